"""Forward and backward of a micro-batch as one CUDA graph: a small model is bound by the launching of its kernels."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lp_train.distill.losses import ROWS_PER_CHUNK, LossSums

Inputs = dict[str, Tensor]
WARM_UP = 3  # runs before a capture: everything is compiled and allocated then
MAX_GRAPHS = 16  # of one training; batches of yet another size run without


@dataclass
class Captured:
    """A graph and the tensors that it always reads from and writes to."""

    replay: Callable[[], None]
    inputs: Inputs
    sums: LossSums
    gradients: Sequence[Tensor | None]


class GraphedLoss:
    """``loss`` with the gradients of ``parameters``, captured once for each size of batch and replayed from then on.

    ``loss`` must not wait for the GPU; of ``trained`` it counts those in ``trained_mask`` [N]. Each result belongs to
    one backward pass, which has to come before the next call.
    """

    def __init__(self, loss: Callable[[Inputs], LossSums], parameters: Sequence[nn.Parameter]) -> None:
        self.loss, self.parameters = loss, list(parameters)
        self.graphs: dict[Any, Captured] = {}
        self.pool: Any = None
        self.gave_up = False

    def __call__(self, inputs: Inputs) -> LossSums:
        filled = fill(inputs)
        size = tuple((name, value.shape) for name, value in filled.items())
        if not self.gave_up and size not in self.graphs and len(self.graphs) < MAX_GRAPHS:
            self._try(size, filled)
        if (graph := self.graphs.get(size)) is None:
            return self.loss(inputs)
        return LossSums(*_Replay.apply(graph, filled, *self.parameters))

    def _try(self, size: Any, inputs: Inputs) -> None:
        try:
            self.graphs[size] = self.capture(inputs)
        except RuntimeError as error:  # too little memory, or an operation that waits for the GPU
            self.gave_up = True
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"CUDA graph: {reason}; training goes on without, which is slower for small models; "
                "train.cuda_graph false leaves the attempt out",
                stacklevel=2,
            )

    def capture(self, inputs: Inputs) -> Captured:
        static = {name: value.clone() for name, value in inputs.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.loss_and_gradients(static)
        torch.cuda.current_stream().wait_stream(side)
        self.pool = self.pool or torch.cuda.graph_pool_handle()  # one graph runs at a time: they share their memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # data loaders have threads
            sums, gradients = self.loss_and_gradients(static)
        return Captured(graph.replay, static, sums, gradients)

    def loss_and_gradients(self, inputs: Inputs) -> tuple[LossSums, Sequence[Tensor | None]]:
        device = inputs["input_ids"].device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # a cached cast of a weight would be that of the moment of capture
        with torch.autocast(device, dtype, enabled, cache_enabled=False), torch.enable_grad():
            sums = self.loss(inputs)
            gradients = torch.autograd.grad(sums.total, self.parameters, allow_unused=True)
        return LossSums(*(value.detach() for value in sums)), gradients


def fill(inputs: Inputs) -> Inputs:
    """``trained`` [N] filled up to whole chunks of the loss, with ``trained_mask`` [N]; ``cu_seq_lens`` [documents + 1]
    up to a power of two, with documents of no token: few sizes, and a graph for each."""
    trained, starts = inputs["trained"], inputs["cu_seq_lens"]
    missing = -len(trained) % ROWS_PER_CHUNK
    no_documents = (1 << (len(starts) - 1).bit_length()) - len(starts)
    return inputs | {
        "trained": F.pad(trained, (0, missing)),
        "trained_mask": F.pad(torch.ones_like(trained, dtype=torch.bool), (0, missing)),
        "cu_seq_lens": F.pad(starts, (0, no_documents), value=inputs["input_ids"].numel()),
    }


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Captured, inputs: Inputs, *parameters: Tensor) -> tuple[Tensor, ...]:
        for name, value in inputs.items():
            graph.inputs[name].copy_(value, non_blocking=True)
        graph.replay()
        ctx.gradients = graph.gradients
        sums = tuple(value.clone() for value in graph.sums)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        present = [gradient for gradient in ctx.gradients if gradient is not None]
        scaled = iter(torch._foreach_mul(present, grad_total))  # new tensors: the next replay overwrites the graph's
        return None, None, *(None if gradient is None else next(scaled) for gradient in ctx.gradients)
