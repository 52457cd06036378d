"""`load_model`: a model with its weights, ready to compute, from whatever `checkpoint.py` can open."""

from __future__ import annotations

from pathlib import Path

import torch

from qwench.model.checkpoint import open_checkpoint, read_config
from qwench.model.decoder import CausalLM
from qwench.model.weights import load_weights, parse_dtype

__all__ = ["load_model", "read_config"]


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    *,
    progress: bool = False,
) -> CausalLM:
    """A model in evaluation mode with its weights.

    `path` is a model directory (Hugging Face or Qwen-1), a hub id such as "Qwen/Qwen2.5-0.5B", a GGUF file or a qwench
    run. dtype is "float32", "float16", "bfloat16", a torch dtype, or "auto" for the narrowest that holds all stored
    values exactly (float32 for quantised files). `progress` shows a bar on a terminal.
    Raises ValueError, naming tensor and file, for what cannot be loaded.
    """
    checkpoint = open_checkpoint(path)
    names = list(checkpoint.checked_table())
    kind = checkpoint.dtype(names) if dtype == "auto" else parse_dtype(dtype)
    model = CausalLM(checkpoint.config, device=device, dtype=kind)
    load_weights(model, checkpoint, progress=progress)
    return model.eval()
