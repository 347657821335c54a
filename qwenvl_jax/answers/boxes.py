"""Boxes in texts, and the coordinates that they are in.

Two forms are read, in texts of people and models alike:

    {"bbox_2d": [x1, y1, x2, y2], "label": "cat"}, {"point_2d": [x, y]}                              Qwen2.5-VL
    <|object_ref_start|>cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>                  Qwen2-VL

A model writes boxes in the coordinates of its family, `families.BOXES`. Datasets often have pixels of the stored
picture, which is larger than the resized picture that the model sees.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError, shown
from qwenvl_jax.types import Visual

# original: pixels of the stored picture, turned upright. resized: pixels of the picture that the model sees.
# thousandths: 0 to 1000 along each side.
COORDINATES = ("original", "resized", "thousandths")

_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_PAIR = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
_NUMBERS = re.compile(_NUMBER)
_JSON = r"""(?P<key>["'](?:bbox|point)_2d\\?["']\s*:\s*)\[(?=[^\]]*[0-9])[-+.0-9eE,\s\[\]]*\]"""
_MARKED = rf"(?P<mark><\|(?:box|quad)_start\|>\s*){_PAIR}(?:\s*,\s*{_PAIR})*"
_BARE = rf"{_PAIR}(?:\s*,\s*{_PAIR})+"  # the second form after its control tokens were left out
_CERTAIN = re.compile(f"{_JSON}|{_MARKED}")
_ANY = re.compile(f"{_JSON}|{_MARKED}|{_BARE}")


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


def to_model(text: str, pictures: Sequence[Sizes], target: str, source: str | None) -> str:
    """A text of a record with its boxes in the model's coordinates, `target`, rounded to whole numbers.

    pictures: the pictures that the text may be about.
    source: the coordinates of the text's boxes. None: the model's, and only a JSON key or <|box_start|> makes
        numbers a box, since the text may be about anything.
    Raises InputError for a box outside its picture or with its corners exchanged, and for a box that may belong to
    pictures of different sizes.
    """
    places = list(dict.fromkeys(pictures))

    def change(found: re.Match) -> str:
        numbers = [float(n) for n in _NUMBERS.findall(found[0][_head(found) :])]
        if source is None:
            if places and not any(_inside(numbers, place.of(target)) for place in places):
                hint = 'say which coordinates they are: "boxes": "original"' if target == "resized" else ""
                raise InputError(_outside(found[0], places[0], target, hint))
            return found[0]
        if len(places) != 1:
            what = "no picture" if not places else f"{len(places)} pictures of different sizes"
            raise InputError(f"a box ({_short(found[0])}) may belong to {what}; its coordinates cannot be converted")
        if not _inside(numbers, places[0].of(source)):
            raise InputError(_outside(found[0], places[0], source))
        return _scaled(found, places[0].of(source), places[0].of(target))

    return (_CERTAIN if source is None else _ANY).sub(change, text)


def from_model(text: str, picture: Sizes, source: str, target: str) -> str:
    """A model's answer with its boxes in `target` coordinates; what lies outside the picture is moved to its edge.

    source: the model's coordinates.
    """
    return _ANY.sub(lambda found: _scaled(found, picture.of(source), picture.of(target)), text)


def parse_boxes(text: str) -> list[Box]:
    """The boxes in an answer, in either form; JSON may stand in a ```json fence and may be broken.

    Broken JSON, cut off or without a comma, is read object by object. Objects without four numbers and a label are
    skipped. A single object needs no list around it.
    """
    if "bbox_2d" not in text:
        return _marked_boxes(text)
    fenced = re.search(r"```(?:json)?\s*(.*?)\s*(?:```|\Z)", text, re.S)
    try:
        objects = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        objects = [_broken(piece) for piece in text.split("{")[1:]]
    boxes = []
    for o in objects if isinstance(objects, list) else [objects]:
        box, label = (o.get("bbox_2d"), o.get("label")) if isinstance(o, dict) else (None, None)
        if isinstance(label, str) and isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)):
            boxes.append(Box(label, *map(float, box)))
    return boxes


def _marked_boxes(text: str) -> list[Box]:
    """Qwen2-VL's boxes; one label may have several. The control tokens may be missing."""
    boxes, label = [], ""
    text = re.sub(r"<\|(?:object_ref|box)_(?:start|end)\|>", "", text)
    for piece in re.split(rf"({_PAIR}\s*,\s*{_PAIR})", text):
        numbers = [float(n) for n in _NUMBERS.findall(piece)] if re.fullmatch(rf"{_PAIR}\s*,\s*{_PAIR}", piece) else []
        if len(numbers) == 4 and all(map(_is_finite, numbers)):
            boxes.append(Box(label, *numbers))
        elif name := piece.strip(" \t\r\n,;"):
            label = name
    return boxes


def _broken(piece: str) -> dict:
    """Box and label of one object, from the text after its brace; {} if either is missing."""
    numbers = r"\s*,\s*".join([f"({_NUMBER})"] * 4)
    box = re.search(rf"""["']bbox_2d["']\s*:\s*\[\s*{numbers}""", piece)
    label = re.search(r"""["']label["']\s*:\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')""", piece)
    if not (box and label):
        return {}
    return {"bbox_2d": [float(x) for x in box.groups()], "label": label[1] if label[1] is not None else label[2]}


def _is_finite(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e9


def _head(found: re.Match) -> int:
    """The length of the key or mark before the numbers; "bbox_2d" has a digit."""
    return len(found["key"] or found["mark"] or "")


def _inside(numbers: list[float], limits: tuple[int, int]) -> bool:
    """Whether every point is in the picture and, of two points, the second is not left of or above the first."""
    in_order = len(numbers) != 4 or (numbers[0] <= numbers[2] and numbers[1] <= numbers[3])
    return in_order and all(0 <= n <= limits[i % 2] for i, n in enumerate(numbers))


def _scaled(found: re.Match, source: tuple[int, int], target: tuple[int, int]) -> str:
    head, position = _head(found), 0
    if source == target:
        return found[0]

    def scale(number: re.Match) -> str:
        nonlocal position
        side, position = position % 2, position + 1
        return str(round(min(max(float(number[0]) * target[side] / source[side], 0), target[side])))

    return found[0][:head] + _NUMBERS.sub(scale, found[0][head:])


def _outside(box: str, picture: Sizes, coordinates: str, hint: str = "") -> str:
    width, height = picture.of(coordinates)
    where = "0 … 1000 along each side" if coordinates == "thousandths" else f"{width} × {height} pixels, {coordinates}"
    text = f"the box {_short(box)} is outside its picture ({where}) or has its corners exchanged"
    return f"{text}; {hint}" if hint else text


def _short(box: str) -> str:
    return box if len(box) <= 60 else f"{box[:57]}…"
