"""Recipes of the training stages. Values that the reports publish are the defaults; the rest is ours and said so."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qwench.config import config
from qwench.model.config import ModelConfig
from qwench.run import Resume


@config
class OptimConfig:
    """AdamW as in [Qwen TR 2.4]; weight decay and clipping from the memo of the August 2023 release."""

    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only: norms and biases are left alone."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; give a positive learning rate")


@config
class ScheduleConfig:
    kind: Literal["cosine", "constant", "linear"] = "cosine"
    """Shape after the warm-up: cosine or linear decay to min_ratio, or constant."""
    warmup_steps: int = 2000
    """Linear warm-up from 0 [Qwen TR memo]."""
    min_ratio: float = 0.1
    """Final learning rate as a share of the peak."""


@config
class CheckpointConfig:
    every_steps: int = 500
    """Steps between resumable checkpoints; the last step always has one."""
    keep_last: int = 2
    """Newest checkpoints kept on disk."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""


@config
class GuardConfig:
    """Steps that would harm the model are skipped, and their batch is kept for inspection."""

    grad_norm_factor: float = 20.0
    """A gradient norm above this multiple of its running median is a spike; 0 switches the test off."""
    window_steps: int = 64
    """Steps over which the median is taken; no spike is declared before half of them have passed."""
    max_consecutive: int = 5
    """Bad steps in a row after which the run stops."""


@config
class LoopConfig:
    """The training loop."""

    steps: int | None = None
    """Optimiser steps; unset means `epochs`."""
    epochs: float | None = None
    """Passes over the data; unset means `steps`. Give exactly one of them."""
    batch_rows: int = 16
    """Packed rows of one optimiser step."""
    micro_batch_rows: int | None = None
    """Rows of one forward and backward pass; unset means all of them at once."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Activations and gradients of activations; weights and optimiser states stay fp32. auto: bf16 where the processor multiplies it natively."""
    seed: int = 0
    """Seed of initial weights and data order."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the first GPU if there is one."""
    eval_every: int = 200
    """Steps between validations; 0 means only at the end."""
    eval_rows: int = 64
    """Validation rows at most."""
    log_every: int = 1
    """Steps between records in metrics.jsonl."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of loop.steps and loop.epochs")
        for name in ("steps", "epochs", "batch_rows", "micro_batch_rows"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"loop.{name} is {value}; give a positive number")


@config
class OpsConfig:
    """Force an implementation of an operation, for example attention = "reference"; unset ones are chosen."""

    attention: str | None = None
    cross_entropy: str | None = None
    rms_norm: str | None = None
    rope: str | None = None
    swiglu: str | None = None


@config
class StartConfig:
    """Where the weights come from: exactly one of preset, config and path."""

    preset: str | None = None
    """A published size by name, with random weights, for example "qwen2.5-0.5b"."""
    config: ModelConfig | None = None
    """Dimensions of a model with random weights. vocab_size = 0 takes the tokenizer's padded size."""
    path: Path | None = None
    """A checkpoint to continue from: Hugging Face directory, GGUF file or qwench run."""
    scale_residual: bool = True
    """Random weights: draw the outputs of attention and MLP from N(0, std / sqrt(2 layers)), as Qwen-1's code does."""

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.preset, self.config, self.path)) != 1:
            raise ValueError("give exactly one of model.preset, model.config and model.path")


@config
class PretrainConfig:
    """Next-token training on token shards."""

    out: Path
    """Run directory."""
    resume: Resume = "auto"
    """auto continues this recipe's run, force continues with changed values, never refuses an existing run."""
    model: StartConfig
    tokenizer: Path
    """Tokenizer directory that made the shards."""
    train_shards: Path
    """Directory of token shards."""
    val_shards: Path | None = None
    """Shards for validation."""
    seq_len: int = 2048
    """Tokens of a packed row [Qwen TR 2.4]."""
    attend_across: bool = False
    """Let documents of a row attend to each other, as Qwen did; by default they are kept apart."""
    loop: LoopConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    ops: OpsConfig = OpsConfig()


@config
class SFTConfig:
    """Supervised fine-tuning on conversations (JSONL, OpenAI message form)."""

    out: Path
    """Run directory."""
    resume: Resume = "auto"
    """auto continues this recipe's run, force continues with changed values, never refuses an existing run."""
    model: StartConfig
    tokenizer: Path | None = None
    """Tokenizer directory; unset takes the one beside the model."""
    chat_format: str | None = None
    """Chat template by name (see docs/tokenizer.md); unset keeps the tokenizer's."""
    train_data: tuple[Path, ...]
    """JSONL files, a conversation a line: {"messages": [...], "tools": [...]}."""
    val_data: tuple[Path, ...] = ()
    seq_len: int = 2048
    """Tokens of a packed row; longer conversations follow over_long."""
    over_long: Literal["truncate", "drop"] = "drop"
    """What happens to a conversation longer than seq_len."""
    mask: Literal["assistant", "qwen"] = "assistant"
    """Targets: the assistant's text and closing <|im_end|>, or the labels of Qwen's public script."""
    loop: LoopConfig
    optim: OptimConfig = OptimConfig(lr=1e-5)
    schedule: ScheduleConfig = ScheduleConfig(warmup_steps=100)
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    ops: OpsConfig = OpsConfig()
