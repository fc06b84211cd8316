"""Hooks: Lightning's, and those that only a federation has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import Callback

from fedlora.state import AdapterState, Client, ClientUpdate, Round

if TYPE_CHECKING:
    from fedlora.modules.classifier import CLIPLoRAClassifier
    from fedlora.sampling import Absence
    from fedlora.trainer import FederatedTrainer

Row = Mapping[str, float | None]


class FederatedCallback(Callback):
    """A callback of :class:`~fedlora.trainer.FederatedTrainer`; every hook does nothing.

    Lightning's own hooks are called too: ``setup``, ``on_fit_start``, ``on_train_start``,
    ``on_train_epoch_start`` and ``_end`` (once a round), ``on_train_batch_end``,
    ``on_validation_start`` and ``_end``, ``on_train_end``, ``on_fit_end``, ``on_test_start`` and
    ``_end``, ``on_exception``, ``teardown``.
    """

    def on_round_start(
        self,
        trainer: FederatedTrainer,
        pl_module: CLIPLoRAClassifier,
        rnd: Round,
        clients: Sequence[Client],
    ) -> None:
        """Called when the clients of a round have been chosen."""

    def on_client_start(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, client: Client
    ) -> None:
        """Called before a client trains."""

    def on_client_end(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, update: ClientUpdate
    ) -> None:
        """Called when a client's update has arrived."""

    def on_client_absent(
        self,
        trainer: FederatedTrainer,
        pl_module: CLIPLoRAClassifier,
        absence: Absence,
        down_nbytes: int,
    ) -> None:
        """Called with a client that was wanted and does not answer, and what was sent to it."""

    def on_aggregate(
        self,
        trainer: FederatedTrainer,
        pl_module: CLIPLoRAClassifier,
        before: AdapterState,
        after: AdapterState,
        report: Row,
    ) -> None:
        """Called when the new adapter is in the model."""

    def on_round_evaluated(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, row: Row
    ) -> None:
        """Called when a round's metrics are known, before its checkpoint is written."""

    def on_round_end(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, row: Row
    ) -> None:
        """Called when a round is saved; again on resume, with the round that is resumed from."""
