"""Dropout whose mask is a pure function of a key, so that replay and recomputation agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fedlora.sampling import derive_seed

STEPS = 2**16  # what probabilities are rounded to a multiple of


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


@dataclass(frozen=True)
class Draws:
    """What the masks of a step are drawn from.

    Attributes:
        keys: one for each lane, whose rows lie one after the other.
        counts: rows of each lane; None: the same number in each.
        part: where the batch of the only lane is spread over processes, the rows that are seen.
    """

    keys: Sequence[int]
    counts: Sequence[int] | None = None
    part: Rows | None = None

    def of(self, rows: int) -> list[tuple[int, int]]:
        """Key and rows of each lane, of so many rows in all."""
        counts = self.counts or [rows // len(self.keys)] * len(self.keys)
        return list(zip(self.keys, counts, strict=True))


class KeyedDropout(nn.Module):
    """Inverted dropout with a mask from (seed, round, client, step, layer).

    Gradient checkpointing runs the forward pass twice: a generator that is advanced by the first
    run would give the second another mask, and so wrong gradients. Here the generator starts from
    the key at every call.

    Args:
        p: probability of a zero, in [0, 1); rounded to a multiple of 2^-16 in what is drawn.
        layer: the module path of the layer that it serves.
    """

    def __init__(self, p: float, layer: str) -> None:
        super().__init__()
        self.p = p
        self.layer = derive_seed(layer)
        self.draws: Draws | None = None

    @property
    def scale(self) -> float:
        """What is left is multiplied by this."""
        return 1.0 / (1.0 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x`` (any shape) while training."""
        mask = self.mask(x)
        return x if mask is None else x * mask.to(x.dtype).mul_(self.scale)

    def mask(self, x: Tensor) -> Tensor | None:
        """1 where an element of ``x`` stays, else 0, int16; None where all do."""
        if not self.training or self.p == 0.0:
            return None
        if self.draws is None:  # outside of the local loop, e.g. under lightning.Trainer
            return self._drawn(x.shape, x.device, None)
        part = self.draws.part
        # Where the batch is spread over processes, that of the whole batch, to cut out of.
        total = len(x) if part is None else part.total
        masks = [
            self._drawn((rows, *x.shape[1:]), x.device, key) for key, rows in self.draws.of(total)
        ]
        mask = masks[0] if len(masks) == 1 else torch.cat(masks)
        return mask if part is None else mask[part.start : part.stop]

    def _drawn(self, shape: Sequence[int], device: torch.device, key: int | None) -> Tensor:
        generator = None
        if key is not None:
            generator = torch.Generator(device=device).manual_seed(key ^ self.layer)
        count = torch.Size(shape).numel()
        # Four of 16 bits from each number of 64: quicker than a draw for each element.
        bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
        bits.random_(-(2**63), None, generator=generator)
        kept = min(round((1.0 - self.p) * STEPS), STEPS - 1) - STEPS // 2
        return bits.view(torch.int16)[:count].lt_(kept).view(shape)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"p={self.p}"
