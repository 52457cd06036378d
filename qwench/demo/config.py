"""What the demo does by default. Sizes are chosen so that two ordinary cores finish in under six minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qwench.config import config


@config
class DemoModelConfig:
    """A Qwen2.5-shaped decoder: grouped queries, q/k/v biases, SwiGLU, tied embeddings."""

    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2


@config
class DemoPretrainConfig:
    tokens: int = 2_000_000
    """Tokens to train on; fewer if the machine would take longer than max_seconds."""
    max_seconds: float = 145.0
    seq_len: int = 128
    batch_tokens: int = 4096
    lr: float = 0.016
    """Peak learning rate of AdamW (embedding, norms, biases)."""
    muon_lr: float = 0.0032
    """Peak learning rate of Muon (matrices of the blocks)."""
    warmup_steps: int = 20


@config
class DemoSFTConfig:
    num_sums: int = 12_000
    num_docs: int = 1_500
    num_manners: int = 900
    sum_form: Literal["plain", "worked"] = "worked"
    """Answer a sum with the bare number, or digit by digit first."""
    max_digits: int = 2
    epochs: float = 1.0
    max_seconds: float = 90.0
    seq_len: int = 128
    batch_tokens: int = 2048
    lr: float = 0.008
    muon_lr: float = 0.004
    warmup_steps: int = 20


@config
class DemoConfig:
    """The whole recipe at small size: raw text -> tokenizer -> pretraining -> chat model -> report."""

    out: Path = Path("demo-run")
    """Folder of the run; running again resumes it at the first unfinished stage."""
    data: Path | None = None
    """Folder or file to read instead of what Python ships: .txt, .md, .html, .jsonl, .parquet, source code."""
    corpus_bytes: int = 16_000_000
    """Text to collect at most."""
    held_out_bytes: int = 300_000
    """Text kept away from training, for the comparison with compressors."""
    vocab_size: int = 4096
    model: DemoModelConfig = DemoModelConfig()
    pretrain: DemoPretrainConfig = DemoPretrainConfig()
    sft: DemoSFTConfig = DemoSFTConfig()
    eval_sums: int = 150
    """Held-out sums asked before and after fine-tuning."""
    seed: int = 0
