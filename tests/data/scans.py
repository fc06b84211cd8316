"""A source of pictures with stamps that counts what is read, also in other processes."""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import contextmanager

import numpy as np
import torch

from fedlora.data import BadImageError, ImagePreprocess, ImageSource, ImageTable
from fedlora.data.cache.disk import open_pictures

SIZE = 8
PREPROCESS = ImagePreprocess(SIZE, True, (0.5,) * 3, (0.5,) * 3)
SLOT = 3 * SIZE * SIZE


class Scans(ImageSource):
    """Noise of unequal sizes that depends on a picture's name and version.

    ``log``: a file that gets a line per picture read; ``versions``: of those changed since;
    ``bad``: name -> error; ``pause``: seconds per picture; ``stuck``: the name of one that takes
    longer than any test.
    """

    def __init__(self, log, n=40, place="/data/scans", pause=0.0):
        super().__init__(["a {}."])
        self.names = [f"{i:03d}.png" for i in range(n)]
        self.versions, self.bad, self.quiet = {}, {}, False
        self.log, self.pause, self._place = log, pause, place
        self.stuck = ""

    class_names = property(lambda self: ["a", "b"])
    place = property(lambda self: self._place)

    def load(self):
        n = len(self.names)
        stamps = np.array([f"10:{self.versions.get(name, 0)}" for name in self.names], np.str_)
        names = np.array(self.names, np.str_)
        return ImageTable(np.zeros(n, np.int64), np.full(n, "train"), names, stamps=stamps)

    def read(self, rows):
        out = []
        for row in rows:
            time.sleep(600 if self.names[row] == self.stuck else self.pause)
            if not self.quiet:
                with self.log.open("a") as file:
                    file.write(f"{self.names[row]}\n")
            error = self.bad.get(self.names[row])
            out.append(self.image(row) if error is None else error)
        return out

    def image(self, row):
        number = int(self.names[row][:-4])
        version = self.versions.get(self.names[row], 0)
        generator = torch.Generator().manual_seed(1000 * version + number)
        shape = (1 + 2 * (number % 2), 9 + number % 5, 12)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def asked(self):
        """Names read since the last call."""
        if not self.log.exists():
            return []
        names = self.log.read_text().split()
        self.log.unlink()
        return names

    def good(self):
        return [row for row, name in enumerate(self.names) if name not in self.bad]

    def right(self, pictures, rows=None):
        """Whether pictures are what they must be, without counting what is read for that."""
        rows = self.good() if rows is None else rows
        self.quiet = True
        found = pictures[torch.tensor(rows, dtype=torch.int64)]
        self.quiet = False
        expected = [PREPROCESS.resize(self.image(row)) for row in rows]
        return torch.equal(found, torch.stack(expected))


class Told:
    """A reporter that remembers."""

    def __init__(self, at=None):
        self.lines, self.tracked, self.steps = [], [], []
        self.at = at or (lambda steps: None)

    def say(self, text):
        self.lines.append(text)

    @contextmanager
    def track(self, what, total):
        self.tracked.append((what, total))
        yield self._advance

    def _advance(self, steps):
        self.steps.append(steps)
        self.at(sum(self.steps))


def lasting(reason, value):
    error = BadImageError(reason)
    error.lasting = value
    return error


def opened(source, folder, limit_gb=1.0, reporter=None, preprocess=PREPROCESS):
    return open_pictures(
        source, source.load(), preprocess, folder=folder, limit_gb=limit_gb, reporter=reporter
    )


def gb(num_pictures):
    """Room for so many pictures, and a bit."""
    return (num_pictures + 0.5) * SLOT / 1e9


def set_folder(folder, name="scans"):
    (found,) = [path for path in folder.glob(f"{name}-*") if path.is_dir()]
    return found


def in_child(function):
    """Run in a process of its own; returns its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        function()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
