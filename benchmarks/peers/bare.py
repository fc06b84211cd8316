"""The rounds as a plain PyTorch loop: one process, clients in turn, a mean of the tensors."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from model import AdaptedTower
from torch import Tensor
from work import Work, norm, write_result


def play(work: Work, model: AdaptedTower, shared: dict[str, Tensor], idx: int) -> list[float]:
    """One round: trains every client from ``shared``, which becomes the mean of what they make."""
    total = sum(work.task.weights)
    trained = model.trained()
    mean = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
    losses = []
    for client, weight in enumerate(work.task.weights):
        model.set(shared)
        losses.append(model.train_client(work.batches(idx, client)))
        for name, parameter in trained.items():
            mean[name].add_(parameter.detach(), alpha=weight / total)
    shared.update(mean)
    return losses


def main() -> None:
    """Play the rounds of a work folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = Work.read(options.work)
    model = AdaptedTower(work)
    shared = dict(work.start)
    seconds, losses, norms = [], [], []
    for idx in range(options.rounds):
        began = time.perf_counter()
        losses.append(play(work, model, shared, idx))
        seconds.append(time.perf_counter() - began)
        norms.append(norm(shared))
    write_result(options.out, seconds=seconds, losses=losses, norms=norms, version="")


if __name__ == "__main__":
    main()
