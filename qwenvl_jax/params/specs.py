"""`specs(config)`: shape, dtype, dimensions, role and group of every parameter, as its Flax module declares them.

Initialisation, shardings, LoRA, the optimizer, FLOPs, `plan` and conversion read them here. A parameter is declared
once, in its module (`declare` in model/linear.py).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError
from qwenvl_jax.model.linear import Declared
from qwenvl_jax.model.qwenvl import parts
from qwenvl_jax.params import quantised
from qwenvl_jax.sharding import AXES, WEIGHT_AXES, check_letters, weight_spec

MATMULS = ("linear", "conv", "head")


class Spec(NamedTuple):
    """One parameter.

    dims: one letter of types.py per dimension, "L" first if layers are stacked, "." for one that is never split.
    role: "linear" (a Linear's kernel), "conv" (a convolution's kernel as a matrix), "head" (the output head),
        "embedding", "scale", "bias"; of a quantised Linear "scales", "zeros", "order"; in an adapter "lora_a",
        "lora_b", "lora_scale".
    group: "llm", "vision" or "merger"; learning rates and freezing are per group.
    init: (key, shape, dtype) → initial value.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    dims: tuple[str, ...]
    role: str
    group: str
    init: Callable

    @property
    def stacked(self) -> bool:
        """Is the first dimension the layers?"""
        return self.dims[:1] == ("L",)

    @property
    def transposed(self) -> bool:
        """Is it [in, out], where torch has [out, in]?"""
        return self.role in MATMULS

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes on a device."""
        return -(-self.size * bits(self.dtype) // 8)


def bits(dtype) -> int:
    """Bits of a number on a device, where two numbers of four bits share a byte. `itemsize` is the host's."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * np.dtype(dtype).itemsize


def specs(config: Config) -> dict[str, Spec]:
    """Path in the tree ("decoder/layers/q_proj/kernel") → Spec, for a model without adapters.

    Raises InputError if a module declares a letter that sharding.py does not have.
    """
    return dict(_specs(config))


@lru_cache(16)
def _specs(config: Config) -> dict[str, Spec]:
    out = {}
    for place, part in parts(config).items():

        def declared(key, *arrays, part=part):
            return part.module.init(key, *arrays, *part.attend)["params"]

        tree = jax.eval_shape(declared, jax.ShapeDtypeStruct((2,), np.uint32), *part.arrays)
        for path, box in flatten(tree, f"{place}/").items():
            if not isinstance(box, Declared):
                raise InputError(f"{path}: its module does not `declare` it (model/linear.py)")
            shape, dims = box.value.shape, tuple(box.dims.split())
            if part.layers:
                shape, dims = (part.layers, *shape), ("L", *dims)
            check_letters(path, dims, shape)
            out[path] = Spec(shape, np.dtype(box.value.dtype), dims, box.role, part.group, box.init)
    for linear, form in config.quantised:
        kernel = out.get(f"{linear}/kernel")
        if kernel is None or kernel.role != "linear":
            raise InputError(f"{linear}: no Linear of this model, so it cannot be quantised")
        out |= quantised.leaves(linear, kernel, form)
    return out


def specs_of(config: Config, params: dict) -> dict[str, Spec]:
    """As `specs`, for the leaves of this tree of arrays or shapes, adapters included.

    Raises InputError if no module declares a leaf.
    """
    known, out = _specs(config), {}
    for path, leaf in flatten(params).items():
        linear, _, name = path.rpartition("/")
        kernel = known.get(f"{linear}/kernel")
        if path in known:
            out[path] = known[path]._replace(shape=leaf.shape, dtype=np.dtype(leaf.dtype))
        elif name in ADAPTER and kernel is not None and kernel.role == "linear":
            *lead, n_in, n_out = kernel.dims
            dims = {"lora_a": (*lead, n_in, "."), "lora_b": (*lead, ".", n_out), "lora_scale": tuple(lead)}[name]
            out[path] = Spec(leaf.shape, np.dtype(leaf.dtype), dims, name, kernel.group, ADAPTER[name])
        else:
            raise InputError(f"{path}: no module of this config declares such a parameter")
    return out


def _uniform(key, shape, dtype):
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


# The leaves of a low-rank adapter and their initial values, as in PEFT.
ADAPTER = {"lora_a": _uniform, "lora_b": jax.nn.initializers.zeros, "lora_scale": jax.nn.initializers.ones}


def init(config: Config, key) -> dict:
    """Random parameters: normal(0.02) matrices, unit scales, zero biases."""
    found = _specs(config).items()
    return unflatten({p: s.init(jax.random.fold_in(key, i), s.shape, s.dtype) for i, (p, s) in enumerate(found)})


def abstract_params(config: Config) -> dict:
    """The parameters as `jax.ShapeDtypeStruct`."""
    return unflatten({path: jax.ShapeDtypeStruct(s.shape, s.dtype) for path, s in _specs(config).items()})


def count_params(config: Config) -> int:
    return sum(s.size for s in _specs(config).values())


def param_shardings(specs: dict[str, Spec], mesh: Mesh) -> dict:
    """A tree of NamedSharding, like the parameters. Raises InputError if the mesh does not divide a width."""
    return unflatten({p: NamedSharding(mesh, weight_spec(p, s.dims, s.shape, mesh.shape)) for p, s in specs.items()})


def on_mesh(config: Config, sizes: Mapping[str, int]) -> Config:
    """The config with groups so small that no group is split over a mesh; sizes: `mesh.shape`.

    Rows of scales and zeros are then repeated (`Regrouped` in params/place.py). The 11,008 rows of an MLP over four
    devices, for example, are 21½ groups of 128 each, so they become 43 groups of 64.
    """
    dense, forms = _specs(config.replace(quantised=())), []
    for linear, form in config.quantised:
        kernel = dense[f"{linear}/kernel"]
        share, rest = divmod(kernel.shape[-2], sizes.get(WEIGHT_AXES[kernel.dims[-2]], 1))
        if form.group and not rest:  # a mesh that does not divide the rows replicates them, or is refused
            form = dataclasses.replace(form, group=math.gcd(form.group, share))
        forms.append((linear, form))
    return config.replace(quantised=tuple(forms))


def check_mesh(config: Config, sizes: dict[str, int]) -> None:
    """Raises InputError if a mesh does not divide the model's widths. sizes: `mesh.shape`; absent axes are 1."""
    for path, s in _specs(on_mesh(config, sizes)).items():
        weight_spec(path, s.dims, s.shape, dict.fromkeys(AXES, 1) | dict(sizes))


def flatten(tree: dict, prefix: str = "") -> dict:
    """A nested dict → {"a/b/c": leaf}."""
    out = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return out


def unflatten(flat: dict) -> dict:
    """The inverse of `flatten`."""
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
