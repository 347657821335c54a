"""Rounds kernels to 8 or 4 bits: to nearest, or with activation-aware scales (AWQ, arXiv:2306.00978).

A channel of a Linear's input that is large makes the rounding of its row of the kernel count more. AWQ multiplies that
row by a scale before it is rounded, and what makes the channel divides by it: a norm, or the Linear before.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwenvl_jax.config import Quantised, TextConfig

BITS = {"int4": 4, "int8": 8}
EXPONENTS = 20  # of the mean input, from 0 (to nearest) to below 1, among which the scales are searched
QUIET = 0.01  # of the mean of all channels: the records may not show what a quieter channel can do
CLIPS = 10  # ranges of a group, from the whole to about half of it

# The Linears of a decoder block that share an input, and what makes it: a Linear or a norm. Each is folded into what
# makes its input before that is rounded itself.
SHARED = {
    "o_proj": (("o_proj",), "v_proj"),
    "down_proj": (("down_proj",), "up_proj"),
    "attention": (("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    "mlp": (("gate_proj", "up_proj"), "post_attention_layernorm"),
}
LINEARS = tuple(name for linears, _ in SHARED.values() for name in linears)
UNCLIPPED = ("q_proj", "k_proj")  # their largest weights decide what attention looks at


class Rounded(NamedTuple):
    """(kernel − zeros) · scales, with the rows of a group sharing a row of scales and zeros."""

    kernel: jax.Array  # [in, out] int8, within 4 or 8 bits
    scales: jax.Array  # [in/group, out] float32, each a number of the stored dtype
    zeros: jax.Array | None  # [in/group, out] int8

    def dense(self):
        """The kernel that is meant: [in, out] float32."""
        q = self.kernel.reshape(*self.scales.shape[:1], -1, self.kernel.shape[1]).astype(jnp.float32)
        q = q if self.zeros is None else q - self.zeros[:, None]
        return (q * self.scales[:, None]).reshape(self.kernel.shape)


class Inputs(NamedTuple):
    """What is kept of the inputs of a Linear, over all tokens."""

    size: jax.Array  # [in] float32: mean absolute value
    moments: jax.Array  # [in/group, group, group] float32: mean products of the channels of a group


@partial(jax.jit, static_argnames=("form", "dtype"))
def to_nearest(kernel, form: Quantised, dtype: str, clip=1.0) -> Rounded:
    """Rounds a kernel [in, out] float32. Without clip, no weight moves by more than half of its scale.

    dtype: that of the stored scales, which are rounded up to it.
    clip: the part of each group's range that is kept, one number or [in/group, out].
    """
    top = 2 ** (BITS[form.dtype] - 1)
    w = kernel.reshape(-1, form.group or len(kernel), kernel.shape[1])
    if form.zeros:
        low, high = jnp.minimum(w.min(1), 0) * clip, jnp.maximum(w.max(1), 0) * clip
        scales = _round_up((high - low) / (2 * top - 1), dtype)
        zeros = jnp.clip(jnp.round(-low / scales), 0, 2 * top - 1) - top
    else:
        scales = _round_up(jnp.abs(w).max(1) * clip / (top - 0.5), dtype)
        zeros = jnp.zeros_like(scales)
    q = jnp.clip(jnp.round(w / scales[:, None]) + zeros[:, None], -top, top - 1).astype(jnp.int8)
    return Rounded(q.reshape(kernel.shape), scales, zeros.astype(jnp.int8) if form.zeros else None)


def _round_up(scales, dtype: str):
    """The next number of a dtype, as float32: otherwise the largest weight could move by more than half a scale."""
    info = jnp.finfo(dtype)
    # Not by casts to the dtype and back, which XLA removes.
    to_dtype = partial(jax.lax.reduce_precision, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    scales = jnp.maximum(scales, info.tiny)
    near = to_dtype(scales)
    return jnp.where(near < scales, to_dtype(near * (1 + 0.75 * 2.0**-info.nmant)), near)


def measure(x, group: int) -> Inputs:
    """x [tokens, in] float32 → what is kept of it, as sums in place of means."""
    parts = x.reshape(len(x), -1, group)
    moments = jnp.einsum("tgi,tgj->gij", parts, parts, precision="highest")
    return Inputs(jnp.abs(x).sum(0), moments)


def error(inputs: Inputs, change):
    """The mean squared change of a Linear's output [in/group, out] with a change of its kernel [in, out], per group."""
    parts = change.reshape(*inputs.moments.shape[:2], -1)
    return jnp.sum(parts * jnp.einsum("gij,gjo->gio", inputs.moments, parts, precision="highest"), 1)


@partial(jax.jit, static_argnames=("form", "dtype", "copies"))
def search_scales(kernels, inputs: Inputs, form: Quantised, dtype: str, copies: tuple[int, int] = (1, 1)):
    """The scales [in] by which the rows of kernels that share an input are multiplied before they are rounded.

    copies: (heads, copies) if the input repeats heads, as with grouped queries: all copies get the same scales.
    """
    size = _shared(inputs.size, copies)
    size = jnp.maximum(size, QUIET * size.mean())

    def scaled(exponent):
        s = size**exponent
        return s / jnp.sqrt(s.max() * s.min())

    def loss(exponent):
        s = scaled(exponent)[:, None]
        changes = (to_nearest(w * s, form, dtype).dense() / s - w for w in kernels)
        return sum(error(inputs, change).sum() for change in changes)

    exponents = jnp.arange(EXPONENTS) / EXPONENTS
    return scaled(exponents[jnp.argmin(jax.lax.map(loss, exponents))])


def _shared(size, copies: tuple[int, int]):
    heads, n = copies
    means = size.reshape(heads, n, -1).mean(1, keepdims=True)
    return jnp.broadcast_to(means, (heads, n, means.shape[-1])).reshape(-1)


@partial(jax.jit, static_argnames=("form", "dtype"))
def search_clip(kernel, inputs: Inputs, form: Quantised, dtype: str):
    """The part of each group's range to keep [in/group, out], so that the output changes least."""

    def losses(clip):
        return error(inputs, to_nearest(kernel, form, dtype, clip).dense() - kernel)

    clips = 1 - jnp.arange(CLIPS) / (2 * CLIPS)
    return clips[jnp.argmin(jax.lax.map(losses, clips), 0)]


def scale_inputs(inputs: Inputs, scales) -> Inputs:
    """The inputs divided by scales [in]."""
    parts = scales.reshape(inputs.moments.shape[:2])
    return Inputs(inputs.size / scales, inputs.moments / (parts[:, :, None] * parts[:, None, :]))


def fold(layer: dict, linears: tuple[str, ...], source: str, scales, config: TextConfig) -> dict:
    """A layer that computes the same, with the rows of `linears` multiplied by scales [in], `source` divided by them.

    layer: {module: {leaf: array}}. v_proj has one head where o_proj's input has its copies.
    """
    out = dict(layer)
    for name in linears:
        out[name] = layer[name] | {"kernel": layer[name]["kernel"] * scales[:, None]}
    if source == "v_proj":
        scales = scales.reshape(config.num_key_value_heads, -1, config.head_dim)[:, 0].reshape(-1)
    out[source] = {leaf: array / scales for leaf, array in out[source].items()}
    return out


@partial(jax.jit, static_argnames=("config", "form", "dtype"))
def scale_layer(layer: dict, inputs: dict[str, Inputs], form: Quantised, dtype: str, config: TextConfig):
    """(the layer with all scales folded in, the inputs of its Linears then), by the names of SHARED."""
    out = {}
    for name, (linears, source) in SHARED.items():
        kernels = tuple(layer[linear]["kernel"] for linear in linears)
        heads = config.num_key_value_heads
        copies = (heads, config.num_attention_heads // heads) if source == "v_proj" else (1, 1)
        scales = search_scales(kernels, inputs[name], form, dtype, copies)
        layer = fold(layer, linears, source, scales, config)
        out[name] = scale_inputs(inputs[name], scales)
    return layer, out


@partial(jax.jit, static_argnames=("form", "dtype"))
def round_layer(layer: dict, inputs: dict[str, Inputs] | None, form: Quantised, dtype: str) -> dict[str, Rounded]:
    """Every Linear of the layer, rounded to nearest; with inputs, within the ranges that they prefer."""
    out = {}
    for name, (linears, _) in SHARED.items():
        for linear in linears:
            kernel, clip = layer[linear]["kernel"], 1.0
            if inputs is not None and linear not in UNCLIPPED:
                clip = search_clip(kernel, inputs[name], form, dtype)
            out[linear] = to_nearest(kernel, form, dtype, clip)
    return out


@jax.jit
def weight_errors(layer: dict, rounded: dict[str, Rounded]) -> dict:
    """The changes of weights, relative to their size, by the names of SHARED."""

    def squares(kernels):
        return sum(jnp.sum(kernel * kernel) for kernel in kernels)

    out = {}
    for name, (linears, _) in SHARED.items():
        kernels = [layer[linear]["kernel"] for linear in linears]
        changes = [rounded[linear].dense() - kernel for linear, kernel in zip(linears, kernels, strict=True)]
        out[name] = jnp.sqrt(squares(changes) / squares(kernels))
    return out
