from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedlora.errors import FedloraError
from fedlora.files import (
    clear_os_errors,
    expand,
    present,
    sha256,
    swapped_folder,
    sweep,
    write_atomically,
    write_json,
    write_text,
)

NO_SPACE, READ_ONLY, DENIED = errno.ENOSPC, errno.EROFS, errno.EACCES


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@contextmanager
def small_disk(size=4096):
    """No file of this process may grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def one_line(caught, path):
    message = str(caught.value)
    assert message.startswith(f"cannot write {path}: ")
    assert "\n" not in message
    return message


# One file.


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "one é")
    write_text(path, "two é")
    assert path.read_text(encoding="utf-8") == "two é"
    assert entries(tmp_path) == ["note.txt"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def write(file):
        assert file.parent == tmp_path  # the same file system, so that a rename is atomic
        file.write_text("ne")
        assert path.read_text() == "old"
        file.write_text("new")

    write_atomically(path, write)
    assert path.read_text() == "new"


def test_a_file_is_flushed_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("flush"), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda s, t: (done.append("name"), replace(s, t))[1])
    write_text(tmp_path / "note.txt", "x")
    assert done == ["flush", "name"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def write(file):
        file.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["note.txt"]


@pytest.mark.parametrize(
    ("where", "number", "reason"),
    [
        ((Path, "write_text"), NO_SPACE, "No space left on device"),
        ((os, "fsync"), NO_SPACE, "No space left on device"),
        ((Path, "replace"), READ_ONLY, "Read-only file system"),
        ((Path, "write_text"), DENIED, "Permission denied"),
    ],
)
def test_a_full_or_unwritable_disk_is_one_line(tmp_path, monkeypatch, where, number, reason):
    path = tmp_path / "note.txt"
    write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(*where, failing(number))
        with pytest.raises(FedloraError) as caught:
            write_text(path, "new")
    message = one_line(caught, path)
    assert reason in message
    assert "--trainer.default_root_dir" in message
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["note.txt"]


def write_torch(file):
    torch.save({"x": torch.zeros(5000)}, file)


def write_safetensors(file):
    save_file({"x": torch.zeros(5000)}, file)


def write_plainly(file):
    file.write_bytes(bytes(20_000))


@pytest.mark.parametrize("write", [write_torch, write_safetensors, write_plainly])
def test_a_disk_that_really_ends_is_one_line(tmp_path, write):
    path = tmp_path / "data"
    write_text(path, "old")
    with pytest.raises(FedloraError) as caught, small_disk():
        write_atomically(path, write)
    one_line(caught, path)
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["data"]


@pytest.mark.parametrize("write", [write_torch, write_safetensors, write_plainly])
def test_a_folder_that_is_gone_is_one_line(tmp_path, write):
    path = tmp_path / "gone" / "data"
    with pytest.raises(FedloraError) as caught:
        write_atomically(path, write)
    one_line(caught, path)


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), clear_os_errors(tmp_path):
        raise RuntimeError("size mismatch")
    with pytest.raises(KeyError), clear_os_errors(tmp_path):
        raise KeyError("x")


def test_json(tmp_path):
    write_json(tmp_path / "x.json", {"name": "é", "n": None})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "é" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"name": "é", "n": None}


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == expected


def test_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/x") == tmp_path / "x"
    assert expand(Path("a/~")) == Path("a/~")
    said = "^folder '~nosuchuser/x': there is no home folder for '~nosuchuser'. Write the path in"
    with pytest.raises(FedloraError, match=said):
        expand("~nosuchuser/x", "folder")


@pytest.mark.parametrize("path", [Path(), Path("/")])
def test_a_folder_without_a_name_is_itself(path):
    assert present(path) == path


# A folder.


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "old.txt").write_text("old")
    return path


def test_a_folder_is_swapped_when_it_is_complete(folder):
    with swapped_folder(folder) as fresh:
        (fresh / "deep").mkdir()
        (fresh / "deep" / "new.txt").write_text("new")
        assert entries(folder) == ["old.txt"]
    assert entries(folder) == ["deep"]
    assert (folder / "deep" / "new.txt").read_text() == "new"
    assert entries(folder.parent) == ["adapter"]


def test_a_first_folder(tmp_path):
    with swapped_folder(tmp_path / "a" / "b") as fresh:
        (fresh / "new.txt").write_text("new")
    assert entries(tmp_path / "a" / "b") == ["new.txt"]


def test_what_a_kill_left_is_cleared(folder):
    for name in (".adapter.tmp", ".adapter.old"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "left.txt").write_text("x")
    with swapped_folder(folder) as fresh:
        assert entries(fresh) == []
        (fresh / "new.txt").write_text("new")
    assert entries(folder) == ["new.txt"]
    assert entries(folder.parent) == ["adapter"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_folder(folder, error):
    def swap():
        with swapped_folder(folder) as fresh:
            (fresh / "new.txt").write_text("new")
            raise error

    with pytest.raises(type(error)):
        swap()
    assert entries(folder) == ["old.txt"]
    assert entries(folder.parent) == ["adapter"]


def test_a_full_disk_leaves_the_old_folder(folder):
    with pytest.raises(FedloraError) as caught, small_disk(), swapped_folder(folder) as fresh:
        write_safetensors(fresh / "data")
    one_line(caught, folder)
    assert entries(folder) == ["old.txt"]
    assert entries(folder.parent) == ["adapter"]


@pytest.mark.parametrize("failing_rename", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(folder, monkeypatch, failing_rename):
    rename, calls = Path.rename, []

    def nth(self, target):
        calls.append(target)
        if len(calls) == failing_rename:
            failing(READ_ONLY)()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", nth)
    with (
        pytest.raises(FedloraError, match="Read-only file system"),
        swapped_folder(folder) as fresh,
    ):
        (fresh / "new.txt").write_text("new")
    assert entries(folder) == ["old.txt"]
    assert entries(folder.parent) == ["adapter"]


def test_what_a_folder_holds_is_flushed(folder, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    with swapped_folder(folder) as fresh:
        shutil.copy(folder / "old.txt", fresh / "one.txt")
        (fresh / "deep").mkdir()
        shutil.copy(folder / "old.txt", fresh / "deep" / "two.txt")
    assert len(flushed) == 2


KILLED = """
import os, sys
from pathlib import Path
from fedlora.files import swapped_folder
rename, left = Path.rename, int(sys.argv[2])
def dies(self, target):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    return rename(self, target)
Path.rename = dies
with swapped_folder(Path(sys.argv[1])) as fresh:
    (fresh / "new.txt").write_text("new")
    if left < 0:
        os._exit(9)
"""


@pytest.mark.parametrize("renames", [-1, 0, 1])
@pytest.mark.parametrize("how", ["present", "sweep", "swap"])
def test_a_kill_leaves_the_old_or_the_new(folder, renames, how):
    """While it is written (-1), before the old one is moved (0), between the renames (1)."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(renames)], check=False)
    assert done.returncode == 9
    assert folder.exists() == (renames < 1)
    assert entries(present(folder)) == ["old.txt"]
    if how == "sweep":
        sweep(folder.parent)
        assert entries(folder) == ["old.txt"]
        assert entries(folder.parent) == ["adapter"]
    if how == "swap":
        with swapped_folder(folder) as fresh:
            assert entries(fresh) == []
            assert entries(folder) == ["old.txt"]
            (fresh / "newer.txt").write_text("x")
        assert entries(folder) == ["newer.txt"]
        assert entries(folder.parent) == ["adapter"]


def test_an_old_version_is_not_brought_back_over_a_new_one(folder):
    old = folder.with_name(".adapter.old")
    old.mkdir()
    assert present(folder) == folder
    sweep(folder.parent)
    assert entries(folder) == ["old.txt"]
    assert entries(folder.parent) == ["adapter"]


@pytest.mark.parametrize("name", ["a.tmp", "a.old", "a"])
def test_names_that_look_like_leftovers_stand_in_nobodys_way(tmp_path, name):
    for other in ("a", "a.tmp", "a.old"):
        (tmp_path / other).mkdir()
    with swapped_folder(tmp_path / name) as fresh:
        (fresh / "new.txt").write_text("new")
    sweep(tmp_path)
    assert entries(tmp_path) == ["a", "a.old", "a.tmp"]
    assert entries(tmp_path / name) == ["new.txt"]
