"""Turns on jax's persistent compilation cache, in a directory that only the user can write to.

jax runs the programs in its cache, so anyone who can write there can run code as the user. The default directory is
`$XDG_CACHE_HOME/qwenvl_jax` or `~/.cache/qwenvl_jax`. It is made with mode 0700, and refused if another user could
have written to it. A directory from JAX_COMPILATION_CACHE_DIR is not checked. This file does not import jax.
"""

import contextlib
import os
import stat
import warnings
from pathlib import Path

from qwenvl_jax.errors import InputError

LIMIT = 2 << 30  # bytes; above this, the least recently used files are removed
_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"


def enable() -> None:
    """Caches every program that this process compiles from now on, however short the compilation.

    jax's own environment variables win. Raises InputError if the default directory is refused.
    """
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory()))
    if _MIN_SECONDS.upper() not in os.environ:
        jax.config.update(_MIN_SECONDS, 0)


@contextlib.contextmanager
def enabled():
    """`enable` for a library: warns if the directory is refused; on exit, jax's time threshold applies again."""
    import jax

    min_seconds = getattr(jax.config, _MIN_SECONDS)
    try:
        enable()
    except InputError as e:
        warnings.warn(str(e), stacklevel=4)
    try:
        yield
    finally:
        jax.config.update(_MIN_SECONDS, min_seconds)


def directory() -> Path:
    """The default directory, made if it is missing. Raises InputError if it is refused."""
    path = Path("the user's cache directory")
    try:
        path = _default()
        for place in (*reversed(path.parents), path):
            place.mkdir(mode=0o700, exist_ok=True)
        problem = _exposed(path) or _prune(path)
    except (OSError, RuntimeError) as e:  # RuntimeError: no home directory, or a loop of symbolic links
        problem = f"{path} cannot be used ({getattr(e, 'strerror', None) or e})"
    if problem:
        raise InputError(
            f"compiled programs are not cached, because {problem}. Set JAX_COMPILATION_CACHE_DIR to a directory that "
            "only you can write to, or JAX_ENABLE_COMPILATION_CACHE=0"
        )
    return path


def _default() -> Path:
    """The default directory with symbolic links resolved: a link could be redirected after the check."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG standard ignores a relative one
        base = Path.home() / ".cache"
    if not base.is_absolute():
        raise RuntimeError("HOME is not an absolute path")
    return (base / "qwenvl_jax").resolve()


def _exposed(path: Path) -> str | None:
    """Why another user could write to `path` or replace it; None if nobody could."""
    me, closed = os.geteuid(), False
    for parent in reversed(path.parents):
        status = parent.stat()
        if status.st_uid not in (0, me):
            return f"{parent} belongs to another user"
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX and not closed:
            return f"others can write to {parent} (chmod go-w fixes this)"
        closed = closed or (
            status.st_uid == me and not status.st_mode & 0o077
        )  # nobody else can go below this directory
    status = path.lstat()
    if status.st_uid != me:
        return f"{path} belongs to another user"
    if status.st_mode & 0o077:
        return f"others can open {path} (chmod 700 fixes this; empty it first if they could write to it)"
    return None


def _prune(path: Path) -> str | None:
    """Removes the least recently used files above LIMIT. If a file belongs to another user, says so instead."""
    files = []
    for folder, _, names in os.walk(path):
        for file in (os.path.join(folder, name) for name in names):
            with contextlib.suppress(FileNotFoundError):  # another process prunes too
                files.append((file, os.lstat(file)))
    for file, status in files:
        if status.st_uid != os.geteuid():
            return f"{file} belongs to another user"
    files.sort(key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime))
    excess = sum(status.st_size for _, status in files) - LIMIT
    for file, status in files:
        if excess <= 0:
            break
        with contextlib.suppress(OSError):
            os.unlink(file)
            excess -= status.st_size
    return None
