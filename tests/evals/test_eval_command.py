"""`qwench eval`: what the command line accepts, presets and published figures, and the table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwench import cli
from qwench.evals import command, presets
from qwench.evals.harness import Item
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.weights import save_pretrained
from qwench.tokenizer import Tokenizer

SMALL = ["cache_tokens=4096", "max_len=200", "--gen", "max_gen_toks=4"]


@pytest.fixture(scope="module")
def model(
    make_model: Callable[..., CausalLM],
    tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    directory = tmp_path_factory.mktemp("models") / "Qwen2.5-Coder-0.5B-Instruct-tiny"
    save_pretrained(make_model(tiny_config), directory)
    tiny_tokenizer.save(directory)
    return directory


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    from qwench.evals.task_loading import Catalogue

    monkeypatch.setattr(
        "qwench.evals.command._catalogue", lambda include: Catalogue(include, families=("gsm8k", "mmlu/default"))
    )
    monkeypatch.setattr("qwench.evals.task_loading.hub_answers", lambda: False)
    root = tmp_path / "data"
    root.mkdir()
    rows = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(4)]
    (root / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("test", "dev"):
        (root / "mmlu" / split).mkdir(parents=True)
        (root / "mmlu" / split / f"virology_{split}.csv").write_text("Which?,1,2,3,4,B\n" * 5)
    return root


def run(model: Path, *arguments: object) -> int:
    return cli.main(["eval", str(model), *SMALL, *map(str, arguments)])


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from qwench.cli import main\n"
        "try: main(['eval', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'lm_eval', 'datasets', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for option in (
        "--tasks",
        "--limit",
        "--data-dir",
        "--preset",
        "--compare",
        "--num-fewshot",
        "--apply-chat-template",
    ):
        assert option in done.stdout


def test_a_run_prints_scores_beside_published_ones(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(command.DATA_VARIABLE, str(data))
    arguments = ["--preset", "qwen2.5-coder-instruct", "--tasks", "gsm8k,mmlu", "--limit", 2, "--out", tmp_path / "run"]
    assert run(model, *arguments, "--compare") == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["preset"] == "qwen2.5-coder-instruct"
    assert results["model"]["name"] == model.name
    assert results["model"]["parameters"] > 0
    assert results["model"]["hash"].startswith("sampled-sha256:")
    assert results["engine"]["device"] == "cpu"
    assert results["engine"]["config"]["cache_tokens"] == 4096
    gsm8k = results["tasks"]["gsm8k"]
    assert gsm8k["published"]["value"] == 49.6
    assert gsm8k["published"]["model"] == "Qwen2.5-0.5B-Instruct"
    assert gsm8k["setting"]["chat"] is True
    prompt = gsm8k["setting"]["first_prompt"]
    assert prompt.endswith("put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n")
    mmlu = results["tasks"]["mmlu"]
    assert mmlu["published"] | {"source": "", "note": ""} == {
        "value": 42.0, "model": "Qwen2.5-Coder-0.5B", "same_model": False, "preset": "qwen2.5-coder-instruct",
        "source": "", "note": "", "same_setting": True,
    }  # fmt: skip
    first = results["tasks"]["mmlu_virology"]["setting"]
    assert first["num_fewshot"] == 5
    assert first["first_prompt"].count("Question: Which?\nA. 1\n") == 6
    assert "49.6" in shown
    assert "virology" not in shown.split("note on")[0], "members of groups are not in the table"
    assert "left out 56 tasks" in shown
    assert "note on mmlu: published for the base model (5-shot)" in shown
    assert f"{100 * gsm8k['metrics']['accuracy']['value'] - 49.6:+.1f}" in shown
    assert run(model, *arguments) == 0
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["tasks"]["gsm8k"]["tokens"]["resumed"] == 2
    assert again["tasks"]["gsm8k"]["metrics"] == gsm8k["metrics"]


def test_options_reach_the_prompt(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["--tasks", "gsm8k_instruct,mmlu_virology", "--limit", 1, "--data-dir", data, "--out", tmp_path / "run"]
    further = [
        "--system",
        "Answer briefly.",
        "--apply-chat-template",
        "--num-fewshot",
        2,
        "--no-fewshot-as-multiturn",
        "--seed",
        7,
    ]
    assert run(model, *arguments, *further) == 0
    tasks = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]
    prompt = tasks["mmlu_virology"]["setting"]["first_prompt"]
    assert prompt.startswith("<|im_start|>system\nAnswer briefly.")
    assert prompt.count("<|im_start|>user") == 1
    assert prompt.count("Which?") == 3
    assert tasks["gsm8k_instruct"]["setting"]["num_fewshot"] == 0, "the task is zero-shot by definition"
    assert tasks["gsm8k_instruct"]["setting"]["generation"]["max_gen_toks"] == 4
    assert tasks["mmlu_virology"]["setting"]["seed"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which tasks? give --tasks A,B or --preset NAME"),
        (["--tasks", "gsm9k"], "there is no task 'gsm9k'; did you mean gsm8k"),
        (["--preset", "qwen2.5-codr"], "there is no preset 'qwen2.5-codr'; did you mean qwen2.5-coder?"),
        (["--preset", "qwen2.5", "--tasks", "glue"], "preset qwen2.5 has no task 'glue'; it has mmlu"),
        (["--tasks", "gsm8k", "--limit", "0"], "--limit is 0; give a positive number"),
        (["--tasks", "gsm8k", "--limit", "inf"], "--limit is inf; give a positive number"),
        (["--tasks", "gsm8k", "--limit", "nan"], "--limit is nan; give a positive number"),
        (["--tasks", "gsm8k", "--limit", "2.5"], "--limit is 2.5; give a positive number"),
        (["--tasks", "no/file.yaml"], "there is no file no/file.yaml"),
        (["--tasks", "gsm8k", "--num-fewshot", "0", "--gen", "temperature=warm"], "temperature is 'warm'"),
        (["--tasks", "gsm8k", "--num-fewshot", "0", "--gen", "max_gen_toks=many"], "max_gen_toks is 'many'"),
        (["--tasks", "gsm8k", "--gen", "hot"], "--gen 'hot' should be key=value"),
        (
            ["--tasks", "gsm8k", "--num-fewshot", "0", "--gen", "beams=3"],
            "generation setting 'beams' is not understood",
        ),
        (["--tasks", "gsm8k", "--batch", "0"], "--batch is 0; give at least 1"),
        (["--tasks", "gsm8k", "--data-dir", "nowhere"], "--data-dir nowhere is no directory"),
        (["--tasks", "gsm8k", "--compare", "Llama-7B"], "no published figures are known for Llama-7B"),
        (["--tasks", "gsm8k", "--metadata", "[1]"], "--metadata should be a JSON object"),
        (["--tasks", "gsm8k", "max_seqz=3"], "max_seqz"),
        (["--tasks", "ifeval"], "there is no task 'ifeval'"),
        (["--tasks", "math500_instruct"], "no file math500*.jsonl"),
        (["--tasks", "gsm8k", "--baseline", "nowhere"], "--baseline nowhere is no run"),
        (["--tasks", "mmlu_virology", "--num-fewshot", "9"], "9 worked examples are asked for, there are 5"),
    ],
)
def test_mistakes_are_one_line(
    model: Path, data: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    defaults = {"--data-dir": data, "--limit": 1, "--out": tmp_path / "run"}
    given = [part for name, value in defaults.items() if name not in arguments for part in (name, value)]
    assert run(model, *arguments, *given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_model_without_a_chat_template_is_refused_where_one_is_needed(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    arguments = ["--tasks", "gsm8k_instruct", "--limit", 1, "--data-dir", data, "--out", tmp_path / "run"]
    assert run(bare, *arguments) == 2
    assert "came without a chat template that is known" in capsys.readouterr().err
    assert run(bare, *arguments, "--chat-format", "qwen2") == 0


def test_results_of_another_model_are_not_overwritten(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "results.json").write_text(json.dumps({"model": {"name": "other", "hash": "x"}}))
    assert run(model, "--tasks", "gsm8k", "--limit", 1, "--data-dir", data, "--out", out, "--num-fewshot", 0) == 2
    assert "has results of other, another model" in capsys.readouterr().err


def test_a_preset_leaves_out_what_has_no_data_here(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwench.evals.task_loading.hub_answers", lambda: False)
    path = tmp_path / "mine.toml"
    path.write_text('about = "x"\n[tasks.gsm8k]\ntask = "gsm8k_instruct"\n[tasks.plus]\ntask = "humaneval_plus"\n')
    arguments = ["--preset", path, "--data-dir", data, "--limit", 1, "--out", tmp_path / "run"]
    assert run(model, *arguments) == 0
    assert "left out 1 tasks (plus): task humaneval_plus: no file HumanEvalPlus.jsonl" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (list(results["tasks"]), list(results["skipped"]), results["complete"]) == (["gsm8k"], ["plus"], True)
    assert run(model, *arguments, "--tasks", "plus") == 2  # one that is asked for by name
    assert "no file HumanEvalPlus.jsonl" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(model, "--preset", path, "--data-dir", tmp_path / "empty", "--out", tmp_path / "none") == 2
    assert "no task has its data here: task gsm8k_instruct: no file gsm8k_test" in capsys.readouterr().err


def test_figures_follow_the_models_name() -> None:
    coder = presets.load("qwen2.5-coder-instruct")
    name = coder.model_named("qwen2.5-coder-0.5b-instruct-q4_k_m")
    assert name == "Qwen2.5-Coder-0.5B-Instruct"
    told = coder.figure("humaneval", name)
    assert told is not None
    assert (told["value"], told["same_model"]) == (61.6, True)
    family = coder.figure("ifeval", name)
    assert family is not None
    assert (family["value"], family["model"], family["same_model"]) == (27.9, "Qwen2.5-0.5B-Instruct", False)
    assert coder.figure("cmmlu", name) is None
    found = {
        name: presets.of_model(name) for name in ("Qwen/Qwen2.5-7B", "qwen2-1.5b-instruct", "Qwen2.5-Coder-7B", "gpt")
    }
    assert [preset.name if preset else None for preset in found.values()] == [
        "qwen2.5",
        "qwen2-instruct",
        "qwen2.5-coder",
        None,
    ]


def test_code_is_asked_of_published_chat_models_as_published(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = command._catalogue(())
    items = [Item(task=name) for name in ("humaneval", "mbpp_plus", "cruxeval_o", "fim", "mmlu_virology")]
    found, names = command.code_as_published(items, "qwen2.5-coder-0.5b-instruct-q4_k_m", catalogue)
    assert names == ["humaneval", "mbpp_plus", "cruxeval_o"]
    assert [item.task for item in found[:3]] == ["humaneval_instruct", "mbpp_plus_instruct", "cruxeval_o_cot"]
    assert found[3:] == items[3:]
    for other in ("Qwen2.5-Coder-0.5B", "my-model"):
        assert command.code_as_published(items, other, catalogue) == (items, [])
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    return 1"}
    (data / "humaneval.jsonl").write_text(json.dumps({**row, "test": "def check(f):\n    assert f() == 1\n"}) + "\n")
    arguments = ["--tasks", "humaneval", "--data-dir", data, "--out"]
    settings = []
    for out, more in (("chat", []), ("text", ["--preset", "none"]), ("told", ["--no-apply-chat-template"])):
        assert run(model, *arguments, tmp_path / out, *more) == 0
        assert ("humaneval as published for this model" in capsys.readouterr().err) is (out == "chat")
        settings.append(json.loads((tmp_path / out / "results.json").read_text())["tasks"]["humaneval"]["setting"])
    assert [setting["chat"] for setting in settings] == [True, False, False]
    assert settings[0]["first_prompt"].endswith("<|im_start|>assistant\n```python\n")
    assert settings[1]["first_prompt"] == settings[2]["first_prompt"] == "def f():\n"


def test_the_preset_of_a_known_model_is_named() -> None:
    items = [Item(task="humaneval"), Item(task="gsm8k_instruct"), Item(task="needle_en")]
    assert command.preset_hint(items, "qwen2.5-coder-0.5b-instruct-q4_k_m").endswith(
        "published scores of Qwen2.5-Coder-0.5B-Instruct: --preset qwen2.5-coder-instruct --tasks humaneval,gsm8k"
    )
    assert command.preset_hint(items[2:], "Qwen2.5-7B") == ""
    assert command.preset_hint(items, "my-model") == ""


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "qwen2.5"\nabout = "mine"\n[tasks.gsm8k]\ntask = "gsm8k"\nnum_fewshot = 3\n')
    mine = presets.load(str(path))
    assert mine.item("gsm8k").num_fewshot == 3
    assert mine.published["Qwen2.5-7B"]["gsm8k"] == 85.4
    path = tmp_path / "bad.toml"
    path.write_text("[tasks.x]\ntask = 1\nshots = 3\n")
    with pytest.raises(ValueError, match=r"bad\.toml: tasks\.x has the unknown key 'shots'"):
        presets.load(str(path))


def test_generation_settings_are_read() -> None:
    given = ["temperature=0.7,top_p=0.8", 'until=["a, b=","c"]', "do_sample=True", "name=text"]
    assert command.generation_settings(given) == {
        "temperature": 0.7, "top_p": 0.8, "until": ["a, b=", "c"], "do_sample": True, "name": "text",
    }  # fmt: skip


def test_broken_data_are_told_before_a_model_is_loaded(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "gsm8k_test.jsonl").write_text('{"question": "q"}\n')
    assert cli.main(["eval", "no-such-model", "--tasks", "gsm8k", "--data-dir", str(data)]) == 2
    assert "gsm8k_test.jsonl line 1 has no field 'answer'" in capsys.readouterr().err


def test_repeats_that_say_nothing_are_told(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tasks", "gsm8k_instruct", "--limit", 1, "--data-dir", data, "--repeats", 2, "--out"]
    assert run(model, *arguments, tmp_path / "greedy") == 0
    assert "note on gsm8k_instruct: greedy: all 2 answers to a question are the same" in capsys.readouterr().out
    assert run(model, *arguments, tmp_path / "sampled", "--gen", "temperature=0.8") == 0
    assert "2 answers to each question were made, but this task scores the first alone" in capsys.readouterr().out
