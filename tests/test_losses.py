"""Chunked log-probabilities against plain ones, DPO against its formula in float64, and packing."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAMILIES, clip, picture, sample, tiny_config, tiny_params, train_batch, with_text

from qwenvl_jax.errors import InputError
from qwenvl_jax.model import decoder, qwenvl
from qwenvl_jax.params import specs
from qwenvl_jax.train.data import Packer
from qwenvl_jax.train.losses import CHUNK, cross_entropy, dpo_loss, segment_logprobs, sft_loss, token_logprobs
from qwenvl_jax.train.records import PackShape
from qwenvl_jax.types import PreferenceBatch, TrainBatch

LIMIT = 1e-5  # float32, relative to the largest value


def assert_close(ours, theirs, limit=LIMIT):
    for path, want in jax.tree_util.tree_leaves_with_path(theirs):
        got = ours
        for key in path:
            got = got[key.key if hasattr(key, "key") else key.idx]
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape
        error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
        assert error <= limit, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def small_config(family, **text):
    """Two blocks of each kind compile fast in both directions."""
    full = (1,) if family == "qwen2_5_vl" else ()
    return tiny_config(family, text=dict(num_hidden_layers=2) | text, vision=dict(depth=2, fullatt_block_indexes=full))


def samples_of(config):
    rng = np.random.default_rng(5)
    pic, vid = (lambda *a: picture(rng, config, *a)), (lambda *a: clip(rng, config, *a))
    return [
        sample(rng, config, 3, pic(10, 14), 9),
        sample(rng, config, 12),
        sample(rng, config, 2, vid(2, 4, 6, 0.7), 4, pic(4, 8), 6),
        sample(rng, config, pic(6, 6), 8),
    ]


def plain_logprobs(config, params, x, targets):
    logp = jax.nn.log_softmax(decoder.unembed(config, params, x), -1)
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]


@functools.cache
def params_of(config):
    return tiny_params(config)


def head_params(config, tied, seed=0):
    """The parameters after the decoder's layers."""
    rng, D, V = np.random.default_rng(seed), config.text.hidden_size, config.text.vocab_size
    head = {"embed_tokens": {"embedding": (V, D)}} if tied else {"lm_head": {"kernel": (D, V)}}

    def draw(shape):
        return jnp.asarray(rng.normal(0, 0.2, shape), config.dtype)

    return {"decoder": {"norm": {"scale": draw(D)}} | jax.tree.map(draw, head, is_leaf=lambda x: isinstance(x, tuple))}


@pytest.mark.parametrize("tied", [True, False])
def test_chunked_equals_plain(tied):
    config = with_text(tiny_config("qwen2_5_vl"), tie_word_embeddings=tied)
    params = head_params(config, tied)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 37, 48)), jnp.float32)
    targets, by = rng.integers(0, 160, (3, 37)), jnp.asarray(rng.standard_normal((3, 37)), jnp.float32)

    def loss(logprobs, params, x):
        out = logprobs(config, params, x, targets)
        return jnp.sum(out * by), out

    def both(logprobs):
        return jax.jit(jax.value_and_grad(partial(loss, logprobs), (0, 1), has_aux=True))(params, x)

    (_, want), want_grad = both(plain_logprobs)
    for chunk in (1, 14, 1000):  # one position, a length that does not divide T, more than T
        (_, ours), ours_grad = both(partial(token_logprobs, chunk=chunk))
        assert ours.dtype == jnp.float32
        assert_close(ours, want)
        assert_close(ours_grad, want_grad)


def learnt(config, params, x, targets, chunk=CHUNK):
    """The same sum by `cross_entropy`, which computes its gradient in the forward pass."""
    batch = TrainBatch(None, targets, jnp.ones(targets.shape, jnp.float32))
    return -cross_entropy(config, params, x, batch, chunk)[0]


@pytest.mark.parametrize("tied", [True, False])
def test_cross_entropy_equals_plain(tied):
    """For any weights and cotangent, and with respect to the weights too."""
    config = with_text(tiny_config("qwen2_5_vl"), tie_word_embeddings=tied)
    params, rng = head_params(config, tied), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 37, 48)), jnp.float32)
    targets = rng.integers(0, 160, (3, 37))
    weights = jnp.asarray(rng.standard_normal((3, 37)) * rng.integers(0, 2, (3, 37)), jnp.float32)

    def plain(params, x, weights):
        return 2.5 * jnp.sum(plain_logprobs(config, params, x, targets) * weights)

    def ours(chunk, params, x, weights):
        return -2.5 * cross_entropy(config, params, x, TrainBatch(None, targets, weights), chunk)[0]

    def both(f):
        return jax.jit(jax.value_and_grad(f, (0, 1, 2)))(params, x, weights)

    for chunk in (1, 14, 1000):
        assert_close(both(partial(ours, chunk)), both(plain))


@pytest.mark.parametrize("logprobs", [token_logprobs, learnt])
def test_the_heads_gradient_is_summed_in_float32(logprobs):
    """4096 equal tokens, one per chunk: a bfloat16 sum would stop growing after 256."""
    config = tiny_config("qwen2_5_vl", dtype="bfloat16")
    params = head_params(config, False)
    x = jnp.broadcast_to(jnp.asarray(np.random.default_rng(0).standard_normal(48), jnp.bfloat16), (1, 4096, 48))

    def gradient(n, chunk):
        def loss(params):
            return jnp.sum(logprobs(config, params, x[:, :n], jnp.ones((1, n), jnp.int32), chunk))

        return np.asarray(jax.jit(jax.grad(loss))(params)["decoder"]["lm_head"]["kernel"], np.float32)

    assert_close(gradient(4096, 1), 4096 * gradient(1, 1), 1e-2)


@pytest.mark.parametrize("form", [token_logprobs, learnt])
@pytest.mark.parametrize("tied", [True, False])
def test_memory_of_a_large_vocabulary(tied, form):
    """Compiled memory of forward and backward at T = 8192, V = 152064."""
    T, V, D = 8192, 152064, 64
    text = dict(vocab_size=V, hidden_size=D, head_dim=16, mrope_section=(2, 3, 3), tie_word_embeddings=tied)
    config = tiny_config("qwen2_5_vl", text=text)
    params = {"decoder": {k: v for k, v in specs.abstract_params(config)["decoder"].items() if k != "layers"}}
    x, targets = jax.ShapeDtypeStruct((1, T, D), jnp.float32), jax.ShapeDtypeStruct((1, T), jnp.int32)

    def compiled(logprobs, trained):

        def total(params, x, targets, logprobs=logprobs):
            return jnp.sum(logprobs(config, params, x, targets))

        return jax.jit(jax.value_and_grad(total, trained)).lower(params, x, targets).compile()

    chunked, plain = compiled(form, (0, 1)), compiled(plain_logprobs, (0, 1))
    memory = [c.memory_analysis().temp_size_in_bytes for c in (chunked, plain)]
    assert memory[1] > 4 * T * V  # the plain form holds all logits
    assert memory[0] < memory[1] / 3
    assert memory[0] < 4 * (4 * CHUNK * V)
    frozen = compiled(form, 1)  # a frozen head needs no matmul for its gradient
    assert frozen.cost_analysis()["flops"] < 0.8 * chunked.cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(family):
    config = small_config(family)
    params, rng = params_of(config), np.random.default_rng(6)

    def example(s):
        learnt = rng.integers(0, 2, len(s.tokens)).astype(np.float32)
        return (s._replace(weights=learnt),)

    examples = [example(s) for s in samples_of(config)]

    def pack(segments):
        packer = Packer(PackShape(4, 100, 4, 256, segments), config)
        assert all([packer.add(e) for e in examples])
        return packer.batch()

    packed, alone = pack(64), pack(1)
    assert (packed.inputs.segments.max(), alone.inputs.segments.max()) == (3, 1)
    grad = jax.jit(jax.value_and_grad(lambda p, batch: sft_loss(config, p, batch)[0]))
    ours, theirs = grad(params, packed), grad(params, alone)
    assert_close(ours, theirs)
    assert min(np.abs(g).max() for g in jax.tree.leaves(ours[1])) > 0


@pytest.mark.slow
def test_remat_keeps_less_and_changes_nothing(monkeypatch):
    config = tiny_config("qwen2_vl", text=dict(num_hidden_layers=8), vision=dict(depth=8))
    params, batch = params_of(config), train_batch(config, [samples_of(config)], T=256)

    def compiled(remat):
        loss = jax.jit(jax.value_and_grad(lambda p, b: sft_loss(config, p, b, remat=remat)[0]))
        return loss.lower(params, batch).compile()

    plain, remat = compiled(False), compiled(True)
    with monkeypatch.context() as m:
        m.setattr(jax, "checkpoint", lambda f, **_: f)
        everything = compiled(False)
    kept = [program.memory_analysis().temp_size_in_bytes for program in (remat, plain, everything)]
    assert kept[0] < 0.85 * kept[1] and kept[0] < 0.6 * kept[2] and kept[1] < 0.85 * kept[2]
    batch = jax.tree.map(jnp.asarray, batch)
    assert_close(remat(params, batch), plain(params, batch))


def test_inference_computes_nothing_twice(monkeypatch):
    """Attention's recomputation in the backward pass leaves the forward program unchanged."""
    config = small_config("qwen2_5_vl").replace(dtype="bfloat16")  # float32 on CPUs has another form
    batch = train_batch(config, [samples_of(config)]).inputs
    params = specs.abstract_params(config)

    def products(backward):
        def f(params, batch):
            return qwenvl.hidden(config, params, batch).sum() if backward else qwenvl.forward(config, params, batch)

        return jax.jit(jax.grad(f) if backward else f).lower(params, batch).as_text().count("dot_general")

    forward, backward = products(False), products(True)
    monkeypatch.setattr(jax, "checkpoint", lambda f, **_: f)
    assert forward == products(False) and backward > products(True)


@pytest.mark.slow
def test_sft_loss_counts_what_is_learnt():
    config = small_config("qwen2_5_vl")
    params, batch = params_of(config), train_batch(config, [samples_of(config)])
    batch = batch._replace(weights=batch.weights * np.float32(0.5))
    total, weight, metrics = jax.jit(partial(sft_loss, config))(params, batch)
    logits = np.asarray(jax.jit(partial(qwenvl.forward, config))(params, batch.inputs), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    assert_close(total, -(picked * batch.weights).sum())
    assert weight == batch.weights.sum()
    assert metrics["accuracy"] == ((logits.argmax(-1) == batch.targets) * batch.weights).sum()


def dpo_batch(config):
    """Three pairs in two rows; the fourth has only a chosen answer, so it does not count."""
    rng = np.random.default_rng(1)
    pic = picture(rng, config, 4, 6)
    pairs = [[sample(rng, config, 2, pic, n), sample(rng, config, 2, pic, m)] for n, m in ((5, 7), (3, 4), (9, 6))]
    batch = train_batch(config, [pairs[0] + pairs[1], pairs[2] + [sample(rng, config, 8)]])
    reference = rng.normal(-20, 12, (2, 4)).astype(np.float32)
    return PreferenceBatch(*batch, reference), [(0, 0), (0, 2), (1, 0)]


@pytest.mark.slow
def test_dpo_equals_the_papers_formula_in_float64():
    """Loss and metrics by eq. 7, and the gradient that the paper gives below it, both from our logits."""
    config, beta = small_config("qwen2_5_vl"), 0.3
    params = params_of(config)
    batch, pairs = dpo_batch(config)

    def ours(params):
        total, weight, metrics = dpo_loss(config, params, batch, beta=beta)
        return total, (weight, metrics)

    (total, (weight, metrics)), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)

    x, pull = jax.vjp(jax.jit(lambda p: decoder.final_norm(config, p, qwenvl.hidden(config, p, batch.inputs))), params)
    kernel = np.asarray(params["decoder"]["lm_head"]["kernel"], np.float64)
    x = np.asarray(x, np.float64)
    p = np.exp(x @ kernel)
    p /= p.sum(-1, keepdims=True)
    onehot = np.eye(p.shape[-1])[batch.targets]
    logp = np.log((p * onehot).sum(-1)) * batch.weights
    segments = batch.inputs.segments
    d_logp = np.zeros(logp.shape)
    loss = margins = wins = 0.0
    for b, i in pairs:
        chosen, rejected = (segments[b] == s for s in (i + 1, i + 2))
        rewards = [
            beta * (logp[b, here].sum() - np.float64(batch.reference[b, slot]))
            for here, slot in ((chosen, i), (rejected, i + 1))
        ]
        margin = rewards[0] - rewards[1]
        loss += np.log1p(np.exp(-margin))
        margins, wins = margins + margin, wins + (margin > 0)
        share = -beta / (1 + np.exp(margin))  # -β σ(r̂(rejected) - r̂(chosen))
        d_logp[b] += share * (chosen.astype(float) - rejected)
    d_logits = (d_logp * batch.weights)[..., None] * (onehot - p)
    want = pull(jnp.asarray(d_logits @ kernel.T, jnp.float32))[0]
    want["decoder"]["lm_head"] = {"kernel": np.einsum("BTD,BTV->DV", x, d_logits)}

    assert weight == 3
    assert_close(total, loss)
    assert_close(metrics, {"margin": margins, "accuracy": wins})
    assert_close(grads, want, 2e-5)


def test_segment_logprobs_are_those_of_each_sample_alone():
    config = small_config("qwen2_vl")
    params, samples = params_of(config), samples_of(config)
    logprobs = jax.jit(segment_logprobs, static_argnums=(0, 3))
    packed = logprobs(config, params, train_batch(config, [samples[:3], samples[3:]]), 4)
    alone = logprobs(config, params, train_batch(config, [[s] for s in samples]), 1)
    assert_close(packed, np.array([[*alone[:3, 0], 0], [alone[3, 0], 0, 0, 0]]))
    assert (np.asarray(packed) < 0).sum() == 4


def test_dpo_needs_a_reference_for_whole_pairs():
    config = small_config("qwen2_5_vl")
    batch = PreferenceBatch(*train_batch(config, [samples_of(config)[:2]]), np.zeros((1, 3), np.float32))
    with pytest.raises(InputError, match="reference"):
        dpo_loss(config, params_of(config), batch)
