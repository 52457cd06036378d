import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import qwench.data.encode as encode
from qwench.data.documents import write_documents
from qwench.data.encode import encode_documents, main
from qwench.data.shards import TokenShards
from qwench.types import Document


def corpus(num, size=40):
    rng = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "def", "return", "你好", "世界", "<|endoftext|>", "<|im_start|>"]
    return [Document(id=str(i), text=" ".join(rng.choice(words, 1 + i % size))) for i in range(num)]


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_documents_come_back_with_one_end_token_each(tmp_path, tokenizer):
    documents = corpus(100)
    result = encode_documents(documents, tokenizer, tmp_path, workers=1, shard_tokens=300)
    shards = TokenShards.open(result.train, tokenizer.fingerprint)
    shards.verify()
    assert (result.num_documents, result.num_tokens, result.val) == (100, shards.num_tokens, None)
    for i, document in enumerate(documents):
        ids = shards.document(i)
        assert np.flatnonzero(ids == tokenizer.eod_id).tolist() == [len(ids) - 1]
        assert tokenizer.decode(ids[:-1]) == document.text


def test_validation_documents_are_spread_and_disjoint(tmp_path, tokenizer):
    documents = corpus(105)
    result = encode_documents(documents, tokenizer, tmp_path, val_fraction=0.1)
    assert (result.num_documents, result.num_val_documents) == (94, 11)
    assert result.val == tmp_path / "val"
    val = TokenShards.open(result.val)
    expected = [documents[i].text for i in range(4, 105, 10)]
    assert [tokenizer.decode(val.document(i)[:-1]) for i in range(11)] == expected
    # Too few documents for one of validation: no val, but a complete run
    few = encode_documents(documents[:3], tokenizer, tmp_path / "few", val_fraction=0.1)
    assert (few.val, few.num_documents) == (None, 3)


@pytest.fixture
def eager_workers(monkeypatch):
    """Start workers with the first batch, and make batches small."""
    monkeypatch.setattr(encode, "_ALONE_S", -1.0)
    monkeypatch.setattr(encode, "_BATCH_CHARS", 2000)


@pytest.mark.usefixtures("eager_workers")
def test_the_number_of_workers_changes_no_byte(tmp_path, tokenizer, monkeypatch):
    made, used = [], []
    make, start = encode._Worker.__init__, encode._Worker.start
    monkeypatch.setattr(encode._Worker, "__init__", lambda worker, tok: (make(worker, tok), made.append(worker))[0])
    monkeypatch.setattr(encode._Worker, "start", lambda worker, job: (used.append(worker), start(worker, job)))

    def slowly():
        for i, document in enumerate(corpus(3000)):
            if i == 300:  # both others are there, and wait for work from here on
                assert len(made) == 2
                assert all(worker._loaded or worker._pipe.poll(100) for worker in made)
            yield document

    for workers in (1, 3):
        documents = slowly() if workers > 1 else corpus(3000)
        encode_documents(
            documents, tokenizer, tmp_path / str(workers), workers=workers, val_fraction=0.02, shard_tokens=9000
        )
    assert files(tmp_path / "1") == files(tmp_path / "3")
    assert used


@pytest.mark.usefixtures("eager_workers")
def test_a_worker_that_dies_is_one_clear_error(tmp_path, tokenizer):
    def killing():
        for document in corpus(100_000):
            for process in encode.multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            yield document

    with pytest.raises(OSError, match="a worker process died"):
        encode_documents(killing(), tokenizer, tmp_path, workers=2, shard_tokens=9000)
    assert not (tmp_path / "manifest.json").exists()
    assert encode.multiprocessing.active_children() == []


def test_kill_and_rerun_gives_the_same_bytes(tmp_path, tokenizer):
    source = tmp_path / "documents.jsonl"
    write_documents(source, corpus(9_000))
    tokenizer.save(tmp_path / "tokenizer")
    program = "import sys; from qwench.data.encode import main; sys.exit(main(sys.argv[1:]))"
    arguments = [
        str(source),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--val-fraction",
        "0.1",
        "--shard-tokens",
        "4000",
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*arguments, "--out", str(whole), "--workers", "1"]) == 0

    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--out", str(broken)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(list(broken.glob("train/shard_*.idx"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    left = files(broken)
    assert "train/progress.json" in left
    assert "train/manifest.json" not in left
    with pytest.raises(ValueError, match="run the same command again"):
        TokenShards.open(broken / "train")

    safe = [broken / name for name in left if name.endswith(".idx")]
    times = {path: path.stat().st_mtime_ns for path in safe[:-1]}
    assert main([*arguments, "--out", str(broken)]) == 0
    assert files(broken) == files(whole)
    assert times == {path: path.stat().st_mtime_ns for path in safe[:-1]}  # kept, not written again
    # A third time there is nothing to do, and nothing changes
    assert main([*arguments, "--out", str(broken)]) == 0
    assert files(broken) == files(whole)


@pytest.mark.parametrize("finished", [True, False])
def test_other_documents_or_settings_do_not_continue(tmp_path, tokenizer, finished, monkeypatch):
    monkeypatch.setattr(encode, "_BATCH_CHARS", 500)
    documents = corpus(200)

    def stopping():
        yield from documents[:150]
        if not finished:
            raise KeyboardInterrupt
        yield from documents[150:]

    with contextlib.suppress(KeyboardInterrupt):
        encode_documents(stopping(), tokenizer, tmp_path, shard_tokens=500)
    changed = [Document(id="0", text="something else"), *documents[1:]]
    for others in (changed, documents[:10]) + (([*documents, documents[0]],) if finished else ()):
        with pytest.raises(ValueError, match=r"(shards of other documents|another)"):
            encode_documents(others, tokenizer, tmp_path, shard_tokens=500)
    with pytest.raises(ValueError, match="another config"):
        encode_documents(documents, tokenizer, tmp_path, shard_tokens=500, config={"clean": True})
    result = encode_documents(documents, tokenizer, tmp_path, shard_tokens=500)
    assert result.num_documents == 200


def test_the_command_reports_what_it_left_out(tmp_path, tokenizer, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("the quick brown fox jumps over the lazy dog")
    (folder / "c.txt").write_bytes(b"\0")
    (folder / "d.txt").write_text("short")
    tokenizer.save(tmp_path / "tok")
    arguments = [str(folder), "--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--clean", "--deduplicate"]) == 0
    out, err = capsys.readouterr()
    assert "1 documents" in out
    for line in ("left out 1: binary (NUL bytes)", "left out 1: too_short", "left out 1: duplicate"):
        assert line in err


@pytest.mark.parametrize(
    ("options", "message"),
    [({"val_fraction": 0.7}, "val_fraction"), ({"workers": 0}, "workers is 0"), ({}, "no documents")],
)
def test_bad_arguments(tmp_path, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        encode_documents([], tokenizer, tmp_path, **options)
