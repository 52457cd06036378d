"""`Tokenizer`: text to ids and back, and conversations to ids. [Qwen TR 2.2, Qwen2.5 TR 2]

The one class that other stages use. Vocabulary files are read in `files.py`, the fast encoder is chosen in
`backend.py`, chat formats live in `chat.py`.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwench.tokenizer import backend, bpe, bpe_native, chat, files, replies
from qwench.tokenizer.messages import Messages, Tools
from qwench.tokenizer.special import CONTROL_SETS, ENDOFTEXT, IM_END, IM_START
from qwench.tokenizer.vocabulary import Vocabulary
from qwench.types import Message, Sample

Mask = Literal["assistant", "qwen"]


class Tokenizer:
    """A Qwen vocabulary with its encoder and chat format. Immutable, and safe to use from several threads.

    >>> tok = Tokenizer.load("model-directory")
    >>> tok.decode(tok.encode("Hello world"))
    'Hello world'
    """

    def __init__(self, vocabulary: Vocabulary, *, chat_format: str | None = "qwen2.5", chat_template: str = "") -> None:
        """`chat_format` None means that conversations cannot be rendered; `chat_template` then keeps the unknown
        Jinja text for `save`."""
        if chat_format is not None:
            chat.find_format(chat_format)
        self.vocabulary = vocabulary
        self.chat_format = chat_format
        """Name of the template generation, a key of `chat.FORMATS`; None for a template that is not known here."""
        self.chat_template = chat.jinja(chat_format) if chat_format else chat_template
        """The chat format as Jinja text, for other programs."""
        self.chat_format_is_guess = False
        """Whether the source had no template, so that the format follows from its control tokens alone."""
        self.num_regular = len(vocabulary.tokens)
        self.vocab_size = len(vocabulary)
        """Number of ids that encoding can give: 151,665 for Qwen2.5. The embedding has more rows (`ModelConfig`)."""
        self.special_ids: dict[str, int] = {control.content: control.id for control in vocabulary.controls}
        """Control token -> id."""
        self.eod_id = self.special_ids[ENDOFTEXT]
        self.pad_id = self.eod_id
        self.im_start_id = self.special_ids[IM_START]
        self.im_end_id = self.special_ids[IM_END]
        self.eos_token_ids = [self.im_end_id, self.eod_id]
        """Ids that end a chat answer."""
        self.fingerprint = vocabulary.fingerprint
        """SHA-256 of what decides ids; token shards carry it. The chat format is not part of it."""
        self._bytes = [*vocabulary.tokens, *(control.content.encode() for control in vocabulary.controls)]
        self._skipped = frozenset(control.id for control in vocabulary.controls if control.special)

    @classmethod
    def load(cls, path: str | Path, *, generation: str | None = None) -> Tokenizer:
        """From a model directory, tokenizer.json, vocab.json, qwen.tiktoken or a GGUF file.

        `generation` names the control tokens where the source has none ("qwen", "qwen2", "qwen2.5", the default).
        The chat format follows the source's template; without one, the control tokens. Raises ValueError.
        """
        loaded = files.read(path, generation)
        if loaded.chat_template:
            known = chat.recognise(loaded.chat_template)
            return cls(loaded.vocabulary, chat_format=known, chat_template=loaded.chat_template)
        names = tuple(control.content for control in loaded.vocabulary.controls)
        by_controls = next((name for name, content in CONTROL_SETS.items() if content == names), "qwen2.5")
        made = cls(loaded.vocabulary, chat_format=loaded.generation or by_controls)
        made.chat_format_is_guess = not loaded.generation
        return made

    def save(self, directory: str | Path) -> None:
        """Write every file form into `directory`; transformers, vLLM and llama.cpp's converter read them."""
        eos = chat.find_format(self.chat_format).eos if self.chat_format else IM_END
        files.write(self.vocabulary, directory, chat_template=self.chat_template, eos_token=eos)

    def with_chat_format(self, name: str) -> Tokenizer:
        """The same vocabulary with another chat format; the encoder is shared."""
        other = Tokenizer(self.vocabulary, chat_format=name)
        other.__dict__["_backend"] = self._backend
        if "_bulk" in self.__dict__:
            other.__dict__["_bulk"] = self._bulk
        return other

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of 128, for models trained from scratch: 151,680 for Qwen2.5.

        The published models have 151,936 or 152,064 rows, which is their config's choice and not the vocabulary's.
        """
        return -(-self.vocab_size // 128) * 128

    @functools.cached_property
    def _backend(self) -> backend.Backend:
        return backend.choose(self.vocabulary)

    @property
    def backend(self) -> str:
        """Which library encodes: "gigatoken" or "tokenizers"."""
        return self._backend.name

    @functools.cached_property
    def _bulk(self) -> bpe_native.Encoder | None:
        """The compiled encoder where there is one and it gives what the definition says on some awkward texts."""
        encoder = bpe_native.load(self.vocabulary.tokens, self.vocabulary.merges)
        if encoder is None:
            return None
        for text in map(backend.normalise, backend.TRICKY):
            data = np.frombuffer(text.encode(), np.uint8)
            (ids,) = encoder.encode(data, np.array([0, len(data)], np.int64), normal=True)
            if ids is not None and ids.tolist() != bpe.encode(text, self.vocabulary.ranks):
                return None
        return encoder

    @functools.cached_property
    def _exact(self) -> backend.Backend:
        return backend.TokenizersBackend(self.vocabulary)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: all but the encoders, which each process builds anew."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_backend", "_bulk", "_exact")}

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, chat_format={self.chat_format!r})"

    # ----------------------------------------------------------------------------------------------------- encoding
    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of `text`, normalised to NFC; a lone surrogate counts as U+FFFD.

        No text becomes a control token unless `parse_special` is set: then their names in the text do, as in Hugging
        Face. Set it only for text of your own.
        """
        return self._encode(text, parse_special).tolist()

    def encode_batch(
        self, texts: Iterable[str], *, parse_special: bool = False, num_threads: int | None = None
    ) -> list[np.ndarray]:
        """`encode` for many texts: one int32 array [n_i] each, in order.

        `num_threads` 1 stays on the calling thread. None and larger numbers use the encoder's own pool, whose size
        the environment variable RAYON_NUM_THREADS sets (default: every core); None leaves it alone in worker
        processes. Texts with `parse_special` are encoded on the calling thread.
        """
        texts = list(texts)
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; give at least 1")
        if parse_special:
            return [self._encode(text, parse_special) for text in texts]
        return self._backend.encode_batch(texts, parallel=None if num_threads is None else num_threads > 1)

    def encode_utf8(
        self, data: np.ndarray, starts: np.ndarray, *, closing: int | None = None, num_threads: int = 1
    ) -> list[np.ndarray]:
        """The ids of `encode` for many texts that lie end to end as valid UTF-8, which is how Arrow has them.

        `data` uint8 [bytes]; text i is data[starts[i] : starts[i + 1]], `starts` int64 [n + 1]. One uint32 array [n_i]
        each, in order, with the id `closing` behind it if one is given. For corpora: about as fast in every script,
        with a few megabytes of memory however much is encoded.
        """
        bulk = self._bulk
        ending = [] if closing is None else [closing]
        bounds = starts.tolist()
        if bulk is None:
            texts = [data[start:end].tobytes().decode() for start, end in itertools.pairwise(bounds)]
            found = self.encode_batch(texts, num_threads=num_threads)
            return [np.append(ids, ending).astype(np.uint32) for ids in found]
        closing = -1 if closing is None else closing
        encoded = bulk.encode(data, starts, closing, num_threads=num_threads)
        result = []
        for ids, start, end in zip(encoded, bounds, bounds[1:], strict=False):
            if ids is None:  # a text with marks that may have to be composed, or with characters of the newest Unicode
                text = backend.normalise(data[start:end].tobytes().decode())
                again = np.frombuffer(text.encode(), np.uint8)
                (ids,) = bulk.encode(again, np.array([0, len(again)], np.int64), closing, normal=True)
                if ids is None:
                    ids = np.append(self._exact.encode(text), ending).astype(np.uint32)
            result.append(ids)
        return result

    def _encode(self, text: str, parse_special: bool) -> np.ndarray:
        if not parse_special:
            return self._backend.encode(text)
        parts = self._control_pattern.split(backend.clean(text))
        ids = [
            np.array([self.special_ids[p]], np.int32) if i % 2 else self._backend.encode(p) for i, p in enumerate(parts)
        ]
        return np.concatenate(ids)

    @functools.cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    # ----------------------------------------------------------------------------------------------------- decoding
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id; a control token's are its name. Ids of padding rows (>= vocab_size) have none: b""."""
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        return self._bytes[token_id] if token_id < self.vocab_size else b""

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The bytes of a sequence. `skip_special` leaves out the control tokens that are flagged special."""
        skipped = self._skipped if skip_special else frozenset()
        return b"".join([self.token_bytes(token_id) for token_id in map(int, ids) if token_id not in skipped])

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of a sequence; bytes that are no UTF-8 become U+FFFD. `<tool_call>` and the code tokens are not
        flagged special, so `skip_special` keeps them, as Hugging Face does."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    # --------------------------------------------------------------------------------------------------------- chat
    def render(self, messages: Messages, tools: Tools | None = None, add_generation_prompt: bool = True) -> list[int]:
        """A conversation as ids. Contents and tool texts never become control tokens.

        `messages`: `Message` records or objects in OpenAI's form; `tools`: objects in OpenAI's form. Raises ValueError
        naming the index of a malformed message.
        """
        pieces = chat.render(self._chat_format(), messages, tools, add_generation_prompt=add_generation_prompt)
        return [token_id for run in self._runs(pieces) for token_id in self._encode_run(run)]

    def render_sample(
        self, messages: Messages, tools: Tools | None = None, *, mask: Mask = "assistant", append_eod: bool = False
    ) -> Sample:
        """A conversation to learn from: the ids of `render` without generation prompt, and a loss weight for each.

        `mask="assistant"` learns what the assistant writes and its closing `<|im_end|>`, not the newline after it nor
        tool results; `mask="qwen"` learns also every turn's `<|im_start|>`, `<|im_end|>` and newline, as the public
        fine-tuning script does. A token that is only in part the assistant's is not learnt. `append_eod` ends the
        sample with `<|endoftext|>` in place of the last newline, as Qwen2.5 does. [Qwen TR 3.1, Qwen2.5 docs]
        """
        if mask not in ("assistant", "qwen"):
            raise ValueError(f"mask is {mask!r}; known masks are assistant and qwen")
        pieces = chat.render(self._chat_format(), messages, tools, add_generation_prompt=False)
        if append_eod:
            assert pieces[-1].part == "gap"
            pieces[-1] = chat.Piece(ENDOFTEXT, control=True, part="close", role=pieces[-1].role)
        token_ids: list[int] = []
        weights: list[float] = []
        for run in self._runs(pieces):
            ids = self._encode_run(run)
            token_ids += ids
            weights += self._weigh(run, ids, mask)
        return Sample(token_ids=np.array(token_ids, np.int32), loss_weights=np.array(weights, np.float32))

    def parse_assistant(self, reply: str | Sequence[int]) -> Message:
        """The assistant's reply, as text or ids, with its tool calls; a malformed call stays in the content."""
        return replies.parse_assistant(reply if isinstance(reply, str) else self.decode(reply), self.chat_format)

    def _chat_format(self) -> str:
        if self.chat_format is None:
            known = ", ".join(chat.FORMATS)
            raise ValueError(
                f"the chat template that came with this tokenizer is not known; choose one by with_chat_format: {known}"
            )
        return self.chat_format

    def _runs(self, pieces: Iterable[chat.Piece]) -> list[list[chat.Piece]]:
        """Group pieces into what is encoded together: a control token alone; the texts of a body, and with it the
        role line where the format joins them. Names of control tokens that this vocabulary lacks are text."""
        joined = chat.find_format(self._chat_format()).joined
        runs: list[list[chat.Piece]] = []
        for piece in pieces:
            control = self._is_control(piece)
            if not control and not piece.text:
                continue
            before = runs[-1][-1] if runs else None
            if (
                control
                or before is None
                or self._is_control(before)
                or not (joined or before.part == piece.part == "body")
            ):
                runs.append([piece])
            else:
                runs[-1].append(piece)
        return runs

    def _is_control(self, piece: chat.Piece) -> bool:
        return piece.control and piece.text in self.special_ids

    def _encode_run(self, run: Sequence[chat.Piece]) -> list[int]:
        if self._is_control(run[0]):
            return [self.special_ids[run[0].text]]
        return self.encode("".join(piece.text for piece in run))

    def _weigh(self, run: Sequence[chat.Piece], ids: Sequence[int], mask: Mask) -> list[float]:
        learnt = [_is_learnt(piece, mask) for piece in run]
        if all(learnt) or not any(learnt):
            return [float(learnt[0])] * len(ids)
        # Bytes of the run as encoded, marked by whose they are; a token is learnt if all its bytes are.
        ends = np.cumsum([len(piece.text) for piece in run])
        text = "".join(piece.text for piece in run)
        marks = bytearray()
        for end, keep in zip(ends.tolist(), learnt, strict=True):
            num_bytes = len(backend.normalise(backend.clean(text[:end])).encode())
            marks.extend(bytes([keep]) * (num_bytes - len(marks)))
        weights, at = [], 0
        for token_id in ids:
            span = marks[at : at + len(self._bytes[token_id])]
            weights.append(float(all(span)))
            at += len(span)
        return weights


def _is_learnt(piece: chat.Piece, mask: Mask) -> bool:
    if piece.part == "body":
        return piece.written
    if mask == "qwen":
        return piece.part in ("open", "close", "gap")
    return piece.part == "close" and piece.role == "assistant"


class StreamDecoder:
    """Text from ids that come one by one, never half a character.

    >>> stream = StreamDecoder(tok)
    >>> [stream.push(51461), stream.push(117), stream.flush()]
    [' ', '根', '']
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes; bytes of an unfinished character are held back."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id], skip_special=self._skip_special))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished, else nothing."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
