"""The tools of agents: their schemas for the prompt, and `read_action`, from a tool call to an `Action`.

    computer_use         a mouse and a keyboard
    mobile_use           a touchscreen
    image_zoom_in_tool   a part of a picture, enlarged ("thinking with images")

Source: the cookbooks of Qwen2.5-VL and Qwen3-VL (computer_use, mobile_agent, think_with_images) and Qwen-Agent. The
schemas are theirs word for word. A model that writes pixels of the resized screenshot gets Qwen2.5-VL's schema, and one
that writes thousandths gets Qwen3-VL's, which has three more actions. Both are read, whichever schema was given.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qwenvl_jax.answers.boxes import Sizes, converted
from qwenvl_jax.answers.grounding import Object, Parsed
from qwenvl_jax.answers.tools import ToolCall
from qwenvl_jax.errors import InputError, shown
from qwenvl_jax.families import family_of
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.inputs.preprocessing import Preprocessing, target_size
from qwenvl_jax.options import build

_LONGEST_WAIT = 60.0  # seconds
_LONGEST_TEXT = 10_000  # characters
_MOST_KEYS = 8
_LEAST_CROP = 28  # pixels along each side
_BUTTONS, _STATUSES = ["Back", "Home", "Menu", "Enter"], ["success", "failure"]
_NUMBER = re.compile(r"[+-]?[0-9]{1,9}(?:\.[0-9]{1,9})?")

# What each action takes; an argument with "?" may be missing. Without a coordinate, a click is where the pointer is.
_ARGUMENTS: dict[str, dict[str, str]] = {
    "computer_use": {
        "key": "keys", "type": "text", "mouse_move": "coordinate", "left_click": "coordinate?",
        "left_click_drag": "coordinate", "right_click": "coordinate?", "middle_click": "coordinate?",
        "double_click": "coordinate?", "triple_click": "coordinate?", "scroll": "pixels coordinate?",
        "hscroll": "pixels coordinate?", "wait": "time", "terminate": "status", "answer": "text",
    },
    "mobile_use": {
        "key": "text", "click": "coordinate", "long_press": "coordinate time", "swipe": "coordinate coordinate2",
        "type": "text", "system_button": "button", "open": "text", "wait": "time", "terminate": "status",
        "answer": "text",
    },
    "image_zoom_in_tool": {"zoom": "bbox_2d label? img_idx?"},
}  # fmt: skip
TOOLS = tuple(_ARGUMENTS)
ACTIONS = {name: needs for actions in _ARGUMENTS.values() for name, needs in actions.items()}


class Action(NamedTuple):
    """What a model asks for.

    points: in pixels of the screenshot as it was taken: of a click or move one, or none where the pointer is; of a
        swipe two; of a zoom the corners of the box, in its picture.
    arguments: the others, checked: "text", "keys" (a list), "pixels" (of the screenshot; positive is up, or to the
        right for hscroll), "time" (seconds), "button", "status", "label", "picture" (counted from 0).
    """

    tool: str
    name: str
    points: tuple[tuple[float, float], ...]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class View:
    """How a model sees pictures: the size that they are resized to, and the coordinates that it writes.

    `View.of(processor)` is right for a checkpoint. options: only min_pixels, max_pixels and resized_* are read.
    """

    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    coordinates: str = "resized"
    options: MediaOptions = field(default_factory=MediaOptions)

    @classmethod
    def of(cls, processor, **media) -> "View":
        """That of a checkpoint's Processor. media: MediaOptions by name, such as max_pixels; `item` passes them on."""
        return cls(processor.preprocessing, family_of(processor.config).BOXES, build(MediaOptions, media))

    def sizes(self, picture) -> Sizes:
        """picture: a PIL image; its sizes are those when it is upright. Raises MediaError for an extreme aspect."""
        original = picture.size[::-1] if _lies(picture) else picture.size
        height, width = target_size(original[1], original[0], self.preprocessing, self.options)
        return Sizes(original, (width, height))

    def item(self, picture) -> dict:
        """The item of a message that shows a PIL image, with these options."""
        names = ("min_pixels", "max_pixels", "resized_height", "resized_width")
        chosen = {name: getattr(self.options, name) for name in names if getattr(self.options, name) is not None}
        return {"type": "image", "image": picture, **chosen}


def _lies(picture) -> bool:
    """Whether a picture's EXIF block says that it must be turned by 90° to be upright."""
    try:
        return picture.getexif().get(0x0112) in (5, 6, 7, 8)
    except Exception:  # the EXIF block is damaged; Pillow raises anything
        return False


def read_action(call: ToolCall, screen: Sizes, coordinates: str = "resized", pictures: Sequence[Sizes] = ()) -> Action:
    """Checks a call and takes its coordinates to pixels of the original picture.

    screen: the newest screenshot. coordinates: the model's, one of `answers.boxes.COORDINATES`.
    pictures: all pictures of the conversation, for image_zoom_in_tool; none: the screenshot alone.
    Raises InputError; its sentence is what the model should read as the tool's result.
    """
    if call.name not in _ARGUMENTS:
        raise InputError(f"there is no tool {shown(call.name)}; the tools are {', '.join(TOOLS)}")
    known = _ARGUMENTS[call.name]
    name = "zoom" if call.name == "image_zoom_in_tool" else call.arguments.get("action")
    if not isinstance(name, str) or name not in known:
        said = "action is missing" if name is None else f"there is no action {shown(name)}"
        raise InputError(f"{said}; the actions of {call.name} are {', '.join(known)}")
    if "coordinate2" not in known[name] and (more := _second_place(known[name], call.arguments)):
        said = "a drag starts at the pointer: mouse_move to its start" if "drag" in name else "make one call for each"
        raise InputError(f"{name} takes one place, coordinate, and {more} is given, too; {said}")
    pictures = list(pictures) or [screen]
    points: list[tuple[float, float]] = []
    values: dict[str, Any] = {}
    for need in known[name].split():
        argument, optional = need.rstrip("?"), need.endswith("?")
        value = call.arguments.get(argument)
        if value is None and not optional:
            raise InputError(f"{name} needs {argument}, and it is missing")
        if argument == "img_idx":
            values["picture"] = _index(value, len(pictures))
        elif value is None:
            continue
        elif argument == "bbox_2d":
            screen = pictures[_index(call.arguments.get("img_idx"), len(pictures))]
            points += _box(value, screen, coordinates)
        elif argument.startswith("coordinate"):
            points.append(_point(argument, value, screen, coordinates))
        else:
            values[argument] = _READERS[argument](argument, value)
    if "pixels" in values:
        side = 0 if name == "hscroll" else 1
        values["pixels"] *= screen.original[side] / screen.of(coordinates)[side]
    return Action(call.name, name, tuple(points), values)


def playable(action: Action) -> Action:
    """A recorded action with its arguments as `read_action` gives them. Without a tool, one of any tool will do.

    Raises InputError if no call can ask for it.
    """
    wants = {tool: known[action.name] for tool, known in _ARGUMENTS.items() if action.name in known}
    wants = {tool: needs for tool, needs in wants.items() if action.tool in ("", tool)}
    said = f"there is no action {shown(action.name)}; the actions are {', '.join(ACTIONS)}"
    for needs in map(str.split, wants.values()):
        try:
            return _checked(action, needs)
        except InputError as e:
            said = str(e)
    raise InputError(said)


def _checked(action: Action, needs: Sequence[str]) -> Action:
    least, most = (sum(need.startswith("coordinate") for need in some) for some in (_must(needs), needs))
    if missing := [n for n in _must(needs) if n in ("text", "keys", "button") and n not in action.arguments]:
        raise InputError(f'{action.name} needs {missing[0]}: "arguments": {{"{missing[0]}": …}}')
    if not least <= len(action.points) <= most:
        said = f"{action.name} has {len(action.points)} points and needs {least or most}"
        raise InputError(f'{said}: "points": [[x, y], …]')
    readers = {name: _READERS[name] for name in (need.rstrip("?") for need in needs) if name in _READERS}
    if more := [name for name in action.arguments if name in _READERS and name not in readers]:
        raise InputError(f"{action.name} takes no {more[0]}; leave it out")
    read = {name: readers[name](name, value) for name, value in action.arguments.items() if name in readers}
    return action._replace(arguments=action.arguments | read)


def _must(needs: Sequence[str]) -> list[str]:
    return [need for need in needs if not need.endswith("?")]


def _second_place(needs: str, arguments: Mapping) -> str | None:
    """An argument beside `coordinate` that is a place, too. To pass it over would do something else than was asked."""
    others = [key for key, value in arguments.items() if "coordinate" in str(key).lower() and value is not None]
    return next((key for key in others if key != "coordinate"), None) if "coordinate" in needs else None


def _number(value):
    """A number that is written as a string, such as "-500", as a number; any other value as it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value


def _numbers(argument: str, value, count: int) -> list[float]:
    if isinstance(value, str) and len(value) < 200:  # "[100, 200]" or "(100, 200)"
        value = [float(n) for n in _NUMBER.findall(value)]
    if isinstance(value, Mapping) and set(value) == {"x", "y"}:
        value = [value["x"], value["y"]]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if isinstance(value, list | tuple):
        value = [_number(n) for n in value]
    if not isinstance(value, list | tuple) or len(value) != count or not all(map(_is_number, value)):
        form = "[x, y]" if count == 2 else "[x1, y1, x2, y2]"
        raise InputError(f"{argument} is {shown(value)}; it must be {form}, {count} numbers")
    return [float(n) for n in value]


def _original(points: Sequence[tuple[float, float]], picture: Sizes, coordinates: str) -> list[tuple[float, float]]:
    moved = converted(Parsed([Object("", "polygon", tuple(points), {})], 0), [picture], coordinates, "original")
    return list(moved.objects[0].points)


def _point(argument: str, value, screen: Sizes, coordinates: str) -> tuple[float, float]:
    x, y = _numbers(argument, value, 2)
    width, height = screen.of(coordinates)
    if not (0 <= x <= width and 0 <= y <= height):
        raise InputError(
            f"{argument} is [{x:g}, {y:g}], which is outside the screen: x is from 0 to {width}, y from 0 to {height}"
        )
    ((x, y),) = _original([(x, y)], screen, coordinates)
    return min(x, screen.original[0] - 1.0), min(y, screen.original[1] - 1.0)


def _box(value, picture: Sizes, coordinates: str) -> list[tuple[float, float]]:
    """The corners of a box within its picture, at least _LEAST_CROP pixels apart where the picture is as large."""
    x1, y1, x2, y2 = _numbers("bbox_2d", value, 4)
    width, height = picture.of(coordinates)
    if x2 <= x1 or y2 <= y1 or x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        where = f"picture, which is {width} × {height}"
        raise InputError(f"bbox_2d is {[x1, y1, x2, y2]}; it must be [left, top, right, bottom] within the {where}")
    (x1, y1), (x2, y2) = _original([(x1, y1), (x2, y2)], picture, coordinates)
    (x1, x2), (y1, y2) = _widened(x1, x2, picture.original[0]), _widened(y1, y2, picture.original[1])
    return [(x1, y1), (x2, y2)]


def _widened(low: float, high: float, end: int) -> tuple[float, float]:
    low, high = math.floor(low), math.ceil(high)
    size = min(max(high - low, _LEAST_CROP), end)
    start = min(max((low + high - size) // 2, 0), end - size)
    return float(start), float(start + size)


def _index(value, count: int) -> int:
    """Which picture; without a number, the newest."""
    if value is None:
        return count - 1
    number = _number(value)
    if not _is_number(number) or number != int(number) or not 0 <= number < count:
        must = f"it must be a whole number from 0 to {count - 1}" if count > 1 else "it must be 0, the only picture"
        raise InputError(f"img_idx is {shown(value)}; {must}")
    return int(number)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _text(argument: str, value) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise InputError(f"{argument} is {shown(value)}; it must be a string of at most {_LONGEST_TEXT} characters")
    return value


def _label(argument: str, value) -> str:
    """Nothing depends on it, so that anything will do."""
    return (value if isinstance(value, str) else shown(value))[:_LONGEST_TEXT]


def _keys(argument: str, value) -> list[str]:
    """["ctrl", "c"]; "ctrl+c" is the same."""
    given = [value] if isinstance(value, str) else value
    if isinstance(given, list) and all(isinstance(key, str) for key in given):
        keys = [part for key in given for part in ([key] if key.strip() in ("+", "") else key.split("+"))]
        keys = [key if key == " " else key.strip() for key in keys]
        if 0 < len(keys) <= _MOST_KEYS and all(keys):
            return keys
    raise InputError(f'{argument} is {shown(value)}; it must be a list of key names, such as ["ctrl", "c"]')


def _seconds(argument: str, value) -> float:
    number = _number(value)
    if not _is_number(number) or not 0 <= number <= _LONGEST_WAIT:
        raise InputError(f"{argument} is {shown(value)}; it must be seconds, from 0 to {_LONGEST_WAIT:g}")
    return float(number)


def _pixels(argument: str, value) -> float:
    number = _number(value)
    if not _is_number(number):
        raise InputError(f"{argument} is {shown(value)}; it must be a number of pixels")
    return float(number)


def _one_of(choices: list[str]):
    def read(argument: str, value) -> str:
        found = [choice for choice in choices if isinstance(value, str) and value.lower() == choice.lower()]
        if not found:
            raise InputError(f"{argument} is {shown(value)}; it must be one of {', '.join(choices)}")
        return found[0]

    return read


_READERS = {
    "text": _text, "label": _label, "keys": _keys, "time": _seconds, "pixels": _pixels, "button": _one_of(_BUTTONS),
    "status": _one_of(_STATUSES),
}  # fmt: skip
