"""From a file or its bytes to pixels, for pictures as they really are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fedlora.errors import FedloraError


class BadImageError(FedloraError):
    """A picture that cannot be read; says why in a few words, without the name of the picture."""


def decode(picture: Path | bytes) -> Tensor:
    """Read one picture.

    Args:
        picture: a file, or the content of one.

    Returns:
        (1, H, W) for grey or (3, H, W) for RGB, uint8.

    Raises:
        BadImageError: says why.
    """
    raise NotImplementedError


def read_all(pictures: Sequence[Path | bytes]) -> list[Tensor | BadImageError]:
    """:func:`decode` of each; an error stands in the place of a picture that cannot be read."""
    raise NotImplementedError
