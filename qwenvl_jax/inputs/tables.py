"""Tables of records: Parquet files and Hugging Face datasets, with the extra `datasets`."""

import os
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from qwenvl_jax.errors import BadRecord, InputError, install

MAX_GROUP = 512 << 20  # bytes of a row group, which is read whole
_CACHED = 256 << 20  # bytes of row groups that a Parquet file keeps
SHUFFLED = 256  # rows of a stream that are shuffled at a time, in memory


class ParquetFile:
    """The rows of a Parquet file. It reads whole row groups and keeps the latest, up to _CACHED bytes.

    `identity` has a checksum of the footer, which holds the sizes, positions and statistics of all columns.
    """

    def __init__(self, path):
        self.path = self.name = Path(path)
        self.folder = self.path.parent
        self.__setstate__(self.__dict__)
        groups = [self._file.metadata.row_group(i) for i in range(self._file.num_row_groups)]
        if large := [i for i, group in enumerate(groups) if group.total_byte_size > MAX_GROUP]:
            said = f"row group {large[0]} has {groups[large[0]].total_byte_size >> 20} MiB"
            raise InputError(f"{path}: {said}; write row groups of at most {MAX_GROUP >> 20} MiB (row_group_size)")
        self._ends = list(accumulate(group.num_rows for group in groups))
        with open(self.path, "rb") as file:
            size = file.seek(-8, os.SEEK_END) + 8
            footer = int.from_bytes(file.read(4), "little")
            file.seek(-min(size, footer + 8), os.SEEK_END)
            self.identity = {"bytes": size, "crc32": zlib.crc32(file.read())}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        group = bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        return self._table(group).slice(row, 1).to_pylist()[0]

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def _table(self, group: int):
        import pyarrow

        with self._lock:
            if group not in self._cache:
                try:
                    self._cache[group] = self._file.read_row_group(group)
                except (OSError, pyarrow.ArrowException) as e:
                    raise BadRecord("unreadable", f"row group {group} is damaged ({e})") from e
            self._cache.move_to_end(group)
            while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > _CACHED:
                self._cache.popitem(last=False)
            return self._cache[group]

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_file", "_lock", "_cache")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as e:
            raise InputError(f"{self.path}: reading Parquet needs the extra `datasets`: {install('datasets')}") from e
        self._lock, self._cache = threading.Lock(), OrderedDict()
        try:
            self._file = parquet.ParquetFile(self.path)
        except (OSError, pyarrow.ArrowException) as e:
            raise InputError(f"{self.path}: not a readable Parquet file ({e})") from e


class Rows:
    """The rows of a Hugging Face dataset, as stored: pictures stay bytes until this package decodes them."""

    def __init__(self, dataset, name: str, folder: Path | None = None, identity: Mapping | None = None):
        self._rows, self.name, self.folder = dataset.with_format("arrow"), name, folder
        self.identity = dict(identity or {})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[int(index)].to_pylist()[0]

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"


class Stream:
    """The rows of a streamed dataset of Hugging Face. Their order depends on (seed, epoch) alone. It has no length.

    Shards are shuffled, and then the rows within a buffer of SHUFFLED rows.
    """

    folder, identity = None, {}

    def __init__(self, dataset, name: str):
        self._rows, self.name = dataset.with_format("arrow"), name

    def epoch(self, seed: int | None, epoch: int) -> Iterator[Any]:
        """The records of one epoch. seed: None for the dataset's own order. Raises InputError if reading fails."""
        rows = self._rows if seed is None else self._rows.shuffle(seed=seed, buffer_size=SHUFFLED)
        rows.set_epoch(epoch)
        try:
            for row in rows:
                yield row.to_pylist()[0]
        except Exception as e:  # from the network and pyarrow, of any kind
            raise InputError(f"{self.name}: cannot be read further ({' '.join(str(e).split())[:300]})") from e

    def where(self, index: int) -> str:
        return f"{self.name}, record {index} of the stream"


def saved(path: str, split: str | None) -> Rows | Stream:
    if not any(os.path.exists(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json")):
        raise InputError(
            f"{path}: is a directory that save_to_disk did not write; give its files, as in '{path}/*.jsonl'"
        )
    datasets = _datasets(path)
    return _split(lambda: datasets.load_from_disk(path), f"{path}:{split}" if split else path, split, Path(path))


def hub(name: str, rest: list[str], streaming: bool = False) -> Rows | Stream:
    try:
        datasets = _datasets(name)
    except InputError as e:
        needs = f"a dataset of the hub needs the extra `datasets`: {install('datasets')}"
        raise InputError(f"{name}: there is no such file; {needs}") from e
    _check_hub(datasets, name)
    config, split = (rest[0] if rest[1:] else None), (rest[-1] if rest else "train")
    full_name, how = ":".join((name, *rest)), {"streaming": True} if streaming else {}
    try:
        return _split(lambda: datasets.load_dataset(name, config, split=split, **how), full_name, None, None)
    except InputError as e:
        raise InputError(f"there is no such file, and as a dataset of the hub: {e}") from e


def _check_hub(datasets, name: str) -> None:
    """Raises InputError if the hub cannot be reached, which `datasets` would try for half a minute."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or os.path.isdir(
        os.path.join(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___"))
    ):
        return
    try:
        HfApi().dataset_info(name, timeout=5)
    except Exception as e:  # the type depends on huggingface_hub's version and http library
        if getattr(e, "response", None) is None:  # an answer of the hub is for `datasets`
            raise InputError(
                f"{name}: there is no such file, and the hub, where it may be a dataset, cannot be reached "
                f"({' '.join(str(e).split())[:200]})"
            ) from e


def _split(load, name: str, split: str | None, folder: Path | None) -> Rows | Stream:
    """The dataset that `load` returns, or a split of it."""
    try:
        dataset = load()
    except Exception as e:  # from files, the network and pyarrow, of any kind
        raise InputError(f"{name}: cannot be opened as a dataset ({' '.join(str(e).split())[:300]})") from e
    if isinstance(dataset, Mapping):
        if split is None:
            split = "train" if "train" in dataset else None
        if split not in dataset:
            known = ", ".join(f"{name.partition(':')[0]}:{s}" for s in dataset)
            raise InputError(f"{name}: name one of its splits: {known}")
        dataset = dataset[split]
    elif split is not None:
        raise InputError(f"{name}: is a single split; leave out ':{split}'")
    if not hasattr(dataset, "__len__"):
        return Stream(dataset, name)
    return Rows(dataset, name, folder, {"fingerprint": dataset._fingerprint})


def _datasets(name: str):
    try:
        import datasets
    except ImportError as e:
        raise InputError(f"{name}: reading datasets needs the extra `datasets`: {install('datasets')}") from e
    return datasets
