"""`qwench convert SRC OUT`: rewrite a checkpoint in another layout or precision, tensor by tensor.

Sources are whatever `load.py` opens (Hugging Face, Qwen-1, GGUF, a qwench run, a hub id); targets are Hugging Face,
Qwen-1 and GGUF. The model is never built, so memory stays at one tensor. Quantisation methods other than GGUF's Q8_0
are not here.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from qwench.model.atomic import atomic_directory, atomic_file, refuse_existing
from qwench.model.checkpoint import Checkpoint, open_checkpoint, read_generation_config
from qwench.model.flops import num_parameters
from qwench.model.gguf_file import GgufStore, write_gguf
from qwench.model.weights import DTYPES, MAX_SHARD_BYTES, plan, progress_bar, write_directory
from qwench.tokenizer import Tokenizer

LAYOUTS = ("hf", "qwen1", "gguf")


def convert(
    source: str | Path,
    out: Path,
    *,
    to: str | None = None,
    dtype: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> list[str]:
    """Write the model at `source` to `out`; returns remarks for the user.

    `to` is "hf", "qwen1" or "gguf" (None: by the ending of `out`); dtype is "auto" (every value stays exact),
    "float32", "float16", "bfloat16" or, for gguf, "q8_0". Raises ValueError for what the target cannot hold.
    """
    to = to or ("gguf" if out.suffix == ".gguf" else "hf")
    if to not in LAYOUTS:
        raise ValueError(f"--to is {to!r}; choose one of {', '.join(LAYOUTS)}")
    if (to == "gguf") != (out.suffix == ".gguf"):
        raise ValueError(
            f"a GGUF target is a file named *.gguf and other targets are directories; {out} does not fit {to}"
        )
    if dtype == "q8_0" and to != "gguf":
        raise ValueError("dtype q8_0 exists in GGUF files only; add --to gguf or choose another dtype")
    refuse_existing(out, overwrite)
    checkpoint = open_checkpoint(source)
    if out.exists() and out.samefile(checkpoint.path):
        raise ValueError(f"{out} is the source itself; choose another place")
    notes = _notes(checkpoint, to, dtype)
    if to == "gguf":
        _to_gguf(checkpoint, out, dtype, overwrite, progress)
    else:
        with atomic_directory(out, overwrite=overwrite) as directory:
            generation = read_generation_config(checkpoint.path)
            layout = "qwen1" if to == "qwen1" else "hf"
            write_directory(
                checkpoint,
                directory,
                layout,
                dtype=dtype,
                generation_config=generation,
                max_shard_bytes=max_shard_bytes,
                progress=progress,
            )
            if _has_tokenizer(checkpoint):
                Tokenizer.load(checkpoint.path).save(directory)
            else:
                notes.append(f"{checkpoint.path} has no tokenizer, so {out} has none either")
    return notes


def _notes(checkpoint: Checkpoint, to: str, dtype: str) -> list[str]:
    notes = []
    if dtype == "auto" and any(info.stored_as not in _EXACT for info in checkpoint.store.tensors.values()):
        notes.append("the source is quantised, so it was expanded to float32; --dtype bfloat16 halves the size")
    config = checkpoint.config
    if to == "gguf" and (config.use_dynamic_ntk or config.use_logn_attn):
        notes.append(
            "GGUF's qwen2 has no dynamic NTK and no LogN scaling; "
            f"the file is the same model up to {config.seq_length} tokens"
        )
    return notes


_EXACT = ("F64", "F32", "F16", "BF16")


def _to_gguf(checkpoint: Checkpoint, out: Path, dtype: str, overwrite: bool, progress: bool) -> None:
    if not _has_tokenizer(checkpoint):
        raise ValueError(f"a GGUF file carries its tokenizer, and {checkpoint.path} has none; add its tokenizer.json")
    if checkpoint.config.seq_length is not None:
        plain = dataclasses.replace(checkpoint.config, seq_length=None, use_dynamic_ntk=False, use_logn_attn=False)
        checkpoint = dataclasses.replace(checkpoint, config=plain)
    entries = plan(checkpoint, "gguf", torch.float32 if dtype == "q8_0" else dtype)
    with tempfile.TemporaryDirectory() as scratch, atomic_file(out, overwrite=overwrite) as path:
        Tokenizer.load(checkpoint.path).save(Path(scratch))
        with progress_bar("writing", sum(entry.num_bytes for entry in entries), show=progress) as advance:
            write_gguf(
                path,
                checkpoint.config,
                entries,
                checkpoint.reader(),
                advance,
                q8_0=dtype == "q8_0",
                tokenizer_dir=Path(scratch),
                name=out.stem,
            )


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    if isinstance(checkpoint.store, GgufStore):
        return "tokenizer.ggml.tokens" in checkpoint.store.metadata
    return any((checkpoint.path / name).is_file() for name in ("tokenizer.json", "qwen.tiktoken", "vocab.json"))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="qwench convert",
        description="Rewrite a checkpoint in another layout or precision, tensor by tensor and all or nothing.",
        epilog="Examples: qwench convert model.gguf DIR --dtype bfloat16;  qwench convert RUN out.gguf --dtype q8_0",
    )
    parser.add_argument(
        "src", metavar="SRC", help="model directory (Hugging Face or Qwen-1), GGUF file, run, or hub id"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to make, or a file name ending in .gguf")
    parser.add_argument("--to", choices=LAYOUTS, help="layout of OUT (default: gguf if OUT ends in .gguf, else hf)")
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES, "q8_0"],
        default="auto",
        help="precision of the weights; auto keeps every value exact and expands quantised ones to float32 (default)",
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=MAX_SHARD_BYTES / 1e9, help="size of one safetensors file (default: 5)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    if args.max_shard_gb <= 0:
        raise ValueError(f"--max-shard-gb is {args.max_shard_gb}; give a positive number")
    shard_bytes = int(args.max_shard_gb * 1e9)
    notes = convert(
        args.src,
        args.out,
        to=args.to,
        dtype=args.dtype,
        max_shard_bytes=shard_bytes,
        overwrite=args.force,
        progress=True,
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    written = open_checkpoint(args.out)
    files = [args.out] if args.out.is_file() else list(args.out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{args.out}: {num_parameters(written.config):,} parameters, {size / 1e9:.2f} GB", file=sys.stderr)
    return 0
