"""Optimizers of the caller's own: any of optax's trains, is stored and goes on; another one is refused."""

import signal

import jax
import numpy as np
import optax
import pytest
from test_loop import CONFIG, Batches, Epochs, equal, exactly, model, options, spoil
from test_step import SPECS, copy, everything, toy_batch, toy_loss, toy_params
from tiny import tiny_params

from qwenvl_jax.errors import OptionsError
from qwenvl_jax.params.specs import flatten
from qwenvl_jax.train import loop, run
from qwenvl_jax.train.optimizer import from_arrays, identity, refuse_another, to_arrays, with_optimizer
from qwenvl_jax.train.options import RULE, TrainOptions
from qwenvl_jax.train.step import init_state, make_step


def noisy(rate=1e-2):
    return optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(rate))


def scheduled(rate=1e-2, steps=10):
    return optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(rate, 0.0, steps))


def two_rules():
    def labels(params):
        return {path: "slow" if path.startswith("vision/") else "fast" for path in params}

    return optax.partition({"slow": optax.sgd(1e-3), "fast": optax.adam(1e-2)}, labels)


# States without an array, with keys, with the parameters, of many trees; rules that need the loss.
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(1e-2),
    "adam": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "adafactor": lambda: optax.adafactor(1e-2),
    "noise": noisy,
    "schedule": scheduled,
    "partition": two_rules,
    "accumulate": lambda: optax.MultiSteps(optax.lion(1e-3), 2),
    "schedule-free": lambda: optax.contrib.schedule_free_sgd(1e-2),
    "prodigy": lambda: optax.contrib.prodigy(),
    "polyak": lambda: optax.polyak_sgd(1e-2),
    "plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_of_optax_goes_on_from_its_arrays(name):
    """Two steps, stored, and two more: the same as four, and as optax by itself."""
    optimizer = OPTIMIZERS[name]()
    step = make_step(SPECS, toy_loss, optimizer, everything)
    batches = [toy_batch(seed=i) for i in range(4)]
    state, middle = init_state(SPECS, toy_params(), optimizer, everything), None
    params = flatten(copy(state.params))
    alone = optax.with_extra_args_support(optimizer)
    opt_state = alone.init(params)
    for i, batch in enumerate(batches):
        if i == 2:
            middle = copy(state.params), state.step.copy(), jax.tree.map(np.array, to_arrays(state.opt_state))
        micro = jax.tree.map(lambda a: a[0], batch)

        def loss(params, micro=micro):
            total, weight, _ = toy_loss(params, micro)
            return total / weight

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = alone.update(grads, opt_state, params, value=value, grad=grads)
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, batch)
        assert metrics["finite"] and ("learning_rate" in metrics) == (name == "schedule")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), flatten(copy(state.params)), params
    )
    assert step._cache_size() == 1
    fresh = init_state(SPECS, toy_params(), optimizer, everything)
    again = fresh._replace(params=middle[0], step=middle[1], opt_state=from_arrays(middle[2], fresh.opt_state))
    for batch in batches[2:]:
        again, _ = step(again, batch)
    assert equal(copy(again.params), copy(state.params))
    assert equal(to_arrays(again.opt_state), to_arrays(state.opt_state))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_known_again(name):
    train = flatten(toy_params())
    mine = identity(OPTIMIZERS[name](), train)
    refuse_another(mine, identity(OPTIMIZERS[name](), train), "run")
    for other in OPTIMIZERS.keys() - {name}:
        with pytest.raises(OptionsError, match="run: a run with another optimizer"):
            refuse_another(mine, identity(OPTIMIZERS[other](), train), "run")


@pytest.mark.parametrize(
    "one, two",
    [
        (optax.adam(1e-2), optax.adam(2e-2)),
        (optax.adam(1e-2), optax.adam(1e-2, b1=0.8)),
        (scheduled(steps=10), scheduled(steps=20)),
        (noisy(1e-2), noisy(2e-2)),
        (optax.adam(1e-2), optax.adam(1e-2, mu_dtype="bfloat16")),
    ],
)
def test_a_changed_number_is_another_optimizer(one, two):
    train = flatten(toy_params())
    one, two = identity(one, train), identity(two, train)
    with pytest.raises(OptionsError, match=r"its rule or a number in it differs|other arrays"):
        refuse_another(one, two, "run")
    if one["arrays"] == two["arrays"]:  # another version of jax may trace the same rule to another program
        one["rule"][0] = "jax 0.0"
        refuse_another(one, two, "run")


@pytest.mark.parametrize(
    "optimizer, sentence",
    [
        (optax.lbfgs(), "cannot update the parameters .*value_fn"),
        (optax.lookahead(optax.sgd(1.0), 5, 0.5), "cannot update the parameters .*fast"),
        (optax.masked(optax.sgd(1.0), {"decoder": True}), "cannot update the parameters"),
        (optax.GradientTransformation(lambda p: (), lambda g, s, p: ({}, s)), "updates are not of the paths"),
        (
            optax.GradientTransformation(lambda p: np.zeros(1), lambda g, s, p: (g, np.zeros(2))),
            "an update changes the shapes or dtypes of its state",
        ),
    ],
)
def test_what_cannot_train_is_refused_at_the_start(optimizer, sentence, tmp_path):
    with pytest.raises(OptionsError, match=sentence):
        identity(optimizer, flatten(toy_params()))
    with pytest.raises(OptionsError, match=sentence):
        loop.train(model(), Batches(), own(tmp_path / "run"), optimizer=optimizer)
    assert not (tmp_path / "run").exists()


def own(output, **changes) -> TrainOptions:
    defaults = {name: getattr(TrainOptions(), name) for name in RULE}
    return options(output, **defaults | dict(steps=6, save_every=2) | changes)


def test_options_without_effect_are_refused(tmp_path):
    assert with_optimizer(own("x"), optax.sgd(1.0)).optimizer == "custom"
    assert with_optimizer(with_optimizer(own("x"), optax.sgd(1.0)), optax.sgd(1.0)).optimizer == "custom"
    others = dict(optimizer="muon", learning_rate=1.0, vision_learning_rate=1.0, merger_learning_rate=1.0, warmup=1)
    others |= dict(weight_decay=0.0, betas=(0.5, 0.5), clip=0.0, moment_dtype="bfloat16", schedule="constant")
    assert others.keys() | {"cooldown"} == set(RULE)
    for name, value in others.items():
        with pytest.raises(OptionsError, match=f"{name} has no effect with an optimizer of one's own"):
            with_optimizer(own("x", **{name: value}), optax.sgd(1.0))
    with pytest.raises(OptionsError, match="is made in Python"):
        loop.train(model(), Batches(), own(tmp_path, optimizer="custom"))
    for wrong in ("adam", optax.adam, 1e-3):
        with pytest.raises(OptionsError, match=r"must be an optax\.GradientTransformation"):
            loop.train(model(), Batches(), own(tmp_path), optimizer=wrong)


@pytest.mark.parametrize("name", ["sgd", "noise"])
def test_a_run_with_it_goes_on_bit_for_bit(name, tmp_path):
    """Stopped after 3 of 6 steps; the fifth batch is not finite and reaches neither weights nor state."""
    bad = {4: spoil}
    straight = loop.train(model(), Batches(bad), own(tmp_path / "a"), optimizer=OPTIMIZERS[name]())
    stop = bad | {3: lambda _: signal.raise_signal(signal.SIGTERM)}
    assert loop.train(model(), Batches(stop), own(tmp_path / "b"), optimizer=OPTIMIZERS[name]()).step == 3
    with pytest.raises(OptionsError, match="another optimizer"):
        loop.train(model(), Batches(), own(tmp_path / "b"), optimizer=optax.adam(1e-2))
    with pytest.raises(OptionsError, match="optimizer was custom and is adamw"):
        loop.train(model(), Batches(), own(tmp_path / "b"))
    result = loop.train(model(), Batches(bad), own(tmp_path / "b"), optimizer=OPTIMIZERS[name]())
    assert result.step == 6 and equal(result.params, straight.params)
    assert exactly(tmp_path / "a") == exactly(tmp_path / "b")
    assert [line["skipped_steps"] for line in exactly(tmp_path / "b")] == [0] * 4 + [1] * 2
    before, after = flatten(tiny_params(CONFIG)), flatten(result.params)  # `freeze` holds
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {p for p in before if not p.startswith("vision/") or p.startswith("vision/merger/")}


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "noise", "adafactor"])
def test_on_a_mesh_by_epochs(name, tmp_path):
    """Four devices give the losses of one, with a learning rate by its share too; and a resumed run goes on."""
    rule = None if name is None else OPTIMIZERS[name]
    losses = []
    for sizes in ({}, dict(mesh_data=2, mesh_fsdp=2)):
        output = tmp_path / str(len(losses))
        how = dict(steps=None, epochs=2, **sizes) | ({} if rule else dict(learning_rate=1e-2, schedule="linear"))
        stop = {3: lambda _: signal.raise_signal(signal.SIGTERM)}
        for events in (stop, {}):
            more = {} if rule is None else dict(optimizer=rule())
            loop.train(model(), Epochs(2, events), own(output, **how), donate=True, **more)
        losses.append([line["loss"] for line in exactly(output)])
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_it_may_go_on_for_longer(tmp_path):
    """With adapters; the number of steps is not one of the optimizer's."""
    lora = dict(lora_rank=2, freeze=())
    shapes = []
    seen = optax.stateless(lambda updates, params: shapes.append(sorted(params)) or updates)
    for steps in (2, 4):
        optimizer = optax.chain(seen, optax.adam(1e-2))
        result = loop.train(model(), Batches(), own(tmp_path, steps=steps, **lora), optimizer=optimizer)
        assert result.step == steps
    assert all("lora_" in path for path in shapes[0])
    assert len(run.read_metrics(tmp_path)) == 4
    with pytest.raises(OptionsError, match="has made 4 steps; steps is 3"):
        loop.train(model(), Batches(), own(tmp_path, steps=3, **lora), optimizer=optimizer)


def test_callbacks_see_every_step(tmp_path):
    """Whatever `log_every` is, with the scores of an evaluation; what they raise ends the run."""
    seen, steps = {}, []
    more = dict(log_every=5, eval_every=3, max_bad_steps=2)
    reports = [seen.__setitem__, lambda step, metrics: steps.append(step)]
    data = Batches({4: spoil})
    loop.train(model(), data, options(tmp_path, steps=6, **more), evaluate=lambda p: {"x": 0.5}, on_metrics=reports)
    assert steps == list(seen) == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "learning_rate", "tokens", "skipped_steps"} <= seen[1].keys()
    assert [step for step in seen if "eval/x" in seen[step]] == [3, 6]
    assert np.isnan(seen[5]["loss"]) and seen[5]["skipped_steps"] == 1
    assert all("tokens_per_second" in seen[step] for step in range(2, 7))
    assert [line["step"] for line in run.read_metrics(tmp_path)] == [3, 5, 6]

    def broken(step, metrics):
        raise RuntimeError(f"no server at step {step}")

    with pytest.raises(RuntimeError, match="no server at step 1"):
        loop.train(model(), Batches(), options(tmp_path / "other", steps=6), on_metrics=broken)
