"""Scores a model on questions whose answers are known, and says how sure the score is.

jax and the engine are imported when first needed: the command line builds its parser from this file.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from qwenvl_jax import metrics
from qwenvl_jax.errors import InputError
from qwenvl_jax.types import Model

METRICS = {"exact": metrics.exact, "anls": metrics.anls, "relaxed": metrics.relaxed, "seconds": metrics.seconds}
BOXES = "iou"  # counted over a task; every other metric is the mean of its items
_PROPORTIONS = ("exact", "relaxed", "seconds")
_LOADERS = 8  # threads that prepare questions while others are answered
_AHEAD = 4  # batches prepared at a time, so that their pictures are all that is in memory


class Question(NamedTuple):
    """One item to answer."""

    messages: list[dict]  # up to the answer
    answers: tuple[str, ...]  # the right ones
    task: str
    metric: str
    where: str  # "file:line", for errors
    tools: list | None = None


class Answer(NamedTuple):
    """One item answered. score is from 0 to 1; matched holds the counts that a box metric's score is made of."""

    question: Question
    prediction: str
    finish_reason: str
    score: float
    matched: metrics.Matched | None = None

    def to_dict(self) -> dict:
        q = self.question
        return {
            "where": q.where,
            "task": q.task,
            "metric": q.metric,
            "question": _text(q.messages[-1]),
            "answer": q.answers[0] if len(q.answers) == 1 else list(q.answers),
            "prediction": self.prediction,
            "finish_reason": self.finish_reason,
            "score": self.score,
        }


@dataclass(frozen=True)
class Score:
    """One metric of one task, from 0 to 1, with its 95% interval; n items. details: precision and recall of boxes."""

    task: str
    metric: str
    n: int
    value: float
    low: float
    high: float
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Scores by task, `overall` (the mean of all items' scores), and every answer in the order of the records."""

    scores: tuple[Score, ...]
    overall: Score
    answers: tuple[Answer, ...]

    def metrics(self) -> dict[str, float]:
        """{"eval/TASK/METRIC": value, …, "eval/overall": value}, for a training run's log."""
        named = {}
        for s in self.scores:
            named |= {f"eval/{s.task}/{name}": value for name, value in {s.metric: s.value, **s.details}.items()}
        return named | {"eval/overall": self.overall.value}

    def to_dict(self) -> dict:
        """The scores, as `--json` prints them."""
        return {"tasks": [vars(s) for s in self.scores], "overall": vars(self.overall)}

    def table(self) -> str:
        """The scores for people, in percent."""
        rows = [("task", "metric", "n", "score", "95% interval", "")]
        for s in (*self.scores, self.overall):
            metric = "F1 at IoU 0.5" if s.metric == BOXES else s.metric
            details = ", ".join(f"{name} {100 * value:.1f}%" for name, value in s.details.items())
            interval = f"{100 * s.low:.1f} – {100 * s.high:.1f}"
            rows.append((s.task, metric, str(s.n), f"{100 * s.value:.1f}%", interval, details))
        width = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pad = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust)
        cells = ([p(x, w) for p, x, w in zip(pad, row, width, strict=True)] for row in rows)
        return "\n".join("  ".join(row).rstrip() for row in cells)

    def write(self, path) -> None:
        """Writes the answers as JSONL, under another name until the file is complete."""
        path = Path(path)
        work = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            with work.open("w", encoding="utf-8") as f:
                f.writelines(json.dumps(a.to_dict(), ensure_ascii=False) + "\n" for a in self.answers)
            os.replace(work, path)
        finally:
            work.unlink(missing_ok=True)


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
            raise InputError(f"batch is {batch}; it must be at least 1")
        self.questions = read_questions(records, metric)
        _check(self.questions, model.processor)
        self._model, self._engine = (model._replace(params=None), None) if isinstance(model, Model) else (None, model)
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
                raise InputError(f"{q.where}: {e}") from e

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


def score(question: Question, prediction: str, finish_reason: str = "stop") -> Answer:
    """Compares one prediction with the right answers of its question."""
    if question.metric == BOXES:
        gold = metrics.parse_boxes(question.answers[0])
        matched = metrics.match_boxes(metrics.parse_boxes(prediction), gold)
        return Answer(question, prediction, finish_reason, matched.f1, matched)
    value = METRICS[question.metric](prediction, question.answers)
    return Answer(question, prediction, finish_reason, value)


def report(answers: Sequence[Answer]) -> Report:
    """The scores of at least one answer; tasks in the order of their first."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for a in answers:
        groups.setdefault((a.question.task, a.question.metric), []).append(a)
    scores = tuple(_score(task, metric, group) for (task, metric), group in groups.items())
    return Report(scores, _score("overall", "mean", answers), tuple(answers))


def _score(task: str, metric: str, answers: Sequence[Answer]) -> Score:
    n = len(answers)
    if metric == BOXES:
        right, predicted, gold = (sum(column) for column in zip(*(a.matched for a in answers), strict=True))
        pairs = [(2 * a.matched.right, a.matched.predicted + a.matched.gold) for a in answers]
        # Of no boxes none is wrong; but where there was something to find, silence is not precise either.
        precision = right / predicted if predicted else float(not gold)
        recall = right / gold if gold else float(not predicted)
        details = {"precision": precision, "recall": recall}
        value = metrics.Matched(right, predicted, gold).f1
        return Score(task, metric, n, value, *metrics.bootstrap(*zip(*pairs, strict=True)), details)
    values = [a.score for a in answers]
    if all(a.question.metric in _PROPORTIONS for a in answers):
        return Score(task, metric, n, sum(values) / n, *metrics.wilson(sum(values), n))
    return Score(task, metric, n, sum(values) / n, *metrics.bootstrap(values, [1.0] * n))


# --- records --------------------------------------------------------------------------------------------


def read_questions(records, metric: str = "exact") -> list[Question]:
    """The questions of a JSONL file, a list of them, or a list of records (see `Evaluator`) or of questions.

    Paths of pictures and clips in a file start from its folder. Raises InputError that names the record at fault.
    """
    from qwenvl_jax.inputs.records import read_lines  # it brings numpy

    if isinstance(records, str | Path):
        records = [records]
    questions = []
    for i in range(len(records)):  # what only has len() and [i] is a list too
        one = records[i]
        if isinstance(one, Question):
            questions.append(one)
            continue
        lines = read_lines(one) if isinstance(one, str | Path) else [(f"record {i}", one, None)]
        for where, value, folder in lines:
            try:
                questions.append(_question(value, folder, metric, where))
            except (InputError, RecursionError) as e:  # the latter where lists are nested by the hundred
                raise InputError(f"{where}: {e}") from e
    if not questions:
        raise InputError(f"{', '.join(map(str, records)) or 'the list of records'}: no record to evaluate on")
    return questions


def _question(record, folder: Path | None, metric: str, where: str) -> Question:
    from qwenvl_jax.inputs.records import conversation

    if not isinstance(record, Mapping):
        raise InputError(f"a record is a JSON object, not a {type(record).__name__}")
    ((messages, _),) = conversation(record, folder)
    answer = record.get("answer")
    last = messages[-1]
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        messages = messages[:-1]
        answer = _text(last) if answer is None else answer
    if answer is None:
        raise InputError("has no 'answer', and does not end with one of the assistant's")
    if not messages:
        raise InputError("has no question before the answer")
    task, metric = record.get("task", "default"), record.get("metric", metric)
    if not isinstance(task, str) or not task:
        raise InputError(f"task is {task!r}; it must be a name")
    if metric not in (*METRICS, BOXES):
        raise InputError(f"metric is {metric!r}; known are {', '.join((*METRICS, BOXES))}")
    return Question(messages, _answers(answer, metric), task, metric, where, record.get("tools"))


def _answers(answer, metric: str) -> tuple[str, ...]:
    """The right answers as texts, checked to be what the metric can compare with."""
    if metric == BOXES:
        try:
            objects = json.loads(answer) if isinstance(answer, str) else answer
            text = json.dumps(objects)
        except (TypeError, ValueError, RecursionError) as e:
            raise InputError(f"answer is not readable as JSON ({e})") from e
        if not isinstance(objects, list) or len(metrics.parse_boxes(text)) != len(objects):
            raise InputError('answer must be a list of {"bbox_2d": [x1, y1, x2, y2], "label": "…"}')
        return (text,)
    several = answer if isinstance(answer, list | tuple) else [answer]
    if not several or not all(isinstance(a, str | int | float) and not isinstance(a, bool) for a in several):
        raise InputError(f"answer is {str(answer)[:80]!r}; it must be a text or a number, or a list of them")
    texts = tuple(map(str, several))
    if metric == "seconds":
        for text in texts:
            if metrics.first_time(text) is None:
                raise InputError(f"answer is {text[:80]!r}; with the metric seconds it must name a time")
    return texts


def _check(questions: Sequence[Question], processor) -> None:
    """Finds what can be found at once, without opening a picture: hours may pass before its turn comes."""
    from qwenvl_jax.inputs.source import locate

    for q in questions:
        try:
            for media in processor.prompt(q.messages, tools=q.tools, add_generation_prompt=True).media:
                if isinstance(media.source, str) and not re.match("(?i)https?:|data:", media.source):
                    locate(media.source, 0)
        except InputError as e:
            raise InputError(f"{q.where}: {e}") from e


def _text(message: Mapping) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    items = content if isinstance(content, list | tuple) else []
    return "".join(i["text"] for i in items if isinstance(i, Mapping) and isinstance(i.get("text"), str))


# --- the command ----------------------------------------------------------------------------------------

_ENCODING = ("min_pixels", "max_pixels", "total_pixels", "fps", "max_frames")


def add_arguments(parser) -> None:
    """The arguments of `qwenvl eval`."""
    parser.add_argument("data", nargs="+", metavar="FILE", help="questions and their answers as JSONL")
    parser.add_argument("--model", default="demo", metavar="DIR_OR_ID", help="directory or hub id (default: demo)")
    parser.add_argument("--metric", choices=(*METRICS, BOXES), default="exact", help="of records that name none")
    parser.add_argument("--output", metavar="FILE", help="write every question, answer and score there as JSONL")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="questions answered together")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), help="default: the checkpoint's")
    parser.add_argument("--min-pixels", type=int, metavar="N", help="of an image, or of each frame")
    parser.add_argument("--max-pixels", type=int, metavar="N")
    parser.add_argument("--total-pixels", type=int, metavar="N", help="of all frames of a video, taken in pairs")
    parser.add_argument("--fps", type=float, help="frames sampled a second of video")
    parser.add_argument("--max-frames", type=int, metavar="N")


def command(args) -> int:
    """Runs `qwenvl eval`; returns its exit code. Bad input raises InputError."""
    from qwenvl_jax.params import checkpoint

    output = None if args.output is None else Path(args.output)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"--output {output}: is a directory, or there is no directory {output.parent}")
    questions = read_questions(args.data, args.metric)  # bad ones are told before the weights are read
    encoding = {name: value for name in _ENCODING if (value := getattr(args, name)) is not None}
    report = evaluate(
        checkpoint.load(args.model, dtype=args.dtype),
        questions,
        batch=args.batch,
        encoding=encoding,
        max_new_tokens=args.max_new_tokens,
        progress=not args.json,
    )
    print(json.dumps(report.to_dict()) if args.json else report.table(), flush=True)
    if output is not None:
        report.write(output)
    return 0
