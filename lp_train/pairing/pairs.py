"""Pairs kept in place: layer k lets its input through, layer k+1 runs both.

No parameter or module is renamed or moved, so checkpoints, PEFT paths, caches and hooks stay those of the original.
A layer's *class* is changed to a dynamic subclass, because Transformers wraps ``forward`` for gradient checkpointing
when a class is made and records hidden states by ``isinstance``: a patched ``forward`` would silently lose both.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lp_train.errors import UserError
from lp_train.pairing.families import Family, check_branches, check_family, decoder_of
from lp_train.pairing.plan import PairPlan

ALGEBRAS = ("lp", "par")
LayerCall = tuple[nn.Module, dict[str, Any]]  # a decoder layer and its keyword arguments


def pair_output(family: Family, algebra: str, first: LayerCall, second: LayerCall, x: Tensor) -> Tensor:
    """Two layers side by side on x [B, T, D], each with the keyword arguments of its own call; the equations are in
    :func:`pair_layers`."""
    attention1, attention2 = (family.attention_branch(layer, x, kwargs) for layer, kwargs in (first, second))
    h = x + attention1 + attention2
    h1, h2 = (h, h) if algebra == "lp" else (x + attention1, x + attention2)
    return h + family.mlp_branch(first[0], h1) + family.mlp_branch(second[0], h2)


class _Pairing:
    """Shared by all paired layers of one model; ``parallel`` is switched by :func:`sequential`."""

    def __init__(self, plan: PairPlan, algebra: str, family: Family) -> None:
        self.plan, self.algebra, self.family = plan, algebra, family
        self.parallel = True


class _Paired(nn.Module):
    """As it is also a layer of a control that stays: its own forward, or in order that of its frozen copy."""

    _pairing: _Pairing
    _original: nn.Module | None = None  # frozen copy of the layer, where its own weights are trained or merged

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._original is None or self._pairing.parallel:
            return super().forward(hidden_states, *args, **kwargs)
        return self._original.forward(hidden_states, *args, **kwargs)


class _Removed(_Paired):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self._pairing.parallel else super().forward(hidden_states, *args, **kwargs)


class _First(_Removed):
    _kwargs: dict[str, Any] | None = None  # from its own call to that of its partner

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._pairing.parallel:  # its own mask and rotary table: neighbours' layer types may differ
            self._kwargs = {n: kwargs[n] for n in ("attention_mask", "position_embeddings") if n in kwargs}
        return super().__call__(hidden_states, *args, **kwargs)


class _Second(_Paired):
    _first: _First

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # handed over outside of `forward`, so that a checkpointed forward has it again when it is run a second time
        if self._pairing.parallel:
            kwargs["first_kwargs"], self._first._kwargs = self._first._kwargs, None
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(
        self, hidden_states: Tensor, *args: Any, first_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        if first_kwargs is None:
            return super().forward(hidden_states, *args, **kwargs)
        calls = (self._first, {**kwargs, **first_kwargs}), (self, kwargs)
        return pair_output(self._pairing.family, self._pairing.algebra, *calls, hidden_states)


@functools.cache
def _subclass(mixin: type[_Paired], base: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.__name__.lstrip('_')}{base.__name__}", (mixin, base), {})


def pair_layers(model: nn.Module, plan: PairPlan | str | Sequence[Sequence[int]], algebra: str = "lp") -> nn.Module:
    """Pairs the layers of a causal LM in place and returns it (arXiv 2502.02790).

    ``lp``: h = x + A1(x) + A2(x); y = h + F1(h) + F2(h), what a tensor-parallel pair computes.
    ``par``: h1 = x + A1(x), h2 = x + A2(x); y = h1 + F1(h1) + (h2 - x) + F2(h2).
    A and F are a layer's attention and feed-forward branches, each with the layer's own norms.
    ``hidden_states[k + 1]`` of a pair (k, k+1) equals ``hidden_states[k]``; the pair's output is the next one.
    A plan that is a control (:meth:`PairPlan.control`) removes or merges its layers instead, in the same way.

    Raises:
        UserError: unknown algebra or family, a plan that does not fit, layers that cannot be merged, or a model that is
            paired already.
    """
    if algebra not in ALGEBRAS:
        raise UserError(f"plan.algebra {algebra!r}: unknown; use one of {', '.join(ALGEBRAS)}")
    family, layers = check_family(model.config.model_type), decoder_of(model).layers
    if is_paired(model):
        raise UserError("the model is paired already; call unpair_layers(model) first")
    control = (plan.kind, plan.removed or None) if isinstance(plan, PairPlan) else ("pair", None)
    plan = PairPlan.parse(plan, num_layers=len(layers)).control(*control)
    pairing = _Pairing(plan, algebra, family)
    record: dict[str, Any] = {"pairs": [list(pair) for pair in plan.pairs], "algebra": algebra}
    if plan.kind != "pair":
        _make_control(layers, pairing)
        model.config.layer_parallel = record | {"kind": plan.kind, "remove": list(plan.removed) or None}
        return model
    check_branches(model, family, plan.layers)
    for k, j in plan.pairs:
        for layer, mixin in ((layers[k], _First), (layers[j], _Second)):
            layer._pairing = pairing
            layer._kwargs = None  # of the layer itself from the start: a compiled layer's guards see where it is
            layer.__class__ = _subclass(mixin, layer.__class__)
        object.__setattr__(layers[j], "_first", layers[k])  # a plain reference: no second registration, no new key
    model.config.layer_parallel = record
    return model


def _make_control(layers: nn.ModuleList, pairing: _Pairing) -> None:
    """The layers of the plan's pairs, those removed, and those that take others in."""
    plan = pairing.plan
    for k, taken in plan.merged.items():
        _check_mergeable(layers[k], k, [layers[i] for i in taken], taken)
    for i in sorted({*plan.layers, *plan.removed, *plan.merged}):
        layers[i]._pairing = pairing
        layers[i].__class__ = _subclass(_Removed if i in plan.removed else _Paired, layers[i].__class__)
    for k, taken in plan.merged.items():
        _keep_original(layers[k])
        _merge(layers[k], [layers[i] for i in taken])


def _check_mergeable(layer: nn.Module, index: int, others: Sequence[nn.Module], indices: Sequence[int]) -> None:
    shapes = {name: p.shape for name, p in layer.named_parameters()}
    for other, i in zip(others, indices, strict=True):
        found = {name: p.shape for name, p in other.named_parameters()}
        if differing := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
            rule = f"layers {index} and {i} differ in {differing[0]}"
            raise UserError(f"plan.kind 'merge': {rule}, so that one cannot take in the other; use plan.kind drop")


@torch.no_grad()
def _merge(layer: nn.Module, others: Sequence[nn.Module]) -> None:
    """w + sum (w_other - w), in float32 (LaCo, arXiv 2402.11187, equation 2)."""
    for name, p in layer.named_parameters():
        own = p.float()
        p.copy_(own + torch.stack([other.get_parameter(name).float() - own for other in others]).sum(0))


def unpair_layers(model: nn.Module) -> nn.Module:
    """Undoes :func:`pair_layers`: the model is the original again, with whatever was trained in it."""
    for layer in _paired_layers(model):
        if layer._pairing.plan.merged and layer._original is not None:
            layer.load_state_dict(layer._original.state_dict())
        layer.__class__ = type(layer).__bases__[1]
        for name in ("_pairing", "_first", "_original", "_kwargs"):
            layer.__dict__.pop(name, None)
    del model.config.layer_parallel
    return model


def is_paired(model: nn.Module) -> bool:
    return any(isinstance(layer, _Paired) for layer in decoder_of(model).layers)


def plan_of(model: nn.Module) -> tuple[PairPlan, str]:
    """The plan and the algebra of a paired model. Raises UserError for any other."""
    pairing = _paired_layers(model)[0]._pairing
    return pairing.plan, pairing.algebra


def _paired_layers(model: nn.Module) -> list[_Paired]:
    layers = [layer for layer in decoder_of(model).layers if isinstance(layer, _Paired)]
    if not layers:
        raise UserError("the model has no paired layers; call pair_layers(model, plan) first")
    return layers


def keep_originals(model: nn.Module) -> None:
    """Keeps frozen copies of the paired layers for :func:`sequential`, for training the layers' own weights.

    Call it with the model on its final device; the copies are no submodules and do not move with it.
    """
    for layer in _paired_layers(model):
        _keep_original(layer)


def _keep_original(layer: _Paired) -> None:
    shared = (layer._pairing, layer.__dict__.get("_first"))
    original = copy.deepcopy(layer, {id(x): x for x in shared})
    original.__class__ = type(layer).__bases__[1]
    object.__setattr__(layer, "_original", original.requires_grad_(False).eval())


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """PEFT adapters of any kind disabled. Unlike PEFT's ``disable_adapter`` it leaves ``requires_grad`` alone and
    costs microseconds, so that it can be entered every step."""
    tuners = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [m._disable_adapters for m in tuners]
    for module in tuners:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, disabled in zip(tuners, before, strict=True):
            module._disable_adapters = disabled


@contextlib.contextmanager
def in_order(model: nn.Module) -> Iterator[nn.Module]:
    """Inside: the pairs run one layer after the other; adapters stay as they are switched."""
    pairing = _paired_layers(model)[0]._pairing
    before, pairing.parallel = pairing.parallel, False
    try:
        yield model
    finally:
        pairing.parallel = before


@contextlib.contextmanager
def sequential(model: nn.Module) -> Iterator[nn.Module]:
    """Inside: the pairs run in order and adapters are off, which is bitwise the original model.

    Nothing is copied; it may be entered between a forward and its backward.
    """
    with in_order(model), adapters_off(model):
        yield model
