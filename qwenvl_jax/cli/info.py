"""`qwenvl info`: describes a checkpoint from its config and the headers of its weight files.

Importing this file does not import numpy, and `describe` does not import jax, except to count the
parameters of a preset that PARAMETERS lacks.
"""

import collections
import dataclasses
import json
import math
from pathlib import Path

from qwenvl_jax.cli.errors import OK
from qwenvl_jax.config import DTYPES, Config
from qwenvl_jax.params.precision import on_cpu

HELP = "Describe a checkpoint, reading only its headers."
EXAMPLES = (
    "qwenvl info CKPT",
    "qwenvl info qwen2.5-vl-7b --json",
)
# `count_params` of params/specs.py needs jax, which takes a second to import; a test compares.
PARAMETERS = {
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2-vl-72b": 73_405_560_320,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
}


def add_arguments(parser) -> None:
    text = "checkpoint directory, hub id, gs:// or s3:// URL, or a preset such as qwen2.5-vl-7b (default: demo)"
    parser.add_argument("checkpoint", nargs="?", default="demo", metavar="CKPT", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args) -> int:
    facts = describe(args.checkpoint)
    print(json.dumps(facts) if args.json else table(facts))
    return OK


def describe(path_or_preset) -> dict:
    """Facts about a checkpoint directory of either format, a URL, a hub id, "demo" or a preset, as JSON values.

    Of one that is not here, only the small files and the headers of the weight files are read.

    Keys: family; boxes (their coordinates in answers: "resized" or "thousandths"); preset (with the same sizes, or
    None); format ("hf", "orbax", "preset"); parameters; dtypes {name: parameters}; files {name: bytes}; bytes; context;
    config; on_cpu (what `load` does with 16-bit weights on a CPU with the memory that is free now);
    adapters (if it is an adapter; then the rest is about its base); quantised (None, or an object: method; forms, how
    Linears are held, each with their paths; dense, the Linears that are not quantised; dequantised {path: why `load`
    dequantises it}; unsupported, why it cannot be loaded).
    A quantised Linear counts with its weights, in the dtype of its codes.
    Raises InputError if there is no such directory or a header is damaged.
    """
    # Not at the top: `--help` imports this file, and these import numpy.
    from qwenvl_convert.safetensors import DTYPES as FLOATS
    from qwenvl_convert.safetensors import Reader

    from qwenvl_jax.families import PRESETS
    from qwenvl_jax.families.shared import core
    from qwenvl_jax.params import directory, locate, remote

    config = PRESETS.get(str(path_or_preset))
    if config:
        count = PARAMETERS.get(str(path_or_preset))
        if count is None:  # a new family's
            from qwenvl_jax.params.specs import count_params

            count = count_params(config)
        return _facts(config, "preset", {config.dtype: count}, {})
    locate.check_name(path_or_preset)
    located = locate.locate(path_or_preset, weights=False)
    path, adapters = located.path, located.adapters
    config, quantised = _quantised(path)
    dtypes = collections.Counter[str]()
    if (path / directory.MARKER).is_file():
        path = locate.with_weights(located).path  # one in a store is copied: its sizes are not in the small files
        form, found = "orbax", {f for f in (path / directory.PARAMS).rglob("*") if f.is_file()}
        files = {str(f.relative_to(path)): f.stat().st_size for f in sorted(found)}
        for name, (shape, dtype) in directory.stored_arrays(path).items():
            if not name.endswith(("/scales", "/zeros", "/order")):
                dtypes[str(dtype)] += math.prod(shape)
    else:
        form = "hf"
        with remote.headers(located.place, path) as path, Reader(path) as reader:
            found = {t.file for t in reader.tensors.values()}
            files = {f.name: f.stat().st_size for f in sorted(found)}
            packed = _packed(config, quantised)
            for name, tensor in reader.tensors.items():
                dtype, (module, _, kind) = FLOATS.get(tensor.dtype), core(name).rpartition(".")
                if module not in packed or kind == "bias":
                    dtypes[dtype.name if dtype else tensor.dtype] += math.prod(tensor.shape)
            for one, size in packed.values():
                dtypes[one] += size
    facts = _facts(config, form, dict(dtypes), files) | {"quantised": quantised}
    return facts | {"adapters": [_adapter(config, a) for a in adapters]}


def _quantised(path: Path) -> tuple[Config, dict | None]:
    """The config of a checkpoint, and the key "quantised"."""
    from qwenvl_jax.config import read_json
    from qwenvl_jax.errors import CheckpointError
    from qwenvl_jax.params import directory

    out: dict = {"method": "", "forms": {}, "dense": [], "dequantised": {}, "unsupported": ""}
    dense = directory.read_dense(path)
    try:
        config, out["dequantised"] = directory.read_quantised(path)
        how = read_json(path / "config.json").get("quantization_config")
    except CheckpointError as e:
        return dense, out | {"unsupported": str(e)}
    if not config.quantised and not out["dequantised"]:
        return config, None
    out["method"] = (how or {}).get("quant_method", "")
    for linear, form in config.quantised:
        out["forms"].setdefault(str(form), []).append(linear)
    held = {linear for linear, _ in config.quantised} | out["dequantised"].keys()
    out["dense"] = [linear for linear in directory.linear_modules(config) if linear not in held]
    return config, out


def _packed(config: Config, quantised: dict | None) -> dict[str, tuple[str, int]]:
    """The modules that the files hold quantised → (dtype of their codes, number of weights)."""
    if quantised is None or quantised["unsupported"]:
        return {}
    from qwenvl_jax.families.shared import core
    from qwenvl_jax.params import directory

    held = {linear: form.dtype for linear, form in config.quantised}
    out: dict[str, tuple[str, int]] = {}
    for linear, (modules, shape) in directory.linear_modules(config).items():
        if linear in held:
            out |= {core(module): (held[linear], math.prod(shape)) for module in modules}
    return out


def _adapter(config: Config, path: Path) -> dict:
    from qwenvl_convert.peft import AdapterFile

    with AdapterFile(config, path) as adapter:
        modules = sum(map(len, adapter.pairs.values()))
        return {"path": str(path), "rank": adapter.rank, "modules": modules, "whole": sorted(adapter.replaced)}


def _facts(config: Config, form: str, dtypes: dict, files: dict) -> dict:
    from qwenvl_jax.families import PRESETS, family_of

    sizes = (config.family, config.text, config.vision)
    same = (name for name, p in PRESETS.items() if (p.family, p.text, p.vision) == sizes)
    return {
        "family": config.family,
        "boxes": family_of(config).BOXES,
        "preset": next(same, None),
        "format": form,
        "parameters": sum(dtypes.values()),
        "dtypes": dtypes,
        "files": files,
        "bytes": sum(files.values()),
        "on_cpu": on_cpu(config.dtype, sum(n for dtype, n in dtypes.items() if dtype in DTYPES)).reason,
        "context": config.text.context,
        "config": dataclasses.asdict(config),
        "adapters": [],
        "quantised": None,
    }


def table(facts: dict) -> str:
    """The facts as a text table."""
    t, v = facts["config"]["text"], facts["config"]["vision"]
    rows = {
        "family": facts["family"] + (f", sizes of {facts['preset']}" if facts["preset"] else ""),
        "format": facts["format"],
        "parameters": f"{facts['parameters']:,}",
        "dtype": ", ".join(facts["dtypes"]),
        "decoder": f"{t['num_hidden_layers']} layers of width {t['hidden_size']}, "
        f"{t['num_attention_heads']} heads ({t['num_key_value_heads']} for keys and values), "
        f"MLP {t['intermediate_size']}, vocabulary {t['vocab_size']}",
        "vision": f"{v['depth']} blocks of width {v['hidden_size']}, {v['num_heads']} heads",
        "context": f"{facts['context']:,} tokens",
        "boxes": {"resized": "pixels of the resized image", "thousandths": "0 … 1000 of each side"}[facts["boxes"]],
    }
    if t["tie_word_embeddings"]:
        rows["decoder"] += ", tied embeddings"
    if v["window_size"]:
        layers = ", ".join(map(str, v["fullatt_block_indexes"]))
        rows["vision"] += f", windows of {v['window_size']} pixels, full attention in blocks {layers}"
    if t["yarn"]:
        rows["context"] += f", YaRN factor {t['yarn']['factor']:g}"
    if facts["on_cpu"]:
        rows["on a CPU"] = facts["on_cpu"].removeprefix("on a CPU, ")
    if facts["files"]:
        rows["weights"] = f"{facts['bytes']:,} bytes in {len(facts['files'])} files"
    if facts["quantised"]:
        rows |= _quantised_rows(facts["quantised"])
    for i, a in enumerate(facts["adapters"], 1):
        whole = f", whole {', '.join(a['whole'])}" if a["whole"] else ""
        rows[f"adapter {i}"] = f"rank {a['rank']} on {a['modules']} modules{whole} ({a['path']})"
    return "\n".join(f"{name:<11} {value}" for name, value in rows.items())


def _quantised_rows(facts: dict) -> dict[str, str]:
    if facts["unsupported"]:
        return {"quantised": facts["unsupported"]}
    rows = {"quantised": "; ".join(f"{_short(paths)}: {form}" for form, paths in facts["forms"].items()) or "nothing"}
    if facts["method"]:
        rows["quantised"] = f"{facts['method']}: {rows['quantised']}"
    if facts["dense"]:
        rows["not so"] = _short(facts["dense"])
    for path, why in facts["dequantised"].items():
        rows["quantised"] += f"; {path} is dequantised when it is loaded: {why}"
    return rows


def _short(paths: list[str]) -> str:
    """Linears by the module that they are in."""
    places: dict[str, list[str]] = {}
    for path in paths:
        place, _, name = path.rpartition("/")
        places.setdefault(place, []).append(name)
    return ", ".join(f"{place} ({' '.join(names)})" for place, names in places.items())
