"""What a run shows: a bar in a terminal, otherwise a line now and then. It also measures the speed of steps."""

import contextlib
import math
import sys
import time

import jax
from tqdm import tqdm

from qwenvl_jax.train.options import TrainOptions

PERIOD = 10  # seconds between two lines, at least


class Progress:
    """The display of one run. Speed counts the time of steps: no compilation, evaluation or wait for a checkpoint.

    peak: FLOP/s of all devices, None if unknown.
    """

    def __init__(self, options: TrainOptions, peak: float | None):
        self.options, self.peak = options, peak
        self._clock: float | None = None  # when the step before ended
        self._shown = -math.inf  # when the last line was printed
        self._first = jax.process_index() == 0
        self._lines = self._first and not sys.stderr.isatty()

    @contextlib.contextmanager
    def started(self, step: int):
        """Shows the steps that follow."""
        hidden = self._lines or not self._first
        self._bar = tqdm(desc="training", total=self.options.steps, initial=step, unit="step", disable=hidden)
        with self._bar:
            yield

    def rates(self, flops: int, tokens: int, **facts) -> dict:
        """The facts of a step that has ended, with its speed."""
        facts["tokens"] = tokens
        before, self._clock = self._clock, time.perf_counter()
        if before is None:  # the first step compiles
            return facts
        seconds = self._clock - before
        speed = flops / seconds
        utilisation = {"mfu": speed / self.peak} if self.peak else {"flops_per_second": speed}
        return facts | {"tokens_per_second": tokens / seconds} | utilisation

    @contextlib.contextmanager
    def paused(self):
        """The time within does not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._clock is not None:
                self._clock += time.perf_counter() - start

    def show(self, step: int, line: dict, last: bool) -> None:
        """Shows the metrics of a step."""
        if not self._lines:
            self._bar.update()
            self._bar.set_postfix_str(self._text(line))
            return
        now = time.perf_counter()
        if last or (step % self.options.log_every == 0 and now >= self._shown + PERIOD):
            self._shown = now
            total = f"/{self.options.steps}" if self.options.steps else ""
            print(f"step {step}{total}: {self._text(line)}", file=sys.stderr, flush=True)

    def say(self, sentence: str) -> None:
        """Prints a line beside the bar, on standard output."""
        if self._first:
            self._bar.write(sentence)

    def _text(self, line: dict) -> str:
        words = [f"loss {line['loss']:.4f}"]
        if self.options.epochs and "epoch" in line:
            words.append(f"epoch {line['epoch']:.2f}/{self.options.epochs}")
        if "tokens_per_second" in line:
            words.append(f"{line['tokens_per_second']:.0f} tokens/s")
        if "mfu" in line:
            words.append(f"MFU {line['mfu']:.1%}")
        elif "flops_per_second" in line:
            words.append(f"{line['flops_per_second'] / 1e9:.1f} GFLOP/s")
        return ", ".join(words)
