"""The recipe of `qwench data`: what is read, what is kept, how it is mixed, and where it goes.

Thresholds live with the stages that use them (`data.prepare`, `data.dedup`, `data.mixture`); this file puts them
together. What the reports leave unpublished is ours or FineWeb's and Gopher's, and said so there.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

from qwench.config import config
from qwench.data.decontaminate import DecontaminateSettings
from qwench.data.dedup import DedupSettings
from qwench.data.mixture import MixtureConfig
from qwench.data.opening import ReadLimits
from qwench.data.prepare import PrepareRules
from qwench.data.scoring import ModelConfig


@config
class SourceConfig:
    """A set of files with a name, which documents carry as their `source`."""

    paths: tuple[str, ...]
    """Files, folders, globs or fsspec URLs (s3://, gs://, https://): text, markup, source code, HTML, WARC and WET,
    JSON lines, Parquet, XML dumps; compressed too."""
    kind: str = ""
    """Domain of all its documents ("web", "code", "math", ...); empty: as the file format says."""
    lang: str = ""
    """Language of all its documents; empty: identified."""
    text_field: tuple[str, ...] = ("text", "content")
    """Field of JSON lines and Parquet that holds the text; several are tried in order."""
    conversations: Literal["no", "plain", "chat"] = "no"
    """Instruction data: JSON lines of messages, as plain text or in the tokenizer's chat template. Rule filters and PII
    scrubbing are not applied to them; duplicates and contamination are removed."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty; name files, folders or URLs")


@config
class ShardsConfig:
    """How token shards are cut."""

    shard_tokens: int = 1 << 26
    """Tokens of a shard, about; a worker holds one in memory."""
    val_fraction: float = 0.0
    """Share of the documents that is kept for validation."""

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens is {self.shard_tokens}; give a positive number")
        if not 0 <= self.val_fraction <= 0.5:
            raise ValueError(f"val_fraction is {self.val_fraction}; give a number between 0 and 0.5")


@config
class DataConfig:
    """From raw documents to a clean, deduplicated, balanced mixture of token shards."""

    out: Path
    """Directory of the run. Running again continues it; after a change of the recipe only what it touches is redone."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Name -> where its documents are: [sources.NAME] with paths, kind, lang, text_field, conversations."""
    inputs: Path | None = None
    """Folder that relative paths of sources are below; unset: the current one."""
    tokenizer: Path | None = None
    """Tokenizer directory, tokenizer.json, qwen.tiktoken or GGUF. Unset: the run ends with clean documents."""
    seed: int = 0
    """Of the shuffle and the choice of validation documents."""
    workers: int = 0
    """Processes; 0: all cores."""
    runner: Literal["local", "ray"] = "local"
    """ray: on a Ray cluster, with `out` and the inputs where every node finds them. The output is the same."""
    ray_address: str | None = None
    """HOST:PORT or "auto"; unset: what RAY_ADDRESS says, or a cluster of this machine."""
    part_mb: float = 16.0
    """Megabytes of input that are one item of work. Part of the recipe: documents of equal files come out the same with
    any other number, only cut into other parts."""
    start_processes_mb: float = 64.0
    """Less input than this is worked on by this process alone; starting others would take longer."""
    read: ReadLimits = ReadLimits()
    rules: PrepareRules = PrepareRules()
    dedup: DedupSettings = DedupSettings()
    models: dict[str, ModelConfig] = field(default_factory=dict)
    """Name -> a model that scores every document (quality, domain, safety, perplexity): [models.NAME]."""
    decontaminate: DecontaminateSettings = DecontaminateSettings()
    mixture: MixtureConfig = MixtureConfig()
    shards: ShardsConfig = ShardsConfig()

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError('there are no sources; give [sources.NAME] with paths = ["..."]')
        if self.part_mb <= 0:
            raise ValueError(f"part_mb is {self.part_mb}; give a positive number of megabytes")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; give a number of processes, or 0 for all cores")
