"""CLIP from the embedded model, a local folder or a hub name, with one clear line where it is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

EMBEDDED = "tiny-clip"
SUPPORTED = ("clip",)


def resolve(model_name: str) -> str:
    """The folder of the embedded model for ``tiny-clip``, the name itself otherwise."""
    if model_name == EMBEDDED:
        return str(resources.files("fedlora") / "assets" / "tiny_clip")
    return model_name


def _unavailable(model_name: str, cause: Exception) -> FedloraError:
    where = Path(model_name).expanduser()
    if where.is_dir():
        reason = str(cause).strip().split("\n")[0]
        return FedloraError(
            f"model_name {model_name!r} is a folder that cannot be loaded ({reason}). It must hold "
            "what CLIPModel.save_pretrained and the tokenizer and image processor write."
        )
    if where.is_absolute() or model_name.startswith((".", "~")):
        return FedloraError(f"model_name {model_name!r}: there is no such folder. Check the path.")
    return FedloraError(
        f"model_name {model_name!r} could not be had: it is no local folder, not in the hub's local "
        "cache, and the hub did not give it (unreachable, or no such name). Check the name, load it "
        f"once where the hub can be reached, give a local folder, or use {EMBEDDED!r}."
    )


def _read_json(model_name: str, *names: str) -> Mapping[str, Any]:
    from transformers.utils.hub import cached_file

    cause: Exception = FileNotFoundError(f"no {names[0]} in it")
    for name in names:
        try:
            path = cached_file(resolve(model_name), name, _raise_exceptions_for_missing_entries=False)
            if path is not None:
                return dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            cause = error
            break
    raise _unavailable(model_name, cause) from cause


def load_preprocess_config(model_name: str) -> Mapping[str, Any]:
    """The image processor's settings; reads one small file.

    Raises:
        FedloraError: where the model cannot be had.
    """
    config = _read_json(model_name, "preprocessor_config.json", "processor_config.json")
    return dict(config.get("image_processor", config))


def load_clip(model_name: str) -> CLIPModel:
    """The pretrained CLIP with both towers, in float32 and evaluation mode.

    Raises:
        FedloraError: where the model cannot be had or is no CLIP.
    """
    from transformers import AutoConfig, CLIPModel

    source = resolve(model_name)
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in SUPPORTED:
            raise FedloraError(
                f"model_name {model_name!r} is a {config.model_type!r} model; supported: "
                f"{', '.join(SUPPORTED)}. Choose a CLIP model."
            )
        model = CLIPModel.from_pretrained(source, config=config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _unavailable(model_name, error) from error
    return model.eval()


def load_tokenizer(model_name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        FedloraError: where it cannot be had.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(model_name))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise _unavailable(model_name, error) from error


def weights_sha256(model: torch.nn.Module) -> str:
    """A hash of a model's weights: names, types, shapes and bytes, however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
