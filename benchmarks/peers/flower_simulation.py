"""The rounds in Flower's simulation: FedAvg over arrays of adapter and head, actors of one CPU."""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flower_client
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import Work, norm, write_result


class Watch:
    """Looks at the rounds from within the server app."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[list[float]] = []
        self.norms: list[float] = []

    def note_losses(self, replies: list[RecordDict], weighted_by: str) -> MetricRecord:
        """Called with what the clients sent."""
        found = [reply["metrics"] for reply in replies]
        self.losses.append([each["loss"] for each in sorted(found, key=lambda m: m["client"])])
        return MetricRecord({})

    def note_round(self, server_round: int, arrays: ArrayRecord) -> None:
        """Called before the first round and after each."""
        if server_round:
            self.seconds.append(time.perf_counter() - self.began)
            self.norms.append(norm(arrays.to_torch_state_dict()))
        self.began = time.perf_counter()


def server_app(options: argparse.Namespace, watch: Watch) -> ServerApp:
    """What averages."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _: Context) -> None:
        work = Work.read(options.work)
        count = len(work.task.weights)
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_train_nodes=count,
            min_available_nodes=count,
            train_metrics_aggr_fn=watch.note_losses,
        )
        config: dict[str, Any] = {
            "work": str(options.work.resolve()),
            "keep": not options.template,
            "threads": options.threads,
        }
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(dict(work.start)),
            num_rounds=options.rounds,
            train_config=ConfigRecord(config),
            evaluate_fn=watch.note_round,
        )

    return app


def main() -> None:
    """Play the rounds of a work folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--template", action="store_true", help="build the model in each call")
    options = parser.parse_args()
    watch = Watch()
    run_simulation(
        server_app(options, watch),
        flower_client.app,
        num_supernodes=len(Work.read(options.work).task.weights),
        backend_config={
            "init_args": {"num_cpus": options.actors * options.threads, "log_to_driver": False},
            "client_resources": {"num_cpus": options.threads, "num_gpus": 0.0},
        },
    )
    write_result(
        options.out,
        seconds=watch.seconds,
        losses=watch.losses,
        norms=watch.norms,
        version=version("flwr"),
    )


if __name__ == "__main__":
    main()
