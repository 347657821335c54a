"""The directory of a run, which may be in an object store: training works in a local copy of that one.

A store has no locks. So whoever opens a run takes it over, and a process that had it open elsewhere stops at its next
copy. In this way a run whose machine is lost can go on at once.
"""

import contextlib
import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from qwenvl_jax import stores
from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.stores import LAST, PARTIAL, join

CHECKPOINTS = "checkpoints"
COMMITTED = "commit_success.txt"  # Orbax's name for it on gs://, so Orbax opens these checkpoints there
OWNER = "owner.txt"  # names the process that writes the run


class Mirror:
    """A local directory, in which there is nothing to copy."""

    def __init__(self, path: Path):
        self.path = path

    def name(self, path: Path) -> str:
        """A path of the directory as the user knows it."""
        return str(path)

    @contextlib.contextmanager
    def names(self) -> Iterator[None]:
        """Errors from the block name the directory as the user knows it."""
        yield

    def rename(self, result: Path, former: Path) -> None:
        """Gives a finished model another name."""
        result.rename(former)

    def push(self, *, progress: bool = False) -> None:
        """Copies what is new to the store. Raises InputError if another process has taken the run over."""

    def push_after(self, directory: Path) -> None:
        """Pushes in the background, once `directory` exists. The next `push` waits for it, and repeats what failed."""

    def close(self) -> None:
        """Ends the use of the directory; the last user's call removes a local copy."""


_OPEN: dict[str, "_StoreMirror"] = {}  # of this process: finetuning and its loop share one


def check_shared(directory) -> None:
    """Raises OptionsError if several processes cannot write the directory together."""
    if stores.as_url(directory):
        raise OptionsError(f"{directory}: several processes need a directory that all of them see; mount the bucket")


def open_mirror(directory) -> Mirror:
    """The directory of a run to work in. Opening one in a store copies what a run needs to resume.

    Raises InputError if the store cannot be reached or written, or if another process of this machine has it open.
    """
    url = stores.as_url(directory)
    if url is None:
        return Mirror(Path(directory).expanduser().absolute())
    if url not in _OPEN:
        _OPEN[url] = _StoreMirror(url)
    _OPEN[url].users += 1
    return _OPEN[url]


class _StoreMirror(Mirror):
    def __init__(self, url: str):
        folder = stores.cache() / "runs" / hashlib.sha256(url.encode()).hexdigest()[:16]
        super().__init__(folder / PurePosixPath(url).name)
        self.url, self.users = url, 0
        self._busy, self._closed = threading.Lock(), threading.Event()
        self._files: dict[str, tuple] = {}  # the size and time of the loose files that the store has
        self._sent: set[str] = set()  # the complete directories that the store has
        self._owner = f"{os.uname().nodename}, process {os.getpid()}, {uuid.uuid4().hex[:8]}"
        with contextlib.ExitStack() as undo:
            undo.enter_context(stores.locked(folder, taken=f"{url}: another process is training there"))
            shutil.rmtree(self.path, ignore_errors=True)  # left by a process that was killed
            self.path.mkdir()
            undo.callback(shutil.rmtree, self.path, ignore_errors=True)
            found = stores.listing(url)
            stores.write(join(url, OWNER), self._owner)  # also shows that the store can be written
            self._pull(found)
            self._held = undo.pop_all()

    def _pull(self, found: dict[str, stores.Object]) -> None:
        """Copies complete checkpoints and the run's own files; of a finished model, only the file that says so.

        Of other directories, nothing is copied: a result whose upload was interrupted would look finished.
        """
        wanted = {}
        for name, (size, _) in found.items():
            folder, last = _unit(name), PurePosixPath(name).name
            signs = [sign for sign in LAST if folder and f"{folder}/{sign}" in found]
            self._sent |= {folder} if signs else set()
            is_step = folder.startswith(f"{CHECKPOINTS}/")
            needed = bool(signs) if is_step else not folder or last in signs[:1]
            if needed and last != COMMITTED and name != OWNER:
                wanted[name] = self.path / name, size
        if wanted:
            stores.download(self.url, wanted)

    def name(self, path: Path) -> str:
        return join(self.url, path.relative_to(self.path).as_posix())

    @contextlib.contextmanager
    def names(self) -> Iterator[None]:
        try:
            yield
        except InputError as e:
            text = str(e).replace(str(self.path), self.url)
            if text != str(e) and "disk" in text:
                text += f" (its local copy is in {stores.cache()})"
            e.args = (text,)
            raise

    def rename(self, result: Path, former: Path) -> None:
        with self._busy:
            stores.remove(self.name(former))  # left by an interrupted move
            stores.move(self.name(result), self.name(former))
            self._sent = self._sent - {result.name} | {former.name}
            result.rename(former)

    def push(self, *, progress: bool = False) -> None:
        with self._busy:
            owner = stores.read(join(self.url, OWNER), 1 << 10, 60).decode(errors="replace")
            if owner != self._owner:
                raise InputError(f"{self.url}: another process has taken over this run ({owner}); this one stops")
            complete, loose = self._contents()
            changed = {name: now for name, now in loose.items() if self._files.get(name) != now}
            stores.upload(self.path, self.url, list(changed), progress=progress)
            self._files |= changed
            for folder in complete:
                if folder not in self._sent:
                    here, there = self.path / folder, f"{self.url}/{folder}"
                    stores.remove(there)  # left by an interrupted upload
                    stores.upload(here, there, stores.files_in(here), progress=progress)
                    if folder.startswith(f"{CHECKPOINTS}/"):
                        stores.write(join(there, COMMITTED), "complete\n")
                    self._sent.add(folder)
            for folder in self._sent - set(complete):
                if folder.startswith(f"{CHECKPOINTS}/"):
                    stores.remove(f"{self.url}/{folder}")
                    self._sent.discard(folder)

    def _contents(self) -> tuple[list[str], dict[str, tuple]]:
        """The complete directories, which are copied once, and the other files with what changes when they do."""
        complete, loose = [], []
        for entry in sorted(self.path.iterdir()):
            if PARTIAL in entry.name:
                continue
            if entry.is_file():
                loose.append(entry.name)
            elif entry.name == CHECKPOINTS:
                complete += [f"{CHECKPOINTS}/{step.name}" for step in sorted(entry.iterdir()) if step.name.isdecimal()]
            elif any((entry / sign).is_file() for sign in LAST):
                complete.append(entry.name)
            else:
                loose += [f"{entry.name}/{name}" for name in stores.files_in(entry)]
        stats = {name: (self.path / name).stat() for name in loose}
        return complete, {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def push_after(self, directory: Path) -> None:
        def wait() -> None:
            while not directory.is_dir():
                if self._closed.wait(0.1):
                    return
            with contextlib.suppress(Exception):
                self.push()

        threading.Thread(target=wait, name="upload", daemon=True).start()

    def close(self) -> None:
        self.users -= 1
        if not self.users:
            self._closed.set()
            del _OPEN[self.url]
            with self._busy:
                self._held.close()  # removes the copy, then gives the lock free


def _unit(name: str) -> str:
    """The directory of a run that an object belongs to: "checkpoints/STEP", or a folder; "" is the run's own."""
    parts = name.split("/")[:-1]
    return "/".join(parts[: 2 if parts[:1] == [CHECKPOINTS] else 1])
