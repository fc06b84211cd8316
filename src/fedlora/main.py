"""The console script: signals and exit codes, before anything heavy is imported."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import FrameType

from fedlora.errors import ElsewhereError, FedloraError, Terminated, UsageError

DONE, FAILED, USAGE = 0, 1, 2  # and 128 + the number of the signal that ended it
RESUME = "A run that had begun goes on with: fedlora fit --ckpt_path last"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its arguments; None takes those of this process, which is then taken to be ours: what
            is imported stays out of the way of Python's collector of cyclic garbage.

    Returns:
        0 done; 1 an error, one line on stderr (FEDLORA_DEBUG=1 adds the traceback); 2 a wrong
        command line; 130 after Ctrl-C, 143 after SIGTERM: the run can be resumed. Of the processes
        of one run any but the first ends at once after an error, and does not return.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        from fedlora import __version__

        print(f"fedlora {__version__}")
        return DONE
    code = _outcome(args, ours=argv is None)
    if code and not _is_first():
        # One of many processes that are ended together: no second signal is to meet Python's end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _outcome(args: Sequence[str], ours: bool) -> int:
    try:
        _run(args, ours)
    except SystemExit as error:  # --help and --print_config end so
        return error.code if isinstance(error.code, int) else FAILED
    except (KeyboardInterrupt, Terminated) as error:
        return _ended(signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    except Exception as error:  # the one place where errors become exit codes
        if os.environ.get("FEDLORA_DEBUG"):
            raise
        return _failed(error)
    return DONE


def _run(args: Sequence[str], ours: bool) -> None:
    # Else torch prints where in its own code it noticed that another process is gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # An exception out of a signal handler can come out of a half-done import as something else.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from fedlora.dependencies import check

    check()
    with _imports(ours):
        run = _command(args)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    run()


def _command(args: Sequence[str]) -> Callable[[], None]:
    """What to run, imported: a side tool, or the rest of the command line, with Lightning."""
    from fedlora.arguments import TOOLS

    if args and args[0] in TOOLS:
        tool = import_module(TOOLS[args[0]][0])
        return partial(tool.run, args[1:])
    cli = import_module("fedlora.cli")
    # The parser asks for its classes. fedlora.data has told it by now not to report to its makers.
    import_module("flwr_datasets.partitioner")
    return partial(cli.run, args)


@contextmanager
def _imports(ours: bool) -> Iterator[None]:
    """Keep the collector of cyclic garbage away from what is imported.

    That is nearly a million objects which stay. Looking through them again and again while they
    become more, and once more when the run has begun, takes a fifth of the time to its first step.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if ours:  # others have garbage, to be collected some day
            gc.freeze()
        if collecting:
            gc.enable()


def _leave(number: int, _frame: FrameType | None) -> None:
    """End at once: nothing has begun yet."""
    os._exit(_ended(number))


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def _ended(number: int) -> int:
    if not _is_first():  # of many processes that are ended together one says so
        return 128 + number
    what = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signal.Signals(number)]
    print(f"fedlora: {what}. {RESUME}", file=sys.stderr, flush=True)
    return 128 + number


def _is_first() -> bool:
    """Whether this is rank 0, as those who start processes say it."""
    names = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def _failed(raised: Exception) -> int:
    error = _mendable(raised)
    if isinstance(error, ElsewhereError):
        return FAILED
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | UsageError):
        text = f"{type(error).__name__}: {text} (FEDLORA_DEBUG=1 shows where)"
    print(f"fedlora: {text}", file=sys.stderr)
    return USAGE if isinstance(error, UsageError) else FAILED


def _mendable(error: Exception) -> BaseException:
    """Our own line, where a library has wrapped it into its words."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FedloraError | UsageError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else cause
