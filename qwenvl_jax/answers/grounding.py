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
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from qwenvl_jax.answers.loose import CUT, Reader
from qwenvl_jax.answers.shapes import (
    GROUP,
    KEYS,
    bare,
    cornered,
    corners_of,
    floats,
    is_pair,
    kind_under,
    numbers_of,
    shape_of,
    shapes_in,
    shapes_under,
)
from qwenvl_jax.errors import InputError, shown


class Object(NamedTuple):
    """One thing that an answer places in a picture.

    label: "" if the answer names nothing.
    kind: "box", "point" or "polygon".
    points: (x, y) pairs: two corners of a box, one pair of a point, the corners of a polygon in order.
    attributes: what else the answer says of it, such as text_content or sub_label.
    image: which picture or clip of the conversation, counted from 0.
    """

    label: str
    kind: str
    points: tuple[tuple[float, float], ...]
    attributes: dict = {}  # noqa: RUF012 - read only
    image: int = 0


class Parsed(NamedTuple):
    """The objects of an answer in text order. malformed: how many more look like objects but cannot be read."""

    objects: list[Object]
    malformed: int


# The first of these keys that an object has is its label. "label" is no attribute; the others are.
_LABELS = (
    *("label", "name", "text_content", "text", "object", "object_name", "instance", "category", "class", "class_name"),
    *("caption", "phrase", "title", "description", "type"),
)
_IMAGES = {"image", "image_id", "image_index", "image_idx", "picture", "picture_id", "img_id", "img_idx"}
_CALLS = ("arguments", "parameters")
_LISTS = ("objects", "detections", "results", "result", "instances", "items", "annotations", "data", "answer", *KEYS)

_N = r"[-+]?(?:[0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})(?:[eE][-+]?[0-9]{1,3})?"
_PAIR = rf"\(\s*+{_N}\s*+,\s*+{_N}\s*+\)"
_START = re.compile(
    r"""(?P<deep>(?:[\[{(]\s*+){25,}+)"""
    rf"""|(?P<json>\[(?=\s*+(?:[\[{{("']|{_N}[\s,]))|\{{(?=\s*+(?:["']|\w++\s*+[:：])))"""
    r"""|(?P<key>["'](?:bbox_2d|point_2d)["']\s*+:)"""
    r"""|(?P<ref><\|object_ref_start\|>|<ref>)"""
    r"""|(?P<mark><\|(?:box|quad)_start\|>|<(?:box|bbox|quad|points?)>"""
    r"""|\b(?:(?:start|end)_(?:box|point)|point)=["'](?!<))"""
    r"""|(?P<points><points?\s)"""
    rf"""|(?P<pairs>{_PAIR}(?:\s*+,?\s*+{_PAIR})*+)"""
)
_REF_END = re.compile(r"<\|object_ref_(?:start|end)\|>|<\|(?:box|quad)_start\|>")
_OLD_REF_END = re.compile(r"</?ref>|<(?:box|quad)>")
_TEXT = re.compile(r"[^<]*+")
_TAG = re.compile(r"""<points?\b((?:[^<>"']|"[^"<]*+"|'[^'<]*+')*+)>""")
_TAG_END = re.compile(r"</points?>")
_ATTRIBUTE = re.compile(r"""(?<![\w-])([\w-]++)\s*+=\s*+(?:"([^"]*+)"|'([^']*+)')""")
_RUN = re.compile(r"[-+.0-9eE,;\s()\[\]]*+")
_RUN_END = re.compile(r"""<\|(?:box|quad)_end\|>|</(?:box|bbox|quad|points?)>|["']""")
_LINE = re.compile(
    rf"^[ \t]*+({_N}(?:[ \t]*+,[ \t]*+|[ \t]++){_N}(?:(?:[ \t]*+,[ \t]*+|[ \t]++){_N}){{2}})[ \t]*+$", re.M
)
_HALF = re.compile(r"\s*+,?\s*+\([-+.0-9eE,\s]*+\Z")
_PICTURE = re.compile(
    r"\b(?:picture|image|photo|video)[ _#]{0,3}([0-9]{1,3})(?![0-9])"
    r"|(?:图片?|图像|视频)\s{0,3}([0-9]{1,3})|第\s?([0-9]{1,3})\s?[张幅]",
    re.I,
)
# The end of a sentence that leads to coordinates and names nothing.
_LEAD = re.compile(
    r"\b(?:bbox(?:_2d)?|coordinates?|answer|result|is|are|at|by)\W*+\Z|\bbounding box|坐标|边界框|[为是在]\W*+\Z", re.I
)
_AND = ("and", "&", "和", "以及", "与")


def parse(text: str) -> Parsed:
    """The objects in an answer. Reads any text, in time linear in its length; it never raises.

    Numbers of pictures in the text ("Picture 2:", {"image": 2}) count from 1, as prompts number them, unless one is 0.
    If the text has thinking in it, only what follows `</think>` is read.
    """
    return _Parser(text).parsed()


class _Parser:
    def __init__(self, text: str):
        if "“bbox_2d”" in text or "“point_2d”" in text:
            text = text.replace("“", '"').replace("”", '"')
        self.text = text
        self.reader = Reader(text)
        self.found: list[tuple[Object, int | None]] = []  # with the number of its picture, if the text says it
        self.malformed = 0
        self.lone: list[tuple[float, ...]] = []  # pairs of numbers, which are a point if the text has nothing else
        self.label, self.picture = "", None  # type: str, int | None
        self.ref: str | None = None  # a label that waits for its box
        self._endless = len(text) + 1

    def parsed(self) -> Parsed:
        done = max(self.text.rfind("</think>"), 0)
        while start := _START.search(self.text, done):
            prose = self.text[done : start.start()]
            if pictures := _PICTURE.findall(prose):
                self.picture = int("".join(pictures[-1]))
            done = getattr(self, f"_{start.lastgroup}")(start, prose)
        if not self.found and not self.malformed:
            self._plain()
        first = 0 if any(picture == 0 for _, picture in self.found) else 1
        return Parsed([o if n is None else o._replace(image=n - first) for o, n in self.found], self.malformed)

    def _plain(self) -> None:
        """Numbers without any mark: a box a line, or one point."""
        for line in _LINE.findall(self.text):
            self._add("", shape_of("point", floats(line)))
        if not self.found and len(self.lone) == 1:
            self._add("", shape_of("point", self.lone[0]))

    def _add(self, label: str, shape, attributes: dict | None = None, picture: int | None = None) -> None:
        """shape: (kind, points), or None if its numbers cannot be read."""
        if shape is None:
            self.malformed += 1
        else:
            self.found.append(
                (Object(label, shape[0], shape[1], attributes or {}), self.picture if picture is None else picture)
            )

    def _deep(self, start: re.Match, prose: str) -> int:
        """The last one of many brackets: no answer is nested so deeply."""
        return max(self.text.rfind(bracket, start.start(), start.end()) for bracket in "[{(")

    # --- JSON ---

    def _json(self, start: re.Match, prose: str) -> int:
        values, end = self.reader.read(start.start(), inside=start.lastgroup == "key")
        before = len(self.found), self.malformed
        for value in values:  # "cat: [x1, y1, x2, y2]"
            self._value(value, _name(prose) if prose.rstrip(" ").endswith((":", "：")) and bare(value) else "")
        if (len(self.found), self.malformed) != before:
            self.label, self.ref = "", None
        elif len(values) == 1 and (numbers := numbers_of(values[0])) and len(numbers) == 2:
            self.lone.append(numbers)
        return end

    _key = _json

    def _value(self, value, name: str = "", picture: int | None = None, explicit: bool = False) -> None:
        """Adds the objects in a value. name: the label of those without one. explicit: bare numbers are no object."""
        if isinstance(value, dict):
            self._dict(value, name, picture, explicit)
        elif isinstance(value, list) and (what := bare(value)):
            for shape in [] if explicit else shapes_under(what, value):
                self._add(name, shape, None, picture)
        elif isinstance(value, list):
            for one in value:
                self._value(one, name, picture, explicit)

    def _dict(self, value: dict, name: str, picture: int | None, explicit: bool) -> None:
        value = dict(value)
        for key in value.keys() & _IMAGES:
            if (n := _picture(value[key])) is not None:
                picture = n
                del value[key]
        if isinstance(text := value.get("arguments"), str) and text.startswith("{"):
            value["arguments"] = Reader(text).read(0)[0][0]
        kinds = [(key, kind) for key, inner in value.items() if (kind := kind_under(key, inner))]
        places = [shape for key, kind in kinds for shape in shapes_under(kind, value.pop(key))]
        if not places and (corners := corners_of(value)):
            places = [cornered(corners, [value.pop(n) for n in corners])]
        if not places:
            return self._children(value, name, picture, explicit)
        if CUT in value.values():  # its text ends in it
            self.malformed += 1
            return
        label = _label(value)
        attributes = {k: v for k, v in value.items() if k != "label" or not isinstance(v, str | int | float)}
        for shape in places:
            self._add(name if label is None else label, shape, attributes, picture)
        for key in [k for k, v in attributes.items() if isinstance(v, dict | list)]:
            before = len(self.found), self.malformed
            self._value(attributes[key], "", picture, explicit=True)
            if before != (len(self.found), self.malformed):  # it holds objects of its own
                del attributes[key]

    def _children(self, value: dict, name: str, picture: int | None, explicit: bool) -> None:
        """The objects in an object that has no place itself. A key may be their label: {"cat": [x1, y1, x2, y2]}."""
        own, points = _label(value) or name, all(bare(v) == "points" or is_pair(v) for v in value.values())
        for key, inner in value.items():
            if not isinstance(inner, dict | list) or (bare(inner) == "points" and not points):
                continue
            n = _picture(key)
            label = name if n is not None or key in _CALLS else own if own or key in _LISTS else str(key)
            inner = [inner] if points and is_pair(inner) else inner
            self._value(inner, label, picture if n is None else n, explicit)

    # --- control tokens, tags and pairs ---

    def _ref(self, start: re.Match, prose: str) -> int:
        old = start[0] == "<ref>"
        end = (_OLD_REF_END if old else _REF_END).search(self.text, start.end())
        closed = end is not None and end[0] in ("<|object_ref_end|>", "</ref>")
        stop = end.start() if end else _span(_TEXT, self.text, start.end())[1]
        label = self.text[start.end() : stop]
        self.ref = label.strip() if old or not closed else label
        return end.end() if end and closed else stop

    def _said(self, prose: str) -> str:
        """The label of numbers outside of JSON: the tokens before them, else the prose, else as the last ones."""
        if self.ref is not None:
            self.label, self.ref = self.ref, None
        elif (said := prose.strip(" \t\r\n,;.")) and said.casefold() not in _AND:
            self.label = _name(prose)
        return self.label

    def _mark(self, start: re.Match, prose: str) -> int:
        run, end = _span(_RUN, self.text, start.end())
        closed = _RUN_END.match(self.text, end)
        if not closed and not any(c.isdigit() for c in run) and not start[0].startswith("<|"):
            return end  # a tag of something else
        places = shapes_in(run, "quad" in start[0])
        if not closed and end == len(self.text) and not (run.rstrip().endswith((")", "]")) and _is_area(places[-1])):
            places[-1] = None  # the text ends in it
        label = self._said(prose) if start[0].startswith("<") else ""
        for shape in places:
            self._add(label, shape)
        return closed.end() if closed else end

    def _points(self, start: re.Match, prose: str) -> int:
        tag = _TAG.match(self.text, start.start())
        if not tag:
            self.malformed += 1
            return start.end()
        said = {m[1]: html.unescape(m[2] if m[2] is not None else m[3]) for m in _ATTRIBUTE.finditer(tag[1])}
        places = [(said.pop(k), said.pop(f"y{k[1:]}", "")) for k in list(said) if re.fullmatch("x[0-9]{0,9}", k)]
        inner, end = "", tag.end()
        if not tag[1].endswith("/"):
            text, end = _span(_TEXT, self.text, end)
            if closed := _TAG_END.match(self.text, end):
                inner, end = html.unescape(text), closed.end()
            elif text.strip() and end == len(self.text) and "alt" not in said:
                places = []  # the text ends in the label
        label = inner if inner.strip() and inner.strip() != said.get("alt") else said.get("alt", inner.strip())
        if said.get("alt") == label:
            del said["alt"]
        for x, y in places or [("", "")]:
            self._add(label, shape_of("point", floats(f"{x} {y}")), dict(said))
        self.label, self.ref = "", None
        return end

    def _pairs(self, start: re.Match, prose: str) -> int:
        end, shapes = start.end(), shapes_in(start[0])
        points = len(GROUP.findall(start[0]))
        half = _HALF.match(self.text, end)
        if points == 1 and not half:
            if not prose[-1:].isalnum() or not self.text[end:].strip(" .\n"):
                self.lone += shapes[0][1] if shapes[0] else ()
            return end
        if half and points % 2:
            shapes = shapes_in(start[0][: start[0].rindex("(")]) if points > 1 else []
        label = self._said(prose)
        for shape in shapes:
            self._add(label, shape)
        self.malformed += bool(half)
        return half.end() if half else end


def _span(pattern: re.Pattern, text: str, at: int) -> tuple[str, int]:
    """What a pattern that always matches finds at a place, and where that ends."""
    found = pattern.match(text, at)
    assert found
    return found[0], found.end()


def _is_area(shape) -> bool:
    return shape is not None and shape[0] != "point"


def _label(value: dict) -> str | None:
    for key in _LABELS:
        if key in value and isinstance(label := value[key], str | int | float) and not isinstance(label, bool):
            return str(label)
    return None


def _name(prose: str) -> str:
    """What the end of a text says about the numbers behind it: "" if it is only a sentence that leads to them."""
    line = _PICTURE.sub("", re.sub(r"<[^<>]*>", "", prose.rstrip().rpartition("\n")[2]))
    name = line.strip(" \t\r,;:：，、-*•`\"'.")
    touches = prose[-1:] and not prose[-1].isspace() and prose[-1] not in ":："
    return "" if not touches and _LEAD.search(name) else name


def _picture(value) -> int | None:
    """The number of a picture: 2 or "Picture 2"."""
    if isinstance(value, str) and (found := _PICTURE.fullmatch(value)):
        return int("".join(filter(None, found.groups())))
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1000 else None


# --- writing ---

FORMS = ("json", "tokens", "xml")


def write(objects: Sequence[Object], form: str = "json") -> str:
    """Objects as a model writes them, for training data; `parse` gives the same objects back.

    form: "json" is that of Qwen2.5-VL and Qwen3-VL, "tokens" the control tokens of Qwen2-VL, "xml" has points only.
    Numbers are written as they are: `boxes.converted` takes them to the coordinates of the model first.
    Raises InputError for an object that the form cannot say, such as attributes in tokens.
    """
    if form not in FORMS:
        raise InputError(f"form is {shown(form)}; it must be one of {', '.join(FORMS)}")
    text = {"json": _as_json, "tokens": _as_tokens, "xml": _as_xml}[form](objects)
    back = parse(text)
    if back != Parsed(list(objects), 0):
        wrong = next((o for o, b in zip(objects, back.objects, strict=False) if o != b), objects[-1])
        raise InputError(f"{shown(wrong)} cannot be written in the form {form}; write it as json, or change it")
    return text


def _as_json(objects: Sequence[Object]) -> str:
    keys, several = {"box": "bbox_2d", "point": "point_2d", "polygon": "poly"}, any(o.image for o in objects)
    lines = []
    for o in objects:
        item: dict = {keys[o.kind]: [_short(n) for point in o.points for n in point]}
        if (_label(o.attributes) or "") != o.label:
            item["label"] = o.label
        lines.append(json.dumps(item | o.attributes | ({"image": o.image + 1} if several else {}), ensure_ascii=False))
    return "[" + ",".join(f"\n\t{line}" for line in lines) + "\n]" if lines else "[]"


def _as_tokens(objects: Sequence[Object]) -> str:
    text, last = "", ("", 0 if not any(o.image for o in objects) else None)
    for o in objects:
        if o.image != last[1]:
            text += f"\nPicture {o.image + 1}: " if text else f"Picture {o.image + 1}: "
        if (o.label, o.image) != last:
            text += f"<|object_ref_start|>{o.label}<|object_ref_end|>"
        token = "quad" if o.kind == "polygon" else "box"
        points = ",".join(f"({_short(x)},{_short(y)})" for x, y in o.points)
        text, last = f"{text}<|{token}_start|>{points}<|{token}_end|>", (o.label, o.image)
    return text


def _as_xml(objects: Sequence[Object]) -> str:
    lines = []
    for (label, image), group in itertools.groupby(objects, lambda o: (o.label, o.image)):
        places = [point for o in group for point in o.points]
        numbers = " ".join(f'x{i}="{_short(x)}" y{i}="{_short(y)}"' for i, (x, y) in enumerate(places, 1))
        heading = f"Picture {image + 1}: " if any(o.image for o in objects) else ""
        label = html.escape(label)
        lines.append(f'{heading}<points {numbers} alt="{label}">{label}</points>')
    return "\n".join(lines)


def _short(n: float) -> float:
    """A whole number without ".0"."""
    return int(n) if math.isfinite(n) and n == int(n) else n
