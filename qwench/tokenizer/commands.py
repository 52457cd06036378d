"""`qwench tokenizer train | import | info | tokens`. Encoding a corpus to shards belongs to the data stage."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from qwench.tokenizer.chat import FORMATS
from qwench.tokenizer.special import CONTROL_SETS
from qwench.tokenizer.tokenizer import Tokenizer
from qwench.tokenizer.train import is_text, read_blocks, train

_SOURCE = "model directory, tokenizer.json, vocab.json, qwen.tiktoken or GGUF file"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="qwench tokenizer", description="Make, convert and look at Qwen vocabularies."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="learn a vocabulary from text files")
    command.add_argument(
        "corpus",
        nargs="+",
        type=Path,
        help="text or .jsonl files, or folders of them; binary files in a folder are skipped",
    )
    command.add_argument("--vocab-size", type=int, required=True, help="number of ids, control tokens included")
    command.add_argument("--out", type=Path, required=True, help="directory to write")
    command.add_argument(
        "--generation", choices=CONTROL_SETS, default="qwen2.5", help="control tokens (default: qwen2.5)"
    )
    command.add_argument("--chat-format", choices=FORMATS, help="chat template (default: that of the generation)")
    command.add_argument("--min-frequency", type=int, default=2, help="how often a pair must occur (default: 2)")
    command.set_defaults(run=train_command)

    command = commands.add_parser("import", help="convert any form to a Hugging Face directory")
    command.add_argument("source", type=Path, help=_SOURCE)
    command.add_argument("out", type=Path, help="directory to write")
    command.add_argument("--generation", choices=CONTROL_SETS, help="control tokens, where the source has none")
    command.add_argument("--chat-format", choices=FORMATS, help="chat template to write instead of the source's")
    command.set_defaults(run=import_command)

    command = commands.add_parser("info", help="show what a tokenizer is")
    command.add_argument("path", type=Path, help=_SOURCE)
    command.set_defaults(run=info_command)

    command = commands.add_parser("tokens", help="show how a text is cut into tokens")
    command.add_argument("path", type=Path, help=_SOURCE)
    command.add_argument("text", help="the text")
    command.add_argument(
        "--parse-special", action="store_true", help="let names of control tokens become control tokens"
    )
    command.set_defaults(run=tokens_command)

    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def train_command(arguments: argparse.Namespace) -> int:
    """`qwench tokenizer train`: learn, save, and say what came out."""
    paths = list(_files(arguments.corpus))
    if not paths:
        raise ValueError(f"there are no text files in {', '.join(map(str, arguments.corpus))}")
    num_bytes = sum(path.stat().st_size for path in paths)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("counting words", total=num_bytes)

        def texts() -> Iterator[str]:
            for path in paths:
                for block in read_blocks(path):
                    yield block
                    progress.advance(task, len(block.encode("utf-8", "surrogatepass")))
            progress.update(task, description="merging", total=None)

        tok = train(
            texts(),
            arguments.vocab_size,
            generation=arguments.generation,
            chat_format=arguments.chat_format,
            min_frequency=arguments.min_frequency,
        )
    tok.save(arguments.out)
    print(f"{arguments.out}: {tok.vocab_size} ids learnt from {len(paths)} files, {num_bytes / 1e6:.1f} MB")
    return 0


def _files(corpus: list[Path]) -> Iterator[Path]:
    for path in corpus:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file() and is_text(file))
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"there is no file or folder {path}")


def import_command(arguments: argparse.Namespace) -> int:
    """`qwench tokenizer import`: read any form, write a Hugging Face directory."""
    tok = Tokenizer.load(arguments.source, generation=arguments.generation)
    if arguments.chat_format:
        tok = tok.with_chat_format(arguments.chat_format)
    tok.save(arguments.out)
    print(f"{arguments.out}: {tok.vocab_size} ids, chat format {tok.chat_format or 'kept as it was (unknown)'}")
    return 0


def info_command(arguments: argparse.Namespace) -> int:
    """`qwench tokenizer info`: sizes, control tokens, chat format, fingerprint, encoder."""
    tok = Tokenizer.load(arguments.path)
    controls = [(number, name) for name, number in tok.special_ids.items()]
    shown = controls if len(controls) < 30 else [*controls[:4], (-1, "..."), controls[-1]]
    rows = {
        "ids": f"{tok.vocab_size:,} ({tok.num_regular:,} regular, {len(controls)} control)",
        "chat format": tok.chat_format or "unknown template",
        "end of answer": ", ".join(map(str, tok.eos_token_ids)),
        "encoder": tok.backend,
        "fingerprint": tok.fingerprint,
    }
    for name, value in rows.items():
        print(f"{name:14} {value}")
    for number, name in shown:
        print(f"{number if number >= 0 else '':>14} {name}")
    return 0


def tokens_command(arguments: argparse.Namespace) -> int:
    """`qwench tokenizer tokens`: one line a token: id, bytes, text."""
    tok = Tokenizer.load(arguments.path)
    ids = tok.encode(arguments.text, parse_special=arguments.parse_special)
    for token_id in ids:
        print(f"{token_id:>7}  {tok.token_bytes(token_id)!r:24}  {tok.decode([token_id])!r}")
    print(f"{len(ids)} tokens, {len(arguments.text)} characters")
    return 0
