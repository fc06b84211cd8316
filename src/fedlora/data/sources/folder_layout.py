"""What the levels of folders mean: split, site or class."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

from fedlora.data.sources.classes import did_you_mean, listed
from fedlora.data.sources.files_on_disk import PictureFolder, printable
from fedlora.errors import FedloraError

Layout = Literal[
    "auto", "class", "split/class", "site/class", "site/split/class", "split/site/class"
]
LAYOUTS = ("class", "split/class", "site/class", "site/split/class", "split/site/class")

# What folders are called -> the split; in any case.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def name_at(folder: PictureFolder, layout: str, level: str) -> str | None:
    """What a folder's path says of its split, its site or its class; None if the layout has none.

    Names are brought to Unicode's composed form, splits to "train", "val" and "test".
    """
    levels = layout.split("/")
    if level not in levels:
        return None
    name = folder.parts[levels.index(level)]
    if level == "split":
        return SPLIT_NAMES[name.lower()]
    return unicodedata.normalize("NFC", name)


def check_layout(layout: str) -> None:
    """Check a layout's name.

    Raises:
        FedloraError: if there is no such layout.
    """
    if layout not in ("auto", *LAYOUTS):
        raise FedloraError(
            f"data.source.layout must be auto, {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}, got "
            f"{layout!r}.{did_you_mean(str(layout), LAYOUTS)}"
        )


def resolve_layout(folders: Sequence[PictureFolder], layout: str) -> str:
    """Find the layout where it is "auto", and check that the folders follow it.

    Args:
        folders: those with pictures, at least one.
        layout: as the user gave it.

    Returns:
        One of :data:`LAYOUTS`.

    Raises:
        FedloraError: if pictures lie too high, a split's name is unknown, or the folders can be
            read in more ways than one.
    """
    if layout == "auto":
        found = _guess(folders)
        _check_sites_share_classes(folders, found)
    else:
        found = layout
        _check_depth(folders, found)
        _check_splits(folders, found)
    _check_classes(folders, found)
    return found


def _guess(folders: Sequence[PictureFolder]) -> str:
    depths = {len(folder.parts): folder for folder in folders}
    if list(depths) == [0]:
        raise FedloraError(
            f"data.source.root holds pictures itself ({_example(depths[0])}), not in folders: "
            "nothing says what they show. Put those of each class into a folder named after it."
        )
    if len(depths) > 1:
        examples = " but ".join(_example(depths[depth]) for depth in sorted(depths))
        raise FedloraError(
            f"pictures lie at unequal depths below data.source.root: {examples}. Set "
            f"data.source.layout ({', '.join(LAYOUTS)}): all below a class folder then belongs to "
            "that class; or move those that lie elsewhere."
        )
    (depth,) = depths
    splits = [_splits_at(folders, level) for level in range(min(depth, 3))]
    if depth == 1:
        return "class"
    if depth == 2 and splits[0] != "some":
        return "split/class" if splits[0] == "all" else "site/class"
    if depth == 3 and (splits[0] == "all") != (splits[1] == "all"):
        return "split/site/class" if splits[0] == "all" else "site/split/class"
    raise FedloraError(
        f"data.source.layout=auto cannot tell what the folders of {_example(folders[0])} are"
        f"{_why(folders, depth)}. Set data.source.layout to {', '.join(LAYOUTS[:-1])} or "
        f"{LAYOUTS[-1]}: all below a class folder belongs to that class."
    )


def _why(folders: Sequence[PictureFolder], depth: int) -> str:
    if depth == 2:
        names = sorted({folder.parts[0] for folder in folders})
        splits = [name for name in names if name.lower() in SPLIT_NAMES]
        others = [name for name in names if name.lower() not in SPLIT_NAMES]
        return f": {listed(splits)} would be splits, {listed(others)} not"
    return ": no level, or more than one, holds only splits (train, val, test)" * (depth == 3)


def _splits_at(folders: Sequence[PictureFolder], level: int) -> Literal["all", "some", "none"]:
    """Whether the folders of one level are named after splits."""
    are = {folder.parts[level].lower() in SPLIT_NAMES for folder in folders}
    return "some" if len(are) == 2 else "all" if are == {True} else "none"


def _check_sites_share_classes(folders: Sequence[PictureFolder], layout: str) -> None:
    """Guess no sites where it is as likely that there are patients below the classes."""
    holders: dict[str, set[str]] = {}
    for folder in folders:
        site, name = name_at(folder, layout, "site"), name_at(folder, layout, "class")
        if site is not None and name is not None:
            holders.setdefault(name, set()).add(site)
    sites = set[str]().union(*holders.values())
    if len(sites) < 2 or any(len(holder) > 1 for holder in holders.values()):
        return
    other = {"site/class": "class", "split/site/class": "split/class"}.get(layout)
    instead = other and f"{other} if {listed(sorted(sites), 2)} are the classes, or to "
    raise FedloraError(
        f"data.source.layout=auto cannot tell whether {_example(folders[0])} is {layout}: no class "
        f"would occur in two sites. Set data.source.layout to {instead or ''}{layout} if every "
        "site really has classes of its own."
    )


def _check_depth(folders: Sequence[PictureFolder], layout: str) -> None:
    depth = layout.count("/") + 1
    for folder in folders:
        if len(folder.parts) < depth:
            raise FedloraError(
                f"data.source.layout={layout} needs pictures to lie at least {depth} folder(s) "
                f"below data.source.root, got {_example(folder)}. Move it, or set another layout."
            )


def _check_splits(folders: Sequence[PictureFolder], layout: str) -> None:
    if "split" not in layout.split("/"):
        return
    level = layout.split("/").index("split")
    for folder in folders:
        name = folder.parts[level]
        if name.lower() not in SPLIT_NAMES:
            raise FedloraError(
                f"data.source.layout={layout}: folders of splits must be called "
                f"{', '.join(SPLIT_NAMES)}, got {name!r} in {_example(folder)}."
                f"{did_you_mean(name.lower(), SPLIT_NAMES) or ' Rename it, or move it away.'}"
            )


def _check_classes(folders: Sequence[PictureFolder], layout: str) -> None:
    names = {name_at(folder, layout, "class") or "" for folder in folders}
    if all(name.lower() in SPLIT_NAMES for name in names):
        raise FedloraError(
            f"{listed(sorted(names))} would be the classes, which are splits, as in "
            f"{_example(folders[0])} (data.source.layout={layout}). Put folders named after "
            "classes into those of splits."
        )


def _example(folder: PictureFolder) -> str:
    return repr(printable("/".join((*folder.parts, folder.names[0]))))
