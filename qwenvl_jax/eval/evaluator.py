"""Puts questions whose answers are known to a model and scores what it says.

jax and the engine are imported when first needed, so that `Evaluator` can be named without them.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.eval.questions import Question, read_questions
from qwenvl_jax.eval.report import Answer, Report, report, score
from qwenvl_jax.types import Model

_LOADERS = 8  # threads that prepare questions while others are answered
_AHEAD = 4  # batches prepared at a time, so that their pictures are all that is in memory


def evaluate(model, records, **options) -> Report:
    """Answers every question of `records` greedily and scores the answers.

    model: a `Model` or an `Engine`. records and options: as in `Evaluator`.
    Raises InputError that names the record (file and line) whose picture or prompt cannot be used.
    """
    return Evaluator(model, records, **options).report(model.params)


class Evaluator:
    """Scores one set of questions again and again as the parameters change: `Evaluator(model, records)(params)`.

    Programs are compiled in the first call; later ones must bring parameters of the same shapes and dtypes. Of
    parameters, nothing is kept between calls.
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
        """model: a `Model`, whose own parameters are not kept, or an `Engine`, which has a batch of its own.

        records: a JSONL file, a list of them, or a list of records. A record is one that can be trained on, plus
            `answer` (a string or number, several of them, or boxes; by default the last assistant message),
            `task` (a name to group by, by default "default") and `metric` (by default `metric`).
        batch: questions answered together.
        encoding: options of `Processor.encode` for all questions.
        options: more of GenerateOptions; the temperature is 0 unless given.
        Raises InputError that names the record at fault; pictures and clips are opened when it is their turn.
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
        """The metrics under these parameters, by name: see `Report.metrics`."""
        return self.report(params).metrics()

    def report(self, params) -> Report:
        """Answers every question under these parameters and scores the answers."""
        import jax

        engine = self._engine or self._new_engine(params)
        own, engine.params = engine.params, jax.tree.map(jax.numpy.asarray, params)
        try:
            return report(self._answers(engine))
        finally:
            engine.params = own if self._model is None else None

    def _new_engine(self, params):
        from qwenvl_jax.infer.engine import Engine
        from qwenvl_jax.inputs.ladder import Ladder

        # One rung of rows: to fill up a last batch with padding is cheaper than to compile for it.
        ladder = Ladder(rows=(self._batch,))
        self._engine = Engine(self._model._replace(params=params), max_batch=self._batch, ladder=ladder)
        return self._engine

    def _answers(self, engine) -> list[Answer]:
        from tqdm import tqdm

        from qwenvl_jax.infer.options import room

        def encode(q: Question):
            try:
                sample = engine.processor.encode(q.messages, tools=q.tools, **self._encoding)
                room(sample, engine.max_length)
                return sample
            except InputError as e:
                raise e.at(q.where) from e

        # Questions of a task are of like size, so that few buckets are met, and lots of neighbours share them.
        order = sorted(range(len(self.questions)), key=lambda i: self.questions[i].task)
        lots = [order[i : i + self._batch * _AHEAD] for i in range(0, len(order), self._batch * _AHEAD)]
        answers: list = [None] * len(order)
        with (
            ThreadPoolExecutor(_LOADERS) as pool,
            tqdm(total=len(order), desc="evaluating", disable=not self._progress) as bar,
        ):
            coming = [pool.submit(encode, self.questions[i]) for i in lots[0]]
            for lot, following in zip(lots, [*lots[1:], []], strict=True):
                samples = {i: future.result() for i, future in zip(lot, coming, strict=True)}
                coming = [pool.submit(encode, self.questions[i]) for i in following]
                lot = sorted(lot, key=lambda i: len(samples[i].tokens))
                for at in range(0, len(lot), self._batch):
                    some = lot[at : at + self._batch]
                    results = engine.generate([samples.pop(i) for i in some], **self._options)
                    for i, result in zip(some, results, strict=True):
                        answers[i] = score(self.questions[i], result.text, result.finish_reason)
                    bar.update(len(some))
        return answers


def _check(questions: Sequence[Question], processor) -> None:
    """Finds what can be found at once, without opening a picture: hours may pass before its turn comes."""
    from qwenvl_jax.inputs.fetch import locate

    for q in questions:
        try:
            for media in processor.prompt(q.messages, tools=q.tools, add_generation_prompt=True).media:
                if isinstance(media.source, str) and not re.match("(?i)https?:|data:", media.source):
                    locate(media.source, 0)
        except InputError as e:
            raise e.at(q.where) from e
