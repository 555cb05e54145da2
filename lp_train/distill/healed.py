"""The start of training, or all there is of it without a GPU: adapters fitted in closed form on a model's own text."""

import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lp_train.distill.replay import run_prefix
from lp_train.pairing.heal import Autocast, Stream, check_healable, heal

HEAL = "heal"  # of lora.start_from: no folder


def fit(model: nn.Module, batches: Iterable[dict[str, Tensor]], autocast: Autocast) -> dict[str, Any]:
    """Heals a paired PeftModel on ``batches`` (``input_ids``, ``position_ids`` [B, T]); see ``lp_train.pairing.heal``.

    The first token of a document does not count: it attends to itself alone, and some models put values there that
    outweigh all others. Returns ``tokens`` that were fitted, ``seconds``, and ``pair_errors``: of each pair's output
    to its two layers in order, relative. Raises UserError as :func:`lp_train.pairing.heal.heal`.
    """
    check_healable(model)
    started = time.perf_counter()
    streams = []
    for batch in batches:
        with autocast():
            hidden, blocks = run_prefix(model.eval(), batch)
        streams.append(Stream(hidden, blocks, counts=(batch["position_ids"] > 0).flatten()))
    errors = heal(model, streams, autocast)
    tokens = sum(int(stream.counts.sum()) for stream in streams)
    return {"tokens": tokens, "seconds": time.perf_counter() - started, "pair_errors": errors}
