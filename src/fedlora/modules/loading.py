"""CLIP or SigLIP from the embedded model, a folder or the hub; one clear line where it is not."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedlora.errors import FedloraError
from fedlora.files import expand
from fedlora.modules.families import check, model_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from fedlora.modules.families import Clip

EMBEDDED = "tiny-clip"
HUB_TIMEOUT = 5.0  # seconds until the hub counts as unreachable


def resolve(model_name: str) -> str:
    """The folder of the embedded model for ``tiny-clip``, the name itself otherwise."""
    if model_name == EMBEDDED:
        return str(resources.files("fedlora") / "assets" / "tiny_clip")
    return str(expand(model_name, "model_name")) if model_name.startswith("~") else model_name


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
    if Path(resolve(model_name)).is_dir() or not isinstance(cause, OSError):
        reason = str(cause).strip().split("\n")[0]
        return FedloraError(
            f"model_name {model_name!r} cannot be loaded ({reason}). It must hold what "
            "CLIPModel.save_pretrained or SiglipModel.save_pretrained and the tokenizer and image "
            "processor write."
        )
    if _is_path(model_name):
        return FedloraError(f"model_name {model_name!r}: there is no such folder. Check the path.")
    return FedloraError(
        f"model_name {model_name!r} could not be had: it is no local folder, not in the hub's "
        "local cache, and the hub did not give it (unreachable, or no such name). Check the name, "
        "load it once where the hub can be reached, give a local folder, or use "
        f"{EMBEDDED!r}."
    )


@contextmanager
def _one_line(model_name: str) -> Iterator[None]:
    """One clear line for whatever transformers and its libraries raise, and no reports."""
    from transformers.utils import logging as reports

    level = reports.get_verbosity()
    reports.set_verbosity(logging.ERROR)
    try:
        yield
    except FedloraError:
        raise
    except Exception as error:  # safetensors and tokenizers have classes of their own
        raise _unavailable(model_name, error) from error
    finally:
        reports.set_verbosity(level)


def load_preprocess_config(model_name: str) -> Mapping[str, Any]:
    """The image processor's settings; reads one small file.

    Raises:
        FedloraError: where the model cannot be had.
    """
    from transformers.utils.hub import cached_file

    source = resolve(model_name)
    with _one_line(model_name):
        local = _local_only(source)
        for name in ("preprocessor_config.json", "processor_config.json"):
            path = cached_file(
                source,
                name,
                local_files_only=local,
                _raise_exceptions_for_missing_entries=False,
            )
            if path is not None:
                config = dict(json.loads(Path(path).read_text(encoding="utf-8")))
                return dict(config.get("image_processor", config))
        raise FileNotFoundError("no preprocessor_config.json in it")


def _config(model_name: str, local: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    source = resolve(model_name)
    config: PreTrainedConfig = AutoConfig.from_pretrained(source, local_files_only=local)
    check(config, f"model_name {model_name!r}")
    return config


def load_config(model_name: str) -> PreTrainedConfig:
    """The config of a model of a supported family; reads one small file.

    Raises:
        FedloraError: where the model cannot be had or is of no supported family.
    """
    with _one_line(model_name):
        return _config(model_name, _local_only(resolve(model_name)))


def empty_clip(model_name: str) -> Clip:
    """The model without its weights, on the meta device: all names and shapes, no memory.

    Needs ``config.json`` only. Float32 and evaluation mode, as :func:`load_clip` gives it.

    Raises:
        FedloraError: where the config cannot be had or is of no supported family.
    """
    with _one_line(model_name):
        config: Any = _config(model_name, _local_only(resolve(model_name)))
        with torch.device("meta"):
            model = model_class(config.model_type)(config)
    # A config may ask for half precision in one tower alone.
    model.float()  # type: ignore[no-untyped-call]
    model.eval()  # type: ignore[no-untyped-call]
    return model


def load_clip(model_name: str) -> Clip:
    """The pretrained model with both towers, in float32 and evaluation mode.

    Raises:
        FedloraError: where the model cannot be had, is of no supported family or lacks weights.
    """
    source = resolve(model_name)
    with _one_line(model_name):
        local = _local_only(source)
        config = _config(model_name, local)
        loaded: Any = model_class(config.model_type).from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            local_files_only=local,
            ignore_mismatched_sizes=True,  # refused below, with the name of the tensor
            output_loading_info=True,
        )
        model: Clip = loaded[0]
        info: Mapping[str, Any] = loaded[1]
        # transformers would fill them with random numbers and go on.
        wrong = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
        if wrong:
            raise ValueError(
                f"its weights do not fit its config.json: {len(wrong)} tensors are missing or of "
                f"another shape, such as {min(wrong)}"
            )
    model.eval()  # type: ignore[no-untyped-call]
    return model


def load_tokenizer(model_name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        FedloraError: where it cannot be had.
    """
    from transformers import AutoTokenizer

    source = resolve(model_name)
    with _one_line(model_name):
        local = _local_only(source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        except Exception as error:
            _name_missing_packages(model_name, local, error)
            raise
        # Without files transformers makes up a tokenizer that knows no words.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("its tokenizer has no vocabulary: is tokenizer.json missing?")
    return tokenizer


def _name_missing_packages(model_name: str, local: bool, error: Exception) -> None:
    """Say which packages SigLIP's tokenizer lacks, where that may be why it does not load."""
    from transformers.utils.hub import cached_file
    from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available

    there = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    missing = [name for name, found in there.items() if not found]
    # The file, because what transformers says of it has nothing in common between its versions.
    file = missing and cached_file(
        resolve(model_name),
        "spiece.model",
        local_files_only=local,
        _raise_exceptions_for_missing_entries=False,
    )
    if file:
        raise FedloraError(
            f"model_name {model_name!r}: its tokenizer needs {' and '.join(missing)}. "
            f"Run: python -m pip install {' '.join(missing)}"
        ) from error


def weights_sha256(model: torch.nn.Module, skip: Container[str] = ()) -> str:
    """A hash of a model's weights: names, types, shapes and bytes, however they are stored."""
    digest = hashlib.sha256()
    named = (item for item in model.state_dict().items() if item[0] not in skip)
    for name, tensor in sorted(named):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
