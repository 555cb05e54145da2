"""One decoding step at a time, uncompiled, compiled or as a CUDA graph, and the clock around it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from lp_train.pairing.families import decoder_of

COMPILE: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
WARMUP = 3
CAPTURED = 2  # eager steps before a graph is captured
WORLD, RANK = (int(os.environ.get(name, alone)) for name, alone in (("WORLD_SIZE", "1"), ("RANK", "0")))
PROFILED = 3 if WORLD > 1 else 1


class Stepper:
    """Greedy decoding, a token at a time, behind ``context`` cached tokens."""

    def __init__(self, model: nn.Module, mode: str, batch: int, context: int, room: int, where: torch.device) -> None:
        self.model, self.forward, self.context = model, model.forward, context
        self.token = torch.ones(batch, 1, dtype=torch.long, device=where)
        self.position = torch.full((1, 1), context, dtype=torch.long, device=where)
        self.length = context if mode == "eager" else context + room
        self.cache: Any = DynamicCache() if mode == "eager" else StaticCache(model.config, max_cache_len=self.length)
        self._fill(batch, model.dtype, where)
        self.step: Callable[[], Any] = self.eager_step
        if mode in ("compile", "frozen", "tuned"):
            torch._dynamo.reset()  # each size is a graph of its own
            torch._inductor.config.freezing = mode == "frozen"
            torch._inductor.config.cpp.enable_concat_linear = mode == "frozen"  # as on a GPU
            torch._inductor.config.coordinate_descent_tuning = mode == "tuned"
            self.forward = torch.compile(model.forward, **COMPILE)
        if mode == "graph":
            self._capture()

    def _fill(self, batch: int, dtype: torch.dtype, where: torch.device) -> None:
        for i, layer in enumerate(decoder_of(self.model).layers):
            heads = self.model.config.per_layer_config[i].num_key_value_heads // WORLD
            zeros = torch.zeros(batch, heads, self.context, layer.self_attn.head_dim, dtype=dtype, device=where)
            self.cache.update(zeros, zeros, i)

    def eager_step(self) -> None:
        made = self.forward(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True
        )
        self.token.copy_(made.logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(CAPTURED):
                self.eager_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.eager_step()
        self.step = graph.replay

    def generate(self, tokens: int) -> None:
        """The prompt and ``tokens`` tokens from an empty cache."""
        for layer in self.cache.layers:
            layer.cumulative_length.zero_()
        prompt = torch.ones(len(self.token), self.context, dtype=torch.long, device=self.token.device)
        made = self.model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(made.logits[:, -1].argmax(-1, keepdim=True))
        self.position.fill_(self.context)
        for _ in range(tokens - 1):
            self.step()

    def bytes_read(self) -> float:
        """What a step must read on this device: weights (an embedding only where it is the head too) and cache."""
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        weights = sum(_local_bytes(p) for p in self.model.parameters() if p is not embedding or p is head)
        return weights + sum(2 * _local_bytes(layer.keys) for layer in self.cache.layers)


def _local_bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def kernels(step: Callable[[], Any], most: int = 20) -> dict[str, Any]:
    """Where the time of one step goes on the device: ms in all-reduces and how many there are, ms in all other kernels,
    and of the longest kernels name, number and ms. Of PROFILED steps the one with the least time in all-reduces, since
    a rank that waits for another does so inside them."""
    steps = [_kernels(step, most) for _ in range(PROFILED)]
    return min(steps, key=lambda found: found["all_reduce_ms"])


def _kernels(step: Callable[[], Any], most: int) -> dict[str, Any]:
    with torch.profiler.profile() as profile:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    on_device = [event for event in profile.key_averages() if event.device_type != torch.autograd.DeviceType.CPU]
    on_device = [event for event in on_device if not event.key.startswith("##")]  # of compiled code: a span, no kernel
    reduces = [event for event in on_device if "nccl" in event.key.lower()]
    spent = {name: sum(e.self_device_time_total for e in of) / 1e3 for name, of in (("a", on_device), ("r", reduces))}
    longest = sorted(on_device, key=lambda event: -event.self_device_time_total)[:most]
    return {
        "all_reduces": sum(event.count for event in reduces),
        "all_reduce_ms": spent["r"],
        "other_kernels_ms": spent["a"] - spent["r"],
        "kernels": [[e.key[:80], e.count, e.self_device_time_total / 1e3] for e in longest],
    }


def timed(step: Callable[[], Any], repeats: int, where: torch.device, warmup: int = WARMUP) -> float:
    """Median of single steps, in ms; on a GPU between events, gaps in which it waits for Python included."""
    for _ in range(warmup):
        step()
    if where.type != "cuda":
        return statistics.median(_wall(step) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks[:-1], marks[1:], strict=True))


def _wall(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def copy_speed(where: torch.device) -> float:
    """GB/s read plus GB/s written, of one large copy: what a step is measured against. Reading alone can be faster."""
    size = 2**31 if where.type == "cuda" else 2**27
    source = torch.ones(size // 4, device=where)
    target = torch.empty_like(source)
    return 2 * size / 1e6 / timed(lambda: target.copy_(source), 20, where)
