"""The training loop: steps, metrics, evaluations and checkpoints. A resumed run continues exactly.

The device does not wait for the host: a step is dispatched, then the next batch is read and sent, then the metrics of
the step before are fetched. `jax.transfer_guard` forbids implicit transfers.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.params import lora
from qwenvl_jax.params.specs import flatten, param_shardings, specs_of, unflatten
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.train.flops import peak_flops, train_flops
from qwenvl_jax.train.losses import dpo_loss, segment_logprobs, sft_loss
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.run import CHECKPOINTS, Run
from qwenvl_jax.train.step import TrainState, batch_shardings, init_state, make_optimizer, make_schedule, make_step
from qwenvl_jax.types import Model, PreferenceBatch, TrainBatch


class Result(NamedTuple):
    """What `train` returns: the parameters of the last step, or of the best checkpoint if `best` names a metric."""

    params: dict
    step: int  # the step of these parameters
    signal: int | None = None  # SIGTERM or SIGINT if it stopped the run early; the same call resumes


def train(
    model: Model, data, options: TrainOptions, *, evaluate: Callable | None = None, loss=sft_loss, donate=False
) -> Result:
    """Trains a model, or resumes the run in `options.output` if it has the same options.

    data: an iterator of TrainBatch (numpy, without the leading axis A) with `get_state()` and `set_state(state)`; JSON
        must hold the state. It must yield at least `options.steps · options.accumulate` batches, and the same complete
        batches in every process.
    evaluate: params → metrics by name, called every `options.eval_every` steps and after the last one.
    loss: replaces `sft_loss` in task "sft": (config, params, TrainBatch, remat=…) → what `sft_loss` returns.
    donate: donate `model.params`, which saves a copy.

    SIGTERM or Ctrl-C stops the run after the current step, with a checkpoint; a second Ctrl-C stops it at once. With
    several processes, SIGTERM to one stops all with a checkpoint; Ctrl-C stops them at once. A bad record stops the run
    with a checkpoint too.
    Raises OptionsError for options that contradict each other, InputError for bad records and for too many steps in a
    row that are not finite.
    """
    if options.best and evaluate is None:
        raise OptionsError(f"best is {options.best!r}, a metric of the evaluation; give eval_data")
    with Run(options) as run, _Signals() as signals:
        run.begin()
        return _Loop(model, data, options, evaluate, loss, donate, run, signals).run_to_end()


class _Loop:
    """One call of `train`."""

    def __init__(self, model, data, options, evaluate, loss, donate, run, signals):
        self.data, self.options, self.evaluate, self.run, self.signals = data, options, evaluate, run, signals
        self.config = model.config.replace(dtype=options.dtype or model.config.dtype)
        self.mesh = make_run_mesh(options)
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
        steps = dict(warmup=options.warmup, total=options.steps, cooldown=options.cooldown)
        schedule = make_schedule(options.learning_rate, options.schedule, **steps)
        optimizer = _optimizer(specs, options, schedule)
        self.step_fn = make_step(specs, loss, optimizer, self.trainable, noise=noise, seed=options.seed)
        self.learning_rates = np.asarray(jax.vmap(schedule)(jnp.arange(options.steps)), np.float64)
        with self.on_mesh():
            self.state = init_state(specs, params, optimizer, self.trainable)
        if self.mesh is None:  # the layout that a step returns; otherwise the second step recompiles
            self.state = jax.device_put(self.state, layout)
        trains = {spec.group for path, spec in specs.items() if self.trainable(path)}
        self.flops = partial(train_flops, self.config, trains=trains, weights=not options.lora_rank)
        devices = jax.devices()[: 1 if self.mesh is None else self.mesh.size]
        peak = peak_flops(devices[0].device_kind)
        self.peak = peak and peak * len(devices)

        self.step = self.skipped = self.skipped_in_row = 0
        self.pending, self.clock = [], None
        if run.step:
            self.resume()

    def resume(self) -> None:
        self.state, progress = self.restored(self.run.step)
        self.step, self.skipped = self.run.step, progress["skipped"]
        self.skipped_in_row = progress["skipped_in_row"]
        self.data.set_state(progress["data"])

    def restored(self, step: int) -> tuple[TrainState, dict]:
        """The state and the progress in a checkpoint."""
        saved, progress = self.run.restore(_saved_part(self.state, self.trainable), step)
        params = unflatten(flatten(self.state.params) | flatten(saved["params"]))
        moments = [leaf for _, leaf in sorted(saved["opt_state"].items())]
        opt_state = jax.tree.unflatten(jax.tree.structure(self.state.opt_state), moments)
        return TrainState(saved["step"], params, opt_state), progress

    def on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def run_to_end(self) -> Result:
        o, data_error, final_metrics = self.options, None, None
        self.bar = tqdm(desc="training", total=o.steps, initial=self.step, unit="step", disable=None)
        with self.bar:
            if self.evaluate and self.step == o.steps and self.run.evaluation(self.step) is None:
                final_metrics = self.run_evaluation(self.evaluate)  # the final evaluation failed or was interrupted
                self.run.amend(self.step, {f"eval/{name}": value for name, value in final_metrics.items()})
            batch = self.load() if self.step < o.steps else None
            while self.step < o.steps:
                position = self.data.get_state()  # for the checkpoint of this step: the next batch is read ahead
                self.dispatch(*batch)
                if self.step < o.steps:
                    try:
                        batch = self.load()
                    except InputError as e:  # raised below, after a checkpoint of the steps before it
                        data_error = e
                self.fetch_metrics(leave=1)
                last = self.step == o.steps or data_error is not None
                evaluating = self.evaluate and (self.step % o.eval_every == 0 or self.step == o.steps)
                stopping = self.signals.reached(self.step)
                if evaluating or last or stopping or self.step % o.save_every == 0:
                    # A stop request skips the evaluation, except the final one: it decides what is returned.
                    due = evaluating and (not stopping or self.step == o.steps)
                    self.checkpoint(position, self.evaluate if due else None)
                if data_error is not None:
                    self.run.wait()
                    raise data_error
                if stopping:
                    break
        self.run.wait()
        if self.step == o.steps and o.best and self.run.best_step not in (None, self.step):
            best = self.run.best_step
            if final_metrics is not None and self.run.better(final_metrics, best):
                return Result(self.state.params, self.step)
            return Result(self.restored(best)[0].params, best)
        return Result(self.state.params, self.step, self.signals.caught if self.step < o.steps else None)

    def load(self) -> tuple[TrainBatch, dict]:
        """The next batch on the device, with its leading axis A, and its FLOPs, tokens and epoch."""
        try:
            micros = [next(self.data) for _ in range(self.options.accumulate)]
        except StopIteration:
            done = f"{self.step} steps of {self.options.steps}"
            raise InputError(f"the data ended after {done}; give more epochs or fewer steps") from None
        batch = jax.tree.map(lambda *parts: np.stack(parts), *micros)
        inputs = batch.inputs
        lanes = sum(v.frames.shape[1] for v in inputs.vision)
        patches = max((v.frames.shape[2] for v in inputs.vision), default=0)
        flops = len(inputs.tokens) * self.flops(*inputs.tokens.shape[1:], lanes, patches)
        facts = {"flops": flops, "tokens": int(np.count_nonzero(inputs.segments))}
        if hasattr(self.data, "epoch"):
            facts["epoch"] = self.data.epoch
        return _place(batch, self.mesh), facts

    def dispatch(self, batch: TrainBatch, facts: dict) -> None:
        """Starts a step, without waiting for the device."""
        with jax.transfer_guard("disallow"), self.on_mesh():
            if self.reference is not None:
                batch = PreferenceBatch(*batch, self.reference(self.state.params, batch))
            self.state, metrics = self.step_fn(self.state, batch)
        self.step += 1
        self.pending.append((self.step, metrics, facts))

    def fetch_metrics(self, leave: int, extra: dict | None = None) -> None:
        """Fetches and logs the metrics of all steps except the last `leave`; `extra` is logged with the last step."""
        while len(self.pending) > leave:
            step, metrics, facts = self.pending.pop(0)
            with jax.transfer_guard("disallow"):
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            line = self.check_finite(step, values) | self.rates(**facts)
            self.bar.update()
            self.bar.set_postfix_str(_postfix(line))
            more = extra if extra and not self.pending else {}
            if step % self.options.log_every == 0 or more or step == self.options.steps:
                self.run.log(step, line | more)

    def check_finite(self, step: int, values: dict) -> dict:
        """The metrics to log. Raises InputError after too many steps in a row that are not finite."""
        finite = bool(values["finite"])
        rate = float(self.learning_rates[step - 1 - self.skipped])
        self.skipped += not finite
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1
        if self.skipped_in_row >= self.options.max_bad_steps:
            where = self.run.path / CHECKPOINTS / str(self.run.step) if self.run.step else "none yet"
            raise InputError(
                f"step {step}: loss or gradient is not finite, as in the {self.skipped_in_row - 1} steps before; none "
                f"of them changed the weights (last checkpoint: {where}). Try a smaller learning_rate or dtype float32"
            )
        numbers = {name: value for name, value in values.items() if name != "finite"}
        return numbers | {"learning_rate": rate, "skipped_steps": self.skipped}

    def rates(self, flops: int, tokens: int, **facts) -> dict:
        facts["tokens"] = tokens
        before, self.clock = self.clock, time.perf_counter()
        if before is None:  # no time is known: the first step compiles, and a checkpoint interrupts
            return facts
        seconds = self.clock - before
        speed = flops / seconds
        utilisation = {"mfu": speed / self.peak} if self.peak else {"flops_per_second": speed}
        return facts | {"tokens_per_second": tokens / seconds} | utilisation

    def run_evaluation(self, evaluate) -> dict[str, float]:
        """The metrics of the current parameters."""
        metrics = evaluate(self.state.params)
        metrics = {name.removeprefix("eval/"): float(value) for name, value in metrics.items()}
        if self.options.best and self.options.best not in metrics:
            raise OptionsError(f"best is {self.options.best!r}; the evaluation returns {', '.join(metrics)}")
        self.bar.write(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        return metrics

    def checkpoint(self, position, evaluate) -> None:
        """Logs all steps, evaluates unless `evaluate` is None, and starts to save."""
        metrics = None
        if evaluate is None:
            self.fetch_metrics(leave=0)
        else:
            self.fetch_metrics(leave=1)
            jax.block_until_ready(self.state)
            try:
                metrics = self.run_evaluation(evaluate)
            except Exception:  # saves the steps before the failed evaluation
                self.checkpoint(position, None)
                self.run.wait()
                raise
            self.fetch_metrics(leave=0, extra={f"eval/{name}": value for name, value in metrics.items()})
        if self.step > self.run.step:
            progress = {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row, "data": position}
            self.run.save(self.step, _saved_part(self.state, self.trainable), progress, metrics)
        self.clock = None


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


def _optimizer(specs: dict, options: TrainOptions, schedule):
    rates = {"vision": options.vision_learning_rate, "merger": options.merger_learning_rate}
    scales = {name: rate / options.learning_rate for name, rate in rates.items() if rate is not None}
    (b1, b2), clip = options.betas, options.clip or None
    rule = dict(weight_decay=options.weight_decay, clip=clip, b1=b1, b2=b2, mu_dtype=options.moment_dtype)
    return make_optimizer(specs, schedule, options.optimizer, scales=scales, **rule)


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
    moments = {f"{i:05}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    return {"step": state.step, "params": unflatten(trained), "opt_state": moments}


def _postfix(line: dict) -> str:
    words = [f"loss {line['loss']:.4f}"]
    if "tokens_per_second" in line:
        words.append(f"{line['tokens_per_second']:.0f} tokens/s")
    if "mfu" in line:
        words.append(f"MFU {line['mfu']:.1%}")
    elif "flops_per_second" in line:
        words.append(f"{line['flops_per_second'] / 1e9:.1f} GFLOP/s")
    return ", ".join(words)


class _Signals:
    """Records SIGTERM and Ctrl-C, so that the loop stops after its step. A second signal acts as usual."""

    def __enter__(self):
        self.caught, self._old = None, {}
        if threading.current_thread() is threading.main_thread():
            # With several processes, JAX catches SIGTERM and agrees on a step to stop at; Ctrl-C acts as usual.
            signals = () if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
            self._old = {s: signal.signal(s, self._catch) for s in signals}
        return self

    def _catch(self, number, _):
        self.caught = number
        self.__exit__()

    def __exit__(self, *exception):
        while self._old:
            signal.signal(*self._old.popitem())

    def reached(self, step: int) -> bool:
        """Whether to stop. All processes get the same answer."""
        if jax.process_count() == 1:
            return self.caught is not None
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.caught = signal.SIGTERM
        return self.caught is not None
