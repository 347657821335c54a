"""Reads and writes low-rank adapters in PEFT's format."""

import contextlib
import logging
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from qwenvl_convert.adapter_config import factors_of, read_settings, targeted
from qwenvl_convert.hf import card, pieces
from qwenvl_convert.names import LAYOUTS, core, tensor_names, tensor_shape
from qwenvl_convert.safetensors import Reader, Tensor, Writer

from qwenvl_jax.config import Config
from qwenvl_jax.errors import CheckpointError, InputError, shown
from qwenvl_jax.params.checkpoint import staged, write_json, write_rule
from qwenvl_jax.params.directory import ADAPTER_SETTINGS, ADAPTER_WEIGHTS
from qwenvl_jax.params.locate import find
from qwenvl_jax.params.lora import attach, linears, split
from qwenvl_jax.params.place import Leaf, Source
from qwenvl_jax.params.specs import ADAPTER, flatten, specs, unflatten

SETTINGS, WEIGHTS = ADAPTER_SETTINGS, ADAPTER_WEIGHTS
_LOG = logging.getLogger("qwenvl_jax.peft")  # below the package's, whose warnings the commands print


def save_adapter(
    config: Config,
    params: dict,
    path,
    *,
    base_name: str,
    revision: str | None = None,
    layout: str = "nested",
    allow_control_tokens: bool = False,
) -> None:
    """Writes the adapter in `params` as a new directory that PEFT loads: its settings, its weights and a model card.

    base_name, revision: the base model, a hub id or a directory, and its branch, tag or commit on the hub.
    layout: module names of transformers from 4.52 on ("nested") or before ("hub"). PEFT of the other one opens the
        directory too, but leaves out modules with no more than a warning.
    allow_control_tokens: the rule that it was trained with, which `load` follows.
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
    with staged(path, sum(t.nbytes for t in tensors.values())) as work:
        write_json(work / SETTINGS, _settings(base_name, revision, ranks, alphas))
        (work / "README.md").write_text(card(base_name, "peft"), "utf-8")
        write_rule(allow_control_tokens, work)
        shapes = {name: (t.dtype, t.shape) for name, t in tensors.items()}
        with Writer(work, shapes, sys.maxsize, WEIGHTS) as writer:
            for name, t in tensors.items():
                writer.write_rows(name, 0, t, False)
            writer.finish()


def _settings(base_name, revision: str | None, ranks: dict[str, int], alphas: dict[str, float]) -> dict:
    """PEFT's settings of an adapter with these ranks and alphas by module."""
    (r, _), (alpha, _) = (Counter(values).most_common(1)[0] for values in (ranks.values(), alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_name),
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out"), False),
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(ranks),
        "rank_pattern": {m: n for m, n in ranks.items() if n != r},
        "alpha_pattern": {m: n for m, n in alphas.items() if n != alpha},
    }


class AdapterFile(contextlib.AbstractContextManager):
    """An adapter's directory by PEFT or `save_adapter`, checked against the config. Use it as a context manager.

    pairs: path of a Linear → layer → (its lora_A, its lora_B, scale); layer 0 if layers are not stacked.
    replaced: path of a parameter → layer → the tensor that replaces it (PEFT's modules_to_save and trained biases).
    Raises CheckpointError as `load_adapter`.
    """

    def __init__(self, config: Config, path):
        self.path, self._declared = Path(path), specs(config)
        settings = read_settings(self.path / SETTINGS)
        if not (self.path / WEIGHTS).is_file():
            raise CheckpointError(_no_weights(self.path))
        for beside in ("non_lora_state_dict.bin", "non_lora_trainables.bin"):  # of scripts that also train the merger
            if (self.path / beside).is_file():
                raise CheckpointError(
                    f"{self.path}: {beside} holds more trained weights, as a pickle; merge both with the script that "
                    "trained them, and load the merged model"
                )
        self._reader = Reader(self.path, WEIGHTS)
        try:
            self.pairs, self.replaced = _match(self._reader, config, settings)
        except BaseException:
            self._reader.close()
            raise

    def __exit__(self, *_):
        self._reader.close()

    @property
    def rank(self) -> int:
        """The largest rank of a module; 0 if it has whole parameters only."""
        return max((pair.A.shape[0] for pairs in self.pairs.values() for pair in pairs.values()), default=0)

    def factors(self, linear: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`lora_a`, `lora_b` and `lora_scale` of a Linear in float32, padded to its largest rank."""
        pairs, spec = self.pairs[linear], self._declared[f"{linear}/kernel"]
        *lead, n_in, n_out = spec.shape
        layers, rank = (lead or [1])[0], max(pair.A.shape[0] for pair in pairs.values())
        a, b = np.zeros((layers, n_in, rank), np.float32), np.zeros((layers, rank, n_out), np.float32)
        scale = np.zeros(layers, np.float32)
        for l, pair in pairs.items():
            r, scale[l] = pair.A.shape[0], pair.scale
            self._reader.read_part(pair.A, slice(0, r), slice(0, n_in), True, a[l, :, :r])
            self._reader.read_part(pair.B, slice(0, n_out), slice(0, r), True, b[l, :r])
            if not (np.isfinite(a[l]).all() and np.isfinite(b[l]).all()):
                raise _diverged(pair.A.file, linear)
        return (a, b, scale) if spec.stacked else (a[0], b[0], scale[0])

    def replace(self, path: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Overwrites what this adapter replaces in `out`, the part `index` of a parameter."""
        for job in pieces(self._declared[path], self.replaced.get(path, {}), index, out):
            self._reader.read_part(*job)
        if self.replaced.get(path) and not np.isfinite(out).all():
            raise _diverged(self.path / WEIGHTS, path)


def _diverged(file: Path, path: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: the adapter's weights of {path} have NaN or infinity, so its training diverged; take an earlier "
        "checkpoint of it, or train again with a smaller learning rate"
    )


class AdaptedSource(Source):
    """A checkpoint with an adapter merged into it, one layer at a time, in float32. Closing it is the caller's."""

    def __init__(self, source: Source, adapter: AdapterFile):
        self.leaves, self._source, self._adapter = source.leaves, source, adapter
        self._held: tuple = (None,)  # one Linear's factors: a parameter is read in many pieces

    def read(self, leaf: Leaf, index: tuple[slice, ...], dtype=None, bar=None) -> np.ndarray:
        """See `Source.read`."""
        linear, adapter = leaf.path.removesuffix("/kernel"), self._adapter
        if linear not in adapter.pairs and leaf.path not in adapter.replaced:
            return self._source.read(leaf, index, dtype, bar)
        stacked, out = leaf.spec.stacked, self.empty(leaf, index, dtype)
        inner = index[1:] if stacked else index
        for l in range(index[0].start, index[0].stop) if stacked else [0]:
            at = (slice(l, l + 1), *inner) if stacked else index
            part = self._source.read(leaf, at, np.float32, bar)
            adapter.replace(leaf.path, at, part)
            if linear in adapter.pairs:
                if self._held[0] != linear:
                    self._held = (linear, *adapter.factors(linear))
                a, b, scale = (x[l] for x in self._held[1:]) if stacked else self._held[1:]
                part += (a[inner[0]] @ b[:, inner[1]]) * scale
            out[l - index[0].start if stacked else ...] = part[0] if stacked else part
        return out


def load_adapter(config: Config, params: dict, path) -> dict:
    """The parameters with the adapter in `path`, a directory by PEFT or `save_adapter`, or a hub id.

    The tensors say which Linears and layers have an adapter; the settings give r, lora_alpha, their patterns and
    use_rslora. Weights become float32. Parameters that PEFT trained whole (modules_to_save, biases) replace the base's.
    Raises InputError for damaged files, for a tensor without a place or of a shape that the settings contradict, and
    for more than plain LoRA: DoRA, other methods, adapters of embeddings, heads or convolutions.
    """
    with AdapterFile(config, find(path)) as adapter:
        out = {}
        for linear in adapter.pairs:
            for leaf, value in zip(ADAPTER, adapter.factors(linear), strict=True):
                out[f"{linear}/{leaf}"] = jnp.asarray(value)
        flat = flatten(params)
        for name in adapter.replaced:
            new = np.array(flat[name])
            adapter.replace(name, tuple(slice(0, n) for n in new.shape), new)
            flat[name] = jax.device_put(new, getattr(flat[name], "sharding", None))
    return attach(config, unflatten(flat), out) if out else unflatten(flat)


def _modules(config: Config, layout: str = "hub") -> dict[str, list[str]]:
    """Path of each Linear → its modules' names in transformers, one per layer if it is stacked."""
    names = tensor_names(config, layout)
    return {path: [name.removesuffix(".weight") for name in names[f"{path}/kernel"]] for path in linears(config)}


class _Pair(NamedTuple):
    A: Tensor
    B: Tensor
    scale: float


def _match(reader: Reader, config: Config, settings: dict) -> tuple[dict, dict]:
    """`pairs` and `replaced` of AdapterFile. Shapes are checked before arrays of these sizes are allocated."""
    low, full = _sort(reader, config)
    expected = _expected(config, settings, [sides[s][0] for sides in low.values() for s in sides])
    declared, pairs, factors = specs(config), {}, factors_of(reader.directory / SETTINGS, settings)
    for linear, modules in _modules(config).items():
        n_in, n_out = declared[f"{linear}/kernel"].shape[-2:]
        for l, module in enumerate(modules):
            sides = low.pop(core(module), None)
            if sides is None:
                continue
            if len(sides) < 2:
                raise CheckpointError(f"{reader.directory / WEIGHTS}: {module} has only one of lora_A and lora_B")
            r, scale = factors(sides["A"][0])
            for side, shape in (("A", (r, n_in)), ("B", (n_out, r))):
                _, key, tensor = sides[side]
                tensor.check(key, shape, SETTINGS)
            pairs.setdefault(linear, {})[l] = _Pair(sides["A"][2], sides["B"][2], scale)
    replaced: dict = {}
    for path, names in tensor_names(config).items():
        for l, name in enumerate(names):
            if found := full.pop(core(name), None):
                found[1].check(found[0], tensor_shape(config, declared[path]), "config.json")
                replaced.setdefault(path, {})[l] = found[1]
    if pairs or replaced:
        _report_lost(reader, expected, pairs, replaced)
    named = settings.get("modules_to_save") or []
    for name in sorted(set(map(str, named if isinstance(named, list) else [named]))):
        if not any(f".{name}." in f".{key}." for key in reader.tensors):
            where = f"{reader.directory / SETTINGS}: modules_to_save is {shown(named)}"
            raise CheckpointError(f"{where}, but {WEIGHTS} has no tensor of {name}; save the adapter again with PEFT")
    if (bias := settings.get("bias", "none")) != "none" and not any(path.endswith("/bias") for path in replaced):
        raise CheckpointError(f"{reader.directory / SETTINGS}: bias is {shown(bias)}, but {WEIGHTS} has no biases")
    if not pairs and not replaced:
        raise CheckpointError(f"{reader.directory / WEIGHTS}: holds no tensors")
    return pairs, replaced


def _report_lost(reader: Reader, expected: dict, pairs: dict, replaced: dict) -> None:
    lost = [
        module
        for linear, modules in expected.items()
        for l, module in modules.items()
        if l not in pairs.get(linear, {}) and f"{linear}/kernel" not in replaced
    ]
    if lost:
        said = f"target_modules names {sum(map(len, expected.values()))} modules, but {WEIGHTS} has nothing for"
        said = f"{said} {len(lost)} of them, first {lost[0]}; they stay as in the base"
        _LOG.warning("%s: %s", reader.directory, said)


def _expected(config: Config, settings: dict, found: list[str]) -> dict[str, dict[int, str]]:
    """Path of each Linear → layer → its module, where target_modules names it. found: modules that the file has."""
    layouts = [_modules(config, layout) for layout in LAYOUTS]
    named = max(layouts, key=lambda names: len({m for modules in names.values() for m in modules}.intersection(found)))
    is_target = targeted(settings)
    if is_target is None:
        return {}
    return {path: {l: m for l, m in enumerate(modules) if is_target(m)} for path, modules in named.items()}


def _sort(reader: Reader, config: Config) -> tuple[dict, dict]:
    """({module: {"A" and "B": (module in the file, key, Tensor)}}, {parameter: (key, Tensor)}), both by `core`."""
    modules = {core(name) for names in _modules(config).values() for name in names}
    params = {core(name) for names in tensor_names(config).values() for name in names}
    low: dict = {}
    full: dict = {}
    for key, tensor in reader.tensors.items():
        if ".original_module." in key:  # in a raw state dict: the base's weights beside the trained ones
            continue
        # In files written from a raw state dict, the adapter's name ("default") precedes ".weight".
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", key)
        plain = core(re.sub(r"\.modules_to_save\.[^.]+(?=\.)", "", key))
        if match and core(match[1]) in modules:
            place, name, value = low.setdefault(core(match[1]), {}), match[2], (match[1], key, tensor)
        elif not match and plain in params:
            place, name, value = full, plain, (key, tensor)
        elif plain == "lm_head.weight" and ".lora_" not in key:
            raise CheckpointError(
                f"{tensor.file}: {key} was trained, but config.json ties lm_head to the embedding; set "
                "tie_word_embeddings to false in the base, or load what PEFT's merge_and_unload gives"
            )
        else:
            raise CheckpointError(
                f"{tensor.file}: tensor {key} has no place in this {config.family} model; only linear layers of the "
                "decoder's blocks, the vision blocks and the merger can have adapters. Load what PEFT's "
                "merge_and_unload gives"
            )
        if name in place:
            raise CheckpointError(f"{tensor.file}: {key} and {place[name][-2]} are for the same layer")
        place[name] = value
    return low, full


def _no_weights(path: Path) -> str:
    if not (path / "adapter_model.bin").is_file():
        return f"{path}: no {WEIGHTS}; adapters are read from safetensors files only"
    return (
        f"{path}: no {WEIGHTS}, only adapter_model.bin, a pickle, which could run code when it is opened; if you trust "
        'it, convert it: python -c "import torch; from safetensors.torch import save_file; save_file({k: '
        "v.contiguous() for k, v in torch.load('adapter_model.bin', weights_only=True).items()}, "
        f"'{WEIGHTS}')\""
    )


def _tidy(alpha: float) -> float | int:
    """Removes float32's rounding error: 16.000001 → 16."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-6 * abs(alpha) else alpha
