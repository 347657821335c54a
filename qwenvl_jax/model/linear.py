"""How parameters are declared, and the one linear layer. Kernels are [in, out]."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenvl_jax.model.kernels.quantised import fits, quantised_dot
from qwenvl_jax.sharding import constrain

GROUPED_ROWS = 256  # with more rows, a quantised kernel is dequantised once: the sums of groups would be larger
MAX_BLOCK_ROWS, MIN_BLOCK_ROWS = 256, 16  # of a quantised kernel, converted at a time on a CPU
QUANTISED = ("scales", "zeros", "order")  # leaves of a quantised Linear beside its kernel
KERNEL_ROWS = 64  # most rows for which a GPU multiplies by the kernel of kernels/quantised.py
NARROW_ROWS = 32  # with more rows, a CPU converts the kernel to float32 faster than it multiplies three times


@flax.struct.dataclass
class Declared(nn.meta.AxisMetadata):
    """A parameter with its declaration. It exists under `init` only; `apply` sees plain arrays.

    dims: letters of types.py, separated by spaces; "." is never split over devices.
    role: see `Spec` in params/specs.py.
    init: (key, shape, dtype) → initial value.
    """

    value: Any
    dims: str = flax.struct.field(pytree_node=False)
    role: str = flax.struct.field(pytree_node=False)
    init: Callable = flax.struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, value):
        return self.replace(value=value)

    def add_axis(self, index, params):
        return self

    remove_axis = add_axis


def declare(init: Callable, dims: str, role: str) -> Callable:
    """An initializer for `self.param` that also holds the declaration, for `specs` of params/specs.py."""
    return lambda key, shape, dtype: Declared(init(key, shape, dtype), dims, role, init)


NORMAL, ONES, ZEROS = nn.initializers.normal(0.02), nn.initializers.ones, nn.initializers.zeros


def precision(dtype) -> jax.lax.Precision | None:
    """Full precision for float32 matmuls: accelerators would otherwise compute them in bfloat16 or tf32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Linear(nn.Module):
    """[..., in] → [..., features] in the input's dtype. What its parameters hold decides how.

    dims: the kernel's, such as "D F". Adapter (params/lora.py): lora_a [in, r], lora_b [r, features], lora_scale [].
    Quantised (params/quantised.py): scales, perhaps zeros [groups, features], perhaps order [in].
    """

    features: int
    dims: str
    use_bias: bool = True
    role: str = "linear"
    param_dtype: str = "bfloat16"

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        held = {leaf: self._held(leaf) for leaf in (*QUANTISED, "layer") if self.has_variable("params", leaf)}
        if not held:
            kernel = self.param("kernel", declare(NORMAL, self.dims, self.role), shape, self.param_dtype)
        # A 2-D matmul: XLA:CPU takes three times as long for the gradients of a 3-D one.
        lead, x = x.shape[:-1], x.reshape(-1, shape[0])
        y = quantised_product(x, self._held("kernel"), **held) if held else _product(x, kernel)
        if self.use_bias:
            bias = self.param("bias", declare(ZEROS, self.dims.split()[1], "bias"), shape[1:], self.param_dtype)
            y = y + bias.astype(x.dtype)
        if self.has_variable("params", "lora_a"):
            a, b, scale = map(self._held, ("lora_a", "lora_b", "lora_scale"))
            # The scale is applied in float32 at width r, where it costs nothing.
            low = jnp.dot(x, a.astype(x.dtype), precision=precision(x.dtype), preferred_element_type=jnp.float32)
            y = y + jnp.dot((low * scale).astype(x.dtype), b.astype(x.dtype), precision=precision(x.dtype))
        return y.reshape(*lead, self.features)

    def _held(self, leaf: str):
        return self.get_variable("params", leaf)


def layer_of(stack: dict, l: int) -> dict:
    """The weights of one layer of a stack, as a decode step takes them.

    A quantised Linear gets the whole stack and the layer's number: a kernel reads its layer in place, not a slice.
    """
    if "scales" not in stack:
        return {name: layer_of(w, l) if isinstance(w, dict) else w[l] for name, w in stack.items()}
    held = {name: stack[name] for name in ("kernel", *QUANTISED) if name in stack}
    return {name: w[l] for name, w in stack.items() if name not in held} | held | {"layer": l}


def in_turn(stack: dict, x) -> tuple[dict, jax.Array]:
    """The same values. XLA takes no slices of scales before x is computed.

    Otherwise XLA:TPU slices the scales of all layers at once and writes them to memory in float32.
    """
    small = {name: {leaf: w[leaf] for leaf in QUANTISED if leaf in w} for name, w in stack.items() if "scales" in w}
    small, x = jax.lax.optimization_barrier((small, x)) if small else (small, x)
    return stack | {name: stack[name] | leaves for name, leaves in small.items()}, x


def _product(x, kernel):
    """x [rows, in] times kernel [in, features]."""
    dot = partial(jnp.dot, precision=precision(x.dtype))

    def wide(x, kernel):
        return dot(x, kernel.astype(x.dtype))

    forms = {"cpu": partial(narrow_product, dims="DF")} if is_narrow(x, kernel) else {}
    if len(x) == 1:

        def two_rows(x, kernel):
            """For one row, XLA:GPU lowers the matmul to a kernel-sized elementwise product plus a reduction."""
            return wide(jnp.broadcast_to(x, (2, x.shape[1])), kernel)[:1]

        forms["cuda"] = two_rows
    return jax.lax.platform_dependent(x, kernel, **forms, default=wide) if forms else wide(x, kernel)


def is_narrow(x, kernel) -> bool:
    """Has x [rows, in] so few rows that `narrow_product` is faster on a CPU?"""
    return kernel.dtype == jnp.bfloat16 and x.dtype != jnp.float16 and len(x) <= NARROW_ROWS


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def narrow_product(x, kernel, dims: str):
    """x [rows, D] times a bfloat16 kernel with dims "DF" or "FD": [rows, F], for CPUs.

    XLA:CPU has a bfloat16 matmul with float32 sums. If x is float32 or has one row, XLA converts the whole kernel
    instead. A float32 number is the exact sum of three bfloat16 numbers, so each float32 row becomes three rows. The
    result is as exact as with a float32 kernel, in half the memory.
    """
    if x.dtype == jnp.float32:
        # Not by casts to bfloat16 and back, which XLA removes.
        rounded = partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
        high = rounded(x)
        middle = rounded(x - high)
        parts = [high, middle, x - high - middle]
    elif len(x) == 1:
        parts = [x, jnp.zeros_like(x)]
    else:
        parts = [x]
    rows = jnp.concatenate(parts).astype(kernel.dtype)
    y = jnp.einsum(f"BD,{dims}->BF", rows, kernel, preferred_element_type=jnp.float32)
    return y.reshape(len(parts), len(x), -1).sum(0).astype(x.dtype)


def _narrow_forward(x, kernel, dims):
    return narrow_product(x, kernel, dims), (x, kernel)


def _narrow_backward(dims, saved, g):
    _, pull = jax.vjp(lambda x, w: jnp.einsum(f"BD,{dims}->BF", x, w.astype(x.dtype)), *saved)
    return pull(g)


narrow_product.defvjp(_narrow_forward, _narrow_backward)


def quantised_product(x, kernel, scales, zeros=None, order=None, layer: int | None = None):
    """x [rows, in] times a kernel that is stored in few bits: [rows, F] in x's dtype. Differentiable in x.

    kernel [in, F], perhaps packed by `pack`; scales [groups, F]; zeros [groups, F] in the kernel's dtype; order [in].
    See `Quantised` in config.py. layer: if it is not None, all of them are stacks and this is the layer's number.
    """
    if order is not None:  # each device needs all features, perhaps for several Linears
        x = constrain(x, "B.")[:, order if layer is None else order[layer]]
    groups, columns = scales.shape[-2:]
    # XLA:TPU reads a slice of a stack in place only if no reshape follows it.
    kernel = kernel.reshape(*kernel.shape[:-2], groups, -1, columns)

    def of_layer(product):
        def sliced(x, *held):
            return product(x, *(w if w is None or layer is None else w[layer] for w in held))

        return sliced

    if len(x) > GROUPED_ROWS:
        return of_layer(_dequantised)(x, kernel, scales, zeros)
    forms = {"cpu": of_layer(_blocked)}
    if len(x) <= KERNEL_ROWS and fits(x, kernel, scales):
        forms["cuda"] = partial(_by_kernel, layer)
    return jax.lax.platform_dependent(x, kernel, scales, zeros, **forms, default=of_layer(_grouped))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(layer, x, *held):
    if layer is None:
        held, layer = [w if w is None else w[None] for w in held], 0
    return quantised_dot(x, *held, layer)


def _by_kernel_forward(layer, x, *held):
    return _by_kernel(layer, x, *held), held


def _by_kernel_backward(layer, held, g):
    kernel = dequantise(*(w if w is None or layer is None else w[layer] for w in held), g.dtype)
    return jnp.dot(g, kernel.T, precision=precision(g.dtype)), None, None, None


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def dequantise(kernel, scales, zeros=None, dtype=jnp.float32):
    """The matrix [..., in, F] that a quantised kernel stands for, its rows as stored; rounded once, from float32."""
    *lead, groups, columns = scales.shape
    w = kernel.reshape(*lead, groups, -1, columns).astype(jnp.float32)
    if zeros is not None:
        w -= zeros[..., None, :].astype(jnp.float32)
    w *= scales[..., None, :].astype(jnp.float32)
    return w.reshape(*lead, -1, columns).astype(dtype)


def _dequantised(x, kernel, scales, zeros):
    kernel = dequantise(_unpack(kernel, x.shape[1]), scales, zeros, x.dtype)
    return jnp.dot(x, kernel, precision=precision(x.dtype))


def _grouped(x, kernel, scales, zeros):
    """One dot per group, scaled and then summed: XLA:TPU converts the kernel inside of the dot.

    It would write a whole kernel if the scales were applied before the dot, or if there were only one row.
    """
    rows, kernel = len(x), _unpack(kernel, x.shape[1])
    x = jnp.broadcast_to(x, (2, x.shape[1])) if rows == 1 else x
    x = x.reshape(len(x), len(scales), -1)
    dot = partial(jnp.einsum, precision=precision(x.dtype), preferred_element_type=jnp.float32)
    y = dot("bgk,gkf->gbf", x, kernel.astype(x.dtype))
    if zeros is not None:
        y -= jnp.sum(x, -1, dtype=jnp.float32).T[..., None] * zeros[:, None].astype(jnp.float32)
    return jnp.sum(y * scales[:, None].astype(jnp.float32), 0).astype(x.dtype)[:rows]


def _blocked(x, kernel, scales, zeros):
    """`_grouped` for CPUs: a loop over blocks of the kernel, which are converted to float32 in the cache.

    In all other forms, XLA:CPU converts the whole kernel in memory, or does not use its fast matmul.
    """
    groups, columns = scales.shape
    block = block_rows(x.shape[1] // groups)
    if block < MIN_BLOCK_ROWS:
        return _dequantised(x, kernel, scales, zeros)
    in_group = x.shape[1] // groups // block
    blocks = jnp.swapaxes(x.astype(jnp.float32).reshape(len(x), -1, block), 0, 1)

    def add(y, args):
        i, x, kernel = args
        parts = jax.lax.optimization_barrier([part.astype(jnp.float32) for part in _halves(kernel, block)])
        part = sum(map(jnp.dot, jnp.split(x, len(parts), 1), parts))
        if zeros is not None:
            part -= jnp.sum(x, 1, keepdims=True) * zeros[i // in_group].astype(jnp.float32)
        return y + part * scales[i // in_group].astype(jnp.float32), None

    start = jnp.zeros((len(x), columns), jnp.float32)
    args = jnp.arange(len(blocks)), blocks, kernel.reshape(len(blocks), -1, columns)
    return jax.lax.scan(add, start, args)[0].astype(x.dtype)


def block_rows(group: int) -> int:
    """Rows of a kernel that `_blocked` takes at a time: a group of `group` rows, or an even part of it."""
    return next(group // n for n in range(1, group + 1) if group % n == 0 and group // n <= MAX_BLOCK_ROWS)


def pack(kernel, group: int):
    """A kernel [..., in, F] of numbers of four bits in int8 → [..., in/2, F]: two numbers share a byte.

    The high bits hold the second half of each block's rows. group: rows that share scales. For CPUs, where XLA converts
    int4 slowly. A kernel whose blocks cannot be halved stays as it is.
    """
    *lead, rows, columns = kernel.shape
    block = block_rows(group)
    if block % 2 or block < MIN_BLOCK_ROWS:
        return kernel
    halves = kernel.reshape(*lead, -1, 2, block // 2, columns)
    return ((halves[..., 0, :, :] & 15) | (halves[..., 1, :, :] << 4)).reshape(*lead, rows // 2, columns)


def _halves(block, rows: int) -> list:
    """The numbers of a block of a kernel: as it is, or the two halves that `pack` put into one."""
    return [block] if len(block) == rows else [(block << 4) >> 4, block >> 4]


def _unpack(kernel, rows: int):
    """kernel [groups, n, F] of a matrix with `rows` rows: as it is, or as it was before `pack`."""
    groups, n, columns = kernel.shape
    if groups * n == rows:
        return kernel
    blocks = kernel.reshape(-1, block_rows(rows // groups) // 2, columns)
    return jnp.concatenate([(blocks << 4) >> 4, blocks >> 4], 1).reshape(groups, 2 * n, columns)
