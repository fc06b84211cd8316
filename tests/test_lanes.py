"""One client at a time or several at once: the same numbers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr_datasets.partitioner import IidPartitioner
from torch import Tensor

from fedlora import (
    SCAFFOLD,
    AdapterAveraging,
    CLIPLoRAClassifier,
    Ditto,
    FedloraError,
    FedProx,
    LoRAConfig,
)
from fedlora.aggregation import FedExLoRA, FedSALoRA, FlexLoRA, FLoRA, FRLoRA, RoLoRA
from fedlora.callbacks.base import FederatedCallback
from fedlora.callbacks.objective import Objective
from fedlora.checkpoint import load
from fedlora.engines.lane import Lane
from fedlora.state import Client
from tests.runs import (
    QUICK,
    KillAtClient,
    Killed,
    assert_same_bits,
    fingerprint,
    fit,
    make_data,
    make_trainer,
    rows,
)

SGD = {"optimizer": partial(torch.optim.SGD, lr=0.3)}


def lora(**settings: Any) -> dict[str, Any]:
    return {"lora": LoRAConfig(**({"r": 4, "lora_alpha": 8, "lora_dropout": 0.2} | settings))}


def unequal() -> dict[str, Any]:
    """Four clients with unequal rows: other numbers of steps, and last batches of other sizes."""
    return QUICK | {"num_clients": 4, "n_shots": 4, "batch_size": 9}


def settings(name: str) -> dict[str, Any]:
    """One of many; each fit has objects of its own."""
    both = {"head": "text", "towers": "both"}
    mixed = {"client_ranks": [1, 4, 2, 4], "model": lora()}
    bf16 = partial(AdapterAveraging, precision="bf16-mixed", gradient_checkpointing=True)
    scenarios: dict[str, dict[str, Any]] = {
        "dropout, clipped, accumulated": {
            "model": lora(),
            "gradient_clip_val": 0.3,
            "accumulate_grad_batches": 2,
            "local_epochs": 2,
        },
        "text tower": {"model": lora() | both, "max_rounds": 1},
        "biases and norms": {"model": lora(bias="all", train_norm=True)},
        "adapted head": {"model": lora(target_components=["encoder", "classifier"])},
        "FedExLoRA": {"rule": FedExLoRA(), "model": lora()},
        "FLoRA, mixed ranks": {"rule": FLoRA()} | mixed,
        "FRLoRA": {"rule": FRLoRA(), "model": lora(lora_dropout=0.0)},
        "FlexLoRA, fixed alpha": {"rule": FlexLoRA(), "client_alpha": "fixed"} | mixed,
        "RoLoRA": {"rule": RoLoRA(), "model": lora()},
        "FedSALoRA": {"rule": FedSALoRA(), "clients_per_round": 3},
        "SCAFFOLD": {"callbacks": [SCAFFOLD()], "model": SGD},
        "FedProx": {"callbacks": [FedProx(1.0)], "model": lora()},
        "Ditto": {"callbacks": [Ditto()], "clients_per_round": 3},
        # A scale that is no power of two, by which 16 bits would be rounded elsewhere.
        "bf16": {"averaging": bf16(), "model": lora(lora_alpha=6), "max_rounds": 1},
        "bf16 base": {
            "averaging": bf16(FedExLoRA(), base_dtype="bfloat16"),
            "model": lora(),
        },
    }
    return {"limit_train_batches": None, "max_rounds": 2, "data": unequal()} | scenarios[name]


NAMES = [
    "dropout, clipped, accumulated",
    "text tower",
    "biases and norms",
    "adapted head",
    "FedExLoRA",
    "FLoRA, mixed ranks",
    "FRLoRA",
    "FlexLoRA, fixed alpha",
    "RoLoRA",
    "FedSALoRA",
    "SCAFFOLD",
    "FedProx",
    "Ditto",
    "bf16",
    "bf16 base",
]


class Shares(FederatedCallback):
    """How many clients shared each pass of the model."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def note(module: Any, *args: Any) -> None:
            lanes = module.lanes
            if module.training and torch.is_grad_enabled():
                self.seen.append(1 if lanes is None else len(lanes.rows))

        self.handle = pl_module.model.register_forward_pre_hook(note)


@pytest.mark.parametrize("name", NAMES)
def test_three_at_once_are_one_at_a_time_to_the_bit(tmp_path: Path, name: str) -> None:
    found, shares = [], Shares()
    for lanes in (1, 3):
        chosen = settings(name)
        callbacks = [*chosen.pop("callbacks", []), *([shares] if lanes == 3 else [])]
        trainer = fit(tmp_path / str(lanes), lanes=lanes, callbacks=callbacks, **chosen)
        found.append(fingerprint(trainer.run.path))
    assert_same_bits(*found)
    # Full at first; at the end of a round those with more steps go on without the others.
    assert shares.seen[0] == 3
    assert set(shares.seen) == {1, 2, 3}


class Told(Objective):
    """Sends what a client starts from, as one number."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def download(self, client: Client, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"sum": torch.stack([t.detach().double().sum() for t in shared.values()]).sum()}

    def on_lane_start(self, lane: Lane) -> None:
        self.seen.append((lane.client.id, float(lane.received["sum"])))


def test_an_objective_is_told_what_each_client_starts_from(tmp_path: Path) -> None:
    found = []
    for lanes in (1, 3):
        told = Told()
        fit(tmp_path / str(lanes), lanes=lanes, callbacks=[told], **settings("FLoRA, mixed ranks"))
        found.append(sorted(told.seen))
    assert found[0] == found[1]
    assert len(set(found[0])) == 8  # two rounds of four clients, of whom each has its own


def test_two_threads_agree_to_rounding(tmp_path: Path) -> None:
    """An epoch of all clients, where threads may cut products of other sizes elsewhere."""
    adapters = []
    chosen = settings("dropout, clipped, accumulated") | {"max_rounds": 1, "threads": 2}
    for lanes in (1, 4):
        run = fit(tmp_path / str(lanes), lanes=lanes, **chosen).run
        adapters.append(dict(load(run.checkpoint("last")).server.adapter.tensors()))
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], rtol=0, atol=1e-4), name


class OwnOptimizer(CLIPLoRAClassifier):
    """A class of the user's that makes its optimizer as Lightning has it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.optimizer_groups(), lr=0.01)


def test_an_optimizer_of_ones_own_knows_one_client(tmp_path: Path) -> None:
    def played(**chosen: Any) -> Any:
        trainer = make_trainer(tmp_path, max_rounds=1, **chosen)
        trainer.fit(OwnOptimizer(lora=LoRAConfig(r=4)), make_data())
        return trainer.rounds.engine.loop.stack

    with pytest.raises(FedloraError, match=r"OwnOptimizer has a configure_optimizers\(\) of its"):
        played(lanes=2)
    assert played(lanes="auto") is None


class Fails(FederatedCallback):
    """A client whose batches cannot be worked on."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.lane.client.id == 1:
            raise KeyError("lost")


def test_an_error_in_a_shared_step_is_its_clients_alone(tmp_path: Path) -> None:
    found = []
    for lanes in (1, 3):
        run = fit(
            tmp_path / str(lanes),
            lanes=lanes,
            callbacks=[Fails()],
            on_client_error="skip",
            **settings("FedSALoRA"),
        ).run
        found.append(fingerprint(run.path))
        said = {row["id"]: row["status"] for row in rows(run.clients_csv)}
        assert said["1"] == "error: KeyError: 'lost'"
        assert set(said.values()) == {"answered", said["1"]}
    assert_same_bits(*found)
    with pytest.raises(KeyError, match="lost"):
        fit(tmp_path / "stop", lanes=3, callbacks=[Fails()], **settings("FedSALoRA"))


class Looks(Fails):
    """Whether what was computed before an error is still there when its clients play again."""

    losses: Any = None
    gone: list[bool]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        if self.losses is not None:
            self.gone = [*getattr(self, "gone", []), self.losses() is None]
        if trainer.lane.client.id == 1:
            self.losses = weakref.ref(outputs["losses"])
        super().on_train_batch_end(trainer)


def test_after_an_error_its_activations_are_gone(tmp_path: Path) -> None:
    """They take what may have been the reason: memory."""
    looks = Looks()
    chosen = settings("FedSALoRA") | {"clients_per_round": None, "max_rounds": 1}
    fit(tmp_path, lanes=3, callbacks=[looks], on_client_error="skip", **chosen)
    assert all(looks.gone)


class Diverges(FederatedCallback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.lane.client.id == 1:
            with torch.no_grad():
                next(iter(trainer.lane.parameters.values())).fill_(torch.inf)


def test_one_that_diverges_leaves_the_others_alone(tmp_path: Path) -> None:
    found = []
    for lanes in (1, 3):
        chosen = settings("dropout, clipped, accumulated") | {"max_rounds": 1}
        extra = {"on_nonfinite": "skip", "callbacks": [Diverges()], "lanes": lanes}
        run = fit(tmp_path / str(lanes), **chosen, **extra).run
        found.append(fingerprint(run.path))
        assert [row["status"] for row in rows(run.clients_csv)].count("not finite") == 1
    assert_same_bits(*found)


def test_killed_and_resumed_with_other_lanes(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", lanes=2, **settings("FedSALoRA")).run
    with pytest.raises(Killed):
        fit(tmp_path / "cut", lanes=3, callbacks=[KillAtClient(5)], **settings("FedSALoRA"))
    again = fit(tmp_path / "cut", lanes=1, ckpt_path="last", **settings("FedSALoRA")).run
    assert_same_bits(fingerprint(whole.path), fingerprint(again.path))


def test_what_cannot_be_shared_is_said(tmp_path: Path) -> None:
    full: dict[str, Any] = {"model": {"lora": LoRAConfig(enabled=False)}, "max_rounds": 1}
    with pytest.raises(FedloraError, match=r"lanes must be 1 here: without LoRA .*nothing frozen"):
        fit(tmp_path, lanes=2, **full)
    assert fit(tmp_path, lanes="auto", **full).rounds.engine.loop.stack is None
    with pytest.raises(FedloraError, match=r"trainer\.lanes must be at least 1 or auto, got 0"):
        fit(tmp_path, lanes=0)


def test_auto_fills_a_pass_and_no_more(tmp_path: Path) -> None:
    def seats(batch_size: int, clients: int = 12, **chosen: Any) -> int:
        data = QUICK | {"batch_size": batch_size, "num_clients": clients}
        data["partitioner"] = IidPartitioner(clients)
        trainer = fit(tmp_path, lanes="auto", data=data, max_rounds=1, local_steps=1, **chosen)
        stack = trainer.rounds.engine.loop.stack
        return 1 if stack is None else stack.seats

    small, large = seats(16), seats(32)
    assert small > large > 1
    assert seats(16) == small  # a function of the model and the batch, not of the moment
    assert seats(1024, clients=2) == 1
    assert seats(1024, clients=40) > 1  # no client has as many rows
    assert seats(16, clients_per_round=2) == 2  # there are no more
