"""One token a row against its cache on TPUs: written in place and attended to in one pass, over live blocks only.

XLA writes 32 rows one after the other, and reads of every row all slots that the bucket has.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwenvl_jax.model.layers import precision
from qwenvl_jax.sharding import divides, on_shards

BLOCK = 2**17  # elements of k, and of v, that are read at a time: of fewer, the reading costs less than the step
TILE = 16  # slots that are written at once: memory is laid out in tiles of so many, of bfloat16


def decode_kernel(q, k, v, k_cache, v_cache, lengths, *, interpret: bool = False):
    """Puts k, v [B, 1, K, H] at slot lengths[b] of k_cache, v_cache [B, K, S, H], and attends with q [B, 1, N, H]
    to that slot and those before it: (attended [B, 1, N, H], k_cache, v_cache). H is a multiple of the 128 lanes.

    interpret: on any machine, slowly, to compare.
    """
    # Heads are split only if those of k are too, so that they still match.
    heads = divides("K", k.shape[2])
    dims = ("BTNH", "BTKH", "BTKH", "BKSH", "BKSH", "B") if heads else ("BT.H",) * 3 + ("B.SH",) * 2 + ("B",)
    args = q, k, v, k_cache, v_cache, lengths
    return on_shards(partial(_one, interpret=interpret), args, dims, (0, 3, 4))


def block_slots(K: int, S: int, H: int) -> int:
    """Slots of a block, whole tiles: as many as BLOCK holds, or up to half as many if those divide S."""
    most = min(max(BLOCK // (K * H * TILE), 1), -(-S // TILE)) * TILE
    return next((n for n in range(most, most // 2, -TILE) if S % n == 0), most)


def cache_block(slots: int, b, j, lengths):
    """Which block of a cache [B, K, S, H] step (b, j) takes: after the row's last live one, that one again, so that
    nothing is fetched."""
    return b, 0, jnp.minimum(j, jax.lax.div(lengths[b], slots)), 0


def _one(q, k, v, k_cache, v_cache, lengths, *, interpret: bool):
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
        # Left to itself, XLA brings a small cache to vector memory as a whole, and back.
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), *(pltpu.HBM(a.shape, a.dtype) for a in (k_cache, v_cache))],
        input_output_aliases={4: 1, 5: 2},  # the scalars count
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(  # with full caches
            flops=4 * q.size * S,
            transcendentals=q.size // H * S,
            bytes_accessed=2 * (k_cache.nbytes + k.nbytes * TILE + k.nbytes + q.nbytes),
        ),
        interpret=interpret,
        name="decode_attention",
    )(jnp.minimum(lengths, S - 1), q, k, v, k_cache, v_cache)  # as an update does, a full row overwrites its last slot
    return out.reshape(B, 1, -1, H), k_cache, v_cache


def _kernel(lengths, q, k_new, v_new, k, v, out, k_tile, v_tile, most, total, weighted, *, slots: int):
    """One row, one block of its cache. `most`, `total` [K, G, 1] and `weighted` [K, G, H] are the softmax so far: the
    largest score, the sum of weights relative to it, and that of weighted values."""
    b, j = pl.program_id(0), pl.program_id(1)
    length = lengths[b]
    product = partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=jnp.float32)
    scale = q.shape[-1] ** -0.5

    @pl.when(j == 0)
    def _():  # the new token, which the cache does not hold yet
        most[...] = product("KGH,KTH->KGT", q[0], k_new[0]) * scale
        total[...] = jnp.ones_like(total)
        weighted[...] = jnp.broadcast_to(v_new[0].astype(jnp.float32), weighted.shape)

    @pl.when(j * slots < length)
    def _():
        live = length - j * slots
        scores = product("KGH,KSH->KGS", q[0], k[0]) * scale
        scores = jnp.where(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2) < live, scores, -jnp.inf)
        now = jnp.maximum(most[...], jnp.max(scores, -1, keepdims=True))
        weights, old = jnp.exp(scores - now), jnp.exp(most[...] - now)
        # A weight of zero is not enough: dead slots may hold anything, NaN too.
        values = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape[1:], 1) < live, v[0], 0)
        most[...] = now
        total[...] = total[...] * old + jnp.sum(weights, -1, keepdims=True)
        weighted[...] = weighted[...] * old + product("KGS,KSH->KGH", weights.astype(values.dtype), values)

    @pl.when(j == jax.lax.div(length, slots))
    def _():
        out[0] = (weighted[...] / total[...]).astype(out.dtype)
        at = length - j * slots
        within = jax.lax.rem(at, TILE)  # `%` and `//` ask which TPU it is, which is not known without one
        start = pl.multiple_of(at - within, TILE)
        for tile, cache, new in ((k_tile, k, k_new), (v_tile, v, v_new)):
            there = jax.lax.broadcasted_iota(jnp.int32, tile.shape[1:], 1) == within
            tile[0] = jnp.where(there, new[0], cache[0, :, pl.ds(start, TILE)])
