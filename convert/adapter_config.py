"""Reads adapter_config.json, PEFT's settings of an adapter: what it may hold, ranks, scales and target modules."""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path

from qwenvl_jax.config import read_json
from qwenvl_jax.errors import CheckpointError, shown
from qwenvl_jax.params.lora import is_alpha, is_rank

# PEFT's settings that change more than the low-rank update of a Linear.
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "trainable_token_indices", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "use_qalora", "arrow_config", "use_bdlora", "kasa_config", "monteclora_config"),
)
# Settings of LoraConfig, up to PEFT 0.21, of its former releases and of ms-swift, that change no adapted weight.
_KNOWN = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core loftq_config "
    "eva_config corda_config lora_ga_config velora_config qalora_group_size runtime_config ensure_weight_tying "
    "merge_weights lora_dtype lorap_lr_ratio lorap_emb_lr".split()
)
# Values of init_lora_weights: the first ones change the base, the last one is another method.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_VARIANTS = ("mica",)
_MOST_WAYS = 1e7  # in which one pattern may match: four `.*`, or two and a hundred names to choose from
_FEW_WAYS = 1e5  # for a pattern that is matched for a warning alone
_SECONDS = 5  # for matching the patterns of one file


def read_settings(file: Path) -> dict:
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file}: peft_type is {shown(settings.get('peft_type'))}; only LORA adapters can be read; load the model "
            "that PEFT's merge_and_unload gives"
        )
    for key in _UNSUPPORTED:
        if settings.get(key):
            more = f"{key} is {shown(settings[key])}, more than plain LoRA"
            raise CheckpointError(f"{file}: {more}; load the model that PEFT's merge_and_unload gives")
    for key, value in settings.items():  # a number or a text alone switches nothing on
        if key not in _KNOWN and (value is True or (isinstance(value, dict | list) and value)):
            raise CheckpointError(
                f"{file}: {key} is {shown(value)}, which is not known here; load the model that PEFT's "
                "merge_and_unload gives, or take the setting out if it changes training alone"
            )
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights {shown(init)} changed the base weights; convert the adapter with PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if isinstance(init, str) and init.startswith(_VARIANTS):
        raise CheckpointError(
            f"{file}: init_lora_weights {shown(init)} is another method than LoRA; load the model that PEFT's "
            "merge_and_unload gives"
        )
    return settings


def factors_of(file: Path, settings: dict) -> Callable[[str], tuple[int, float]]:
    """Module → its rank and scale. As in PEFT, the first pattern that matches the end of its name counts."""
    rank, alpha = (_by_pattern(file, key, settings.get(key)) for key in ("rank_pattern", "alpha_pattern"))

    def factors(module: str) -> tuple[int, float]:
        r = rank(module, settings.get("r", 8))  # 8 is PEFT's default for both
        a = alpha(module, settings.get("lora_alpha", 8))
        if not is_rank(r):
            raise CheckpointError(f"{file}: r is {shown(r)} for {module}; it must be an integer of at least 1")
        if not is_alpha(a):
            raise CheckpointError(f"{file}: lora_alpha is {shown(a)} for {module}; it must be a number")
        return r, a / (r**0.5 if settings.get("use_rslora") else r)

    return factors


def _by_pattern(file: Path, key: str, patterns) -> Callable:
    """(module, default) → the value of the first pattern that matches.

    Files of others hold a regular expression per module: plain names are looked up, and what is left must be cheap.
    """
    plain, rest = {}, []
    try:
        for i, (pattern, value) in enumerate((patterns or {}).items()):
            if re.fullmatch(r"[\w.]+", pattern):
                plain[pattern] = i, value
            elif _ways(pattern) > _MOST_WAYS:
                raise CheckpointError(f"{file}: {key} has {shown(pattern)}, too complex a pattern; name the modules")
            else:
                rest.append((i, re.compile(rf"(.*\.)?({pattern})$"), value))
    except (AttributeError, TypeError, OverflowError, RecursionError, re.error) as e:
        raise CheckpointError(f"{file}: {key} is not readable ({e})") from e
    ends = time.monotonic() + _SECONDS

    def find_value(module: str, default):
        parts = module.split(".")
        ending = [".".join(parts[n:]) for n in range(len(parts))]
        found = [plain[name] for name in ending if name in plain]
        for i, pattern, value in rest:
            if time.monotonic() > ends:
                raise CheckpointError(f"{file}: {key} takes too long to match; name the modules")
            if pattern.match(module):
                found.append((i, value))
                break
        return min(found, key=lambda f: f[0])[1] if found else default

    return find_value


def _ways(pattern: str) -> float:
    """An upper bound of the ways in which `re` may try to match a name: the product of what each part can do."""
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    plain = re.sub(r"\(\?[:=!]", "(", plain)
    if len(pattern) > 1000 or plain.count("(") > 50 or re.search(r"\)[*+{]|\(\?", plain) or re.search(r"\\\d", pattern):
        return math.inf
    ways, branches = 50.0 ** len(re.findall(r"[*+{]", plain)) * 2.0 ** plain.count("?"), [1]
    for letter in plain:
        if letter == "(":
            branches.append(1)
        elif letter == "|":
            branches[-1] += 1
        elif letter == ")" and len(branches) > 1:
            ways *= branches.pop()
    return ways * math.prod(branches)


def targeted(settings: dict) -> Callable[[str], bool] | None:
    """Module → whether PEFT gives it an adapter by these settings; None if they are a rule that is not read here."""
    names, excluded = settings.get("target_modules"), settings.get("exclude_modules") or []
    layers, within = settings.get("layers_to_transform"), settings.get("layers_pattern")
    tests = [_named(names), _named(excluded)]
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not names or names == "all-linear" or None in tests or within:
        return None

    def is_target(module: str) -> bool:
        layer = re.match(r".*\.[^.]*\.(\d+)\.", module) if numbers else None
        if numbers and (layer is None or int(layer[1]) not in numbers):
            return False
        return tests[0](module) and not tests[1](module)  # type: ignore[misc]

    return is_target


def _named(names) -> Callable[[str], bool] | None:
    """Module → whether a pattern matches all of it, or one of the names is its end; None if they cannot be read."""
    if isinstance(names, str) and _ways(names) <= _FEW_WAYS:
        try:
            pattern = re.compile(names)
        except (re.error, OverflowError, RecursionError):
            return None
        return lambda module: bool(pattern.fullmatch(module))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    ends = tuple(f".{name}" for name in names)
    return lambda module: f".{module}".endswith(ends)
