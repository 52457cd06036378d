"""`qwench sft`: supervised fine-tuning on conversations [Qwen TR 3.1], [Qwen2 TR 4].

Conversations are JSONL in OpenAI message form. They are rendered to token ids by the tokenizer's chat template; the
loss is on the assistant's tokens, the closing <|im_end|> included. Samples are packed into rows and kept apart there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from qwench import config
from qwench.data.packing import SampleDataset
from qwench.parallel.layout import Team
from qwench.run import console
from qwench.tokenizer import Tokenizer
from qwench.train.command import parse_recipe, report
from qwench.train.config import SFTConfig
from qwench.train.job import open_run, run_stage
from qwench.train.loop import Trainer, TrainResult
from qwench.train.prepare import prepare_model
from qwench.train.start import model_config
from qwench.types import Sample


def sft(recipe: SFTConfig) -> TrainResult:
    """Fine-tune from `recipe`; the result is recipe.out/model. Raises ValueError naming file and line of bad data.

    With recipe.gpus > 1 the work is done by that many processes, which import the caller's main module.
    """
    return run_stage(_train, recipe, lambda recipe: model_config(recipe.model, _tokenizer(recipe)))


def _tokenizer(recipe: SFTConfig) -> Tokenizer:
    source = recipe.tokenizer or recipe.model.path
    if source is None:
        raise ValueError("the model starts from random weights; give tokenizer=DIR as well")
    tokenizer = Tokenizer.load(source)
    return tokenizer if recipe.chat_format is None else tokenizer.with_chat_format(recipe.chat_format)


def _train(recipe: SFTConfig, team: Team) -> TrainResult:
    tokenizer = _tokenizer(recipe)
    dataset = sample_dataset(recipe, tokenizer, recipe.train_data)
    val_dataset = sample_dataset(recipe, tokenizer, recipe.val_data) if recipe.val_data else None
    if dataset.num_over_long:
        console.print(f"{dataset.num_over_long} conversations exceed {recipe.seq_len} tokens: {recipe.over_long}")
    if dataset.num_without_loss:
        console.print(f"{dataset.num_without_loss} conversations have no token to learn and are left out")
    prepared = prepare_model(recipe, recipe.model, tokenizer, team)
    # A chat model ends its turn with <|im_end|>; the base model's end token stays the second one.
    end_tokens = tuple(tokenizer.eos_token_ids)
    prepared.model.config = dataclasses.replace(prepared.model.config, eos_token_id=end_tokens)
    with open_run(recipe, "sft", team) as run:
        return Trainer(recipe, run, prepared, tokenizer, dataset, val_dataset, team=team).train()


def sample_dataset(recipe: SFTConfig, tokenizer: Tokenizer, files: Sequence[Path]) -> SampleDataset:
    samples = [sample for path in files for sample in render_file(path, tokenizer, recipe.mask)]
    return SampleDataset(samples, recipe.seq_len, recipe.loop.seed, over_long=recipe.over_long)


def render_file(path: Path, tokenizer: Tokenizer, mask: Literal["assistant", "qwen"]) -> Iterator[Sample]:
    """The samples of one conversation file. Raises ValueError naming the line that is no conversation."""
    for number, table in read_conversations(path):
        try:
            yield tokenizer.render_sample(table["messages"], table.get("tools"), mask=mask)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None


def read_conversations(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, {"messages": ..., "tools": ...}) of a JSONL file."""
    if not path.is_file():
        raise ValueError(f'no conversation file {path}; give a JSONL file with one {{"messages": [...]}} a line')
    found = False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                table = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number} is not JSON in UTF-8: {error}") from None
            if not isinstance(table, dict) or not isinstance(table.get("messages"), list):
                raise ValueError(f'{path}:{number} has no list "messages"; write {{"messages": [{{"role": ...}}]}}')
            found = True
            yield number, table
    if not found:
        raise ValueError(f"{path} is empty; give at least one conversation")


def main(argv: list[str]) -> int:
    recipe = config.load(SFTConfig, parse_recipe("sft", __doc__, argv))
    report(sft(recipe), recipe.out)
    return 0
