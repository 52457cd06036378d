"""Settings of the engine. None means: decided at start from the model and the measured memory, and printed."""

from __future__ import annotations

from typing import Literal

from qwench.config import config

MAX_DECODE_STEPS = 64


@config
class EngineConfig:
    max_len: int | None = None
    """Longest prompt plus answer, in tokens; the model's own context by default."""
    max_seqs: int | None = None
    """Sequences that run at the same time; 1024 on a GPU, 16 on a CPU."""
    max_step_tokens: int | None = None
    """Tokens of one forward pass, at least max_seqs. Longer prompts are read in chunks; 16,384 on a GPU, 1,024 on a
    CPU."""
    idle_step_tokens: int | None = None
    """The same while no answer is being written, as a long pass delays nobody then; up to 65,536 where a GPU has the
    memory, and max_step_tokens where that is given."""
    block_size: int = 32
    """Positions in one block of the key/value cache. Smaller ones share more of beginnings that are alike, larger ones
    are found faster."""
    memory_fraction: float = 0.9
    """Share of the device's memory that weights, activations and cache may fill together (CPU: of what is free)."""
    cache_tokens: int | None = None
    """Size of the key/value cache in tokens; by default what the measured free memory holds."""
    cache_dtype: Literal["auto", "fp8"] = "auto"
    """Numbers in the cache: the activations' own, or 8-bit floats (half the memory, slightly different answers)."""
    prefix_caching: bool = True
    """Keep the blocks of finished prompts, and reuse them for prompts that begin alike."""
    cuda_graphs: bool = True
    """Replay recorded decoding steps instead of launching each kernel."""
    decode_steps: int | None = None
    """Decoding steps launched between two looks of the host, at most; short steps profit. 8 on a GPU, 1 on a CPU."""
    overlap: bool = True
    """Launch the next step before the tokens of the last one are read."""
    deterministic: bool = False
    """Batch-invariant kernels: an answer does not depend on what else is served. Costs speed; GPU only."""
    speculate: Literal["off", "ngram", "draft"] = "off"
    """Propose tokens and check several in one pass: from repetitions in the text, or with a small draft model."""
    draft_model: str | None = None
    """Checkpoint of the draft model (speculate=draft); it must share the tokenizer."""
    draft_tokens: int = 4
    """Tokens proposed at a time, at most; fewer where they are often wrong."""
    speculate_max_seqs: int | None = None
    """Speculate only while at most so many answers run, as more keep the device busy by themselves; 8 on a GPU, 2 on a
    CPU."""
    tensor_parallel: int = 1
    """GPUs that share the model."""

    def __post_init__(self) -> None:
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction is {self.memory_fraction}; give a number in (0, 1]")
        for name in (
            "max_len", "max_seqs", "max_step_tokens", "idle_step_tokens", "block_size", "cache_tokens", "decode_steps",
            "speculate_max_seqs",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give at least 1")
        if self.decode_steps is not None and self.decode_steps > MAX_DECODE_STEPS:
            raise ValueError(f"decode_steps is {self.decode_steps}; give at most {MAX_DECODE_STEPS}")
        if self.max_seqs is not None and self.max_step_tokens is not None and self.max_seqs > self.max_step_tokens:
            raise ValueError(
                f"max_step_tokens is {self.max_step_tokens}, but {self.max_seqs} sequences (max_seqs) need a token "
                "each in every step; raise max_step_tokens or lower max_seqs"
            )
        if not 1 <= self.draft_tokens <= 15:
            raise ValueError(f"draft_tokens is {self.draft_tokens}; give 1 to 15")
        if self.speculate == "draft" and self.draft_model is None:
            raise ValueError("speculate=draft needs draft_model, the path of a small model of the same family")
        if self.speculate != "draft" and self.draft_model is not None:
            raise ValueError(
                f"draft_model is given, but speculate={self.speculate}; set speculate=draft or leave it out"
            )
        if self.speculate != "off" and self.deterministic:
            raise ValueError(
                f"speculate={self.speculate} computes a token with other kernels where it is a draft, which "
                "deterministic=true rules out; leave one of the two out"
            )
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel is {self.tensor_parallel}; give at least 1")
