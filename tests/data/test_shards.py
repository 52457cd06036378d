import json

import numpy as np
import pytest

from qwench.data.shards import ShardWriter, TokenShards

SETTINGS = {"tokenizer_fingerprint": "a" * 64, "vocab_size": 500, "shard_tokens": 20}
DOCUMENTS = [np.append(np.arange(1, 1 + n), 0) for n in (3, 12, 1, 0, 30, 7, 2)]


def write(directory, documents=DOCUMENTS, **changes):
    with ShardWriter(directory, **{**SETTINGS, **changes}) as writer:
        for document in documents:
            writer.add(document)


def test_documents_and_token_ranges_come_back(tmp_path):
    write(tmp_path)
    shards = TokenShards.open(tmp_path, "a" * 64)
    stream = np.concatenate(DOCUMENTS)
    assert shards.num_documents == len(DOCUMENTS)
    assert shards.num_tokens == len(stream)
    assert len(shards.records) > 2
    for i, document in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(shards.document(i), document)
    for start in range(0, len(stream) + 1, 5):
        for stop in range(start, len(stream) + 1, 7):
            np.testing.assert_array_equal(shards.tokens(start, stop), stream[start:stop])
    shards.verify()


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65535, 2), (65536, 4), (151936, 4)])
def test_the_dtype_follows_the_vocabulary(tmp_path, vocab_size, itemsize):
    top = np.array([vocab_size - 1])
    write(tmp_path, [top], vocab_size=vocab_size)
    assert (tmp_path / "shard_00000.bin").stat().st_size == itemsize
    assert TokenShards.open(tmp_path).document(0)[0] == vocab_size - 1


def test_the_files_are_plain_little_endian_arrays(tmp_path):
    write(tmp_path, shard_tokens=1000)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "shard_00000.bin", "<u2"), np.concatenate(DOCUMENTS))
    ends = np.cumsum([len(d) for d in DOCUMENTS])
    np.testing.assert_array_equal(np.fromfile(tmp_path / "shard_00000.idx", "<i8"), ends)


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"aaaaaaaaaaaa, but this tokenizer is bbbbbbbbbbbb; use the tokenizer"):
        TokenShards.open(tmp_path, "b" * 64)


def test_a_missing_manifest_tells_unfinished_from_absent(tmp_path):
    with pytest.raises(ValueError, match="no token shards"):
        TokenShards.open(tmp_path)
    write(tmp_path)
    (tmp_path / "manifest.json").rename(tmp_path / "progress.json")
    with pytest.raises(ValueError, match="unfinished token shards; run the same command again"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize("name", ["shard_00001.bin", "shard_00001.idx"])
def test_truncated_and_missing_files_are_refused(tmp_path, name):
    write(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name} has .* bytes instead of .* truncated"):
        TokenShards.open(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        TokenShards.open(tmp_path)


def test_verify_finds_a_changed_byte(tmp_path):
    write(tmp_path)
    path = tmp_path / "shard_00001.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    shards = TokenShards.open(tmp_path)
    with pytest.raises(ValueError, match=r"shard_00001.bin is damaged"):
        shards.verify()


def test_a_manifest_of_another_version_or_broken_is_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "manifest.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        TokenShards.open(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        TokenShards.open(tmp_path)


def test_an_exception_leaves_no_manifest_and_the_writer_goes_on_after_the_safe_shards(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(whole)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        write(broken, [*DOCUMENTS[:6], np.array([500])])
    assert not (broken / "manifest.json").exists()
    (broken / "shard_00007.bin.tmp").write_bytes(b"rest")
    with ShardWriter(broken, **SETTINGS, resume=True) as writer:
        assert writer.num_documents == 5
        for document in DOCUMENTS[writer.num_documents :]:
            writer.add(document)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in broken.iterdir()}


def test_existing_shards_are_not_overwritten_and_settings_must_agree(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="already holds token shards"):
        ShardWriter(tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="another vocab_size"):
        ShardWriter(tmp_path, **{**SETTINGS, "vocab_size": 501}, resume=True)
    assert ShardWriter(tmp_path, **SETTINGS, resume=True).finished


@pytest.mark.parametrize("tokens", [np.array([500]), np.array([-1]), np.array([], int), np.zeros((2, 2), int)])
def test_tokens_that_cannot_be_stored_are_refused(tmp_path, tokens):
    with ShardWriter(tmp_path, **SETTINGS) as writer, pytest.raises(ValueError, match=r"vocabulary|non-empty vector"):
        writer.add(tokens)


def test_ranges_outside_are_refused(tmp_path):
    write(tmp_path)
    shards = TokenShards.open(tmp_path)
    for start, stop in ((-1, 3), (3, 2), (0, shards.num_tokens + 1)):
        with pytest.raises(ValueError, match="asked for"):
            shards.tokens(start, stop)
    with pytest.raises(ValueError, match="document 7 asked for"):
        shards.document(7)
