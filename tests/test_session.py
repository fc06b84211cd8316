from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fedlora import federation, session
from fedlora.checkpoint import Checkpoint, load, save
from fedlora.distributed.world import World
from fedlora.errors import FedloraError
from fedlora.run_folder import RunFolder
from fedlora.state import AdapterState, ServerState


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.unlink()  # another name of it stays whole
    path.write_bytes(content)


@pytest.fixture
def run(tmp_path):
    """A run of two rounds."""
    folder = RunFolder.create(tmp_path)
    for round_idx in (0, 1, 2):
        save(folder.checkpoint("last"), Checkpoint(ServerState(AdapterState(), round_idx)))
    return folder


def reopen(run):
    said: list[str] = []
    progress = SimpleNamespace(say=said.append)
    trainer = SimpleNamespace(
        default_root_dir=run.path.parent, progress=progress, run=None, world=World()
    )
    opened, saved = session._open(trainer, str(run.path))
    opened.unlock()
    return saved.server.round_idx, said


def test_the_last_checkpoint_is_gone_on_from(run):
    assert reopen(run) == (2, [])


def test_a_damaged_one_is_replaced_by_the_one_before(run):
    # Left in place, the next save would keep the damaged file as the previous one: for a moment
    # there would be no whole checkpoint at all.
    last, previous = run.checkpoint("last"), run.checkpoint("previous")
    spoil(last)
    round_idx, [said] = reopen(run)
    assert round_idx == 1
    assert f"{last} is damaged" in said
    assert load(last).server.round_idx == load(previous).server.round_idx == 1
    save(last, Checkpoint(ServerState(AdapterState(), 2)))
    assert load(previous).server.round_idx == 1
    assert sorted(p.name for p in last.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


class Elsewhere(World):
    """Rank 1 of two, who is told what rank 0 has."""

    def __init__(self, of_zero: object = None, others: bool = False) -> None:
        super().__init__(1, 2)
        self.of_zero, self.others = of_zero, others

    def share(self, make):
        return self.of_zero

    def any(self, flag):
        return flag or self.others


def test_a_process_with_other_data_is_refused():
    identity = {"seed": 1, "pictures_sha256": "a", "class_names": ["x", "y"]}
    rounds = SimpleNamespace(identity=identity)
    federation._check_alike(Elsewhere(dict(identity)), rounds)
    with pytest.raises(FedloraError, match=r"rank 1 has other data .* class_names: .*'z'"):
        federation._check_alike(Elsewhere(identity | {"class_names": ["x", "z"]}), rounds)


def test_a_run_folder_that_not_all_see_matters_where_clients_keep_something(run, tmp_path):
    here, gone = run, RunFolder(tmp_path / "none")
    session._check_folder(Elsewhere(), SimpleNamespace(run=here, keeps=9))
    session._check_folder(Elsewhere(others=True), SimpleNamespace(run=gone, keeps=0))
    for folder, others in ((gone, False), (here, True)):
        with pytest.raises(FedloraError, match=r"not every machine sees .* shared disk"):
            session._check_folder(Elsewhere(others=others), SimpleNamespace(run=folder, keeps=9))
