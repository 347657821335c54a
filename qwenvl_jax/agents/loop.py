"""The loop of an agent: a model looks at a screenshot, asks for an action, and sees what came of it.

A model is any callable `model(messages, tools) -> text`. An Engine needs three lines:

    view = View.of(engine.processor)
    def model(messages, tools):
        return engine.generate([messages], tools=tools)[0].text
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from qwenvl_jax.agents.actions import ACTIONS, TOOLS, Action, View, read_action
from qwenvl_jax.agents.options import Limits
from qwenvl_jax.agents.record import Record, Step, describe
from qwenvl_jax.agents.schemas import schema
from qwenvl_jax.answers import tools as calls
from qwenvl_jax.answers.boxes import Sizes
from qwenvl_jax.errors import InputError, shown
from qwenvl_jax.inputs.media import load_image
from qwenvl_jax.options import build

ZOOM = "image_zoom_in_tool"
_UNREADABLE = (
    'the tool call cannot be read; write <tool_call>{"name": …, "arguments": {…}}</tool_call> and its JSON whole'
)
_NOT_DONE = "not done, since the call before it failed"
_ACTION = re.compile(rf"""["']action["']\s*:\s*["'](?:{"|".join(sorted(ACTIONS))})["']""")  # a call without a name
_LEAST_TOKENS = 256  # of an enlarged part of a picture, as in the cookbook


class Environment(Protocol):
    """What an agent acts on."""

    def screenshot(self) -> Any:
        """A PIL image of the screen."""

    def act(self, action: Action) -> str:
        """Does it, and returns a sentence for the model. Raises InputError, whose sentence the model gets."""

    def close(self) -> None:
        """Frees what it holds. `run` leaves this to its caller."""


class Still:
    """An environment that is one picture, to look at closely with image_zoom_in_tool."""

    def __init__(self, picture):
        self._picture = picture

    def screenshot(self):
        return self._picture

    def act(self, action: Action) -> str:
        raise InputError("a picture can only be looked at")

    def close(self) -> None:
        pass


class Outcome(NamedTuple):
    """How a run ended.

    status: "success" or "failure" (the model says so by terminate), "answered" (in words, without a call), "steps",
        "seconds" or "repeats" (a limit), or "error" (bad input, such as a prompt that is too long; `text` says which).
    messages: the whole conversation, with the pictures that stayed in it.
    """

    status: str
    text: str
    steps: list[Step]
    messages: list[dict]


def run(
    model: Callable[[list[dict], list[dict]], str],
    environment: Environment,
    task: str,
    *,
    tools: Sequence[str] = ("computer_use",),
    view: View | None = None,
    folder=None,
    **limits,
) -> Outcome:
    """Lets a model work on a task until it ends it, or a limit does.

    tools: names of tools, of `actions.TOOLS`; image_zoom_in_tool works on the pictures of the conversation.
    view: how the model sees pictures; the default is that of the official Qwen2.5-VL.
    folder: where the record goes (see `record`); None: nowhere. limits: fields of `Limits`.
    What is wrong with an answer goes back to the model as the tool's result. Raises InputError for bad options or a
    folder that holds a run. Other exceptions of the model and the environment pass; the record then ends with the last
    whole step.
    """
    if not tools or isinstance(tools, str) or not set(tools) <= set(TOOLS):
        raise InputError(f"tools is {shown(tools)}; it must be a list of some of {', '.join(TOOLS)}")
    options = build(Limits, limits)
    work = _Work(environment, view or View(), tuple(tools), options, Record(folder, task) if folder else None)
    try:
        status, text = work.go(model, task)
    except InputError as e:
        status, text = "error", str(e)
    if work.record:
        work.record.end(status, text)
    return Outcome(status, text, work.steps, work.messages)


class _Work:
    """The state of one run."""

    def __init__(self, environment, view: View, tools: tuple[str, ...], limits: Limits, record: Record | None):
        self.environment, self.view, self.tools, self.limits, self.record = environment, view, tools, limits, record
        self.steps: list[Step] = []
        self.messages: list[dict] = []
        self._screen: Any = None  # the newest screenshot, upright as the model sees it
        self._changed = False  # whether the model has not seen it yet
        self._pictures: list = []  # all that the conversation had; None in place of those left out
        self._sizes: list[Sizes] = []  # theirs
        self._items: list[tuple[list, int]] = []  # where they are or were: (content, index in it)
        self._parts: list[bool] = []  # which of them are parts of others
        self._start = time.monotonic()
        self._calls = self._same = 0
        self._last: Any = None

    def go(self, model, task: str) -> tuple[str, str]:
        self._screen = load_image(self.environment.screenshot())
        content: list = [_text(task)]
        self.messages.append({"role": "user", "content": content})
        self._show(self._screen, content)
        while not (ended := self._limit()):
            sizes = self.view.sizes(self._screen)
            answer = model([*self.messages], [schema(name, sizes, self.view.coordinates) for name in self.tools])
            if not isinstance(answer, str):
                raise InputError(f"the model returned {shown(answer)}; it must return the text of its answer")
            turn = calls.parse(answer, self.tools)
            if not turn.calls and not turn.malformed and _ACTION.search(turn.text):
                turn = turn._replace(malformed=1, first_malformed=0)
            if not turn.calls and not turn.malformed:
                self._add(answer, None, "", self._screen)
                return "answered", _words(turn)
            if ended := self._turn(turn, answer):
                return ended
        return ended

    def _turn(self, turn: calls.Turn, answer: str) -> tuple[str, str] | None:
        """Does what an answer calls for, one call after the other up to the first that fails."""
        reply = calls.message(turn, self._calls)
        self._calls += len(turn.calls)
        self.messages.append(reply)
        told: list[list[dict]] = []
        failed = False
        for number, call in enumerate(turn.calls):
            failed = failed or number == turn.first_malformed  # a call before it cannot be read
            if failed or self._limit():
                told.append([_text(_NOT_DONE)])
                continue
            action, content = self._do(call, answer)
            told.append(content)
            if action and action.name in ("terminate", "answer"):
                status, text = action.arguments.get("status"), action.arguments.get("text")
                return status or "answered", _words(turn) if text is None else text
            failed = action is None
        self.messages += calls.results(reply, told)
        if turn.malformed:
            self._add(answer, None, _UNREADABLE, self._screen)
            told.append([_text(_UNREADABLE)])
            self.messages.append({"role": "user", "content": told[-1]})
        if self._changed:
            self._show(self._screen, told[-1])
            self._changed = False
        return None

    def _do(self, call: calls.ToolCall, answer: str) -> tuple[Action | None, list[dict]]:
        """The action of a call, or None if it failed, and what the model is told."""
        seen, content = self._screen, [_text("")]
        action: Action | None = None
        try:
            if call.name not in self.tools:
                raise InputError(f"there is no tool {shown(call.name)}; the tools are {', '.join(self.tools)}")
            action = read_action(call, self.view.sizes(seen), self.view.coordinates, self._sizes)
            if action.tool == ZOOM:
                seen, result = self._zoom(action, content)
            elif action.name in ("terminate", "answer"):
                result = ""
            else:
                result = self.environment.act(action)
        except InputError as e:
            result, failed = str(e), True
        else:
            failed = False
        self._add(answer, action, result, seen)
        if action and action.tool != ZOOM and action.name not in ("terminate", "answer"):
            self._screen, self._changed = load_image(self.environment.screenshot()), True
        content[0] = _text(result)
        return None if failed else action, content

    def _zoom(self, action: Action, content: list[dict]) -> tuple[Any, str]:
        """Adds the part of a picture to `content`; returns the picture and a sentence."""
        index = action.arguments["picture"]
        picture = self._pictures[index]
        if picture is None:
            raise InputError(f"picture {index} is no longer in the conversation")
        part = picture.crop((*action.points[0], *action.points[1]))
        tokens = part.width * part.height / self.view.preprocessing.factor**2
        if tokens < _LEAST_TOKENS:
            scale = math.sqrt(_LEAST_TOKENS / tokens)
            part = part.resize((math.ceil(part.width * scale), math.ceil(part.height * scale)), 3)  # bicubic
        self._show(part, content, part=True)
        return picture, f"picture {len(self._pictures) - 1}, a part of picture {index}:"

    def _show(self, picture, content: list[dict], part: bool = False) -> None:
        """Adds a picture to the conversation, and leaves out older ones if there are too many: first parts of others.

        The newest screenshot stays, and so does the picture that is added.
        """
        self._sizes.append(self.view.sizes(picture))
        self._pictures.append(picture)
        self._parts.append(part)
        content.append(self.view.item(picture))
        self._items.append((content, len(content) - 1))
        screen = max(number for number, is_part in enumerate(self._parts) if not is_part)
        there = [number for number, picture in enumerate(self._pictures) if picture is not None]
        older = [number for number in there[:-1] if number != screen]
        for number in sorted(older, key=lambda n: not self._parts[n])[: max(len(there) - self.limits.pictures, 0)]:
            place, index = self._items[number]
            place[index] = _text(f"(picture {number} was here)")
            self._pictures[number] = None

    def _add(self, answer: str, action: Action | None, result: str, picture) -> None:
        seconds = time.monotonic() - self._start
        step = Step(f"{len(self.steps):03d}.png", answer, action, result, seconds)
        self.steps.append(step)
        asked = action or answer
        self._same = self._same + 1 if asked == self._last else 1
        self._last = asked
        if self.record:
            self.record.add(step, picture)

    def _limit(self) -> tuple[str, str] | None:
        if len(self.steps) >= self.limits.steps:
            return "steps", f"the limit of {self.limits.steps} steps is reached"
        if time.monotonic() - self._start > self.limits.seconds:
            return "seconds", f"the limit of {self.limits.seconds:g} seconds is reached"
        if self._same >= self.limits.repeats:
            last = describe(self._last) if isinstance(self._last, Action) else shown(self._last)
            return "repeats", f"the same came {self._same} times in a row: {last}"
        return None


def _words(turn: calls.Turn) -> str:
    """What an answer says after its thinking."""
    return turn.text[calls.thought(turn.text) :].strip()


def _text(text: str) -> dict:
    return {"type": "text", "text": text}
