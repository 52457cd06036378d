"""Every parameter of every published size splits by the plan and comes together again; other sizes are refused."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.presets import preset, preset_names
from qwench.parallel.plan import (
    PLAN,
    REPLICATED,
    TRAINING_PLAN,
    Plan,
    check,
    join,
    local_config,
    shard,
    spans,
    split_of,
)


def dense_presets() -> list[str]:
    return [name for name in preset_names() if not preset(name).num_experts]


def parameters(config: ModelConfig) -> dict[str, torch.Size]:
    """Those outside the layers and of one layer: all layers have the same shapes."""
    model = CausalLM(dataclasses.replace(config, num_hidden_layers=1), device="meta")
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", dense_presets())
def test_every_published_size(name: str) -> None:
    """For each number of devices that works: shards have the shapes of the local network and join to the whole."""
    config = preset(name)
    if config.rope_scaling is not None:
        pytest.skip("the decoder does not compute this one yet")
    shared = math.gcd(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    worlds = [world for world in (1, 2, 4, 8) if shared % world == 0]
    assert worlds
    whole = parameters(config)
    assert len(whole) >= 9
    for world in worlds:
        local = parameters(local_config(config, world))
        for parameter, shape in whole.items():
            split = split_of(parameter)
            if split == REPLICATED:
                assert local[parameter] == shape
                continue
            # Only the split axis matters: one row or column of every index along it says where each one goes.
            assert split.axis is not None
            line = torch.arange(shape[split.axis]).reshape([-1 if a == split.axis else 1 for a in range(len(shape))])
            shards = [shard(parameter, line, config, rank, world) for rank in range(world)]
            for rank, piece in enumerate(shards):
                assert piece.shape[split.axis] == local[parameter][split.axis]
                runs = [torch.arange(start, stop) for start, stop in spans(parameter, config, rank, world)]
                assert world == 1 or torch.equal(piece.flatten(), torch.cat(runs))
            assert torch.equal(join(parameter, shards, config), line)


CONFIG = ModelConfig(
    vocab_size=32, hidden_size=12, intermediate_size=4, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=2,
)  # fmt: skip


@pytest.mark.parametrize("plan", [PLAN, TRAINING_PLAN], ids=["engine", "training"])
def test_whole_tensors(plan: Plan) -> None:
    """Both axes, biases, and tensors that are not only a line."""
    for name, shape in parameters(CONFIG).items():
        whole = torch.randn(shape)
        shards = [shard(name, whole, CONFIG, rank, 2, plan) for rank in range(2)]
        assert torch.equal(join(name, shards, CONFIG, plan), whole)
        assert (shards[0].shape == whole.shape) == (split_of(name, plan) == REPLICATED)


def test_training_cuts_the_vocabulary() -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert split_of(name) == REPLICATED
        assert spans(name, CONFIG, 1, 2, TRAINING_PLAN) == [(16, 32)]
    check(dataclasses.replace(CONFIG, vocab_size=33), 2)
    with pytest.raises(ValueError, match="vocab_size 33 does not split over 2 devices; these work: 1"):
        check(dataclasses.replace(CONFIG, vocab_size=33), 2, TRAINING_PLAN)


def test_query_heads_stay_with_their_keys() -> None:
    """8 rows of q (4 heads), 4 of k and 4 of v (2 heads each): device 1 has heads 2, 3 and key/value head 1."""
    name = "model.layers.0.self_attn.qkv_proj.bias"
    assert shard(name, torch.arange(16), CONFIG, 1, 2).tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    assert shard("model.layers.0.mlp.gate_up_proj.weight", torch.arange(8)[:, None], CONFIG, 0, 2).tolist() == [
        [0], [1], [4], [5],
    ]  # fmt: skip


def test_what_does_not_split() -> None:
    message = "num_attention_heads 4, num_key_value_heads 2, intermediate_size 4 does not split over 3 devices; these "
    with pytest.raises(ValueError, match=re.escape(message + "work: 1, 2")):
        check(CONFIG, 3)
    with pytest.raises(ValueError, match="does not split over 4"):
        local_config(CONFIG, 4)
    with pytest.raises(ValueError, match="60 experts; only dense"):
        check(preset("qwen1.5-moe-a2.7b"), 2)
    with pytest.raises(ValueError, match=r"no entry for the parameter 'model\.layers\.0\.mlp\.router\.weight'"):
        split_of("model.layers.0.mlp.router.weight")
