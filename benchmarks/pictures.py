"""A first and a second run over a folder of pictures: reading, time to the start, peak memory.

Each run is a process of its own. Both play one round of one batch per client.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def child(root: str, cache: str, runs: str) -> None:
    """One run; prints its figures as JSON."""
    began = time.perf_counter()
    # All that a run imports on its way.
    import datasets  # noqa: F401
    import flwr_datasets.partitioner  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401
    from from_config import FromConfig
    from lightning.pytorch import Callback

    figures = {"imports_s": time.perf_counter() - began}
    start = time.perf_counter()

    class Clock(Callback):
        def setup(self, trainer: object, pl_module: object, stage: str) -> None:
            figures["model_s"] = time.perf_counter() - start - figures["data_s"]

        def on_train_start(self, trainer: object, pl_module: object) -> None:
            figures["to_start_s"] = time.perf_counter() - start

        def on_client_start(self, trainer: object, pl_module: object, client: object) -> None:
            figures.setdefault("to_first_client_s", time.perf_counter() - start)

    built = FromConfig(
        "--config=clip_lora.yaml",
        "--data.source=ImageFolder",
        f"--data.source.root={root}",
        f"--data.cache_dir={cache}",
        f"--trainer.default_root_dir={runs}",
        "--trainer.fast_dev_run=true",
        "--trainer.logger=false",
        "--quiet",
    )
    built.trainer.hooks.callbacks.append(Clock())
    setup = built.datamodule.setup

    def timed(stage: str | None = None) -> None:
        before = time.perf_counter()
        setup(stage)
        figures["data_s"] = time.perf_counter() - before

    built.datamodule.setup = timed
    built.fit()
    figures["pictures"] = len(built.datamodule.holdings.table)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    figures["peak_gb"] = int(peak.split()[1]) * 1024 / 1e9
    print(json.dumps(figures))


def main() -> int:
    """Run twice with one cache and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", help="a folder for ImageFolder; site_folder.py writes one")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.root, *options.child)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            command = [sys.executable, __file__, options.root, "--child", f"{folder}/cache"]
            done = subprocess.run([*command, f"{folder}/runs"], stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            pictures, data = found["pictures"], found["data_s"]
            print(
                f"{name} run of {pictures:,} pictures: imports {found['imports_s']:.1f} s, data "
                f"{data:.1f} s ({pictures / data:,.0f} pictures a second), model "
                f"{found['model_s']:.1f} s; from the imports to the start of training "
                f"{found['to_start_s']:.1f} s, to the first client (after the untrained model's "
                f"evaluation) {found['to_first_client_s']:.1f} s; peak memory "
                f"{found['peak_gb']:.2f} GB",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
