"""Attention backends against plain XLA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.model import attention
from qwenvl_jax.model.kernels import window as window_kernel


def problem(seed: int, B: int, T: int, K: int, G: int, H: int):
    """Random q, k, v, segment ids (some rows end in padding, 0) and weights for the sum of the outputs."""
    rng = np.random.default_rng(seed)
    q, k, v, w = (jnp.asarray(rng.standard_normal((B, T, heads, H)), jnp.float32) for heads in (K * G, K, K, K * G))
    segments = np.sort(rng.integers(1, rng.integers(2, 9), (B, T)), 1)
    segments[rng.random(B) < 0.5, -rng.integers(1, T) :] = 0
    return q, k, v, jnp.asarray(segments, jnp.int32), w


def value_and_grads(attend, q, k, v, segments, w):
    def total(q, k, v, segments, w):
        return jnp.sum(attend(q, k, v, segments) * w)

    return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v, segments, w)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [attention.splash, attention.flash], ids=["tpu", "gpu"])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 2), st.sampled_from([128, 384, 512, 1024]), st.integers(1, 2), st.integers(1, 4)),
    width=st.sampled_from([64, 80, 128]),
    causal=st.booleans(),
)
def test_kernels_equal_plain_attention(kernel, seed, shape, width, causal):
    """Forward and backward; the kernels are interpreted."""
    args = problem(seed, *shape, width)
    got = value_and_grads(partial(kernel, causal=causal, interpret=True), *args)
    want = value_and_grads(partial(attention.attention, causal=causal), *args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(b))))


def test_cpus_get_plain_attention_in_16_bits():
    """float32 has its own form on CPUs (test_cpu_attention.py)."""
    q, k, v, segments, _ = problem(0, 1, attention.MIN_TOKENS, 1, 2, 64)
    q, k, v = (a.astype(jnp.bfloat16) for a in (q, k, v))
    f = jax.jit(lambda *a: attention.attention(*a, segments, causal=True))
    np.testing.assert_array_equal(f(q, k, v), jax.jit(lambda *a: attention._plain(*a, segments, causal=True))(q, k, v))


@pytest.mark.parametrize(("dtype", "kernels"), [("bfloat16", (1, 1)), ("float32", (0, 1)), ("float16", (0, 0))])
def test_tpus_get_kernels_for_what_these_multiply_exactly(dtype, kernels):
    """jax's kernels do not compute in full float32, and TPUs have no float16."""
    q, segments = jax.ShapeDtypeStruct((1, 512, 4, 128), dtype), jax.ShapeDtypeStruct((1, 512), jnp.int32)
    qkv, angles = jax.ShapeDtypeStruct((1, 512, 3 * 128), dtype), jax.ShapeDtypeStruct((1, 512, 32), jnp.float32)
    calls = (
        (partial(attention.attention, causal=True), (q, q, q, segments)),
        (partial(window_kernel.window_attention, heads=2, slots=64), (qkv, angles, angles, segments)),
    )
    texts = [jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).as_text() for f, args in calls]
    assert tuple(int("tpu_custom_call" in text) for text in texts) == kernels
