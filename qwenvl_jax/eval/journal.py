"""The file of an evaluation's answers. It grows as answers come, and a killed evaluation goes on from it."""

import fcntl
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qwenvl_jax.errors import InputError
from qwenvl_jax.eval.questions import Question

_START = b'{"id": "'  # of every line
_KEYS = {"id": str, "model": str, "options": dict, "answer": str | list, "prediction": str, "finish_reason": str}


class Journal:
    """A JSONL file of answers, open for appending: a context manager. A line is on the disk when `add` returns.

    Each line starts with the question's id, the model's fingerprint and the options; `report.Answer.to_dict` follows.
    ids: of all questions that the file may answer. `answered`: the lines found there, by id. A half-written last line
    is dropped. overwrite: drop whatever the file holds.
    Raises InputError if the file holds anything else, or answers of another model, other options or other questions.
    """

    def __init__(self, path, model: str, options: dict, ids: Sequence[str], *, overwrite: bool = False):
        self.path, self._ids = Path(path), dict.fromkeys(ids)
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
            raise InputError(f"{where}: is the answer of another model; give another --output, or --overwrite")
        old, new = value["options"], self._run["options"]
        if changed := [name for name in sorted(old | new) if old.get(name) != new.get(name)]:
            was = ", ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in changed)
            raise InputError(f"{where}: was answered with other options ({was}); give another --output, or --overwrite")
        if value["id"] not in self._ids:
            raise InputError(f"{where}: answers a question that is not asked; give another --output, or --overwrite")
        return value

    @staticmethod
    def _foreign(where: str) -> InputError:
        return InputError(f"{where}: is not an answer of an evaluation; give another --output, or --overwrite")

    def add(self, answers: Iterable[tuple[str, dict]]) -> None:
        """Appends answers: pairs of a question's id and `Answer.to_dict()`."""
        self._write(self._file, [{"id": name, **self._run, **answer} for name, answer in answers])

    def finish(self, answers: Iterable[tuple[str, dict]]) -> None:
        """Puts all answers into the order of the questions. The file is replaced as a whole."""
        now = self.answered | {name: {"id": name, **self._run, **answer} for name, answer in answers}
        work = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}")
        try:
            with work.open("wb") as file:
                self._write(file, [now[name] for name in self._ids if name in now])
            os.replace(work, self.path)
        finally:
            work.unlink(missing_ok=True)

    def _write(self, file, lines: list[dict]) -> None:
        try:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror})") from e

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


def question_ids(questions: Sequence[Question]) -> list[str]:
    """A name for each question, from what it asks and its right answers. Equal questions are numbered."""
    seen: Counter[str] = Counter()
    ids = []
    for q in questions:
        parts = [q.messages, q.tools, q.answers, q.metric, q.task, q.boxes]
        asked = json.dumps(parts, default=_as_json, sort_keys=True)
        name = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        seen[name] += 1
        ids.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return ids


def _as_json(value):
    """What a record from Python may hold beside JSON: bytes, arrays, pictures, paths."""
    content = value.tobytes() if hasattr(value, "tobytes") else value
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else str(value)


def fingerprint(config, processor, params: dict) -> str:
    """A name for a model: it changes with any weight, the config or the chat template, but not with the mesh."""
    sums = {path: int(total) for path, total in _sums()(params).items()}
    parts = repr(config), sorted(processor.template.sources.items()), sorted(sums.items())
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


@cache
def _sums():
    import jax
    import jax.numpy as jnp

    from qwenvl_jax.params.specs import flatten

    def total(w):
        """A sum of the bits, weighted by place. Integers wrap, so their order on the devices does not matter."""
        bits = jax.lax.bitcast_convert_type(w, f"uint{8 * w.dtype.itemsize}").astype(jnp.uint32)
        for axis in range(w.ndim):
            bits = bits * (2 * jax.lax.broadcasted_iota(jnp.uint32, w.shape, axis) + 2 * axis + 3)
        return bits.sum(dtype=jnp.uint32)

    return jax.jit(lambda params: {path: total(w) for path, w in flatten(params).items()})
