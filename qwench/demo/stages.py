"""The stages of the demo, as data. Later parts of the recipe (DPO, GRPO, quantising, ...) join as further rows."""

from __future__ import annotations

from collections.abc import Callable

from qwench.demo.config import DemoConfig
from qwench.demo.evaluate import ANSWER_TOKENS, evaluate, export
from qwench.demo.pipeline import Stage
from qwench.demo.prepare import clean, collect, learn_tokenizer, write_conversations, write_shards
from qwench.demo.report import write_report
from qwench.demo.training import (
    pretrain_steps,
    run_pretrain,
    run_sft,
    seconds_per_token,
    sft_seconds_per_token,
    sft_steps,
)


def _megabytes(cfg: DemoConfig) -> float:
    return cfg.corpus_bytes / 1e6


def _pretrain_s(cfg: DemoConfig) -> float:
    stage = cfg.pretrain
    return pretrain_steps(cfg) * stage.batch_tokens * seconds_per_token(cfg, stage.seq_len, stage.batch_tokens)


def _sft_s(cfg: DemoConfig) -> float:
    return sft_steps(cfg) * cfg.sft.batch_tokens * sft_seconds_per_token(cfg)


def _evaluate_s(cfg: DemoConfig) -> float:
    # A decoding step of a model this small is bound by the host: about 0.7 ms a layer.
    return 4 + 2 * (cfg.eval_sums + 40) * 0.6 * ANSWER_TOKENS * 0.7e-3 * cfg.model.num_hidden_layers


def _command(name: str) -> Callable[[DemoConfig], str]:
    return lambda cfg: f"qwench {name} {cfg.out}/recipes/{name}.toml"


STAGES = (
    Stage(
        name="collect",
        title="Collect text",
        reads=("data", "corpus_bytes"),
        estimate=lambda cfg: 1 + 0.2 * _megabytes(cfg),
        run=collect,
    ),
    Stage(
        name="clean",
        title="Clean and deduplicate",
        reads=("held_out_bytes",),
        estimate=lambda cfg: 1 + 0.25 * _megabytes(cfg),
        run=clean,
    ),
    Stage(
        name="tokenizer",
        title="Learn a tokenizer",
        reads=("vocab_size",),
        estimate=lambda cfg: 1 + 0.35 * _megabytes(cfg),
        run=learn_tokenizer,
        command=lambda cfg: (
            f"qwench tokenizer train {cfg.out}/corpus/train.jsonl --vocab-size {cfg.vocab_size} "
            f"--out {cfg.out}/tokenizer"
        ),
    ),
    Stage(
        name="shards",
        title="Write token shards",
        reads=(),
        estimate=lambda cfg: 2 + 0.1 * _megabytes(cfg),
        run=write_shards,
        command=_command("data"),
    ),
    Stage(
        name="pretrain",
        title="Pretrain",
        reads=("model", "pretrain", "seed"),
        estimate=_pretrain_s,
        run=run_pretrain,
        command=_command("pretrain"),
    ),
    Stage(
        name="conversations",
        title="Write conversations",
        reads=("sft", "seed"),
        estimate=lambda cfg: 1 + 0.25 * _megabytes(cfg),
        run=write_conversations,
    ),
    Stage(
        name="sft",
        title="Fine-tune on conversations",
        reads=("sft", "seed"),
        estimate=_sft_s,
        run=run_sft,
        command=_command("sft"),
    ),
    Stage(name="evaluate", title="Evaluate", reads=("eval_sums", "seed"), estimate=_evaluate_s, run=evaluate),
    Stage(
        name="export",
        title="Save and reload",
        reads=(),
        estimate=lambda cfg: 2,
        run=export,
        command=lambda cfg: f"qwench convert {cfg.out}/sft {cfg.out}/model",
    ),
    Stage(name="report", title="Write the report", reads=(), estimate=lambda cfg: 3, run=write_report),
)
