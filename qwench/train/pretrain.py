"""`qwench pretrain`: next-token training on token shards [Qwen TR 2.4]."""

from __future__ import annotations

from qwench import config
from qwench.data.packing import PretrainDataset
from qwench.data.shards import TokenShards
from qwench.run import Run
from qwench.tokenizer import Tokenizer
from qwench.train.command import parse_recipe, report
from qwench.train.config import PretrainConfig
from qwench.train.loop import Trainer, TrainResult, training_device
from qwench.train.start import build_model


def pretrain(recipe: PretrainConfig) -> TrainResult:
    """Train from `recipe`; the result is recipe.out/model. Raises ValueError for what does not fit together."""
    tokenizer = Tokenizer.load(recipe.tokenizer)
    shards = TokenShards.open(recipe.train_shards, tokenizer.fingerprint)
    source = PretrainDataset(shards, recipe.seq_len, recipe.loop.seed, attend_across=recipe.attend_across)
    val_source = None
    if recipe.val_shards is not None:
        val_shards = TokenShards.open(recipe.val_shards, tokenizer.fingerprint)
        val_source = PretrainDataset(val_shards, recipe.seq_len, 0, attend_across=recipe.attend_across)
    model = build_model(recipe.model, tokenizer, training_device(recipe.loop), recipe.loop.seed)
    with Run(recipe.out, recipe, "pretrain", recipe.resume) as run:
        return Trainer(recipe, run, model, tokenizer, source, val_source).train()


def main(argv: list[str]) -> int:
    recipe = config.load(PretrainConfig, parse_recipe("pretrain", __doc__, argv))
    report(pretrain(recipe), recipe.out)
    return 0
