"""Questions with known answers, from files or records. This file does not import numpy."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qwenvl_jax.errors import InputError, shown
from qwenvl_jax.eval import metrics
from qwenvl_jax.eval.metrics import BOXES, METRICS

_IDS = ("id", "_id", "uid", "uuid", "question_id", "qid", "sample_id", "item_id")  # keys of a record
_CALLS = ("tool_type", "tool_call", "tool_step")


class Question(NamedTuple):
    """One item to answer."""

    messages: list[dict]  # without the answer
    answers: tuple[str, ...]  # the right ones
    task: str
    metric: str
    where: str  # "file:line", for errors
    tools: list | None = None
    boxes: str | None = None  # their coordinates in the messages and answers; None: the model's
    reply: dict | None = None  # the assistant message with tool calls that is the answer; the template writes it
    record_id: str | int | None = None  # the record's own, for files of answers
    screen: tuple[int, int] | None = None  # largest x and y in its last picture, in the model's coordinates


class Questions:
    """The questions of files (what `open_records` takes) or of a list of records (see `Evaluator`), in order.

    A record is read when it is first asked for. columns: "old=new" renames a key of every record, and "old=" drops it.
    """

    def __init__(self, records, metric: str = "exact", columns: Sequence[str] = ()):
        from qwenvl_jax.inputs.source import open_records  # imports numpy

        self._source, self._metric = open_records(records, columns), metric
        self._read: list[Question | InputError] = []

    def first(self, limit: int | None = None) -> list[Question | InputError]:
        """The first `limit` questions, or all, with the error of each bad record in its place.

        Raises InputError if there is no record.
        """
        end = len(self._source) if limit is None else min(limit, len(self._source))
        for i in range(len(self._read), end):
            try:
                self._read.append(_question(self._source[i], self._source, i, self._metric))
            except InputError as e:
                self._read.append(e.at(self._source.where(i)))
            except RecursionError as e:  # deeply nested lists
                self._read.append(InputError(f"{self._source.where(i)}: {e}"))
        if not self._read:
            raise InputError(f"{self._source.name}: no record to evaluate on")
        return self._read[:limit]


def _question(record, source, index: int, metric: str) -> Question:
    from qwenvl_jax.inputs.records import conversation

    messages, _, tools = conversation(record, source.folder(index))
    answer, reply = record.get("answer"), None
    last = messages[-1]
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        messages = messages[:-1]
        if answer is None:
            answer, reply = text_of(last), dict(last) if last.get("tool_calls") else None
    if answer is None:
        raise InputError("has no 'answer' and does not end with an assistant message; add one of them")
    if not messages:
        raise InputError("has no question before the answer; add a user message")
    task, metric = _task(record.get("task")), metric if record.get("metric") is None else record["metric"]
    if metric not in (*METRICS, *BOXES):
        raise InputError(f"metric is {shown(metric)}; known are {', '.join((*METRICS, *BOXES))}")
    from qwenvl_jax.answers.boxes import check_coordinates  # not at the top, as in `metrics`

    check_coordinates(boxes := record.get("boxes"))
    answers = (str(answer),) if reply and metric in _CALLS else _answers(answer, metric)  # a reply is checked later
    for text in answers:
        _check_characters(text, "answer")
    own = next((record[key] for key in _IDS if isinstance(record.get(key), str | int)), None)
    return Question(messages, answers, task, metric, source.where(index), tools, boxes, reply, own)


def _task(task) -> str:
    """The name of a task, which may be a number. None, as tables write it, counts as absent."""
    if task is None:
        return "default"
    if isinstance(task, float) and task.is_integer():  # tables turn whole numbers with gaps into floats
        task = int(task)
    if isinstance(task, int) and not isinstance(task, bool) and abs(task) < 1 << 64:
        task = str(task)
    if not isinstance(task, str) or not task:
        raise InputError(f"task is {shown(task)}; it must be a name")
    _check_characters(task, "task")
    return task


def _check_characters(text: str, key: str) -> None:
    """Raises InputError for half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = ascii(text[e.start])[1:-1]
        raise InputError(f"{key} has half of a surrogate pair ({half}), which is no character; remove it") from e


def _answers(answer, metric: str) -> tuple[str, ...]:
    """The right answers as texts. Raises InputError if the metric cannot read one."""
    if metric in BOXES:
        return (_boxes(answer),)
    if metric == "tiou" and not _is_texts(answer):
        answer = _json(answer)
    if metric in _CALLS and not _is_texts(answer):
        answer = f"<tool_call>\n{_json(answer)}\n</tool_call>"
    several = answer if isinstance(answer, list | tuple) else [answer]
    if not several or not all(isinstance(a, str | int | float) and not isinstance(a, bool) for a in several):
        raise InputError(f"answer is {shown(answer)}; it must be a text or a number, or a list of them")
    texts = tuple(map(str, several))
    for text in texts:
        check_answer(text, metric)
    return texts


def check_answer(text: str, metric: str) -> None:
    """Raises InputError if a right answer has nothing that the metric compares."""
    from qwenvl_jax.answers import moments, tools

    if metric == "seconds" and moments.first_time(text) is None:
        raise InputError(f"answer is {text[:80]!r}; for the metric seconds it must contain a time")
    if metric == "tiou":
        found = moments.parse(text)
        if found.malformed or not any(m.end is not None and m.end > m.start for m in found.moments):
            want = 'such as "from 12.5 to 20 seconds" or [[12.5, 20.0]]'
            raise InputError(f"answer is {text[:80]!r}; for the metric tiou it must contain spans of time, {want}")
    if metric == "teds" and metrics.table_tree(text) is None:
        rule = "for the metric teds it must be a table of at most 1,000 rows and cells"
        raise InputError(f"answer is {text[:80]!r}; {rule}")
    if metric in _CALLS:
        turn = tools.parse(text)
        if turn.malformed or not turn.calls:
            want = '<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>'
            raise InputError(f"answer is {text[:80]!r}; for the metric {metric} it must contain tool calls, {want}")


def _is_texts(answer) -> bool:
    return isinstance(answer, str) or (isinstance(answer, list | tuple) and all(isinstance(a, str) for a in answer))


def _json(answer) -> str:
    try:
        return json.dumps(answer, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(answer)


def _boxes(answer) -> str:
    """The right boxes as text: objects, or any text that a model may answer."""
    try:
        text = answer if isinstance(answer, str) else json.dumps(answer)
        objects = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        text, objects = str(answer), None
    count = len(objects) if isinstance(objects, list) else max(isinstance(objects, dict), text.count("bbox_2d"), 1)
    if isinstance(objects, list) and objects and not any(isinstance(o, list | dict) for o in objects):
        count = 1  # [x1, y1, x2, y2]
    from qwenvl_jax.answers.boxes import parse_boxes

    found = len(parse_boxes(text, unlabelled=True))
    if found < count or (isinstance(objects, list) and found != count):
        raise InputError(
            'answer must be a list of {"bbox_2d": [x1, y1, x2, y2], "label": "…"}, or boxes as the model writes them'
        )
    return text


def text_of(message: Mapping) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    items = content if isinstance(content, list | tuple) else []
    return "".join(i["text"] for i in items if isinstance(i, Mapping) and isinstance(i.get("text"), str))
