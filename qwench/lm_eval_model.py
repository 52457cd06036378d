"""The engine as the model "qwench" of lm-eval's own command and functions.

    python -m qwench.lm_eval_model run --model qwench --model_args pretrained=PATH,dtype=bfloat16 --tasks hellaswag

    import qwench.lm_eval_model
    lm_eval.simple_evaluate(model="qwench", model_args="pretrained=PATH", tasks=["hellaswag"])

`qwench eval` is the same harness with local data, presets, the sandbox, settings beside the scores, and resuming.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model

from qwench.evals.lm import EngineLM
from qwench.evaluate import load_engine, template_error


@register_model("qwench")
class QwenchLM(EngineLM):
    """`pretrained`, `tokenizer`, `device`, `dtype`, `chat_format` and `max_length` as `qwench eval` has them; all other
    arguments are settings of the engine (`max_seqs=64`). The engine fills its batches by itself: `batch_size`, which
    lm-eval always passes, has no effect."""

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        tokenizer: str | None = None,
        chat_format: str | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        """Raises ValueError for an unknown setting, and FileNotFoundError or ValueError for a model that is none."""
        given = [f"{name}={value}" for name, value in settings.items()]
        opened = load_engine(pretrained, device or "auto", dtype, tokenizer, chat_format, given)
        super().__init__(opened, max_length=max_length, chat_error=template_error(opened, pretrained))
        self.opened = opened

    def close(self) -> None:
        self.opened.close()


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
