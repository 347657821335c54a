"""Safetensors files: a tensor is a dtype, a shape and a byte range of a file.

The format is a length, a JSON header and the bytes. So `pread` and `pwrite` move any part of any tensor, in any order
and from several threads, without a copy of the file in memory. The safetensors library writes tensors from memory only.
Headers are untrusted: every number is checked against the file's size before it is used.
"""

import contextlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from qwenvl_jax.config import read_json, refuse_pointer
from qwenvl_jax.errors import CheckpointError, InputError, shown
from qwenvl_jax.params.directory import INDEX, leftover

SINGLE = "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# With those of quantised weights.
STORED = DTYPES | {
    **{"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)},
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_NAMES = {dtype: name for name, dtype in STORED.items()}
_MAX_HEADER = 100_000_000  # the reference reader's limit
_ROWS = 256  # rows transposed at once: whole cache lines on both sides, and few enough for the cache


class Tensor(NamedTuple):
    """Where one tensor is. dtype: the file's name for it ("BF16"), possibly one that we cannot read."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape with all dimensions but the first flattened."""
        return (self.shape[0], math.prod(self.shape[1:])) if self.shape else (1, 1)

    def check(self, name: str, shape: tuple[int, ...], source: str) -> None:
        """Raises CheckpointError if the dtype is not in DTYPES, or the shape is not the one that `source` gives."""
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self.file}: tensor {name} is {self.dtype}; only {', '.join(DTYPES)} are supported")
        if self.shape != shape:
            have, want = list(self.shape), list(shape)
            raise CheckpointError(f"{self.file}: tensor {name} has shape {have}; {source} calls for {want}")


class Reader(contextlib.AbstractContextManager):
    """The open files of a checkpoint directory, and `tensors`: name → Tensor. Use it as a context manager.

    single: the file's name if there is only one.
    """

    def __init__(self, directory, single: str = SINGLE):
        self.directory, self._single = Path(directory), single
        self._open = {}
        try:
            self.tensors = self._read_all()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_):
        self.close()

    def close(self):
        for fd in self._open.values():
            os.close(fd)
        self._open = {}

    def _read_all(self) -> dict[str, Tensor]:
        tensors = {}
        for file, listed in self._files().items():
            stored = self._read_header(file)
            if listed is not None and listed != stored.keys():
                name = min(listed ^ stored.keys())
                has = "does not hold it" if name in listed else "holds it"
                raise CheckpointError(f"{self.directory / INDEX}: wrong about tensor {name}: {file.name} {has}")
            tensors |= stored
        return tensors

    def _files(self) -> dict[Path, set[str] | None]:
        """The weight files, each with the tensors that the index lists for it (None: there is no index)."""
        if (self.directory / self._single).is_file():
            return {self.directory / self._single: None}
        index = self.directory / INDEX
        if not index.is_file():
            if shards := self._unlisted():
                return shards
            either = f"{self._single} and no {INDEX}"
            what = leftover(self.directory) or "; weights are read from safetensors files only"
            raise CheckpointError(f"{self.directory}: no {either}{what}")
        try:
            weight_map = read_json(index)["weight_map"]
            pairs = [(name, Path(file)) for name, file in weight_map.items()]
        except (KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{index}: not a readable index of weight files ({e!r})") from e
        files = {}
        for name, file in pairs:
            if file.name != str(file) or file.name == "..":
                raise CheckpointError(f"{index}: tensor {name} is placed in {shown(file)}, outside this directory")
            files.setdefault(self.directory / file, set()).add(name)
        if not files:
            raise CheckpointError(f"{index}: names no tensors")
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file}: missing, though {INDEX} places tensors in it; download it again")
        return files

    def _unlisted(self) -> dict[Path, None]:
        """Weight files whose names say that they are all there, in a directory without an index."""
        files = sorted(self.directory.glob("model-*-of-*.safetensors"))
        whole = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        return dict.fromkeys(files) if whole == [f.name for f in files] else {}

    def _read_header(self, file: Path) -> dict[str, Tensor]:
        try:
            fd = self._open[file] = os.open(file, os.O_RDONLY)
            refuse_pointer(file)
            size = os.fstat(fd).st_size
            length = int.from_bytes(os.pread(fd, 8, 0), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                claim = f"{size} bytes, its header claims {length}"
                raise CheckpointError(f"{file}: not a safetensors file, or cut short ({claim})")
            header = json.loads(os.pread(fd, length, 8).decode("utf-8"), object_pairs_hook=_no_duplicates)
        except OSError as e:
            raise CheckpointError(f"{file}: cannot be read ({e.strerror})") from e
        except InputError:
            raise
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{file}: its safetensors header is not valid JSON ({e})") from e
        if not isinstance(header, dict):
            raise CheckpointError(f"{file}: its safetensors header is not a JSON object")
        header.pop("__metadata__", None)
        begin = 8 + length
        tensors = {name: _entry(file, name, entry, begin) for name, entry in header.items()}
        at = begin
        for name, t in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            if t.start != at:
                raise CheckpointError(f"{file}: tensor {name} overlaps its neighbour or leaves a hole")
            at = t.stop
        if at != size:
            raise CheckpointError(f"{file}: cut short or damaged ({size} bytes, not {at}); download it again")
        return tensors

    def read(self, tensor: Tensor, row: int, out: np.ndarray) -> None:
        """Fills `out` (contiguous, of the tensor's dtype) with rows of the tensor, from row `row` on."""
        view = out.reshape(-1).view(np.uint8)
        at = tensor.start + row * (tensor.nbytes // max(tensor.matrix[0], 1))
        done = 0
        while done < view.size:  # one call reads at most 2 GiB
            try:
                n = os.preadv(self._open[tensor.file], [view[done:]], at + done)
            except OSError as e:
                raise CheckpointError(f"{tensor.file}: reading failed ({e.strerror})") from e
            if n == 0:
                raise CheckpointError(f"{tensor.file}: was cut short while it was read")
            done += n

    def read_part(self, tensor: Tensor, rows: slice, columns: slice, transpose: bool, out: np.ndarray) -> None:
        """Fills `out` with [rows, columns] of the tensor as a matrix, or [columns, rows] if transposed.

        Casts to out's dtype. Reads a few of the wanted rows at a time, so it needs only a few megabytes beside `out`.
        """
        dtype = STORED[tensor.dtype]
        width = tensor.matrix[1]
        if out.dtype == dtype:  # numpy copies integers faster, and without the interpreter's lock
            out, dtype = out.view(_bits(dtype)), _bits(dtype)
            if not transpose and columns == slice(0, width) and out.flags.c_contiguous:
                return self.read(tensor, rows.start, out)
        scratch = np.empty((min(_ROWS, rows.stop - rows.start), width), dtype)
        for row in range(rows.start, rows.stop, _ROWS):
            n = min(_ROWS, rows.stop - row)
            self.read(tensor, row, scratch[:n])
            at = row - rows.start
            target = out[:, at : at + n].T if transpose else out[at : at + n]
            target[...] = scratch[:n, columns]

    def part(self, tensor: Tensor, rows: slice, columns: slice) -> np.ndarray:
        """[rows, columns] of the tensor as a matrix, in a new array."""
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start), STORED[tensor.dtype])
        self.read_part(tensor, rows, columns, False, out)
        return out

    def whole(self, tensor: Tensor) -> np.ndarray:
        rows, columns = tensor.matrix
        return self.part(tensor, slice(0, rows), slice(0, columns)).reshape(tensor.shape)


def _entry(file: Path, name: str, entry, begin: int) -> Tensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in [*shape, start, stop])
    except (TypeError, KeyError, ValueError):
        good = False
    if not good or stop < start:
        raise CheckpointError(f"{file}: the header's entry for tensor {name} is malformed")
    if dtype in STORED and math.prod(shape) * STORED[dtype].itemsize != stop - start:
        raise CheckpointError(f"{file}: tensor {name} is {dtype} {shape}, but {stop - start} bytes are set aside")
    return Tensor(file, dtype, tuple(shape), begin + start, begin + stop)


def _no_duplicates(pairs):
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out


def _bits(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


class Writer(contextlib.AbstractContextManager):
    """Writes tensors of known shapes into `directory`, in any order, split into files of at most `max_bytes`.

    shapes: name → (dtype, shape), in file order. single: the file's name if there is only one.
    Files get their full size at once, so a full disk is found before the work. `finish` writes the headers, so an
    interrupted file cannot be read as a checkpoint.
    """

    def __init__(self, directory, shapes: dict, max_bytes: int, single: str = SINGLE):
        groups, bytes_left = [{}], max_bytes
        for name, (dtype, shape) in shapes.items():
            nbytes = math.prod(shape) * dtype.itemsize
            if groups[-1] and nbytes > bytes_left:
                groups.append({})
                bytes_left = max_bytes
            groups[-1][name] = (dtype, shape, nbytes)
            bytes_left -= nbytes
        directory = Path(directory)
        count = len(groups)
        names = [single] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        self.tensors, self._open, self._headers = {}, {}, {}
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._index = directory / INDEX if count > 1 else None
        self._total = sum(nbytes for group in groups for _, _, nbytes in group.values())
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for file, group in zip((directory / n for n in names), groups, strict=True):
                self._lay_out(file, group)
            undo.pop_all()

    def _lay_out(self, file: Path, group: dict) -> None:
        entries, at = {}, 0
        for name, (dtype, shape, nbytes) in group.items():
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
            at += nbytes
        # transformers refuses a file without a framework's name.
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        begin = 8 + len(header)
        for name, e in entries.items():
            start, stop = e["data_offsets"]
            self.tensors[name] = Tensor(file, e["dtype"], tuple(e["shape"]), begin + start, begin + stop)
        self._headers[file] = len(header).to_bytes(8, "little") + header
        fd = self._open[file] = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.posix_fallocate(fd, 0, begin + at)

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._pool.shutdown(cancel_futures=True)
        for fd in self._open.values():
            os.close(fd)
        self._open = {}

    def write_rows(self, name: str, row: int, part: np.ndarray, transpose: bool) -> None:
        """Writes rows from `row` on; `part` is [rows, width], or [width, rows] to be transposed."""
        t = self.tensors[name]
        part = part.view(_bits(part.dtype))
        part = part.T if transpose else part
        rows, width = part.shape
        at = t.start + row * width * part.itemsize
        fd = self._open[t.file]
        if part.flags.c_contiguous:
            return _pwrite(fd, part, at)

        def write(first):
            block = np.empty((min(_ROWS, rows - first), width), part.dtype)
            for c in range(0, width, _ROWS):
                block[:, c : c + _ROWS] = part[first : first + len(block), c : c + _ROWS]
            _pwrite(fd, block, at + first * width * part.itemsize)

        for _ in self._pool.map(write, range(0, rows, _ROWS)):
            pass

    def finish(self) -> None:
        """Writes the headers and the index; the caller syncs."""
        for file, header in self._headers.items():
            _pwrite(self._open[file], np.frombuffer(header, np.uint8), 0)
        self.close()
        if self._index:
            files = {name: t.file.name for name, t in sorted(self.tensors.items())}
            index = {"metadata": {"total_size": self._total}, "weight_map": files}
            self._index.write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _pwrite(fd: int, part: np.ndarray, at: int) -> None:
    view = memoryview(part.reshape(-1).view(np.uint8))
    while view:
        n = os.pwrite(fd, view, at)
        view, at = view[n:], at + n
