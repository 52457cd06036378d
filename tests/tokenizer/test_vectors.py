"""Ids of the published vocabulary, as printed in the tokenizer report, section 5."""

import pytest
import tiktoken

from qwench.tokenizer import StreamDecoder, Tokenizer, bpe

pytestmark = pytest.mark.real

VECTORS = {
    "Hello world": "9707 1879",
    " Hello world": "21927 1879",
    "Hello, world!": "9707 11 1879 0",
    "12345": "16 17 18 19 20",
    "3.14159": "18 13 16 19 16 20 24",
    "  two  spaces": "220 1378 220 12621",
    "   leading": "256 6388",
    "trailing   ": "376 14277 262",
    "\n": "198",
    "\n\n": "271",
    "\n\n\n": "1406",
    " \n": "715",
    "\t": "197",
    "a\tb": "64 2233",
    "A\r\nB": "32 319 33",
    "def f(x):\n    return x+1\n": "750 282 2075 982 262 470 856 10 16 198",
    "x=1;;;\n\n\ny": "87 28 16 6768 5210 88",
    "你好，世界。": "108386 3837 99489 1773",
    "通义千问": "31935 64559 99320 56007",
    "I'm you're I'LL": "40 2776 498 2299 358 6 4086",
    "\u00e9": "963",
    "e\u0301": "963",
    "🙂": "145080",
    "Ａ": "133054",
    "x²": "87 29456",
    "½": "26062",
    "Ⅷ": "70467 100",
    "\u00a0x": "4102 87",
    "\u3000全角": "22441 35987 63836",
    "한국어": "23573 124785 31079",
    "العربية": "31382 23224 125600",
    "system": "8948",
    "user": "872",
    "assistant": "77091",
    "tool": "14172",
    " A": "362",
    " B": "425",
    "A": "32",
    "B": "33",
    "#### 42": "820 220 19 17",
    r"\boxed{}": "59 79075 6257",
    'print("<|endoftext|>")': "1350 9639 91 8691 723 427 91 82598",
    "You are a helpful assistant.": "2610 525 264 10950 17847 13",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.": (
        "2610 525 1207 16948 11 3465 553 54364 14817 13 1446 525 264 10950 17847 13"
    ),
    "<tool_response>": "27 14172 9655 29",
    "</tool_response>": "522 14172 9655 29",
    "<tools>": "27 15918 29",
    "Observation:": "37763 367 25",
    "Observation:\n": "37763 367 510",
}


@pytest.mark.parametrize("text", VECTORS)
def test_published_ids(real: Tokenizer, text: str) -> None:
    expected = [int(number) for number in VECTORS[text].split()]
    assert real.encode(text) == expected
    assert bpe.encode(text, real.vocabulary.ranks) == expected


def test_control_tokens_are_parsed_on_request_only(real: Tokenizer) -> None:
    text = 'print("<|endoftext|>")'
    assert real.encode(text, parse_special=True) == [1350, 445, 151643, 899]
    assert max(real.encode(text)) < real.num_regular


def test_published_chat(real: Tokenizer) -> None:
    messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Hello!"}]
    expected = (
        "151644 8948 198 2610 525 264 10950 17847 13 151645 198 151644 872 198 9707 0 151645 198 151644 77091 198"
    )
    ids = [int(number) for number in expected.split()]
    assert real.render(messages) == ids
    assert real.with_chat_format("qwen").render(messages) == ids


def test_sizes(real: Tokenizer, assets) -> None:
    assert (real.num_regular, real.vocab_size, real.padded_vocab_size) == (151_643, 151_665, 151_680)
    assert (real.eod_id, real.im_start_id, real.im_end_id) == (151_643, 151_644, 151_645)
    assert real.special_ids["<tool_call>"] == 151_657
    assert real.special_ids["<|file_sep|>"] == 151_664
    assert Tokenizer.load(assets / "qwen.tiktoken", generation="qwen").special_ids["<|extra_204|>"] == 151_850
    assert Tokenizer.load(assets / "qwen.tiktoken", generation="qwen2").vocab_size == 151_646
    assert real.backend == "gigatoken"


def test_the_rank_file_gives_the_merges_of_the_published_model(real: Tokenizer, assets) -> None:
    """The GGUF file carries the merges that were published; ours are recovered from ranks alone."""
    path = assets / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    if not path.is_file():
        pytest.skip("the real GGUF model is not here")
    published = Tokenizer.load(path)
    assert list(published.vocabulary.merges) == list(real.vocabulary.merges)
    assert published.vocabulary.controls == real.vocabulary.controls
    assert published.fingerprint == real.fingerprint
    assert published.chat_format == "qwen2.5"


def test_streaming_example(real: Tokenizer) -> None:
    stream = StreamDecoder(real)
    assert [stream.push(51461), stream.push(117), stream.flush()] == [" ", "根", ""]
    assert real.decode([51461]) == " \ufffd"


def test_same_ids_as_tiktoken(real: Tokenizer) -> None:
    """tiktoken is what Qwen-1's own code encodes with."""
    encoding = tiktoken.Encoding(
        "qwen", pat_str=bpe.PATTERN, mergeable_ranks=dict(real.vocabulary.ranks), special_tokens={}
    )
    for text in VECTORS:
        if text != "e\u0301":  # its caller normalises
            assert encoding.encode_ordinary(text) == real.encode(text)
