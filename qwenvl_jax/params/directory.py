"""Checkpoint directories without their weights: their files, format and config. Imports no jax."""

import dataclasses
import json
import re
from pathlib import Path

import ml_dtypes  # noqa: F401 - makes "bfloat16" the name of a numpy dtype
import numpy as np

from qwenvl_jax.config import Config, read_json, refuse_pointer
from qwenvl_jax.errors import CheckpointError, InputError, shown
from qwenvl_jax.families import from_dict
from qwenvl_jax.inputs.preprocessing import read_preprocessing

FORMAT = 1
MARKER, PARAMS = "qwenvl_jax.json", "params"  # of our own format
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # a Hugging Face checkpoint has one of them
# A checkpoint's files, except the weights.
SIDE_FILES = ("*.json", "*.jinja", "merges.txt", "README.md", "LICENSE*")
ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's


def read_config(path: Path, *, quantised: bool = False) -> Config:
    """The config of a checkpoint directory, with the mean and std of its preprocessor config, if it has one.

    quantised: accept the config of quantised weights, which cannot be loaded.
    Raises CheckpointError if the model is not supported.
    """
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: not a checkpoint, there is no config.json in it{leftover(path)}")
    data = read_json(file)
    try:
        config = from_dict(data)
    except InputError as e:
        raise CheckpointError(f"{file}: {e}") from e
    text = data.get("text_config")
    how = data.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if how and not quantised:
        method = how.get("quant_method", "?") if isinstance(how, dict) else how
        raise CheckpointError(f"{file}: quantised checkpoints ({method}) are not supported; use the original model")
    preprocessing = read_preprocessing(path, config)
    if preprocessing is None:
        return config
    # Part of the model's config, because pictures are normalised on the device.
    mean, std = preprocessing.image_mean, preprocessing.image_std
    return config.replace(vision=dataclasses.replace(config.vision, image_mean=mean, image_std=std))


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
