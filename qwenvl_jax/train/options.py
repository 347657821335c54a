"""Every key of a training run, defined and documented once, for a TOML file, flags and Python alike."""

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from qwenvl_jax import options
from qwenvl_jax.errors import OptionsError
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.options import as_text, build, check, check_names, checked, given, names, option

GROUPS = ("vision", "merger", "llm")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine")
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(MediaOptions):
    """Settings of one run. Wrong types and ranges raise OptionsError, here as in a file or a flag."""

    model: str = option("", "checkpoint to start from: a directory or a hub id", title="the run")
    data: str = option("", "JSONL file of records to learn from")
    eval_data: str = option("", "JSONL file of records to answer and score during training")
    output: str = option(
        "", "directory of the run: checkpoints, metrics, the result. A run that is there goes on", free=True
    )
    task: str = option("sft", "what to learn: the assistant's turns, or preferences", choices=("sft", "dpo"))
    beta: float = option(0.1, "DPO: how strongly to stay near the reference model", above=0)
    seed: int = option(0, "seed of the order of records and of dropout", least=0, most=2**31 - 1)
    rows: int = option(4, "rows in a batch; several samples share a row", least=1, title="one step")
    tokens: int = option(2048, "tokens in a row; a longer sample is a bad record", least=8)
    lanes: int = option(4, "lanes of image patches in a batch", least=1)
    patches: int = option(4096, "patches in a lane, a multiple of 64; the largest frame must fit", least=4)
    segments: int = option(64, "samples that may share a row; a preference is two", least=1)
    accumulate: int = option(1, "batches in a step; their gradients are summed before the update", least=1)
    steps: int = option(1000, "updates to make", least=1)
    optimizer: str = option(
        "adamw",
        "how gradients become updates; muon is for training from nothing",
        choices=OPTIMIZERS,
        title="the optimizer",
    )
    learning_rate: float = option(1e-5, "the optimizer's step size at its peak", above=0, most=1)
    vision_learning_rate: float | None = option(
        None, "step size of the vision tower; default: learning_rate", above=0, most=1
    )
    merger_learning_rate: float | None = option(
        None, "step size of the merger; default: learning_rate", above=0, most=1
    )
    freeze: tuple[str, ...] = option((), "parts of the model to leave as they are; repeatable", choices=GROUPS)
    schedule: str = option("cosine", "how the step size falls after warmup", choices=SCHEDULES)
    cooldown: int = option(0, "last steps, over which a constant step size falls to 0", least=0)
    warmup: int = option(0, "steps over which the step size rises from 0", least=0)
    weight_decay: float = option(0.01, "pull of matrices towards 0; norms and biases have none", least=0)
    betas: tuple[float, float] = option((0.9, 0.95), "decay of AdamW's two moments", least=0, below=1)
    clip: float = option(1.0, "largest norm of the gradient; 0 is off", least=0)
    lora_rank: int = option(0, "train adapters of this rank instead of the weights; 0 is off", least=0, title="LoRA")
    lora_alpha: float = option(16.0, "adapters are scaled by alpha / rank", above=0)
    lora_dropout: float = option(0.0, "share of an adapter's inputs set to zero in training", least=0, below=1)
    lora_targets: tuple[str, ...] = option(
        ("llm",), "linear layers to adapt: llm, vision, merger, or patterns such as q_proj; repeatable"
    )
    param_dtype: str | None = option(
        None,
        "dtype of the weights in training; default: float32, with LoRA the checkpoint's",
        choices=_DTYPES,
        title="precision and memory",
    )
    dtype: str | None = option(None, "dtype to compute in; default: the checkpoint's", choices=_DTYPES)
    moment_dtype: str | None = option(None, "dtype of AdamW's first moment; default: float32", choices=_DTYPES)
    remat: bool = option(True, "compute activations again in the backward pass instead of keeping them")
    mesh_data: int = option(1, "devices that share a batch, each with all weights", least=1, free=True)
    mesh_fsdp: int = option(1, "devices that share a batch and the weights", least=1, free=True)
    mesh_tensor: int = option(1, "devices that share the work on each token", least=1, free=True)
    distributed: bool = option(False, "this is one process of several, started on every host of a pod", free=True)
    on_bad_record: str = option(
        "stop", "what to do about a record that cannot be used", choices=("stop", "skip"), title="records"
    )
    threads: int = option(2, "threads that read records", least=0, free=True)
    workers: int = option(
        0, "processes that read records, each with that many threads; 0: this process", least=0, free=True
    )
    allow_control_tokens: bool = option(
        False, "let tokens such as <|box_start|> that a text spells out be tokens; scores are of texts without them"
    )
    save_every: int = option(500, "steps between checkpoints", least=1, free=True, title="along the way")
    keep: int = option(2, "latest checkpoints to keep, besides the best one", least=1, free=True)
    eval_every: int = option(500, "steps between evaluations; a checkpoint goes with each", least=1, free=True)
    best: str | None = option(
        None, "metric of the evaluation that says which checkpoint is best and becomes the result", free=True
    )
    best_mode: str = option("max", "whether more of that metric is better, or less", choices=("max", "min"), free=True)
    log_every: int = option(1, "steps between lines of metrics.jsonl", least=1, free=True)
    max_bad_steps: int = option(
        10, "steps in a row with a loss or gradient that is not finite before giving up", least=1
    )

    def __post_init__(self):
        check(self)
        if self.schedule != "constant" and self.warmup >= self.steps:
            raise OptionsError(f"warmup is {self.warmup}; it must be less than steps, {self.steps}")
        if self.cooldown and self.schedule != "constant":
            raise OptionsError(
                f"cooldown is of the constant schedule; schedule is {self.schedule!r}, which falls anyway"
            )
        if self.cooldown and self.warmup + self.cooldown > self.steps:
            raise OptionsError(
                f"warmup and cooldown are {self.warmup + self.cooldown} steps, more than all {self.steps}"
            )

    @classmethod
    def read(cls, file=None, flags: dict | None = None) -> "TrainOptions":
        """The options of a TOML file (None: no file), overridden by those in `flags`."""
        values = {} if file is None else _read_toml(Path(file))
        return build(cls, values | (flags or {}))

    def to_toml(self) -> str:
        """What `read` reads; None is left out."""
        # JSON's strings, numbers and lists are TOML's too.
        values = given(self, TrainOptions).items()
        return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in values)

    def replace(self, **changes) -> "TrainOptions":
        return options.replace(self, changes)

    def differences(self, before: "TrainOptions") -> list[str]:
        """What makes this another run than the one before, as "learning_rate was 1e-05 and is 2e-05"."""
        free = {f.name for f in dataclasses.fields(self) if f.metadata["free"]}
        if self.schedule == before.schedule == "constant":
            free |= {"steps", "cooldown"}  # the steps made so far were the same
        fixed = [name for name in names(self) if name not in free]
        pairs = [(name, getattr(before, name), getattr(self, name)) for name in fixed]
        return [f"{name} was {as_text(old)} and is {as_text(new)}" for name, old, new in pairs if old != new]


def _read_toml(file: Path) -> dict:
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except OSError as e:
        raise OptionsError(f"{file}: cannot be read ({e.strerror})") from e
    except ValueError as e:  # not TOML, or not UTF-8
        raise OptionsError(f"{file}: not readable as TOML ({e})") from e
    check_names(values, names(TrainOptions), f"{file}: ")
    return {name: checked(TrainOptions, name, value, f"{file}: ") for name, value in values.items()}
