"""Errors that a user can mend: one line that says what is wrong and what to do."""

from __future__ import annotations


class FedloraError(ValueError):
    """A mistake in input or surroundings; the command line prints it as one line, exit code 1."""


class CheckpointError(FedloraError):
    """A checkpoint that cannot be read or does not fit."""


class DependencyError(FedloraError, ImportError):
    """A package that fedlora is built on is missing or too old."""


class LostError(FedloraError):
    """Another process of the run is gone, or does not answer."""


class ElsewhereError(FedloraError):
    """This process ends by an error that rank 0 was told of, which prints it."""


class UsageError(Exception):
    """A wrong command line; exit code 2."""


class Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt not an Exception, so that nothing swallows it."""
