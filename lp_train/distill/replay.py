"""One pass of the original in order; the paired model goes on from its first pair with what was recorded.

The layers below the first pair are the same for both, so they run once, without gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from lp_train.distill import packed_attention
from lp_train.pairing import plan_of, sequential
from lp_train.pairing.families import check_family, decoder_of
from lp_train.pairing.pairs import LayerCall

RunBlock = Callable[[Tensor, Sequence[LayerCall]], Tensor]


@dataclass
class Recording:
    """A pass of the original: its result, and what the layers are called with."""

    blocks: list[list[LayerCall]]  # from the first pair on: the two layers of a pair, or one layer
    hidden: Tensor  # [B, T, D], the input of the first pair
    final: Tensor  # [B, T, D], after the final norm
    pair_outputs: dict[int, Tensor] = field(default_factory=dict)  # by the pair's place in `blocks`


def run_block(hidden: Tensor, calls: Sequence[LayerCall]) -> Tensor:
    """hidden [B, T, D] through layers one after the other."""
    for layer, kwargs in calls:
        hidden = layer(hidden, **kwargs)
    return hidden


@torch.no_grad()
def run_original(
    model: nn.Module, inputs: dict[str, Tensor], keep_pair_outputs: bool = False, block: RunBlock = run_block
) -> Recording:
    """Runs the sequential original on ``input_ids`` and ``position_ids`` [B, T], without cache or attention mask.

    Documents packed into one row stay apart by their position ids only as long as there is neither.
    ``block`` runs one block of layers; a compiled :func:`run_block` does it faster.

    Raises:
        ValueError: there is an attention mask, or the layers are given a cache.
    """
    first, blocks = run_prefix(model, inputs, block)
    hidden, outputs = first, dict[int, Tensor]()
    with sequential(model):
        for i, layers in enumerate(blocks):
            hidden = block(hidden, layers)
            if keep_pair_outputs and len(layers) == 2:
                outputs[i] = hidden
        return Recording(blocks, first, decoder_of(model).norm(hidden), outputs)


@torch.no_grad()
def run_prefix(
    model: nn.Module, inputs: dict[str, Tensor], block: RunBlock = run_block
) -> tuple[Tensor, list[list[LayerCall]]]:
    """As far as the first pair, with the same errors: its input [B, T, D], and the blocks of layers from it on."""
    plan, _ = plan_of(model)
    hidden, calls = layer_calls(model, inputs)
    with sequential(model):
        for call in calls[: plan.first_layer]:
            hidden = block(hidden, [call])
    return hidden, [[calls[i] for i in layers] for layers in plan.blocks]


def run_suffix(model: nn.Module, recording: Recording, block: RunBlock = run_block) -> tuple[Tensor, dict[int, Tensor]]:
    """The model as it is switched now, from the first paired layer on.

    Returns the hidden states after the final norm [B, T, D], and those after each pair of ``recording.pair_outputs``.
    """
    hidden, outputs = recording.hidden, {}
    if torch.is_grad_enabled() and getattr(recording.blocks[0][-1][0], "gradient_checkpointing", False):
        hidden = hidden.detach().requires_grad_()  # reentrant checkpointing makes no gradient without one of its input
    for i, layers in enumerate(recording.blocks):
        hidden = block(hidden, layers)
        if i in recording.pair_outputs:
            outputs[i] = hidden
    return decoder_of(model).norm(hidden), outputs


class _Call(nn.Module):
    """Stands for a decoder layer: keeps what it is called with and lets its input through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # by it some decoders choose a layer's mask
        self.hidden, self.kwargs = torch.empty(0), dict[str, Any]()

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.hidden, self.kwargs = hidden_states, kwargs
        return hidden_states


def layer_calls(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[LayerCall]]:
    """The input of the first decoder layer [B, T, D], and every layer with its mask, rotary table and the like, as the
    decoder's own forward makes them for stand-ins of its layers; ``inputs`` and errors as in :func:`run_original`."""
    if "attention_mask" in inputs:
        raise ValueError("attention_mask: documents packed into one row would see each other; leave it out")
    arguments = {"attention_mask": _masks(model, inputs), **_document_lengths(model, inputs)}
    decoder = decoder_of(model)
    layers, decoder.layers = decoder.layers, nn.ModuleList(map(_Call, decoder.layers))
    try:
        stand_ins, ids = decoder.layers, {name: inputs.get(name) for name in ("input_ids", "position_ids")}
        decoder(**ids, **arguments, use_cache=False, output_hidden_states=False)
    finally:
        decoder.layers = layers
    calls = [(layer, stand_in.kwargs) for layer, stand_in in zip(layers, stand_ins, strict=True)]
    if any(kwargs.get("past_key_values") is not None for _, kwargs in calls):
        raise ValueError("past_key_values: documents packed into one row would see each other; run without a cache")
    return stand_ins[0].hidden, calls


def _document_lengths(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Transformers' arguments that keep documents apart for attention that has no mask to do it."""
    attention = model.config.get_text_config()._attn_implementation
    if "flash" not in attention and attention != packed_attention.NAME:
        return {}
    if "cu_seq_lens" not in inputs:
        raise ValueError("cu_seq_lens: this attention keeps packed documents apart by them; take RowCollator's batch")
    starts, length = inputs["cu_seq_lens"], inputs["input_ids"].shape[1]
    torch._dynamo.maybe_mark_dynamic(starts, 0)  # as many documents as there are
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": length, "max_length_k": length}


def _masks(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """None, from which Transformers makes masks that keep packed documents apart; or those masks, where it does not."""
    if check_family(model.config.model_type).masks_packed_rows or "position_ids" not in inputs:
        return None
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    return create_masks_for_generate(
        model.config, embeddings, attention_mask=None, past_key_values=None, position_ids=inputs["position_ids"]
    )
