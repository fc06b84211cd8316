"""Folders of drawn pictures: a stripe whose place tells the class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def draw(path: Path, label: int = 0, number: int = 0, classes: int = 2) -> None:
    """A noisy picture with a stripe; makes the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 60, (20, 24, 3), dtype=np.uint8)
    at = label * 24 // classes
    pixels[:, at : at + 3] += 180
    Image.fromarray(pixels).save(path)


def draw_sites(
    root: Path,
    sites: Sequence[str] = ("north", "south"),
    classes: Sequence[str] = ("cat", "dog"),
    count: int = 6,
) -> Path:
    """``root/site/class/*.png``."""
    for i, site in enumerate(sites):
        for label, name in enumerate(classes):
            for number in range(count):
                draw(root / site / name / f"{number}.png", label, 100 * i + number, len(classes))
    return root
