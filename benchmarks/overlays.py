"""Every overlay of configs/rules over clip_lora.yaml: how far it lifts the start, and its export.

For each: validation accuracy before the first round and after the last (of the clients' own models
where the rule is personal), the largest aggregation error, bytes, and how far the features of the
exported adapter, served by plain PEFT, are from those of the trainer. Exit code 1 where a rule
lifts by less than ``--lift`` points or its export serves something else.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from from_config import FromConfig
from peft import PeftModel
from torch import Tensor

from fedlora.arguments import shipped_configs
from fedlora.modules.loading import load_clip
from fedlora.trainer import FederatedTrainer

FARTHEST = 1e-5  # between normalised features, float32
# Prompts that say little, so that there is much to learn.
START = ("--data.source=Digits", '--data.source.templates=["a drawing of {} things"]')


def measure(overlay: Path, args: Sequence[str], root: Path) -> dict[str, Any]:
    """Run one overlay."""
    built = FromConfig(
        "--config=clip_lora.yaml",
        f"--config={overlay}",
        *args,
        f"--trainer.default_root_dir={root / overlay.stem}",
        "--trainer.logger=false",
        "--quiet",
    )
    built.fit()
    trainer, rounds = built.trainer, built.trainer.rounds
    history = trainer.server.history
    figure = rounds.monitor
    errors = [row["agg/error"] for row in history[1:] if row["agg/error"] is not None]
    about = json.loads((trainer.run.adapter / "fedlora.json").read_text(encoding="utf-8"))
    return {
        "overlay": overlay.stem,
        "figure": figure,
        "start": history[0][figure],
        "end": history[-1][figure],
        "agg/error": max(errors) if errors else None,
        "up": sum(row["comm/up_bytes"] for row in history[1:]),
        "down": sum(row["comm/down_bytes"] for row in history[1:]),
        "export": deviation(trainer),
        "stated": about.get("peft", {}).get("error", 0.0),
    }


@torch.no_grad()
def deviation(trainer: FederatedTrainer) -> float:
    """Largest difference of a feature, over the exported global and personal adapters."""
    rounds, server, model = trainer.rounds, trainer.server, trainer.lightning_module.model.eval()
    batch = next(iter(trainer.datamodule.test_dataloader()))["image"]
    pixels = model.preprocess.normalise(batch)

    def far(folder: Path) -> float:
        return float((model.encode_image(pixels) - through_peft(folder, pixels)).abs().max())

    found = [far(trainer.run.adapter)]
    for client in rounds.clients:
        if rounds.personal and client.id in server.versions:
            rounds.engine.load_own(client, rounds.round(server.round_idx), server, rounds.rule)
            found.append(far(trainer.run.path / "adapters" / str(client.id)))
    rounds.engine.lora.load(server.adapter)
    return max(found)


def through_peft(folder: Path, pixels: Tensor) -> Tensor:
    """Normalised picture features of the embedded model under an adapter that PEFT loads."""
    peft = PeftModel.from_pretrained(load_clip("tiny-clip"), str(folder)).eval()
    features = peft.get_image_features(pixel_values=pixels).pooler_output
    return torch.nn.functional.normalize(features, dim=-1)


def main() -> int:
    """Run all overlays, or those asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="What else is given goes to fedlora: --trainer.max_rounds=5 …"
    )
    parser.add_argument("--rules", help="names of overlays, e.g. fedex,flora; default: all")
    parser.add_argument("--lift", type=float, default=10.0, help="points that each must gain")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options, rest = parser.parse_known_args()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    there = {path.stem: path for path in sorted((shipped_configs() / "rules").glob("*.yaml"))}
    names = options.rules.split(",") if options.rules else list(there)
    if unknown := sorted(set(names) - set(there)):
        parser.error(f"--rules should be of {', '.join(there)} but got {', '.join(unknown)}")
    print("| overlay | figure | start | end | points | agg error | MB up | MB down | export |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            row = measure(there[name], [*START, *rest], Path(scratch))
            rows.append(row)
            error = "" if row["agg/error"] is None else f"{row['agg/error']:.1e}"
            print(
                f"| {name} | {row['figure']} | {row['start']:.4f} | {row['end']:.4f} | "
                f"{100 * (row['end'] - row['start']):+.1f} | {error} | {row['up'] / 1e6:.2f} | "
                f"{row['down'] / 1e6:.2f} | {row['export']:.0e} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    low = [r["overlay"] for r in rows if 100 * (r["end"] - r["start"]) < options.lift]
    other = [r["overlay"] for r in rows if r["export"] > FARTHEST and not r["stated"]]
    if low:
        print(f"below {options.lift:g} points: {', '.join(low)}")
    if other:
        print(f"the export serves something else: {', '.join(other)}")
    return int(bool(low or other))


if __name__ == "__main__":
    raise SystemExit(main())
