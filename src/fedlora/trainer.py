"""FederatedTrainer: Fabric, run folder and callbacks around the rounds. It knows no rule or model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fedlora import artefacts, checkpoint
from fedlora.callbacks.averaging import AdapterAveraging
from fedlora.callbacks.checkpoint import RoundCheckpoint
from fedlora.callbacks.progress import Progress, ProgressMode
from fedlora.callbacks.records import Records
from fedlora.data.datamodule import FederatedDataModule
from fedlora.engines.local import Lane, LocalLoop, NonFiniteError
from fedlora.engines.sequential import SequentialEngine
from fedlora.errors import CheckpointError, FedloraError
from fedlora.hooks import Hooks
from fedlora.modules.classifier import CLIPLoRAClassifier
from fedlora.personal import ClientStore
from fedlora.rounds import Rounds
from fedlora.run_folder import RunFolder
from fedlora.sampling import derive_seed
from fedlora.state import AdapterState, Client, ServerState

log = logging.getLogger("fedlora")


class FederatedTrainer:
    """Plays clients in turn and averages their adapters.

    Args:
        averaging: the rule, gradient checkpointing and precision; None means FedAvg in float32.
        callbacks: federated callbacks, and Lightning's that use only their hooks' arguments.
        logger: a Lightning logger or several; True means TensorBoard, False none.
        accelerator: ``auto``, ``cpu``, ``gpu`` or ``mps``.
        devices: 1 or ``auto``; more are refused for now.
        strategy: ``auto``; others are refused for now.
        seed: of everything that is drawn.
        max_rounds: rounds to play.
        clients_per_round: clients drawn for each round; None means all.
        local_epochs: passes over its rows that a client makes in a round.
        local_steps: optimizer steps of a client in a round; replaces ``local_epochs``.
        gradient_clip_val: largest norm of a client's gradient.
        accumulate_grad_batches: batches per optimizer step.
        val_every_n_rounds: how often to evaluate; the last round always is.
        val_clients: whose validation rows to evaluate on: ``participants``, ``all`` or a number.
        limit_train_batches: most batches of a local epoch.
        fast_dev_run: one round of one batch each.
        deterministic: only deterministic algorithms (needed for equal bits on a GPU).
        threads: CPU threads of torch; None leaves torch's choice.
        on_nonfinite: a NaN or infinite loss or adapter of a client ends the run (``error``) or
            leaves the client out of the round (``skip``).
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
        strategy: Literal["auto", "clients", "ddp"] = "auto",
        seed: int = 0,
        max_rounds: int = 10,
        clients_per_round: int | None = None,
        local_epochs: int = 1,
        local_steps: int | None = None,
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
        val_every_n_rounds: int = 1,
        val_clients: int | Literal["participants", "all"] = "participants",
        limit_train_batches: int | None = None,
        fast_dev_run: bool = False,
        deterministic: bool = False,
        threads: int | None = None,
        on_nonfinite: Literal["error", "skip"] = "error",
        progress: ProgressMode = "auto",
        default_root_dir: str = "runs",
    ) -> None:
        _check_range(
            seed=(seed, 0),
            max_rounds=(max_rounds, 1),
            clients_per_round=(clients_per_round, 1),
            local_epochs=(local_epochs, 1),
            local_steps=(local_steps, 1),
            accumulate_grad_batches=(accumulate_grad_batches, 1),
            val_every_n_rounds=(val_every_n_rounds, 1),
            val_clients=(val_clients if isinstance(val_clients, int) else None, 1),
            limit_train_batches=(limit_train_batches, 1),
            threads=(threads, 1),
        )
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise FedloraError(
                f"trainer.gradient_clip_val must be above 0, got {gradient_clip_val}. Leave it out to "
                "not clip."
            )
        if devices not in (1, "auto") or strategy != "auto":
            raise FedloraError(
                f"trainer.devices={devices} with strategy={strategy}: this version runs on one device. "
                "Set devices=1 and strategy=auto."
            )
        self.averaging = AdapterAveraging() if averaging is None else averaging
        self.logger = logger
        self.accelerator = accelerator
        self.seed = seed
        self.max_rounds = 1 if fast_dev_run else max_rounds
        self.clients_per_round = clients_per_round
        self.local_epochs = 1 if fast_dev_run else local_epochs
        self.local_steps = 1 if fast_dev_run and local_steps else local_steps
        self.gradient_clip_val = gradient_clip_val
        self.accumulate_grad_batches = accumulate_grad_batches
        self.val_every_n_rounds = val_every_n_rounds
        self.val_clients = val_clients
        self.limit_train_batches = 1 if fast_dev_run else limit_train_batches
        self.fast_dev_run = fast_dev_run
        self.deterministic = deterministic
        self.threads = threads
        self.on_nonfinite = on_nonfinite
        self.default_root_dir = Path(default_root_dir)
        chosen = list(callbacks or [])
        if not any(isinstance(callback, RoundCheckpoint) for callback in chosen):
            chosen.append(RoundCheckpoint())
        self.progress = Progress(progress)
        self.hooks = Hooks([self.averaging, Records(), *chosen, self.progress])
        # The resolved configuration, where there is one: saved, and compared on resume.
        self.config: Mapping[str, Any] | None = None
        self.config_text = ""
        self.run: RunFolder
        self.fabric: Fabric
        self.server: ServerState
        self.loggers: list[Logger] = []
        self.lane: Lane | None = None
        self._rounds: Rounds
        # What Lightning's callbacks read.
        self.lightning_module: CLIPLoRAClassifier
        self.datamodule: FederatedDataModule
        self.callback_metrics: dict[str, Tensor] = {}
        self.should_stop = False
        self.state = SimpleNamespace(fn=TrainerFn.FITTING)
        self.sanity_checking = False
        self.val_check_interval = 1.0
        self.check_val_every_n_epoch = val_every_n_rounds

    strategy = property(lambda self: self.fabric.strategy)
    world_size = property(lambda self: self.fabric.world_size)
    global_rank = property(lambda self: self.fabric.global_rank)
    is_global_zero = property(lambda self: self.fabric.is_global_zero)
    current_epoch = property(lambda self: self.server.round_idx)
    callbacks = property(lambda self: self.hooks.callbacks)

    def call(self, hook: str, *args: Any) -> None:
        """Call a hook of every callback."""
        self.hooks(hook, self, self.lightning_module, *args)

    def fit(
        self, model: CLIPLoRAClassifier, datamodule: FederatedDataModule, ckpt_path: str | None = None
    ) -> None:
        """Train, or go on with a run.

        Args:
            model: the classifier.
            datamodule: the data.
            ckpt_path: ``last`` goes on with the newest run; or a run folder.

        Raises:
            FedloraError: for input that cannot be used; one line that says what to do.
        """
        self._launch(TrainerFn.FITTING, model, datamodule, lambda: self._fit(ckpt_path))

    def validate(
        self, model: CLIPLoRAClassifier, datamodule: FederatedDataModule, ckpt_path: str | None = None
    ) -> dict[str, float]:
        """Evaluate on the server's validation split; without ``ckpt_path`` the untrained model."""
        return self._evaluated(TrainerFn.VALIDATING, model, datamodule, ckpt_path)

    def test(
        self, model: CLIPLoRAClassifier, datamodule: FederatedDataModule, ckpt_path: str | None = None
    ) -> dict[str, float]:
        """Evaluate on the test split; without ``ckpt_path`` the untrained model."""
        return self._evaluated(TrainerFn.TESTING, model, datamodule, ckpt_path)

    def predict(
        self, model: CLIPLoRAClassifier, datamodule: FederatedDataModule, ckpt_path: str | None = None
    ) -> Path:
        """Write the predictions of the test pictures as CSV, beside the checkpoint; returns where."""

        def body() -> Path:
            run = self._load_for_evaluation(ckpt_path)
            path = run.predictions if run else self.default_root_dir / "predictions.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            count = artefacts.write_predictions(self, path)
            self.progress.say(f"{count} predictions are in {path}")
            return path

        path: Path = self._launch(TrainerFn.PREDICTING, model, datamodule, body)
        return path

    def num_batches(self, client: Client) -> int:
        """Batches that a client trains on in a round."""
        return self._rounds.engine.loop.num_batches(self.datamodule.num_batches(client))

    def keep_as_best(self) -> None:
        """Give the checkpoint just written a second name, ``best.ckpt``."""
        self._rounds.keep_as_best()

    def _launch(
        self,
        stage: TrainerFn,
        model: CLIPLoRAClassifier,
        datamodule: FederatedDataModule,
        body: Callable[[], Any],
    ) -> Any:
        """Build Fabric, attach model and data, and run ``body`` under it."""
        device = _device_type(self.accelerator)
        self.averaging.check_device(device)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(self.deterministic)
        self.fabric = Fabric(accelerator=device, devices=1, precision=self.averaging.precision)
        self.lightning_module, self.datamodule = model, datamodule
        self.state.fn = stage

        def run(fabric: Fabric) -> Any:
            with torch.random.fork_rng(devices=[fabric.device] if device == "cuda" else []):
                self._attach(stage)
                return body()

        try:
            return self.fabric.launch(run)
        except BaseException as error:
            self.call("on_exception", error)
            raise
        finally:
            self.call("teardown", stage.value)
            if hasattr(self, "run"):
                self.run.unlock()

    def _attach(self, stage: TrainerFn) -> None:
        model, data = self.lightning_module, self.datamodule
        model.trainer = self  # type: ignore[assignment]  # it only reads the data module from it
        data.trainer = self  # type: ignore[assignment]
        data.prepare_data()
        data.setup(stage.value)
        # The adapter's first values are a function of the seed alone.
        torch.manual_seed(derive_seed(self.seed, "init"))
        model.configure_model()
        model.to(self.fabric.device)
        self.call("setup", stage.value)

    def _make_rounds(self, run: RunFolder) -> Rounds:
        model, data = self.lightning_module, self.datamodule
        clients = data.clients()
        if self.clients_per_round is not None and self.clients_per_round > len(clients):
            raise FedloraError(
                f"trainer.clients_per_round must be between 1 and {len(clients)} (the number of "
                f"clients), got {self.clients_per_round}. Lower it or raise data.num_clients."
            )
        loop = LocalLoop(
            self.fabric,
            model,
            epochs=self.local_epochs,
            steps=self.local_steps,
            clip=self.gradient_clip_val,
            accumulate=self.accumulate_grad_batches,
            limit_batches=self.limit_train_batches,
            on_batch=self._on_batch,
        )
        on_skip = self._on_skip if self.on_nonfinite == "skip" else None
        engine = SequentialEngine(loop, data, ClientStore(run.clients), self._on_client_start, on_skip)
        return Rounds(self, engine, clients)

    def _on_client_start(self, client: Client) -> None:
        self.call("on_client_start", client)

    def _on_batch(self, lane: Lane, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        self.lane = lane
        self.call("on_train_batch_end", outputs, batch, lane.step)

    def _on_skip(self, client: Client, error: NonFiniteError) -> None:
        self.progress.say(f"left out of the round: {error}")

    def _fit(self, ckpt_path: str | None) -> None:
        if ckpt_path is None:
            self.run = RunFolder.create(self.default_root_dir)
            self.run.lock()
            saved = None
        else:
            self.run, which = RunFolder.of(ckpt_path, self.default_root_dir)
            if which != "last":
                raise CheckpointError(
                    f"fit goes on from last.ckpt only, got {ckpt_path!r}. Give the run folder."
                )
            self.run.lock()
            saved = self._read_last()
        self._rounds = rounds = self._make_rounds(self.run)
        self.server = ServerState(AdapterState())
        if saved is not None:
            rounds.resume(saved)
            if self._is_over() and artefacts.summary_round(self.run.summary) == self.server.round_idx:
                self.progress.say(f"nothing to do: the run in {self.run.path} is finished.")
                return
        self.run.write_config(self.config_text)
        self.loggers = self._make_loggers()
        self.progress.describe(self, rounds)
        self.call("on_fit_start")
        self.call("on_train_start")
        if saved is None:
            rounds.start()
        else:
            rounds.mend()
        while not self._is_over():
            rounds.play()
        self.call("on_train_end")
        self._finish(rounds)
        self.call("on_fit_end")

    def _is_over(self) -> bool:
        return bool(self.server.finished) or self.server.round_idx >= self.max_rounds

    def _read_last(self) -> checkpoint.Checkpoint | None:
        """``last.ckpt``, or the one before where it is damaged; None where there is none yet."""
        last, previous = self.run.checkpoint("last"), self.run.checkpoint("previous")
        if not last.exists() and not previous.exists():
            return None
        try:
            return checkpoint.load(last)
        except CheckpointError as error:
            if not previous.exists():
                raise
            saved = checkpoint.load(previous)
            self.progress.say(f"{error} Going on from {previous}.")
            return saved

    def _finish(self, rounds: Rounds) -> None:
        test = rounds.test()
        self.call("on_test_end")
        personal = artefacts.export_personal(rounds)
        summary = artefacts.write_summary(rounds, test)
        for logger in self.loggers:
            logger.log_metrics(test, step=self.server.round_idx)
            logger.finalize("success")
        self.progress.conclude(summary, self.run, personal)

    def _make_loggers(self) -> list[Logger]:
        if isinstance(self.logger, bool):
            if not self.logger:
                return []
            from lightning.pytorch.loggers import TensorBoardLogger

            return [TensorBoardLogger(self.run.path, name="tensorboard", version="")]
        return list(self.logger) if isinstance(self.logger, Iterable) else [self.logger]

    def _evaluated(
        self,
        stage: TrainerFn,
        model: CLIPLoRAClassifier,
        datamodule: FederatedDataModule,
        ckpt_path: str | None,
    ) -> dict[str, float]:
        def body() -> dict[str, float]:
            from fedlora.engines.evaluate import evaluate

            self._load_for_evaluation(ckpt_path)
            testing = stage == TrainerFn.TESTING
            batches = datamodule.test_dataloader() if testing else datamodule.val_dataloader()
            step = model.test_step if testing else model.validation_step
            values = evaluate(self.fabric, model, batches, step)
            named = {f"{'test' if testing else 'val'}/{name}": value for name, value in values.items()}
            self.callback_metrics = {name: torch.tensor(value) for name, value in named.items()}
            self.call("on_test_end" if testing else "on_validation_end")
            self.progress.table(named)
            return named

        result: dict[str, float] = self._launch(stage, model, datamodule, body)
        return result

    def _load_for_evaluation(self, ckpt_path: str | None) -> RunFolder | None:
        """Load a checkpoint's adapter into the model; None leaves it untrained."""
        if ckpt_path is None:
            return None
        run, which = RunFolder.of(ckpt_path, self.default_root_dir)
        saved = checkpoint.load(run.checkpoint(which))
        if self.lightning_module.lora is None:
            raise FedloraError("the model is not built yet.")
        self.lightning_module.lora.load(saved.server.adapter)
        return run


def _check_range(**values: tuple[int | None, int]) -> None:
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise FedloraError(f"trainer.{name} must be at least {least}, got {value}.")


def _device_type(accelerator: str) -> str:
    """``cuda``, ``mps`` or ``cpu``; refuses an accelerator that is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if accelerator == "auto":
        return next(name for name, available in there.items() if available)
    if accelerator == "gpu":
        accelerator = "mps" if there["mps"] and not there["cuda"] else "cuda"
    if not there[accelerator]:
        raise FedloraError(
            f"trainer.accelerator={accelerator}: there is no such device here. Use auto or cpu."
        )
    return accelerator
