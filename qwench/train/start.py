"""Where a training run's weights come from: a published shape, a shape of one's own, or a checkpoint."""

from __future__ import annotations

import dataclasses

import torch

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.init import init_weights
from qwench.model.load import load_model
from qwench.model.presets import preset
from qwench.tokenizer import Tokenizer
from qwench.train.config import StartConfig

DEFAULT_ROWS = next(f.default for f in dataclasses.fields(ModelConfig) if f.name == "vocab_size")


def build_model(start: StartConfig, tokenizer: Tokenizer, device: torch.device, seed: int) -> CausalLM:
    """fp32 weights on `device`. Raises ValueError when the tokenizer has more ids than the model has rows."""
    if start.path is not None:
        model = load_model(start.path, device=device, dtype="float32")
    else:
        config = preset(start.preset) if start.preset is not None else start.config
        assert config is not None
        rows = start.vocab_size or (config.vocab_size if start.preset else tokenizer.padded_vocab_size)
        if start.config is not None and config.vocab_size not in (rows, DEFAULT_ROWS):
            raise ValueError(
                f"model.config.vocab_size is {config.vocab_size} but the tokenizer needs {rows} rows; leave it out, "
                "or set model.vocab_size to choose another number of rows"
            )
        config = dataclasses.replace(
            config, vocab_size=rows, bos_token_id=tokenizer.eod_id, eos_token_id=tokenizer.eod_id
        )
        model = CausalLM(config, device=device, dtype=torch.float32)
        init_weights(model, seed, start.scale_residual)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {model.config.vocab_size} embedding "
            f"rows; set vocab_size to {tokenizer.padded_vocab_size} or use the tokenizer that belongs to the model"
        )
    return model
