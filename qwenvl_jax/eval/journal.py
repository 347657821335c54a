"""The file of an evaluation's answers. It grows as answers come, and a killed evaluation goes on from it."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qwenvl_jax.errors import InputError, shown
from qwenvl_jax.eval.metrics import BOXES
from qwenvl_jax.eval.questions import Question
from qwenvl_jax.inputs.messages import normalize

_START = b'{"id": "'  # of every line
_ID = re.compile(re.escape(_START) + rb'([^"]*)"')
_MAX_LINE = 64 << 20  # bytes that are read to see what a file holds
_PROMPT = 8  # letters of an id that depend on the prompt alone
_ANEW = "give another output, or overwrite it"
_KEYS = {"id": str, "model": str, "options": dict, "answer": str | list, "prediction": str, "finish_reason": str}


class Journal:
    """A JSONL file of answers, open for appending: a context manager. A line is on the disk when `add` returns.

    Each line starts with the question's id, the model's fingerprint, the options and a checksum of the sizes and times
    of the question's pictures and clips; `report.Answer.to_dict` follows.
    questions: all that the file may answer, by id (see `question_ids`). `answered`: the lines found there, by id. A
    half-written last line is dropped. overwrite: drop whatever the file holds.
    Raises InputError if the file holds anything else, or answers of another model, other options, other questions or
    other pictures.
    """

    def __init__(self, path, model: str, options: dict, questions: Mapping[str, Question], *, overwrite: bool = False):
        self.path, self._questions = Path(os.path.realpath(path)), questions
        self._media = {name: _media_state(q) for name, q in questions.items()}  # before they are opened
        self._run: dict[str, Any] = {"model": model, "options": options}
        self.answered: dict[str, dict] = {}
        try:
            self._file = open(self.path, "a+b")
        except OSError as e:
            raise InputError(f"{path}: cannot be written ({e.strerror})") from e
        try:
            self._lock()
            if overwrite:
                self._file.truncate(0)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        mine = os.fstat(self._file.fileno())
        if not stat.S_ISREG(mine.st_mode):
            raise InputError(f"{self.path}: is not a regular file, so answers cannot be found again in it")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.stat(self.path).st_ino == mine.st_ino  # else `finish` of another process has just replaced it
        except OSError:
            there = False
        if not there:
            raise InputError(f"{self.path}: another process is writing it")

    def _read(self) -> None:
        self._file.seek(0)
        *lines, rest = self._file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            value = self._parsed(line, f"{self.path}:{number}")
            self.answered.setdefault(value["id"], value)
        if not (rest.startswith(_START) or _START.startswith(rest)):
            raise self._foreign(f"{self.path}:{len(lines) + 1}")
        if rest:
            self._file.truncate(sum(len(line) + 1 for line in lines))

    def _parsed(self, line: bytes, where: str) -> dict:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or not all(isinstance(value.get(k), kind) for k, kind in _KEYS.items()):
            raise self._foreign(where)
        if value["model"] != self._run["model"]:
            said = "another model (weights, config, preprocessing, tokenizer or chat template)"
            raise InputError(f"{where}: is the answer of {said}; {_ANEW}")
        old, new = value["options"], self._run["options"]
        if changed := [name for name in sorted(old | new) if old.get(name) != new.get(name)]:
            was = ", ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in changed)
            raise InputError(f"{where}: was answered with other options ({was}); {_ANEW}")
        if value["id"] not in self._questions:
            raise InputError(f"{where}: {self._why_not_asked(value)}; {_ANEW}")
        if value.get("media", "") != self._media[value["id"]]:
            asked = self._questions[value["id"]].where
            raise InputError(f"{where}: an image or video of {asked} has changed since it was answered; {_ANEW}")
        return value

    def _why_not_asked(self, line: dict) -> str:
        """What has changed, if the same prompt is still asked."""
        name, _, copy = line["id"].partition("-")
        if name in self._questions:
            asked = sum(other.partition("-")[0] == name for other in self._questions)
            times = "once" if asked == 1 else f"{asked} times"
            return f"is answer {copy} to the question of {self._questions[name].where}, which is now asked {times}"
        same = [
            (_changes(line, q), q.where) for other, q in self._questions.items() if other[:_PROMPT] == name[:_PROMPT]
        ]
        if not same:
            return "answers a question that is not asked"
        changed, where = min(same, key=lambda pair: len(pair[0]))  # one prompt may have several right answers
        if changed:
            return f"the {changed[0][0]} of {where} was {changed[0][1]} and is {changed[0][2]}"
        return f"the right answer of {where}, or the coordinates of its boxes, have changed"

    @staticmethod
    def _foreign(where: str) -> InputError:
        return InputError(f"{where}: is not an answer of an evaluation; {_ANEW}")

    def add(self, answers: Iterable[tuple[str, dict]]) -> None:
        """Appends answers: pairs of a question's id and `Answer.to_dict()`."""
        self._write(self._file, [self._line(name, answer) for name, answer in answers])

    def _line(self, name: str, answer: dict) -> dict:
        media = {"media": self._media[name]} if self._media[name] else {}
        return {"id": name, **self._run, **media, **answer}

    def finish(self, answers: Iterable[tuple[str, dict]]) -> None:
        """Puts all answers into the order of the questions. The file is replaced as a whole, or stays as it is.

        Raises InputError if it cannot be replaced; no answer is lost then.
        """
        now = self.answered | {name: self._line(name, answer) for name, answer in answers}
        work = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}")
        try:
            with work.open("wb") as file:
                self._write(file, [now[name] for name in self._questions if name in now])
            os.replace(work, self.path)
        except (OSError, InputError) as e:
            why = e.strerror if isinstance(e, OSError) else e
            raise InputError(f"{self.path}: has all answers, but not in the order of the questions ({why})") from e
        finally:
            with contextlib.suppress(OSError):
                work.unlink()

    def _write(self, file, lines: list[dict]) -> None:
        try:
            file.write(b"".join(map(_encoded, lines)))
            file.flush()
            os.fsync(file.fileno())
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror})") from e

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


def _changes(line: dict, q: Question) -> list[tuple[str, str, str]]:
    """What differs between a line and a question of the same prompt: names, old and new values."""
    golds = q.answers[0] if len(q.answers) == 1 else list(q.answers)
    pairs: dict[str, tuple] = {"metric": (line.get("metric"), q.metric), "task": (line.get("task"), q.task)}
    if q.metric not in BOXES:  # a line has them in the model's coordinates
        pairs["answer"] = line["answer"], golds
    return [(name, shown(old), shown(new)) for name, (old, new) in pairs.items() if old != new]


def answered_ids(path: Path) -> set[str]:
    """The ids of the questions that a file answers; none if it cannot be read."""
    if path.is_file():  # not a pipe
        with contextlib.suppress(OSError), open(path, "rb") as file:
            starts = filter(None, map(_ID.match, file))
            return {start[1].decode("utf-8", "replace") for start in starts}
    return set()


def holds_answers(path: Path) -> bool:
    """Whether a file is empty or starts with an answer of an evaluation."""
    try:
        with open(path, "rb") as file:
            line = file.readline(_MAX_LINE)
        value = json.loads(line or "{}")
    except (OSError, ValueError, RecursionError):
        return False
    return not line or (isinstance(value, dict) and all(isinstance(value.get(k), kind) for k, kind in _KEYS.items()))


def _encoded(line: dict) -> bytes:
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # the name of a file that is not UTF-8
        return (json.dumps(line) + "\n").encode()


def question_ids(questions: Sequence[Question]) -> list[str]:
    """A name for each question, from what it asks and its right answers. Equal questions are numbered.

    It does not depend on the working directory. The first _PROMPT letters depend on the prompt alone.
    """
    seen: Counter[str] = Counter()
    ids = []
    for q in questions:
        messages, media = _read(q)
        prompt = [messages, [[m.kind, _absolute(m.source), m.options] for m in media], q.tools]
        name = _digest(prompt)[:_PROMPT] + _digest([q.answers, q.metric, q.task, q.boxes])[: 16 - _PROMPT]
        seen[name] += 1
        ids.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return ids


def _digest(value) -> str:
    text = json.dumps(value, default=_as_json, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read(question: Question) -> tuple[list, list]:
    """The messages without their media, and the media. Messages that cannot be asked stay as they are."""
    try:
        return normalize(question.messages)
    except InputError:
        return question.messages, []


def _local(source) -> str | None:
    """The path of a picture or clip, if it is a file of this machine."""
    if not isinstance(source, str | os.PathLike):
        return None
    path = re.sub("(?i)^file://(localhost(?=/))?", "", os.fspath(source))
    if re.match("(?i)[a-z][a-z0-9+.-]*://|data:", path):
        return None
    return os.path.abspath(path if os.path.exists(path) else os.path.expanduser(path))


def _absolute(source):
    if isinstance(source, list | tuple):  # the frames of a clip
        return [_absolute(s) for s in source]
    return _local(source) or source


def _media_state(question: Question) -> str:
    """A checksum of the sizes and times of the question's local files; "" if it has none."""
    sources = [s for m in _read(question)[1] for s in (m.source if isinstance(m.source, list | tuple) else [m.source])]
    states: list = []
    for path in filter(None, map(_local, sources)):
        try:
            state = os.stat(path)
            states.append([state.st_size, state.st_mtime_ns])
        except (OSError, ValueError):  # missing, or no path at all
            states.append(None)
    return _digest(states)[:16] if states else ""


def _as_json(value):
    """What a record from Python may hold beside JSON: bytes, arrays, pictures, paths."""
    content = value.tobytes() if hasattr(value, "tobytes") else value
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else str(value)


def fingerprint(config, processor, params: dict) -> str:
    """A name for a model. It changes with any weight, the config and all that makes prompts, but not with the mesh."""
    sums = {path: int(total) for path, total in _sums()(params).items()}
    template = sorted(processor.template.sources.items()), sorted(processor.template.variables.items())
    tokenizer = processor.tokenizer.to_str(), processor.allow_control_tokens
    parts = repr(config), repr(processor.preprocessing), tokenizer, template, sorted(sums.items())
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


@cache
def _sums():
    import jax
    import jax.numpy as jnp

    from qwenvl_jax.params.specs import bits as bits_of
    from qwenvl_jax.params.specs import flatten

    def total(w):
        """A sum of the bits, weighted by place. Integers wrap, so their order on the devices does not matter."""
        bits = jax.lax.bitcast_convert_type(w, f"uint{bits_of(w.dtype)}").astype(jnp.uint32)
        for axis in range(w.ndim):
            bits = bits * (2 * jax.lax.broadcasted_iota(jnp.uint32, w.shape, axis) + 2 * axis + 3)
        return bits.sum(dtype=jnp.uint32)

    return jax.jit(lambda params: {path: total(w) for path, w in flatten(params).items()})
