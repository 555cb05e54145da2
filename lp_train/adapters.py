"""What is trained: LoRA on the paired blocks (PEFT), or the paired blocks' own weights."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from lp_train.config import Config
from lp_train.errors import UserError
from lp_train.models import check_stamp
from lp_train.pairing import PairPlan, decoder_of

ADAPTER_KEYS = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern")

ROUTERS = re.compile(r"(^|\.)(router|mlp\.gate|shared_expert_gate)(\.|$)")


def attach(model: nn.Module, plan: PairPlan, config: Config) -> nn.Module:
    """Makes the paired blocks trainable and freezes the rest.

    ``tune: lora`` returns a PeftModel with adapters on the projections of the paired layers (``lora.scope: paired``)
    or of all layers from the first pair on (``suffix``). ``tune: full`` makes the paired layers' own parameters
    trainable, in float32; call ``pairing.keep_originals`` first.

    Raises:
        UserError: ``lora.target_modules`` matches no projection, or PEFT refuses a value.
    """
    model.requires_grad_(False)
    if config.tune == "full":
        for i in plan.layers:
            decoder_of(model).layers[i].float().requires_grad_(True)
        return model
    options = dict(config.lora)
    del options["scope"], options["start_from"], options["heal_tokens"]
    wanted, layers = options.pop("target_modules", None), adapted_layers(plan, config)
    targets = [name for name in projections(model, layers) if selects(wanted, name)]
    if not targets:
        available = sorted({name.rsplit(".", 1)[1] for name in projections(model, layers)})
        raise UserError(f"lora.target_modules {wanted!r}: matches no projection; there are {', '.join(available)}")
    if saved := options.get("modules_to_save"):
        options["modules_to_save"] = [name for name, _ in modules_of(model, layers) if selects(saved, name)] or saved
    try:
        model = peft.get_peft_model(model, peft.LoraConfig(**options, target_modules=targets, task_type="CAUSAL_LM"))
    except (ValueError, TypeError) as error:
        raise UserError(f"lora: PEFT refuses it: {' '.join(str(error).split())}") from error
    _refuse_shared_layers(model, plan)
    return model


def adapted_layers(plan: PairPlan, config: Config) -> Sequence[int]:
    """The layers that get adapters: the paired ones, or all from the first pair on (``lora.scope: suffix``).
    A control has them only on layers that stay."""
    if config.lora["scope"] == "paired":
        return plan.layers
    return [i for i in range(plan.first_layer, plan.num_layers) if i not in plan.removed]


def _refuse_shared_layers(model: nn.Module, plan: PairPlan) -> None:
    """Layers below the first pair run once, for the original: nothing in them can be trained."""
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if parameter.requires_grad and not (layer and int(layer[1]) >= plan.first_layer):
            rule = f"adapters go into layers {plan.first_layer} to {plan.num_layers - 1}"
            raise UserError(f"lora: it would train {name}, which original and paired model share; {rule}")


def start_from_activations(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> None:
    """``init_lora_weights: eva`` (arXiv 2410.07170): the adapters' A from the principal directions of their inputs.

    The paired model reads the batches (``input_ids``, ``position_ids`` [B, T]); its output does not change.
    """
    peft.initialize_lora_eva_weights(model, list(batches), show_progress_bar=False)


def projections(model: nn.Module, layers: Iterable[int]) -> Iterator[str]:
    """Full names of the linear layers of attention and MLP in the given decoder layers. Routers are left alone.

    So is a mixture's dense MLP (``mlp_only_layers``): PEFT takes its names for those of the experts, in all layers.
    """
    mixture = is_mixture(model)
    for name, module in modules_of(model, layers):
        left_out = ROUTERS.search(name) or (mixture and ".mlp." in name)
        if isinstance(module, nn.Linear) and not left_out:
            yield name


def is_mixture(model: nn.Module) -> bool:
    """Whether some of its feed-forward blocks are mixtures of experts."""
    return any(ROUTERS.search(name) for name, _ in decoder_of(model).named_modules())


def modules_of(model: nn.Module, layers: Iterable[int]) -> Iterator[tuple[str, nn.Module]]:
    """Full names and modules inside the given decoder layers."""
    decoder = decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    for i in layers:
        for name, module in decoder.layers[i].named_modules():
            yield f"{prefix}.layers.{i}.{name}", module


def selects(wanted: str | list[str] | None, name: str) -> bool:
    """PEFT's rule for ``target_modules``: a regular expression for the whole name, or a list of endings."""
    if wanted is None or wanted == "all-linear":
        return True
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


def autocast(dtype: torch.dtype, where: torch.device) -> torch.autocast:
    """Float32 adapters beside half-precision weights compute in half precision."""
    half = dtype != torch.float32
    return torch.autocast(where.type, dtype=dtype if half else None, enabled=half)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. 4-bit weights count as what they stand for."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(_numel(p) for p in model.parameters())


def _numel(parameter: torch.Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Gives the adapters of ``model`` (paired and stamped) the weights of the one in ``folder``.

    Raises:
        UserError: it is of another base, plan, rank or scale, or on other modules.
    """
    what = f"lora.start_from {str(folder)!r}"
    check_stamp(folder, model)
    theirs, ours = peft.PeftConfig.from_pretrained(str(folder)), model.peft_config["default"]
    for key in ADAPTER_KEYS:
        if getattr(theirs, key) != getattr(ours, key):
            stored = getattr(theirs, key)
            raise UserError(f"{what}: made with lora.{key} {stored}, this run has {getattr(ours, key)}; use {stored}")
    weights, wanted = peft.load_peft_weights(str(folder), device="cpu"), peft.get_peft_model_state_dict(model)
    shapes, expected = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (weights, wanted))
    differing = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))
    if differing:
        name = differing[0]
        found = f"{name} is {shapes.get(name, 'missing')} in it and {expected.get(name, 'missing')} in this run"
        raise UserError(f"{what}: {found}; use the lora section of the run that made it")
    peft.set_peft_model_state_dict(model, weights)


def check_adapter(model: nn.Module, folder: Path, live: dict[str, Tensor]) -> None:
    """Reads an adapter just written and compares it with the parameters that are trained, whole, by name.

    Raises:
        UserError: one is missing, of another shape or of other values; nothing is compared without adapters.
    """
    if not isinstance(model, peft.PeftModel):
        return
    saved = peft.load_peft_weights(str(folder), device="cpu")
    expected = peft.get_peft_model_state_dict(model, state_dict=live)
    wrong = [name for name in saved.keys() ^ expected.keys()]
    wrong += [name for name in saved.keys() & expected.keys() if not torch.equal(saved[name], expected[name])]
    empty = [name for name, value in live.items() if not value.numel()]
    if wrong or empty or len(saved) != len(live):
        first = sorted(wrong or empty or live)[0]
        found = f"{len(saved)} tensors saved of {len(live)} that are trained, {len(wrong)} differ from those in memory"
        remedy = "this adapter is not whole; use configs/accelerate/ddp.yaml and report it"
        raise UserError(f"{folder}: {found} ({first} first): {remedy}")
