"""Moments of a clip in answers: when something happens, in seconds.

`parse` reads these forms, alone and in prose, one or several, and `write` writes them:

    [{"start_time": "00:12.00", "end_time": "00:45.00", "description": "A man enters"}, …]       Qwen2.5-VL
    {"timestamp": "00:12", "event": "…"}, {"relevant_windows": [[12.5, 20.0]]}, {"00:12": "…"}     other keys
    00:12 - 00:45: A man enters                12.5 - 20.0 seconds, A man enters
    The truck appears at 1.5 seconds.          The event happens from 00:12 to 00:45.
    <12.5 seconds> … <20.0 seconds>            Qwen3-VL
    第12秒，…    从00:12到00:45    <answer>12.54 to 17.83</answer>    [12.5, 20.0]    12

Which expressions are times, see `answers.times`. JSON may be broken or cut short (`answers.lenient`).
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from qwenvl_jax.answers import around, time_keys, times
from qwenvl_jax.answers.lenient import DEPTH, Unreadable, read, written
from qwenvl_jax.errors import InputError, shown


class Moment(NamedTuple):
    """An instant or a span of a clip. text: what happens, "" if the answer does not say."""

    start: float  # seconds
    end: float | None = None  # seconds; None: an instant
    text: str = ""


class Parsed(NamedTuple):
    """The moments of an answer in the order of its text; malformed: how many more look like moments but are none."""

    moments: list[Moment]
    malformed: int


_FORMS = ("json", "json_seconds", "clock", "seconds", "tags", "chinese")
_JSON = re.compile(r"\{(?=\s*(?:[\"'}]|[^\W\d]\w*+\s*:))|\[(?=\s*[\[{\"'])")
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.S | re.I)
_TAGS = re.compile(r"</?[a-z_]{1,20}>", re.I)
_NUMBER = r"[0-9]{1,9}(?:\.[0-9]{1,20})?"
_AROUND = (
    r"[\W_]*+(?:(?:from|between|at|in|about|around|approximately|the|answer|it|is|was|an?|event|video|clip|happens|occurs|starts?|"
    r"appears|time|timestamps?|seconds?|secs?|interval|span|segment|moment|range)\b[\W_]*+){0,9}"
)
_BARE_SPAN = re.compile(
    rf"{_AROUND}(?<![0-9.])({_NUMBER})[\])>]?\s*(?:-{{1,3}}>?|[–—~～→,;]|to|and|until|到|至)\s*[\[(<]?({_NUMBER})"
    r"[\])>}\"'`*]*+(?:\s*(?:[:：,，.。]\s*(?P<text>.*))?)$",
    re.I,
)
_START_END = re.compile(
    rf"(?:start|begin|开始)(?:(?!frame|帧)[^0-9\n]){{0,20}}({_NUMBER})[^0-9]{{1,30}}?"
    rf"(?:end|finish|stop|结束)(?:(?!frame|帧)[^0-9\n]){{0,20}}({_NUMBER})",
    re.I,
)
_KEY = re.compile(rf"\s*({_NUMBER})\s*(?:-{{1,3}}>?|[–—~～→]|to|到|至)\s*({_NUMBER})\s*")
_BETWEEN = re.compile(r"\s*[,;，、；]\s*(?:and\s)?\s*|\s+and\s+|\s*[和与]\s*")
_PAIR = re.compile(rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]")
_FIRST_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_ONE_NUMBER = re.compile(rf"{_AROUND}(?<![-.0-9])({_FIRST_NUMBER.pattern})\W{{0,3}}", re.I)
_INSTANT = re.compile(rf"{_AROUND}(?<![-.0-9])({_NUMBER})\W*(?:s|secs?|seconds?)?\W*", re.I)


def parse(text: str) -> Parsed:
    """The moments of an answer.

    Of an answer that thinks first, the part after `</think>` counts, and within it the part in `<answer>`. A number
    without a colon or a unit is a moment only if the answer has no other, and is nothing but a number or a span.
    """
    moments, malformed, _ = _parse(text)
    return Parsed(moments, malformed)


def first_time(text: str) -> float | None:
    """The first time in a text, in seconds, or None.

    Moments come first; without one, lengths of time ("12 seconds long"), then any number.
    """
    moments, _, rest = _parse(text)
    if moments:
        return moments[0].start
    if found := sorted(times.find(rest), key=lambda time: time.kind == "length"):
        return found[0].start
    any_number = _FIRST_NUMBER.search(rest)
    return float(any_number[0]) if any_number and math.isfinite(float(any_number[0])) else None


def write(moments: Sequence[Moment], form: str = "json") -> str:
    """The moments as an answer that `parse` reads as the same moments.

    form: "json" (mm:ss.ff) or "json_seconds", or one moment a line: "clock", "seconds", "tags" ("<2.0 seconds>") or
    "chinese". Raises InputError for a time that is negative or not finite, a span that ends before it starts, and a
    time (of 1,000 hours and more) or text that the form cannot hold.
    """
    if form not in _FORMS:
        raise InputError(f"form is {shown(form)}; it must be one of {', '.join(_FORMS)}")
    for moment in moments:
        ends = (moment.start, moment.start if moment.end is None else moment.end)
        if not 0 <= ends[0] <= ends[1] < 1e9:
            raise InputError(f"{moment} is no moment: its times must be finite, at least 0, and in order")
    if form.startswith("json"):
        rows = [_json(moment, form) for moment in moments]
        text = "```json\n[\n" + ",\n".join(f"    {row}" for row in rows) + "\n]\n```" if rows else "```json\n[]\n```"
    else:
        rows = [_line(moment, form) for moment in moments]
        text = "\n".join(rows)
    for moment, row in zip(moments, rows, strict=True):
        if parse(row) != ([moment], 0):
            bare = moment._replace(text="")
            if parse(_json(bare, form) if form.startswith("json") else _line(bare, form)) != ([bare], 0):
                raise InputError(f'the times of {moment} are too long for the form {form}; use "json_seconds"')
            raise InputError(f'the text of {moment} cannot stand in a line of the form {form}; use "json"')
    return text


def timed(value: dict) -> tuple[dict, list[Moment]]:
    """(what an object of JSON says under keys such as "time" or "start_time", the moments that this is)."""
    own = {
        key: inner
        for key, inner in value.items()
        if time_keys.name(str(key)) in time_keys.TIMES and not _is_branch(inner)
    }
    walk = _Walk((), False)
    walk.value(own)
    return own, walk.moments


def _parse(text: str) -> tuple[list[Moment], int, str]:
    """(moments, how many are malformed, the part of the text that counts)."""
    text = re.split("</think(?:ing)?>", text)[-1]
    if answer := _ANSWER.search(text):
        text = answer[1]
    moments: list[Moment] = []
    malformed = at = prose = 0
    while found := _JSON.search(text, at):
        try:
            value, at, unfinished, half = read(text, found.start())
        except Unreadable as e:
            at = e.at
            continue
        walk = _Walk(unfinished, half)
        walk.value(value)
        if walk.moments or walk.malformed:
            more, bad = _prose(text[prose : found.start()])
            moments += [*more, *walk.moments]
            malformed += bad + walk.malformed
            prose = at
    more, bad = _prose(text[prose:])
    moments, malformed = moments + more, malformed + bad
    return moments or ([] if malformed else _bare(text)), malformed, text


# --- JSON -----------------------------------------------------------------------------------------------


class _Walk:
    """Collects the moments in a value of JSON.

    unfinished: the lists and dicts that the text does not close. half: the text ends within a key or value.
    """

    def __init__(self, unfinished: Sequence, half: bool):
        self.moments: list[Moment] = []
        self.malformed = 0
        self._unfinished = {id(value) for value in unfinished}
        self._half = half

    def value(self, value, depth: int = 0) -> None:
        if isinstance(value, dict):
            self._object(value, depth)
        elif isinstance(value, list):
            spans = None if id(value) in self._unfinished else _spans(value)
            row = _spans(value[:2]) if spans is None and len(value) == 3 and isinstance(value[2], str) else None
            if depth == 0 and spans is not None:
                self._add(spans, "")
            elif row and len(row) == 1 and id(value) not in self._unfinished:  # [start, end, text]
                self._add(row, value[2])
            else:
                for item in value:
                    self.value(item, depth + 1)

    def _object(self, value: dict, depth: int) -> None:
        keys: dict[str, str] = {}
        for key in value:
            name = time_keys.name(key)
            spans = _spans(value[key]) if name in time_keys.SPANS and isinstance(value[key], list) else None
            keys.setdefault("span" if spans and all(end is not None for _, end in spans) else name, key)
        start, end, when, length = (
            next((key for name, key in keys.items() if name in kind), None)
            for kind in (time_keys.START, time_keys.END, time_keys.WHEN, time_keys.DURATION)
        )
        text = next(
            (value[keys[name]] for name in time_keys.TEXTS if name in keys and isinstance(value[keys[name]], str)), ""
        )
        if when is not None and (start is not None or end is not None or _is_branch(value[when])):
            start, when = (when, None) if start is None and not _is_branch(value[when]) else (start, None)
        used = [key for key in (start, end, when) if key is not None]
        if used:
            spans = self._ends(value, start, end, length) if when is None else self._when(value, when, length)
            if spans is not None:
                self._add(
                    spans, text, next((v for k, v in value.items() if k not in used and _are_texts(v, len(spans))), ())
                )
            elif not time_keys.ALSO.issuperset(map(time_keys.name, used)):
                self.malformed += 1
        elif not value and depth and self._half and id(value) in self._unfinished:
            self.malformed += 1
        for key, item in value.items():
            if isinstance(item, dict | list) and key not in used:
                self._branch(key, item, depth)
            elif isinstance(item, str) and not used:  # {"00:12": "A man"}, {"A man": "00:12"}
                if spans := spans_of_key(key):
                    self._add(spans, item)
                elif spans := _spans(item, strict=True):
                    self._add(spans, "" if time_keys.name(key) in time_keys.ANSWERS else key)

    def _branch(self, key: str, item: dict | list, depth: int) -> None:
        """A value in an object. Its key may be its time: {"00:12": {"description": "A man"}}, {"00:12": ["A man"]}."""
        before = len(self.moments) + self.malformed
        self.value(item, depth + 1)
        if before == len(self.moments) + self.malformed and (spans := spans_of_key(key)):
            texts = (
                [v for k, v in item.items() if time_keys.name(k) in time_keys.TEXTS] if isinstance(item, dict) else item
            )
            self._add(spans, ", ".join(text for text in texts if isinstance(text, str)))

    def _ends(self, value: dict, start: str | None, end: str | None, length: str | None) -> list | None:
        """The span of an object with a time for its start; None if it has none, or is cut short before its end."""
        if not any(value[key] not in (None, "") for key in (start, end) if key is not None):
            return []
        first = None if start is None else _seconds(value[start], start)
        if first is None:
            return None
        if end is None and length is not None:
            last = _seconds(value[length], length)
            return None if last is None else [(first, first + last)]
        if end is None or value[end] in (None, ""):
            return None if id(value) in self._unfinished else [(first, None)]
        last = _seconds(value[end], end)
        return None if last is None else [(first, last)]

    def _when(self, value: dict, when: str, length: str | None) -> list | None:
        """The times of an object under one key; None if they are none, or cut short."""
        if value[when] in (None, "", [], {}):
            return []
        spans = None if id(value[when]) in self._unfinished else _spans(value[when])
        if spans and time_keys.is_milliseconds(when, value[when]):
            spans = [(first / 1000, None if last is None else last / 1000) for first, last in spans]
        seconds = None if length is None else _seconds(value[length], length)
        if spans and seconds is not None and len(spans) == 1 and spans[0][1] is None:
            return [(spans[0][0], spans[0][0] + seconds)]
        return spans

    def _add(self, spans: Sequence[tuple[float, float | None]], text: str, texts: Sequence[str] = ()) -> None:
        """texts: those of the spans, if each has its own."""
        for (start, end), own in zip(spans, texts or [text] * len(spans), strict=True):
            if end is not None and end < start:
                self.malformed += 1
            else:
                self.moments.append(Moment(start, end, own))


def _are_texts(value, count: int) -> bool:
    return isinstance(value, list) and len(value) == count > 1 and all(isinstance(item, str) for item in value)


def _is_branch(value) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))


def _seconds(value, key=None) -> float | None:
    """The seconds of one time in JSON: a number, or text as in prose or with a number alone."""
    spans = None if isinstance(value, list) else _spans(value)
    if spans is None or len(spans) != 1 or spans[0][1] is not None:
        return None
    return spans[0][0] / 1000 if time_keys.is_milliseconds(key, value) else spans[0][0]


def _spans(value: Any, strict: bool = False, depth: int = 0) -> list[tuple[float, float | None]] | None:
    """The times and spans of a value under a key that says that it is a time; None if it is none.

    strict: a text must be nothing but one, with a colon or a unit.
    """
    if isinstance(value, bool) or depth > DEPTH:
        return None
    if isinstance(value, int | float):
        return [(float(value), None)] if 0 <= value < 1e9 else None
    if isinstance(value, str):
        if not strict and re.fullmatch(rf"\s*{_NUMBER}\s*", value):
            return [(float(value), None)]
        found = [time for time in times.find(value) if time.kind != "bad"]
        if strict and (len(found) != 1 or not around.is_alone(value, found[0])):
            return None
        if not found and not strict and (bare := _BARE_SPAN.fullmatch(value)) and not bare["text"]:
            return [(float(bare[1]), float(bare[2]))]
        return [(time.start, time.end) for time in found] or None
    if not isinstance(value, list) or not value:
        return None
    parts = [_spans(item, strict, depth + 1) for item in value]
    if any(part is None for part in parts):
        return None
    flat = [span for part in parts for span in part or ()]
    if (
        len(value) == 2 == len(flat)
        and flat[0][1] is flat[1][1] is None
        and not any(isinstance(v, list) for v in value)
    ):
        return [(flat[0][0], flat[1][0])]
    return flat


def spans_of_key(key: str) -> list[tuple[float, float | None]] | None:
    """The time or span that a key is; a span needs no unit."""
    bare = _KEY.fullmatch(key) if len(key) < 60 else None
    return [(float(bare[1]), float(bare[2]))] if bare else _spans(key, strict=True)


# --- prose ----------------------------------------------------------------------------------------------


def _prose(text: str) -> tuple[list[Moment], int]:
    """(the moments of a text without JSON, how many are malformed)."""
    found = times.find(text)
    spots = [time for time in found if time.kind == "moment"]
    said = around.said(text, spots)
    return [Moment(t.start, t.end, s) for t, s in zip(spots, said, strict=True)], sum(t.kind == "bad" for t in found)


def _bare(text: str) -> list[Moment]:
    """The moments of an answer without colons and units: spans of numbers, one a line, or one number."""
    ends, text = _START_END.findall(text), _TAGS.sub(" ", text).strip()
    if len(text) < 60 and (one := _ONE_NUMBER.fullmatch(text)):
        value = float(one[1])
        return [Moment(value)] if 0 <= value < 1e9 else []
    pairs = _PAIR.findall(text)
    if pairs and _PAIR.sub("", text).strip(" \n,;.[]()"):
        pairs = []
    if pairs := pairs or ends:
        return [Moment(float(a), float(b)) for a, b in pairs if float(a) <= float(b)]
    out: list[Moment] = []
    for line in text.splitlines():
        parts = _BETWEEN.split(line) if len(line) < 2000 else []
        spans = [_BARE_SPAN.fullmatch(part) for part in parts]
        instants = [_INSTANT.fullmatch(part) for part in parts]
        if len(parts) > 1 and all(span and not span["text"] for span in spans):
            out += [Moment(float(s[1]), float(s[2])) for s in spans if s and float(s[1]) <= float(s[2])]
        elif len(parts) > 2 and all(instants):
            out += [Moment(float(one[1])) for one in instants if one]
        elif len(told := _told(parts)) > 1:
            out += told
        elif (span := _BARE_SPAN.fullmatch(line)) and float(span[1]) <= float(span[2]):
            out.append(Moment(float(span[1]), float(span[2]), (span["text"] or "").strip()))
    return out


def _told(parts: list[str]) -> list[Moment]:
    """The spans of "0.0-5.2: a, b; 5.2-9.1: c" in its parts, each with its text; [] for another line."""
    out: list[Moment] = []
    for part in parts:
        span = _BARE_SPAN.fullmatch(part)
        if span and span["text"] and float(span[2]) >= float(span[1]) >= (out[-1].start if out else 0):
            out.append(Moment(float(span[1]), float(span[2]), span["text"].strip()))
        elif out:
            out[-1] = out[-1]._replace(text=f"{out[-1].text}, {part.strip()}")
        else:
            return []
    return out


# --- writing --------------------------------------------------------------------------------------------


def _row(moment: Moment, form: str) -> dict:
    def time(seconds):
        return float(seconds) if form == "json_seconds" else times.clock(seconds, 2)

    if moment.end is None:
        return {"timestamp": time(moment.start), "description": moment.text}
    return {"start_time": time(moment.start), "end_time": time(moment.end), "description": moment.text}


def _json(moment: Moment, form: str) -> str:
    text = written(_row(moment, form))
    return re.sub("(?i)<(?=/think(?:ing)?>|/?answer>)", r"\\u003c", text)  # tags that `parse` heeds


def _line(moment: Moment, form: str) -> str:
    around = {"tags": "<{} seconds>", "chinese": "{}秒"}.get(form, "{}")
    write_one = times.clock if form == "clock" else times.plain
    ends = [around.format(write_one(end)) for end in (moment.start, moment.end) if end is not None]
    text = moment.text and f"{'：' if form == 'chinese' else ': '}{moment.text}"
    if form == "chinese":
        return ("从" + "到".join(ends) if len(ends) > 1 else f"第{ends[0]}") + text
    return " - ".join(ends) + " seconds" * (form == "seconds") + text
