"""The things that an answer places in pictures: boxes, points and polygons.

`parse` reads these forms, several of them in one text too, with any prose around them:

    {"bbox_2d": [x1, y1, x2, y2], "label": "cat"}, {"point_2d": [x, y], …}, lists of them, [x1, y1, x2, y2]
    {"rotate_rect": [cx, cy, w, h, degrees], "text": "…"}, {"poly": [x1, y1, …]}                          OCR
    <|object_ref_start|>cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>, <|quad_start|>…    Qwen2-VL
    cat(x1,y1),(x2,y2)                                                                   without its control tokens
    <points x1="…" y1="…" x2="…" y2="…" alt="cat">cat</points>, <point x="…" y="…">cat</point>
    <p data-bbox="x1 y1 x2 y2">, which `answers.documents` reads with its text                        Qwen2.5-VL
    click(start_box='(x,y)'), <point>x y</point>, <ref>cat</ref><box>[[x1, y1, x2, y2]]</box>      UI-TARS and others

Broken JSON is read as far as it goes (`answers.lenient`). The coordinates are those of the text;
`boxes.converted` takes them to others, and `writing.write` makes such texts.
"""

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from qwenvl_jax.answers import names, shapes
from qwenvl_jax.answers.lenient import CUT, NUMBER, Reader, is_cut, out_of_string


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


class Place(NamedTuple):
    """The numbers of an object as the text says them, or of something that looks like one and cannot be read.

    kind: that of the `Object`; "" if the numbers cannot be read.
    form: the key of its numbers as `shapes.plain_key` writes it, or the mark or tag; "" in JSON without a key; "four",
        "named" or "pairs" in prose; "plain" for what is an object only because the text has no other.
    points: as in `Object`.
    numbers: x and y in turn; or x, y, width and height; or those of a rotated rectangle. () if they cannot be read.
    text: the words of the text, for messages.
    """

    kind: str
    form: str
    points: tuple[tuple[float, float], ...]
    numbers: tuple[float, ...]
    text: str


class Parsed(NamedTuple):
    """The objects of an answer in text order. malformed: how many more look like objects but cannot be read."""

    objects: list[Object]
    malformed: int


_CALLS = ("arguments", "parameters")  # keys that hold objects and name nothing; these too:
_LISTS = set("objects detections results result instances items annotations data answer output response".split())
_LISTS |= {"predictions", "elements", *shapes.KEYS}

_PAIR = rf"\(\s*+{NUMBER}\s*+[,，]\s*+{NUMBER}\s*+\)"
_NAMED = [rf"\b{name}\s*+[=:]\s*+({NUMBER})" for name in ("x1?", "y1?", "x2", "y2")]
_START = re.compile(
    r"""(?P<deep>(?:[\[{(]\s*+){25,}+)"""
    rf"""|(?P<json>\[(?=\s*+(?:[\[{{("']|{NUMBER}[\s,]))|\{{(?=\s*+(?:["']|\w++\s*+[:：])))"""
    r"""|(?P<key>["'](?:bbox_2d|point_2d)["']\s*+:)"""
    r"""|(?P<ref><\|object_ref_start\|>|<ref>)"""
    r"""|(?P<mark><\|(?:box|quad)_start\|>|<(?:box|bbox|bndbox|quad|points?)>"""
    r"""|\b(?:(?:start|end)_(?:box|point)|point|bbox|polygon)=\\?["'](?!<))"""
    r"""|(?P<points><points?\s)"""
    rf"""|(?P<four>\(\s*+{NUMBER}(?:\s*+[,，]\s*+{NUMBER}){{3}}\s*+\))"""
    rf"""|(?P<named>{_NAMED[0]}[\s,]*+{_NAMED[1]}(?:[\s,]*+{_NAMED[2]}[\s,]*+{_NAMED[3]})?)"""
    rf"""|(?P<pairs>{_PAIR}(?:\s*+,?\s*+{_PAIR})*+)"""
)
_REF_END = re.compile(r"<\|object_ref_(?:start|end)\|>|<\|(?:box|quad)_start\|>")
_OLD_REF_END = re.compile(r"</?ref>|<(?:box|quad)>")
_TEXT = re.compile(r"[^<]*+")
_TAG = re.compile(r"""<points?\b((?:[^<>"']|"[^"<]*+"|'[^'<]*+')*+)>""")
_TAG_END = re.compile(r"</points?>")
_RUN = re.compile(r"[-+.0-9eE,;\s()\[\]]*+")
_RUN_END = re.compile(r"""<\|(?:box|quad)_end\|>|</(?:box|bbox|bndbox|quad|points?)>|["']""")
_XML_NUMBER = re.compile(rf"\s*+<(\w++)>\s*+({NUMBER})\s*+</\1>")
_XML = re.compile(rf"(?:\s*+<(\w++)>\s*+{NUMBER}\s*+</\1>){{2,9}}")
_HALF = re.compile(r"\s*+,?\s*+\([-+.0-9eE,\s]*+\Z")
_ESCAPED_KEY = re.compile(r'\\"(?:bbox_2d|point_2d)\\"')
THOUGHT = re.compile(r"</?think(?:ing)?>")


def parse(text: str, clips: Sequence[bool] = ()) -> Parsed:
    """The objects in an answer. Reads any text, in time linear in its length; it never raises.

    Meant for answers to a question about places: four numbers in brackets are a box in any sentence.
    Numbers of pictures in the text ("Picture 2:", {"image": 2}) count from 1, as prompts number them, unless one is 0;
    `img_idx` counts from 0.
    clips: for each picture and clip of the conversation, whether it is a clip. If it has both, "Picture 1" is the first
        picture and "Video 1" the first clip. Without it, the text is taken to speak of one kind only.
        An object in a clip has its time in its attributes, also if it is said around it: "At 00:05 …", {"00:05": …}.
    If the text has thinking in it, only what follows `</think>` is read; nothing of a thought that does not end.
    """
    return _Parser(text, clips).parsed()


def places(text: str) -> list[Place]:
    """The numbers of the objects that `parse` reads, in its order, and of those that it counts as malformed."""
    parser = _Parser(text)
    parser.parsed()
    return parser.places


class _Parser:
    def __init__(self, text: str, clips: Sequence[bool] = ()):
        if "“bbox_2d”" in text or "“point_2d”" in text:
            text = text.replace("“", '"').replace("”", '"')
        if _ESCAPED_KEY.search(text):
            text = out_of_string(text)
        self.text = text
        self.reader = Reader(text)
        self.found: list[tuple[Object, names.Picture | None, dict]] = []  # with its picture and time, if they are said
        self.clips, self.has_clips, self.times = clips, any(clips), names.Times()
        self.time: dict = {}  # as attributes: of the JSON object that is read now, or of what it is in
        self.malformed, self.places = 0, list[Place]()
        self.form = self.words = self.label = ""  # of the place that is read now; of the last object outside of JSON
        self.lone: list[tuple[float, ...]] = []  # pairs of numbers, which are a point if the text has nothing else
        self.picture: names.Picture | None = None
        self.ref: str | None = None  # a label that waits for its box
        self.run = 0  # the first of the last objects with only "and" between them

    def parsed(self) -> Parsed:
        done = begin = _begin(self.text)
        while start := _START.search(self.text, done):
            prose = self.text[done : start.start()]
            self._pictures(prose)
            if self.has_clips:
                self.times.read(prose, len(self.found))
            self.form, self.words = start.lastgroup or "", self.text[start.start() : start.start() + 80]
            done = getattr(self, f"_{start.lastgroup}")(start, prose)
        self._pictures(self.text[done : done + 200] if self.found or self.lone else "")
        if not self.found and not self.malformed:
            self._plain(self.text[begin:])
        first = 0 if any(p and p.kind != "index" and p.number == 0 for _, p, _ in self.found) else 1
        objects = [o if p is None else o._replace(image=names.index(p, first, self.clips)) for o, p, _ in self.found]
        if self.has_clips:
            self.times.read(self.text[done:], len(objects))
            for i, o in enumerate(objects):
                if o.image < len(self.clips) and self.clips[o.image]:
                    time = self.found[i][2] or self.times.of(i, len(objects))
                    objects[i] = o._replace(attributes=o.attributes | time)
        return Parsed(objects, self.malformed)

    def _pictures(self, prose: str) -> None:
        """Reads the names of pictures between two places. What a name stands behind is in its picture."""
        if (named := names.behind(prose)) is not None:
            for i in range(self.run, len(self.found)):
                thing, picture, time = self.found[i]
                self.found[i] = thing, named if picture is self.picture else picture, time
        if prose.strip(" ,，、&") not in ("", "and", "和", "以及", "与"):
            self.run = len(self.found)
        self.picture = names.last(prose, self.picture) if prose else self.picture

    def _plain(self, text: str) -> None:
        """Numbers without any mark: a box a line, one point, or "top left (x1, y1), bottom right (x2, y2)"."""
        self.form, self.words = "plain", text
        for line in shapes.LINE.findall(text):
            self._add("", shapes.shape("point", shapes.floats(line)))
        if self.found:
            return
        corners, done = list(shapes.CORNERS.finditer(text)), 0
        if corners and 2 * len(corners) == len(self.lone):
            for found in corners:
                prose, done = text[done : found.start()], found.end()
                self.picture = names.last(prose, self.picture)
                label = names.said(prose) if prose.rstrip(" *-").endswith((":", "：")) else ""
                self._add(label, shapes.shape("box", shapes.floats(" ".join(found.groups()))))
        elif len(self.lone) == 1:
            self._add("", shapes.shape("point", self.lone[0]))
        elif len(self.lone) == 2 and shapes.CORNER.search(text):
            self._add("", shapes.shape("box", (*self.lone[0], *self.lone[1])))
        elif self.lone and corners:
            self._malformed()

    def _add(self, label: str, shape, attributes: dict | None = None, picture: names.Picture | None = None) -> None:
        """shape: (kind, points, numbers), or None if its numbers cannot be read."""
        if shape is None:
            return self._malformed()
        self.places.append(Place(shape[0], self.form, shape[1], shape[2], self.words))
        if picture is None:
            picture = names.of_label(label)[0] or self.picture
        self.found.append((Object(label, shape[0], shape[1], attributes or {}), picture, self.time))

    def _malformed(self) -> None:
        self.malformed += 1
        self.places.append(Place("", self.form, (), (), self.words))

    def _deep(self, start: re.Match, prose: str) -> int:
        """The last one of many brackets: no answer is nested so deeply."""
        return max(self.text.rfind(bracket, start.start(), start.end()) for bracket in "[{(")

    # --- JSON ---

    def _json(self, start: re.Match, prose: str) -> int:
        values, end = self.reader.read(start.start(), inside=start.lastgroup == "key")
        before = len(self.found), self.malformed
        for value in values:  # "cat: [x1, y1, x2, y2]"
            name = ""
            if shapes.bare(value):
                is_named = prose.rstrip(" ").endswith((":", "："))
                name = names.said(prose) if is_named else names.listed(prose, self.text[end : end + 9])
            self._value(value, name)
        if (len(self.found), self.malformed) != before:
            self.label, self.ref = "", None
        elif len(values) == 1 and (numbers := shapes.numbers_of(values[0])) and len(numbers) == 2:
            self.lone.append(numbers)
        return end

    _key = _json

    def _value(self, value, name: str = "", picture: names.Picture | None = None, explicit: bool = False) -> None:
        """Adds the objects in a value. name: the label of those without one. explicit: bare numbers are no object."""
        if isinstance(value, dict):
            outer, self.time = self.time, names.time_of(value) or self.time if self.has_clips else {}
            self._dict(value, name, picture, explicit)
            self.time = outer
        elif isinstance(value, list) and not explicit and (row := shapes.row(value)):
            self.form, self.words = "", str(value)
            self._add(row[0] or name, row[1], row[2], picture)
        elif isinstance(value, list) and not explicit and (rows := shapes.scored(value)):
            self.form, self.words = "", str(value)
            for shape, score in rows:
                self._add(name, shape, {"score": score}, picture)
        elif isinstance(value, list) and (what := shapes.bare(value)):
            self.form, self.words = "", str(value)
            for shape in [] if explicit else shapes.under(what, value):
                self._add(name, shape, None, picture)
        elif isinstance(value, list):
            for one in value:
                self._value(one, name, picture, explicit)

    def _dict(self, value: dict, name: str, picture: names.Picture | None, explicit: bool) -> None:
        value = dict(value)
        for key in list(value):
            if (named := names.of_item(key, value[key])) is not None:
                picture = named
                del value[key]
        if isinstance(text := value.get("arguments"), str) and text.startswith("{"):
            value["arguments"] = Reader(text).read(0)[0][0]
        places = shapes.of_object(value)
        if not any(read for _, _, read in places):
            return self._children(value, name, picture, explicit)
        self.form, self.words = "", f'"{places[0][0]}": {places[0][1]}'
        if any(v is CUT for v in value.values()):  # its text ends in it
            return self._malformed()
        count = sum(len(read) for _, _, read in places)
        named, label = names.in_object(value, headed=picture is None)
        key, labels = names.parallel(value, count) if label is None and len(places) == 1 else (None, [])
        labels = labels or [name if label is None else label] * count
        attributes = {k: v for k, v in value.items() if k != "label" or isinstance(v, list | dict | bool)}
        attributes.pop(key, None)
        picture = picture or named or self.picture
        at = len(self.found)
        for key, numbers, read in places:
            self.form, self.words = shapes.plain_key(key), f'"{key}": {numbers}'
            for shape in read:
                self._add(labels.pop(0), shape, attributes, picture)
        end = len(self.found)
        for key in [k for k, v in attributes.items() if isinstance(v, dict | list)]:
            before = len(self.found), self.malformed
            self._value(attributes[key], "", picture, explicit=True)
            if before != (len(self.found), self.malformed):  # it holds objects of its own
                del attributes[key]
            elif is_cut(attributes[key]):
                del self.found[at:end]
                return self._malformed()

    def _children(self, value: dict, name: str, picture: names.Picture | None, explicit: bool) -> None:
        """The objects in an object that has no place itself. A key may be their label: {"cat": [x1, y1, x2, y2]}."""
        own, outer = names.label_of(value) or name, self.time
        points = all(shapes.bare(v) == "points" or shapes.is_pair(v) for v in value.values())
        for key, inner in value.items():
            is_list = shapes.plain_key(key) in _LISTS
            if isinstance(inner, str) and is_list and re.match(r"\s*[\[{]", inner):  # JSON in a string
                inner = Reader(inner).read(len(inner) - len(inner.lstrip()))[0]
            if not isinstance(inner, dict | list) or (shapes.bare(inner) == "points" and not points):
                continue
            named, time = names.of_key(key), names.time_of_key(key) if self.has_clips else {}
            label = name if named or time or key in _CALLS else own if own or is_list else str(key)
            inner = [inner] if points and shapes.is_pair(inner) else inner
            self.time = time or outer
            self._value(inner, label, named or picture, explicit)

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
        elif names.is_said(prose):
            self.label = names.said(prose)
        return self.label

    def _mark(self, start: re.Match, prose: str) -> int:
        self.form, self.words = start[0], self.text[start.start() : start.start() + 80]
        if tags := _XML.match(self.text, start.end()):
            numbers = {m[1]: m[2] for m in _XML_NUMBER.finditer(tags[0])}
            self._add(self._said(prose), shapes.of_names(numbers))
            return tags.end()
        run, end = _span(_RUN, self.text, start.end())
        closed, self.words = _RUN_END.match(self.text, end), self.text[start.start() : end]
        if not closed and not any(c.isdigit() for c in run) and not start[0].startswith("<|"):
            return end  # a tag of something else
        places = shapes.within(run, "quad" in start[0])
        is_complete = run.rstrip().endswith((")", "]")) and places[-1] and places[-1][0] != "point"
        if not closed and end == len(self.text) and not is_complete:
            places[-1] = None  # the text ends in it
        label = self._said(prose) if start[0].startswith("<") else ""
        for shape in places:
            self._add(label, shape)
        return closed.end() if closed else end

    def _points(self, start: re.Match, prose: str) -> int:
        self.form, tag = start[0].rstrip(), _TAG.match(self.text, start.start())
        if not tag:
            self._malformed()
            return start.end()
        said, places = shapes.of_tag(tag[1])
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
        for place in places or [None]:
            self._add(label, place and shapes.shape("point", place), dict(said))
        self.label, self.ref = "", None
        return end

    def _four(self, start: re.Match, prose: str) -> int:
        self._add(self._said(prose), shapes.shape("box", shapes.floats(start[0].strip("()"))))
        return start.end()

    def _named(self, start: re.Match, prose: str) -> int:
        numbers = re.findall(rf"[=:]\s*+({NUMBER})", start[0])
        label = names.said(prose) if prose.rstrip(" ").endswith((":", "：")) else ""
        self._add(label, shapes.shape("point", shapes.floats(" ".join(numbers))))
        return start.end()

    def _pairs(self, start: re.Match, prose: str) -> int:
        end, places = start.end(), shapes.within(start[0])
        points = len(shapes.GROUP.findall(start[0]))
        half = _HALF.match(self.text, end)
        if points == 1 and not half:
            if not prose[-1:].isalnum() or not self.text[end:].strip(" .\n"):
                self.lone += places[0][1] if places[0] else ()
            return end
        if half and points % 2:
            places = shapes.within(start[0][: start[0].rindex("(")]) if points > 1 else []
        label = self._said(prose)
        for shape in places:
            self._add(label, shape)
        if half:
            self._malformed()
        return half.end() if half else end


def _begin(text: str) -> int:
    """Where the answer begins, after the thinking."""
    tags = list(THOUGHT.finditer(text))
    ends = [tag.end() for tag in tags if tag[0][1] == "/"]
    is_cut = tags and not ends and not text[: tags[0].start()].strip()
    return len(text) if is_cut else max(ends, default=0)


def _span(pattern: re.Pattern, text: str, at: int) -> tuple[str, int]:
    """What a pattern that always matches finds at a place, and where that ends."""
    found = pattern.match(text, at)
    assert found
    return found[0], found.end()
