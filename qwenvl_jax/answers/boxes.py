"""Boxes in texts, and the coordinates that they are in.

`to_model` and `from_model` change the numbers within a text, of people and models alike, and of the arguments of tool
calls; all else stays as it is. They change what `grounding` reads, in every form that it knows.

A model writes boxes in the coordinates of its family, `families.BOXES`. Datasets often have pixels of the stored
picture, which is larger than the resized picture that the model sees.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from qwenvl_jax.answers.grounding import THOUGHT, Object, Parsed, parse, places
from qwenvl_jax.answers.lenient import NUMBER
from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError, shown
from qwenvl_jax.types import COORDINATES, Visual

# Numbers that are no part of a word such as "bbox_2d"; in escaped JSON, "\\n" may stand before them.
_ALONE = re.compile(rf"(?:(?<![A-Za-z0-9_.])|(?<=\\[nrt])){NUMBER}(?![A-Za-z0-9_.])")
_BEGUN = re.compile(r"(?<![A-Za-z0-9_.])\.?[0-9]")  # the beginning of a number, or of a word such as 10px
# Forms that make numbers a box in any text; other forms do so only in a text that is said to have boxes.
_CERTAIN = ("bbox2d", "point2d", "<|box_start|>", "<|quad_start|>", "<point", "<points")
_FOREIGN = re.compile(r"<(?:loc|bin|patch_index)_?[0-9]{1,4}>")  # PaliGemma, Florence-2, Kosmos-2
_FRACTIONS = 'fractions from 0 to 1; multiply them by 1000 and say "boxes": "thousandths"'


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
    clip: bool = False  # bare pairs of numbers may then be times

    def of(self, coordinates: str) -> tuple[int, int]:
        """The largest x and y in these coordinates. Raises InputError for others, and for a picture without pixels."""
        check_coordinates(str(coordinates), "coordinates")
        if min(*self.original, *self.resized) < 1:
            raise InputError(f"{self} is of a picture without pixels; each side has at least one")
        return (1000, 1000) if coordinates == "thousandths" else getattr(self, coordinates)


def check_coordinates(name, what: str = "boxes") -> None:
    """Raises InputError unless it is one of COORDINATES or None. what: the name of the argument, for the message."""
    if name is not None and name not in list(COORDINATES):
        raise InputError(f"{what} is {shown(name)}; it must be one of {', '.join(COORDINATES)}")


def sizes(visual: Visual, config: Config) -> Sizes:
    resized = (visual.grid.w * config.vision.patch_size, visual.grid.h * config.vision.patch_size)
    return Sizes(visual.size or resized, resized, visual.kind == "video")


class _Place(NamedTuple):
    """A `grounding.Place` with what the text has there."""

    kind: str
    form: str
    points: tuple[tuple[float, float], ...]
    numbers: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]  # (start, end) of each number; () if it cannot be read
    words: str  # for messages

    @property
    def is_turned(self) -> bool:
        return len(self.numbers) == 5

    @property
    def is_fractions(self) -> bool:
        return all(0 <= n <= 1 for n in self.numbers) and any(n % 1 for n in self.numbers)

    def is_inside(self, limits: tuple[int, int]) -> bool:
        """Whether every point is in the picture and the second corner of a box is not left of or above the first."""
        (x1, y1), (x2, y2) = self.points[0], self.points[-1]
        in_order = self.kind != "box" or (x1 <= x2 and y1 <= y2)
        return in_order and all(0 <= x <= limits[0] and 0 <= y <= limits[1] for x, y in self.points)

    def is_chance(self, picture: Sizes, coordinates: str) -> bool:
        """Whether they are rather no coordinates: bare pairs that are times, a range or far outside."""
        if picture.clip and self.kind == "point" and self.form in ("", "plain"):
            return True
        return self.form == "plain" and (max(self.numbers) <= 1 or not self.is_inside(picture.of(coordinates)))


def to_model(text: str, pictures: Sequence[Sizes], target: str, source: str | None, learnt: bool = True) -> str:
    """A text of a record with its boxes in the model's coordinates, `target`, rounded to whole numbers.

    pictures: the pictures that the text may be about. A text before any picture is not changed.
    source: the coordinates of the text's boxes. None: the model's. Then only what is a box for certain is checked, and
        only in a `learnt` text.
    Raises InputError for what looks like a box and cannot be converted: it cannot be read, is outside its picture, has
    its corners exchanged or no area, has fractions, or may belong to pictures of different sizes.
    """
    for what, name in (("target", str(target)), ("source", source)):
        check_coordinates(name, what)
    sizes = list(dict.fromkeys(pictures))
    if not sizes or (source is None and not learnt):
        return text
    found = _places(text)
    if source is None:
        for place in found:
            _check_undeclared(place, sizes, target, text, alone=len(found) == 1)
        return text
    if foreign := _FOREIGN.search(text):
        raise InputError(f'the box {foreign[0]}… is in the form of another model; write "bbox_2d": [x1, y1, x2, y2]')
    found = [place for place in found if _is_box(place, sizes[0], source, learnt and place.words == text.strip())]
    if found and len(sizes) > 1:
        what = f"{len(sizes)} pictures of different sizes"
        said = f"a box ({found[0].words}) may belong to {what}; its coordinates cannot be converted"
        raise InputError(f"{said}; show one picture a message, or convert the boxes and leave out boxes")
    for place in found:
        _check(place, sizes[0], target, source)
    return _rewritten(text, found, sizes[0], source, target)


def from_model(text: str, picture: Sizes, source: str, target: str) -> str:
    """A model's answer with its boxes in `target` coordinates; what lies outside the picture is moved to its edge.

    source: the model's coordinates. A "rotate_rect" stays as it is, since stretching changes its angle; `converted`
    gives its corners.
    """
    for what, name in (("source", source), ("target", target)):
        check_coordinates(str(name), what)
    found = [p for p in _places(text) if p.spans and not p.is_turned and not p.is_chance(picture, source)]
    return _rewritten(text, found, picture, source, target)


def _places(text: str) -> list[_Place]:
    """What `grounding` reads in a text, and where the numbers stand.

    `grounding` is given a text in which no number occurs twice: of equal numbers, all but the first are changed in
    their last bits. So each number that it reads says where it stands, however the text writes it.
    """
    spans: dict[float, tuple[int, int]] = {}
    last: dict[float, float] = {}

    def unlike(found: re.Match) -> str:
        n = own = float(found[0])
        if math.isfinite(n):
            own = last.get(n, n)
            while own in spans:
                own = math.nextafter(own, math.inf)
            last[n], spans[own] = own, (found.start(), found.start() + len(found[0].rstrip(".")))
        return found[0] if own == n else repr(own)

    def original(part: str) -> str:
        return _ALONE.sub(lambda m: text[slice(*spans[float(m[0])])] if float(m[0]) in spans else m[0], part)

    out = []
    for part in THOUGHT.split(_ALONE.sub(unlike, text)):
        for kind, form, points, numbers, words in places(part):
            at = tuple(spans[n] for n in numbers if n in spans)
            if not at or len(at) < len(numbers):
                out.append(_Place("", form, (), (), (), _short(original(words[:200]).replace("Ellipsis", "…"))))
                continue
            start, end = min(at)[0], max(at)[1]
            while text[start - 1 : start] in ("[", "("):
                start -= 1
            while text[end : end + 1] in ("]", ")"):
                end += 1
            numbers = tuple(float(text[slice(*span)]) for span in at)
            corners = tuple((round(x, 4), round(y, 4)) for x, y in points)  # without the change of the last bits
            out.append(_Place(kind, form, corners, numbers, at, _short(text[start:end])))
    return out


def _is_box(place: _Place, picture: Sizes, source: str, whole: bool) -> bool:
    """Whether a place in a text that is said to have boxes is to be converted. Raises InputError if it cannot be.

    whole: it is all of an answer.
    """
    words = place.words
    if not place.spans:
        if len(_BEGUN.findall(words)) < 2:  # '{"bbox_2d": [x1, y1, x2, y2]}' shows the form
            return False
        raise InputError(f'the box {words} cannot be read; write "bbox_2d": [x1, y1, x2, y2] or "point_2d": [x, y]')
    if place.form in ("bbox", "bboxes"):
        said = f"the box {words} may be [x, y, width, height] or two corners"
        raise InputError(f'{said}; write "bbox_2d": [x1, y1, x2, y2], or leave out boxes')
    if place.is_turned:
        said = f"{words} has an angle, which changes with the sides of a picture"
        raise InputError(f'{said}; write its corners, "poly": [x1, y1, …], or leave out boxes')
    chance = place.is_chance(picture, source)
    if place.is_fractions and (whole or not chance):
        raise InputError(f"the box {words} has {_FRACTIONS}")
    return not chance


def _check(place: _Place, picture: Sizes, target: str, source: str) -> None:
    """Raises InputError if a place is not in its picture, or is a box without an area."""
    if not place.is_inside(picture.of(source)):
        raise InputError(f"{_outside(place.words, picture, source)}; correct it, or what boxes says")
    if place.kind == "box":
        sides = [(a[i], b[i]) for i in (0, 1) for a, b in [place.points]]
        told = [[_scaled(n, i, picture, source, target) for n in side] for i, side in enumerate(sides)]
        if any(a == b for a, b in told):
            where = "" if any(a == b for a, b in sides) else f" in {target} coordinates; raise max_pixels"
            raise InputError(f"the box {place.words} has no area{where or '; mend it'}, or leave it out")


def _check_undeclared(place: _Place, sizes: Sequence[Sizes], target: str, text: str, alone: bool) -> None:
    """Raises InputError if what is a box for certain, or may be the whole text, is not in the model's coordinates."""
    is_whole = alone and place.kind == "box" and not place.form and text.strip()[0] + text.strip()[-1] == "[]"
    if not place.spans or not (place.form in _CERTAIN or is_whole):
        return
    if place.is_fractions and (not is_whole or place.is_inside((1, 1))):
        raise InputError(f"the box {place.words} has {_FRACTIONS}")
    if any(place.is_inside(size.of(target)) for size in sizes):
        return
    if not is_whole or any(place.is_inside(size.original) for size in sizes):  # other lists of numbers are no box
        hint = 'say which coordinates they are: "boxes": "original"'
        raise InputError(f"{_outside(place.words, sizes[0], target)}; {hint}")


def _rewritten(text: str, found: Sequence[_Place], picture: Sizes, source: str, target: str) -> str:
    """The text with the numbers of these places in other coordinates."""
    if source == target:
        return text
    new = {
        span: str(_scaled(n, i % 2, picture, source, target))
        for place in found
        for i, (span, n) in enumerate(zip(place.spans, place.numbers, strict=True))
    }
    parts, done = [], 0
    for start, end in sorted(new):
        parts += [text[done:start], new[start, end]]
        done = end
    return "".join([*parts, text[done:]])


def _scaled(n: float, side: int, picture: Sizes, source: str, target: str) -> float:
    """A coordinate along a side (0: x), as a whole number and within the picture, unless it stays as it is."""
    if source == target:
        return n
    end = picture.of(target)[side]
    return round(min(max(n * end / picture.of(source)[side], 0), end))


def converted(parsed: Parsed, pictures: Sequence[Sizes], source: str, target: str, *, rounded: bool = False) -> Parsed:
    """Objects in `target` coordinates; what lies outside its picture is moved to the edge.

    pictures: those of the conversation, in order; a clip counts as one, and all its frames have its size. If there is
    one, every object is in it. Otherwise, an object in a picture that is not there counts as malformed. So does one
        with a NaN.
    source: the coordinates of the objects, one of COORDINATES. rounded: to whole numbers.
    There and back, a point moves by rounding errors of floats only. Rounded to whole model pixels or thousandths on the
    way, it moves by up to half of one along each side; that is more than an original pixel in a picture that was shrunk
    to less than half. Raises InputError for unknown coordinates.
    """
    for what, name in (("source", source), ("target", target)):
        check_coordinates(str(name), what)
    objects = [o._replace(image=0) if len(pictures) == 1 else o for o in parsed.objects]
    good = (o for o in objects if 0 <= o.image < len(pictures) and not any(math.isnan(n) for p in o.points for n in p))
    moved = [_moved(o, pictures[o.image], source, target, rounded) for o in good]
    return Parsed(moved, parsed.malformed + len(parsed.objects) - len(moved))


def _moved(o: Object, picture: Sizes, source: str, target: str, rounded: bool) -> Object:
    def along(side: int, n: float) -> float:
        end = picture.of(target)[side]
        moved = min(max(n * end / picture.of(source)[side], 0.0), float(end))
        return float(round(moved)) if rounded else moved

    return o._replace(points=tuple((along(0, x), along(1, y)) for x, y in o.points))


def parse_boxes(text: str, *, unlabelled: bool = False, points: bool = False) -> list[Box]:
    """The boxes in an answer, in any form that `grounding.parse` reads.

    unlabelled: also those without a label. points: also points, as boxes without an area.
    """
    kinds = ("box", "point") if points else ("box",)
    found = [o for o in parse(text).objects if o.kind in kinds and (o.label or unlabelled)]
    return [Box(o.label, *o.points[0], *o.points[-1]) for o in found]


def _outside(box: str, picture: Sizes, coordinates: str) -> str:
    width, height = picture.of(coordinates)
    where = "0 … 1000 along each side" if coordinates == "thousandths" else f"{width} × {height} pixels, {coordinates}"
    return f"the box {box} is outside its picture ({where}) or has its corners exchanged"


def _short(box: str) -> str:
    return box if len(box) <= 60 else f"{box[:57]}…"
