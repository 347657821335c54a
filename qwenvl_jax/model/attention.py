"""Attention over segments: in plain XLA, the reference, and on TPUs and GPUs by kernels that keep scores on the chip.

A mask is never an array between modules: it is segment ids, a causal flag, or lengths. Scores are float32.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as tpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from qwenvl_jax.model.cpu_attention import cpu_attention
from qwenvl_jax.model.layers import ATTENDED, precision
from qwenvl_jax.sharding import divides, on_shards

# (All at the top of the file: what is imported while a function is traced makes jax 0.12 trace others again.)
with warnings.catch_warnings():  # as of jax 0.12 this one is called deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        from jax.experimental.pallas.ops.gpu import attention as gpu
    except ImportError:  # plain XLA will do
        gpu = None

# Scores that exist at once, in elements: 256 MB of float32. Longer products go over the queries in chunks,
# which changes nothing in the result, since every query still sees all its keys at once.
MAX_SCORES = 2**26
MIN_TOKENS, TOKEN_MULTIPLE = 512, 128  # the kernels are for so many queries and more, in multiples of a block
SPANS = 8  # of the queries of a long causal product, each against no more keys than its last query sees


def attention(q, k, v, segments, *, causal: bool):
    """softmax(q·kᵀ/√H)·v within equal segments, and if `causal` with no key that comes after the query.

    q [B, T, N, H]; k, v [B, T, K, H] with N a multiple of K; segments [B, T] int32. Returns [B, T, N, H].
    """
    plain = partial(_plain, causal=causal)
    kernels = {}
    if q.dtype == jnp.float32:  # of which the kernels of accelerators would multiply only the upper half
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            kernels["cpu"] = lambda *whole: cpu_attention(*whole, causal)
    elif q.shape[1] >= MIN_TOKENS and q.shape[1] % TOKEN_MULTIPLE == 0:
        if q.dtype == jnp.bfloat16:  # TPUs have no float16
            kernels["tpu"] = partial(splash, causal=causal)
        if gpu:
            kernels["cuda"] = partial(flash, causal=causal)
    whole = q, k, v, segments
    out = jax.lax.platform_dependent(*whole, **kernels, default=plain) if kernels else plain(*whole)
    return checkpoint_name(out, ATTENDED)


def _plain(q, k, v, segments, *, causal: bool):
    """As `attention`, in XLA."""
    B, T, N, _ = q.shape
    chunk = T
    while chunk > 8 and B * N * chunk * T > MAX_SCORES:
        chunk = -(-chunk // 2)
    if not causal or chunk == T:
        return _chunked(q, k, v, segments, chunk, 0 if causal else None)
    width = chunk * -(-T // (chunk * SPANS))
    spans = [
        _chunked(q[:, i:j], k[:, :j], v[:, :j], segments[:, :j], chunk, i)
        for i, j in ((i, i + width) for i in range(0, T, width))
    ]
    return jnp.concatenate(spans, 1)


def _chunked(q, k, v, segments, chunk: int, first: int | None):
    """As `attention`, `chunk` queries at a time; first: the slot of the first query if causal, else None."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q = q.reshape(B, T, K, N // K, H)
    keys = jnp.arange(S)

    # The backward pass computes scores again; kept, they would be most of what a training step holds.
    @partial(jax.checkpoint, prevent_cse=False)
    def block(q, q_segments, index):
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, precision=precision(q.dtype), preferred_element_type=jnp.float32)
        mask = q_segments[:, :, None] == segments[:, None, :]
        if first is not None:
            mask &= index[:, None] >= keys
        scores = jnp.where(mask[:, None, None], scores * H**-0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, -1).astype(v.dtype)
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, precision=precision(v.dtype))

    index = jnp.arange(T) + (first or 0)
    q_segments = segments[:, S - T :]
    if chunk >= T:
        return block(q, q_segments, index).reshape(B, T, N, H)

    chunks = -(-T // chunk)

    def split(x, axis):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, chunks * chunk - T)
        x = jnp.pad(x, pad)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, chunk, *x.shape[axis + 1 :]), axis, 0)

    parts = split(q, 1), split(q_segments, 1), split(index, 0)
    out = jax.lax.map(lambda p: block(*p), parts)  # [chunks, B, chunk, K, G, H]
    return jnp.moveaxis(out, 0, 1).reshape(B, chunks * chunk, N, H)[:, :T]


def splash(q, k, v, segments, *, causal: bool, interpret: bool = False):
    """As `attention`, by jax's Pallas kernel for TPUs, forward and backward; T is a multiple of TOKEN_MULTIPLE.

    interpret: on any machine, slowly, to compare.
    """
    T, H = q.shape[1], q.shape[3]
    size = next(b for b in (512, 384, 256, 128) if T % b == 0)
    sizes = tpu.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    mask = (masks.CausalMask if causal else masks.FullMask)((T, T))

    def kernel(q, k, v, segments):
        heads = masks.MultiHeadMask([mask] * q.shape[2])
        row = tpu.make_splash_mha(heads, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
        heads_first = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
        with jax.named_scope("causal" if causal else "full"):  # for who reads the compiled program
            out = jax.vmap(lambda q, k, v, s: row(q, k, v, tpu.SegmentIds(s, s)))(*heads_first, segments)
        return jnp.swapaxes(out, 1, 2)

    return _on_shards(kernel, q, k, v, segments)


def flash(q, k, v, segments, *, causal: bool, interpret: bool = False):
    """As `splash`, by jax's Pallas kernel for GPUs."""

    def kernel(q, k, v, segments):
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))  # it knows no grouped queries
        with jax.named_scope("causal" if causal else "full"):
            return gpu.mha(q, k, v, segments, sm_scale=q.shape[-1] ** -0.5, causal=causal, interpret=interpret)

    return _on_shards(kernel, q, k, v, segments)


def _on_shards(kernel, q, k, v, segments):
    # Heads are split only if those of k are too, so that they still match.
    heads = divides("K", k.shape[2])
    dims = ("BTNH", "BTKH", "BTKH", "BT") if heads else ("BT.H", "BT.H", "BT.H", "BT")
    return on_shards(kernel, (q, k, v, segments), dims, 0)


def decode_attention(q, k, v, lengths):
    """One query a row against its cache. q [B, 1, N, H]; k, v [B, K, S, H]; lengths [B] live slots → [B, 1, N, H]."""
    B, _, N, H = q.shape
    K, S = k.shape[1:3]
    q = q.reshape(B, K, N // K, H)
    scores = jnp.einsum("BKGH,BKSH->BKGS", q, k, precision=precision(q.dtype), preferred_element_type=jnp.float32)
    live = jnp.arange(S) < lengths[:, None]
    scores = jnp.where(live[:, None, None], scores * H**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("BKGS,BKSH->BKGH", weights, v, precision=precision(v.dtype)).reshape(B, 1, N, H)
