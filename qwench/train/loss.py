"""The loss of next-token training, for pretraining and fine-tuning alike."""

from __future__ import annotations

from torch import Tensor

from qwench.model.decoder import CausalLM
from qwench.parallel.vocabulary import token_losses
from qwench.train.batch import Batch


def next_token_losses(model: CausalLM, batch: Batch, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """(sum over tokens of loss weight * (cross-entropy in nats + z_loss * (log sum exp)^2), the cross-entropies [T]).

    The first is an fp32 scalar to be differentiated, the second has no gradient. Weights that include every factor (the
    loop divides them by the step's total) leave nothing to scale in the backward pass.
    """
    hidden_TD = model(batch.tokens_T, batch.positions_T, batch.meta)
    return token_losses(model, hidden_TD, batch.targets_T, batch.loss_weights_T, z_loss)


def next_token_loss(model: CausalLM, batch: Batch) -> Tensor:
    """The sum alone, without z-loss."""
    return next_token_losses(model, batch)[0]
