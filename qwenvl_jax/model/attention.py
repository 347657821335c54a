"""Attention over segments: plain XLA is the reference; TPUs and GPUs have kernels that keep the scores on the chip.

No mask array passes between modules, only segment ids, a causal flag, or lengths. Scores are float32.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as tpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from qwenvl_jax.model.kernels.cpu import INT8_BLOCK, cached_scores, cached_sums, cpu_attention
from qwenvl_jax.model.linear import precision
from qwenvl_jax.model.scan import ATTENDED
from qwenvl_jax.sharding import current_mesh, divides, on_shards
from qwenvl_jax.types import Int8

# Imported here, not in `flash`: an import during tracing makes jax 0.12 trace other functions again.
with warnings.catch_warnings():  # jax 0.12 calls this module deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        from jax.experimental.pallas.ops.gpu import attention as gpu
    except ImportError:  # GPUs then use plain XLA
        gpu = None

# Scores in memory at once (256 MB of float32). Longer prompts are computed in chunks of queries.
MAX_SCORES = 2**26
MIN_TOKENS, TOKEN_MULTIPLE = 512, 128  # the kernels take at least so many tokens, in multiples of a block
SPANS = 8  # long causal attention is cut into up to SPANS query ranges; each reads keys up to its own last query


def attention(q, k, v, segments, *, causal: bool):
    """softmax(q·kᵀ/√H)·v within equal segments; with `causal`, a query sees no later key.

    q [B, T, N, H]; k, v [B, T, K, H] with N a multiple of K; segments [B, T] int32. Returns [B, T, N, H].
    """
    plain = partial(_plain, causal=causal)
    kernels = {}
    if q.dtype == jnp.float32:  # the kernels for accelerators would multiply it in bfloat16 or tf32
        if current_mesh() is None:
            kernels["cpu"] = lambda *args: cpu_attention(*args, causal)
    elif q.shape[1] >= MIN_TOKENS and q.shape[1] % TOKEN_MULTIPLE == 0:
        if q.dtype == jnp.bfloat16:  # TPUs have no float16
            kernels["tpu"] = partial(splash, causal=causal)
        if gpu:
            kernels["cuda"] = partial(flash, causal=causal)
    args = q, k, v, segments
    out = jax.lax.platform_dependent(*args, **kernels, default=plain) if kernels else plain(*args)
    return checkpoint_name(out, ATTENDED)


def _plain(q, k, v, segments, *, causal: bool):
    """`attention` in XLA."""
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
    """`attention`, `chunk` queries at a time; first: the slot of the first query if causal, else None."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q = q.reshape(B, T, K, N // K, H)
    keys = jnp.arange(S)

    # The backward pass computes the scores again: saved, they would take most of a training step's memory.
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
    """`attention` by jax's Pallas kernel for TPUs, with its backward pass; T is a multiple of TOKEN_MULTIPLE.

    interpret: run slowly on any machine, for comparisons.
    """
    T, H = q.shape[1], q.shape[3]
    size = next(b for b in (512, 384, 256, 128) if T % b == 0)
    blocks = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = tpu.BlockSizes(**dict.fromkeys(blocks, size))
    mask = (masks.CausalMask if causal else masks.FullMask)((T, T))

    def kernel(q, k, v, segments):
        heads = masks.MultiHeadMask([mask] * q.shape[2])
        row = tpu.make_splash_mha(heads, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
        heads_first = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
        with jax.named_scope("causal" if causal else "full"):  # plan/hlo.py reads this name
            out = jax.vmap(lambda q, k, v, s: row(q, k, v, tpu.SegmentIds(s, s)))(*heads_first, segments)
        return jnp.swapaxes(out, 1, 2)

    return _on_shards(kernel, q, k, v, segments)


def flash(q, k, v, segments, *, causal: bool, interpret: bool = False):
    """`attention` by jax's Pallas kernel for GPUs."""

    def kernel(q, k, v, segments):
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))  # the kernel has no grouped queries
        with jax.named_scope("causal" if causal else "full"):
            return gpu.mha(q, k, v, segments, sm_scale=q.shape[-1] ** -0.5, causal=causal, interpret=interpret)

    return _on_shards(kernel, q, k, v, segments)


def _on_shards(kernel, q, k, v, segments):
    # Query heads are split only together with KV heads, so that each device holds matching ones.
    dims = ("BTNH", "BTKH", "BTKH", "BT") if divides("K", k.shape[2]) else ("BT.H",) * 3 + ("BT",)
    return on_shards(kernel, (q, k, v, segments), dims, 0)


def decode_attention(q, k, v, lengths):
    """One query per row attends to its KV cache.

    q [B, 1, N, H]; k, v [B, K, S, H], or `Int8`; lengths [B]: live slots. Returns [B, 1, N, H].
    """
    (k, k_scales), (v, v_scales) = (a if isinstance(a, Int8) else (a, None) for a in (k, v))
    B, _, N, H = q.shape
    K, S = k.shape[1:3]
    live = (jnp.arange(S) < lengths[:, None])[:, None, None]
    scores = _with_cache(cached_scores, "BKGH,BKSH->BKGS", q.reshape(B, K, N // K, H), k, lengths) * H**-0.5
    if k_scales is not None:  # scores and weights are scaled, so that no dequantised cache is written
        scores *= k_scales[:, :, None]
    weights = jax.nn.softmax(jnp.where(live, scores, jnp.finfo(jnp.float32).min), -1)
    if v_scales is not None:
        weights *= jnp.where(live, v_scales[:, :, None], 0)
    out = _with_cache(cached_sums, "BKGS,BKSH->BKGH", weights.astype(q.dtype), v, lengths)
    return out.astype(q.dtype).reshape(B, 1, N, H)


def _with_cache(in_blocks, dims: str, x, cache, lengths):
    """x times a cache [B, K, S, H], in float32. in_blocks: the form for CPUs, where XLA converts the cache first."""

    def product(x, cache, lengths):
        dot = partial(jnp.einsum, precision=precision(x.dtype), preferred_element_type=jnp.float32)
        return dot(dims, x, cache.astype(x.dtype))

    if cache.dtype != jnp.int8 or cache.size <= INT8_BLOCK or current_mesh() is not None:
        return product(x, cache, lengths)
    return jax.lax.platform_dependent(x, cache, lengths, cpu=in_blocks, default=product)


def to_int8(x) -> Int8:
    """x [..., H] in int8, each vector with its own scale: its largest element becomes ±127. NaN and ∞ become NaN."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), -1) / 127
    values = x / jnp.where(scales == 0, 1, scales)[..., None]
    return Int8(jnp.clip(jnp.round(values), -127, 127).astype(jnp.int8), scales)


def as_slot(new, cache):
    """Keys or values [B, 1, K, H] of one token as a slot of the cache: [B, K, 1, H] in its dtype, or `Int8`."""
    new = jnp.swapaxes(new, 1, 2)
    return to_int8(new) if isinstance(cache, Int8) else new.astype(cache.dtype)
