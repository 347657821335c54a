"""Attention over segments: in plain XLA, the reference, and on TPUs by a kernel that keeps scores on the chip.

A mask is never an array between modules: it is segment ids, a causal flag, or lengths. Scores are float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from qwenvl_jax.model.layers import precision
from qwenvl_jax.sharding import activation_sharding

# Scores that exist at once, in elements: 256 MB of float32. Longer products go over the queries in chunks,
# which changes nothing in the result, since every query still sees all its keys at once.
MAX_SCORES = 2**26
FEWEST, LANES = 512, 128  # the kernel is for so many queries and more, in multiples of the vector lanes
SPANS = 8  # of the queries of a long causal product, each against no more keys than its last query sees


def attention(q, k, v, q_segments, kv_segments, *, causal: bool):
    """softmax(q·kᵀ/√H)·v within equal segments.

    q [B, T, N, H]; k, v [B, S, K, H] with N a multiple of K; q_segments [B, T] and kv_segments [B, S] int32.
    `causal` compares slot indices, so T and S must then be the same slots. Returns [B, T, N, H].
    """
    whole = q, k, v, q_segments, kv_segments
    plain = partial(_plain, causal=causal)
    if q.shape[1] < FEWEST or q.shape[1] % LANES or k.shape[1] % LANES:
        return plain(*whole)
    return jax.lax.platform_dependent(*whole, tpu=partial(splash, causal=causal), default=plain)


def _plain(q, k, v, q_segments, kv_segments, *, causal: bool):
    """As `attention`, in XLA."""
    B, T, N, _ = q.shape
    chunk = T
    while chunk > 8 and B * N * chunk * k.shape[1] > MAX_SCORES:
        chunk = -(-chunk // 2)
    if not causal or chunk == T:
        return _chunked(q, k, v, q_segments, kv_segments, chunk, 0 if causal else None)
    width = chunk * -(-T // (chunk * SPANS))
    spans = [
        _chunked(q[:, i:j], k[:, :j], v[:, :j], q_segments[:, i:j], kv_segments[:, :j], chunk, i)
        for i, j in ((i, i + width) for i in range(0, T, width))
    ]
    return jnp.concatenate(spans, 1)


def _chunked(q, k, v, q_segments, kv_segments, chunk: int, first: int | None):
    """As `attention`, `chunk` queries at a time; first: the slot of the first query if causal, else None."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q = q.reshape(B, T, K, N // K, H)
    keys = jnp.arange(S)

    # The backward pass computes scores again; kept, they would be most of what a training step holds.
    @partial(jax.checkpoint, prevent_cse=False)
    def block(q, segments, index):
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, precision=precision(q.dtype), preferred_element_type=jnp.float32)
        mask = segments[:, :, None] == kv_segments[:, None, :]
        if first is not None:
            mask &= index[:, None] >= keys
        scores = jnp.where(mask[:, None, None], scores * H**-0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, -1).astype(v.dtype)
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, precision=precision(v.dtype))

    index = jnp.arange(T) + (first or 0)
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


def splash(q, k, v, q_segments, kv_segments, *, causal: bool, interpret: bool = False):
    """As `attention`, by jax's Pallas kernel for TPUs, forward and backward; T and S are multiples of LANES.

    interpret: on any machine, slowly, to compare.
    """
    mesh = jax.sharding.get_abstract_mesh()
    one = partial(_splash, causal=causal, interpret=interpret)
    if mesh.empty or mesh.size == 1:
        return one(q, k, v, q_segments, kv_segments)
    # XLA cannot split a kernel by itself. Heads are split only if those of k are too, so that they still match.
    K = k.shape[2]
    heads = activation_sharding("K", (K,), mesh).shard_shape((K,)) != (K,)
    dims = ("BTNH", "BSKH", "BSKH", "BT", "BS") if heads else ("BT.H", "BS.H", "BS.H", "BT", "BS")
    whole = q, k, v, q_segments, kv_segments
    specs = tuple(activation_sharding(d, a.shape, mesh).spec for d, a in zip(dims, whole, strict=True))
    return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*whole)


def _splash(q, k, v, q_segments, kv_segments, *, causal: bool, interpret: bool):
    (_, T, N, H), S = q.shape, k.shape[1]
    rows, columns = (next(b for b in (512, 384, 256, 128) if n % b == 0) for n in (T, S))
    sizes = kernels.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    mask = (masks.CausalMask if causal else masks.FullMask)((T, S))
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * N), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
    heads_first = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    with jax.named_scope("causal" if causal else "full"):  # for who reads the compiled program
        out = jax.vmap(lambda q, k, v, a, b: kernel(q, k, v, kernels.SegmentIds(a, b)))(
            *heads_first, q_segments, kv_segments
        )
    return jnp.swapaxes(out, 1, 2)


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
