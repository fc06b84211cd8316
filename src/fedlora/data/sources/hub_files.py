"""Data sets in files: in the hub's layout, as ``datasets`` saves them, or a single one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.data.sources.files_on_disk import printable
from fedlora.data.sources.folder_layout import SPLIT_NAMES
from fedlora.data.sources.parquet_shards import ParquetShards
from fedlora.data.sources.shards import ArrowShards, Shards, check_schemas
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, DatasetDict

# Formats that may hold pictures; those of text can be listed in a Manifest.
_FORMATS = ("parquet", "arrow", "imagefolder", "webdataset")


def open_file(path: Path) -> dict[str, Shards]:
    """Open a single parquet or Arrow file, all of which is called "train".

    Raises:
        FedloraError: if it is neither.
    """
    if path.suffix == ".arrow":
        return {"train": _arrow([path], path.parent)}
    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            raise FedloraError(
                f"data.source.name must be a parquet or Arrow file, got {path}, which is neither. "
                "For a CSV file that lists pictures use Manifest."
            )
    return {"train": _parquet([path], None, path.parent)}


def open_folder(path: Path, config: str | None) -> dict[str, Shards]:
    """Open a folder as the hub has it, or as ``save_to_disk`` writes it.

    Parquet and Arrow files are read where they are; of other formats ``datasets`` makes a table in
    its cache.

    Args:
        path: the folder.
        config: which of several data sets in it.

    Raises:
        FedloraError: if it is not there, holds something else, or is not complete.
    """
    from datasets import load_dataset_builder, load_from_disk

    if not path.is_dir():
        raise FedloraError(
            "data.source.name must be a data set of the Hugging Face hub (OWNER/NAME), a folder or "
            f"a file, got {path}, which does not exist. Mend it; a relative path counts from the "
            "folder in which fedlora is started."
        )
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return mapped(load_from_disk(str(path), keep_in_memory=False), path)
    builder = load_dataset_builder(str(path), config)
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _FORMATS:
        raise FedloraError(
            f"data.source.name={path} holds {kind} files: none of {', '.join(_FORMATS)}, which can "
            "hold pictures. For a CSV file that lists pictures use Manifest."
        )
    files = {str(split): list(map(Path, found)) for split, found in _data_files(builder).items()}
    if kind == "imagefolder":
        _check_levels(path, [file for found in files.values() for file in found])
    if kind in ("imagefolder", "webdataset") or not all(
        file.is_file() for found in files.values() for file in found
    ):
        builder.download_and_prepare()
        return mapped(builder.as_dataset(in_memory=False), path)
    if kind == "arrow":
        return {split: _arrow(found, path) for split, found in files.items()}
    shards = {split: _parquet(found, builder.info.features, path) for split, found in files.items()}
    _check_complete(path, shards, builder)
    return shards


def mapped(found: Dataset | DatasetDict, folder: Path) -> dict[str, Shards]:
    """Splits that ``datasets`` has mapped into memory; a single one is called "train".

    Args:
        found: as it loads them.
        folder: from which relative paths of pictures count.
    """
    from datasets import Dataset

    parts = {"train": found} if isinstance(found, Dataset) else found
    return {
        str(split): ArrowShards(
            part.data.table,
            part.features,
            [Path(file["filename"]) for file in part.cache_files],
            folder,
        )
        for split, part in parts.items()
    }


def _arrow(files: list[Path], folder: Path) -> Shards:
    import pyarrow as pa
    from datasets import Features

    tables = [_map(file) for file in files]
    features = Features.from_arrow_schema(tables[0].schema)
    check_schemas(files, [table.schema for table in tables], features)
    return ArrowShards(pa.concat_tables(tables), features, files, folder)


def _map(file: Path) -> Any:
    import pyarrow as pa

    content = pa.memory_map(str(file))
    try:
        return pa.ipc.open_stream(content).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(content).read_all()


def _parquet(files: list[Path], features: Any, folder: Path) -> Shards:
    import pyarrow.parquet as pq
    from datasets import Features

    found = features or Features.from_arrow_schema(pq.read_schema(files[0]))
    return ParquetShards(files, found, folder)


def _data_files(builder: DatasetBuilder) -> Mapping[Any, list[str]]:
    found: Mapping[Any, list[str]] = builder.config.data_files
    return found


def _check_levels(path: Path, files: list[Path]) -> None:
    """Refuse folders that may be sites: ``datasets`` takes the lowest one only, as the class."""
    if any(file.stem == "metadata" for file in files):
        return
    above: dict[tuple[str, ...], Path] = {}
    for file in files:
        folders = file.relative_to(path).parts[:-1] if file.is_relative_to(path) else ()
        levels = tuple(name for name in folders if name.lower() not in SPLIT_NAMES)
        above.setdefault(levels[:-1], file)
    if len(above) > 1:
        example = printable(str(above[max(above)]))
        raise FedloraError(
            f"data.source.name={path} holds pictures in several levels of folders, as {example}: "
            "sites among them would be lost. Use ImageFolder for these."
        )


def _check_complete(path: Path, shards: Mapping[str, Shards], builder: DatasetBuilder) -> None:
    """Refuse a download that was broken off, where the README says how many rows there are."""
    for split, info in (builder.info.splits or {}).items():
        have = len(shards[split]) if split in shards else 0
        if have != info.num_examples:
            raise FedloraError(
                f"data.source.name={path}: split {split!r} has {have:,} rows but its README.md "
                f"says {info.num_examples:,}. Download it again (`hf download` goes on where it "
                "broke off), or correct num_examples in the README.md."
            )
