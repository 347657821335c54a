"""Where arrays live: a mesh, and which of its axes split each dimension of an activation or a weight.

Model code calls `constrain(x, "BTD")`, which does nothing without a mesh. Modules declare the letters of their
parameters; `param_shardings` of params/specs.py lays them out.
"""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")

# The mesh axes that split each letter of the legend (types.py). Other letters are not split.
ACTIVATION_AXES = {
    "B": ("data", "fsdp"),
    "R": ("data", "fsdp"),
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
    # If fsdp splits the vocabulary (v) or the width (d), it does not split the rows (b).
    "b": "data",
    "v": ("fsdp", "tensor"),
    "d": "fsdp",
}
# The same for parameters. The vision tower is split by lanes and width only: its number of heads rarely divides.
WEIGHT_AXES = dict.fromkeys(("D", "E", "U"), "fsdp") | dict.fromkeys(("NH", "KH", "F", "V"), "tensor")
WEIGHT_AXES |= dict.fromkeys(("L", "C", "."))  # never split
# A dimension that the mesh does not divide is replicated if it is one of these, and otherwise an error.
REPLICATED_IF_UNEVEN = ("E", "U", "NH", "KH", "V")


def parse_mesh(name: str) -> tuple[int, int, int]:
    """(data, fsdp, tensor) from "1x1x8"."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", name):
        raise InputError(f"mesh {name!r} is not chips along data, fsdp and tensor, such as 1x1x8")
    data, fsdp, tensor = map(int, name.split("x"))
    return data, fsdp, tensor


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh `data × fsdp × tensor` over the first devices.

    Raises InputError if an axis is below 1, if there are too few devices, or if they are not neighbours.
    """
    devices = jax.devices() if devices is None else devices
    size = data * fsdp * tensor
    if min(data, fsdp, tensor) < 1:
        raise InputError(f"a mesh of {data}×{fsdp}×{tensor} has an axis without devices")
    if size > len(devices):
        raise InputError(f"a mesh of {data}×{fsdp}×{tensor} needs {size} devices; there are {len(devices)}")
    try:  # `jax.make_mesh` cannot split an axis of a TPU's torus over two of ours, or span hosts with GPUs
        grid = create_device_mesh((data, fsdp, tensor), devices[:size], allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as e:
        raise InputError(
            f"the first {size} of {len(devices)} devices are not a block of neighbours for a mesh of "
            f"{data}×{fsdp}×{tensor}; use all of them, or as many as a row has"
        ) from e
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def current_mesh():
    """The mesh of `jax.set_mesh`; None without one, or if it has a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x, dims: str):
    """Lays out x on the current mesh by ACTIVATION_AXES; one letter per dimension."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, _activation_spec(dims, x.shape, mesh))


def kv_copies(K: int) -> int:
    """Copies of each of K KV heads, so that the current mesh's tensor axis divides K · copies."""
    mesh = current_mesh()
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    return tensor // math.gcd(K, tensor)


def spread_heads(q, k, v):
    """Replicates KV heads until the tensor axis divides them; the copies share the head's queries.

    q [B, T, N, H]; k, v [B, T, K, H] → q [B, T, N', H]; k, v [B, T, K', H]. If the copies cannot share a head's
    queries evenly, zero queries are added. Weights are not copied; they may be split within a head.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    copies = kv_copies(K)
    if copies > 1:
        q = jnp.pad(q.reshape(B, T, K, N // K, H), ((0, 0),) * 3 + ((0, -(N // K) % copies), (0, 0)))
        q, k, v = q.reshape(B, T, -1, H), jnp.repeat(k, copies, 2), jnp.repeat(v, copies, 2)
    return constrain(q, "BTNH"), constrain(k, "BTKH"), constrain(v, "BTKH")


def restore_heads(attended, N: int, K: int):
    """The attended values of the original queries of `spread_heads`: [B, T, N', H] → [B, T, N, H]."""
    B, T, spread, H = attended.shape
    if spread == N:
        return attended
    return attended.reshape(B, T, K, spread // K, H)[..., : N // K, :].reshape(B, T, N, H)


def divides(dims: str, *shape: int) -> bool:
    """Does the current mesh split each of these dimensions?"""
    mesh = current_mesh()
    return mesh is not None and None not in _activation_spec(dims, shape, mesh)


def local_rows(B: int) -> int:
    """Rows on one device of the current mesh, of a batch of B rows."""
    mesh = current_mesh()
    return B if mesh is None else activation_sharding("B", (B,), mesh).shard_shape((B,))[0]


def activation_sharding(dims: str, shape: tuple[int, ...], mesh) -> NamedSharding:
    """The layout of an activation by ACTIVATION_AXES; one letter per dimension, "." is never split."""
    return NamedSharding(mesh, _activation_spec(dims, shape, mesh))


def on_shards(kernel, args: tuple, dims: tuple[str, ...], results: int | tuple[int, ...]):
    """kernel(*args) on each device's shards, because XLA cannot split a kernel.

    dims: letters of each argument. results: for each result, the index of the argument with the same layout.
    """
    mesh = current_mesh()
    if mesh is None:
        return kernel(*args)
    specs = tuple(_activation_spec(d, a.shape, mesh) for d, a in zip(dims, args, strict=True))
    out = specs[results] if isinstance(results, int) else tuple(specs[i] for i in results)
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*args)


def check_letters(path: str, dims: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Raises InputError if a parameter's letters are not in WEIGHT_AXES, too few, or split over one axis."""
    for letter in dims:
        if letter not in WEIGHT_AXES:
            raise InputError(f"{path}: its dimension {letter!r} is none of {', '.join(WEIGHT_AXES)} (sharding.py)")
    if len(dims) != len(shape):
        raise InputError(f"{path}: it has {len(shape)} dimensions, and is declared with {len(dims)}: {' '.join(dims)}")
    axes = [axis for letter in dims if (axis := WEIGHT_AXES[letter])]
    if len(axes) > len(set(axes)):
        raise InputError(f"{path}: two of its dimensions, {' '.join(dims)}, are split over the same axis of the mesh")


def weight_spec(path: str, dims: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The layout of a parameter over a mesh; sizes: `mesh.shape`.

    fsdp splits matrices only: gathering a vector takes longer than it saves.
    Raises InputError if the mesh does not divide a dimension that must be split.
    """
    matrix = sum(letter != "L" for letter in dims) > 1
    axes_of = {letter: axis for letter, axis in WEIGHT_AXES.items() if matrix or axis != "fsdp"}
    for letter, size in zip(dims, shape, strict=True):
        axis = axes_of.get(letter)
        if axis and letter not in REPLICATED_IF_UNEVEN and size % sizes[axis]:
            devices = f"the mesh's {axis}, {sizes[axis]}"
            raise InputError(f"{path}: its dimension {letter}, {size}, is not a multiple of {devices}")
    return _spec(dims, shape, axes_of, sizes)


def _activation_spec(dims: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
    return _spec(tuple(dims), shape, ACTIVATION_AXES, mesh.shape)


def _spec(dims, shape, axes_of, sizes: Mapping[str, int]) -> PartitionSpec:
    """Splits each dimension over its axes, or replicates it if they do not divide it."""

    def axes(dim, size):
        names = axes_of.get(dim)
        names = (names,) if isinstance(names, str) else names or ()
        split = math.prod(sizes[name] for name in names)
        return names if split > 1 and size % split == 0 else None

    return PartitionSpec(*(axes(d, n) for d, n in zip(dims, shape, strict=True)))
