"""Read an exported model back: it must hold the weights of the run, and load into a model with the same logits.

Every rank compares its own share of the files with its own memory, bit for bit. The logits compare what a user gets
from the directory, by the normal way of loading, with what the training model computes: they find a directory in which
every tensor is right and the config is wrong.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from qwench.model.checkpoint import open_checkpoint
from qwench.model.decoder import CausalLM
from qwench.model.load import load_model
from qwench.model.tensor_files import SafetensorsStore
from qwench.ops.attention import AttnMeta
from qwench.parallel.blocks import blocks_of
from qwench.parallel.data import no_gradients
from qwench.parallel.layout import Team, axes_in_use
from qwench.train.sharded_files import read_blocks

log = logging.getLogger("qwench.train")

NUM_TOKENS = 32
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of two logits as a share of the largest logit: other kernels round in another order."""


@torch.no_grad()
def verify_export(model: CausalLM, directory: Path, dtype: torch.dtype, team: Team) -> None:
    """Raises RuntimeError naming what differs. By all ranks together.

    The logits are compared where every rank computes whole rows (no tensor, context or pipeline axis).
    """
    checkpoint = open_checkpoint(directory)
    checkpoint.checked_table()
    assert isinstance(checkpoint.store, SafetensorsStore)
    for block in blocks_of(model, team):
        stored = torch.empty(block.values.shape, dtype=dtype)
        read_blocks(checkpoint.store, [replace(block, values=stored)])
        if not torch.equal(stored, block.values.to("cpu", dtype)):
            raise RuntimeError(f"{directory} does not hold the weights of this run: {block.name} differs")
    if axes_in_use(team.layout):
        return
    tokens_T = torch.arange(NUM_TOKENS, device=team.device) * 7 % model.config.vocab_size
    positions_T = torch.arange(NUM_TOKENS, device=team.device)
    with no_gradients(model):
        meta = AttnMeta.packed([NUM_TOKENS], team.device)
        wanted_TV = model.head(model(tokens_T, positions_T, meta)).cpu()
    if team.is_main:
        _compare_logits(directory, dtype, team.device, tokens_T, wanted_TV)
    team.barrier()


def _compare_logits(
    directory: Path, dtype: torch.dtype, device: torch.device, tokens_T: torch.Tensor, wanted_TV: torch.Tensor
) -> None:
    num_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.5 * num_bytes:
        device = torch.device("cpu")
    found_TV = load_model(directory, device=device, dtype=dtype).logits(tokens_T[None])[0].cpu()
    worst = float((found_TV - wanted_TV).abs().max() / wanted_TV.abs().max().clamp_min(1e-6))
    log.info("re-loaded %s: logits differ by %.2g of the largest", directory, worst)
    if not worst <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"the model loaded from {directory} has other logits than this run's: {worst:.2g} of the largest"
        )
