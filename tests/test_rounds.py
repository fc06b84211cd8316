from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from fedlora import artefacts
from fedlora.checkpoint import Checkpoint, load, save
from fedlora.distributed.world import World
from fedlora.errors import CheckpointError
from fedlora.personal import ClientStore, Kept
from fedlora.rounds import Rounds
from fedlora.run_folder import RunFolder
from fedlora.saves import Saves
from fedlora.state import AdapterState, ServerState

NAMES = ("last", "previous", "best")


@pytest.fixture
def run(tmp_path):
    """A run of three rounds of two clients that keep something; best was round 1."""
    folder = RunFolder.create(tmp_path)
    store = ClientStore(folder.clients)
    for round_idx in (1, 2, 3):
        for client in (0, 1):
            kept = Kept(AdapterState(B={"x": torch.full((2, 1), round_idx)}))
            store.write(client, round_idx, kept)
        versions = {0: round_idx, 1: round_idx}
        server = ServerState(AdapterState(), round_idx, versions, history=({"round": round_idx},))
        for name in ("last", "best") if round_idx == 1 else ("last",):
            save(folder.checkpoint(name), Checkpoint(server, rule={"state": {}}))
    return folder


@pytest.fixture
def rounds(run, monkeypatch):
    """The rounds of that run, without a model."""
    monkeypatch.setattr(artefacts, "export", lambda *_: None)
    rounds = object.__new__(Rounds)
    rounds.run, rounds.rule, rounds.identity = run, MagicMock(), {}
    rounds.trainer = MagicMock(config=None)
    rounds.engine = SimpleNamespace(store=ClientStore(run.clients), lora=MagicMock())
    rounds.saves, rounds.world = Saves(run, rounds.engine.store), World()
    return rounds


def kept(run):
    return sorted({int(path.stem) for path in run.clients.glob("*/*")})


def test_a_resume_keeps_what_each_checkpoint_names(run, rounds):
    rounds.resume(load(run.checkpoint("last")))
    rounds.mend()
    for name in NAMES:
        versions = load(run.checkpoint(name)).server.versions
        for client, version in versions.items():
            state = rounds.engine.store.read(client, versions)
            assert state.adapter.B["x"].tolist() == [[version], [version]]
    assert kept(run) == [1, 2, 3]


def test_a_resume_deletes_what_a_kill_left(run, rounds):
    rounds.engine.store.write(0, 4, Kept(AdapterState(B={"x": torch.zeros(2, 1)})))
    rounds.resume(load(run.checkpoint("last")))
    assert kept(run) == [1, 2, 3]


@pytest.mark.parametrize(("name", "left"), [("previous", [1, 3]), ("best", [2, 3])])
def test_damage_elsewhere_does_not_stop_a_run(run, rounds, name, left):
    run.checkpoint(name).write_bytes(b"nothing")
    rounds.resume(load(run.checkpoint("last")))
    assert kept(run) == left


def test_other_settings_are_refused_and_named(run, rounds):
    rounds.identity = {"seed": 1, "class_names": ["a"]}
    with pytest.raises(
        CheckpointError, match=r"other settings: class_names: .*; seed: 'absent' -> 1"
    ):
        rounds.resume(load(run.checkpoint("last")))
