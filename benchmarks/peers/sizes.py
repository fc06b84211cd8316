"""The runs that are compared, and how each tool is asked to do them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vit_folder import make_vit_b32_folder

COMMON = (
    "--config=clip_lora.yaml",
    "--data.partitioner=flwr_datasets.partitioner.IidPartitioner",
    # Few rows to evaluate on: all train.
    "--data.val_fraction=0.02",
    "--data.client_val_fraction=0",
    "--data.source.test_fraction=0.02",
    # Without it losses and norms of all tools can be compared.
    "--model.lora.lora_dropout=0",
    "--model.lora.placement=attention",
    "--model.head_lr=null",
    "--trainer.accelerator=cpu",
    "--trainer.progress=off",
    "--trainer.logger=false",
    "--trainer.val_every_n_rounds=1000000",
)
VIT = (
    "--data.batch_size=16",
    "--trainer.local_steps=2",
    "--model.lora.r=16",
    "--model.lora.lora_alpha=32",
)


@dataclass(frozen=True)
class Size:
    """A run.

    Attributes:
        name: what it is called.
        clients: all of them play in every round.
        warm_up: rounds that do not count.
        counted: rounds that do.
        settings: of fedlora, beside the common ones.
        vit: whether the model is of ViT-B/32's size.
    """

    name: str
    clients: int
    warm_up: int
    counted: int
    settings: tuple[str, ...] = ()
    vit: bool = False

    @property
    def rounds(self) -> int:
        """In all; the last one does not count, since fedlora evaluates after it."""
        return self.warm_up + self.counted + 1

    def arguments(self, scratch: Path) -> list[str]:
        """What ``fedlora fit`` is given; ``scratch`` keeps the model's folder."""
        given = [*COMMON, f"--data.num_clients={self.clients}", *self.settings]
        if self.vit:
            given.append(f"--model.model_name={make_vit_b32_folder(scratch / 'vit_b32')}")
        return given


TINY = Size("tiny", 20, 1, 5)
VIT_B32 = Size("vit", 4, 1, 2, VIT, vit=True)
SPREAD = tuple(Size(f"tiny-{count}", count, 2, 5) for count in (10, 50, 200))
SIZES: Mapping[str, Size] = {size.name: size for size in (TINY, VIT_B32, *SPREAD)}
