"""The first vision blocks, where nothing in them is learned: what they give is kept."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.modules import families

if TYPE_CHECKING:
    from fedlora.modules.classifier import CLIPLoRAClassifier
    from fedlora.modules.clip import FederatedCLIPModel


def frozen_blocks(clip: Any, learned: Container[int]) -> int:
    """How many of the first vision blocks stay as they are, with all that is below them.

    Args:
        clip: the model.
        learned: ids of the parameters that may change, whether they want gradients now or not.
    """

    def stays(part: nn.Module) -> bool:
        return not any(id(p) in learned or p.requires_grad for p in part.parameters())

    before, blocks = families.vision_parts(clip)
    if not all(map(stays, before)):
        return 0
    return next((count for count, block in enumerate(blocks) if not stays(block)), len(blocks))


@contextmanager
def keeping_frozen(
    module: CLIPLoRAClassifier,
    trained: int,
    others: int,
    say: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Keep what frozen vision blocks give for pictures, as far as ``frozen_cache_gb`` allows.

    As long as the context lasts ``index`` of a batch says which pictures it is of, whatever step it
    is for. Whether anything is kept depends on nothing but what is known here: all or nothing.

    Args:
        module: the classifier, built; its base must not be trained meanwhile.
        trained: pictures that clients train on, if they are the same each time; else 0.
        others: pictures in batches that always come as they are, those in several counted again.
        say: called with a line where there are too many.
    """
    model, lora = module.model, module.lora
    if model is None or lora is None:
        raise FedloraError("the model is not built yet: call build() or use a trainer.")
    learned = {id(p) for part in lora.parameters.values() for p in part.values()}
    if blocks := frozen_blocks(model.clip, learned):
        model.prefix = FrozenPrefix(model, blocks)
        model.prefix.allow(module.frozen_cache_gb, trained, others, say)
    try:
        yield
    finally:
        model.prefix = None


class FrozenPrefix:
    """Runs the frozen first blocks without gradients, and keeps what they give for each picture.

    The bits of what comes of a picture depend on what else is in the batch. So that they depend on
    nothing but who holds what, only two kinds of batches are kept: those that always come as they
    are (in evaluation), known by their rows; and a client's training rows, computed before it
    trains, in the order in which it holds them, whatever order they are asked for in afterwards.

    Kept is kept on the model's device, until the prefix is dropped or its weights change.

    Args:
        model: the classifier.
        blocks: the number of blocks, at least 1.

    Attributes:
        most_fixed: most pictures in batches that always come as they are; more are not kept.
        keeps_trained: whether training rows are kept.
    """

    def __init__(self, model: FederatedCLIPModel, blocks: int) -> None:
        self.model = model
        self.blocks = blocks
        self.most_fixed = 0
        self.keeps_trained = False
        before, layers = families.vision_parts(model.clip)
        self._weights = [p for part in (*before, *layers[:blocks]) for p in part.parameters()]
        self._clients: dict[int, Tensor] = {}
        self._places: dict[int, tuple[int, int]] = {}  # row -> client, place among its rows
        self._fixed: dict[bytes, Tensor] = {}
        self._of = self._version()

    def allow(
        self, gb: float, trained: int, others: int, say: Callable[[str], None] | None = None
    ) -> None:
        """Keep so many pictures from now on, if they take at most ``gb`` 10^9 bytes."""
        vision: Any = self.model.clip.config.vision_config
        if not gb or vision.attention_dropout:  # with which no two passes agree
            return
        need = (trained + others) * self.nbytes_each() / 1e9
        if need <= gb:
            self.keeps_trained, self.most_fixed = trained > 0, others
        elif say is not None:
            say(
                f"what the {self.blocks} frozen vision blocks give is computed each time: for "
                f"{trained + others:,} pictures it takes {need:.3g} GB, and model.frozen_cache_gb "
                f"is {gb:g}."
            )

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return sum(t.nbytes for kept in (self._clients, self._fixed) for t in kept.values())

    def nbytes_each(self) -> int:
        """Bytes that a picture takes."""
        size = self.model.preprocess.size
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.model.device)
        return self.compute(blank).nbytes

    @torch.no_grad()
    def compute(self, images: Tensor) -> Tensor:
        """What the blocks give: images as in the model's ``forward`` -> (n, tokens, width)."""
        pixels = self.model.as_pixels(images)
        return families.first_blocks(self.model.clip, pixels, self.blocks)

    def image_features(self, images: Tensor, index: Tensor | None, *, fixed: bool) -> Tensor:
        """Normalised features (n, dim); arguments as in the model's ``forward``."""
        hidden = None
        if index is not None and (self.most_fixed if fixed else self.keeps_trained):
            self._forget_other_weights()
            hidden = self._again(images, index) if fixed else self._gathered(index)
        if hidden is None:
            hidden = self.compute(images)
        return families.features_after(self.model.clip, hidden, self.blocks)

    def _again(self, images: Tensor, index: Tensor) -> Tensor:
        key = index.numpy(force=True).tobytes()
        if key not in self._fixed:
            hidden = self.compute(images)
            if sum(map(len, self._fixed.values())) + len(hidden) > self.most_fixed:
                return hidden
            self._fixed[key] = hidden
        return self._fixed[key]

    def _gathered(self, index: Tensor) -> Tensor | None:
        """What is kept of training rows in any order; None unless it is of them all."""
        places = [self._places.get(row) for row in index.tolist()]
        known = [place for place in places if place is not None]
        if not known or len(known) < len(places):
            return None
        parts = []
        for client, own in groupby(known, itemgetter(0)):  # one after the other, where several
            kept = self._clients[client]
            order = torch.tensor([place for _, place in own])
            parts.append(kept.index_select(0, order.to(kept.device, non_blocking=True)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def keep(self, client: int, count: int, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Compute a client's training rows, unless that was done.

        Args:
            client: id.
            count: number of its rows.
            batches: ``image`` and ``index``, always the same ones for this client; not begun where
                they are not needed.
        """
        if not self.keeps_trained:
            return
        self._forget_other_weights()
        if client in self._clients or not count:
            return
        kept, rows = None, list[int]()
        for images, index in self._moved(batches):
            hidden = self.compute(images)
            if kept is None:
                kept = hidden.new_empty(count, *hidden.shape[1:])
            kept[len(rows) : len(rows) + len(hidden)] = hidden
            rows += index
        if kept is not None:
            self._clients[client] = kept
            self._places |= {row: (client, place) for place, row in enumerate(rows)}

    def _moved(self, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[Tensor, list[int]]]:
        for batch in batches:
            yield batch["image"].to(self.model.device, non_blocking=True), batch["index"].tolist()

    def _version(self) -> list[tuple[int, int]]:
        # What is written to in place counts up; what is moved or cast lies elsewhere.
        return [(p.data_ptr(), p._version) for p in self._weights]

    def _forget_other_weights(self) -> None:
        now = self._version()
        if now != self._of:
            self._of = now
            self._clients.clear()
            self._places.clear()
            self._fixed.clear()
