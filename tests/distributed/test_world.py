from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from fedlora.distributed import world as module
from fedlora.distributed.launch import ClientParallelStrategy, explained
from fedlora.distributed.world import AHEAD, MOST, World
from fedlora.errors import ElsewhereError, FedloraError, LostError
from tests.processes import in_processes


def launched() -> tuple[Fabric, World]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=ClientParallelStrategy("gloo", 20.0))
    fabric.launch(lambda _: None)
    return fabric, World.of(fabric)


def test_one_process_needs_no_messages() -> None:
    world = World()
    assert world.share(lambda: {1, 2}) == {1, 2}  # nothing is encoded
    assert world.any(True)
    assert not world.any(False)
    total = torch.ones(2)
    world.add_up(total)
    assert total.tolist() == [1, 1]
    done: list[int] = []
    results = world.in_order([0, 0], lambda number: done.append(number) or number)
    assert next(results) == 0
    assert done == [0]  # one at a time, when it is asked for
    assert list(results) == [1]


def exchange(folder: Path) -> None:
    _, world = launched()
    found: dict[str, Any] = {
        "size": world.size,
        "shared": world.share(lambda: [os.getpid(), world.rank]),
        "any": [world.any(world.rank == 1), world.any(False)],
    }
    tensor = torch.tensor([1.0 + world.rank])
    world.add_up(tensor)
    found["sum"] = tensor.item()
    done: list[int] = []

    def compute(number: int) -> tuple[int, torch.Tensor]:
        done.append(number)
        return number, torch.full((1000,), number)

    # Rank 0 waits for nobody before it has done AHEAD of its own, which come last here.
    owners = [1, 1, 0, 1, *[0] * (AHEAD + 5), 1]
    order = []
    for number, tensor in world.in_order(
        owners, compute, lambda result: result, lambda _, plain: (plain[0], plain[1])
    ):
        order.append(number)
        assert (tensor == number).all()
        if len(order) == 1:
            found["before the first"] = len(done)
    found |= {"order": order, "done": sorted(done)}
    slow: list[int] = []
    world.once("something", lambda: (time.sleep(0.5), slow.append(1)))
    found["slow"] = slow
    world.once("something", lambda: None)
    world.any(False)  # all are here
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    assert in_processes(exchange, tmp_path) == [0, 0]
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert zero["shared"] == one["shared"]
    assert zero["shared"][1] == 0
    for each in (zero, one):
        assert (each["size"], each["any"], each["sum"]) == (2, [True, False], 3.0)
    assert zero["order"] == list(range(AHEAD + 10))
    assert one["order"] == []
    assert one["done"] == [0, 1, 3, AHEAD + 9]
    assert sorted(zero["done"] + one["done"]) == list(range(AHEAD + 10))
    assert zero["before the first"] == AHEAD
    assert (zero["slow"], one["slow"]) == ([1], [])


def in_bunches(folder: Path) -> None:
    """Three results are over at a time, and travel together."""
    _, world = launched()
    done: list[int] = []

    def compute(number: int) -> int:
        done.append(number)
        return number

    encode = vars(module)["encode"]
    messages: list[int] = []
    vars(module)["encode"] = lambda bunch: messages.append(len(bunch)) or encode(bunch)
    owners = [1, 0, 1, 1, 0, 1, 1, 1, 1, 0]
    found = list(
        world.in_order(
            owners, compute, ready=lambda: -len(done) % 3, nbytes=lambda _: 0, ahead=len(owners)
        )
    )
    world.any(False)
    (folder / f"{world.rank}.json").write_text(json.dumps([found, messages]))


def test_what_is_over_together_travels_together(tmp_path: Path) -> None:
    assert in_processes(in_bunches, tmp_path) == [0, 0]
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert zero[0] == list(range(10))
    assert one == [[], [3, 3, 1]]


def heavy(folder: Path) -> None:
    _, world = launched()
    done: list[int] = []

    def compute(number: int) -> torch.Tensor:
        done.append(number)
        return torch.zeros(MOST // 2 + 1, dtype=torch.uint8)

    for _ in world.in_order([1, 0, 0, 0, 0], compute, len, lambda _, n: n, lambda t: t.nbytes):
        (folder / "first").write_text(str(len(done)))
        os._exit(0)


def test_large_results_are_not_hoarded(tmp_path: Path) -> None:
    in_processes(heavy, tmp_path)
    assert (tmp_path / "first").read_text() == "2"


def again(folder: Path, size: int) -> None:
    _, world = launched()
    if size == 2:
        world.report(KeyError("x"))
        world.any(False)  # all are here
    fabric = Fabric(accelerator="cpu", devices=size, strategy=ClientParallelStrategy("gloo", 5.0))
    try:
        fabric.launch(lambda _: None)
    except FedloraError as error:
        (folder / os.environ["LOCAL_RANK"]).write_text(str(error))
    world.any(False)  # rank 0 keeps what was said until all have read it


@pytest.mark.parametrize(
    ("size", "said"), [(3, "runs on 2 processes already"), (2, "failed in this")]
)
def test_a_program_has_one_world(tmp_path: Path, size: int, said: str) -> None:
    in_processes(again, tmp_path, size)
    assert all(said in (tmp_path / rank).read_text() for rank in "01")


def fails(folder: Path, how: str) -> None:
    fabric, world = launched()

    def compute(number: int) -> int:
        if world.rank == 1:
            if how == "dies":
                os.kill(os.getpid(), 9)
            if how == "hangs":
                time.sleep(60)
            raise KeyError("lost")
        return number

    try:
        list(world.in_order([0, 1, 0], compute))
    except Exception as error:
        said = explained(error, world, fabric)
        (folder / f"{world.rank}").write_text(f"{type(said).__name__}: {said}")
    os._exit(0)


@pytest.mark.parametrize(
    ("how", "zero"),
    [
        ("raises", "FedloraError: rank 1: KeyError: 'lost'"),
        ("dies", "LostError: another process of the run is gone. Go on with fit --ckpt_path last."),
    ],
)
def test_one_that_fails_ends_the_other(tmp_path: Path, how: str, zero: str) -> None:
    in_processes(fails, tmp_path, how, within=60)
    assert (tmp_path / "0").read_text() == zero
    if how == "raises":
        assert (tmp_path / "1").read_text() == "ElsewhereError: rank 1: KeyError: 'lost'"


def waits(folder: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=ClientParallelStrategy("gloo", 1.0))
    fabric.launch(lambda _: None)
    world = World.of(fabric)
    if world.rank == 1:
        time.sleep(3)
        os._exit(0)
    try:
        world.share(lambda: None)
        world.any(True)
    except LostError as error:
        (folder / "said").write_text(str(error))


def test_one_that_hangs_is_not_waited_for_longer_than_the_timeout(tmp_path: Path) -> None:
    in_processes(waits, tmp_path)
    assert "did not answer in time (trainer.timeout)" in (tmp_path / "said").read_text()


def test_nobody_to_tell() -> None:
    assert World().last_words() is None
    assert World(1, 2).report(ValueError("x")) is None
    assert not issubclass(LostError, ElsewhereError)
