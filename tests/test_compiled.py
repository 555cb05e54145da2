"""Compiled blocks against eager ones, and what is compiled when."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench_cases import Configure, configure
from family_cases import CASES
from test_replay import LENGTHS, gradients, inputs, paired
from tiny_trainer import Make, adapter, assert_same_weights, logged, trainer_maker
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lp_train.data import RowCollator
from lp_train.distill import compiled, flash4, packed_attention, trainer
from lp_train.distill.compiled import Engine, attention, choose_engine, compiled_block
from lp_train.distill.replay import RunBlock, run_block, run_original, run_suffix
from lp_train.errors import UserError

__all__ = ["configure"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def make(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Make:
    return trainer_maker(tiny_llama, tiny_tokenizer, tmp_path)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def step(model: nn.Module, batch: dict[str, Tensor], block: RunBlock) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    recording = run_original(model, batch, block=block)
    student, _ = run_suffix(model, recording, block)
    return recording.final, student, gradients(model, student)


@pytest.mark.no_cover  # counting lines doubles the time that Dynamo takes
@pytest.mark.parametrize(  # no mixture: its experts get another shape each step
    ("name", "checkpointing"),
    [("llama", False), ("llama", True), ("gemma2", False), ("gemma2", True), ("gemma3", False), ("phi3", False)],
)
def test_compiled_blocks_are_a_graph_for_each_kind_and_compute_the_same(name: str, checkpointing: bool) -> None:
    """Without the kernels of inductor, so that every value is bitwise that of eager PyTorch; no graph is made later."""
    model, batch, block = paired(name), inputs(), compiled_block("aot_eager")
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0  # Phi-3's
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher, student, expected = step(model, batch, run_block)
    before, seen = graphs(), []
    for _ in range(3):
        found = step(model, inputs(), block)
        seen.append(graphs() - before)
        assert torch.equal(found[0], teacher) and torch.equal(found[1], student)
        assert all(torch.equal(found[2][parameter], gradient) for parameter, gradient in expected.items())
    kinds = len({type(layer) for layer in model.get_decoder().layers})  # plain, first and second of a pair
    assert not counters["graph_break"] and seen == [seen[0]] * 3 and 0 < seen[0] <= 2 * (kinds + 2)


@pytest.mark.no_cover  # counting lines doubles the time that Dynamo takes
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_compiles_nothing_after_its_first_step(
    make: Make, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    monkeypatch.setattr(trainer, "compiled_block", lambda: compiled_block("aot_eager"))
    seen: list[int] = []

    class Count(trainer.TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            seen.append(graphs())

    options = {"batch": (2, accumulation), "rows": 16, "max_steps": 5}
    ours = make(compile=True, callbacks=(Count(),), **options)
    ours.train()
    assert seen[0] > 0 and seen == [seen[0]] * 5
    plain = make(name="plain", **options)
    plain.train()
    assert logged(ours) == pytest.approx(logged(plain), rel=1e-6)
    assert_same_weights(adapter(ours.model), adapter(plain.model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama"])
def test_kernels_of_inductor_agree_with_eager(name: str) -> None:
    model, batch = paired(name), inputs()
    teacher, student, expected = step(model, batch, run_block)
    found = step(model, batch, compiled_block())
    torch.testing.assert_close(found[0], teacher, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], student, rtol=1e-5, atol=1e-5)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[2][parameter], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def engine(configure: Configure, name: str, device: torch.device, *overrides: str, **options: Any) -> Engine:
    model = CASES[name].model()
    model.config.head_dim = 64
    dtype = options.pop("dtype", torch.bfloat16)
    return choose_engine(configure(*overrides), model, dtype, device, **{"triton": True, **options})


def test_auto_compiles_on_a_gpu_only(configure: Configure) -> None:
    def parts(name: str, device: torch.device, *overrides: str) -> tuple[bool, bool, bool]:
        found = engine(configure, name, device, *overrides)
        return found.compile_blocks, found.compile_loss, found.cuda_graph

    assert parts("llama", CPU) == (False, False, False)
    assert parts("llama", GPU) == (True, True, True)
    assert parts("qwen3_moe", GPU) == parts("gpt_oss", GPU) == (False, True, False)  # experts: another shape each step
    assert parts("llama", CPU, "train.torch_compile=true") == (True, True, False)
    assert parts("llama", GPU, "train.torch_compile=false") == (False, False, False)
    assert parts("llama", GPU, "train.torch_compile=false", "train.cuda_graph=true") == (False, False, True)
    assert parts("llama", GPU, "train.cuda_graph=false") == (True, True, False)
    assert parts("llama", GPU, "train.gradient_checkpointing=true") == (True, True, False)


def test_several_processes_have_no_graph(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks of DDP are on another stream: the capture breaks and its memory stays taken (four H100)."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    found = engine(configure, "llama", GPU)
    assert (found.compile_blocks, found.cuda_graph) == (True, False)
    with pytest.raises(UserError, match="train.cuda_graph true: DDP talks to other processes.*set it false"):
        engine(configure, "llama", GPU, "train.cuda_graph=true")


def test_a_gpu_without_triton_is_told_what_it_costs(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "has_triton", lambda: False)
    with pytest.warns(UserWarning, match="Triton is missing.*set train.torch_compile false"):
        assert engine(configure, "llama", GPU, triton=None) == Engine()


def test_attention_is_switched_and_comes_back(tiny_llama: LlamaForCausalLM) -> None:
    batch = {"input_ids": torch.arange(1, 9)[None]}
    own = tiny_llama.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), attention(tiny_llama, "eager"):
        assert tiny_llama(**batch, output_attentions=True).attentions[0] is not None  # only eager has scores
        raise RuntimeError("stop")
    assert tiny_llama.config._attn_implementation == own != "eager"
    with attention(tiny_llama, None):
        assert tiny_llama.config._attn_implementation == own


@pytest.mark.parametrize(
    ("name", "dtype", "gpu", "cpu"),
    [
        ("llama", torch.bfloat16, "packed", "packed"),
        ("gemma3", torch.float16, "packed", None),
        ("llama", torch.float32, "flex_attention", None),
        ("gemma2", torch.bfloat16, "flex_attention", None),  # soft cap
        ("gpt_oss", torch.bfloat16, "flex_attention", None),  # sinks
    ],
)
def test_attention_of_training(name: str, dtype: torch.dtype, gpu: str, cpu: str | None, configure: Configure) -> None:
    def attention(device: torch.device, *overrides: str) -> str | None:
        return engine(configure, name, device, *overrides, dtype=dtype).attention

    for device, expected, compile in ((GPU, gpu, "true"), (CPU, cpu, "false")):
        assert attention(device, f"train.torch_compile={compile}") == expected
        assert attention(device, f"train.torch_compile={'false' if device is GPU else 'true'}") is None
        assert attention(device, f"train.torch_compile={compile}", "model.attn_implementation=sdpa") is None


def as_on_gpu(monkeypatch: pytest.MonkeyPatch, kernel: str = "PyTorch's") -> None:
    """The kernel is replaced by its formula, as it runs on GPUs only."""
    if kernel == "FlashAttention 4":
        monkeypatch.setattr(flash4, "kernels", lambda: Flash4ByFormula)
        monkeypatch.setattr(flash4, "faster_here", lambda query: True)
    else:
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_by_formula)
        monkeypatch.setattr(packed_attention, "has_kernel", lambda query: True)


class Flash4ByFormula:
    """What ``flash_attn.cute.interface`` has: forward and backward as functions without autograd."""

    @staticmethod
    def _flash_attn_fwd(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> tuple[Tensor, Tensor, None]:
        weights = weights_by_formula(q, k, how["cu_seqlens_q"], how["softmax_scale"])
        out = torch.einsum("hij,jhd->ihd", weights, shared(v, q)).contiguous()
        return out, torch.zeros(q.shape[1], q.shape[0]), None

    @staticmethod
    def _flash_attn_bwd(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, sums: Tensor, **how: Any
    ) -> tuple[Tensor, ...]:
        scale = how["softmax_scale"]
        weights = weights_by_formula(q, k, how["cu_seqlens_q"], scale)
        of_weights = torch.einsum("ihd,jhd->hij", grad, shared(v, q))
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        dq = torch.einsum("hij,jhd->ihd", of_scores, shared(k, q))
        dk = torch.einsum("hij,ihd->jhd", of_scores, q)
        dv = torch.einsum("hij,ihd->jhd", weights, grad)
        dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
        return dq.contiguous(), dk.contiguous(), dv.contiguous()


def shared(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [N, K, d] as each head of q [N, H, d] reads them: [N, H, d]."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def weights_by_formula(q: Tensor, k: Tensor, starts: Tensor, scale: float, window: int | None = None) -> Tensor:
    """[H, N, N]: the softmax over what comes before in the same document, no further back than ``window``."""
    place = torch.arange(len(q))
    document = torch.searchsorted(starts[1:].contiguous(), place, right=True)
    distance = place[:, None] - place
    seen = (document[:, None] == document) & (distance >= 0)
    seen &= distance <= (len(q) if window is None else window)
    scores = torch.einsum("ihd,jhd->hij", q, shared(k, q)) * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def flash_by_formula(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, *args: Any, scale: float, **window: int
) -> tuple[Tensor]:
    """What PyTorch's kernel computes: [tokens, heads, d] with document starts and a window."""
    weights = weights_by_formula(q, k, starts, scale, window.get("window_size_left"))
    return (torch.einsum("hij,jhd->ihd", weights, shared(v, q)),)


@pytest.mark.parametrize("long", [1, 8, 1024])
@pytest.mark.parametrize("kernel", [None, "PyTorch's", "FlashAttention 4"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3"])
def test_packed_attention_keeps_documents_apart_as_a_mask_does(
    name: str, kernel: str | None, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "LONG", long)
    if kernel:
        as_on_gpu(monkeypatch, kernel)
    model, batch = paired(name), inputs()
    starts = torch.tensor([0, *np.cumsum(2 * list(LENGTHS))], dtype=torch.int32)
    teacher, student, expected = step(model, batch, run_block)
    with attention(model, "packed"):
        found = step(model, batch | {"cu_seq_lens": starts}, run_block)
        with pytest.raises(ValueError, match="cu_seq_lens"):
            step(model, batch, run_block)
    torch.testing.assert_close(found[0], teacher, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], student, rtol=1e-4, atol=1e-5)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[2][parameter], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_flash_attention_4_is_an_operator_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shapes for the compiler, its gradients and that it writes into nothing, by PyTorch's own checks."""
    as_on_gpu(monkeypatch, "FlashAttention 4")
    q, k, v = (torch.randn(12, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    torch.library.opcheck(flash4.attend, (q, k, v, starts, 12, 0.3))


def test_flash_attention_4_is_taken_where_its_package_and_its_gpu_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4.importlib.util, "find_spec", lambda name: None)
    flash4.kernels.cache_clear()
    assert flash4.kernels() is None
    flash4.kernels.cache_clear()
    half = torch.zeros(2, 1, 128, dtype=torch.bfloat16)
    assert not flash4.faster_here(half)  # on a CPU
    monkeypatch.setattr(flash4, "kernels", lambda: Flash4ByFormula)
    capability = {"Ampere": (8, 0), "Hopper": (9, 0), "Blackwell": (10, 0)}
    for gpu, version in capability.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda version=version: version)
        assert flash4._usable() == (gpu == "Hopper")
    monkeypatch.setattr(flash4, "_usable", lambda: True)
    on_gpu = dict(is_cuda=True, dtype=torch.bfloat16, shape=(2, 1, 128))
    assert flash4.faster_here(SimpleNamespace(**on_gpu))
    slower = {"shape": (2, 1, 64)}  # than PyTorch's kernel
    for other in ({"is_cuda": False}, {"dtype": torch.float32}, slower):
        assert not flash4.faster_here(SimpleNamespace(**on_gpu | other)), other


@pytest.mark.no_cover  # counting lines doubles the time that Dynamo takes
@pytest.mark.parametrize("kernel", ["PyTorch's", "FlashAttention 4"])
def test_another_number_of_documents_compiles_nothing_new(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_gpu(monkeypatch, kernel)
    model, block = paired("llama"), compiled_block("aot_eager")
    seen = []
    with attention(model, "packed"):
        for lengths in ([5, 12, 3], [20], [2] * 10, [7, 13]):
            rows = [{"input_ids": list(range(1, 21)), "labels": list(range(1, 21)), "seq_lengths": lengths}] * 2
            step(model, RowCollator(20, 0)(rows), block)
            seen.append(graphs())
    assert seen == [seen[0]] * 4
