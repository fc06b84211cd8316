"""The ``adapter/`` folder: files that PEFT and transformers load as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlora.files import sha256, swapped_folder
from fedlora.state import AdapterState

if TYPE_CHECKING:
    from fedlora.modules.clip_wrapper import CLIPLoRAWrapper

FORMAT = 1
PEFT_PREFIX = "base_model.model."  # how PEFT names what is inside its PeftModel


def export_adapter(
    folder: Path, lora: CLIPLoRAWrapper, adapter: AdapterState, about: Mapping[str, Any]
) -> None:
    """Write an adapter, replacing ``folder`` as a whole.

    With LoRA: PEFT's two files; without: the trained towers in ``model/``, as transformers writes
    them. Beside them the head in ``classifier.safetensors`` and ``fedlora.json``.

    Args:
        folder: the folder to replace.
        lora: the model that the adapter belongs to.
        adapter: the global adapter, residual included.
        about: what ``fedlora.json`` says besides (round, rule …).

    Raises:
        FedloraError: when it cannot be written; ``folder`` is then as it was.
    """
    from safetensors.torch import save_file

    with swapped_folder(folder) as fresh:
        if lora.config.enabled:
            _write_peft(fresh, lora, adapter)
        else:
            _write_model(fresh / "model", lora, adapter)
        if lora.classifier.head == "linear":
            head = {name: tensor.contiguous() for name, tensor in _head(adapter).items()}
            save_file(head, fresh / "classifier.safetensors", metadata={"format": "pt"})
        files = sorted(path for path in fresh.rglob("*") if path.is_file())
        model = lora.classifier
        content = {
            "format": FORMAT,
            **about,
            "base_model": model.model_name,
            "base_model_sha256": model.base_sha256,
            "towers": lora.towers,
            "head": model.head,
            "class_names": model.class_names,
            "templates": model.templates,
            "logit_scale": model.logit_scale,
            "preprocessing": asdict(model.preprocess),
            "lora": lora.config.to_dict(),
            "sha256": {str(path.relative_to(fresh)): sha256(path) for path in files},
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (fresh / "fedlora.json").write_text(text + "\n", encoding="utf-8")


def _head(adapter: AdapterState) -> dict[str, Tensor]:
    prefix = "classifier."
    return {n.removeprefix(prefix): t for n, t in adapter.other.items() if n.startswith(prefix)}


def _write_peft(folder: Path, lora: CLIPLoRAWrapper, adapter: AdapterState) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    factors = {name: _factors(adapter, name) for name in adapter.A}
    r = max(A.shape[0] for A, _ in factors.values())
    config = lora.config
    served = bool(adapter.residual)
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = _pad(A, r, 0)
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = _pad(B, r, 1)
    for name, tensor in adapter.other.items():
        if not name.startswith("classifier."):  # biases
            # PEFT wraps an adapted layer, and ignores the bias under its plain name silently.
            layer = name.removesuffix(".bias")
            name = f"{layer}.base_layer.bias" if layer in factors else name
            tensors[f"{PEFT_PREFIX}{name}"] = tensor.contiguous()
    LoraConfig(
        r=r,
        # With a residual the scaling is inside the factors: alpha = r scales by 1.
        lora_alpha=r if served else config.lora_alpha,  # type: ignore[arg-type]
        use_rslora=False if served else config.use_rslora,
        lora_dropout=config.lora_dropout,
        bias=config.bias,
        target_modules=sorted(factors),
        base_model_name_or_path=lora.classifier.model_name,
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _factors(adapter: AdapterState, name: str) -> tuple[Tensor, Tensor]:
    """A and B of one layer; with a residual such that B A is all that is served beside W0."""
    A, B = adapter.A[name], adapter.B[name]
    if not adapter.residual:
        return A.contiguous(), B.contiguous()
    scaled = B.double() * adapter.scaling[name]
    if name not in adapter.residual:
        return A.contiguous(), scaled.float()
    residual = adapter.residual[name].to(torch.float64)
    stacked = A.shape[0] + residual.U.shape[1]
    if residual.V is not None and stacked < min(residual.shape):
        return torch.cat([A, residual.V.float()]), torch.cat([scaled, residual.U], 1).float()
    # At full rank one factor is the identity and the other the whole change: exact, and no SVD.
    change = (residual.dense() + scaled @ A.double()).float()
    out_features, in_features = change.shape
    if out_features <= in_features:
        return change, torch.eye(out_features)
    return torch.eye(in_features), change


def _pad(factor: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros in the unused slots: PEFT's file has one rank."""
    missing = rank - factor.shape[dim]
    if not missing:
        return factor.contiguous()
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _write_model(folder: Path, lora: CLIPLoRAWrapper, adapter: AdapterState) -> None:
    """The trained towers, as ``CLIPModel`` or, without a text tower, its vision half."""
    from transformers import CLIPVisionModelWithProjection

    clip = lora.classifier.clip
    weights = {name: adapter.other.get(name, t.cpu()) for name, t in clip.state_dict().items()}
    if lora.classifier.has_text_tower:
        clip.save_pretrained(str(folder), state_dict=weights)
        return
    vision_config: Any = copy(clip.config.vision_config)
    vision_config.projection_dim = clip.config.projection_dim  # some folders say it only once
    vision = CLIPVisionModelWithProjection(vision_config)
    vision.load_state_dict({name: weights[name] for name in vision.state_dict()})
    vision.save_pretrained(str(folder))
