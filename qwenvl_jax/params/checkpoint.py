"""Checkpoints on disk: loads Hugging Face directories, ours and hub ids; saves ours with Orbax.

Ours holds `params/` (an ordinary Orbax checkpoint), the unchanged Hugging Face config, tokenizer, template and
preprocessor files, and `qwenvl_jax.json`, which marks it as ours. A directory gets its final name only when complete.
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
import numpy as np

from qwenvl_jax import stores
from qwenvl_jax.config import DTYPES, Config, read_json
from qwenvl_jax.errors import CheckpointError, InputError
from qwenvl_jax.families import quantisation, to_dict
from qwenvl_jax.inputs.fields import unsupported
from qwenvl_jax.inputs.preprocessing import read_preprocessing
from qwenvl_jax.inputs.processor import RULE, RULE_FILE
from qwenvl_jax.params import directory, lora
from qwenvl_jax.params.directory import MARKER, PARAMS, first_line, kvstore, read_quantised
from qwenvl_jax.params.directory import read_config as read_config
from qwenvl_jax.params.locate import Located, locate, with_weights
from qwenvl_jax.params.locate import find as find
from qwenvl_jax.params.place import Leaf, Regrouped, Source, is_castable, to_devices
from qwenvl_jax.params.precision import Precision, on_cpu
from qwenvl_jax.params.specs import flatten, on_mesh, param_shardings, specs, unflatten
from qwenvl_jax.types import Model

_LOG = logging.getLogger(__name__)
PARTIAL = ".partial-qwenvl_jax"
GENERATION = "generation_config.json"
CHUNK_BYTES = 16 << 20  # small, so that a process reads little more than its own shard
PIECE_BYTES = 64 << 20  # in memory at a time, unless one layer is larger


def load(path_or_id, *, adapter=(), mesh=None, dtype=None, revision: str | None = None, progress: bool = True) -> Model:
    """Loads a checkpoint: a Hugging Face directory, one written by `save` or `qwenvl convert`, a hub id, or "demo".

    path_or_id: as for `find`, so also "gs://…", "s3://…" and "ID@REVISION". It may be an adapter in PEFT's format: then
        its base is loaded and the adapter is merged into it.
    adapter: an adapter to merge, named in the same way; or several, which are merged in order.
    mesh: lay the parameters out over it (sharding.make_mesh); None puts them on the first device.
    dtype: cast the weights to it and compute in it ("bfloat16"). None keeps the checkpoint's. CPUs multiply 16 bits
        slowly, so they compute 16-bit checkpoints in float32 (`precision_of`); `save` may then write float32.
    revision: branch, tag or commit of a hub id. The model is of one commit, even if the branch moves meanwhile.
    Raises InputError if it is not a complete checkpoint of a supported model, or if the mesh does not divide it.
    """
    adapters = [adapter] if isinstance(adapter, str | Path) else adapter
    located = locate(path_or_id, *adapters, revision=revision, weights=False)
    return load_located(located, mesh=mesh, dtype=dtype, progress=progress)


def load_located(located: Located, *, mesh=None, dtype=None, progress: bool = True) -> Model:
    """As `load`, of what `locate` gave. Weights that are elsewhere are copied when all other files are checked."""
    from qwenvl_jax.inputs.processor import Processor

    path, (config, reasons) = located.path, read_quantised(located.path)
    forms, config = config.quantised, config if mesh is None else on_mesh(config, mesh.shape)
    shardings = None if mesh is None else param_shardings(specs(config), mesh)
    chosen = precision_of(config, mesh) if dtype is None else Precision(_known_dtype(dtype), _known_dtype(dtype))
    config = config.replace(dtype=chosen.compute)
    processor = Processor.from_dir(path, config, located.adapters)  # before the weights, because it fails quickly
    generation = read_json(path / GENERATION, missing={})
    apart = located.adapters if forms else ()  # quantised kernels cannot take an adapter in
    with open_weights(located._replace(adapters=()) if apart else located, config.replace(quantised=forms)) as source:
        params = to_devices(Regrouped(source, specs(config)), shardings, chosen.weights, progress)
    params = _attached(config, params, apart)
    if progress and chosen.reason:
        _LOG.warning("%s: %s", path.name, chosen.reason)  # without handlers, Python shows it on stderr
    for linear, reason in reasons.items():
        _LOG.warning("%s: %s is dequantised to %s: %s", path.name, linear, config.dtype, reason)
    if ignored := unsupported(generation):
        _LOG.warning("%s: not supported, so answers differ from transformers': %s", path / GENERATION, ignored)
    return Model(config, params, processor, generation)


def _attached(config: Config, params: dict, adapters) -> dict:
    """The parameters with adapters beside the kernels. Raises CheckpointError if an adapter holds whole parameters."""
    from qwenvl_convert.peft import AdapterFile, load_adapter

    total: dict = {}
    for path in adapters:
        with AdapterFile(config, path) as adapter:
            if adapter.replaced:
                held = f"holds whole parameters ({min(adapter.replaced)})"
                raise CheckpointError(f"{path}: {held}, which cannot be laid over a quantised model")
        total = lora.join(total, lora.split(load_adapter(config, params, path))[1])
    return lora.combine(params, total)


@contextlib.contextmanager
def open_weights(located: Located, config: Config):
    """The parameters of a checkpoint of either format with its adapters merged, still on disk: yields a `Source`.

    The adapters are checked first, then weights that are elsewhere are copied.
    """
    from qwenvl_convert.hf import HfSource
    from qwenvl_convert.peft import AdaptedSource, AdapterFile

    if located.adapters and config.quantised:
        raise CheckpointError(
            f"{located.path}: is quantised, and an adapter cannot be merged into quantised weights; write a model in "
            "16 bits with `qwenvl merge --dequantise` and open that"
        )
    with contextlib.ExitStack() as files:
        adapters = [files.enter_context(AdapterFile(config, path)) for path in located.adapters]
        located = with_weights(located)
        if (located.path / MARKER).is_file():
            source: Source = OrbaxSource(located.path, config)
        else:
            source = files.enter_context(HfSource(located.path, config))
        for adapter in adapters:
            source = AdaptedSource(source, adapter)
        yield source


def precision_of(config: Config, mesh=None) -> Precision:
    """The precision that `load` chooses without a dtype: the checkpoint's, or on a CPU that of `on_cpu`."""
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform == "cpu":
        return on_cpu(config.dtype, sum(s.size for s in specs(config).values() if is_castable(s)))
    if config.quantised and config.dtype == "float16":
        reason = "computes in bfloat16, since the activations of these models overflow float16 (dtype changes this)"
        return Precision("bfloat16", "bfloat16", reason)
    return Precision(config.dtype, None)


def save(model: Model, path, *, files_from=None) -> None:
    """Writes a model as a new directory `path`, or at a URL: its parameters, config and generation settings.

    files_from: a checkpoint directory whose tokenizer, template and preprocessor files are copied. Without them, `load`
    cannot read the directory, but `qwenvl convert` can.
    Raises InputError if `path` exists, if the disk is full, if the parameters do not match the config, or if the
    model and `files_from` normalise pictures differently.
    """
    import orbax.checkpoint as ocp

    if jax.process_count() > 1:
        raise InputError("save writes from a single process; this job has several")
    declared = specs(model.config)
    for name in sorted(flatten(model.params).keys() ^ declared.keys()):
        raise CheckpointError(f"{path}: the parameters do not match the config ({name}); merge an adapter first")
    if files_from is not None:
        files_from = Path(files_from)
        if not files_from.is_dir():
            raise CheckpointError(f"{files_from}: no such directory")
        theirs = read_preprocessing(files_from, model.config)
        for key in ("image_mean", "image_std") if theirs else ():
            here, there = getattr(model.config.vision, key), getattr(theirs, key)
            if here != there:
                raise CheckpointError(f"{files_from}: its {key} is {there}, the model's config says {here}")
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    with staged(path, nbytes) as work:
        # No chunk spans two layers, so that conversion and sharded loading can read one layer alone.
        args = {
            path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if spec.stacked else ())
            for path, spec in declared.items()
        }
        with ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:
            checkpointer.save(work / PARAMS, model.params, save_args=unflatten(args))
        if files_from is not None:
            copy_side_files(files_from, work)
            (work / "README.md").unlink(missing_ok=True)  # it describes other weights
            write_rule(getattr(model.processor, RULE, False), work)
        stored = model.params["decoder"]["embed_tokens"]["embedding"].dtype  # not the compute dtype, on CPUs
        write_json(work / "config.json", config_dict(model.config.replace(dtype=str(stored)), files_from))
        write_json(work / GENERATION, dict(model.generation))
        write_json(work / MARKER, directory.marker(model.config))


def config_dict(config: Config, files_from: Path | None = None) -> dict:
    """The config.json of a config, with its quantization_config.

    That is the one of `files_from`, if the Linears are held as there, and otherwise compressed-tensors'.
    """
    data, held = to_dict(config.replace(quantised=())), config.quantised
    if not held:
        return data
    if files_from is not None and (files_from / "config.json").is_file():
        theirs = read_json(files_from / "config.json").get("quantization_config")
        if theirs and read_config(files_from).quantised == held:
            return data | {"quantization_config": theirs}
    return data | {"quantization_config": quantisation.to_dict(dict(held), directory.linear_modules(config))}


class OrbaxSource(Source):
    """One of our directories opened as parameters, checked against the config.

    Orbax's own restore reads all parameters at once and hides the cause of errors; this reads one part at a time.
    """

    def __init__(self, path: Path, config: Config):
        import tensorstore as ts

        self.leaves = stored_params(path, config)
        self._params = path / PARAMS
        # At most four chunks are read at once; tensorstore's default holds dozens in memory.
        self._context = ts.Context({"file_io_concurrency": {"limit": 4}, "cache_pool": {"total_bytes_limit": 1 << 20}})

    def read(self, leaf: Leaf, index: tuple[slice, ...], dtype=None, bar=None) -> np.ndarray:
        """See `Source.read`."""
        import tensorstore as ts

        spec = {"driver": "zarr", "kvstore": kvstore(self._params) | {"path": leaf.path.replace("/", ".") + "/"}}
        out = self.empty(leaf, index, dtype)
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
        except (ValueError, OSError) as e:  # tensorstore's errors for missing or damaged data
            raise CheckpointError(f"{self._params}: {leaf.path} cannot be read, it is damaged ({first_line(e)})") from e
        return out


def stored_params(path: Path, config: Config) -> dict[str, Leaf]:
    """The parameters in one of our directories, by path. Raises CheckpointError if they do not match the config."""
    stored, needed = directory.stored_arrays(path), specs(config)
    for name in sorted(needed.keys() ^ stored.keys()):
        raise CheckpointError(f"{path / PARAMS}: {name} is {'missing' if name in needed else 'unexpected'}")
    for name, (shape, dtype) in stored.items():
        have, want = list(shape), list(needed[name].shape)
        if have != want:
            raise CheckpointError(f"{path / PARAMS}: {name} has shape {have}; config.json calls for {want}")
        if dtype != needed[name].dtype and not (is_castable(needed[name]) or needed[name].role == "scales"):
            raise CheckpointError(f"{path / PARAMS}: {name} is {dtype}; {MARKER} calls for {needed[name].dtype}")
    return {name: Leaf(name, needed[name]._replace(dtype=dtype)) for name, (_, dtype) in stored.items()}


def write_json(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_rule(rule: bool, directory: Path) -> None:
    """Writes whether control tokens in texts take effect into the tokenizer's settings, unless they say so already."""
    settings = read_json(directory / RULE_FILE, missing={})
    if settings.get(RULE, False) != rule:
        write_json(directory / RULE_FILE, settings | {RULE: rule})


def copy_side_files(source: Path, target: Path) -> None:
    """Copies a checkpoint's files, except the weights, byte for byte."""
    for file in {file for pattern in directory.SIDE_FILES for file in source.glob(pattern)}:
        if file.is_file() and file.name not in (directory.INDEX, MARKER, directory.ADAPTER_SETTINGS):
            shutil.copyfile(file, target / file.name)


def check_new(path, outside: Path | None = None) -> None:
    """Raises InputError if `staged` would refuse the place, so that this is found before weights are read."""
    if url := stores.as_url(path):
        stores.check_empty(url)
        return
    path = Path(path).expanduser().absolute()
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: exists already; choose another name, or remove it first")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written, there is no directory {path.parent}; make it first")
    if outside is not None and path.resolve().is_relative_to(outside.resolve()):
        raise CheckpointError(f"{path}: is inside {outside}, the checkpoint that is read; choose a place outside of it")


@contextlib.contextmanager
def staged(path, nbytes: int, outside: Path | None = None):
    """Yields a directory to fill. It is renamed to `path` if the block succeeds, and removed if it raises.

    nbytes: the size to check against the free space first. Leftovers of a killed run are removed.
    outside: a directory that `path` must not be in.
    `path` may be a URL, to which the directory is copied when it is complete.
    Raises InputError if `path` exists, if another process is writing it, or if the disk is full.
    """
    if url := stores.as_url(path):
        with stores.new_directory(url) as here, staged(here, nbytes) as work:
            yield work
        return
    check_new(path, outside)
    path = Path(path).expanduser().absolute()
    work = path.with_name(path.name + PARTIAL)
    need = nbytes + (64 << 20)
    undecided = True  # whether the directory may be one that this call made and does not hold yet

    def unmake() -> None:
        if undecided:  # Ctrl-C came between the two
            with contextlib.suppress(OSError):
                work.rmdir()

    with contextlib.ExitStack() as cleanup:
        cleanup.callback(unmake)
        try:
            work.mkdir(exist_ok=True)
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
            cleanup.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            undecided = False
            raise CheckpointError(f"{path}: another process is writing it") from e
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be written ({e.strerror})") from e
        cleanup.callback(_remove, work)
        undecided = False
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


def _disk_full(path: Path, need: int, free: int) -> InputError:
    return InputError(f"{path}: no space on the disk; {need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")


def _remove(directory: Path) -> None:
    for _ in range(50):  # Orbax's threads may still be writing
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            break
        time.sleep(0.1)


def is_full(e: BaseException | None) -> bool:
    """Is this a full disk, a quota or a size limit? tensorstore gives no errno, only the message."""
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
    """Flushes a directory and its contents to the disk."""
    for entry in path.iterdir() if deep else ():
        _sync(entry, deep=entry.is_dir())
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _known_dtype(dtype) -> str:
    name = getattr(dtype, "__name__", str(dtype))  # jnp.bfloat16, or "bfloat16"
    if name not in DTYPES:
        raise CheckpointError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return name
