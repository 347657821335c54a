"""Every key of a training run, defined and documented once, for a TOML file, flags and Python alike.

Imports nothing heavy: `qwenvl train --help` is made from the fields below.
"""

import argparse
import dataclasses
import difflib
import json
import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args, get_type_hints

from qwenvl_jax.errors import InputError

GROUPS = ("vision", "merger", "llm")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine")
_DTYPES = ("float32", "bfloat16")


def _key(default, doc: str, *, least=None, above=None, most=None, below=None, choices=None, free=False):
    """A field: its meaning, its range, and `free` if a run may go on with another value."""
    bounds = dict(least=least, above=above, most=most, below=below, choices=choices)
    return dataclasses.field(default=default, metadata=dict(doc=doc, free=free, **bounds))


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Settings of one run. Wrong types and ranges raise InputError, here as in a file or a flag."""

    # the run
    model: str = _key("", "checkpoint to start from: a directory or a hub id")
    data: str = _key("", "JSONL file of records to learn from")
    eval_data: str = _key("", "JSONL file of records to answer and score during training")
    output: str = _key(
        "", "directory of the run: checkpoints, metrics, the result. A run that is there goes on", free=True
    )
    task: str = _key("sft", "what to learn: the assistant's turns, or preferences", choices=("sft", "dpo"))
    beta: float = _key(0.1, "DPO: how strongly to stay near the reference model", above=0)
    seed: int = _key(0, "of the order of records and of dropout", least=0, most=2**31 - 1)
    # one step
    rows: int = _key(4, "rows of a batch; several samples share a row", least=1)
    tokens: int = _key(2048, "tokens of a row; a longer sample is a bad record", least=8)
    lanes: int = _key(4, "lanes of image patches of a batch", least=1)
    patches: int = _key(4096, "patches of a lane, 64·n; the largest frame must fit", least=4)
    segments: int = _key(64, "samples that may share a row; a preference is two", least=1)
    accumulate: int = _key(1, "batches of a step; their gradients are added up before the update", least=1)
    steps: int = _key(1000, "updates to make", least=1)
    # the optimizer
    optimizer: str = _key(
        "adamw", "how gradients become updates; muon is for training from nothing", choices=OPTIMIZERS
    )
    learning_rate: float = _key(1e-5, "the optimizer's step size at its peak", above=0, most=1)
    vision_learning_rate: float | None = _key(None, "of the vision tower; default: learning_rate", above=0, most=1)
    merger_learning_rate: float | None = _key(None, "of the merger; default: learning_rate", above=0, most=1)
    freeze: tuple[str, ...] = _key((), "parts of the model to leave as they are; repeatable", choices=GROUPS)
    schedule: str = _key("cosine", "how the step size falls after warmup", choices=SCHEDULES)
    cooldown: int = _key(0, "last steps, over which a constant step size falls to 0", least=0)
    warmup: int = _key(0, "steps over which the step size rises from 0", least=0)
    weight_decay: float = _key(0.01, "pull of matrices towards 0; norms and biases have none", least=0)
    betas: tuple[float, float] = _key((0.9, 0.95), "decay of AdamW's two moments", least=0, below=1)
    clip: float = _key(1.0, "largest norm of the gradient; 0 is off", least=0)
    # LoRA
    lora_rank: int = _key(0, "train adapters of this rank instead of the weights; 0 is off", least=0)
    lora_alpha: float = _key(16.0, "adapters are scaled by alpha / rank", above=0)
    lora_dropout: float = _key(0.0, "share of an adapter's inputs that a batch leaves out", least=0, below=1)
    lora_targets: tuple[str, ...] = _key(
        ("llm",), "linear layers to adapt: llm, vision, merger, or patterns such as q_proj; repeatable"
    )
    # precision and memory
    param_dtype: str | None = _key(
        None, "dtype of the weights in training; default: float32, with LoRA the checkpoint's", choices=_DTYPES
    )
    dtype: str | None = _key(None, "dtype to compute in; default: the checkpoint's", choices=_DTYPES)
    moment_dtype: str | None = _key(None, "dtype of AdamW's first moment; default: float32", choices=_DTYPES)
    remat: bool = _key(True, "compute activations again in the backward pass instead of keeping them")
    mesh_data: int = _key(1, "devices that share a batch, each with all weights", least=1, free=True)
    mesh_fsdp: int = _key(1, "devices that share a batch and the weights", least=1, free=True)
    mesh_tensor: int = _key(1, "devices that share the work on each token", least=1, free=True)
    distributed: bool = _key(False, "this is one process of several, started on every host of a pod", free=True)
    # records
    on_bad_record: str = _key("stop", "what to do about a record that cannot be used", choices=("stop", "skip"))
    threads: int = _key(2, "threads that read records", least=0, free=True)
    workers: int = _key(0, "processes that do, each with so many threads; 0: none", least=0, free=True)
    min_pixels: int | None = _key(None, "of an image or frame; default: the checkpoint's", least=1)
    max_pixels: int | None = _key(None, "of an image or frame; default: the checkpoint's", least=1)
    total_pixels: int | None = _key(None, "of all frames of a video, taken in pairs", least=1)
    fps: float | None = _key(None, "frames sampled a second of video", above=0)
    max_frames: int | None = _key(None, "frames sampled of a video, at most", least=2)
    allow_control_tokens: bool = _key(
        False, "let tokens such as <|box_start|> that a text spells out be tokens; scores are of texts without them"
    )
    # along the way
    save_every: int = _key(500, "steps between checkpoints", least=1, free=True)
    keep: int = _key(2, "latest checkpoints to keep, besides the best one", least=1, free=True)
    eval_every: int = _key(500, "steps between evaluations; a checkpoint goes with each", least=1, free=True)
    best: str | None = _key(
        None, "metric of the evaluation that says which checkpoint is best and becomes the result", free=True
    )
    best_mode: str = _key("max", "whether more of that metric is better, or less", choices=("max", "min"), free=True)
    log_every: int = _key(1, "steps between lines of metrics.jsonl", least=1, free=True)
    max_bad_steps: int = _key(10, "steps in a row with a loss or gradient that is not finite before giving up", least=1)

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.schedule != "constant" and self.warmup >= self.steps:
            raise InputError(f"warmup is {self.warmup}; it must be less than steps, {self.steps}")
        if self.cooldown and self.schedule != "constant":
            raise InputError(f"cooldown is of the constant schedule; schedule is {self.schedule!r}, which falls anyway")
        if self.cooldown and self.warmup + self.cooldown > self.steps:
            raise InputError(f"warmup and cooldown are {self.warmup + self.cooldown} steps, more than all {self.steps}")

    @classmethod
    def read(cls, file=None, flags: dict | None = None) -> "TrainOptions":
        """The options of a TOML file (None: no file), overridden by those in `flags`."""
        values = {} if file is None else _read_toml(Path(file))
        return cls.from_dict(values | (flags or {}))

    @classmethod
    def from_dict(cls, values: dict) -> "TrainOptions":
        """Options by name; an unknown name is refused, with the closest one that there is."""
        _known(values, "")
        return cls(**values)

    def to_toml(self) -> str:
        """What `read` reads; None is left out."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        # JSON's strings, numbers and lists are TOML's too.
        return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in given.items() if v is not None)

    def replace(self, **changes) -> "TrainOptions":
        _known(changes, "")
        return dataclasses.replace(self, **changes)

    def differences(self, before: "TrainOptions") -> list[str]:
        """What makes this another run than the one before, as "learning_rate was 1e-05 and is 2e-05"."""
        free = {f.name for f in fields(self) if f.metadata["free"]}
        if self.schedule == before.schedule == "constant":
            free |= {"steps", "cooldown"}  # the steps made so far were the same
        names = [f.name for f in fields(self) if f.name not in free]
        pairs = [(name, getattr(before, name), getattr(self, name)) for name in names]
        return [f"{name} was {_show(old)} and is {_show(new)}" for name, old, new in pairs if old != new]


_HINTS = get_type_hints(TrainOptions)
_TITLES = {
    "model": "the run",
    "rows": "one step",
    "optimizer": "the optimizer",
    "lora_rank": "LoRA",
    "param_dtype": "precision and memory",
    "on_bad_record": "records",
    "save_every": "along the way",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every key; what is not given is absent from the namespace."""
    for field in fields(TrainOptions):
        if field.name in _TITLES:
            group = parser.add_argument_group(_TITLES[field.name])
        kind, many, _ = _kind(field.name)
        how: dict = dict(default=argparse.SUPPRESS, help=_help(field))
        if kind is bool:
            how |= dict(action=argparse.BooleanOptionalAction)
        else:
            how |= dict(type=kind, metavar={int: "N", float: "X", str: "NAME"}[kind])
            if field.metadata["choices"]:
                how |= dict(choices=field.metadata["choices"], metavar=None)
            if many:
                how |= dict(action="append") if many is ... else dict(nargs=many)
        group.add_argument(f"--{field.name.replace('_', '-')}", **how)


def flags(namespace: argparse.Namespace) -> dict:
    """The keys that were given as flags."""
    return {f.name: getattr(namespace, f.name) for f in fields(TrainOptions) if hasattr(namespace, f.name)}


def _help(field) -> str:
    default = field.default
    said = "" if default in (None, (), "") else f" (default: {_show(default)})"
    return (field.metadata["doc"] + said).replace("%", "%%")


def _show(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "nothing"
    return "not given" if value in (None, "") else str(value)


def _kind(name: str) -> tuple[type, object, bool]:
    """The type of a key's value or items; how many items (0: it is no list, ...: any number); may it be None?"""
    hint = _HINTS[name]
    args = get_args(hint)
    if type(None) in args:
        return args[0], 0, True
    if args:
        return args[0], ... if args[1] is ... else len(args), False
    return hint, 0, False


def _known(values: dict, where: str) -> None:
    names = [f.name for f in fields(TrainOptions)]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, 1, 0.5)
            hint = f"; did you mean {close[0]}?" if close else "; `qwenvl train --help` lists the keys"
            raise InputError(f"{where}unknown key {key}{hint}")


def _read_toml(file: Path) -> dict:
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror})") from e
    except ValueError as e:  # not TOML, or not UTF-8
        raise InputError(f"{file}: not readable as TOML ({e})") from e
    _known(values, f"{file}: ")
    for field in fields(TrainOptions):
        if field.name in values:
            values[field.name] = _checked(field, values[field.name], f"{file}: ")
    return values


def _checked(field, value, where: str = ""):
    """The value in the field's type; InputError that names the key, the value and what is allowed."""
    kind, many, optional = _kind(field.name)
    if value is None and optional:
        return None
    if not many:
        return _item(field, kind, value, where)
    if isinstance(value, str) and many is ...:  # a single file needs no brackets
        value = (value,)
    if not isinstance(value, list | tuple) or (many is not ... and len(value) != many):
        count = "a list" if many is ... else f"a list of {many}"
        raise InputError(f"{where}{field.name} is {value!r}; it must be {count}")
    return tuple(_item(field, kind, item, where) for item in value)


def _item(field, kind: type, value, where: str):
    m = field.metadata
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if fits and kind is float:
        fits = math.isfinite(value)
    if fits and m["choices"]:
        fits = value in m["choices"]
    tests = (("least", "__ge__"), ("above", "__gt__"), ("most", "__le__"), ("below", "__lt__"))
    if fits:
        fits = all(m[bound] is None or getattr(value, test)(kind(m[bound])) for bound, test in tests)
    if fits:
        return value
    what = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]
    if m["choices"]:
        what = "one of " + ", ".join(m["choices"])
    words = dict(least="at least", above="more than", most="at most", below="less than")
    limits = [f"{words[bound]} {m[bound]:g}" for bound, _ in tests if m[bound] is not None]
    raise InputError(f"{where}{field.name} is {value!r}; it must be {', '.join([what, *limits])}")
