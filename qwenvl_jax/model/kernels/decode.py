"""A decode step's attention on TPUs: writes the new token into the KV cache in place and reads live blocks only.

XLA instead writes 32 rows one after the other, and reads every slot of the bucket for every row.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwenvl_jax.model.linear import precision
from qwenvl_jax.sharding import divides, on_shards

BLOCK = 2**17  # elements of k (and of v) per grid step; with fewer, the step's overhead exceeds its reading
TILE = 16  # slots written at once: a bfloat16 tile of the TPU's memory


def decode_kernel(q, k, v, k_cache, v_cache, lengths, *, interpret: bool = False):
    """Puts k, v at slot lengths[b] of the cache; q attends to that slot and all before it.

    q [B, 1, N, H]; k, v [B, 1, K, H]; k_cache, v_cache [B, K, S, H]; H a multiple of 128.
    Returns (attended [B, 1, N, H], k_cache, v_cache). interpret: run slowly on any machine, for comparisons.
    """
    # Query heads are split only together with KV heads, so that each device holds matching ones.
    split = divides("K", k.shape[2])
    dims = ("BTNH", "BTKH", "BTKH", "BKSH", "BKSH", "B") if split else ("BT.H",) * 3 + ("B.SH",) * 2 + ("B",)
    args = q, k, v, k_cache, v_cache, lengths
    return on_shards(partial(_on_one_device, interpret=interpret), args, dims, (0, 3, 4))


def block_slots(K: int, S: int, H: int) -> int:
    """Slots per block, in whole tiles: as many as BLOCK holds, or fewer (at least half) if those divide S."""
    most = min(max(BLOCK // (K * H * TILE), 1), -(-S // TILE)) * TILE
    return next((n for n in range(most, most // 2, -TILE) if S % n == 0), most)


def cache_block(slots: int, b, j, lengths):
    """The block of a cache [B, K, S, H] for grid step (b, j). Past the row's last live block, it stays that block:
    Pallas fetches a block only when its index changes."""
    return b, 0, jnp.minimum(j, jax.lax.div(lengths[b], slots)), 0


def _on_one_device(q, k, v, k_cache, v_cache, lengths, *, interpret: bool):
    B, K, S, H = k_cache.shape
    G, slots = q.shape[2] // K, block_slots(K, S, H)
    q = q.reshape(B, K, G, H)
    k, v = (jnp.swapaxes(new, 1, 2).astype(k_cache.dtype) for new in (k, v))

    def row(rows):
        return pl.BlockSpec((1, K, rows, H), lambda b, j, lengths: (b, 0, 0, 0))

    block = pl.BlockSpec((1, K, slots, H), partial(cache_block, slots))
    tile = pl.BlockSpec((1, K, TILE, H), lambda b, j, lengths: (b, 0, jax.lax.div(lengths[b], TILE), 0))
    out, k_cache, v_cache = pl.pallas_call(
        partial(_kernel, slots=slots),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, -(-S // slots)),
            in_specs=[row(G), row(1), row(1), block, block],
            out_specs=[row(G), tile, tile],
            scratch_shapes=[pltpu.VMEM((K, G, n), jnp.float32) for n in (1, 1, H)],
        ),
        # Otherwise XLA copies a small cache to vector memory and back.
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), *(pltpu.HBM(a.shape, a.dtype) for a in (k_cache, v_cache))],
        input_output_aliases={4: 1, 5: 2},  # input 0 is the prefetched lengths
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(  # with full caches
            flops=4 * q.size * S,
            transcendentals=q.size // H * S,
            bytes_accessed=2 * (k_cache.nbytes + k.nbytes * TILE + k.nbytes + q.nbytes),
        ),
        interpret=interpret,
        name="decode_attention",
    )(jnp.minimum(lengths, S - 1), q, k, v, k_cache, v_cache)  # a full row overwrites its last slot, as in XLA
    return out.reshape(B, 1, -1, H), k_cache, v_cache


def _kernel(lengths, q, k_new, v_new, k, v, out, k_tile, v_tile, top, total, weighted, *, slots: int):
    """One row, one block of its cache. The online softmax's state: `top` [K, G, 1], the largest score so far;
    `total` [K, G, 1], the sum of weights relative to it; `weighted` [K, G, H], the sum of weighted values."""
    b, j = pl.program_id(0), pl.program_id(1)
    length = lengths[b]
    product = partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=jnp.float32)
    scale = q.shape[-1] ** -0.5

    @pl.when(j == 0)
    def _():  # the new token, not in the cache yet
        top[...] = product("KGH,KTH->KGT", q[0], k_new[0]) * scale
        total[...] = jnp.ones_like(total)
        weighted[...] = jnp.broadcast_to(v_new[0].astype(jnp.float32), weighted.shape)

    @pl.when(j * slots < length)
    def _():
        live = length - j * slots
        scores = product("KGH,KSH->KGS", q[0], k[0]) * scale
        scores = jnp.where(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2) < live, scores, -jnp.inf)
        new_top = jnp.maximum(top[...], jnp.max(scores, -1, keepdims=True))
        weights, rescale = jnp.exp(scores - new_top), jnp.exp(top[...] - new_top)
        # Dead slots may hold NaN, and a zero weight times NaN is NaN.
        values = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape[1:], 1) < live, v[0], 0)
        top[...] = new_top
        total[...] = total[...] * rescale + jnp.sum(weights, -1, keepdims=True)
        weighted[...] = weighted[...] * rescale + product("KGS,KSH->KGH", weights.astype(values.dtype), values)

    @pl.when(j == jax.lax.div(length, slots))
    def _():
        out[0] = (weighted[...] / total[...]).astype(out.dtype)
        at = length - j * slots
        within = jax.lax.rem(at, TILE)  # `%` and `//` query the TPU's generation, which fails without a TPU
        start = pl.multiple_of(at - within, TILE)
        for tile, cache, new in ((k_tile, k, k_new), (v_tile, v, v_new)):
            there = jax.lax.broadcasted_iota(jnp.int32, tile.shape[1:], 1) == within
            tile[0] = jnp.where(there, new[0], cache[0, :, pl.ds(start, TILE)])
