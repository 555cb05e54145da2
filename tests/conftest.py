"""Settings and tiny models shared by all tests: no network, one thread, nothing downloaded."""

import atexit
import os
import shutil
import tempfile

# Before the first import of torch or of a Hugging Face library: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lp-train-tests-")
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

TOKENIZER_TEXT = (
    "Two decoder layers run side by side, so that the longest path through the model is shorter.",
    "The function returns a new array; if the argument is not a list, an exception is raised.",
    "A parser reads tokens from the stream and returns the tree that they describe.",
    "What is the capital of France? The capital of France is Paris.",
    "You are a helpful assistant. Write a short story about the sea, please.",
)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# Files of tests that are begun first, in about this order, so that none is left at the end for one process alone.
LONGEST = ["preemption", "engines", "bench_training", "compiled", "fuse_smollm2", "track", "tasks", "selection_run"]
LONGEST += ["two_processes", "slurm", "smollm2"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker("no_cover")  # counting lines costs Python 3.11 a third to a half of the time


DRAW = Figure.savefig


@pytest.fixture(scope="session", autouse=True)
def undrawn() -> Iterator[None]:
    """Plots are made but not drawn: that takes longer than all else of a tiny run. ``drawn`` is for tests of plots."""

    def save_nothing(figure: Figure, path: str | Path, **options: Any) -> None:
        Path(path).write_bytes(b"\x89PNG\r\n\x1a\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_nothing)
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", DRAW)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 400 tokens with ChatML markers; EOS is ``<|im_end|>``, padding has its own token.

    Shared by the whole session: a test that changes it works on a ``copy.deepcopy``.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TOKENIZER_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=8192,
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


@pytest.fixture
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh random Llama in float32, the same weights for every test: 6 layers, width 32, 4 heads, 2 KV heads."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).float().eval()
