"""The CPU form of attention against plain XLA, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.model import attention
from qwenvl_jax.model.kernels import cpu as cpu_attention


def case(T, N, K, H):
    """q, k, v, the output's gradient, and segment ids in several layouts."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, T, n, H)), jnp.float32) for n in (N, K, K, N)]
    ids = {
        "one": np.ones((2, T)),
        "padded": np.arange(T) < np.array([[T], [max(T // 3, 1)]]),
        "packed": np.sort(rng.integers(0, 5, (2, T)), -1)[:, ::-1],
        "shuffled": rng.integers(0, 4, (2, T)),
    }
    return *arrays, {kind: jnp.asarray(x, jnp.int32) for kind, x in ids.items()}


def with_gradients(attend):
    """(the output, the gradients of q, k and v for its gradient g), compiled once for all segment ids."""

    def both(q, k, v, g, ids):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, ids), q, k, v)
        return out, *pull(g)

    return jax.jit(both)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "N", "K", "H"), [(1, 2, 1, 8), (64, 4, 4, 80), (97, 6, 2, 48), (300, 4, 1, 64)])
def test_equals_the_plain_form(T, N, K, H, causal, at_once, monkeypatch):
    monkeypatch.setattr(cpu_attention, "DENSE_SCORES", 2**30 if at_once else 0)
    monkeypatch.setattr(cpu_attention, "BLOCK_SCORES", 2**12)  # several blocks, of a size that does not divide T
    monkeypatch.setattr(cpu_attention, "MIN_BLOCK", 16)
    *arrays, segments = case(T, N, K, H)
    ours = with_gradients(lambda q, k, v, ids: cpu_attention.cpu_attention(q, k, v, ids, causal))
    plain = with_gradients(lambda q, k, v, ids: attention._plain(q, k, v, ids, causal=causal))
    for kind, ids in segments.items():
        (out, *grads), (want, *want_grads) = ours(*arrays, ids), plain(*arrays, ids)
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5, err_msg=kind)
        for a, b in zip(grads, want_grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=kind)


def test_cpus_take_it_and_hold_no_square_of_scores():
    q, k, v, _, segments = case(2048, 8, 2, 64)
    ids = segments["one"]

    def f(q, k, v):
        return jnp.sum(attention.attention(q, k, v, ids, causal=True))

    both = jax.jit(jax.value_and_grad(f, (0, 1, 2))).lower(q, k, v).compile()
    assert both.memory_analysis().temp_size_in_bytes < 2 * 8 * 2048 * 2048 * 4 / 2  # half of all scores of this size
    assert "2048,2048" not in both.as_text()
