"""From a loaded model and decided settings to a `Core` that can run steps: the same for every rank of an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from qwench.engine.blocks import BlockPool
from qwench.engine.cache import cache_shape, num_blocks_that_fit
from qwench.engine.config import EngineConfig
from qwench.engine.core import Core
from qwench.engine.proposers import DraftModel, load_draft_model
from qwench.engine.runner import Runner
from qwench.model.decoder import CausalLM
from qwench.parallel.tensor import num_local_kv_heads
from qwench.tokenizer import Tokenizer

log = logging.getLogger("qwench.engine")


def build_core(
    model: CausalLM, tokenizer: Tokenizer, config: EngineConfig, agree: Callable[[int], int] = lambda count: count
) -> Core:
    """`config` has numbers for max_len, max_seqs and tokens of a step. `agree` takes the number of blocks that fit here
    and returns the number to allocate.

    Raises ValueError when the cache does not fit.
    """
    max_len, max_seqs, max_step_tokens = config.max_len, config.max_seqs, config.max_step_tokens
    idle_step_tokens, size = config.idle_step_tokens, config.block_size
    assert max_len is not None
    assert max_seqs is not None
    assert max_step_tokens is not None
    assert idle_step_tokens is not None
    weight = model.model.embed_tokens.weight
    device, dtype = weight.device, model.model.compute_dtype or weight.dtype
    longest = max_len + (config.draft_tokens if config.speculate != "off" else 0)
    runner = Runner(model, config, tokenizer.vocab_size, max_seqs, -(-longest // size))
    shapes = [cache_shape(model.config, config, dtype, num_local_kv_heads(model))]
    if config.draft_model is not None:
        draft = load_draft_model(config.draft_model, device, dtype, tokenizer)
        runner.draft = DraftModel(draft, runner)
        shapes.append(cache_shape(draft.config, config, dtype))
    with torch.inference_mode():
        fitting = num_blocks_that_fit(
            shapes, config, max_seqs * max_len, device, lambda: runner.rehearse(idle_step_tokens)
        )
        num_blocks = agree(fitting)
        runner.caches = shapes[0].allocate(num_blocks, device)
        if runner.draft is not None:
            runner.draft.caches = shapes[1].allocate(num_blocks, device)
    log.info(
        "cache of %d tokens (%.2f GiB), up to %d sequences of %d tokens",
        (num_blocks - 1) * size, num_blocks * sum(s.block_bytes for s in shapes) / 2**30, max_seqs, max_len,
    )  # fmt: skip
    pool = BlockPool(num_blocks, size, caching=config.prefix_caching)
    return Core(runner, pool, config, max_seqs, max_step_tokens, idle_step_tokens)
