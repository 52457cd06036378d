"""Chat completions, asked by the official client, compared with the engine's own answers."""

from __future__ import annotations

import concurrent.futures
import math
from typing import Any

import openai
import pytest
from served import NAME, Running, wait_until

from qwench.types import Completion, SamplingParams

QUESTION: list[Any] = [{"role": "user", "content": "What does len do?"}]


def alone(running: Running, messages: Any = QUESTION, **params: Any) -> Completion:
    """The engine's answer to the same conversation."""
    prompt = running.engine.tokenizer.render(messages)
    chosen: dict[str, Any] = {"temperature": 0, "max_tokens": 24} | params
    return running.engine.generate([prompt], SamplingParams(**chosen))[0]


def test_a_greedy_answer_is_the_engines(running: Running) -> None:
    answer = running.client().chat.completions.create(model=NAME, messages=QUESTION, temperature=0, max_tokens=24)
    want = alone(running)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == want.text
    assert choice.message.tool_calls is None
    assert choice.finish_reason == want.finish_reason
    assert answer.object == "chat.completion"
    assert answer.model == NAME
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    num_prompt = len(running.engine.tokenizer.render(QUESTION))
    assert answer.usage.prompt_tokens == num_prompt
    assert answer.usage.completion_tokens == len(want.token_ids)
    assert answer.usage.total_tokens == num_prompt + len(want.token_ids)
    assert answer.usage.prompt_tokens_details is not None
    assert 0 <= (answer.usage.prompt_tokens_details.cached_tokens or 0) < num_prompt


def test_a_stream_is_the_same_answer_in_pieces(running: Running) -> None:
    stream = running.client().chat.completions.create(
        model=NAME, messages=QUESTION, temperature=0, max_completion_tokens=24, stream=True
    )
    chunks = list(stream)
    want = alone(running)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == want.text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == want.finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])


def test_usage_comes_last_in_a_stream_that_asks_for_it(running: Running) -> None:
    stream = running.client().chat.completions.create(
        model=NAME, messages=QUESTION, temperature=0, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(alone(running, max_tokens=8).token_ids)
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_the_raw_stream_ends_with_done(running: Running) -> None:
    body = {"model": NAME, "messages": QUESTION, "max_tokens": 3, "stream": True}
    response = running.post("/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert response.text.isascii()


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(running: Running) -> None:
    text = alone(running).text
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    before = text[: text.index(stop)]
    client = running.client()
    for given in (stop, ["never-in-there", stop]):
        common: dict[str, Any] = {
            "model": NAME,
            "messages": QUESTION,
            "temperature": 0,
            "max_tokens": 24,
            "stop": given,
        }
        choice = client.chat.completions.create(**common).choices[0]
        assert choice.message.content == before
        assert choice.finish_reason == "stop"
        pieces = list(client.chat.completions.create(**common, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == before
        assert pieces[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_and_n_answers_draw_with_following_seeds(running: Running) -> None:
    client = running.client()
    ask: dict[str, Any] = {"model": NAME, "messages": QUESTION, "temperature": 1.0, "max_tokens": 12}
    three = [choice.message.content for choice in client.chat.completions.create(**ask, n=3, seed=40).choices]
    each = [client.chat.completions.create(**ask, seed=seed).choices[0].message.content for seed in (40, 41, 42)]
    assert three == each
    assert len(set(three)) > 1, "different seeds draw different answers"
    assert three[0] == alone(running, temperature=1.0, seed=40, max_tokens=12).text


def test_n_answers_in_one_stream(running: Running) -> None:
    ask: dict[str, Any] = {"model": NAME, "messages": QUESTION, "temperature": 1.0, "max_tokens": 12, "n": 3, "seed": 7}
    want = [choice.message.content for choice in running.client().chat.completions.create(**ask).choices]
    texts, ends = ["", "", ""], [0, 0, 0]
    options: Any = {"include_usage": True}
    usage = None
    for chunk in running.client().chat.completions.create(**ask, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] += choice.finish_reason is not None
    assert texts == want
    assert ends == [1, 1, 1]
    assert usage is not None
    assert usage.prompt_tokens == len(running.engine.tokenizer.render(QUESTION)), "the prompt counts once"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_belong_to_the_text(running: Running, stream: bool) -> None:
    ask: dict[str, Any] = {
        "model": NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 24, "logprobs": True, "top_logprobs": 3
    }  # fmt: skip
    entries: list[Any] = []
    if stream:
        for chunk in running.client().chat.completions.create(**ask, stream=True):
            logprobs = chunk.choices[0].logprobs
            entries += (logprobs.content or []) if logprobs else []
    else:
        logprobs = running.client().chat.completions.create(**ask).choices[0].logprobs
        assert logprobs is not None
        entries += logprobs.content or []
    want = alone(running, top_logprobs=3)
    kept = want.token_ids[:-1] if want.finish_reason == "stop" else want.token_ids
    assert b"".join(bytes(entry.bytes) for entry in entries) == running.engine.tokenizer.decode_bytes(kept)
    assert [entry.logprob for entry in entries] == pytest.approx(want.logprobs[: len(kept)], abs=1e-4)
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob == pytest.approx(values[0], abs=1e-6), "greedy takes the likeliest"
        assert sum(map(math.exp, values)) <= 1 + 1e-6


def test_logprobs_leave_out_tokens_behind_a_stop_string(running: Running) -> None:
    text = alone(running).text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    ask: dict[str, Any] = {
        "model": NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 24, "logprobs": True, "stop": stop
    }  # fmt: skip
    choice = running.client().chat.completions.create(**ask).choices[0]
    assert choice.logprobs is not None
    assert choice.message.content is not None
    tokens = choice.logprobs.content or []
    joined = b"".join(bytes(entry.bytes or []) for entry in tokens).decode(errors="replace")
    assert joined.startswith(choice.message.content)
    without_last = b"".join(bytes(entry.bytes or []) for entry in tokens[:-1]).decode(errors="replace")
    assert len(without_last) <= len(choice.message.content), "only the last token may reach past the text"
    streamed: list[Any] = []
    for chunk in running.client().chat.completions.create(**ask, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += (logprobs.content or []) if logprobs else []
    assert [entry.token for entry in streamed] == [entry.token for entry in tokens]


def test_further_fields_reach_the_engine(running: Running) -> None:
    """Each changes the answer in the way that its definition demands."""
    client = running.client()

    def ask(**fields: Any) -> tuple[str, str]:
        extra = {name: fields.pop(name) for name in list(fields) if name in EXTRAS}
        chosen: dict[str, Any] = {"temperature": 0, "max_tokens": 12} | fields
        choice = client.chat.completions.create(model=NAME, messages=QUESTION, extra_body=extra, **chosen).choices[0]
        return choice.message.content or "", choice.finish_reason

    first = alone(running, max_tokens=12).token_ids[0]
    banned = alone(running, max_tokens=12, logit_bias={first: -100.0})
    assert first not in banned.token_ids
    assert ask(logit_bias={str(first): -100})[0] == banned.text
    assert ask(stop_token_ids=[first]) == ("", "stop")
    assert (
        ask(stop_token_ids=[first], min_tokens=5)[0]
        == alone(running, max_tokens=12, stop_token_ids=[first], min_tokens=5).text
    )
    assert ask(repetition_penalty=1.5)[0] == alone(running, max_tokens=12, repetition_penalty=1.5).text
    assert ask(frequency_penalty=2.0)[0] == alone(running, max_tokens=12, frequency_penalty=2.0).text
    assert ask(presence_penalty=2.0)[0] == alone(running, max_tokens=12, presence_penalty=2.0).text
    assert ask(temperature=1, top_k=1)[0] == alone(running, max_tokens=12).text
    assert ask(temperature=1, min_p=1.0)[0] == alone(running, max_tokens=12).text
    assert ask(temperature=1, top_p=1e-6)[0] == alone(running, max_tokens=12).text
    assert ask(ignore_eos=True)[1] == "length"


EXTRAS = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids")


def test_harmless_fields_change_nothing(running: Running) -> None:
    answer = running.client().chat.completions.create(
        model=NAME, messages=QUESTION, temperature=0, max_tokens=24, user="someone", metadata={"a": "b"}, store=False,
        service_tier="auto", safety_identifier="x", prompt_cache_key="y", modalities=["text"],
        response_format={"type": "text"},
    )  # fmt: skip
    assert answer.choices[0].message.content == alone(running).text


def test_developer_is_system_and_parts_are_one_text(running: Running) -> None:
    asked: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What does "}, {"type": "text", "text": "len do?"}]},
    ]
    answer = running.client().chat.completions.create(model=NAME, messages=asked, temperature=0, max_tokens=24)
    plain = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert answer.choices[0].message.content == alone(running, plain).text


def test_an_answer_can_be_sent_back_as_it_came(running: Running) -> None:
    client = running.client()
    first = (
        client.chat.completions.create(model=NAME, messages=QUESTION, temperature=0, max_tokens=6).choices[0].message
    )
    more: list[Any] = [*QUESTION, first.model_dump(), {"role": "user", "content": "And sum?"}]
    answer = client.chat.completions.create(model=NAME, messages=more, temperature=0, max_tokens=24)
    plain = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And sum?"}]
    assert answer.choices[0].message.content == alone(running, plain).text


def test_without_max_tokens_the_rest_of_the_context_is_there(running: Running) -> None:
    body = {"model": NAME, "messages": QUESTION, "temperature": 0, "ignore_eos": True, "stream": True}
    room = running.engine.max_len - len(running.engine.tokenizer.render(QUESTION))
    stop = alone(running, max_tokens=3, ignore_eos=True).text
    assert running.post("/v1/chat/completions", body | {"stop": stop}).status_code == 200
    assert running.post("/v1/chat/completions", body | {"max_tokens": room, "stop": stop}).status_code == 200
    too_long = running.post("/v1/chat/completions", body | {"max_tokens": room + 1, "stop": stop})
    assert too_long.status_code == 400
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


def test_many_clients_at_once_get_what_each_would_get_alone(running: Running) -> None:
    conversations = [[{"role": "user", "content": f"Count to {number}."}] for number in range(12)]
    want = [alone(running, messages, max_tokens=16).text for messages in conversations]

    def ask(messages: Any) -> str:
        stream = running.client().chat.completions.create(
            model=NAME, messages=messages, temperature=0, max_tokens=16, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, conversations)) == want
    wait_until(running.is_idle, "all answers to be over")


def test_a_refused_request_raises_the_clients_own_error(running: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        running.client().chat.completions.create(model=NAME, messages=QUESTION, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        running.client().chat.completions.create(model="gpt-4", messages=QUESTION)
    assert missing.value.code == "model_not_found"
