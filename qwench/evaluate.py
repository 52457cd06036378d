"""`qwench eval`: opens the model and hands it to the harness. Engine and evaluation meet here and nowhere below."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qwench.evals import command

if TYPE_CHECKING:
    from qwench.engine import Engine
    from qwench.evals.harness import About

SMALL = 64 << 20
"""Bytes up to which a file is read whole for its digest."""
PIECE, PIECES = 1 << 20, 64


def main(argv: list[str]) -> int:
    return command.main(argv, open_engine)


@contextmanager
def open_engine(args: argparse.Namespace) -> Iterator[tuple[Engine, About]]:
    """The engine that the command's arguments describe, and what is recorded of it."""
    from qwench.run import console

    settings = [*args.settings, *([f"max_seqs={args.batch}"] if args.batch else [])]
    with console.status(f"loading {args.model}"):
        engine = load_engine(args.model, args.device, args.dtype, args.tokenizer, args.chat_format, settings)
    with engine:
        yield engine, about(engine, args)


def load_engine(
    model: str, device: str, dtype: str, tokenizer: str | None, chat_format: str | None, settings: Sequence[str]
) -> Engine:
    """An engine with settings as the command line gives them (`key=value`), and a chat template by name."""
    from qwench import config
    from qwench.engine import Engine
    from qwench.engine.config import EngineConfig
    from qwench.model.checkpoint import locate
    from qwench.tokenizer import Tokenizer

    chosen: str | Tokenizer | None = tokenizer
    if chat_format:
        chosen = Tokenizer.load(tokenizer or locate(model)).with_chat_format(chat_format)
    return Engine(model, device, dtype, chosen, config.load(EngineConfig, list(settings)))


def template_error(engine: Engine, model: str) -> str:
    """Why conversations cannot be put to this model; empty where they can."""
    if engine.tokenizer.chat_format is not None and not engine.tokenizer.chat_format_is_guess:
        return ""
    return (
        f"{model} came without a chat template that is known, and this task asks through one; give "
        "--chat-format (for example qwen2.5), or --no-apply-chat-template where the task allows it"
    )


def about(engine: Engine, args: argparse.Namespace) -> About:
    import torch

    from qwench import config
    from qwench.evals.harness import About
    from qwench.model.checkpoint import locate

    weight = engine.model.model.embed_tokens.weight
    where = Path(locate(args.model))
    tokenizer = engine.tokenizer
    return About(
        model={
            "name": command.model_name(args.model),
            "path": str(args.model),
            "hash": digest_of(where),
            "parameters": sum(p.numel() for p in {id(p): p for p in engine.model.parameters()}.values()),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "vocabulary": tokenizer.fingerprint,
            "chat_format": tokenizer.chat_format,
            "context": engine.max_len,
        },
        engine={
            "name": "qwench",
            "device": str(weight.device),
            "gpu": torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else None,
            "torch": torch.__version__,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "config": config.to_dict(engine.config),
        },
        preset=None if args.preset == "none" else args.preset,
        chat_error=template_error(engine, args.model),
    )


def digest_of(path: Path) -> str:
    """A digest of a model's files: small ones whole, of large ones their size and pieces spread over them.

    Reading hundreds of gigabytes for a name would take longer than many evaluations; any training step changes all
    pieces.
    """
    files = (
        [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".json"))
    )
    together = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        together.update(f"{file.name if path.is_dir() else ''}:{size}\n".encode())
        with file.open("rb") as stream:
            if size <= SMALL:
                together.update(stream.read())
                continue
            for place in range(PIECES):
                stream.seek((size - PIECE) * place // (PIECES - 1))
                together.update(stream.read(PIECE))
    return f"sampled-sha256:{together.hexdigest()}"
