"""Adapters of paired layers without gradients: each pair is fitted to its two layers run in order, by ridge regression.

Pair after pair, the stream that the pair reads is that of the pairs healed before it. Three closed-form fits each:

    1. q, k and v of the second layer read the pair's input and not what the first layer makes of it. What they read in
       order is predicted from it linearly, z' = z + D z, so that the weights' change is W D.
    2. The same for what gate and up of both layers read.
    3. What is then missing in the pair's output is predicted from the inputs of both down projections, u1 and u2, and
       added by them: minimise |y - pair(x) - W1 u1 - W2 u2|^2 + ridge (|W1|^2 + |W2|^2).

Under a rank the fits are reduced-rank regressions (Izenman 1975), of the two down projections in turn, since each has
a rank of its own. The result is the weights of LoRA adapters; the base stays as it is.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from tqdm import tqdm

from lp_train.errors import UserError
from lp_train.pairing.families import FAMILIES, check_family, decoder_of
from lp_train.pairing.pairs import LayerCall, plan_of, sequential

RIDGE = 1e-3  # of the mean diagonal of the inputs' second moments
TURNS = 4  # of the two down projections under a rank: the gain of the next one is a hundredth of the first's

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass
class Stream:
    """A batch on its way through the model.

    ``hidden`` [B, T, D]: the input of the next block of ``blocks``, which are those from the first pair on.
    ``counts`` [B * T] bool: the tokens that are fitted. In order, the block makes ``target`` [B, T, D] of its input,
    and its two MLPs read ``mlp_inputs`` [B * T, D].
    """

    hidden: Tensor
    blocks: Sequence[Sequence[LayerCall]]
    counts: Tensor
    target: Tensor = field(default_factory=lambda: torch.empty(0))
    mlp_inputs: list[Tensor] = field(default_factory=list)

    def through(self, block: int) -> Tensor:
        hidden = self.hidden
        for layer, kwargs in self.blocks[block]:
            hidden = layer(hidden, **kwargs)
        return hidden


class Moments:
    """Of inputs x [N, inputs] and targets y [N, outputs]: x'x and x'y, a batch in float32, their sum in float64."""

    def __init__(self) -> None:
        self.xx = self.xy = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.float(), y.float()
        self.xx, self.xy = self.xx + (x.T @ x).double(), self.xy + (x.T @ y).double()

    def add_change(self, x: Tensor, wanted: Tensor, counts: Tensor) -> None:
        """Of what is missing in x [N, inputs] to what is wanted [N, inputs], at the tokens that count."""
        self.add(x[counts], wanted[counts].float() - x[counts].float())

    def regularised(self) -> Tensor:
        """x'x with the ridge on its diagonal. Raises UserError where the activations were not finite."""
        if not (self.xx.isfinite().all() and self.xy.isfinite().all()):
            raise UserError("heal: the model's activations are not finite on this text; use model.dtype float32")
        return self.xx + RIDGE * self.xx.diagonal().mean() * torch.eye(len(self.xx)).to(self.xx)

    def solve(self) -> Tensor:
        """W [inputs, outputs] that minimises |y - x W|^2 + ridge |W|^2."""
        return torch.cholesky_solve(self.xy, torch.linalg.cholesky(self.regularised()))


def reduced_rank(weight: Tensor, xx: Tensor, rank: int) -> Tensor:
    """Of W [inputs, outputs] the nearest of that rank in the metric of ``xx``: the sum of squares of x (W - W_r)."""
    _, directions = torch.linalg.eigh(weight.T @ xx @ weight)
    kept = directions[:, -rank:]
    return weight @ kept @ kept.T


def solve_in_turns(moments: Moments, rank: int) -> list[Tensor]:
    """Of inputs in two halves, [x1 x2], W1 and W2 of at most that rank each that minimise |y - x1 W1 - x2 W2|^2 and the
    ridge: one after the other, each the best beside the other, which never gets worse."""
    xx, half = moments.regularised(), len(moments.xx) // 2
    parts = (slice(0, half), slice(half, None))
    weights = list(moments.solve().split(half))
    if rank >= weights[0].shape[1]:
        return weights
    factors = [torch.linalg.cholesky(xx[part, part]) for part in parts]
    weights = [reduced_rank(weight, xx[part, part], rank) for weight, part in zip(weights, parts, strict=True)]
    for turn in range(2 * TURNS):
        this, other = turn % 2, 1 - turn % 2
        left = moments.xy[parts[this]] - xx[parts[this], parts[other]] @ weights[other]
        best = torch.cholesky_solve(left, factors[this])
        weights[this] = reduced_rank(best, xx[parts[this], parts[this]], rank)
    return weights


@torch.no_grad()
def heal(model: nn.Module, streams: Sequence[Stream], autocast: Autocast = contextlib.nullcontext) -> list[float]:
    """Fits the adapters of a paired PeftModel, which is put into eval mode, on the tokens of ``streams``.

    Base and shared layers stay as they are. The streams end as those after the last block. Returns for each pair the
    mean relative error of its output to the two layers in order.

    Raises:
        UserError: a family with a norm after its MLP, DoRA, no adapter on a down projection, activations not finite.
    """
    check_healable(model.eval())
    errors = []
    for i, block in enumerate(tqdm(streams[0].blocks, desc="healing", delay=3, leave=False)):
        if len(block) == 2:
            _heal_attention(model, streams, i, autocast)
            _heal_mlp_inputs(streams, i, autocast)
            _heal_outputs(streams, i, autocast)
        for stream in streams:
            with autocast():
                stream.hidden = stream.through(i)
        if len(block) == 2:
            errors.append(_relative_error(streams))
    return errors


def check_healable(model: nn.Module) -> None:
    """Raises UserError for a family or adapters that the fit cannot be written into."""
    plan, _ = plan_of(model)
    if plan.kind != "pair":
        raise UserError(f"plan.kind {plan.kind!r}: only pairs can be healed; use plan.kind: pair")
    if check_family(model.config.model_type).after_mlp:
        names = ", ".join(sorted(name for name, family in FAMILIES.items() if not family.after_mlp))
        rule = "a norm after its MLP, through which no linear fit goes"
        raise UserError(f"model type {model.config.model_type!r}: {rule}; train it, or heal one of {names}")
    for i in plan.layers:
        down = getattr(decoder_of(model).layers[i].mlp, "down_proj", None)
        if not isinstance(down, LoraLayer):
            raise UserError(f"heal: no adapter on mlp.down_proj of layer {i}; add down_proj to lora.target_modules")
        if down.use_dora[down.active_adapters[0]]:
            raise UserError("lora.use_dora true: it also scales the weights, which no fit does; leave it out to heal")


def _heal_attention(model: nn.Module, streams: Sequence[Stream], i: int, autocast: Autocast) -> None:
    """Step 1. The streams keep what the layers do in order, for the steps after it."""
    first, second = (layer for layer, _ in streams[0].blocks[i])
    norm = getattr(second, str(check_family(model.config.model_type).before_attention))
    moments = Moments()
    for stream in streams:
        with sequential(model), autocast(), _inputs(second.self_attn, first.mlp, second.mlp) as inputs:
            stream.target = stream.through(i)
        wanted, *stream.mlp_inputs = inputs
        moments.add_change(norm(stream.hidden).flatten(0, 1), wanted, stream.counts)
    _read_changed(second.self_attn, moments)


def _heal_mlp_inputs(streams: Sequence[Stream], i: int, autocast: Autocast) -> None:
    """Step 2."""
    mlps = [layer.mlp for layer, _ in streams[0].blocks[i]]
    moments = [Moments() for _ in mlps]
    for stream in streams:
        with autocast(), _inputs(*mlps) as inputs:
            stream.through(i)
        for of_mlp, read, wanted in zip(moments, inputs, stream.mlp_inputs, strict=True):
            of_mlp.add_change(read, wanted, stream.counts)
    for mlp, of_mlp in zip(mlps, moments, strict=True):
        _read_changed(mlp, of_mlp)


def _read_changed(block: nn.Module, moments: Moments) -> None:
    """Has the projections that read the block's input read it changed, as ``moments`` say."""
    change, xx = moments.solve(), moments.regularised()
    for name, module in block.named_children():
        if isinstance(module, LoraLayer) and name not in ("o_proj", "down_proj"):
            weight = dequantize_module_weight(module.get_base_layer()).to(change)
            _adapt(module, reduced_rank(change @ weight.T, xx, _rank(module)))


def _heal_outputs(streams: Sequence[Stream], i: int, autocast: Autocast) -> None:
    """Step 3."""
    downs = [layer.mlp.down_proj for layer, _ in streams[0].blocks[i]]
    moments = Moments()
    for stream in streams:
        with autocast(), _inputs(*downs) as inputs:
            missing = stream.target.float() - stream.through(i).float()
        inner = torch.cat([x[stream.counts] for x in inputs], -1)
        moments.add(inner, missing.flatten(0, 1)[stream.counts])
    for down, weight in zip(downs, solve_in_turns(moments, _rank(downs[0])), strict=True):
        _adapt(down, weight)


@contextlib.contextmanager
def _inputs(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Inside: the list is filled with what each module was last called with, [B * T, inputs]."""
    seen = [torch.empty(0) for _ in modules]

    def keep(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            seen[i] = (args[0] if args else kwargs["hidden_states"]).flatten(0, 1)

        return hook

    hooks = [module.register_forward_pre_hook(keep(i), with_kwargs=True) for i, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _rank(module: LoraLayer) -> int:
    return int(module.r[module.active_adapters[0]])


def _adapt(module: LoraLayer, weight: Tensor) -> None:
    """Writes the change W [inputs, outputs] into the module's A and B, in equal shares of its size.

    Rows of A that W does not need keep their random start, so that training can still use them."""
    name = module.active_adapters[0]
    u, sizes, v = torch.linalg.svd(weight / module.scaling[name], full_matrices=False)
    kept = int((sizes > 1e-7 * sizes[0]).sum().clamp(max=_rank(module)))
    roots = sizes[:kept].sqrt()
    module.lora_A[name].weight[:kept] = (roots[:, None] * u[:, :kept].T).to(module.lora_A[name].weight)
    module.lora_B[name].weight.zero_()
    module.lora_B[name].weight[:, :kept] = (v[:kept].T * roots).to(module.lora_B[name].weight)


def _relative_error(streams: Sequence[Stream]) -> float:
    return float(torch.cat([relative_errors(s.hidden, s.target).flatten()[s.counts] for s in streams]).mean())


def relative_errors(ours: Tensor, original: Tensor) -> Tensor:
    """Of each vector: |ours - original| / |original|; [..., D] twice -> [...]."""
    return (ours.float() - original.float()).norm(dim=-1) / original.float().norm(dim=-1)
