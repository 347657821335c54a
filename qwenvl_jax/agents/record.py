"""The record of a run: a folder of pictures and one file of JSON lines, which needs no model to be looked at again.

    steps.jsonl       {"task": …}, then a line per step, and at the end {"status": …, "text": …}
    000.png           the screenshot that the model saw before step 0
    000-action.png    the same with the action drawn on it

Each file is written under a temporary name and then renamed, so that a run that is killed leaves whole files.
"""

import html
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwenvl_jax.agents.actions import Action
from qwenvl_jax.answers import draw as drawing
from qwenvl_jax.answers.grounding import Object
from qwenvl_jax.answers.sheets import captioned
from qwenvl_jax.errors import InputError, shown

STEPS = "steps.jsonl"
_PICTURE = re.compile(r"[0-9]{1,9}\.png")


class Step(NamedTuple):
    """picture: the screenshot's file. action: None if the answer asks for nothing that can be done.

    box: where a click should be, (x1, y1, x2, y2), in recordings that a person wrote (see `phone`).
    """

    picture: str
    answer: str
    action: Action | None
    result: str  # what the model was told
    seconds: float  # from the start of the run to the end of the step
    box: tuple[float, float, float, float] | None = None


class Run(NamedTuple):
    """status: see `loop.run`; "" if the run was killed. text: the model's last words."""

    task: str
    steps: list[Step]
    status: str
    text: str


class Record:
    """Writes a run into a folder as it goes. Raises InputError if the folder holds a run already."""

    def __init__(self, folder, task: str):
        self.folder = Path(folder)
        if (self.folder / STEPS).exists():
            raise InputError(f"{self.folder} holds a run already; name another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"{self.folder}: cannot be made ({e.strerror})") from e
        self._lines: list[dict[str, Any]] = [{"task": task}]
        self._write()

    def add(self, step: Step, picture) -> None:
        """picture: the PIL image of the step's screenshot."""
        _save(picture, self.folder / step.picture)
        if step.action:
            _save(draw(picture, step.action), self.folder / _drawn(step.picture))
        line = step._asdict() | {"action": step.action._asdict() if step.action else None}
        self._lines.append({name: value for name, value in line.items() if name != "box"})
        self._write()

    def end(self, status: str, text: str) -> None:
        self._lines.append({"status": status, "text": text})
        self._write()

    def _write(self) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines)
        # Half of a surrogate pair becomes \udc80, which JSON reads back.
        _replace(self.folder / STEPS, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def read(folder, check: Callable[[Step], Step] = lambda step: step) -> Run:
    """A run from its folder. Raises InputError that names the file and line, also where `check` raises ValueError.

    check: returns the step that stands in the run for one that was read.
    """
    path = Path(folder) / STEPS
    try:
        lines = path.read_bytes().decode("utf-8-sig", "replace").split("\n")  # JSON's strings may have other breaks
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); name the folder of a run") from e
    task, steps, status, text = "", [], "", ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if "status" in value:
                status, text = str(value["status"]), str(value["text"])
            elif "picture" in value:
                steps.append(check(_step(value)))
            else:
                task = str(value["task"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
            raise InputError(f"{path}, line {number}: {shown(line)} is not a line of a run ({e})") from e
    return Run(task, steps, status, text)


def _only_known(value: dict, known: Sequence[str], what: str) -> None:
    if more := [key for key in value if key not in known]:
        raise ValueError(f"{shown(more[0])} is no part of {what}; it has {', '.join(known)}")


def _step(value: dict) -> Step:
    if not _PICTURE.fullmatch(value["picture"]):
        raise ValueError(f"picture is {shown(value['picture'])}; it must be a name such as 000.png")
    action = value.get("action")
    _only_known(value, Step._fields, "a line")
    if action is not None:
        _only_known(action, Action._fields, "an action")
        points = tuple((float(x), float(y)) for x, y in action.get("points", ()))
        action = Action(str(action.get("tool", "")), str(action["name"]), points, dict(action.get("arguments", {})))
    box = value.get("box")
    if box is not None:
        x1, y1, x2, y2 = map(float, box)
        box = x1, y1, x2, y2
    texts = (str(value.get("answer", "")), action, str(value.get("result", "")))
    return Step(value["picture"], *texts, float(value.get("seconds", 0)), box)


def replay(folder) -> Path:
    """Writes `replay.html` into a run's folder, a page that shows every step, and returns its path."""
    run = read(folder)
    rows = []
    for number, step in enumerate(run.steps):
        drawn = _drawn(step.picture)
        picture = drawn if (Path(folder) / drawn).exists() else step.picture
        said = describe(step.action) if step.action else "nothing that can be done"
        rows.append(
            f"<h2>{number}: {html.escape(said)}</h2>\n<p>{step.seconds:.1f} s</p>\n<img src='{picture}' alt=''>\n"
            f"<pre>{html.escape(step.answer)}</pre>\n<p>{html.escape(step.result)}</p>\n"
        )
    ended = f"{run.status or 'killed'}: {run.text}"
    page = (
        "<!doctype html>\n<meta charset='utf-8'>\n<title>Replay</title>\n"
        "<style>body { font-family: sans-serif; margin: 2em } img { max-width: 100%; border: 1px solid #888 }\n"
        "pre { white-space: pre-wrap; background: #eee; padding: 1em }</style>\n"
        f"<h1>{html.escape(run.task)}</h1>\n{''.join(rows)}<h2>{html.escape(ended)}</h2>\n"
    )
    path = Path(folder) / "replay.html"
    _replace(path, lambda file: file.write(page.encode("utf-8", "replace")))
    return path


def describe(action: Action) -> str:
    """An action in one line, such as "left_click (120, 48)"."""
    where = [f"({x:.0f}, {y:.0f})" for x, y in action.points]
    values = [f"{name} {shown(value)}" for name, value in action.arguments.items()]
    return " ".join([action.name, *where, *values])


def draw(picture, action: Action):
    """A copy of a PIL image with the action drawn on it: a point, a box, or a line to a point; its name is below."""
    points, objects = tuple(action.points), []
    if action.name == "zoom":
        objects.append(Object("", "box", points))
    elif points:
        objects += [Object("", "polygon", points)] * (len(points) == 2) + [Object("", "point", points[-1:])]
    return captioned(drawing.draw(picture, objects), describe(action))


def _drawn(picture: str) -> str:
    return picture.replace(".png", "-action.png")


def _save(picture, path: Path) -> None:
    _replace(path, lambda file: picture.convert("RGB").save(file, "PNG", compress_level=1))


def _replace(path: Path, write) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)
