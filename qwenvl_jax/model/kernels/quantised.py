"""Products with quantised kernels on GPUs: loads few bits, and converts and scales them in registers.

XLA:GPU instead writes the whole converted kernel to memory, for every token.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

COLUMNS = 128  # of the kernel, per program
ROWS = 64  # of x, per program
CHUNK = 128  # rows of the kernel that a program multiplies at a time
LEAST = 16  # a tensor core's smallest side
PROGRAMS = 100  # at least, on a card with 132 multiprocessors: if columns are few, the kernel's rows are split too


def fits(x, kernel, scales) -> bool:
    """Can `quantised_dot` multiply these? See there for shapes."""
    chunk = _chunk(kernel, scales)
    return x.dtype in (jnp.bfloat16, jnp.float16) and chunk >= LEAST and _columns(kernel) >= LEAST


def quantised_dot(x, kernel, scales, zeros, layer: int, *, interpret: bool = False):
    """x [rows, K] times layer `layer` of a stack of kernels [L, groups, K/groups, F]: [rows, F] in x's dtype.

    scales, zeros [L, groups, F]; zeros may be None. interpret: run slowly on any machine, for comparisons.
    """
    rows, (_, groups, group, F) = len(x), kernel.shape
    K, chunk, columns = groups * group, _chunk(kernel, scales), _columns(kernel)
    block = min(max(LEAST, pl.next_power_of_2(rows)), ROWS)
    padded = -(-rows // block) * block
    parts = _parts(groups if groups > 1 else K // chunk, padded // block * (F // columns))
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    scale_rows = pl.BlockSpec(
        (None, max(groups // parts, 1), columns), lambda n, p, r: (layer, p if groups > 1 else 0, n)
    )
    held = [kernel.reshape(-1, K, F), scales] + ([] if zeros is None else [zeros])
    out = pl.pallas_call(
        partial(_kernel, chunk=chunk, rows=rows),
        grid=(F // columns, parts, padded // block),
        in_specs=[
            pl.BlockSpec((block, K // parts), lambda n, p, r: (r, p)),
            pl.BlockSpec((None, K // parts, columns), lambda n, p, r: (layer, p, n)),
            *[scale_rows] * (len(held) - 1),
        ],
        out_specs=pl.BlockSpec((None, block, columns), lambda n, p, r: (p, r, n)),
        out_shape=jax.ShapeDtypeStruct((parts, rows, F), x.dtype if parts == 1 else jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="quantised_dot",
    )(x, *held)
    return out[0] if parts == 1 else jnp.sum(out, 0).astype(x.dtype)


def _kernel(x, kernel, scales, *rest, chunk: int, rows: int):
    """One block of rows, one block of columns, one part of the kernel's rows."""
    *zeros, out = rest
    per_scale = kernel.shape[0] // scales.shape[0] // chunk

    def add(i, total):
        codes = kernel[pl.ds(i * chunk, chunk), :].astype(x.dtype)
        at = pl.ds(i // per_scale, 1)
        for z in zeros:
            codes -= z[at, :].astype(x.dtype)  # exact: whole numbers below 256
        part = triton.dot(x[:, pl.ds(i * chunk, chunk)], codes)
        return total + part * scales[at, :].astype(jnp.float32)

    total = jax.lax.fori_loop(0, kernel.shape[0] // chunk, add, jnp.zeros((x.shape[0], kernel.shape[1]), jnp.float32))
    first = pl.program_id(2) * x.shape[0]
    triton.store(out, total.astype(out.dtype), mask=(first + jnp.arange(x.shape[0]) < rows)[:, None])


def _chunk(kernel, scales) -> int:
    """Rows of the kernel multiplied at a time: a power of two that divides a group."""
    group = kernel.shape[-2]
    return min(group & -group, CHUNK)


def _columns(kernel) -> int:
    """Columns per program: COLUMNS, or half of it if there would be few programs."""
    F = kernel.shape[-1]
    return min(F & -F, COLUMNS if F >= 16 * COLUMNS else COLUMNS // 2)


def _parts(most: int, programs: int) -> int:
    """In how many parts of equal size the kernel's rows are split, so that there are PROGRAMS."""
    return next((n for n in range(1, most) if most % n == 0 and n * programs >= PROGRAMS), most)
