"""An adapter folder, read back: our own, or what plain PEFT wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.files import expand, present, sha256
from fedlora.modules.compatibility import faults
from fedlora.modules.lora import LoRAWrapper
from fedlora.modules.peft_files import (
    CONFIG,
    PeftFiles,
    check_pairs,
    finite,
    read_json,
    read_peft,
    read_tensors,
)
from fedlora.state import AdapterState, Residual

FORMAT = 1
ABOUT = "fedlora.json"
CLASSIFIER = "classifier.safetensors"
OTHER = "other.safetensors"
RESIDUAL = "residual.safetensors"
# What is read of fedlora.json besides plain values; each may be missing or null.
TYPES = {"lora": dict, "head_lora": dict, "class_names": list}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk.

    Attributes:
        folder: where it is, absolute.
        state: what was learned.
        told: ``fedlora.json``; empty where plain PEFT wrote the folder.
        peft: PEFT's ``adapter_config.json``; empty for an adapter on a head alone.
        head: of a head that has LoRA its ``layer`` and the tensors ``base_weight`` and ``bias``
            that it stands on; empty otherwise.
    """

    folder: Path
    state: AdapterState
    told: Mapping[str, Any] = field(default_factory=dict)
    peft: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        """``r``, ``lora_alpha``, ``use_rslora``, ``bias`` … that it was trained with."""
        # With a residual PEFT's config is about the sum, not about what was trained.
        return dict(self.told.get("lora") or self.peft)


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read an adapter folder; nothing in it is ever executed.

    Args:
        folder: what :func:`~fedlora.export.export_adapter` or PEFT's ``save_pretrained`` wrote;
            ``~`` is the home folder.

    Raises:
        FedloraError: when it is no such folder, is damaged, or uses features that we have not.
    """
    path = _find(folder)
    told = _read_about(path)

    def tensors(name: str) -> dict[str, Tensor]:
        # Only files that fedlora.json vouches for, where there is one.
        there = (path / name).is_file() and (not told or name in told["sha256"])
        return read_tensors(path / name) if there else {}

    peft = read_peft(path) if (path / CONFIG).is_file() else PeftFiles()
    A, B, scaling = dict(peft.A), dict(peft.B), dict(peft.scaling)
    residual: dict[str, Residual] = {}
    other = {**peft.other, **tensors(OTHER)}
    head = _read_head(told, tensors(CLASSIFIER), (A, B, scaling, other), path)
    apart = tensors(RESIDUAL)
    if apart:
        A, B, scaling, residual = _read_apart(apart, path)
    state = AdapterState(A, B, {n: t.float() for n, t in other.items()}, scaling, residual)
    return SavedAdapter(path, state, told, peft.config, head)


def load_adapter(folder: str | Path, wrapper_or_model: Any) -> SavedAdapter:
    """Put a saved adapter into a model that fits; returns what was read.

    Args:
        folder: the ``adapter`` folder of a run, what a LoRAModelManager's ``save_model`` returned,
            or what PEFT's ``save_pretrained`` wrote; ``~`` is the home folder.
        wrapper_or_model: a LoRAWrapper that is applied and on, or an object that a CLIPLoRAWrapper
            wraps (of a CLIPLoRAClassifier its ``model``); with the settings that the adapter was
            trained with.

    Raises:
        FedloraError: where the folder is no adapter, is damaged or uses features that we have not;
            where it does not fit, naming each difference. Nothing is changed then.

    Example:
        >>> import tempfile, torch
        >>> from fedlora import LoRAConfig, LoRAModelManager, LoRAWrapper, load_adapter
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> lora = LoRAWrapper(model, LoRAConfig(r=2)).apply()
        >>> folder = LoRAModelManager(tempfile.mkdtemp()).save_model(lora, "mine")
        >>> load_adapter(folder, lora).settings["r"]
        2
    """
    lora = wrapper_of(wrapper_or_model)
    lora.report()  # says so where the adapter is not on
    saved = read_adapter(folder)
    if not lora.config.enabled:
        raise FedloraError(
            f"{saved.folder} holds a LoRA adapter, and LoRA is off here. Set lora.enabled=true."
        )
    state, found = faults(saved, lora)
    if found:
        raise FedloraError(
            f"the adapter in {saved.folder} does not fit this model, nothing was changed: "
            f"{'; '.join(found)}."
        )
    lora.load(state)
    return saved


def wrapper_of(thing: Any) -> LoRAWrapper:
    """A LoRAWrapper itself, or the one that an object knows as ``lora_wrapper``.

    Raises:
        FedloraError: where there is none.
    """
    found = thing if isinstance(thing, LoRAWrapper) else getattr(thing, "lora_wrapper", None)
    if not isinstance(found, LoRAWrapper):
        raise FedloraError(
            f"expected a LoRAWrapper or an object that one wraps, got {type(thing).__name__}, "
            "which knows of none. Wrap it with CLIPLoRAWrapper and apply that first; with "
            "lora.enabled=false there is no adapter to save or load."
        )
    return found


def _find(folder: str | Path) -> Path:
    """Where an adapter is, absolute: the working folder itself has no name."""
    if not isinstance(folder, str | os.PathLike) or not str(folder):
        raise FedloraError(f"adapter must be the path of a folder, got {folder!r}.")
    try:
        path = present(expand(folder, "adapter").absolute())
        _refuse_other(path, folder)
    except OSError as error:
        raise FedloraError(
            f"adapter {str(folder)!r} cannot be read: {error.strerror}. Check the path."
        ) from error
    return path


def _refuse_other(path: Path, written: str | Path) -> None:
    if not path.is_dir():
        raise FedloraError(f"adapter {str(written)!r}: there is no such folder. Check the path.")
    if (path / "model").is_dir() and not (path / CONFIG).exists():
        raise FedloraError(
            f"{path} holds a whole model, trained with lora.enabled=false, and no adapter. Load "
            f"{path / 'model'} with transformers' from_pretrained."
        )
    if not (path / CONFIG).exists() and not (path / ABOUT).exists():
        inner = next((n for n in ("adapter", "default") if (path / n / CONFIG).exists()), "")
        hint = f"Give {path / inner}." if inner else "Check the path."
        raise FedloraError(
            f"{path} is no adapter folder: it has neither {CONFIG} nor {ABOUT}. {hint}"
        )


def _read_about(path: Path) -> dict[str, Any]:
    if not (path / ABOUT).exists():
        return {}
    told = read_json(path / ABOUT)
    hashes = told.get("sha256")
    if told.get("format") != FORMAT or not isinstance(hashes, dict):
        raise FedloraError(
            f"{path / ABOUT} has format {told.get('format')!r}, this version reads {FORMAT}. Use "
            f"the version of fedlora that wrote it ({told.get('fedlora', 'unknown')})."
        )
    wrong = [fault for name in hashes for fault in _wrong(path, name, hashes[name])]
    wrong += _mistyped(told)
    if wrong:
        raise FedloraError(
            f"the adapter in {path} is damaged: {'; '.join(wrong)}. Copy or save it anew."
        )
    return told


def _mistyped(told: Mapping[str, Any]) -> Iterator[str]:
    """What fedlora.json says in another type than it was written with."""
    for name, kind in TYPES.items():
        if not isinstance(told.get(name), kind | None):
            yield f"{name} in {ABOUT} is {told[name]!r}"
    lora = told.get("lora")
    components = lora.get("target_components") if isinstance(lora, dict) else None
    if not isinstance(components, list | None):
        yield f"lora.target_components in {ABOUT} is {components!r}"


def _wrong(path: Path, name: str, digest: object) -> list[str]:
    file = path / name
    try:
        if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file():
            return [f"{name} is missing"]
        same = sha256(file) == digest
    except OSError as error:
        return [f"{name} cannot be read ({error.strerror})"]
    return [] if same else [f"{name} is not what {ABOUT} says (its SHA-256 is another)"]


Parts = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float], dict[str, Tensor]]


def _read_head(
    told: Mapping[str, Any], tensors: dict[str, Tensor], parts: Parts, path: Path
) -> dict[str, Any]:
    """Put the head's tensors to their parts (A, B, scaling, other); returns what it stands on."""
    A, B, scaling, other = parts
    about = told.get("head_lora")
    if about is None:
        other.update({f"classifier.{name}": tensor for name, tensor in tensors.items()})
        return {}
    try:
        layer = str(about["layer"])
        A[layer], B[layer] = tensors["lora_A"].float(), tensors["lora_B"].float()
        scaling[layer] = finite(about["scaling"])
        head: dict[str, Any] = {"layer": layer, "base_weight": tensors["base_weight"]}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FedloraError(
            f"the adapter in {path} is damaged: {CLASSIFIER} and {ABOUT} do not agree on the head "
            f"({error}). Save it anew."
        ) from error
    check_pairs(path, {layer: A[layer]}, {layer: B[layer]})
    if "bias" in tensors:
        if about.get("bias_learned"):
            other[f"{layer}.bias"] = tensors["bias"]
        else:
            head["bias"] = tensors["bias"]
    return head


def _read_apart(
    tensors: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float], dict[str, Residual]]:
    names = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    try:
        A, B = ({n: tensors[f"{n}.lora_{factor}"].float() for n in names} for factor in "AB")
        scaling = {n: float(tensors[f"{n}.scaling"]) for n in names}
    except (KeyError, ValueError, RuntimeError) as error:
        raise FedloraError(f"{path / RESIDUAL} is damaged ({error}). Save it anew.") from error
    check_pairs(path, A, B)
    residual = {
        n: Residual(tensors[f"{n}.U"], tensors.get(f"{n}.V")) for n in names if f"{n}.U" in tensors
    }
    return A, B, scaling, residual
