"""The command line: train, import, info, tokens."""

from pathlib import Path

import pytest

from qwench.tokenizer import Tokenizer
from qwench.tokenizer.commands import main


def test_train_import_info_tokens(library_texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    (corpus / "deep" / "a.py").write_text(library_texts[0], encoding="utf-8")
    (corpus / "b.pyc").write_bytes(b"\0\1\2" * 100)  # passed over
    assert main(["train", str(corpus), "--vocab-size", "400", "--out", str(tmp_path / "tok")]) == 0
    assert "400 ids learnt from 1 files" in capsys.readouterr().out
    tok = Tokenizer.load(tmp_path / "tok")
    assert tok.vocab_size == 400

    out = tmp_path / "out"
    assert main(["import", str(tmp_path / "tok" / "qwen.tiktoken"), str(out), "--generation", "qwen"]) == 0
    again = Tokenizer.load(out)
    assert (again.vocab_size, again.chat_format) == (400 - 22 + 208, "qwen")
    assert main(["import", str(tmp_path / "tok"), str(out), "--chat-format", "qwen2.5-math"]) == 0
    assert Tokenizer.load(out).chat_format == "qwen2.5-math"
    capsys.readouterr()

    assert main(["info", str(tmp_path / "tok")]) == 0
    shown = capsys.readouterr().out
    assert tok.fingerprint in shown
    assert "378 <|endoftext|>" in shown

    assert main(["tokens", str(tmp_path / "tok"), "é1<|im_end|>", "--parse-special"]) == 0
    shown = capsys.readouterr().out
    assert "b'1'" in shown
    assert "'<|im_end|>'" in shown
    assert "4 tokens" in shown


def test_mistakes_are_told(tmp_path: Path) -> None:
    out = ["--vocab-size", "400", "--out", str(tmp_path / "x")]
    with pytest.raises(ValueError, match="no file or folder"):
        main(["train", str(tmp_path / "none"), *out])
    with pytest.raises(ValueError, match="no text files"):
        main(["train", str(tmp_path), *out])
    with pytest.raises(SystemExit):
        main(["train"])
