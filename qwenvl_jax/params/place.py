"""Parameters from where they are stored onto their devices, one after the other."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from qwenvl_jax.params.specs import Spec, flatten, unflatten


@dataclass(frozen=True)
class Leaf:
    """A parameter that is still on disk, with the dtype that it has there.

    tensors: where, one entry a layer, or one (convert/safetensors.py; none in an Orbax checkpoint).
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


def to_devices(source, shardings=None, dtype=None, progress: bool = True) -> dict:
    """The parameters of a source (`leaves`, `read`, `nbytes`) as jax arrays; see read_params of convert/hf.py."""
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
