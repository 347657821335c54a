"""Boxes in texts, and the coordinates that they are in.

`to_model` and `from_model` change the numbers within a text, of people and models alike, and of the arguments of tool
calls. They read these forms; `grounding.parse` reads more, since it may misread a text that has no boxes.

    {"bbox_2d": [x1, y1, x2, y2], "label": "cat"}, {"point_2d": [x, y]}, {"coordinate": [x, y]}          Qwen2.5-VL
    <|object_ref_start|>cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>                     Qwen2-VL
    cat(x1,y1),(x2,y2) or [x1, y1, x2, y2], as the whole text
    {"poly": [x1, y1, x2, y2, …]}, <points x1="…" y1="…" x2="…" y2="…">cat</points>
    click(start_box='(x,y)'), <point>x y</point>, <box>[[x1, y1, x2, y2]]</box>                      UI-TARS and others

A model writes boxes in the coordinates of its family, `families.BOXES`. Datasets often have pixels of the stored
picture, which is larger than the resized picture that the model sees.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qwenvl_jax.answers.grounding import Object, Parsed, parse
from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError, shown
from qwenvl_jax.types import Visual

# original: pixels of the stored picture, turned upright. resized: pixels of the picture that the model sees.
# thousandths: 0 to 1000 along each side.
COORDINATES = ("original", "resized", "thousandths")

_NUMBER = r"[+-]?(?:[0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})(?:[eE][+-]?[0-9]{1,3})?"
_NUMBERS = re.compile(_NUMBER)
_LIST = r"""\[[-+.0-9eE,\s\[\]"']*\]"""
_RUN = r"[-+.0-9eE,\s()\[\]]*"
_TAG = r"""(?P<tag><points?\s(?:[^<>"']|"[^"<]*+"|'[^'<]*+')*+>)"""
_PLACE = re.compile(rf"""(?P<before>\b(?P<axis>[xy])[0-9]*\s*=\s*["']\s*)(?P<n>{_NUMBER})(?=\s*["'])""")
# What makes numbers a box in any text; and what does so only in a text that is said to have boxes.
_CERTAIN = re.compile(
    rf"""(?P<key>["'](?P<name>bbox_2d|point_2d)\\?["']\s*:\s*){_LIST}|(?P<mark><\|(?:box|quad)_start\|>){_RUN}|{_TAG}"""
)
_LIKELY = re.compile(
    rf"""(?P<key>["'](?P<name>bbox_2d|point_2d|coordinate2?|bbox|poly|polygon|rotate_rect)\\?["']\s*:\s*){_LIST}"""
    rf"""|(?P<mark><\|(?:box|quad)_start\|>|<box>|<point>|\b(?:(?:start|end)_(?:box|point)|point)=["']){_RUN}|{_TAG}"""
)
_BARE = re.compile(
    r"(?P<key>(?P<name>(?P<mark>(?P<tag>))))(?<![\s(,])\([0-9]{1,9},[0-9]{1,9}\),\([0-9]{1,9},[0-9]{1,9}\)"
)
_WHOLE = re.compile(rf"(?P<key>(?P<name>(?P<mark>(?P<tag>))))\s*{_LIST}\s*")


class Box(NamedTuple):
    """A labelled rectangle; its coordinates are those of the text that it was read from."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float


class Sizes(NamedTuple):
    """(width, height) of one picture before and after resizing."""

    original: tuple[int, int]
    resized: tuple[int, int]

    def of(self, coordinates: str) -> tuple[int, int]:
        """The largest x and y in these coordinates."""
        return (1000, 1000) if coordinates == "thousandths" else getattr(self, coordinates)


def check_coordinates(name) -> None:
    """Raises InputError unless it is one of COORDINATES or None."""
    if name is not None and name not in list(COORDINATES):
        raise InputError(f"boxes is {shown(name)}; it must be one of {', '.join(COORDINATES)}")


def sizes(visual: Visual, config: Config) -> Sizes:
    resized = (visual.grid.w * config.vision.patch_size, visual.grid.h * config.vision.patch_size)
    return Sizes(visual.size or resized, resized)


def to_model(text: str, pictures: Sequence[Sizes], target: str, source: str | None, learnt: bool = True) -> str:
    """A text of a record with its boxes in the model's coordinates, `target`, rounded to whole numbers.

    pictures: the pictures that the text may be about. A text before any picture is not changed.
    source: the coordinates of the text's boxes. None: the model's, which are only checked, and only in a `learnt` text.
    Raises InputError for a box outside its picture or with its corners exchanged, and for a box that may belong to
    pictures of different sizes.
    """
    places = list(dict.fromkeys(pictures))

    def change(found: re.Match, numbers: list[float]) -> str:
        if source is None:
            if not any(_inside(found, numbers, place.of(target)) for place in places):
                hint = 'say which coordinates they are: "boxes": "original"'
                raise InputError(f"{_outside(found[0], places[0], target)}; {hint}")
            return found[0]
        if found["name"] == "bbox":
            said = f"the box {_short(found[0])} may be [x, y, width, height] or two corners"
            raise InputError(f'{said}; write "bbox_2d": [x1, y1, x2, y2], or leave out boxes')
        if found["name"] == "rotate_rect":
            said = f"{_short(found[0])} has an angle, which changes with the sides of a picture"
            raise InputError(f'{said}; write its corners, "poly": [x1, y1, …], or leave out boxes')
        if len(places) > 1:
            what = f"{len(places)} pictures of different sizes"
            raise InputError(f"a box ({_short(found[0])}) may belong to {what}; its coordinates cannot be converted")
        if not _inside(found, numbers, places[0].of(source)):
            raise InputError(_outside(found[0], places[0], source))
        return _scaled(found, places[0].of(source), places[0].of(target))

    if not places or (source is None and not learnt):
        return text
    return _replaced(text, change, certain=source is None)


def from_model(text: str, picture: Sizes, source: str, target: str) -> str:
    """A model's answer with its boxes in `target` coordinates; what lies outside the picture is moved to its edge.

    source: the model's coordinates. A "rotate_rect" stays as it is, since stretching changes its angle; `converted`
    gives its corners.
    """
    return _replaced(text, lambda found, _: _scaled(found, picture.of(source), picture.of(target)))


def converted(parsed: Parsed, pictures: Sequence[Sizes], source: str, target: str, *, whole: bool = False) -> Parsed:
    """Objects in `target` coordinates; what lies outside its picture is moved to the edge.

    pictures: those of the conversation, in order; a clip counts as one, and all its frames have its size. If there is
    one, every object is in it. Otherwise, an object in a picture that is not there counts as malformed.
    source: the coordinates of the objects, one of COORDINATES. whole: round to whole numbers.
    There and back, a point moves by rounding errors of floats only. Rounded to whole model pixels or thousandths on the
    way, it moves by up to half of one along each side; that is more than an original pixel in a picture that was shrunk
    to less than half.
    """
    objects = [o._replace(image=0) if len(pictures) == 1 else o for o in parsed.objects]
    moved = [_moved(o, pictures[o.image], source, target, whole) for o in objects if o.image < len(pictures)]
    return Parsed(moved, parsed.malformed + len(parsed.objects) - len(moved))


def _moved(o: Object, picture: Sizes, source: str, target: str, whole: bool) -> Object:
    def along(side: int, n: float) -> float:
        end = picture.of(target)[side]
        moved = min(max(n * end / picture.of(source)[side], 0.0), float(end))
        return float(round(moved)) if whole else moved

    return o._replace(points=tuple((along(0, x), along(1, y)) for x, y in o.points))


def _replaced(text: str, change: Callable[[re.Match, list[float]], str], certain: bool = False) -> str:
    """The text with `change(match, its numbers)` in place of each box."""

    def one(found: re.Match) -> str:
        if found["tag"]:
            read = [place["n"] for place in _PLACE.finditer(found[0])]
        else:
            read = _NUMBERS.findall(found[0], _head(found))
        numbers = [n for n in map(float, read) if math.isfinite(n)]
        if found["name"] == "rotate_rect":
            return change(found, numbers) if len(numbers) == 5 else found[0]
        return change(found, numbers) if numbers and len(numbers) % 2 == 0 else found[0]

    if certain:
        return _CERTAIN.sub(one, text)
    if whole := _WHOLE.fullmatch(text):
        return one(whole) if len(_NUMBERS.findall(text)) % 4 == 0 else text
    if text.rstrip().endswith(")"):  # "cat(1,2),(3,4)" is a box, "the points (1,2),(3,4)" in a sentence are not
        text = _BARE.sub(one, text)
    return _LIKELY.sub(one, text)


def parse_boxes(text: str, *, unlabelled: bool = False, points: bool = False) -> list[Box]:
    """The boxes in an answer, in any form that `grounding.parse` reads.

    unlabelled: also those without a label. points: also points, as boxes without an area.
    """
    kinds = ("box", "point") if points else ("box",)
    found = [o for o in parse(text).objects if o.kind in kinds and (o.label or unlabelled)]
    return [Box(o.label, *o.points[0], *o.points[-1]) for o in found]


def _head(found: re.Match) -> int:
    """The length of the key or mark before the numbers; "bbox_2d" has a digit."""
    return len(found["key"] or found["mark"] or "")


def _inside(found: re.Match, numbers: list[float], limits: tuple[int, int]) -> bool:
    """Whether every point is in the picture and the second corner of a box is not left of or above the first."""
    is_box = len(numbers) == 4 and not found["tag"] and found["name"] not in ("point_2d", "coordinate", "coordinate2")
    in_order = not is_box or (numbers[0] <= numbers[2] and numbers[1] <= numbers[3])
    return in_order and all(0 <= n <= limits[i % 2] for i, n in enumerate(numbers))


def _scaled(found: re.Match, source: tuple[int, int], target: tuple[int, int]) -> str:
    head, position = _head(found), 0
    if source == target or found["name"] == "rotate_rect":
        return found[0]

    def scaled(number: str, side: int) -> str:
        return str(round(min(max(float(number) * target[side] / source[side], 0), target[side])))

    def scale(number: re.Match) -> str:
        nonlocal position
        position += 1
        return scaled(number[0], (position - 1) % 2)

    if found["tag"]:
        return _PLACE.sub(lambda place: place["before"] + scaled(place["n"], "xy".index(place["axis"])), found[0])
    return found[0][:head] + _NUMBERS.sub(scale, found[0][head:])


def _outside(box: str, picture: Sizes, coordinates: str) -> str:
    width, height = picture.of(coordinates)
    where = "0 … 1000 along each side" if coordinates == "thousandths" else f"{width} × {height} pixels, {coordinates}"
    return f"the box {_short(box)} is outside its picture ({where}) or has its corners exchanged"


def _short(box: str) -> str:
    return box if len(box) <= 60 else f"{box[:57]}…"
