"""What the words around coordinates name: the label of an object, the picture or clip that it is in, and its time.

Pictures are named as in "Picture 2:", "in the second image", "in the last image", 第二张图, 最后一张, {"image": 2} and
{"label": "Image 2: dog"}. After a picture is named, "in the second one" and "in the second:" name one of its kind.
These name none, since they may be about other things: "the second one is", "the other image", "the left image", 第二个.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qwenvl_jax.answers import moments, times
from qwenvl_jax.answers.shapes import plain_key


class Picture(NamedTuple):
    """A picture as a text names it.

    kind: "image" or "video", by the noun; "index" for `img_idx` of Qwen's zoom tool, which always counts from 0.
    number: as the text says it; from the end, the last one is -1.
    """

    kind: str
    number: int


# The first of these keys that an object has is its label. "label" is no attribute; the others are.
_LABELS = (
    *("label", "name", "text_content", "text", "object", "object_name", "instance", "category", "class", "class_name"),
    *("caption", "phrase", "title", "description", "type"),
)
_READ = {"text_content", "text", "caption", "title", "description"}  # words that the picture shows
_LISTS = ("labels", "names", "texts", "categories", "classes", "objects")  # a label for each of several places

# Keys that say in which frames of a clip an object is, as plain keys; a "span" is a first and a last one.
_FRAMES = dict.fromkeys("frame frames frameid frameids frameindex frameidx framenumber frameno 帧".split(), "frame")
_FRAMES |= dict.fromkeys("framerange framespan frameinterval".split(), "span")
_FRAMES |= dict.fromkeys("startframe framestart firstframe beginframe".split(), "start")
_FRAMES |= dict.fromkeys("endframe frameend lastframe stopframe".split(), "end")
_FRAME = re.compile(r"frame[ _#-]{0,3}[0-9]{1,6}|第\s?[0-9]{1,6}\s?帧", re.I)
_FRAME_NUMBER = re.compile(r"(?:frame|第)?[ _#-]{0,3}([0-9]{1,6})(?:\.0{1,9})?\s?帧?", re.I)
_FRAME_SPAN = re.compile(r"(?:frames?\s?)?([0-9]{1,6})\s?(?:-|–|to|~|到|至)\s?([0-9]{1,6})", re.I)

_IMAGE = "picture|image|photograph|photo|pic|img|screenshot"
_NOUN = rf"(?P<noun>{_IMAGE}|video|clip)"
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_DIGITS = "一二三四五六七八九"
_HAN = rf"(?:[0-9]{{1,3}}(?![0-9.])|[{_DIGITS}十两]{{1,3}})"
_HAN_NOUN = r"(?:图片|图像|照片|相片|截图|图|视频)"
_ORDINAL = rf"(?:{'|'.join(_ORDINALS)}|[0-9]{{1,2}}(?:st|nd|rd|th))"
# "image 640 x 480", "image 100%"; but "**Image 2**" is a heading
_COUNTS = r"(?![ \t]{0,3}(?:[x×*][ \t]{0,3}[0-9]|%|px\b|pixels?\b|by\b|-?\s?(?:seconds?|minutes?|hours?)\b))"
# What follows the number of a picture but nothing that it counts: "the image 2 shows", not "the image 2 dogs".
_AFTER = (
    r"(?=\s{0,3}(?:[^\w\s]|\Z|(?:is|was|shows?|has|contains?|depicts?|there|and|or|at|in|on|with|we|i|you|of [0-9])\b)"
    r"|[ \t]*\n)"
)
_NAMED = re.compile(
    rf"(?<![a-z]){_NOUN}"
    r"(?:[ _#]{0,3}|-|\s?(?:no\.?|number|nr\.?)\s?)"
    rf"(?:(?P<n>[0-9]{{1,3}})(?![0-9]|\.[0-9]|[a-z]){_COUNTS}"
    rf"|\[(?P<n2>[0-9]{{1,3}})\]|\*\*(?P<n3>[0-9]{{1,3}})(?=\*\*)"
    rf"|(?P<word>{'|'.join(_WORDS)})\b{_AFTER}(?!\s*\w))"
    rf"|(?<![a-z-])(?<![0-9] )(?:(?P<nth>{_ORDINAL})(?P<back>(?:[ -]to)?[ -]last)?|(?P<last>last|final))[ -]"
    rf"(?:(?:input|given|provided|attached)\s)?(?P<noun2>{_IMAGE}|video|clip)(?![a-z])"
    rf"|(?:(?:(?P<back2>倒数)?第\s?(?P<han>{_HAN})|(?P<last2>最后)(?:的|\s?[一1]))\s?"
    rf"(?:[张幅副]\s?{_HAN_NOUN}?|[个段]?\s?{_HAN_NOUN})|{_HAN_NOUN}\s{{0,3}}(?P<han2>{_HAN}))"
    r"(?![个只条人辆件位匹名头棵朵秒分])",
    re.I,
)
# One of several pictures, after one is named.
_ONE = re.compile(
    rf"\b(?:in|on|from)\s+the\s+(?:(?P<nth>{_ORDINAL})|last|final)(?:\s+one\b|(?=\s*(?:[:：,，]|\Z)))"
    rf"|第\s?(?P<han>{_HAN})\s?[个段](?=\s?[里中])",
    re.I,
)
# The end of a sentence that leads to coordinates and names nothing.
_LEAD = re.compile(
    r"\b(?:bbox(?:_2d)?|coordinates?|answer|result|is|are|at|by)\W*+\Z|\bbounding box|坐标|边界框|[为是在]\W*+\Z", re.I
)
_BULLET = re.compile(r"^[0-9]{1,3}[.)]\s+")
_AND = re.compile(r"^(?:(?:and|&)(?:\s|$)|和|以及|与)\s*", re.I)
# What stands behind the name of a picture and names nothing: "(right)", "2/3", "of 3", 中, 里的.
_SIDE = re.compile(
    r"^(?:\s*(?:/|(?:out )?of)\s?[0-9]{1,3}(?![0-9]))?[\s)）\]】*]*(?:[(（][^()（）]{0,40}[)）]\s*(?=[:：]|\Z))?", re.I
)
_WITHIN = re.compile(r"\s*(?:之中|当中|中间|里面|上面|[中里内上])")
_ENDS_WITHIN = re.compile(r"[的有是，,：:\s（(]|\Z")
_THERE = re.compile(
    r"^(?:there (?:is|are|was|were)|(?:also )?(?:has|have|shows?|contains?|depicts?|features?|displays?))\s+"
    rf"(?:(?:also|only|an?|the|some|several|{'|'.join(_WORDS)}|[0-9]{{1,3}})\s+){{0,2}}"
    rf"|^的|^有(?:(?:{_HAN})[个只条人辆件位匹名头棵朵张把]?)?",
    re.I,
)
_THE = r"(?:the|this|that|my|your|our)(?:\s+(?:very|same))?"
_IN = re.compile(rf"\A\W*{_THE}\s+\Z|\W*\b(?:in|on|of|from|for|within)(?:\s+{_THE})?\s*\Z|[\s(（,，在]+\Z", re.I)
# What stands between a place and the picture that it is in: "[1, 2, 3, 4] in the second image", "… (Image 2)".
_BEHIND = re.compile(
    r"(?P<open>[ \t*]*[(（\[]\s?(?:(?:in|from|of|on)\s)?|[ \t*]*(?:,?[ \t]*(?:which|that) is[ \t]+)?"
    r"(?:located[ \t]|found[ \t])?(?:in|from|of|on|within)[ \t]+|[ \t]*(?:位于|在|属于|来自)[ \t]*)"
    r"(?:the[ \t]+)?(?:very[ \t]+)?"
    r"|[ \t*]*(?:[,，|@:：]|[-–—=]{1,2}>?|→)?[ \t]*(?:(?:in|from|of|on)[ \t]+)?(?:the[ \t]+)?(?:位于|在)?"
)
_CLAUSE_END = re.compile(r"[中里内上]?[ \t*]*(?:[;；.。\n]|\Z|\|[^\n]*(?:\n|\Z))")
_STOP = re.compile(r"\b(?:i|we|you|it|they|he|she|see|found|here|click|tap|box|boxes|values?|sum)\b", re.I)
_DETERMINER = re.compile(r"\b(?:the|this|that|an?|each|every|your|our|my)\s+\Z", re.I)
_IS_NAME = re.compile(_AFTER, re.I)
_DURATION = re.compile(rf"\b(?:{'|'.join(_WORDS)})[ -]\Z", re.I)  # "a ten second clip"
_SENTENCE = re.compile(r"[.!?;]\s|[。！？；]")
_STRIPPED = " \t\r,;:：，、-*•`\"'."


def mentions(text: str) -> Iterator[tuple[Picture, int, int]]:
    """(picture, start, end) of each name of a picture."""
    for found in _NAMED.finditer(text):
        word = next(filter(None, (found[n] for n in ("n", "n2", "n3", "word", "nth", "han", "han2"))), "1")
        before = text[max(found.start() - 12, 0) : found.start()]
        if word.lower() == "second" and _DURATION.search(before):
            continue
        if found["n"] and _DETERMINER.search(before) and not _IS_NAME.match(text, found.end()):
            continue
        noun = (found["noun"] or found["noun2"] or found[0]).lower()
        kind = "video" if noun in ("video", "clip") or "视频" in noun else "image"
        from_end = any(found[n] for n in ("back", "back2", "last", "last2"))
        yield Picture(kind, _number(word.lower()) * (-1 if from_end else 1)), found.start(), found.end()


def _number(word: str) -> int:
    for words in (_WORDS, _ORDINALS):
        if word in words:
            return words.index(word) + 1
    if digits := re.match("[0-9]+", word):
        return int(digits[0])
    tens, ten, ones = word.replace("两", "二").rpartition("十")
    return (10 * (_DIGITS.find(tens[:1]) + 1 if tens else 1) if ten else 0) + (
        _DIGITS.find(ones[:1]) + 1 if ones else 0
    )


def last(text: str, before: Picture | None = None) -> Picture | None:
    """The picture that a text names last, or `before`."""
    named = [(start, picture.kind, picture.number) for picture, start, _ in mentions(text)]
    for found in _ONE.finditer(text):
        word = found["nth"] or found["han"]
        named.append((found.start(), "", _number(word.lower()) if word else -1))
    for _, kind, number in sorted(named):
        if kind or (before and before.kind != "index"):
            before = Picture(kind or (before.kind if before else ""), number)
    return before


def behind(prose: str) -> Picture | None:
    """The picture that a text names at its beginning for what stands before it: " (Image 2), cat: "."""
    lead = prose.partition("\n")[0][:80]
    picture, start, end = next(mentions(lead), (None, 0, 0))
    if picture is None or not (found := _BEHIND.fullmatch(lead, 0, start)) or re.match(r"\s*[:：]", prose[end:]):
        return None
    return picture if found["open"] is not None or _CLAUSE_END.match(prose, end) else None


def of_key(key) -> Picture | None:
    """The picture that a key such as "Image-2" or "second_image" names."""
    text = key.replace("_", " ").strip() if isinstance(key, str) and len(key) < 60 else ""
    text = re.sub(r"\Athe\s", "", text, flags=re.I)
    found = _NAMED.fullmatch(text)
    return next((picture for picture, _, _ in mentions(text)), None) if found else None


def of_item(key, value) -> Picture | None:
    """The picture that a key and its value name: "image": 2, "image_id": "2", "picture": "the second", "img_idx": 0."""
    found = re.fullmatch(rf"({_IMAGE}|video|clip)(?:id|index|idx|number|num|no)?", plain_key(key))
    if not found:
        return None
    kind = "index" if found[0] == "imgidx" else "video" if found[1] in ("video", "clip") else "image"
    if isinstance(value, str) and len(value) < 60:
        word = re.sub(r"\A(?:the\s+|#)|\s+one\Z", "", value.strip().lower())
        if re.fullmatch(rf"[0-9]{{1,3}}|{_ORDINAL}|{'|'.join(_WORDS)}", word):
            value = _number(word)
        elif word in ("last", "final"):
            return Picture(kind, -1)
        else:
            return of_key(value)
    return Picture(kind, value) if type(value) is int and 0 <= value < 1000 else None


def of_label(label: str, headed: bool = False) -> tuple[Picture | None, str]:
    """(the picture that a label names, the label): "the cup in image 2". headed: also "Image 2: cup", which is cut."""
    found = list(mentions(label)) if len(label) < 1000 else []
    if not found:
        return None, label
    (first, start, end), (picture, at, stop) = found[0], found[-1]
    if not label[stop:].strip(" .)）") and (_IN.search(label[:at]) or (headed and not label[:at].strip())):
        return picture, label
    if headed and not label[:start].strip() and (rest := re.match(r"\s*[:：—–,，-]\s*(?=\S)", label[end:])):
        return first, label[end + rest.end() :]
    return None, label


def index(picture: Picture, first: int, clips: Sequence[bool]) -> int:
    """The place of a picture in the conversation, from 0. first: the number of the first one.

    clips: for each picture and clip of the conversation, whether it is a clip. If it has both, each kind is counted for
    itself, as the chat template does. Without it, the last picture is taken to be the only one.
    """
    if picture.kind == "index":
        return picture.number
    mixed = len(set(clips)) > 1
    same = [i for i, clip in enumerate(clips) if not mixed or clip == (picture.kind == "video")]
    if picture.number < 0:
        return same[picture.number] if -picture.number <= len(same) else len(clips)
    n = picture.number - first
    return same[n] if mixed and n < len(same) else n + mixed * len(clips)


def time_of(value: dict) -> dict:
    """What an object of JSON says of its time, such as {"start_time": "00:12", "end_time": "00:15"}; {} if nothing."""
    said, found = moments.timed(value)
    frames = {key: inner for key, inner in value.items() if plain_key(key) in _FRAMES}
    return (said if found else {}) | (frames if frames_said(frames) else {})


def time_of_key(key) -> dict:
    """The same of a key that is a time or a frame, such as "00:12", "3.0" or "frame_3"."""
    if not isinstance(key, str) or len(key) > 60:
        return {}
    if _FRAME.fullmatch(key.strip()):
        return {"frame": key}
    return {"time": key} if re.fullmatch(r"[0-9]{1,6}\.[0-9]{1,9}", key) or moments.spans_of_key(key) else {}


def frames_said(attributes: dict) -> list[tuple[int, int]]:
    """(first, last) of each span of frames that attributes name: {"frame": 3}, {"start_frame": 2, "end_frame": 4}."""
    at: dict[str, list[int]] = {}
    for key, value in attributes.items():
        what = _FRAMES.get(plain_key(key), "")
        if what and what not in at:
            numbers = [_frame_number(v) for v in (value if isinstance(value, list) else [value])[:1000]]
            if what == "span" and isinstance(value, str) and (ends := _FRAME_SPAN.fullmatch(value[:60].strip())):
                numbers = [int(end) for end in ends.groups()]
            if found := [n for n in numbers if n is not None]:
                at[what] = found
    if "start" in at or "end" in at:
        first = at.get("start", at.get("end", [0]))[0]
        return [(first, max(first, at["end"][0]) if "end" in at else first)]
    if len(span := at.get("span", [])) == 2:
        return [(min(span), max(span))]
    return [(n, n) for n in at.get("frame", span)]


def _frame_number(value) -> int | None:
    """3 of 3, 3.0, "3", "frame 3" or 第3帧."""
    if isinstance(value, str) and (found := _FRAME_NUMBER.fullmatch(value[:60].strip())):
        return int(found[1])
    return int(value) if type(value) in (int, float) and 0 <= value < 1e7 and value == int(value) else None


class Times:
    """The times in the prose around objects."""

    def __init__(self):
        self._found: list[tuple[int, dict]] = []  # (how many objects stand before it, the time as attributes)

    def read(self, prose: str, count: int) -> None:
        """count: how many objects stand before the prose."""
        for time in times.find(prose):
            if time.kind == "moment":
                said = {"time": time.start} if time.end is None else {"start_time": time.start, "end_time": time.end}
                self._found.append((count, said))

    def of(self, i: int, count: int) -> dict:
        """The time of object i of `count`: the last one before it, or the next one if each object has one behind it."""
        behind = bool(self._found) and self._found[0][0] > 0 and self._found[-1][0] == count
        place = bisect_right(self._found, i, key=lambda found: found[0]) - (not behind)
        return self._found[place][1] if place >= 0 else {}


def label_of(value: dict) -> str | None:
    return next((label for _, label in _labels(value)), None)


def _labels(value: dict) -> Iterator[tuple[str, str]]:
    for key in _LABELS:
        if key in value and isinstance(label := value[key], str | int | float) and not isinstance(label, bool):
            yield key, str(label)


def in_object(value: dict, headed: bool) -> tuple[Picture | None, str | None]:
    """(picture, label) that an object of JSON names. headed: a picture at the beginning of its label is one."""
    for key, label in _labels(value):
        return of_label(label, headed) if key not in _READ else (None, label)
    return None, None


def parallel(value: dict, count: int) -> tuple[str | None, list[str]]:
    """(key, labels) of a list with as many labels as the object has places; (None, []) if there is none."""
    for key in (*_LABELS, *_LISTS):
        labels = value.get(key)
        if isinstance(labels, list) and len(labels) == count and all(type(label) in (str, int) for label in labels):
            return key, [str(label) for label in labels]
    return None, []


def is_said(prose: str) -> bool:
    """Whether there are words in it that may be a label."""
    return bool(_AND.sub("", prose.strip(" \t\r\n,;.")))


def said(prose: str) -> str:
    """What the end of a text says about the numbers behind it: "" if it is only a sentence that leads to them."""
    line = prose.rstrip().rpartition("\n")[2].rpartition("<!--")[2]
    line = re.sub(r"<[^<>]*>", "", line.rpartition("-->")[2])
    if found := list(mentions(line)):
        (_, at, end), before = found[-1], found[-2][2] if len(found) > 1 else 0
        within, head = _WITHIN.match(line, end), line[before:at]
        if within and (head.endswith("在") or _ENDS_WITHIN.match(line, within.end())):
            end = within.end()
        line = _SIDE.sub("", line[end:])
        if not line.strip(_STRIPPED):  # "the cup in image 2:"
            line = _IN.sub("", _SENTENCE.split(head)[-1])
    name = _THERE.sub("", _BULLET.sub("", line.strip()).strip(_STRIPPED))
    touches = prose[-1:] and not prose[-1].isspace() and prose[-1] not in ":："
    if name.endswith("=") or (
        not touches and (_LEAD.search(name) or _ONE.fullmatch(name))
    ):  # start_box='…', "The box is at …"
        return ""
    return _AND.sub("", name)


def listed(prose: str, after: str) -> str:
    """The label of "dog [1, 2, 3, 4]; cat [5, 6, 7, 8]": a few words between items; "" for other prose."""
    item = re.split(r"[;；\n]", prose)[-1]
    words = item.split()
    is_item = item != prose or re.match(r"[ \t]*[;；\n]", after)
    if not is_item or not 1 <= len(words) <= 3 or _STOP.search(item) or not re.fullmatch(r"[\w\s'*`-]+", item):
        return ""
    return said(item)
