"""A tiny model, a little text and a configuration on disk: what a run of ``lp_train/finetune.py`` needs."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import TOKENIZER_TEXT
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYERS = 6


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **shape: Any) -> Path:
    """A random float32 Llama with its tokenizer. Its weights are large, so that pairing its layers costs something."""
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, **shape}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **special, **options)).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentences(random_state: random.Random, number: int) -> str:
    return " ".join(random_state.choice(TOKENIZER_TEXT) for _ in range(number))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_text(path: Path, documents: int = 80, seed: int = 0) -> Path:
    """JSON lines of plain text, each document its own."""
    state = random.Random(seed)
    return write_lines(path, [{"text": f"{i}. {sentences(state, state.randint(1, 4))}"} for i in range(documents)])


def write_chats(path: Path, conversations: int = 60, seed: int = 0) -> Path:
    state = random.Random(seed)
    turns = [
        [("user", f"{i}. {sentences(state, 1)}"), ("assistant", sentences(state, 1))] for i in range(conversations)
    ]
    return write_lines(path, [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in turns])


def write_config(path: Path, model: Path, text: Path) -> Path:
    """Four steps of four packed rows of 64 tokens, float32, beside the file: ``run/``."""
    config = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "plan": {"pairs": "2:6"},
        "lora": {"r": 4},
        "data": {"train": str(text), "eval_fraction": 0.2},
        "train": {
            "max_length": 64,
            "global_batch_tokens": 256,
            "max_steps": 4,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "eval_steps": 2,
            "save_steps": 2,
            "output_dir": str(path.parent / "run"),
        },
        "evaluate": {"tokens": 512, "batch_size": 4, "generation_prompts": 4, "generation_tokens": 8},
        "track": {"wandb": "off"},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def copy_run(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The model in float32 and its byte-level BPE as llama.cpp writes them."""
    from gguf import GGUFWriter

    config, writer = model.config, GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, number in heads.items():
            if projection in name:  # llama.cpp's rotary embedding turns neighbours, that of Transformers halves
                tensor = tensor.view(number, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(gguf_name(name), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name
