"""Tiny random models of every supported family, each with its ``reference.Arch``.

Pairs (0, 1) and (3, 4) of six layers: where a family alternates, one pair is (sliding, full) and one (full, sliding),
and layers 2 and 5 stay alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import reference as ref
import torch
import torch.nn.functional as F
import transformers as hf

PAIRS = ((0, 1), (3, 4))
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 6, 32, 4, 2, 8, 64
WINDOW = 4
FULL, SLIDING, ALTERNATING = (None,) * LAYERS, (WINDOW,) * LAYERS, (WINDOW, None) * (LAYERS // 2)
TYPES = ["sliding_attention", "full_attention"] * (LAYERS // 2)
THETA = 100.0  # low, so that every rotary frequency matters within a few tokens

PRE = ("input_layernorm", None, "post_attention_layernorm", None)
POST = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
BOTH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Case:
    config: Callable[..., hf.PreTrainedConfig]
    options: dict[str, Any]
    arch: ref.Arch
    attention: str = "sdpa"

    def model(self, seed: int = 0) -> hf.PreTrainedModel:
        """The model in float32 and eval mode, every parameter random: no gain is one, no bias is zero."""
        config = self.config(**{**COMMON, **self.options})
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=self.attention)
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            vector = p.ndim == 1 or name.endswith("_bias")
            wide = 8.0 if config.model_type == "gpt_oss" and name.endswith("gate_up_proj") else 1.0  # meets the clamp
            values = torch.randn(p.shape, generator=generator)
            p.data = 0.5 + 0.5 * values if vector else 0.2 * wide * values
        model.tie_weights()
        return model.eval()


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def arch(
    windows: tuple[int | None, ...] = FULL,
    project: Callable[..., Any] = ref.separate,
    feed_forward: Callable[..., Any] = ref.gated,
    norms: tuple[str | None, ...] = PRE,
    **other: Any,
) -> ref.Arch:
    defaults = {"thetas": (THETA,) * LAYERS, "scale": HEAD_DIM**-0.5}
    numbers = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, **defaults, **other}
    return ref.Arch(windows=windows, project=project, feed_forward=feed_forward, norms=norms, **numbers)  # type: ignore[arg-type]


gelu_tanh = partial(F.gelu, approximate="tanh")
gemma = {"gain_offset": 1.0, "activation": gelu_tanh, "embedding_scale": WIDTH**0.5, "scale": 20.0**-0.5}
moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
two_tables = {
    "sliding_attention": {"rope_type": "default", "rope_theta": THETA},
    "full_attention": {"rope_type": "default", "rope_theta": 10 * THETA},
}

CASES: dict[str, Case] = {
    "llama": Case(hf.LlamaConfig, {}, arch()),
    "llama-biases": Case(hf.LlamaConfig, {"attention_bias": True, "mlp_bias": True}, arch()),
    "mistral": Case(hf.MistralConfig, {"sliding_window": WINDOW}, arch(SLIDING)),
    "qwen2": Case(
        hf.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 4},
        arch((None,) * 4 + (WINDOW,) * 2),
    ),
    "qwen2-layer-types": Case(
        hf.Qwen2Config, {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": TYPES}, arch(ALTERNATING)
    ),
    "qwen2-window-unused": Case(
        hf.Qwen2Config, {"use_sliding_window": False, "sliding_window": WINDOW, "max_window_layers": 4}, arch(FULL)
    ),
    "qwen3": Case(hf.Qwen3Config, {}, arch(project=ref.normed_per_head)),
    "qwen3-layer-types": Case(
        hf.Qwen3Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": TYPES},
        arch(ALTERNATING, ref.normed_per_head),
    ),
    "smollm3": Case(
        hf.SmolLM3Config,
        {"no_rope_layers": [1, 0, 1, 0, 1, 1]},
        arch(thetas=(THETA, None, THETA, None, THETA, THETA)),
    ),
    "smollm3-layer-types": Case(
        hf.SmolLM3Config,
        {
            "no_rope_layers": [1, 0, 1, 0, 1, 1],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": TYPES,
        },
        arch(ALTERNATING, thetas=(THETA, None, THETA, None, THETA, THETA)),
    ),
    "phi3": Case(
        hf.Phi3Config,
        {"sliding_window": WINDOW, "resid_pdrop": 0.1},
        arch(SLIDING, ref.packed, ref.gated_packed),
    ),
    # Eager: sdpa has no soft cap (Transformers 5.23 refuses it, 5.17 left the cap out in silence).
    "gemma2": Case(
        hf.Gemma2Config,
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        arch(ALTERNATING, norms=BOTH, attention_cap=2.0, logit_cap=3.0, **gemma),
        attention="eager",
    ),
    "gemma3": Case(
        hf.Gemma3TextConfig,
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 20,
            "layer_types": TYPES,
            "rope_parameters": two_tables,
        },
        arch(ALTERNATING, ref.normed_per_head, norms=BOTH, thetas=(THETA, 10 * THETA) * 3, **gemma),
    ),
    "olmo2": Case(hf.Olmo2Config, {}, arch(project=ref.normed_whole, norms=POST)),
    "qwen3_moe": Case(
        hf.Qwen3MoeConfig,
        {**moe, "norm_topk_prob": True},
        arch(project=ref.normed_per_head, feed_forward=ref.experts_after_softmax, top_k=2, normalise_top_k=True),
    ),
    "qwen3_moe-raw-top-k": Case(
        hf.Qwen3MoeConfig,
        {**moe, "norm_topk_prob": False, "use_sliding_window": True, "sliding_window": WINDOW},
        arch(SLIDING, ref.normed_per_head, ref.experts_after_softmax, top_k=2),
    ),
    "gpt_oss": Case(
        hf.GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW, "layer_types": TYPES},
        arch(ALTERNATING, feed_forward=ref.experts_before_softmax, top_k=2),
        attention="eager",
    ),
}
