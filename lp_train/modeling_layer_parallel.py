"""Layer-parallel causal language models (arXiv 2502.02790) for Transformers: wide layers and pairs of layers.

This file is the model code of a checkpoint made by lp-train. It needs torch and transformers >= 5.17 only:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Every class is the family's own, with other layers. ``config.per_layer_config`` (a field of Transformers) widens the
layers that two layers were fused into; where there are none, it only keeps the family's own class from running the
pairs in order. ``config.parallel_layers`` says the rest: ``wide``, the indices of those layers; ``pairs``, the layers
that run side by side, their ``algebra``, and ``branches``, the names of the norms and dropouts around attention and
MLP; for the record ``original_layers`` and ``original_pairs``.
"""

import copy
import functools
from typing import Any

import torch
import transformers
from torch import Tensor, nn

FAMILIES = {  # by the original's `model_type`: its configuration and its causal LM
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}
PREFIX = "layer_parallel_"  # a model type of its own: nothing but this code reads such a checkpoint as a model


# --- two layers side by side -----------------------------------------------------------------------------------------


class _First(nn.Module):
    """Lets its input through; the second layer of the pair runs both."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._own = {name: kwargs[name] for name in ("attention_mask", "position_embeddings") if name in kwargs}
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


class _Second(nn.Module):
    """``lp``: h = x + A1(x) + A2(x), y = h + F1(h) + F2(h). ``par``: each F sees the sum of x and its own A only."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # outside of `forward`, so that a checkpointed forward has it again when it is run a second time
        return super().__call__(hidden_states, *args, first_kwargs=self._first._own, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, first_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        first, x = self._first, hidden_states
        attention1 = _attention(first, x, {**kwargs, **first_kwargs})
        attention2 = _attention(self, x, kwargs)
        h = x + attention1 + attention2
        h1, h2 = (h, h) if self._algebra == "lp" else (x + attention1, x + attention2)
        return h + _mlp(first, h1) + _mlp(self, h2)


def _attention(layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    out = layer.self_attn(hidden_states=_through(layer, "before_attention", x), **kwargs)[0]
    return _through(layer, "attention_dropout", _through(layer, "after_attention", out))


def _mlp(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer.mlp(_through(layer, "before_mlp", x))
    out = out[0] if isinstance(out, tuple) else out  # gpt-oss also returns its router's scores
    return _through(layer, "mlp_dropout", _through(layer, "after_mlp", out.view_as(x)))


def _through(layer: nn.Module, place: str, x: Tensor) -> Tensor:
    name = layer._branches.get(place)
    return x if name is None else getattr(layer, name)(x)


@functools.cache
def _side_by_side(half: type[nn.Module], layer: type[nn.Module]) -> type[nn.Module]:
    # a subclass, not a patched `forward`: Transformers wraps `forward` when a class is made, and knows layers by class
    return type(f"{half.__name__.lstrip('_')}{layer.__name__}", (half, layer), {})


# --- one wide layer --------------------------------------------------------------------------------------------------


class HeadRMSNorm(nn.Module):
    """RMS norm over a head's width with a gain of its own for every head: weight [H, d], input [B, T, H, d].

    Under tensor parallelism a rank sees its own heads only, in order of rank.
    """

    def __init__(self, heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        gain: Tensor = self.weight
        heads = hidden_states.shape[-2]
        if heads < len(gain):
            gain = gain[heads * (torch.distributed.get_rank() % (len(gain) // heads)) :][:heads]
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return gain * x.to(hidden_states.dtype)


def _give_each_head_its_gain(attention: nn.Module, config: Any) -> None:
    for name, heads in (("q_norm", config.num_attention_heads), ("k_norm", config.num_key_value_heads)):
        setattr(attention, name, HeadRMSNorm(heads, config.head_dim, config.rms_norm_eps))


# --- configurations and models ---------------------------------------------------------------------------------------


def _uniform(config: Any) -> Any:
    """The configuration as if no layer were wide. Some code of the families reads the one width of a whole model."""
    plain: Any = copy.copy(config)
    plain.per_layer_config = None
    return plain


class _Config:
    def validate(self) -> None:
        super(_Config, _uniform(self)).validate()  # type: ignore[misc]


class _Model(nn.Module):
    def __init__(self, config: Any) -> None:
        widths = config.to_dict().get("per_layer_config")
        config.per_layer_config = None  # the family's own code wants one width for all layers
        super().__init__(config)
        config.per_layer_config = widths
        layers = self.get_decoder().layers
        if config.parallel_layers["wide"]:
            self._widen(layers)
            self.get_decoder().rotary_emb.config = _uniform(config)
            self.post_init()  # again, for the new layers
        for k, j in config.parallel_layers["pairs"]:
            self._pair(layers[k], layers[j])

    def _widen(self, layers: nn.ModuleList) -> None:
        for i, config in enumerate(self.config.per_layer_config):
            layers[i] = type(layers[i])(config, i)
            if i in self.config.parallel_layers["wide"] and hasattr(layers[i].self_attn, "q_norm"):
                _give_each_head_its_gain(layers[i].self_attn, config)

    def _pair(self, first: nn.Module, second: nn.Module) -> None:
        for layer, half in ((first, _First), (second, _Second)):
            layer._branches = self.config.parallel_layers["branches"]
            layer._algebra = self.config.parallel_layers["algebra"]
            layer.__class__ = _side_by_side(half, layer.__class__)
        first._own = {}
        object.__setattr__(second, "_first", first)  # a plain reference: no second registration, no new key

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)
        for layer in self.get_decoder().layers:  # their configurations are copies with other widths
            layer.self_attn.config._attn_implementation_internal = self.config._attn_implementation


def _define(model_type: str, config_name: str, model_name: str) -> tuple[Any, Any]:
    """Configuration and model of one family, as classes of this file that a checkpoint can name."""
    base_config, base_model = getattr(transformers, config_name), getattr(transformers, model_name)
    about = {"__module__": __name__, "model_type": PREFIX + model_type}
    config: Any = type(f"LayerParallel{config_name}", (_Config, base_config), about)
    model: Any = type(
        f"LayerParallel{model_name}", (_Model, base_model), {"__module__": __name__, "config_class": config}
    )
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForCausalLM")
    return config, model


CLASSES = {model_type: _define(model_type, *names) for model_type, names in FAMILIES.items()}
globals().update({made.__name__: made for pair in CLASSES.values() for made in pair})
