"""Checkpoint directories without their weights: where they are, their format, their config. Imports no jax."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes  # noqa: F401 - makes "bfloat16" the name of a numpy dtype
import numpy as np

from qwenvl_jax.config import Config, read_json
from qwenvl_jax.errors import CheckpointError, InputError
from qwenvl_jax.families import from_dict
from qwenvl_jax.inputs.preprocessing import read_preprocessing

PACKAGE = Path(__file__).parents[1]
FORMAT = 1
DEMO = "demo"
MARKER, PARAMS = "qwenvl_jax.json", "params"
INDEX = "model.safetensors.index.json"  # in a Hugging Face checkpoint with several weight files
# A checkpoint's files, except the weights.
SIDE_FILES = ("*.json", "*.jinja", "merges.txt", "README.md", "LICENSE*")


def find(path_or_id, *, revision: str | None = None, weights: bool = True) -> Path:
    """The checkpoint's directory. One on the hub or in an object store is copied to a cache first.

    path_or_id: a directory, "gs://…", "s3://…", a hub id such as "Qwen/Qwen2-VL-2B-Instruct", or "ID@REVISION".
        "demo" is always the package's small checkpoint; "./demo" is a directory.
    weights: False copies the small files only. Otherwise they are judged before the weights are copied.
    Raises CheckpointError if it is not found.
    """
    from qwenvl_jax.params import remote

    if path_or_id == DEMO:
        path = PACKAGE / "demo" / "checkpoint"
        if not path.is_dir():
            raise CheckpointError(f"{DEMO}: this installation has no demo checkpoint; name a directory or a hub id")
        return path
    path = Path(path_or_id).expanduser()
    if path.is_dir() and revision is None:
        return path.absolute()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; a checkpoint is a directory (with config.json and the weights)")
    place = remote.place_of(path_or_id, revision)
    if place is None:
        raise CheckpointError(f"{path}: no such directory")
    return remote.fetch(place, weights=weights)


def named(path_or_id) -> bool:
    """Whether this names a checkpoint by its form, or a directory that exists."""
    from qwenvl_jax.params import remote

    return path_or_id == DEMO or Path(path_or_id).expanduser().is_dir() or remote.place_of(path_or_id) is not None


def read_config(path: Path, *, quantised: bool = False) -> Config:
    """The config of a checkpoint directory, with the mean and std of its preprocessor config, if it has one.

    quantised: accept the config of quantised weights, which cannot be loaded.
    Raises CheckpointError if the model is not supported.
    """
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: not a checkpoint, there is no config.json in it")
    data = read_json(file)
    try:
        config = from_dict(data)
    except InputError as e:
        raise CheckpointError(f"{file}: {e}") from e
    if (how := data.get("quantization_config")) and not quantised:
        method = how.get("quant_method", "?") if isinstance(how, dict) else how
        raise CheckpointError(f"{file}: quantised checkpoints ({method}) are not supported; use the original model")
    preprocessing = read_preprocessing(path, config)
    if preprocessing is None:
        return config
    # Part of the model's config, because pictures are normalised on the device.
    mean, std = preprocessing.image_mean, preprocessing.image_std
    return config.replace(vision=dataclasses.replace(config.vision, image_mean=mean, image_std=std))


def stored_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The arrays in one of our directories, from their headers: parameter path → shape and dtype."""
    import tensorstore as ts

    found = read_json(path / MARKER).get("format")
    if found != FORMAT:
        raise CheckpointError(f"{path / MARKER}: format {found!r} is not {FORMAT}; a newer qwenvl_jax wrote it")
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
