"""Parts that the decoder and the vision tower share: parameter declarations, the linear layer, norms, rotary tables.

Norms, rotary tables and softmax are always float32; kernels are [in, out].
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.config import TextConfig

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


def unpack_bfloat16(weights):
    """A layer's weights, with bfloat16 in place of its bits in uint16 (`cpu_layouts` in infer/programs.py)."""
    bfloat16 = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.bfloat16)
    return jax.tree.map(lambda w: bfloat16(w) if w.dtype == jnp.uint16 else w, weights)


# Elementwise operations and views: XLA fuses these into their consumers.
_FUSED = frozenset(
    "abs add add_any and broadcast_in_dim concatenate convert_element_type copy div eq erf exp expand_dims ge gt "
    "integer_pow iota le log logistic lt max min mul ne neg not or pow reshape rsqrt select_n sign slice sqrt square "
    "squeeze stop_gradient sub tanh transpose".split()
)
ATTENDED = "attended"  # the name of attention's output, which `checkpointed` saves


def checkpointed(f, remat: bool):
    """`f`, a scan's body, with a choice of what it saves for the backward pass.

    remat: only its inputs. Otherwise the results of linear layers, attention and sums, but no scores. The rest is
    computed again: saving it would take most of the memory that a training step writes, and more time.
    """

    def saved(primitive, *_, **params) -> bool:
        if remat or primitive.name in _FUSED:
            return False
        if primitive.name == "dot_general":  # scores have batch dimensions
            return not any(params["dimension_numbers"][1])
        return params["name"] == ATTENDED if primitive.name == "name" else True

    return jax.checkpoint(f, prevent_cse=False, policy=saved)  # XLA cannot merge a scan's body with its recomputation


class Linear(nn.Module):
    """[..., in] → [..., features] in the input's dtype, with a low-rank adapter if the parameters hold one.

    dims: the kernel's, such as "D F". Adapter (params/lora.py): lora_a [in, r], lora_b [r, features], lora_scale [].
    """

    features: int
    dims: str
    use_bias: bool = True
    role: str = "linear"
    param_dtype: str = "bfloat16"

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", declare(NORMAL, self.dims, self.role), shape, self.param_dtype)
        # A 2-D matmul: XLA:CPU takes three times as long for the gradients of a 3-D one.
        lead, x = x.shape[:-1], x.reshape(-1, shape[0])
        y = _product(x, kernel)
        if self.use_bias:
            bias = self.param("bias", declare(ZEROS, self.dims.split()[1], "bias"), shape[1:], self.param_dtype)
            y = y + bias.astype(x.dtype)
        if self.has_variable("params", "lora_a"):
            a, b, scale = (self.get_variable("params", f"lora_{leaf}") for leaf in ("a", "b", "scale"))
            # The scale is applied in float32 at width r, where it costs nothing.
            low = jnp.dot(x, a.astype(x.dtype), precision=precision(x.dtype), preferred_element_type=jnp.float32)
            y = y + jnp.dot((low * scale).astype(x.dtype), b.astype(x.dtype), precision=precision(x.dtype))
        return y.reshape(*lead, self.features)


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


class RMSNorm(nn.Module):
    """Root-mean-square norm; casts to x's dtype *before* it multiplies by the scale, as the reference does."""

    eps: float
    param_dtype: str = "bfloat16"

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", declare(ONES, ".", "scale"), x.shape[-1:], self.param_dtype)
        return _unit_rms(x.astype(jnp.float32), self.eps).astype(x.dtype) * scale.astype(x.dtype)


def _unit_rms(x, eps: float):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


class LayerNorm(nn.Module):
    eps: float
    param_dtype: str = "bfloat16"

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", declare(ONES, ".", "scale"), x.shape[-1:], self.param_dtype)
        bias = self.param("bias", declare(ZEROS, ".", "bias"), x.shape[-1:], self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = _unit_rms(x32 - jnp.mean(x32, -1, keepdims=True), self.eps)
        return (x32 * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding of x [..., heads, H] by cos, sin [..., H/2] float32; pairs are (i, i + H/2)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def vision_rope(positions, head_dim: int):
    """cos, sin [..., head_dim/2] of patch positions [..., 2] (row, column), head_dim/4 frequencies each; θ 10000."""
    inverse = 10000.0 ** -(np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    angles = positions[..., None].astype(jnp.float32) * inverse
    angles = angles.reshape(*positions.shape[:-1], head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def text_rope(positions, config: TextConfig):
    """cos, sin [B, T, H/2] of M-RoPE positions [3, B, T]: each frequency belongs to t, h or w."""
    inverse, scale = rope_frequencies(config)
    angles = jnp.moveaxis(positions.astype(jnp.float32)[frequency_axes(config)], 0, -1) * inverse
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def frequency_axes(config: TextConfig) -> np.ndarray:
    """[H/2] the axis (0 t, 1 h, 2 w) of each frequency: `mrope_section` of each, in chunks or interleaved."""
    if config.rope == "sections":
        return np.repeat(np.arange(3), config.mrope_section)
    axes = np.zeros(config.head_dim // 2, int)  # t, h, w, t, h, w, …; t takes the places that h and w leave
    for axis in (1, 2):
        axes[axis : 3 * config.mrope_section[axis] : 3] = axis
    return axes


def rope_frequencies(config: TextConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies [H/2] float32 and the factor on cos and sin; YaRN (arXiv:2309.00071) if configured."""
    half = config.head_dim // 2
    inverse = config.rope_theta ** -(np.arange(half) / half)
    yarn = config.yarn
    if yarn is None:
        return inverse.astype(np.float32), 1.0

    def dim_of(rotations):  # the frequency that makes so many turns within the original context (eq. 17)
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return half * math.log(turns) / math.log(config.rope_theta)

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), config.head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    inverse = inverse * (1 - ramp) + inverse / yarn.factor * ramp
    scale = yarn.attention_factor
    if scale is None:
        scale = 0.1 * math.log(max(yarn.factor, 1)) + 1
    return inverse.astype(np.float32), float(scale)
