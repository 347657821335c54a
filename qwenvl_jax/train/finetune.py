"""Fine-tuning from TrainOptions: reads a checkpoint and records, writes a checkpoint that `load` opens."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from qwenvl_convert.orbax import save_hf
from qwenvl_convert.peft import AdapterFile, load_adapter, save_adapter

from qwenvl_jax import distributed
from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.inputs.source import Records, open_records
from qwenvl_jax.params import checkpoint, directory, lora
from qwenvl_jax.params.locate import Located, locate
from qwenvl_jax.train.data import Dataset
from qwenvl_jax.train.loop import OnMetrics, make_run_mesh, train
from qwenvl_jax.train.mirror import Mirror, check_shared, open_mirror
from qwenvl_jax.train.optimizer import with_optimizer
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.records import PackShape
from qwenvl_jax.train.run import Run
from qwenvl_jax.types import Model

FINAL, ADAPTER = "final", "adapter"


def finetune(
    options: TrainOptions,
    evaluator: Callable[[Model, Records, dict], Callable] | None = None,
    *,
    optimizer=None,
    on_metrics: OnMetrics | Sequence[OnMetrics] = (),
) -> int | None:
    """Trains and writes the result to `options.output`. Returns the number of the signal that stopped the run, or None.

    evaluator: (model, eval_data, options of Processor.encode) → params → metrics by name.
    optimizer, on_metrics: as for `train`.
    The result is the directory `final`, which `load` opens, and transformers too if `result_format` is "hf". With LoRA,
    it holds merged adapters, and PEFT opens the directory `adapter` beside it. A finished run returns at once; one that
    is now to be longer goes on, and its former result is renamed to `final-STEP`. Over a quantised checkpoint, only
    adapters are trained, and the result is `adapter` alone.
    Raises InputError for bad options, checkpoints and records.
    """
    for name in ("model", "data", "output"):
        if not getattr(options, name):
            raise OptionsError(f"{name} is missing; give --{name} or set it in the TOML file")
    if options.distributed:
        check_shared(options.output)
        distributed.initialize()
    options, _ = with_optimizer(options, optimizer), make_run_mesh(options)
    with contextlib.closing(open_mirror(options.output)) as mirror, mirror.names():
        stopped = _finetune(options, mirror, evaluator, dict(optimizer=optimizer, on_metrics=on_metrics))
        mirror.push(progress=True)
        return stopped


def _finetune(options: TrainOptions, mirror: Mirror, evaluator, more: dict) -> int | None:
    final, adapter = (mirror.path / name for name in (FINAL, ADAPTER))
    with Run(options) as run:  # refuses another run's directory before any weights are read
        if run.before is not None and run.before.length != options.length:
            run.check_epochs()
            _set_aside(mirror, run.step, final, adapter)
        else:
            for done in (final, adapter):
                if done.is_dir() and run.step < (options.steps or 1):
                    steps = f"after {run.step} steps"
                    raise InputError(f"{mirror.name(done)} exists, {steps}; move it away to train for {options.length}")
            if final.is_dir():
                _say(f"already finished: {mirror.name(final)}")
                return None
    records, questions = _open(options)
    source = locate(options.model, weights=False)
    stored = directory.read_config(source.path)  # the result has the dtype of the checkpoint
    if stored.quantised and adapter.is_dir():
        _say(f"already finished: {mirror.name(adapter)}")
        return None
    model = _load(options, source)
    with contextlib.closing(_dataset(options, records, model)) as data:
        evaluate = None
        if questions is not None:
            if evaluator is None:
                raise OptionsError("eval_data needs an evaluator")
            evaluate = evaluator(model, questions, options.encoding)
        result = train(
            model, data, options, evaluate=evaluate, donate=True, reserve=_result_bytes(model, stored), **more
        )
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
            adapted = _with_earlier(model.config, params, source)
            how = dict(base_name=source.name, revision=source.revision, layout=options.adapter_layout)
            save_adapter(
                model.config, adapted, adapter, allow_control_tokens=model.processor.allow_control_tokens, **how
            )
            _say(f"adapter for PEFT: {mirror.name(adapter)}")
        if stored.quantised:
            _say("it is used with the quantised checkpoint; `qwenvl merge --dequantise` writes both as one model")
            return None
        params = lora.merge(params)
    params = jax.tree.map(lambda w: w.astype(stored.dtype), params)
    model = model._replace(config=stored, params=params)
    if options.result_format == "hf":
        save_hf(model, final, base=source)
    else:
        checkpoint.save(model, final, files_from=source.path)
    _say(f"model of step {result.step}: {mirror.name(final)}")
    return None


def _result_bytes(model: Model, stored: Config) -> int:
    """The size of the result, which the first process writes; several leave it to a later call."""
    if jax.process_count() > 1 or stored.quantised:  # then it is a small adapter
        return 0
    return sum(w.size for w in jax.tree.leaves(model.params)) * np.dtype(stored.dtype).itemsize


def _set_aside(mirror: Mirror, step: int, *results: Path) -> None:
    """Renames the results of a run that ended after `step` steps and goes on now."""
    if jax.process_index() > 0:
        return
    for result in reversed(results):  # `final` last: without it, the next call would not look for the others
        if result.is_dir():
            former = result.with_name(f"{result.name}-{step}")
            if former.exists():
                names = mirror.name(former), mirror.name(result)
                raise InputError(f"{names[0]} exists; move it away, since {names[1]} is to get this name")
            mirror.rename(result, former)
            _say(f"the result after {step} steps is now {mirror.name(former)}")


def _with_earlier(config: Config, params: dict, source: Located) -> dict:
    """The parameters with one adapter that holds the trained one and those that were merged before training."""
    base, adapter = lora.split(params)
    for earlier in source.adapters:
        adapter = lora.join(lora.split(load_adapter(config, base, earlier))[1], adapter)
    return lora.combine(base, adapter)


def _load(options: TrainOptions, source: Located) -> Model:
    """The model to train, on the mesh and in the dtypes of the options."""
    if options.lora_rank:
        lora.choose(directory.read_config(source.path), options.lora_targets)
    for path in source.adapters if options.lora_rank else ():
        with AdapterFile(directory.read_config(source.path), path) as adapter:
            if adapter.replaced:
                raise InputError(
                    f"{path}: holds whole parameters ({min(adapter.replaced)}), which a new adapter cannot; write the "
                    "model with `qwenvl merge` and train from that"
                )
    mesh = make_run_mesh(options)
    dtype = options.dtype or checkpoint.precision_of(directory.read_config(source.path), mesh).compute
    if dtype == "float16":
        raise OptionsError("the checkpoint is float16, where gradients vanish; set dtype to bfloat16 or float32")
    # bfloat16 weights round small updates away. Adapters are always float32.
    param_dtype = options.param_dtype or (None if options.lora_rank else "float32")
    model = checkpoint.load_located(source, mesh=mesh, dtype=param_dtype)
    processor, generation = model.processor, dict(model.generation)
    if options.allow_control_tokens is not None:  # the result keeps this rule
        processor = dataclasses.replace(processor, allow_control_tokens=options.allow_control_tokens)
    if options.skip_special_tokens is not None:
        generation["skip_special_tokens"] = options.skip_special_tokens
    config = model.config.replace(dtype=dtype)
    return model._replace(config=config, processor=processor, generation=generation)


def _open(options: TrainOptions) -> tuple[Records, Records | None]:
    """The records to train on and to evaluate on, opened before the model is."""
    questions = open_records(options.eval_data, options.columns) if options.eval_data else None
    records = open_records(options.data, options.columns, options.streaming)
    if records.streamed:
        options.check_stream()
    return records, questions


def _dataset(options: TrainOptions, records: Records, model: Model) -> Dataset:
    return Dataset(
        records,
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
