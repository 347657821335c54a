"""The options of a training run, for TOML files, flags and Python."""

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from qwenvl_jax import options
from qwenvl_jax.config import GROUPS, decode_text
from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.inputs.options import MediaOptions, PromptOptions, RecordOptions
from qwenvl_jax.options import as_text, build, check, check_names, checked, given, names, option

OPTIMIZERS = ("adamw", "muon")
CUSTOM = "custom"  # an optimizer of the caller's own
# The options that describe an optimizer; they have no effect with one of the caller's own.
RULE = ("optimizer", "learning_rate", "vision_learning_rate", "merger_learning_rate", "schedule", "cooldown", "warmup",
        "weight_decay", "betas", "clip", "moment_dtype")  # fmt: skip
SCHEDULES = ("constant", "linear", "cosine")
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(MediaOptions, PromptOptions, RecordOptions):
    """Options of one run. Raises OptionsError for a wrong type, a value out of range and options that contradict."""

    model: str = option("", "checkpoint or adapter to start from: a directory or a hub id", title="the run")
    data: tuple[str, ...] = option(
        (), "training records: a JSONL, JSON or Parquet file, a pattern, or a dataset of the hub; repeatable"
    )
    eval_data: tuple[str, ...] = option((), 'records to answer and score during training; repeatable, "" for none')
    streaming: bool = option(False, "read a dataset of the hub as it comes, without downloading it first")
    output: str = option("", "directory of the run and its result; a run in it is resumed", free=True)
    task: str = option("sft", "train on the assistant's messages, or on preferences", choices=("sft", "dpo"))
    beta: float = option(0.1, "DPO: strength of the pull to the reference model", above=0)
    seed: int = option(0, "seed of the order of records and of dropout", least=0, most=2**31 - 1)
    rows: int = option(4, "rows in a batch; samples share rows", least=1, title="one step")
    tokens: int = option(2048, "tokens in a row; a longer sample is a bad record", least=8)
    lanes: int = option(4, "lanes of image patches in a batch", least=1)
    patches: int = option(4096, "patches in a lane, a multiple of 64; the largest frame must fit", least=4)
    segments: int = option(64, "most samples in a row; a preference counts as two", least=1)
    accumulate: int = option(1, "batches in a step; their gradients are summed before the update", least=1)
    steps: int | None = option(None, "updates to make; default: 1000, without epochs", least=1, most=2**31 - 1)
    epochs: int | None = option(None, "times to read every record, in place of steps", least=1, most=2**31 - 1)
    optimizer: str = option(
        "adamw",
        "the optimizer; muon is for training from scratch, custom is one made in Python",
        choices=(*OPTIMIZERS, CUSTOM),
        title="the optimizer",
    )
    learning_rate: float = option(1e-5, "peak learning rate", above=0, most=1)
    vision_learning_rate: float | None = option(None, "for the vision tower; default: learning_rate", above=0, most=1)
    merger_learning_rate: float | None = option(None, "for the merger; default: learning_rate", above=0, most=1)
    freeze: tuple[str, ...] = option((), "parts of the model not to train; repeatable", choices=GROUPS)
    schedule: str = option("cosine", "how the learning rate falls after warmup", choices=SCHEDULES)
    cooldown: int = option(0, "last steps, over which a constant learning rate falls to 0", least=0)
    warmup: int = option(0, "steps over which the learning rate rises from 0", least=0)
    weight_decay: float = option(0.01, "weight decay of matrices; norms and biases have none", least=0)
    betas: tuple[float, float] = option((0.9, 0.95), "decay of AdamW's two moments", least=0, below=1)
    clip: float = option(1.0, "largest norm of the gradient; 0 is off", least=0)
    lora_rank: int = option(
        0, "train adapters of this rank instead of the weights; 0 is off", least=0, most=2**31 - 1, title="LoRA"
    )
    lora_alpha: float = option(16.0, "adapters are scaled by alpha / rank", above=0)
    lora_dropout: float = option(0.0, "fraction of an adapter's inputs set to 0 in training", least=0, below=1)
    lora_targets: tuple[str, ...] = option(
        ("llm",), "linear layers to adapt: llm, vision, merger, or patterns such as q_proj; repeatable"
    )
    param_dtype: str | None = option(
        None,
        "dtype of the weights; default: float32, LoRA: the checkpoint's",
        choices=_DTYPES,
        title="precision and memory",
    )
    dtype: str | None = option(None, "dtype to compute in; default: the checkpoint's", choices=_DTYPES)
    moment_dtype: str | None = option(None, "dtype of AdamW's first moment; default: float32", choices=_DTYPES)
    remat: bool = option(True, "recompute activations in the backward pass instead of storing them")
    mesh_data: int = option(1, "devices that split a batch, each with all weights", least=1, free=True)
    mesh_fsdp: int = option(1, "devices that split a batch and the weights", least=1, free=True)
    mesh_tensor: int = option(1, "devices that split the work on each token", least=1, free=True)
    distributed: bool = option(False, "this is one of several processes, one per host", free=True)
    threads: int = option(2, "threads that read records", least=0, free=True, title="reading")
    workers: int = option(0, "processes that read records, each with `threads` threads", least=0, free=True)
    save_every: int = option(500, "steps between checkpoints", least=1, free=True, title="output")
    keep: int = option(2, "latest checkpoints to keep, besides the best one", least=1, free=True)
    eval_every: int = option(500, "steps between evaluations; each writes a checkpoint", least=1, free=True)
    skip_special_tokens: bool | None = option(
        None, "score answers without control tokens; default: unless they are allowed", free=True
    )
    best: str | None = option(None, "evaluation metric that selects the checkpoint to return", free=True)
    best_mode: str = option("max", "whether a larger or smaller metric is better", choices=("max", "min"), free=True)
    result_format: str = option(
        "orbax", "format of the result, final: Orbax's or Hugging Face's", choices=("orbax", "hf"), free=True
    )
    adapter_layout: str = option(
        "nested",
        "names in the adapter for PEFT: of transformers 4.52 and newer (nested) or older (hub)",
        choices=("nested", "hub"),
        free=True,
    )
    log_every: int = option(1, "steps between lines of metrics.jsonl", least=1, free=True)
    max_bad_steps: int = option(10, "stop after this many steps in a row that are not finite", least=1)

    def __post_init__(self):
        check(self)
        for name in names(self):
            if getattr(self, name) == ("",):  # --eval-data "" switches a key of the file off
                object.__setattr__(self, name, ())
        if self.steps is not None and self.epochs is not None:
            raise OptionsError(f"steps is {self.steps} and epochs is {self.epochs}; give one of them")
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", 1000)
        if self.schedule != "constant" and self.warmup >= (self.steps or math.inf):
            raise OptionsError(f"warmup is {self.warmup}; it must be less than steps, {self.steps}")
        if self.cooldown and self.schedule != "constant":
            raise OptionsError(f"cooldown needs the constant schedule; schedule is {self.schedule!r}")
        if self.cooldown and self.warmup + self.cooldown > (self.steps or math.inf):
            total = self.warmup + self.cooldown
            raise OptionsError(f"warmup and cooldown are {total} steps together; steps is {self.steps}")

    @classmethod
    def read(cls, file=None, flags: dict | None = None) -> "TrainOptions":
        """The options of a TOML file, if given, overridden by those in `flags`."""
        values = {} if file is None else _read_toml(Path(file))
        return build(cls, values | _one_length(flags or {}))

    def to_toml(self) -> str:
        """The text of a TOML file of all options that are not None."""
        values = given(self, TrainOptions).items()  # JSON's strings, numbers and lists are valid TOML
        return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in values)

    def replace(self, **changes) -> "TrainOptions":
        return options.replace(self, _one_length(changes))

    @property
    def encoding(self) -> dict:
        """How records are read: the options of a Dataset and of an Evaluator."""
        return given(self, TrainOptions, only=(*names(MediaOptions), *names(PromptOptions), "boxes"))

    def check_stream(self) -> None:
        """Raises OptionsError if the run is by epochs and needs to know how long the data is."""
        if self.epochs is not None and self.optimizer != CUSTOM and (self.schedule != "constant" or self.cooldown):
            raise OptionsError(
                f"epochs is {self.epochs}, but a stream does not say how long it is, so the learning rate cannot fall "
                "towards its end; give steps, or the constant schedule without a cooldown"
            )

    @property
    def length(self) -> str:
        """How long the run is, as messages say it."""
        return f"{self.epochs} epochs" if self.steps is None else f"{self.steps} steps"

    def differences(self, before: "TrainOptions", step: int = 0) -> list[str]:
        """The changes that make this another run, such as "learning_rate was 1e-05 and is 2e-05".

        step: how many steps were made. Those that follow may be more or fewer, if that does not change the learning
        rates of these: with the constant schedule before its cooldown, and with an optimizer of the caller's own.
        """
        free, end = {f.name for f in dataclasses.fields(self) if f.metadata["free"]}, ""
        if self.optimizer == before.optimizer == CUSTOM or self.schedule == before.schedule == "constant":
            free |= {"steps", "epochs", "cooldown"}
            if step > min(self._cooldown_start, before._cooldown_start):
                free -= {"steps", "epochs", "cooldown"}
                end = f", but step {step} is past the start of a cooldown"
        else:
            end = f", but a {before.schedule} schedule has its end; only constant can be extended"
        fixed = [name for name in names(self) if name not in free]
        pairs = [(name, getattr(before, name), getattr(self, name)) for name in fixed]
        changed = [(name, f"{name} was {as_text(old)} and is {as_text(new)}") for name, old, new in pairs if old != new]
        return [text + end if name in ("steps", "epochs", "cooldown") else text for name, text in changed]

    @property
    def _cooldown_start(self) -> float:
        """The last step before the cooldown. With epochs it is not known in advance."""
        if not self.cooldown:
            return math.inf
        return 0 if self.steps is None else self.steps - self.cooldown


def _one_length(changes: dict) -> dict:
    """The changes, where steps replaces epochs and the reverse."""
    given = [name for name in ("steps", "epochs") if changes.get(name) is not None]
    return {name: None for name in ("steps", "epochs") if given} | changes


def _read_toml(file: Path) -> dict:
    try:
        values = tomllib.loads(decode_text(file.read_bytes()))
    except OSError as e:
        raise OptionsError(f"{file}: cannot be read ({e.strerror})") from e
    except InputError as e:
        raise OptionsError(f"{file}: {e}") from e
    except ValueError as e:
        raise OptionsError(f"{file}: not readable as TOML ({e})") from e
    check_names(values, names(TrainOptions), f"{file}: ")
    return {name: checked(TrainOptions, name, value, f"{file}: ") for name, value in values.items()}
