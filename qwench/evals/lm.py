"""An engine of ours as a language model of lm-eval: log-likelihoods, rolling log-likelihoods and answers.

What one context is asked several times is computed once. Continuations that differ in their last token only (the
letters of multiple choice) are one prompt, whose next-token probabilities are read at several ids; longer ones share
their context through the engine's prefix cache, block by block, and the head is applied to their own tokens only.
Imported where an evaluation runs and not before, as lm-eval takes seconds to load.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qwench.evals.ask import Scoring
from qwench.evals.chat_prompt import ChatPrompt, render_prompt
from qwench.evals.finished import Finished, digest
from qwench.run import progress
from qwench.types import Completion, Grammar, SamplingParams

DEFAULT_MAX_TOKENS = 256
"""Of an answer where the task does not say; lm-eval's own."""
LEAST_ANSWER = 256
"""Tokens that an answer has room for, if it may have so many: for them a prompt that is too long is cut."""
WINDOW = 8192
"""Requests that are handed to the engine at a time; it holds their tokens in memory."""
GEN_KEYS = frozenset(
    ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
     "presence_penalty", "frequency_penalty", "seed", "stop_token_ids", "min_tokens", "ignore_eos", "grammar")
)  # fmt: skip
"""Generation settings that are understood."""


@dataclass(slots=True)
class Usage:
    """What the requests of one task have cost."""

    requests: int = 0
    resumed: int = 0
    """Of these, requests whose value an earlier run had left."""
    prompt_tokens: int = 0
    """Tokens of prompts handed to the engine, shared ones counted each time."""
    cached_tokens: int = 0
    """Of these, tokens that the prefix cache held."""
    generated_tokens: int = 0
    cut_prompts: int = 0
    """Prompts that were longer than the context and lost their beginning."""
    cut_answers: int = 0
    """Answers that ended at the token limit."""


@dataclass(slots=True)
class Pair:
    """A context with one continuation whose log-likelihood is wanted."""

    key: str
    task: str
    context: list[int]
    continuation: list[int]


@dataclass(slots=True)
class Prompt:
    """One prompt for the engine, and the pairs that it answers."""

    tokens: list[int]
    pairs: list[Pair] = field(default_factory=list)


class EngineLM(LM):
    """`model_key` names the model and what else decides its numbers; finished requests are looked up with it.

    `max_length`: tokens that a context with its continuation may have; longer contexts lose their beginning, as with
    lm-eval's own backends.
    """

    def __init__(
        self,
        engine: Scoring,
        finished: Finished | None = None,
        *,
        model_key: str = "",
        seed: int = 1234,
        max_length: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        chat_error: str = "",
    ) -> None:
        super().__init__()
        self.engine, self.tokenizer_, self.seed = engine, engine.tokenizer, seed
        self.finished = finished or Finished()
        self.model_key, self.chat_error = model_key, chat_error
        self.max_length = min(max_length or engine.max_len - 1, engine.max_len - 1)
        self.overrides = dict(overrides or {})
        """Generation settings that go before the task's."""
        self.usage: defaultdict[str, Usage] = defaultdict(Usage)
        self.generation: dict[str, dict[str, Any]] = {}
        """The settings with which each task's first answer was asked for."""

    # --------------------------------------------------------------------------------------------------------- chat
    @property
    def tokenizer_name(self) -> str:
        return f"{self.tokenizer_.fingerprint}-{self.tokenizer_.chat_format}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer_.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a prompt; without `add_generation_prompt` its last turn is an answer to continue."""
        if self.chat_error:
            raise ValueError(self.chat_error)
        opened = None
        if not add_generation_prompt and chat_history and chat_history[-1]["role"] == "assistant":
            *chat_history, last = chat_history
            opened = last["content"]
        return render_prompt(self.tokenizer_, chat_history, opened=opened)

    def encode(self, text: str) -> list[int]:
        return list(text.ids) if isinstance(text, ChatPrompt) else self.tokenizer_.encode(text, parse_special=True)

    # ----------------------------------------------------------------------------------------------- log-likelihoods
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation after its context: the sum, and whether greedy decoding would write it."""
        pairs: list[Pair] = []
        last_text, last_ids = "", list[int]()
        for request in requests:
            context, continuation = _two(request)
            key = digest("loglikelihood", self.model_key, self.max_length, context, continuation)
            if context == "":
                tokens = self.tokenizer_.encode(continuation, parse_special=True)
                before, after = [self.tokenizer_.eod_id], tokens
            else:
                stripped = context.rstrip()
                continuation = context[len(stripped) :] + continuation  # blanks belong to the word that follows
                if stripped != last_text:
                    last_text, last_ids = stripped, self.encode(context if stripped == context else stripped)
                whole = self.encode(stripped + continuation)
                before, after = last_ids, whole[len(last_ids) :]
            if not after:
                raise ValueError(
                    f"task {request.task_name}: the continuation {continuation!r} has no token of its own; give "
                    "choices that are not empty"
                )
            pairs.append(Pair(key, request.task_name or "", before, after))
        return [(value, greedy) for value, greedy in self._score(pairs, "log-likelihoods")]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of each text, in windows of the context's length: every token is paid for once, the first after
        <|endoftext|>."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tokenizer_.encode(text, parse_special=True)
            windows = get_rolling_token_windows(tokens, self.tokenizer_.eod_id, self.max_length, 1)
            for place, window in enumerate(map(make_disjoint_window, windows)):
                key = digest("rolling", self.model_key, self.max_length, text, place)
                pairs.append(Pair(key, request.task_name or "", *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(pairs, "log-likelihoods"), strict=True):
            totals[owner] += value
        return totals

    def _score(self, pairs: Sequence[Pair], title: str) -> list[tuple[float, bool]]:
        """The log-likelihood of every pair, and whether the continuation is the greedy one."""
        waiting: dict[str, Pair] = {}
        for pair in pairs:
            self.usage[pair.task].requests += 1
            if self.finished.get(pair.key) is None:
                waiting.setdefault(pair.key, pair)
            else:
                self.usage[pair.task].resumed += 1
                self.usage[pair.task].cut_prompts += self._surplus(pair) > 0
        prompts: dict[tuple[int, ...], Prompt] = {}
        for pair in waiting.values():
            surplus = self._surplus(pair)
            if surplus > 0:
                self.usage[pair.task].cut_prompts += 1
                if surplus >= len(pair.context):
                    raise ValueError(
                        f"task {pair.task}: a continuation has {len(pair.continuation)} tokens, but the context holds "
                        f"{self.max_length}; give a larger max_len"
                    )
                pair.context = pair.context[surplus:]
            tokens = pair.context + pair.continuation[:-1]
            prompts.setdefault(tuple(tokens), Prompt(tokens)).pairs.append(pair)
        work = list(prompts.values())
        params = [self._scoring_params(prompt) for prompt in work]

        def done(place: int, completion: Completion) -> None:
            for pair in work[place].pairs:
                self.finished.put(pair.key, _value(pair, completion))
            self._count(work[place].pairs[0].task, completion, len(work[place].tokens), answered=False)

        self._run([prompt.tokens for prompt in work], params, done, title)
        values = [self.finished.values[pair.key] for pair in pairs]
        return [(float(value), bool(greedy)) for value, greedy in values]

    def _surplus(self, pair: Pair) -> int:
        """Tokens of the pair beyond what the context holds."""
        return len(pair.context) + len(pair.continuation) - 1 - self.max_length

    @staticmethod
    def _scoring_params(prompt: Prompt) -> SamplingParams:
        first = min(len(pair.context) for pair in prompt.pairs)
        return SamplingParams(
            temperature=0,
            max_tokens=1,
            prompt_logprobs=first < len(prompt.tokens),
            prompt_logprobs_from=first if first < len(prompt.tokens) else 0,
            first_logprobs=list(dict.fromkeys(pair.continuation[-1] for pair in prompt.pairs)),
        )

    # ------------------------------------------------------------------------------------------------------- answers
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, up to the first of the task's stop strings, the model's end token, or the token limit."""
        seen: Counter[int] = Counter()
        keys: list[str] = []
        work: dict[str, tuple[str, list[int], SamplingParams]] = {}
        cut: set[str] = set()
        for request in requests:
            context, settings = _two(request)
            repeat = seen[id(request)]
            seen[id(request)] += 1
            task = request.task_name or ""
            wishes = self.read_settings(task, settings)
            sampled = wishes["temperature"] > 0
            name = [context, wishes, *([repeat, self.seed, request.doc_id] if sampled else [])]
            key = digest("generate", self.model_key, self.max_length, *name)
            keys.append(key)
            self.usage[task].requests += 1
            if (known := self.finished.get(key)) is not None:
                self.usage[task].resumed += 1
                self.usage[task].cut_answers += known.get("finish") == "length"
                self.usage[task].cut_prompts += bool(known.get("cut"))
            elif key not in work:
                seed = zlib.crc32(key.encode()) + self.seed if sampled else None
                params = self._answer_params(wishes, seed)
                tokens = self.encode(context)
                work[key] = task, self._fit(task, tokens, params.max_tokens), params
                if len(work[key][1]) < len(tokens):
                    cut.add(key)
        todo = list(work.items())

        def done(place: int, completion: Completion) -> None:
            key, (task, tokens, _) = todo[place]
            value = {"text": completion.text, "tokens": len(completion.token_ids), "finish": completion.finish_reason}
            if key in cut:
                value["cut"] = True  # so that a resumed run tells it too
            self.finished.put(key, value)
            self._count(task, completion, len(tokens), answered=True)

        prompts, params = [tokens for _, (_, tokens, _) in todo], [params for _, (_, _, params) in todo]
        self._run(prompts, params, done, "answers")
        return [str(self.finished.values[key]["text"]) for key in keys]

    def generate_turns(self, requests: list[Instance]) -> list[str]:
        """Answers to conversations whose questions follow the model's own answers; see `turns`."""
        from qwench.evals.turns import generate_turns

        return generate_turns(self, requests)

    def read_settings(self, task: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A task's generation settings with the command's over them. Raises ValueError for unknown ones."""
        given = {**settings, **self.overrides}
        for name in ("temperature", "max_gen_toks"):
            try:
                float(given.get(name) or 0)
            except (TypeError, ValueError):
                raise ValueError(f"task {task}: {name} is {given[name]!r}; it should be a number") from None
        if "temperature" in self.overrides:
            given["do_sample"] = float(self.overrides["temperature"]) > 0
        wishes: dict[str, Any] = dict(normalize_gen_kwargs(given, DEFAULT_MAX_TOKENS))
        if unknown := sorted(set(wishes) - GEN_KEYS):
            raise ValueError(
                f"task {task}: generation setting {unknown[0]!r} is not understood; known are "
                f"{', '.join(sorted(GEN_KEYS))}"
            )
        wishes = {name: value for name, value in sorted(wishes.items()) if value is not None}
        wishes["until"] = [stop for stop in wishes.get("until", []) if stop]
        wishes.setdefault("temperature", 0.0)
        self.generation.setdefault(task, wishes)
        return wishes

    def _answer_params(self, wishes: Mapping[str, Any], seed: int | None) -> SamplingParams:
        special = self.tokenizer_.special_ids
        named = {"top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"}
        further = {name: value for name, value in wishes.items() if name in named}
        grammar = wishes.get("grammar")
        return SamplingParams(
            grammar=Grammar(kind=grammar["kind"], value=grammar.get("value", "")) if grammar else None,
            temperature=float(wishes["temperature"]),
            max_tokens=int(wishes["max_gen_toks"]),
            stop=[stop for stop in wishes["until"] if stop not in special],
            stop_token_ids=[
                *wishes.get("stop_token_ids", ()),
                *(special[stop] for stop in wishes["until"] if stop in special),
            ],
            ignore_eos=bool(wishes.get("ignore_eos", False)),
            seed=int(wishes["seed"]) + seed if seed is not None and "seed" in wishes else seed,
            **further,
        )

    def _fit(self, task: str, tokens: list[int], max_tokens: int) -> list[int]:
        """The prompt, without its beginning where less than LEAST_ANSWER tokens of the answer would fit behind it."""
        room = self.max_length + 1 - min(max_tokens, LEAST_ANSWER)
        if len(tokens) <= room:
            return tokens  # the engine ends an answer where the context does
        if room < 1:
            raise ValueError(
                f"task {task}: the context holds {self.max_length + 1} tokens, too few for a prompt and an answer; "
                "give a larger max_len"
            )
        self.usage[task].cut_prompts += 1
        return tokens[-room:]

    # ------------------------------------------------------------------------------------------------------- running
    def _run(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        done: Callable[[int, Completion], None],
        title: str,
    ) -> None:
        if not prompts:
            return
        with progress() as bar:
            task = bar.add_task(title, total=len(prompts))
            for start in range(0, len(prompts), WINDOW):
                part = slice(start, start + WINDOW)

                def finish(place: int, completion: Completion, start: int = start) -> None:
                    done(start + place, completion)
                    bar.advance(task)

                self.engine.generate(prompts[part], params[part], on_answer=finish)

    def _count(self, task: str, completion: Completion, num_prompt: int, *, answered: bool) -> None:
        usage = self.usage[task]
        usage.prompt_tokens += num_prompt
        usage.cached_tokens += completion.num_cached_tokens
        if answered:
            usage.generated_tokens += len(completion.token_ids)
            usage.cut_answers += completion.finish_reason == "length"


def _two(request: Instance) -> tuple[Any, Any]:
    """What a request for a log-likelihood or an answer holds: the context, and the continuation or settings."""
    arguments: tuple[Any, ...] = request.args
    return arguments[0], arguments[1]


def _value(pair: Pair, completion: Completion) -> list[Any]:
    """[log-likelihood, greedy] of the pair in a prompt that ends before its last token."""
    last = pair.continuation[-1]
    assert completion.first_logprobs is not None
    total, greedy = completion.first_logprobs[last], completion.token_ids[0] == last
    if len(pair.continuation) > 1:
        assert completion.prompt_logprobs is not None
        assert completion.prompt_greedy is not None
        first = len(pair.context)
        total += sum(value for value in completion.prompt_logprobs[first:] if value is not None)
        greedy = greedy and all(completion.prompt_greedy[first:])
    return [total, greedy]
