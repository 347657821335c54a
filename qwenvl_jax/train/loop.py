"""The training loop: steps, metrics, evaluations and checkpoints. A resumed run continues exactly.

The device does not wait for the host: a step is dispatched, then the next batch is read and sent, then the metrics of
the step before are fetched. `jax.transfer_guard` forbids implicit transfers.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.params import lora
from qwenvl_jax.params.specs import flatten, param_shardings, specs_of, unflatten
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.train.flops import peak_flops, train_flops
from qwenvl_jax.train.losses import dpo_loss, segment_logprobs, sft_loss
from qwenvl_jax.train.optimizer import from_arrays, from_options, identity, refuse_another, to_arrays, with_optimizer
from qwenvl_jax.train.options import CUSTOM, TrainOptions
from qwenvl_jax.train.progress import Progress
from qwenvl_jax.train.run import CHECKPOINTS, Run
from qwenvl_jax.train.signals import Signals
from qwenvl_jax.train.step import (
    TrainState,
    batch_shardings,
    init_state,
    learning_rate_at,
    make_schedule,
    make_step,
    split,
)
from qwenvl_jax.types import Model, PreferenceBatch, TrainBatch


class Result(NamedTuple):
    """What `train` returns: the parameters of the last step, or of the best checkpoint if `best` names a metric."""

    params: dict
    step: int  # the step of these parameters
    signal: int | None = None  # SIGTERM or SIGINT if it stopped the run early; the same call resumes


OnMetrics = Callable[[int, dict[str, float]], object]


def train(
    model: Model,
    data,
    options: TrainOptions,
    *,
    evaluate: Callable | None = None,
    loss=sft_loss,
    optimizer=None,
    on_metrics: OnMetrics | Sequence[OnMetrics] = (),
    donate=False,
    reserve=0,
) -> Result:
    """Trains a model, or resumes the run in `options.output` if it has the same options.

    data: an iterator of TrainBatch (numpy, without the leading axis A) with `get_state()` and `set_state(state)`; JSON
        must hold the state. It must yield at least `options.steps · options.accumulate` batches, and the same complete
        batches in every process. With `options.epochs` it must be a Dataset of that many epochs; the run ends with it.
    evaluate: params → metrics by name, called every `options.eval_every` steps and after the last one.
    loss: replaces `sft_loss` in task "sft": (config, params, TrainBatch, remat=…) → what `sft_loss` returns.
    optimizer: an `optax.GradientTransformation` in place of the one that the options describe, its clipping and its
        schedule included. It gets the trainable leaves alone (after `freeze`, or the adapters of LoRA) as a flat dict
        from path to float32 array. Gradients are averaged over `options.accumulate` batches before it. A step that is
        not finite reaches neither the weights nor its state.
    on_metrics: called with (step, metrics) after every step, in the first process: one function, or several. Their
        errors end the run. A resumed run calls again for the steps after its checkpoint.
    donate: donate `model.params`, which saves a copy. reserve: bytes that the caller writes there after the run.

    SIGTERM or Ctrl-C stops the run after the current step, with a checkpoint; a second Ctrl-C stops it at once. With
    several processes, SIGTERM to one stops all with a checkpoint; Ctrl-C stops them at once. A bad record stops the run
    with a checkpoint too.
    Raises OptionsError for options that contradict each other or the run in the directory, InputError for bad records
    for too many steps in a row that are not finite, and if the disk does not hold what the run writes.
    """
    if options.best and evaluate is None:
        raise OptionsError(f"best is {options.best!r}, a metric of the evaluation; give eval_data")
    _check_best(options.best, getattr(evaluate, "names", None))  # before hours of training
    options, mesh = with_optimizer(options, optimizer), make_run_mesh(options)
    if options.epochs is not None and getattr(data, "epochs", None) != options.epochs:
        raise OptionsError(f"epochs is {options.epochs}; data must end after as many, as Dataset(…, epochs=…) does")
    if math.isnan(getattr(data, "epoch", 0.0)):
        options.check_stream()
    with Run(options, reserve) as run, run.names(), Signals() as signals:
        loop = _Loop(model, data, options, loss, optimizer, donate, mesh, run)
        loop.evaluate, loop.signals = evaluate, signals
        loop.on_metrics = (on_metrics,) if callable(on_metrics) else tuple(on_metrics)
        return loop.run_to_end()


def _check_best(best: str | None, names) -> None:
    if best and names is not None and best not in names:
        raise OptionsError(f"best is {best!r}; the evaluation returns {', '.join(names)}")


class _Loop:
    """One call of `train`."""

    evaluate: Callable | None
    signals: Signals
    on_metrics: tuple[OnMetrics, ...]

    def __init__(self, model, data, options, loss, optimizer, donate, mesh, run):
        self.data, self.options, self.mesh, self.run = data, options, mesh, run
        self.config = model.config.replace(dtype=options.dtype or model.config.dtype)
        params = model.params if donate else jax.tree.map(jnp.copy, model.params)
        # The same layout as a restored checkpoint, so that a resumed run compiles the same program.
        layout = _layout(specs_of(self.config, params), self.mesh)
        params = jax.device_put(params, layout)
        noise = None
        if options.lora_rank:
            how = dict(rank=options.lora_rank, alpha=options.lora_alpha, targets=options.lora_targets)
            params = lora.add(self.config, params, jax.random.key(options.seed), **how)
            if options.lora_dropout:
                noise = partial(lora.dropout, rate=options.lora_dropout)
        chosen = lora.is_trainable if options.lora_rank else lambda path: True
        specs = specs_of(self.config, params)
        self.trainable = lambda path: chosen(path) and specs[path].group not in options.freeze

        self.reference = None
        if options.task == "dpo":
            # With LoRA, the base weights are the reference model.
            base = None
            if not options.lora_rank:
                base = jax.tree.map(jnp.copy, params) if donate else jax.device_put(model.params, layout)
            self.reference = _reference(self.config, options, base)
            loss = partial(dpo_loss, self.config, beta=options.beta, remat=options.remat)
        else:
            loss = partial(loss, self.config, remat=options.remat)
        self.identity = identity(optimizer, split(params, self.trainable)[0]) if optimizer else None
        self.learning_rates: np.ndarray | None = None  # of each update, where the options decide them in advance
        if optimizer is None:
            optimizer = from_options(specs, options, self.make_schedule())
        self.step_fn = make_step(specs, loss, optimizer, self.trainable, noise=noise, seed=options.seed)
        with self.on_mesh():
            self.state = init_state(specs, params, optimizer, self.trainable)
        if self.mesh is None:  # the layout that a step returns; otherwise the second step recompiles
            self.state = jax.device_put(self.state, layout)
        trains = {spec.group for path, spec in specs.items() if self.trainable(path)}
        self.flops = partial(train_flops, self.config, trains=trains, weights=not options.lora_rank)
        devices = jax.devices()[: 1 if self.mesh is None else self.mesh.size]
        peak = peak_flops(devices[0].device_kind)
        self.progress = Progress(options, peak and peak * len(devices))

        self.step = self.skipped = self.skipped_in_row = 0
        self.last: int | None = None  # the number of the last step, once it is known
        self.pending: list = []
        if run.step:
            self.resume()

    def make_schedule(self):
        """The learning rate by update, None if it depends on how much of the data is left."""
        o = self.options
        if o.steps is None:
            return None
        schedule = make_schedule(o.learning_rate, o.schedule, warmup=o.warmup, total=o.steps, cooldown=o.cooldown)
        self.learning_rates = np.asarray(jax.vmap(schedule)(jnp.arange(o.steps)), np.float64)
        return schedule

    def resume(self) -> None:
        progress = self.run.progress(self.run.step)
        refuse_another(progress.get("optimizer"), self.identity, self.run.path)
        self.state = self.state_at(self.run.step)
        self.run.check_epochs()
        self.step, self.skipped = self.run.step, progress["skipped"]
        self.skipped_in_row = progress["skipped_in_row"]
        self.data.set_state(progress["data"])

    def state_at(self, step: int) -> TrainState:
        """The state in a checkpoint."""
        saved = self.run.restore(_saved_part(self.state, self.trainable), step)
        params = unflatten(flatten(self.state.params) | flatten(saved["params"]))
        return TrainState(saved["step"], params, from_arrays(saved.get("opt_state", {}), self.state.opt_state))

    def on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def run_to_end(self) -> Result:
        o, data_error, final_metrics = self.options, None, None
        batch = self.load()
        if batch is None and not self.step:
            raise InputError("the data has no record that can be used")
        self.run.begin(_saved_part(self.state, self.trainable), bool(self.evaluate))
        with self.progress.started(self.step):
            if batch is None and self.evaluate and self.run.evaluation(self.step) is None:
                final_metrics = self.run_evaluation(self.evaluate)  # the final evaluation failed or was interrupted
                self.run.amend(self.step, {f"eval/{name}": value for name, value in final_metrics.items()})
            while batch is not None:
                position = self.position()  # for the checkpoint of this step: the next batch is read ahead
                self.dispatch(*batch)
                try:
                    batch = self.load()
                except InputError as e:  # raised below, after a checkpoint of the steps before it
                    data_error = e
                self.log_metrics(leave=1)
                last = batch is None
                evaluating = self.evaluate and (self.step % o.eval_every == 0 or last)
                stopping = self.signals.reached(self.step)
                if evaluating or last or stopping or data_error is not None or self.step % o.save_every == 0:
                    # A stop request skips the evaluation, except the final one: it decides what is returned.
                    due = evaluating and (not stopping or last)
                    self.checkpoint(position, self.evaluate if due else None)
                if data_error is not None:
                    self.run.wait()
                    raise data_error
                if stopping:
                    break
        self.run.wait()
        if batch is None and o.best and self.run.best_step not in (None, self.step):
            best = self.run.best_step
            if final_metrics is not None and self.run.better(final_metrics, best):
                return Result(self.state.params, self.step)
            return Result(self.state_at(best).params, best)
        return Result(self.state.params, self.step, None if batch is None else self.signals.caught)

    def position(self) -> dict:
        """How far the data is read, for a checkpoint. epoch: how often; None if that is not known."""
        epoch = getattr(self.data, "epoch", math.nan)
        return {"data": self.data.get_state(), "epoch": None if math.isnan(epoch) else epoch}

    def load(self) -> tuple[TrainBatch, Any, dict] | None:
        """The next batch on the device, with its leading axis A, its learning rate if the options do not fix it, and
        its FLOPs, tokens and epoch. None if the run ends."""
        o, micros, begins = self.options, [], getattr(self.data, "epoch", 0.0)
        if self.step == o.steps:
            self.last = self.step
            return None
        for _ in range(o.accumulate):
            try:
                micros.append(next(self.data))
            except StopIteration:
                if o.steps is not None:
                    done = f"{self.step} steps of {o.steps}"
                    raise InputError(f"the data ended after {done}; give more epochs or fewer steps") from None
                break
        if not micros:
            self.last = self.step
            return None
        micros += [_empty(micros[0])] * (o.accumulate - len(micros))
        batch = jax.tree.map(lambda *parts: np.stack(parts), *micros)
        inputs = batch.inputs
        lanes = sum(v.frames.shape[1] for v in inputs.vision)
        patches = max((v.frames.shape[2] for v in inputs.vision), default=0)
        flops = len(inputs.tokens) * self.flops(*inputs.tokens.shape[1:], lanes, patches)
        facts = {"flops": flops, "tokens": int(np.count_nonzero(inputs.segments))}
        rate = None
        if not math.isnan(epoch := getattr(self.data, "epoch", math.nan)):
            facts["epoch"] = epoch
        if o.steps is None and o.optimizer != CUSTOM:
            # The run's length in steps, estimated from the share of the records that the steps so far have read.
            total = self.step * o.epochs / begins if begins > 0 else math.inf
            how = dict(warmup=o.warmup, cooldown=o.cooldown)
            facts["learning_rate"] = learning_rate_at(o.learning_rate, o.schedule, self.step, total, **how)
            rate = _place_scalar(facts["learning_rate"], self.mesh)
        return _place(batch, self.mesh), rate, facts

    def dispatch(self, batch: TrainBatch, rate, facts: dict) -> None:
        """Starts a step, without waiting for the device."""
        with jax.transfer_guard("disallow"), self.on_mesh():
            if self.reference is not None:
                batch = PreferenceBatch(*batch, self.reference(self.state.params, batch))
            self.state, metrics = self.step_fn(self.state, batch, rate)
        self.step += 1
        self.pending.append((self.step, metrics, facts))

    def log_metrics(self, leave: int, extra: dict | None = None) -> None:
        """Fetches and logs the metrics of all steps except the last `leave`; `extra` is logged with the last step."""
        while len(self.pending) > leave:
            step, metrics, facts = self.pending.pop(0)
            with jax.transfer_guard("disallow"):
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            line = self.counted(step, values) | self.progress.rates(**facts)
            last = step == self.last
            self.progress.show(step, line, last)
            more = extra if extra and not self.pending else {}
            if step % self.options.log_every == 0 or more or last:
                self.run.log(step, line | more)
            for report in self.on_metrics if jax.process_index() == 0 else ():
                report(step, line | more)
            self.check_finite(step)

    def counted(self, step: int, values: dict) -> dict:
        """The metrics to log, after counting steps that are not finite."""
        finite = bool(values.pop("finite"))
        if self.learning_rates is not None:
            values["learning_rate"] = float(self.learning_rates[step - 1 - self.skipped])
        self.skipped += not finite
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1
        return values | {"skipped_steps": self.skipped}

    def check_finite(self, step: int) -> None:
        """Raises InputError after too many steps in a row that are not finite."""
        if self.skipped_in_row >= self.options.max_bad_steps:
            where = self.run.path / CHECKPOINTS / str(self.run.step) if self.run.step else "none yet"
            raise InputError(
                f"step {step}: loss or gradient is not finite, as in the {self.skipped_in_row - 1} steps before; none "
                f"of them changed the weights (last checkpoint: {where}). Try a smaller learning_rate or dtype float32"
            )

    def run_evaluation(self, evaluate) -> dict[str, float]:
        """The metrics of the current parameters."""
        with self.progress.paused():
            metrics = evaluate(self.state.params)
        metrics = {name.removeprefix("eval/"): float(value) for name, value in metrics.items()}
        scores = {name: value for name, value in metrics.items() if not name.endswith(("/low", "/high"))}
        _check_best(self.options.best, scores)
        self.progress.say(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        return metrics

    def checkpoint(self, position, evaluate) -> None:
        """Logs all steps, evaluates unless `evaluate` is None, and starts to save."""
        metrics = None
        if evaluate is None:
            self.log_metrics(leave=0)
        else:
            self.log_metrics(leave=1)
            jax.block_until_ready(self.state)
            try:
                metrics = self.run_evaluation(evaluate)
            except Exception:  # saves the steps before the failed evaluation
                self.checkpoint(position, None)
                self.run.wait()
                raise
            self.log_metrics(leave=0, extra={f"eval/{name}": value for name, value in metrics.items()})
        if self.step > self.run.step:
            progress = {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row, **position}
            if self.step == self.last and self.options.epochs:  # known at the end of a stream, too
                progress["epoch"] = self.options.epochs
            progress |= {"optimizer": self.identity} if self.identity else {}
            with self.progress.paused():
                self.run.save(self.step, _saved_part(self.state, self.trainable), progress, metrics)


def make_run_mesh(options: TrainOptions):
    """The mesh of the options; None for a single device. Raises OptionsError if it does not fit."""
    sizes = options.mesh_data, options.mesh_fsdp, options.mesh_tensor
    if jax.process_count() > 1 and math.prod(sizes) != jax.device_count():
        devices = f"the {jax.device_count()} devices of all processes"
        raise OptionsError(f"mesh_data · mesh_fsdp · mesh_tensor is {math.prod(sizes)}; it must be {devices}")
    if math.prod(sizes) == 1:
        return None
    share = options.mesh_data * options.mesh_fsdp
    for name in ("rows", "lanes"):
        if (size := getattr(options, name)) % share:
            raise OptionsError(f"{name} is {size}; it must be a multiple of mesh_data · mesh_fsdp, {share}")
    return make_mesh(*sizes)


def _layout(specs: dict, mesh):
    return SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else param_shardings(specs, mesh)


def _place(batch: TrainBatch, mesh) -> TrainBatch:
    """The batch on its devices. Each of several processes has the complete batch and sends its devices their part."""
    if mesh is None:
        return jax.device_put(batch)
    layout = batch_shardings(batch, mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, layout)
    return jax.tree.map(lambda a, s: jax.make_array_from_callback(a.shape, s, lambda i: a[i]), batch, layout)


def _place_scalar(value: float, mesh):
    """A float32 on all devices."""
    value = np.float32(value)
    if mesh is None:
        return jax.device_put(value)
    return jax.make_array_from_callback((), NamedSharding(mesh, PartitionSpec()), lambda _: value)


def _empty(batch: TrainBatch) -> TrainBatch:
    """A batch of this shape that holds nothing: it completes the last step of a run."""
    empty = jax.tree.map(np.zeros_like, batch)
    return empty._replace(inputs=empty.inputs._replace(visual_index=np.full_like(batch.inputs.visual_index, -1)))


def _reference(config, options: TrainOptions, base: dict | None):
    """(params, batch [A, …]) → [A, B, n]: `segment_logprobs` of the reference model."""
    logprobs = partial(segment_logprobs, config, n=options.segments, remat=options.remat)

    @jax.jit
    def reference(params, batch):
        return jax.lax.map(partial(logprobs, params), batch)

    return lambda params, batch: reference(lora.strip(params) if base is None else base, batch)


def _saved_part(state: TrainState, trainable) -> dict:
    """What a checkpoint of a run holds. The model's own checkpoint has the frozen weights."""
    trained = {path: w for path, w in flatten(state.params).items() if trainable(path)}
    return {"step": state.step, "params": unflatten(trained), "opt_state": to_arrays(state.opt_state)}
