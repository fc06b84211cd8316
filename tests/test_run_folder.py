from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.errors import CheckpointError, FedloraError
from fedlora.run_folder import RunFolder


def make(root, number, config=True):
    path = root / f"version_{number}"
    (path / "checkpoints").mkdir(parents=True)
    if config:
        (path / "config.yaml").write_text("a: 1\n")
    return path


# Numbers.


def test_folders_are_numbered_from_zero(tmp_path):
    root = tmp_path / "deep" / "runs"
    names = [RunFolder.create(root).path.name for _ in range(3)]
    assert names == ["version_0", "version_1", "version_2"]
    assert (root / "version_2" / "checkpoints").is_dir()


def test_the_number_is_one_more_than_the_largest(tmp_path):
    for name in ("version_2", "version_11", "version_x", "version_99.bak", "other"):
        (tmp_path / name).mkdir()
    assert RunFolder.create(tmp_path).path.name == "version_12"


def test_a_number_that_another_process_took_is_skipped(tmp_path, monkeypatch):
    make(tmp_path, 0)
    monkeypatch.setattr("fedlora.run_folder._versions", lambda _: [])
    assert RunFolder.create(tmp_path).path.name == "version_1"


def test_an_unwritable_root_is_one_line(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(FedloraError, match=r"cannot write .*Read-only file system") as caught:
        RunFolder.create(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_root_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(FedloraError, match=f"cannot write {tmp_path / 'runs'}"):
        RunFolder.create(tmp_path / "runs")


# Which run is meant.


def test_the_newest_by_number_that_has_its_config(tmp_path):
    for number in (2, 9, 10):
        make(tmp_path, number)
    make(tmp_path, 11, config=False)  # killed before it wrote it
    (tmp_path / "version_12").write_text("a file")
    assert RunFolder.newest(tmp_path).path.name == "version_10"


@pytest.mark.parametrize("root", [".", "none"])
def test_no_run_at_all(tmp_path, root):
    make(tmp_path, 0, config=False)
    with pytest.raises(CheckpointError, match=r"there is no run under .*fit --config FILE"):
        RunFolder.newest(tmp_path / root)


def test_the_forms_of_ckpt_path(tmp_path):
    make(tmp_path, 0)
    newest = make(tmp_path, 1)
    older = tmp_path / "version_0"
    best = older / "checkpoints" / "best.ckpt"
    best.write_bytes(b"")
    assert _of("last", tmp_path) == (newest, "last")
    assert _of("best", tmp_path) == (newest, "best")
    assert _of(str(older), tmp_path) == (older, "last")
    assert _of(f"{older}/", tmp_path / "elsewhere") == (older, "last")
    assert _of(str(best), tmp_path) == (older, "best")


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = make(tmp_path, 3)
    assert _of("~/version_3", tmp_path) == (path, "last")


def _of(ckpt_path, root):
    run, which = RunFolder.of(ckpt_path, root)
    return run.path, which


@pytest.mark.parametrize(
    "given", ["nowhere", "root", "root/version_0/config.yaml", "root/loose.ckpt", "latest", ""]
)
def test_what_is_no_run_is_refused(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "root", 0)
    (tmp_path / "root" / "loose.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="neither 'last' nor 'best' nor") as caught:
        RunFolder.of(given, tmp_path / "root")
    assert repr(given) in str(caught.value)


# What is in it.


def test_names(tmp_path):
    run = RunFolder(tmp_path)
    given = [run.config, run.metrics, run.clients_csv, run.clients, run.adapter, run.summary]
    given += [run.predictions, run.log, run.checkpoint("last")]
    assert [str(path.relative_to(tmp_path)) for path in given] == [
        "config.yaml",
        "metrics.csv",
        "clients.csv",
        "clients",
        "adapter",
        "summary.json",
        "predictions.csv",
        "fedlora.log",
        "checkpoints/last.ckpt",
    ]


def test_the_config_is_written_once(tmp_path):
    run = RunFolder(tmp_path)
    for text in ("one", "two", "three"):
        run.write_config(text)
    assert (tmp_path / "config.yaml").read_text() == "one"
    assert (tmp_path / "config.resume1.yaml").read_text() == "two"
    assert (tmp_path / "config.resume2.yaml").read_text() == "three"


# The lock.

HOLD = """
import sys
from pathlib import Path
from fedlora.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.lock()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is running in ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, holder):
    run = RunFolder(tmp_path)
    for _ in range(2):
        with pytest.raises(FedloraError, match="another process is running in") as caught:
            run.lock()
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
    run.unlock()  # harmless: it is not ours
    with pytest.raises(FedloraError):
        run.lock()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    run.lock()
    run.unlock()


def test_a_lock_that_is_let_go_can_be_taken(tmp_path):
    one, other = RunFolder(tmp_path), RunFolder(tmp_path)
    one.lock()
    with pytest.raises(FedloraError):
        other.lock()
    one.unlock()
    one.unlock()
    other.lock()
    other.unlock()


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path):
    with pytest.raises(FedloraError, match=r"cannot write .*gone: No such file or directory"):
        RunFolder(tmp_path / "gone").lock()


def test_what_a_kill_left_half_written_is_swept_away(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    left = [folder.path / ".metrics.csv.12.tmp", folder.path / "checkpoints" / ".last.ckpt.12.tmp"]
    for path in [*left, folder.checkpoint("last"), folder.metrics]:
        path.write_text("half")
    folder.sweep()
    assert not any(path.exists() for path in left)
    assert folder.checkpoint("last").exists()
    assert folder.metrics.exists()


def test_an_adapter_whose_swap_was_killed_comes_back(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    for name in (".adapter.old", ".adapter.tmp", "adapters/.3.old"):
        (folder.path / name).mkdir(parents=True)
    (folder.path / ".adapter.old" / "fedlora.json").write_text("{}")
    folder.sweep()
    assert (folder.adapter / "fedlora.json").exists()
    assert [path.name for path in (folder.path / "adapters").iterdir()] == ["3"]
    assert not any(path.name.startswith(".") for path in folder.path.iterdir())
