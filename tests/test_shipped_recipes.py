"""Every TOML file that ships loads under its stage's schema, and the network exists for the shapes they name."""

from __future__ import annotations

import pytest
import torch

from qwench import config
from qwench.model.decoder import CausalLM
from qwench.model.flops import num_parameters
from qwench.model.presets import preset
from qwench.train.config import PretrainConfig, SFTConfig

PRETRAIN = ["out=x", "tokenizer=x", "train_shards=x"]
SFT = ["out=x", "model.path=x", 'train_data=["x.jsonl"]']
NAMES = sorted(path.stem for path in config.RECIPES.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads_by_its_bare_name(name: str) -> None:
    if name.startswith("sft-"):
        recipe = config.load(SFTConfig, [name, *SFT])
        assert recipe.optim.lr < 1e-4
        return
    recipe = config.load(PretrainConfig, [name, *PRETRAIN])
    shape = recipe.model.config or preset(recipe.model.preset or "")
    with torch.device("meta"):
        model = CausalLM(shape, device="meta")
    assert sum(p.numel() for p in model.parameters()) == num_parameters(shape)


def test_published_values() -> None:
    """Spot checks against the reports: tokens of a step, peak and final learning rates."""
    qwen = config.load(PretrainConfig, ["pretrain-qwen", *PRETRAIN])
    assert qwen.loop.batch_rows * qwen.seq_len == 4_194_304
    assert (qwen.loop.steps or 0) * 4_194_304 == pytest.approx(2.4e12, rel=0.01)
    sft = config.load(SFTConfig, ["sft-qwen2.5", *SFT])
    assert sft.optim.lr * sft.schedule.min_ratio == pytest.approx(7e-7)
