"""`qwench pretrain`: next-token training on token shards [Qwen TR 2.4]."""

from __future__ import annotations

import logging
from pathlib import Path

from qwench import config
from qwench.data.mixture import MixedDataset, MixedShards, is_mixture
from qwench.data.packing import PretrainDataset
from qwench.data.shards import TokenShards
from qwench.data.sources import JoinedShards
from qwench.parallel.launch import place_in_environment
from qwench.parallel.layout import Team
from qwench.tokenizer import Tokenizer
from qwench.train.command import parse_recipe, report
from qwench.train.config import PretrainConfig
from qwench.train.job import open_run, run_stage
from qwench.train.loop import Trainer, TrainResult
from qwench.train.prepare import prepare_model
from qwench.train.start import model_config

log = logging.getLogger("qwench.train")


def pretrain(recipe: PretrainConfig) -> TrainResult:
    """Train from `recipe`; the result is recipe.out/model. Raises ValueError for what does not fit together.

    With recipe.gpus > 1 the work is done by that many processes, which import the caller's main module.
    """
    return run_stage(
        _train,
        recipe,
        lambda recipe: model_config(recipe.model, Tokenizer.load(recipe.tokenizer)),
        check_data=_check_shards,
    )


def _datasets(
    recipe: PretrainConfig, tokenizer: Tokenizer
) -> tuple[PretrainDataset | MixedDataset, PretrainDataset | None]:
    """For training and for validation."""
    train_shards = (recipe.train_shards,) if isinstance(recipe.train_shards, Path) else recipe.train_shards
    if any(is_mixture(directory) for directory in train_shards):
        directory, *others = train_shards
        if others:
            raise ValueError("a mixture (mixture.json) is read alone; give one directory as train_shards")
        mixture = MixedShards.open(directory, tokenizer.fingerprint)
        source = MixedDataset(mixture, recipe.seq_len, recipe.loop.seed, attend_across=recipe.attend_across)
        if source.left_out:
            log.warning("left out, for lack of one row of tokens: %s", ", ".join(source.left_out))
    else:
        shards = JoinedShards.open(train_shards, tokenizer.fingerprint)
        source = PretrainDataset(shards, recipe.seq_len, recipe.loop.seed, attend_across=recipe.attend_across)
    if recipe.val_shards is None:
        return source, None
    val_shards = TokenShards.open(recipe.val_shards, tokenizer.fingerprint)
    return source, PretrainDataset(val_shards, recipe.seq_len, 0, attend_across=recipe.attend_across)


def _check_shards(recipe: PretrainConfig) -> None:
    """Raise ValueError for shards that are missing, too short, another tokenizer's or damaged."""
    place = place_in_environment()
    for dataset in _datasets(recipe, Tokenizer.load(recipe.tokenizer)):
        if dataset is not None and recipe.verify_shards:
            dataset.shards.verify(place.rank, place.world)


def _train(recipe: PretrainConfig, team: Team) -> TrainResult:
    tokenizer = Tokenizer.load(recipe.tokenizer)
    source, val_source = _datasets(recipe, tokenizer)
    prepared = prepare_model(recipe, recipe.model, tokenizer, team, row_tokens=recipe.seq_len)
    with open_run(recipe, "pretrain", team) as run:
        return Trainer(recipe, run, prepared, tokenizer, source, val_source, team=team).train()


def main(argv: list[str]) -> int:
    recipe = config.load(PretrainConfig, parse_recipe("pretrain", __doc__, argv))
    report(pretrain(recipe), recipe.out)
    return 0
