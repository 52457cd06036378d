"""The front of generation: open a checkpoint by path and continue prompts, many at a time.

    with Engine("path") as engine:
        engine.generate([engine.tokenizer.encode("Hello")], SamplingParams(temperature=0, max_tokens=8))

One thread of its own runs the steps of `core.py`; callers on any thread, or on asyncio loops, hand it requests and get
what is new after each step.
"""

from __future__ import annotations

import array
import asyncio
import functools
import math
import queue
import secrets
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from qwench.engine.answer import Answer, joined
from qwench.engine.assembly import build_core
from qwench.engine.cache import long_pass_tokens
from qwench.engine.config import EngineConfig
from qwench.engine.core import Core
from qwench.engine.loop import EngineLoop
from qwench.engine.mailbox import Mailbox
from qwench.engine.replicas import Replicas
from qwench.engine.sequence import Sequence
from qwench.model.checkpoint import locate
from qwench.model.decoder import CausalLM
from qwench.model.load import load_model
from qwench.model.weights import parse_dtype
from qwench.ops.hardware import pick_device
from qwench.tokenizer import Tokenizer
from qwench.types import Chunk, Completion, SamplingParams

if TYPE_CHECKING:
    from qwench.engine.grammar import GrammarCompiler


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What the engine does now, and has done since it started."""

    num_running: int
    num_waiting: int
    num_blocks: int
    """Blocks of the cache that can be given out."""
    num_free_blocks: int
    block_size: int
    """Tokens in a block."""
    num_preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    """Prompt tokens that the prefix cache already held."""
    generated_tokens: int
    draft_tokens: int
    """Tokens that speculative decoding has proposed and checked."""
    accepted_draft_tokens: int


class Engine:
    """A model that generates."""

    def __init__(
        self,
        path: str | Path | CausalLM,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        tokenizer: str | Path | Tokenizer | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        """`path`: a checkpoint, or a model that is already loaded (give its tokenizer then).

        `dtype` "auto" takes bf16 on a GPU and fp32 on a CPU. `tokenizer` overrides the one beside the model.
        Raises ValueError for what cannot be loaded or does not fit.
        """
        self._replicas: Replicas | None = None
        try:
            self._open(path, device, dtype, tokenizer, config or EngineConfig())
        except BaseException as error:
            if self._replicas is None:
                raise
            cause = self._replicas.explain(error)
            self._replicas.close()
            raise cause from (None if cause is error else error)

    def _open(
        self,
        path: str | Path | CausalLM,
        device: str,
        dtype: str | torch.dtype,
        tokenizer: str | Path | Tokenizer | None,
        config: EngineConfig,
    ) -> None:
        if isinstance(path, CausalLM):
            if tokenizer is None:
                raise ValueError("an engine over a loaded model needs its tokenizer: Engine(model, tokenizer=...)")
            if config.tensor_parallel > 1:
                raise ValueError(
                    f"tensor_parallel is {config.tensor_parallel}, but the model is already loaded; give the path of "
                    "its checkpoint, of which each device loads its share"
                )
            self.model = path
        else:
            place = pick_device(device)
            if dtype == "auto":
                dtype = "bfloat16" if place.type == "cuda" else "float32"
            where = locate(path)
            tokenizer = tokenizer or where
            if config.tensor_parallel > 1:
                self._replicas = Replicas(where, place, parse_dtype(dtype), config.tensor_parallel)
            with ThreadPoolExecutor(1) as pool:  # a real vocabulary takes as long to read as small weights
                reading = None if isinstance(tokenizer, Tokenizer) else pool.submit(_read_tokenizer, tokenizer)
                if self._replicas is not None:
                    self.model = self._replicas.load()
                else:
                    self.model = load_model(where, device=place, dtype=dtype)
            if reading is not None:
                tokenizer = reading.result()
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else _read_tokenizer(tokenizer)
        shape = self.model.config
        if self.tokenizer.vocab_size > shape.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids but the model only {shape.vocab_size} rows; "
                "use the tokenizer that belongs to the model"
            )
        self.config = self._decided(config)
        self.max_len = self.config.max_len or shape.max_position_embeddings
        self._ends = frozenset((*self.tokenizer.eos_token_ids, *shape.eos_token_ids))
        self._core = self._build()
        self.num_blocks = self._core.pool.num_blocks
        self._loop = EngineLoop(self._core, self._replicas)
        self._lock = threading.Lock()
        self._grammars: GrammarCompiler | None = None
        self._mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = weakref.WeakKeyDictionary()
        # An engine that nobody closes ends with its last reference, at the latest before the interpreter does.
        weakref.finalize(self, self._loop.close)

    def _decided(self, config: EngineConfig) -> EngineConfig:
        """The settings with numbers in place of None."""
        weight, context = self.model.model.embed_tokens.weight, self.model.config.max_position_embeddings
        on_gpu = weight.device.type == "cuda"
        if config.deterministic and not on_gpu:
            raise ValueError("deterministic=true needs the GPU's batch-invariant kernels; leave it out on a CPU")
        if config.deterministic and config.tensor_parallel > 2:
            raise ValueError(
                f"deterministic=true with tensor_parallel={config.tensor_parallel}: the order of sums over more than "
                "two devices depends on the batch; use at most two"
            )
        if config.max_len is not None and config.max_len > context:
            raise ValueError(
                f"max_len is {config.max_len}, but the model's context has {context} tokens; give at most that"
            )
        most_seqs, most_tokens = (1024, 16384) if on_gpu else (16, 1024)
        max_step_tokens = config.max_step_tokens or max(most_tokens, config.max_seqs or 0)
        idle_step_tokens = config.idle_step_tokens or max_step_tokens
        if idle_step_tokens < max_step_tokens:  # memory is measured with the larger one
            raise ValueError(
                f"idle_step_tokens is {idle_step_tokens}, less than max_step_tokens ({max_step_tokens}); give at least "
                "as many, or lower max_step_tokens as well"
            )
        if on_gpu and config.max_step_tokens is None and config.idle_step_tokens is None:
            idle_step_tokens = max(max_step_tokens, long_pass_tokens(self.model.config, weight.device))
        return replace(
            config,
            max_len=config.max_len or context,
            max_seqs=config.max_seqs or min(most_seqs, config.max_step_tokens or most_seqs),
            max_step_tokens=max_step_tokens,
            idle_step_tokens=idle_step_tokens,
            decode_steps=config.decode_steps or (8 if on_gpu else 1),
        )

    def _build(self) -> Core:
        if self._replicas is None:
            return build_core(self.model, self.tokenizer, self.config)
        self._replicas.join(self.model, self.config, self.tokenizer)
        core = build_core(self.model, self.tokenizer, self.config, self._replicas.agree)
        self._replicas.follow(core)
        return core

    # --------------------------------------------------------------------------------------------------- generating
    def generate(
        self,
        prompts: Seq[Seq[int]],
        params: SamplingParams | Seq[SamplingParams],
        progress: Callable[[int], None] | None = None,
        on_answer: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """The completions of all prompts, in order; with n > 1 the n answers to a prompt stand together.

        `params` are shared, or one a prompt. `progress` is called with 1 for each answer that is complete, and
        `on_answer` with its place in the result and the answer itself, so that nothing is lost when a long call is
        interrupted; both on the caller's thread.
        Raises ValueError before anything is computed when a prompt cannot be served.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} sampling parameters; give one, or one a prompt")
        sequences = [
            sequence
            for prompt, wishes in zip(prompts, each, strict=True)
            for sequence in self._answers_to(prompt, wishes)
        ]
        done: queue.SimpleQueue[BaseException | int] = queue.SimpleQueue()
        for place, sequence in enumerate(sequences):
            sequence.on_end, sequence.on_failure = functools.partial(done.put, place), done.put
        self._loop.start(sequences)
        try:
            for _ in sequences:
                item = done.get()
                if isinstance(item, BaseException):
                    _raise(item)
                elif on_answer is not None:
                    on_answer(item, sequences[item].answer.completion())
                if progress is not None:
                    progress(1)
        finally:
            self._loop.give_up(sequences)
        return [sequence.answer.completion() for sequence in sequences]

    def _answers_to(self, prompt: Seq[int], params: SamplingParams) -> list[Sequence]:
        if params.n == 1:
            return [self._sequence(prompt, params)]
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return [self._sequence(prompt, replace(params, n=1, seed=seed + i)) for i in range(params.n)]

    def stream(self, prompt: Seq[int], params: SamplingParams) -> Generator[Chunk]:
        """The pieces of one answer as they become final; the last one carries the completion.

        The answer is begun at once. Closing the generator early gives it up and frees its cache.
        Raises ValueError when the prompt cannot be served.
        """
        chunks: queue.SimpleQueue[Chunk | BaseException] = queue.SimpleQueue()
        sequence = self._sequence(prompt, params, chunks.put)
        sequence.on_failure = chunks.put
        pieces = self._pieces(sequence, chunks)
        next(pieces)
        return pieces

    def _pieces(self, sequence: Sequence, chunks: queue.SimpleQueue[Chunk | BaseException]) -> Generator[Chunk]:
        self._loop.start([sequence])
        try:
            yield Chunk(text="")  # for `stream`: Python ends only generators that have begun
            while not isinstance(item := chunks.get(), BaseException):
                yield item
                if item.completion is not None:
                    return
            _raise(item)
        finally:
            self._loop.give_up([sequence])

    async def astream(self, prompt: Seq[int], params: SamplingParams) -> AsyncGenerator[Chunk]:
        """`stream` for asyncio. Leaving the loop early (break, cancellation) gives the answer up and frees its cache.

        Pieces that gather while the reader is busy come as one, so that a reader who is behind can catch up.
        After a break, close the generator (`contextlib.aclosing`): Python does so only some time later by itself.
        """
        chunks: asyncio.Queue[Chunk | BaseException] = asyncio.Queue()
        put = functools.partial(self._mailbox(asyncio.get_running_loop()).put, chunks)
        if params.grammar is None:
            sequence = self._sequence(prompt, params, put)
        else:  # compiling may take a second, in which the loop has other work
            sequence = await asyncio.to_thread(self._sequence, prompt, params, put)
        sequence.on_failure = put
        self._loop.start([sequence])
        try:
            while True:
                pieces, item = list[Chunk](), await chunks.get()
                while not isinstance(item, BaseException):
                    pieces.append(item)
                    if chunks.empty():
                        break
                    item = chunks.get_nowait()
                if pieces:
                    yield joined(pieces)
                if isinstance(item, BaseException):
                    _raise(item)
                elif item.completion is not None:
                    return
        finally:
            self._loop.give_up([sequence])

    def _mailbox(self, loop: asyncio.AbstractEventLoop) -> Mailbox:
        with self._lock:
            mailbox = self._mailboxes.get(loop)
            if mailbox is None:
                mailbox = self._mailboxes[loop] = Mailbox(loop)
            return mailbox

    def validate(self, prompt: Seq[int], params: SamplingParams) -> list[int]:
        """The prompt as a list. Raises ValueError for what cannot be served: empty, too long, unknown ids."""
        return self._validated(prompt, params).tolist()

    def _validated(self, prompt: Seq[int], params: SamplingParams) -> np.ndarray:
        if isinstance(prompt, str | bytes):
            raise ValueError("the prompt is a string; give token ids, for example tokenizer.encode(text)")
        try:
            packed = array.array("q", prompt)  # checks that all are integers, much faster than a loop
        except (TypeError, OverflowError) as error:
            raise ValueError(f"the prompt has something that is no token id: {error}") from None
        if not packed:
            raise ValueError("the prompt is empty; give at least one token")
        rows, ids = self.model.config.vocab_size, np.frombuffer(packed, np.int64)
        if ids.min() < 0 or ids.max() >= rows:
            bad = next(token for token in packed if not 0 <= token < rows)
            raise ValueError(f"token id {bad} is outside the model's rows 0 to {rows - 1}")
        longest = min(self.max_len, self.cache_tokens) - 1
        if len(ids) > longest:
            what, name = ("context", "max_len") if self.max_len <= self.cache_tokens else ("cache", "cache_tokens")
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but the {what} ({name}) holds {longest} and one of the answer; "
                "shorten the prompt"
            )
        if bad_bias := [token for token in params.logit_bias if not 0 <= token < self.tokenizer.vocab_size]:
            raise ValueError(f"logit_bias names token {bad_bias[0]}; ids run from 0 to {self.tokenizer.vocab_size - 1}")
        if bad_value := [value for value in params.logit_bias.values() if math.isnan(value) or value == math.inf]:
            raise ValueError(
                f"logit_bias has the value {bad_value[0]}; give a finite number, or -inf to forbid a token"
            )
        if params.prompt_logprobs_from > len(ids):
            raise ValueError(
                f"prompt_logprobs_from is {params.prompt_logprobs_from}, but the prompt has {len(ids)} tokens"
            )
        if bad_first := [token for token in params.first_logprobs if not 0 <= token < rows]:
            raise ValueError(f"first_logprobs has {bad_first[0]}; ids run from 0 to {rows - 1}")
        if bad_stop := [token for token in params.stop_token_ids if not 0 <= token < rows]:
            raise ValueError(f"stop_token_ids has {bad_stop[0]}; ids run from 0 to {rows - 1}")
        return ids

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values fit into the cache."""
        return (self.num_blocks - 1) * self.config.block_size

    def _sequence(
        self, prompt: Seq[int], params: SamplingParams, sink: Callable[[Chunk], None] | None = None
    ) -> Sequence:
        if params.n != 1:
            raise ValueError(f"n is {params.n}; a stream carries one answer, so open n streams with seeds of their own")
        ids = self._validated(prompt, params)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._ends)
        limit = min(params.max_tokens, min(self.max_len, self.cache_tokens) - len(ids))
        seed = secrets.randbits(63) if params.seed is None else params.seed
        answer = Answer(self.tokenizer, params, ends, limit, streaming=sink is not None)
        sequence = Sequence(ids, params, seed, answer, sink)
        if params.grammar is not None:
            sequence.matcher = self.grammars.compile(params.grammar)
            if self._replicas is not None:
                sequence.matcher = self._replicas.lead(sequence.matcher)
        return sequence

    @property
    def grammars(self) -> GrammarCompiler:
        """Compiles grammars for this tokenizer; built when first needed."""
        with self._lock:
            if self._grammars is None:
                from qwench.engine.grammar import GrammarCompiler

                self._grammars = GrammarCompiler(self.tokenizer, self.model.config.vocab_size)
            return self._grammars

    # ------------------------------------------------------------------------------------------------------- status
    @property
    def failure(self) -> BaseException | None:
        """The error that has stopped the engine for good, if there was one. Closing it is none."""
        return self._loop.failure

    def stats(self) -> EngineStats:
        """Counters of this moment; cheap, and for any thread. Waits for no step."""
        core = self._core
        return EngineStats(
            num_running=len(core.scheduler.running),
            num_waiting=len(core.scheduler.waiting) + self._loop.num_arriving,
            num_blocks=self.num_blocks - 1,
            num_free_blocks=core.pool.num_free,
            block_size=self.config.block_size,
            num_preemptions=core.scheduler.num_preemptions,
            prompt_tokens=core.scheduler.num_prompt_tokens,
            cached_prompt_tokens=core.scheduler.num_cached_tokens,
            generated_tokens=core.num_generated,
            draft_tokens=core.speculator.num_drafts if core.speculator is not None else 0,
            accepted_draft_tokens=core.speculator.num_accepted if core.speculator is not None else 0,
        )

    def close(self) -> None:
        """Stop after the step that is being computed, and free the cache. Who waits for an answer gets a
        RuntimeError."""
        self._loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer, with its encoder built, which is otherwise built by the first text."""
    tokenizer = Tokenizer.load(path)
    tokenizer.encode("a")
    return tokenizer


def _raise(failure: BaseException | None) -> None:
    """Errors of one request as they are; those of the engine anew for each who waits, with their cause."""
    if isinstance(failure, ValueError):
        raise failure
    if failure is not None:
        raise RuntimeError(str(failure)) from failure.__cause__
