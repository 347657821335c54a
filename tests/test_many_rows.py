"""More than 32,768 rows at once, forward and backward, with XLA's default flags, against float64.

jaxlib 0.10.2 miscompiles some fused reductions on CPUs: rows from 32,768 on get values of other rows
(https://github.com/jax-ml/jax/issues/39103). No computation here may use such a fusion, in any jaxlib.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from tiny import tiny_config, tiny_params

from qwenvl_jax.model import attention
from qwenvl_jax.model.kernels import window as window_kernel
from qwenvl_jax.model.linear import Linear
from qwenvl_jax.model.norms import LayerNorm, RMSNorm
from qwenvl_jax.params.specs import Spec
from qwenvl_jax.train.losses import cross_entropy, sft_loss
from qwenvl_jax.train.step import init_state, make_optimizer, make_step
from qwenvl_jax.types import Batch, TrainBatch, VisionBatch

ROWS = (32_768, 32_769, 65_537, 131_072)
EPS = 1e-6
# The flags of conftest.py turn off most of XLA's optimizations, and the emitters that users get with jaxlib 0.10.
OPTIONS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if jaxlib.__version__.startswith("0.10."):
    OPTIONS["xla_cpu_use_fusion_emitters"] = True


def compiled(f):
    return jax.jit(f, compiler_options=OPTIONS)


def with_gradients(f, cotangent, *args):
    """f(*args) and its gradients with respect to all arguments, as one compiled program."""

    def both(cotangent, *args):
        out, pull = jax.vjp(f, *args)
        return out, pull(cotangent)

    return compiled(both)(cotangent, *args)


def random(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def assert_rows_close(got, want, limit: float = 3e-6, of=None) -> None:
    """Per row, the largest error is relative to the row's largest value, or to that of `of`."""
    got, want, of = (np.asarray(a, np.float64).reshape(len(want), -1) for a in (got, want, want if of is None else of))
    error = np.abs(got - want).max(1) / np.abs(of).max(1)
    wrong = np.flatnonzero(~(error <= limit))
    assert not len(wrong), f"{len(wrong)} of {len(want)} rows, from {wrong[0]} on; errors up to {error.max()}"


def assert_sum_close(got, want, limit: float = 2e-5) -> None:
    """A sum over all rows, which float32 rounds at each row: the error is relative to all values."""
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


def test_the_fault_itself():
    """`assert_rows_close` detects XLA's fault if this jaxlib has it; otherwise the same expression passes."""
    x = random(32_769, 3)
    want = (x.astype(np.float64) ** 2).sum(1)[:, None]
    got = compiled(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(x)
    if jaxlib.__version__ == "0.10.2" and jax.default_backend() == "cpu":
        with pytest.raises(AssertionError, match=r"1 of 32769 rows, from 32768 on"):
            assert_rows_close(got, want)
    else:
        assert_rows_close(got, want)


def width(kind, rows: int) -> int:
    """XLA's fault needs narrow rows. (LayerNorm of three values subtracts the mean, which may leave only rounding.)"""
    return 3 if rows == 32_769 and kind is RMSNorm else 12


def centre(kind):
    return (lambda a: a - a.mean(1, keepdims=True)) if kind is LayerNorm else (lambda a: a)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms(kind, rows):
    D = width(kind, rows)
    x, g, scale, bias = random(rows, D), random(rows, D, seed=1), 1 + random(D) / 5, random(D, seed=1)
    weights = {"scale": scale} | ({"bias": bias} if kind is LayerNorm else {})
    norm = kind(EPS, "float32")

    def f(x, weights):
        return norm.apply({"params": weights}, x)

    out, (x_grad, grads) = with_gradients(f, g, x, weights)

    x, g, scale, bias = (a.astype(np.float64) for a in (x, g, scale, bias))
    centred = centre(kind)
    inverse = (np.mean(centred(x) ** 2, 1, keepdims=True) + EPS) ** -0.5
    n, n_grad = centred(x) * inverse, g * scale
    # The difference from the mean of three values may be small compared with the mean.
    assert_rows_close(out, n * scale + (bias if kind is LayerNorm else 0), of=1 + np.abs(x) * inverse)
    x_wanted = inverse * (centred(n_grad) - n * np.mean(n_grad * n, 1, keepdims=True))
    assert_rows_close(
        x_grad, x_wanted, 1e-5, of=inverse * (1 + np.abs(x) * inverse) * np.abs(n_grad).max(1, keepdims=True)
    )
    assert_sum_close(grads["scale"], np.sum(g * n, 0))
    if kind is LayerNorm:
        assert_sum_close(grads["bias"], np.sum(g, 0))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norm_of_a_product(kind, rows):
    """As in every block: one fusion adds a linear layer's output and sums the squares."""
    D = width(kind, rows)
    x, kernel, bias, g = random(rows, D), random(D, D) / 4, random(D), random(rows, D, seed=1)
    weights = {"scale": jnp.ones(D)} | ({"bias": jnp.zeros(D)} if kind is LayerNorm else {})

    def f(x, kernel, bias):
        x = x + Linear(D, "D D", param_dtype="float32").apply({"params": {"kernel": kernel, "bias": bias}}, x)
        return kind(EPS, "float32").apply({"params": weights}, x)

    out, grads = with_gradients(f, g, x, kernel, bias)
    x, kernel, bias, g = (a.astype(np.float64) for a in (x, kernel, bias, g))
    y, centred = x + x @ kernel + bias, centre(kind)
    inverse = (np.mean(centred(y) ** 2, 1, keepdims=True) + EPS) ** -0.5
    n = centred(y) * inverse
    d = inverse * (centred(g) - n * np.mean(g * n, 1, keepdims=True))
    room = 1 + inverse * (np.abs(x) + np.abs(x) @ np.abs(kernel) + np.abs(bias)).max(1, keepdims=True)
    assert_rows_close(out, n, 1e-5, of=room)
    assert_rows_close(
        grads[0],
        d + d @ kernel.T,
        1e-5,
        of=room * inverse * (1 + np.abs(kernel).sum()) * np.abs(g).max(1, keepdims=True),
    )
    assert_sum_close(grads[1], x.T @ d)
    assert_sum_close(grads[2], d.sum(0))


def exact_attention(q, k, v, g, width: int):
    """Attention within runs of `width` rows [n, H]: the output, and the gradients of q, k and v."""
    rows, H = q.shape
    pad = -rows % width
    q, k, v, g = (np.pad(a.astype(np.float64), ((0, pad), (0, 0))).reshape(-1, width, H) for a in (q, k, v, g))
    scores = q @ k.swapaxes(1, 2) * H**-0.5
    scores[-1, :, width - pad :] = -np.inf
    p = np.exp(scores - scores.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    p_grad = g @ v.swapaxes(1, 2)
    d = p * (p_grad - np.sum(p_grad * p, 2, keepdims=True)) * H**-0.5
    parts = p @ v, d @ k, d.swapaxes(1, 2) @ q, p.swapaxes(1, 2) @ g
    return [a.reshape(-1, H)[:rows] for a in parts]


@pytest.mark.parametrize("rows", [32_769, 131_072])
def test_attention_in_one_long_row(rows):
    """The CPU's form: pictures or conversations in one row, each its own segment."""
    arrays = [random(rows, 8, seed=i) for i in range(4)]
    segments = (np.arange(rows, dtype=np.int32) // 24 + 1)[None]

    def f(*qkv):
        return attention.attention(*qkv, segments, causal=False)

    q, k, v, g = (a[None, :, None] for a in arrays)
    out, grads = with_gradients(f, g, q, k, v)
    for got, want in zip((out, *grads), exact_attention(*arrays, 24), strict=True):
        assert_rows_close(got[0], want, 3e-5)


@pytest.mark.parametrize(("form", "blocks"), [("cpu", 513), ("plain", 513), ("plain", 2048)])
def test_attention_in_windows(form, blocks):
    """32,832 and 131,072 rows of scores by 64 keys, also with plain XLA, as on several devices."""
    H = 8
    qkv = random(1, blocks * 64, 3 * H)
    cos, sin = np.ones((1, blocks * 64, H // 2), np.float32), np.zeros((1, blocks * 64, H // 2), np.float32)
    windows = np.ones((1, blocks * 64), np.int32)
    g = random(1, blocks * 64, H, seed=1)

    def f(qkv):
        if form == "cpu":
            return window_kernel.window_attention(qkv, cos, sin, windows, heads=1, slots=64)
        q, k, v = (a.reshape(blocks, 64, 1, H) for a in jnp.split(qkv, 3, 2))
        return attention._plain(q, k, v, windows.reshape(blocks, 64), causal=False).reshape(g.shape)

    out, (grad,) = with_gradients(f, g, qkv)
    wanted, *grads = exact_attention(*np.split(qkv[0], 3, 1), g[0], 64)
    assert_rows_close(out[0], wanted, 3e-5)
    for got, want in zip(np.split(np.asarray(grad[0]), 3, 1), grads, strict=True):
        assert_rows_close(got, want, 1e-4)


@pytest.mark.parametrize("rows", ROWS)
def test_attention_of_a_token(rows):
    q, k, v = random(rows, 1, 1, 4), random(rows, 1, 6, 4), random(rows, 1, 6, 4, seed=1)
    lengths = np.random.default_rng(0).integers(1, 7, rows).astype(np.int32)
    got = compiled(attention.decode_attention)(q, k, v, lengths)
    scores = np.sum(q.astype(np.float64)[:, 0] * k[:, 0], 2) / 2
    scores[np.arange(6) >= lengths[:, None]] = -np.inf
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    assert_rows_close(got, np.sum(p[..., None] * v[:, 0], 1), 1e-5)


@pytest.mark.parametrize(("rows", "whole"), [*((n, True) for n in ROWS), (32_769, False), (131_072, False)])
def test_cross_entropy(rows, whole):
    """With the final norm; for all tokens at once, and for chunks as in training."""
    V, D, rng = 24, 12, np.random.default_rng(rows)
    config = tiny_config("qwen2_5_vl", dict(vocab_size=V, hidden_size=D), image_token_id=1, video_token_id=2)
    x, table, scale = random(rows, D), random(V, D) / 2, 1 + random(D) / 5
    targets = rng.integers(0, V, (1, rows)).astype(np.int32)
    weights = rng.integers(0, 2, (1, rows)).astype(np.float32)

    def f(x, table, scale):
        params = {"decoder": {"embed_tokens": {"embedding": table}, "norm": {"scale": scale}}}
        params["decoder"]["lm_head"] = {"kernel": table.T}
        batch = TrainBatch(None, targets, weights)
        total, weight, metrics = cross_entropy(config, params, x[None], batch, *([rows] if whole else []))
        return total, (weight, metrics["accuracy"])

    run = compiled(jax.value_and_grad(f, (0, 1, 2), has_aux=True))
    (total, (weight, hits)), grads = run(x, table, scale)

    x, table, scale = (a.astype(np.float64) for a in (x, table, scale))
    eps = config.text.rms_norm_eps
    inverse = (np.mean(x**2, 1, keepdims=True) + eps) ** -0.5
    n = x * inverse
    logits = n * scale @ table.T
    logp = logits - np.log(np.sum(np.exp(logits), 1, keepdims=True))
    hot, w = np.eye(V)[targets[0]], weights[0].astype(np.float64)
    assert np.isclose(total, -np.sum(w * np.sum(hot * logp, 1)), rtol=1e-5) and weight == w.sum()
    assert abs(hits - np.sum(w * (logp.argmax(1) == targets[0]))) <= 1  # two logits may be equal in float32
    d = w[:, None] * (np.exp(logp) - hot)
    h = d @ table
    x_grad = inverse * (h * scale - n * np.mean(h * scale * n, 1, keepdims=True))
    assert_rows_close(
        grads[0], x_grad, 1e-5, of=inverse * np.abs(table).max()
    )  # a correct prediction has a small gradient
    assert not np.asarray(grads[0])[w == 0].any()
    assert_sum_close(grads[1], d.T @ (n * scale))
    assert_sum_close(grads[2], np.sum(h * n, 0))


@pytest.mark.parametrize("rows", [32_769, 131_072])
def test_a_step_on_an_embedding(rows):
    """Norm of the gradient, clipping and AdamW, for a leaf with that many rows."""
    wanted, params = random(rows, 4), {"table": {"embedding": random(rows, 4, seed=1)}}
    start = params["table"]["embedding"].astype(np.float64)
    declared = {"table/embedding": Spec((rows, 4), np.float32, ("V", "D"), "embedding", "llm", None)}
    optimizer = make_optimizer(declared, 1e-2, weight_decay=0.1)
    state = init_state(declared, params, optimizer, lambda path: True)

    def loss(params, batch):
        return jnp.sum(params["table"]["embedding"] * wanted), jnp.float32(1), {}

    args = state, TrainBatch(None, np.zeros((1, 1, 1), np.int32), None)
    step = make_step(declared, loss, optimizer, lambda path: True).lower(*args).compile(OPTIONS)
    state, metrics = step(*args)
    gradient = wanted.astype(np.float64)
    norm = np.linalg.norm(gradient)
    assert np.isclose(metrics["grad_norm"], norm, rtol=1e-5) and norm > 1
    clipped = gradient / norm
    moved = start - 1e-2 * (clipped / (np.abs(clipped) + 1e-8) + 0.1 * start)
    assert_rows_close(np.asarray(state.params["table"]["embedding"]) - start, moved - start, 1e-4)


@pytest.mark.slow
def test_a_whole_model():
    """Loss and gradients of 513 rows of 64 tokens, each with a lane of 64 patches, are the sums of 27 rows' each."""
    config = tiny_config("qwen2_vl", dict(num_hidden_layers=1), dict(patch_size=2, depth=1))
    params, rng, B, T = tiny_params(config), np.random.default_rng(0), 513, 64

    def batch(start: int, rows: int) -> TrainBatch:
        patches, tokens, targets = (a[start : start + rows] for a in arrays)
        ones = np.ones((rows, T), np.int32)
        places = np.broadcast_to(np.stack(np.indices((8, 8)), -1).reshape(1, T, 2), (rows, T, 2)).astype(np.int32)
        index = np.full((rows, T), -1, np.int32)
        index[:, :16] = np.arange(rows * 16).reshape(rows, 16)
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (3, rows, T))
        inputs = Batch(tokens, positions, ones, index, (VisionBatch(patches, places, ones, ones),))
        return TrainBatch(inputs, targets, ones.astype(np.float32))

    arrays = [rng.integers(0, 256, (B, T, config.vision.patch_values), np.uint8)]
    arrays += [rng.integers(0, 150, (B, T)).astype(np.int32) for _ in range(2)]
    f = jax.value_and_grad(lambda params, batch: sft_loss(config, params, batch)[0])
    got, few = compiled(f)(params, batch(0, B)), jax.jit(f)
    parts = [jax.device_get(few(params, batch(start, 27))) for start in range(0, B, 27)]
    want = jax.tree.map(lambda *each: np.sum(np.asarray(each, np.float64), 0), *parts)
    jax.tree.map(partial(assert_sum_close, limit=1e-4), got, want)
