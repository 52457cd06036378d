"""Every TOML file that ships loads under its stage's schema, and the network exists for the shapes they name."""

from __future__ import annotations

import pytest
import torch

from qwench import config
from qwench.data.pipeline.recipe import DataConfig
from qwench.model.decoder import CausalLM
from qwench.model.flops import num_parameters
from qwench.model.presets import preset
from qwench.parallel.layout import plan_layout
from qwench.train.config import PretrainConfig, SFTConfig
from qwench.train.job import sizes_of
from qwench.train.layouts import settle, workload_of
from qwench.train.memory import memory_plan, usable_bytes
from qwench.train.schedule import lr_ratio

PRETRAIN = ["out=x", "tokenizer=x", "train_shards=x"]
STARTED = ["model.preset=qwen-14b"]
"""For recipes that leave the size, or the checkpoint to continue from, to the user."""
SFT = ["out=x", "model.path=x", 'train_data=["x.jsonl"]']
NAMES = sorted(path.stem for path in config.RECIPES.glob("*.toml"))
SIZES = [
    *(f"qwen-{size}" for size in ("1.8b", "14b", "72b")),
    *(f"qwen2-{size}" for size in ("0.5b", "1.5b", "7b", "72b")),
    *(f"qwen2.5-{size}" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")),
]
TOKENS = {"qwen": 3.0e12, "qwen-1.8b": 2.2e12, "qwen2": 7e12, "qwen2-0.5b": 12e12, "qwen2.5": 18e12}
"""Published tokens of pretraining, by size or generation."""


@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads_by_its_bare_name(name: str) -> None:
    if name.startswith("data_"):
        recipe = config.load(DataConfig, [name, "out=x", "tokenizer=x", 'sources.web.paths=["x"]'])
        assert recipe.sources["web"].kind == "web"
        return
    if name.startswith("sft-"):
        recipe = config.load(SFTConfig, [name, *SFT])
        assert recipe.optim.lr < 1e-4
        return
    given = [] if set(config.read_recipe(config.find_recipe(name)).get("model", {})) & {"preset", "config"} else STARTED
    recipe = config.load(PretrainConfig, [name, *PRETRAIN, *given])
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


@pytest.mark.parametrize("size", SIZES)
def test_every_dense_size_has_a_recipe(size: str) -> None:
    """4 M tokens a step, the published tokens in all, the generation's row length and rotary base, and a plan that fits
    8 GPUs, or 64 for the largest."""
    recipe = config.load(PretrainConfig, [f"pretrain-{size}", *PRETRAIN])
    generation = size.partition("-")[0]
    assert recipe.model.preset == size
    assert recipe.seq_len == (2048 if generation == "qwen" else 4096)
    assert recipe.model.rope_theta == (None if generation == "qwen" else 10_000)
    tokens = recipe.loop.batch_rows * recipe.seq_len
    assert tokens == 4_194_304
    assert (recipe.loop.steps or 0) * tokens == pytest.approx(TOKENS.get(size) or TOKENS[generation], rel=1e-3)
    assert (recipe.optim.kind, recipe.optim.betas, recipe.optim.lr) == ("adamw", (0.9, 0.95), 3e-4)
    assert (recipe.schedule.kind, recipe.schedule.warmup_steps, recipe.schedule.min_ratio) == ("cosine", 2000, 0.1)
    world, shape = (64, preset(size)) if size.endswith("-72b") else (8, preset(size))
    assert recipe.parallel.auto
    if size in ("qwen-72b", "qwen2-72b"):
        return  # of nearly the same shape as qwen2.5-72b, and the search over 64 GPUs takes seconds
    memory = 81_559 << 20
    settled = settle(recipe, shape, world, memory)
    layout = plan_layout(world, **sizes_of(settled.parallel))
    assert memory_plan(workload_of(settled, shape, layout)).total <= usable_bytes(memory, world)
    assert settled.loop.batch_rows % layout.data == 0, "gradient accumulation makes up the published step"


@pytest.mark.parametrize("generation", ["qwen2", "qwen2.5"])
def test_second_stages(generation: str) -> None:
    given = [*PRETRAIN, "model.path=x"]
    recipe = config.load(PretrainConfig, [f"pretrain-{generation}-long", *given])
    assert (recipe.seq_len, recipe.model.rope_theta) == (32_768, 1_000_000)
    assert recipe.seq_len * recipe.loop.batch_rows == 4_194_304


@pytest.mark.parametrize(("size", "lr"), [("7b", 3e-5), ("14b", 6e-5)])
def test_code_qwen(size: str, lr: float) -> None:
    recipe = config.load(PretrainConfig, [f"pretrain-code-qwen-{size}", *PRETRAIN, "model.path=x"])
    assert (recipe.seq_len, recipe.optim.lr) == (8192, lr)
    assert (recipe.loop.steps or 0) * recipe.loop.batch_rows * 8192 == pytest.approx(90e9, rel=1e-3)
    steps = recipe.loop.steps or 0
    ratios = [lr_ratio(step, steps, recipe.schedule) for step in (0, round(0.03 * steps) - 1, steps // 2, steps - 1)]
    assert ratios[0] < 0.01
    assert ratios[1:] == [1.0, 1.0, 1.0]
