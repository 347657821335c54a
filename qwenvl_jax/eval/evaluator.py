"""Asks a model questions with known answers and scores its answers. jax is imported on first use."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.eval.questions import Question, read_questions
from qwenvl_jax.eval.report import Answer, Report, report, score
from qwenvl_jax.types import Model

_LOADERS = 8  # threads that encode the next questions meanwhile
_AHEAD = 4  # batches encoded at a time; only their images are in memory


def evaluate(model, records, **options) -> Report:
    """Answers every question of `records` greedily and scores the answers.

    model: a `Model` or an `Engine`. records, options: as for `Evaluator`.
    Raises InputError that names the record (file and line) whose image, video or prompt cannot be used.
    """
    return Evaluator(model, records, **options).report(model.params)


class Evaluator:
    """Scores one set of questions repeatedly, as parameters change: `Evaluator(model, records)(params)`.

    The first call compiles; later ones must have parameters of the same shapes and dtypes. Between calls it holds no
    reference to parameters.
    """

    def __init__(
        self,
        model,
        records,
        *,
        batch: int = 32,
        metric: str = "exact",
        encoding: Mapping | None = None,
        max_new_tokens: int = 256,
        progress: bool = False,
        **options,
    ):
        """model: a `Model`, whose own parameters are dropped, or an `Engine`, whose max_batch is used.

        records: a JSONL file, a list of them, or a list of records. A record is a training record plus `answer` (a text
            or number, a list of them, or boxes; by default the last assistant message), `task` (the group of its score;
            by default "default") and `metric` (by default `metric`).
        batch: questions answered together.
        encoding: options of `Processor.encode` for all questions.
        options: other `GenerateOptions`; the default temperature is 0.
        Raises InputError that names the bad record. Images and videos are not opened here.
        """
        if batch < 1:
            raise OptionsError(f"batch is {batch}; it must be at least 1")
        self.questions = read_questions(records, metric)
        _check(self.questions, model.processor)
        self._model: Any = model._replace(params={}) if isinstance(model, Model) else None
        self._engine: Any = None if isinstance(model, Model) else model
        self._batch = min(batch, len(self.questions)) if self._engine is None else model.max_batch
        self._encoding, self._progress = dict(encoding or {}), progress
        self._options = {"temperature": 0.0, "max_new_tokens": max_new_tokens, **options}

    def __call__(self, params) -> dict[str, float]:
        """The scores under these parameters, by name: see `Report.metrics`."""
        return self.report(params).metrics()

    def report(self, params) -> Report:
        """Answers every question under these parameters and scores the answers."""
        import jax

        from qwenvl_jax.infer.engine import Engine
        from qwenvl_jax.inputs.ladder import Ladder

        if self._engine is None:
            # A single bucket of rows: padding the last batch is cheaper than compiling for its size.
            ladder = Ladder(rows=(self._batch,))
            self._engine = Engine(self._model._replace(params=params), max_batch=self._batch, ladder=ladder)
        engine = self._engine
        own, engine.params = engine.params, jax.tree.map(jax.numpy.asarray, params)
        try:
            return report(self._answers(engine))
        finally:
            engine.params = own if self._model is None else None

    def _answers(self, engine) -> list[Answer]:
        from tqdm import tqdm

        from qwenvl_jax.infer.options import tokens_left

        def encode(i: int):
            q = self.questions[i]
            try:
                sample = engine.processor.encode(q.messages, tools=q.tools, **self._encoding)
                tokens_left(sample, engine.max_length)
                return sample
            except InputError as e:
                raise e.at(q.where) from e

        # Questions of one task have similar sizes, so their batches need few buckets.
        order = sorted(range(len(self.questions)), key=lambda i: self.questions[i].task)
        windows = [order[i : i + self._batch * _AHEAD] for i in range(0, len(order), self._batch * _AHEAD)]
        answers: list = [None] * len(order)
        with (
            ThreadPoolExecutor(_LOADERS) as pool,
            tqdm(total=len(order), desc="evaluating", disable=not self._progress) as bar,
        ):
            encoded = pool.map(encode, windows[0])
            for window, following in zip(windows, [*windows[1:], []], strict=True):
                samples = dict(zip(window, encoded, strict=True))
                encoded = pool.map(encode, following)  # starts now, while this window is answered
                by_length = sorted(window, key=lambda i: len(samples[i].tokens))
                for at in range(0, len(by_length), self._batch):
                    batch = by_length[at : at + self._batch]
                    results = engine.generate([samples.pop(i) for i in batch], **self._options)
                    for i, result in zip(batch, results, strict=True):
                        answers[i] = score(self.questions[i], result.text, result.finish_reason)
                    bar.update(len(batch))
        return answers


def _check(questions: Sequence[Question], processor) -> None:
    """Raises InputError for a bad prompt or a missing file now; the evaluation may reach it hours later."""
    from qwenvl_jax.inputs.fetch import locate

    for q in questions:
        try:
            for media in processor.prompt(q.messages, tools=q.tools, add_generation_prompt=True).media:
                if isinstance(media.source, str) and not re.match("(?i)(https?|gs|s3):|data:", media.source):
                    locate(media.source, 0)
        except InputError as e:
            raise e.at(q.where) from e
