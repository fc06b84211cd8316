"""What every tool is given to do: pictures, a start, and each client's batches, round by round.

Read where fedlora is not installed: numpy, torch and safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

IMAGES, LABELS, START, TASK = "images.npy", "labels.npy", "start.safetensors", "task.json"


@dataclass(frozen=True)
class Task:
    """All of it but the tensors.

    Attributes:
        model: folder of a CLIP in the Hugging Face layout.
        targets: names of the adapted layers.
        rank: of the adapter.
        alpha: the adapter is scaled by alpha / rank.
        lr: of AdamW without weight decay, for adapter and head.
        weights: of each client in the mean.
        rounds: for each round and client the row numbers of each batch.
        losses: each client's mean training loss in each round, as fedlora has it.
        norms: of the averaged adapter and head after each round, as fedlora has it.
        settings: of fedlora, that it is of.
    """

    model: str
    targets: list[str]
    rank: int
    alpha: float
    lr: float
    weights: list[float]
    rounds: list[list[list[list[int]]]]
    losses: list[list[float]]
    norms: list[float]
    settings: list[str]

    def write(self, folder: Path) -> None:
        """As JSON; what is written last says that the folder is whole."""
        (folder / TASK).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Task:
        """What :meth:`write` wrote."""
        return cls(**json.loads((folder / TASK).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Work:
    """A task with its tensors.

    Attributes:
        task: settings and batches.
        images: (n, 3, size, size), uint8, at the model's size; read from the disk as they are used.
        labels: (n,), int64.
        start: name in the adapted tower -> what all start from.
        scale: (3, 1, 1), float32; pixels become ``image * scale + shift``.
        shift: (3, 1, 1), float32.
    """

    task: Task
    images: Tensor
    labels: Tensor
    start: Mapping[str, Tensor]
    scale: Tensor
    shift: Tensor

    @classmethod
    def read(cls, folder: Path) -> Work:
        """A folder that the benchmark wrote."""
        task = Task.read(folder)
        config = json.loads((Path(task.model) / "preprocessor_config.json").read_text())
        mean, std = torch.tensor(
            [config["image_mean"], config["image_std"]], dtype=torch.float64
        ).view(2, 3, 1, 1)
        return cls(
            task,
            # Private to the process, so that it may be a tensor; nobody writes to it.
            torch.from_numpy(np.load(folder / IMAGES, mmap_mode="c")),
            torch.from_numpy(np.load(folder / LABELS)),
            load_file(folder / START),
            (1 / (255 * std)).float(),
            (-mean / std).float(),
        )

    def batches(self, round_idx: int, client: int) -> list[tuple[Tensor, Tensor]]:
        """Pictures, uint8, and labels of each batch of a client in a round."""
        rows = [torch.tensor(batch) for batch in self.task.rounds[round_idx][client]]
        return [(self.images[batch], self.labels[batch]) for batch in rows]


def write_result(path: Path, **found: Any) -> None:
    """What a tool found, as JSON, with torch's version."""
    found["torch"] = torch.__version__
    path.write_text(json.dumps(found), encoding="utf-8")


def norm(tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> float:
    """Of all entries together."""
    each = tensors.values() if isinstance(tensors, Mapping) else tensors
    return float(sum(t.detach().double().square().sum() for t in each) ** 0.5)
