"""A recorded phone (or computer): an environment of screenshots that knows which action comes next.

It plays the folder of a run (see `record`), or one that a person wrote, where "box" says how far off a click may be:

    {"task": "Open the settings"}
    {"picture": "000.png", "action": {"name": "click", "points": [[310, 950]]}, "box": [250, 900, 370, 1000]}
    {"picture": "001.png"}
"""

from pathlib import Path

from qwenvl_jax.agents.actions import Action, playable
from qwenvl_jax.agents.record import STEPS, Step, read
from qwenvl_jax.errors import InputError
from qwenvl_jax.inputs.media import load_image

_NEAR = 0.05  # of the screen's shorter side: how far a point may be from the recorded one, where there is no box
_PASSED_OVER = ("wait", "terminate", "answer", "zoom")  # they change no screen


class RecordedPhone:
    """Shows each screenshot until the recorded action comes; another action changes nothing.

    at: which screenshot it shows, counted from 0. wrong: how many actions changed nothing.
    Raises InputError that names the file and line for a folder that cannot be played.
    """

    def __init__(self, folder):
        self.at = self.wrong = 0
        self._folder = Path(folder)
        steps = read(folder, self._check).steps
        acting = [step for step in steps if step.action and step.action.name not in _PASSED_OVER]
        if not steps:
            raise InputError(f"{self._folder / STEPS} has no screenshot; each line needs a picture, such as 000.png")
        self._screens = acting if acting and acting[-1] is steps[-1] else [*acting, steps[-1]]

    def _check(self, step: Step) -> Step:
        """The step with its action as a model's call would be read. Raises ValueError if no call can ask for it."""
        if not (file := self._folder / step.picture).is_file():
            raise ValueError(f"there is no {step.picture} beside it")
        if step.action is None or step.action.name in _PASSED_OVER:
            return step
        action = playable(step.action)
        width, height = load_image(str(file)).size if action.points else (0, 0)
        for x, y in action.points:
            if not (0 <= x <= width and 0 <= y <= height):
                raise ValueError(f"the point {[x, y]} is not on {step.picture}, which is {width} × {height}")
        if len(action.points) == 2 and action.points[0] == action.points[1]:
            raise ValueError("the points are equal, so that the swipe goes nowhere")
        if step.box:
            x1, y1, x2, y2 = step.box
            if len(action.points) != 1 or not (x1 < x2 and y1 < y2):
                raise ValueError(f"box is {list(step.box)}; it must be [left, top, right, bottom] around one point")
            ((x, y),) = action.points
            if not (x1 <= x <= x2 and y1 <= y <= y2):
                raise ValueError(f"the point {[x, y]} is not in its box {list(step.box)}")
        return step._replace(action=action)

    @property
    def done(self) -> bool:
        """Whether the last screenshot is reached."""
        return self.at == len(self._screens) - 1

    def screenshot(self):
        return load_image(str(self._folder / self._screens[self.at].picture))

    def act(self, action: Action) -> str:
        if action.name in _PASSED_OVER:
            return "done"
        if self.done or not _same(action, self._screens[self.at], self.screenshot().size):
            self.wrong += 1
            return "nothing happened"
        self.at += 1
        return "done"

    def close(self) -> None:
        pass


def _same(action: Action, step: Step, size: tuple[int, int]) -> bool:
    """Whether an action is the one that was recorded, as far as a screen would tell."""
    expected = step.action
    if expected is None or action.name != expected.name or len(action.points) != len(expected.points):
        return False
    for name in ("text", "keys", "button"):
        mine, theirs = (str(a.arguments.get(name, "")).strip().casefold() for a in (action, expected))
        if mine != theirs:
            return False
    if action.arguments.get("pixels", 0.0) * expected.arguments.get("pixels", 0.0) < 0:
        return False
    if len(action.points) == 2:
        return _direction(action) == _direction(expected)
    for (x, y), (x0, y0) in zip(action.points, expected.points, strict=True):
        near = _NEAR * min(size)
        x1, y1, x2, y2 = step.box or (x0 - near, y0 - near, x0 + near, y0 + near)
        if not (x1 <= x <= x2 and y1 <= y <= y2):
            return False
    return True


def _direction(swipe: Action) -> tuple[bool, bool]:
    """(along x?, towards larger numbers?)"""
    (x1, y1), (x2, y2) = swipe.points
    along_x = abs(x2 - x1) > abs(y2 - y1)
    return along_x, (x2 > x1) if along_x else (y2 > y1)
