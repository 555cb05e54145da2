"""What makes a training step fast on a GPU: compiled blocks of layers, and attention that skips what is masked."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._triton import has_triton

from lp_train.adapters import is_mixture
from lp_train.cluster import engine
from lp_train.config import Config
from lp_train.distill import packed_attention
from lp_train.distill.replay import RunBlock, run_block
from lp_train.errors import UserError

GRAPHS = 64  # of run_block: two modes, with and without gradient, times the kinds of layers; PyTorch gives up after 8


@dataclass(frozen=True)
class Engine:
    """How a training step runs. ``cuda_graph``: a micro-batch is one graph. ``attention``: Transformers' name of the
    one used in training, None for the model's own."""

    compile_blocks: bool = False
    compile_loss: bool = False
    cuda_graph: bool = False
    attention: str | None = None


def choose_engine(
    config: Config, model: nn.Module, dtype: torch.dtype, device: torch.device, triton: bool | None = None
) -> Engine:
    """What ``train.torch_compile``, ``train.cuda_graph`` and ``model.attn_implementation`` mean on this device.

    auto compiles on a GPU, but no blocks with a mixture of experts, whose shapes are others in every step. Compiled
    training of one process without checkpointing runs as CUDA graphs. ``triton``: whether the compiler is there; None
    looks.
    """
    setting, graph, on_gpu = config.train["torch_compile"], config.train["cuda_graph"], device.type == "cuda"
    alone, sharded = engine.asked() == "NO", engine.asked() in engine.SHARDED
    if not alone and graph is True:  # DDP's hooks are on another stream, which breaks the capture
        raise UserError(f"train.cuda_graph true: {engine.asked()} talks to other processes within a step; set it false")
    compile = on_gpu and (_has_triton() if triton is None else triton) if setting == "auto" else setting
    leave = is_mixture(model) or engine.asked() == "ZeRO-3"  # whose hooks are on every module
    blocks = compile and not (setting == "auto" and leave)
    if graph == "auto":
        graph = blocks and not config.train["gradient_checkpointing"] and alone
    attention = None
    if config.model.attn_implementation == "auto" and (blocks == on_gpu or sharded):  # so they were tried
        packed = packed_attention.supports(model.config.get_text_config(), dtype, device)
        attention = packed_attention.NAME if packed else "flex_attention" if on_gpu and blocks else None
    return Engine(blocks, compile, graph and on_gpu, attention)


def _has_triton() -> bool:
    if not (found := has_triton()):
        warnings.warn(
            "Triton is missing, so nothing is compiled and training runs at about half of its speed; "
            "`pip install triton`, or set train.torch_compile false",
            stacklevel=3,
        )
    return found


def compiled_block(backend: str = "inductor") -> RunBlock:
    """:func:`run_block` compiled for the shapes it is called with: one graph per kind of block, not per layer."""
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.optimize_ddp = False  # it splits graphs where DDP's buckets end, but ours are no larger
    return torch.compile(run_block, dynamic=False, backend=backend)


@contextlib.contextmanager
def attention(model: nn.Module, implementation: str | None) -> Iterator[None]:
    """Inside: the model attends by another of Transformers' implementations. None leaves it alone."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = implementation or before
    try:
        yield
    finally:
        config._attn_implementation = before
