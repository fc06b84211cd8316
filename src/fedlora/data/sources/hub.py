"""Data sets of the Hugging Face hub, opened there, in its cache or in a folder."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.data.sources.classes import listed
from fedlora.data.sources.hub_files import mapped, open_file, open_folder
from fedlora.data.sources.shards import Shards
from fedlora.errors import FedloraError
from fedlora.files import expand

# Seconds to wait for the hub's first answer. Its own client tries again for half a minute.
_TIMEOUT = 10.0
_COMMIT = re.compile("[0-9a-f]{40}")


def is_local(name: str) -> bool:
    """Whether a name is a path: one that is there, or is not OWNER/NAME as on the hub."""
    path = expand(name, "data.source.name")
    looks = name[0] in "./~" or name.count("/") != 1 or path.suffix in (".parquet", ".arrow")
    return looks or path.exists()


def open_data_set(name: str, config: str | None, revision: str | None) -> dict[str, Shards]:
    """Open a data set, from a path or the hub.

    Args:
        name: a path or a name of the hub.
        config: which of several data sets in it.
        revision: of the hub.

    Returns:
        split -> its rows.

    Raises:
        FedloraError: if it cannot be had; says what to do.
    """
    with _calm():
        try:
            if not is_local(name):
                return _from_hub(name, config, revision)
            path = expand(name, "data.source.name").resolve()
            return open_file(path) if path.is_file() else open_folder(path, config)
        except FedloraError:
            raise
        except Exception as error:
            raise FedloraError(_why(name, config, error)) from error


def _from_hub(name: str, config: str | None, revision: str | None) -> dict[str, Shards]:
    from datasets import load_dataset

    why = _unreachable(name, revision)
    if why is not None:
        return _from_cache(name, config, revision, why)
    # A table that datasets makes of the files, in its cache: the library's own way.
    found = load_dataset(name, config, revision=revision, keep_in_memory=False)
    return mapped(found, Path())


def _unreachable(name: str, revision: str | None) -> str | None:
    """Why the hub cannot be reached; None where it can.

    Raises:
        HfHubHTTPError: if it has no such data set or revision.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT)
    except HfHubHTTPError as error:
        if error.response.status_code < 500 and error.response.status_code != 429:
            raise
        return f"it answers {error.response.status_code}"
    except OfflineModeIsEnabled:
        return "the variable HF_HUB_OFFLINE forbids it"
    except (OSError, httpx.HTTPError) as error:
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return None


def _from_cache(name: str, config: str | None, revision: str | None, why: str) -> dict[str, Shards]:
    """What an earlier run with a network left behind."""
    from datasets import load_dataset

    try:
        with _offline():
            found = load_dataset(name, config, keep_in_memory=False)
    except ConnectionError as error:
        raise FedloraError(
            f"data.source.name={name}: there is no such folder, the Hugging Face hub cannot be "
            f"reached ({why}), and no earlier run left it in the cache. Where there is "
            f"a network, run `hf download --repo-type dataset {name} --local-dir DIR`, bring DIR "
            "here and set data.source.name=DIR."
        ) from error
    shards = mapped(found, Path())
    files = [file for part in found.values() for file in part.cache_files]
    there = {Path(file["filename"]).parent.name for file in files}
    if revision is not None and there != {_commit(name, revision)}:
        raise FedloraError(
            f"data.source.revision={revision} of {name} cannot be had: the Hugging Face hub cannot "
            f"be reached ({why}), and what the cache holds is another one, "
            f"{listed(there)}. Leave revision out to take that."
        )
    return shards


def _commit(name: str, revision: str) -> str | None:
    """What a revision was when it was last asked for."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if _COMMIT.fullmatch(revision):
        return revision
    note = Path(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "refs", revision)
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


@contextmanager
def _offline() -> Iterator[None]:
    """Let ``datasets`` look into its cache only."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _calm() -> Iterator[None]:
    """Neither progress bars nor log lines nor warnings of the two libraries."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    logs = (datasets.logging, hub_logging)
    levels = [log.get_verbosity() for log in logs]
    restore = []
    if not datasets.are_progress_bars_disabled():
        restore.append(datasets.enable_progress_bars)
    if not are_progress_bars_disabled():
        restore.append(enable_progress_bars)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        disable_progress_bars()
        for log in logs:
            log.set_verbosity(log.CRITICAL)
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.set_verbosity(level)
            for enable in restore:
                enable()


def _why(name: str, config: str | None, error: Exception) -> str:
    """One line about what a library raised."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    said = " ".join(str(error).split("Example of usage")[0].split()).rstrip(".")
    if _caused_by(error, GatedRepoError) or "is a gated dataset" in said:
        return (
            f"data.source.name={name} is gated: ask for access at "
            f"https://huggingface.co/datasets/{name}, then run `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"data.source.revision: {name} has no such branch, tag or commit. Mend it."
    if isinstance(error, HFValidationError | RepositoryNotFoundError | DatasetNotFoundError):
        return (
            f"data.source.name={name}: there is no such data set on the Hugging Face hub, or it is "
            "private, and no such folder. Mend the name; for a private one run `hf auth login`."
        )
    if isinstance(error, FileNotFoundError):
        hint = " It reads [ in a path as a pattern: rename the folder." if "[" in name else ""
        return f"data.source.name={name} does not hold the files of a data set: {said}.{hint}"
    if "onfig" in said and isinstance(error, ValueError):
        got = "" if config is None else f" (got {config!r})"
        return f"data.source.config of {name}{got}: {said}."
    if "scripts are no longer supported" in said:
        return (
            f"data.source.name={name} is a script, which is not run. Take a copy in parquet: on "
            "the hub often data.source.revision=refs/convert/parquet."
        )
    cause = error.__cause__
    more = f" ({' '.join(str(cause).split())})" if cause is not None else ""
    return f"data.source.name={name} cannot be opened: {said or type(error).__name__}{more[:300]}."


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False
