"""What a user would otherwise run: two models in TRL's trainer, with TRL's own chunked divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from lp_train.config import LossConfig
from lp_train.pairing.families import decoder_of


class TwoModelTrainer(SFTTrainer):
    """Distils a second, frozen copy of the weights into a paired model; both run all their layers.

    The loss is that of ``PairedTrainer`` with a divergence only: summed over the trained tokens, divided by their
    number.
    """

    def __init__(self, teacher: nn.Module, loss: LossConfig, **options: Any) -> None:
        options["args"].dataset_kwargs = {"skip_prepare_dataset": True}
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True
        self.teacher, self.loss = teacher, loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        trained = inputs["trained"]
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher = _states(self.teacher, inputs, trained)
            student = _states(model, inputs, trained)
            heads = (model.get_output_embeddings().weight, self.teacher.get_output_embeddings().weight)
            total = trl_divergence(student, teacher, heads, self.loss)
        return total / torch.as_tensor(num_items_in_batch, device=total.device)


def _states(model: nn.Module, inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    hidden = decoder_of(model)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, kept)


def trl_divergence(
    student: Tensor,
    teacher: Tensor,
    heads: tuple[Tensor, Tensor],
    loss: LossConfig,
    softcap: float | None = None,
) -> Tensor:
    """TRL's divergence, summed over tokens; student, teacher: hidden states [N, D], their heads [V, D] each."""
    states = (student, heads[0], None, teacher, heads[1], None)
    per_token, _ = ChunkedDivergenceFunction.apply(*states, loss.beta, loss.temperature, 1.0, softcap, 1.0, softcap)
    return per_token.sum()
