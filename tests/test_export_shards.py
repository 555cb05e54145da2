"""How a checkpoint is written: in shards, and a layer at a time. Tolerance 1e-5."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from closeness import error
from family_cases import CASES
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_export import random_ids, written
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import export
from lp_train.pairing import pair_layers


def test_shards_hold_no_more_than_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    save = export.save_file

    def saving(tensors: dict[str, Tensor], *arguments: Any, **options: Any) -> None:
        sizes.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        save(tensors, *arguments, **options)

    monkeypatch.setattr(export, "save_file", saving)
    monkeypatch.setattr(export, "SHARD", 20_000)
    model, loaded = written(CASES["qwen3"], tmp_path, "fused")
    assert len(sizes) > 3 and max(sizes) <= 20_000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(4 * p.numel() for p in loaded.parameters())
    for file in set(index["weight_map"].values()):
        assert set(load_file(tmp_path / file)) == {n for n, where in index["weight_map"].items() if where == file}
    assert error(loaded(random_ids()).logits, model(random_ids()).logits) < 1e-5


class Allocated(TorchDispatchMode):
    """Bytes of the memory that operations under it made: the most that was alive at once, and in all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        self.alive: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            if storage.data_ptr() not in self.known:
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {reference: size for reference, size in self.alive.items() if not reference.expired()}
        self.most = max(self.most, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("adapted", [False, True], ids=["as it is", "with adapters"])
def test_beside_the_model_there_is_a_shard_and_the_layers_at_work(adapted: bool, tmp_path: Path) -> None:
    shape = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = hf.LlamaConfig(num_hidden_layers=40, **shape)
    model = pair_layers(hf.LlamaForCausalLM(config).requires_grad_(False), "0:40")
    wide = 2 * sum(4 * p.numel() for p in model.model.layers[0].parameters())
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with Allocated(model) as allocated:
        export._write_layers(model, tmp_path, "fused", wide, print)
    total = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert allocated.most <= 4 * wide  # a shard of one, two at work and one before them that is still held
    assert total > 20 * wide
