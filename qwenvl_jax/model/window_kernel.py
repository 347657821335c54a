"""Attention within windows from the product that makes q, k and v: in plain XLA, and on TPUs by a kernel.

The kernel reads that product once and writes the result once. XLA's blocks are the reference and the backward pass;
on TPUs they move ten times as much, because heads of 80 are padded and rotated around in memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwenvl_jax.model.attention import attention
from qwenvl_jax.model.layers import precision, rotate
from qwenvl_jax.sharding import on_shards

BLOCKS_PER_STEP = 4  # blocks at a time, which fit a TPU's vector memory in float32 too


def window_attention(qkv, cos, sin, windows, *, heads: int, slots: int):
    """Rotary embedding, and attention within equal `windows`, each of which lies in one block of `slots`.

    qkv [R, P, 3E]; cos, sin [R, P, H/2] float32; windows [R, P] int32, with P a multiple of `slots`. Returns [R, P, E].
    """
    whole, sizes = (qkv, cos, sin, windows), dict(heads=heads, slots=slots)
    kernels = {} if qkv.dtype == jnp.float16 else {"tpu": partial(kernel, **sizes)}  # TPUs know no float16
    return jax.lax.platform_dependent(*whole, **kernels, default=partial(plain, **sizes))


def plain(qkv, cos, sin, windows, *, heads: int, slots: int):
    """As `window_attention`, in XLA."""
    R, P, width = qkv.shape
    qkv = qkv.reshape(R, P, 3, heads, -1)
    q, k, v = rotate(qkv[:, :, 0], cos, sin), rotate(qkv[:, :, 1], cos, sin), qkv[:, :, 2]
    q, k, v, windows = (a.reshape(R * P // slots, slots, *a.shape[2:]) for a in (q, k, v, windows))
    return attention(q, k, v, windows, causal=False).reshape(R, P, width // 3)


def kernel(qkv, cos, sin, windows, *, heads: int, slots: int, interpret: bool = False):
    """As `window_attention`, by a Pallas kernel for TPUs. interpret: on any machine, slowly, to compare."""
    return on_shards(partial(_kernel, heads, slots, interpret), (qkv, cos, sin, windows), ("RP.",) * 3 + ("RP",), 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kernel(heads, slots, interpret, qkv, cos, sin, windows):
    R, P, width = qkv.shape
    blocks = R * P // slots
    step = next(n for n in range(min(BLOCKS_PER_STEP, blocks), 0, -1) if blocks % n == 0)

    def rows(columns):
        return pl.BlockSpec((step * slots, columns), lambda i: (i, 0))

    out = pl.pallas_call(
        partial(_blocks, heads=heads),
        grid=(blocks // step,),
        in_specs=[
            rows(width),
            rows(cos.shape[-1]),
            rows(cos.shape[-1]),
            pl.BlockSpec((step, 1, slots), lambda i: (i, 0, 0)),
        ],
        out_specs=rows(width // 3),
        out_shape=jax.ShapeDtypeStruct((R * P, width // 3), qkv.dtype),
        interpret=interpret,
        name="window_attention",  # plan/hlo.py knows it by this
    )(*(a.reshape(R * P, -1) for a in (qkv, cos, sin)), windows.reshape(blocks, 1, slots))
    return out.reshape(R, P, width // 3)


def _forward(heads, slots, interpret, *inputs):
    return _kernel(heads, slots, interpret, *inputs), inputs


def _backward(heads, slots, interpret, inputs, gradient):
    *inputs, windows = inputs
    _, pull = jax.vjp(lambda *a: plain(*a, windows, heads=heads, slots=slots), *inputs)
    return *pull(gradient), None


_kernel.defvjp(_forward, _backward)


def _blocks(qkv_ref, cos_ref, sin_ref, windows_ref, out_ref, *, heads: int):
    """Some blocks: qkv [rows, 3E], cos and sin [rows, H/2], windows [blocks, 1, slots] → [rows, E]."""
    blocks, _, slots = windows_ref.shape
    E = out_ref.shape[1]
    H = E // heads
    cos, sin = cos_ref[...], sin_ref[...]
    windows = windows_ref[...]
    mask = jnp.swapaxes(windows, 1, 2) == windows
    dot = partial(jnp.einsum, precision=precision(out_ref.dtype), preferred_element_type=jnp.float32)

    def rotated(at):
        a, b = (qkv_ref[:, at + n : at + n + H // 2].astype(jnp.float32) for n in (0, H // 2))
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(out_ref.dtype)

    for at in range(0, E, H):
        q, k, v = (
            a.reshape(blocks, slots, H) for a in (rotated(at), rotated(E + at), qkv_ref[:, 2 * E + at : 2 * E + at + H])
        )
        scores = jnp.where(mask, dot("bqh,bkh->bqk", q, k) * H**-0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, -1).astype(out_ref.dtype)
        out_ref[:, at : at + H] = dot("bqk,bkh->bqh", weights, v).reshape(blocks * slots, H).astype(out_ref.dtype)
