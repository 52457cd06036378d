"""Ids to text: whole, in parts, with and without control tokens."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.tokenizer import StreamDecoder


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_stream_says_what_decode_says(small, data) -> None:
    ids = data.draw(st.lists(st.integers(0, small.vocab_size + 3), max_size=60))
    for skip in (True, False):
        stream = StreamDecoder(small, skip_special=skip)
        assert "".join(map(stream.push, ids)) + stream.flush() == small.decode(ids, skip_special=skip)


def test_a_stream_holds_back_incomplete_characters(small) -> None:
    ids = [small.vocabulary.ranks[bytes([byte])] for byte in "🙂".encode()]
    stream = StreamDecoder(small)
    assert [stream.push(token_id) for token_id in ids] == ["", "", "", "🙂"]
    assert stream.push(ids[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(small.encode("x")[0]) == "x"  # ready for the next answer


def test_skip_special_keeps_tool_calls(small) -> None:
    ids = small.encode("<|im_start|>a<tool_call>b</tool_call><|im_end|><|fim_pad|>", parse_special=True)
    assert small.decode(ids, skip_special=True) == "a<tool_call>b</tool_call><|fim_pad|>"
    assert small.decode(ids) == "<|im_start|>a<tool_call>b</tool_call><|im_end|><|fim_pad|>"


def test_bytes_of_tokens(small) -> None:
    assert small.token_bytes(220) == b" "
    assert small.token_bytes(small.im_end_id) == b"<|im_end|>"
    assert small.token_bytes(small.vocab_size + 5) == b""  # a padding row of the embedding
    assert small.decode_bytes(small.encode("é")) == "é".encode()
    with pytest.raises(ValueError, match="negative"):
        small.decode([-1])


def test_a_tokenizer_can_be_sent_to_a_worker(small) -> None:
    small.encode("the encoder is built now")
    copy = pickle.loads(pickle.dumps(small))
    assert copy.encode("é 42") == small.encode("é 42")
    assert copy.fingerprint == small.fingerprint
