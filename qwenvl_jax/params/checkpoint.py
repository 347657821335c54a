"""Checkpoints on disk: opens a Hugging Face directory, one of ours, or a hub id; saves ours with Orbax.

Ours holds `params/` (an ordinary Orbax checkpoint of the parameter tree), the Hugging Face config, tokenizer,
template and preprocessor files as they were, and `qwenvl_jax.json`, which says that it is one of ours.
A directory being written has another name until it is complete, so what carries the final name is whole.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.config import Config, read_json
from qwenvl_jax.errors import CheckpointError, InputError
from qwenvl_jax.families import to_dict
from qwenvl_jax.inputs.preprocessing import read_preprocessing
from qwenvl_jax.params.directory import (
    FORMAT,
    INDEX,
    MARKER,
    PARAMS,
    SIDE_FILES,
    find,
    first_line,
    kvstore,
    read_config,
    stored_arrays,
)
from qwenvl_jax.params.place import Leaf, aligned_empty, to_devices
from qwenvl_jax.params.precision import Precision, on_cpu
from qwenvl_jax.params.specs import count_params, flatten, param_shardings, specs, unflatten
from qwenvl_jax.types import Model

_LOG = logging.getLogger(__name__)
PARTIAL = ".partial-qwenvl_jax"
# Small enough that a process that needs one shard reads little more than it, and a few are written at a time.
CHUNK_BYTES = 16 << 20
PIECE_BYTES = 64 << 20  # in memory at a time, where a single layer is not larger


def load(path_or_id, *, mesh=None, dtype=None, progress: bool = True) -> Model:
    """Opens a checkpoint: a Hugging Face directory, one written by `save` or `qwenvl convert`, a hub id, or "demo".

    mesh: lay the parameters out over it (sharding.make_mesh); None puts them on the first device.
    dtype: cast the weights to it and compute in it ("bfloat16"). None keeps the checkpoint's; on CPUs, which multiply
        16 bits slowly, 16-bit checkpoints are computed in float32 (`precision_of`), and `save` then writes float32.
    Raises InputError for anything that is not a complete checkpoint of a supported model, or a mesh that does not
    divide it.
    """
    from qwenvl_jax.inputs.processor import Processor

    path = find(path_or_id)
    config = read_config(path)
    shardings = None if mesh is None else param_shardings(specs(config), mesh)
    if dtype is None:
        chosen = precision_of(config, mesh)
    else:
        chosen = Precision(_known_dtype(dtype), _known_dtype(dtype))
    config = config.replace(dtype=chosen.compute)
    processor = Processor.from_dir(path, config)  # before the weights: it is quick to fail
    if (path / MARKER).is_file():
        params = restore(path, config, shardings, chosen.weights, progress)
    else:
        from qwenvl_convert.hf import read_params

        params = read_params(path, config, shardings, chosen.weights, progress)
    if progress and chosen.reason:
        _LOG.warning("%s: %s", path.name, chosen.reason)  # without handlers, Python shows it on stderr
    return Model(config, params, processor, read_json(path / "generation_config.json", missing={}))


def precision_of(config: Config, mesh=None) -> Precision:
    """What `load` does where no dtype is given: as the checkpoint says, or on a CPU as `on_cpu` says."""
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform != "cpu":
        return Precision(config.dtype, None)
    return on_cpu(config.dtype, count_params(config))


def save(model: Model, path, *, files_from=None) -> None:
    """Writes a model as a new directory `path`: its parameters, config and generation settings.

    files_from: a checkpoint directory whose tokenizer, template and preprocessor files are carried along. Only with
    them can `load` read the directory; without, it holds weights for `restore` and `qwenvl convert`.
    Raises InputError if `path` exists, if the disk is full, if the parameters are not those of the config, or if the
    model's pictures are not those of `files_from`.
    """
    import orbax.checkpoint as ocp

    if jax.process_count() > 1:
        raise InputError("save writes from a single process; this job has several")
    declared = specs(model.config)
    odd = sorted(flatten(model.params).keys() ^ declared.keys())
    if odd:
        raise CheckpointError(
            f"{path}: the parameters are not those of the config ({odd[0]}); an adapter is merged first"
        )
    if files_from is not None:
        files_from, vision = Path(files_from), model.config.vision
        if not files_from.is_dir():
            raise CheckpointError(f"{files_from}: no such directory")
        theirs = read_preprocessing(files_from, model.config)
        for key in ("image_mean", "image_std") if theirs else ():
            if getattr(theirs, key) != getattr(vision, key):
                raise CheckpointError(
                    f"{files_from}: its {key} is {getattr(theirs, key)}, the model's config says {getattr(vision, key)}"
                )
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    with staged(path, nbytes) as work:
        # Whole layers, so that converting and sharded loading can read one without its neighbours.
        args = {
            path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if spec.stacked else ())
            for path, spec in declared.items()
        }
        with ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:
            checkpointer.save(work / PARAMS, model.params, save_args=unflatten(args))
        if files_from is not None:
            copy_side_files(files_from, work)
            (work / "README.md").unlink(missing_ok=True)  # tells of other weights
        stored = model.params["decoder"]["embed_tokens"]["embedding"].dtype  # a CPU computes in another one
        write_json(work / "config.json", to_dict(model.config.replace(dtype=str(stored))))
        write_json(work / "generation_config.json", dict(model.generation))
        write_json(work / MARKER, {"format": FORMAT})


def restore(path: Path, config: Config, shardings=None, dtype=None, progress: bool = True) -> dict:
    """Reads the parameters of one of our directories straight onto their devices; as read_params of convert/hf.py."""
    return to_devices(OrbaxSource(path, config), shardings, dtype, progress)


class OrbaxSource:
    """One of our directories opened as parameters: `leaves`, checked against the config, and `read`.

    Orbax's own restore starts on all parameters at once and hides what went wrong; this reads a part of one
    at a time from the same files.
    """

    def __init__(self, path: Path, config: Config):
        import tensorstore as ts

        self.leaves = stored_params(path, config)
        self._params = path / PARAMS
        # What is on its way from the disk is in memory: a few chunks, not the dozens that are the default.
        self._context = ts.Context({"file_io_concurrency": {"limit": 4}, "cache_pool": {"total_bytes_limit": 1 << 20}})

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def read(self, leaf: Leaf, index: tuple[slice, ...], dtype=None, bar=None) -> np.ndarray:
        """As HfSource.read of convert/hf.py."""
        import tensorstore as ts

        spec = {"driver": "zarr", "kvstore": kvstore(self._params) | {"path": leaf.path.replace("/", ".") + "/"}}
        index = [slice(*i.indices(n)[:2]) for i, n in zip(index, leaf.shape, strict=True)]
        out = aligned_empty([i.stop - i.start for i in index], leaf.dtype if dtype is None else jnp.dtype(dtype))
        try:
            store = ts.open(spec, open=True, read=True, context=self._context).result()
            chunk = store.chunk_layout.read_chunk.shape[0]
            source = ts.cast(store, out.dtype) if out.dtype != leaf.dtype else store
            first, stop = index[0].start, index[0].stop
            step = max(1, PIECE_BYTES * out.shape[0] // max(out.nbytes, 1) // chunk) * chunk
            for at in range(first // chunk * chunk, stop, step):  # cut between chunks
                cut = slice(max(at, first), min(at + step, stop))
                part = out[cut.start - first : cut.stop - first]
                ts.array(part).write(source[(cut, *index[1:])]).result()
                if bar is not None:
                    bar.update(part.size * leaf.dtype.itemsize)
        except (ValueError, OSError) as e:  # what the storage layer raises for missing or damaged data
            raise CheckpointError(
                f"{self._params}: {leaf.path} cannot be read, it looks damaged ({first_line(e)})"
            ) from e
        return out


def stored_params(path: Path, config: Config) -> dict[str, Leaf]:
    """What one of our directories holds, checked against its config: parameter path → shape and dtype."""
    stored, needed = stored_arrays(path), specs(config)
    for name in sorted(needed.keys() ^ stored.keys()):
        raise CheckpointError(f"{path / PARAMS}: {name} is {'missing' if name in needed else 'unexpected'}")
    for name, want in needed.items():
        shape, _ = stored[name]
        if shape != want.shape:
            raise CheckpointError(
                f"{path / PARAMS}: {name} has shape {list(shape)}; config.json calls for {list(want.shape)}"
            )
    return {name: Leaf(name, needed[name]._replace(dtype=dtype)) for name, (_, dtype) in stored.items()}


def write_json(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def copy_side_files(source: Path, target: Path) -> None:
    """Copies everything that is not weights, byte for byte."""
    files = {f for pattern in SIDE_FILES for f in source.glob(pattern) if f.is_file()}
    for file in sorted(files):
        if file.name not in (INDEX, MARKER):
            shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def staged(path, nbytes: int, outside: Path | None = None):
    """Yields a directory to fill, which becomes `path` when the block ends well and is removed when it does not.

    nbytes: what will be written, checked against the free space first. What a killed run left behind is removed.
    outside: a directory that `path` must not be in.
    Raises InputError if `path` exists, if another process is writing it, or if the disk is full.
    """
    path = Path(path).expanduser().absolute()
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: exists already; choose another name, or remove it first")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written, there is no directory {path.parent}; make it first")
    if outside is not None and path.resolve().is_relative_to(outside.resolve()):
        raise CheckpointError(f"{path}: is inside {outside}, the checkpoint that is read; choose a place outside of it")
    work = path.with_name(path.name + PARTIAL)
    need = nbytes + (64 << 20)
    lock = None
    try:
        try:
            work.mkdir(exist_ok=True)
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise CheckpointError(f"{path}: another process is writing it") from e
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be written ({e.strerror})") from e
        try:
            _empty(work)
            free = shutil.disk_usage(work).free
            if free < need:
                raise _disk_full(path, need, free)
            try:
                yield work
                _sync(work)
                os.rename(work, path)
                _sync(path.parent, deep=False)
            except Exception as e:
                if is_full(e):
                    raise _disk_full(path, need, shutil.disk_usage(path.parent).free) from e
                raise
        finally:
            for _ in range(50):  # Orbax's threads may still be writing
                shutil.rmtree(work, ignore_errors=True)
                if not work.exists():
                    break
                time.sleep(0.1)
    finally:
        if lock is not None:
            os.close(lock)


def _disk_full(path: Path, need: int, free: int) -> InputError:
    return InputError(f"{path}: no room on the disk; {need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")


def is_full(e: BaseException | None) -> bool:
    """Is this a full disk, a quota or a size limit? Orbax's storage layer says so only in the message."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    while e is not None:
        if getattr(e, "errno", None) in codes or any(os.strerror(c) in str(e) for c in codes):
            return True
        e = e.__cause__
    return False


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _sync(path: Path, deep: bool = True) -> None:
    """Flushes a directory, and all in it, to the disk."""
    for entry in path.iterdir() if deep else ():
        _sync(entry, deep=entry.is_dir())
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _known_dtype(dtype) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("bfloat16", "float16", "float32"):
        raise CheckpointError(f"dtype {name!r} is not one of 'bfloat16', 'float16', 'float32'")
    return name
