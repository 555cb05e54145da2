"""One prompt answered greedily, to see what the figures mean."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lp_train.config import EvaluateConfig


@torch.no_grad()
def answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig) -> str:
    """The model's greedy continuation of ``evaluate.prompt``, as a chat turn where the tokenizer has a chat template."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": config.prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(config.prompt, return_tensors="pt")
    inputs = inputs.to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    tokens = model.generate(
        **inputs, max_new_tokens=config.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    model.train(was_training)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
