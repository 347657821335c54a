"""Low-rank adapters (LoRA, arXiv:2106.09685) as transforms of the parameter tree. PEFT's files: convert/peft.py.

An adapted Linear has `lora_a` [L, in, r], `lora_b` [L, r, out] and `lora_scale` [L] beside its kernel (no L in the
merger), and adds ((x @ a) · scale) @ b to its output. Every function of the model, generation included, takes an
adapted tree. The base's arrays are neither copied nor changed.

Zeros stand for a layer of a stack without an adapter, and pad an adapter of lower rank than the stack's. Their
gradients are zero, so they stay zero in training.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qwenvl_jax.config import GROUPS, Config, is_number
from qwenvl_jax.errors import InputError
from qwenvl_jax.params.specs import ADAPTER, flatten, param_shardings, specs, specs_of, unflatten


def add(
    config: Config,
    params: dict,
    key,
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str] = "llm",
    rslora: bool = False,
    dtype=jnp.float32,
) -> dict:
    """The parameters with a new adapter on the Linears of `targets`; the model's output does not change.

    targets: a sequence, or a string split at commas. Each is a group ("llm", "vision", "merger") or a glob pattern for
        a Linear's path ("vision/blocks/*") or its end ("q_proj", "merger/fc?"). As in PEFT, "gate_proj" matches the
        decoder and a vision tower with a gated MLP.
    rslora: scale by alpha/√rank (arXiv:2312.03732) instead of alpha/rank.
    Initial values are PEFT's: lora_a uniform within ±1/√in, lora_b zero.
    Raises InputError if a pattern matches nothing, or if the parameters have an adapter already.
    """
    if not is_rank(rank):
        raise InputError(f"an adapter's rank must be a whole number from 1, not {rank!r}")
    if not is_alpha(alpha) or alpha <= 0:
        raise InputError(f"an adapter's alpha must be a positive number, not {alpha!r}")
    chosen, flat, out = choose(config, targets), flatten(params), {}
    for i, path in enumerate(linears(config)):
        if path in chosen:
            *stack, n_in, n_out = flat[f"{path}/kernel"].shape
            scale = alpha / (rank**0.5 if rslora else rank)
            shapes = {"lora_a": (*stack, n_in, rank), "lora_b": (*stack, rank, n_out), "lora_scale": tuple(stack)}
            new = {name: ADAPTER[name](jax.random.fold_in(key, i), shape, dtype) for name, shape in shapes.items()}
            new["lora_scale"] = scale * new["lora_scale"].astype(jnp.float32)
            out |= {f"{path}/{name}": value for name, value in new.items()}
    return attach(config, params, out)


def linears(config: Config) -> list[str]:
    """Paths of the Linears, each of which can have an adapter."""
    return [path.removesuffix("/kernel") for path, spec in specs(config).items() if spec.role == "linear"]


def is_adapter(path: str) -> bool:
    """Is the leaf at this path ("decoder/layers/q_proj/lora_a") part of an adapter?"""
    return path.rpartition("/")[2] in ADAPTER


def is_trainable(path: str) -> bool:
    """Does training an adapter change the leaf at this path?"""
    return path.endswith(("/lora_a", "/lora_b"))


def split(params: dict) -> tuple[dict, dict]:
    """(base, adapter), two trees of the same arrays; `combine` is the inverse."""
    flat = flatten(params)
    adapter = {path: flat.pop(path) for path in list(flat) if is_adapter(path)}
    return unflatten(flat), unflatten(adapter)


def strip(params: dict) -> dict:
    """The base's parameters, without the adapter."""
    return split(params)[0]


def combine(base: dict, adapter: dict) -> dict:
    return unflatten(flatten(base) | flatten(adapter))


def merge(params: dict) -> dict:
    """Adds the adapter to the kernels: in float32, one layer at a time, then rounded to the kernel's dtype.

    Raises InputError if a kernel is quantised.
    """
    base, adapter = (flatten(tree) for tree in split(params))
    for path in sorted({p.rpartition("/")[0] for p in adapter}):
        if f"{path}/scales" in base:
            raise InputError(
                f"{path} is quantised, so an adapter cannot be merged into it; dequantise it first (`dequantise` of "
                "params/quantised.py, `qwenvl merge --dequantise`), or use the adapter as it is"
            )
        kernel = base[f"{path}/kernel"]
        leaves = kernel, *(adapter[f"{path}/{leaf}"] for leaf in ADAPTER)
        base[f"{path}/kernel"] = jax.lax.map(_fold, leaves) if kernel.ndim == 3 else _fold(leaves)
    return unflatten(base)


def join(first: dict, second: dict) -> dict:
    """One adapter that adds both updates. first, second: trees of an adapter alone, as `split` gives them."""
    one, two = flatten(first), flatten(second)
    for linear in {path.rpartition("/")[0] for path in one.keys() & two.keys()}:
        (a1, b1, s1), (a2, b2, s2) = ([flat[f"{linear}/{leaf}"] for leaf in ADAPTER] for flat in (one, two))
        scaled = [b * s[..., None, None] for b, s in ((b1, s1), (b2, s2))]
        leaves = jnp.concatenate([a1, a2], -1), jnp.concatenate(scaled, -2), jnp.ones_like(s1)
        two |= {f"{linear}/{leaf}": value for leaf, value in zip(ADAPTER, leaves, strict=True)}
    return unflatten(one | two)


def dropout(params: dict, key, rate: float) -> dict:
    """The parameters with dropout on each adapter's inputs, for one micro-batch of training; differentiable.

    Zeroes rows of lora_a with probability `rate` and divides the others by 1 − rate. So all tokens lose the same input
    features of a layer, while PEFT draws them per token. The expected output is the same, with fewer random numbers
    and without a key in the forward pass. Raises InputError if the rate is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise InputError(f"the adapter's dropout is {rate}; it must be at least 0 and below 1")
    flat = flatten(params)
    rows = {path: flat[path].shape[:-1] for path in sorted(flat) if path.endswith("/lora_a")}
    if not rows or not rate:
        return params
    # One draw for all layers: XLA compiles a random number generator per layer slowly.
    drawn = jax.random.bernoulli(key, 1 - rate, (sum(map(math.prod, rows.values())),))
    for path, shape in rows.items():
        mask, drawn = drawn[: math.prod(shape)], drawn[math.prod(shape) :]
        flat[path] = jnp.where(mask.reshape(*shape, 1), flat[path] / (1 - rate), 0)
    return unflatten(flat)


def choose(config: Config, targets: str | Sequence[str]) -> set[str]:
    """Paths of the Linears that `targets` of `add` name. Raises InputError if a pattern matches nothing."""
    declared = specs(config)
    groups = {path: declared[f"{path}/kernel"].group for path in linears(config)}
    patterns, chosen = targets.split(",") if isinstance(targets, str) else targets, set()
    for pattern in map(str.strip, patterns):
        if pattern in GROUPS:
            found = {path for path, group in groups.items() if group == pattern}
        else:
            found = {path for path in groups if fnmatchcase(path, pattern) or fnmatchcase(path, f"*/{pattern}")}
        if not found:
            known = f"groups are {', '.join(GROUPS)}, Linears are {', '.join(groups)}"
            raise InputError(f"adapter target {pattern!r} matches nothing; {known}")
        chosen |= found
    if not chosen:
        raise InputError(f"no adapter targets were given; name some of {', '.join(GROUPS)}, or Linears by pattern")
    return chosen


def attach(config: Config, params: dict, adapter: dict) -> dict:
    """The parameters with an adapter's leaves (by path), laid out over the parameters' mesh, if they have one."""
    if any(is_adapter(path) for path in flatten(params)):
        raise InputError("these parameters have an adapter already; merge it or strip it first")
    adapter = unflatten(adapter)
    for leaf in jax.tree.leaves(params):
        layout = leaf.sharding if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) else None
        if isinstance(layout, NamedSharding) and isinstance(layout.mesh, Mesh):
            adapter = jax.device_put(adapter, param_shardings(specs_of(config, adapter), layout.mesh))
            break
    return combine(params, adapter)


def _fold(leaves):
    kernel, a, b, scale = leaves
    update = jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + update * scale).astype(kernel.dtype)


def is_rank(value) -> bool:
    return is_number(value, int) and 0 < value < 2**31


def is_alpha(value) -> bool:
    return is_number(value) and abs(value) < 1e30
