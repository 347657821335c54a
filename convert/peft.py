"""Reads and writes low-rank adapters in PEFT's format."""

import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from qwenvl_convert.names import hub_name, tensor_names
from qwenvl_convert.safetensors import Reader, Writer

from qwenvl_jax.config import Config, read_json
from qwenvl_jax.errors import CheckpointError, InputError
from qwenvl_jax.params.checkpoint import staged, write_json
from qwenvl_jax.params.directory import find
from qwenvl_jax.params.lora import attach, is_alpha, is_rank, linears, split
from qwenvl_jax.params.specs import ADAPTER, flatten, specs

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT's settings that change more than the low-rank update of a Linear.
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication"),
    *("target_parameters", "alora_invocation_tokens", "use_qalora", "arrow_config"),
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # values of init_lora_weights


def save_adapter(config: Config, params: dict, path, *, base_name: str, layout: str = "hub") -> None:
    """Writes the adapter in `params` as a new directory that PEFT loads: its settings and its weights.

    base_name: the base model, a hub id or a directory.
    layout: module names of transformers before 4.52 ("hub") or from 4.52 on ("nested").
    lora_alpha is the adapter's scale · r, however the scale was derived.
    Raises InputError if there is no adapter, if `path` exists, or if the disk is full.
    """
    if jax.process_count() > 1:
        raise InputError("save_adapter writes from a single process; this job has several")
    flat, declared = flatten(split(params)[1]), specs(config)
    tensors, ranks, alphas = {}, {}, {}
    for linear, modules in _modules(config, layout).items():
        if f"{linear}/lora_a" not in flat:
            continue
        leaves = (np.asarray(flat[f"{linear}/{leaf}"]) for leaf in ADAPTER)
        layers = zip(*leaves, strict=True) if declared[f"{linear}/kernel"].stacked else [tuple(leaves)]
        for module, (a, b, scale) in zip(modules, layers, strict=True):
            used = np.flatnonzero((a != 0).any(0) | (b != 0).any(1))
            if scale == 0 or not len(used):
                continue  # this layer has none
            r = ranks[module] = int(used[-1]) + 1
            alphas[module] = _tidy(float(scale) * r)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a[:, :r].T
            tensors[f"base_model.model.{module}.lora_B.weight"] = b[:r].T
    if not tensors:
        raise CheckpointError("there is no adapter in these parameters")
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
    """The parameters with the adapter in `path`, a directory by PEFT or `save_adapter`, or a hub id.

    The tensors say which Linears and layers have an adapter; the settings give r, lora_alpha, their patterns and
    use_rslora. Weights become float32.
    Raises InputError for damaged files, for a tensor without a place or of a shape that the settings contradict, and
    for more than plain LoRA: DoRA, trained biases, whole trained modules, adapters of embeddings or convolutions.
    """
    path = find(path)
    settings = _read_settings(path / SETTINGS)
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{path}: no {WEIGHTS}; adapters are read from safetensors files only")
    declared, out = specs(config), {}
    with Reader(path, WEIGHTS) as reader:
        pairs = _pairs(reader, config)
        for linear, modules in _modules(config).items():
            adapted = {l: pairs[name] for l, name in enumerate(modules) if name in pairs}
            if not adapted:
                continue
            kernel = declared[f"{linear}/kernel"]
            n_in, n_out = kernel.shape[-2:]
            factors = {l: _factors(path / SETTINGS, settings, pair["A"][0]) for l, pair in adapted.items()}
            for l, (r, _) in factors.items():  # before arrays of these sizes are allocated
                for side, shape in (("A", (r, n_in)), ("B", (n_out, r))):
                    _, key, tensor = adapted[l][side]
                    tensor.check(key, shape, SETTINGS)
            rank = max(r for r, _ in factors.values())
            a, b = np.zeros((len(modules), n_in, rank), np.float32), np.zeros((len(modules), rank, n_out), np.float32)
            scale = np.zeros(len(modules), np.float32)
            for l, pair in adapted.items():
                r, scale[l] = factors[l]
                reader.read_part(pair["A"][2], slice(0, r), slice(0, n_in), True, a[l, :, :r])
                reader.read_part(pair["B"][2], slice(0, n_out), slice(0, r), True, b[l, :r])
            for leaf, value in zip(ADAPTER, (a, b, scale), strict=True):
                out[f"{linear}/{leaf}"] = jnp.asarray(value if kernel.stacked else value[0])
    return attach(config, params, out)


def _modules(config: Config, layout: str = "hub") -> dict[str, list[str]]:
    """Path of each Linear → its modules' names in transformers, one per layer if it is stacked."""
    names = tensor_names(config, layout)
    return {path: [name.removesuffix(".weight") for name in names[f"{path}/kernel"]] for path in linears(config)}


def _pairs(reader: Reader, config: Config) -> dict:
    """Module in the hub's spelling → {"A" and "B": (module in the file's spelling, key, Tensor)}."""
    known = {name for names in _modules(config).values() for name in names}
    pairs = {}
    for key, tensor in reader.tensors.items():
        # In files written from a raw state dict, the adapter's name ("default") precedes ".weight".
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", key)
        if not match or hub_name(match[1]) not in known:
            raise CheckpointError(
                f"{tensor.file}: tensor {key} has no place in this {config.family} model; only linear layers of the "
                "decoder's blocks, the vision blocks and the merger can have adapters"
            )
        sides = pairs.setdefault(hub_name(match[1]), {})
        if match[2] in sides:
            raise CheckpointError(f"{tensor.file}: {key} and {sides[match[2]][1]} are for the same layer")
        sides[match[2]] = match[1], key, tensor
    if not pairs:
        raise CheckpointError(f"{reader.directory / WEIGHTS}: holds no tensors")
    for module, sides in pairs.items():
        if len(sides) < 2:
            raise CheckpointError(f"{reader.directory / WEIGHTS}: {module} has only one of lora_A and lora_B")
    return pairs


def _read_settings(file) -> dict:
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {settings.get('peft_type')!r}; only LORA adapters can be read")
    for key in _UNSUPPORTED:
        if settings.get(key):
            more = f"{key} is {settings[key]!r}, more than plain LoRA"
            raise CheckpointError(f"{file}: {more}; load the model that PEFT's merge_and_unload gives")
    if settings.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias is {settings['bias']!r}; adapters with trained biases cannot be read")
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights {init!r} changed the base weights; convert the adapter with PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return settings


def _factors(file, settings: dict, module: str) -> tuple[int, float]:
    """Rank and scale of a module. As in PEFT, the first pattern that matches the end of its name counts."""

    def setting(key, patterns):
        patterns = settings.get(patterns) or {}
        try:
            for pattern, value in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
        except (AttributeError, re.error) as e:
            raise CheckpointError(f"{file}: patterns for {key} are not readable ({e})") from e
        return settings.get(key, 8)  # PEFT's default for both

    r, alpha = setting("r", "rank_pattern"), setting("lora_alpha", "alpha_pattern")
    if not is_rank(r):
        raise CheckpointError(f"{file}: r is {r!r} for {module}; it must be an integer of at least 1")
    if not is_alpha(alpha):
        raise CheckpointError(f"{file}: lora_alpha is {alpha!r} for {module}; it must be a number")
    return r, alpha / (r**0.5 if settings.get("use_rslora") else r)


def _tidy(alpha: float) -> float | int:
    """Removes float32's rounding error: 16.000001 → 16."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-6 * abs(alpha) else alpha
