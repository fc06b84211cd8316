"""Started as a user does: torchrun, and a script that starts the others itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlora.checkpoint import load
from fedlora.run_folder import RunFolder
from tests.runs import QUICK, assert_same_bits, fingerprint, fit

SCRIPT = """
import sys
from tests.runs import QUICK, fit
if __name__ == "__main__":
    root, devices, rounds = sys.argv[1:]
    extra = {"timeout": 60.0, "limit_train_batches": 2, "max_rounds": int(rounds)}
    fit(root, data=QUICK, devices=int(devices), **extra)
"""


def start(command: list[str], script: Path, *args: object) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if "RANK" not in k and "MASTER" not in k}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, str(script), *map(str, args)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def played(run: RunFolder) -> int:
    path = run.checkpoint("last")
    return load(path).server.round_idx if path.exists() else -1


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
def test_torchrun(tmp_path: Path, script: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = start([*torchrun, "--nproc-per-node=2"], script, tmp_path / "two", 2, 1)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["version_0"]
    fit(tmp_path / "one", data=QUICK, max_rounds=1, limit_train_batches=2)
    assert_same_bits(*(fingerprint(tmp_path / name / "version_0") for name in ("one", "two")))


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def is_there(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_script_starts_the_others_and_they_end_together(
    tmp_path: Path, script: Path, first: bool
) -> None:
    process = start([sys.executable], script, tmp_path / "runs", 2, 10_000)
    run = RunFolder(tmp_path / "runs" / "version_0")
    until = time.monotonic() + 120
    while played(run) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    [other] = [pid for pid in children(process.pid) if is_there(pid)]
    os.kill(process.pid if first else other, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    while is_there(other) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_there(other)
    if first:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 1
        assert "is gone: rank 1 was killed by SIGKILL. Go on with fit --ckpt_path last." in said
