"""What fine-tuning learns: the assistant's tokens and their <|im_end|>, nothing else, by a loss computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwench import config
from qwench.train.config import SFTConfig
from qwench.train.sft import read_conversations, render_file, sample_dataset, sft
from qwench.train.start import build_model

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, I am."},
]


def write(path: Path, *tables: object) -> Path:
    path.write_text("".join(json.dumps(table) + "\n" for table in tables), encoding="utf-8")
    return path


def test_first_loss_by_hand(tmp_path: Path, tiny_tokenizer, sft_arguments) -> None:
    """The loss that the first step reports, from the text alone: split it at the assistant's words."""
    data = write(tmp_path / "a.jsonl", {"messages": TURNS})
    arguments = sft_arguments(tmp_path / "run", f'train_data=["{data}"]', "loop.steps=1", "loop.batch_rows=1")
    recipe = config.load(SFTConfig, [*arguments, "seq_len=256"])
    # Qwen's chat markup, written out here a second time on purpose.
    ids: list[int] = []
    learnt: list[bool] = []
    for turn in TURNS:
        parts = [
            ([tiny_tokenizer.special_ids["<|im_start|>"]], False),
            (tiny_tokenizer.encode(turn["role"] + "\n"), False),
            (tiny_tokenizer.encode(turn["content"]), turn["role"] == "assistant"),
            ([tiny_tokenizer.special_ids["<|im_end|>"]], turn["role"] == "assistant"),
            (tiny_tokenizer.encode("\n"), False),
        ]
        for tokens, keep in parts:
            ids += tokens
            learnt += [keep] * len(tokens)
    model = build_model(recipe.model, tiny_tokenizer, torch.device("cpu"), recipe.loop.seed)
    logprobs = model.logits(torch.tensor([ids]))[0].log_softmax(-1)
    terms = [-float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids)) if learnt[i]]
    assert len(terms) > 10
    assert sft(recipe).train_loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_qwen_mask_learns_more(tmp_path: Path, tiny_tokenizer) -> None:
    data = write(tmp_path / "a.jsonl", {"messages": TURNS})
    [ours] = render_file(data, tiny_tokenizer, "assistant")
    [theirs] = render_file(data, tiny_tokenizer, "qwen")
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert ours.loss_weights.sum() < theirs.loss_weights.sum() < len(theirs.token_ids)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', r"bad.jsonl:2 is not JSON"),
        ("[1, 2]", r'bad.jsonl:2 has no list "messages"'),
        ('{"messages": "hello"}', r'bad.jsonl:2 has no list "messages"'),
        ('{"text": "hello"}', r'bad.jsonl:2 has no list "messages"'),
        ('{"messages": []}', r"bad.jsonl:2: messages is empty"),
        ('{"messages": [{"role": "robot", "content": ""}]}', r"bad.jsonl:2: messages\[0\] has role 'robot'"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"bad.jsonl:2: messages\[0\].content is a int"),
        ('{"messages": ["hello"]}', r"bad.jsonl:2: messages\[0\] is a str"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": 5}', r"bad.jsonl:2: tools must be a list"),
        (b'{"messages": "\xff"}', r"bad.jsonl:2 is not JSON in UTF-8"),
        ("[" * 100_000, r"bad.jsonl:2 is not JSON"),
    ],
)
def test_bad_lines_are_named(line: str | bytes, message: str, tmp_path: Path, tiny_tokenizer) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"messages": TURNS}).encode()
    path.write_bytes(good + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=message):
        list(render_file(path, tiny_tokenizer, "assistant"))


def test_empty_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl; give a JSONL file"):
        list(read_conversations(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n  \n")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        list(read_conversations(tmp_path / "empty.jsonl"))


def test_what_is_left_out_is_said(tmp_path: Path, sft_arguments, capsys) -> None:
    long = [TURNS[1], {"role": "assistant", "content": "four " * 200}]
    data = write(tmp_path / "a.jsonl", {"messages": TURNS[1:3]}, {"messages": long}, {"messages": TURNS[:2]})
    arguments = sft_arguments(tmp_path / "run", f'train_data=["{data}"]', "loop.steps=1")
    sft(config.load(SFTConfig, arguments))
    err = " ".join(capsys.readouterr().err.split())
    assert "1 conversations exceed 96 tokens: drop" in err
    assert "1 conversations have no token to learn and are left out" in err


def test_nothing_to_learn(tmp_path: Path, sft_arguments) -> None:
    data = write(tmp_path / "a.jsonl", {"messages": TURNS[:2]})
    with pytest.raises(ValueError, match=r"no sample left of 1 .* 1 without any token to learn"):
        sft(config.load(SFTConfig, sft_arguments(tmp_path / "run", f'train_data=["{data}"]')))


def test_several_files_and_truncation(tmp_path: Path, sft_arguments, tiny_tokenizer) -> None:
    files = [write(tmp_path / f"{name}.jsonl", {"messages": TURNS}) for name in "ab"]
    names = ", ".join(f'"{path}"' for path in files)
    arguments = sft_arguments(tmp_path / "run", f"train_data=[{names}]", "seq_len=40", "over_long=truncate")
    recipe = config.load(SFTConfig, arguments)
    dataset = sample_dataset(recipe, tiny_tokenizer, recipe.train_data)
    assert len(dataset.samples) == 2
    assert dataset.num_over_long == 2
    assert all(len(sample.token_ids) == 40 for sample in dataset.samples)
