"""Every task of every preset through the harness with a tiny random model: each has its score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from qwench.engine import Engine
from qwench.engine.config import EngineConfig
from qwench.evals import presets
from qwench.evals.harness import Item, Plan, evaluate
from qwench.evals.task_loading import Catalogue
from qwench.tokenizer import Tokenizer
from qwench.tools.sandbox import Sandbox, SandboxUnavailable

FAMILIES = (
    "mmlu", "mmlu_pro", "cmmlu", "ceval", "bbh/cot_fewshot", "ifeval", "minerva_math", "arc", "hellaswag", "winogrande",
    "truthfulqa", "super_glue", "piqa", "commonsense_qa", "lambada",
)  # fmt: skip
FROM_THE_HUB = {"truthfulqa_mc2"}


def unlike_items() -> list[Item]:
    """The items of all presets, those that are told alike once."""
    found: dict[str, Item] = {}
    for preset in map(presets.load, presets.names()):
        for label in preset.tasks:
            item = preset.item(label)
            found.setdefault(repr((item.task, item.overrides, item.metric, item.chat, item.num_fewshot)), item)
    return list(found.values())


@pytest.fixture(scope="module")
def engine(make_model: Callable, tiny_config, tiny_tokenizer: Tokenizer) -> Iterator[Engine]:
    config = EngineConfig(cache_tokens=12_000, max_len=2048)
    with Engine(make_model(tiny_config), tokenizer=tiny_tokenizer, config=config) as made:
        yield made


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue(families=FAMILIES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every file, in the benchmarks' forms; two subjects of MMLU, so that there is something to average."""
    root = tmp_path_factory.mktemp("data")
    maths = {"question": "What is 1 + 1?", "answer": "It is $\\boxed{2}$.\n#### 2"}
    plus = {
        "task_id": "Mbpp/8", "prompt": '"""\nSays x.\nassert f(1) == 1\n"""\n', "entry_point": "f", "base_input": [[1]],
        "canonical_solution": "def f(x):\n    return x", "plus_input": [[2]], "atol": 0, "contract": "",
        "assertion": "assert f(1) == 1",
    }  # fmt: skip
    js = {
        "name": "HumanEval_0_f", "language": "js", "prompt": "function f(){\n", "stop_tokens": ["\nfunction "],
        "tests": "const assert = require('node:assert');\n assert.equal(f(), 1);\n",
    }  # fmt: skip
    options = {"question": "Which?", "options": ["x", "y"], "answer": "B", "answer_index": 1, "category": "law"}
    files: dict[str, object] = {
        "cmmlu/test/arts.csv": ",Question,A,B,C,D,Answer\n0,问？,一,二,三,四,D\n",
        "cmmlu/dev/arts.csv": ",Question,A,B,C,D,Answer\n" + "0,问？,一,二,三,四,D\n" * 5,
        "ceval/val/law_val.csv": "id,question,A,B,C,D,answer\n0,问？,一,二,三,四,D\n",
        "ceval/dev/law_dev.csv": "id,question,A,B,C,D,answer,explanation\n" + "0,问？,一,二,三,四,D,因\n" * 5,
        "icl/arc_easy.jsonl": [{"query": "Question: Why?", "choices": ["x", "y"], "gold": 1}],
        "icl/piqa.jsonl": [{"query": "Question: How?", "choices": ["so", "or so"], "gold": 1}],
        "icl/boolq.jsonl": [{"query": "Passage: P.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1}],
        "icl/commonsense_qa.jsonl": [{"query": "Question: Where?\nChoices:\nA. a\nB. b\nAnswer:", "gold": 1}],
        "icl/lambada_openai.jsonl": [{"context": "To the", "continuation": " end"}],
        "mmlu_pro.jsonl": [options] * 2,
        "bbh/snarks.json": json.dumps({"examples": [{"input": "Which?", "target": "(A)"}] * 2}),
        "gsm8k_test.jsonl": [maths] * 2,
        "gsm8k_train.jsonl": [maths] * 8,
        "math500.jsonl": [maths] * 2,
        "arc_challenge.jsonl": [{"query": "Question: Why?", "choices": ["x", "y"], "gold": 1}] * 300,
        "hellaswag.jsonl": [{"ctx": f"A: b {n}. c", "endings": ["a", "b"], "label": 0} for n in range(100)],
        "winogrande.jsonl": [
            {"context_options": ["Ann beat Bo as Ann", "Ann beat Bo as Bo"], "continuation": f"ran {n}.", "gold": 0}
            for n in range(60)
        ],
        "ifeval.jsonl": [
            {"key": 1, "prompt": "Hi", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        ],
        "humaneval.jsonl": [
            {
                "task_id": "HumanEval/0", "prompt": 'def f():\n    """One."""\n', "entry_point": "f",
                "canonical_solution": "    return 1", "test": "def check(candidate):\n    assert candidate() == 1\n",
            }
        ],
        "HumanEvalPlus.jsonl": [
            {**plus, "task_id": "HumanEval/0", "prompt": "def f(x):\n", "canonical_solution": "    return x"}
        ],
        "MbppPlus.jsonl": [plus],
        "mbpp.jsonl": [
            {"task_id": n, "text": "Says.", "code": "def f(): pass", "test_list": ["assert f() == 1"] * 3}
            for n in range(16)
        ],
        "humaneval_js.jsonl": [js],
        "cruxeval.jsonl": [{"id": "0", "code": "def f(x):\n    return x", "input": "1", "output": "1"}],
        "fim.jsonl": [
            {"name": "a", "language": "py", "prompt": "a\n", "suffix": "c\n", "canonical_solution": "b"}
        ],
    }  # fmt: skip
    for subject in ("virology", "astronomy"):
        for split in ("test", "dev"):
            files[f"mmlu/{split}/{subject}_{split}.csv"] = "Which?,1,2,3,4,B\n" * 5
    for name, rows in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)  # pyright: ignore[reportGeneralTypeIssues]
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("item", unlike_items(), ids=lambda item: f"{item.task}-{item.metric}")
def test_a_task_of_a_preset_has_its_score(item: Item, engine: Engine, data: Path, catalogue: Catalogue) -> None:
    if item.task in FROM_THE_HUB:
        pytest.skip("no local form of its data")
    if item.task.startswith(("humaneval", "mbpp", "multipl_e", "cruxeval")):
        if "_js" in item.task and shutil.which("node") is None:
            pytest.skip("JavaScript needs node")
        try:
            Sandbox(workers=1).close()
        except SandboxUnavailable as error:
            pytest.skip(str(error))
    plan = Plan(items=[item], limit=1, data_dirs=(data,), generation={"max_gen_toks": 4}, workers=1)
    entry = evaluate(engine, plan, catalogue=catalogue)["tasks"][item.label or item.task]
    assert entry["primary"] in entry["metrics"]
    assert not item.metric or entry["primary"].startswith(item.metric)
    assert 0 <= entry["metrics"][entry["primary"]]["value"] <= 1
    assert entry["n"] == {"mmlu": 2, "mmlu_generative": 2}.get(item.task, 1)


def test_presets_name_tasks_that_exist_and_figures_of_their_tasks(catalogue: Catalogue) -> None:
    for preset in map(presets.load, presets.names()):
        assert preset.about
        assert preset.source
        for label in preset.tasks:
            assert preset.item(label).task in catalogue.index
        for model, figures in preset.published.items():
            assert all(0 < value < 100 for value in figures.values()), model
            assert set(figures) <= set(preset.tasks), model
        for model, others in preset.relatives.items():
            assert model in preset.published
            assert set(others) <= set(preset.published)
