"""Fine-tuning from TrainOptions: reads a checkpoint and records, writes a checkpoint that `load` opens."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from qwenvl_convert.peft import save_adapter

from qwenvl_jax import distributed
from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.params import checkpoint, lora
from qwenvl_jax.train.data import Dataset
from qwenvl_jax.train.loop import OnMetrics, make_run_mesh, train
from qwenvl_jax.train.optimizer import settled
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.records import PackShape
from qwenvl_jax.train.run import Run
from qwenvl_jax.types import Model

FINAL, ADAPTER = "final", "adapter"


def finetune(
    options: TrainOptions,
    evaluator: Callable[[Model, str, dict], Callable] | None = None,
    *,
    optimizer=None,
    on_metrics: OnMetrics | Sequence[OnMetrics] = (),
) -> int | None:
    """Trains and writes the result to `options.output`. Returns the number of the signal that stopped the run, or None.

    evaluator: (model, eval_data, options of Processor.encode) → params → metrics by name.
    optimizer, on_metrics: as for `train`.
    The result is the directory `final`, which `load` opens. With LoRA, it holds merged adapters, and PEFT opens the
    directory `adapter` beside it. A finished run returns at once; one that is now to be longer goes on, and its former
    result is renamed to `final-STEP`.
    Raises InputError for bad options, checkpoints and records.
    """
    for name in ("model", "data", "output"):
        if not getattr(options, name):
            raise OptionsError(f"{name} is missing; give --{name} or set it in the TOML file")
    final, adapter = (Path(options.output).expanduser() / name for name in (FINAL, ADAPTER))
    if options.distributed:
        distributed.initialize()
    options, _ = settled(options, optimizer), make_run_mesh(options)
    with Run(options) as run:  # refuses another run's directory before any weights are read
        if run.before is not None and run.before.length != options.length:
            _set_aside(run.step, final, adapter)
        else:
            for done in (final, adapter):
                if done.is_dir() and run.step < (options.steps or 1):
                    steps = f"after {run.step} steps"
                    raise InputError(f"{done} exists, {steps}; move it away to train for {options.length}")
            if final.is_dir():
                _say(f"already finished: {final}")
                return None
    source = checkpoint.find(options.model)
    model = _load(options, source)
    with contextlib.closing(_dataset(options, model)) as data:
        evaluate = None
        if options.eval_data:
            if evaluator is None:
                raise OptionsError("eval_data needs an evaluator")
            evaluate = evaluator(model, options.eval_data, options.encoding)
        more = dict(optimizer=optimizer, on_metrics=on_metrics)
        result = train(model, data, options, evaluate=evaluate, donate=True, **more)
    if result.signal is not None:
        _say(f"stopped after step {result.step}; the same command resumes the run")
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
    stored = checkpoint.read_config(source)  # the result has the dtype of the checkpoint
    params = jax.tree.map(lambda w: w.astype(stored.dtype), params)
    checkpoint.save(model._replace(config=stored, params=params), final, files_from=source)
    _say(f"model of step {result.step}: {final}")
    return None


def _set_aside(step: int, *results: Path) -> None:
    """Renames the results of a run that ended after `step` steps and goes on now."""
    if jax.process_index() > 0:
        return
    for result in reversed(results):  # `final` last: without it, the next call would not look for the others
        if result.is_dir():
            former = result.with_name(f"{result.name}-{step}")
            if former.exists():
                raise InputError(f"{former} exists; move it away, since {result} is to get this name")
            result.rename(former)
            _say(f"the result after {step} steps is now {former}")


def _load(options: TrainOptions, source: Path) -> Model:
    """The model to train, on the mesh and in the dtypes of the options."""
    mesh = make_run_mesh(options)
    dtype = options.dtype or checkpoint.precision_of(checkpoint.read_config(source), mesh).compute
    if dtype == "float16":
        raise OptionsError("the checkpoint is float16, where gradients vanish; set dtype to bfloat16 or float32")
    # bfloat16 weights round small updates away. Adapters are always float32.
    param_dtype = options.param_dtype or (None if options.lora_rank else "float32")
    model = checkpoint.load(source, mesh=mesh, dtype=param_dtype)
    return model._replace(config=model.config.replace(dtype=dtype))


def _dataset(options: TrainOptions, model: Model) -> Dataset:
    return Dataset(
        options.data,
        model.processor,
        PackShape(options.rows, options.tokens, options.lanes, options.patches, options.segments),
        seed=options.seed,
        epochs=options.epochs,
        on_error=options.on_bad_record,
        preferences=options.task == "dpo",
        options=options.encoding,
        threads=options.threads,
        workers=options.workers,
    )


def _say(sentence: str) -> None:
    if jax.process_index() == 0:
        print(sentence, flush=True)
