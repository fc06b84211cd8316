"""One call of the trainer: Fabric around it, the run folder under it, rounds inside."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.pytorch.loggers import Logger

from fedlora import artefacts, checkpoint, per_class
from fedlora.distributed.devices import device_type, make_fabric, per_machine, set_threads
from fedlora.distributed.launch import end, explained
from fedlora.distributed.world import World
from fedlora.errors import CheckpointError, ElsewhereError, FedloraError
from fedlora.federation import make_clients, make_rounds
from fedlora.garbage import looking_at_new_objects_only
from fedlora.heap import keeping_freed_memory
from fedlora.modules.prefix import keeping_frozen
from fedlora.rounds import Rounds
from fedlora.run_folder import RunFolder
from fedlora.sampling import derive_seed
from fedlora.state import AdapterState, ServerState

if TYPE_CHECKING:
    from fedlora.trainer import FederatedTrainer

T = TypeVar("T")


def launch(trainer: FederatedTrainer, body: Callable[[], T]) -> T:
    """Build Fabric, start the other processes, attach model and data, and run ``body`` in each."""
    device = device_type(trainer.accelerator)
    trainer.averaging.check_device(device)
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    trainer.fabric = fabric = make_fabric(
        device,
        trainer.averaging.precision,
        trainer.devices,
        trainer.num_nodes,
        trainer.spread,
        trainer.timeout,
    )

    def run(fabric: Fabric) -> T:
        trainer.world = World.of(fabric)
        set_threads(trainer.threads, per_machine(fabric))
        if not trainer.world.is_zero:
            trainer.progress.mode = "off"
        with torch.random.fork_rng(devices=[fabric.device] if device == "cuda" else []):
            _attach(trainer)
            return body()

    failed = True
    try:
        result: T = fabric.launch(run)
        failed = False
        return result
    except BaseException as error:
        trainer.call("on_exception", error)
        said = explained(error, trainer.world, fabric)
        if said is None:
            raise
        # Of what happened elsewhere there is no more to see here.
        raise said from (error if isinstance(said, ElsewhereError) else None)
    finally:
        end(fabric, failed)
        trainer.call("teardown", trainer.state.fn.value)
        if trainer.run is not None:
            trainer.run.unlock()


def _attach(trainer: FederatedTrainer) -> None:
    """Let the model and the data know each other through the trainer, and build both."""
    model, data, stage = trainer.lightning_module, trainer.datamodule, trainer.state.fn.value
    model.trainer = trainer  # type: ignore[assignment]  # it only reads the data module from it
    data.trainer = trainer  # type: ignore[assignment]
    trainer.world.once("the data are prepared", data.prepare_data)
    data.setup(stage)
    # The adapter's first values are a function of the seed alone.
    torch.manual_seed(derive_seed(trainer.seed, "init"))
    model.configure_model()
    model.to(trainer.fabric.device)
    trainer.call("setup", stage)


def fit(trainer: FederatedTrainer, ckpt_path: str | None) -> None:
    """Start a run, or go on with one, until it is over."""
    clients = make_clients(trainer)
    run, saved = _open(trainer, ckpt_path)
    trainer.run = run
    if ckpt_path is not None and saved is None:  # left out while there might be a checkpoint
        trainer.lightning_module.start_from_adapter()
    trainer.rounds = rounds = make_rounds(trainer, run, clients)
    trainer.server = ServerState(AdapterState())
    if saved is not None:
        rounds.resume(saved)
        if trainer.world.share(lambda: _is_finished(trainer, run)):
            trainer.progress.say(f"nothing to do: the run in {run.path} is finished.")
            return
    if trainer.world.is_zero:
        run.write_config(trainer.config_text)
    _check_folder(trainer.world, rounds)
    log = _log_file(run) if trainer.world.is_zero else nullcontext()
    with log, _keeping(trainer), looking_at_new_objects_only(), keeping_freed_memory():
        _play(trainer, rounds, fresh=saved is None)


def _keeping(trainer: FederatedTrainer) -> AbstractContextManager[None]:
    """What frozen blocks give for pictures is kept, as far as the model's bound allows."""
    data = trainer.datamodule
    trained, others = data.holdings.pictures()
    # Of clients that do not pass over all their rows few of them may ever be needed.
    partly = trainer.local_steps is not None or trainer.limit_train_batches is not None
    trained = 0 if partly or data.augment is not None else trained
    return keeping_frozen(trainer.lightning_module, trained, others, trainer.progress.say)


def _check_folder(world: World, rounds: Rounds) -> None:
    """Refuse a run folder that not all can read, where clients' states go there."""
    if world.any(not rounds.run.path.is_dir()) and rounds.keeps:
        raise FedloraError(
            f"not every machine sees {rounds.run.path}, where the clients' states are kept. Set "
            "trainer.default_root_dir to a folder on a shared disk."
        )


def _play(trainer: FederatedTrainer, rounds: Rounds, fresh: bool) -> None:
    trainer.loggers = _make_loggers(trainer, rounds.run) if trainer.world.is_zero else []
    if fresh:
        rounds.prepare()
    if trainer.world.is_zero:
        trainer.progress.describe(trainer, rounds)
    trainer.call("on_fit_start")
    trainer.call("on_train_start")
    if fresh:
        rounds.start()
    else:
        rounds.mend()
    while not _is_over(trainer):
        rounds.play()
    trainer.call("on_train_end")
    _finish(trainer, rounds)
    trainer.call("on_fit_end")


@contextmanager
def _log_file(run: RunFolder) -> Iterator[None]:
    """Write what is said to ``fedlora.log`` too."""
    log = logging.getLogger("fedlora")
    handler = logging.FileHandler(run.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()


def _open(
    trainer: FederatedTrainer, ckpt_path: str | None
) -> tuple[RunFolder, checkpoint.Checkpoint | None]:
    """The run folder, locked, and what is saved in it, in every process."""
    world, opened = trainer.world, None
    if world.is_zero:
        opened = _locked(trainer, ckpt_path)
    told = world.share(lambda: _told(*opened) if opened else None)
    if opened is not None:
        return opened
    path, saved = told
    return RunFolder(Path(path)), None if saved is None else checkpoint.from_dict(saved)


def _told(run: RunFolder, saved: checkpoint.Checkpoint | None) -> list[Any]:
    return [str(run.path), None if saved is None else checkpoint.to_dict(saved)]


def _locked(
    trainer: FederatedTrainer, ckpt_path: str | None
) -> tuple[RunFolder, checkpoint.Checkpoint | None]:
    if ckpt_path is None:
        run = RunFolder.create(trainer.default_root_dir)
        run.lock()
        return run, None
    run, which = RunFolder.of(ckpt_path, trainer.default_root_dir)
    if which != "last":
        raise CheckpointError(
            f"fit goes on from last.ckpt only, got {ckpt_path!r}. Give 'last' or the run folder."
        )
    run.lock()
    run.sweep()
    trainer.run = run
    last, previous = run.checkpoint("last"), run.checkpoint("previous")
    if not last.exists() and not previous.exists():
        return run, None  # killed before its first checkpoint: start from the beginning
    try:
        return run, checkpoint.load(last)
    except CheckpointError as error:
        if not previous.exists():
            raise
        saved = checkpoint.load(previous)
        # Else the next save would keep the damaged file as the previous one.
        checkpoint.keep_as(previous, last)
        trainer.progress.say(f"{error} Going on from {previous}.")
        return run, saved


def _is_over(trainer: FederatedTrainer) -> bool:
    return bool(trainer.server.finished) or trainer.server.round_idx >= trainer.max_rounds


def _is_finished(trainer: FederatedTrainer, run: RunFolder) -> bool:
    done = trainer.server.round_idx
    return _is_over(trainer) and artefacts.summary_round(run.summary) == done


def _finish(trainer: FederatedTrainer, rounds: Rounds) -> None:
    """Test once, and write what a run leaves behind."""
    trainer.call("on_test_start")
    scores = rounds.test(per_class=True)
    values = {**scores.values, **artefacts.write_client_scores(rounds)}
    trainer.call("on_test_end")
    if not trainer.world.is_zero:
        return
    if scores.classes:
        names = trainer.datamodule.class_names
        per_class.write(rounds.run.per_class, names, scores.classes)
    personal = artefacts.export_personal(rounds)
    for logger in trainer.loggers:
        defined = {name: value for name, value in values.items() if value is not None}
        logger.log_metrics(defined, step=trainer.server.round_idx)
        logger.finalize("success")
    # Last: a run that has its summary is a finished one.
    summary = artefacts.write_summary(rounds, values)
    trainer.progress.conclude(summary, rounds.run, personal)


def _make_loggers(trainer: FederatedTrainer, run: RunFolder) -> list[Logger]:
    if isinstance(trainer.logger, bool):
        if not trainer.logger:
            return []
        from lightning.pytorch.loggers import TensorBoardLogger

        return [TensorBoardLogger(run.path, name="tensorboard", version="")]
    return list(trainer.logger) if isinstance(trainer.logger, Iterable) else [trainer.logger]
