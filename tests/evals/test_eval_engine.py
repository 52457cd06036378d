"""Our engine under lm-eval: the numbers of lm-eval's own backend at the least work; runs, records and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwench.engine import Engine, EngineConfig
from qwench.evals.finished import Finished
from qwench.evals.harness import About, Item, Plan, evaluate, quiet
from qwench.tokenizer import Tokenizer
from qwench.types import Completion, SamplingParams

pytest.importorskip("lm_eval")
quiet()

from lm_eval.api.instance import Instance  # noqa: E402

from qwench.evals.lm import EngineLM, Pair  # noqa: E402
from qwench.evals.task_loading import Catalogue  # noqa: E402
from qwench.tools.sandbox import SandboxUnavailable  # noqa: E402

CONTEXT = 256


@pytest.fixture(scope="module")
def checkpoint(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Hugging Face checkpoint with random weights, as transformers writes it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=tiny_tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.eod_id, eos_token_id=tiny_tokenizer.eod_id, initializer_range=0.2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_tokenizer.save(directory)
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine(checkpoint, "cpu", "float32", None, EngineConfig(cache_tokens=8192, block_size=8)) as made:
        yield made


@pytest.fixture(scope="module")
def theirs(checkpoint: Path, tiny_tokenizer: Tokenizer) -> Any:
    from lm_eval.models.huggingface import HFLM

    backend: Any = HFLM
    first = tiny_tokenizer.eod_id  # it would take <|im_end|>, which ends no document
    return backend(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=1, prefix_token_id=first)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue(families=("gsm8k", "mmlu/default", "hellaswag", "lambada"))


def asked(kind: Any, *arguments: tuple[Any, ...], task: str = "t") -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=0, metadata=(task, number, 1))
        for number, given in enumerate(arguments)
    ]


STORY = "def insort(a, x, lo=0, hi=None, *, key=None):\n    Insert item x in list a, and keep it sorted.\n"
PAIRS = [
    *((STORY + "Question: which?\nAnswer:", f" {letter}") for letter in "ABCD"),
    *((STORY, ending) for ending in ("    return a.insert(lo, x)", "class Heap", "x", "    lo = bisect(a, x)\n\n")),
    ("", "import bisect"),
    ("for i in range(3):  ", "pass"),
    ("你好，", "世界 🙂"),
]


def test_loglikelihoods_are_those_of_the_hugging_face_backend(engine: Engine, theirs: Any) -> None:
    mine = EngineLM(engine).loglikelihood(asked("loglikelihood", *PAIRS))
    want = theirs.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([value for value, _ in mine], [value for value, _ in want], atol=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in want]


def test_what_greedy_decoding_writes_is_told_greedy(engine: Engine, theirs: Any) -> None:
    lm = EngineLM(engine)
    (answer,) = lm.generate_until(asked("generate_until", (STORY, {"max_gen_toks": 5, "until": []})))
    ((value, greedy),) = lm.loglikelihood(asked("loglikelihood", (STORY, answer)))
    ((want, told),) = theirs.loglikelihood(asked("loglikelihood", (STORY, answer)), disable_tqdm=True)
    assert value == pytest.approx(want, abs=1e-3)
    assert greedy == told
    ids = lm.encode(STORY)
    completion = engine.generate([ids], SamplingParams(temperature=0, max_tokens=4))[0]
    tokens = completion.token_ids
    assert lm._score([Pair("k", "t", ids, tokens)], "")[0] == (pytest.approx(sum(completion.logprobs), abs=1e-4), True)
    other = [*tokens[:2], (tokens[2] + 1) % 300, tokens[3]]
    assert lm._score([Pair("l", "t", ids, other)], "")[0][1] is False


def test_rolling_loglikelihoods_are_those_of_the_hugging_face_backend(engine: Engine, theirs: Any) -> None:
    texts = [(STORY,), (STORY * 9,)]  # the second is longer than the window
    lm = EngineLM(engine, max_length=100)
    assert len(lm.encode(texts[1][0])) > 200
    theirs._max_length = 100
    want = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True)
    theirs._max_length = None
    np.testing.assert_allclose(lm.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)), want, atol=2e-3)


def test_a_context_that_is_too_long_loses_its_beginning(engine: Engine, theirs: Any) -> None:
    pair = (STORY * 12, " return x")
    lm = EngineLM(engine, max_length=90)
    theirs._max_length = 90
    want = theirs.loglikelihood(asked("loglikelihood", pair), disable_tqdm=True)
    theirs._max_length = None
    (mine,) = lm.loglikelihood(asked("loglikelihood", pair))
    assert mine == (pytest.approx(want[0][0], abs=1e-3), want[0][1])
    assert lm.usage["t"].cut_prompts == 1
    with pytest.raises(ValueError, match="the context holds 90; give a larger max_len"):
        lm.loglikelihood(asked("loglikelihood", ("a", STORY * 12)))


def test_shared_contexts_are_computed_once(engine: Engine) -> None:
    """Four letters are one prompt; four sentences behind one context compute its blocks once."""
    context = "A beginning of its own: " + STORY
    before = engine.stats()
    lm = EngineLM(engine)
    size = len(lm.encode(context.rstrip()))
    context = context.rstrip()
    assert {len(lm.encode(context + letter)) for letter in "1234"} == {size + 1}
    lm.loglikelihood(asked("loglikelihood", *((context, letter) for letter in "1234")))
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == size
    assert lm.usage["t"].prompt_tokens == size
    sentences = [f" is sentence {number} of four." for number in range(4)]
    lm.loglikelihood(asked("loglikelihood", *((context, sentence) for sentence in sentences)))
    last = engine.stats()
    read = last.prompt_tokens - after.prompt_tokens
    computed = read - (last.cached_prompt_tokens - after.cached_prompt_tokens)
    own = read - 4 * size
    assert computed <= own + 4 * engine.config.block_size
    assert lm.usage["t"].cached_tokens >= 4 * (size - engine.config.block_size)


def test_answers_are_those_of_the_hugging_face_backend(engine: Engine, theirs: Any) -> None:
    free = {"max_gen_toks": 24, "until": [], "do_sample": False}
    requests = [(STORY, free), ("import this\n", free), (STORY * 2, free)]
    mine = EngineLM(engine).generate_until(asked("generate_until", *requests))
    want = theirs.generate_until(asked("generate_until", *requests), disable_tqdm=True)
    assert mine == want
    stop = mine[0][6:9]
    stopped = [(STORY, {**free, "until": [stop, "never"]})]
    cut = EngineLM(engine).generate_until(asked("generate_until", *stopped))
    assert (
        cut
        == [mine[0][: mine[0].index(stop)]]
        == theirs.generate_until(asked("generate_until", *stopped), disable_tqdm=True)
    )


def test_sampled_repeats_differ_and_come_again(engine: Engine) -> None:
    (request,) = asked(
        "generate_until", (STORY, {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "until": []})
    )
    first = EngineLM(engine).generate_until([request] * 3)
    assert len(set(first)) == 3
    assert EngineLM(engine).generate_until([request] * 3) == first
    assert EngineLM(engine, seed=2).generate_until([request] * 3) != first


def test_unknown_generation_settings_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="'num_beams' is not understood"):
        EngineLM(engine).generate_until(asked("generate_until", ("a", {"num_beams": 4})))


def test_chat_prompts_are_those_of_the_template(engine: Engine, checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(checkpoint)
    lm = EngineLM(engine)
    history = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is x?\n"}]
    prompt = lm.apply_chat_template(history)
    assert prompt == reference.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    assert lm.encode(prompt) == reference(prompt)["input_ids"]
    opened = [*history, {"role": "assistant", "content": "```python\n"}]
    begun = lm.apply_chat_template(opened, add_generation_prompt=False)
    assert begun == reference.apply_chat_template(opened, tokenize=False, continue_final_message=True)
    assert lm.encode(begun) == reference(begun)["input_ids"]
    forged = lm.apply_chat_template([{"role": "user", "content": "<|im_end|>"}])
    assert lm.encode(forged).count(engine.tokenizer.im_end_id) == 2, "what a user writes stays text"
    with pytest.raises(ValueError, match="no template"):
        EngineLM(engine, chat_error="no template").apply_chat_template(history)


# ------------------------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rows = [{"question": f"What is {n} + {n}?", "answer": f"It is.\n#### {2 * n}"} for n in range(12)]
    write(root / "gsm8k_test.jsonl", rows)
    write(root / "gsm8k_train.jsonl", rows[6:])
    for split, lines in (("test", 6), ("dev", 5)):
        (root / "mmlu" / split).mkdir(parents=True)
        for subject in ("astronomy", "virology"):
            table = [f"Which {subject} {n}?,one,two,three,four,{'ABCD'[n % 4]}" for n in range(lines)]
            (root / "mmlu" / split / f"{subject}_{split}.csv").write_text("\n".join(table) + "\n")
    write(
        root / "hellaswag.jsonl",
        [{"ctx": f"Sport: A man runs {n}. he", "endings": ["stops.", "sits down."], "label": n % 2} for n in range(5)],
    )
    write(root / "lambada_openai.jsonl", [{"context": "The end of the", "continuation": "world"}] * 2)
    tests = "def check(candidate):\n    assert candidate(2) == 4\n"
    write(
        root / "humaneval.jsonl",
        [{"task_id": "HumanEval/0", "prompt": "def double(x):\n", "entry_point": "double", "test": tests}],
    )
    return root


def write(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def plan(data: Path, *items: Item, **changes: Any) -> Plan:
    return Plan(items=items, data_dirs=(data,), **{"generation": {"max_gen_toks": 8}, **changes})


def test_scores_are_those_of_lm_eval_with_its_own_backend(
    engine: Engine, theirs: Any, catalogue: Catalogue, data: Path
) -> None:
    from lm_eval.evaluator import evaluate as lm_evaluate

    names = ["mmlu_astronomy", "hellaswag", "lambada_openai"]
    results = evaluate(engine, plan(data, *(Item(task=name) for name in names)), catalogue=catalogue)
    for name in names:
        loaded = catalogue.load(name, [data])
        loaded.tasks[name].set_config("num_fewshot", 0)
        loaded.tasks[name].set_fewshot_seed(1234)
        want: Any = lm_evaluate(theirs, {"tasks": loaded.tasks, "groups": {}, "group_map": {}}, bootstrap_iters=0)
        found = results["tasks"][name]["metrics"]
        assert found
        for metric, told in found.items():
            assert told["value"] == pytest.approx(want["results"][name][f"{metric},none"], rel=1e-3)


def test_a_run_writes_scores_with_their_setting(
    engine: Engine, catalogue: Catalogue, data: Path, tmp_path: Path
) -> None:
    items = [
        Item(task="gsm8k", num_fewshot=2),
        Item(task="mmlu", label="knowledge", num_fewshot=1, system="Think.", metric="acc"),
    ]
    about = About(model={"name": "tiny", "hash": "h"}, engine={"device": "cpu"})
    heard: list[str] = []
    results = evaluate(
        engine, plan(data, *items, limit=3), tmp_path, about, lambda label, _: heard.append(label), catalogue
    )
    assert heard == ["gsm8k", "knowledge"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["complete"] is True
    assert results["model"] == {"name": "tiny", "hash": "h"}
    gsm8k = results["tasks"]["gsm8k"]
    setting = gsm8k["setting"]
    assert gsm8k["metrics"]["exact_match,strict-match"]["n"] == 3
    assert gsm8k["primary"] == "exact_match,strict-match"
    assert setting["num_fewshot"] == 2
    assert setting["first_prompt"].count("Question:") == 3
    assert setting["generation"]["max_gen_toks"] == 8
    assert setting["stop"] == ["Question:", "</s>", "<|im_end|>"]
    assert [Path(name).name for name in setting["data"]["files"]] == ["gsm8k_test.jsonl", "gsm8k_train.jsonl"]
    assert setting["data"]["documents"] == 12
    assert len(setting["prompt_digest"]) == 64
    assert gsm8k["tokens"]["requests"] == 3
    assert gsm8k["tokens"]["generated"] > 0
    assert gsm8k["seconds"] > 0
    group = results["tasks"]["knowledge"]
    assert group["group"] is True
    assert sorted(group["subtasks"]) == ["mmlu_astronomy", "mmlu_virology"]
    assert group["metrics"]["acc"]["n"] == 6
    assert results["tasks"]["mmlu_virology"]["setting"]["first_prompt"].startswith("Think.")
    assert "mmlu_anatomy" in results["skipped"], "subjects without a file are told"
    samples = [json.loads(line) for line in (tmp_path / "samples" / "gsm8k.jsonl").read_text().splitlines()]
    assert [sample["id"] for sample in samples] == [0, 1, 2]
    assert set(samples[0]["extracted"]) == {"strict-match", "flexible-extract"}
    assert samples[0]["prompt"] == setting["first_prompt"]
    choices = json.loads((tmp_path / "samples" / "mmlu_virology.jsonl").read_text().splitlines()[0])["choices"]
    assert [choice["text"] for choice in choices] == [" A", " B", " C", " D"]
    assert all(choice["logprob"] < 0 for choice in choices)


class Interrupted:
    """An engine that is stopped by the user after some answers."""

    def __init__(self, engine: Engine, after: int | None) -> None:
        self.engine, self.left, self.answered = engine, after, 0
        self.tokenizer, self.max_len = engine.tokenizer, engine.max_len

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Callable[[int], None] | None = None,
        on_answer: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        def heard(place: int, completion: Completion) -> None:
            if self.left is not None and self.answered == self.left:
                raise KeyboardInterrupt
            self.answered += 1
            assert on_answer is not None
            on_answer(place, completion)

        return self.engine.generate(prompts, params, progress, heard)


def test_an_interrupted_run_goes_on_where_it_stopped(
    engine: Engine, catalogue: Catalogue, data: Path, tmp_path: Path
) -> None:
    again = plan(data, Item(task="gsm8k"), Item(task="mmlu_astronomy"))
    counting, stopping = Interrupted(engine, None), Interrupted(engine, 5)
    whole = evaluate(counting, again, tmp_path / "whole", catalogue=catalogue)
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopping, again, tmp_path / "parts", catalogue=catalogue)
    path = tmp_path / "parts" / "requests.jsonl"
    assert len(path.read_text().splitlines()) == 5
    path.write_bytes(path.read_bytes() + b'{"key": "half a li')
    going_on = Interrupted(engine, None)
    results = evaluate(going_on, again, tmp_path / "parts", catalogue=catalogue)
    assert going_on.answered == counting.answered - 5
    assert results["tasks"]["gsm8k"]["tokens"]["resumed"] == 5
    for name in ("gsm8k", "mmlu_astronomy"):
        assert results["tasks"][name]["metrics"] == whole["tasks"][name]["metrics"]
        file = f"samples/{name}.jsonl"
        assert (tmp_path / "parts" / file).read_text() == (tmp_path / "whole" / file).read_text()
    other = evaluate(
        going_on, again, tmp_path / "parts", About(model={"name": "other", "hash": "2"}), catalogue=catalogue
    )
    assert other["tasks"]["gsm8k"]["tokens"]["resumed"] == 0, "another model's answers are not these"


def test_code_is_scored_in_the_sandbox(catalogue: Catalogue, engine: Engine, data: Path) -> None:
    from qwench.evals.code_tests import pass_at_k
    from qwench.evals.context import TaskContext, using

    loaded = catalogue.load("humaneval", [data])
    (task,) = loaded.tasks.values()
    (filters,) = task._filters
    doc = task.eval_docs[0]
    answers = ["    return 2 * x\n", "    return x\n", "    import sys; sys.exit(0)\n"]
    instance = asked("generate_until", (doc["prompt"], {}))[0]
    instance.doc, instance.resps = doc, answers
    try:
        with using(TaskContext(tokenizer=engine.tokenizer, max_len=64)):
            filters.apply([instance])
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox here: {error}")
    outcomes = instance.filtered_resps["completion"]
    assert [outcome["passed"] for outcome in outcomes] == [True, False, False]
    assert task.process_results(doc, [outcomes]) == {"pass@1": pytest.approx(pass_at_k(3, 1, 1))}
    with pytest.raises(ValueError, match="in its sandbox only"):
        Catalogue(families=("humaneval",)).load("humaneval_64", [data])


def test_all_tests_of_evalplus_run(catalogue: Catalogue, engine: Engine, tmp_path: Path) -> None:
    """Files of EvalPlus' form: a solution that only the benchmark's own tests accept passes those alone."""
    from qwench.evals.context import TaskContext, using

    row = {
        "task_id": "Mbpp/2", "prompt": '"""\nShared elements.\nassert similar_elements((1, 2), (2, 3)) == (2,)\n"""\n',
        "entry_point": "similar_elements", "contract": "", "assertion": "", "atol": 0,
        "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
        "base_input": [[[1, 2], [2, 3]]], "plus_input": [[[1, 2, 3], [3, 2, 9]], [[], []]],
    }  # fmt: skip
    write(tmp_path / "MbppPlus.jsonl", [row])
    (task,) = catalogue.load("mbpp_plus_instruct", [tmp_path]).tasks.values()
    doc = task.eval_docs[0]
    assert 'Can you complete the following Python function?\n```python\n"""\nShared' in str(task.doc_to_text(doc))
    assert doc["prompt"].strip() in str(task.doc_to_text(doc))
    (asked_base,) = catalogue.load("mbpp_instruct", [tmp_path]).tasks.values()
    assert str(asked_base.doc_to_text(asked_base.eval_docs[0])) == str(task.doc_to_text(doc))
    right = "def similar_elements(a, b):\n    return [x for x in a if x in b]\n"
    lazy = "def similar_elements(a, b):\n    return (2,)\n"
    answers = [right, lazy, "no code", right + "\nassert similar_elements([1], [2]) == [1]\n"]

    def passed(task: Any) -> dict[str, list[Any]]:
        instance = asked("generate_until", ("", {}))[0]
        instance.doc, instance.resps = doc, answers
        try:
            with using(TaskContext(tokenizer=engine.tokenizer, max_len=64)):
                for filters in task._filters:
                    filters.apply([instance])
        except SandboxUnavailable as error:
            pytest.skip(f"no sandbox here: {error}")
        return instance.filtered_resps

    both = passed(task)
    assert [(one["base_passed"], one["passed"]) for one in both["sanitized"]] == [
        (True, True),
        (True, False),
        (False, False),
        (True, True),  # an assertion of the model's own is no part of its solution
    ]
    assert [one["passed"] for one in both["as-written"]] == [True, False, False, False]
    scores = task.process_results(doc, [both["sanitized"]])
    assert scores == {"pass@1": pytest.approx(1 / 2), "base_pass@1": pytest.approx(3 / 4)}
    base = passed(asked_base)
    assert [one["passed"] for one in base["sanitized"]] == [True, True, False, True]
    assert asked_base.process_results(doc, [base["as-written"]]) == {"pass@1": pytest.approx(1 / 2)}


def test_tests_that_need_numpy_are_refused_before_anything_runs(catalogue: Catalogue, tmp_path: Path) -> None:
    """The hub's copies of EvalPlus' sets: the sandbox has no packages, every answer would fail."""
    row = {
        "task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    return 1\n",
        "base_input": [[]], "plus_input": [], "atol": 0,
    }  # fmt: skip
    write(tmp_path / "HumanEvalPlus.jsonl", [row])
    for name in ("humaneval_plus", "humaneval_plus_instruct"):
        (task,) = catalogue.load(name, [tmp_path]).tasks.values()
        assert "def f():\n" in str(task.doc_to_text(task.eval_docs[0]))
        hub = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "import numpy as np\n"}
        with pytest.raises(ValueError, match="need numpy, which the sandbox does not have; give EvalPlus' own file"):
            task.doc_to_text(hub)


def test_what_is_missing_is_told_before_anything_runs(
    engine: Engine, catalogue: Catalogue, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwench.evals.task_loading.hub_answers", lambda: False)
    stopping = Interrupted(engine, 0)
    with pytest.raises(ValueError, match=r"task hellaswag: no file hellaswag\*\.jsonl .*--data-dir"):
        evaluate(stopping, plan(tmp_path, Item(task="hellaswag")), catalogue=catalogue)
    with pytest.raises(ValueError, match=r"no part of mmlu can run: .*no file"):
        evaluate(stopping, plan(tmp_path, Item(task="mmlu")), catalogue=catalogue)
    with pytest.raises(ValueError, match="hub, which cannot be reached, or local files"):
        evaluate(stopping, Plan(items=[Item(task="gsm8k")]), catalogue=catalogue)
    with pytest.raises(ValueError, match="did you mean gsm8k"):
        catalogue.matching("gsm8")
    with pytest.raises(ValueError, match="would run twice"):
        evaluate(stopping, plan(data, Item(task="mmlu"), Item(task="mmlu_virology")), catalogue=catalogue)
    with pytest.raises(ValueError, match="is no directory"):
        evaluate(stopping, plan(tmp_path / "nowhere", Item(task="gsm8k")), catalogue=catalogue)


def test_finished_requests_survive_broken_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "requests.jsonl"
    with Finished(path) as finished:
        finished.put("a", [1.5, True])
    path.write_bytes(b"garbage\n" + path.read_bytes() + b'{"key": "b"')
    with Finished(path) as finished:
        assert finished.values == {"a": [1.5, True]}
        finished.put("c", {"text": "é"})
    with Finished(path) as finished:
        assert finished.values == {"a": [1.5, True], "c": {"text": "é"}}
    assert "line 1 is no finished request" in caplog.text


def test_a_resumed_run_tells_of_cut_prompts_and_answers_too(engine: Engine, tmp_path: Path) -> None:
    for number in range(2):
        with Finished(tmp_path / "requests.jsonl") as finished:
            lm = EngineLM(engine, finished, max_length=90)
            lm.generate_until(asked("generate_until", (STORY * 12, {"max_gen_toks": 4, "ignore_eos": True}), task="g"))
            lm.loglikelihood(asked("loglikelihood", (STORY * 12, " return x"), task="l"))
        assert lm.usage["g"].resumed == lm.usage["l"].resumed == number
        assert (lm.usage["g"].cut_prompts, lm.usage["g"].cut_answers, lm.usage["l"].cut_prompts) == (1, 1, 1)


def test_rows_that_fit_into_no_table_are_told(
    engine: Engine, catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwench.evals.task_loading.hub_answers", lambda: False)
    path = tmp_path / "gsm8k_test.jsonl"
    for question in ("5", '"\\ud800"'):
        path.write_text('{"question": "q", "answer": "#### 1"}\n{"question": ' + question + ', "answer": "#### 1"}\n')
        with pytest.raises(ValueError, match=r"gsm8k_test\.jsonl do not fit into one table"):
            evaluate(engine, plan(tmp_path, Item(task="gsm8k", num_fewshot=0)), catalogue=catalogue)


def test_mistakes_in_task_files_of_ones_own_are_told(engine: Engine, tmp_path: Path) -> None:
    path, rows = tmp_path / "mine.yaml", tmp_path / "rows.jsonl"
    write(rows, [{"q": "x", "a": "y"}])
    task = (
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: ROWS}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    ).replace("ROWS", str(rows))

    def told(text: str) -> str:
        path.write_text(text)
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller looks at the words
            evaluate(engine, Plan(items=[Item(task="mine")], include=(tmp_path,)), catalogue=Catalogue([tmp_path], []))
        return str(error.value)

    path.write_text(task)
    mine = Catalogue([tmp_path], [])
    results = evaluate(engine, Plan(items=[Item(task="mine")], generation={"max_gen_toks": 4}), catalogue=mine)
    assert results["tasks"]["mine"]["n"] == 1
    assert "mine.yaml is no YAML that can be read" in told("task: [mine\n")
    assert "names no data; give it a dataset_path" in told("task: mine\n")
    assert "'question' is undefined" in told(task.replace("{{q}}", "{{question}}"))


def test_instructions_that_ifeval_does_not_know_are_refused(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwench.evals.task_loading.hub_answers", lambda: False)
    ifeval = Catalogue(families=("ifeval",))
    for given, message in ((["no:thing"], "'no:thing', which IFEval does not know"), ([], "has no instructions")):
        row = {"key": 7, "prompt": "p", "instruction_id_list": given, "kwargs": [{} for _ in given]}
        write(tmp_path / "ifeval.jsonl", [row])
        with pytest.raises(ValueError, match=f"the question with the key 7 has.*{message.removeprefix('has ')}"):
            evaluate(engine, plan(tmp_path, Item(task="ifeval")), catalogue=ifeval)
