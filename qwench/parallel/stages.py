"""What one rank of a pipeline has of a model: the layers of its stages, under the names of the whole model.

    counts = deal_layers(model.config, num_stages=4)
    mine = StagedLM(model, stages_of_rank(counts, rank=1, num_ranks=2))
    mine.select(mine.stages[0])
    x_TD = mine(x_TD, positions_T, meta)

The first stage has the embedding, the last one the final norm and the output matrix. With tied embeddings both hold the
one matrix, each sums its own gradient of it, and `pipeline.py` adds the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from qwench.model.config import ModelConfig
from qwench.model.decoder import CausalLM, Decoder
from qwench.model.flops import num_parameters
from qwench.ops.attention import AttnMeta, KVCache


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive layers, and whether the embedding stands before them and the norm and the loss after them."""

    layers: range
    first: bool
    last: bool


def deal_layers(config: ModelConfig, num_stages: int) -> list[int]:
    """Layers of each stage, so that the slowest stage is as fast as can be; at least one each.

    Layers cost their weights, the output matrix with its loss its own: nine layers of the 0.5B model. The embedding is
    a look-up and counts as nothing, as in `flops.training_flops_per_token`. Raises ValueError if there are too few.
    """
    num_layers = config.num_hidden_layers
    if num_stages > num_layers:
        raise ValueError(
            f"a pipeline of {num_stages} stages (parallel.pipeline x parallel.virtual_stages), but the model has only "
            f"{num_layers} layers; a stage needs one layer at least"
        )
    layer = num_parameters(config, embedding=False) / num_layers
    loads = [layer] * num_stages
    loads[-1] += config.vocab_size * config.hidden_size
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):
        stage = loads.index(min(loads))
        loads[stage] += layer
        counts[stage] += 1
    return counts


def stages_of_rank(counts: Sequence[int], rank: int, num_ranks: int) -> list[Stage]:
    """The stages rank, rank + num_ranks, ... of those whose layers `counts` says."""
    stages: list[Stage] = []
    for number in range(rank, len(counts), num_ranks):
        top = sum(counts[:number])
        stages.append(Stage(range(top, top + counts[number]), number == 0, number == len(counts) - 1))
    return stages


class StageDecoder(Decoder):
    """Some stages of a decoder, of which one is selected: tokens or hidden states in, hidden states out."""

    def __init__(self, whole: Decoder, stages: Sequence[Stage], tied: bool) -> None:
        """Takes the modules of `whole`. `tied`: the output matrix is the embedding's, so the last stage has it too."""
        nn.Module.__init__(self)
        self.config, self.compute_dtype, self.stage = whole.config, whole.compute_dtype, stages[0]
        has_last = any(stage.last for stage in stages)
        if any(stage.first for stage in stages) or (tied and has_last):
            self.embed_tokens = whole.embed_tokens
        self.layers = nn.ModuleList()
        for number in sorted(number for stage in stages for number in stage.layers):
            # Not by `append`, which would count from 0: the name is the layer's number in the whole model.
            self.layers.add_module(str(number), whole.layers[number])
        if has_last:
            self.norm = whole.norm

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, meta: AttnMeta, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """What the selected stage makes of tokens [T] if it is the first one, else of the hidden states before it."""
        assert caches is None, "a stage is for training"
        x_TD = self.embed(tokens_T) if self.stage.first else tokens_T
        layers = [self.layers.get_submodule(str(number)) for number in self.stage.layers]
        x_TD = self.run(layers, x_TD, positions_T, meta)
        return self.norm(x_TD) if self.stage.last else x_TD


class StagedLM(CausalLM):
    """A rank's stages. `config` is the whole model's; iterating over `model.layers` gives the layers that are here."""

    def __init__(self, whole: CausalLM, stages: Sequence[Stage]) -> None:
        """Takes the modules of `whole`, which should not be used any more."""
        nn.Module.__init__(self)
        self.config, self.stages = whole.config, tuple(stages)
        self.model: StageDecoder = StageDecoder(whole.model, stages, whole.config.tie_word_embeddings)
        if any(stage.last for stage in stages):
            self.lm_head = whole.lm_head

    def select(self, stage: Stage) -> None:
        """Let the next passes run through this stage."""
        self.model.stage = stage
