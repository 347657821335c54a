"""Quantised Linears as a transform of the parameter tree: (kernel − zeros) · scales, see `Quantised` in config.py.

A quantised Linear keeps its `kernel` [L, in, out], in 4 or 8 bits, and has beside it `scales` [L, in/group, out],
perhaps `zeros` of the same shape in the kernel's dtype, and perhaps `order` [L, in] int32 (no L in the merger).
Someone else's files: convert/quantised.py.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.nn import initializers

from qwenvl_jax.config import Config, Quantised
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model import linear

KERNEL_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("int4", "int8", "float8_e4m3fn")}


def leaves(path: str, kernel, form: Quantised) -> dict:
    """The Specs of a quantised Linear, by path, from the dense kernel's Spec.

    Raises CheckpointError if `group` does not divide the kernel's rows.
    """
    *lead, rows, columns = kernel.shape
    *stack, n_in, n_out = kernel.dims
    group = form.group or rows
    if rows % group:
        raise CheckpointError(f"{path}: its {rows} rows are not a multiple of the group size {group}")
    dims = (*stack, n_in if form.group else ".", n_out)
    scales = kernel._replace(shape=(*lead, rows // group, columns), dims=dims, role="scales", init=initializers.ones)
    dtype = KERNEL_DTYPES[form.dtype]
    out = {f"{path}/kernel": kernel._replace(dtype=dtype), f"{path}/scales": scales}
    if form.zeros:
        out[f"{path}/zeros"] = scales._replace(dtype=dtype, role="zeros", init=initializers.zeros)
    if form.order:
        order = kernel._replace(shape=(*lead, rows), dims=(*stack, "."), dtype=np.dtype(np.int32), role="order")
        out[f"{path}/order"] = order._replace(init=initializers.zeros)
    return out


def dequantise(config: Config, params: dict, dtype=jnp.float32) -> tuple[Config, dict]:
    """The config and parameters of the same model with dense kernels, which are in `dtype` and in the inputs' order.

    In float32 they are exact. Biases, adapters and what is not quantised stay as they are.
    """

    def walk(tree):
        if not isinstance(tree, dict):
            return tree
        if "scales" not in tree:
            return {name: walk(value) for name, value in tree.items()}
        form = {name: tree[name] for name in ("kernel", "scales", "zeros", "order") if name in tree}
        stacked = form["kernel"].ndim == 3
        kernel = jax.lax.map(lambda one: _dense(one, dtype), form) if stacked else _dense(form, dtype)
        return {name: value for name, value in tree.items() if name not in form} | {"kernel": kernel}

    return config.replace(quantised=()), walk(params)


def _dense(form: dict, dtype):
    kernel = linear.dequantise(form["kernel"], form["scales"], form.get("zeros"), dtype)
    return jnp.zeros_like(kernel).at[form["order"]].set(kernel) if "order" in form else kernel
