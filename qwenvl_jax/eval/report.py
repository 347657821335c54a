"""Scores of single answers, and of all answers with 95% intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qwenvl_jax.eval import metrics
from qwenvl_jax.eval.metrics import BOXES, METRICS
from qwenvl_jax.eval.questions import Question, text_of

_PROPORTIONS = ("exact", "relaxed", "seconds", "tool_type", "tool_call", "tool_step")


class Answer(NamedTuple):
    """One answered question. score: from 0 to 1; matched: the counts behind a box score."""

    question: Question
    prediction: str
    finish_reason: str
    score: float
    matched: metrics.Matched | None = None

    def to_dict(self) -> dict:
        q = self.question
        return {
            **({} if q.record_id is None else {"record_id": q.record_id}),
            "where": q.where,
            "task": q.task,
            "metric": q.metric,
            "question": text_of(q.messages[-1]),
            "answer": q.answers[0] if len(q.answers) == 1 else list(q.answers),
            **({} if q.screen is None else {"screen": list(q.screen)}),
            "prediction": self.prediction,
            "finish_reason": self.finish_reason,
            "score": self.score,
        }


@dataclass(frozen=True)
class Score:
    """One metric of one task, from 0 to 1, with its 95% interval; n answers. details: precision and recall of boxes."""

    task: str
    metric: str
    n: int
    value: float
    low: float
    high: float
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Scores by task, `overall` (the mean over all answers), and the answers in the order of the records.

    skipped: how many records could not be asked or answered, by reason. They are in no score.
    """

    scores: tuple[Score, ...]
    overall: Score
    answers: tuple[Answer, ...]
    skipped: dict[str, int] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """{"eval/TASK/METRIC": value, …, "eval/overall": value}, for the metrics of a training run.

        The ends of an interval are named as their score, with "/low" and "/high".
        """
        named: dict[str, float] = {}
        for s in (*self.scores, self.overall):
            name = "eval/overall" if s is self.overall else f"eval/{s.task}/{s.metric}"
            named |= {name: s.value, f"{name}/low": s.low, f"{name}/high": s.high}
            named |= {f"eval/{s.task}/{detail}": value for detail, value in s.details.items()}
        return named | {f"eval/skipped/{reason.replace(' ', '_')}": float(n) for reason, n in self.skipped.items()}

    def to_dict(self) -> dict:
        """The scores, as `--json` prints them."""
        return {"tasks": [vars(s) for s in self.scores], "overall": vars(self.overall), "skipped": self.skipped}

    def table(self) -> str:
        """The scores as a text table, in percent."""
        rows = [("task", "metric", "n", "score", "95% interval", "")]
        for s in (*self.scores, self.overall):
            metric = {"iou": "F1 at IoU 0.5", "points": "F1, points in boxes"}.get(s.metric, s.metric)
            details = ", ".join(f"{name} {100 * value:.1f}%" for name, value in s.details.items())
            interval = f"{100 * s.low:.1f} – {100 * s.high:.1f}"
            rows.append((s.task, metric, str(s.n), f"{100 * s.value:.1f}%", interval, details))
        width = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pad = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust)
        cells = ([p(x, w) for p, x, w in zip(pad, row, width, strict=True)] for row in rows)
        lines = ["  ".join(row).rstrip() for row in cells]
        if self.skipped:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(self.skipped.items()))
            lines.append(f"{sum(self.skipped.values())} records skipped, in no score ({reasons})")
        return "\n".join(lines)


def score(
    question: Question, prediction: str, finish_reason: str = "stop", clean: Callable[[str], str] = str
) -> Answer:
    """Scores one prediction. clean: what is done to it and to the right answers before they are compared."""
    said, golds = clean(prediction), [clean(answer) for answer in question.answers]
    if question.metric in BOXES:
        from qwenvl_jax.answers.boxes import parse_boxes

        gold = parse_boxes(golds[0], unlabelled=True)
        loose = any(not box.label for box in gold)
        predicted = parse_boxes(said, unlabelled=loose, points=question.metric == "points")
        matched = metrics.match_boxes(predicted, gold, BOXES[question.metric])
        return Answer(question, prediction, finish_reason, matched.f1, matched)
    known = {"screen": question.screen} if question.metric == "tool_step" else {}
    return Answer(question, prediction, finish_reason, METRICS[question.metric](said, golds, **known))


def report(answers: Sequence[Answer], skipped: Mapping[str, int] | None = None) -> Report:
    """The scores of at least one answer; tasks keep their order. skipped: records by reason, see `Report`."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for a in answers:
        groups.setdefault((a.question.task, a.question.metric), []).append(a)
    scores = tuple(_score(task, metric, group) for (task, metric), group in groups.items())
    return Report(scores, _score("overall", "mean", answers), tuple(answers), dict(skipped or {}))


def _score(task: str, metric: str, answers: Sequence[Answer]) -> Score:
    n = len(answers)
    if metric in BOXES:
        matched = [a.matched for a in answers if a.matched is not None]
        right, predicted, gold = (sum(column) for column in zip(*matched, strict=True))
        pairs = [(2 * m.right, m.predicted + m.gold) for m in matched]
        # Without predicted boxes, precision is 1 only if there was nothing to find; recall likewise.
        precision = right / predicted if predicted else float(not gold)
        recall = right / gold if gold else float(not predicted)
        details = {"precision": precision, "recall": recall}
        value = metrics.Matched(right, predicted, gold).f1
        return Score(task, metric, n, value, *metrics.bootstrap(*zip(*pairs, strict=True)), details)
    values = [a.score for a in answers]
    if all(a.question.metric in _PROPORTIONS for a in answers):
        return Score(task, metric, n, sum(values) / n, *metrics.wilson(sum(values), n))
    return Score(task, metric, n, sum(values) / n, *metrics.bootstrap(values, [1.0] * n))
