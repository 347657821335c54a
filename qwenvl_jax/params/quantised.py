"""Quantised Linears as a transform of the parameter tree: (kernel − zeros) · scales, see `Quantised` in config.py.

A quantised Linear keeps its `kernel` [L, in, out], in 4 or 8 bits, and has beside it `scales` [L, in/group, out],
perhaps `zeros` of the same shape in the kernel's dtype, and perhaps `order` [L, in] int32 (no L in the merger).
Someone else's files: convert/quantised.py.
"""

import ml_dtypes
import numpy as np
from jax.nn import initializers

from qwenvl_jax.config import Quantised
from qwenvl_jax.errors import CheckpointError

KERNEL_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("int4", "int8", "float8_e4m3fn")}


def leaves(linear: str, kernel, form: Quantised) -> dict:
    """The Specs of a quantised Linear, by path, from the dense kernel's Spec.

    Raises CheckpointError if `group` does not divide the kernel's rows.
    """
    *lead, rows, columns = kernel.shape
    *stack, n_in, n_out = kernel.dims
    group = form.group or rows
    if rows % group:
        raise CheckpointError(f"{linear}: its {rows} rows are not a multiple of the group size {group}")
    dims = (*stack, n_in if form.group else ".", n_out)
    scales = kernel._replace(shape=(*lead, rows // group, columns), dims=dims, role="scales", init=initializers.ones)
    dtype = KERNEL_DTYPES[form.dtype]
    out = {f"{linear}/kernel": kernel._replace(dtype=dtype), f"{linear}/scales": scales}
    if form.zeros:
        out[f"{linear}/zeros"] = scales._replace(dtype=dtype, role="zeros", init=initializers.zeros)
    if form.order:
        order = kernel._replace(shape=(*lead, rows), dims=(*stack, "."), dtype=np.dtype(np.int32), role="order")
        out[f"{linear}/order"] = order._replace(init=initializers.zeros)
    return out
