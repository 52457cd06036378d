"""Logits, loss and gradients are those of transformers' Qwen2ForCausalLM, through saved files in both directions."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwench.data.packing import PackedRow
from qwench.model.config import ModelConfig
from qwench.model.load import load_model
from qwench.model.names import pieces
from qwench.model.weights import save_pretrained
from qwench.train.batch import make_batch
from qwench.train.loss import next_token_loss

BASE = dict(
    vocab_size=192, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VARIANTS = {
    "untied": {},
    "tied": dict(tie_word_embeddings=True),
    "mha": dict(num_key_value_heads=4),
    "7 to 1": dict(hidden_size=56, num_attention_heads=7, num_key_value_heads=1),
    "14 to 2, as 0.5B": dict(hidden_size=112, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "head_dim 64": dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1),
    "head_dim 128": dict(hidden_size=256, num_attention_heads=2, num_key_value_heads=2),
    "explicit head_dim": dict(head_dim=24),
    "window on upper layers": dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "window in every layer": dict(use_sliding_window=True, sliding_window=4, max_window_layers=0),
    "window switched off": dict(use_sliding_window=False, sliding_window=4, max_window_layers=0),
    "theta 1e4": dict(rope_theta=1e4),
    "theta 1e6, eps 1e-5": dict(rope_theta=1e6, rms_norm_eps=1e-5),
}
TOKENS = torch.randint(192, (2, 33), generator=torch.Generator().manual_seed(3))


def config_of(name: str) -> ModelConfig:
    return ModelConfig(**(BASE | VARIANTS[name]))


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Weights as the decoder test uses them: nothing is 0 or 1, everything matters."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        center, std = (1.0, 0.3) if "norm" in name else (0.0, 0.12)
        parameter.normal_(center, std, generator=generator)


@torch.no_grad()
def assert_same_logits(ours, theirs) -> None:
    want = theirs(TOKENS).logits
    assert float(want.abs().max()) > 3
    torch.testing.assert_close(ours.logits(TOKENS), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_ours_to_theirs(name: str, tmp_path: Path, make_model) -> None:
    ours = make_model(config_of(name))
    randomise(ours)
    save_pretrained(ours, tmp_path / "model")
    theirs, info = Qwen2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_logits(ours, theirs.eval())


@pytest.mark.parametrize("name", VARIANTS)
def test_theirs_to_ours(name: str, tmp_path: Path) -> None:
    theirs = Qwen2ForCausalLM(Qwen2Config(**config_of(name).to_hf())).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "model")
    ours = load_model(tmp_path / "model")
    assert_same_logits(ours, theirs)
    wanted, read = config_of(name), ours.config
    for field in ("head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings"):
        assert (getattr(read, field) or read.d_head) == (getattr(wanted, field) or wanted.d_head)
    assert [read.window(i) for i in range(3)] == [wanted.window(i) for i in range(3)]


def test_variants_differ(make_model) -> None:
    """A switch that changed nothing would make the comparisons above empty."""
    logits = {}
    for name in ("untied", "window on upper layers", "window in every layer", "theta 1e4"):
        model = make_model(config_of(name))
        randomise(model)
        logits[name] = model.logits(TOKENS)
    for left, right in itertools.combinations(logits.values(), 2):
        assert float((left - right).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["tied", "untied", "7 to 1", "window on upper layers"])
def test_loss_and_gradients_of_a_packed_batch(name: str, tmp_path: Path, make_model) -> None:
    """A packed batch with zero weights against the sum of transformers' losses on the sequences one by one."""
    ours = make_model(config_of(name))
    randomise(ours)
    save_pretrained(ours, tmp_path / "model")
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 192, length, dtype=np.int32) for length in (17, 5, 30, 2)]
    learnt = [rng.random(len(sample)) < 0.7 for sample in samples]
    for keep in learnt:
        keep[-1] = True

    total = torch.zeros(())
    for sample, keep in zip(samples, learnt, strict=True):
        ids = torch.from_numpy(sample).long()[None]
        labels = ids.masked_fill(~torch.from_numpy(keep)[None], -100)
        total = total + theirs(ids, labels=labels).loss * int(keep[1:].sum())
    total.backward()

    def row(chosen: list[int]) -> PackedRow:
        return PackedRow(
            tokens=np.concatenate([samples[i] for i in chosen]),
            targets=np.concatenate([np.append(samples[i][1:], 0) for i in chosen]),
            loss_weights=np.concatenate([np.append(learnt[i][1:], False) for i in chosen]).astype(np.float32),
            seq_lens=np.array([len(samples[i]) for i in chosen], np.int32),
        )

    loss = next_token_loss(ours, make_batch([row([0, 1]), row([2, 3])], torch.device("cpu")))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    wanted = {key: p.grad for key, p in theirs.named_parameters()}
    for key, parts in pieces(ours.config, "hf").items():
        want = torch.cat([wanted[part.name] for part in parts])
        got = ours.get_parameter(key).grad
        assert want.abs().max() > 1e-4, key
        assert float((got - want).norm() / want.norm()) < 1e-4, key
