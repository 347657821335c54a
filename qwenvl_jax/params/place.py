"""Moves parameters from disk onto their devices, one after the other."""

import abc
import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from qwenvl_jax.config import DTYPES, Config
from qwenvl_jax.params.specs import Spec, flatten, specs_of, unflatten


@dataclass(frozen=True)
class Leaf:
    """A parameter that is still on disk; `spec` has the stored dtype.

    tensors: one per layer, or one (convert/safetensors.py); none in an Orbax checkpoint.
    """

    path: str
    spec: Spec
    tensors: tuple = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> np.dtype:
        return self.spec.dtype

    @property
    def nbytes(self) -> int:
        return self.spec.size * self.dtype.itemsize


class Source(abc.ABC):
    """A checkpoint opened as parameters: path → Leaf."""

    leaves: dict[str, Leaf]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves.values())

    @abc.abstractmethod
    def read(self, leaf: Leaf, index: tuple[slice, ...], dtype=None, bar=None) -> np.ndarray:
        """The part `index`, one slice(start, stop) per dimension, of a parameter in a new array; `bar` counts bytes."""

    def empty(self, leaf: Leaf, index: tuple[slice, ...], dtype=None) -> np.ndarray:
        """The array for `read` to fill, on a 64-byte boundary: jax's CPU backend then uses it without a copy."""
        dtype = leaf.dtype if dtype is None else jnp.dtype(dtype)
        shape = [i.stop - i.start for i in index]
        nbytes = math.prod(shape) * dtype.itemsize
        raw = np.empty(nbytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + nbytes].view(dtype).reshape(shape)


class ArraySource(Source):
    """Parameters in memory, as a source that can be written to files. Raises InputError for a leaf without a place."""

    def __init__(self, config: Config, params: dict):
        self._params = flatten(params)
        self.leaves = {path: Leaf(path, spec) for path, spec in specs_of(config, params).items()}

    def read(self, leaf: Leaf, index: tuple[slice, ...], dtype=None, bar=None) -> np.ndarray:
        """See `Source.read`."""
        out = self.empty(leaf, index, dtype)
        out[...] = self._params[leaf.path][index]
        return out


class Regrouped(Source):
    """A quantised source with rows of scales and zeros repeated, as `on_mesh` of params/specs.py needs them."""

    def __init__(self, source: Source, declared: dict[str, Spec]):
        self._source = source
        self.leaves = {
            path: dataclasses.replace(leaf, spec=leaf.spec._replace(shape=declared[path].shape))
            for path, leaf in source.leaves.items()
        }

    def read(self, leaf: Leaf, index: tuple[slice, ...], dtype=None, bar=None) -> np.ndarray:
        """See `Source.read`."""
        stored = self._source.leaves[leaf.path]
        if stored.shape == leaf.shape:
            return self._source.read(stored, index, dtype, bar)
        *lead, rows, columns = index
        copies = leaf.shape[-2] // stored.shape[-2]
        first = rows.start // copies
        part = self._source.read(stored, (*lead, slice(first, -(-rows.stop // copies)), columns), dtype, bar)
        out = self.empty(leaf, index, dtype)
        out[...] = np.repeat(part, copies, -2)[..., rows.start - first * copies : rows.stop - first * copies, :]
        return out


def to_devices(source: Source, shardings=None, dtype=None, progress: bool = True) -> dict:
    """The parameters of a source as jax arrays; arguments as for `read_params` of convert/hf.py.

    A dtype is for what is not quantised: kernels in few bits, their zeros, scales and order keep their own.
    """
    flat_shardings = None if shardings is None else flatten(shardings)
    default = SingleDeviceSharding(jax.local_devices()[0])
    out = {}
    with progress_bar("loading", source.nbytes, progress) as bar:
        for path, leaf in source.leaves.items():
            to = dtype if is_castable(leaf.spec) else None
            out[path] = _place(source, leaf, flat_shardings[path] if flat_shardings else default, to, bar)
    return unflatten(out)


def is_castable(spec: Spec) -> bool:
    """Is it an ordinary parameter in a floating dtype? Scales are not: float16 has exactly what the file says."""
    return spec.role != "scales" and spec.dtype.name in DTYPES


def progress_bar(what: str, nbytes: int, progress: bool = True) -> tqdm:
    """A bar in bytes on stderr; none if stderr is not a terminal."""
    return tqdm(desc=what, total=nbytes, unit="B", unit_scale=True, disable=None if progress else True)


def _place(source: Source, leaf: Leaf, sharding, dtype, bar) -> jax.Array:
    devices = {}  # devices with the same shard share one read
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        key = tuple(i.indices(n)[:2] for i, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(key, []).append(device)
    arrays = []
    for key, holders in devices.items():
        host = source.read(leaf, tuple(slice(*k) for k in key), dtype, bar)
        arrays += [jax.device_put(host, SingleDeviceSharding(d, memory_kind=sharding.memory_kind)) for d in holders]
        jax.block_until_ready(arrays)  # otherwise two shards would be in host memory
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)
