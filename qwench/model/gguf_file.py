"""GGUF files: read every quantisation that the `gguf` package can expand, write F32, F16, BF16 and Q8_0.

Reading parses the header here (the package's reader takes 9 s for the metadata of a 0.5B file, this one 0.2 s) and
leaves the arithmetic of the block types to `gguf_blocks.py`, on chunks of rows and several threads. Tokenizers inside
GGUF files are `qwench.tokenizer`'s; this file only writes them, out of a tokenizer.json. Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qwench.model.config import ModelConfig
from qwench.model.gguf_blocks import GGML, expand
from qwench.model.tensor_files import Entry, ReadRows, TensorInfo, read_raw, row_chunks

_PLAIN = {GGML.F32: torch.float32, GGML.F16: torch.float16, GGML.BF16: torch.bfloat16, GGML.F64: torch.float64}
_CHUNK_ELEMENTS = 1 << 18

# Metadata value type -> struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class _Stored:
    kind: gguf.GGMLQuantizationType
    offset: int


# ---------------------------------------------------------------------------------------------------------- reading
class GgufStore:
    """The tensors and the scalar metadata of a GGUF file; shapes are in our order (rows first).

    Raises ValueError for a file that is no GGUF, is truncated, or is one part of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._stored: dict[str, _Stored] = {}
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    self.metadata = self._parse(data)
                except (struct.error, IndexError, UnicodeDecodeError) as error:
                    raise ValueError(f"{path} is truncated or damaged: its header does not parse ({error})") from None
        if self.metadata.get("split.count", 1) > 1:
            raise ValueError(f"{path} is part of a split GGUF; merge the parts with llama-gguf-split first")

    def _parse(self, data: mmap.mmap) -> dict[str, Any]:
        version, num_tensors, num_keys = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):
            raise ValueError(f"{self.path} has GGUF version {version}; qwench reads 2 and 3 (little-endian)")
        position = 24
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key, position = _string(data, position)
            (kind,) = struct.unpack_from("<I", data, position)
            metadata[key], position = _value(data, position + 4, kind)
        infos = []
        for _ in range(num_tensors):
            name, position = _string(data, position)
            (num_dims,) = struct.unpack_from("<I", data, position)
            *dims, code, offset = struct.unpack_from(f"<{num_dims}QIQ", data, position + 4)
            position += 4 + 8 * num_dims + 12
            infos.append((name, tuple(reversed(dims)), code, offset))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.path} is damaged: general.alignment is {alignment}")
        begin = -(-position // alignment) * alignment
        for name, shape, code, offset in infos:
            self._add(name, shape, code, begin + offset, len(data))
        return metadata

    def _add(self, name: str, shape: tuple[int, ...], code: int, offset: int, file_bytes: int) -> None:
        try:
            kind = GGML(code)
        except ValueError:
            raise ValueError(
                f"tensor {name!r} in {self.path} has the unknown type {code}; a newer gguf package may know it"
            ) from None
        missing = offset + _num_bytes(kind, shape) - file_bytes
        if missing > 0:
            raise ValueError(
                f"{self.path} is truncated: tensor {name!r} ends {missing} bytes after the end of the file"
            )
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        # Blocks run along rows of matrices; anything else is no quantised weight.
        expands = torch.float32 if len(shape) == 2 and shape[1] % block == 0 and block > 1 else None
        self.tensors[name] = TensorInfo(shape, _PLAIN.get(kind, expands), kind.name, self.path)
        self._stored[name] = _Stored(kind, offset)

    def read_rows(self, name: str, start: int, out: Tensor) -> None:
        info, stored = self.tensors[name], self._stored[name]
        what = f"{name!r} in {self.path}"
        with open(self.path, "rb", buffering=0) as file:
            descriptor = file.fileno()
            if dtype := _PLAIN.get(stored.kind):
                row_bytes = math.prod(info.shape[1:]) * dtype.itemsize
                read_raw(descriptor, stored.offset + start * row_bytes, dtype, out, what)
                return
            columns = info.shape[-1]
            row_bytes = _num_bytes(stored.kind, (columns,))
            step = max(1, _CHUNK_ELEMENTS // columns)

            def fill(begin: int) -> None:
                rows = out[begin : begin + step]
                raw = torch.empty((len(rows), row_bytes), dtype=torch.uint8)
                read_raw(descriptor, stored.offset + (start + begin) * row_bytes, torch.uint8, raw, what)
                values = expand(raw.numpy(), stored.kind)
                if direct is None:
                    rows.copy_(torch.from_numpy(values))
                else:
                    direct[begin : begin + step] = values

            # Within numpy for the usual case: PyTorch's copy would start a second set of threads in every worker.
            direct = out.detach().numpy() if out.device.type == "cpu" and out.dtype == torch.float32 else None
            try:
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    list(pool.map(fill, range(0, len(out), step)))
            except NotImplementedError:
                raise ValueError(f"tensor {what} has type {info.stored_as}, which qwench cannot expand") from None


def _num_bytes(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes


def _string(data: mmap.mmap, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, position)
    end = position + 8 + length
    if end > len(data):
        raise IndexError("a string runs past the end of the file")
    return data[position + 8 : end].decode(), end


def _value(data: mmap.mmap, position: int, kind: int) -> tuple[Any, int]:
    """A metadata value and where it ends; of an array (the vocabulary) only the length is kept."""
    if kind == _STRING:
        return _string(data, position)
    if kind == _ARRAY:
        item_kind, count = struct.unpack_from("<IQ", data, position)
        position += 12
        if item_kind in _SCALARS:
            return count, position + count * struct.calcsize(f"<{_SCALARS[item_kind]}")
        for _ in range(count):
            if item_kind != _STRING:
                raise IndexError(f"array of values of type {item_kind}")
            (length,) = struct.unpack_from("<Q", data, position)
            position += 8 + length
        return count, position
    if kind not in _SCALARS:
        raise IndexError(f"value of type {kind}")
    (value,) = struct.unpack_from(f"<{_SCALARS[kind]}", data, position)
    if kind == 6:
        value = float(str(np.float32(value)))  # 1e-6 in float32 is meant as 1e-6
    return value, position + struct.calcsize(f"<{_SCALARS[kind]}")


def config_of(store: GgufStore) -> ModelConfig:
    """The dimensions that a GGUF file of architecture "qwen2" describes. Raises ValueError for another architecture."""
    meta, path = store.metadata, store.path
    architecture = meta.get("general.architecture")
    if architecture != "qwen2":
        raise ValueError(f"{path} holds a model of architecture {architecture!r}; qwench reads qwen2")

    def required(key: str) -> Any:
        if f"qwen2.{key}" not in meta:
            raise ValueError(f"{path} has no metadata qwen2.{key}, which a qwen2 model needs")
        return meta[f"qwen2.{key}"]

    if "token_embd.weight" not in store.tensors:
        raise ValueError(f"{path} has no tensor 'token_embd.weight'; it is not a whole model")
    hidden, heads = required("embedding_length"), required("attention.head_count")
    head_dim = meta.get("qwen2.attention.key_length")
    scaling = None
    if meta.get("qwen2.rope.scaling.type", "none") != "none":
        scaling = {"rope_type": meta["qwen2.rope.scaling.type"], "factor": required("rope.scaling.factor")}
        if original := meta.get("qwen2.rope.scaling.original_context_length"):
            scaling["original_max_position_embeddings"] = original
    return ModelConfig(
        vocab_size=store.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=required("feed_forward_length"),
        num_hidden_layers=required("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=meta.get("qwen2.attention.head_count_kv", heads),
        head_dim=None if head_dim is None or head_dim * heads == hidden else head_dim,
        tie_word_embeddings="output.weight" not in store.tensors,
        rope_theta=meta.get("qwen2.rope.freq_base", 10000.0),
        rope_scaling=scaling,
        rms_norm_eps=required("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=required("context_length"),
        qkv_bias="blk.0.attn_q.bias" in store.tensors,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=meta.get("tokenizer.ggml.eos_token_id"),
    )


# ---------------------------------------------------------------------------------------------------------- writing
_FILE_TYPES = {GGML.F32: 0, GGML.F16: 1, GGML.Q8_0: 7, GGML.BF16: 32}
_KINDS = {torch.float32: GGML.F32, torch.float16: GGML.F16, torch.bfloat16: GGML.BF16}


def write_gguf(
    path: Path,
    config: ModelConfig,
    entries: Sequence[Entry],
    read: ReadRows,
    advance: Callable[[int], None],
    *,
    q8_0: bool,
    tokenizer_dir: Path,
    name: str,
) -> None:
    """Write a model of architecture "qwen2" with its tokenizer, one tensor in memory at a time.

    Vectors are stored as F32, as llama.cpp wants them; matrices in their entry's dtype, or as Q8_0.
    Raises ValueError for what the format cannot hold.
    """
    kinds = {entry.name: _kind(entry, q8_0) for entry in entries}
    main = kinds["token_embd.weight"]
    writer = gguf.GGUFWriter(path, "qwen2")
    try:
        _add_config(writer, config, name)
        writer.add_file_type(_FILE_TYPES[main])
        if main == GGML.Q8_0:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_tokenizer(writer, config, tokenizer_dir)
        for entry in entries:
            kind = kinds[entry.name]
            # For quantised types the writer wants the shape in bytes.
            shape = (*entry.shape[:-1], _num_bytes(kind, entry.shape[-1:])) if kind == GGML.Q8_0 else entry.shape
            dtype = np.dtype(np.uint8 if kind == GGML.Q8_0 else np.float16 if kind == GGML.F16 else np.float32)
            writer.add_tensor_info(entry.name, shape, dtype, _num_bytes(kind, entry.shape), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_encoded(entry, kinds[entry.name], read))
            advance(entry.num_bytes)
    finally:
        writer.close()


def _kind(entry: Entry, q8_0: bool) -> gguf.GGMLQuantizationType:
    if len(entry.shape) == 1:
        return GGML.F32
    if not q8_0:
        return _KINDS[entry.dtype]
    if entry.shape[-1] % 32:
        raise ValueError(f"{entry.name} has rows of {entry.shape[-1]}; Q8_0 needs a multiple of 32, so choose bfloat16")
    return GGML.Q8_0


def _encoded(entry: Entry, kind: gguf.GGMLQuantizationType, read: ReadRows) -> np.ndarray:
    if len(entry.shape) == 1 or kind == GGML.Q8_0:
        entry = Entry(entry.name, entry.shape, torch.float32, entry.parameter, entry.start)
    parts = []
    for rows in row_chunks(entry, read):
        if kind == GGML.Q8_0:
            parts.append(gguf.quantize(rows.numpy(), kind))
        else:
            parts.append(rows.contiguous().view(torch.uint8).numpy().copy())
    return np.concatenate(parts)


def _add_config(writer: gguf.GGUFWriter, config: ModelConfig, name: str) -> None:
    if config.use_sliding_window or config.dual_chunk_attention_config is not None:
        raise ValueError("GGUF's qwen2 has neither sliding windows nor dual chunk attention; unset them in config.json")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.head_dim is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind not in ("yarn", "linear"):
            raise ValueError(f"GGUF has no rope scaling of type {kind!r}; it has yarn and linear")
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
        if original := scaling.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)


def _add_tokenizer(writer: gguf.GGUFWriter, config: ModelConfig, directory: Path) -> None:
    """Vocabulary, merges, special tokens and chat template out of tokenizer.json and its companions."""
    path = directory / "tokenizer.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        vocab, merges, added = table["model"]["vocab"], table["model"]["merges"], table.get("added_tokens", [])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"a GGUF file carries its tokenizer, but {path} is missing or no BPE ({error!r})") from None
    tokens = [f"[PAD{index}]" for index in range(config.vocab_size)]
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    known = [(text, index, gguf.TokenType.NORMAL) for text, index in vocab.items()]
    for token in added:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        known.append((token["content"], token["id"], kind))
    for text, index, kind in known:
        if index >= config.vocab_size:
            raise ValueError(f"{path} has token {index} ({text!r}), but the model has only {config.vocab_size} rows")
        tokens[index], types[index] = text, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])
    padding = next((index for text, index, _ in known if text == "<|endoftext|>"), None)
    if padding is not None:
        writer.add_pad_token_id(padding)
    writer.add_add_bos_token(False)
    if template := _chat_template(directory):
        writer.add_chat_template(template)


def _chat_template(directory: Path) -> str | None:
    if (path := directory / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    if (path := directory / "tokenizer_config.json").is_file():
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        return template if isinstance(template, str) else None
    return None
