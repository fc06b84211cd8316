"""One round after another: choose, play, average, evaluate, save."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from fedlora import artefacts, checkpoint, identity
from fedlora.callbacks.base import Row
from fedlora.cohort import Cohort, share_adapter
from fedlora.engines.evaluate import (
    ClientScore,
    evaluate_clients,
    evaluate_split,
    rows_in_turns,
    spread,
)
from fedlora.errors import CheckpointError
from fedlora.personal import Storage
from fedlora.run_folder import RunFolder
from fedlora.sampling import Absence, Plan, choose, plan
from fedlora.saves import Saves
from fedlora.state import Client, Round, ServerState

if TYPE_CHECKING:
    from fedlora.engines.sequential import SequentialEngine
    from fedlora.modules.metrics import Scores
    from fedlora.trainer import FederatedTrainer

TOO_FEW = "too few others"  # why a client that would have answered did not train


class Rounds:
    """Plays the rounds of a run.

    Args:
        trainer: settings, hooks and the server's state.
        run: the run folder.
        engine: plays the clients.
        clients: every client of the federation.
    """

    def __init__(
        self,
        trainer: FederatedTrainer,
        run: RunFolder,
        engine: SequentialEngine,
        clients: Sequence[Client],
    ) -> None:
        self.trainer = trainer
        self.engine = engine
        self.clients = clients
        self.rule = trainer.averaging.aggregator
        self.run = run
        self.world = engine.world
        self.cohort = Cohort(trainer, engine)
        self.identity = identity.of(trainer, engine, clients)
        self.saves = Saves(run, engine.store)

    def round(self, idx: int) -> Round:
        """What is known about a round beforehand."""
        count = len(self.clients)
        cohort = self.trainer.clients_per_round or count
        return Round(idx, self.trainer.seed, count, min(cohort, count))

    @property
    def personal(self) -> bool:
        """Whether each client has a model of its own."""
        return self.engine.personal(self.rule, self.round(0))

    @property
    def monitor(self) -> str:
        """The figure that says how good a round was, unless another is asked for."""
        return "clients/acc_mean" if self.personal else "val/acc"

    @property
    def keeps(self) -> int:
        """Bytes of what stays with a client, on disk; 0 where nothing does."""
        rnd = self.round(self.trainer.server.round_idx)
        rank = max(client.rank for client in self.clients)
        return self.engine.kept_nbytes(self.rule, rnd, rank)

    def storage(self) -> Storage:
        """What stays with the clients, in bytes on disk."""
        rnd = self.round(self.trainer.server.round_idx)
        return Storage(
            self.keeps,
            min(rnd.num_clients, rnd.cohort * self.trainer.max_rounds),
            rnd.cohort,
            shutil.disk_usage(self.run.path).free,
        )

    def prepare(self) -> None:
        """Let the rule make the adapter that a new run starts from."""
        lora, server = self.engine.lora, None
        if self.world.is_zero:
            server = self.rule.start(lora.state(), lora.base_weights(), self.round(0))
        server = share_adapter(self.world, server)
        lora.load(server)
        self.trainer.server = ServerState(server)

    def start(self) -> None:
        """Begin a new run: the untrained model is evaluated as row 0 and saved."""
        state = self.trainer.server
        values = self._evaluate(state, choose(self.clients, self.round(0)))
        values = {"round": 0, **values, **self.test().values}
        row = self.world.share(lambda: values)
        self._commit(replace(state, history=(row,)), row)

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: names everything that differs from what was saved.
        """
        changed = checkpoint.differences(saved.config, self.trainer.config)
        changed += checkpoint.differences(saved.identity, self.identity)
        if changed:
            raise CheckpointError(
                f"the run in {self.run.path} cannot go on with other settings: "
                f"{'; '.join(changed)}. Set them back, or start a new run."
            )
        self.rule.load_state_dict(saved.rule["state"])
        self.trainer.hooks.load_state_dict(dict(saved.callbacks))
        self.trainer.server = saved.server
        self.engine.lora.load(saved.server.adapter)
        if self.world.is_zero:
            self.saves.reopen()

    def play(self) -> None:
        """Play the next round; where it breaks off the model is as before it."""
        try:
            self._play()
        except BaseException:
            self.engine.lora.load(self.trainer.server.adapter)
            raise

    def _play(self) -> None:
        trainer, server = self.trainer, self.trainer.server
        began = time.perf_counter()
        rnd = self.round(server.round_idx)
        planned = plan(self.clients, rnd, trainer.sampling, self.engine.num_steps)
        if len(planned.players) < trainer.min_clients:
            planned = self._void(planned, rnd)
        trainer.call("on_train_epoch_start")
        trainer.call("on_round_start", rnd, planned.players)
        averaged = self.cohort.average(planned, rnd)
        adapter, report = averaged.adapter, averaged.report
        reached = [*planned.players, *(each.client for each in planned.absent if each.reached)]
        state = replace(
            server,
            adapter=adapter,
            round_idx=rnd.idx + 1,
            versions={**server.versions, **averaged.versions},
            received={**server.received, **{client.id: rnd.idx for client in reached}},
        )
        trainer.call("on_aggregate", server.adapter, adapter, report)
        due = state.round_idx % trainer.val_every_n_rounds == 0
        if due or state.round_idx == trainer.max_rounds:
            answered = set(averaged.answered)
            report |= self._evaluate(state, [c for c in planned.players if c.id in answered])
        row = self.world.share(lambda: {**report, "time/round_s": time.perf_counter() - began})
        self._commit(replace(state, history=(*server.history, row)), row)

    def _void(self, planned: Plan, rnd: Round) -> Plan:
        """A round in which too few will answer: nobody trains, since nothing would come of it."""
        self.trainer.progress.say(
            f"round {rnd.idx + 1} passes without effect: {len(planned.players)} clients would "
            f"answer, trainer.min_clients is {self.trainer.min_clients}."
        )
        left = tuple(Absence(client, TOO_FEW, True) for client in planned.players)
        return Plan((), {}, (*planned.absent, *left))

    def _evaluate(
        self, state: ServerState, participants: Sequence[Client]
    ) -> dict[str, float | None]:
        """Metrics of the server's validation split and of clients' own; on rank 0."""
        values = self._evaluate_split("val").values
        which = self.trainer.val_clients
        chosen = participants if which == "participants" else self.clients
        if isinstance(which, int):
            chosen = choose(self.clients, replace(self.round(0), cohort=which))
        data = self.engine.data
        busy = rows_in_turns(len(data.holdings.division.val), data.eval_batch_size, self.world)
        scores = self.evaluate_clients(chosen, state, busy=busy)
        return {**values, **spread(scores, "clients/")}

    def evaluate_clients(
        self,
        clients: Sequence[Client],
        state: ServerState,
        split: Literal["val", "test"] = "val",
        busy: Sequence[int] = (),
    ) -> dict[int, ClientScore]:
        """How each client does on its own rows, with the model that it uses; on rank 0."""
        rnd = self.round(state.round_idx)
        return evaluate_clients(self.engine, clients, rnd, state, self.rule, split, busy)

    def test(self, per_class: bool = False) -> Scores:
        """Metrics of the test split of the model as it is loaded; on rank 0."""
        return self._evaluate_split("test", per_class)

    def _evaluate_split(self, split: Literal["val", "test"], per_class: bool = False) -> Scores:
        loop, data = self.engine.loop, self.engine.data
        return evaluate_split(loop.fabric, loop.module, data, split, per_class, self.world)

    def _commit(self, state: ServerState, row: Row) -> None:
        """Let callbacks judge the row, save, and tell everyone that the round is over."""
        trainer = self.trainer
        trainer.server = state
        trainer.callback_metrics = {
            name: torch.tensor(float(value)) for name, value in row.items() if value is not None
        }
        if state.round_idx and "val/loss" in row:
            trainer.call("on_validation_end")
        if state.round_idx:
            trainer.call("on_train_epoch_end")
        trainer.call("on_round_evaluated", row)
        trainer.should_stop = self.world.any(trainer.should_stop)
        if trainer.should_stop:
            trainer.server = replace(state, finished="a callback asked to stop")
        self._save()
        self._derive(row)

    def mend(self) -> None:
        """Mend what a kill may have left behind the checkpoint: all else is derived from it."""
        self._derive(self.trainer.server.history[-1])

    def _derive(self, row: Row) -> None:
        if self.world.is_zero:
            artefacts.export(self, self.run.adapter, self.trainer.server.adapter)
        self.trainer.call("on_round_end", row)
        if self.world.is_zero:
            self.saves.prune()

    def _save(self) -> None:
        trainer = self.trainer
        if not self.world.is_zero:
            return
        rule = {"class_path": identity.class_path(self.rule), "state": self.rule.state_dict()}
        self.saves.write(
            checkpoint.Checkpoint(
                trainer.server, rule, trainer.hooks.state_dict(), self.identity, trainer.config
            )
        )
