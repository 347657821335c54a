"""A decode step's attention on TPUs: writes the new token into the KV cache in place and reads live blocks only.

XLA instead writes 32 rows one after the other, and reads every slot of the bucket for every row.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwenvl_jax.model.attention import as_slot
from qwenvl_jax.model.linear import precision
from qwenvl_jax.sharding import divides, on_shards
from qwenvl_jax.types import Int8

BLOCK = 2**17  # elements of k (and of v) per grid step; with fewer, the step's overhead exceeds its reading
TILE = 16  # slots written at once: a bfloat16 tile of the TPU's memory. An int8 tile has twice as many
LANES = 128  # scales of an int8 cache are read in multiples of it


def decode_kernel(q, k, v, k_cache, v_cache, lengths, *, interpret: bool = False):
    """Puts k, v at slot lengths[b] of the cache; q attends to that slot and all before it.

    q [B, 1, N, H]; k, v [B, 1, K, H]; k_cache, v_cache [B, K, S, H], or `Int8`; H a multiple of 128.
    Returns (attended [B, 1, N, H], k_cache, v_cache). interpret: run slowly on any machine, for comparisons.
    """
    new, caches = (as_slot(k, k_cache), as_slot(v, v_cache)), (k_cache, v_cache)
    # Query heads are split only together with KV heads, so that each device holds matching ones.
    split = divides("K", k.shape[2])
    of_cache = tuple(("BKSH" if split else "B.SH")[: a.ndim] for a in jax.tree.leaves(caches))
    args, tree = jax.tree.flatten((q, lengths, new, caches))
    first = len(args) - len(of_cache)

    def kernel(*args):
        return tuple(jax.tree.leaves(_on_one_device(*jax.tree.unflatten(tree, args), interpret=interpret)))

    dims = ("BTNH" if split else "BT.H", "B", *of_cache, *of_cache)
    out, *caches = on_shards(kernel, tuple(args), dims, (0, *range(first, len(args))))
    return out, *jax.tree.unflatten(jax.tree.structure((k_cache, v_cache)), caches)


def block_slots(K: int, S: int, H: int, *, int8: bool = False) -> int:
    """Slots per block, in whole tiles: as many as BLOCK holds, or fewer (at least half) if those divide S.

    int8: as many bytes, in multiples of LANES; or all slots, if they are whole tiles.
    """
    block, step = (2 * BLOCK, LANES) if int8 else (BLOCK, TILE)
    most = min(max(block // (K * H * step), 1), -(-S // step)) * step
    if int8 and S <= most and S % (2 * TILE) == 0:
        return S
    return next((n for n in range(most, most // 2, -step) if S % n == 0), most)


def cache_block(slots: int, b, j, lengths):
    """The block of a cache [B, K, S, H] for grid step (b, j). Past the row's last live block, it stays that block:
    Pallas fetches a block only when its index changes."""
    return b, 0, jnp.minimum(j, jax.lax.div(lengths[b], slots)), 0


def _on_one_device(q, lengths, new, caches, *, interpret: bool):
    """new: a slot of each of the two caches, see `as_slot`. Returns (attended [B, 1, N, H], the caches)."""
    (k, v), (k_cache, v_cache) = new, caches
    int8 = isinstance(k_cache, Int8)
    B, K, S, H = (k_cache.values if int8 else k_cache).shape
    G, slots, rows = q.shape[2] // K, block_slots(K, S, H, int8=int8), TILE * (1 + int8)
    q = q.reshape(B, K, G, H)

    def first(b, j, lengths):
        return b, 0, 0, 0

    def written(n, b, j, lengths):
        return b, 0, jax.lax.div(lengths[b], n), 0

    def spec(n, index):
        """Blocks of n slots of keys or values."""
        values = pl.BlockSpec((1, K, n, H), index)
        return Int8(values, pl.BlockSpec((1, K, n), lambda *at: index(*at)[:3])) if int8 else values

    query, new, block = pl.BlockSpec((1, K, G, H), first), spec(1, first), spec(slots, partial(cache_block, slots))
    tile = spec(rows, partial(written, rows))
    if int8:  # TPUs write 128 scales at least; a whole block is little more
        tile = tile._replace(scales=spec(slots, partial(written, slots)).scales)
    new_slots, caches, tiles = map(jax.tree.leaves, ((k, v), (k_cache, v_cache), (tile, tile)))
    moved = [*new_slots, *caches, q, q]  # and the tiles that are written
    n, moved = len(caches), sum(a.nbytes for a in moved)
    moved += B * sum(math.prod(t.block_shape) * a.dtype.itemsize for t, a in zip(tiles, caches, strict=True))
    out, k_cache, v_cache = pl.pallas_call(
        partial(_kernel, slots=slots),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, -(-S // slots)),
            in_specs=[query, new, new, block, block],
            out_specs=[query, tile, tile],
            scratch_shapes=[pltpu.VMEM((K, G, n), jnp.float32) for n in (1, 1, H)],
        ),
        # Otherwise XLA copies a small cache to vector memory and back.
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            *jax.tree.map(lambda a: pltpu.HBM(a.shape, a.dtype), (k_cache, v_cache)),
        ],
        input_output_aliases={2 + n + i: 1 + i for i in range(n)},  # inputs 0 and 1 are the lengths and q
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(  # with full caches
            flops=4 * q.size * S,
            transcendentals=q.size // H * S,
            bytes_accessed=moved,
        ),
        interpret=interpret,
        name="decode_attention",
    )(jnp.minimum(lengths, S - 1), q, k, v, k_cache, v_cache)  # a full row overwrites its last slot, as in XLA
    return out.reshape(B, 1, -1, H), (k_cache, v_cache)


def _kernel(lengths, q, k_new, v_new, k, v, out, k_tile, v_tile, top, total, weighted, *, slots: int):
    """One row, one block of its cache. The online softmax's state: `top` [K, G, 1], the largest score so far;
    `total` [K, G, 1], the sum of weights relative to it; `weighted` [K, G, H], the sum of weighted values."""
    b, j = pl.program_id(0), pl.program_id(1)
    length = lengths[b]
    product = partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=jnp.float32)
    scale = q.shape[-1] ** -0.5

    def scores(k):
        if not isinstance(k, Int8):
            return product("KGH,KSH->KGS", q[0], k[0]) * scale
        return product("KGH,KSH->KGS", q[0], k.values[0].astype(q.dtype)) * (scale * k.scales[0][:, None])

    @pl.when(j == 0)
    def _():  # the new token, not in the cache yet
        top[...] = scores(k_new)
        total[...] = jnp.ones_like(total)
        value = v_new[0] if not isinstance(v, Int8) else v_new.values[0] * v_new.scales[0][:, :, None]
        weighted[...] = jnp.broadcast_to(value.astype(jnp.float32), weighted.shape)

    @pl.when(j * slots < length)
    def _():
        def is_live(shape, dim):
            return jax.lax.broadcasted_iota(jnp.int32, shape, dim) < length - j * slots

        s = scores(k)
        s = jnp.where(is_live(s.shape, 2), s, -jnp.inf)
        new_top = jnp.maximum(top[...], jnp.max(s, -1, keepdims=True))
        weights, rescale = jnp.exp(s - new_top), jnp.exp(top[...] - new_top)
        top[...] = new_top
        total[...] = total[...] * rescale + jnp.sum(weights, -1, keepdims=True)
        # Dead slots may hold NaN, and a zero weight times NaN is NaN.
        if isinstance(v, Int8):
            weights *= jnp.where(is_live(v.scales.shape[1:], 1), v.scales[0], 0)[:, None]
            values = v.values[0].astype(q.dtype)
        else:
            values = jnp.where(is_live(v.shape[1:], 1), v[0], 0)
        weighted[...] = weighted[...] * rescale + product("KGS,KSH->KGH", weights.astype(values.dtype), values)

    @pl.when(j == jax.lax.div(length, slots))
    def _():
        out[0] = (weighted[...] / total[...]).astype(out.dtype)
        at = length - j * slots
        for tile, cache, new in ((k_tile, k, k_new), (v_tile, v, v_new)):
            if isinstance(cache, Int8):
                here = jax.lax.broadcasted_iota(jnp.int32, tile.scales.shape[1:], 1) == at
                tile.scales[0] = jnp.where(here, new.scales[0], cache.scales[0])
                tile, cache, new = tile.values, cache.values, new.values
            rows = tile.shape[2]
            within = jax.lax.rem(at, rows)  # `%` and `//` query the TPU's generation, which fails without a TPU
            start = pl.multiple_of(at - within, rows)
            here = jax.lax.broadcasted_iota(jnp.int32, tile.shape[1:], 1) == within
            tile[0] = jnp.where(here, new[0], cache[0, :, pl.ds(start, rows)])
