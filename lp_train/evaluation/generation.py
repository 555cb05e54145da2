"""Greedy answers, because likelihood hides what happens in generation."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lp_train.cluster.shard import in_parts, inside
from lp_train.evaluation.fidelity import evaluating


def answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """The model's greedy continuation of a prompt, a chat turn where the tokenizer has a chat template."""
    text: Any = prompt
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return str(tokenizer.decode(generate(model, tokenizer, inputs, new_tokens)[0], skip_special_tokens=True))


def generate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, new_tokens: int) -> list[list[int]]:
    """Greedy answers to prompts [B, T], each up to its end token, with a cache and without a model's own penalties."""
    inputs = prompts.to(next(model.parameters()).device)
    end = tokenizer.eos_token_id
    with evaluating(model):
        greedy = functools.partial(
            model.generate,
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=end,
            pad_token_id=int(tokenizer.pad_token_id or 0),
            synced_gpus=True if in_parts(model) and dist.is_initialized() else None,
        )
        made = inside(model, greedy)[:, inputs.shape[1] :].tolist()
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in made]
