"""The directory of a run. It is consistent at any moment, so a killed process can be resumed.

train.toml      the options; a run is resumed with the same ones
checkpoints/    trained weights, optimizer state and progress, by step
metrics.jsonl   one line per step
tensorboard/    the same for TensorBoard, if tensorboardX is installed
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
from functools import cached_property, partial
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from qwenvl_jax import stores
from qwenvl_jax.errors import CheckpointError, InputError, OptionsError
from qwenvl_jax.params.checkpoint import is_full
from qwenvl_jax.train.mirror import CHECKPOINTS, check_shared, open_mirror
from qwenvl_jax.train.options import TrainOptions

OPTIONS, METRICS, BOARD = "train.toml", "metrics.jsonl", "tensorboard"
_DELETED = "deleted"


class Run:
    """The directory of a run, opened for training: a context manager.

    reserve: bytes that will be written there after the run.
    Raises InputError if another process has it open, or if it holds a run with other options.
    """

    def __init__(self, options: TrainOptions, reserve: int = 0):
        if not options.output:
            raise OptionsError("output is missing; it names the directory of the run")
        if jax.process_count() > 1:
            check_shared(options.output)
        self._mirror = open_mirror(options.output)
        self.path = self._mirror.path
        self._options, self._reserve, self._metrics, self._board = options, reserve, None, None
        self._writes, self._locked = jax.process_index() == 0, False
        self._made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as e:
            self._mirror.close()
            raise InputError(f"{self.path}: not usable as the directory of a run ({e.strerror})") from e
        try:
            with self.names():
                self._open(options)
        except BaseException:
            self._close()
            raise

    def _open(self, options: TrainOptions) -> None:
        if self._writes:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise InputError(f"{self.path}: another process is training there") from e
            self._locked = True
            self._delete_old()
        self.step, file = last_step(self.path), self.path / OPTIONS
        self.before: TrainOptions | None = None  # the options of its checkpoints
        if self.step:
            if not file.is_file():
                raise InputError(f"{self.path}: holds checkpoints but no {OPTIONS}; give another output")
            self.before = TrainOptions.read(file)
            if changes := "; ".join(options.differences(self.before, self.step)):
                raise OptionsError(f"{self.path}: a run with other options ({changes}); give those, or another output")
            if options.steps is not None and options.steps < self.step:
                raise OptionsError(f"{self.path}: the run has made {self.step} steps; steps is {options.steps}")

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Made on first use: it makes a directory, and threads that do not end with an error elsewhere."""
        options = self._options
        policies, best_fn = [checkpoint_managers.LatestN(options.keep)], None
        if options.best:
            best_fn = partial(_score, options)
            best = checkpoint_managers.BestN(get_metric_fn=best_fn, n=1, keep_checkpoints_without_metrics=False)
            policies.append(best)
        policy = checkpoint_managers.AnyPreservationPolicy(policies)
        how = ocp.CheckpointManagerOptions(
            preservation_policy=policy, best_fn=best_fn, todelete_subdir=_DELETED, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self.path / CHECKPOINTS, item_names=("state", "progress"), options=how)

    def begin(self, state: dict | None = None, evaluates=False) -> None:
        """Writes the options, and drops metrics after the last checkpoint.

        state: what each checkpoint will hold, as for `save`. evaluates: whether evaluations write checkpoints too.
        Raises InputError if the disk does not hold the checkpoints and `reserve`.
        """
        self._check_space(sum(leaf.nbytes for leaf in jax.tree.leaves(state)), evaluates)
        self._manager  # noqa: B018 - in every process at the same time: they wait for each other
        if self._writes:
            _replace(self.path / OPTIONS, [self._options.to_toml()])
            _replace(self.path / METRICS, _lines_up_to(self.path / METRICS, self.step))
            self._mirror.push()

    def _check_space(self, nbytes: int, evaluates: bool) -> None:
        o, stored = self._options, len(_steps(self.path))
        new: float = math.inf  # of a run by epochs, whose steps are not known
        if o.steps is not None:
            every = (o.save_every, o.eval_every if evaluates else o.save_every)
            once, other, both = ((o.steps - 1) // n - self.step // n for n in (*every, math.lcm(*every)))
            new = once + other - both + 1 if self.step < o.steps else 0
        # The next one is complete before the oldest is deleted.
        count = max(0, int(min(o.keep + bool(o.best) + 1, stored + new)) - stored)
        need, free = count * nbytes + self._reserve, shutil.disk_usage(self.path).free
        if free < need + stores.MARGIN:
            parts = [f"{count} checkpoints of {_size(nbytes)}"] if count else []
            parts += [f"the result of {_size(self._reserve)}"] if self._reserve else []
            said = f"{' and '.join(parts)} are to be written, and {_size(free)} are free"
            raise InputError(f"{self.path}: no space for the run: {said}; free some, or lower keep ({o.keep})")

    def evaluation(self, step: int) -> dict | None:
        """The metrics of a checkpoint's evaluation, None if there was none."""
        return self._manager.metrics(step)

    def amend(self, step: int, values: dict) -> None:
        """Adds values to the last line of the metrics, which is that of `step`."""
        if self._writes and (lines := _lines_up_to(self.path / METRICS, step)):
            lines[-1] = json.dumps(json.loads(lines[-1]) | values) + "\n"
            _replace(self.path / METRICS, lines)

    def better(self, metrics: dict, step: int) -> bool:
        """Whether metrics are at least as good as those of the checkpoint of `step`."""
        return _score(self._options, metrics) >= _score(self._options, self.evaluation(step) or {})

    def _delete_old(self) -> None:
        """Deletes the checkpoints that Orbax renamed. Without the renaming, a half-deleted one would look complete."""
        shutil.rmtree(self.path / CHECKPOINTS / _DELETED, ignore_errors=True)

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the best metric; of the latest one if no metric is named."""
        return self._manager.best_step()

    def save(self, step: int, state: dict, progress: dict, metrics: dict | None) -> None:
        """Starts to write a checkpoint in the background.

        state: arrays by name. progress: any JSON value. metrics: those of an evaluation, if there was one.
        """
        self.wait()
        if self._writes:
            self._delete_old()
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        self._manager.save(step, args=args, metrics=metrics, force=True)
        self._mirror.push_after(self.path / CHECKPOINTS / str(step))
        self.step = step

    def check_epochs(self) -> None:
        """Raises OptionsError if the records were read more often than the options say."""
        read, epochs = self.progress(self.step).get("epoch"), self._options.epochs
        if None not in (read, epochs) and read > epochs:
            raise OptionsError(f"{self.path}: the run has read its records {read:.3g} times; epochs is {epochs}")

    def progress(self, step: int) -> dict:
        """The progress in a checkpoint. Raises CheckpointError."""
        return self._restore(step, progress=ocp.args.JsonRestore())["progress"]

    def restore(self, like: dict, step: int) -> dict:
        """The state in a checkpoint, with the shapes and layout of `like`. Raises CheckpointError."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._restore(step, state=ocp.args.StandardRestore(abstract))["state"]

    def _restore(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as e:
            reason = " ".join(str(e).split())[:300]
            where = self.path / CHECKPOINTS / str(step)
            raise CheckpointError(f"{where}: not readable as a checkpoint of this run ({reason})") from e

    def log(self, step: int, values: dict) -> None:
        """Appends one line to the metrics and to TensorBoard. In the line, null is a value that is not finite."""
        if not self._writes:
            return
        if self._metrics is None:
            self._metrics = open(self.path / METRICS, "a", encoding="utf-8")
            self._board = _board(self.path / BOARD, self.step)
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def wait(self) -> None:
        """Waits until the checkpoint of `save` is written, and raises its errors."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            if is_full(e):
                raise InputError(f"{self.path}: the disk is full; free some space and resume the run") from e
            raise
        self._mirror.push()

    def __enter__(self):
        return self

    def names(self):
        """See `Mirror.names`."""
        return self._mirror.names()

    def __exit__(self, kind, *exception):
        try:
            if kind is not KeyboardInterrupt and "_manager" in vars(
                self
            ):  # a second Ctrl-C does not wait for its write
                self._manager.close()
                if self._writes:
                    self._delete_old()
            for file in filter(None, (self._metrics, self._board)):
                file.close()
            if kind is None:
                self._mirror.push()
        finally:
            self._close()

    def _close(self) -> None:
        """Gives the directory free. One that a failed start would leave empty is removed."""
        if self._locked:
            for empty in (self.path / CHECKPOINTS, self.path) if self._made else (self.path / CHECKPOINTS,):
                with contextlib.suppress(OSError):
                    empty.rmdir()
        os.close(self._lock)
        self._mirror.close()


def last_step(output) -> int:
    """The step of a run's latest checkpoint, 0 if there is none, without opening the run."""
    return max(_steps(Path(output).expanduser()), default=0)


def _steps(path: Path) -> list[int]:
    return [int(step.name) for step in (path / CHECKPOINTS).glob("*") if step.name.isdecimal()]


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def read_metrics(run) -> list[dict]:
    """The lines of metrics.jsonl. run: the directory of a run, or the file. Raises InputError if there is none."""
    url = stores.as_url(run)
    file = stores.local_copy(url if url.endswith(METRICS) else f"{url}/{METRICS}") if url else Path(run).expanduser()
    file = file / METRICS if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"{run}: not the directory of a run; it has no {METRICS}")
    return [json.loads(line) for line in _lines_up_to(file, math.inf)]


def _lines_up_to(file: Path, step: float) -> list[str]:
    """The complete lines up to a step. A resumed run computes later ones again."""
    lines = []
    text = file.read_text("utf-8", errors="replace") if file.exists() else ""
    for line in text.split("\n")[:-1]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
    return lines


def _replace(file: Path, lines: list[str]) -> None:
    """Writes a file atomically."""
    work = file.with_name(file.name + ".partial")
    work.write_text("".join(lines), "utf-8")
    os.replace(work, file)


def _score(options: TrainOptions, metrics: dict) -> float:
    value = metrics.get(options.best, math.nan)
    return -math.inf if math.isnan(value) else value if options.best_mode == "max" else -value


def _board(directory: Path, step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1)  # drops values after the checkpoint
