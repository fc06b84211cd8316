"""The ``adapter/`` folder: files that PEFT and transformers load as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlora.files import sha256, swapped_folder
from fedlora.modules import families
from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.compatibility import heads
from fedlora.modules.peft_files import PREFIX, WEIGHTS
from fedlora.modules.saved import ABOUT, CLASSIFIER, FORMAT, OTHER, RESIDUAL
from fedlora.peft_factors import peft_factors, scaling_settings
from fedlora.state import AdapterState

if TYPE_CHECKING:
    from fedlora.modules.lora import LoRAWrapper


def export_adapter(
    folder: Path,
    lora: LoRAWrapper,
    adapter: AdapterState,
    about: Mapping[str, Any],
    rank: int | None = None,
) -> None:
    """Write an adapter, replacing ``folder`` as a whole.

    With LoRA: PEFT's two files; without: the trained model in ``model/``, as transformers writes
    it. Beside them what those do not know:

    - ``classifier.safetensors``: a head that is part of a FederatedCLIPModel or has LoRA, as it is
      served (``weight``, ``bias``); with LoRA also ``base_weight``, ``lora_A``, ``lora_B``.
    - ``other.safetensors``: all else that is learned, under its own name.
    - ``residual.safetensors``: with a residual, factors and residual apart, to the bit. PEFT's
      file holds their sum, from which they cannot be had back.
    - ``fedlora.json``: what the adapter belongs to, and the hashes of all other files; with a
      residual under ``peft`` the ``rank`` of PEFT's file, whether it is ``exact``, and its
      ``error``: ``||served - exported||_F / ||served||_F`` over the layers in it together.

    Args:
        folder: the folder to replace.
        lora: the model that the adapter belongs to; applied, and on.
        adapter: the global adapter, residual included.
        about: what ``fedlora.json`` says besides (round, rule …).
        rank: the largest rank of PEFT's file, which with a residual may need more: it then holds
            the best approximation of this rank. None: whatever is exact.

    Raises:
        FedloraError: when it cannot be written; ``folder`` is then as it was.
    """
    described = lora.describe()
    counts, nbytes = _counts(lora, adapter)
    with swapped_folder(folder) as fresh:
        rest = dict(adapter.other)
        peft: dict[str, Any] = {}
        head = _write_head(fresh / CLASSIFIER, lora, adapter, rest)
        if lora.config.enabled:
            known, peft = _write_peft(fresh, lora, adapter, described["base_model"], rank)
        else:
            known = _write_model(fresh / "model", lora.model, adapter)
        _save(fresh / OTHER, {name: t for name, t in rest.items() if name not in known})
        files = sorted(path for path in fresh.rglob("*") if path.is_file())
        content = {
            "format": FORMAT,
            "fedlora": version("fedlora"),
            **about,
            **described,
            "lora": _settings(lora, adapter),
            **({"head_lora": head} if head else {}),
            **({"peft": peft} if peft else {}),
            "counts": counts,
            "bytes": nbytes,
            "sha256": {path.relative_to(fresh).as_posix(): sha256(path) for path in files},
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (fresh / ABOUT).write_text(text + "\n", encoding="utf-8")


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # safetensors refuses tensors that share memory, as a residual may with the factors.
        start = tensor.untyped_storage().data_ptr()
        whole[name] = (tensor.clone() if start in seen else tensor).contiguous()
        seen.add(start)
    if whole:
        save_file(whole, file, metadata={"format": "pt"})


def _write_head(
    file: Path, lora: LoRAWrapper, adapter: AdapterState, rest: dict[str, Tensor]
) -> dict[str, Any]:
    """Write the head as it is served, and take it out of ``rest``.

    Returns:
        What ``fedlora.json`` says of a head that has LoRA.
    """
    adapted = heads(lora)
    federated: Any = getattr(lora, "federated", None)
    ours = isinstance(federated, FederatedCLIPModel) and federated.classifier is not None
    if not adapted and not ours:
        return {}
    name = adapted[0] if adapted else "classifier"
    layer: Any = lora.layers[name].get_base_layer() if adapted else federated.classifier
    now = {"weight": layer.weight, "bias": layer.bias}
    head = {key: value.detach().cpu() for key, value in now.items() if value is not None}
    learned = {key: rest.pop(f"{name}.{key}") for key in head if f"{name}.{key}" in rest}
    head |= learned
    if not adapted:
        _save(file, head)
        return {}
    A, B, base = adapter.A[name], adapter.B[name], lora.served.pristine(name).cpu()
    served = base.double() + adapter.scaling[name] * (B.double() @ A.double())
    if name in adapter.residual:
        served += adapter.residual[name].to(torch.float64).dense()
    head["weight"] = served.to(base.dtype)
    _save(file, {**head, "base_weight": base, "lora_A": A, "lora_B": B})
    return {
        "layer": name,
        "r": A.shape[0],
        "scaling": adapter.scaling[name],
        "bias_learned": "bias" in learned,
    }


def _counts(lora: LoRAWrapper, adapter: AdapterState) -> tuple[dict[str, int], int]:
    """How much there is and travels, and in how many bytes, of an adapter that may be smaller."""
    report, travels = lora.report(), {id(tensor) for tensor in lora.travels().values()}
    adapted = exchanged = nbytes = 0
    for part in ("A", "B"):
        for name, own in lora.parameters[part].items():
            spared = own.numel() - adapter.part(part).get(name, own).numel()
            adapted += spared
            exchanged += spared * (id(own) in travels)
            nbytes += spared * (id(own) in travels) * own.element_size()
    counts = {
        "total": report.total,
        "adapter": report.adapter - adapted,
        "full": report.full,
        "exchanged": report.exchanged - exchanged,
    }
    return counts, report.exchanged_nbytes - nbytes


def _settings(lora: LoRAWrapper, adapter: AdapterState) -> dict[str, Any]:
    """The config that a model needs for this adapter to fit: a client may have a rank of its own.

    A head beside the encoder has its own preset, which no setting changes.
    """
    beside = heads(lora)
    names = [name for name in adapter.A if name not in beside] or list(adapter.A)
    if not names:
        return lora.config.to_dict()
    rank = max(adapter.A[name].shape[0] for name in names)
    scaling = {name: adapter.scaling[name] for name in names}
    found = scaling_settings(lora.config, scaling, rank)
    return lora.config.to_dict() | {name: found[name] for name in ("r", "lora_alpha")}


def _write_peft(
    folder: Path,
    lora: LoRAWrapper,
    adapter: AdapterState,
    base_model: str,
    limit: int | None = None,
) -> tuple[frozenset[str], dict[str, Any]]:
    """Write PEFT's two files, and factors and residual apart where there is one.

    Returns:
        The names in ``other`` that are at home in them; what ``fedlora.json`` says of them.
    """
    from peft import LoraConfig

    beside = heads(lora)
    names = [name for name in adapter.A if name not in beside]
    if adapter.residual:
        _save(folder / RESIDUAL, _apart(adapter))
    if not names:
        return frozenset(), {}
    factors = peft_factors(adapter, names, limit)
    r, config = factors.rank, lora.config
    tensors = {}
    for name in names:
        A, B = factors.A[name], factors.B[name]
        kernel = lora.layers[name].get_base_layer().weight.shape[2:]
        if kernel:  # PEFT's factors of a convolution: A has the kernel, B is one by one
            A, B = A.view(r, -1, *kernel), B.view(*B.shape, *(1 for _ in kernel))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
    inside = _inside(lora, adapter)
    for name, tensor in inside.items():
        # PEFT wraps an adapted layer, and ignores the bias under its plain name silently.
        layer = name.removesuffix(".bias")
        name = f"{layer}.base_layer.bias" if layer in names else name
        tensors[f"{PREFIX}{name}"] = tensor
    if adapter.residual:  # the scaling is inside the factors: alpha = r scales by 1
        scaled: dict[str, Any] = {"r": r, "lora_alpha": r}
    else:
        scaled = scaling_settings(config, {name: adapter.scaling[name] for name in names}, r)
    written = LoraConfig(
        **scaled,
        lora_dropout=config.lora_dropout,
        bias=config.bias,
        target_modules=_targets(lora, names),
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    if isinstance(written.target_modules, set):  # whose order is another in each process
        written.target_modules = sorted(written.target_modules)
    written.save_pretrained(str(folder))
    _save(folder / WEIGHTS, tensors)
    known = frozenset(n for n in inside if config.bias != "none" and n.endswith("bias"))
    error = factors.error
    told = {} if error is None else {"rank": r, "exact": error == 0, "error": error}
    return known, told


def _inside(lora: LoRAWrapper, adapter: AdapterState) -> dict[str, Tensor]:
    """What else is learned inside the model that PEFT knows.

    PEFT's own settings speak of biases only, but it loads whatever its file holds: with running
    statistics and layers trained in full in it too, PEFT alone predicts the same.
    """
    own = {id(tensor) for tensor in lora.model.state_dict(keep_vars=True).values()}
    learned = lora.exchanged()
    return {n: t for n, t in adapter.other.items() if n in learned and id(learned[n]) in own}


def _targets(lora: LoRAWrapper, names: list[str]) -> list[str] | str:
    """``target_modules`` that match these layers only: PEFT compares the ends of names."""
    paths = [path for path, _ in lora.model.named_modules() if path not in names]
    if any(path.endswith(f".{name}") for path in paths for name in names):
        return "|".join(re.escape(name) for name in names)  # a string must match in full
    return sorted(names)


def _apart(adapter: AdapterState) -> dict[str, Tensor]:
    """Factors, scaling and residual of each layer, as they are."""
    tensors = {}
    for name in adapter.A:
        tensors[f"{name}.lora_A"] = adapter.A[name]
        tensors[f"{name}.lora_B"] = adapter.B[name]
        tensors[f"{name}.scaling"] = torch.tensor(adapter.scaling[name], dtype=torch.float64)
        residual = adapter.residual.get(name)
        if residual is not None:
            tensors[f"{name}.U"] = residual.U
            if residual.V is not None:
                tensors[f"{name}.V"] = residual.V
    return tensors


def _write_model(folder: Path, model: Any, adapter: AdapterState) -> frozenset[str]:
    """Write the trained model, or its vision half where the text tower was dropped.

    Returns:
        The names in ``other`` that are in it.
    """
    weights = {name: adapter.other.get(name, t.cpu()) for name, t in model.state_dict().items()}
    two_towers = hasattr(getattr(model, "config", None), "vision_config")
    if two_towers and not families.has_text_tower(model):
        families.vision_only(model, weights).save_pretrained(str(folder))
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(str(folder), state_dict=weights)
    else:
        folder.mkdir()
        _save(folder / "model.safetensors", weights)
    return frozenset(weights)
