"""The plan: how files become items, and what makes an item another one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwench import config
from qwench.data.documents import read_item
from qwench.data.inputs import Skipped
from qwench.data.pipeline.conversations import plain_text, read_conversations
from qwench.data.pipeline.plan import plan_items, plan_of
from qwench.data.pipeline.recipe import DataConfig


def recipe(folder: Path, **sources: str) -> DataConfig:
    given = [f"sources.{name}.paths=['{path}']" for name, path in sources.items()]
    return config.load(DataConfig, ["out=x", f"inputs={folder}", "part_mb=0.01", *given])


def test_large_files_are_cut_and_small_ones_put_together(tmp_path: Path) -> None:
    lines = [json.dumps({"id": str(n), "text": f"{n} " * (n % 40 + 1)}) for n in range(600)]
    (tmp_path / "big.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "small").mkdir()
    for number in range(30):
        (tmp_path / "small" / f"{number:02d}.txt").write_text(f"{number} " * 300)
    table = pa.table({"text": [str(n) * 100 for n in range(300)]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=20, compression="none", use_dictionary=False)
    items = plan_items(recipe(tmp_path, big="big.jsonl", small="small", rows="rows.parquet"), [])
    assert [item["source"] for item in items] == sorted(
        [i["source"] for i in items], key=["big", "small", "rows"].index
    )
    assert all(item["bytes"] <= 10_000 for item in items)
    counts = {entry["source"]: entry for entry in plan_of(items)}
    assert counts["big"]["items"] > 3
    assert 1 < counts["small"]["items"] < 10
    assert counts["small"]["files"] == 30
    assert counts["rows"]["items"] > 3
    problems: list[Skipped] = []
    read = [document for item in items for document in read_item(item, problems)]
    assert not problems
    assert sorted(int(d.id) for d in read if d.source == "big") == list(range(600))
    assert sum(d.source == "rows" for d in read) == 300
    assert len({d.id for d in read}) == len(read) == 930


def test_a_changed_file_is_another_item(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = plan_items(recipe(tmp_path, a="a.txt"), [])
    assert plan_items(recipe(tmp_path, a="a.txt"), []) == first
    os.utime(path, ns=(1, 1))
    assert plan_items(recipe(tmp_path, a="a.txt"), []) != first


def test_sources_without_files(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"sources\.a: no readable files in .*folder"):
        plan_items(recipe(tmp_path, a="folder"), [])
    with pytest.raises(ValueError, match=r"give \[sources\.NAME\] with paths"):
        config.load(DataConfig, ["out=x"])


def test_conversations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi\r\n"}, {"role": "assistant", "content": "Hello."}]
    lines = [
        json.dumps({"messages": turns, "id": "first"}),
        json.dumps({"instruction": "Add.", "context": "1, 2", "response": "3"}),
        json.dumps({"instruction": "Add."}),
        json.dumps({"messages": [{"role": "king", "content": "?"}]}),
        "[1]",
        "{",
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    item = {"files": [{"name": "chats.jsonl", "path": str(tmp_path / "chats.jsonl")}], "source": "s"}
    problems: list[Skipped] = []
    first, second = read_conversations(item, "chat", problems)
    assert (first.id, first.kind, first.source) == ("first", "instructions", "s")
    assert first.text == "User: Hi\n\nAssistant: Hello."
    assert first.meta["messages"][0] == {"role": "user", "content": "Hi"}
    assert second.text == "User: Add.\n\n1, 2\n\nAssistant: 3"
    assert plain_text(second.meta["messages"]) == second.text
    reasons = [problem.reason for problem in problems]
    assert len(reasons) == 4
    assert "role 'king'" in reasons[1]
    assert [document.meta for document in read_conversations(item, "plain", [])] == [{}, {}]
    problems.clear()
    gone = {"files": [{"name": "gone", "path": str(tmp_path / "gone.jsonl")}]}
    assert list(read_conversations(gone, "plain", problems)) == []
    assert problems == [Skipped(id="gone", reason="unreadable (No such file or directory)")]
