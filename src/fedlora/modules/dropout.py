"""Dropout whose mask is a pure function of a key, so that replay and recomputation agree."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from fedlora.sampling import derive_seed


class Rows(Protocol):
    """Some rows of a batch."""

    @property
    def start(self) -> int:
        """The first."""

    @property
    def stop(self) -> int:
        """The one behind the last."""

    @property
    def total(self) -> int:
        """Rows of the whole batch."""


class KeyedDropout(nn.Module):
    """Inverted dropout with a mask from (seed, round, client, step, layer).

    Gradient checkpointing runs the forward pass twice: a generator that is advanced by the first
    run would give the second another mask, and so wrong gradients. Here the generator starts from
    the key at every call.

    Args:
        p: probability of a zero, in [0, 1).
        layer: the module path of the layer that it serves.
    """

    def __init__(self, p: float, layer: str) -> None:
        super().__init__()
        self.p = p
        self.layer = derive_seed(layer)
        self.key: int | None = None
        self.rows: Rows | None = None  # of the batch that is seen; None: all of it

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x`` (any shape) while training."""
        if not self.training or self.p == 0.0:
            return x
        if self.key is None:  # outside of the local loop, e.g. under lightning.Trainer
            return nn.functional.dropout(x, self.p)
        generator = torch.Generator(device=x.device).manual_seed(self.key ^ self.layer)
        # Where the batch is spread over processes, that of the whole batch, to cut out of.
        count = len(x) if self.rows is None else self.rows.total
        mask = x.new_empty(count, *x.shape[1:]).bernoulli_(1.0 - self.p, generator=generator)
        if self.rows is not None:
            mask = mask[self.rows.start : self.rows.stop]
        return x * mask.div_(1.0 - self.p)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"p={self.p}"
