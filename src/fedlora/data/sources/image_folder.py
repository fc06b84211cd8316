"""Pictures in folders named after what they show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlora.data.decode import BadImageError, read_all
from fedlora.data.sources.base import SPLITS, ImageTable
from fedlora.data.sources.classes import label_rows
from fedlora.data.sources.files_on_disk import (
    PICTURE_ENDINGS,
    PictureFolder,
    existing_folder,
    full_path,
    pictures_below,
    printable,
)
from fedlora.data.sources.folder_layout import Layout, check_layout, name_at, resolve_layout
from fedlora.data.sources.scanned import Found, ScannedSource
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Found(Found):
    """What a look through the folders showed.

    ``paths``: of each row, below ``root``, as the file system knows it.
    """

    root: Path
    layout: str
    paths: list[str]


class ImageFolder(ScannedSource[_Found]):
    """Pictures in folders named after what they show, e.g. ``root/site/class/x.png``.

    .. code-block:: yaml

        data:
          source:
            class_path: fedlora.data.ImageFolder
            init_args:
              root: ~/data/wards
              layout: site/class          # auto finds it, where it can
              class_names: {nv: mole, mel: melanoma}   # or a list, or left out
              templates: ["a photo of a {}, a skin lesion."]

    **Layouts** name the levels of folders below ``root``:

    - ``class``: ``cat/x.png``;
    - ``split/class``: ``train/cat/x.png``;
    - ``site/class``: ``paris/cat/x.png``; the sites can become the clients;
    - ``site/split/class``: ``paris/train/cat/x.png``;
    - ``split/site/class``: ``train/paris/cat/x.png``.

    Splits are called train or training; val, valid, validation or dev; test or testing, in any
    case. Where the layout has none, all pictures are for training, and the data module sets parts
    of them aside for validation and testing. With a layout that is set, pictures may lie in
    folders below that of their class (patients, dates), which say nothing then.

    ``auto`` looks how deep the pictures lie. One folder deep is ``class``. Two deep is
    ``split/class`` if the upper folders are all named after splits, and ``site/class`` if none is;
    three deep has the splits at the first or the second level. It stops with one line where
    pictures lie at unequal depths or the folders can be read in two ways: above all where no class
    would occur in two sites, which is more likely to be ``class/patient``.

    **Pictures** are the files whose names end in png, jpg, jpeg, jpe, jfif, webp, bmp, gif, tif,
    tiff, ppm, pgm, pbm, jp2, avif or mpo, in any case. Other files, and files and folders whose
    names begin with a dot, are passed over, and folders without pictures with them (but a class
    that ``class_names`` lists must have some). Links are followed. A picture that is there but
    cannot be read is reported by the data module.

    **Classes** come in the order of their names (numbers by size: 2 before 10), or in that of
    ``class_names``. A name is the same in whichever Unicode form sites write it.

    Args:
        root: the folder; ``~`` is the home folder.
        layout: what the levels of folders are; "auto" finds it.
        class_names: None for the folders' names; a list of them that says their order; or a dict
            from folders' names to the names that prompts use. All folders must be in it and all in
            it must have pictures.
        templates: prompts with one ``{}`` each; None for "a photo of a {}.".

    Raises:
        FedloraError: if an argument is not usable by itself; the disk is looked at in
            :meth:`prepare`.
    """

    def __init__(
        self,
        root: str,
        layout: Layout = "auto",
        class_names: list[str] | dict[str, str] | None = None,
        templates: list[str] | None = None,
    ) -> None:
        if not str(root).strip():
            raise FedloraError("data.source.root must be a folder, got an empty name. Name one.")
        check_layout(layout)
        self.root = root
        self.layout = layout
        super().__init__(class_names, templates)

    @property
    def place(self) -> str:
        """The full path of the folder."""
        return printable(str(full_path(self.root)))

    def read(self, rows: Sequence[int]) -> list[Tensor | BadImageError]:
        """Pictures (C, H, W), uint8, each of its own size."""
        found = self._found
        return read_all([found.root / found.paths[row] for row in rows])

    def summary(self) -> str:
        """One line that says what was found, for the user.

        Raises:
            FedloraError: as :meth:`prepare`.
        """
        found, table = self._found, self._found.table
        parts = []
        if table.site is not None:
            parts.append(_count(len(set(table.site.tolist())), "site"))
        parts.append(f"{len(found.class_names):,} classes")
        if "split" in found.layout.split("/"):
            counts = Counter(table.split.tolist())
            parts += [f"{name} {counts[name]:,}" for name in SPLITS if counts[name]]
        pictures = _count(len(table), "picture")
        where = printable(str(found.root))
        return f"{pictures} in {where}, layout {found.layout}: {', '.join(parts)}"

    def _look(self) -> _Found:
        root = existing_folder(self.root)
        folders, others = pictures_below(root)
        if not folders:
            raise FedloraError(
                f"data.source.root has no pictures in it: {printable(str(root))} "
                f"{_instead(others)}. Name the folder that pictures lie in; what counts is the end "
                f"of a file's name: {', '.join(PICTURE_ENDINGS)}."
            )
        layout = resolve_layout(folders, self.layout)
        paths = ["/".join((*folder.parts, name)) for folder in folders for name in folder.names]
        classes = [name_at(folder, layout, "class") or "" for folder in folders]
        labels, class_names = label_rows(classes, self._given, "class folder with pictures")
        counts = [len(folder.names) for folder in folders]
        table = ImageTable(
            labels=np.repeat(labels, counts),
            split=_split(folders, layout, counts),
            keys=np.array([printable(path) for path in paths]),
            site=_site(folders, layout, counts),
            stamps=np.array([mark for folder in folders for mark in folder.stamps]),
        )
        return _Found(class_names, table, root, layout, paths)


def _split(folders: list[PictureFolder], layout: str, counts: list[int]) -> NDArray[np.str_]:
    names = [name_at(folder, layout, "split") or "train" for folder in folders]
    return np.repeat(np.array(names), counts)


def _site(folders: list[PictureFolder], layout: str, counts: list[int]) -> NDArray[np.str_] | None:
    names = [name_at(folder, layout, "site") for folder in folders]
    if None in names:
        return None
    return np.repeat(np.array([printable(str(name)) for name in names]), counts)


def _instead(others: Counter[str]) -> str:
    """What lies where pictures should."""
    if not others:
        return "has no files at all"
    kinds = [
        f"{count:,} .{ending}" if ending else f"{count:,} without an ending"
        for ending, count in others.most_common(5)
    ]
    return f"has files of other kinds only ({', '.join(kinds)})"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
