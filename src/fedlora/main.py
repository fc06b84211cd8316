"""The console script: what answers at once needs no heavy import."""

from __future__ import annotations

import sys


def main() -> int:
    """Run a command of the command line; returns its exit code."""
    if sys.argv[1:] == ["--version"]:
        from fedlora import __version__

        print(f"fedlora {__version__}")
        return 0
    from fedlora.cli import main as run

    return run()
