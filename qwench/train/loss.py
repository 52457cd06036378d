"""The loss of next-token training, for pretraining and fine-tuning alike."""

from __future__ import annotations

from torch import Tensor

from qwench.model.decoder import CausalLM
from qwench.ops.cross_entropy import linear_cross_entropy
from qwench.parallel.vocabulary import VocabularyHead
from qwench.train.batch import Batch


def next_token_loss(model: CausalLM, batch: Batch) -> Tensor:
    """Sum over tokens of loss weight * cross-entropy in nats; the loop divides by the step's total weight."""
    hidden_TD = model(batch.tokens_T, batch.positions_T, batch.meta)
    if isinstance(model.lm_head, VocabularyHead):  # cut over a tensor group
        return model.lm_head.cross_entropy(hidden_TD, batch.targets_T, batch.loss_weights_T)[0]
    return linear_cross_entropy(hidden_TD, model.lm_head.weight, batch.targets_T, batch.loss_weights_T)
