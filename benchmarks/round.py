"""One round of fedlora against the same steps in a bare PyTorch loop, in one process.

Timed is what ``FederatedTrainer.fit`` itself does from the choice of clients until the averaged
adapter is in the model; evaluation, checkpoint and export come on top and are shown apart. The two
take turns round by round, so that both meet the same noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from from_config import FromConfig
from torch import Tensor, nn
from vit_folder import make_vit_b32_folder

from fedlora.callbacks.base import FederatedCallback, Row
from fedlora.data import FederatedDataModule
from fedlora.modules.classifier import CLIPLoRAClassifier
from fedlora.modules.loading import resolve
from fedlora.state import AdapterState, Client, ClientUpdate, Round
from fedlora.trainer import FederatedTrainer

WARM_UP = 1  # rounds not counted
TOLERANCE = 1e-5  # between the losses of the two, without dropout
TARGETS = {"tiny": 1.15, "vit-b32": 1.05}
REPEATS = {"tiny": 10, "vit-b32": 4}
VIT_B32 = (
    "--data.num_clients=2",
    "--data.batch_size=16",
    "--trainer.local_steps=2",
    "--model.lora.r=16",
    "--model.lora.lora_alpha=32",
    # Few rows to evaluate on: they are not what is measured.
    "--data.val_fraction=0.02",
    "--data.client_val_fraction=0.01",
    "--data.source.test_fraction=0.02",
)


class BareLoop:
    """The rounds of a run as one writes them by hand: PEFT, a loop over clients, a mean.

    Args:
        model: gives names and settings; no code of it runs here.
        data: the pictures.
        start: the adapter and head to start from.
    """

    def __init__(
        self, model: CLIPLoRAClassifier, data: FederatedDataModule, start: AdapterState
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import CLIPVisionModelWithProjection

        lora = model.lora_config
        self.vision = CLIPVisionModelWithProjection.from_pretrained(resolve(model.model_name))
        self.vision.requires_grad_(False)
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=sorted(start.A),
        )
        inject_adapter_in_model(config, self.vision)
        head = start.other["classifier.weight"]
        self.head = nn.Linear(head.shape[1], head.shape[0])
        self.optimizer, self.head_lr = model.optimizer, model.head_lr
        adapter = {n: p for n, p in self.vision.named_parameters() if p.requires_grad}
        self.trained = {**adapter, **{f"head.{n}": p for n, p in self.head.named_parameters()}}
        self.shared: dict[str, Tensor] = {
            **{f"{n}.lora_A.default.weight": tensor for n, tensor in start.A.items()},
            **{f"{n}.lora_B.default.weight": tensor for n, tensor in start.B.items()},
            "head.weight": start.other["classifier.weight"],
            "head.bias": start.other["classifier.bias"],
        }
        preprocess, table = model.preprocess, data.source.load()
        self.images = preprocess.resize(data.source.read(range(len(table))))
        self.labels = torch.from_numpy(table.labels)
        # Float64 as in fedlora: Adam's first step is lr * sign(gradient), a last bit can turn it.
        moments = torch.tensor([preprocess.mean, preprocess.std], dtype=torch.float64)
        mean, std = moments.view(2, 3, 1, 1)
        self.scale, self.shift = (1 / (255 * std)).float(), (-mean / std).float()

    def play(self, work: Sequence[tuple[int, Sequence[Tensor]]]) -> list[float]:
        """Train each client on its batches of rows and average.

        Args:
            work: weight and batches (row numbers) of each client.

        Returns:
            Each client's mean training loss.
        """
        total = sum(weight for weight, _ in work)
        mean = {name: torch.zeros_like(p) for name, p in self.trained.items()}
        losses = []
        for weight, batches in work:
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(self.shared[name])
            losses.append(self._train(batches))
            for name, parameter in self.trained.items():
                mean[name].add_(parameter.detach(), alpha=weight / total)
        self.shared = mean
        return losses

    def _train(self, batches: Sequence[Tensor]) -> float:
        adapter = [p for n, p in self.trained.items() if not n.startswith("head.")]
        head: dict[str, Any] = {"params": list(self.head.parameters())}
        if self.head_lr is not None:
            head["lr"] = self.head_lr
        optimizer = self.optimizer([{"params": adapter}, head])
        self.vision.train()
        summed, seen = torch.zeros(()), 0
        for rows in batches:
            pixels = self.images[rows].float().mul_(self.scale).add_(self.shift)
            features = nn.functional.normalize(self.vision(pixels).image_embeds, dim=-1)
            loss = nn.functional.cross_entropy(self.head(features), self.labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            summed += loss.detach() * len(rows)
            seen += len(rows)
        return summed.item() / seen


class Stopwatch(FederatedCallback):
    """Times the parts of each round, and plays it once more in the bare loop, before or after.

    Attributes:
        seconds: part -> seconds of each counted round.
        gap: largest difference between the two losses of a client.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {
            name: [] for name in ("fedlora", "bare", "evaluation", "checkpoint and export")
        }
        self.gap = 0.0
        self._bare: BareLoop | None = None
        self._losses: list[float] = []
        self._bare_losses: list[float] = []
        self._work: list[tuple[int, list[Tensor]]] = []
        self._mark = 0.0
        self._counts = False

    def on_round_start(
        self,
        trainer: FederatedTrainer,
        pl_module: CLIPLoRAClassifier,
        rnd: Round,
        clients: Sequence[Client],
    ) -> None:
        if self._bare is None:
            self._bare = BareLoop(pl_module, trainer.datamodule, trainer.server.adapter)
        self._work = [(c.num_samples, _rows(trainer, c, rnd)) for c in clients]
        self._losses, self._counts = [], rnd.idx >= WARM_UP
        if rnd.idx % 2:
            self._play_bare()
        self._mark = time.perf_counter()

    def on_client_end(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, update: ClientUpdate
    ) -> None:
        self._losses.append(update.metrics["loss"])

    def on_aggregate(
        self,
        trainer: FederatedTrainer,
        pl_module: CLIPLoRAClassifier,
        before: AdapterState,
        after: AdapterState,
        report: Row,
    ) -> None:
        self._lap("fedlora")

    def on_round_evaluated(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, row: Row
    ) -> None:
        self._lap("evaluation")

    def on_round_end(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, row: Row
    ) -> None:
        if not row["round"]:
            return
        self._lap("checkpoint and export")
        if row["round"] % 2:
            self._play_bare()
        pairs = zip(self._losses, self._bare_losses, strict=True)
        self.gap = max(self.gap, *(abs(one - other) for one, other in pairs))

    def _play_bare(self) -> None:
        if self._bare is None:
            raise RuntimeError("no round has started.")
        self._mark = time.perf_counter()
        self._bare_losses = self._bare.play(self._work)
        self._lap("bare")

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        if self._counts:
            self.seconds[name].append(now - self._mark)
        self._mark = now


def _rows(trainer: FederatedTrainer, client: Client, rnd: Round) -> list[Tensor]:
    """The rows of each batch that the client will train on."""
    epochs = (trainer.datamodule.client_batches(client, rnd, e) for e in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    return [b["index"] for b in itertools.islice(batches, trainer.num_batches(client))]


def run(settings: Sequence[str], rounds: int, threads: int, root: Path) -> Stopwatch:
    """Play a run with a stopwatch in it."""
    stopwatch = Stopwatch()
    built = FromConfig(
        "--config=clip_lora.yaml",
        f"--trainer.max_rounds={rounds}",
        f"--trainer.threads={threads}",
        f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu",
        "--trainer.progress=off",
        *settings,
    )
    # Behind all others, so that what they do in a round counts as fedlora's.
    built.trainer.callbacks.append(stopwatch)
    built.fit()
    return stopwatch


def measure(size: str, repeats: int, threads: int, scratch: Path) -> dict[str, Any]:
    """Check that both loops compute the same, then time them."""
    settings: tuple[str, ...] = ()
    if size == "vit-b32":
        folder = make_vit_b32_folder(scratch / "vit_b32")
        settings = (*VIT_B32, f"--model.model_name={folder}")
    same = run(("--model.lora.lora_dropout=0", *settings), 2, threads, scratch / size)
    timed = run(settings, WARM_UP + repeats, threads, scratch / size)
    seconds = timed.seconds
    ratios = sorted(a / b for a, b in zip(seconds["fedlora"], seconds["bare"], strict=True))
    return {
        "size": size,
        "threads": threads,
        "repeats": repeats,
        "loss_gap_without_dropout": same.gap,
        "ratio_median": median(ratios),
        "ratio_of_minima": min(seconds["fedlora"]) / min(seconds["bare"]),
        "ratio_least": ratios[0],
        "ratio_most": ratios[-1],
        "target": TARGETS[size],
        "seconds_median": {name: median(values) for name, values in seconds.items()},
        "seconds": seconds,
    }


def show(result: Mapping[str, Any]) -> None:
    """Print a result."""
    gap = result["loss_gap_without_dropout"]
    seconds = result["seconds_median"]
    print(
        f"{result['size']}, {result['threads']} thread(s), {result['repeats']} rounds each in turn"
    )
    print(f"  losses without dropout differ by {gap:.1e} at most (allowed {TOLERANCE:.0e})")
    print(
        f"  fedlora / bare loop: {result['ratio_median']:.3f} (median; {result['ratio_least']:.3f} "
        f"to {result['ratio_most']:.3f}), {result['ratio_of_minima']:.3f} (fastest of each); "
        f"target at most {result['target']}"
    )
    for name, value in seconds.items():
        print(f"  {name:<22} {value * 1000:9.1f} ms a round (median)")


def main() -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="tiny,vit-b32", help="of: tiny,vit-b32")
    parser.add_argument("--repeats", type=int, help="counted rounds (default 10 and 4)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results, every timing included")
    parser.add_argument("--scratch", type=Path, help="kept folder for runs and the ViT-B/32 folder")
    options = parser.parse_args()
    sizes = options.sizes.split(",")
    unknown = sorted(set(sizes) - set(TARGETS))
    if unknown:
        parser.error(f"--sizes should be of {', '.join(TARGETS)} but got {', '.join(unknown)}")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        for size in sizes:
            repeats = options.repeats or REPEATS[size]
            results.append(measure(size, repeats, options.threads, scratch))
            show(results[-1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    different = [r["size"] for r in results if r["loss_gap_without_dropout"] > TOLERANCE]
    if different:
        print(f"the two loops do not compute the same: {', '.join(different)}")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
