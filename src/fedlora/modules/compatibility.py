"""Whether a saved adapter fits a model, and each thing that keeps it from fitting."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.clip_targets import HEADS
from fedlora.modules.in_full import norms
from fedlora.state import AdapterState

if TYPE_CHECKING:
    from fedlora.modules.lora import LoRAWrapper
    from fedlora.modules.saved import SavedAdapter

# A zero-shot head is computed where it is built: another machine rounds it differently. A type
# whose own steps are wider is compared by those.
CLOSE = 1e-4
SAME = "(use the model that it was trained on)"


def heads(lora: LoRAWrapper) -> list[str]:
    """Adapted layers that are not in the model which PEFT knows: a head beside a CLIP."""
    inside = {id(module) for module in lora.model.modules()}
    return [name for name, layer in lora.layers.items() if id(layer) not in inside]


def faults(saved: SavedAdapter, lora: LoRAWrapper) -> tuple[AdapterState, list[str]]:
    """Compare a saved adapter with a model.

    Returns:
        What of the saved state is to be loaded; each difference, with what to do, in words.
    """
    state, mine = saved.state, lora.state()
    found = [*_base(saved, lora)]
    model = getattr(lora, "federated", None)
    if isinstance(model, FederatedCLIPModel):
        found += _classes(saved, model)
        if model.classifier is None:  # a text head: a saved linear one is of no use
            state = _without_head(state)
    differing = _heads(saved, lora)
    found += differing
    if differing:  # said once: neither its layer nor its tensors again
        names = {"classifier", saved.head.get("layer"), *heads(lora)}
        state, mine = (_without_head(_without(s, names), names) for s in (state, mine))
    found += _layers(state, mine, lora)
    found += _sizes(saved, state, lora)
    found += _others(saved, state, mine, lora)
    found += lora.served.faults({n: r for n, r in state.residual.items() if n in lora.layers})
    return state, found


def _without(state: AdapterState, names: Collection[str | None]) -> AdapterState:
    A, B = ({n: t for n, t in part.items() if n not in names} for part in (state.A, state.B))
    return replace(state, A=A, B=B)


def _without_head(
    state: AdapterState, names: Collection[str | None] = ("classifier",)
) -> AdapterState:
    other = {n: t for n, t in state.other.items() if n.rpartition(".")[0] not in names}
    return replace(state, other=other)


def _base(saved: SavedAdapter, lora: LoRAWrapper) -> Iterator[str]:
    there = saved.told.get("base_model_sha256")
    if there is None:  # plain PEFT does not say
        return
    described = lora.describe()
    here = described["base_model_sha256"]
    if there != here:
        model = saved.told.get("base_model")
        yield (
            f"it was trained on other base weights, {model} with SHA-256 {str(there)[:12]}…, here "
            f"{described['base_model']} with {here[:12]}… (load that model)"
        )


def _classes(saved: SavedAdapter, model: FederatedCLIPModel) -> Iterator[str]:
    """A linear head is of use for its own classes, in their order."""
    if model.classifier is None or not saved.told:
        return
    head = saved.told.get("head")
    if head is not None and head != "linear":
        yield f"its head is {head!r}, here 'linear' (set model.head={head})"
        return
    there, here = saved.told.get("class_names"), model.class_names
    if there is None or here is None:
        return
    if len(there) != len(here):
        yield f"it has {len(there)} classes, here are {len(here)} (use the data it was trained on)"
        return
    pairs = ((i, a, b) for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
    first = next(pairs, None)
    if first is not None:
        yield "its class {} is {!r}, here {!r} (use the data it was trained on)".format(*first)


def _heads(saved: SavedAdapter, lora: LoRAWrapper) -> list[str]:
    """Whether the same head has LoRA, on the same base weight."""
    there, here = saved.head.get("layer"), next(iter(heads(lora)), None)
    if there is None and here is None:
        return []
    if there is None or here is None:
        with_lora, without = ("there", "here") if here is None else ("here", "there")
        components = saved.settings.get("target_components") or ["encoder"]
        return [
            f"the head {there or here!r} has LoRA {with_lora} and none {without} (set "
            f"lora.target_components={list(components)})"
        ]
    if there != here:
        return [f"the head with LoRA is {there!r} there and {here!r} here"]
    layer: Any = lora.layers[here].get_base_layer()
    pairs = [("base_weight", "weight", lora.served.pristine(here))]
    if "bias" in saved.head and layer.bias is not None:
        pairs.append(("bias", "bias", layer.bias.detach()))
    return [
        fault
        for key, name, own in pairs
        for fault in _unlike(f"the {name} of the head {here!r} below LoRA", saved.head[key], own)
    ]


def _unlike(what: str, there: Tensor, here: Tensor) -> Iterator[str]:
    close = max(CLOSE, *(torch.finfo(tensor.dtype).eps for tensor in (there, here)))
    if there.shape != here.shape:
        yield (
            f"{what} has shape {tuple(there.shape)}, here {tuple(here.shape)} (use the classes and "
            "the model that it was trained on)"
        )
    elif not torch.allclose(there.double(), here.cpu().double(), rtol=close, atol=CLOSE):
        yield f"{what} has other values (use the classes and prompts that it was trained on)"


def _layers(state: AdapterState, mine: AdapterState, lora: LoRAWrapper) -> Iterator[str]:
    todo = "(check lora.placement, layers, target_modules and target_components, and the towers)"
    # A layer that the head leaves idle may be there or not.
    only_there = sorted(state.A.keys() - lora.layers.keys())
    only_here = sorted(mine.A.keys() - state.A.keys())
    if only_there:
        yield f"{_count(only_there)} adapted there and not here {todo}"
    if only_here:
        yield f"{_count(only_here)} adapted here and not there {todo}"


def _count(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"layer {names[0]} is"
    return f"{len(names)} layers (such as {names[0]}) are"


def _sizes(saved: SavedAdapter, state: AdapterState, lora: LoRAWrapper) -> Iterator[str]:
    """Widths, ranks and scaling of the layers that both have."""
    both = sorted(state.A.keys() & lora.layers.keys())
    there, here = _shapes(state.A, state.B), _shapes(lora.parameters["A"], lora.parameters["B"])
    for (one, two), names in _differing(both, there, here, "width"):
        yield f"{_count(names)} {one} there, {two} here"
    ranks = list(_differing(both, there, here, "rank"))
    for (one, two), names in ranks:
        yield f"{_count(names)} of rank {one} there, {two} here (set lora.r={one})"
    scalings = {
        (saved.state.scaling[n], lora.scaling[n])
        for n in both
        if not math.isclose(saved.state.scaling[n], lora.scaling[n], rel_tol=1e-6)
    }
    if ranks or scalings:
        said = list(_scaling_settings(saved.settings, lora))
        yield from said
        if not said and not ranks:
            for one, two in sorted(scalings):
                yield f"B A is scaled by {one:g} there, {two:g} here (set lora.lora_alpha)"


def _shapes(A: Mapping[str, Tensor], B: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"rank": len(A[name]), "width": f"{len(B[name])} x {A[name].flatten(1).shape[1]}"}
        for name in A
    }


def _differing(
    names: Sequence[str],
    there: Mapping[str, Mapping[str, Any]],
    here: Mapping[str, Mapping[str, Any]],
    what: str,
) -> Iterator[tuple[tuple[Any, Any], list[str]]]:
    """Each pair of values that differ, with the layers where they do."""
    found: dict[tuple[Any, Any], list[str]] = defaultdict(list)
    for name in names:
        pair = (there[name][what], here[name][what])
        if pair[0] != pair[1]:
            found[pair].append(name)
    yield from found.items()


def _scaling_settings(settings: Mapping[str, Any], lora: LoRAWrapper) -> Iterator[str]:
    for name in ("lora_alpha", "use_rslora"):
        there, here = settings.get(name, False), getattr(lora.config, name)
        if there != here:
            value = str(there).lower() if isinstance(there, bool) else there
            yield f"{name} is {there} there, {here} here (set lora.{name}={value})"
    for name in ("rank_pattern", "alpha_pattern"):
        if settings.get(name):
            yield f"{name} gives its layers different settings, which LoRAConfig cannot"


def _others(
    saved: SavedAdapter, state: AdapterState, mine: AdapterState, lora: LoRAWrapper
) -> Iterator[str]:
    """Biases, normalisation layers, a head, running statistics: names and shapes."""
    there, here = dict(state.other), dict(mine.other)
    layers = norms(lora.model)
    theirs = _trains_norms(saved, there, lora, layers)
    if theirs != lora.config.train_norm:
        value = str(theirs).lower()
        yield (
            f"train_norm is {theirs} there, {lora.config.train_norm} here (set "
            f"lora.train_norm={value})"
        )
        there, here = ({n: t for n, t in p.items() if n not in layers} for p in (there, here))
    bias = saved.settings.get("bias", "none")
    if bias != lora.config.bias:
        yield f"bias is {bias!r} there, {lora.config.bias!r} here (set lora.bias={bias})"
        there, here = (
            {n: t for n, t in part.items() if not n.endswith("bias")} for part in (there, here)
        )
    only_there = sorted(there.keys() - here.keys())
    only_here = sorted(here.keys() - there.keys())
    if only_there:
        yield f"{_tensors(only_there)} learned there and not here {SAME}"
    if only_here and saved.told:  # plain PEFT knows of no head: it stays as it is
        yield f"{_tensors(only_here)} learned here and not there {SAME}"
    head = _head_names(lora)
    for name in sorted(there.keys() & here.keys()):
        one, two = tuple(there[name].shape), tuple(here[name].shape)
        if one != two:
            classes = name.rpartition(".")[0] in head and one[:1] != two[:1]
            todo = f"(it has {one[0]} classes: use the data it was trained on)" if classes else SAME
            yield f"{name} has shape {one} there, {two} here {todo}"


def _trains_norms(
    saved: SavedAdapter, there: Collection[str], lora: LoRAWrapper, layers: Collection[str]
) -> bool:
    """Whether a saved adapter brings normalisation layers of its own."""
    if saved.told:
        return bool(saved.settings.get("train_norm", False))
    # PEFT has no such setting, so its tensors tell; without any the layers stay as they are.
    weights = (name for name in layers if name.endswith("weight"))
    return lora.config.train_norm or any(name in there for name in weights)


def _head_names(lora: LoRAWrapper) -> Collection[str]:
    """Linear heads beside a CLIP, adapted or not."""
    anatomy = getattr(lora, "anatomy", None)
    layers = list(anatomy.linear_outside()) if anatomy is not None else []
    return layers if len(layers) == 1 else [n for n in layers if n.rpartition(".")[2] in HEADS]


def _tensors(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{len(names)} tensors (such as {names[0]}) are"
