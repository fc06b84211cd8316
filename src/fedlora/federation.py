"""The clients of a run, what they cannot be or do, and what plays them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fedlora.callbacks.objective import Setting, check_objectives
from fedlora.checkpoint import differences
from fedlora.distributed.world import World
from fedlora.engines.lane import Lane
from fedlora.engines.local import LocalLoop, NonFiniteError
from fedlora.engines.parallel import ClientParallelEngine
from fedlora.engines.seats import make_stack
from fedlora.engines.sequential import SequentialEngine
from fedlora.errors import CheckpointError, FedloraError, LostError
from fedlora.personal import ClientStore
from fedlora.ranks import assign_ranks
from fedlora.rounds import Rounds
from fedlora.run_folder import RunFolder
from fedlora.sampling import Absence
from fedlora.state import Client, Round

if TYPE_CHECKING:
    from fedlora.trainer import FederatedTrainer


def make_clients(trainer: FederatedTrainer) -> list[Client]:
    """Every client with its rank.

    Called before there is a run folder.

    Raises:
        FedloraError: for more clients a round than there are, ranks that cannot be, and objectives
            that do not fit the rest.
    """
    clients = trainer.datamodule.clients()
    _check_counts(trainer, len(clients))
    model, rule = trainer.lightning_module, trainer.averaging.aggregator
    given = assign_ranks(
        clients,
        trainer.client_ranks,
        model.lora_config,
        rule,
        trainer.seed,
        trainer.client_alpha,
    )
    cohort = min(trainer.clients_per_round or len(given), len(given))
    setting = Setting(
        rule,
        Round(0, trainer.seed, len(given), cohort),
        given,
        model.lora_config.r,
        model.configure_optimizers(),
        trainer.gradient_clip_val,
        trainer.averaging.precision,
    )
    check_objectives(trainer.objectives, setting)
    return given


def _check_counts(trainer: FederatedTrainer, count: int) -> None:
    asked = trainer.clients_per_round
    if asked is not None and asked > count:
        raise FedloraError(
            f"trainer.clients_per_round must be between 1 and {count} (the number of clients), got "
            f"{asked}. Lower it or raise data.num_clients."
        )
    if trainer.min_clients > (asked or count):
        raise FedloraError(
            f"trainer.min_clients must be at most {asked or count}, the clients of a round, got "
            f"{trainer.min_clients}. Lower it."
        )


def make_rounds(trainer: FederatedTrainer, run: RunFolder, clients: list[Client]) -> Rounds:
    """What plays the rounds of a run, alike in every process.

    Raises:
        FedloraError: where a process has other data or another model than rank 0.
    """

    def on_start(client: Client) -> None:
        trainer.call("on_client_start", client)

    def on_batch(lane: Lane, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        trainer.lane = lane
        trainer.call("on_train_batch_end", outputs, batch, lane.step)

    def leaves_out(error: Exception) -> bool:
        if isinstance(error, NonFiniteError):
            return trainer.on_nonfinite == "skip"
        # No fault of the client: what was kept for it cannot be read, another process is gone.
        of_others = isinstance(error, CheckpointError | LostError)
        return trainer.on_client_error == "skip" and not of_others

    def on_absent(absence: Absence, nbytes: int, error: Exception | None) -> None:
        trainer.rounds.cohort.miss(absence, nbytes, error)

    rows = trainer.world.size > 1 and trainer.spread == "ddp"
    loop = LocalLoop(
        trainer.fabric,
        trainer.lightning_module,
        epochs=trainer.local_epochs,
        steps=trainer.local_steps,
        clip=trainer.gradient_clip_val,
        accumulate=trainer.accumulate_grad_batches,
        limit_batches=trainer.limit_train_batches,
        lr_factor=lambda idx: trainer.round_lr.factor(idx, trainer.max_rounds),
        on_batch=on_batch,
        rows_over=trainer.world if rows else None,
        stack=make_stack(trainer, clients),
    )
    # Where all train the same client, one of them writes what stays with it.
    store = ClientStore(run.clients, writes=not rows or trainer.world.is_zero)
    engine = (SequentialEngine if rows else ClientParallelEngine)(
        loop,
        trainer.datamodule,
        store,
        trainer.objectives,
        on_start,
        on_absent,
        leaves_out,
        trainer.world,
    )
    rounds = Rounds(trainer, run, engine, clients)
    _check_alike(trainer.world, rounds)
    return rounds


def _check_alike(world: World, rounds: Rounds) -> None:
    """Refuse processes that see other pictures or another model than rank 0."""
    of_zero = world.share(lambda: rounds.identity)
    if found := differences(of_zero, rounds.identity):
        raise FedloraError(
            f"rank {world.rank} has other data or another model than rank 0: {'; '.join(found)}. "
            "Put the same files on every machine."
        )
