"""Rotary embeddings, in float32: M-RoPE with YaRN in the decoder, 2-D positions in the vision tower."""

import math

import jax.numpy as jnp
import numpy as np

from qwenvl_jax.config import TextConfig


def rotate(x, cos, sin):
    """Rotary embedding of x [..., heads, H] by cos, sin [..., H/2] float32; pairs are (i, i + H/2)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def vision_rope(positions, head_dim: int):
    """cos, sin [..., head_dim/2] of patch positions [..., 2] (row, column), head_dim/4 frequencies each; θ 10000."""
    inverse = 10000.0 ** -(np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    angles = positions[..., None].astype(jnp.float32) * inverse
    angles = angles.reshape(*positions.shape[:-1], head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def text_rope(positions, config: TextConfig):
    """cos, sin [B, T, H/2] of M-RoPE positions [3, B, T]: each frequency belongs to t, h or w."""
    inverse, scale = rope_frequencies(config)
    angles = jnp.moveaxis(positions.astype(jnp.float32)[frequency_axes(config)], 0, -1) * inverse
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def frequency_axes(config: TextConfig) -> np.ndarray:
    """[H/2] the axis (0 t, 1 h, 2 w) of each frequency: `mrope_section` of each, in chunks or interleaved."""
    if config.rope == "sections":
        return np.repeat(np.arange(3), config.mrope_section)
    axes = np.zeros(config.head_dim // 2, int)  # t, h, w, t, h, w, …; t takes the places that h and w leave
    for axis in (1, 2):
        axes[axis : 3 * config.mrope_section[axis] : 3] = axis
    return axes


def rope_frequencies(config: TextConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies [H/2] float32 and the factor on cos and sin; YaRN (arXiv:2309.00071) if configured."""
    half = config.head_dim // 2
    inverse = config.rope_theta ** -(np.arange(half) / half)
    yarn = config.yarn
    if yarn is None:
        return inverse.astype(np.float32), 1.0

    def dim_of(rotations):  # the frequency that makes so many turns within the original context (eq. 17)
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return half * math.log(turns) / math.log(config.rope_theta)

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), config.head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    inverse = inverse * (1 - ramp) + inverse / yarn.factor * ramp
    scale = yarn.attention_factor
    if scale is None:
        scale = 0.1 * math.log(max(yarn.factor, 1)) + 1
    return inverse.astype(np.float32), float(scale)
