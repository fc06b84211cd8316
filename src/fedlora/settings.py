"""What the trainer's numbers may be."""

from __future__ import annotations

from fedlora.errors import FedloraError


def check_range(**values: tuple[int | None, int]) -> None:
    """Refuse a number below the least that it may be; None is no number.

    Raises:
        FedloraError: names the first setting that is.
    """
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise FedloraError(f"trainer.{name} must be at least {least}, got {value}.")


def check_lanes(lanes: int | str) -> None:
    """Refuse anything but a number from 1 and ``auto``.

    Raises:
        FedloraError: says so.
    """
    if lanes != "auto" and (not isinstance(lanes, int) or lanes < 1):
        raise FedloraError(f"trainer.lanes must be at least 1 or auto, got {lanes!r}.")
