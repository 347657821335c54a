"""The TPU's kernel for a decode step, interpreted, against plain XLA; and what it reads."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.families import PRESETS
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.model import decode_kernel
from qwenvl_jax.model.decoder import step, write_and_attend
from qwenvl_jax.params.specs import abstract_params
from qwenvl_jax.sharding import activation_sharding, make_mesh
from qwenvl_jax.types import Cache


def problem(seed: int, B: int, K: int, G: int, S: int, H: int, dtype):
    """Random q, k, v, caches and lengths, among them the least and the most."""
    rng = np.random.default_rng(seed)
    shapes = (B, 1, K * G, H), (B, 1, K, H), (B, 1, K, H), (B, K, S, H), (B, K, S, H)
    lengths = np.where(rng.random(B) < 0.5, rng.integers(0, S, B), rng.choice([0, S // 2, S - 1, S], B))
    return *(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes), jnp.asarray(lengths, jnp.int32)


def with_dead(caches, lengths, value: float):
    """The caches with `value` in every slot that holds no token."""
    live = jnp.arange(caches[0].shape[2]) < lengths[:, None]
    return [jnp.where(live[:, None, :, None], cache, jnp.asarray(value, cache.dtype)) for cache in caches]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("B", "K", "G", "S", "slots"), [(1, 4, 1, 64, 64), (4, 2, 3, 96, 32), (5, 1, 8, 192, 64), (3, 2, 2, 100, 16)]
)
def test_the_kernel_equals_plain_xla(monkeypatch, B, K, G, S, slots, dtype):
    """For rows of any length; dead slots may hold anything."""
    H = 16
    monkeypatch.setattr(decode_kernel, "BLOCK", K * H * slots)
    assert decode_kernel.block_slots(K, S, H) == slots
    kernel = jax.jit(lambda *a: decode_kernel.decode_kernel(*a, interpret=True))
    plain = jax.jit(write_and_attend)
    for seed in range(8):
        *qkv, k_cache, v_cache, lengths = problem(seed, B, K, G, S, H, dtype)
        poisoned = with_dead((k_cache, v_cache), lengths, jnp.nan)
        got, *caches = kernel(*qkv, *poisoned, lengths)
        want, *_ = plain(*qkv, *with_dead((k_cache, v_cache), lengths, 0), lengths)
        _, *written = plain(*qkv, *poisoned, lengths)
        got, want, *caches = (np.asarray(a, np.float32) for a in (got, want, *caches, *written))
        for a, b in zip(caches[:2], caches[2:], strict=True):
            np.testing.assert_array_equal(a, b)  # NaN is equal to NaN
        # In bfloat16 the weights are rounded before they are divided by their sum, in plain XLA after.
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 2**-7, "atol": 2**-7}
        np.testing.assert_allclose(got, want, **tolerance)


@pytest.mark.parametrize(("B", "K"), [(4, 4), (3, 2)])
def test_on_a_mesh(B, K):
    """Rows and heads that are split, and that are not."""
    args = problem(0, B, K, 2, 64, 16, "float32")
    want = jax.jit(write_and_attend)(*args)
    with jax.set_mesh(mesh := make_mesh(data=2, tensor=4)):
        dims = "BTNH", "BTKH", "BTKH", "BKSH", "BKSH", "."
        places = [activation_sharding(d, a.shape, mesh) for d, a in zip(dims, args, strict=True)]
        kernel = jax.jit(lambda *a: decode_kernel.decode_kernel(*a, interpret=True))
        got = kernel(*jax.device_put(args, tuple(places)))
    assert got[1].sharding.is_equivalent_to(places[3], 4)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("K", "S"), [(1, 4096), (4, 4096), (4, 96), (8, 1536), (2, 131072), (4, 1000)])
def test_what_is_fetched_follows_what_is_live(K, S):
    """A block is fetched where it is another than in the step before: of every row, those that hold live slots."""
    slots = decode_kernel.block_slots(K, S, 128)
    blocks = -(-S // slots)
    lengths = np.random.default_rng(0).integers(0, S, 8)
    steps = [decode_kernel.cache_block(slots, b, j, lengths) for b in range(len(lengths)) for j in range(blocks)]
    fetched = [block for block, _ in itertools.groupby((b, int(block)) for b, _, block, _ in steps)]
    assert fetched == [(b, j) for b, length in enumerate(lengths) for j in range(length // slots + 1)]


@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_blocks_are_large_and_divide_the_buckets(K):
    """In each step k and v take half a megabyte, where the bucket has as much."""
    for S in Ladder().tokens:
        slots = decode_kernel.block_slots(K, S, 128)
        assert S % slots == 0
        assert slots == S or 2**16 < slots * K * 128 <= 2**17


def test_tpus_get_the_kernel():
    """One a layer, if the heads fill the vector lanes."""
    config = PRESETS["qwen2.5-vl-3b"]
    t = replace(config.text, num_hidden_layers=2)
    narrow = replace(t, head_dim=64, mrope_section=(8, 12, 12))

    def kernels(platform, text):
        whole = replace(config, text=text)
        caches = [[jax.ShapeDtypeStruct((3, 2, 96, text.head_dim), "bfloat16")] * 2] * 2
        tokens = jax.ShapeDtypeStruct((3,), "int32")
        traced = jax.jit(partial(step, whole)).trace(abstract_params(whole), tokens, Cache(*caches, tokens, tokens))
        return traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")

    assert [kernels("tpu", t), kernels("tpu", narrow), kernels("cpu", t)] == [2, 0, 0]
