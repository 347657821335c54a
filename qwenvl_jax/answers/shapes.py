"""Numbers of an answer → boxes, points and polygons. Their count decides, since models exchange the keys.

A shape is (kind, points, numbers), or None if the numbers cannot be read. kind, points: as in `grounding.Object`.
numbers: those of the text, in its terms: x and y in turn, or a width and height, or an angle at last.
"""

import html
import math
import re
from collections import deque
from collections.abc import Sequence

from qwenvl_jax.answers.lenient import CUT, NUMBER, number

# What the numbers under a key are; keys are compared without case, "_", "-" and spaces. A key with other values is an
# attribute, unless it is one of _CERTAIN.
KEYS = dict.fromkeys(("bbox2d", "bbox", "box2d", "box", "bboxes", "bboxes2d", "boxes", "boundingbox"), "box")
KEYS |= dict.fromkeys(("boundingboxes", "startbox", "endbox", "bndbox", "boundingpoly"), "box")
KEYS |= dict.fromkeys(("point2d", "point", "coordinate", "coordinate2", "startpoint", "endpoint"), "point")
KEYS |= dict.fromkeys(("points", "points2d", "coordinates", "center", "position"), "points")
KEYS |= dict.fromkeys(("poly", "polygon", "quad", "vertices", "corners", "segmentation", "location"), "polygon")
KEYS |= dict.fromkeys(("rotaterect", "rotatedrect", "rotatebox", "rotatedbox"), "rotated")
_CERTAIN = ("bbox2d", "bbox", "point2d", "poly", "polygon", "rotaterect")
_SIGNS = str.maketrans("", "", "_- ")
# The names of numbers, as plain keys. What stands behind the first two says the rest: corner, size or centre and size.
_STARTS = (("x1", "y1"), ("xmin", "ymin"), ("minx", "miny"), ("left", "top"), ("x", "y"))
_ENDS = (("x2", "y2"), ("xmax", "ymax"), ("maxx", "maxy"), ("right", "bottom"))
_SIZES = (("width", "height"), ("w", "h"))
_CENTERS = (("cx", "cy"), ("centerx", "centery"), ("xcenter", "ycenter"), ("xc", "yc"))
_CORNERS = (
    *((*start, *end) for start, end in zip(_STARTS, _ENDS, strict=False)),
    *((*start, *size) for start in (*_STARTS, *_CENTERS) for size in _SIZES),
    ("x", "y"),
    *_CENTERS,
)
_CORNERS = (("x0", "y0", "x1", "y1"), *_CORNERS)
_FIRST = {names[0] for names in _CORNERS}
# The names of corners: left or right, top or bottom.
_CORNER_NAMES = {
    f"{a}{b}": (side, end)
    for side, word in enumerate(("left", "right"))
    for end, others in enumerate((("top", "upper"), ("bottom", "lower")))
    for other in others
    for a, b in ((word, other), (other, word))
}
_CORNER_NAMES |= {"tl": (0, 0), "tr": (1, 0), "bl": (0, 1), "br": (1, 1)}
# What four numbers are, by the value of a key such as "format", or by the end of their own key: "bbox_xywh".
_LAYOUTS = dict.fromkeys(("xywh", "ltwh", "tlwh", "coco"), "size")
_LAYOUTS |= dict.fromkeys(("cxcywh", "xcycwh", "ccwh", "yolo"), "center")
_LAYOUTS |= dict.fromkeys(("yxyx", "tlbr", "yminxminymaxxmax"), "yx") | dict.fromkeys(("xyxy", "ltrb"), "corners")
_FORMATS = re.compile("(?:bbox|box|boundingbox|coordinates?)?(?:format|mode|layout)")
_LARGEST = 1e9
_SEPARATOR = re.compile("[,;，]")
_ATTRIBUTE = re.compile(r"""(?<![\w-])([\w-]++)\s*+=\s*+(?:"([^"]*+)"|'([^']*+)')""")
Shape = tuple[str, tuple[tuple[float, float], ...], tuple[float, ...]]
# Coordinates without marks: four numbers that are a line of their own, and two corners of a box by name.
LINE = re.compile(
    rf"^[ \t]*+({NUMBER}(?:[ \t]*+,[ \t]*+|[ \t]++){NUMBER}(?:(?:[ \t]*+,[ \t]*+|[ \t]++){NUMBER}){{2}})[ \t]*+$", re.M
)
_ANY_PAIR = rf"[(\[]\s*+({NUMBER})\s*+[,，]\s*+({NUMBER})\s*+[)\]]"
CORNER = re.compile(r"\b(?:top|upper)[ -]?left\b|左上", re.I)
CORNERS = re.compile(
    rf"(?:\b(?:top|upper)[ -]?left\b|左上)[^()\[\]]{{0,40}}{_ANY_PAIR}"
    rf"[^()\[\]]{{0,40}}(?:\b(?:bottom|lower)[ -]?right\b|右下)[^()\[\]]{{0,40}}{_ANY_PAIR}",
    re.I,
)
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


def under(what: str, value, layout: str = "") -> list:
    """What `shape` gives of each list of numbers in a value. layout: one of the values of _LAYOUTS, of four numbers."""
    if (numbers := numbers_of(value)) is not None:
        points = list(zip(numbers[::2], numbers[1::2], strict=False))
        if what == "points" and len(numbers) % 2 == 0 and numbers:
            return [shape("point", point) for point in points]
        return [_laid(numbers, layout) if layout and len(numbers) == 4 else shape(what, numbers)]
    if isinstance(value, dict):
        if names := corners_of(value):
            return [of_names({n: value[n] for n in names})]
        if (named := _named_corners(value)) and len(named) == len(value):
            return [_cornered({corner: value[key] for key, corner in named.items()})]
        value = list(value.values())
    if not isinstance(value, list):
        return [None]
    inner = [v for v in value if v is not CUT]
    if inner and all(pair_of(v) for v in inner):
        pairs = [pair_of(v) or () for v in inner]
        if what in ("point", "points"):
            return [shape("point", pair) for pair in pairs]
        return [None] if CUT in value else [shape(what, [n for pair in pairs for n in pair])]
    if inner and all(isinstance(v, list | dict) for v in inner):
        return [one for v in inner for one in under(what, v, layout)]
    return [None]


def of_object(value: dict) -> list[tuple[str, object, list]]:
    """(key, value, what `under` gives) of each place that an object has; they are taken out of it."""
    kinds = [(key, what) for key, inner in value.items() if (what := kind(key, inner))]
    said = next((v for k, v in value.items() if isinstance(v, str) and _FORMATS.fullmatch(plain_key(k))), "")
    said = _LAYOUTS.get(re.sub("[^a-z]", "", said.lower()) if len(said) < 60 else "", "")
    places = [
        (key, value[key], under(what, value.pop(key), _layout(key) or (said if what == "box" else "")))
        for key, what in kinds
    ]
    if any(read for _, _, read in places):
        return places
    if named := _named_corners(value):
        corners = {corner: value.pop(key) for key, corner in named.items()}
        return [(", ".join(map(str, named)), list(corners.values()), [_cornered(corners)])]
    if names := corners_of(value):
        numbers = {n: value.pop(n) for n in names}
        return [(", ".join(names), list(numbers.values()), [of_names(numbers)])]
    return places


def _layout(key) -> str:
    found = re.fullmatch(f"(?:bbox|bboxes|box|boxes|boundingbox)?({'|'.join(_LAYOUTS)})", plain_key(key))
    return _LAYOUTS[found[1]] if found else ""


def _laid(numbers: tuple[float, ...], layout: str) -> Shape | None:
    if layout == "yx":
        return shape("box", (numbers[1], numbers[0], numbers[3], numbers[2]))
    return shape("box", numbers) if layout == "corners" else _sized(numbers, layout == "center")


def _sized(numbers: tuple[float, ...], is_center: bool) -> Shape | None:
    """A box of x, y, width and height."""
    x, y, width, height = numbers
    x1, y1 = (x - width / 2, y - height / 2) if is_center else (x, y)
    points = ((x1, y1), (x1 + width, y1 + height))
    return ("box", points, numbers) if all(is_number(n) for point in points for n in point) else None


def _named_corners(value: dict) -> dict:
    """{key: corner} of an object with two opposite corners, or all four, by name; else {}."""
    found = {key: corner for key in value if (corner := _CORNER_NAMES.get(plain_key(key))) and pair_of(value[key])}
    corners = set(found.values())
    opposite = corners in ({(0, 0), (1, 1)}, {(1, 0), (0, 1)}) or len(corners) == 4
    return found if opposite and len(found) == len(corners) else {}


def _cornered(corners: dict) -> Shape | None:
    """The box of two opposite corners, or the polygon of four."""
    at = {corner: pair_of(value) or () for corner, value in corners.items()}
    if len(at) == 4:
        return shape("polygon", [n for corner in ((0, 0), (1, 0), (1, 1), (0, 1)) for n in at[corner]])
    if (0, 0) in at:
        return shape("box", (*at[0, 0], *at[1, 1]))
    return shape("box", (at[0, 1][0], at[1, 0][1], at[1, 0][0], at[0, 1][1]))


def corners_of(value: dict) -> tuple[str, ...]:
    """The keys of an object that have the numbers of a box or point by name; () for another object."""
    keys = {plain_key(key): key for key in value}
    if keys.keys().isdisjoint(_FIRST):
        return ()
    for names in _CORNERS:
        if all(n in keys and _number_of(value[keys[n]]) is not None for n in names):
            return tuple(keys[n] for n in names)
    return ()


def of_names(value: dict) -> Shape | None:
    """The shape of numbers by name; None if the names are not those of a box or point."""
    names = corners_of(value)
    numbers = tuple(float(_number_of(value[n]) or 0) for n in names)
    plain = tuple(map(plain_key, names))
    if plain[2:] in _SIZES:
        return _sized(numbers, plain[:2] in _CENTERS)
    return shape("box" if len(numbers) == 4 else "point", numbers)


def _number_of(value) -> float | None:
    """A number, which may be quoted."""
    read = number(value.strip()) if isinstance(value, str) and len(value) < 60 else value
    return read if is_number(read) else None


def pair_of(value) -> tuple[float, ...] | None:
    """(x, y) of [x, y], {"x": x, "y": y} or "x, y"; else None."""
    if isinstance(value, dict):
        names = corners_of(value)
        return tuple(float(_number_of(value[n]) or 0) for n in names) if len(names) == len(value) == 2 else None
    numbers = numbers_of(value)
    return numbers if numbers and len(numbers) == 2 else None


def of_tag(tag: str) -> tuple[dict[str, str], list]:
    """(other attributes, (x, y) of each point or None) of a tag: x1="…" y1="…" x2="…"; x1="1, 2" y1="3, 4" too."""
    said: dict[str, str] = {}
    pairs: list[dict[str, str]] = []  # the texts of x and y
    waiting: dict[tuple, deque] = {}  # (the side that is missing, number of the attribute): pairs
    for found in _ATTRIBUTE.finditer(tag):
        text = html.unescape(found[2] if found[2] is not None else found[3])
        side = re.fullmatch("([xy])([0-9]{0,9})", found[1])
        if not side:
            said[found[1]] = text
        elif halves := waiting.get(side.groups()):
            halves.popleft()[side[1]] = text
        else:
            pairs.append({side[1]: text})
            waiting.setdefault(("y" if side[1] == "x" else "x", side[2]), deque()).append(pairs[-1])
    places: list = []
    for pair in pairs:
        xs, ys = (floats(pair.get(side, "")) or () for side in "xy")
        places += zip(xs, ys, strict=True) if xs and len(xs) == len(ys) else [None]
    return said, places


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
    """(label, shape, attributes) of ["cat", x1, y1, x2, y2], also with a score, or ["cat", [x1, y1, x2, y2]]; or None.

    The label may be the last one.
    """
    if len(value) == 2 and isinstance(value[1], list):
        value = [value[0], *value[1]]
    labels, numbers = [v for v in value if isinstance(v, str)], [v for v in value if not isinstance(v, str)]
    at_an_end = value and (isinstance(value[0], str) or isinstance(value[-1], str))
    if len(labels) != 1 or not at_an_end or not all(map(is_number, numbers)) or len(numbers) not in (4, 5):
        return None
    if len(numbers) == 4:
        return (labels[0], shape("box", numbers_of(numbers)), {})
    scores = [i for i in (0, 4) if _is_score(numbers[i])]
    if len(scores) != 1:
        return None
    score = numbers.pop(scores[0])
    return labels[0], shape("box", numbers_of(numbers)), {"score": score}


def scored(value: list) -> list[tuple]:
    """(shape, score) of each of [[x1, y1, x2, y2, score], …]; [] for another list."""
    if not all(isinstance(v, list) and len(v) == 5 and all(map(is_number, v)) for v in value):
        return []
    if not all(_is_score(v[4]) and v[0] <= v[2] and v[1] <= v[3] and max(v[:4]) > 1 for v in value):
        return []
    return [(shape("box", numbers_of(v[:4])), v[4]) for v in value]


def _is_score(n: float) -> bool:
    return isinstance(n, float) and 0 <= n <= 1


def kind(key, value) -> str:
    """What the numbers in a value are, by its key; "" if the value does not say where something is."""
    plain = plain_key(key)
    what = "box" if _layout(key) else KEYS.get(plain, "")
    if not what or plain in _CERTAIN or numbers_of(value) is not None:
        return what
    if isinstance(value, dict):
        inner = list(value.values())
        is_place = corners_of(value) or _named_corners(value) or (len(inner) == 1 and kind("points", inner[0]))
        return what if is_place else ""
    holds = (
        isinstance(value, list) and value and (is_number(value[0]) or isinstance(value[0], list) or pair_of(value[0]))
    )
    return what if holds else ""


def plain_key(key) -> str:
    return key.lower().translate(_SIGNS) if isinstance(key, str) else ""
