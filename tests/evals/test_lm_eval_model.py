"""The engine registered with lm-eval: its own functions run on it and give what the Hugging Face backend gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")


TASKS = """
task: which_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
num_fewshot: 0
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: ["red", "blue"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
TEXT = """output_type: generate_until
doc_to_target: red
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"Which colour has the {thing}?", "answer": n % 2} for n, thing in enumerate(("sky", "sea", "sun"))
    ]
    (root / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, more in (("choice", CHOICE), ("text", TEXT)):
        (root / f"{kind}.yaml").write_text(TASKS.format(kind=kind, file=root / "rows.json") + more)
    return root


def test_lm_eval_finds_the_engine_by_name(tiny_model_dir: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import qwench.lm_eval_model  # noqa: F401 - what registers it

    def samples(model: str, arguments: str) -> Any:
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        names: list[Any] = ["which_choice", "which_text"]
        found = lm_eval.simple_evaluate(
            model, arguments, tasks=names, task_manager=manager, device="cpu", bootstrap_iters=0, batch_size=1
        )
        assert found is not None
        return found["samples"]

    mine = samples("qwench", f"pretrained={tiny_model_dir},dtype=float32,max_len=512,cache_tokens=2048")
    theirs = samples("hf", f"pretrained={tiny_model_dir},dtype=float32")
    for ours, other in zip(mine["which_choice"], theirs["which_choice"], strict=True):
        for (value, greedy), (wanted, told) in zip(ours["filtered_resps"], other["filtered_resps"], strict=True):
            assert (float(value), greedy) == (pytest.approx(float(wanted), abs=1e-3), told)
    texts = [[row["resps"] for row in run["which_text"]] for run in (mine, theirs)]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="max_seqz"):
        samples("qwench", f"pretrained={tiny_model_dir},max_seqz=3")
