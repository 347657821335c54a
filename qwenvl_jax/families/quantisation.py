"""Reads `quantization_config` of config.json: how a checkpoint's files hold each quantised Linear.

The methods are AWQ, GPTQ, compressed-tensors and block FP8. What the tensors hold: convert/quantised.py.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from qwenvl_jax.config import Quantised, is_number, typed
from qwenvl_jax.errors import CheckpointError, shown
from qwenvl_jax.families.shared import core, reader

AWQ, GPTQ, GPTQ_V2, PACKED, INT, FLOAT, BLOCK = (
    *("awq", "gptq", "gptq_v2", "pack-quantized", "int-quantized", "float-quantized", "fp8"),
)
# A Linear is quantised if it has one of these.
SUFFIXES = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
_OTHER = "use the original model, or one in AWQ, GPTQ, compressed-tensors or block FP8"
_LONGEST = 200  # letters of a pattern


class Scheme(NamedTuple):
    """How the files hold a quantised Linear.

    format: the file's, one of the constants above.
    group: inputs that share a scale; 0: all. outputs: outputs that share a scale; 0: all.
    zeros: are there zero points? order: does an index say which group an input is in (GPTQ's desc_act)?
    activations: see `Quantised` of config.py.
    """

    format: str
    bits: int
    group: int = 0
    outputs: int = 1
    zeros: bool = False
    order: bool = False
    activations: str | None = None

    @property
    def dtype(self) -> str:
        return "float8_e4m3fn" if self.format in (FLOAT, BLOCK) else f"int{self.bits}"

    def __str__(self):
        scales = f"groups of {self.group}" if self.group else "a scale per channel" if self.outputs else "one scale"
        return f"{self.format}, {self.bits} bits, {scales}"


class Quantisation(NamedTuple):
    """What quantization_config says.

    rules: (is it about this module?, is the module quantised?, its Scheme); the first one that is about it counts.
        The second is None if the config does not say it, and the module's tensors do.
    """

    method: str
    rules: tuple[tuple[Callable[[str], bool], bool | None, Scheme | None], ...]

    def lookup(self, module: str) -> tuple[bool | None, Scheme | None]:
        """Is a module, by its name on the hub, quantised (None: its tensors say it), and how?"""
        return next(((said, scheme) for about, said, scheme in self.rules if about(module)), (False, None))

    def scheme(self, module: str, stored: set[str] | None) -> Scheme | None:
        """How a module is held, None if it is not quantised.

        stored: `core` of the names of the checkpoint's tensors. Without them, what the config does not say is so only
        in the decoder.
        """
        said, scheme = self.lookup(module)
        if said is None:
            said = _in_decoder(module) if stored is None else is_packed(module, stored)
        return scheme if said else None


def is_packed(module: str, stored) -> bool:
    return any(core(module) + suffix in stored for suffix in SUFFIXES)


def forms(how: Quantisation, linears: dict[str, tuple[list[str], tuple]], stored: set[str] | None) -> tuple:
    """(Config.quantised, {path: why a Linear that the files hold quantised is dequantised when it is loaded}).

    linears: path → (its modules on the hub, one per layer if it is stacked; in and out). stored: see `Quantisation`.
    Raises CheckpointError if a group size does not divide the rows.
    """
    found, reasons = [], {}
    for path, (modules, (rows, _)) in linears.items():
        schemes = {how.scheme(module, stored) for module in modules}
        scheme = schemes.pop()
        if schemes:
            reasons[path] = "its layers are not all held in the same way"
        elif scheme is not None and scheme.group and rows % scheme.group:
            if scheme.outputs == 1:
                size = f"{rows} inputs, not a multiple of the group size {scheme.group}"
                raise CheckpointError(f"quantization_config: {modules[0]} has {size}")
            reasons[path] = f"its {rows} inputs are not a multiple of the block's {scheme.group}"
        elif scheme is not None:
            found.append((path, form_of(scheme)))
    return tuple(found), reasons


def form_of(scheme: Scheme) -> Quantised:
    """How our kernels are held that files hold by this scheme."""
    return Quantised(scheme.dtype, scheme.group, scheme.zeros, scheme.order, scheme.activations)


def from_dict(data: dict) -> Quantisation | None:
    """Reads the `quantization_config` of a whole config.json; None if there is none.

    Raises CheckpointError for methods and formats that are not supported, and for what is missing or contradictory.
    """
    text = data.get("text_config")
    how = data.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if not how:
        return None
    if not isinstance(how, dict):
        raise CheckpointError(f"quantization_config is {shown(how)}; it must be a JSON object")
    method = how.get("quant_method")
    if method is None and ("load_in_4bit" in how or "load_in_8bit" in how):
        method = "bitsandbytes"
    if method is None:
        raise CheckpointError("quantization_config has no quant_method; copy the whole config.json of the checkpoint")
    read = _METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        name = method[:80] if isinstance(method, str) else shown(method)
        raise CheckpointError(f"quantised checkpoints ({name}) are not supported; {_OTHER}")
    return Quantisation(method, tuple(read(how)))


def to_dict(held: dict[str, Quantised], linears: dict[str, tuple[list[str], tuple]]) -> dict:
    """The `quantization_config`, as compressed-tensors writes it, of Linears that are held in these forms.

    held: `Config.quantised`. linears: as for `forms`.
    """
    groups: dict[Scheme, list[str]] = {}
    for path, form in held.items():
        groups.setdefault(written(form), []).append(path)
    formats = {scheme.format for scheme in groups}
    every = len(groups) == 1
    ignored = [path for path in linears if path not in held]
    patterns = [_module_pattern(linears[path][0]) for path in ignored]
    if not any(path.startswith("vision/") for path in held):
        patterns = ["re:.*visual.*", *(p for p in patterns if "visual" not in p)]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if every else [_module_pattern(linears[path][0]) for path in paths],
                "weights": _args(scheme),
                "input_activations": _input_args(scheme.activations),
                "output_activations": None,
                "format": scheme.format,
            }
            for i, (scheme, paths) in enumerate(groups.items())
        },
        "ignore": ["lm_head", *patterns],
        "kv_cache_scheme": None,
    }


def _module_pattern(modules: list[str]) -> str:
    """Matches the modules of a Linear, one per layer, in every spelling: the hub's, transformers' and vLLM's."""
    escaped = re.escape(core(modules[0]))
    return "re:.*" + (escaped.replace(r"\.0", r"\.\d+", 1) if len(modules) > 1 else escaped) + "$"


def written(form: Quantised) -> Scheme:
    """The scheme of compressed-tensors that holds a form. vLLM opens integers packed, unless inputs are quantised."""
    bits = 4 if form.dtype == "int4" else 8
    plain = FLOAT if form.dtype == "float8_e4m3fn" else INT if form.activations else PACKED
    return Scheme(plain, bits, form.group, 1, form.zeros, form.order, form.activations)


def _args(scheme: Scheme) -> dict:
    kind = "float" if scheme.format == FLOAT else "int"
    strategy = {"strategy": "group", "group_size": scheme.group} if scheme.group else {"strategy": "channel"}
    order = {"actorder": "group"} if scheme.order else {}
    return {"num_bits": scheme.bits, "type": kind, "symmetric": not scheme.zeros, "dynamic": False} | strategy | order


def _input_args(dtype: str | None) -> dict | None:
    kind = "int" if dtype == "int8" else "float"
    whole = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    return whole if dtype else None


def _awq(how: dict):
    get = reader(how, where="quantization_config.")
    version = get("version", str, "gemm").lower()
    if version != "gemm" or get("backend", str, "autoawq").lower() != "autoawq":
        kind = version if version != "gemm" else get("backend", str)
        raise CheckpointError(f"quantised checkpoints (AWQ's format {shown(kind)}) are not supported; {_OTHER}")
    scheme = Scheme(AWQ, _bits(how, (4,), "bits", "w_bit"), _group(how, "group_size", "q_group_size"), zeros=True)
    listed = get("modules_to_not_convert", list)
    if listed is not None:
        names = _names(listed, "modules_to_not_convert")
        yield (lambda module: any(name in one for one in spellings(module) for name in names)), False, None
        yield _in_decoder, True, scheme
    yield _always, None, scheme


def _gptq(how: dict):
    get = reader(how, where="quantization_config.")
    form = get("checkpoint_format", str, get("format", str, GPTQ))
    if get("is_marlin_format", bool, False):
        form = "marlin"
    if form not in (GPTQ, GPTQ_V2) or get("pack_dtype", str, "int32") != "int32":
        what = form if form not in (GPTQ, GPTQ_V2) else get("pack_dtype", str)
        raise CheckpointError(f"quantised checkpoints (GPTQ's format {shown(what)}) are not supported; {_OTHER}")
    if get("lm_head", bool, False):
        raise CheckpointError(f"quantization_config.lm_head: a quantised output head is not supported; {_OTHER}")
    group, order = _group(how, "group_size"), get("desc_act", bool, False)
    scheme = Scheme(
        form, _bits(how, (4, 8), "bits"), group, zeros=not get("sym", bool, True), order=order and group > 0
    )
    for key, changes in get("dynamic", dict, {}).items():  # GPTQModel's: "-:pattern" is not quantised
        if key.startswith("-:"):
            yield _pattern(key[2:]), False, None
            continue
        one = how | typed(f"quantization_config.dynamic[{shown(key)}]", changes, dict) | {"dynamic": None}
        *_, (_, _, scheme_of_it) = _gptq(one)
        yield _pattern(key.removeprefix("+:")), None, scheme_of_it
    yield _always, None, scheme


def _fp8(how: dict):
    get = reader(how, where="quantization_config.")
    block = get("weight_block_size", list)
    if block is None:
        raise CheckpointError(f"quantization_config has no weight_block_size; FP8 is read by blocks only; {_OTHER}")
    if get("fmt", str, "e4m3") != "e4m3":
        raise CheckpointError(f"quantization_config.fmt {shown(get('fmt', str))} is not supported; only 'e4m3' is")
    outputs, inputs = _block(block, "weight_block_size")
    scheme, listed = Scheme(BLOCK, 8, inputs, outputs), get("modules_to_not_convert", list)
    if listed is not None:
        parts = [f".{name}." for name in _names(listed, "modules_to_not_convert")]
        yield (lambda module: any(part in f".{one}." for one in spellings(module) for part in parts)), False, None
    yield _always, None if listed is None else True, scheme


def _compressed(how: dict):
    get = reader(how, where="quantization_config.")
    sparsity = get("sparsity_config", dict, {}).get("format", "dense")
    if sparsity != "dense":
        raise CheckpointError(
            f"quantised checkpoints (with the sparse format {shown(sparsity)}) are not supported; {_OTHER}"
        )
    if get("transform_config", dict, {}).get("config_groups"):
        raise CheckpointError(f"quantised checkpoints (with transform_config) are not supported; {_OTHER}")
    groups = get("config_groups", dict)
    if not groups:
        raise CheckpointError("quantization_config has no config_groups; copy the whole config.json of the checkpoint")
    yield _targets(get("ignore", list, []), "ignore"), False, None
    for name, group in groups.items():
        where = f"config_groups.{name}."
        group = typed(f"quantization_config.{where[:-1]}", group, dict)
        inner = reader(group, where=f"quantization_config.{where}")
        if inner("weights", dict) is None:
            continue
        form = inner("format", str, get("format", str))
        if form is None:
            raise CheckpointError("quantization_config has no format; copy the whole config.json of the checkpoint")
        scheme = _weights(group["weights"], form, f"{where}weights.")
        scheme = scheme._replace(activations=_activations(inner("input_activations", dict, {})))
        yield _targets(inner("targets", list, []), f"{where}targets"), True, scheme


def _weights(args: dict, form: str, where: str) -> Scheme:
    get = reader(args, where=f"quantization_config.{where}")
    kind, group = get("type", str, "int"), args.get("group_size")
    if form == "naive-quantized":
        form = FLOAT if kind == "float" else INT
    if form not in (PACKED, INT, FLOAT):
        raise CheckpointError(f"quantised checkpoints (compressed-tensors' {shown(form)}) are not supported; {_OTHER}")
    if kind != ("float" if form == FLOAT else "int"):
        raise CheckpointError(f"quantization_config.{where}type is {shown(kind)}, but its format is {form!r}")
    bits = _bits(args, (4, 8) if form == PACKED else (8,), "num_bits", where=where)
    strategy = get("strategy", str, "tensor" if group is None else "channel" if group == -1 else "group")
    size, outputs = 0, 1
    if strategy == "group":
        size = _group(args, "group_size", where=where)
    elif strategy == "block":
        structure = args.get("block_structure")
        sides = structure.split("x") if isinstance(structure, str) else structure
        outputs, size = _block([int(n) if str(n).isdecimal() else n for n in sides or ()], f"{where}block_structure")
    elif strategy not in ("channel", "tensor"):
        raise CheckpointError(f"quantization_config.{where}strategy {shown(strategy)} is not supported; {_OTHER}")
    if strategy in ("tensor", "block"):
        outputs = outputs if strategy == "block" else 0
        if form == PACKED:
            raise CheckpointError(f"quantization_config.{where}strategy is {strategy!r}, which {PACKED!r} cannot hold")
    order = args.get("actorder") in (True, "group", "dynamic")
    if order and (form != PACKED or not size):
        raise CheckpointError(f"quantization_config.{where}actorder needs packed weights with the strategy 'group'")
    return Scheme(form, bits, size, outputs, not get("symmetric", bool, True), order)


def _activations(args: dict) -> str | None:
    """The dtype of inputs that are quantised token by token. What files ask for otherwise does not change weights."""
    asked = [args.get(key) for key in ("num_bits", "strategy", "dynamic")]
    if asked != [8, "token", True] or args.get("symmetric") is False:
        return None
    return "float8_e4m3fn" if args.get("type") == "float" else "int8"


_METHODS = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "fp8": _fp8}


def spellings(module: str) -> list[str]:
    """A module's name on the hub, and as newer transformers saves it."""
    if module.startswith("model."):
        return [module, module.replace("model.", "model.language_model.", 1)]
    return [module, f"model.{module}"] if module.startswith("visual.") else [module]


def _always(module: str) -> bool:
    return True


def _in_decoder(module: str) -> bool:
    return module.startswith("model.layers.")


def _targets(values: list, key: str) -> Callable[[str], bool]:
    """Do targets or names to ignore hold for a module? They are names, "re:" patterns, or the class Linear."""
    names = _names(values, key)
    tests = [_pattern(name[3:]) for name in names if name.startswith("re:")]
    plain = set(names)
    return lambda module: (
        "Linear" in plain or any(n in plain for n in spellings(module)) or any(t(module) for t in tests)
    )


def _pattern(pattern: str) -> Callable[[str], bool]:
    """Does a regular expression match the beginning of a module's name?

    Files are untrusted, so groups may not be repeated, and only a few parts may be: matching then takes no time.
    """
    plain = re.sub(r"\\.", "x", pattern)
    if len(pattern) > _LONGEST or re.search(r"\)[*+{]", plain) or len(re.findall(r"[*+{]", plain)) > 5:
        raise CheckpointError(f"quantization_config has {shown(pattern)}, too complex a pattern; name the modules")
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise CheckpointError(f"quantization_config has {shown(pattern)}, which is not a pattern ({e})") from e
    return lambda module: any(compiled.match(name) for name in spellings(module))


def _names(values: Iterable, key: str) -> list[str]:
    for value in values:
        if not isinstance(value, str) or not value:
            raise CheckpointError(f"quantization_config.{key} has {shown(value)}; it must be a list of names")
    return list(values)


def _required(how: dict, keys: tuple[str, ...], where: str):
    value = next((how[key] for key in keys if how.get(key) is not None), None)
    if value is None:
        raise CheckpointError(
            f"quantization_config has no {where}{keys[0]}; copy the whole config.json of the checkpoint"
        )
    return value


def _bits(how: dict, known: tuple[int, ...], *keys: str, where: str = "") -> int:
    value = _required(how, keys, where)
    if not is_number(value, int) or value not in known:
        those = " or ".join(map(str, known))
        raise CheckpointError(
            f"quantization_config.{where}{keys[0]} is {shown(value)}; only {those} bits are supported here"
        )
    return value


def _group(how: dict, *keys: str, where: str = "") -> int:
    """The group size, 0 for all inputs (-1 in files)."""
    value = _required(how, keys, where)
    if not is_number(value, int) or not (value == -1 or 0 < value < 2**31):
        raise CheckpointError(
            f"quantization_config.{where}{keys[0]} is {shown(value)}; it must be -1 or a positive integer"
        )
    return max(value, 0)


def _block(value, key: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(is_number(n, int) and 0 < n < 2**31 for n in value):
        raise CheckpointError(f"quantization_config.{key} is {shown(value)}; it must be two positive integers")
    return value[0], value[1]
