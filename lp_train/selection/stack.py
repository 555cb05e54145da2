"""One batch in the layers of an unpaired base, called one by one, or two side by side, from any state of the stream."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lp_train.distill.losses import Head, rows_per_chunk
from lp_train.distill.replay import layer_calls
from lp_train.errors import UserError
from lp_train.pairing import blocks_of, check_family, decoder_of, pair_output

Block = tuple[int, ...]  # one layer, or the two of a pair


class Stack:
    """The layers of ``model`` with what each is called with for ``batch``, RowCollator's on the model's device.

    ``states[i]`` [B, T, D] is the original's input of layer i, ``states[num_layers]`` the output of the last.

    Raises:
        UserError: a layer of the original gives NaN or infinite values.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], algebra: str) -> None:
        self.family, self.algebra = check_family(model.config.model_type), algebra
        hidden, self.calls = layer_calls(model, batch)
        self.num_layers, self.norm, self.head = len(self.calls), decoder_of(model).norm, Head.of(model)
        self.trained = batch["trained"]
        self.labels = batch["labels"].flatten()[self.trained + 1]
        self.states = [hidden]
        for i in range(self.num_layers):
            self.states.append(self.layer(i, self.states[-1]))
        self._check_finite()

    def _check_finite(self) -> None:
        good = torch.stack([state.isfinite().all() for state in self.states]).tolist()  # waits for the device once
        if not all(good):
            where = f"layer {good.index(False) - 1}" if good[0] else "the embedding"
            rule = f"gives NaN or infinite values in {str(self.states[0].dtype)[6:]}"
            remedy = "check the checkpoint, or set model.dtype bfloat16 or float32"
            raise UserError(f"{where} of the original {rule}; {remedy}")

    def layer(self, i: int, hidden: Tensor) -> Tensor:
        layer, kwargs = self.calls[i]
        return layer(hidden, **kwargs)

    def pair(self, first: int, hidden: Tensor) -> Tensor:
        """Layers ``first`` and ``first + 1`` side by side."""
        return pair_output(self.family, self.algebra, self.calls[first], self.calls[first + 1], hidden)

    def run(self, blocks: Iterable[Block], hidden: Tensor) -> Tensor:
        for block in blocks:
            hidden = self.layer(block[0], hidden) if len(block) == 1 else self.pair(block[0], hidden)
        return hidden

    def finish(self, pairs: Iterable[int], start: int, hidden: Tensor) -> Tensor:
        """From the input of layer ``start`` [B, T, D] through all layers above, with ``pairs``, and the final norm:
        the states [N, D] that the batch's N trained tokens are predicted from."""
        return self.select(self.run(blocks_of(pairs, start, self.num_layers), hidden))

    def select(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden).flatten(0, 1)[self.trained]

    def sums(self, finals: Sequence[Tensor]) -> Tensor:
        """Of each model whose final states [N, D] are given, summed over the batch's N tokens: NLL and
        KL(original || it), float64 [models, 2]. The original's distribution is made once for all of them."""
        original = self.select(self.states[-1])
        found = torch.zeros(len(finals), 2, dtype=torch.float64, device=original.device)
        rows = rows_per_chunk(original.device)
        for start in range(0, len(self.labels), rows):
            chunk = slice(start, start + rows)
            log_p, labels = self.head.log_probabilities(original[chunk]), self.labels[chunk, None]
            p = log_p.exp()
            negative_entropy = log_p.mul_(p).sum(-1)
            for i, states in enumerate(finals):
                log_q = self.head.log_probabilities(states[chunk])
                nll = -log_q.gather(1, labels)[:, 0]
                kl = negative_entropy - log_q.mul_(p).sum(-1)
                found[i] += torch.stack([nll, kl]).double().sum(1)
        return found
