"""Checkpoint directories without their weights: their files, format and config. Imports no jax."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import ml_dtypes  # noqa: F401 - makes "bfloat16" the name of a numpy dtype
import numpy as np

from qwenvl_jax.config import MAX_JSON, Config, Quantised, read_json, refuse_pointer, typed
from qwenvl_jax.errors import CheckpointError, InputError, shown
from qwenvl_jax.families import family_of, from_dict, quantisation
from qwenvl_jax.families.shared import core
from qwenvl_jax.inputs.preprocessing import read_preprocessing

FORMAT = 1
# Of our own format. BESIDE holds tensors of a quantised checkpoint that are no parameters, for the way back.
MARKER, PARAMS, BESIDE = "qwenvl_jax.json", "params", "beside.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # a Hugging Face checkpoint has one of them
# A checkpoint's files, except the weights.
SIDE_FILES = ("*.json", "*.jinja", "merges.txt", "README.md", "LICENSE*")
ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's


def read_config(path: Path) -> Config:
    """The config of a checkpoint directory, with the mean and std of its preprocessor config, if it has one.

    Of quantised weights, it says how each Linear is held (`Config.quantised`).
    Raises CheckpointError if the model is not supported.
    """
    return read_quantised(path)[0]


def read_quantised(path: Path) -> tuple[Config, dict[str, str]]:
    """As `read_config`, and {a Linear: why it is dequantised when it is loaded, though the files hold it quantised}."""
    config = read_dense(path)
    if (path / MARKER).is_file():
        return config.replace(quantised=_marked(path / MARKER)), {}
    file, reasons = path / "config.json", {}
    try:
        how = quantisation.from_dict(read_json(file))
        if how is not None:
            held, reasons = quantisation.forms(how, linear_modules(config), _stored_names(path))
            config = config.replace(quantised=held)
    except InputError as e:
        raise e if str(file) in str(e) else CheckpointError(f"{file}: {e}") from e
    return config, reasons


def read_dense(path: Path) -> Config:
    """As `read_config`, as if nothing were quantised."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: not a checkpoint, there is no config.json in it{leftover(path)}")
    data = read_json(file)
    try:
        config = from_dict(data)
    except InputError as e:
        raise CheckpointError(f"{file}: {e}") from e
    preprocessing = read_preprocessing(path, config)
    if preprocessing is None:
        return config
    # Part of the model's config, because pictures are normalised on the device.
    mean, std = preprocessing.image_mean, preprocessing.image_std
    return config.replace(vision=dataclasses.replace(config.vision, image_mean=mean, image_std=std))


def _marked(file: Path) -> tuple[tuple[str, Quantised], ...]:
    """`Config.quantised` of one of our directories, which says it in its own file."""
    held = read_json(file).get("quantised", {})
    try:
        return tuple((path, Quantised(**form)) for path, form in typed("quantised", held, dict).items())
    except (TypeError, InputError) as e:
        raise CheckpointError(f"{file}: quantised is {shown(held)}, which is not readable ({e})") from e


def marker(config: Config, reasons: dict[str, str] | None = None) -> dict:
    """The contents of MARKER. reasons: see `read_quantised`."""
    held = {path: dataclasses.asdict(form) for path, form in config.quantised}
    more = {"quantised": held} if held else {}
    return {"format": FORMAT} | more | ({"dequantised": reasons} if reasons else {})


def linear_modules(config: Config) -> dict[str, tuple[list[str], tuple[int, int]]]:
    """Path of each Linear → its modules on the hub, one per layer if it is stacked, and its in and out."""
    from qwenvl_jax.params.specs import specs  # imports jax, which few checkpoints need here

    declared, out = specs(config.replace(quantised=())), {}
    for path, name in family_of(config).tensor_names(config).items():
        spec = declared.get(path)
        if spec is not None and spec.role == "linear":
            layers = range(spec.shape[0]) if spec.stacked else [0]
            module = name.removesuffix(".weight")
            out[path.removesuffix("/kernel")] = [module.format(l=l) for l in layers], spec.shape[-2:]
    return out


def _stored_names(path: Path) -> set[str] | None:
    """The tensors of a Hugging Face directory, by `core` of their names; None if its files are not here."""
    with contextlib.suppress(InputError, OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        if not (path / SINGLE).is_file():
            return {core(name) for name in read_json(path / INDEX)["weight_map"]}
        with (path / SINGLE).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return {core(name) for name in json.loads(file.read(min(length, MAX_JSON)))}
    return None


# What training and saving leave behind: a pattern of names, and what to do.
_LEFTOVERS = (
    ("zero_to_fp32.py", "it holds DeepSpeed's shards; run `python zero_to_fp32.py . OUT` in it and open OUT"),
    ("global_step*", "it holds DeepSpeed's shards; make one checkpoint of them with DeepSpeed's zero_to_fp32.py"),
    ("mp_rank_*", "it holds DeepSpeed's shards; make one checkpoint of them with DeepSpeed's zero_to_fp32.py"),
    ("*.distcp", "it holds FSDP's shards; run `accelerate merge-weights DIR OUT` and add the base's other files"),
    ("pytorch_model_fsdp*", "it holds FSDP's shards; run `accelerate merge-weights` and add the base's other files"),
    ("*.gguf", "GGUF files are not supported; use the original model"),
    ("consolidated*", "it is in another project's format; use the model in Hugging Face's format"),
    ("snapshots/*/config.json", "it is a folder of the hub's cache; name the folder in snapshots, or the hub id"),
    ("final/config.json", "it is the directory of a run; name its folder final"),
    ("final/adapter_config.json", "it is the directory of a run; name its folder final"),
    ("adapter/adapter_config.json", "it is the directory of a run; name its folder adapter"),
    ("checkpoint-*/config.json", "it holds a trainer's checkpoints; name one of them"),
    ("checkpoint-*/adapter_config.json", "it holds a trainer's checkpoints of an adapter; name one of them"),
    ("checkpoints/*/state", "it is the directory of a run that has not ended; run `qwenvl train` again to end it"),
    ("progress", "it is a checkpoint of a run; end the run with `qwenvl train`, then open its folder final"),
    ("*/progress", "it holds checkpoints of a run; end the run with `qwenvl train`, then open its folder final"),
    ("d/*", "it holds Orbax's arrays alone; name the checkpoint's directory, which has a config.json"),
    ("_METADATA", "it holds Orbax's arrays alone; name the checkpoint's directory, which has a config.json"),
    ("adapter_model.*", "it holds an adapter's weights without adapter_config.json; copy that file into it"),
    (
        "pytorch_model*.bin",
        "it holds weights as pickles, which could run code when they are opened; if you trust them, save the model "
        "again: AutoModelForImageTextToText.from_pretrained(DIR, dtype='auto').save_pretrained(OUT)",
    ),
    ("*.safetensors", "it holds weights alone; copy config.json and the tokenizer's files of the base model into it"),
    ("*/config.json", "one of its folders is a checkpoint; name that folder"),
    ("*/adapter_config.json", "one of its folders is an adapter; name that folder"),
)


def leftover(path: Path, *, of_adapters: bool = False) -> str:
    """What a directory is that lacks config.json or its weights, and what to do, to end a sentence; "" if unknown.

    of_adapters: only what may stand where an adapter is expected.
    """
    for pattern, advice in _LEFTOVERS:
        if of_adapters and "adapter" not in pattern:
            continue
        found = sorted(path.glob(pattern))
        if found and not (pattern == "*.safetensors" and (path / "config.json").is_file()):
            newest = max(found, key=lambda f: [int(n) for n in re.findall(r"\d+", str(f.relative_to(path)))])
            folder = newest.relative_to(path).parts[0] if "/" in pattern and "name" in advice else ""
            return f": {advice}" + (f" ({path / folder})" if folder and folder != "snapshots" else "")
    return ""


def stored_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The arrays in one of our directories, from their headers: parameter path → shape and dtype."""
    import tensorstore as ts

    found = read_json(path / MARKER).get("format")
    if found != FORMAT:
        raise CheckpointError(f"{path / MARKER}: format {shown(found)} is not {FORMAT}; a newer qwenvl_jax wrote it")
    for file in sorted((path / PARAMS).rglob("*")):
        refuse_pointer(file)
    try:  # without Orbax, each of whose threads would report a damaged file on stderr
        files = ts.KvStore.open(kvstore(path / PARAMS)).result()
        stored = {}
        for key in files.list().result():
            name, _, file = key.decode().rpartition("/")
            if file == ".zarray":
                entry = json.loads(files[key])
                stored[name.replace(".", "/")] = tuple(entry["shape"]), np.dtype(entry["dtype"])
    except (ValueError, OSError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path / PARAMS}: not a readable Orbax checkpoint ({first_line(e)})") from e
    if not stored:
        raise CheckpointError(f"{path / PARAMS}: not a readable Orbax checkpoint, it has no parameters")
    return stored


def kvstore(params: Path) -> dict:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{params.absolute()}/"}}


def first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
