"""Where a training run's weights come from: a published shape, a shape of one's own, or a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from qwench.model.checkpoint import open_checkpoint, read_config
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.init import init_parameter, init_weights
from qwench.model.load import load_model
from qwench.model.presets import preset
from qwench.parallel.axes import apply_tensor
from qwench.parallel.blocks import cut, whole_shapes
from qwench.parallel.data import apply_data_parallel
from qwench.parallel.layout import Team
from qwench.parallel.stages import StagedLM, deal_layers, stages_of_rank
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
    if start.rope_theta is not None:
        config = dataclasses.replace(config, rope_theta=start.rope_theta)
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
        model = load_model(start.path, device=device, dtype="float32")
        model.config = model.model.config = config
        return model
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
    virtual_stages: int = 1,
    before_sharding: Callable[[CausalLM], None] = lambda model: None,
) -> CausalLM:
    """This rank's share of the same model, for a team of several ranks; `build_model` for one.

    A rank holds its shares and one whole unit (a block, or the embedding and the output matrix) at a time. The values
    do not depend on the layout. `before_sharding` may change how blocks run, after the tensor axis has cut them and
    before FSDP shards them; with several ranks the parameters have no memory yet. Raises ValueError as `build_model`
    does.
    """
    if team.is_alone:
        model = build_model(start, tokenizer, team.device, seed)
        before_sharding(model)
        return model
    config = model_config(start, tokenizer)
    checkpoint = open_checkpoint(start.path) if start.path is not None else None
    if checkpoint is not None:
        checkpoint.checked_table()
    read = checkpoint.reader() if checkpoint is not None else None
    model = CausalLM(config, device="meta", dtype=torch.float32)
    model = hand_to_axes(model, team, virtual_stages)
    before_sharding(model)
    shapes = whole_shapes(model)

    def filled(name: str) -> nn.Parameter:
        whole = torch.empty(shapes[name], dtype=torch.float32, device=team.device)
        if read is not None:
            read(name, 0, whole)
        else:
            init_parameter(name, whole, config, seed, start.scale_residual)
        return nn.Parameter(cut(name, whole, config, team))

    def fill_unit(unit: nn.Module, prefix: str) -> None:
        # Tied weights come twice, in one unit. What is kept longer than the unit is never freed by FSDP.
        once: dict[nn.Parameter, nn.Parameter] = {}
        for path, module in unit.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    if parameter not in once:
                        once[parameter] = filled(prefix + (f"{path}.{key}" if path else key))
                    setattr(module, key, once[parameter])

    apply_data_parallel(model, team, compute_dtype, reshard_after_forward=reshard_after_forward, before_unit=fill_unit)
    return model


def hand_to_axes(model: CausalLM, team: Team, virtual_stages: int = 1) -> CausalLM:
    """Apply the axes that change what a rank computes to a model without memory, whose parameters become its cuts.

    With a pipeline the result is another model, which has the rank's layers. The context axis changes batches only
    (`batch.py`).
    """
    if team.layout.tensor > 1:
        apply_tensor(model, team.group("tensor"))
    num_ranks = team.layout.pipeline
    if num_ranks > 1:
        counts = deal_layers(model.config, num_ranks * virtual_stages)
        model = StagedLM(model, stages_of_rank(counts, team.place("pipeline"), num_ranks))
    return model
