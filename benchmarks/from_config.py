"""The trainer, model and data that ``python -m fedlora fit`` would run, built and not yet run."""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from fedlora.arguments import complete
from fedlora.cli import FederatedCLI, UsageError

warnings.filterwarnings("ignore", module="lightning")


class FromConfig(FederatedCLI):
    """``trainer``, ``model`` and ``datamodule`` of a command line.

    Args:
        args: what follows ``fedlora fit``, e.g. ``--config=clip_lora.yaml --model.lora.r=4``.
    """

    def __init__(self, *args: str) -> None:
        try:
            super().__init__(complete(["fit", *args]))
        except UsageError as error:
            raise SystemExit(str(error)) from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave the run to the caller."""

    def fit(self) -> None:
        """What the command does."""
        self.trainer.fit(self.model, self.datamodule)
