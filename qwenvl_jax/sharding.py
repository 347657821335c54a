"""Where arrays live: one mesh, and two tables from dimensions to its axes, one for weights, one for activations.

Model code only says `constrain(x, "BTD")`; without a mesh that does nothing.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.types import InputError

AXES = ("data", "fsdp", "tensor")

# What each letter of the legend (types.py) is split over. Absent letters are not split.
ACTIVATIONS = {
    "B": ("data", "fsdp"),
    "R": ("data", "fsdp"),
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
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


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh `data × fsdp × tensor` over the first so many devices."""
    devices = jax.devices() if devices is None else devices
    size = data * fsdp * tensor
    if size > len(devices):
        raise InputError(f"a mesh of {data}×{fsdp}×{tensor} needs {size} devices; there are {len(devices)}")
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size])


def constrain(x, dims: str):
    """Asks for x's dimensions, one letter each, to be laid out by the activation table on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(tuple(dims), x.shape, ACTIVATIONS, mesh))


def local_rows(B: int) -> int:
    """Rows that one device holds of a dimension "B" of this size, on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return B if mesh.empty else activation_sharding("B", (B,), mesh).shard_shape((B,))[0]


def activation_sharding(dims: str, shape: tuple[int, ...], mesh) -> NamedSharding:
    """The activation table's layout for dimensions, one letter each ("." is never split), of these sizes."""
    return NamedSharding(mesh, _spec(tuple(dims), shape, ACTIVATIONS, mesh))


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
