"""The decoder with M-RoPE: one block, scanned over the stack for whole sequences, looped for a token.

A decode step indexes the stacked weights statically and keeps one cache array a layer: scanned, XLA copies
every layer's weights out of the stack and the caches with them, which triples the bytes a step moves.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenvl_jax.config import Config
from qwenvl_jax.model.attention import attention, decode_attention
from qwenvl_jax.model.decode_kernel import decode_kernel
from qwenvl_jax.model.layers import (
    NORMAL,
    Linear,
    RMSNorm,
    checkpointed,
    declare,
    is_narrow,
    narrow_product,
    precision,
    rotate,
    text_rope,
    unpack_bfloat16,
)
from qwenvl_jax.sharding import constrain, divides, restore_heads, spread_heads
from qwenvl_jax.types import Cache


class DecoderBlock(nn.Module):
    """x [B, T, D] → (x, state). `attend(q, k, v)` returns the attended values and whatever the caller keeps."""

    config: Config

    @nn.compact
    def __call__(self, x, cos, sin, attend):
        c = self.config.text
        linear = partial(Linear, param_dtype=self.config.dtype)
        norm = partial(RMSNorm, c.rms_norm_eps, self.config.dtype)
        heads = (*x.shape[:2], -1, c.head_dim)
        NH, KH = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

        h = norm(name="input_layernorm")(x)
        q = linear(NH, "D NH", c.qkv_bias, name="q_proj")(h).reshape(heads)
        k = linear(KH, "D KH", c.qkv_bias, name="k_proj")(h).reshape(heads)
        v = linear(KH, "D KH", c.qkv_bias, name="v_proj")(h).reshape(heads)
        if c.qk_norm:
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        attended, state = attend(*spread_heads(rotate(q, cos, sin), rotate(k, cos, sin), v))
        attended = restore_heads(attended, c.num_attention_heads, c.num_key_value_heads)
        x = x + linear(c.hidden_size, "NH D", False, name="o_proj")(attended.reshape(*x.shape[:2], -1))

        h = norm(name="post_attention_layernorm")(x)
        gate = linear(c.intermediate_size, "D F", False, name="gate_proj")(h)
        h = constrain(jax.nn.silu(gate) * linear(c.intermediate_size, "D F", False, name="up_proj")(h), "BTF")
        return constrain(x + linear(c.hidden_size, "F D", False, name="down_proj")(h), "BTD"), state


class VocabMatrix(nn.Module):
    """A matrix that is looked up or multiplied as it is: the token embedding and the output head."""

    shape: tuple[int, int]
    dims: str
    role: str
    leaf: str
    param_dtype: str

    @nn.compact
    def __call__(self):
        return self.param(self.leaf, declare(NORMAL, self.dims, self.role), self.shape, self.param_dtype)


@jax.named_scope("embed_tokens")
def embed(config: Config, params: dict, tokens, visual_index, visual=None):
    """Token embeddings [B, T, D], with row `visual_index[b, t]` of `visual` [X, D] where that is not −1."""
    x = _rows(params["decoder"]["embed_tokens"]["embedding"], tokens).astype(config.dtype)
    if visual is not None:
        picked = visual[jnp.maximum(visual_index, 0)].astype(x.dtype)
        x = jnp.where((visual_index >= 0)[..., None], picked, x)
    return constrain(x, "BTD")


def _rows(table, tokens):
    """table [V, D] at tokens [B, T]. One token is looked up twice: XLA would make of it a slice of the table, and
    of a table that is split over GPUs one that is whole first, in every step."""
    if tokens.size == 1:
        return table[jnp.broadcast_to(tokens, (2, 1))][:1]
    if divides("d", table.shape[1]):
        # All rows, of a share of the width: neither the table nor its gradient is ever whole.
        return constrain(table[constrain(tokens, "b.")], "b.d")
    return table[tokens]


def run_layers(config: Config, params: dict, x, positions, segments, collect_kv, *, remat: bool = False):
    """All layers over x [B, T, D]: the last layer's output, before the final norm, and every layer's `collect_kv(k, v)`
    stacked (k, v [B, T, K, H]). With `remat`, a backward pass keeps only each layer's input."""
    cos, sin = text_rope(positions, config.text)
    block = DecoderBlock(config)

    def attend(q, k, v):
        return attention(q, k, v, segments, causal=True), collect_kv(k, v)

    def layer(x, weights):
        return block.apply({"params": unpack_bfloat16(weights)}, x, cos, sin, attend)

    return jax.lax.scan(checkpointed(layer, remat), x, params["decoder"]["layers"])


def step(config: Config, params: dict, tokens, cache: Cache):
    """One token a row: tokens [B] → (hidden [B, 1, D] before the final norm, the cache one slot longer).

    The token is written at slot `lengths`, and its M-RoPE position is `lengths + deltas` on all three axes.
    """
    x = embed(config, params, tokens[:, None], None)
    positions = jnp.broadcast_to((cache.lengths + cache.deltas)[None, :, None], (3, len(tokens), 1))
    cos, sin = text_rope(positions, config.text)
    block = DecoderBlock(config)
    keys, values = [], []

    def attend(layer, q, k, v):
        whole = q, k, v, cache.k[layer], cache.v[layer], cache.lengths
        if config.text.head_dim % 128 == 0 and q.dtype != jnp.float16:  # heads fill the vector lanes, which know it not
            attended, k, v = jax.lax.platform_dependent(*whole, tpu=decode_kernel, default=write_and_attend)
        else:
            attended, k, v = write_and_attend(*whole)
        keys.append(k)
        values.append(v)
        return attended, None

    for l in range(config.text.num_hidden_layers):
        x, _ = block.apply({"params": layer_weights(params, l)}, x, cos, sin, lambda *qkv, l=l: attend(l, *qkv))
    return x, Cache(keys, values, cache.lengths + 1, cache.deltas)


def layer_weights(params: dict, l: int) -> dict:
    """Weights of layer `l`, sliced from a stack, or held apart already (`cpu_layouts` in infer/programs.py)."""
    layers = params["decoder"]["layers"]
    return layers[l] if isinstance(layers, list) else jax.tree.map(lambda w: w[l], layers)


def write_and_attend(q, k, v, k_cache, v_cache, lengths):
    """As `decode_kernel`, in XLA."""
    k_cache, v_cache = write(k_cache, k, lengths), write(v_cache, v, lengths)
    return decode_attention(q, k_cache, v_cache, lengths + 1), k_cache, v_cache


def write(cache, new, lengths):
    """Puts new [B, 1, K, H] at slot lengths[b] of every row of cache [B, K, S, H], in place where donated.

    One update a row: a batched update is a scatter, which copies the whole cache on GPUs and on sharded TPUs.
    """
    new = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
    if len(cache) == 1:
        return jax.lax.dynamic_update_slice(cache, new, (0, 0, lengths[0], 0))

    def row(b, cache):
        return jax.lax.dynamic_update_slice(cache, jax.lax.dynamic_slice_in_dim(new, b, 1), (b, 0, lengths[b], 0))

    new = jax.lax.optimization_barrier(new)  # libtpu 0.0.42 fails to compile a loop over more rows without it
    return jax.lax.fori_loop(0, len(cache), row, cache)


def unembed(config: Config, params: dict, x):
    """Final norm and output head: x [..., D] → logits [..., V] float32."""
    return logits(final_norm(config, params, x), *head(config, params))


def final_norm(config: Config, params: dict, x):
    return RMSNorm(config.text.rms_norm_eps, config.dtype).apply({"params": params["decoder"]["norm"]}, x)


def head(config: Config, params: dict) -> tuple[jax.Array, str]:
    """The output head and its dimensions: "VD" where it is the token embedding, "DV" where it is its own."""
    p = params["decoder"]
    return (p["embed_tokens"]["embedding"], "VD") if config.text.tie_word_embeddings else (p["lm_head"]["kernel"], "DV")


@jax.named_scope("lm_head")
def logits(x, head, dims: str):
    """x [..., D], after the final norm, times the head: [..., V] float32."""

    def product(x, head):
        exact = dict(precision=precision(x.dtype), preferred_element_type=jnp.float32)
        return jnp.einsum(f"...D,{dims}->...V", x, head.astype(x.dtype), **exact)

    rows = x.reshape(-1, x.shape[-1])
    if not is_narrow(rows, head):
        return product(x, head)

    def narrow(x, head):
        y = narrow_product(rows.astype(jnp.float32), head, dims.replace("V", "F"))
        return y.reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, head, cpu=narrow, default=product)
