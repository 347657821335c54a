"""Buckets, lanes, neighbours, order, chunks and token-by-token decoding do not change the logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    FAMILIES,
    clip,
    followed,
    mixed_samples,
    picture,
    sample,
    tiny_config,
    tiny_params,
    with_text,
    with_vision,
)

from qwenvl_jax.config import YarnConfig
from qwenvl_jax.errors import InputError
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.model import attention as attention_module
from qwenvl_jax.model import vision
from qwenvl_jax.model.decoder import DecoderBlock
from qwenvl_jax.model.qwenvl import decode, embed, encode_vision, forward, prefill
from qwenvl_jax.model.rope import rope_frequencies, text_rope

LIMIT = 1e-5  # float32, relative to the largest logit


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    config = tiny_config(request.param)
    return config, tiny_params(config)


def logits_by_row(config, params, samples, ladder=None):
    batch = make_batch(samples, config, ladder)
    logits = np.asarray(jax.jit(forward, static_argnums=0)(config, params, batch))
    return [logits[row, : len(s.tokens)] for row, s in enumerate(samples)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert np.abs(x - y).max() <= LIMIT * np.abs(y).max()


def test_bucket_size_leaves_the_logits_unchanged(model):
    samples = mixed_samples(model[0])
    wide = Ladder(rows=(8,), tokens=(333,), lanes=5, patches=(768,))
    assert_same(logits_by_row(*model, samples, wide), logits_by_row(*model, samples))


def test_lane_packing_leaves_the_logits_unchanged(model):
    samples = mixed_samples(model[0])
    one_lane = Ladder(patches=(4096,))
    assert_same(logits_by_row(*model, samples, one_lane), logits_by_row(*model, samples))


@pytest.mark.slow
def test_sizes_and_calls_leave_the_logits_unchanged(model):
    config = model[0]
    rng = np.random.default_rng(3)
    large, small = picture(rng, config, 40, 48), picture(rng, config, 6, 8)
    samples = [sample(rng, config, 3, large, 2, clip(rng, config, 7, 8, 10, 0.7), small, 4), *mixed_samples(config)]
    assert len(make_batch(samples, config).vision) > 1
    one_lane = Ladder(patches=(8192,))
    assert_same(logits_by_row(*model, samples), logits_by_row(*model, samples, one_lane))


def test_batch_order_leaves_the_logits_unchanged(model):
    samples = mixed_samples(model[0])
    assert_same(logits_by_row(*model, samples[::-1])[::-1], logits_by_row(*model, samples))


def test_batch_size_leaves_the_logits_unchanged(model):
    samples = mixed_samples(model[0])
    alone = [logits_by_row(*model, [s])[0] for s in samples]
    assert_same(alone, logits_by_row(*model, samples))


def test_padding_side_leaves_the_logits_unchanged(model):
    config, params = model
    samples = mixed_samples(config)
    batch = make_batch(samples, config)
    T = batch.tokens.shape[1]
    shift = [T - len(s.tokens) for s in samples]

    def roll(x):
        return np.stack([np.roll(row, n, -1) for row, n in zip(x, shift, strict=True)])

    left = batch._replace(
        tokens=roll(batch.tokens),
        segments=roll(batch.segments),
        visual_index=roll(batch.visual_index),
        positions=np.stack([roll(axis) for axis in batch.positions]),
    )
    logits = np.asarray(jax.jit(forward, static_argnums=0)(config, params, left))
    ours = [logits[row, n:] for row, n in enumerate(shift)]
    assert_same(ours, logits_by_row(config, params, samples))


def test_packed_rows_equal_separate_rows(model):
    config, params = model
    samples = mixed_samples(config)[:2]
    batch = make_batch(samples, config, Ladder(tokens=(128,)))
    n, m = (len(s.tokens) for s in samples)

    def join(x):
        return np.concatenate([x[..., :1, :n], x[..., 1:2, :m]], -1)

    packed = batch._replace(
        tokens=join(batch.tokens),
        segments=np.concatenate([np.full((1, n), 1), np.full((1, m), 2)], 1).astype(np.int32),
        visual_index=join(batch.visual_index),
        positions=join(batch.positions),
    )
    logits = np.asarray(jax.jit(forward, static_argnums=0)(config, params, packed))[0]
    assert_same([logits[:n], logits[n:]], logits_by_row(config, params, samples))


def test_prefill_and_decode_equal_one_forward(model):
    config, params = model
    samples = mixed_samples(config)
    tail = 6  # tokens per row that are decoded one by one
    rng = np.random.default_rng(1)
    extra = rng.integers(1, 150, (len(samples), tail)).astype(np.int32)
    longer = [followed(s, e) for s, e in zip(samples, extra, strict=True)]
    want = [x[-tail - 1 :] for x in logits_by_row(config, params, longer)]

    batch = make_batch(samples, config)
    visual = jnp.concatenate([encode_vision(config, params, v) for v in batch.vision])
    x = embed(config, params, batch.tokens, batch.visual_index, visual)
    logits, cache = jax.jit(prefill, static_argnums=(0, 5))(
        config, params, x, batch.positions, batch.segments, batch.tokens.shape[1] + 7
    )
    step = jax.jit(decode, static_argnums=0)
    got = [logits]
    for i in range(tail):
        logits, cache = step(config, params, extra[:, i], cache)
        got.append(logits)
    assert_same(np.stack(got, 1), want)
    assert cache.lengths.tolist() == [len(s.tokens) for s in longer]


@pytest.mark.parametrize("spans", [8, 3, 1])
def test_chunked_attention_equals_whole(monkeypatch, spans):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 37, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, 37)), 1), jnp.int32)

    def loss(q, k, v, causal):
        return jnp.sum(attention_module.attention(q, k, v, segments, causal=causal) ** 2)

    for causal in (True, False):
        whole = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)(q, k, v, causal)
        with monkeypatch.context() as patch:
            patch.setattr(attention_module, "MAX_SCORES", 37 * 2 * 4 * 9)
            patch.setattr(attention_module, "SPANS", spans)
            chunked = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)(q, k, v, causal)
        for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("full", [(), (0,), (1, 3), (0, 1, 2, 3), (2,)])
def test_grouped_layers_equal_a_plain_loop(full):
    config = with_vision(tiny_config("qwen2_5_vl"), fullatt_block_indexes=full)
    params = tiny_params(config)
    repeats, pattern = vision.layer_groups(config)
    assert pattern * repeats == [i not in full for i in range(4)]
    (lanes,) = make_batch(mixed_samples(config), config).vision
    p = params["vision"]
    x = vision.normalise(lanes.patches, config)
    x = vision.patch_embed(config).apply({"params": p["patch_embed"]}, x)
    rope = vision.vision_rope(lanes.positions, 16)
    for i in range(4):
        block = vision.VisionBlock(config, windowed=i not in full)
        segments = lanes.frames if i in full else lanes.windows
        x = block.apply({"params": jax.tree.map(lambda w, i=i: w[i], p["blocks"])}, x, *rope, segments)
    want = vision.Merger(config).apply({"params": p["merger"]}, x).reshape(-1, 48)
    live = np.asarray(lanes.frames[:, ::4] > 0).reshape(-1)
    assert_same([np.asarray(encode_vision(config, params, lanes))[live]], [np.asarray(want)[live]])


def test_normalisation_on_the_device_is_the_references_bit_for_bit():
    config = tiny_config("qwen2_5_vl")
    v = config.vision
    every = np.arange(256, dtype=np.uint8)
    patches = np.zeros((256, v.in_channels, v.patch_values // 3), np.uint8) + every[:, None, None]
    ours = jax.jit(lambda p: vision.normalise(p, config))(patches.reshape(256, -1)).reshape(patches.shape)[:, :, 0]
    x = (every.astype(np.float64) * (1 / 255)).astype(np.float32)[:, None]
    assert (np.asarray(ours) == (x - np.float32(v.image_mean)) / np.float32(v.image_std)).all()


def test_rotary_angles_are_never_bfloat16():
    config = tiny_config("qwen2_5_vl")
    cos, _ = text_rope(jnp.full((3, 1, 1), 257, jnp.int32), dataclasses.replace(config.text))
    assert cos.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(257.0), rtol=1e-5)


def test_yarn_scales_cos_and_sin():
    text = with_text(tiny_config("qwen2_vl"), yarn=YarnConfig(4.0, 512)).text
    _, scale = rope_frequencies(text)
    assert scale == pytest.approx(0.1 * np.log(4) + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_runs_and_stays_near_float32(family):
    config = tiny_config(family)
    params = tiny_params(config)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    samples = mixed_samples(config)
    a = logits_by_row(config.replace(dtype="bfloat16"), half, samples)
    b = logits_by_row(config, jax.tree.map(lambda w: w.astype(np.float32), half), samples)
    for x, y in zip(a, b, strict=True):
        assert np.isfinite(x).all() and np.linalg.norm(x - y) <= 0.05 * np.linalg.norm(y)


def test_queries_are_normalised_then_turned_by_t_h_w_in_turns():
    """Against complex numbers in numpy: frequency i belongs to axis [0 1 2 0 1 2 0 0][i] of t, h, w."""
    text = dict(head_dim=16, mrope_section=(4, 2, 2), qkv_bias=False, qk_norm=True, rope="interleaved")
    config = tiny_config("qwen2_5_vl", text)
    rng, t = np.random.default_rng(0), config.text
    x, positions = rng.standard_normal((1, 5, 48)).astype(np.float32), rng.integers(0, 50, (3, 1, 5))
    weights = jax.tree.map(lambda w: w[0], tiny_params(config)["decoder"]["layers"])
    block = DecoderBlock(config)
    _, (q, k) = block.apply({"params": weights}, x, *text_rope(positions, t), lambda q, k, v: (q, (q, k)))

    def normal(a, scale):
        return a / np.sqrt(np.mean(a * a, -1, keepdims=True) + t.rms_norm_eps) * scale

    turns = positions[[0, 1, 2, 0, 1, 2, 0, 0], 0].T * t.rope_theta ** -(np.arange(8) / 8)
    h = normal(x, weights["input_layernorm"]["scale"])
    for got, name in ((q, "q"), (k, "k")):
        want = normal((h @ weights[f"{name}_proj"]["kernel"]).reshape(5, -1, 16), weights[f"{name}_norm"]["scale"])
        want = (want[..., :8] + 1j * want[..., 8:]) * np.exp(1j * turns)[:, None]
        np.testing.assert_allclose(got[0], np.concatenate([want.real, want.imag], -1), atol=2e-5)
    with pytest.raises(InputError, match="interleave"):
        tiny_config("qwen2_5_vl", text | dict(mrope_section=(1, 4, 3)))
