"""The things that an answer places in pictures: boxes, points and polygons.

`parse` reads these forms, several of them in one text too, with any prose around them:

    {"bbox_2d": [x1, y1, x2, y2], "label": "cat"}, {"point_2d": [x, y], …}, lists of them, [x1, y1, x2, y2]
    {"rotate_rect": [cx, cy, w, h, degrees], "text": "…"}, {"poly": [x1, y1, …]}                          OCR
    <|object_ref_start|>cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>, <|quad_start|>…    Qwen2-VL
    cat(x1,y1),(x2,y2)                                                                   without its control tokens
    <points x1="…" y1="…" x2="…" y2="…" alt="cat">cat</points>, <point x="…" y="…">cat</point>
    click(start_box='(x,y)'), <point>x y</point>, <ref>cat</ref><box>[[x1, y1, x2, y2]]</box>      UI-TARS and others

Broken JSON is read as far as it goes (`answers.loose`). The coordinates are those of the text;
`boxes.converted` takes them to others.
"""

import html
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qwenvl_jax.answers.loose import CUT, Reader, number
from qwenvl_jax.errors import InputError, shown


class Object(NamedTuple):
    """One thing that an answer places in a picture.

    label: "" if the answer names nothing.
    kind: "box", "point" or "polygon".
    points: (x, y) pairs. A box has two, its first and its last corner; a point has one; a polygon has its corners in order.
    attributes: what else the answer says of it, such as text_content or sub_label.
    image: which picture or clip of the conversation, counted from 0.
    """

    label: str
    kind: str
    points: tuple[tuple[float, float], ...]
    attributes: dict = {}  # noqa: RUF012 - read only
    image: int = 0


class Parsed(NamedTuple):
    """The objects of an answer in the order of its text; malformed: how many more look like objects but cannot be read."""

    objects: list[Object]
    malformed: int


def parse(text: str) -> Parsed:
    """The objects in an answer. Reads any text, in time linear in its length; it never raises."""
    raise NotImplementedError
