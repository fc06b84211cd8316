"""``fedlora partition``: who holds what, as a table and a picture, before any training."""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.arguments import TOOLS, complete
from fedlora.errors import FedloraError, UsageError
from fedlora.explain import explain, known_names
from fedlora.files import expand, write_atomically
from fedlora.tools.info import ANYTHING

if TYPE_CHECKING:
    from fedlora.data import FederatedDataModule

# Settings of the other commands, so that their configs and options are taken as they are.
IGNORED = ("ckpt_path", "weights_only", "trainer")
FORMATS = (".png", ".pdf", ".svg")
MOST_CLIENTS, MOST_CLASSES = 60, 12  # that a table shows


def holdings(data: FederatedDataModule) -> dict[str, Any]:
    """Who holds what.

    Args:
        data: the data module; its settings say it all.

    Returns:
        ``classes``: their names; ``clients``: per client ``id``, ``name``, ``train``, ``val`` and
        ``test`` (rows), ``counts`` (training rows of each class); ``val`` and ``test``: rows of
        each class at the server; ``shared_test``: rows that both a client and the server test on;
        ``idle``: rows that nobody got; ``unreadable``: pictures left out; ``skew``: mean over
        clients of the total variation distance between a client's labels and the pool's (0: alike;
        1: apart).

    Raises:
        FedloraError: when the pictures cannot be had or divided.
    """
    data.prepare_data()
    table, division = data.divide()
    names = data.class_names

    def counted(rows: Any) -> list[int]:
        counts: list[int] = np.bincount(table.labels[rows], minlength=len(names)).tolist()
        return counts

    clients = [
        {
            "id": i,
            "name": name,
            "train": len(rows),
            "val": len(division.client_val[i]),
            "test": len(division.client_test[i]),
            "counts": counted(rows),
        }
        for i, (rows, name) in enumerate(zip(division.train, division.names, strict=True))
    ]
    counts = np.array([client["counts"] for client in clients], dtype=np.float64)
    pool = counts.sum(0) / counts.sum()
    skew = np.abs(counts / counts.sum(1, keepdims=True) - pool).sum(1) / 2
    return {
        "classes": names,
        "clients": clients,
        "val": counted(division.val),
        "test": counted(division.test),
        "shared_test": division.shared_test(),
        "idle": division.idle,
        "unreadable": division.unusable,
        "skew": float(skew.mean()),
    }


def show(held: Mapping[str, Any]) -> None:
    """Print what :func:`holdings` gave."""
    from rich.console import Console

    # Without a terminal there is no width to keep to.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    clients, names = held["clients"], held["classes"]
    console.print(_table(held))
    if len(clients) > MOST_CLIENTS:
        print(f"… and {len(clients) - MOST_CLIENTS:,} more; --json prints all.")
    for line in _notes(held, len(clients), len(names)):
        console.print(line, markup=False)


def _notes(held: Mapping[str, Any], clients: int, classes: int) -> Iterator[str]:
    total = sum(client["train"] for client in held["clients"])
    yield (
        f"\n{total:,} training pictures of {classes} classes with {clients:,} clients; the server "
        f"has {sum(held['val']):,} to validate and {sum(held['test']):,} to test on."
    )
    tested, shared = _tested(held), held["shared_test"]
    if tested:
        too = f"; the server has {shared:,} of these, too" if shared else ""
        yield f"The clients have {tested:,} of their own to test on{too}."
    yield (
        f"Label skew {held['skew']:.3f}: how far a client's classes are from those of all (mean "
        "total variation distance; 0 alike, 1 apart)."
    )
    if held["idle"]:
        yield f"{held['idle']:,} pictures are with nobody."
    if held["unreadable"]:
        yield f"{held['unreadable']:,} pictures cannot be read and are left out."


def _table(held: Mapping[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    names = held["classes"]
    each = len(names) <= MOST_CLASSES
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    named = any(client["name"] for client in held["clients"])
    sizes = ("train", "val", "test") if _tested(held) else ("train", "val")
    for title in ("client", *(("name",) if named else ()), *sizes):
        table.add_column(title, justify="left" if title == "name" else "right")
    for title in names if each else ("classes", "most of", "share"):
        table.add_column(_plain(title), justify="left" if title == "most of" else "right")
    for client in held["clients"][:MOST_CLIENTS]:
        own = (_plain(client["name"]),) if named else ()
        cells = map(str, client["counts"]) if each else _largest(client["counts"], names)
        table.add_row(str(client["id"]), *own, *(f"{client[part]:,}" for part in sizes), *cells)
    return table


def _tested(held: Mapping[str, Any]) -> int:
    """How many pictures clients test on."""
    return sum(client["test"] for client in held["clients"])


def _largest(counts: Sequence[int], names: Sequence[str]) -> tuple[str, str, str]:
    """How many classes there are, the largest one, and its share."""
    best = int(np.argmax(counts))
    share = 100 * counts[best] / max(sum(counts), 1)
    return str(sum(count > 0 for count in counts)), _plain(names[best]), f"{share:.0f} %"


def _plain(name: str) -> str:
    from rich.markup import escape

    return escape(name)


def plot(held: Mapping[str, Any], path: Path) -> None:
    """Draw the training rows of each client and class: bars, or a map where there are many.

    Args:
        held: from :func:`holdings`.
        path: where to write; .png, .pdf or .svg.

    Raises:
        FedloraError: for another kind of file, and where it cannot be written.
    """
    import warnings

    from matplotlib.figure import Figure

    counts = np.array([client["counts"] for client in held["clients"]])
    labels = [_drawn(client["name"]) or str(client["id"]) for client in held["clients"]]
    few = len(labels) <= 100
    figure = Figure(figsize=(9, min(max(3.0, 0.3 * len(labels)), 16)), layout="constrained")
    axes = figure.add_subplot()
    if few and counts.shape[1] <= 20:
        _bars(axes, counts, held["classes"])
    else:
        image = axes.imshow(counts, aspect="auto", interpolation="nearest", cmap="viridis")
        figure.colorbar(image, label="training pictures")
        axes.set_xlabel("class")
    axes.set_yticks(range(len(labels)) if few else [], labels if few else [])
    axes.set_ylabel("client")
    # A font may lack a name's letters: boxes are drawn in their place.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150))


def _drawn(name: str) -> str:
    """A name as matplotlib draws it: no mathematics, and no legend is left out."""
    return ("\u200b" * name.startswith("_")) + name.replace("$", r"\$")


def _bars(axes: Any, counts: Any, names: Sequence[str]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    left = np.zeros(len(counts))
    for label, name in enumerate(names):
        axes.barh(
            range(len(counts)),
            counts[:, label],
            left=left,
            color=colours[label],
            label=_drawn(name),
        )
        left += counts[:, label]
    axes.invert_yaxis()
    axes.set_xlabel("training pictures")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def run(args: Sequence[str]) -> None:
    """Parse the options of ``fedlora partition``, divide, print and draw.

    Raises:
        UsageError: for a wrong command line.
        FedloraError: when the pictures cannot be had or divided.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from fedlora.data.datamodule import FederatedDataModule
    from fedlora.data.partition import link_partitioner

    parser = ArgumentParser("fedlora partition", allow_abbrev=False, exit_on_error=False)
    parser.description = TOOLS["partition"][1]
    parser.add_argument("-c", "--config", action="config", help="A config of fit; may be repeated.")
    parser.add_argument("--seed_everything", type=int, default=0, help="The seed.")
    parser.add_class_arguments(FederatedDataModule, "data")
    link_partitioner(parser)
    parser.add_argument("--plot", type=str | None, help="Draw it too: a .png, .pdf or .svg file.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument("--quiet", action="store_true", help=SUPPRESS)
    for name in (*IGNORED, "model"):
        parser.add_argument(f"--{name}", type=ANYTHING, help=SUPPRESS)
    try:
        config = parser.parse_args(complete(["partition", *args])[1:])
    except ArgumentError as error:
        raise UsageError(explain(error, known_names(parser))) from error
    path = None if config.plot is None else _drawable(config.plot)
    data = parser.instantiate(config).data
    if data.on_bad_image == "skip":
        data.preprocess = _preprocess(config.model)
    held = holdings(data)
    if path is not None:
        plot(held, path)
    if config.json:
        print(json.dumps(held, indent=2, ensure_ascii=False))
    else:
        show(held)
        if path is not None:
            print(f"The picture is in {path}")


def _preprocess(model: Any) -> Any:
    """The size at which pictures are kept: they are read, so that bad ones are known."""
    from fedlora.data.preprocess import ImagePreprocess
    from fedlora.modules.loading import load_preprocess_config

    name = model.get("model_name", "tiny-clip") if isinstance(model, Mapping) else "tiny-clip"
    return ImagePreprocess.from_config(load_preprocess_config(name))


def _drawable(name: str) -> Path:
    path = expand(name, "--plot")
    if path.suffix.lower() not in FORMATS:
        raise FedloraError(
            f"--plot must be a file that ends in {', '.join(FORMATS)}, got {name}. Write for "
            "example --plot=clients.png."
        )
    if not path.parent.is_dir():
        raise FedloraError(f"--plot {name}: there is no folder {path.parent}. Make it first.")
    return path
