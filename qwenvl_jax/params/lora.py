"""Low-rank adapters (LoRA, arXiv:2106.09685) as transforms of the parameter tree. PEFT's files: convert/peft.py.

An adapted Linear holds `lora_a` [L, in, r], `lora_b` [L, r, out] and `lora_scale` [L] beside its kernel (the merger's
have no L), and adds ((x @ a) · scale) @ b to its output. So an adapted model is an ordinary tree that every function
of the model takes, generation included, and the base's arrays are neither copied nor changed. A layer of a stack
that has no adapter holds zeros, and an adapter of a lower rank than its stack's is filled up with zeros: their
gradients are zero, so training leaves them so.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError
from qwenvl_jax.params.specs import ADAPTER, flatten, param_shardings, specs, specs_of, unflatten

GROUPS = ("llm", "vision", "merger")


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
    """The parameters with a fresh adapter on the Linears that `targets` chooses; the model computes what it did.

    targets: one or more (a string is split at commas) of the groups "llm", "vision", "merger", and of glob patterns
        for a Linear's path ("vision/blocks/*") or for the end of it ("q_proj", "merger/fc?"). As in PEFT, "gate_proj"
        is in the decoder and in a vision tower with a gated MLP.
    rslora: scale by alpha/√rank (arXiv:2312.03732) instead of alpha/rank.
    The start is PEFT's: lora_a uniform within ±1/√in, lora_b zero.
    Raises InputError for a pattern that matches nothing, and for parameters that are adapted already.
    """
    if not is_rank(rank):
        raise InputError(f"an adapter's rank must be a whole number from 1, not {rank!r}")
    if not is_number(alpha) or alpha <= 0:
        raise InputError(f"an adapter's alpha must be a positive number, not {alpha!r}")
    chosen, flat, out = _choose(config, targets), flatten(params), {}
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
    """Path of every Linear that can be adapted."""
    return [path.removesuffix("/kernel") for path, spec in specs(config).items() if spec.role == "linear"]


def is_adapter(path: str) -> bool:
    """Is the leaf at this path ("decoder/layers/q_proj/lora_a") part of an adapter?"""
    return path.rpartition("/")[2] in ADAPTER


def is_trainable(path: str) -> bool:
    """Is it one that training an adapter changes, lora_a or lora_b?"""
    return path.endswith(("/lora_a", "/lora_b"))


def split(params: dict) -> tuple[dict, dict]:
    """(the base, the adapter alone), two trees of the same arrays; `combine` undoes it."""
    flat = flatten(params)
    adapter = {path: flat.pop(path) for path in list(flat) if is_adapter(path)}
    return unflatten(flat), unflatten(adapter)


def strip(params: dict) -> dict:
    """The base alone: the arrays that the adapter was added to."""
    return split(params)[0]


def combine(base: dict, adapter: dict) -> dict:
    return unflatten(flatten(base) | flatten(adapter))


def merge(params: dict) -> dict:
    """Parameters without an adapter that compute the same: it is added to the kernels.

    The sum is float32 and is then rounded to the kernel's dtype, one layer at a time.
    """
    base, adapter = (flatten(tree) for tree in split(params))
    for path in {p.rpartition("/")[0] for p in adapter}:
        kernel = base[f"{path}/kernel"]
        leaves = kernel, *(adapter[f"{path}/{leaf}"] for leaf in ADAPTER)
        base[f"{path}/kernel"] = jax.lax.map(_fold, leaves) if kernel.ndim == 3 else _fold(leaves)
    return unflatten(base)


def dropout(params: dict, key, rate: float) -> dict:
    """The parameters with a random part of each adapter's inputs switched off, for one micro-batch of training.

    Rows of lora_a are zeroed with probability `rate`, and the others divided by 1 − rate: the same input features
    for all tokens, another choice in every layer. PEFT draws for every token anew. The expected output is the same;
    this is fewer random numbers, and the forward pass needs no key. Gradients are taken through it.
    """
    if not 0 <= rate < 1:
        raise InputError(f"the adapter's dropout is {rate}; it must be from 0 to below 1")
    flat = flatten(params)
    rows = {path: flat[path].shape[:-1] for path in sorted(flat) if path.endswith("/lora_a")}
    if not rows or not rate:
        return params
    # Drawn at once: a random number generator per layer is slow to compile.
    keep = jax.random.bernoulli(key, 1 - rate, (sum(map(math.prod, rows.values())),))
    for path, shape in rows.items():
        mask, keep = keep[: math.prod(shape)], keep[math.prod(shape) :]
        flat[path] = jnp.where(mask.reshape(*shape, 1), flat[path] / (1 - rate), 0)
    return unflatten(flat)


def _choose(config: Config, targets: str | Sequence[str]) -> set[str]:
    groups = {path: specs(config)[f"{path}/kernel"].group for path in linears(config)}
    patterns, chosen = targets.split(",") if isinstance(targets, str) else targets, set()
    for pattern in map(str.strip, patterns):
        if pattern in GROUPS:
            found = {path for path, group in groups.items() if group == pattern}
        else:
            found = {path for path in groups if fnmatchcase(path, pattern) or fnmatchcase(path, f"*/{pattern}")}
        if not found:
            raise InputError(
                f"adapter target {pattern!r} matches nothing; there are the groups {', '.join(GROUPS)}, and "
                f"{', '.join(groups)}"
            )
        chosen |= found
    if not chosen:
        raise InputError(f"no adapter targets were given; name some of {', '.join(GROUPS)}, or Linears by pattern")
    return chosen


def attach(config: Config, params: dict, adapter: dict) -> dict:
    """The parameters with an adapter's leaves, by path; laid out over the mesh that the parameters are on, if any."""
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
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
