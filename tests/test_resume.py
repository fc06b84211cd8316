"""Killed at any moment and resumed: the same bits as the undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from fedlora import FedloraError
from fedlora import checkpoint as checkpoints
from fedlora import export as exports
from fedlora.aggregation import Aggregator, FedAvg, FedExLoRA, FedSALoRA
from fedlora.callbacks.base import FederatedCallback
from fedlora.errors import CheckpointError
from tests.runs import assert_same_bits, fingerprint, fit

# FedExLoRA's state has all that FedAvg's has.
RULES = [pytest.param(FedAvg, marks=pytest.mark.slow), FedExLoRA, FedSALoRA]


class Killed(BaseException):
    """Stands for a kill inside this process: nothing catches it."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[Aggregator]], dict]:
    found: dict[type[Aggregator], dict] = {}

    def get(rule: type[Aggregator]) -> dict:
        if rule not in found:
            trainer = fit(tmp_path_factory.mktemp("undisturbed"), rule(), clients_per_round=2)
            found[rule] = fingerprint(trainer.run.path)
        return found[rule]

    return get


class KillAt(FederatedCallback):
    """Raises at the n-th call of a hook."""

    def __init__(self, hook: str, n: int) -> None:
        self.left = n
        setattr(type(self), hook, self.count)

    def count(self, *args) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("hook", "n"),
    [
        ("on_train_batch_end", 3),  # in the middle of a client
        ("on_client_end", 4),  # the client's row is written, the round is not over
        ("on_aggregate", 2),  # averaged, not saved
        ("on_round_evaluated", 3),  # just before the checkpoint
        ("on_train_end", 1),  # all rounds saved, no summary yet
    ],
)
def test_killed_in_a_hook(
    tmp_path: Path, undisturbed: Callable, rule: type[Aggregator], hook: str, n: int
) -> None:
    kill = type("Kill", (KillAt,), {})(hook, n)
    with pytest.raises(Killed):
        fit(tmp_path, rule(), clients_per_round=2, callbacks=[kill])
    trainer = fit(tmp_path, rule(), clients_per_round=2, ckpt_path="last")
    assert trainer.run.path.name == "version_0"
    assert_same_bits(undisturbed(rule), fingerprint(trainer.run.path))


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (torch, "save", 2),  # the checkpoint of round 1 is half written
        (checkpoints, "keep_as", 2),  # written, but not yet in place
        (exports, "_write_peft", 3),  # the checkpoint is in place, the adapter is not
    ],
)
def test_killed_while_a_file_is_written(
    tmp_path: Path, undisturbed: Callable, monkeypatch: pytest.MonkeyPatch, module, name, call
) -> None:
    real = getattr(module, name)
    calls = 0

    def dies(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            if name == "save":
                Path(args[1]).write_bytes(b"half of a checkpoint")
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies)
        with pytest.raises(Killed):
            fit(tmp_path, FedExLoRA(), clients_per_round=2)
    trainer = fit(tmp_path, FedExLoRA(), clients_per_round=2, ckpt_path="last")
    assert_same_bits(undisturbed(FedExLoRA), fingerprint(trainer.run.path))


@pytest.mark.parametrize("rule", [FedExLoRA, pytest.param(FedSALoRA, marks=pytest.mark.slow)])
def test_kill_9_and_the_command_line(tmp_path: Path, rule: type[Aggregator]) -> None:
    """A real SIGKILL of ``fedlora fit`` in its second round, then ``fit --ckpt_path last``."""
    settings = [
        "--trainer.max_rounds=3",
        "--data.num_clients=3",
        "--trainer.limit_train_batches=2",
        f"--trainer.averaging.aggregator={rule.__name__}",
        "--trainer.logger=false",
    ]
    command = [sys.executable, "-m", "fedlora", "fit"]
    roots = {name: f"--trainer.default_root_dir={tmp_path / name}" for name in ("whole", "killed")}
    start = [*command, "--config", "clip_lora.yaml", *settings]
    whole = subprocess.Popen([*start, roots["whole"]], stdout=subprocess.DEVNULL)
    process = subprocess.Popen([*start, roots["killed"]], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("round 1/3"):
            break
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    resume = [*command, "--ckpt_path", "last", roots["killed"]]
    subprocess.run(resume, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert whole.wait(timeout=120) == 0
    assert_same_bits(
        fingerprint(tmp_path / "whole" / "version_0"),
        fingerprint(tmp_path / "killed" / "version_0"),
    )


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_polite_end_says_how_to_go_on(tmp_path: Path, number: int, code: int) -> None:
    command = [
        *(sys.executable, "-m", "fedlora", "fit", "--config", "clip_lora.yaml"),
        *("--trainer.default_root_dir", str(tmp_path), "--data.num_clients=3"),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    for line in process.stdout:
        if line.startswith("round 1/"):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert len(errors.strip().splitlines()) == 1
    assert "fedlora fit --ckpt_path last" in errors
    assert (
        checkpoints.load(tmp_path / "version_0" / "checkpoints" / "last.ckpt").server.round_idx >= 1
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_end_while_python_still_imports_is_one_line_too(number: int, code: int) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fedlora", "fit", "--ckpt_path", "last"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "numpy" in line:  # torch is being imported
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    said = [line for line in errors.splitlines() if not line.startswith("import time:")]
    assert process.returncode == code
    assert len(said) == 1
    assert "fedlora fit --ckpt_path last" in said[0]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, undisturbed: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    kill = type("Kill", (KillAt,), {})("on_aggregate", 3)
    with pytest.raises(Killed):
        fit(tmp_path, FedSALoRA(), clients_per_round=2, callbacks=[kill])
    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 0xFF
    last.unlink()  # previous.ckpt may be the same file under another name
    last.write_bytes(content)
    trainer = fit(tmp_path, FedSALoRA(), clients_per_round=2, ckpt_path="last", progress="plain")
    assert "damaged" in capsys.readouterr().out
    assert_same_bits(undisturbed(FedSALoRA), fingerprint(trainer.run.path))


def test_two_damaged_checkpoints_end_in_one_line(tmp_path: Path) -> None:
    fit(tmp_path, max_rounds=1)
    for name in ("last", "previous"):
        path = tmp_path / "version_0" / "checkpoints" / f"{name}.ckpt"
        path.unlink()
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"previous\.ckpt is damaged"):
        fit(tmp_path, max_rounds=2, ckpt_path="last")


def test_a_finished_run_has_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, max_rounds=1)
    summary = tmp_path / "version_0" / "summary.json"
    before = summary.stat().st_mtime_ns
    fit(tmp_path, max_rounds=1, ckpt_path="last", progress="plain")
    assert "nothing to do" in capsys.readouterr().out
    assert summary.stat().st_mtime_ns == before


def test_more_rounds_may_be_asked_for_later(tmp_path: Path, undisturbed: Callable) -> None:
    fit(tmp_path, FedAvg(), clients_per_round=2, max_rounds=1)
    trainer = fit(tmp_path, FedAvg(), clients_per_round=2, max_rounds=3, ckpt_path="last")
    assert_same_bits(undisturbed(FedAvg), fingerprint(trainer.run.path))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rule": FedExLoRA()}, "rule: 'fedlora.aggregation.fedavg.FedAvg' -> "),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"data": {"num_clients": 4}}, "client_samples: "),
        ({"model": {"head": "text"}}, "shapes.other/classifier.bias"),
    ],
)
def test_another_model_or_config_is_refused_and_named(
    tmp_path: Path, settings: dict, named: str
) -> None:
    fit(tmp_path, max_rounds=1)
    with pytest.raises(CheckpointError, match="cannot go on with other settings") as caught:
        fit(tmp_path, max_rounds=2, ckpt_path="last", **settings)
    assert named in str(caught.value)


def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, undisturbed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.save, 0

    def full(content, file):
        nonlocal calls
        calls += 1
        if calls == 3:
            Path(file).write_bytes(b"a part")
            raise OSError(28, "No space left on device")
        return real(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(FedloraError, match=r"last\.ckpt: No space left on device\. Free space"):
            fit(tmp_path, FedAvg(), clients_per_round=2)
    folder = tmp_path / "version_0" / "checkpoints"
    assert {path.name for path in folder.iterdir()} <= {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert checkpoints.load(folder / "last.ckpt").server.round_idx == 1
    trainer = fit(tmp_path, FedAvg(), clients_per_round=2, ckpt_path="last")
    assert_same_bits(undisturbed(FedAvg), fingerprint(trainer.run.path))


def test_early_stopping_counts_on_after_a_kill(tmp_path: Path) -> None:
    def settings() -> dict:
        stop = EarlyStopping("val/loss", patience=2, min_delta=100.0)
        return {"max_rounds": 9, "limit_train_batches": 1, "callbacks": [stop]}

    kill = type("Kill", (KillAt,), {})("on_aggregate", 3)
    first = settings()
    first["callbacks"].append(kill)
    with pytest.raises(Killed):
        fit(tmp_path, **first)
    trainer = fit(tmp_path, **settings(), ckpt_path="last")
    assert trainer.server.round_idx == 3  # the first judged round, and two without improvement


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_rounds=1)
    trainer.run.lock()
    try:
        with pytest.raises(FedloraError, match="another process is running in"):
            fit(tmp_path, max_rounds=2, ckpt_path="last")
    finally:
        trainer.run.unlock()
