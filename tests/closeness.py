"""How far logits are from others, and models whose pairs change almost nothing."""

from collections.abc import Iterable

from torch import Tensor, nn


def error(ours: Tensor, expected: Tensor) -> float:
    """The largest, of the largest expected one."""
    return ((ours.double() - expected.double()).abs().max() / expected.abs().max()).item()


def distance(ours: Tensor, expected: Tensor) -> float:
    """Of the norms."""
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


def weaken(layers: Iterable[nn.Module], scale: float = 1e-3) -> None:
    """What the layers add is ``scale`` of what it was."""
    for layer in layers:
        layer.self_attn.o_proj.weight.data *= scale
        layer.mlp.down_proj.weight.data *= scale
