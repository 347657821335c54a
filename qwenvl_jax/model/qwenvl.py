"""The whole model as pure functions of (config, params, arrays), which everything else composes.

Arrays of another shape than the docstrings state raise AssertionError while the function is traced.
"""

from functools import partial
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenvl_jax.config import Config
from qwenvl_jax.model import decoder, vision
from qwenvl_jax.model.attention import to_int8
from qwenvl_jax.model.decoder import embed
from qwenvl_jax.model.norms import RMSNorm
from qwenvl_jax.model.vision import encode_vision
from qwenvl_jax.types import Batch, Cache

__all__ = ["decode", "embed", "encode_vision", "forward", "hidden", "parts", "prefill"]


class Part(NamedTuple):
    """A module whose parameters form one subtree."""

    module: nn.Module
    group: str  # "llm", "vision" or "merger"
    layers: int = 0  # length of the stack; 0: not stacked
    arrays: tuple = ()  # shapes of the arrays that it is called with
    attend: tuple = ()  # a decoder block is also called with a function


def parts(config: Config) -> dict[str, Part]:
    """Every module that has parameters, by its place in the tree."""
    t, v, dtype = config.text, config.vision, config.dtype
    shape = jax.ShapeDtypeStruct
    matrix = partial(decoder.VocabMatrix, param_dtype=dtype)
    x, rope = shape((1, 1, t.hidden_size), dtype), shape((1, 1, t.head_dim // 2), jnp.float32)
    out = {
        "decoder/embed_tokens": Part(matrix((t.vocab_size, t.hidden_size), "V D", "embedding", "embedding"), "llm"),
        "decoder/layers": Part(
            decoder.DecoderBlock(config), "llm", t.num_hidden_layers, (x, rope, rope), (lambda q, k, v: (q, None),)
        ),
        "decoder/norm": Part(RMSNorm(t.rms_norm_eps, dtype), "llm", arrays=(x,)),
    }
    if not t.tie_word_embeddings:
        out["decoder/lm_head"] = Part(matrix((t.hidden_size, t.vocab_size), "D V", "head", "kernel"), "llm")
    W = v.block_slots
    x, rope = shape((1, W, v.hidden_size), dtype), shape((1, W, v.hidden_size // v.num_heads // 2), jnp.float32)
    patches = shape((1, W, v.patch_values), dtype)
    out["vision/patch_embed"] = Part(vision.patch_embed(config), "vision", arrays=(patches,))
    arrays = x, rope, rope, shape((1, W), jnp.int32)
    out["vision/blocks"] = Part(vision.VisionBlock(config, False), "vision", v.depth, arrays)
    return out | {"vision/merger": Part(vision.Merger(config), "merger", arrays=(x,))}


def forward(config: Config, params: dict, batch: Batch):
    """Logits [B, T, V] float32 of a whole batch. Segment 0 marks padding, which may be anywhere."""
    return decoder.unembed(config, params, hidden(config, params, batch))


def hidden(config: Config, params: dict, batch: Batch, *, remat: bool = False):
    """The decoder's output [B, T, D] before the final norm; remat: the backward pass keeps only the blocks' inputs."""
    chex.assert_equal_shape((batch.tokens, batch.segments, batch.visual_index, batch.positions[0]))
    visual = [encode_vision(config, params, v, remat=remat) for v in batch.vision]
    x = embed(config, params, batch.tokens, batch.visual_index, jnp.concatenate(visual) if visual else None)
    x, _ = decoder.run_layers(config, params, x, batch.positions, batch.segments, lambda k, v: None, remat=remat)
    return x


def prefill(config: Config, params: dict, embeds, positions, segments, slots: int, *, int8: bool = False):
    """Reads right-padded prompts: (logits [B, V] float32 after each row's last live token, their Cache).

    embeds [B, T, D]; positions [3, B, T]; segments [B, T], 0 = padding; slots ≥ T: the cache's length S.
    int8: the cache is in int8. The prompt itself attends to exact keys and values.
    """
    B, T = segments.shape
    chex.assert_shape((embeds, positions), ((B, T, config.text.hidden_size), (3, B, T)))

    def collect_kv(k, v):
        kv = tuple(jnp.swapaxes(a, 1, 2) for a in (k, v))
        if int8:
            kv = tuple(map(to_int8, kv))
        return jax.tree.map(lambda a: jnp.pad(a, [(0, 0), (0, 0), (0, slots - T), *[(0, 0)] * (a.ndim - 3)]), kv)

    x, (k, v) = decoder.run_layers(config, params, embeds, positions, segments, collect_kv)
    lengths = jnp.maximum(jnp.sum(segments != 0, 1, dtype=jnp.int32), 1)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], 1)
    deltas = jnp.max(jnp.where(segments != 0, positions, -1), (0, 2)).astype(jnp.int32) + 1 - lengths
    layers = range(config.text.num_hidden_layers)
    k, v = ([jax.tree.map(lambda a, l=l: a[l], stack) for l in layers] for stack in (k, v))
    cache = Cache(k, v, lengths, deltas)
    return decoder.unembed(config, params, last)[:, 0], cache


def decode(config: Config, params: dict, tokens, cache: Cache):
    """One more token per row: tokens [B] → (logits [B, V] float32, the cache one slot longer; donate the old one)."""
    chex.assert_equal_shape((tokens, cache.lengths, cache.deltas))
    x, cache = decoder.step(config, params, tokens, cache)
    return decoder.unembed(config, params, x)[:, 0], cache
