"""The demo's training stages: a plan that fits the machine, and recipes for `qwench pretrain` and `qwench sft`."""

from __future__ import annotations

import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwench import config
from qwench.data.packing import row_of_samples
from qwench.demo.config import DemoConfig
from qwench.demo.pipeline import Context, Results
from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM
from qwench.model.init import init_weights
from qwench.ops.hardware import pick_device, pick_dtype
from qwench.run import write_atomically
from qwench.train.batch import make_batch
from qwench.train.config import (
    CheckpointConfig,
    LoopConfig,
    OptimConfig,
    PretrainConfig,
    ScheduleConfig,
    SFTConfig,
    StartConfig,
)
from qwench.train.loop import TrainResult
from qwench.train.loss import next_token_loss
from qwench.train.optim import build_optimizer
from qwench.train.pretrain import pretrain
from qwench.train.sft import sft
from qwench.types import Sample


def model_config(cfg: DemoConfig) -> ModelConfig:
    shape = config.to_dict(cfg.model)
    return ModelConfig(
        **shape,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        max_position_embeddings=max(cfg.pretrain.seq_len, cfg.sft.seq_len, 512),
    )


@functools.cache
def seconds_per_token(cfg: DemoConfig, seq_len: int, batch_tokens: int) -> float:
    """Measured time of a training step of this shape, over its tokens.

    The median of a few, raised by a tenth, because a run also validates and saves.
    """
    device = pick_device()
    shape = config.to_dict(model_config(cfg)) | {"vocab_size": -(-cfg.vocab_size // 128) * 128}
    model = CausalLM(config.from_dict(ModelConfig, shape), device=device, dtype=torch.float32)
    init_weights(model, 0)
    model.set_compute_dtype(pick_dtype("auto", device))
    optimizer = build_optimizer(model, OptimConfig(kind="muon"))
    rng = np.random.default_rng(0)
    samples = [
        Sample(token_ids=rng.integers(0, cfg.vocab_size, seq_len, np.int32), loss_weights=np.ones(seq_len, np.float32))
        for _ in range(batch_tokens // seq_len)
    ]
    batch = make_batch([row_of_samples(samples)], device)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        (next_token_loss(model, batch) / batch.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return 1.1 * statistics.median(times[2:]) / batch.num_tokens


def pretrain_steps(cfg: DemoConfig) -> int:
    """The configured tokens, or what fits into max_seconds on this machine."""
    stage = cfg.pretrain
    fitting = int(stage.max_seconds / seconds_per_token(cfg, stage.seq_len, stage.batch_tokens))
    return max(1, min(stage.tokens, fitting) // stage.batch_tokens)


def _planned(context: Context, name: str, steps: int) -> int:
    """The number of steps that an interrupted attempt settled on, so that it is resumed and not begun anew."""
    recipe = context.path("recipes", f"{name}.toml")
    if context.path(name, "config.toml").exists() and recipe.exists():
        return int(config.read_toml(recipe)["loop"]["steps"])
    return steps


def _write_recipe(context: Context, name: str, recipe: Any) -> None:
    path = context.path("recipes", f"{name}.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, config.dump(recipe))


def run_pretrain(context: Context) -> Results:
    cfg, stage = context.cfg, context.cfg.pretrain
    steps = _planned(context, "pretrain", pretrain_steps(cfg))
    recipe = PretrainConfig(
        out=context.path("pretrain"),
        resume="force",
        model=StartConfig(config=model_config(cfg)),
        tokenizer=context.path("tokenizer"),
        train_shards=context.path("data", "shards", "train"),
        val_shards=context.path("shards", "held_out"),
        seq_len=stage.seq_len,
        attend_across=True,
        loop=LoopConfig(
            steps=steps,
            batch_rows=max(1, stage.batch_tokens // stage.seq_len),
            eval_every=max(1, steps // 5),
            eval_rows=128,
            seed=cfg.seed,
        ),
        optim=OptimConfig(kind="muon", lr=stage.lr, muon_lr=stage.muon_lr),
        schedule=ScheduleConfig(kind="linear", warmup_steps=min(stage.warmup_steps, steps // 2), min_ratio=0.0),
        checkpoint=CheckpointConfig(every_steps=max(1, steps // 4), keep_last=1, keep_best=False),
    )
    _write_recipe(context, "pretrain", recipe)
    result = pretrain(recipe)
    return _training_results(context.path("pretrain"), result)


def _training_results(run: Path, result: TrainResult) -> Results:
    provenance = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    return {
        "summary": f"{result.steps} steps, {result.tokens / 1e6:.2f} M tokens, validation loss {result.val_loss:.3f} "
        f"nats; {result.tokens_per_s:,.0f} tokens/s, MFU {result.mfu:.1%}",
        "steps": result.steps,
        "tokens": result.tokens,
        "val_loss": result.val_loss,
        "tokens_per_s": result.tokens_per_s,
        "mfu": result.mfu,
        "skipped_steps": result.skipped_steps,
        "parameters": provenance["parameters"],
        "precision": provenance["precision"],
        "ops": provenance["ops"],
    }


def run_sft(context: Context) -> Results:
    cfg, stage = context.cfg, context.cfg.sft
    batch_rows = max(1, stage.batch_tokens // stage.seq_len)
    steps = _planned(context, "sft", sft_steps(cfg))
    recipe = SFTConfig(
        out=context.path("sft"),
        resume="force",
        model=StartConfig(path=context.path("pretrain", "model")),
        train_data=(context.path("conversations", "train.jsonl"),),
        val_data=(context.path("conversations", "val.jsonl"),),
        seq_len=stage.seq_len,
        loop=LoopConfig(
            steps=steps, batch_rows=batch_rows, eval_every=max(1, steps // 5), eval_rows=128, seed=cfg.seed
        ),
        optim=OptimConfig(kind="muon", lr=stage.lr, muon_lr=stage.muon_lr),
        schedule=ScheduleConfig(kind="linear", warmup_steps=min(stage.warmup_steps, steps // 2), min_ratio=0.0),
        checkpoint=CheckpointConfig(every_steps=max(1, steps // 4), keep_last=1, keep_best=False),
    )
    _write_recipe(context, "sft", recipe)
    return _training_results(context.path("sft"), sft(recipe))


def sft_steps(cfg: DemoConfig) -> int:
    """Steps of `epochs` passes over the conversations, or what fits into max_seconds on this machine.

    A conversation takes about 75 tokens with a sum in worked form, 55 in plain form, and 60 for the other tasks.
    """
    stage = cfg.sft
    per_sum = 75 if stage.sum_form == "worked" else 55
    tokens = stage.epochs * (per_sum * stage.num_sums + 60 * (stage.num_docs + stage.num_manners))
    fitting = stage.max_seconds / sft_seconds_per_token(cfg)
    return max(1, int(min(tokens, fitting)) // stage.batch_tokens)


def sft_seconds_per_token(cfg: DemoConfig) -> float:
    """Short samples are padded to the longest in attention, which makes a token dearer than in pretraining."""
    return 1.2 * seconds_per_token(cfg, cfg.sft.seq_len, cfg.sft.batch_tokens)
