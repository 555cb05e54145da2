"""A pair as one wide layer: the same function, fewer and larger products.

For ``lp`` and norms before each block only. Both layers normalise the same x, so that each norm's gain goes into the
projections behind it; q, k, v, gate and up of the two layers are stacked by rows, o and down by columns, which adds
up the layers' outputs. Every query head keeps its key and value head. What cannot be fused stays a pair.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lp_train import register
from lp_train.errors import UserError
from lp_train.modeling_layer_parallel import CLASSES
from lp_train.pairing.families import FAMILIES, decoder_of, head_dim
from lp_train.pairing.pairs import plan_of
from lp_train.pairing.plan import blocks_of

FUSABLE = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
NORM_OF = {name: "input_layernorm" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj")} | {
    name: "post_attention_layernorm" for name in ("gate_proj", "up_proj", "gate_up_proj")
}
BY_COLUMNS = ("o_proj", "down_proj")
PER_LAYER = ("layer_types", "no_rope_layers")  # lists of a configuration with one entry for each layer
WIDER = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
FEED_FORWARD = ("intermediate_size", "moe_intermediate_size")

State = dict[str, Tensor]
Block = tuple[int, ...]

register()  # for a fused model's own configuration


def fusable(model: nn.Module, pair: tuple[int, int]) -> str | None:
    """None, or why the pair of layers of a paired model cannot be one wide layer."""
    config, family = model.config, FAMILIES[model.config.model_type]
    first, second = (decoder_of(model).layers[i] for i in pair)
    if family.after_attention or family.after_mlp:
        return "norms after a block"
    if config.model_type not in FUSABLE:
        return f"a layer of {config.model_type} has no wider form"
    if plan_of(model)[1] != "lp":
        return "algebra par: each feed-forward block sees another input"
    if differing := [name for name in PER_LAYER if len({_entry(config, name, i) for i in pair}) > 1]:
        return f"the two layers differ in {differing[0]}"
    if _shapes(first) != _shapes(second):
        return "the two layers differ in the shapes of their weights"
    return None


def _entry(config: PretrainedConfig, name: str, layer: int) -> Any:
    values = getattr(config, name, None)
    return values[layer] if values else None


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in layer.named_parameters() if "lora_" not in name}


def blocks(model: nn.Module, form: str = "fused") -> tuple[list[Block], dict[tuple[int, int], str]]:
    """The layers of the ``fused`` or ``paired`` form, as tuples of the original's, and why pairs stay pairs."""
    plan = plan_of(model)[0]
    if plan.kind != "pair":
        raise UserError(f"plan.kind {plan.kind}: a control of training, which has no fused or paired form")
    reasons = {pair: "the form is paired" if form == "paired" else fusable(model, pair) for pair in plan.pairs}
    wide = [first for (first, _), reason in reasons.items() if reason is None]
    return blocks_of(wide, 0, plan.num_layers), {pair: reason for pair, reason in reasons.items() if reason}


def fuse(model: nn.Module) -> PreTrainedModel:
    """A new model with a wide layer for each pair of a paired ``model`` (a PEFT model too: its adapters are merged).

    Its logits are the paired model's, up to rounding. ``model`` stays as it is. What is neither paired nor adapted is
    shared with it, in memory too: as the draft of its original the fused model costs its pairs only.

    Raises:
        UserError: not paired, weights in 4 bits, or no pair that can be fused (with the reason).
    """
    made, kept = blocks(model)
    if all(len(block) == 1 for block in made):
        raise UserError(f"no pair can be fused: {listed(kept)}; export the paired form instead")
    with torch.device("meta"):
        fused = CLASSES[model.config.model_type][1](config_of(model, made))
    fused.load_state_dict(dict(tensors(model, made)), strict=False, assign=True)
    fused.tie_weights()
    _fill_buffers(fused, model)
    fused.generation_config = copy.deepcopy(model.generation_config)
    return fused.eval()


def listed(reasons: dict[tuple[int, int], str]) -> str:
    return "; ".join(f"{first}+{second}: {reason}" for (first, second), reason in reasons.items())


def _fill_buffers(fused: nn.Module, model: nn.Module) -> None:
    """Buffers that no checkpoint holds (rotary frequencies), from the module of the same name."""
    source = decoder_of(model)
    for name, buffer in decoder_of(fused).named_buffers():
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            setattr(decoder_of(fused).get_submodule(parent), leaf, source.get_submodule(parent)._buffers[leaf].clone())


def config_of(model: nn.Module, made: list[Block]) -> PretrainedConfig:
    """The configuration of the model with these layers: its own model type, its wide layers, its pairs."""
    plan, algebra = plan_of(model)
    old = model.config.to_dict()
    for name in ("layer_parallel", "model_type", "architectures", "quantization_config"):
        old.pop(name, None)
    for name in PER_LAYER:
        if old.get(name):
            old[name] = [old[name][block[0]] for block in made]
    wide = [i for i, block in enumerate(made) if len(block) > 1]
    index = {block[0]: i for i, block in enumerate(made)}
    pairs = [[index[k], index[j]] for k, j in plan.pairs if j in index]
    widths = {i: {name: 2 * old[name] for name in WIDER} for i in wide}
    # The family's own class refuses layers of different widths. Pairs alone would be all of one width, and it would run
    # them in order: so the second of each says how wide a feed-forward block the two are together.
    widths = widths or {j: {name: 2 * old[name] for name in FEED_FORWARD if old.get(name)} for _, j in pairs}
    new = old | {
        "num_hidden_layers": len(made),
        "head_dim": head_dim(model.config),
        "per_layer_config": widths,
        "parallel_layers": {
            "wide": wide,
            "pairs": pairs,
            "algebra": algebra,
            "branches": {n: v for n, v in vars(FAMILIES[model.config.model_type]).items() if isinstance(v, str)},
            "original_layers": plan.num_layers,
            "original_pairs": [list(pair) for pair in plan.pairs],
        },
        "attn_implementation": model.config._attn_implementation,
    }
    return CLASSES[model.config.model_type][0](**new)


# --- weights ---------------------------------------------------------------------------------------------------------


def tensors(model: nn.Module, made: list[Block]) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the model with these layers, one layer at a time; adapters merged.

    What was not changed is the model's own memory. A tied head is left out.
    """
    bare: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    dtype = bare.get_input_embeddings().weight.dtype
    prefix = next(name for name, module in bare.named_modules() if module is decoder_of(model)) + ".layers"
    tied = bare.get_output_embeddings().weight is bare.get_input_embeddings().weight
    for name, tensor in bare.state_dict().items():
        if ".base_layer." in name and not name.startswith(f"{prefix}."):
            raise UserError(f"{name}: only adapters in decoder layers can be merged here; merge this one first")
        if not name.startswith(f"{prefix}.") and not (tied and name == "lm_head.weight"):
            yield name, tensor
    for i, block in enumerate(made):
        states = [_plain_state(decoder_of(model).layers[j]) for j in block]
        state = states[0] if len(states) == 1 else wide_state(states[0], states[1], model.config)
        yield from ((f"{prefix}.{i}.{name}", tensor.to(dtype)) for name, tensor in state.items())


@torch.no_grad()
def _plain_state(layer: nn.Module) -> State:
    """Weights of a layer with adapters merged, in float32 where there were any; its own ones where there were none."""
    adapted = [m for m in layer.modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    if any(type(p).__name__ == "Params4bit" for p in layer.parameters()):
        raise UserError("the weights are in 4 bits; load the base in full precision (scripts/export.py does)")
    if not adapted:
        return layer.state_dict()
    shared = [value for name in ("_pairing", "_first", "_original") if (value := layer.__dict__.get(name)) is not None]
    merged = copy.deepcopy(layer, {id(value): value for value in shared}).float()
    for name, module in list(merged.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, ModulesToSaveWrapper):
            setattr(merged.get_submodule(parent), leaf, module.modules_to_save[module.active_adapters[0]])
        elif isinstance(module, BaseTunerLayer):
            module.merge()
            setattr(merged.get_submodule(parent), leaf, module.get_base_layer())
    return merged.state_dict()


@torch.no_grad()
def wide_state(first: State, second: State, config: PretrainedConfig) -> State:
    """Weights of the wide layer from those of two layers (names as in a decoder layer), in float32."""
    heads, kv_heads, width = (getattr(config, name) for name in WIDER)
    d = head_dim(config)
    packed = {"qkv_proj": [heads * d, kv_heads * d, kv_heads * d], "gate_up_proj": [width, width]}
    state = {}
    for name in first:
        pair = [layer[name].float() for layer in (first, second)]
        path, kind = name.rsplit(".", 1)
        module = path.rsplit(".", 1)[-1]
        if module in NORM_OF:
            if kind == "weight":
                gains = (layer[f"{NORM_OF[module]}.weight"].float() for layer in (first, second))
                pair = [weight * gain for weight, gain in zip(pair, gains, strict=True)]
            sizes = packed.get(module, [len(pair[0])])
            parts = zip(*(tensor.split(sizes) for tensor in pair), strict=True)
            state[name] = torch.cat([part for both in parts for part in both])
        elif module in BY_COLUMNS:
            state[name] = torch.cat(pair, dim=1) if kind == "weight" else pair[0] + pair[1]
        elif module in ("q_norm", "k_norm"):
            count = heads if module == "q_norm" else kv_heads
            state[name] = torch.cat([gain.expand(count, -1) for gain in pair])
        else:
            state[name] = torch.ones_like(pair[0])  # the norms before the blocks: their gains are in the projections
    return state
