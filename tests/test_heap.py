from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PAGES = 5 * 20 * 2**20 // 4096  # of what a turn of the script asks for

SCRIPT = """
import resource
from fedlora.heap import keeping_freed_memory

def turn():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        blocks = [b"x" * (20 * 2**20) for _ in range(5)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

turn()
print(turn())
with keeping_freed_memory():
    turn()
    print(turn())
    kept = resident()
print(kept - resident())
print(turn())
"""


def faults(**environment: str) -> list[int]:
    """Of four turns before and in the context, pages it gave back at its end, faults after it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_memory_is_kept_for_as_long_as_clients_train() -> None:
    before, inside, back, after = faults()
    assert before > 3 * PAGES
    assert inside < PAGES / 10
    assert back > PAGES / 2
    assert after > 3 * PAGES


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_who_has_chosen_is_not_overruled(name: str) -> None:
    value = "glibc.malloc.trim_threshold=65536" if name == "GLIBC_TUNABLES" else "65536"
    before, inside, _, after = faults(**{name: value})
    assert min(before, inside, after) > 3 * PAGES


@pytest.mark.parametrize("which", [("", ""), ("musl", "1.2")])
def test_another_c_library_is_left_alone(monkeypatch, which: tuple[str, str]) -> None:
    from fedlora import heap

    monkeypatch.setattr(platform, "libc_ver", lambda: which)
    monkeypatch.setattr(heap.ctypes, "CDLL", None)
    with heap.keeping_freed_memory():
        pass
