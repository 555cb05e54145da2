"""Sharded weights (FSDP2): what is one unit, and how the whole of a weight is had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from trl.models.utils import _ForwardRedirection

from lp_train.pairing import plan_of
from lp_train.pairing.families import decoder_of


def shard_layers(model: nn.Module, **options: Any) -> nn.Module:
    """``fully_shard`` on the decoder's layers, a pair as one unit: the second layer of a pair also computes with
    the weights of the first, which on its own would have let them go. The caller shards the rest.

    ``options``: those of ``fully_shard`` (mesh, policies).
    """
    layers, (plan, _) = decoder_of(model).layers, plan_of(model)
    for block in plan.blocks_from(0):
        fully_shard([layers[i] for i in block], **options)
    return model


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one; then all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def inside(model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` as the forward of a sharded model, so that the weights outside of its layers are whole in it;
    called plainly for any other model."""
    return _ForwardRedirection()(model, model, function, *args) if isinstance(model, FSDPModule) else function(*args)


def sharded_parameters(model: nn.Module) -> int:
    """How many parameters are held in parts: by FSDP2 or by ZeRO-3."""
    return sum(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())
