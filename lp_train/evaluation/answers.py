"""One prompt answered greedily, to see what the figures mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lp_train.config import EvaluateConfig


@torch.no_grad()
def answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig) -> str:
    """The model's greedy continuation of ``evaluate.prompt``, a chat turn where the tokenizer has a chat template."""
    prompt: Any = config.prompt
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    inputs = inputs.to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    tokens = model.generate(
        **inputs, max_new_tokens=config.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    model.train(was_training)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
