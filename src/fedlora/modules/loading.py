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
HUB_TIMEOUT = 5.0  # seconds until the hub counts as unreachable


def resolve(model_name: str) -> str:
    """The folder of the embedded model for ``tiny-clip``, the name itself otherwise."""
    if model_name == EMBEDDED:
        return str(resources.files("fedlora") / "assets" / "tiny_clip")
    return str(Path(model_name).expanduser()) if model_name.startswith("~") else model_name


def _local_only(source: str) -> bool:
    """Whether only the disk can give ``source``: it is a folder, or the hub does not answer.

    Asked before each load: the hub's own client would repeat every request for half a minute.
    """
    if Path(source).is_dir() or _is_path(source):
        return True
    import httpx  # what huggingface_hub speaks through
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except (httpx.TransportError, ConnectionError):  # the second: HF_HUB_OFFLINE is set
        return True
    return False


def _is_path(source: str) -> bool:
    return Path(source).is_absolute() or source.startswith((".", "~"))


def _unavailable(model_name: str, cause: Exception) -> FedloraError:
    where = Path(model_name).expanduser()
    if where.is_dir():
        reason = str(cause).strip().split("\n")[0]
        return FedloraError(
            f"model_name {model_name!r} is a folder that cannot be loaded ({reason}). It must hold "
            "what CLIPModel.save_pretrained and the tokenizer and image processor write."
        )
    if _is_path(model_name):
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
            path = cached_file(
                resolve(model_name), name, _raise_exceptions_for_missing_entries=False
            )
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
    model.eval()  # type: ignore[no-untyped-call]
    return model  # type: ignore[no-any-return]


def load_tokenizer(model_name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        FedloraError: where it cannot be had.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(model_name))
    except (OSError, ValueError) as error:
        raise _unavailable(model_name, error) from error


def weights_sha256(model: torch.nn.Module) -> str:
    """A hash of a model's weights: names, types, shapes and bytes, however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
