"""One forward of the original in order; the paired model goes on from its first pair with what was recorded.

The layers below the first pair are the same for both, so they run once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from lp_train.pairing import plan_of, sequential
from lp_train.pairing.families import check_family, decoder_of


@dataclass
class Recording:
    """A forward of the original: its result, and what the layers from the first pair on were called with."""

    first_layer: int
    hidden: Tensor | None = None  # [B, T, D], the input of the first paired layer
    kwargs: dict[int, dict[str, Any]] = field(default_factory=dict)
    pair_outputs: dict[int, Tensor] = field(default_factory=dict)  # by the second layer of each pair
    final: Tensor | None = None  # [B, T, D], after the final norm


@torch.no_grad()
def run_original(model: nn.Module, inputs: dict[str, Tensor], keep_pair_outputs: bool = False) -> Recording:
    """Runs the sequential original on ``input_ids`` and ``position_ids`` [B, T], without cache or attention mask.

    Documents packed into one row stay apart by their position ids only as long as there is neither.
    """
    plan, _ = plan_of(model)
    recording = Recording(plan.first_layer)
    ends = [second for _, second in plan.pairs] if keep_pair_outputs else []
    with _recorded(decoder_of(model).layers, recording, ends), sequential(model):
        out = decoder_of(model)(
            input_ids=inputs["input_ids"],
            attention_mask=_masks(model, inputs),
            position_ids=inputs.get("position_ids"),
            use_cache=False,
        )
    recording.final = out.last_hidden_state
    return recording


def _masks(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """None, from which Transformers makes masks that keep packed documents apart; or those masks, where it does not."""
    if check_family(model.config.model_type).masks_packed_rows or "position_ids" not in inputs:
        return None
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    return create_masks_for_generate(
        model.config, embeddings, attention_mask=None, past_key_values=None, position_ids=inputs["position_ids"]
    )


@contextlib.contextmanager
def _recorded(layers: nn.ModuleList, recording: Recording, ends: list[int]) -> Iterator[None]:
    def before(i: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if i == recording.first_layer:
                recording.hidden = args[0]
            recording.kwargs[i] = kwargs

        return hook

    def after(i: int) -> Any:
        return lambda module, args, out: recording.pair_outputs.__setitem__(i, out)

    hooks = [
        layers[i].register_forward_pre_hook(before(i), with_kwargs=True)
        for i in range(recording.first_layer, len(layers))
    ]
    hooks += [layers[i].register_forward_hook(after(i)) for i in ends]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_suffix(model: nn.Module, recording: Recording) -> tuple[Tensor, dict[int, Tensor]]:
    """The model as it is switched now, from the first paired layer on.

    Returns the hidden states after the final norm [B, T, D], and those after each pair of ``recording.pair_outputs``.
    """
    decoder, hidden, outputs = decoder_of(model), recording.hidden, {}
    assert hidden is not None
    if torch.is_grad_enabled() and getattr(decoder.layers[-1], "gradient_checkpointing", False):
        hidden = hidden.detach().requires_grad_()  # reentrant checkpointing makes no gradient without one of its input
    for i in range(recording.first_layer, len(decoder.layers)):
        hidden = decoder.layers[i](hidden, **recording.kwargs[i])
        if i in recording.pair_outputs:
            outputs[i] = hidden
    return decoder.norm(hidden), outputs
