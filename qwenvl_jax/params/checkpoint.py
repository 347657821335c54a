"""Checkpoints on disk: opens a Hugging Face directory, one of ours, or a hub id; saves ours with Orbax.

Ours holds `params/` (an ordinary Orbax checkpoint of the parameter tree), the Hugging Face config, tokenizer,
template and preprocessor files as they were, and `qwenvl_jax.json`, which says that it is one of ours.
A directory being written has another name until it is complete, so what carries the final name is whole.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from qwenvl_jax.config import Config
from qwenvl_jax.model.qwenvl import abstract_params
from qwenvl_jax.params.hf import STACKED, flatten, progress_bar, read_params, unflatten
from qwenvl_jax.params.tensors import INDEX
from qwenvl_jax.sharding import param_shardings
from qwenvl_jax.types import InputError, Model

FORMAT = 1
MARKER, PARAMS = "qwenvl_jax.json", "params"
# Everything of a checkpoint that is not weights.
SIDE_FILES = ("*.json", "*.jinja", "merges.txt", "README.md", "LICENSE*")
_HUB_FILES = (*SIDE_FILES, "*.safetensors", f"{PARAMS}/**")
# Small enough that a process that needs one shard reads little more than it, and a few are written at a time.
CHUNK_BYTES = 16 << 20


def load(path_or_id, *, mesh=None, dtype=None, progress: bool = True) -> Model:
    """Opens a checkpoint: a Hugging Face directory, one written by `save` or `qwenvl convert`, or a hub id.

    mesh: lay the parameters out over it (sharding.make_mesh); None puts them on the first device.
    dtype: cast the weights to it and compute in it ("float32"); None keeps the checkpoint's.
    Raises InputError for anything that is not a complete checkpoint of a supported model.
    """
    from qwenvl_jax.inputs.processor import Processor

    path = find(path_or_id)
    config = read_config(path)
    shapes = abstract_params(config)
    shardings = None if mesh is None else param_shardings(shapes, mesh)
    dtype = None if dtype is None else _known_dtype(dtype)
    processor = Processor.from_dir(path, config)  # before the weights: it is quick to fail
    if (path / MARKER).is_file():
        params = restore(path, config, shardings, dtype, progress)
    else:
        params = read_params(path, config, shardings, dtype, progress)
    if dtype is not None:
        config = config.replace(dtype=dtype)
    return Model(config, params, processor, read_json(path / "generation_config.json", default={}))


def save(model: Model, path, *, files_from=None) -> None:
    """Writes a model as a new directory `path` that `load` reads; only the params and config need be there.

    files_from: a checkpoint directory whose tokenizer, template and preprocessor files are carried along.
    The config and the generation settings are the model's own. Raises InputError if `path` exists or the disk is full.
    """
    if jax.process_count() > 1:
        raise InputError("save writes from a single process; this job has several")
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    with staged(path, nbytes) as work:
        # Whole layers, so that converting and sharded loading can read one without its neighbours.
        args = unflatten(
            {
                p: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if p.startswith(STACKED) else ())
                for p in flatten(model.params)
            }
        )
        with ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:
            checkpointer.save(work / PARAMS, model.params, save_args=args)
        if files_from is not None:
            carry(Path(files_from), work)
        write_json(work / "config.json", model.config.to_dict())
        if model.generation:
            write_json(work / "generation_config.json", model.generation)
        write_json(work / MARKER, {"format": FORMAT})


def restore(path: Path, config: Config, shardings=None, dtype=None, progress: bool = True) -> dict:
    """Reads the parameters of one of our directories straight onto their devices (see `load`)."""
    stored = stored_params(path, config)
    shapes = abstract_params(config)
    if shardings is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    flat = flatten(shapes)
    target = jax.tree_util.tree_map_with_path(
        lambda keys, s, sharding: jax.ShapeDtypeStruct(
            s.shape, dtype or stored["/".join(k.key for k in keys)].dtype, sharding=sharding
        ),
        shapes,
        shardings,
    )
    largest = max(s.size for s in flat.values()) * 4
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=max(2, 2 + largest // 10**9))
    total = sum(s.size * stored[p].dtype.itemsize for p, s in flat.items())
    with ocp.Checkpointer(handler) as checkpointer, progress_bar("loading", total, progress) as bar:
        try:
            args = ocp.checkpoint_utils.construct_restore_args(target)
            params = checkpointer.restore(path / PARAMS, item=target, restore_args=args)
        except (ValueError, OSError, KeyError) as e:
            raise InputError(f"{path / PARAMS}: cannot be restored, it looks damaged ({_first_line(e)})") from e
        jax.block_until_ready(params)
        bar.update(total)
    return params


def stored_params(path: Path, config: Config) -> dict:
    """What one of our directories holds, checked against its config: parameter path → Orbax's shape and dtype."""
    marker = read_json(path / MARKER)
    if marker.get("format") != FORMAT:
        raise InputError(
            f"{path / MARKER}: format {marker.get('format')!r} is not {FORMAT}; a newer qwenvl_jax wrote it"
        )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = flatten(checkpointer.metadata(path / PARAMS).item_metadata.tree)
    except (ValueError, OSError, KeyError, AttributeError) as e:
        raise InputError(f"{path / PARAMS}: not a readable Orbax checkpoint ({_first_line(e)})") from e
    needed = flatten(abstract_params(config))
    for name in sorted(needed.keys() ^ stored.keys()):
        raise InputError(f"{path / PARAMS}: {name} is {'missing' if name in needed else 'unexpected'}")
    for name, want in needed.items():
        if tuple(stored[name].shape) != want.shape:
            raise InputError(
                f"{path / PARAMS}: {name} has shape {list(stored[name].shape)}; "
                f"config.json calls for {list(want.shape)}"
            )
    return stored


def find(path_or_id) -> Path:
    """The checkpoint's directory, downloaded first if the argument is a hub id such as "Qwen/Qwen2-VL-2B-Instruct"."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise InputError(f"{path}: is a file; a checkpoint is a directory (with config.json and the weights)")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_id)):
        raise InputError(f"{path}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as e:  # what huggingface_hub raises for no network, no such repo, no access
        raise InputError(
            f"{path_or_id}: no such directory, and it could not be had from the hub ({_first_line(e)})"
        ) from e


def read_config(path: Path) -> Config:
    """The config of a checkpoint directory; InputError for a model that is not supported or is quantised."""
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path}: not a checkpoint, there is no config.json in it")
    config = Config.from_file(file)
    quantised = read_json(file).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
        raise InputError(f"{file}: quantised checkpoints ({method}) are not supported; use the original model")
    return config


def read_json(file: Path, default: dict | None = None) -> dict:
    if default is not None and not file.exists():
        return default
    try:
        data = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{file}: not readable JSON ({_first_line(e)})") from e
    if not isinstance(data, dict):
        raise InputError(f"{file}: not a JSON object")
    return data


def write_json(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def carry(source: Path, target: Path) -> None:
    """Copies everything that is not weights, byte for byte."""
    files = {f for pattern in SIDE_FILES for f in source.glob(pattern) if f.is_file()}
    for file in sorted(files):
        if file.name not in (INDEX, MARKER):
            shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def staged(path, nbytes: int):
    """Yields a directory to fill, which becomes `path` when the block ends well and is removed when it does not.

    nbytes: what will be written, checked against the free space first. What a killed run left behind is removed.
    Raises InputError if `path` exists, if another process is writing it, or if the disk is full.
    """
    path = Path(path).expanduser().absolute()
    if os.path.lexists(path):
        raise InputError(f"{path}: exists already; choose another name, or remove it first")
    work = path.with_name(path.name + ".partial")
    need = nbytes + (64 << 20)
    lock = None
    try:
        try:
            work.mkdir(exist_ok=True)
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(f"{path}: another process is writing it") from e
        except OSError as e:
            raise InputError(f"{path}: cannot be written ({e.strerror})") from e
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
                if _is_full(e):
                    raise _disk_full(path, need, shutil.disk_usage(path.parent).free) from e
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _disk_full(path: Path, need: int, free: int) -> InputError:
    return InputError(f"{path}: no room on the disk; {need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")


def _is_full(e: BaseException | None) -> bool:
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
        raise InputError(f"dtype {name!r} is not one of 'bfloat16', 'float16', 'float32'")
    return name


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
