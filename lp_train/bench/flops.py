"""The FLOPs of one training step, product by product, and what GPUs can do at most: the two halves of an MFU."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lp_train.adapters import count_parameters
from lp_train.bench.shapes import LayerShape, checkpoint_every, layer_shapes, suffix_blocks
from lp_train.config import Config
from lp_train.pairing import FAMILIES, decoder_of, plan_of

PEAK_FLOPS = {  # dense bf16 tensor-core FLOPs per second, from NVIDIA's data sheets; the first name that matches counts
    "MIG": None,  # a part of a GPU
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090$": 165e12,  # not the laptop's
}


def peak_flops(device: torch.device) -> float | None:
    """The GPU's peak in bf16 FLOPs per second, for MFU; None for a CPU or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf"\b{known}(?!\w)", name)), None)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step by part, per token of a packed row; a multiply-add counts as two."""

    prefix: float  # the layers below the first pair, once: projections, MLP, router and chosen experts
    teacher: float  # the other layers
    student: float
    input_gradients: float  # the student's backward through those
    adapters: float  # LoRA's A and B forward and backward; with `tune: full` gradients of the paired layers' matrices
    attention: float  # the products with the scores, of all forwards and of the backward
    recomputed: float  # what gradient checkpointing runs again of all these
    head: float  # per trained token: teacher (with `loss.kd`), student, and its gradient

    def total(self, tokens: float, trained_tokens: float) -> float:
        """FLOPs of a step on rows of ``tokens`` tokens, ``trained_tokens`` of them with a loss."""
        return (sum(dataclasses.astuple(self)) - self.head) * tokens + self.head * trained_tokens


def step_flops(model: nn.Module, config: Config, document_lengths: Sequence[int] | np.ndarray) -> StepFlops:
    """Of a paired model with its adapters, on packed rows of documents with these lengths in tokens.

    Counted are the products that eager layers and autograd make; an attention kernel that computes scores again or
    whole blocks of a mask does more, a compiled checkpoint less. Not looked at: ``modules_to_save``, padding, DoRA's
    norm (once per forward).
    """
    c, layers, (plan, _) = model.config.get_text_config(), layer_shapes(model), plan_of(model)
    contexts = {window: mean_context(document_lengths, window) for window in {layer.window for layer in layers}}
    scores = [2.0 * layer.queries * contexts[layer.window] for layer in layers]
    linear = [2.0 * (layer.matrices + layer.active) for layer in layers]
    student = _Student(model, layers, scores, config.tune)
    blocks = suffix_blocks(plan, checkpoint_every(config))
    _, needs = blocks[0]  # replay.run_suffix then starts from a copy of that input with a gradient
    for block, checkpointed in blocks:
        needs = student.run(block, needs, checkpointed)
    passes = 2 + bool(config.loss.kd) if config.loss.kd or config.loss.ce else 0
    return StepFlops(
        prefix=sum(linear[: plan.first_layer]),
        teacher=sum(linear[plan.first_layer :]),
        student=sum(linear[i] for block, _ in blocks for i in block),
        input_gradients=student.input_gradients,
        adapters=student.adapters,
        attention=2 * sum(scores) + student.attention,
        recomputed=student.recomputed,
        head=passes * 2.0 * c.vocab_size * c.hidden_size,
    )


def forward_costs(model: nn.Module, row: int) -> dict[str, Any]:
    """What a forward costs the original (``sequential``) and the paired model or control (``paired``), adapters aside:
    ``parameters``, ``flops_per_token`` on documents of ``row`` tokens, ``kv_bytes_per_token`` of a cache in the model's
    precision. Also how many parameters are ``trainable``."""
    c, layers, (plan, _) = model.config.get_text_config(), layer_shapes(model), plan_of(model)
    trainable, everything = count_parameters(model)
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    flops = [2.0 * (s.matrices + s.active) + 4.0 * s.queries * mean_context([row], s.window) for s in layers]
    found: dict[str, Any] = {"trainable": trainable}
    for name, removed in (("sequential", ()), ("paired", plan.removed)):
        kept = [i for i in range(plan.num_layers) if i not in removed]
        gone = sum(count_parameters(decoder_of(model).layers[i])[1] for i in removed)
        found[name] = {
            "parameters": everything - adapters - gone,
            "flops_per_token": sum(flops[i] for i in kept) + 2.0 * c.vocab_size * c.hidden_size,
            "kv_bytes_per_token": sum(2 * layers[i].keys * model.dtype.itemsize for i in kept),
        }
    return found


def mean_context(document_lengths: Sequence[int] | np.ndarray, window: int | None) -> float:
    """Positions that a token attends to, averaged over the tokens of causal documents; at most ``window``."""
    length = np.asarray(document_lengths, np.float64)
    full = length if window is None else np.minimum(length, window)
    return float((full * (full + 1) / 2 + (length - full) * full).sum() / length.sum())


class _Student:
    """Counts the student's products from block to block. Methods take whether their input has a gradient, and return
    whether their output does. ``scores``: by layer, one product of queries and keys."""

    def __init__(self, model: nn.Module, layers: list[LayerShape], scores: list[float], tune: str) -> None:
        plan, self.algebra = plan_of(model)
        self.layers, self.scores, self.family = layers, scores, FAMILIES[model.config.model_type]
        self.trained = plan.layers if tune == "full" else ()
        self.forward = self.input_gradients = self.adapters = self.attention = self.recomputed = 0.0

    def run(self, block: tuple[int, ...], needs: bool, checkpointed: bool) -> bool:
        """One layer, or a pair with attention and MLP side by side."""
        before = self.forward
        attended = [needs | self._attend(i, needs) for i in block]
        if self.algebra == "lp":
            attended = [any(attended)] * len(block)
        needs = any([has | self._mlp(i, has) for i, has in zip(block, attended, strict=True)])
        if checkpointed and needs:
            self.recomputed += self.forward - before - self._not_run_again(block[-1])
        return needs

    def _attend(self, i: int, needs: bool) -> bool:
        needs |= i in self.trained and self.family.before_attention is not None
        *inputs, output = [name for name in self.layers[i].linears if name.startswith("self_attn.")]
        have = [self._project(i, name, needs) for name in inputs]
        q, k, v = have if len(have) == 3 else have * 3  # one matrix for all in Phi-3
        self.forward += 2 * self.scores[i]
        self.attention += (2 + q + k + (q | k) + v) * self.scores[i]  # the fifth: of the probabilities
        return self._project(i, output, q | k | v)

    def _mlp(self, i: int, needs: bool) -> bool:
        needs |= i in self.trained and self.family.before_mlp is not None
        names = [name for name in self.layers[i].linears if name.startswith("mlp.")]
        if not names:
            return self._product(2.0 * self.layers[i].active, needs, i in self.trained)
        *inputs, output = names
        return self._project(i, output, any([self._project(i, name, needs) for name in inputs]))

    def _project(self, i: int, name: str, needs: bool) -> bool:
        a, b, rank = self.layers[i].linears[name]
        self.forward += 2.0 * rank * (a + b)
        self.adapters += 2.0 * rank * (2 * a + 3 * b + a * needs)  # forward; A's and B's own; to A's output; to x
        return self._product(2.0 * a * b, needs, i in self.trained) | (rank > 0)

    def _product(self, flops: float, needs: bool, trained: bool) -> bool:
        self.forward += flops
        self.input_gradients += flops * needs
        self.adapters += flops * trained
        return needs | trained

    def _not_run_again(self, last: int) -> float:
        """PyTorch's checkpoint stops at the last value that the backward needs, often the input of the last product."""
        name, (a, b, rank) = list(self.layers[last].linears.items())[-1]
        if name != "mlp.down_proj" or self.family.after_mlp is not None:
            return 0.0  # experts' outputs are weighted, or the output is normed: those need the whole block
        return 2.0 * b * (rank or a)
