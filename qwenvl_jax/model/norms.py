"""RMSNorm and LayerNorm, in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenvl_jax.model.linear import ONES, ZEROS, declare


class RMSNorm(nn.Module):
    """Root-mean-square norm; casts to x's dtype *before* it multiplies by the scale, as the reference does."""

    eps: float
    param_dtype: str = "bfloat16"

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", declare(ONES, ".", "scale"), x.shape[-1:], self.param_dtype)
        return _unit_rms(x.astype(jnp.float32), self.eps).astype(x.dtype) * scale.astype(x.dtype)


def _unit_rms(x, eps: float):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


class LayerNorm(nn.Module):
    eps: float
    param_dtype: str = "bfloat16"

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", declare(ONES, ".", "scale"), x.shape[-1:], self.param_dtype)
        bias = self.param("bias", declare(ZEROS, ".", "bias"), x.shape[-1:], self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = _unit_rms(x32 - jnp.mean(x32, -1, keepdims=True), self.eps)
        return (x32 * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
