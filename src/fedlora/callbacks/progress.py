"""What a user sees of a run: a table, a live display or plain lines, a summary."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from fedlora.callbacks import tables
from fedlora.callbacks.base import FederatedCallback, Row
from fedlora.modules.report import readable
from fedlora.state import Client

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

    from fedlora.engines.lane import Lane
    from fedlora.rounds import Rounds
    from fedlora.run_folder import RunFolder
    from fedlora.sampling import Absence
    from fedlora.state import ClientUpdate, Round
    from fedlora.trainer import FederatedTrainer

ProgressMode = Literal["auto", "rich", "plain", "off"]
log = logging.getLogger("fedlora")
LINE_S = 10.0
REFRESH_S = 0.25  # reading a loss waits for the device, so the display looks at it rarely


class Progress(FederatedCallback):
    """Shows a run.

    Args:
        mode: ``rich`` (a live display), ``plain`` (a line a round), ``off``, or ``auto``: ``rich``
            on a terminal and ``plain`` elsewhere.
    """

    def __init__(self, mode: ProgressMode = "auto") -> None:
        self.mode: ProgressMode = mode
        self._console: Console | None = None
        self._bar: RichProgress | None = None
        self._tasks: dict[str, Any] = {}
        self._played = 0
        self._began = 0.0
        self._shown = 0.0

    @property
    def console(self) -> Console:
        """Where it is shown."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(highlight=False, soft_wrap=True)
        return self._console

    @property
    def live(self) -> bool:
        """Whether there is a live display."""
        return self.mode == "rich" or (self.mode == "auto" and self.console.is_terminal)

    def say(self, text: str) -> None:
        """One line, in the log too."""
        log.info(text)
        if self.mode != "off":
            self.console.print(text, markup=False)

    def say_left_out(self, absence: Absence, error: Exception) -> None:
        """A client that an error left out; where it came from is in the log only."""
        if absence.reason == "not finite":
            self.say(f"left out of the round: {error}")
            return
        self.say(f"left out of the round: {absence.client}, {absence.reason}")
        # As text: a record that holds the error would hold its frames, with batch and graph.
        log.info("%s", "".join(traceback.format_exception(error)).rstrip())

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of its own, for work before the rounds; a line now and then where there is none.

        Gives a function to call with the number of further steps done.
        """
        if not self.live:
            yield self._lines(what, total)
            return
        from rich import progress

        with progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
        ) as bar:
            task = bar.add_task(what, total=total)
            yield lambda steps: bar.advance(task, steps)

    def _lines(self, what: str, total: int) -> Callable[[int], None]:
        done, said = 0, time.perf_counter()

        def advance(steps: int) -> None:
            nonlocal done, said
            done += steps
            if time.perf_counter() - said > LINE_S:
                said = time.perf_counter()
                self.say(f"{what}: {done:,} of {total:,}")

        return advance

    def table(self, values: Mapping[str, Any], title: str = "") -> None:
        """Names and values in two columns."""
        for name, value in values.items():
            log.info("%s: %s", name, value)
        if self.mode == "off":
            return
        from rich.table import Table

        table = Table(title=title or None, show_header=False, title_justify="left")
        for name, value in values.items():
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
        self.console.print(table)

    def describe(self, trainer: FederatedTrainer, rounds: Rounds) -> None:
        """The table at the start: what is trained, what travels, who holds what."""
        stays = rounds.storage()
        self.table(tables.at_start(trainer, rounds, stays), title="fedlora")
        if stays.lacking:
            self.say(
                f"there may be too little room for what stays with the clients: "
                f"{readable(stays.free)} are free."
            )

    def conclude(self, summary: Mapping[str, Any], run: RunFolder, personal: int) -> None:
        """The summary at the end and where things are."""
        self.table(tables.at_end(summary, run, personal), title="done")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the live display."""
        self._began, self._played = time.perf_counter(), 0
        if self.live:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[note]}"),
                progress.TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            done = trainer.server.round_idx
            self._tasks = {
                "round": self._bar.add_task(
                    "rounds", total=trainer.max_rounds, completed=done, note=""
                ),
                "client": self._bar.add_task("clients", total=1, note=""),
                "step": self._bar.add_task("steps", total=1, note=""),
            }
            self._bar.start()

    def on_round_start(
        self, trainer: FederatedTrainer, pl_module: Any, rnd: Round, clients: Sequence[Client]
    ) -> None:
        """Count the round's clients from 0."""
        self._played += 1
        if self._bar:
            self._bar.reset(self._tasks["client"], total=len(clients), note="")
            self._bar.reset(self._tasks["step"], total=0, note="")

    def on_client_start(self, trainer: FederatedTrainer, pl_module: Any, client: Client) -> None:
        """Count the client's steps from 0, or with those of the others that share them."""
        if self._bar:
            task, total = self._tasks["step"], trainer.num_batches(client)
            if trainer.rounds.engine.loop.stack is None:
                self._bar.reset(task, total=total, note=str(client))
            else:
                self._bar.update(task, total=(self._bar.tasks[task].total or 0) + total)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on by a batch; look at the loss now and then."""
        if self._bar is None:
            return
        self._bar.advance(self._tasks["step"])
        lane: Lane = trainer.lane
        if time.perf_counter() - self._shown > REFRESH_S:
            self._shown = time.perf_counter()
            figures = lane.metrics()
            note = f"{lane.client}: loss {figures['loss']:.3f}, acc {figures['acc']:.3f}"
            self._bar.update(self._tasks["step"], note=note)

    def on_client_end(self, trainer: Any, pl_module: Any, update: ClientUpdate) -> None:
        """Move on by a client."""
        if self._bar:
            self._bar.advance(self._tasks["client"])

    def on_round_end(self, trainer: FederatedTrainer, pl_module: Any, row: Row) -> None:
        """A line with the round's figures and the time left."""
        done = int(row["round"] or 0)
        parts = [f"round {done}/{trainer.max_rounds}"]
        answered, wanted = row.get("clients/answered"), trainer.rounds.round(done).cohort
        if answered is not None and answered < wanted:
            parts.append(f"{answered:.0f} of {wanted} clients answered")
        for name, label in (
            ("train/loss", "train loss"),
            ("val/loss", "val loss"),
            ("val/acc", "val acc"),
            ("clients/acc_mean", "clients' acc"),
            ("test/acc", "test acc"),
            ("agg/error", "agg error"),
            ("agg/effective_rank", "rank"),
            ("clients/drift_max", "drift"),
        ):
            if row.get(name) is not None:
                parts.append(f"{label} {row[name]:.4f}")
        if done == 0:
            started = getattr(pl_module, "adapter", None)
            parts.append(f"(as {started} has it)" if started else "(untrained: zero-shot)")
        elif self._played:
            each = (time.perf_counter() - self._began) / self._played
            parts.append(
                f"{row['time/round_s']:.1f} s, {each * (trainer.max_rounds - done):.0f} s left"
            )
        self.say("  ".join(parts))
        if self._bar:
            self._bar.update(self._tasks["round"], completed=done)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the live display."""
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the live display."""
        self.close()

    def close(self) -> None:
        """Close the live display."""
        if self._bar:
            self._bar.stop()
            self._bar = None
