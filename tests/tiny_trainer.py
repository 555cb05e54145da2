"""PairedTrainer on a tiny model with packed synthetic rows, shared by its tests."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig

from lp_train.cluster.shard import shard
from lp_train.config import LossConfig
from lp_train.data import RowCollator
from lp_train.distill.callbacks import MetricsFile
from lp_train.distill.compiled import Engine
from lp_train.distill.trainer import PairedTrainer
from lp_train.pairing import pair_layers

LENGTH, PAIRS = 20, "2:6"
COLLATE = RowCollator(LENGTH, pad_token_id=3)
ALL = LossConfig(kd=1.0, ce=0.5, hidden=2.0)

Make = Callable[..., PairedTrainer]


def packed_rows(number: int, vocab: int, ce_labels: bool = False) -> Dataset:
    """Rows of two documents with 0 to 17 trained tokens each; the third row has none."""
    draw = np.random.default_rng(0)
    columns = ("input_ids", "labels", "seq_lengths", *(["ce_labels"] if ce_labels else []))
    table: dict[str, list[list[int]]] = {name: [] for name in columns}
    for row in range(number):
        lengths = [4 + row % 5, 11]
        ids = draw.integers(4, vocab, sum(lengths))
        labels = np.where(draw.random(len(ids)) < (row % 4 + 1) / 4, ids, -100)
        labels[[0, lengths[0]]] = -100
        if row == 2:
            labels[:] = -100
        fewer = np.where(np.arange(len(ids)) % 2, labels, -100)
        for name, values in zip(columns, (ids, labels, lengths, fewer), strict=False):
            table[name].append([int(value) for value in values])
    return Dataset.from_dict(table)


def paired_with_adapter(tiny_llama: LlamaForCausalLM, dropout: float, algebra: str = "lp") -> nn.Module:
    """Weights large enough that pairing costs something, and a B that is not zero so that A has a gradient too."""
    generator = torch.Generator().manual_seed(1)
    model = pair_layers(tiny_llama, PAIRS, algebra).requires_grad_(False)
    targets = [f"model.layers.{i}.{name}" for i in range(2, 6) for name in ("self_attn.q_proj", "mlp.down_proj")]
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if parameter.ndim > 1 and "lora_A" not in name:
            scale = 0.05 if "lora_B" in name else 0.2
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return peft


def trainer_maker(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Make:
    """Makes trainers of fresh copies of one model. ``rows``: a number or a dataset; ``batch``: rows x accumulation."""
    start = {name: value.clone() for name, value in tiny_llama.state_dict().items()}

    def build(
        loss: LossConfig = ALL,
        rows: int | Dataset = 8,
        batch: tuple[int, int] = (4, 2),
        name: str = "run",
        dropout: float = 0.0,
        evaluate: Callable[[nn.Module], Mapping[str, float | None]] = lambda model: {},
        callbacks: tuple[TrainerCallback, ...] = (),
        compile: bool = False,
        checkpoint_every: int = 1,
        cuda_graph: bool = False,
        algebra: str = "lp",
        frozen: torch.dtype = torch.float32,
        **options: Any,
    ) -> PairedTrainer:
        base = LlamaForCausalLM(tiny_llama.config).float()
        base.load_state_dict(start)
        adapted = paired_with_adapter(base, dropout, algebra)
        for parameter in (p for p in adapted.parameters() if not p.requires_grad):
            parameter.data = parameter.data.to(frozen)
        model, folder = shard(adapted), tmp_path / name
        dataset = packed_rows(rows, base.config.vocab_size) if isinstance(rows, int) else rows
        defaults = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False}
        defaults |= {"use_cpu": True}
        args = SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=batch[0],
            gradient_accumulation_steps=batch[1],
            bf16=False,
            max_length=LENGTH,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            **{**defaults, **options},
        )
        return PairedTrainer(
            model=model,
            args=args,
            loss=loss,
            train_dataset=dataset,
            eval_dataset=dataset,
            collate=COLLATE,
            tokenizer=tiny_tokenizer,
            measure=lambda: evaluate(model),
            callbacks=[MetricsFile(folder / "metrics.jsonl"), *callbacks],
            tokens_per_step=batch[0] * batch[1] * LENGTH,
            flops=lambda tokens, trained: 1e3 * tokens + 500 * trained,
            peak_flops=1e6,
            engine=Engine(compile_blocks=compile, cuda_graph=cuda_graph),
            checkpoint_every=checkpoint_every,
        )

    return build


def adapter(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logged(trainer: PairedTrainer, name: str = "loss") -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Largest difference of each tensor relative to its largest value; 0: bitwise."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        error = (ours[name] - value).abs().max() / value.abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
