"""Plain completions, token routes, models, metrics and the page's files."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from served import NAME, Running, wait_until

from qwench.serve.app import PAGE_HEADERS, STATIC
from qwench.serve.params import SamplingDefaults
from qwench.types import Completion, SamplingParams

TEXT = "def bisect_left(a, x, lo=0"


def alone(running: Running, prompt: str | list[int] = TEXT, **params: Any) -> Completion:
    ids = running.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    chosen: dict[str, Any] = {"temperature": 0, "max_tokens": 16} | params
    return running.engine.generate([ids], SamplingParams(**chosen))[0]


# -------------------------------------------------------------------------------------------------- plain completions
def test_a_text_and_its_ids_are_continued_alike(running: Running) -> None:
    client, ids = running.client(), running.engine.tokenizer.encode(TEXT)
    for prompt in (TEXT, ids):
        answer = client.completions.create(model=NAME, prompt=prompt, temperature=0)
        assert answer.object == "text_completion"
        assert answer.choices[0].text == alone(running).text, "16 tokens unless asked otherwise, as OpenAI has it"
        assert answer.choices[0].finish_reason == alone(running).finish_reason
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids)


def test_several_prompts_with_several_answers_each(running: Running) -> None:
    prompts = [TEXT, "import heapq", "The Zen"]
    ask: dict[str, Any] = {"model": NAME, "temperature": 1.0, "max_tokens": 8, "seed": 3}
    answer = running.client().completions.create(prompt=prompts, n=2, **ask)
    want = [
        alone(running, prompt, temperature=1.0, max_tokens=8, seed=seed).text for prompt in prompts for seed in (3, 4)
    ]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == want
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(running.engine.tokenizer.encode(prompt)) for prompt in prompts)
    ids = [running.engine.tokenizer.encode(prompt) for prompt in prompts]
    streamed = [""] * 6
    for chunk in running.client().completions.create(prompt=ids, n=2, stream=True, **ask):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == want


@pytest.mark.parametrize("num_top", [0, 2])
def test_logprobs_in_the_old_form(running: Running, num_top: int) -> None:
    ask: dict[str, Any] = {"model": NAME, "prompt": TEXT, "temperature": 0, "logprobs": num_top}
    choice = running.client().completions.create(**ask).choices[0]
    want = alone(running, top_logprobs=num_top)
    kept = want.token_ids[:-1] if want.finish_reason == "stop" else want.token_ids
    got = choice.logprobs
    assert got is not None
    assert got.token_logprobs == pytest.approx(want.logprobs[: len(kept)], abs=1e-4)
    assert got.tokens is not None
    assert len(got.tokens) == len(kept)
    assert got.text_offset is not None
    assert got.text_offset[0] == 0
    assert got.text_offset == sorted(got.text_offset)
    for token, offset in zip(got.tokens, got.text_offset, strict=True):
        if not token.startswith("bytes:") and "\ufffd" not in choice.text[offset : offset + len(token)]:
            assert choice.text[offset:].startswith(token)
    if num_top:
        assert got.top_logprobs is not None
        assert all(token in top for token, top in zip(got.tokens, got.top_logprobs, strict=True))
        assert all(len(top) == num_top for top in got.top_logprobs), "greedy: the drawn token is among the best"
    else:
        assert got.top_logprobs is None
    streamed: list[str] = []
    for chunk in running.client().completions.create(**ask, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += (logprobs.tokens or []) if logprobs else []
    assert streamed == got.tokens


def test_control_tokens_are_text_unless_asked_otherwise(running: Running) -> None:
    text, client = "<|fim_prefix|>import", running.client()
    as_text = client.completions.create(model=NAME, prompt=text, max_tokens=1).usage
    as_token = client.completions.create(
        model=NAME, prompt=text, max_tokens=1, extra_body={"parse_special": True}
    ).usage
    assert as_text is not None
    assert as_token is not None
    assert as_text.prompt_tokens == len(running.engine.tokenizer.encode(text))
    assert as_token.prompt_tokens == len(running.engine.tokenizer.encode("import")) + 1


# -------------------------------------------------------------------------------------------------------------- tokens
def test_tokenize_and_back(running: Running) -> None:
    text = "naïve 日本語 🙂 <|im_end|>"
    body = running.post("/tokenize", {"model": NAME, "prompt": text, "return_token_strs": True}).json()
    ids = running.engine.tokenizer.encode(text)
    assert body["tokens"] == ids
    assert body["count"] == len(ids)
    assert body["max_model_len"] == running.engine.max_len
    assert body["token_strs"] == [running.engine.tokenizer.decode([token]) for token in ids]
    assert running.post("/detokenize", {"tokens": ids}).json() == {"prompt": text}
    assert running.post("/tokenize", {"prompt": ""}).json()["tokens"] == []


def test_tokenize_a_conversation(running: Running) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    tool = {"type": "function", "function": {"name": "now", "description": "d", "parameters": {"type": "object"}}}
    render = running.engine.tokenizer.render
    assert running.post("/tokenize", {"messages": messages}).json()["tokens"] == render(messages)
    no_prompt = {"messages": messages, "add_generation_prompt": False}
    assert running.post("/tokenize", no_prompt).json()["tokens"] == render(messages, add_generation_prompt=False)
    strict = {"messages": messages, "tools": [tool | {"function": tool["function"] | {"strict": True}}]}
    assert running.post("/tokenize", strict).json()["tokens"] == render(messages, [tool]), "strict is not for the model"


def test_results_of_tools_stand_in_the_order_of_their_calls(running: Running) -> None:
    def call(name: str) -> dict[str, Any]:
        return {"id": f"id-{name}", "type": "function", "function": {"name": name, "arguments": '{"a": null}'}}

    def result(name: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": f"id-{name}", "content": f"result of {name}"}

    head: list[Any] = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": None, "tool_calls": [call("one"), call("two")]},
    ]
    tail = [{"role": "user", "content": "And?"}]
    want = running.engine.tokenizer.render([*head, result("one"), result("two"), *tail])
    for results in ([result("one"), result("two")], [result("two"), result("one")]):
        assert running.post("/tokenize", {"messages": [*head, *results, *tail]}).json()["tokens"] == want


def test_ids_that_do_not_exist_are_refused(running: Running) -> None:
    error = running.post("/detokenize", {"tokens": [1, 10**6]}).json()["error"]
    assert error["param"] == "tokens"
    both = running.post("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]})
    assert both.status_code == running.post("/tokenize", {"model": NAME}).status_code == 400


# -------------------------------------------------------------------------------------------------------------- models
def test_models(running: Running) -> None:
    models = running.client().models.list().data
    assert [model.id for model in models] == [NAME]
    assert running.client().models.retrieve(NAME).id == NAME
    body = running.get("/v1/models").json()["data"][0]
    assert body["max_model_len"] == running.engine.max_len
    assert body["sampling_defaults"]["temperature"] == 1.0


def test_the_models_own_sampling_is_the_default(start_server: Callable[..., Running]) -> None:
    table = {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 1,
        "top_p": 0.8,
        "repetition_penalty": 1.3,
        "eos_token_id": 1,
    }
    defaults = SamplingDefaults.from_generation_config(table)
    assert defaults == SamplingDefaults(temperature=0.5, top_k=1, top_p=0.8, repetition_penalty=1.3)
    server = start_server(defaults=defaults, model_names=("a/b", "alias"))
    client = server.client()
    assert [model.id for model in client.models.list()] == ["a/b", "alias"]
    assert client.models.retrieve("a/b").id == "a/b"
    text = client.completions.create(model="alias", prompt=TEXT).choices[0].text
    assert text == alone(server, repetition_penalty=1.3).text, "top_k 1 is greedy"
    plain = client.completions.create(
        model="a/b", prompt=TEXT, extra_body={"repetition_penalty": 1.0, "temperature": 0}
    )
    assert plain.choices[0].text == alone(server).text, "a request's own values win"


def test_greedy_and_unusable_generation_configs() -> None:
    greedy = SamplingDefaults.from_generation_config({"do_sample": False, "temperature": 0.7, "top_p": 0.8})
    assert greedy == SamplingDefaults(temperature=0.0)
    assert SamplingDefaults.from_generation_config({}) == SamplingDefaults()
    for wrong in ({"temperature": "hot"}, {"top_p": 7}, {"top_k": 1.5}, {"temperature": True}):
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            SamplingDefaults.from_generation_config(wrong)


# ------------------------------------------------------------------------------------------------------------- metrics
def figures(running: Running) -> dict[str, float]:
    lines = running.get("/metrics").text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_metrics_count(start_server: Callable[..., Running]) -> None:
    server = start_server()
    done = 'qwench_http_requests_total{method="POST",route="/v1/completions",status="200"}'
    bad = 'qwench_http_requests_total{method="POST",route="/v1/completions",status="400"}'
    before = figures(server)
    ids = server.engine.tokenizer.encode(TEXT)
    answer = server.post("/v1/completions", {"model": NAME, "prompt": ids, "max_tokens": 10, "ignore_eos": True})
    assert answer.status_code == 200
    assert server.post("/v1/completions", {"model": NAME}).status_code == 400
    server.get("/made/up/path")
    wait_until(lambda: figures(server).get(bad) == 1, "the second request to be counted")
    after = figures(server)
    assert after[done] == 1
    assert after['qwench_http_requests_total{method="GET",route="none",status="404"}'] == 1
    assert after["qwench_prompt_tokens_total"] - before["qwench_prompt_tokens_total"] == len(ids)
    assert after["qwench_generated_tokens_total"] - before["qwench_generated_tokens_total"] == 10
    assert after["qwench_time_to_first_token_seconds_count"] == 1
    assert after["qwench_time_to_first_token_seconds_sum"] > 0
    assert 1 <= after["qwench_inter_token_seconds_count"] <= 9
    assert after['qwench_request_seconds_count{route="/v1/completions"}'] == 2
    assert after["qwench_cache_blocks"] == server.engine.stats().num_blocks
    assert after["qwench_cache_blocks_free"] <= after["qwench_cache_blocks"]
    for name in ("sequences_running", "sequences_waiting", "preemptions_total", "cached_prompt_tokens_total"):
        assert f"qwench_{name}" in after
    assert {"qwench_draft_tokens_total", "qwench_accepted_draft_tokens_total"} <= set(after)


# ---------------------------------------------------------------------------------------------------------------- page
def test_every_file_of_the_page_is_served_with_the_policy(running: Running) -> None:
    names = [file.relative_to(STATIC).as_posix() for file in STATIC.rglob("*") if file.is_file()]
    assert "index.html" in names
    for name in names:
        response = running.get("/" if name == "index.html" else f"/{name}")
        assert response.status_code == 200
        assert response.content == (STATIC / name).read_bytes()
        for header, value in PAGE_HEADERS.items():
            assert response.headers[header] == value
        assert response.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in PAGE_HEADERS["content-security-policy"]
    page = running.get("/").text
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page), "the page loads from another host"
    assert running.get("/").headers["content-type"].startswith("text/html")
    assert running.get("/__init__.py").status_code == 404
