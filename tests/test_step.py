"""The step: what changes, its layout and size, and that a bad batch changes nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_losses import assert_close, params_of, samples_of, small_config
from tiny import train_batch, with_text

from qwenvl_jax.errors import InputError
from qwenvl_jax.params.specs import Spec, flatten, specs, unflatten
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.step import GROUPS, decays, init_state, make_optimizer, make_schedule, make_step
from qwenvl_jax.types import TrainBatch

# One leaf of every group, and of every role with rules of its own.
SPECS = {
    "vision/blocks/qkv/kernel": Spec((2, 3, 4), np.float32, ("L", "E", "."), "linear", "vision", None),
    "vision/merger/fc1/bias": Spec((4,), np.float32, (".",), "bias", "merger", None),
    "decoder/layers/q_proj/kernel": Spec((2, 3, 3), np.float32, ("L", "D", "NH"), "linear", "llm", None),
    "decoder/layers/q_proj/lora_scale": Spec((2,), np.float32, ("L",), "lora_scale", "llm", None),
    "decoder/norm/scale": Spec((3,), np.float32, (".",), "scale", "llm", None),
}


def everything(path):
    return True


def toy_params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return unflatten({path: jnp.asarray(rng.standard_normal(s.shape), dtype) for path, s in SPECS.items()})


def toy_loss(params, batch):
    """Σ weights · (target − Σ of all squares)² / 2: each leaf and each micro-batch has another gradient."""
    size = sum(jnp.sum(w.astype(jnp.float32) ** 2) for w in jax.tree.leaves(params))
    return jnp.sum(batch.weights * (batch.targets - size) ** 2) / 2, jnp.sum(batch.weights), {"size": size}


def toy_batch(A=1, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 60, (A, 2, 5))
    return TrainBatch(None, targets, rng.integers(0, 2, targets.shape).astype(np.float32))


def copy(tree):
    return jax.tree.map(np.array, tree)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_groups():
    declared = specs(small_config("qwen2_vl"))
    groups = {name: {path for path, s in declared.items() if s.group == name} for name in GROUPS}
    assert groups["merger"] == {path for path in declared if path.startswith("vision/merger/")}
    assert groups["llm"] == {path for path in declared if path.startswith("decoder/")}
    assert groups["vision"] == declared.keys() - groups["merger"] - groups["llm"]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules(name):
    rate = make_schedule(2.0, name, warmup=4, total=20, end=0.1)
    after = {"constant": [2, 2, 2], "linear": [2, 1.1, 0.2], "cosine": [2, 1.1, 0.2]}[name]
    np.testing.assert_allclose([rate(i) for i in (0, 1, 2, 4, 12, 20)], [0, 0.5, 1, *after], rtol=1e-6)
    np.testing.assert_allclose(make_schedule(2.0, name, total=20)(0), 2, rtol=1e-6)


def test_cooldown():
    rate = make_schedule(2.0, warmup=4, total=20, cooldown=8)
    np.testing.assert_allclose([rate(i) for i in (0, 2, 4, 12, 16, 20)], [0, 1, 2, 2, 1, 0], rtol=1e-6)


def test_muon_turns_kernels_evenly():
    """Kernels move by 0.2 · √(longest side) in every direction; vectors and the head as with AdamW."""
    rng = np.random.default_rng(0)
    shapes = {
        "decoder/layers/q_proj/kernel": (2, 24, 16),
        "decoder/norm/scale": (24,),
        "decoder/lm_head/kernel": (24, 40),
    }
    roles = {path: specs(with_text(small_config("qwen2_vl"), tie_word_embeddings=False))[path] for path in shapes}
    grads = {path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}
    params = jax.tree.map(jnp.zeros_like, grads)
    moved = {}
    for name in ("muon", "adamw"):
        optimizer = make_optimizer(roles, 1.0, name, clip=None)
        moved[name], _ = optimizer.update(grads, optimizer.init(params), params)
    turned = moved["muon"].pop("decoder/layers/q_proj/kernel")
    moved["adamw"].pop("decoder/layers/q_proj/kernel")
    assert_close(moved["muon"], moved["adamw"])
    sizes = np.linalg.svd(turned, compute_uv=False) / (0.2 * 24**0.5)
    assert sizes.shape == (2, 16) and 0.6 < sizes.min() and sizes.max() < 1.3  # five Newton-Schulz steps
    for layer, gradient in zip(turned, grads["decoder/layers/q_proj/kernel"], strict=True):
        assert np.sum(layer * gradient) < 0


@pytest.mark.parametrize("call, names", [
    (lambda: make_schedule(1.0, "step"), "schedule 'step'"),
    (lambda: make_schedule(1.0, "cosine"), "total|ends after None"),
    (lambda: make_schedule(1.0, "linear", warmup=9, total=9), "warmup, 9"),
    (lambda: make_optimizer(SPECS, 1.0, scales={"head": 1.0}), "'head'"),
    (lambda: init_state(SPECS, toy_params(), optax.sgd(1.0), lambda path: False), "nothing is trainable"),
])  # fmt: skip
def test_what_cannot_be(call, names):
    with pytest.raises(InputError, match=names):
        call()


def test_adamw_by_hand():
    """Three updates with every option, against the equations in float64."""
    scales, rate = {"vision": 0.5, "merger": 0.0}, make_schedule(0.1, "linear", warmup=1, total=8)
    optimizer = make_optimizer(SPECS, rate, scales=scales, weight_decay=0.2, clip=3.0, b1=0.8, b2=0.95, eps=1e-3)
    state, step = (
        init_state(SPECS, toy_params(), optimizer, everything),
        make_step(SPECS, toy_loss, optimizer, everything),
    )
    batch = toy_batch()
    weights, targets = batch.weights.astype(np.float64), batch.targets
    w = {path: np.float64(x) for path, x in flatten(toy_params()).items()}
    m, v = ({path: np.zeros(x.shape) for path, x in w.items()} for _ in range(2))
    decay = {"vision/blocks/qkv/kernel", "decoder/layers/q_proj/kernel"}
    assert {path for path, yes in decays(SPECS, w).items() if yes} == decay
    for t in range(3):
        state, metrics = step(state, batch)
        size = sum((x**2).sum() for x in w.values())
        loss = (weights * (targets - size) ** 2).sum() / 2 / weights.sum()
        share = (weights * (size - targets)).sum() / weights.sum()
        grads = {path: 2 * share * x for path, x in w.items()}
        norm = sum((g**2).sum() for g in grads.values()) ** 0.5
        assert norm > 3
        for path, g in grads.items():
            g = g * 3 / norm
            m[path] = 0.8 * m[path] + 0.2 * g
            v[path] = 0.95 * v[path] + 0.05 * g**2
            u = m[path] / (1 - 0.8 ** (t + 1)) / (np.sqrt(v[path] / (1 - 0.95 ** (t + 1))) + 1e-3)
            u += 0.2 * w[path] * (path in decay)
            w[path] = w[path] - float(rate(t)) * scales.get(SPECS[path].group, 1.0) * u
        want = {"loss": loss, "grad_norm": norm, "weight": weights.sum(), "size": size / weights.sum(), "finite": True}
        assert_close(metrics, want)
        assert_close(flatten(state.params), w)
    assert state.step == 3
    assert_equal(state.params["vision"]["merger"], toy_params()["vision"]["merger"])


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_bad_batch_changes_nothing(bad):
    def loss(params, batch):
        total, weight, metrics = toy_loss(params, batch)
        # √0 has a finite value but no finite gradient
        root = jnp.sqrt(jnp.where(batch.targets[0, 0] < 0, 0.0, 1.0) * jnp.sum(params["decoder"]["norm"]["scale"] ** 2))
        return total + (root if bad == "gradient" else 0), weight, metrics

    optimizer = make_optimizer(SPECS, make_schedule(0.1, "cosine", total=9), weight_decay=0.1)
    state, step = init_state(SPECS, toy_params(), optimizer, everything), make_step(SPECS, loss, optimizer, everything)
    good, batch = toy_batch(2), toy_batch(2)
    if bad == "loss":
        batch.weights[1, 0, 0] = np.nan
    else:
        batch.targets[1, 0, 0] = -1
    state, _ = step(state, good)
    before = copy(state)
    state, metrics = step(state, batch)
    assert not metrics["finite"]
    assert np.isfinite(metrics["loss"]) == (bad == "gradient")
    assert_equal(state, before)
    state, metrics = step(state, good)  # training continues
    assert metrics["finite"] and state.step == 2
    assert step._cache_size() == 1


def test_a_batch_without_trained_tokens_is_no_disaster():
    optimizer = make_optimizer(SPECS, 0.1)
    state, step = (
        init_state(SPECS, toy_params(), optimizer, everything),
        make_step(SPECS, toy_loss, optimizer, everything),
    )
    batch = toy_batch()
    state, metrics = step(state, batch._replace(weights=0 * batch.weights))
    assert metrics["finite"] and metrics["loss"] == 0 and metrics["weight"] == 0
    assert_equal(state.params, toy_params())


def test_moments_of_bfloat16_parameters():
    optimizer = make_optimizer(SPECS, 1e-2, mu_dtype="bfloat16", weight_decay=0.1)
    state, step = (
        init_state(SPECS, toy_params(jnp.bfloat16), optimizer, everything),
        make_step(SPECS, toy_loss, optimizer, everything),
    )
    kinds = jax.tree.map(lambda a: a.dtype, state)
    adam = next(s for s in state.opt_state if hasattr(s, "mu"))
    assert {a.dtype for a in adam.mu.values()} == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in adam.nu.values()} == {jnp.dtype("float32")}
    state, _ = step(state, toy_batch())
    assert jax.tree.map(lambda a: a.dtype, state) == kinds
    state, _ = step(state, toy_batch())
    assert step._cache_size() == 1


def test_any_optax_transformation():
    optimizer = optax.chain(optax.adaptive_grad_clip(0.1), optax.adafactor(1e-2, min_dim_size_to_factor=2))
    state, step = (
        init_state(SPECS, toy_params(), optimizer, everything),
        make_step(SPECS, toy_loss, optimizer, everything),
    )
    before, (state, _) = toy_params(), step(state, toy_batch())
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True))


def test_noise_has_another_key_every_time():
    """The noise is the same in a second run and differs at every micro-batch of one."""

    def noise(params, key):
        return params | {"draw": jax.random.uniform(key)}

    def loss(params, batch):
        total, weight, _ = toy_loss({k: v for k, v in params.items() if k != "draw"}, batch)
        return total, weight, {"draw": params["draw"] * 2.0 ** (-8 * batch.targets[0, 0])}

    def run(seed):
        optimizer = optax.sgd(1e-3)
        state = init_state(SPECS, toy_params(), optimizer, everything)
        step = make_step(SPECS, loss, optimizer, everything, noise=noise, seed=seed)
        draws, batch = [], toy_batch(3)
        batch.targets[:, 0, 0] = 0
        one = toy_batch(1)
        one.targets[:, 0, 0] = 0
        for _ in range(3):
            state, metrics = step(state, one)
            draws.append(float(metrics["draw"] * metrics["weight"]))
        state, metrics = step(state, batch)
        return draws, float(metrics["draw"] * metrics["weight"])

    draws, total = run(0)
    assert len({*draws}) == 3
    assert run(0) == (draws, total)
    assert run(1) != (draws, total)
    key = jax.random.fold_in(jax.random.key(0), 3)
    each = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(3)]
    assert total == pytest.approx(sum(each), rel=1e-6) and len({*each}) == 3


# The real model


def stack(batches):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


@pytest.mark.slow
def test_accumulation_equals_one_batch_and_a_frozen_tower_costs_nothing():
    """Four micro-batches of one row with different numbers of trained tokens, against one batch of four rows."""
    config = small_config("qwen2_5_vl")
    samples, declared = samples_of(config), specs(config)
    one = train_batch(config, [[s] for s in samples], T=64)
    shares = one.weights.sum(1)
    assert len({*shares}) > 2
    # Every micro-batch has all lanes, so visual tokens have the same indices.
    four = [one._replace(inputs=one.inputs._replace(**{
        k: getattr(one.inputs, k)[..., i : i + 1, :] for k in ("tokens", "positions", "segments", "visual_index")
    }), targets=one.targets[i : i + 1], weights=one.weights[i : i + 1]) for i in range(4)]  # fmt: skip
    optimizer = optax.sgd(0.1)
    compiled = {}

    def run(batch, trainable, name):
        state = init_state(declared, copy(params_of(config)), optimizer, trainable)
        step = make_step(declared, partial(sft_loss, config), optimizer, trainable)
        compiled[name] = step.lower(state, batch).compile()
        return compiled[name](state, jax.tree.map(jnp.asarray, batch))

    (state, metrics), (want, theirs) = run(stack(four), everything, "four"), run(stack([one]), everything, "one")
    assert metrics["weight"] == shares.sum()
    assert_close(metrics, theirs)
    assert_close(state.params, want.params)

    learns = {path: spec.group != "vision" for path, spec in declared.items()}
    frozen, _ = run(stack([one]), learns.get, "frozen")
    start, now, all_learnt = flatten(params_of(config)), flatten(frozen.params), flatten(want.params)
    assert_equal(*({path: w for path, w in tree.items() if not learns[path]} for tree in (now, start)))
    assert_close(*({path: w for path, w in tree.items() if learns[path]} for tree in (now, all_learnt)))
    assert compiled["frozen"].cost_analysis()["flops"] < 0.75 * compiled["one"].cost_analysis()["flops"]
    adam = init_state(declared, params_of(config), make_optimizer(declared, 1e-3), learns.get)
    held = sum(a.size for a in jax.tree.leaves(adam.opt_state) if a.ndim)
    assert held == 2 * sum(w.size for path, w in start.items() if learns[path])


@pytest.mark.slow
def test_bfloat16_learns_with_float32_parameters():
    config = small_config("qwen2_5_vl")
    optimizer = make_optimizer(specs(config), 5e-3)
    state = init_state(specs(config), copy(params_of(config)), optimizer, everything)
    step = make_step(specs(config), partial(sft_loss, config.replace(dtype="bfloat16")), optimizer, everything)
    batch, losses = stack([train_batch(config, [samples_of(config)])]), []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0], losses
    assert {w.dtype for w in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert step._cache_size() == 1
