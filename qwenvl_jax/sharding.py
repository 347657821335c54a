"""Where arrays live: one mesh, and two tables from dimensions to its axes, one for weights, one for activations.

Model code only says `constrain(x, "BTD")`; without a mesh that does nothing. Parameters are declared with their letters
where they are used, and laid out by `param_shardings` of params/specs.py.
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

# What each letter of the legend (types.py) is split over. Absent letters are not split.
ACTIVATION_AXES = {
    "B": ("data", "fsdp"),
    "R": ("data", "fsdp"),
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
    # Where the vocabulary or the width is split over fsdp, rows are not.
    "b": "data",
    "v": ("fsdp", "tensor"),
    "d": "fsdp",
}
# Letters of parameters, as their modules declare them. Of the vision tower, whose number of heads rarely divides, only
# the width is split: the tower is shared out by lanes.
WEIGHT_AXES = {
    "D": "fsdp",
    "E": "fsdp",
    "U": "fsdp",
    "NH": "tensor",
    "KH": "tensor",
    "F": "tensor",
    "V": "tensor",
    "L": None,
    "C": None,
    ".": None,
}
# Where the mesh does not divide one of these, every device holds all of it; of the others, that is an error.
REPLICATED_IF_UNEVEN = ("E", "U", "NH", "KH", "V")


def parse_mesh(name: str) -> tuple[int, int, int]:
    """(data, fsdp, tensor) from "1x1x8"."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", name):
        raise InputError(f"mesh {name!r} is not chips along data, fsdp and tensor, such as 1x1x8")
    data, fsdp, tensor = map(int, name.split("x"))
    return data, fsdp, tensor


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh `data × fsdp × tensor` over the first so many devices."""
    devices = jax.devices() if devices is None else devices
    size = data * fsdp * tensor
    if min(data, fsdp, tensor) < 1:
        raise InputError(f"a mesh of {data}×{fsdp}×{tensor} has an axis without devices")
    if size > len(devices):
        raise InputError(f"a mesh of {data}×{fsdp}×{tensor} needs {size} devices; there are {len(devices)}")
    try:  # `jax.make_mesh` would neither split an axis of a TPU's torus over two of ours, nor join hosts of GPUs
        grid = create_device_mesh((data, fsdp, tensor), devices[:size], allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as e:
        raise InputError(
            f"a mesh of {data}×{fsdp}×{tensor} cannot be laid over the first {size} of {len(devices)} devices, because "
            "they are not a block of neighbours; take all of them, or as many as a row has"
        ) from e
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def constrain(x, dims: str):
    """Asks for x's dimensions, one letter each, to be laid out by the activation table on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(tuple(dims), x.shape, ACTIVATION_AXES, mesh.shape))


def kv_copies(K: int) -> int:
    """In how many copies each of K kv heads is held, so that the tensor axis of the current mesh divides them all."""
    mesh = jax.sharding.get_abstract_mesh()
    tensor = 1 if mesh.empty else mesh.shape["tensor"]
    return tensor // math.gcd(K, tensor)


def spread_heads(q, k, v):
    """Heads that the tensor axis divides: every kv head in as many copies as that takes, its queries shared by them.

    q [B, T, N, H]; k, v [B, T, K, H] → q [B, T, N', H]; k, v [B, T, K', H]; where a kv head's queries cannot be shared
    evenly, zeros fill up N'. Weights are not copied, they are split wherever that may be within a head.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    copies = kv_copies(K)
    if copies > 1:
        q = jnp.pad(q.reshape(B, T, K, N // K, H), ((0, 0),) * 3 + ((0, -(N // K) % copies), (0, 0)))
        q, k, v = q.reshape(B, T, -1, H), jnp.repeat(k, copies, 2), jnp.repeat(v, copies, 2)
    return constrain(q, "BTNH"), constrain(k, "BTKH"), constrain(v, "BTKH")


def restore_heads(attended, N: int, K: int):
    """What was attended by `spread_heads`' queries, [B, T, N', H] → [B, T, N, H]."""
    B, T, spread, H = attended.shape
    if spread == N:
        return attended
    return attended.reshape(B, T, K, spread // K, H)[..., : N // K, :].reshape(B, T, N, H)


def divides(dims: str, *shape: int) -> bool:
    """Whether the current mesh splits each of these dimensions as the activation table says."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return False
    spec = _spec(tuple(dims), shape, ACTIVATION_AXES, mesh.shape)
    return all(axes is not None for axes in spec)


def local_rows(B: int) -> int:
    """Rows that one device holds of a dimension "B" of this size, on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return B if mesh.empty else activation_sharding("B", (B,), mesh).shard_shape((B,))[0]


def activation_sharding(dims: str, shape: tuple[int, ...], mesh) -> NamedSharding:
    """The activation table's layout for dimensions, one letter each ("." is never split), of these sizes."""
    return NamedSharding(mesh, _spec(tuple(dims), shape, ACTIVATION_AXES, mesh.shape))


def on_shards(kernel, args: tuple, dims: tuple[str, ...], results: int | tuple[int, ...]):
    """kernel(*args) with what each device holds of them, since XLA cannot split a kernel by itself.

    dims: of each argument, as in `activation_sharding`. results: which argument each result is laid out as.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(*args)
    specs = tuple(activation_sharding(d, a.shape, mesh).spec for d, a in zip(dims, args, strict=True))
    out = specs[results] if isinstance(results, int) else tuple(specs[i] for i in results)
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*args)


def check_letters(path: str, dims: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Raises InputError if a parameter declares a letter that is not in WEIGHT_AXES, or too few letters."""
    for letter in dims:
        if letter not in WEIGHT_AXES:
            raise InputError(f"{path}: its dimension {letter!r} is none of {', '.join(WEIGHT_AXES)} (sharding.py)")
    if len(dims) != len(shape):
        raise InputError(f"{path}: it has {len(shape)} dimensions, and is declared with {len(dims)}: {' '.join(dims)}")


def weight_spec(path: str, dims: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The layout of a parameter over a mesh of such sizes by axis (`mesh.shape`).

    fsdp splits matrices only: to gather a vector takes longer than it saves.
    Raises InputError for a dimension that must be split and that the mesh does not divide.
    """
    matrix = sum(letter != "L" for letter in dims) > 1
    table = {letter: axis for letter, axis in WEIGHT_AXES.items() if matrix or axis != "fsdp"}
    for letter, size in zip(dims, shape, strict=True):
        axis = table.get(letter)
        if axis and letter not in REPLICATED_IF_UNEVEN and size % sizes[axis]:
            raise InputError(
                f"{path}: its dimension {letter}, {size}, cannot be shared by {sizes[axis]} devices ({axis})"
            )
    return _spec(dims, shape, table, sizes)


def _spec(dims, shape, table, sizes: Mapping[str, int]) -> PartitionSpec:
    """Splits each dimension over its axes, or not at all where they do not divide it."""

    def axes(dim, size):
        names = table.get(dim)
        names = (names,) if isinstance(names, str) else names or ()
        split = math.prod(sizes[name] for name in names)
        return names if split > 1 and size % split == 0 else None

    return PartitionSpec(*(axes(d, n) for d, n in zip(dims, shape, strict=True)))
