"""MT-Bench's questions as a task: the second question of a conversation follows the model's answer to the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from qwench.evals import context
from qwench.evals.judge_data import mt_bench
from qwench.evals.local_files import Files
from qwench.evals.turns import REQUEST, Turn

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""By category, as MT-Bench's own code has them; all others are greedy."""


def data(**metadata: Any) -> datasets.DatasetDict:
    rows = mt_bench(Files(roots=context.current().data_dirs), None)["test"]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


class TwoTurns(ConfigurableTask):
    def __init__(self, config: dict[str, Any] | None = None) -> None:
        given = {key: value for key, value in (config or {}).items() if key != "class"}
        super().__init__(config={"custom_dataset": data} | given)
        self._system: str | None = None

    def build_all_requests(self, *, system_instruction: str | None = None, **further: Any) -> None:
        self._system = system_instruction
        super().build_all_requests(system_instruction=system_instruction, **further)

    def construct_requests(self, doc: dict[str, Any], ctx: str | list[str], **further: Any) -> list[Instance]:
        temperature = TEMPERATURES.get(doc["category"], 0.0)
        settings = {"do_sample": temperature > 0, "temperature": temperature} | dict(
            self.config.generation_kwargs or {}
        )
        return [
            Instance(
                REQUEST,  # pyright: ignore[reportArgumentType]  # its name is the method of the language model
                doc,
                (
                    ctx if number == 0 else question,
                    settings,
                    Turn(number=number, question=question, system=self._system),
                ),
                number,
                metadata=further["metadata"],
            )
            for number, question in enumerate(doc["turns"])
        ]


def measure(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {
        "answered": float(all(text.strip() for text in results)),
        "characters": sum(map(len, results)) / max(1, len(results)),
    }
