"""Checkpoints that are elsewhere: on the Hugging Face hub, or in an object store. The small files come first.

They are judged before any weights are copied: whether the model is supported, quantised, and complete. All files are of
one commit of the hub, or of one state of the store. Imports no jax.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qwenvl_jax import stores
from qwenvl_jax.config import read_json
from qwenvl_jax.errors import CheckpointError, InputError
from qwenvl_jax.inputs.preprocessing import PREPROCESSOR_FILE, read_preprocessing
from qwenvl_jax.params import directory
from qwenvl_jax.params.directory import (
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    INDEX,
    MARKER,
    PARAMS,
    SIDE_FILES,
    SINGLE,
    first_line,
)

_WEIGHTS = ("*.safetensors", f"{PARAMS}/**")
_AT_REVISION = rf"({stores.HUB_ID.pattern})(?:@(\w[\w./-]*))?"
_BLOCK = 1 << 18  # bytes to read ahead in a header
_MAX_HEADER = 100_000_000


class Place(NamedTuple):
    """Where a checkpoint is. Either a store's URL, or a repository of the hub and a revision, None for its default."""

    url: str | None
    repo: str = ""
    revision: str | None = None


def place_of(name, revision: str | None = None) -> Place | None:
    """The place that a model's name means: "gs://…", "s3://…", "OWNER/NAME" or "OWNER/NAME@REVISION"; else None."""
    url = stores.as_url(name)
    match = None if url else re.fullmatch(_AT_REVISION, str(name))
    if revision is not None and (match is None or match[2] is not None):
        why = "names one already" if match else "is not an id of the hub"
        raise CheckpointError(f"{name}: {why}; leave out revision")
    return Place(url) if url else match and Place(None, match[1], match[2] or revision)


def small_files(place: Place) -> Path:
    """A directory with the checkpoint's small files. Raises CheckpointError."""
    return stores.local_copy(place.url, SIDE_FILES) if place.url else _from_hub(place)


def add_weights(place: Place, path: Path) -> Path:
    """Adds the weights to what `small_files` gave, after a look at the small files. Raises CheckpointError."""
    if _has_weights(path):
        return path
    _judge(place.url or place.repo, path)
    if not place.url:
        return _weights_from_hub(place.repo, path)
    if stores.local_copy(place.url, (*SIDE_FILES, *_WEIGHTS)) != path:
        raise CheckpointError(f"{place.url}: changed while it was copied; run the command again")
    return path


@contextlib.contextmanager
def headers(place: Place | None, path: Path) -> Iterator[Path]:
    """Yields a directory of weight files that have their headers and sizes, but nothing else, and take no space.

    path: what `small_files` gave. If it has the weights, or if there is no place, it is yielded as it is.
    """
    if place is None or _has_weights(path):
        yield path
        return
    import tempfile

    if place.url:
        sizes = {name: size for name, (size, _) in stores.listing(place.url).items()}
        fs, root = stores.filesystem(place.url), place.url
    else:
        from huggingface_hub import HfFileSystem

        sizes, fs, root = _sizes(place.repo, path.name), HfFileSystem(), f"{place.repo}@{path.name}"
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(re.compile(r"[^/]+\.(safetensors|index\.json)").fullmatch, sizes):
            with _reading(f"{place.url or place.repo}: {name}"), fs.open(f"{root}/{name}", block_size=_BLOCK) as file:
                text = file.read(8)
                length = sizes[name] if name.endswith(".json") else int.from_bytes(text, "little")
                if length <= min(_MAX_HEADER, sizes[name]):  # otherwise the reader of the header refuses it
                    text += file.read(length)
            target = Path(folder) / name
            target.write_bytes(text)
            with target.open("r+b") as file:
                file.truncate(sizes[name])
        yield Path(folder)


def _judge(name: str, path: Path) -> None:
    """Raises CheckpointError if a checkpoint cannot be used, whatever its weights are."""
    if (path / ADAPTER_SETTINGS).is_file():
        return  # its weights are small, and its base is judged when that is opened
    config = directory.read_config(path)
    if read_preprocessing(path, config) is None:
        raise CheckpointError(f"{name}: has no {PREPROCESSOR_FILE}; a checkpoint needs it")


def _has_weights(path: Path) -> bool:
    """Whether the weights are there, as far as the small files say; those of our format do not."""
    if (path / SINGLE).is_file() or (path / ADAPTER_WEIGHTS).is_file():
        return True
    with contextlib.suppress(InputError, AttributeError):
        files = set(read_json(path / INDEX)["weight_map"].values()) if (path / INDEX).is_file() else ()
        return bool(files) and all(isinstance(f, str) and (path / f).is_file() for f in files)
    return False


def _from_hub(place: Place) -> Path:
    """The small files of a repository, at the commit that its revision means now; the folder's name is the commit."""
    from huggingface_hub import snapshot_download

    name = place.repo if place.revision is None else f"{place.repo}@{place.revision}"
    try:  # the top folder only: others hold checkpoints of a run, or files for other programs
        how = dict(allow_patterns=list(SIDE_FILES), ignore_patterns=["*/*"])
        return Path(snapshot_download(place.repo, revision=place.revision, **how))
    except Exception as e:  # the type depends on huggingface_hub's version and http library
        raise CheckpointError(f"{name}: no such directory, and not on the hub ({first_line(e)})") from e


def _weights_from_hub(repo: str, path: Path) -> Path:
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE and (path / PARAMS).is_dir():
        return path
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{repo}: HF_HUB_OFFLINE is set, and the cache lacks {_lacking(path)}; unset it")
    sizes = _sizes(repo, path.name)
    wanted = [name for name in sizes if stores.matches(name, _WEIGHTS)]
    if not wanted:
        other = next((name for name in sizes if re.search(r"\.(bin|pth?|gguf|ckpt)$", name)), None)
        has = f"only {other}" if other else "none"
        raise CheckpointError(f"{repo}: weights are read from safetensors files, and the repository has {has}")
    need = sum(sizes[name] for name in wanted if not (path / name).exists()) + stores.MARGIN
    free = shutil.disk_usage(path).free
    if free < need:
        space = f"{need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free in {constants.HF_HUB_CACHE}"
        raise CheckpointError(f"{repo}: no space for its weights; {space} (HF_HOME names another place)")
    with _reading(repo):
        how = dict(allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in wanted])
        return Path(snapshot_download(repo, revision=path.name, **how))


def _sizes(repo: str, commit: str) -> dict[str, int]:
    """The files of a repository's commit."""
    from huggingface_hub import HfApi

    with _reading(repo):
        files = HfApi().model_info(repo, revision=commit, files_metadata=True).siblings or ()
        return {file.rfilename: file.size or 0 for file in files}


@contextlib.contextmanager
def _reading(name: str):
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        raise CheckpointError(f"{name}: cannot be downloaded ({first_line(e)})") from e


def _lacking(path: Path) -> str:
    """The weight files that are not there, in words."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        files = sorted(set(read_json(path / INDEX)["weight_map"].values()))
        files = [file for file in files if not (path / file).is_file()]
        return f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else files[0]
    return f"{PARAMS}/" if (path / MARKER).is_file() else SINGLE
