"""Boxes, points and polygons with their labels, drawn on a picture; `sheets` draws them on the frames of a clip.

Sizes follow the picture. A picture whose shorter side is under SMALL pixels is enlarged by a whole factor, so that a
line of two pixels and letters of twelve have room. Colours are those of Okabe and Ito, which people with any form of
colour blindness tell apart; a white and a black line beside each keep it visible on any background.

Where no font of this machine has the letters of a label, its number is drawn, and `legend` says which label that is.
"""

import math
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageOps

from qwenvl_jax.answers.fonts import Fonts, clean, fitted
from qwenvl_jax.answers.grounding import Object
from qwenvl_jax.errors import InputError, shown

SMALL = 320  # pixels of the shorter side, to which smaller pictures are enlarged
_LONGEST = 4096  # pixels of the longer side that enlarging does not pass
_PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
LEAST_TEXT = 12  # pixels of the height of letters
_SYMBOLS = ("So", "Sk", "Cf")  # categories of emoji, and of what joins and colours them
_MOST_VAIN = 300  # searches for the place of a label
_SHARE = 0.45  # of the picture's width that a label takes at most

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels; x2 and y2 are not in it


class _Style(NamedTuple):
    """Pixels: width of lines, of the edge around them, radius of points, and height of letters."""

    line: int
    edge: int
    radius: int
    text: int


class _Shape(NamedTuple):
    kind: str
    points: list[tuple[float, float]]  # in pixels of the drawn picture
    bounds: Rectangle  # of the shape, clipped
    text: str
    colour: Colour


def draw(image: Image.Image, objects: Sequence[Object]) -> Image.Image:
    """A copy of a picture, RGB and upright, with objects drawn on it.

    objects: in pixels of the upright picture. Of `Object.image` nothing is read: give the objects of this picture.
        What lies outside is cut off; `outside` counts the objects of which nothing is seen.
    A picture whose shorter side is under SMALL pixels is enlarged by a whole factor. A label has the same colour in
    each picture, unless two labels of one picture would share it. A label that finds no free place is left out.
    """
    drawn = upright(image)
    factor = max(1, min(math.ceil(SMALL / min(drawn.size)), _LONGEST // max(drawn.size)))
    if factor > 1:
        drawn = drawn.resize((drawn.width * factor, drawn.height * factor), Image.Resampling.BICUBIC)
    look_of(objects).draw(drawn, objects, factor)
    return drawn


class Look(NamedTuple):
    """How objects look in all pictures that show them: the text of each name, and the colour of each label."""

    fonts: Fonts
    texts: dict[str, str]
    colours: dict[str, Colour]

    def draw(self, picture: Image.Image, objects: Sequence[Object], scale: float) -> None:
        """Draws on an RGB picture itself. scale: pixels of the picture per pixel of the objects."""
        shapes, size = [], (picture.width / scale, picture.height / scale)
        for thing in objects:
            if (points := _visible(thing, size)) is not None:
                points = [(x * scale, y * scale) for x, y in points]
                bounds = _bounds(points, picture.size)
                text, colour = self.texts[_name(thing)], self.colours[_class(thing)]
                shapes.append(_Shape(thing.kind, points, bounds, text, colour))
        style = _style(picture.size, shapes)
        least = min(2 * style.line + 1, *picture.size)
        shapes = [s._replace(bounds=_seen(s.bounds, least)) if s.kind == "box" else s for s in shapes]
        canvas = ImageDraw.Draw(picture)
        for shape in sorted(shapes, key=lambda s: _area(s.bounds), reverse=True):  # small ones stay on top
            _outline(canvas, shape, style)
        _Labels(canvas, shapes, style).write(self.fonts)


def look_of(objects: Sequence[Object]) -> Look:
    fonts = Fonts()
    return Look(fonts, _texts(objects, fonts), _colours(objects))


def outside(size: tuple[int, int], objects: Sequence[Object]) -> int:
    """How many of the objects show nothing in an upright picture of `size`, (width, height) in pixels."""
    return sum(_visible(thing, size) is None for thing in objects)


def legend(objects: Sequence[Object]) -> dict[str, str]:
    """What `draw` writes in place of the labels that no font of this machine has the letters of: {"#1": label}."""
    return {
        text: name
        for name, text in _texts(objects, Fonts()).items()
        if clean(name) and text != clean(name) and text[0] == "#"
    }


def upright(image: Image.Image) -> Image.Image:
    """A new RGB picture, turned as its EXIF block says, with white where it is transparent."""
    if not isinstance(image, Image.Image):
        raise InputError(f"{shown(image)} is no PIL picture; open it with `inputs.media.load_image`")
    if 0 in image.size:
        raise InputError("the picture has no pixels")
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:  # the EXIF block is damaged; Pillow raises anything
        turned = image
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        canvas = Image.new("RGB", turned.size, (255, 255, 255))
        canvas.paste(turned, mask=turned.getchannel("A"))
        return canvas
    if turned.mode.startswith("I") or turned.mode == "F":  # of 16 bits and more; `convert` would clip them
        import numpy as np

        values = np.nan_to_num(np.asarray(turned, np.float64), posinf=0, neginf=0)
        values -= values.min()
        turned = Image.fromarray((values * (255 / (values.max() or 1))).astype(np.uint8))
    copy = turned.convert("RGB")
    return copy.copy() if copy is image else copy


def _visible(thing: Object, size: tuple[float, float]) -> list[tuple[float, float]] | None:
    """The points of an object, cut off at the edges of a picture; None if nothing of it is seen."""
    try:
        points = [(float(x), float(y)) for x, y in thing.points]
    except (TypeError, ValueError) as e:
        raise InputError(f"the points of {shown(thing)} must be pairs of numbers, (x, y)") from e
    least = {"box": 2, "point": 1, "polygon": 2}.get(thing.kind)
    if least is None or len(points) < least or any(math.isnan(v) for point in points for v in point):
        return None
    across, down = [x for x, _ in points], [y for _, y in points]
    if max(across) < 0 or max(down) < 0 or min(across) > size[0] or min(down) > size[1]:
        return None
    if thing.kind == "polygon":  # far corners keep roughly their direction
        limits = [(-4 * side, 5 * side) for side in size]
    else:
        limits = [(0, side) for side in size]
    (x1, x2), (y1, y2) = limits
    return [(min(max(x, x1), x2), min(max(y, y1), y2)) for x, y in points]


def _bounds(points: list[tuple[float, float]], size: tuple[int, int]) -> Rectangle:
    """The pixels around points, within the picture; at least one pixel."""
    across, down = [x for x, _ in points], [y for _, y in points]
    x1, y1 = (min(max(math.floor(min(v)), 0), side - 1) for v, side in ((across, size[0]), (down, size[1])))
    x2, y2 = (min(math.ceil(max(v)), side) for v, side in ((across, size[0]), (down, size[1])))
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


def _area(bounds: Rectangle) -> int:
    return (bounds[2] - bounds[0]) * (bounds[3] - bounds[1])


def _style(size: tuple[int, int], shapes: list[_Shape]) -> _Style:
    """Lines and letters for a picture. They are finer where there are many shapes, or low ones, as lines of text."""
    side, heights = math.sqrt(size[0] * size[1]), sorted(s.bounds[3] - s.bounds[1] for s in shapes if s.kind != "point")
    crowd = min(1.0, max(0.55, (20 / max(len(shapes), 1)) ** 0.25))
    line = max(2, round(side * 0.0035 * crowd))
    text = side * 0.024 * crowd
    if len(heights) > 4:
        text = min(text, max(heights[len(heights) // 2] * 0.7, side * 0.012))
    return _Style(line, max(1, line // 3), 2 * line + 1, max(LEAST_TEXT, round(text)))


def _outline(canvas: ImageDraw.ImageDraw, shape: _Shape, style: _Style) -> None:
    """Draws one shape: its line in its colour, beside a white and a black one."""
    colour, (line, edge, radius, _) = shape.colour, style
    if shape.kind == "box":
        x1, y1, x2, y2 = shape.bounds
        for out, shade, width in ((edge, _WHITE, edge), (0, colour, line), (-line, _BLACK, edge)):
            if x2 - x1 + 2 * out > 0 and y2 - y1 + 2 * out > 0:
                canvas.rectangle((x1 - out, y1 - out, x2 - 1 + out, y2 - 1 + out), None, shade, width)
        return
    ring = [*shape.points, *shape.points[:2]]  # two more, for the joint at the first corner
    for more, shade in ((2 * edge, _WHITE), (edge, _BLACK), (0, colour)):
        if shape.kind == "point":
            canvas.circle(shape.points[0], radius + more, shade)
        else:
            canvas.line(ring, shade, line + 2 * more, "curve")


def _seen(bounds: Rectangle, least: int) -> Rectangle:
    """The rectangle; grown around its centre to sides of so many pixels, if both are shorter."""
    x1, y1, x2, y2 = bounds
    if max(x2 - x1, y2 - y1) >= least:
        return bounds
    across, down = (max(least - side, 0) for side in (x2 - x1, y2 - y1))
    return x1 - across // 2, y1 - down // 2, x2 + across - across // 2, y2 + down - down // 2


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever contrasts more with a colour, by the relative luminance of WCAG 2."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _BLACK if light > 0.179 else _WHITE


def _colours(objects: Sequence[Object]) -> dict[str, Colour]:
    """A colour for each label: by a checksum, or the next free one if another label of the picture has it."""
    sums = {label: zlib.crc32(label.encode("utf-8", "surrogatepass")) for label in set(map(_class, objects))}
    taken: dict[int, str] = {}
    found = {}
    for label in sorted(sums, key=lambda label: (sums[label], label)):
        slot = sums[label] % len(_PALETTE)
        while slot in taken and len(taken) < len(_PALETTE):
            slot = (slot + 1) % len(_PALETTE)
        taken[slot] = label
        value = int(_PALETTE[slot][1:], 16)
        found[label] = (value >> 16, value >> 8 & 255, value & 255)
    return found


def _class(thing: Object) -> str:
    """What has a colour of its own: the label, unless it is only the text that was read there."""
    return "" if thing.label in (thing.attributes.get("text_content"), thing.attributes.get("text")) else thing.label


def _name(thing: Object) -> str:
    """What an answer calls an object: its label and the part of it, or the text that was read there."""
    parts = [thing.label, *(thing.attributes.get(key) for key in ("sub_label", "text_content"))]
    names = [part for part in parts if isinstance(part, str) and part.strip()]
    return ", ".join(dict.fromkeys(names))


def _texts(objects: Sequence[Object], fonts: Fonts) -> dict[str, str]:
    """What is drawn for each name: its letters, without emoji that no font has; "#1" if no font has its letters."""
    found: dict[str, str] = {}
    missing = 0
    for name in dict.fromkeys(map(_name, objects)):
        found[name] = clean(name)
        if fonts.file(found[name]) is not None:
            continue
        words = clean("".join(c for c in name if unicodedata.category(c) not in _SYMBOLS))
        if words and fonts.file(words) is not None:  # a label with emoji
            found[name] = words
        else:
            missing += 1
            found[name] = f"#{missing}"
    return found


class _Labels:
    """Places the labels of one picture, small shapes first. It keeps a coarse map of what is taken."""

    def __init__(self, canvas: ImageDraw.ImageDraw, shapes: list[_Shape], style: _Style):
        import numpy as np

        self._canvas, self._style = canvas, style
        self._size = width, height = canvas.im.size
        self._cell = cell = max(1, style.text // 4)
        self._taken = np.zeros((height // cell + 2, width // cell + 2), bool)  # by labels and points
        self._things = self._taken.copy()  # the inside of the smaller shapes
        self._vain = 0  # how often there was no place nearby
        self._shapes = sorted(shapes, key=lambda s: _area(s.bounds))
        for shape in shapes:
            x1, y1, x2, y2 = grown = self._around(shape)
            if shape.kind == "point":
                self._taken[self._cells(grown)] = True
            elif 2 * _area(shape.bounds) < width * height:
                self._things[-(-y1 // cell) : y2 // cell, -(-x1 // cell) : x2 // cell] = True

    def write(self, fonts: Fonts) -> None:
        pad, height = max(2, self._style.text // 4), round(self._style.text * 1.4)
        room = min(self._size[0], max(round(self._size[0] * _SHARE), 8 * self._style.text)) - 2 * pad
        for shape in self._shapes:
            if not shape.text or height > self._size[1]:
                continue
            text, font = fitted(shape.text, fonts, self._style.text, room)
            left, _, right, _ = font.getbbox(text)
            width = math.ceil(right - left) + 2 * pad
            if text and (at := self._free(shape, width, height)):
                ink = ink_on(shape.colour)
                self._taken[self._cells(at)] = True
                self._canvas.rectangle((at[0], at[1], at[2] - 1, at[3] - 1), shape.colour, ink, max(1, pad // 4))
                self._canvas.text((at[0] + pad - left, (at[1] + at[3]) / 2), text, ink, font, "lm")

    def _around(self, shape: _Shape) -> Rectangle:
        """The pixels of a shape and its lines."""
        x1, y1, x2, y2 = shape.bounds
        more = 2 * self._style.edge + (self._style.radius if shape.kind == "point" else 0)
        return max(x1 - more, 0), max(y1 - more, 0), x2 + more, y2 + more

    def _cells(self, at: Rectangle) -> tuple[slice, slice]:
        cell = self._cell
        return slice(at[1] // cell, -(-at[3] // cell)), slice(at[0] // cell, -(-at[2] // cell))

    def _free(self, shape: _Shape, width: int, height: int) -> Rectangle | None:
        """The first place that is free: first one that hides no object either, then any, then any nearby.

        After _MOST_VAIN vain searches nearby, the picture counts as full, and only the usual places are tried.
        """
        if width > self._size[0]:
            return None
        places = list(self._places(shape, width, height))
        free = [at for at in places if not self._taken[self._cells(at)].any()]
        clear = (at for at in free if not self._things[self._cells(at)].any())
        if free:
            return next(clear, free[0])
        if self._vain == _MOST_VAIN:
            return None
        x, y = places[0][:2]
        nearby = (self._at(x + dx * height, y + dy * height, width, height) for dx, dy in _NEARBY)
        found = next((at for at in nearby if not self._taken[self._cells(at)].any()), None)
        self._vain += found is None
        return found

    def _places(self, shape: _Shape, width: int, height: int) -> Iterator[Rectangle]:
        """The usual places of a label: above, below and beside its shape, then in its corners."""
        x1, y1, x2, y2 = self._around(shape)
        right, inner = x2 - width, self._style.line + 2 * self._style.edge
        for x, y in (
            *((x1, y1 - height), (x1, y2), (right, y1 - height), (right, y2)),
            *((x2, y1), (x1 - width, y1), (x2, y2 - height), (x1 - width, y2 - height)),
            *((x1 + inner, y1 + inner), (right - inner, y2 - height - inner)),
        ):
            yield self._at(x, y, width, height)

    def _at(self, x: int, y: int, width: int, height: int) -> Rectangle:
        """The rectangle, moved into the picture."""
        x, y = min(max(x, 0), self._size[0] - width), min(max(y, 0), self._size[1] - height)
        return x, y, x + width, y + height


# Moves of a label away from its usual place, in its heights, near ones first.
_NEARBY = sorted(((x, y) for x in range(-8, 9) for y in range(-5, 6)), key=lambda at: at[0] ** 2 + 4 * at[1] ** 2)
