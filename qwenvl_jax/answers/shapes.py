"""Numbers of an answer → boxes, points and polygons. Their count decides, since models exchange the keys.

A shape is (kind, points, numbers), or None if the numbers cannot be read. kind, points: as in `grounding.Object`.
numbers: those of the text, in its terms: x and y in turn, or a width and height, or an angle at last.
"""

import math
import re
from collections.abc import Sequence

from qwenvl_jax.answers.loose import CUT, number

# What the numbers under a key are; keys are compared without case, "_", "-" and spaces. A key with other values is an
# attribute, unless it is one of _CERTAIN.
KEYS = dict.fromkeys(("bbox2d", "bbox", "box2d", "box", "bboxes", "bboxes2d", "boxes", "boundingbox"), "box")
KEYS |= dict.fromkeys(("boundingboxes", "startbox", "endbox"), "box")
KEYS |= dict.fromkeys(("point2d", "point", "coordinate", "coordinate2", "startpoint", "endpoint"), "point")
KEYS |= dict.fromkeys(("points", "points2d", "coordinates", "center", "position"), "points")
KEYS |= dict.fromkeys(("poly", "polygon", "quad", "vertices", "corners", "segmentation", "location"), "polygon")
KEYS |= dict.fromkeys(("rotaterect", "rotatedrect", "rotatebox", "rotatedbox"), "rotated")
_CERTAIN = ("bbox2d", "bbox", "point2d", "poly", "polygon", "rotaterect")
_SIGNS = str.maketrans("", "", "_- ")
_CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("left", "top", "right", "bottom"),
    ("x", "y", "width", "height"),
    ("x", "y", "w", "h"),
    ("x", "y"),
)
_FIRST = {names[0] for names in _CORNERS}
_LARGEST = 1e9
_SEPARATOR = re.compile("[,;，]")
Shape = tuple[str, tuple[tuple[float, float], ...], tuple[float, ...]]
GROUP = re.compile(r"[(\[]([^()\[\]]*+)[)\]]")


def shape(what: str, numbers: Sequence[float] | None) -> Shape | None:
    """The shape of the numbers under a key. what: "box", "point", "points", "polygon" or "rotated"."""
    if numbers is None or not all(map(is_number, numbers)):
        return None
    n, points, numbers = len(numbers), tuple(zip(numbers[::2], numbers[1::2], strict=False)), tuple(numbers)
    if what == "rotated" and n == 5:
        return "polygon", _turned(*numbers), numbers
    if n == 2 and what != "box":
        return "point", points, numbers
    if n == 4:
        return "box", points, numbers
    return ("polygon", points, numbers) if n >= 6 and n % 2 == 0 else None


def _turned(x: float, y: float, width: float, height: float, degrees: float) -> tuple[tuple[float, float], ...]:
    """The corners of a rectangle around (x, y) that is turned clockwise, from its top left corner on."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = ((-width, -height), (width, -height), (width, height), (-width, height))
    return tuple((x + (a * cos - b * sin) / 2, y + (a * sin + b * cos) / 2) for a, b in corners)


def under(what: str, value) -> list:
    """What `shape` gives of each list of numbers in a value."""
    if (numbers := numbers_of(value)) is not None:
        points = list(zip(numbers[::2], numbers[1::2], strict=False))
        if what == "points" and len(numbers) % 2 == 0 and numbers:
            return [shape("point", point) for point in points]
        return [shape(what, numbers)]
    if isinstance(value, dict):
        if corners := corners_of(value):
            return [cornered(corners, [value[n] for n in corners])]
        value = list(value.values())
    if not isinstance(value, list):
        return [None]
    inner = [v for v in value if v is not CUT]
    if inner and all(map(is_pair, inner)):
        pairs = [numbers_of(v) or () for v in inner]
        if what in ("point", "points"):
            return [shape("point", pair) for pair in pairs]
        return [None] if CUT in value else [shape(what, [n for pair in pairs for n in pair])]
    if inner and all(isinstance(v, list | dict) for v in inner):
        return [one for v in inner for one in under(what, v)]
    return [None]


def corners_of(value: dict) -> tuple[str, ...]:
    """The keys of an object that have the numbers of a box or point by name; () for another object."""
    if value.keys().isdisjoint(_FIRST):
        return ()
    return next((names for names in _CORNERS if all(is_number(value.get(n)) for n in names)), ())


def cornered(names: Sequence[str], numbers: Sequence[float]) -> Shape | None:
    """The shape of numbers with names, one of _CORNERS."""
    x, y, *size = read = tuple(map(float, numbers))
    if names[2:3] in (("width",), ("w",)):
        corner = (x + size[0], y + size[1])
        return ("box", ((x, y), corner), read) if all(map(is_number, corner)) else None
    return shape("box" if size else "point", read)


def within(text: str, quad: bool = False) -> list:
    """The shapes in a run of numbers and brackets. quad: its pairs are the corners of one polygon."""
    read = [floats(group) for group in GROUP.findall(text)] or [floats(text)]
    groups = [group for group in read if group is not None and len(group) == 2]
    left = GROUP.sub("", text) if GROUP.search(text) else ""
    if len({len(group or ()) for group in read}) > 1 or any(c.isdigit() for c in left):
        return [None]
    if len(groups) < len(read):
        return [shape("point", group) for group in read]
    boxes = [(*a, *b) for a, b in zip(groups[::2], groups[1::2], strict=False)]
    if len(groups) == 2 or (len(groups) % 2 == 0 and not quad and all(a <= c and b <= d for a, b, c, d in boxes)):
        return [shape("box", box) for box in boxes]
    if quad or len(groups) == 4:
        return [shape("polygon", [n for group in groups for n in group])]
    return [shape("point", group) for group in groups]


def is_number(value) -> bool:
    """Whether it may be a coordinate. NaN is not smaller than anything, and a truth value is no number."""
    return type(value) in (int, float) and abs(value) < _LARGEST


def numbers_of(value) -> tuple[float, ...] | None:
    """The numbers of a list of them, which may all be quoted, or of a text such as "[1, 2]"; else None."""
    if isinstance(value, str):
        return floats(value.strip("[]() ")) if len(value) < 1000 else None
    if not isinstance(value, list) or not value:
        return None
    if all(map(is_number, value)):
        return tuple(map(float, value))
    read = [number(v.strip()) for v in value] if all(isinstance(v, str) for v in value) else [None]
    return tuple(float(n) for n in read if n is not None) if None not in read else None


def floats(text: str) -> tuple[float, ...] | None:
    """The numbers of a text that has only numbers, white space, commas and semicolons; None for other texts."""
    read = [number(word) for word in _SEPARATOR.sub(" ", text).split()]
    return tuple(float(n) for n in read if n is not None) if read and None not in read else None


def is_pair(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and numbers_of(value) is not None


def bare(value) -> str:
    """What a list of numbers is that stands under no key: "box", "points" or "" for nothing."""
    if not isinstance(value, list) or not value:
        return ""
    if isinstance(value[0], list):
        kinds = {"points" if is_pair(v) and is_number(v[0]) else _flat(v) for v in value if v is not CUT}
        return kinds.pop() if len(kinds) == 1 else ""
    return _flat(value)


def _flat(value) -> str:
    if not isinstance(value, list) or not value:
        return ""
    numbers = [v for v in value if v is not CUT]
    if not all(map(is_number, numbers)):
        return ""
    return "box" if len(value) in (4, 8) or (value[-1] is CUT and 2 <= len(numbers) < 8) else ""


def row(value: list):
    """(label, shape) of ["cat", x1, y1, x2, y2], [x1, y1, x2, y2, "cat"] or ["cat", [x1, y1, x2, y2]]; else None."""
    if len(value) == 2 and isinstance(value[1], list):
        value = [value[0], *value[1]]
    if len(value) != 5:
        return None
    label, numbers = (value[0], value[1:]) if isinstance(value[0], str) else (value[4], value[:4])
    return (
        (label, shape("box", numbers_of(numbers))) if isinstance(label, str) and all(map(is_number, numbers)) else None
    )


def kind(key, value) -> str:
    """What the numbers in a value are, by its key; "" if the value does not say where something is."""
    plain = plain_key(key)
    what = KEYS.get(plain, "")
    if not what or plain in _CERTAIN or numbers_of(value) is not None:
        return what
    if isinstance(value, dict):
        return what if corners_of(value) else ""
    return what if isinstance(value, list) and value and (is_number(value[0]) or isinstance(value[0], list)) else ""


def plain_key(key) -> str:
    return key.lower().translate(_SIGNS) if isinstance(key, str) else ""
