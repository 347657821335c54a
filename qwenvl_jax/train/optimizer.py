"""The optimizer of a run: the one that the options describe, or one of the caller's own."""

import re
import zlib

import jax
import numpy as np
import optax

from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.params.specs import Spec
from qwenvl_jax.train.options import CUSTOM, RULE, TrainOptions
from qwenvl_jax.train.step import make_optimizer, masters, update


def with_optimizer(options: TrainOptions, optimizer) -> TrainOptions:
    """The options of a run with the caller's optimizer, or with None.

    Raises OptionsError for an optimizer that is none of optax's, and for options that would have no effect with it.
    """
    if optimizer is None:
        if options.optimizer == CUSTOM:
            raise OptionsError(
                f"optimizer is {CUSTOM!r}: this run's optimizer is made in Python, train(…, optimizer=…)"
            )
        return options
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        kind = type(optimizer).__name__
        raise OptionsError(f"optimizer is of type {kind}; it must be an optax.GradientTransformation, as optax.adam(…)")
    defaults = TrainOptions()
    for name in RULE:
        value = getattr(options, name)
        if value != getattr(defaults, name) and (name, value) != ("optimizer", CUSTOM):
            raise OptionsError(f"{name} has no effect with an optimizer of one's own; make it a part of the optimizer")
    return options.replace(optimizer=CUSTOM)


def from_options(specs: dict[str, Spec], options: TrainOptions, schedule) -> optax.GradientTransformation:
    """The optimizer that the options describe. schedule: its learning rate; None if each step gives one."""
    rates = {"vision": options.vision_learning_rate, "merger": options.merger_learning_rate}
    scales = {name: rate / options.learning_rate for name, rate in rates.items() if rate is not None}
    (b1, b2), clip = options.betas, options.clip or None
    rule = dict(weight_decay=options.weight_decay, clip=clip, b1=b1, b2=b2, mu_dtype=options.moment_dtype)
    return make_optimizer(specs, schedule, options.optimizer, scales=scales, **rule)


def identity(optimizer, train: dict) -> dict:
    """What tells the caller's optimizer from another one, as JSON can hold it.

    train: the trainable leaves by path. The rule's checksum is of the traced program, so it sees every number in it;
    it only compares within one version of jax and optax.
    Raises OptionsError if the optimizer cannot update these parameters.
    """
    params = jax.eval_shape(masters, train)
    loss = jax.ShapeDtypeStruct((), np.float32)

    def one(grads, state, params, value):
        return update(optimizer, grads, state, params, value=value)

    try:
        state = jax.eval_shape(optimizer.init, params)
        traced, (updates, after) = jax.make_jaxpr(one, return_shape=True)(params, state, params, loss)
    except InputError:
        raise
    except Exception as e:
        first = (str(e).strip().splitlines() or [""])[0][:200]
        raise OptionsError(
            f"optimizer: it cannot update the parameters of this run ({type(e).__name__}: {first}). It gets the "
            "gradients, its state, the parameters, and the loss as `value`, all as flat dicts from path to array"
        ) from e
    if _shapes(updates, False) != _shapes(params, False):
        raise OptionsError("optimizer: its updates are not of the paths and shapes of the parameters")
    if _shapes(after) != _shapes(state):
        raise OptionsError("optimizer: an update changes the shapes or dtypes of its state")
    nodes = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "_fields"))
    names = [type(node).__name__ for node in nodes if hasattr(node, "_fields")]
    text = re.sub("0x[0-9a-f]+", "", str(traced.jaxpr)).encode()  # without the addresses of functions
    for constant in traced.consts:
        text += _numbers(constant).tobytes()
    versions = f"jax {jax.__version__}, optax {optax.__version__}"
    return {"state": names, "arrays": zlib.crc32(repr(_shapes(state)).encode()), "rule": [versions, zlib.crc32(text)]}


def refuse_another(saved: dict | None, mine: dict | None, where) -> None:
    """Raises OptionsError if a checkpoint's optimizer is not this one. where: the directory of the run."""
    if saved is None or mine is None:  # of the options, which are compared by themselves
        return
    end = "give the one that it began with, or another output"
    if saved["state"] != mine["state"]:
        before, now = (", ".join(names) or "none" for names in (saved["state"], mine["state"]))
        raise OptionsError(f"{where}: a run with another optimizer (its state was {before} and is {now}); {end}")
    if saved["arrays"] != mine["arrays"]:
        raise OptionsError(f"{where}: a run with another optimizer (its state has other arrays); {end}")
    if saved["rule"][0] == mine["rule"][0] and saved["rule"] != mine["rule"]:
        raise OptionsError(f"{where}: a run with another optimizer (its rule or a number in it differs); {end}")


def to_arrays(opt_state) -> dict:
    """The arrays of a state by number, as a checkpoint holds them: a state may be of any tree."""
    return {f"{i:05}": jax.random.key_data(x) if _is_key(x) else x for i, x in enumerate(jax.tree.leaves(opt_state))}


def from_arrays(saved: dict, like):
    """The state that `to_arrays` gave, as a tree like `like`."""
    leaves = jax.tree.leaves(like)
    arrays = [array for _, array in sorted(saved.items())]
    keys = [jax.random.wrap_key_data(a, impl=jax.random.key_impl(x)) if _is_key(x) else a
            for a, x in zip(arrays, leaves, strict=True)]  # fmt: skip
    return jax.tree.unflatten(jax.tree.structure(like), keys)


def _is_key(leaf) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers(constant) -> np.ndarray:
    if hasattr(constant, "dtype") and _is_key(constant):
        constant = jax.random.key_data(constant)
    return np.asarray(constant)


def _shapes(tree, dtypes: bool = True) -> list:
    """(path, shape, dtype) of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), x.shape, str(x.dtype) if dtypes else "") for path, x in leaves]
