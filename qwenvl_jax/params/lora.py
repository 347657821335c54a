"""Low-rank adapters (LoRA, arXiv:2106.09685) as transforms of the parameter tree, and PEFT's files for them.

An adapted Linear holds `lora_a` [L, in, r], `lora_b` [L, r, out] and `lora_scale` [L] beside its kernel (the merger's
have no L), and adds ((x @ a) · scale) @ b to its output. So an adapted model is an ordinary tree that every function
of the model takes, generation included, and the base's arrays are neither copied nor changed. A layer of a stack
that has no adapter holds zeros, and an adapter of a lower rank than its stack's is filled up with zeros: their
gradients are zero, so training leaves them so.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwenvl_jax.config import Config, read_json
from qwenvl_jax.errors import InputError
from qwenvl_jax.params.checkpoint import find, staged, write_json
from qwenvl_jax.params.hf import STACKED, flatten, hub_name, table, unflatten
from qwenvl_jax.params.tensors import DTYPES, Reader, Writer
from qwenvl_jax.sharding import param_shardings

GROUPS = {"llm": "decoder/layers/*", "vision": "vision/blocks/*", "merger": "vision/merger/*"}
LEAVES = ("lora_a", "lora_b", "lora_scale")
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Settings of PEFT's that change more than the low-rank update of a Linear.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "arrow_config",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # values of init_lora_weights


# Trees


def linears(config: Config, layout: str = "hub") -> dict[str, tuple[str, ...]]:
    """Path of every Linear that can be adapted → its modules' names in transformers, one a layer if it is stacked."""
    return {
        path.removesuffix("/kernel"): tuple(name.removesuffix(".weight") for name in names)
        for path, names in table(config, layout).items()
        if path.endswith("/kernel") and any(fnmatchcase(path, group) for group in GROUPS.values())
    }


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
    if not _is_rank(rank):
        raise InputError(f"an adapter's rank must be a whole number from 1, not {rank!r}")
    if not _is_number(alpha) or alpha <= 0:
        raise InputError(f"an adapter's alpha must be a positive number, not {alpha!r}")
    chosen, flat, out = _choose(config, targets), flatten(params), {}
    for i, path in enumerate(linears(config)):
        if path in chosen:
            *stack, n_in, n_out = flat[f"{path}/kernel"].shape
            bound = n_in**-0.5
            shape = (*stack, n_in, rank)
            out[f"{path}/lora_a"] = jax.random.uniform(jax.random.fold_in(key, i), shape, dtype, -bound, bound)
            out[f"{path}/lora_b"] = jnp.zeros((*stack, rank, n_out), dtype)
            out[f"{path}/lora_scale"] = jnp.full(stack, alpha / (rank**0.5 if rslora else rank), jnp.float32)
    return _attach(params, out)


def is_adapter(path: str) -> bool:
    """Is the leaf at this path ("decoder/layers/q_proj/lora_a") part of an adapter?"""
    return path.rpartition("/")[2] in LEAVES


def is_trainable(path: str) -> bool:
    """Is it one that training an adapter changes, lora_a or lora_b?"""
    return path.rpartition("/")[2] in LEAVES[:2]


def split(params: dict) -> tuple[dict, dict]:
    """(the base, the adapter alone), two trees of the same arrays; `join` undoes it."""
    flat = flatten(params)
    adapter = {path: flat.pop(path) for path in list(flat) if is_adapter(path)}
    return unflatten(flat), unflatten(adapter)


def strip(params: dict) -> dict:
    """The base alone: the arrays that the adapter was added to."""
    return split(params)[0]


def join(base: dict, adapter: dict) -> dict:
    return unflatten(flatten(base) | flatten(adapter))


def merge(params: dict) -> dict:
    """Parameters without an adapter that compute the same: it is added to the kernels.

    The sum is float32 and is then rounded to the kernel's dtype, one layer at a time.
    """
    base, adapter = (flatten(tree) for tree in split(params))
    for path in {p.rpartition("/")[0] for p in adapter}:
        kernel = base[f"{path}/kernel"]
        leaves = kernel, *(adapter[f"{path}/{leaf}"] for leaf in LEAVES)
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
    paths, chosen = linears(config), set()
    patterns = targets.split(",") if isinstance(targets, str) else targets
    for pattern in patterns:
        glob = GROUPS.get(pattern.strip(), pattern.strip())
        found = {path for path in paths if fnmatchcase(path, glob) or fnmatchcase(path, f"*/{glob}")}
        if not found:
            raise InputError(
                f"adapter target {pattern!r} matches nothing; there are the groups {', '.join(GROUPS)}, and "
                f"{', '.join(paths)}"
            )
        chosen |= found
    if not chosen:
        raise InputError(f"no adapter targets were given; name some of {', '.join(GROUPS)}, or Linears by pattern")
    return chosen


def _attach(params: dict, adapter: dict) -> dict:
    """Adds the flat adapter, laid out over the mesh that the parameters are on, if any."""
    if any(is_adapter(path) for path in flatten(params)):
        raise InputError("these parameters have an adapter already; merge it or strip it first")
    adapter = unflatten(adapter)
    for leaf in jax.tree.leaves(params):
        layout = leaf.sharding if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) else None
        if isinstance(layout, NamedSharding) and isinstance(layout.mesh, Mesh):
            adapter = jax.device_put(adapter, param_shardings(adapter, layout.mesh))
            break
    return join(params, adapter)


def _fold(leaves):
    kernel, a, b, scale = leaves
    update = jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + update * scale).astype(kernel.dtype)


# PEFT's files


def save_adapter(config: Config, params: dict, path, *, base_name: str, layout: str = "hub") -> None:
    """Writes the adapter in `params` as a new directory that PEFT loads: its settings and its weights.

    base_name: the model it belongs to, a hub id or a directory.
    layout: whose names of modules: "hub", as in transformers before 4.52, or "nested", as from there on.
    The scale that the adapter has goes into lora_alpha (alpha = scale · r), whichever way it was derived.
    Raises InputError if there is no adapter, if `path` exists, or if the disk is full.
    """
    if jax.process_count() > 1:
        raise InputError("save_adapter writes from a single process; this job has several")
    flat = flatten(split(params)[1])
    tensors, ranks, alphas = {}, {}, {}
    for linear, modules in linears(config, layout).items():
        if f"{linear}/lora_a" not in flat:
            continue
        leaves = (np.asarray(flat[f"{linear}/{leaf}"]) for leaf in LEAVES)
        layers = zip(*leaves, strict=True) if linear.startswith(STACKED) else [tuple(leaves)]
        for module, (a, b, scale) in zip(modules, layers, strict=True):
            used = np.flatnonzero((a != 0).any(0) | (b != 0).any(1))
            if scale == 0 or not len(used):
                continue  # this layer has none
            r = ranks[module] = int(used[-1]) + 1
            alphas[module] = _tidy(float(scale) * r)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a[:, :r].T
            tensors[f"base_model.model.{module}.lora_B.weight"] = b[:r].T
    if not tensors:
        raise InputError("there is no adapter in these parameters")
    (r, _), (alpha, _) = (Counter(values).most_common(1)[0] for values in (ranks.values(), alphas.values()))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_name),
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(ranks),
        "rank_pattern": {m: n for m, n in ranks.items() if n != r},
        "alpha_pattern": {m: n for m, n in alphas.items() if n != alpha},
    }
    with staged(path, sum(t.nbytes for t in tensors.values())) as work:
        write_json(work / SETTINGS, settings)
        shapes = {name: (t.dtype, t.shape) for name, t in tensors.items()}
        with Writer(work, shapes, sys.maxsize, WEIGHTS) as writer:
            for name, t in tensors.items():
                writer.write_rows(name, 0, t, False)
            writer.finish()


def load_adapter(config: Config, params: dict, path) -> dict:
    """The parameters with the adapter that PEFT, or save_adapter, wrote to a directory (or a hub id) `path`.

    Which Linears have one, in which layers, is read from the tensors; r, lora_alpha, their patterns and use_rslora
    from the settings. Weights become float32.
    Raises InputError for damaged files, for a tensor that has no place or another shape than the settings say, and
    for what is not plain LoRA: DoRA, trained biases, whole trained modules, adapters of embeddings or convolutions.
    """
    path = find(path)
    settings = _read_settings(path / SETTINGS)
    if not (path / WEIGHTS).is_file():
        raise InputError(f"{path}: no {WEIGHTS}; adapters are read from safetensors files only")
    shapes, out = flatten(strip(params)), {}
    with Reader(path, WEIGHTS) as reader:
        pairs = _pairs(reader, config)
        for linear, modules in linears(config).items():
            held = {l: pairs[name] for l, name in enumerate(modules) if name in pairs}
            if not held:
                continue
            n_in, n_out = shapes[f"{linear}/kernel"].shape[-2:]
            factors = {l: _factors(path / SETTINGS, settings, side["A"][0]) for l, side in held.items()}
            for l, side in held.items():
                r = factors[l][0]
                for which, want in (("A", (r, n_in)), ("B", (n_out, r))):
                    _, key, tensor = side[which]
                    if tensor.dtype not in DTYPES:
                        raise InputError(
                            f"{tensor.file}: tensor {key} is {tensor.dtype}; only {', '.join(DTYPES)} are supported"
                        )
                    if tensor.shape != want:
                        raise InputError(
                            f"{tensor.file}: tensor {key} has shape {list(tensor.shape)}; {SETTINGS} and the model "
                            f"call for {list(want)}"
                        )
            rank = max(r for r, _ in factors.values())
            a, b = np.zeros((len(modules), n_in, rank), np.float32), np.zeros((len(modules), rank, n_out), np.float32)
            scale = np.zeros(len(modules), np.float32)
            for l, side in held.items():
                r, scale[l] = factors[l]
                reader.read_part(side["A"][2], slice(0, r), slice(0, n_in), True, a[l, :, :r])
                reader.read_part(side["B"][2], slice(0, n_out), slice(0, r), True, b[l, :r])
            for leaf, value in zip(LEAVES, (a, b, scale), strict=True):
                out[f"{linear}/{leaf}"] = jnp.asarray(value if linear.startswith(STACKED) else value[0])
    return _attach(params, out)


def _pairs(reader: Reader, config: Config) -> dict:
    """Module, in the hub's spelling → {"A" and "B": (module as the file spells it, key, Tensor)}."""
    known = {name for names in linears(config).values() for name in names}
    pairs = {}
    for key, tensor in reader.tensors.items():
        # Files written from a raw state dict have the adapter's name ("default") before ".weight".
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", key)
        if not match or hub_name(match[1]) not in known:
            raise InputError(
                f"{tensor.file}: tensor {key} has no place in a {config.family} model of this config; adapters go on "
                "the linear layers of decoder blocks, vision blocks and merger"
            )
        sides = pairs.setdefault(hub_name(match[1]), {})
        if match[2] in sides:
            raise InputError(f"{tensor.file}: {key} and {sides[match[2]][1]} are for the same layer")
        sides[match[2]] = match[1], key, tensor
    if not pairs:
        raise InputError(f"{reader.directory / WEIGHTS}: holds no tensors")
    for module, sides in pairs.items():
        if len(sides) < 2:
            raise InputError(f"{reader.directory / WEIGHTS}: {module} has lora_{''.join(sides)} but not the other half")
    return pairs


def _read_settings(file) -> dict:
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is {settings.get('peft_type')!r}; only LORA adapters can be read")
    for key in _UNSUPPORTED:
        if settings.get(key):
            raise InputError(
                f"{file}: {key} is {settings[key]!r}, more than plain LoRA; merge it with PEFT (merge_and_unload) and "
                "load the merged model"
            )
    if settings.get("bias", "none") != "none":
        raise InputError(f"{file}: bias is {settings['bias']!r}; adapters with trained biases cannot be read")
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise InputError(
            f"{file}: init_lora_weights is {init!r}, which starts from changed base weights; convert the adapter with "
            "PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return settings


def _factors(file, settings: dict, module: str) -> tuple[int, float]:
    """Rank and scale of a module; a pattern must match its name's end, and the first that does counts, as in PEFT."""

    def setting(key, patterns):
        patterns = settings.get(patterns) or {}
        try:
            for pattern, value in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
        except (AttributeError, re.error) as e:
            raise InputError(f"{file}: patterns for {key} are not readable ({e})") from e
        return settings.get(key, 8)  # PEFT's default of both

    r, alpha = setting("r", "rank_pattern"), setting("lora_alpha", "alpha_pattern")
    if not _is_rank(r):
        raise InputError(f"{file}: r is {r!r} for {module}; it must be a whole number from 1")
    if not _is_number(alpha):
        raise InputError(f"{file}: lora_alpha is {alpha!r} for {module}; it must be a number")
    return r, alpha / (r**0.5 if settings.get("use_rslora") else r)


def _is_rank(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _tidy(alpha: float) -> float | int:
    """16 for the 16.000001 that a float32 scale gives."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-6 * abs(alpha) else alpha
