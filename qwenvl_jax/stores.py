"""Object stores: `gs://` and `s3://` URLs in place of paths. No other file knows them.

Everything else works on local files. What is read is copied to a cache (`local_copy`), or into memory if it is small
(`read`). What is written is complete on the local disk before it is copied (`new_directory`; for
runs, train/mirror.py).

A store cannot rename, so the file without which a directory does not count is copied last and deleted first: see
`LAST`.

gcsfs and s3fs find credentials and other endpoints by themselves: GOOGLE_APPLICATION_CREDENTIALS,
STORAGE_EMULATOR_HOST, AWS_PROFILE, AWS_ENDPOINT_URL and so on.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from qwenvl_jax.errors import InputError, install

LIBRARIES = {"gs": "gcsfs", "s3": "s3fs"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # OWNER/NAME, a model or dataset of the Hugging Face hub
# The last one is what Orbax itself writes to gs:// when a checkpoint is complete.
LAST = ("adapter_config.json", "config.json", "commit_success.txt")
PARTIAL = ".partial"
MARGIN = 64 << 20  # bytes to leave free on the local disk
_COPIES = 8  # at a time


class Object(NamedTuple):
    """What a store says of one object. tag: changes with its content."""

    size: int
    tag: str


def as_url(path) -> str | None:
    """The URL that a path is, None for a local one. `Path("gs://a/b")` has lost a slash and counts as a URL.

    Raises InputError for other stores, which would otherwise become a local directory of that name.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", str(path), re.DOTALL)
    if not match:
        return None
    scheme, rest = match[1].lower(), match[2].rstrip("/")
    if scheme not in LIBRARIES:
        raise InputError(f"{path}: {scheme}:// is not supported here; give a local path, or gs:// or s3://")
    if not rest or "//" in rest or {".", ".."} & set(rest.split("/")):
        raise InputError(f"{path}: not the URL of an object; it must have the form {scheme}://BUCKET/NAME")
    return f"{scheme}://{rest}"


def folder(path):
    """A path to which `/` appends a name: a Path or, of a URL, one of etils."""
    url = as_url(path)
    if url is None:
        return Path(path)
    from etils import epath  # comes with Orbax

    return epath.Path(url)


def local_file(option: str, path) -> Path:
    """The path of a file to write. Raises InputError if it is a URL, a directory, or in a directory that is missing."""
    if as_url(path):
        raise InputError(f"{option} {path}: is written to a local file only; give a local path and copy it afterwards")
    if not str(path):
        raise InputError(f"{option} is empty; give a file")
    path = Path(path).expanduser()
    if path.is_dir():
        raise InputError(f"{option} {path}: is a directory; give a file, such as {path / 'answers.jsonl'}")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no directory {path.parent}; make it first")
    return path


def read(url: str, max_bytes: int, seconds: float, take: Callable[[int], None] = lambda size: None) -> bytes:
    """One object, in memory. Raises InputError if it is larger or takes longer, TimeoutError included.

    take(size): called before the content is read; it may raise InputError.
    """
    from fsspec.asyn import sync

    with reaching(url):
        fs, end = filesystem(url), time.monotonic() + seconds
        size = sync(fs.loop, fs._info, url, timeout=seconds)["size"]
        if size > max_bytes:
            raise InputError(f"{url}: larger than {max_bytes >> 20} MiB")
        take(size)
        if (seconds := end - time.monotonic()) <= 0:
            raise TimeoutError
        return sync(fs.loop, fs._cat_file, url, start=0, end=size, timeout=seconds) if size else b""


def local_copy(url: str, patterns: tuple[str, ...] = ("**",), *, progress: bool = True) -> Path:
    """The local copy of an object, or of all objects below `url`, which are copied if they are new or have changed.

    patterns: names to copy; `*` does not match a slash, and `**` at the end matches everything. Calls with other
        patterns add to the same copy, as long as the store has not changed.
    Raises InputError if there is nothing, if the disk has no space, or if the store changes meanwhile.
    """
    found = listing(url)
    if not found:
        raise InputError(f"{url}: no such object, and none below it")
    what = repr((url, sorted(found.items())))
    folder = cache() / "copies" / hashlib.sha256(what.encode()).hexdigest()[:16]
    target = folder / PurePosixPath(url).name
    with locked(folder, wait=True):
        for leftover in folder.rglob(f"*{PARTIAL}"):
            leftover.unlink()
        files = {name: target / name if name else target for name in found if not name or matches(name, patterns)}
        missing = {name: file for name, file in files.items() if not file.is_file()}
        if missing:
            download(url, {name: (file, found[name].size) for name, file in missing.items()}, progress)
            if listing(url) != found:
                raise InputError(f"{url}: changed while it was copied; run the command again")
        elif not files:
            target.mkdir(exist_ok=True)
    return target


def listing(url: str) -> dict[str, Object]:
    """All objects below a URL by name; "" is the one that the URL itself names. Raises InputError."""
    with reaching(url):
        root, found = url.partition("://")[2], {}
        for key, info in filesystem(url).find(url, detail=True).items():
            name = key.removeprefix(root).removeprefix("/")
            if name.endswith("/") or (not name and info["type"] != "file"):
                continue  # the web consoles' mark of an empty folder
            if {"", ".", ".."} & set(name.split("/")) and name:
                raise InputError(f"{url}: holds an object named {name!r}, which cannot be a file")
            tag = info.get("generation") or info.get("ETag") or info.get("etag")
            found[name] = Object(info["size"], str(tag))
        return found


def download(url: str, files: dict[str, tuple[Path, int]], progress: bool = True) -> None:
    """Copies objects {name below url: (file, its size)}. A file gets its name when it is complete."""
    need = sum(size for _, size in files.values()) + MARGIN
    place = next(iter(files.values()))[0].parent
    place.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(place).free) < need:
        space = f"{need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free in {cache()}"
        raise InputError(f"{url}: no space for its copy; {space}")
    fs = filesystem(url)

    def copy(name: str, callback) -> None:
        file, size = files[name]
        work = file.with_name(file.name + PARTIAL)
        file.parent.mkdir(parents=True, exist_ok=True)
        if size:
            fs.get_file(join(url, name), str(work), callback=callback)
        else:
            work.touch()
        if work.stat().st_size != size:
            raise InputError(f"{join(url, name)}: {work.stat().st_size} bytes came of {size}; run the command again")
        work.replace(file)

    with reaching(url):
        _together(copy, files, need - MARGIN, "downloading", progress)


def upload(folder: Path, url: str, names, *, progress: bool = False) -> None:
    """Copies files of a folder to the store, those in LAST at the end and one after the other."""
    fs = filesystem(url)

    def copy(name: str, callback) -> None:
        fs.put_file(str(folder / name), join(url, name), callback=callback)

    first = [name for name in names if name not in LAST]
    size = sum((folder / name).stat().st_size for name in first)
    with reaching(url):
        _together(copy, first, size, "uploading", progress)
        for name in LAST:
            if name in names:
                fs.put_file(str(folder / name), join(url, name))


def write(url: str, text: str) -> None:
    """Writes one small object."""
    with reaching(url, "cannot be written"):
        filesystem(url).pipe_file(url, text.encode())


def check_empty(url: str) -> None:
    """Raises InputError if there is anything below a URL."""
    if listing(url):
        raise InputError(f"{url}: not empty; choose another name, or remove what is there first")


@contextlib.contextmanager
def new_directory(url: str) -> Iterator[Path]:
    """Yields a local path to make; what is there afterwards is copied to `url`, which must be empty, and removed.

    If the copying fails, the store is left without the files in LAST.
    """
    check_empty(url)
    folder = cache() / "new" / uuid.uuid4().hex
    with locked(folder):
        try:
            path = folder / PurePosixPath(url).name
            yield path
            upload(path, url, files_in(path), progress=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove(url: str) -> None:
    """Deletes everything below a URL, first what makes it count."""
    with reaching(url):
        fs = filesystem(url)
        names = listing(url)
        for last in reversed(LAST):
            if last in names:
                fs.rm_file(join(url, last))
        rest = [join(url, name) for name in names if name not in LAST]
        if rest:
            fs.rm(rest)


def move(url: str, new: str) -> None:
    """Copies everything below a URL to another one of the store, last what makes it count, and deletes the first."""
    with reaching(url):
        fs = filesystem(url)
        for name in sorted(listing(url), key=lambda name: name in LAST):
            fs.cp_file(join(url, name), join(new, name))
    remove(url)


def files_in(folder: Path) -> list[str]:
    """The names of all files below a folder, sorted."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def cache() -> Path:
    """Where local copies are: `$XDG_CACHE_HOME/qwenvl_jax_stores`, or `~/.cache/qwenvl_jax_stores`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "qwenvl_jax_stores"


def filesystem(url: str):
    scheme = url.partition("://")[0]
    try:
        if scheme == "gs":
            from gcsfs.core import GCSFileSystem as FileSystem
        else:
            from s3fs import S3FileSystem as FileSystem
    except ImportError as e:
        raise InputError(f"{url}: {scheme}:// needs {LIBRARIES[scheme]}: {install('stores')}") from e
    return FileSystem(use_listings_cache=False)  # the same object for each call, by fsspec


@contextlib.contextmanager
def reaching(url: str, problem: str = "cannot be read or written"):
    """Turns the errors of a store's library, whose types are many, into InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as e:
        raise InputError(f"{url}: no such object or bucket") from e
    except TimeoutError as e:
        raise InputError(f"{url}: no answer in time; try again") from e
    except Exception as e:
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        raise InputError(f"{url}: {problem} ({reason})") from e


def _together(copy, names, size: int, verb: str, progress: bool) -> None:
    """Calls copy(name, callback) for all names, several at a time; the bar counts bytes."""
    from fsspec.callbacks import Callback
    from tqdm import tqdm

    disable = None if progress and size > MARGIN else True
    with tqdm(desc=verb, total=size, unit="B", unit_scale=True, disable=disable) as bar:

        class Bytes(Callback):
            def relative_update(self, inc=1):
                bar.update(inc)

            def branched(self, path_1, path_2, **kwargs):
                return self

        with ThreadPoolExecutor(_COPIES) as pool:
            jobs = [pool.submit(copy, name, Bytes()) for name in names]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False, taken: str = "in use"):
    """Holds a lock on a folder of the cache, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise InputError(f"{folder}: local copies cannot be kept there ({e.strerror}); set XDG_CACHE_HOME") from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as e:
            raise InputError(taken) from e
        yield
    finally:
        os.close(fd)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    for pattern in patterns:
        if pattern.endswith("**"):
            if name.startswith(pattern[:-2]):
                return True
        elif name.count("/") == pattern.count("/") and fnmatchcase(name, pattern):
            return True
    return False


def join(url: str, name: str) -> str:
    return f"{url}/{name}" if name else url


def refuse_closed(path, error: type[InputError] = InputError) -> None:
    """Raises `error` for a path that is, or lies in, a folder that this user may not enter or list.

    For paths that are folders or were not found: without permission, the system says that nothing is there.
    """
    for folder in (*reversed(Path(path).parents), Path(path)):
        try:
            os.stat(os.path.join(folder, "."))
            if folder == Path(path):
                os.scandir(folder).close()
        except PermissionError as e:
            raise error(f"{path}: cannot be read (no permission to open the folder {folder})") from e
        except (OSError, ValueError):
            return
