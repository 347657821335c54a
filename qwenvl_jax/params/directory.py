"""Checkpoint directories before anything of their weights is read: where they are, which form they have, their config.

Importing this file does not import jax.
"""

import dataclasses
import json
import re
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
INDEX = "model.safetensors.index.json"  # of a Hugging Face checkpoint in several files
# Everything of a checkpoint that is not weights.
SIDE_FILES = ("*.json", "*.jinja", "merges.txt", "README.md", "LICENSE*")
_HUB_FILES = (*SIDE_FILES, "*.safetensors", f"{PARAMS}/**")


def find(path_or_id) -> Path:
    """The checkpoint's directory, downloaded first if the argument is a hub id such as "Qwen/Qwen2-VL-2B-Instruct".

    "demo" is the small one that comes with the package, whatever the working directory holds; "./demo" is a directory.
    """
    if path_or_id == DEMO:
        path = PACKAGE / "demo" / "checkpoint"
        if not path.is_dir():
            raise CheckpointError(f"{DEMO}: this installation has no demo checkpoint; name a directory or a hub id")
        return path
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise CheckpointError(f"{path}: is a file; a checkpoint is a directory (with config.json and the weights)")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_id)):
        raise CheckpointError(f"{path}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=list(_HUB_FILES)))
    except Exception as e:  # no network, no such repo, no access: the type depends on the version and its http library
        raise CheckpointError(
            f"{path_or_id}: no such directory, and it could not be had from the hub ({first_line(e)})"
        ) from e


def read_config(path: Path, *, quantised: bool = False) -> Config:
    """The config of a checkpoint directory, with the normalisation of its preprocessor config if there is one.

    quantised: read the config of quantised weights too, which cannot be loaded.
    Raises CheckpointError for a model that is not supported.
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
    # Pictures are normalised on the device, so the model must know how.
    mean, std = preprocessing.image_mean, preprocessing.image_std
    return config.replace(vision=dataclasses.replace(config.vision, image_mean=mean, image_std=std))


def stored_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The arrays of one of our directories, from their headers: parameter path → shape and dtype."""
    import tensorstore as ts

    marker = read_json(path / MARKER)
    if marker.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / MARKER}: format {marker.get('format')!r} is not {FORMAT}; a newer qwenvl_jax wrote it"
        )
    try:  # not through Orbax, whose threads report a damaged file on stderr, each for itself
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
        raise CheckpointError(f"{path / PARAMS}: not a readable Orbax checkpoint, there are no parameters in it")
    return stored


def kvstore(params: Path) -> dict:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{params.absolute()}/"}}


def first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
