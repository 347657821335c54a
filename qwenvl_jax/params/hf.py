"""Hugging Face checkpoints as parameters: the table of their tensors, and reading that never holds two copies.

A parameter called `kernel` is a torch weight transposed to [in, out]; the patch convolution is flattened to a
matrix first; everything else keeps its shape. Parameters of `decoder/layers` and `vision/blocks` stack one tensor
a layer. Every tensor of the files is used once and every parameter is made once, or an `InputError` names it.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError
from qwenvl_jax.families import family_of
from qwenvl_jax.model.qwenvl import abstract_params
from qwenvl_jax.params.tensors import DTYPES, Reader, Tensor

# Prefixes of the decoder and the vision tower: the hub's files, and newer saves of transformers (4.52 on).
LAYOUTS = {"hub": ("model.", "visual."), "nested": ("model.language_model.", "model.visual.")}
STACKED = ("decoder/layers/", "vision/blocks/")


def table(config: Config, layout: str = "hub") -> dict[str, tuple[str, ...]]:
    """Parameter path → its tensors' names, one a layer for a stacked parameter, in the order files are written."""
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    depths = dict(zip(STACKED, (config.text.num_hidden_layers, config.vision.depth), strict=True))
    out = {}
    for path, name in family_of(config).tensor_names(config).items():
        for hub, prefix in zip(LAYOUTS["hub"], LAYOUTS[layout], strict=True):
            if name.startswith(hub):
                name = prefix + name.removeprefix(hub)
                break
        depth = next((depth for start, depth in depths.items() if path.startswith(start)), 1)
        out[path] = tuple(name.format(l=l) for l in range(depth))
    return out


def tensor_shape(config: Config, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, in the files, of (one layer of) the parameter at `path` whose full shape is `shape`."""
    if path == "vision/patch_embed/kernel":
        v = config.vision
        return (shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    shape = tuple(shape[1:] if path.startswith(STACKED) else shape)
    return shape[::-1] if path.endswith("/kernel") else shape


def flatten(tree: dict, prefix: str = "") -> dict:
    """A nested dict → {"a/b/c": leaf}."""
    out = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return out


def unflatten(flat: dict) -> dict:
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


@dataclass(frozen=True)
class Leaf:
    """A parameter that is still on disk: `tensors` holds one entry a layer, or one (none in an Orbax checkpoint)."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source:
    """A Hugging Face checkpoint opened as parameters. `leaves`: path → Leaf, all checked against the config."""

    def __init__(self, directory, config: Config):
        self._reader = Reader(directory)
        try:
            self.leaves = _match(self._reader, config)
        except BaseException:
            self._reader.close()
            raise
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def read(self, leaf: Leaf, index: tuple[slice, ...], dtype=None, bar=None) -> np.ndarray:
        """The part `index` (contiguous slices, one a dimension) of a parameter, in a new array; `bar` counts bytes.

        The work is cut into pieces of a few tens of megabytes that a pool of threads reads, transposes and casts.
        """
        index = [slice(*i.indices(n)[:2]) for i, n in zip(index, leaf.shape, strict=True)]
        dtype = leaf.dtype if dtype is None else dtype
        out = aligned_empty([i.stop - i.start for i in index], dtype)
        stacked, transpose = leaf.path.startswith(STACKED), leaf.path.endswith("/kernel")
        layers = range(index[0].start, index[0].stop) if stacked else [0]
        inner = index[1:] if stacked else index
        columns, rows = (inner[0], inner[1]) if transpose else (slice(0, 1), inner[0])
        if not transpose and len(inner) == 2:
            columns = inner[1]
        jobs = []
        for layer, part in zip(layers, out if stacked else [out], strict=True):
            tensor = leaf.tensors[layer]
            part = part[:, None] if part.ndim == 1 else part
            width = tensor.matrix[1] * leaf.dtype.itemsize
            step = max(256, (32 << 20) // width // 256 * 256)
            for row in range(rows.start, rows.stop, step):
                stop = min(row + step, rows.stop)
                cut = slice(row - rows.start, stop - rows.start)
                target = part[:, cut] if transpose else part[cut]
                jobs.append((tensor, slice(row, stop), columns, transpose, target))
        for job, _ in zip(jobs, self._pool.map(lambda j: self._reader.read_part(*j), jobs), strict=True):
            if bar is not None:
                bar.update(job[-1].size * leaf.dtype.itemsize)
        return out


def read_params(directory, config: Config, shardings=None, dtype=None, progress: bool = True) -> dict:
    """Reads a Hugging Face checkpoint directory into jax arrays, one parameter after the other.

    shardings: a tree like the parameters; None puts everything on this process's first device.
    dtype: cast to it; None keeps each tensor's own.
    progress: show a bar on stderr, if that is a terminal.

    Each process reads what its own devices hold, and host memory beside the devices' stays within one
    parameter's shard on one device plus some megabytes.
    Raises InputError for damaged files and for any tensor that is missing, unexpected or of another shape or dtype.
    """
    with Source(directory, config) as source:
        return to_devices(source, shardings, dtype, progress)


def to_devices(source, shardings=None, dtype=None, progress: bool = True) -> dict:
    """The parameters of a source (`leaves`, `read`, `nbytes`) as jax arrays; see read_params."""
    flat_shardings = None if shardings is None else flatten(shardings)
    default = SingleDeviceSharding(jax.local_devices()[0])
    out = {}
    with progress_bar("loading", source.nbytes, progress) as bar:
        for path, leaf in source.leaves.items():
            sharding = flat_shardings[path] if flat_shardings else default
            out[path] = _place(source, leaf, sharding, leaf.dtype if dtype is None else jnp.dtype(dtype), bar)
    return unflatten(out)


def progress_bar(what: str, nbytes: int, progress: bool = True) -> tqdm:
    """A bar in bytes on stderr; none when stderr is not a terminal."""
    return tqdm(desc=what, total=nbytes, unit="B", unit_scale=True, disable=None if progress else True)


def _place(source, leaf: Leaf, sharding, dtype, bar) -> jax.Array:
    devices = {}  # devices that hold the same part share one read
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        key = tuple(i.indices(n)[:2] for i, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(key, []).append(device)
    arrays = []
    for key, holders in devices.items():
        host = source.read(leaf, tuple(slice(*k) for k in key), dtype, bar)
        arrays += [jax.device_put(host, SingleDeviceSharding(d, memory_kind=sharding.memory_kind)) for d in holders]
        jax.block_until_ready(arrays)  # or the next part would be read while this one is still in host memory
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def aligned_empty(shape, dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte border, which jax's CPU backend takes over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def hub_name(name: str) -> str:
    """A name of either layout, as the hub's files spell it."""
    decoder, visual = LAYOUTS["nested"]
    for old, new in ((visual, "visual."), (decoder, "model.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _match(reader: Reader, config: Config) -> dict[str, Leaf]:
    held = {}
    for name, tensor in reader.tensors.items():
        hub = hub_name(name)
        if hub in held:
            raise InputError(f"{reader.directory}: tensor {hub} is stored twice, under two spellings")
        held[hub] = (name, tensor)
    shapes, names = flatten(abstract_params(config)), table(config)
    needed = {name for group in names.values() for name in group}
    _check_names(reader, config, held, needed)
    leaves = {}
    for path, group in names.items():
        want = tensor_shape(config, path, shapes[path].shape)
        dtypes = {}
        for hub in group:
            name, tensor = held[hub]
            if tensor.dtype not in DTYPES:
                raise InputError(
                    f"{tensor.file}: tensor {name} is {tensor.dtype}; only {', '.join(DTYPES)} are supported"
                )
            if tensor.shape != want:
                raise InputError(
                    f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}; config.json calls for {list(want)}"
                )
            dtypes.setdefault(tensor.dtype, name)
        if len(dtypes) > 1:
            (a, first), (b, second), *_ = dtypes.items()
            raise InputError(f"{reader.directory}: {first} is {a} but {second} is {b}; layers must share one dtype")
        tensors = tuple(held[hub][1] for hub in group)
        leaves[path] = Leaf(path, shapes[path].shape, DTYPES[tensors[0].dtype], tensors)
    return leaves


def _check_names(reader: Reader, config: Config, held: dict, needed: set[str]) -> None:
    where = reader.directory
    if any(name.endswith((".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv")) for name in held):
        raise InputError(
            f"{where}: the weights are quantised (AWQ, GPTQ or FP8), which is not supported; use the original model"
        )
    missing = sorted(needed - held.keys())
    if missing:
        hint = "; should config.json say tie_word_embeddings?" if missing == ["lm_head.weight"] else ""
        raise InputError(f"{where}: tensor {missing[0]} is missing{_and_more(missing)}{hint}")
    # Buffers that old versions of transformers stored; they follow from the config.
    extra = sorted(
        n for n in held.keys() - needed if not n.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq"))
    )
    if extra == ["lm_head.weight"]:
        if not _same(reader, held["lm_head.weight"][1], held["model.embed_tokens.weight"][1]):
            raise InputError(
                f"{where}: config.json ties lm_head to the embedding, but lm_head.weight differs from it; "
                "set tie_word_embeddings to false if the head is its own"
            )
    elif extra:
        raise InputError(
            f"{where}: tensor {held[extra[0]][0]} has no place in a {config.family} model of this config"
            f"{_and_more(extra)}"
        )


def _and_more(names: list) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _same(reader: Reader, a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape) or a.dtype not in DTYPES:
        return False
    rows, width = a.matrix
    step = max(1, (8 << 20) // (width * 4))
    one, two = (np.empty((step, width), f"u{DTYPES[a.dtype].itemsize}") for _ in range(2))
    for row in range(0, rows, step):
        n = min(step, rows - row)
        reader.read(a, row, one[:n])
        reader.read(b, row, two[:n])
        if not np.array_equal(one[:n], two[:n]):
            return False
    return True
