"""Where arrays live: one mesh, and two tables from dimensions to its axes, one for weights, one for activations.

Model code only says `constrain(x, "BTD")`; without a mesh that does nothing.
"""

import math
import os
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
HEARTBEAT = 30  # seconds without a sign of a process until the others end

# What each letter of the legend (types.py) is split over. Absent letters are not split.
ACTIVATIONS = {
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
WEIGHTS = {"D": "fsdp", "E": "fsdp", "NH": "tensor", "KH": "tensor", "F": "tensor", "V": "tensor"}


def _linear(inputs: str, outputs: str) -> dict[str, str]:
    """An adapter is split as its kernel is; its rank is not."""
    return {"kernel": f"{inputs} {outputs}", "lora_a": f"{inputs} -", "lora_b": f"- {outputs}"}


# Dimensions of every parameter by the module and leaf name; stacked leaves have L in front.
# The vision tower is split over lanes, not heads, whose number rarely divides: over fsdp, which shares out lanes too,
# its weights are split as the decoder's are, over tensor they are not.
DIMS = {
    "decoder": {
        "embed_tokens": {"embedding": "V D"},
        "q_proj": _linear("D", "NH") | {"bias": "NH"},
        "k_proj": _linear("D", "KH") | {"bias": "KH"},
        "v_proj": _linear("D", "KH") | {"bias": "KH"},
        "o_proj": _linear("NH", "D"),
        "gate_proj": _linear("D", "F"),
        "up_proj": _linear("D", "F"),
        "down_proj": _linear("F", "D"),
        "lm_head": {"kernel": "D V"},
    },
    "vision": {
        "patch_embed": {"kernel": "C E"},
        "qkv": _linear("E", "-"),
        "proj": _linear("-", "E"),
        "gate_proj": _linear("E", "-"),
        "up_proj": _linear("E", "-"),
        "down_proj": _linear("-", "E"),
        "fc1": _linear("E", "-"),  # the merger's too, whose width is a few times E
        "fc2": _linear("-", "E"),
    },
}


def join() -> None:
    """Makes this process one of several that run the same program, each with its own devices; call it before all else.

    A TPU pod and Slurm say which one it is; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do.
    When a process dies, exchanges with it fail in the others; where they hang instead, jax ends the others after
    HEARTBEAT seconds with a message that names it. Raises InputError where nothing says which process this is.
    """
    if jax.distributed.is_initialized():
        return
    numbers = {}
    for name, key in (("JAX_NUM_PROCESSES", "num_processes"), ("JAX_PROCESS_ID", "process_id")):
        if (value := os.environ.get(name)) is not None:
            if not value.isdecimal():
                raise InputError(f"{name} is {value!r}; it must be a number")
            numbers[key] = int(value)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is not None:
        if not re.fullmatch(r".+:\d+", address):
            raise InputError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be host:port of process 0")
        print(f"waiting for all processes to come to {address}", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            **numbers, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=2 * HEARTBEAT
        )
    except jax.errors.JaxRuntimeError as e:
        raise InputError(f"the processes cannot come together at {address} ({e})") from e
    except ValueError as e:
        raise InputError(
            f"nothing says which of several processes this is ({e}); a TPU pod or Slurm does, elsewhere set "
            "JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from e


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


def check_mesh(config, sizes) -> None:
    """Raises InputError where a mesh of such sizes by axis (`mesh.shape`) does not divide the model's widths."""
    t = config.text
    for axis, width, size in (
        ("fsdp", "hidden_size", t.hidden_size),
        ("tensor", "intermediate_size", t.intermediate_size),
    ):
        if size % sizes[axis]:
            raise InputError(f"the model's {width}, {size}, cannot be shared by {sizes[axis]} devices ({axis})")


def constrain(x, dims: str):
    """Asks for x's dimensions, one letter each, to be laid out by the activation table on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(tuple(dims), x.shape, ACTIVATIONS, mesh))


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


def join_heads(attended, N: int, K: int):
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
    spec = _spec(tuple(dims), shape, ACTIVATIONS, mesh)
    return all(axes is not None for axes in spec)


def local_rows(B: int) -> int:
    """Rows that one device holds of a dimension "B" of this size, on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return B if mesh.empty else activation_sharding("B", (B,), mesh).shard_shape((B,))[0]


def activation_sharding(dims: str, shape: tuple[int, ...], mesh) -> NamedSharding:
    """The activation table's layout for dimensions, one letter each ("." is never split), of these sizes."""
    return NamedSharding(mesh, _spec(tuple(dims), shape, ACTIVATIONS, mesh))


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


def param_shardings(params, mesh: Mesh):
    """A tree of NamedSharding for a tree of parameters (arrays or shapes)."""

    def sharding(path, leaf):
        keys = [k.key for k in path]
        dims = DIMS[keys[0]].get(keys[-2], {}).get(keys[-1], "").split()
        dims = [""] * (leaf.ndim - len(dims)) + dims
        return NamedSharding(mesh, _spec(dims, leaf.shape, WEIGHTS, mesh))

    return jax.tree_util.tree_map_with_path(sharding, params)


def _spec(dims, shape, table, mesh) -> PartitionSpec:
    """Splits each dimension over its axes, or not at all where they do not divide it."""

    def axes(dim, size):
        names = table.get(dim)
        names = (names,) if isinstance(names, str) else names or ()
        split = 1
        for name in names:
            split *= mesh.shape[name]
        return names if split > 1 and size % split == 0 else None

    return PartitionSpec(*(axes(d, n) for d, n in zip(dims, shape, strict=True)))
