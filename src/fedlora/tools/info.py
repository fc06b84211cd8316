"""``fedlora info``: how much of a model is trained and travels, counted in the model itself."""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from fedlora.arguments import TOOLS, complete
from fedlora.errors import FedloraError, UsageError
from fedlora.explain import explain, known_names
from fedlora.modules.config import LoRAConfig

# No imports for type checkers only: jsonargparse would run them, and the help would wait for torch.
Towers = Literal["vision", "both"]
RANKS = (4, 8, 16, 32, 64)
PARTS = {"both": "both towers", "vision": "vision only"}
# Settings of the other commands, so that their configs and options are taken as they are. Not of
# type Any: jsonargparse would import the classes that they name.
ANYTHING = dict | list | str | float | bool | None  # type: ignore[type-arg]
IGNORED = (
    *("seed_everything", "ckpt_path", "weights_only", "trainer", "data"),
    *("model.towers", "model.adapter", "model.optimizer", "model.head_lr", "model.label_smoothing"),
    *("model.metrics", "model.class_weights", "model.frozen_cache_gb"),
)


def measure(
    model_name: str = "tiny-clip",
    num_classes: int | None = None,
    head: Literal["linear", "text"] = "linear",
    lora: LoRAConfig = LoRAConfig(),  # noqa: B008  (read only; the command line shows its fields)
) -> dict[str, Any]:
    """Measure how much of a model is trained and travels.

    The model is built from its config.json alone, without memory, wrapped at each rank and counted.

    Args:
        model_name: ``tiny-clip``, a local folder in the Hugging Face layout, or a hub name.
        num_classes: counts a linear head for so many classes too.
        head: ``linear`` or ``text``; a text head has no parameters of its own.
        lora: the adapter's settings; other ranks keep its lora_alpha / r.

    Returns:
        The settings; ``rows``, of which ``asked`` has the rank of the settings: ``total``
        parameters without the adapter, ``full``: trained in full (head, biases, normalisation
        layers), ``percent`` of the total trained, bytes for one client, one round, each way, and of
        the whole model, ``reduction`` in percent; ``left_out``: towers -> why they could not be
        measured.

    Raises:
        FedloraError: for a wrong setting, and a model whose config cannot be had.
    """
    lora.validate()
    if num_classes is not None and num_classes < 1:
        raise FedloraError(f"model.num_classes must be at least 1, got {num_classes}.")
    classes = num_classes if head == "linear" else None
    if "classifier" in lora.target_components and classes is None:
        raise FedloraError(
            "target_components: 'classifier' needs a linear head and the number of classes. Add "
            "--model.num_classes=N, and leave model.head at linear."
        )
    from torch import nn

    from fedlora.modules.families import drop_text_tower, feature_dim, has_text_tower
    from fedlora.modules.loading import empty_clip

    shell: Any = nn.Module()  # holds CLIP and head as somebody's own model would
    shell.clip = empty_clip(model_name)
    if classes is not None:
        shell.classifier = nn.Linear(feature_dim(shell.clip), classes, device="meta")
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    parts: tuple[Towers, ...] = ("both", "vision") if has_text_tower(shell.clip) else ("vision",)
    for towers in parts:
        if towers == "vision":
            drop_text_tower(shell.clip)
        try:
            rows += list(_rows(shell, lora, towers))
        except FedloraError as error:  # a block, say, that one tower has and the other has not
            left_out[towers] = str(error)
            if len(left_out) == len(parts):
                raise
    about = {"model": model_name, "num_classes": num_classes, "head": head, "lora": lora.to_dict()}
    return {**about, "rows": rows, "left_out": left_out}


def _rows(shell: Any, lora: LoRAConfig, towers: Towers) -> Iterator[dict[str, Any]]:
    import torch

    from fedlora.modules.clip_wrapper import CLIPLoRAWrapper

    for r in sorted({*RANKS, lora.r}) if lora.enabled else [lora.r]:
        config = replace(lora, r=r, lora_alpha=lora.lora_alpha * r / lora.r)
        with torch.device("meta"):  # PEFT makes the factors
            wrapper = CLIPLoRAWrapper(shell, config, towers=towers).apply()
        reports = {}
        for name in ("bfloat16", "float32"):
            shell.to(getattr(torch, name))
            reports[name] = wrapper.report()
        wrapper.unload()
        names = ("total", "adapter", "full", "trained", "percent", "reduction")
        yield {"towers": towers, "r": r, "lora_alpha": config.lora_alpha, "asked": r == lora.r} | {
            **{name: getattr(reports["float32"], name) for name in names},
            **{f"{name}_bytes": report.exchanged_nbytes for name, report in reports.items()},
            **{f"whole_{name}_bytes": report.total_nbytes for name, report in reports.items()},
        }


def show(sizes: Mapping[str, Any]) -> None:
    """Print what :func:`measure` gave: a table for each part, and what the figures mean."""
    from rich.console import Console

    # Without a terminal there is no width to keep to.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    lora = sizes["lora"]
    names = ["placement", "target_modules", "layers", "bias", "target_components"]
    names += ["train_norm"] if lora["train_norm"] else []
    settings = ", ".join(f"{name}={lora[name]}" for name in names if lora[name] is not None)
    what = f"lora_alpha = {lora['lora_alpha'] / lora['r']:g} r, {settings}"
    console.print(f"{sizes['model']}: LoRA {what if lora['enabled'] else 'off'}", markup=False)
    for towers, name in PARTS.items():
        rows = [row for row in sizes["rows"] if row["towers"] == towers]
        if rows:
            head_alone = lora["enabled"] and lora["bias"] == "none" and not lora["train_norm"]
            full = "head" if head_alone else "in full"
            console.print("", *_part(rows, name, full), sep="\n")
        elif towers in sizes["left_out"]:
            console.print(f"\n{name}: {sizes['left_out'][towers]}", markup=False)
    console.print("", *_notes(sizes), sep="\n", markup=False)


def _part(rows: Sequence[Mapping[str, Any]], name: str, full: str) -> Iterator[Any]:
    from rich import box
    from rich.table import Table

    from fedlora.modules.report import readable

    single, half = (readable(rows[0][f"whole_{name}_bytes"]) for name in ("float32", "bfloat16"))
    yield f"{name}: {_count(rows[0]['total'])} parameters ({single} in float32, {half} in bf16)\n"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for title in ("r", "adapter", full, "trained", "float32", "bf16", "reduction"):
        table.add_column(title, justify="right", overflow="fold")
    for row in rows:
        table.add_row(
            f"{row['r'] if row['adapter'] else 'off'} {'*' if row['asked'] else ' '}",
            _count(row["adapter"]),
            _count(row["full"]),
            f"{row['percent']:.2f} %",
            readable(row["float32_bytes"]),
            readable(row["bfloat16_bytes"]),
            f"{row['reduction']:.2f} %",
        )
    yield table


def _count(number: float) -> str:
    """A number of parameters: 151,277,313 -> "151.3M", 1,228,800 -> "1.23M"."""
    size, unit = (1e6, "M") if number >= 1e6 else (1e3, "k") if number >= 1e3 else (1, "")
    return f"{number / size:.{0 if size == 1 else 1 if number >= 10 * size else 2}f}{unit}"


def _notes(sizes: Mapping[str, Any]) -> Iterator[str]:
    yield "* as configured. Bytes: one client, one round, each way. Reduction: of a full exchange."
    linear = sizes["head"] == "linear"
    if linear and sizes["num_classes"] is None:
        yield "The linear head comes on top: --model.num_classes=N counts it."
    if linear and any(row["towers"] == "both" for row in sizes["rows"]):
        yield (
            "A text tower under a linear head gets no gradient. Its adapter is exchanged only "
            'where asked (towers=both); else what travels is what "vision only" shows.'
        )
    if not sizes["lora"]["save_only_trainable"]:
        yield "save_only_trainable is off: the whole model travels."


def run(args: Sequence[str]) -> None:
    """Parse the options of ``fedlora info``, measure and print.

    Raises:
        UsageError: for a wrong command line.
        FedloraError: for a wrong setting, and a model whose config cannot be had.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser("fedlora info", allow_abbrev=False, exit_on_error=False)
    parser.description = TOOLS["info"][1]
    parser.add_argument("-c", "--config", action="config", help="A config of fit; may be repeated.")
    parser.add_function_arguments(measure, "model")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument("--quiet", action="store_true", help=SUPPRESS)
    for name in IGNORED:
        parser.add_argument(f"--{name}", type=ANYTHING, help=SUPPRESS)
    try:
        config = parser.parse_args(complete(["info", *args])[1:])
    except ArgumentError as error:
        raise UsageError(explain(error, known_names(parser))) from error
    model, lora = config.model, LoRAConfig(**vars(config.model.lora))
    sizes = measure(model.model_name, model.num_classes, model.head, lora)
    if config.json:
        print(json.dumps(sizes, indent=2))
    else:
        show(sizes)
