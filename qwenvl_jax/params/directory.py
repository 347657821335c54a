"""Checkpoint directories without their weights: where they are, their format, their config. Imports no jax."""

import contextlib
import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - makes "bfloat16" the name of a numpy dtype
import numpy as np

from qwenvl_jax.config import Config, read_json, refuse_pointer
from qwenvl_jax.errors import CheckpointError, InputError, shown
from qwenvl_jax.families import from_dict
from qwenvl_jax.inputs.preprocessing import read_preprocessing

PACKAGE = Path(__file__).parents[1]
FORMAT = 1
DEMO = "demo"
MARKER, PARAMS = "qwenvl_jax.json", "params"
INDEX = "model.safetensors.index.json"  # in a Hugging Face checkpoint with several weight files
# A checkpoint's files, except the weights.
SIDE_FILES = ("*.json", "*.jinja", "merges.txt", "README.md", "LICENSE*")
ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
_LOG = logging.getLogger(__name__)


class Located(NamedTuple):
    """A checkpoint, its name for other programs (a hub id or a directory), and its adapters, in order.

    place: where its weights are still to be copied from (`params.remote.Place`), or None.
    """

    path: Path
    name: str
    adapters: tuple[Path, ...] = ()
    place: Any = None


def find(path_or_id, *, revision: str | None = None, weights: bool = True) -> Path:
    """The checkpoint's directory. One on the hub or in an object store is copied to a cache first.

    path_or_id: a directory, "gs://…", "s3://…", a hub id such as "Qwen/Qwen2-VL-2B-Instruct", or "ID@REVISION".
        "demo" is always the package's small checkpoint; "./demo" is a directory.
    weights: False copies the small files only. Otherwise they are judged before the weights are copied.
    Raises CheckpointError if it is not found.
    """
    from qwenvl_jax.params import remote

    path, place = _small(path_or_id, revision)
    return path if place is None or not weights else remote.complete(place, path)


def _small(path_or_id, revision: str | None = None) -> tuple[Path, Any]:
    """A checkpoint's directory with its small files, and the place of its weights, None if it is a local directory."""
    from qwenvl_jax.params import remote

    if path_or_id == DEMO:
        path = PACKAGE / "demo" / "checkpoint"
        if not path.is_dir():
            raise CheckpointError(f"{DEMO}: this installation has no demo checkpoint; name a directory or a hub id")
        return path, None
    path = Path(path_or_id).expanduser()
    if path.is_dir() and revision is None:
        return path.absolute(), None
    if path.exists() and not path.is_dir():
        raise CheckpointError(_a_file(path))
    place = remote.place_of(path_or_id, revision)
    if place is None:
        raise CheckpointError(f"{path}: no such directory")
    return remote.fetch(place), place


def named(path_or_id) -> bool:
    """Whether this names a checkpoint by its form, or a directory that exists."""
    from qwenvl_jax.params import remote

    return path_or_id == DEMO or Path(path_or_id).expanduser().is_dir() or remote.place_of(path_or_id) is not None


def locate(path_or_id, *adapters, revision: str | None = None, weights: bool = True) -> Located:
    """Finds a model and its adapters, each named as for `find`.

    If `path_or_id` is an adapter, its base is opened and the adapter comes first. `adapters` are applied after it.
    revision, weights: as for `find`; those of adapters are always there. The model's are copied last; without
        `weights`, `complete` copies them.
    Raises CheckpointError if one of them, or a base, is not found, or if an adapter is named twice.
    """
    from qwenvl_jax.stores import as_url

    name, (path, place) = path_or_id, _small(path_or_id, revision)
    own: list[Path] = []
    chain = [_adapter(*_small(adapter)) for adapter in adapters]
    while (path / ADAPTER_SETTINGS).is_file():
        if any((path / weights).is_file() for weights in (MARKER, "model.safetensors", INDEX)):
            if own or path in chain:
                break
            both = f"{path}: holds a model's weights and an adapter"
            raise CheckpointError(f"{both}; move {ADAPTER_SETTINGS} away, or apply it too: --adapter {path}")
        if path in own:
            raise CheckpointError(f"{path}: this adapter's base is an adapter of it; name the base with --model")
        own.insert(0, _adapter(path, place))
        name, revision = _base_of(path)
        at = f"@{revision}" if revision else ""
        _LOG.warning("%s: an adapter; its base model is %s%s", path, name, at)
        path, place = _small(name, revision)
    seen: set[Path] = set()
    for adapter in (*own, *chain):
        if adapter.resolve() in seen:
            raise CheckpointError(f"{adapter}: this adapter is applied already; name it once")
        seen.add(adapter.resolve())
    cached = _CACHED.search(str(path))
    named = f"{cached[1]}/{cached[2]}" if cached else str(name)
    if not as_url(named) and (Path(named).is_dir() or not HUB_ID.fullmatch(named)):
        named = str(path)
    located = Located(path, named, (*own, *chain), place)
    return complete(located) if weights else located


def complete(located: Located) -> Located:
    """The same checkpoint with its weights, which are copied now if they are elsewhere. Raises CheckpointError."""
    from qwenvl_jax.params import remote

    if located.place is None:
        return located
    return located._replace(path=remote.complete(located.place, located.path), place=None)


def _adapter(path: Path, place) -> Path:
    """An adapter's directory with its weights. Raises CheckpointError if it is none, before they are copied."""
    from qwenvl_jax.params import remote

    if not (path / ADAPTER_SETTINGS).is_file():
        hint = leftover(path, of_adapters=True)
        raise CheckpointError(f"{path}: not an adapter, there is no {ADAPTER_SETTINGS} in it{hint}")
    return path if place is None else remote.complete(place, path)


def _base_of(adapter: Path) -> tuple[Any, str | None]:
    """An adapter's base and its revision, as `find` takes them. Raises CheckpointError that says what to do."""
    file = adapter / ADAPTER_SETTINGS
    settings, instead = read_json(file), f"name its base: --model BASE --adapter {adapter}"
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{file}: base_model_name_or_path is {shown(name)}; {instead}")
    if revision is not None and not isinstance(revision, str):
        raise CheckpointError(f"{file}: revision is {shown(revision)}; {instead}")
    if name == DEMO:
        return name, None
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no name of a file, or of a user
        for path in (Path(name).expanduser(), adapter / name):  # as in PEFT, and for a base that moved with its adapter
            if path.is_dir():
                return path, None
    cached = _CACHED.search(name)  # the hub's cache on the machine where the adapter was trained
    name = f"{cached[1]}/{cached[2]}" if cached else name
    if name.lower().endswith(("-bnb-4bit", "-awq", "-fp8")) or "-gptq" in name.lower():
        raise CheckpointError(f"{file}: the base {name} is quantised; give the original model ({instead})")
    if name.startswith(("gs://", "s3://")):
        return name, None
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{file}: the base {name} is not here; {instead}")
    return name, revision or None


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


def _a_file(path: Path) -> str:
    kind = path.suffix.lower()
    if kind == ".gguf":
        return f"{path}: GGUF files are not supported; use the original model's directory or hub id"
    if kind in (".bin", ".pt", ".pth", ".ckpt"):
        return f"{path}: is a file; pickles are not read, save the model with transformers' save_pretrained"
    inside = kind in (".safetensors", ".json")
    hint = f"; did you mean {path.parent}?" if inside else " (with config.json and the weights)"
    return f"{path}: is a file; a checkpoint is a directory{hint}"


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
