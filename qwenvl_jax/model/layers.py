"""The small parts both halves share: how parameters are declared, one linear layer, two norms, rotary tables.

Norms, rotary tables and softmax are float32 whatever the compute dtype; kernels are [in, out].
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

NARROW_ROWS = 32  # with more, converting the kernel costs a CPU less than multiplying three times


@flax.struct.dataclass
class Declared(nn.meta.AxisMetadata):
    """A parameter with what its module declares of it. It exists under `init` only; `apply` sees plain arrays.

    dims: its dimensions in the letters of types.py, separated by spaces; "." is never split over devices.
    role: "linear", "conv", "embedding", "head", "scale" or "bias" (what each means: `Spec` in params/specs.py).
    init: (key, shape, dtype) → its initial value.
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

    def remove_axis(self, index, params):
        return self


def declare(init: Callable, dims: str, role: str) -> Callable:
    """For `self.param`: the initial value, and what `specs` of params/specs.py reads."""
    return lambda key, shape, dtype: Declared(init(key, shape, dtype), dims, role, init)


NORMAL, ONES, ZEROS = nn.initializers.normal(0.02), nn.initializers.ones, nn.initializers.zeros


def precision(dtype) -> jax.lax.Precision | None:
    """float32 means float32: accelerators would otherwise multiply it in bfloat16 or tf32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def unpack_bfloat16(weights):
    """A layer's weights from a stack that holds bfloat16 as its bits, uint16 (`cpu_layouts` in infer/programs.py)."""
    bfloat16 = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.bfloat16)
    return jax.tree.map(lambda w: bfloat16(w) if w.dtype == jnp.uint16 else w, weights)


# Elementwise, or another view: XLA fuses these into whatever reads them.
_FUSED = frozenset(
    "abs add add_any and broadcast_in_dim concatenate convert_element_type copy div eq erf exp expand_dims ge gt "
    "integer_pow iota le log logistic lt max min mul ne neg not or pow reshape rsqrt select_n sign slice sqrt square "
    "squeeze stop_gradient sub tanh transpose".split()
)
ATTENDED = "attended"  # what attention gives, for `checkpointed` to keep


def checkpointed(f, remat: bool):
    """`f`, the body of a scan, keeps for the backward pass only its inputs if `remat`, and otherwise what linear
    layers, attention and sums gave, but not the scores. All else is computed again: to keep it would be most of the
    memory that a training step writes, and would take longer."""

    def kept(primitive, *_, **params) -> bool:
        if remat or primitive.name in _FUSED:
            return False
        if primitive.name == "dot_general":  # scores have batch dimensions
            return not any(params["dimension_numbers"][1])
        return params["name"] == ATTENDED if primitive.name == "name" else True

    return jax.checkpoint(f, prevent_cse=False, policy=kept)  # a scan's body cannot be merged with its recomputation


class Linear(nn.Module):
    """[..., in] → [..., features], in the dtype of its input; plus a low-rank adapter, if its parameters hold one.

    dims: of its kernel, such as "D F". The adapter (params/lora.py): lora_a [in, r], lora_b [r, features],
    lora_scale [].
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
        # As a matrix: XLA on CPUs takes three times as long for the gradients of products of higher rank.
        lead, x = x.shape[:-1], x.reshape(-1, shape[0])
        y = _product(x, kernel)
        if self.use_bias:
            bias = self.param("bias", declare(ZEROS, self.dims.split()[1], "bias"), shape[1:], self.param_dtype)
            y = y + bias.astype(x.dtype)
        if self.has_variable("params", "lora_a"):
            a, b, scale = (self.get_variable("params", f"lora_{leaf}") for leaf in ("a", "b", "scale"))
            # Scaled while narrow and in float32: the scale is exact, and that costs nothing at this width.
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
            """For one row, XLA:GPU makes an elementwise product as large as the kernel, keeps it, and sums it."""
            return wide(jnp.broadcast_to(x, (2, x.shape[1])), kernel)[:1]

        forms["cuda"] = two_rows
    return jax.lax.platform_dependent(x, kernel, **forms, default=wide) if forms else wide(x, kernel)


def is_narrow(x, kernel) -> bool:
    """Whether x [rows, in] has so few rows that a CPU multiplies a bfloat16 kernel without converting it first."""
    return kernel.dtype == jnp.bfloat16 and x.dtype != jnp.float16 and len(x) <= NARROW_ROWS


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def narrow_product(x, kernel, dims: str):
    """x [rows, D] times a bfloat16 kernel whose dimensions are "DF" or "FD": [rows, F], for CPUs.

    XLA:CPU has a bfloat16 matmul that sums in float32, but converts the whole kernel first where x is float32 or has
    one row. Any float32 is the exact sum of three bfloat16 numbers, so a row becomes three, and the result is as
    exact as with a float32 kernel, which takes twice the memory.
    """
    if x.dtype == jnp.float32:
        rounded = partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)  # casts there and back would go
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
    """Root-mean-square norm; casts down *before* multiplying by its weight, as the reference does."""

    eps: float
    param_dtype: str = "bfloat16"

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", declare(ONES, ".", "scale"), x.shape[-1:], self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    eps: float
    param_dtype: str = "bfloat16"

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", declare(ONES, ".", "scale"), x.shape[-1:], self.param_dtype)
        bias = self.param("bias", declare(ZEROS, ".", "bias"), x.shape[-1:], self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, -1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding of x [..., heads, H] by cos, sin [..., H/2] float32, halves paired (not interleaved)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def vision_rope(positions, head_dim: int):
    """cos, sin [..., head_dim/2] of patch positions [..., 2] (row, column): a quarter of the head each, θ 10000."""
    inverse = 10000.0 ** -(np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    angles = positions[..., None].astype(jnp.float32) * inverse
    angles = angles.reshape(*positions.shape[:-1], head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def text_rope(positions, config: TextConfig):
    """cos, sin [B, T, H/2] of M-RoPE ids [3, B, T]: each frequency turns with t, h or w."""
    inverse, scale = rope_frequencies(config)
    axis = frequency_axes(config)
    angles = jnp.moveaxis(positions.astype(jnp.float32)[axis], 0, -1) * inverse
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def frequency_axes(config: TextConfig) -> np.ndarray:
    """[H/2] which of (t, h, w) each frequency turns with, `mrope_section` of each: in chunks, or interleaved."""
    if config.rope == "sections":
        return np.repeat(np.arange(3), config.mrope_section)
    axes = np.zeros(config.head_dim // 2, int)  # t, h, w, t, h, w, … until h or w is used up, then t
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

    def dim_of(rotations):  # the frequency that turns this often within the original context (eq. 17)
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return half * math.log(turns) / math.log(config.rope_theta)

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), config.head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    inverse = inverse * (1 - ramp) + inverse / yarn.factor * ramp
    scale = yarn.attention_factor
    if scale is None:
        scale = 0.1 * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0
    return inverse.astype(np.float32), float(scale)
