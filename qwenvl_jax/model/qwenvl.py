"""The whole model as pure functions of (config, params, arrays): the four calls everything else composes."""

from functools import lru_cache

import jax
import jax.numpy as jnp

from qwenvl_jax.config import Config
from qwenvl_jax.model import decoder, vision
from qwenvl_jax.model.decoder import embed
from qwenvl_jax.model.vision import encode
from qwenvl_jax.types import Batch, Cache

__all__ = ["abstract_params", "count_params", "decode", "embed", "encode", "forward", "hidden", "init", "prefill"]


def init(config: Config, key) -> dict:
    """Random parameters: normal(0.02) kernels and embeddings, unit scales, zero biases; layers stacked on L."""
    t, v = config.text, config.vision
    embed_key, layers_key, head_key, patch_key, blocks_key, merger_key = jax.random.split(key, 6)

    def table(key, *shape):
        return 0.02 * jax.random.normal(key, shape, jnp.float32).astype(config.dtype)

    def stack(module, key, depth, *args):
        return jax.vmap(lambda k: module.init(k, *args)["params"])(jax.random.split(key, depth))

    x = jnp.zeros((1, 1, t.hidden_size), config.dtype)
    rope = jnp.zeros((1, 1, t.head_dim // 2), jnp.float32)
    layers = stack(
        decoder.DecoderBlock(config),
        layers_key,
        t.num_hidden_layers,
        x,
        rope,
        rope,
        lambda q, k, v: (q, None),
    )
    tower = {"embed_tokens": {"embedding": table(embed_key, t.vocab_size, t.hidden_size)}, "layers": layers}
    tower["norm"] = {"scale": jnp.ones(t.hidden_size, config.dtype)}
    if not t.tie_word_embeddings:
        tower["lm_head"] = {"kernel": table(head_key, t.hidden_size, t.vocab_size)}

    W = v.block_slots
    patches = jnp.zeros((1, W, v.patch_values), config.dtype)
    x = jnp.zeros((1, W, v.hidden_size), config.dtype)
    rope = jnp.zeros((1, W, v.hidden_size // v.num_heads // 2), jnp.float32)
    segments = jnp.zeros((1, W), jnp.int32)
    eyes = {
        "patch_embed": vision.patch_embed(config).init(patch_key, patches)["params"],
        "blocks": stack(vision.VisionBlock(config, False), blocks_key, v.depth, x, rope, rope, segments),
        "merger": vision.Merger(config).init(merger_key, x)["params"],
    }
    return {"decoder": tower, "vision": eyes}


def abstract_params(config: Config) -> dict:
    """Shapes and dtypes of the parameters (`jax.ShapeDtypeStruct`), without making them."""
    return jax.tree.map(lambda leaf: leaf, _abstract_params(config))  # a tree of its own for each caller


@lru_cache(16)
def _abstract_params(config: Config) -> dict:
    return jax.eval_shape(lambda key: init(config, key), jax.ShapeDtypeStruct((2,), jnp.uint32))


def count_params(config: Config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def forward(config: Config, params: dict, batch: Batch):
    """Logits [B, T, V] float32 of a whole batch; padding anywhere, marked by segment 0."""
    return decoder.unembed(config, params, hidden(config, params, batch))


def hidden(config: Config, params: dict, batch: Batch, *, remat: bool = False):
    """The decoder's output [B, T, D] before the final norm; `remat`: a backward pass keeps only the blocks' inputs."""
    seen = [encode(config, params, v, remat=remat) for v in batch.vision]
    x = embed(config, params, batch.tokens, batch.visual_index, jnp.concatenate(seen) if seen else None)
    x, _ = decoder.full(config, params, x, batch.positions, batch.segments, lambda k, v: None, remat=remat)
    return x


def prefill(config: Config, params: dict, embeds, positions, segments, slots: int):
    """Reads a right-padded prompt: (logits [B, V] float32 after each row's last live token, its Cache).

    embeds [B, T, D]; positions [3, B, T]; segments [B, T], 0 = padding; slots ≥ T: the cache's length S.
    """
    T = segments.shape[1]

    def keep(k, v):
        return tuple(jnp.pad(jnp.swapaxes(a, 1, 2), ((0, 0), (0, 0), (0, slots - T), (0, 0))) for a in (k, v))

    x, (k, v) = decoder.full(config, params, embeds, positions, segments, keep)
    lengths = jnp.maximum(jnp.sum(segments != 0, 1, dtype=jnp.int32), 1)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], 1)
    deltas = jnp.max(jnp.where(segments != 0, positions, -1), (0, 2)).astype(jnp.int32) + 1 - lengths
    layers = range(config.text.num_hidden_layers)
    cache = Cache([k[l] for l in layers], [v[l] for l in layers], lengths, deltas)
    return decoder.unembed(config, params, last)[:, 0], cache


def decode(config: Config, params: dict, tokens, cache: Cache):
    """One more token a row: tokens [B] → (logits [B, V] float32, the cache one slot longer; donate the old one)."""
    x, cache = decoder.step(config, params, tokens, cache)
    return decoder.unembed(config, params, x)[:, 0], cache
