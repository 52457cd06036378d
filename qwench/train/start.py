"""Where a training run's weights come from: a published shape, a shape of one's own, or a checkpoint."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from qwench.model.checkpoint import open_checkpoint, read_config
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.init import init_parameter, init_weights
from qwench.model.load import load_model
from qwench.model.presets import preset
from qwench.parallel.blocks import cut, whole_shapes
from qwench.parallel.data import apply_data_parallel
from qwench.parallel.layout import Team
from qwench.tokenizer import Tokenizer
from qwench.train.config import StartConfig

DEFAULT_ROWS = next(f.default for f in dataclasses.fields(ModelConfig) if f.name == "vocab_size")


def model_config(start: StartConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of the model that `build_model` makes, without allocating anything.

    Raises ValueError when the tokenizer has more ids than the model has rows, or for a checkpoint that is not there.
    """
    if start.path is not None:
        config = read_config(start.path)
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
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {config.vocab_size} embedding "
            f"rows; set vocab_size to {tokenizer.padded_vocab_size} or use the tokenizer that belongs to the model"
        )
    return config


def build_model(start: StartConfig, tokenizer: Tokenizer, device: torch.device, seed: int) -> CausalLM:
    """fp32 weights on `device`. Raises ValueError when the tokenizer has more ids than the model has rows."""
    config = model_config(start, tokenizer)
    if start.path is not None:
        return load_model(start.path, device=device, dtype="float32")
    model = CausalLM(config, device=device, dtype=torch.float32)
    init_weights(model, seed, start.scale_residual)
    return model


def build_sharded(
    start: StartConfig,
    tokenizer: Tokenizer,
    team: Team,
    seed: int,
    compute_dtype: torch.dtype,
    *,
    reshard_after_forward: bool = True,
) -> CausalLM:
    """This rank's share of the same model, for a team of several ranks; `build_model` for one.

    A rank holds its shares and one whole unit (a block, or the embedding and the output matrix) at a time. The values
    do not depend on the layout. Raises ValueError as `build_model` does.
    """
    if team.is_alone:
        return build_model(start, tokenizer, team.device, seed)
    config = model_config(start, tokenizer)
    checkpoint = open_checkpoint(start.path) if start.path is not None else None
    if checkpoint is not None:
        checkpoint.checked_table()
    read = checkpoint.reader() if checkpoint is not None else None
    model = CausalLM(config, device="meta", dtype=torch.float32)
    hand_to_axes(model, team)
    shapes = whole_shapes(model)
    filled: dict[nn.Parameter, nn.Parameter] = {}

    def fill(name: str, empty: nn.Parameter) -> nn.Parameter:
        if empty not in filled:  # tied weights come twice
            whole = torch.empty(shapes[name], dtype=torch.float32, device=team.device)
            if read is not None:
                read(name, 0, whole)
            else:
                init_parameter(name, whole, config, seed, start.scale_residual)
            filled[empty] = nn.Parameter(cut(name, whole, config, team))
        return filled[empty]

    def fill_unit(unit: nn.Module, prefix: str) -> None:
        for path, module in unit.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    setattr(module, key, fill(prefix + (f"{path}.{key}" if path else key), parameter))

    apply_data_parallel(model, team, compute_dtype, reshard_after_forward=reshard_after_forward, before_unit=fill_unit)
    return model


def hand_to_axes(model: CausalLM, team: Team) -> None:
    """Apply the axes that change what a rank computes to a model without memory, whose parameters become its cuts.

    The context axis changes batches only (`batch.py`).
    """
    assert team.layout.pipeline == 1, "refused by job.run_stage"
    if team.layout.tensor > 1:
        from qwench.parallel.axes import apply_tensor  # DTensor's import takes a second, which one process saves

        apply_tensor(model, team.group("tensor"))
