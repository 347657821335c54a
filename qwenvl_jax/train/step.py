"""One optimizer step as one compiled program: gradients of the trainable leaves, summed over micro-batches.

The optimizer gets a flat dict from path to array that holds the trainable leaves only, in float32. Layers are stacked:
a norm that an optimizer takes of a leaf is one of all layers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.params.specs import MATMULS, Spec, flatten, param_shardings, unflatten
from qwenvl_jax.sharding import activation_sharding
from qwenvl_jax.train.options import GROUPS, OPTIMIZERS, SCHEDULES
from qwenvl_jax.types import Batch, TrainBatch, VisionBatch


class TrainState(NamedTuple):
    """The values that a step changes. Moments are float32 for parameters of any dtype; `mu_dtype` changes the first."""

    step: Any  # [] int32: updates made
    params: dict  # all parameters, trainable or not
    opt_state: Any  # of the trainable leaves only


def make_schedule(
    learning_rate: float, schedule="constant", *, warmup=0, total: int | None = None, cooldown=0, end=0.0
) -> optax.Schedule:
    """Learning rate per update: it rises from 0 over `warmup` updates, then falls to `end`·learning_rate at `total`.

    schedule: how it falls; "constant" does not, except to 0 over the last `cooldown` updates.
    Raises OptionsError for an unknown schedule, and if `total` is not more than `warmup`.
    """
    if schedule not in SCHEDULES:
        raise OptionsError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if schedule == "constant":
        after = optax.constant_schedule(learning_rate)
        if cooldown:
            after = optax.linear_schedule(learning_rate, 0.0, cooldown, total - cooldown - warmup)
    elif total is None or total <= warmup:
        raise OptionsError(f"a {schedule} schedule ends after {total} steps, which must be more than warmup, {warmup}")
    elif schedule == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, total - warmup, end)
    else:
        after = optax.linear_schedule(learning_rate, end * learning_rate, total - warmup)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), after], [warmup])


def learning_rate_at(learning_rate: float, schedule: str, step: int, total: float, *, warmup=0, cooldown=0) -> float:
    """`make_schedule`'s rate of one update, as a host number, if the total is an estimate that changes.

    total: the number of updates, as far as it is known before this one; infinity if nothing is known.
    """
    if step < warmup:
        return learning_rate * step / warmup
    if schedule == "constant":
        return learning_rate * (min(1.0, max(0.0, total - step) / cooldown) if cooldown else 1.0)
    share = min(1.0, (step - warmup) / (total - warmup)) if total > warmup else 1.0
    return learning_rate * ((1 + math.cos(math.pi * share)) / 2 if schedule == "cosine" else 1 - share)


def make_optimizer(
    specs: dict[str, Spec], learning_rate, name="adamw", *, scales=None, weight_decay=0.0, clip=1.0, **adam
) -> optax.GradientTransformation:
    """An optimizer of a flat dict of parameters that are in `specs`.

    name: "adamw" is arXiv:1711.05101. "muon" updates the kernels of hidden layers by their orthogonalised momentum,
        scaled as in arXiv:2502.16982, section 2.2, so that AdamW's learning rate suits it; all else uses AdamW.
    learning_rate: a number or a schedule; None if every call of the step gives one.
    scales: factors of the learning rate per group, such as {"vision": 0.1}.
    weight_decay: not for biases and the scales of norms. clip: largest global gradient norm, None for no limit.
    adam: b1, b2, eps and mu_dtype (dtype of the first moment) of `optax.scale_by_adam`.
    Raises OptionsError for a name that is not in OPTIMIZERS, and a group that is not in GROUPS.
    """
    if name not in OPTIMIZERS:
        raise OptionsError(f"optimizer {name!r} is not one of {', '.join(OPTIMIZERS)}")
    for part in scales or {}:
        if part not in GROUPS:
            raise OptionsError(f"{part!r} is not one of the groups {', '.join(GROUPS)}")
    rule = optax.scale_by_adam(**adam)
    if name == "muon":
        axes = partial(jax.tree.map, lambda w: optax.contrib.MuonDimensionNumbers(w.ndim - 2, w.ndim - 1))
        muon = optax.contrib.scale_by_muon(mu_dtype=adam.get("mu_dtype"), weight_dimension_numbers=axes)
        rules = {"muon": optax.chain(muon, optax.stateless(_as_large)), "adamw": rule}
        rule = optax.partition(rules, lambda params: {p: _rule(specs[p]) for p in params})

    def scale_groups(updates, _):
        return {path: u * scales.get(specs[path].group, 1.0) for path, u in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        rule,
        optax.add_decayed_weights(weight_decay, partial(decays, specs)) if weight_decay else optax.identity(),
        optax.stateless(scale_groups) if scales else optax.identity(),
        _given_rate() if learning_rate is None else optax.scale_by_learning_rate(learning_rate),
    )


def _given_rate() -> optax.GradientTransformationExtraArgs:
    """Scales updates by the `learning_rate` of the call."""

    def update(updates, state, params=None, *, learning_rate, **_):
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _rule(spec: Spec) -> str:
    """The rule for a parameter under "muon". Embeddings and the head are not hidden layers."""
    return "muon" if spec.role in MATMULS and spec.role != "head" else "adamw"


def _as_large(updates, _):
    """Scales orthogonal updates to the usual size of AdamW's."""
    return jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)


def decays(specs: dict[str, Spec], params: dict) -> dict[str, bool]:
    """Weight-decay mask of a flat dict: all parameters except biases and scales."""
    return {path: specs[path].role not in ("bias", "scale", "lora_scale") for path in params}


def init_state(specs: dict[str, Spec], params: dict, optimizer, trainable: Callable[[str], bool]) -> TrainState:
    """The state before the first step. It holds `params` without a copy, and the first step donates them.

    On a mesh, call it and the step within `jax.set_mesh(mesh)`. Raises InputError if nothing is trainable.
    """

    def start(train):
        opt_state = optimizer.init(masters(train))
        # Some states hold the parameters. Without a copy, both would share a buffer that a step donates twice.
        opt_state = jax.tree.map(jnp.copy, opt_state)
        return _constrained(TrainState(jnp.zeros((), jnp.int32), {}, opt_state), specs)

    params = jax.tree.map(jnp.asarray, params)
    return jax.jit(start)(split(params, trainable)[0])._replace(params=params)


def masters(train: dict) -> dict:
    """The parameters as an optimizer sees them: in float32."""
    return {path: w.astype(jnp.float32) for path, w in train.items()}


def update(optimizer, grads: dict, opt_state, params: dict, **given):
    """(updates, state) of any optimizer. One that asks for `value` or `grad`, as polyak_sgd does, gets them.

    given: `value`, the loss, and `learning_rate` if the options of the run decide it.
    """
    return optax.with_extra_args_support(optimizer).update(grads, opt_state, params, grad=grads, **given)


def make_step(
    specs: dict[str, Spec], loss: Callable, optimizer, trainable: Callable[[str], bool], *, noise=None, seed=0
) -> Callable:
    """Compiles `step(state, batch, rate=None) → (state, metrics)`; the first argument is donated.

    specs: of all parameters (`specs_of`).
    loss: (params, TrainBatch) → (total, weight, metrics), all sums, such as `partial(sft_loss, config)`.
    noise: (params, key) → params, applied before the loss of each micro-batch, such as LoRA's dropout. The key follows
        from `seed`, the step and the micro-batch.

    batch: a TrainBatch whose leaves have a leading axis A of micro-batches, which are computed one after the other.
        The gradient is the sum of theirs divided by the sum of their weights, so A only trades memory for time.
    rate: [] float32: the learning rate, if the optimizer has none of its own.
    metrics: scalars on the device. `loss`; `weight`, the trained tokens or pairs that it is averaged over; `grad_norm`
        before clipping; `finite`; and the averaged metrics of the loss. If the loss or the gradient is not finite,
        `finite` is False and the state does not change. `learning_rate` if the state of the optimizer holds one, as
        that of `optax.inject_hyperparams` does.
    """

    def step(state: TrainState, batch: TrainBatch, rate=None):
        train, frozen = split(state.params, trainable)
        constrained = partial(_constrained, specs=specs)
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)

        def total_of(train, micro, index):
            params = unflatten(train | frozen)
            if noise is not None:
                params = noise(params, jax.random.fold_in(step_key, index))
            total, weight, metrics = loss(params, micro)
            return total, {"loss": total, "weight": weight} | metrics

        grads, sums = _summed(jax.grad(total_of, has_aux=True), train, batch, constrained)
        weight = sums.pop("weight")
        share = 1 / jnp.where(weight > 0, weight, 1)
        grads = jax.tree.map(lambda g: g * share, grads)
        metrics = {name: value * share for name, value in sums.items()}
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

        given = {"value": metrics["loss"]} | ({} if rate is None else {"learning_rate": rate})
        full = masters(train)
        updates, opt_state = update(optimizer, grads, state.opt_state, full, **given)
        new = {path: (w + updates[path]).astype(train[path].dtype) for path, w in full.items()}
        new, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (new, opt_state), (train, state.opt_state)
        )
        state = constrained(TrainState(state.step + finite, unflatten(new | frozen), opt_state))
        found = [x for _, x in optax.tree.get_all_with_path(opt_state, "learning_rate")]
        rates = [x for x in found if isinstance(x, jax.Array) and x.ndim == 0]
        metrics |= {"learning_rate": rates[0]} if len(rates) == 1 else {}
        return state, metrics | {"weight": weight, "grad_norm": norm, "finite": finite}

    return jax.jit(step, donate_argnums=0)


def _summed(gradient: Callable, train: dict, batch: TrainBatch, constrained: Callable) -> tuple[dict, dict]:
    """Gradients and metrics, summed over the micro-batches in float32."""
    micros = len(batch.targets)
    first = jax.tree.map(lambda a: a[0], batch), jnp.zeros((), jnp.int32)
    if micros == 1:  # saves a pass over all gradients, which would add them to zeros
        grads, sums = gradient(train, *first)
        return constrained(jax.tree.map(lambda g: g.astype(jnp.float32), grads)), sums

    def accumulate(carry, part):
        grads, sums = gradient(train, *part)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (constrained(grads), sums)), None

    _, sums = jax.eval_shape(gradient, train, *first)
    grads, sums = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (train, sums))
    return jax.lax.scan(accumulate, (constrained(grads), sums), (batch, jnp.arange(micros)))[0]


def shardings(tree, specs: dict[str, Spec], mesh):
    """A tree of NamedSharding for a TrainState or gradients, whose leaves are arrays or shapes.

    A leaf with the path and shape of a parameter is split as that parameter; all others are replicated.
    """
    split, replicated = flatten(param_shardings(specs, mesh)), NamedSharding(mesh, PartitionSpec())

    def sharding(path, leaf):
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        name = keys[-1] if keys and "/" in keys[-1] else "/".join(keys)
        return split[name] if name in specs and specs[name].shape == leaf.shape else replicated

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_shardings(batch, mesh):
    """A tree of NamedSharding for a TrainBatch or a subtype with a leading axis A: rows and lanes are split."""
    lanes = VisionBatch("RPC", "RP.", "RP", "RP")
    inputs = Batch("BT", ".BT", "BT", "BT", (lanes,) * len(batch.inputs.vision))
    dims = jax.tree.map(lambda a: "B" + "." * (len(a.shape) - 2), batch)._replace(inputs=inputs)
    return jax.tree.map(lambda d, leaf: activation_sharding(f".{d}", leaf.shape, mesh), dims, batch)


def split(params: dict, trainable: Callable[[str], bool]) -> tuple[dict, dict]:
    """(trainable, frozen) leaves by path."""
    flat = flatten(params)
    train = {path: w for path, w in flat.items() if trainable(path)}
    if not train:
        raise InputError("nothing is trainable: every group is frozen, or no parameter matches the pattern")
    if packed := next((path for path in train if path.endswith("/scales")), None):
        linear = packed.removesuffix("/scales")
        raise InputError(
            f"{linear} is quantised and cannot be trained itself; train adapters (lora_rank), or freeze it"
        )
    return train, {path: w for path, w in flat.items() if path not in train}


def _constrained(tree, specs: dict[str, Spec]):
    """Fixes the layout that one step hands to the next. Otherwise XLA chooses another, and the next step recompiles."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, shardings(tree, specs, mesh))
