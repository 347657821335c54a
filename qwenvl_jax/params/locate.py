"""Finds checkpoints and adapters by name: a directory, a hub id, a URL or "demo". Imports no jax."""

import contextlib
import logging
import re
from pathlib import Path
from typing import NamedTuple

from qwenvl_jax import stores
from qwenvl_jax.config import read_json
from qwenvl_jax.errors import CheckpointError, shown
from qwenvl_jax.families import PRESETS
from qwenvl_jax.params import remote
from qwenvl_jax.params.directory import ADAPTER_SETTINGS, INDEX, MARKER, SINGLE, leftover
from qwenvl_jax.params.remote import Place
from qwenvl_jax.stores import HUB_ID

PACKAGE = Path(__file__).parents[1]
DEMO = "demo"
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([\w.-]+)")
_LOG = logging.getLogger(__name__)


class Located(NamedTuple):
    """A checkpoint, its name for other programs (a hub id or a directory), and its adapters, in order.

    place: where its weights are still to be copied from, or None.
    revision: the branch, tag or commit of the hub that was asked for, or None.
    """

    path: Path
    name: str
    adapters: tuple[Path, ...] = ()
    place: Place | None = None
    revision: str | None = None


def find(path_or_id, *, revision: str | None = None, weights: bool = True) -> Path:
    """The checkpoint's directory. One on the hub or in an object store is copied to a cache first.

    path_or_id: a directory, "gs://…", "s3://…", a hub id such as "Qwen/Qwen2-VL-2B-Instruct", or "ID@REVISION".
        "demo" is always the package's small checkpoint; "./demo" is a directory.
    weights: False copies the small files only. Otherwise they are judged before the weights are copied.
    Raises CheckpointError if it is not found.
    """
    path, place = _small(path_or_id, revision)
    return path if place is None or not weights else remote.add_weights(place, path)


def _small(path_or_id, revision: str | None = None) -> tuple[Path, Place | None]:
    """A checkpoint's directory with its small files, and the place of its weights, None if it is a local directory."""
    if path_or_id == DEMO:
        path = PACKAGE / "demo" / "checkpoint"
        if not path.is_dir():
            raise CheckpointError(f"{DEMO}: this installation has no demo checkpoint; name a directory or a hub id")
        return path, None
    path = Path(path_or_id).expanduser()
    stores.refuse_closed(path, CheckpointError)
    if path.is_dir() and revision is None:
        return path.absolute(), None
    if path.exists() and not path.is_dir():
        raise CheckpointError(_a_file(path))
    place = remote.place_of(path_or_id, revision)
    if place is None:
        raise CheckpointError(f"{path}: no such directory")
    return remote.small_files(place), place


def check_name(path_or_id) -> None:
    """Raises CheckpointError, which lists the presets, if this is neither a directory nor in the form of a name."""
    if path_or_id != DEMO and not Path(path_or_id).expanduser().is_dir() and remote.place_of(path_or_id) is None:
        raise CheckpointError(f"{path_or_id}: no such directory or preset; presets are {', '.join(PRESETS)}")


def locate(path_or_id, *adapters, revision: str | None = None, weights: bool = True) -> Located:
    """Finds a model and its adapters, each named as for `find`.

    If `path_or_id` is an adapter, its base is opened and the adapter comes first. `adapters` are applied after it.
    revision, weights: as for `find`; those of adapters are always there. The model's are copied last; without
        `weights`, `with_weights` copies them.
    Raises CheckpointError if one of them, or a base, is not found, or if an adapter is named twice.
    """
    name, (path, place) = path_or_id, _small(path_or_id, revision)
    own: list[Path] = []
    chain = [_adapter(*_small(adapter)) for adapter in adapters]
    while (path / ADAPTER_SETTINGS).is_file():
        if any((path / file).is_file() for file in (MARKER, SINGLE, INDEX)):
            if own or path in chain:
                break
            both = f"{path}: holds a model's weights and an adapter"
            raise CheckpointError(f"{both}; move {ADAPTER_SETTINGS} away, or merge them: {_merge(path, path)}")
        if path in own:
            raise CheckpointError(f"{path}: this adapter's base is an adapter of it; name the base: {_merge(path)}")
        own.insert(0, _adapter(path, place))
        name, revision = _base_of(path)
        at = f"@{revision}" if revision else ""
        _LOG.warning("%s: an adapter; its base model is %s%s", path, name, at)
        path, place = _small(name, revision)
    seen: set[Path] = set()
    for adapter in (*own, *chain):
        if adapter.resolve() in seen:
            raise CheckpointError(f"{adapter}: this adapter is applied already; name it once")
        seen.add(adapter.resolve())
    public, revision = _public_name(path, place)
    located = Located(path, public, (*own, *chain), place, revision)
    return with_weights(located) if weights else located


def with_weights(located: Located) -> Located:
    """The same checkpoint with its weights, which are copied now if they are elsewhere. Raises CheckpointError."""
    if located.place is None:
        return located
    return located._replace(path=remote.add_weights(located.place, located.path), place=None)


def _public_name(path: Path, place: Place | None) -> tuple[str, str | None]:
    """The name of a checkpoint for other programs, and its revision; of a folder in the hub's cache, its commit."""
    if place is not None:
        return place.url or place.repo, place.revision
    if path == PACKAGE / "demo" / "checkpoint":  # the same on every machine
        return DEMO, None
    cached = _CACHED.search(str(path))
    return (f"{cached[1]}/{cached[2]}", cached[3]) if cached else (str(path), None)


def _adapter(path: Path, place: Place | None) -> Path:
    """An adapter's directory with its weights. Raises CheckpointError if it is none, before they are copied."""
    if not (path / ADAPTER_SETTINGS).is_file():
        hint = leftover(path, of_adapters=True)
        raise CheckpointError(f"{path}: not an adapter, there is no {ADAPTER_SETTINGS} in it{hint}")
    return path if place is None else remote.add_weights(place, path)


def _merge(adapter: Path, base="BASE") -> str:
    """The command that applies an adapter to a base that is named."""
    return f"qwenvl merge {base} OUT --adapter {adapter}"


def _base_of(adapter: Path) -> tuple[Path | str, str | None]:
    """An adapter's base and its revision, as `find` takes them. Raises CheckpointError that says what to do."""
    file = adapter / ADAPTER_SETTINGS
    settings, instead = read_json(file), f"name its base: {_merge(adapter)}"
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{file}: base_model_name_or_path is {shown(name)}; {instead}")
    if revision is not None and not isinstance(revision, str):
        raise CheckpointError(f"{file}: revision is {shown(revision)}; {instead}")
    if name == DEMO:
        return name, None
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no name of a file, or of a user
        for path in (Path(name).expanduser(), adapter / name):  # as in PEFT, and for a base that moved with its adapter
            if path.is_dir():
                return path, None
    cached = _CACHED.search(name)  # the hub's cache on the machine where the adapter was trained
    if cached:
        name, revision = f"{cached[1]}/{cached[2]}", revision or cached[3]
    if name.lower().endswith(("-bnb-4bit", "-awq", "-fp8")) or "-gptq" in name.lower():
        raise CheckpointError(f"{file}: the base {name} is quantised; give the original model ({instead})")
    if name.startswith(("gs://", "s3://")):
        return name, None
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{file}: the base {name} is not here; {instead}")
    return name, revision or None


def _a_file(path: Path) -> str:
    kind = path.suffix.lower()
    if kind == ".gguf":
        return f"{path}: GGUF files are not supported; use the original model's directory or hub id"
    if kind in (".bin", ".pt", ".pth", ".ckpt"):
        return f"{path}: is a file; pickles are not read, save the model with transformers' save_pretrained"
    inside = kind in (".safetensors", ".json")
    hint = f"; did you mean {path.parent}?" if inside else " (with config.json and the weights)"
    return f"{path}: is a file; a checkpoint is a directory{hint}"
