"""float32 attention on CPUs: blocks of scores that fit the cache, with an online softmax.

XLA:CPU runs a 2-D matmul several times faster than a batched one. It also allocates large temporaries in every call,
page by page. So the loop takes one head, one block of queries and one block of keys at a time (FlashAttention-2,
arXiv:2307.08691). It skips blocks of keys that share no segment with the queries, or come after them.

Short rows and windows are computed for all heads at once: with few scores, a loop costs more than it saves.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwenvl_jax.model.scan import ATTENDED

BLOCK_SCORES = 2**17  # scores in a block: half a megabyte
MIN_BLOCK = 64  # least slots in a block
DENSE_SCORES = 2**22  # up to so many scores (16 MB), all heads are computed at once
INT8_BLOCK = 2**20  # values of an int8 cache that are converted at a time: 4 MB of float32
_EXACT = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
_NO_SEGMENT = int(jnp.iinfo(jnp.int32).min)
_MASKED = float(jnp.finfo(jnp.float32).min)
# Otherwise XLA:CPU fuses slices and transposes into the matmuls and reads them element by element.
_unfused = jax.lax.optimization_barrier


def cpu_attention(q, k, v, segments, causal: bool):
    """`attention` of attention.py, for float32."""
    B, T, N, _ = q.shape
    return (_dense if B * N * T * T <= DENSE_SCORES else _blocked)(q, k, v, segments, causal)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _dense(q, k, v, segments, causal):
    return _dense_forward(q, k, v, segments, causal)[0]


def _dense_forward(q, k, v, segments, causal):
    (B, T, _, H), K = q.shape, k.shape[2]
    q, k, v = _unfused((_heads(q * H**-0.5, K), _heads(k, K), _heads(v, K)))
    scores = _dense_scores(q, k, segments, causal)
    top = jnp.max(scores, -1, keepdims=True)
    e = jnp.exp(scores - top)
    total = jnp.sum(e, -1, keepdims=True)
    out, logsumexp = checkpoint_name((_batched(e, v, 2, 1) / total, top + jnp.log(total)), ATTENDED)
    return _unblocks(out[:, None], B, T, T), (q, k, v, segments, out, logsumexp)


def _dense_backward(causal, saved, g):
    q, k, v, segments, out, logsumexp = saved
    (B, T, _, H), K = g.shape, len(k) // len(g)
    g = _unfused(_heads(g, K))
    p = jnp.exp(_dense_scores(q, k, segments, causal) - logsumexp)
    ds = p * (_batched(g, v, 2, 2) - jnp.sum(out * g, -1, keepdims=True))
    dq = _batched(ds, k, 2, 1) * H**-0.5
    return *(_unblocks(a[:, None], B, T, T) for a in (dq, _batched(ds, q, 1, 1), _batched(p, g, 1, 1))), None


_dense.defvjp(_dense_forward, _dense_backward)


def _dense_scores(q, k, segments, causal: bool):
    B, T = segments.shape
    mask = segments[:, :, None] == segments[:, None]
    if causal:
        mask &= jnp.arange(T)[:, None] >= jnp.arange(T)
    scores = _batched(q, k, 2, 2).reshape(B, -1, T, T)
    return jnp.where(mask[:, None], scores, _MASKED).reshape(len(q), -1, T)


def _batched(a, b, a_dim: int, b_dim: int):
    dims = (((a_dim,), (b_dim,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST)


def _heads(a, heads: int):
    """[B, T, N, H] → [B·heads, N/heads · T, H]."""
    return _blocks(a, heads, 1, a.shape[1])[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q, k, v, segments, causal):
    return _blocked_forward(q, k, v, segments, causal)[0]


def _dot(a, b, dims=(1, 0)):
    return jax.lax.dot_general(a, b, (((dims[0],), (dims[1],)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def _blocks(a, heads: int, n: int, c: int):
    """[B, T, N, H] → [B·heads, n blocks, N/heads · c, H], padded with zeros."""
    B, T, N, H = a.shape
    a = jnp.pad(a, ((0, 0), (0, n * c - T), (0, 0), (0, 0))).reshape(B, n, c, heads, N // heads, H)
    return jnp.transpose(a, (0, 3, 1, 4, 2, 5)).reshape(B * heads, n, -1, H)


def _unblocks(a, B: int, T: int, c: int):
    """The inverse of `_blocks`."""
    heads, n, H = len(a) // B, a.shape[1], a.shape[3]
    a = a.reshape(B, heads, n, -1, c, H)
    return jnp.transpose(a, (0, 2, 4, 1, 3, 5)).reshape(B, n * c, -1, H)[:, :T]


def _plan(q, k, segments, causal: bool):
    """Cuts a row into n blocks of c slots: (n, c, by_row, key slots [n, c], query slots [n, G · c]).

    by_row: segments of keys and of queries; for each query block, its first key block and the one after its last.
    """
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    n = -(-T // max(MIN_BLOCK, int((BLOCK_SCORES / G) ** 0.5)))
    c = -(-T // n)
    segments = jnp.pad(segments, ((0, 0), (0, n * c - T)), constant_values=_NO_SEGMENT).reshape(-1, n, c)
    ordered = jnp.where(segments > 0, segments, jnp.iinfo(jnp.int32).max)  # padding comes last
    low, high = jnp.min(ordered, -1), jnp.max(ordered, -1)
    meet = (low[:, :, None] <= high[:, None]) & (high[:, :, None] >= low[:, None])
    first = jnp.argmax(meet, -1).astype(jnp.int32)
    last = n - jnp.argmax(meet[..., ::-1], -1).astype(jnp.int32)
    if causal:
        last = jnp.broadcast_to(jnp.arange(1, n + 1, dtype=jnp.int32), first.shape)
    slots = jnp.arange(n * c, dtype=jnp.int32).reshape(n, c)
    by_row = segments, jnp.tile(segments, (1, 1, G)), first, last
    return n, c, by_row, slots, jnp.tile(slots, (1, G))


def _masked(scores, q_segments, k_segments, q_slots, k_slots, causal: bool):
    mask = q_segments[:, None] == k_segments
    if causal:
        mask &= q_slots[:, None] >= k_slots
    return jnp.where(mask, scores, _MASKED)


def _blocked_forward(q, k, v, segments, causal):
    (B, T, _, H), K = q.shape, k.shape[2]
    n, c, by_row, k_slots, q_slots = _plan(q, k, segments, causal)

    def head(part):
        q, k, v, row = part
        k_segments, q_segments, first, last = (a[row] for a in by_row)

        def queries(i):
            q_i, q_segments_i, q_slots_i = _unfused((q[i], q_segments[i], q_slots[i]))

            def scores(j):
                k_segments_j, k_slots_j = _unfused((k_segments[j], k_slots[j]))
                return _masked(_dot(q_i, k[j], (1, 1)), q_segments_i, k_segments_j, q_slots_i, k_slots_j, causal)

            def start(j):
                s = scores(j)
                top = jnp.max(s, -1, keepdims=True)
                e = jnp.exp(s - top)
                return _dot(e, v[j]), top, jnp.sum(e, -1, keepdims=True)

            def more(j, carry):
                out, top, total = carry
                s = scores(j)
                new = jnp.maximum(top, jnp.max(s, -1, keepdims=True))
                e, rescale = jnp.exp(s - new), jnp.exp(top - new)
                return out * rescale + _dot(e, v[j]), new, total * rescale + jnp.sum(e, -1, keepdims=True)

            out, top, total = start(first[i])
            if n > 1:
                out, top, total = jax.lax.fori_loop(first[i] + 1, last[i], more, (out, top, total))
            return out / total, top + jnp.log(total)

        return jax.lax.map(queries, jnp.arange(n)) if n > 1 else tuple(a[None] for a in queries(0))

    parts = _blocks(q * H**-0.5, K, n, c), _blocks(k, K, n, c), _blocks(v, K, n, c), jnp.arange(B * K) // K
    out, logsumexp = jax.lax.map(head, parts)
    out = _unblocks(out, B, T, c)
    return out, (q, k, v, segments, out, logsumexp)


def _blocked_backward(causal, saved, g):
    q, k, v, segments, out, logsumexp = saved
    (B, T, _, H), K = q.shape, k.shape[2]
    n, c, by_row, k_slots, q_slots = _plan(q, k, segments, causal)

    def head(part):
        q, k, v, g, logsumexp, delta, row = part
        k_segments, q_segments, first, last = (a[row] for a in by_row)

        def queries(carry, i):
            block = _unfused((q[i], g[i], logsumexp[i], delta[i], q_segments[i], q_slots[i]))
            q_i, g_i, logsumexp_i, delta_i, segments_i, slots_i = block

            def gradients(j):
                k_j, v_j, segments_j, slots_j = _unfused((k[j], v[j], k_segments[j], k_slots[j]))
                s = _masked(_dot(q_i, k_j, (1, 1)), segments_i, segments_j, slots_i, slots_j, causal)
                p = jnp.exp(s - logsumexp_i)
                ds = p * (_dot(g_i, v_j, (1, 1)) - delta_i)
                return _dot(ds, k_j), _unfused(_dot(q_i, ds, (0, 0))).T, _unfused(_dot(g_i, p, (0, 0))).T

            def more(j, carry):
                dq, dk, dv = carry
                a, b, d = gradients(j)
                return dq + a, dk.at[j].add(b), dv.at[j].add(d)

            if n == 1:
                dq, dk, dv = gradients(0)
                return (dk[None], dv[None]), dq
            dq, dk, dv = jax.lax.fori_loop(first[i], last[i], more, (jnp.zeros_like(q_i), *carry))
            return (dk, dv), dq

        if n == 1:
            (dk, dv), dq = queries(None, 0)
            return dq[None], dk, dv
        (dk, dv), dq = jax.lax.scan(queries, (jnp.zeros((n, c, H)),) * 2, jnp.arange(n))
        return dq, dk, dv

    delta = jnp.sum(out * g, -1, keepdims=True)
    arrays = (_blocks(a, K, n, c) for a in (q * H**-0.5, k, v, g))
    dq, dk, dv = jax.lax.map(head, (*arrays, logsumexp, _blocks(delta, K, n, c), jnp.arange(B * K) // K))
    return _unblocks(dq, B, T, c) * H**-0.5, _unblocks(dk, B, T, c), _unblocks(dv, B, T, c), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def cached_scores(q, k, lengths):
    """q [B, K, G, H] times int8 keys [B, K, S, H]: [B, K, G, S] float32. Only blocks with live slots are read."""
    slots, blocks = _cache_blocks(k, lengths)

    def block(i, scores):
        start, keys = _cache_block(k, slots, i, q.dtype)
        part = jnp.einsum("BKGH,BKSH->BKGS", q, keys, **_EXACT)
        return jax.lax.dynamic_update_slice_in_dim(scores, part, start, 3)

    return jax.lax.fori_loop(0, blocks, block, jnp.zeros((*q.shape[:3], k.shape[2]), jnp.float32))


def cached_sums(weights, v, lengths):
    """weights [B, K, G, S], 0 for dead slots, times int8 values [B, K, S, H]: [B, K, G, H] float32."""
    slots, blocks = _cache_blocks(v, lengths)

    def block(i, total):
        start, values = _cache_block(v, slots, i, weights.dtype)
        part = jax.lax.dynamic_slice_in_dim(weights, start, slots, 3)
        part = jnp.where(start + jnp.arange(slots) >= i * slots, part, 0)  # the last block may overlap the one before
        return total + jnp.einsum("BKGS,BKSH->BKGH", part, values, **_EXACT)

    return jax.lax.fori_loop(0, blocks, block, jnp.zeros((*weights.shape[:3], v.shape[3]), jnp.float32))


def _cache_blocks(cache, lengths):
    """(slots per block, the number of blocks with live slots)."""
    B, K, S, H = cache.shape
    slots = min(S, max(INT8_BLOCK // (B * K * H), MIN_BLOCK))
    return slots, -(-jnp.max(lengths) // slots)


def _cache_block(cache, slots: int, i, dtype):
    """(the first slot of block i, its values)."""
    start = jnp.minimum(i * slots, cache.shape[2] - slots)
    return start, jax.lax.dynamic_slice_in_dim(cache, start, slots, 2).astype(dtype)
