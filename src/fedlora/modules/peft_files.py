"""PEFT's two files of a LoRA adapter, read without PEFT, and refused where they mean more."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedlora.errors import FedloraError

T = TypeVar("T")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # what PEFT wrote before safetensors
PREFIX = "base_model.model."  # how PEFT names what is inside its PeftModel
FACTOR = re.compile(r"^(.+)\.lora_(A|B)\.weight$")
# A pattern that is a layer's name: any other expression in a foreign file could take for ever.
PLAIN = re.compile(r"(?:[\w.^$-]|\\[.-])+")
PATTERNS = ("rank_pattern", "alpha_pattern")
# Settings that say which layers there are, how they were trained or who wrote the file: the
# tensors tell all that matters of them. Any other that is set is a feature that we have not.
# fmt: off
HARMLESS = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora",
    "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "init_lora_weights", "eva_config", "megatron_core",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
))
# fmt: on
# Starts of the factors that leave the base weights alone; pissa, olora, loftq … change them.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftFiles:
    """What PEFT's files say.

    Attributes:
        config: ``adapter_config.json``.
        A: path in the base model -> (rank, in_features * kernel), float32.
        B: path -> (out_features, rank), float32.
        scaling: path -> what B A is multiplied with.
        other: biases, normalisation layers and whatever else of the base is in it, by path.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    A: dict[str, Tensor] = field(default_factory=dict)
    B: dict[str, Tensor] = field(default_factory=dict)
    scaling: dict[str, float] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)


def read_peft(folder: Path) -> PeftFiles:
    """Read an adapter that PEFT or :func:`~fedlora.export.export_adapter` wrote.

    Raises:
        FedloraError: for files that are missing or damaged, and for features that we have not, by
            name.
    """
    config = read_json(folder / CONFIG)
    features = list(_features(config))
    if features:
        raise FedloraError(
            f"the adapter in {folder} uses what fedlora does not have: {', '.join(features)}. Use "
            "a plain LoRA adapter."
        )
    found = PeftFiles(config)
    for key, tensor in _weights(folder).items():
        name = key.removeprefix(PREFIX)
        match = FACTOR.match(name)
        if match:
            factors = found.A if match[2] == "A" else found.B
            factors[match[1]] = tensor.float().flatten(1) if tensor.ndim > 2 else tensor.float()
        elif "lora_" in name:
            raise FedloraError(
                f"the adapter in {folder} uses what fedlora does not have: the tensor {key}. Use a "
                "plain LoRA adapter on linear and convolutional layers."
            )
        else:
            found.other[name.replace(".base_layer.", ".")] = tensor
    check_pairs(folder, found.A, found.B)
    if not found.A:
        raise FedloraError(f"the adapter in {folder} holds no LoRA layer. Save it anew.")
    found.scaling.update({name: _scaling(config, name, folder) for name in found.A})
    return found


def _features(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type {kind!r} (expected 'LORA')"
    if config.get("init_lora_weights") not in STARTS:
        yield f"init_lora_weights {config['init_lora_weights']!r} (it changes the base weights)"
    for name, value in config.items():
        if value and name not in HARMLESS:
            yield f"{name}={value!r}"
    for name in PATTERNS:
        patterns = config.get(name)
        for pattern in patterns if isinstance(patterns, Mapping) else ():
            if not PLAIN.fullmatch(pattern):
                yield f"{name} {pattern!r} (only names of layers, no other regular expression)"


def check_pairs(folder: Path, A: Mapping[str, Tensor], B: Mapping[str, Tensor]) -> None:
    """Refuse factors that are not (rank, in_features) and (out_features, rank) for each layer.

    Raises:
        FedloraError: names the first layer.
    """
    for name in sorted(A.keys() | B.keys()):
        if name not in A or name not in B or not _is_pair(A[name], B[name]):
            raise FedloraError(
                f"the adapter in {folder} is damaged: the factors of {name} are not a pair. Save "
                "it anew."
            )


def _is_pair(A: Tensor, B: Tensor) -> bool:
    return A.ndim == B.ndim == 2 and len(A) == B.shape[1]


def _scaling(config: Mapping[str, Any], name: str, folder: Path) -> float:
    """As PEFT computes it, patterns included."""
    try:
        r = _by_pattern(config.get("rank_pattern"), name, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        return finite(alpha / (math.sqrt(r) if config.get("use_rslora") else r))
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise FedloraError(
            f"{folder / CONFIG} has no usable r and lora_alpha ({type(error).__name__}). Save the "
            "adapter anew."
        ) from error


def finite(value: Any) -> float:
    """A number from a file: JSON has NaN, and whole numbers of any size.

    Raises:
        ValueError: where it is not finite; as ``float`` does where it is none.
        OverflowError: where it is too large.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    if not (folder / PICKLED).is_file():
        raise FedloraError(
            f"the adapter in {folder} has no {WEIGHTS} (nor {PICKLED}) beside its {CONFIG}. Copy "
            "the whole folder."
        )

    def load(path: Path) -> object:
        return torch.load(path, map_location="cpu", weights_only=True)  # executes nothing

    loaded = _read(folder / PICKLED, load)
    if not isinstance(loaded, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in loaded.items()
    ):
        raise FedloraError(f"{folder / PICKLED} holds something else than named tensors.")
    return _checked(folder / PICKLED, loaded)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of the floating point types that they have.

    Raises:
        FedloraError: when it is damaged, or has values that are NaN or infinite.
    """
    from safetensors.torch import load_file

    return _checked(path, _read(path, load_file))


def _checked(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise FedloraError(f"{path}: {name} is {tensor.dtype}, expected floating point.")
        if not bool(tensor.isfinite().all()):
            raise FedloraError(
                f"{path}: {name} has values that are NaN or infinite. Go back to an adapter from "
                "before that."
            )
    return dict(tensors)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        FedloraError: when it is none.
    """
    content = _read(path, lambda file: json.loads(file.read_text(encoding="utf-8")))
    if not isinstance(content, dict):
        raise FedloraError(f"{path} is damaged: it holds a {type(content).__name__}.")
    return content


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (FileNotFoundError, PermissionError) as error:
        reason = error.strerror or str(error)
        raise FedloraError(f"cannot read {path}: {reason}. Copy the whole folder.") from error
    except Exception as error:  # torch.load and safetensors fail with many types on damaged bytes
        raise FedloraError(
            f"{path} is damaged ({type(error).__name__}). Copy or save the folder anew."
        ) from error
