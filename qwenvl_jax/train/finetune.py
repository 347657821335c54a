"""A whole fine-tuning from its options: a checkpoint and records in, a checkpoint that `load` opens out."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax
from qwenvl_convert.peft import save_adapter

from qwenvl_jax import distributed
from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.options import given
from qwenvl_jax.params import checkpoint, lora
from qwenvl_jax.train.data import Dataset
from qwenvl_jax.train.loop import make_run_mesh, train
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.records import PackShape
from qwenvl_jax.train.run import Run, last_step
from qwenvl_jax.types import Model

FINAL, ADAPTER = "final", "adapter"


def finetune(options: TrainOptions, evaluator: Callable[[Model, str, dict], Callable] | None = None) -> int | None:
    """Trains as `options` say and writes the result; if a signal ends the run early, returns its number.

    evaluator: (model, eval_data, options of Processor.encode) → params → metrics by name.
    The result is the directory `final` in the output, which `load` opens; with LoRA, adapters are merged into it,
    and beside it is `adapter`, which PEFT opens too. Where they are there already, nothing is left to do.
    Raises InputError for everything that the options, the checkpoint or the records have wrong.
    """
    for name in ("model", "data", "output"):
        if not getattr(options, name):
            raise OptionsError(f"{name} is not given; give --{name} or put it into the TOML file")
    final, adapter = (Path(options.output).expanduser() / name for name in (FINAL, ADAPTER))
    if options.distributed:
        distributed.initialize()
    step = last_step(options.output)
    for done in (final, adapter):
        if done.is_dir() and step < options.steps:
            raise InputError(f"{done} is there, after {step} steps; move it away to go on to {options.steps}")
    with Run(options):  # refuses another run's directory before any weights are read
        if final.is_dir():
            _say(f"finished before: {final}")
            return None
    source = checkpoint.find(options.model)
    model = _load(options, source)
    encoding = given(options, MediaOptions) | {"allow_control_tokens": options.allow_control_tokens}
    with contextlib.closing(_dataset(options, model, encoding)) as data:
        evaluate = None
        if options.eval_data:
            if evaluator is None:
                raise OptionsError("eval_data is given, but there is nothing to evaluate with")
            evaluate = evaluator(model, options.eval_data, encoding)
        result = train(model, data, options, evaluate=evaluate, donate=True)
    if result.signal is not None:
        _say(f"stopped after step {result.step}; the same command goes on from there")
        return result.signal
    if data.skipped:
        _say("records skipped: " + ", ".join(f"{reason}: {n}" for reason, n in sorted(data.skipped.items())))
    if jax.process_count() > 1:
        _say(f"trained to step {result.step}; run the same command in a single process to write {final}")
        return None
    params = result.params
    if options.lora_rank:
        if not adapter.exists():
            save_adapter(model.config, params, adapter, base_name=options.model)
            _say(f"adapter for PEFT: {adapter}")
        params = lora.merge(params)
    # Trained in whatever precision, it is stored in the one it came in.
    stored = checkpoint.read_config(source)
    params = jax.tree.map(lambda w: w.astype(stored.dtype), params)
    checkpoint.save(model._replace(config=stored, params=params), final, files_from=source)
    _say(f"model of step {result.step}: {final}")
    return None


def _load(options: TrainOptions, source: Path) -> Model:
    """The model to train, on the run's mesh, its weights and its arithmetic in the dtypes of the options."""
    mesh = make_run_mesh(options)
    dtype = options.dtype or checkpoint.precision_of(checkpoint.read_config(source), mesh).compute
    if dtype == "float16":
        raise OptionsError("the checkpoint is float16, whose gradients vanish; set dtype to bfloat16 or float32")
    # Small updates are lost in bfloat16 weights. Adapters are float32 anyway.
    param_dtype = options.param_dtype or (None if options.lora_rank else "float32")
    model = checkpoint.load(source, mesh=mesh, dtype=param_dtype)
    return model._replace(config=model.config.replace(dtype=dtype))


def _dataset(options: TrainOptions, model: Model, encoding: dict) -> Dataset:
    return Dataset(
        options.data,
        model.processor,
        PackShape(options.rows, options.tokens, options.lanes, options.patches, options.segments),
        seed=options.seed,
        on_error=options.on_bad_record,
        preferences=options.task == "dpo",
        options=encoding,
        threads=options.threads,
        workers=options.workers,
    )


def _say(sentence: str) -> None:
    if jax.process_index() == 0:
        print(sentence, flush=True)
