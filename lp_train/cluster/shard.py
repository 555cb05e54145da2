"""Sharded weights (FSDP2, ZeRO-3): what is one unit, and how the whole of a weight is had."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from trl.models.utils import _ForwardRedirection

from lp_train.cluster import engine
from lp_train.pairing import blocks_of, decoder_of, plan_of


def shard(model: nn.Module) -> nn.Module:
    """The model in parts where accelerate's configuration asks for FSDP2, with that configuration's options; otherwise
    as it is. Every parameter keeps its dtype: accelerate's own wrapping would cut pairs and upcast adapters."""
    if engine.asked() == "FSDP2":
        plugin = FullyShardedDataParallelPlugin()  # reads the variables that `accelerate launch` sets
        fully_shard(shard_layers(model, reshard_after_forward=plugin.reshard_after_forward))
    return model


def shard_layers(model: nn.Module, **options: Any) -> nn.Module:
    """``fully_shard`` on the decoder's layers, a pair as one unit: the second layer of a pair also computes with
    the weights of the first, which on its own would have let them go. The caller shards the rest.

    ``options``: those of ``fully_shard`` (mesh, policies).
    """
    layers, (plan, _) = decoder_of(model).layers, plan_of(model)
    for block in blocks_of([first for first, _ in plan.pairs], 0, plan.num_layers):
        fully_shard([layers[i] for i in block], **options)
    return model


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside: parameters that ZeRO-3 holds in parts are whole. All processes must enter it. In the forward of another
    module to ask for a parameter is enough: DeepSpeed has put it together then."""
    parts = [p for p in parameters if (status := getattr(p, "ds_status", None)) and status.name == "NOT_AVAILABLE"]
    if not parts:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # an extra

    with GatheredParameters(parts):
        yield


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one; then all processes must call it.

    What ZeRO-3 has put together stays so for as long as the result is held: it lets go of its own reference only."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    with gathered([tensor] if isinstance(tensor, nn.Parameter) else []):
        return tensor.detach()


def whole_state(model: nn.Module, trained: bool, keep: bool = True) -> dict[str, Tensor]:
    """Parameters by name, whole and on the CPU; ``trained``: only those. All processes must call it; those that do not
    ``keep`` get an empty one."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad or not trained}
    found = {}
    for name, p in wanted.items():
        value = whole(p)
        if keep:
            found[name] = value.detach().to("cpu", copy=True)
    return found


def inside(model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` as the forward of a sharded model, so that the weights outside of its layers are whole in it;
    called plainly for any other model."""
    if not in_parts(model):
        return function(*args)
    # None: torch 2.11's FSDP2 moves a forward's inputs to the GPU, and fails where there are none
    result = _ForwardRedirection()(model, model, lambda _, *given: function(*given), None, *args)
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()  # without a backward those weights would stay whole, and a checkpoint could not be loaded
    return result


def in_parts(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has cut the model: all processes must then take the same number of forwards."""
    return isinstance(model, FSDPModule) or any(hasattr(p, "ds_id") for p in model.parameters())


def held(model: nn.Module) -> tuple[int, int]:
    """(elements of the parameters that this process holds, of all parameters)."""
    ours = everything = 0
    for p in model.parameters():
        part = p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p)
        ours, everything = ours + part.numel(), everything + getattr(p, "ds_numel", p.numel())
    return ours, everything
