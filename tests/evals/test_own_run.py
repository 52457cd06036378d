"""Every task of ours through the harness with a tiny random model: it runs, and scores are in their range."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from qwench.engine import Engine
from qwench.engine.config import EngineConfig
from qwench.evals.harness import About, Item, Plan, evaluate
from qwench.evals.task_loading import TASKS, Catalogue
from qwench.tokenizer import Tokenizer
from qwench.tools.sandbox import Sandbox, SandboxUnavailable
from qwench.types import SamplingParams

OWN = sorted(path.stem for path in (TASKS / "own").glob("*.yaml"))
MAX_LEN = 2049
"""The context; perplexity by position takes windows of one token less."""
OPTIONS = {"metadata": {"lengths": [2048], "samples": 2}}


@pytest.fixture(scope="module")
def engine(make_model: Callable, tiny_config, tiny_tokenizer: Tokenizer) -> Iterator[Engine]:
    config = EngineConfig(cache_tokens=12_000, max_len=MAX_LEN)
    with Engine(make_model(tiny_config), tokenizer=tiny_tokenizer, config=config) as made:
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row or two of every file, in the benchmarks' forms."""
    root = tmp_path_factory.mktemp("own")
    qas = [{"question": "Who?", "answers": [{"text": "Kell"}]}]
    squad = json.dumps({"data": [{"paragraphs": [{"context": "Kell did. " * 9, "qas": qas}]}]})
    tool = {"name": "f", "description": "d", "parameters": {"type": "dict", "properties": {}, "required": []}}
    asked = {"id": "1", "question": [[{"role": "user", "content": "Hi"}]], "function": [tool]}
    openai = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    files: dict[str, str | list[dict]] = {
        "squad.json": squad,
        "hotpot.json": squad,
        "wikitext2_valid.txt": "The mill stands by the river, and nobody counts.\n" * 300,
        "cruxeval.jsonl": [{"id": "0", "code": "def f(x):\n    return x", "input": "1", "output": "1"}] * 2,
        "fim.jsonl": [
            {"name": n, "language": n, "prompt": "a\n", "suffix": "c\n", "canonical_solution": "b"}
            for n in ("py", "js")
        ],
        "bfcl/BFCL_v4_simple_python.json": [asked, asked],
        "bfcl/BFCL_v4_parallel.json": [asked, asked],
        "bfcl/BFCL_v4_irrelevance.json": [asked, asked],
        "bfcl/possible_answer/BFCL_v4_simple_python.json": [{"id": "1", "ground_truth": [{"f": {}}]}],
        "bfcl/possible_answer/BFCL_v4_parallel.json": [{"id": "1", "ground_truth": [{"f": {}}, {"f": {}}]}],
        "tool_selection.jsonl": [{"query": "q", "tools": [openai], "action": name} for name in ("f", None)],
    }
    for name, rows in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue(families=())


@pytest.mark.parametrize("task", [name for name in OWN if not name.startswith("ruler_") and name != "bfcl"])
def test_a_task_runs(task: str, engine: Engine, data: Path, catalogue: Catalogue, tmp_path: Path) -> None:
    if task.startswith("cruxeval"):
        try:
            Sandbox(workers=1).close()
        except SandboxUnavailable as error:
            pytest.skip(str(error))
    made = task == "ruler" or "custom_dataset" in (TASKS / "own" / f"{task}.yaml").read_text(encoding="utf-8")
    limit = 1 if task in ("ruler", "bits_per_byte") else 2
    item = Item(task=task, overrides=OPTIONS if made else {})
    plan = Plan(items=[item], limit=limit, data_dirs=(data,), generation={"max_gen_toks": 4}, workers=1)
    results = evaluate(engine, plan, tmp_path / "run", catalogue=catalogue)
    scores = results["tasks"][task]
    assert not results["skipped"]
    assert scores["primary"] in scores["metrics"]
    for name, metric in scores["metrics"].items():
        assert 0 <= metric["value"] <= (1 if metric["higher_is_better"] else math.inf), name
    leaves = scores["subtasks"] or [task]
    assert len(leaves) == {"ruler": 13, "cruxeval": 2}.get(task, 1)
    for leaf in leaves:
        lines = (tmp_path / "run" / "samples" / f"{leaf}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == limit
        assert all(json.loads(line)["metrics"] for line in lines)


def test_losses_by_position_add_up_to_the_rolling_one(
    engine: Engine, data: Path, catalogue: Catalogue, tiny_tokenizer: Tokenizer
) -> None:
    """The bins of a window, asked one by one, are the whole window's log-likelihood."""
    plan = Plan(items=[Item(task="perplexity_by_position")], data_dirs=(data,))
    metrics = evaluate(engine, plan, catalogue=catalogue)["tasks"]["perplexity_by_position"]["metrics"]
    tokens = tiny_tokenizer.encode((data / "wikitext2_valid.txt").read_text(encoding="utf-8"))
    length = MAX_LEN - 1
    windows = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    assert len(windows) >= 2
    prompts = [[tiny_tokenizer.eod_id, *window] for window in windows]
    losses: list[float] = []
    for prompt in prompts:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=True, first_logprobs=[prompt[-1]])
        (done,) = engine.generate([prompt[:-1]], params)
        assert done.prompt_logprobs is not None
        assert done.first_logprobs is not None
        losses += [-value for value in done.prompt_logprobs[1:] if value is not None]
        losses.append(-done.first_logprobs[prompt[-1]])
    assert len(losses) == length * len(windows)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert list(metrics) == ["perplexity", *(f"nll_{128 * n}_{128 * n + 128}" for n in range(16))]


@pytest.mark.parametrize("name", ["bfcl_simple", "tool_selection", "tool_selection_react"])
def test_conversations_of_our_own_need_a_template(engine: Engine, data: Path, name: str) -> None:
    bare, plan = About(chat_error="this model has no template"), Plan(items=[Item(task=name)], data_dirs=(data,))
    with pytest.raises(ValueError, match="this model has no template"):
        evaluate(engine, plan, about=bare, catalogue=Catalogue(families=[]))


def test_metrics_of_a_part_of_the_documents_say_how_many(engine: Engine) -> None:
    item = Item(task="tables_en", overrides={"metadata": {"samples": 4}})
    results = evaluate(engine, Plan(items=[item], generation={"max_gen_toks": 2}), catalogue=Catalogue(families=[]))
    entry = results["tasks"]["tables_en"]
    counts = {name: told["n"] for name, told in entry["metrics"].items()}
    kinds = [n for name, n in counts.items() if name not in ("acc", "acc_markdown", "acc_csv", "acc_html")]
    assert counts["acc"] == entry["n"] == sum(kinds) == 4
    assert len(kinds) > 1
