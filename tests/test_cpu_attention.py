"""Attention as CPUs compute it, against the plain form, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.model import attention, cpu_attention


def case(T, N, K, H, segments):
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, T, n, H)), jnp.float32) for n in (N, K, K, N))
    ids = {
        "one": np.ones((2, T)),
        "padded": np.arange(T) < np.array([[T], [max(T // 3, 1)]]),
        "packed": np.sort(rng.integers(0, 5, (2, T)), -1)[:, ::-1],
        "shuffled": rng.integers(0, 4, (2, T)),
    }
    return q, k, v, jnp.asarray(ids[segments], jnp.int32), g


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", ["one", "padded", "packed", "shuffled"])
@pytest.mark.parametrize(("T", "N", "K", "H"), [(1, 2, 1, 8), (64, 4, 4, 80), (97, 6, 2, 48), (300, 4, 1, 64)])
def test_equals_the_plain_form(T, N, K, H, segments, causal, at_once, monkeypatch):
    monkeypatch.setattr(cpu_attention, "AT_ONCE", 2**30 if at_once else 0)
    monkeypatch.setattr(cpu_attention, "SCORES", 2**12)  # several blocks, and not of a size that divides T
    monkeypatch.setattr(cpu_attention, "FEWEST", 16)
    q, k, v, ids, g = case(T, N, K, H, segments)
    ours = lambda q, k, v: cpu_attention.cpu_attention(q, k, v, ids, causal)  # noqa: E731
    plain = lambda q, k, v: attention._plain(q, k, v, ids, causal=causal)  # noqa: E731
    (out, pull), (want, want_pull) = (jax.vjp(jax.jit(f), q, k, v) for f in (ours, plain))
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(pull(g), want_pull(g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_cpus_take_it_and_hold_no_square_of_scores():
    q, k, v, ids, _ = case(2048, 8, 2, 64, "one")
    f = lambda q, k, v: jnp.sum(attention.attention(q, k, v, ids, causal=True))  # noqa: E731
    both = jax.jit(jax.value_and_grad(f, (0, 1, 2))).lower(q, k, v).compile()
    assert both.memory_analysis().temp_size_in_bytes < 2 * 8 * 2048 * 2048 * 4 / 2  # half of all scores of this size
    assert "2048,2048" not in both.as_text()
