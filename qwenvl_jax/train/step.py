"""One optimizer step as one compiled program: gradients of the trainable leaves only, summed over micro-batches.

Frozen leaves have no gradient, no optimizer state, and no place in what the optimizer sees: a flat dict from
parameter path to array. Every optax transformation that works leaf by leaf works on it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.errors import InputError
from qwenvl_jax.params.specs import MATMULS, Spec, flatten, param_shardings, unflatten
from qwenvl_jax.sharding import activation_sharding
from qwenvl_jax.train.options import GROUPS, OPTIMIZERS, SCHEDULES
from qwenvl_jax.types import Batch, TrainBatch, VisionBatch


class TrainState(NamedTuple):
    """Everything a step changes. Moments are float32 (the first as `mu_dtype` says), whatever the parameters are."""

    step: Any  # [] int32: updates made
    params: dict  # the whole tree, trainable or not
    opt_state: Any  # of the trainable leaves only


def make_schedule(
    learning_rate: float,
    schedule: str = "constant",
    *,
    warmup: int = 0,
    total: int | None = None,
    cooldown: int = 0,
    end: float = 0.0,
) -> optax.Schedule:
    """Learning rate by update: from 0 up in `warmup` updates, then constant, or down to `end`·learning_rate at `total`.

    cooldown: a constant one falls after all, to 0, in so many updates up to `total`.
    Raises InputError for a name that is not in SCHEDULES, and for a decay without a `total` beyond `warmup`.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if schedule == "constant":
        after = optax.constant_schedule(learning_rate)
        if cooldown:
            fall = optax.linear_schedule(learning_rate, 0.0, cooldown)
            after = optax.join_schedules([after, fall], [total - cooldown - warmup])
    elif total is None or total <= warmup:
        raise InputError(f"a {schedule} schedule ends after {total} steps, which must be more than warmup, {warmup}")
    elif schedule == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, total - warmup, end)
    else:
        after = optax.linear_schedule(learning_rate, end * learning_rate, total - warmup)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), after], [warmup])


def make_optimizer(
    specs: dict[str, Spec],
    learning_rate: float | optax.Schedule,
    name: str = "adamw",
    *,
    scales: dict[str, float] | None = None,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype=None,
) -> optax.GradientTransformation:
    """An optimizer on a flat dict of parameters, some of those of `specs`, by a name of OPTIMIZERS.

    "adamw": arXiv:1711.05101. "muon": kernels of hidden layers are moved by their orthogonalised momentum, as far as
    AdamW would (arXiv:2502.16982, section 2.2), so that one learning rate suits both; the rest by AdamW.
    learning_rate: a number, or what `make_schedule` gives. scales: factors on it by group, such as {"vision": 0.1}.
    weight_decay: not for biases and the scales of norms. clip: largest global gradient norm, None for no limit.
    mu_dtype: of the first moment, such as "bfloat16"; None is float32.
    Raises InputError for a group that is not in GROUPS, or a name that is not in OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer {name!r} is not one of {', '.join(OPTIMIZERS)}")
    for part in scales or {}:
        if part not in GROUPS:
            raise InputError(f"{part!r} is not one of the groups {', '.join(GROUPS)}")
    rule = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
    if name == "muon":
        axes = partial(jax.tree.map, lambda w: optax.contrib.MuonDimensionNumbers(w.ndim - 2, w.ndim - 1))
        muon = optax.contrib.scale_by_muon(mu_dtype=mu_dtype, weight_dimension_numbers=axes)
        rules = {"muon": optax.chain(muon, optax.stateless(_as_large)), "adamw": rule}
        rule = optax.partition(rules, lambda params: {p: _rule(specs[p]) for p in params})

    def scale_groups(updates, _):
        return {path: u * scales.get(specs[path].group, 1.0) for path, u in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        rule,
        optax.add_decayed_weights(weight_decay, partial(decays, specs)) if weight_decay else optax.identity(),
        optax.stateless(scale_groups) if scales else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def _rule(spec: Spec) -> str:
    """Which rule Muon has for a parameter: embeddings and the head are not hidden layers."""
    return "muon" if spec.role in MATMULS and spec.role != "head" else "adamw"


def _as_large(updates, _):
    """Orthogonal updates, as large as AdamW's usually are."""
    return jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)


def decays(specs: dict[str, Spec], params: dict) -> dict[str, bool]:
    """Weight-decay mask of a flat dict: everything but biases and scales."""
    return {path: specs[path].role not in ("bias", "scale", "lora_scale") for path in params}


def init_state(
    specs: dict[str, Spec], params: dict, optimizer: optax.GradientTransformation, trainable: Callable[[str], bool]
) -> TrainState:
    """The state before the first step. It holds `params` themselves, which the first step therefore uses up.

    On a mesh, call it (like the step) within `jax.set_mesh(mesh)`.
    Raises InputError if nothing is trainable.
    """

    def start(train):
        opt_state = optimizer.init({path: w.astype(jnp.float32) for path, w in train.items()})
        return _settled(TrainState(jnp.zeros((), jnp.int32), {}, opt_state), specs)

    params = jax.tree.map(jnp.asarray, params)
    return jax.jit(start)(_split(params, trainable)[0])._replace(params=params)


def make_step(
    specs: dict[str, Spec],
    loss: Callable,
    optimizer: optax.GradientTransformation,
    trainable: Callable[[str], bool],
    *,
    noise=None,
    seed=0,
):
    """Compiles `step(state, batch) → (state, metrics)`; the state that goes in is donated.

    specs: of all leaves of the parameters (`specs_of`).
    loss: (params, TrainBatch) → (total, weight, metrics), all sums, such as `partial(sft_loss, config)`.
    batch: a TrainBatch whose every leaf has a leading axis A of micro-batches, which are read one after the other.
    The gradient is the sum of theirs over the sum of their weights, so that A only trades memory for time.
    noise: (params, key) → params, applied before the loss with another key every micro-batch (LoRA's dropout);
    keys follow from `seed`, the step and the micro-batch.

    metrics, all scalars on the device: `loss`, `weight` (what the loss is averaged over: trained tokens or pairs),
    `grad_norm` before clipping, `finite`, and the loss's own, averaged. Where loss or gradient are not finite,
    `finite` is False and the state comes back as it was.
    """

    def step(state: TrainState, batch: TrainBatch):
        train, frozen = _split(state.params, trainable)
        settled = partial(_settled, specs=specs)
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)

        def total_of(train, micro, index):
            params = unflatten(train | frozen)
            if noise is not None:
                params = noise(params, jax.random.fold_in(step_key, index))
            total, weight, metrics = loss(params, micro)
            return total, {"loss": total, "weight": weight} | metrics

        grads, sums = _summed(jax.grad(total_of, has_aux=True), train, batch, settled)
        weight = sums.pop("weight")
        share = 1 / jnp.where(weight > 0, weight, 1)
        grads = jax.tree.map(lambda g: g * share, grads)
        metrics = {name: value * share for name, value in sums.items()}
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

        masters = {path: w.astype(jnp.float32) for path, w in train.items()}
        updates, opt_state = optimizer.update(grads, state.opt_state, masters)
        new = {path: (w + updates[path]).astype(train[path].dtype) for path, w in masters.items()}
        new, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (new, opt_state), (train, state.opt_state)
        )
        state = settled(TrainState(state.step + finite, unflatten(new | frozen), opt_state))
        return state, metrics | {"weight": weight, "grad_norm": norm, "finite": finite}

    return jax.jit(step, donate_argnums=0)


def _summed(gradient: Callable, train: dict, batch: TrainBatch, settled: Callable) -> tuple[dict, dict]:
    """Gradients and metrics, summed over the micro-batches in float32."""
    micros = len(batch.targets)
    first = jax.tree.map(lambda a: a[0], batch), jnp.zeros((), jnp.int32)
    if micros == 1:  # without a pass over all gradients to add them to zeros
        grads, sums = gradient(train, *first)
        return settled(jax.tree.map(lambda g: g.astype(jnp.float32), grads)), sums

    def accumulate(carry, part):
        grads, sums = gradient(train, *part)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (settled(grads), sums)), None

    _, sums = jax.eval_shape(gradient, train, *first)
    grads, sums = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (train, sums))
    return jax.lax.scan(accumulate, (settled(grads), sums), (batch, jnp.arange(micros)))[0]


def shardings(tree, specs: dict[str, Spec], mesh):
    """A tree of NamedSharding for a TrainState, or for anything else with likenesses of the parameters in it (moments,
    gradients), nested or flat: each lies as its parameter does, all else is on every device. Arrays or shapes."""
    where, whole = flatten(param_shardings(specs, mesh)), NamedSharding(mesh, PartitionSpec())

    def sharding(path, leaf):
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        name = keys[-1] if keys and "/" in keys[-1] else "/".join(keys)
        return where[name] if name in specs and specs[name].shape == leaf.shape else whole

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_shardings(batch, mesh):
    """A tree of NamedSharding for a TrainBatch, or one with more fields, with a leading axis A (arrays or shapes): rows
    and lanes are split."""
    lanes = VisionBatch("RPC", "RP.", "RP", "RP")
    inputs = Batch("BT", ".BT", "BT", "BT", (lanes,) * len(batch.inputs.vision))
    dims = jax.tree.map(lambda a: "B" + "." * (len(a.shape) - 2), batch)._replace(inputs=inputs)
    return jax.tree.map(lambda d, leaf: activation_sharding(f".{d}", leaf.shape, mesh), dims, batch)


def _split(params: dict, trainable: Callable[[str], bool]) -> tuple[dict, dict]:
    """(trainable, frozen) leaves by path."""
    flat = flatten(params)
    train = {path: w for path, w in flat.items() if trainable(path)}
    if not train:
        raise InputError("nothing is trainable: every group is frozen, or no parameter's name fits the pattern")
    return train, {path: w for path, w in flat.items() if path not in train}


def _settled(tree, specs: dict[str, Spec]):
    """One layout for what a step hands to the next; otherwise XLA would choose, and compile again for its choice."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, shardings(tree, specs, mesh))
