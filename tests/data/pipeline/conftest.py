"""A small corpus of several kinds, with a bit of everything that goes wrong, and recipes for it."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qwench.data.classifier import ClassifierSettings, train_classifier

LIBRARY = Path(os.__file__).parent
MODULES = ("abc", "argparse", "ast", "bisect", "calendar", "cmd", "copy", "csv", "dis", "enum", "heapq", "inspect")


def _paragraphs(name: str) -> list[str]:
    text = (LIBRARY / f"{name}.py").read_text(encoding="utf-8")
    return [block for block in text.split("\n\n") if len(block) > 200]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pages/*.html, code.jsonl (with repeated records), notes/*.jsonl.gz (one cut off), chats.jsonl, eval/*.jsonl (some
    code that is on no page), classifier/ (methods against other code)."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "pages").mkdir()
    for module in MODULES[:6]:
        body = "".join(f"<p>{block.replace('<', '&lt;')}</p>" for block in _paragraphs(module)[:20])
        head = f"<head><title>{module}</title></head>"
        page = f"<html>{head}<body><nav>Home | Next</nav><h1>{module}</h1>{body}</body></html>"
        (folder / "pages" / f"{module}.html").write_text(page, encoding="utf-8")
    (folder / "pages" / "logo.png").write_bytes(b"\x89PNG")
    code = [{"text": block, "lang": "python"} for module in MODULES for block in _paragraphs(module)]
    lines = [json.dumps(record) for record in [*code, *code[:10]]]
    lines.insert(5, "{no json")
    (folder / "code.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    notes = "".join(json.dumps({"id": f"note-{n}", "text": f"Note {n}: " + code[n]["text"]}) + "\n" for n in range(40))
    whole = gzip.compress(notes.encode(), mtime=0)
    (folder / "notes").mkdir()
    (folder / "notes/whole.jsonl.gz").write_bytes(whole)
    (folder / "notes/cut.jsonl.gz").write_bytes(whole[: len(whole) * 3 // 4])
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} + {n}?"},
                {"role": "assistant", "content": f"It is {2 * n}."},
            ]
        }
        for n in range(30)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    (folder / "eval").mkdir()
    leaked = [{"question": block} for module in MODULES[6:] for block in _paragraphs(module)[1::20]]
    (folder / "eval" / "leaked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in leaked))
    blocks = [block for module in MODULES[:4] for block in _paragraphs(module)]
    labels = ["method" if "self" in block else "other" for block in blocks]
    model = train_classifier(blocks, labels, ClassifierSettings(bucket_bits=12), ("other", "method"))
    model.save(folder / "classifier")
    return folder


@pytest.fixture(scope="session")
def data_arguments(corpus: Path, tiny_tokenizer_dir: Path) -> Callable[..., list[str]]:
    """Arguments of `qwench data` into `out`, cut into many items; further ones win."""

    def arguments(out: Path, *further: str) -> list[str]:
        return [
            f"out={out}", f"tokenizer={tiny_tokenizer_dir}", "part_mb=0.03", "start_processes_mb=0", "seed=7",
            f'sources.web.paths=["{corpus}/pages"]', f'sources.code.paths=["{corpus}/code.jsonl"]',
            "sources.code.kind=code", f'models.method={{path="{corpus}/classifier", drop_above=0.98}}',
            f'decontaminate.against=["{corpus}/eval"]',
            f'sources.notes.paths=["{corpus}/notes"]', "sources.notes.kind=docs",
            f'sources.chats.paths=["{corpus}/chats.jsonl"]', "sources.chats.conversations=chat",
            "mixture.shares.code=0.5", "shards.shard_tokens=20000", "shards.val_fraction=0.05", *further,
        ]  # fmt: skip

    return arguments


def outputs(out: Path) -> dict[str, bytes]:
    """Every byte of a run that does not say when, where or how fast it was."""
    told = {"config.toml", "provenance.json", "metrics.jsonl", "summary.json", "done.json", "run.log", ".lock"}
    told |= {"report.html"}  # seconds are in it
    found = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in told]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}
