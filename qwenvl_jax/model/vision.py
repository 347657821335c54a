"""The vision tower: lanes of patches in, visual tokens in the decoder's width out.

Blocks attend to whole frames, or within windows except at a few layers; the config says which norm and MLP they have.
"""

from functools import partial
from itertools import groupby

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.config import Config
from qwenvl_jax.model.attention import attention
from qwenvl_jax.model.layers import LayerNorm, Linear, RMSNorm, checkpointed, rotate, unpack_bfloat16, vision_rope
from qwenvl_jax.model.window_kernel import window_attention
from qwenvl_jax.sharding import constrain
from qwenvl_jax.types import VisionBatch

NORM_EPS = 1e-6  # not in any config file; fixed in the reference towers

NORMS = {"rms": RMSNorm, "layer": LayerNorm}
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def _norm(config: Config, name: str):
    return NORMS[config.vision.norm](NORM_EPS, config.dtype, name=name)


def patch_embed(config: Config) -> Linear:
    """The reference's convolution over one patch, as a product: [R, P, C] → [R, P, E]."""
    return Linear(config.vision.hidden_size, "C E", use_bias=False, role="conv", param_dtype=config.dtype)


def normalise(patches, config: Config):
    """uint8 [..., C] → float32 [..., C], bit for bit what the reference computes on the host."""
    v = config.vision
    x = patches.astype(jnp.float32).reshape(*patches.shape[:-1], v.in_channels, -1)
    # XLA replaces division by a scalar with a product by its rounded reciprocal, constant or not; adding 0·x
    # hides that the divisor is the same everywhere, so these stay true divisions.
    mean, std = np.float32(v.image_mean)[:, None], np.float32(v.image_std)[:, None]
    return ((x / (255 + 0 * x) - mean) / (std + 0 * x)).reshape(patches.shape)


class VisionBlock(nn.Module):
    """One transformer block over x [R, P, E]; `segments` [R, P] says who attends to whom."""

    config: Config
    windowed: bool

    @nn.compact
    def __call__(self, x, cos, sin, segments):
        c, v = self.config, self.config.vision
        linear = partial(Linear, param_dtype=c.dtype)
        R, P, E = x.shape

        qkv = linear(3 * E, "E .", name="qkv")(_norm(c, "norm1")(x))
        if self.windowed:  # every window lies inside one block: attention is dense over small blocks
            attended = window_attention(qkv, cos, sin, segments, heads=v.num_heads, slots=v.block_slots)
        else:
            qkv = qkv.reshape(R, P, 3, v.num_heads, -1)
            q, k = rotate(qkv[:, :, 0], cos, sin), rotate(qkv[:, :, 1], cos, sin)
            attended = attention(q, k, qkv[:, :, 2], segments, causal=False).reshape(R, P, E)
        x = x + linear(E, ". E", name="proj")(attended)

        h, act, width = _norm(c, "norm2")(x), ACTIVATIONS[v.hidden_act], v.intermediate_size
        if v.gated_mlp:
            h = act(linear(width, "E .", name="gate_proj")(h)) * linear(width, "E .", name="up_proj")(h)
            x = x + linear(E, ". E", name="down_proj")(h)
        else:
            x = x + linear(E, ". E", name="fc2")(act(linear(width, "E .", name="fc1")(h)))
        return constrain(x, "RPE")


class Merger(nn.Module):
    """[R, P, E] → [R, M, D]: every four neighbouring patches become one visual token."""

    config: Config

    @nn.compact
    def __call__(self, x):
        c, v = self.config, self.config.vision
        width = v.hidden_size * v.merge_unit
        x = _norm(c, "norm")(x).reshape(x.shape[0], -1, width)
        x = jax.nn.gelu(Linear(width, "U .", param_dtype=c.dtype, name="fc1")(x), approximate=False)
        return Linear(v.out_hidden_size, ". D", param_dtype=c.dtype, name="fc2")(x)


def layer_groups(config: Config) -> tuple[int, list[bool]]:
    """How often a pattern of blocks repeats, and the pattern: for each of its blocks, is it windowed?

    The official towers with windows repeat (7 windowed, 1 full) four times; an irregular tower is one long pattern.
    """
    v = config.vision
    windowed = [not v.is_full_attention(i) for i in range(v.depth)]
    period = next(p for p in range(1, v.depth + 1) if v.depth % p == 0 and windowed == windowed[:p] * (v.depth // p))
    return v.depth // period, windowed[:period]


def encode_vision(config: Config, params: dict, vision: VisionBatch, *, remat: bool = False):
    """Visual tokens [R·M, D] of the lanes; rows of empty slots are meaningless.

    `params` is the whole model's tree. The stack is scanned a pattern at a time, so that compile time does
    not grow with depth and a group's blocks see their weights by static index. With `remat`, a backward pass
    keeps only each block's input.
    """
    p = params["vision"]
    x = normalise(constrain(vision.patches, "RPC"), config).astype(config.dtype)
    x = patch_embed(config).apply({"params": p["patch_embed"]}, x)
    rope = vision_rope(vision.positions, config.vision.hidden_size // config.vision.num_heads)
    repeats, pattern = layer_groups(config)

    def run(windowed: bool):
        segments = vision.windows if windowed else vision.frames
        block = VisionBlock(config, windowed)

        def layer(x, weights):
            return block.apply({"params": unpack_bfloat16(weights)}, x, *rope, segments), None

        return checkpointed(layer, remat)

    def group(x, weights):
        start = 0
        for windowed, blocks in groupby(pattern):
            stop = start + len(list(blocks))
            x, _ = jax.lax.scan(run(windowed), x, jax.tree.map(lambda w, i=start, j=stop: w[i:j], weights))
            start = stop
        return x, None

    stacked = jax.tree.map(lambda w: w.reshape(repeats, len(pattern), *w.shape[1:]), p["blocks"])
    x, _ = jax.lax.scan(group, constrain(x, "RPE"), stacked)
    x = Merger(config).apply({"params": p["merger"]}, x)
    return constrain(x.reshape(-1, x.shape[-1]), "XD")
