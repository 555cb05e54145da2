"""The relative error of the residual stream after each pair, against layers called by hand."""

import pytest
import torch
from test_fidelity import LENGTH, packed_rows, with_adapter
from transformers import LlamaForCausalLM

from lp_train.data import RowCollator
from lp_train.evaluation.fidelity import as_it_is, measure
from lp_train.pairing import adapters_off, sequential

VARIANTS = {"sequential": sequential, "paired": adapters_off, "recovered": as_it_is}


@torch.no_grad()
def test_the_error_after_a_pair(tiny_llama: LlamaForCausalLM) -> None:
    """Layers 2 and 3 are paired: the stream after them is what layer 3 returns."""
    model = with_adapter(tiny_llama).train()
    rows, collate = packed_rows(model.config.vocab_size), RowCollator(LENGTH, pad_token_id=3)
    batches = [collate([rows[i] for i in part]) for part in ((0, 1, 2), (3, 4))]
    found = measure(model, rows.select(range(5)), collate, 3, VARIANTS)
    assert model.training
    model.eval()
    streams: list[torch.Tensor] = []
    layer = model.get_base_model().model.layers[3]
    hook = layer.register_forward_hook(lambda _, __, output: streams.append(output))
    for name, variant in VARIANTS.items():
        errors = []
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
            streams.clear()
            with sequential(model):
                model(**inputs, use_cache=False)
            with variant(model):
                model(**inputs, use_cache=False)
            original, ours = streams
            followed = batch["labels"][:, 1:] != -100
            difference = (ours - original)[:, :-1][followed].double().norm(dim=-1)
            errors.append(difference / original[:, :-1][followed].double().norm(dim=-1))
        expected = float(torch.cat(errors).mean())
        assert found[name].drift == pytest.approx([expected], rel=1e-5)
        assert (expected == 0) == (name == "sequential")
    hook.remove()
