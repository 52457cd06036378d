"""Recipes of the training stages. Values that the reports publish are the defaults; the rest is ours and said so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from qwench.config import config
from qwench.model.config import ModelConfig
from qwench.run import Resume

LARGEST_HALF_BETA = 0.98
"""Updates of (1 - beta) of a state must be well above half a step of bf16, which is 0.2 to 0.4 %."""


@config
class OptimConfig:
    """AdamW as in [Qwen TR 2.4]; weight decay and clipping from the memo of the August 2023 release."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for the matrices inside the blocks with adamw for the rest."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    muon_lr: float | None = None
    """Peak learning rate of Muon, whose steps have AdamW's size; unset takes lr."""
    muon_momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only: norms and biases are left alone."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    state_dtype: Literal["fp32", "bf16", "8bit"] = "fp32"
    """What AdamW's two states are kept in between steps: 8, 4 or 2 bytes a parameter. Its arithmetic is fp32. bf16
    wants betas of at most 0.98; 8bit rounds stochastically. A run can be continued with another one (resume=force):
    its states are cast."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; give a positive learning rate")
        if self.muon_lr is not None and not 0 < self.muon_lr < math.inf:
            raise ValueError(f"muon_lr is {self.muon_lr}; give a positive learning rate, or leave it out to take lr")
        if self.state_dtype == "bf16" and max(self.betas) > LARGEST_HALF_BETA:
            raise ValueError(
                f"betas are {self.betas}; optimiser states in bf16 need at most {LARGEST_HALF_BETA}, or set "
                "state_dtype to fp32 or 8bit"
            )
        if self.grad_clip < 0 or self.weight_decay < 0:
            raise ValueError(
                f"grad_clip is {self.grad_clip} and weight_decay {self.weight_decay}; give positive numbers, 0 is off"
            )


@config
class ScheduleConfig:
    kind: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    """Shape after the warm-up: cosine or linear decay to min_ratio; constant; wsd: constant with a decay at the end."""
    warmup_steps: int = 2000
    """Linear warm-up from 0 [Qwen TR memo]."""
    warmup_share: float | None = None
    """The warm-up as a share of all steps, in the place of warmup_steps."""
    min_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    decay_share: float = 0.1
    """wsd: the decay as a share of all steps."""
    decay_steps: int | None = None
    """wsd: the decay in steps, in the place of decay_share."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """wsd: a straight line down to min_ratio, or 1 - sqrt of the part of the decay that has passed: faster at first."""

    def __post_init__(self) -> None:
        for name in ("warmup_share", "decay_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; give a share of all steps between 0 and 1")
        if self.decay_steps is not None and self.decay_steps < 0:
            raise ValueError(f"decay_steps is {self.decay_steps}; give 0 (none) or a positive number")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; give 0 (none) or a positive number")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio is {self.min_ratio}; give a share of the peak between 0 and 1")


@config
class CheckpointConfig:
    every_steps: int = 500
    """Steps between resumable checkpoints; the last step always has one."""
    keep_last: int = 2
    """Newest checkpoints kept on disk."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    background: Literal["auto", "on", "off"] = "auto"
    """Write while training goes on, from a copy in the host's memory. auto: on with a GPU; on a CPU the copy would take
    from the same memory and the writing from the same cores."""
    verify: bool = True
    """Compare a checkpoint with its checksums before loading it, which reads it once more, every rank its share. A
    damaged one is set aside and the one before is taken."""

    def __post_init__(self) -> None:
        _require_positive(self, "every_steps", "keep_last")


@config
class GuardConfig:
    """Steps that would harm the model are skipped, and their batch is kept for inspection."""

    grad_norm_factor: float = 20.0
    """A gradient norm above this multiple of its running median is a spike; 0 switches the test off."""
    window_steps: int = 64
    """Steps over which the median is taken; no spike is declared before half of them have passed."""
    max_consecutive: int = 5
    """Bad steps in a row after which the run stops."""
    hang_seconds: float = 600.0
    """Seconds without progress in a step or a validation after which the job is stopped, with every rank's stacks in
    RUN/logs; 0 switches it off (for a debugger)."""
    hang_seconds_long: float = 3600.0
    """The same for what may take long: the first step, which compiles, loading, checkpoints and the export."""
    max_restarts: int | None = None
    """Times in a row that a job whose processes died or hung is started again without a new checkpoint in between.
    Unset means 3 with several processes, and 0 with one, which then runs in the process of the command."""

    def __post_init__(self) -> None:
        _require_positive(self, "window_steps", "max_consecutive")
        if not 0 <= self.hang_seconds <= self.hang_seconds_long < math.inf:
            raise ValueError(
                f"hang_seconds is {self.hang_seconds} and hang_seconds_long {self.hang_seconds_long}; give positive "
                "numbers of which the second is the larger, or hang_seconds=0 (off)"
            )
        if self.max_restarts is not None and self.max_restarts < 0:
            raise ValueError(f"max_restarts is {self.max_restarts}; give 0 (never) or a positive number")
        if self.grad_norm_factor < 0:
            raise ValueError(f"grad_norm_factor is {self.grad_norm_factor}; give 0 (off) or a positive number")


@config
class BatchWarmupConfig:
    """Fewer rows a step at the beginning of a run, where large batches teach no more than small ones."""

    start_rows: int
    """Rows of the first step; batch_rows must be a multiple, and every step's rows are one."""
    tokens: int
    """Tokens of the run (rows x seq_len) after which a step has all batch_rows."""
    shape: Literal["linear", "doubling"] = "linear"
    """Rows grow in proportion to the tokens seen, or double at equal distances."""

    def __post_init__(self) -> None:
        _require_positive(self, "start_rows", "tokens")


@config
class LoopConfig:
    """The training loop."""

    steps: int | None = None
    """Optimiser steps; unset means `epochs`."""
    epochs: float | None = None
    """Passes over the data; unset means `steps`. Give exactly one of them."""
    batch_rows: int = 16
    """Packed rows of one optimiser step, on all ranks together."""
    batch_warmup: BatchWarmupConfig | None = None
    """Fewer rows a step at first; unset: batch_rows from the first step on. loop.steps counts the small steps too."""
    micro_batch_rows: int | None = None
    """Rows of one forward and backward pass of a rank; unset means all that it has, at once."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the blocks. auto: on with a GPU, unless [ops] forces what compiled blocks cannot take; off on a CPU,
    where it needs a C++ compiler."""
    remat: Literal["auto", "none", "elementwise", "mlp", "attention", "full"] = "auto"
    """What the backward pass computes a second time instead of keeping it, from nothing to everything (the table in
    docs/training.md). auto: on a GPU the least that fits into its memory by the memory plan; on a CPU elementwise in
    compiled blocks, none in others."""
    fp8: Literal["off", "on", "auto"] = "off"
    """Products of the blocks' matrices in FP8, each tensor with one scale of its own; weights and optimiser states stay
    fp32. auto times a block both ways on this GPU at the start, and takes FP8 where it is faster."""
    z_loss: float = 0.0
    """Factor of (log sum exp of the logits)^2 in the training loss, which keeps logits from drifting; PaLM: 1e-4."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Activations and gradients of activations; weights and optimiser states stay fp32.
    auto: bf16 where the processor multiplies it natively."""
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
    profile_step: int = 0
    """The step from which on three steps are recorded by torch.profiler on rank 0: RUN/profile.json says where their
    time went. 0 switches it off. Not one of the first few, which compile and allocate."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of loop.steps and loop.epochs")
        if self.batch_warmup is not None and self.batch_rows % self.batch_warmup.start_rows:
            raise ValueError(
                f"batch_rows is {self.batch_rows}, which is no multiple of batch_warmup.start_rows "
                f"{self.batch_warmup.start_rows}; change one of them"
            )
        _require_positive(self, "steps", "epochs", "batch_rows", "micro_batch_rows", "eval_rows", "log_every")
        if self.profile_step < 0 or (self.steps is not None and self.profile_step > self.steps):
            last = f" up to {self.steps}" if self.steps is not None else ""
            raise ValueError(f"profile_step is {self.profile_step}; give 0 (off) or the number of a step{last}")
        if self.eval_every < 0:
            raise ValueError(f"eval_every is {self.eval_every}; give 0 (only at the end) or a positive number")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss is {self.z_loss}; give 0 (off) or a small positive number, such as 1e-4")


def _require_positive(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; give a positive number")


@config
class ParallelConfig:
    """How the processes of a job share the work; the product of the sizes is their number."""

    auto: bool = False
    """Choose the sizes below, and loop.micro_batch_rows and loop.remat where those are unset, so that the job fits into
    the GPUs' memory at the least cost (`qwench plan` shows the choice). On CPUs all processes shard."""
    pipeline: int = 1
    """Ranks that each have some of the layers; micro-batches pass through them (1F1B)."""
    virtual_stages: int = 1
    """Stages a rank of the pipeline; more than 1 makes it interleaved 1F1B, which waits less and sends more. The
    micro-batches of a step must then be a multiple of `pipeline`."""
    replicate: int = 1
    """Groups of ranks that each hold the whole model between them, and take different rows."""
    shard: int = -1
    """Ranks of a group that divide weights, gradients and optimiser states (FSDP), and take different rows;
    -1 takes all processes that the other axes leave."""
    context: int = 1
    """Ranks that divide the tokens of each row."""
    tensor: int = 1
    """Ranks that divide every matrix."""
    reshard_after_forward: bool | None = None
    """Give a block's gathered weights back after its forward pass and gather them again for its backward pass, in every
    micro-batch; false gathers them once a step and keeps them, for less communication and more memory. Unset: false on
    GPUs with memory for that and with a pipeline, else true."""
    accumulate: Literal["whole", "shards"] = "whole"
    """Gradients between the micro-batches of a step: whole on every rank with one exchange a step, or scattered over
    the shard group after every micro-batch, for less memory."""


@config
class FollowConfig:
    """Trackers that follow metrics.jsonl from a thread of rank 0; none of them can stop or slow a run."""

    tensorboard: bool = False
    """Event files in RUN/tensorboard."""
    wandb_project: str | None = None
    """Project at Weights & Biases; without a key (WANDB_API_KEY, wandb login) the run is kept offline, for `wandb sync`
    later."""
    trackio_project: str | None = None
    """Project of trackio, which keeps its tables on this machine (`trackio show`)."""
    name: str | None = None
    """The run's name there; unset takes the run directory's."""


@config
class MiniConfig:
    """Scores of a small fixed sample of benchmarks while training goes on, in metrics.jsonl; in one process only."""

    every: int = 0
    """Steps from one to the next; also before the first step and after the last. 0: never."""
    data_dirs: tuple[Path, ...] = ()
    """Where the benchmarks' files are, as for `qwench eval --data-dir`."""
    seconds: float = 60
    """Time for one; tasks that do not finish in it have no score."""
    call: str = "qwench.mini:mini_suite"
    """module:function that takes (model, tokenizer, data_dirs, seconds) and gives numbers by name."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.seconds <= 0:
            raise ValueError(
                f"mini.every is {self.every} and mini.seconds {self.seconds}; give 0 (never) or more steps, and a "
                "positive time"
            )


@config
class OpsConfig:
    """Force an implementation of an operation, for example attention = "reference"; unset ones are chosen."""

    attention: str | None = None
    cross_entropy: str | None = None
    linear: str | None = None
    rms_norm: str | None = None
    rope: str | None = None
    rope_and_store: str | None = None
    swiglu: str | None = None


@config
class StartConfig:
    """Where the weights come from: exactly one of preset, config and path."""

    preset: str | None = None
    """A published size by name, with random weights, for example "qwen2.5-0.5b"."""
    config: ModelConfig | None = None
    """Dimensions of a model with random weights; rows come from vocab_size below, end tokens from the tokenizer."""
    path: Path | None = None
    """A checkpoint to continue from: Hugging Face directory, GGUF file or qwench run."""
    rope_theta: float | None = None
    """Base of the rotary frequencies; unset keeps the preset's or the checkpoint's. Qwen2 and Qwen2.5 began with 10,000
    and went on with 1,000,000 for long rows [Qwen2.5 TR 3.3]."""
    vocab_size: int | None = None
    """Embedding rows of a model with random weights; unset takes the preset's, else the tokenizer's padded to 128."""
    scale_residual: bool = True
    """Random weights: draw the outputs of attention and MLP from N(0, std / sqrt(2 layers)), as Qwen-1's code does."""

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.preset, self.config, self.path)) != 1:
            raise ValueError("give exactly one of model.preset, model.config and model.path")
        _require_positive(self, "vocab_size", "rope_theta")
        if self.path is not None and (self.vocab_size is not None or not self.scale_residual):
            raise ValueError(
                "model.vocab_size and model.scale_residual are for random weights; leave them out with model.path"
            )


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
    train_shards: Path | tuple[Path, ...]
    """Directory of token shards, or a list of several, or a mixture of `qwench data` (OUT/shards/train). The loss of
    each directory, or group of the mixture, is recorded by itself."""
    val_shards: Path | None = None
    """Shards for validation."""
    verify_shards: bool = True
    """Read all shards before anything is started, and compare them with the checksums of their manifests."""
    seq_len: int = 2048
    """Tokens of a packed row [Qwen TR 2.4]."""
    attend_across: bool = False
    """Let documents of a row attend to each other, as Qwen did; by default they are kept apart."""
    gpus: int = 1
    """GPUs of this machine to train on, a process each (with loop.device=cpu: processes). Not under torchrun."""
    loop: LoopConfig
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    follow: FollowConfig = FollowConfig()
    mini: MiniConfig = MiniConfig()
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
    gpus: int = 1
    """GPUs of this machine to train on, a process each (with loop.device=cpu: processes). Not under torchrun."""
    loop: LoopConfig
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig(lr=1e-5)
    schedule: ScheduleConfig = ScheduleConfig(warmup_steps=100)
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    follow: FollowConfig = FollowConfig()
    mini: MiniConfig = MiniConfig()
    ops: OpsConfig = OpsConfig()
