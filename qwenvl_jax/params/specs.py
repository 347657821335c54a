"""What every parameter is: read off the Flax modules that declare it, for everyone who must know.

Initial values, layouts over a mesh, LoRA's targets, the optimizer's groups, FLOPs, `plan` and conversion all read
`specs(config)`. A parameter is declared once, in its module (`declare` in model/linear.py).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError
from qwenvl_jax.model.linear import Declared
from qwenvl_jax.model.qwenvl import parts
from qwenvl_jax.sharding import AXES, check_letters, weight_spec

MATMULS = ("linear", "conv", "head")


class Spec(NamedTuple):
    """One parameter.

    dims: a letter of types.py for each dimension ("L" in front where layers are stacked), "." where it is never split.
    role: "linear" (the kernel of a Linear), "conv" (a convolution's kernel as a matrix), "head" (the output head),
        "embedding", "scale" or "bias"; of an adapter "lora_a", "lora_b" or "lora_scale".
    group: "llm", "vision" or "merger", which learning rates and freezing go by.
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
        """Is the first dimension that of the layers?"""
        return self.dims[:1] == ("L",)

    @property
    def transposed(self) -> bool:
        """Is it [in, out], where torch has [out, in]?"""
        return self.role in MATMULS

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def specs(config: Config) -> dict[str, Spec]:
    """Path in the tree ("decoder/layers/q_proj/kernel") → Spec, of every parameter of a model without adapters.

    Raises InputError for a letter that types.py and sharding.py do not have.
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
            lead = ((part.layers,), ("L",)) if part.layers else ((), ())
            shape, dims = lead[0] + box.value.shape, lead[1] + tuple(box.dims.split())
            check_letters(path, dims, shape)
            out[path] = Spec(shape, np.dtype(box.value.dtype), dims, box.role, part.group, box.init)
    return out


def specs_of(config: Config, params: dict) -> dict[str, Spec]:
    """As `specs`, of the leaves that this tree of arrays or shapes holds: an adapter's too.

    Raises InputError for a leaf that no module declares.
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


# The leaves of a low-rank adapter, and where they start: PEFT's lora_a is uniform within ±1/√in, its lora_b zero.
ADAPTER = {"lora_a": _uniform, "lora_b": jax.nn.initializers.zeros, "lora_scale": jax.nn.initializers.ones}


def init(config: Config, key) -> dict:
    """Random parameters, as their modules declare them: normal(0.02) matrices, unit scales, zero biases."""
    found = _specs(config).items()
    return unflatten({p: s.init(jax.random.fold_in(key, i), s.shape, s.dtype) for i, (p, s) in enumerate(found)})


def abstract_params(config: Config) -> dict:
    """Shapes and dtypes of the parameters (`jax.ShapeDtypeStruct`), without making them."""
    return unflatten({path: jax.ShapeDtypeStruct(s.shape, s.dtype) for path, s in _specs(config).items()})


def count_params(config: Config) -> int:
    return sum(s.size for s in _specs(config).values())


def param_shardings(specs: dict[str, Spec], mesh: Mesh) -> dict:
    """A tree of NamedSharding, like the parameters. Raises InputError for a width that the mesh does not divide."""
    return unflatten({p: NamedSharding(mesh, weight_spec(p, s.dims, s.shape, mesh.shape)) for p, s in specs.items()})


def check_mesh(config: Config, sizes: dict[str, int]) -> None:
    """Raises InputError where a mesh of such sizes by axis (`mesh.shape`) does not divide the model's widths."""
    for path, s in _specs(config).items():
        weight_spec(path, s.dims, s.shape, dict.fromkeys(AXES, 1) | dict(sizes))


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
