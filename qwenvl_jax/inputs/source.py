"""Where records come from: JSONL, JSON arrays, Parquet, Hugging Face datasets and lists, alone or joined.

A source has `len()`, and `[i]` returns the same record i every time. `where(i)` names it for errors, its relative paths
start at `folder`, and `identity` tells a resumed run whether the records are the same. Sources are thread-safe and can
be pickled.
"""

import contextlib
import glob
import json
import os
import re
import stat
import sys
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax import stores
from qwenvl_jax.errors import BadRecord, InputError, OptionsError
from qwenvl_jax.inputs.fields import QUESTIONS, without_nulls
from qwenvl_jax.inputs.tables import ParquetFile, Rows, Stream, hub, saved

MAX_IN_MEMORY = 512 << 20  # bytes of a JSON array, which is read whole, and of a pipe
_CHUNK = 1 << 20  # bytes; fits the CPU's cache
_DESCRIPTORS = ("/dev", "/dev/fd", "/proc/self/fd")  # where open files have names, such as /dev/stdin
_SPACE = re.compile(r"[ \t\n\r]*")
_FILES = (".json", ".jsonl", ".parquet", ".txt", ".csv", ".tsv", ".gz", ".zst", ".zip", ".arrow", ".toml", ".yaml")
# Other kinds of files by their first bytes. None of them can begin JSON.
_PACKED = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard", b"PK": "ZIP", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7z", b"\x04\x22\x4d\x18": "LZ4", b"\x5d\0\0": "LZMA", b"Rar!": "RAR",
}  # fmt: skip
_UTF = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"{\0": "UTF-16", b"\0{": "UTF-16", b"[\0": "UTF-16",
        b"\0[": "UTF-16", b"\0\0": "UTF-32"}  # fmt: skip
_PICTURES = {
    b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"RIFF": "WebP or AVI", b"BM": "BMP", b"II*\0": "TIFF",
    b"MM\0*": "TIFF", b"\x1a\x45\xdf\xa3": "Matroska", b"%PDF": "PDF",
}  # fmt: skip
_TABLES = {
    b"ARROW1": "Arrow", b"FEA1": "Feather", b"\xff\xff\xff\xff": "Arrow", b"\x93NUMPY": "NumPy", b"\x89HDF": "HDF5",
    b"SQLite": "SQLite", b"Obj\x01": "Avro", b"ORC": "ORC", b"\x80\x04": "pickle", b"\x80\x05": "pickle",
}  # fmt: skip


def open_records(data, columns: Sequence[str] = (), streaming: bool = False) -> "Records":
    """The records of `data` as one sequence.

    data: a file (JSONL, a JSON array or Parquet), a pipe of JSONL, a glob pattern, a directory of `save_to_disk` or
        a hub id; "DIR:split", "USER/NAME:split" and "USER/NAME:config:split" name a split other than train. Also a
        list of those, a dataset of Hugging Face, or any object with `len()` and `[i]`.
    columns: "old=new" renames a key of every record, and "old=" drops it.
    streaming: a dataset of the hub is read as it comes. It must stand alone, and only `Records.epoch` reads it.
    Raises InputError that names what cannot be read, OptionsError for bad columns.
    """
    if isinstance(data, Records) and not columns:
        return data
    names = [data] if isinstance(data, str | os.PathLike) else data
    if isinstance(names, list | tuple) and names and all(isinstance(n, str | os.PathLike) for n in names):
        return Records([part for name in names for part in _open(os.path.expanduser(name), streaming)], columns)
    return Records([_in_memory(data)], columns)


class Records:
    """Several sources as one, with keys renamed. name: of all files, for messages."""

    def __init__(self, parts: Sequence[Any], columns: Sequence[str] = ()):
        self._parts, self._columns = list(parts), _renames(columns)
        self.streamed = any(isinstance(part, Stream) for part in parts)
        if self.streamed and parts[1:]:
            raise InputError(f"{parts[0].name}: a streamed dataset stands alone; leave out the other data")
        self._ends = [] if self.streamed else list(accumulate(len(part) for part in parts))
        self.name = ", ".join(str(part.name) for part in parts[:3]) + (", …" if parts[3:] else "")
        self.identity: dict = dict(parts[0].identity)
        if parts[1:]:
            identities = json.dumps([part.identity for part in parts]).encode()
            self.identity = {"files": len(parts), "crc32": zlib.crc32(identities)}

    def __len__(self) -> int:
        if self.streamed:
            raise InputError(f"{self.name}: is streamed, so it has no length; save it with save_to_disk")
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        part, i = self._find(index)
        return self.renamed(part[i])

    def epoch(self, seed: int | None, epoch: int) -> Iterator[Any]:
        """The records of a stream in the order of (seed, epoch), before `renamed`."""
        return self._parts[0].epoch(seed, epoch)

    def renamed(self, record):
        """The record without nulls and with its keys renamed as `columns` says.

        Raises BadRecord if that would overwrite a key.
        """
        record = without_nulls(record)
        if not self._columns or not isinstance(record, Mapping):
            return record
        out = {k: v for k, v in record.items() if k not in self._columns}
        for old, new in self._columns.items():
            if new and record.get(old) is not None:
                if out.get(new) is not None:
                    raise BadRecord("unknown key", f"columns renames {old!r} to {new!r}, which the record has already")
                out[new] = record[old]
        return out

    def where(self, index: int) -> str:
        part, i = self._find(index)
        return part.where(i)

    def folder(self, index: int) -> Path | None:
        return self._find(index)[0].folder

    def _find(self, index: int) -> tuple[Any, int]:
        if self.streamed:
            return self._parts[0], index
        if not 0 <= index < len(self):
            raise IndexError(index)
        k = bisect_right(self._ends, index)
        return self._parts[k], index - (self._ends[k - 1] if k else 0)


def _renames(columns: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in columns]
    for text, (old, equals, _) in zip(columns, pairs, strict=True):
        if not (old and equals):
            raise OptionsError(f"columns has {text!r}; it must be OLD=NEW, or OLD= to pass over a key")
    return {old.strip(): new.strip() for old, _, new in pairs}


def _open(name: str, streaming: bool) -> list:
    if url := stores.as_url(name):
        copy = str(stores.local_copy(url))
        try:
            parts = _open(copy, streaming)
        except InputError as e:
            e.args = (str(e).replace(copy, url),)
            raise
        for part in parts:
            part.name, part.folder = url, stores.folder(url).parent
        return parts
    if os.path.exists(name) and not os.path.isdir(name):
        return [_file(name)]
    stores.refuse_closed(os.path.dirname(re.split(r"[*?\[]", name)[0]) if glob.has_magic(name) else name)
    if os.path.isdir(name):
        return [saved(name, None)]
    if glob.has_magic(name):
        if not (found := sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p))):
            raise InputError(f"{name}: no file matches the pattern")
        return [_file(path) for path in found]
    head, *rest = name.split(":")
    if len(rest) == 1 and os.path.isdir(head):
        return [saved(head, rest[0])]
    if len(rest) <= 2 and stores.HUB_ID.fullmatch(head) and not head.endswith(_FILES):
        return [hub(head, rest, streaming)]
    raise InputError(f"{name}: cannot be read (No such file or directory)")


def _file(path: str):
    if path.lower().endswith((".csv", ".tsv")):
        raise InputError(f"{path}: tables of text are not read; write one JSON object per line, or Parquet")
    if stat.S_ISREG(os.stat(path).st_mode):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            start = file.read(512)
            if start[:4] == b"PAR1":
                return ParquetFile(path)
            if why := _not_json(path.lower(), start):
                raise InputError(f"{path}: {why}")
    return JsonFile(path)


def _not_json(name: str, start: bytes) -> str | None:
    """Why a file with this name and these first bytes is not read, or None."""

    def kind(table: dict[bytes, str]) -> str | None:
        return next((what for magic, what in table.items() if start.startswith(magic)), None)

    if what := kind(_PACKED):
        return f"is compressed ({what}); unpack it first"
    if start[257:262] == b"ustar":
        return "is an archive (tar); unpack it first"
    if (what := kind(_TABLES)) or name.endswith((".arrow", ".feather")):
        return f"is a file of {what or 'Arrow'}; write one JSON object per line, Parquet, or use save_to_disk"
    if start[4:8] == b"ftyp" or (what := kind(_PICTURES)):
        said = f"is a picture, clip or page ({what or 'MP4'})"
        return f"{said}, not records; if a pattern found it, narrow the pattern, as in *.jsonl"
    if what := kind(_UTF):
        return f"is text in {'UTF-32' if start[2:4] == bytes(2) else what}; write it as UTF-8"
    if name.endswith((".yaml", ".yml", ".toml")) and not start.lstrip().startswith((b"{", b"[{")):
        return f"records are not read from {name[name.rindex('.') :]} files; write one JSON object per line"
    return None


class JsonFile:
    """The records of a JSONL file or pipe, or of a JSON array. It stores byte offsets, 16 bytes of memory per record.

    Opening reads the file once, for the offsets and a checksum (`identity`). The file must not change while it is open.
    A pipe is kept in memory. An item raises BadRecord if it is not JSON.
    """

    def __init__(self, path):
        self.path = self.name = Path(path)
        self.folder = Path() if str(self.path.parent) in _DESCRIPTORS else self.path.parent
        self._data, self._is_array = None, False
        try:
            self._file = os.open(self.path, os.O_RDONLY)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                self.folder, self._data = Path(), self._whole_pipe()  # paths start at the working directory
            self._scan()
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({e.strerror})") from e

    def _whole_pipe(self) -> bytes:
        data = bytearray()
        while chunk := os.read(self._file, _CHUNK):
            data += chunk
            if len(data) > MAX_IN_MEMORY:
                raise InputError(f"{self.path}: a pipe of more than {MAX_IN_MEMORY >> 20} MiB; write it to a file")
        return bytes(data)

    def _scan(self) -> None:
        """Sets the offsets of the records, the numbers of their lines, and the identity."""
        starts, maybe_blank, checksum, size = [np.zeros(1, int)], [np.ones(1, bool)], 0, 0
        while chunk := self._read(size, size + _CHUNK):
            if size == 0 and chunk.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                self._is_array = True
            data = np.frombuffer(chunk, np.uint8)
            after = np.flatnonzero(data == ord("\n")) + 1
            starts.append(after + size)
            maybe_blank.append(np.append(data, 0)[after] <= ord(" "))  # the first byte of the next line
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
        self.identity = {"bytes": size, "crc32": checksum}
        if self._is_array:
            self._starts, self._ends = self._elements(size)
            return
        self._starts = np.concatenate(starts)
        self._ends = np.append(self._starts[1:], size)
        blank = [i for i in np.flatnonzero(np.concatenate(maybe_blank)) if not self._item(i).strip()]
        self._lines = np.delete(np.arange(len(self._starts)), blank) + 1
        self._starts, self._ends = np.delete(self._starts, blank), np.delete(self._ends, blank)
        self._refuse_objects(size)

    def _refuse_objects(self, size: int) -> None:
        """Raises InputError for an object over several lines, and for a single one that holds the records."""
        if not len(self) or self._item(0).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{" or size > MAX_IN_MEMORY:
            return
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(self._item(0))
            if len(self) > 1:
                return
        text = self._read(0, size).decode("utf-8-sig", "replace").lstrip()
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return  # its lines are bad records
        if key := _wrapper(value):
            said, how = (
                f"the records are under {key!r}",
                f"write one per line, as jq -c '.[{json.dumps(key)}][]' {self.path} does",
            )
            raise InputError(f"{self.path}: {said}; {how}")
        if "\n" in text[:end]:
            several = (
                "JSON objects over several lines each" if text[end:].strip() else "one JSON object over several lines"
            )
            how = f"write one record per line, as jq -c . {self.path} does, or a JSON array of records"
            raise InputError(f"{self.path}: holds {several}; {how}")

    def _elements(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the elements of the array start and end."""
        if size > MAX_IN_MEMORY:
            said = f"a JSON array of {size >> 20} MiB; more than {MAX_IN_MEMORY >> 20} MiB are not read at once"
            raise InputError(f"{self.path}: {said}, so write one record per line, as jq -c '.[]' {self.path} does")
        # JSON's own characters are ASCII. Read as Latin-1, the text has the positions of the bytes.
        text, decode, spans = self._read(0, size).decode("latin-1"), json.JSONDecoder().raw_decode, []
        at = _SPACE.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
        try:
            while text[at : at + 1] != "]" or spans:
                end = decode(text, at)[1]
                spans.append((at, end))
                at = _SPACE.match(text, end).end()  # type: ignore[union-attr]
                if text[at : at + 1] != ",":
                    break
                at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
            if text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except (ValueError, RecursionError) as e:
            raise InputError(f"{self.path}: a JSON array that is not readable ({e})") from e
        if text[at + 1 :].strip():
            raise InputError(f"{self.path}: goes on after its array; write one array, or one record per line")
        starts, ends = np.array(spans, int).reshape(-1, 2).T
        return starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        return _parse(self._item(index))

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]" if self._is_array else f"{self.name}:{self._lines[index]}"

    def _item(self, index: int) -> bytes:
        return self._read(int(self._starts[index]), int(self._ends[index]))

    def _read(self, start: int, end: int) -> bytes:
        return os.pread(self._file, end - start, start) if self._data is None else self._data[start:end]

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_file"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self._data is None:
            self._file = os.open(self.path, os.O_RDONLY)

    def __del__(self, close=os.close):  # bound here: at Python's exit, `os` may be gone
        if hasattr(self, "_file"):
            close(self._file)


def _wrapper(value) -> str | None:
    """The key of an object under which a list of records stands, if the object itself is no record."""
    if not isinstance(value, dict) or value.keys() & {*QUESTIONS, "chosen"}:
        return None
    rest = {k: v for k, v in value.items() if k not in ("images", "videos", "tools", "history")}
    lists = (k for k, v in rest.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v))
    return next(lists, None)


def _parse(line: bytes):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise BadRecord("unreadable", f"not UTF-8 text ({e.reason} at byte {e.start} of the line)") from e
    except json.JSONDecodeError as e:
        raise BadRecord("unreadable", _why_no_record(e)) from e
    except (ValueError, RecursionError) as e:
        raise BadRecord("unreadable", f"not readable as JSON ({e})") from e


def _why_no_record(e: json.JSONDecodeError) -> str:
    """Why a line is not one JSON value."""
    if e.msg != "Extra data":
        return f"not readable as JSON ({e})"
    before, after = e.doc[: e.pos], e.doc[e.pos : e.pos + 1]
    if "\r" in before[len(before.rstrip()) :]:
        return "lines end with carriage returns alone (\\r); write line feeds, as tr '\\r' '\\n' does"
    if after in ("{", "["):
        return "several JSON values on one line; write one record per line, as jq -c . does"
    if after == ",":
        return "a comma after the record; write one record per line and no commas, or a JSON array"
    return f"not readable as JSON ({e})"


class _List:
    """Records of an object with `len()` and `[i]`."""

    name, folder = "the list of records", None

    def __init__(self, records):
        self._records, self.identity = records, getattr(records, "identity", {})

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._records[int(index)]

    def where(self, index: int) -> str:
        return self._records.where(index) if hasattr(self._records, "where") else f"record {index}"


def _in_memory(data):
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.Dataset):
        return Rows(data, "dataset")
    if datasets is not None and isinstance(data, datasets.IterableDataset):
        return Stream(data, "dataset")
    if isinstance(data, Mapping) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        kind = type(data).__name__
        said = f"records are of type {kind}; give a path, or a sequence with len() and [i]"
        hint = ", such as one split of it" if "Dataset" in kind else ""
        raise InputError(said + hint)
    return _List(data)
