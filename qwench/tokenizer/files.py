"""Every file form of a Qwen vocabulary, read into and written from one `Vocabulary`.

    qwen.tiktoken                Qwen: "base64 rank" lines, no control tokens inside
    vocab.json + merges.txt      Qwen1.5 and later, slow Hugging Face tokenizer
    tokenizer.json               the same for the fast one, control tokens included
    tokenizer_config.json        control tokens, chat template
    model.gguf                   llama.cpp: tokens and merges in the header (`gguf_header.py`)

Only vocabularies that work as Qwen's does are taken (byte-level BPE, NFC, Qwen's splitting pattern, ids in merge
order): anything else raises ValueError rather than encode wrongly. Chat templates are passed on as text and
understood in `chat.py`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwench.tokenizer import bpe
from qwench.tokenizer.gguf_header import read_header
from qwench.tokenizer.special import ENDOFTEXT, NOT_SPECIAL, ControlToken, control_tokens
from qwench.tokenizer.vocabulary import Vocabulary

TIKTOKEN_NAME = "qwen.tiktoken"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a source says: its vocabulary, and its chat template as Jinja text ("" if it has none)."""

    vocabulary: Vocabulary
    chat_template: str = ""
    generation: str = ""
    """Set to "qwen" by a directory of the first generation, whose chat template is code and not Jinja."""


# ---------------------------------------------------------------------------------------------------------- reading
def read(path: str | Path, generation: str | None = None) -> Loaded:
    """Read a model directory or any single file of the forms above.

    `generation` ("qwen", "qwen2", "qwen2.5") names the control tokens where the files hold none, as a rank file does;
    by default those of Qwen2.5, or of Qwen for a directory that says so. Raises ValueError for anything unreadable.
    """
    path = Path(path)
    if path.is_dir():
        return _read_directory(path, generation)
    if not path.is_file():
        raise ValueError(
            f"there is no tokenizer at {path}; give a model directory, tokenizer.json, qwen.tiktoken or a GGUF file"
        )
    try:
        if path.suffix == ".gguf":
            return _read_gguf(path)
        if path.suffix == ".tiktoken":
            return Loaded(Vocabulary.from_tokens(_read_tiktoken(path), generation or "qwen2.5"))
        if path.name in ("vocab.json", "merges.txt"):
            return _read_slow(path.parent, generation)
        if path.suffix == ".json":
            return Loaded(_read_tokenizer_json(path), _template(path.parent))
    except ValueError as error:
        raise _named(path, error) from None
    raise ValueError(
        f"{path} is no tokenizer file that is known here; give tokenizer.json, qwen.tiktoken, vocab.json or a GGUF file"
    )


def _named(path: Path, error: ValueError) -> ValueError:
    return error if str(path.parent) in str(error) else ValueError(f"{path}: {error}")


def _read_directory(folder: Path, generation: str | None) -> Loaded:
    if (folder / "tokenizer.json").is_file():
        return read(folder / "tokenizer.json", generation)
    if (folder / "vocab.json").is_file():
        return read(folder / "vocab.json", generation)
    rank_files, ggufs = sorted(folder.glob("*.tiktoken")), sorted(folder.glob("*.gguf"))
    if rank_files:
        path = folder / TIKTOKEN_NAME if folder / TIKTOKEN_NAME in rank_files else rank_files[0]
        first = _read_json(folder / "tokenizer_config.json").get("tokenizer_class") == "QWenTokenizer"
        first = first or _read_json(folder / "config.json").get("model_type") == "qwen"
        loaded = read(path, generation or ("qwen" if first else None))
        return Loaded(loaded.vocabulary, _template(folder), "qwen" if first else "")
    if ggufs:
        return read(ggufs[0])  # all files of a split or requantised model carry the same vocabulary
    raise ValueError(f"{folder} holds no tokenizer: none of tokenizer.json, vocab.json, *.tiktoken, *.gguf is there")


def _read_tiktoken(path: Path) -> list[bytes]:
    tokens: list[bytes] = []
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            encoded, rank = line.split()
            tokens.append(base64.b64decode(encoded, validate=True))
        except (ValueError, binascii.Error):
            raise ValueError(
                f"line {number + 1} is not 'base64 rank'; the file is truncated or no tiktoken file"
            ) from None
        if rank != str(number).encode():
            raise ValueError(
                f"line {number + 1} has rank {rank.decode(errors='replace')} instead of {number}; the file is damaged"
            )
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is absent."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is truncated or damaged") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} holds no JSON object")
    return table


def _template(folder: Path) -> str:
    """The chat template beside a tokenizer: chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = _read_json(folder / "tokenizer_config.json").get("chat_template") or ""
    if isinstance(template, list):  # several named templates
        template = next((entry.get("template", "") for entry in template if entry.get("name") == "default"), "")
    return template if isinstance(template, str) else ""


def _read_slow(folder: Path, generation: str | None) -> Loaded:
    table = _read_json(folder / "vocab.json")
    if not (folder / "merges.txt").is_file():
        raise ValueError(f"{folder / 'merges.txt'} is missing beside vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line]
    config = _read_json(folder / "tokenizer_config.json")
    added = config.get("added_tokens_decoder") or {}
    if added:
        entries = [{"id": int(number), **entry} for number, entry in added.items()]
        vocabulary = _assemble(table, merges, entries)
    else:
        tokens, pairs = _regular(table, merges)
        vocabulary = Vocabulary(tokens, pairs, control_tokens(generation or "qwen2.5", len(tokens)))
    return Loaded(vocabulary, _template(folder))


def _read_tokenizer_json(path: Path) -> Vocabulary:
    table = _read_json(path)
    try:
        model, normalizer, splitter = table["model"], table["normalizer"], table["pre_tokenizer"]
        kind, vocab, merges = model["type"], model["vocab"], model["merges"]
    except (KeyError, TypeError):
        raise ValueError(
            "the parts model, normalizer and pre_tokenizer of a byte-level BPE tokenizer are not all there"
        ) from None
    if (
        kind != "BPE"
        or model.get("byte_fallback")
        or model.get("ignore_merges")
        or model.get("continuing_subword_prefix")
    ):
        raise ValueError(f"the model is of another kind ({kind}) than Qwen's byte-level BPE")
    if not normalizer or normalizer.get("type") != "NFC":
        raise ValueError(f"the normalizer is {normalizer and normalizer.get('type')} where Qwen has NFC")
    stages = splitter.get("pretokenizers", []) if splitter else []
    patterns = [stage["pattern"].get("Regex") for stage in stages if stage.get("type") == "Split"]
    if patterns != [bpe.PATTERN]:
        raise ValueError("the text is split with another pattern than Qwen's, so encoding with Qwen's would be wrong")
    return _assemble(vocab, merges, table.get("added_tokens") or [])


def _regular(
    vocab: Mapping[str, int], merges: Iterable[str | Sequence[str]]
) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """Tokens in id order and merges, from their spelled forms."""
    by_id = sorted(vocab.items(), key=lambda item: item[1])
    if [number for _, number in by_id] != list(range(len(by_id))):
        raise ValueError("the ids of the regular tokens are not 0, 1, 2, ... without gaps")
    pairs = [entry.split(" ") if isinstance(entry, str) else list(entry) for entry in merges]
    if bad := next((pair for pair in pairs if len(pair) != 2), None):
        raise ValueError(f"merge {bad} is no pair of two tokens; the file is damaged")
    return [bpe.unspell(text) for text, _ in by_id], [(bpe.unspell(a), bpe.unspell(b)) for a, b in pairs]


def _assemble(
    vocab: Mapping[str, int], merges: Iterable[str | Sequence[str]], added: Iterable[Mapping[str, Any]]
) -> Vocabulary:
    controls = []
    for entry in sorted(added, key=lambda entry: entry["id"]):
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word") or entry.get("normalized"):
            raise ValueError(
                f"added token {entry['content']!r} takes in text around it, which Qwen's control tokens do not"
            )
        controls.append(ControlToken(entry["content"], entry["id"], bool(entry.get("special"))))
    # Some tools repeat added tokens in the table of regular ones.
    names = {control.content for control in controls}
    tokens, pairs = _regular({text: number for text, number in vocab.items() if text not in names}, merges)
    return Vocabulary(tokens, pairs, tuple(controls))


def _read_gguf(path: Path) -> Loaded:
    wanted = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    header = read_header(path, (*wanted, "tokenizer.ggml.merges", "tokenizer.chat_template"))
    if missing := [key for key in (wanted[0], *wanted[2:], "tokenizer.ggml.merges") if key not in header]:
        raise ValueError(f"the GGUF header has no {missing[0]}, so it carries no byte-level vocabulary")
    model, pre = header["tokenizer.ggml.model"], header.get("tokenizer.ggml.pre", "qwen2")
    if model != "gpt2" or pre != "qwen2":
        raise ValueError(f"the GGUF vocabulary is of kind {model}/{pre} where Qwen's is gpt2/qwen2")
    texts, kinds = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.token_type"]
    if len(texts) != len(kinds):
        raise ValueError(f"{len(texts)} tokens but {len(kinds)} token types; the file is damaged")
    normal, control, user_defined = 1, 3, 4  # llama.cpp's token types; 5 marks padding rows of the embedding
    vocab = {text: number for number, text in enumerate(texts) if kinds[number] == normal}
    # Converters flag the code tokens as control by their names; Hugging Face does not, and decoding follows it.
    added = [
        {"id": number, "content": text, "special": kinds[number] == control and text not in NOT_SPECIAL}
        for number, text in enumerate(texts)
        if kinds[number] in (control, user_defined)
    ]
    vocabulary = _assemble(vocab, header["tokenizer.ggml.merges"], added)
    return Loaded(vocabulary, header.get("tokenizer.chat_template", ""))


# ---------------------------------------------------------------------------------------------------------- writing
def write(vocabulary: Vocabulary, folder: str | Path, *, chat_template: str, eos_token: str) -> None:
    """Write every form into `folder`: tokenizer.json, vocab.json, merges.txt, tokenizer_config.json,
    special_tokens_map.json and qwen.tiktoken. `chat_template` may be ""."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "tokenizer.json": json.dumps(tokenizer_json(vocabulary), ensure_ascii=False, indent=2) + "\n",
        "vocab.json": json.dumps(_spelled(vocabulary), ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{line}\n" for line in _merge_lines(vocabulary)),
        "tokenizer_config.json": json.dumps(_config(vocabulary, chat_template, eos_token), ensure_ascii=False, indent=2)
        + "\n",
        "special_tokens_map.json": json.dumps(_special_map(vocabulary, eos_token), ensure_ascii=False, indent=2) + "\n",
        TIKTOKEN_NAME: "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(vocabulary.tokens)),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    # An older template file would win over the one just written.
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def tokenizer_json(vocabulary: Vocabulary, *, with_controls: bool = True, normalize: bool = True) -> dict[str, Any]:
    """The table of tokenizer.json, which the `tokenizers` and `gigatoken` libraries load too.

    Without control tokens no text can become one; without normalisation the text must be NFC already.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": bpe.PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": c.id, **_added(c)} for c in vocabulary.controls] if with_controls else [],
        "normalizer": {"type": "NFC"} if normalize else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": _spelled(vocabulary),
            "merges": _merge_lines(vocabulary),
        },
    }


def _spelled(vocabulary: Vocabulary) -> dict[str, int]:
    return {bpe.spell(token): rank for rank, token in enumerate(vocabulary.tokens)}


def _merge_lines(vocabulary: Vocabulary) -> list[str]:
    return [f"{bpe.spell(left)} {bpe.spell(right)}" for left, right in vocabulary.merges]


def _added(control: ControlToken) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": control.content, **plain, "special": control.special}


def _extra_specials(vocabulary: Vocabulary) -> list[str]:
    return [c.content for c in vocabulary.controls if c.special and c.content != ENDOFTEXT]


def _special_map(vocabulary: Vocabulary, eos_token: str) -> dict[str, Any]:
    return {"additional_special_tokens": _extra_specials(vocabulary), "eos_token": eos_token, "pad_token": ENDOFTEXT}


def _config(vocabulary: Vocabulary, chat_template: str, eos_token: str) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(control.id): _added(control) for control in vocabulary.controls},
        "additional_special_tokens": _extra_specials(vocabulary),
        "bos_token": None,
        **({"chat_template": chat_template} if chat_template else {}),
        "clean_up_tokenization_spaces": False,
        "eos_token": eos_token,
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": ENDOFTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
