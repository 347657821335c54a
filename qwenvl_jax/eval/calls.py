"""Metrics of tool calls, as pure functions of strings: see `metrics`."""

import math
from collections.abc import Sequence

from qwenvl_jax.errors import InputError, shown


def tool_type(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction makes the calls of an answer, in order, by type alone, else 0: TM of arXiv:2409.12191.

    The type is the tool's name, and the argument `action` if it has one, as `computer_use` and `mobile_use` do.
    A prediction with a malformed call is never right.
    """

    def types(calls):
        return [(call.name, call.arguments.get("action")) for call in calls]

    calls = _predicted(prediction)
    return float(calls is not None and types(calls) in map(types, map(_calls, golds)))


def tool_call(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction makes the calls of an answer, in order, with equal arguments, else 0: EM of arXiv:2409.12191.

    The order of keys does not count, and 1 equals 1.0. Text beside the calls is ignored. Points must be equal, too:
    `tool_step` has the tolerance of benchmarks of phones. A prediction with a malformed call is never right.
    """
    calls = _predicted(prediction)
    return float(calls is not None and calls in map(_calls, golds))


def _calls(text: str) -> list:
    from qwenvl_jax.answers import tools

    return tools.parse(text).calls


def _predicted(text: str) -> list | None:
    """The calls of a prediction; None if one of them is malformed, since an agent would not get through it."""
    from qwenvl_jax.answers import tools

    turn = tools.parse(text)
    return None if turn.malformed else turn.calls


def tool_step(
    prediction: str, golds: Sequence[str], *, screen: tuple[float, float] | None = None, tolerance: float = 0.14
) -> float:
    """1 if the prediction does on a screen what an answer does, call by call, else 0: `tool_call` with tolerance.

    It is the EM of AitZ and AndroidControl as far as those who report it have said in public how they count:

    - A point is right in one of the answer's boxes, if the answer has [x1, y1, x2, y2], or a list of such boxes, in
      place of the point. Qwen's AndroidControl script uses the box of the element (issue 1155 of QwenLM/Qwen3-VL).
    - Another point is right within 14% of the screen: the distance, with x in widths and y in heights, is at most
      `tolerance`. That is the rule of Android in the Wild (arXiv:2307.10088), which OS-Atlas and UI-TARS follow, too.
      Its second rule, that both points may be in one element of the screen, needs the list of elements.
    - A swipe, from `coordinate` to `coordinate2`, is right if it goes up, down, left or right as the answer's does
      (issue 59 of bytedance/UI-TARS). A drag moves something: both of its ends count as points.
    - All other arguments must be equal, typed text too. A prediction with a malformed call is never right.

    screen: its (width, height) in the coordinates of the calls. Without it, points outside of boxes must be equal.
    An evaluation takes the size of the question's last picture.
    Raises InputError for a screen without an area and a tolerance that is not 0 or more.
    """
    if screen is not None and not (len(screen) == 2 and all(_is_number(side) and side > 0 for side in screen)):
        raise InputError(f"screen is {shown(screen)}; it must be (width, height), both above 0")
    if not (_is_number(tolerance) and tolerance >= 0):
        raise InputError(f"tolerance is {shown(tolerance)}; it must be a share of the screen, 0 or more")
    calls = _predicted(prediction)

    def is_right(gold: str) -> bool:
        wanted = _calls(gold)
        if calls is None or len(calls) != len(wanted):
            return False
        return all(_is_same_step(*pair, screen, tolerance) for pair in zip(calls, wanted, strict=True))

    return float(any(map(is_right, golds)))


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_same_step(call, wanted, screen, tolerance: float) -> bool:
    from qwenvl_jax.answers import shapes

    said, right = dict(call.arguments), dict(wanted.arguments)
    if call.name != wanted.name or said.keys() != right.keys():
        return False
    swipes = [
        _direction(*(shapes.numbers_of(a.get(key)) for key in ("coordinate", "coordinate2"))) for a in (said, right)
    ]
    if None not in swipes and "swipe" in (wanted.name, right.get("action")):
        if swipes[0] != swipes[1]:
            return False
        right = {key: value for key, value in right.items() if key not in ("coordinate", "coordinate2")}
    for key, value in right.items():
        is_point = shapes.KEYS.get(shapes.plain_key(key)) == "point"
        if not (_is_near(said[key], value, screen, tolerance) if is_point else said[key] == value):
            return False
    return True


def _direction(start: tuple[float, ...] | None, end: tuple[float, ...] | None) -> tuple[bool, int] | None:
    """(whether it is along y, -1 or 1; 0 without a movement); None unless it has two points."""
    if start is None or end is None or not len(start) == len(end) == 2:
        return None
    x, y = end[0] - start[0], end[1] - start[1]
    along = y if abs(y) > abs(x) else x
    return abs(y) > abs(x), (along > 0) - (along < 0)


def _is_near(said, right, screen, tolerance: float) -> bool:
    from qwenvl_jax.answers import shapes

    point, wanted = shapes.numbers_of(said), shapes.numbers_of(right)
    boxes = [wanted] if wanted and len(wanted) == 4 else []
    if isinstance(right, list) and not wanted:
        boxes = [box for box in map(shapes.numbers_of, right) if box and len(box) == 4]
    if not point or len(point) != 2 or not (boxes or (wanted and len(wanted) == 2)):
        return said == right
    x, y = point
    if boxes or not screen:
        return any(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in boxes) or point == wanted
    assert wanted
    return math.hypot((x - wanted[0]) / screen[0], (y - wanted[1]) / screen[1]) <= tolerance + 1e-9
