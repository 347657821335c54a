"""The decoder with M-RoPE: one block. `run_layers` scans it over whole sequences; `step` loops it for one token.

A decode step takes static slices of the stacked weights, and one cache array per layer. In a scan, XLA copies every
layer's weights and caches, which triples the bytes that a step moves.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenvl_jax.config import Config
from qwenvl_jax.model.attention import attention, decode_attention
from qwenvl_jax.model.kernels.decode import decode_kernel
from qwenvl_jax.model.linear import NORMAL, Linear, declare, in_turn, is_narrow, layer_of, narrow_product, precision
from qwenvl_jax.model.norms import RMSNorm
from qwenvl_jax.model.rope import rotate, text_rope
from qwenvl_jax.model.scan import checkpointed, unpack_bfloat16
from qwenvl_jax.sharding import constrain, divides, restore_heads, spread_heads
from qwenvl_jax.types import Cache


class DecoderBlock(nn.Module):
    """x [B, T, D] → (x, state). `attend(q, k, v)` returns the attended values and the state."""

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
    """The token embedding or the output head."""

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


def _rows(embedding, tokens):
    """embedding [V, D] at tokens [B, T]. A single token is looked up twice: XLA lowers one lookup to a slice, and
    gathers an embedding that is split over GPUs before it slices."""
    if tokens.size == 1:
        return embedding[jnp.broadcast_to(tokens, (2, 1))][:1]
    if divides("d", embedding.shape[1]):
        # Each device looks up all rows in its share of the width: no device gathers the embedding or its gradient.
        return constrain(embedding[constrain(tokens, "b.")], "b.d")
    return embedding[tokens]


def run_layers(config: Config, params: dict, x, positions, segments, collect_kv, *, remat: bool = False):
    """All layers over x [B, T, D]: (the output before the final norm, every layer's `collect_kv(k, v)`, stacked).

    k, v [B, T, K, H]. remat: the backward pass keeps only each layer's input.
    """
    cos, sin = text_rope(positions, config.text)
    block = DecoderBlock(config)

    def attend(q, k, v):
        return attention(q, k, v, segments, causal=True), collect_kv(k, v)

    def layer(x, weights):
        return block.apply({"params": unpack_bfloat16(weights)}, x, cos, sin, attend)

    return jax.lax.scan(checkpointed(layer, remat), x, params["decoder"]["layers"])


def step(config: Config, params: dict, tokens, cache: Cache):
    """One token per row: tokens [B] → (hidden [B, 1, D] before the final norm, the cache one slot longer)."""
    x = embed(config, params, tokens[:, None], None)
    positions = jnp.broadcast_to((cache.lengths + cache.deltas)[None, :, None], (3, len(tokens), 1))
    cos, sin = text_rope(positions, config.text)
    block = DecoderBlock(config)
    keys, values = [], []

    def attend(layer, q, k, v):
        args = q, k, v, cache.k[layer], cache.v[layer], cache.lengths
        # The kernel needs 128-wide heads, and TPUs have no float16.
        if config.text.head_dim % 128 == 0 and q.dtype != jnp.float16:
            attended, k, v = jax.lax.platform_dependent(*args, tpu=decode_kernel, default=write_and_attend)
        else:
            attended, k, v = write_and_attend(*args)
        keys.append(k)
        values.append(v)
        return attended, None

    layers = params["decoder"]["layers"]
    for l in range(config.text.num_hidden_layers):
        if isinstance(layers, list):  # of `cpu_layouts` (infer/programs.py)
            weights = layers[l]
        else:
            layers, x = in_turn(layers, x)
            weights = layer_of(layers, l)
        x, _ = block.apply({"params": weights}, x, cos, sin, lambda *qkv, l=l: attend(l, *qkv))
    return x, Cache(keys, values, cache.lengths + 1, cache.deltas)


def write_and_attend(q, k, v, k_cache, v_cache, lengths):
    """`decode_kernel` in XLA."""
    k_cache, v_cache = _write(k_cache, k, lengths), _write(v_cache, v, lengths)
    return decode_attention(q, k_cache, v_cache, lengths + 1), k_cache, v_cache


def _write(cache, new, lengths):
    """Puts new [B, 1, K, H] at slot lengths[b] of every row of cache [B, K, S, H]; in place if it is donated.

    Rows are updated one by one: a batched update is a scatter, which copies the cache on GPUs and sharded TPUs.
    """
    new = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
    if len(cache) == 1:
        return jax.lax.dynamic_update_slice(cache, new, (0, 0, lengths[0], 0))

    def row(b, cache):
        return jax.lax.dynamic_update_slice(cache, jax.lax.dynamic_slice_in_dim(new, b, 1), (b, 0, lengths[b], 0))

    new = jax.lax.optimization_barrier(new)  # without it, libtpu 0.0.42 fails to compile this loop
    return jax.lax.fori_loop(0, len(cache), row, cache)


def unembed(config: Config, params: dict, x):
    """Final norm and output head: x [..., D] → logits [..., V] float32."""
    return logits(final_norm(config, params, x), *head(config, params))


def final_norm(config: Config, params: dict, x):
    return RMSNorm(config.text.rms_norm_eps, config.dtype).apply({"params": params["decoder"]["norm"]}, x)


def head(config: Config, params: dict) -> tuple[jax.Array, str]:
    """The output head and its dimensions: "VD" if it is the tied token embedding, else "DV"."""
    p = params["decoder"]
    return (p["embed_tokens"]["embedding"], "VD") if config.text.tie_word_embeddings else (p["lm_head"]["kernel"], "DV")


@jax.named_scope("lm_head")
def logits(x, head, dims: str):
    """x [..., D], after the final norm, times the head: [..., V] float32."""

    def product(x, head):
        dot = partial(jnp.einsum, precision=precision(x.dtype), preferred_element_type=jnp.float32)
        return dot(f"...D,{dims}->...V", x, head.astype(x.dtype))

    rows = x.reshape(-1, x.shape[-1])
    if not is_narrow(rows, head):
        return product(x, head)

    def narrow(x, head):
        y = narrow_product(rows.astype(jnp.float32), head, dims.replace("V", "F"))
        return y.reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, head, cpu=narrow, default=product)
