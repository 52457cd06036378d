"""A small vocabulary learnt from Python's own library, and the real one where it is on this machine."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer

from qwench.tokenizer import Tokenizer, train
from qwench.tokenizer.files import tokenizer_json


@pytest.fixture(scope="session")
def library_texts() -> list[str]:
    folder = Path(os.__file__).parent
    names = ("argparse.py", "typing.py", "inspect.py", "tarfile.py", "this.py", "turtle.py", "locale.py")
    return [(folder / name).read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def small(library_texts: list[str]) -> Tokenizer:
    other_scripts = ["你好，世界。 通义千问 " * 3, "Привет, мир! é ü 한국어 العربية 🙂 🙂 " * 3]
    return train([*library_texts, *other_scripts], 1500)


@pytest.fixture(scope="session")
def assets() -> Path:
    folder = Path(os.environ.get("QWENCH_ASSETS", Path.home() / ".cache/qwench-assets"))
    if not (folder / "qwen.tiktoken").is_file():
        pytest.skip("the real vocabulary is not here; set QWENCH_ASSETS to the folder of qwen.tiktoken")
    return folder


@pytest.fixture(scope="session")
def real(assets: Path) -> Tokenizer:
    return Tokenizer.load(assets / "qwen.tiktoken")


def oracle_of(tok: Tokenizer, *, with_controls: bool = False) -> HuggingFaceTokenizer:
    """The `tokenizers` library on the same vocabulary."""
    return HuggingFaceTokenizer.from_str(json.dumps(tokenizer_json(tok.vocabulary, with_controls=with_controls)))


@pytest.fixture(scope="session")
def small_oracle(small: Tokenizer) -> HuggingFaceTokenizer:
    return oracle_of(small)


@pytest.fixture(scope="session")
def small_oracle_parsing(small: Tokenizer) -> HuggingFaceTokenizer:
    return oracle_of(small, with_controls=True)


@pytest.fixture(scope="session")
def real_oracle(real: Tokenizer) -> HuggingFaceTokenizer:
    return oracle_of(real)
