"""Every file form in, every file form out, and other programs that read what we write."""

import base64
import itertools
import json
import shutil
from pathlib import Path

import gguf
import pytest
from gguf import GGUFWriter
from transformers import AutoTokenizer, Qwen2TokenizerFast

from qwench.tokenizer import Tokenizer, bpe
from qwench.tokenizer.gguf_header import read_header

TEXTS = [
    "Hello, world!",
    "  two\r\n\n 12 e\u0301 你好 한국어 🙂",
    "I'm <tool_call>x</tool_call> <|im_end|>",
    "",
    "\x00 \t",
]


def write_gguf(tok: Tokenizer, path: Path) -> None:
    """With the gguf package, as llama.cpp's converter lays it out: padding rows included."""
    writer = GGUFWriter(path, "qwen2")
    writer.add_uint32("qwen2.block_count", 1)
    writer.add_array("general.tags", ["some", "tags"])
    writer.add_array("general.numbers", [1, 2, 3])
    controls = [(name, 3 if name.startswith("<|") else 4) for name in tok.special_ids]
    texts = [(bpe.spell(token), 1) for token in tok.vocabulary.tokens] + controls + [("[PAD1]", 5), ("[PAD2]", 5)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([text for text, _ in texts])
    writer.add_token_types([kind for _, kind in texts])
    writer.add_token_merges([f"{bpe.spell(left)} {bpe.spell(right)}" for left, right in tok.vocabulary.merges])
    writer.add_chat_template(tok.chat_template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


FORMS = ("tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken", "model.gguf", "directory", "slow directory")


def write_form(tok: Tokenizer, form: str, folder: Path) -> Path:
    folder.mkdir()
    if form == "model.gguf":
        write_gguf(tok, folder / form)
        return folder / form
    tok.save(folder)
    if form == "slow directory":
        (folder / "tokenizer.json").unlink()
    return folder if form.endswith("directory") else folder / form


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FORMS, repeat=2)))
def test_round_trips(small: Tokenizer, tmp_path: Path, first: str, second: str) -> None:
    once = Tokenizer.load(write_form(small, first, tmp_path / "a"))
    twice = Tokenizer.load(write_form(once, second, tmp_path / "b"))
    assert twice.vocabulary == small.vocabulary
    assert twice.fingerprint == small.fingerprint
    assert twice.chat_format == "qwen2.5"
    assert twice.encode(TEXTS[1]) == small.encode(TEXTS[1])


def test_transformers_reads_what_we_write(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    for cls in (AutoTokenizer, Qwen2TokenizerFast):
        other = cls.from_pretrained(tmp_path)
        assert len(other) == small.vocab_size
        assert (other.eos_token, other.pad_token, other.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
        for text in TEXTS:
            ids = small.encode(text, parse_special=True)
            assert other(text)["input_ids"] == ids
            assert other.decode(ids) == small.decode(ids)
            assert other.decode(ids, skip_special_tokens=True) == small.decode(ids, skip_special=True)


def test_we_read_what_transformers_writes(small: Tokenizer, tmp_path: Path) -> None:
    small.with_chat_format("qwen2").save(tmp_path / "a")
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert again.vocabulary == small.vocabulary
    assert again.chat_format == "qwen2"


@pytest.mark.real
def test_transformers_with_the_real_vocabulary(real: Tokenizer, tmp_path: Path) -> None:
    real.save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert len(other) == 151_665
    for text in TEXTS:
        assert other(text)["input_ids"] == real.encode(text, parse_special=True)
    slow = tmp_path / "slow"
    slow.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tmp_path / name, slow)
    other = AutoTokenizer.from_pretrained(slow)
    assert other(TEXTS[1])["input_ids"] == real.encode(TEXTS[1])


def test_the_rank_file_is_written_byte_for_byte(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    lines = (tmp_path / "qwen.tiktoken").read_bytes().split(b"\n")
    assert lines[0] == base64.b64encode(b"!") + b" 0"
    assert lines[-1] == b""
    assert len(lines) == small.num_regular + 1


@pytest.mark.real
def test_the_real_rank_file_comes_out_as_it_went_in(real: Tokenizer, assets: Path, tmp_path: Path) -> None:
    real.save(tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (assets / "qwen.tiktoken").read_bytes()


def test_control_sets(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    ranks = tmp_path / "qwen.tiktoken"
    for generation, count, chat_format in (("qwen", 208, "qwen"), ("qwen2", 3, "qwen2"), ("qwen2.5", 22, "qwen2.5")):
        tok = Tokenizer.load(ranks, generation=generation)
        assert tok.vocab_size == small.num_regular + count
        assert tok.chat_format == chat_format
        assert tok.pad_id == tok.eod_id == small.num_regular
        assert tok.eos_token_ids == [tok.im_end_id, tok.eod_id]
        tok.save(tmp_path / generation)
        assert Tokenizer.load(tmp_path / generation).vocabulary == tok.vocabulary
    assert Tokenizer.load(ranks, generation="qwen").special_ids["<|extra_0|>"] == small.num_regular + 3
    with pytest.raises(ValueError, match="choose one of qwen, qwen2"):
        Tokenizer.load(ranks, generation="qwen9")


def test_a_first_generation_directory(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "all")
    folder = tmp_path / "Qwen-7B-Chat"
    folder.mkdir()
    shutil.copy(tmp_path / "all" / "qwen.tiktoken", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    tok = Tokenizer.load(folder)
    assert (tok.vocab_size, tok.chat_format) == (small.num_regular + 208, "qwen")


def test_an_unknown_chat_template_is_kept(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ 'something else' }}")
    tok = Tokenizer.load(tmp_path / "a")
    assert tok.chat_format is None
    with pytest.raises(ValueError, match="with_chat_format"):
        tok.render([{"role": "user", "content": "x"}])
    tok.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").chat_template == "{{ 'something else' }}"
    tok.with_chat_format("qwen2.5").save(tmp_path / "a")  # over the old template file
    assert Tokenizer.load(tmp_path / "a").chat_format == "qwen2.5"


def test_the_fingerprint_sees_what_decides_ids(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    assert len(small.fingerprint) == 64
    assert small.with_chat_format("qwen2").fingerprint == small.fingerprint
    assert Tokenizer.load(tmp_path / "qwen.tiktoken", generation="qwen2").fingerprint != small.fingerprint


def change(path: Path, edit) -> None:
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))


DAMAGE = {
    "cut tokenizer.json": ("tokenizer.json", lambda p: p.write_bytes(p.read_bytes()[:5000]), "not valid JSON"),
    "no model": ("tokenizer.json", lambda p: p.write_text("{}"), "not all there"),
    "a list": ("tokenizer.json", lambda p: p.write_text("[1]"), "no JSON object"),
    "other regex": (
        "tokenizer.json",
        lambda p: change(p, lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x")),
        "another pattern",
    ),
    "no NFC": ("tokenizer.json", lambda p: change(p, lambda t: t.update(normalizer=None)), "NFC"),
    "lost merges": (
        "tokenizer.json",
        lambda p: change(p, lambda t: t["model"]["merges"].pop()),
        "merges, but there are",
    ),
    "swapped merges": (
        "tokenizer.json",
        lambda p: change(p, lambda t: t["model"]["merges"].__setitem__(slice(0, 2), t["model"]["merges"][1::-1])),
        "merge order",
    ),
    "lost token": (
        "tokenizer.json",
        lambda p: change(p, lambda t: t["model"]["vocab"].popitem()),
        "merges, but there are",
    ),
    "gap": ("tokenizer.json", lambda p: change(p, lambda t: t["added_tokens"].pop(3)), "is next"),
    "cut vocab.json": ("vocab.json", lambda p: p.write_bytes(p.read_bytes()[:-9]), "not valid JSON"),
    "cut merges.txt": ("merges.txt", lambda p: p.write_bytes(p.read_bytes()[:-9]), "truncated|damaged|merge"),
    "cut ranks": ("qwen.tiktoken", lambda p: p.write_bytes(p.read_bytes()[:-6]), "line 1478"),
    "ranks shuffled": (
        "qwen.tiktoken",
        lambda p: p.write_bytes(b"\n".join(reversed(p.read_bytes().split()))),
        "line 1 ",
    ),
    "no ranks": ("qwen.tiktoken", lambda p: p.write_bytes(b""), "256 single bytes"),
    "html": ("qwen.tiktoken", lambda p: p.write_text("<html>not found</html>\n"), "line 1 "),
    "cut gguf": ("model.gguf", lambda p: p.write_bytes(p.read_bytes()[:9000]), "ends too early"),
    "no gguf": ("model.gguf", lambda p: p.write_bytes(b"PK\3\4" + bytes(99)), "no GGUF file"),
    "old gguf": ("model.gguf", lambda p: p.write_bytes(b"GGUF\1\0\0\0" + bytes(99)), "version 1"),
    "empty gguf": ("model.gguf", lambda p: p.write_bytes(b"GGUF\3\0\0\0" + bytes(16)), "tokenizer.ggml.model"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named_in_one_sentence(small: Tokenizer, tmp_path: Path, name: str) -> None:
    form, damage, message = DAMAGE[name]
    path = write_form(small, form, tmp_path / "a")
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", range(0, 24_000, 997))
def test_a_gguf_file_cut_anywhere(small: Tokenizer, tmp_path: Path, cut: int) -> None:
    write_gguf(small, tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"m\.gguf"):
        Tokenizer.load(tmp_path / "m.gguf")


def test_missing_sources(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "no tokenizer at"), (tmp_path, "holds no tokenizer")):
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="no tokenizer file that is known"):
        Tokenizer.load(tmp_path / "notes.txt")


def test_the_header_reader_reads_what_gguf_reads(small: Tokenizer, tmp_path: Path) -> None:
    write_gguf(small, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    keys = [key for key in fields if not key.startswith("GGUF.")]
    assert read_header(tmp_path / "m.gguf", keys) == {key: fields[key].contents() for key in keys}
