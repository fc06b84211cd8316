"""FederatedTrainer: the settings and the calls of a run. It knows no rule and no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lightning.fabric import Fabric
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fedlora import evaluation, session
from fedlora.callbacks.averaging import AdapterAveraging
from fedlora.callbacks.checkpoint import RoundCheckpoint
from fedlora.callbacks.objective import Objective
from fedlora.callbacks.progress import Progress, ProgressMode
from fedlora.callbacks.records import Records
from fedlora.data.datamodule import FederatedDataModule
from fedlora.distributed.devices import check_devices, spread_of
from fedlora.distributed.world import World
from fedlora.engines.lane import Lane
from fedlora.errors import FedloraError
from fedlora.hooks import Hooks
from fedlora.modules.classifier import CLIPLoRAClassifier
from fedlora.round_lr import RoundLR
from fedlora.rounds import Rounds
from fedlora.run_folder import RunFolder
from fedlora.sampling import Sampling
from fedlora.settings import check_lanes, check_range
from fedlora.state import Client, ServerState


class FederatedTrainer:
    """Plays clients in turn and averages their adapters.

    Args:
        averaging: the rule, gradient checkpointing and precision; None means FedAvg in float32.
        callbacks: federated callbacks, objectives among them, and Lightning's that use only their
            hooks' arguments.
        logger: a Lightning logger or several; True means TensorBoard, False none.
        accelerator: ``auto``, ``cpu``, ``gpu`` or ``mps``.
        devices: processes on each machine, one per GPU; ``auto``: as many as torchrun started, else
            one per GPU, else one.
        num_nodes: machines.
        strategy: what they share: whole clients (``clients``, ``auto``; the same bits as on one
            device) or the rows of each batch (``ddp``; the same up to rounding).
        timeout: seconds that a process waits for another before the run ends.
        lanes: clients that share forward and backward passes; ``auto``: as many as pay here.
        seed: of everything that is drawn.
        max_rounds: rounds to play.
        clients_per_round: clients drawn for each round; None means all.
        sampling: which clients are there and answer in time; all that are chosen by default.
        min_clients: answers without which a round does not count; 0 does without any.
        client_ranks: LoRA ranks of the clients, at most the model's: one for all, a list with one
            for each, or shares such as ``{4: 0.5, 8: 0.5}``, drawn from the seed; None means the
            model's. Needs a rule that can average them.
        client_alpha: with ``client_ranks``: ``scaled`` lets lora_alpha follow the rank, so that all
            clients scale by the same lora_alpha / rank; ``fixed`` is one lora_alpha for all.
        local_epochs: passes over its rows that a client makes in a round.
        local_steps: optimizer steps of a client in a round; replaces ``local_epochs``.
        round_lr: what the learning rates are multiplied with over the rounds; constant by default.
        gradient_clip_val: largest norm of a client's gradient.
        accumulate_grad_batches: batches per optimizer step.
        val_every_n_rounds: how often to evaluate; the last round always is.
        val_clients: whose validation rows to evaluate on: ``participants``, ``all`` or a number.
        limit_train_batches: most batches of a local epoch.
        fast_dev_run: one round of one batch each.
        deterministic: only deterministic algorithms (needed for equal bits on a GPU).
        threads: CPU threads of torch; None leaves torch's choice.
        on_nonfinite: a client's NaN or infinite loss or adapter ends the run (``error``) or leaves
            the client out of the round (``skip``).
        on_client_error: any other error while a client plays ends the run (``stop``) or leaves the
            client out of the round (``skip``).
        progress: ``auto`` (a display on a terminal, lines elsewhere), ``rich``, ``plain``, ``off``.
        default_root_dir: where run folders are made.

    Raises:
        FedloraError: for a value out of range, before anything heavy is done.
    """

    def __init__(
        self,
        averaging: AdapterAveraging | None = None,
        callbacks: list[Callback] | None = None,
        logger: Logger | list[Logger] | bool = True,
        accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
        devices: int | Literal["auto"] = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        timeout: float = 1800.0,
        lanes: int | Literal["auto"] = 1,
        seed: int = 0,
        max_rounds: int = 10,
        clients_per_round: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen; the command line shows its fields)
        min_clients: int = 1,
        client_ranks: int | list[int] | dict[int, float] | None = None,
        client_alpha: Literal["scaled", "fixed"] = "scaled",
        local_epochs: int = 1,
        local_steps: int | None = None,
        round_lr: RoundLR = RoundLR(),  # noqa: B008  (frozen; the command line shows its fields)
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
        val_every_n_rounds: int = 1,
        val_clients: int | Literal["participants", "all"] = "participants",
        limit_train_batches: int | None = None,
        fast_dev_run: bool = False,
        deterministic: bool = False,
        threads: int | None = None,
        on_nonfinite: Literal["error", "skip"] = "error",
        on_client_error: Literal["stop", "skip"] = "stop",
        progress: ProgressMode = "auto",
        default_root_dir: str = "runs",
    ) -> None:
        check_lanes(lanes)
        check_range(
            seed=(seed, 0),
            max_rounds=(max_rounds, 1),
            clients_per_round=(clients_per_round, 1),
            min_clients=(min_clients, 0),
            local_epochs=(local_epochs, 1),
            local_steps=(local_steps, 1),
            accumulate_grad_batches=(accumulate_grad_batches, 1),
            val_every_n_rounds=(val_every_n_rounds, 1),
            val_clients=(val_clients if isinstance(val_clients, int) else None, 1),
            limit_train_batches=(limit_train_batches, 1),
            threads=(threads, 1),
        )
        sampling.validate()
        round_lr.validate()
        if sampling.over_selection and clients_per_round is None:
            raise FedloraError(
                "trainer.sampling.over_selection chooses more than trainer.clients_per_round, and "
                "without that all clients play. Set it, or leave over_selection out."
            )
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise FedloraError(
                f"trainer.gradient_clip_val must be above 0, got {gradient_clip_val}. Leave it out "
                "to not clip."
            )
        check_devices(devices, num_nodes, strategy, timeout, on_client_error)
        self.averaging = AdapterAveraging() if averaging is None else averaging
        self.logger = logger
        self.accelerator = accelerator
        self.devices = devices
        self.num_nodes = num_nodes
        self.spread = spread_of(strategy)
        self.timeout = timeout
        self.lanes = lanes
        self.world = World()
        self.seed = seed
        self.max_rounds = 1 if fast_dev_run else max_rounds
        self.clients_per_round = clients_per_round
        self.sampling = sampling
        self.min_clients = min_clients
        self.client_ranks = client_ranks
        self.client_alpha = client_alpha
        self.local_epochs = 1 if fast_dev_run else local_epochs
        self.local_steps = 1 if fast_dev_run and local_steps else local_steps
        self.round_lr = round_lr
        self.gradient_clip_val = gradient_clip_val
        self.accumulate_grad_batches = accumulate_grad_batches
        self.val_every_n_rounds = val_every_n_rounds
        self.val_clients = val_clients
        self.limit_train_batches = 1 if fast_dev_run else limit_train_batches
        self.fast_dev_run = fast_dev_run
        self.deterministic = deterministic
        self.threads = threads
        self.on_nonfinite = on_nonfinite
        self.on_client_error = on_client_error
        self.default_root_dir = Path(default_root_dir)
        chosen = list(callbacks or [])
        keepers = [callback for callback in chosen if isinstance(callback, RoundCheckpoint)]
        if len(keepers) > 1:
            raise FedloraError(
                f"trainer.callbacks must have at most one RoundCheckpoint, got {len(keepers)}: "
                "there is one best.ckpt. Drop the others."
            )
        self.keeper = keepers[0] if keepers else RoundCheckpoint()
        chosen += [] if keepers else [self.keeper]
        self.progress = Progress(progress)
        self.hooks = Hooks([self.averaging, Records(), *chosen, self.progress])
        # The resolved configuration, where there is one: saved, and compared on resume.
        self.config: Mapping[str, Any] | None = None
        self.config_text = ""
        self.run: RunFolder | None = None
        self.played = False
        self.rounds: Rounds
        self.fabric: Fabric
        self.server: ServerState
        self.loggers: list[Logger] = []
        self.lane: Lane | None = None
        # What Lightning's callbacks read.
        self.lightning_module: CLIPLoRAClassifier
        self.datamodule: FederatedDataModule
        self.ckpt_path: str | None = None
        self.callback_metrics: dict[str, Tensor] = {}
        self.should_stop = False
        self.state = SimpleNamespace(fn=TrainerFn.FITTING)
        self.sanity_checking = False
        self.val_check_interval = 1.0
        self.check_val_every_n_epoch = val_every_n_rounds

    strategy = property(lambda self: self.fabric.strategy)
    world_size = property(lambda self: self.world.size)
    global_rank = property(lambda self: self.world.rank)
    is_global_zero = property(lambda self: self.world.is_zero)
    current_epoch = property(lambda self: self.server.round_idx)
    callbacks = property(lambda self: self.hooks.callbacks)

    @property
    def objectives(self) -> list[Objective]:
        """What clients minimise besides their loss."""
        return [each for each in self.callbacks if isinstance(each, Objective)]

    def call(self, hook: str, *args: Any) -> None:
        """Call a hook of every callback."""
        self.hooks(hook, self, self.lightning_module, *args)

    def fit(
        self,
        model: CLIPLoRAClassifier,
        datamodule: FederatedDataModule,
        ckpt_path: str | None = None,
    ) -> None:
        """Train, or go on with a run.

        Args:
            model: the classifier.
            datamodule: the data.
            ckpt_path: ``last`` goes on with the newest run; or a run folder.

        Raises:
            FedloraError: for input that cannot be used; one line that says what to do.
        """
        if self.played and ckpt_path is None:
            raise FedloraError(
                "this trainer has played a run, which its rule and its callbacks remember. Make a "
                "new trainer for another, or go on with ckpt_path."
            )
        self.played = True
        self._begin(TrainerFn.FITTING, model, datamodule, ckpt_path)
        session.launch(self, lambda: session.fit(self, ckpt_path))

    def validate(
        self,
        model: CLIPLoRAClassifier,
        datamodule: FederatedDataModule,
        ckpt_path: str | None = None,
    ) -> dict[str, float]:
        """Evaluate on the server's validation split; without ``ckpt_path`` the untrained model."""
        self._begin(TrainerFn.VALIDATING, model, datamodule, ckpt_path)
        return session.launch(self, lambda: evaluation.evaluated(self, ckpt_path))

    def test(
        self,
        model: CLIPLoRAClassifier,
        datamodule: FederatedDataModule,
        ckpt_path: str | None = None,
    ) -> dict[str, float]:
        """Evaluate on the test split; without ``ckpt_path`` the untrained model."""
        self._begin(TrainerFn.TESTING, model, datamodule, ckpt_path)
        return session.launch(self, lambda: evaluation.evaluated(self, ckpt_path))

    def predict(
        self,
        model: CLIPLoRAClassifier,
        datamodule: FederatedDataModule,
        ckpt_path: str | None = None,
    ) -> Path:
        """Write predictions of the test pictures as CSV beside the checkpoint; returns where."""
        self._begin(TrainerFn.PREDICTING, model, datamodule, ckpt_path)
        return session.launch(self, lambda: evaluation.predict(self, ckpt_path))

    def _begin(
        self,
        stage: TrainerFn,
        model: CLIPLoRAClassifier,
        datamodule: FederatedDataModule,
        ckpt_path: str | None,
    ) -> None:
        self.state.fn = stage
        self.ckpt_path = ckpt_path
        self.lightning_module, self.datamodule = model, datamodule

    def num_batches(self, client: Client) -> int:
        """Batches that a client trains on in a round, in all of its lanes."""
        engine = self.rounds.engine
        return engine.lanes * engine.loop.num_batches(self.datamodule.num_batches(client))

    def keep_as_best(self) -> None:
        """Give the checkpoint just written a second name, ``best.ckpt``."""
        if self.world.is_zero:
            self.rounds.saves.keep_as_best()
