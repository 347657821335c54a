"""Times and spans of time in a sentence, in English and Chinese: where they stand and how many seconds they are.

A number is a time if a colon or a unit makes it one: 00:12, 1:02:03.5, 12.5 seconds, 12s, 1 minute 5 seconds, the 12th
second, second 12, t=12.5, 第12秒, 1分05秒. The numbers of a list share the unit: at 5, 10 and 15 seconds. A length of
time ("for 3 seconds", "a 10-second clip"), a time of day ("3:45 PM"), a ratio ("16:9") and an age ("in her 30s") are no
moments.
"""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import NamedTuple

_UNITS = "one two three four five six seven eight nine".split()
_TEENS = "zero ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60}
_WORDS = {word: n for n, word in enumerate(_UNITS, 1)} | {"zero": 0} | _TENS
_WORDS |= {word: n for n, word in enumerate(_TEENS[1:], 10)}
_HAN = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}

_HAN_DIGITS = "零〇一二两三四五六七八九十百"
_DIGITS = r"(?>(?:[0-9]{1,3}(?:,[0-9]{3})++|[0-9]{1,9}+)(?:\.[0-9]{1,20}+)?|(?<![0-9.])\.[0-9]{1,20}+)"
_SPELLED = rf"(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_UNITS)}))?|{'|'.join(_UNITS + _TEENS)}"
_N = rf"(?:{_DIGITS}|(?:{_SPELLED})(?![a-z])|(?<![{_HAN_DIGITS}])[{_HAN_DIGITS}]{{1,7}}+)"
_SCALES = {"h": Decimal(3600), "m": Decimal(60), "s": Decimal(1), "ms": Decimal("0.001")}
_UNIT = (
    r"(?:(?P<ms>milliseconds?|msecs?|ms|毫秒)|(?P<h>hours?|hrs?|h|个?小时)|(?P<m>minutes?|mins?|m|分钟|分"
    r"|minutos?|minuten?|minuti|минут[аыу]?|분)|(?P<s>seconds?|secs?|s|秒钟?|segundos?|sekunden?|secondes?|secondi|секунд[аыу]?"
    r"|초))(?![a-zа-я])"
)
_TO_UNIT = r"(?:st|nd|rd|th)?[*_`$]{0,3}[ \t-]{0,2}"
_PAIR = re.compile(rf"[ \t]?,?[ \t]?(?:and[ \t])?零?(?P<n>{_N}){_TO_UNIT}{_UNIT}")
_SUFFIX = re.compile(_TO_UNIT + _UNIT)
_TIME = re.compile(
    rf"""(?=[.0-9{_HAN_DIGITS}oetfsnz])(?<![0-9a-z])(?<![0-9][:：,])(?<![^.]\.)(?:
    (?P<clock>[0-9]{{1,9}}+(?:[:：][0-9]{{1,9}}+){{1,4}}+(?:[.,][0-9]{{1,20}}+(?![:：][0-9]))?)(?![0-9]|[:：][0-9])
        (?:[ ]?s(?:ec(?:ond)?s?)?\b)?
    |(?:(?:(?<!the[ ])(?<!a[ ])seconds?|timestamps?)(?:[ ]?[=≈:]|[ ]is|[ ]of|(?=[ ]))|t[ ]?[=≈:])[ ]?
        (?P<named>{_DIGITS})(?![0-9]|[:：.][0-9])
    |(?P<n>{_N}){_TO_UNIT}{_UNIT})""",
    re.X,
)
_OF_DAY = re.compile(r"\s?[ap]\.?m\b")
_DATE = re.compile(r"[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2},?[ t]$")
_ABOUT = r"(?:about|approximately|around|roughly|nearly|almost|only|just|an?|the|约|大约|了|为|是)"
# What makes the time that follows, or that stands before it, a length and not a moment.
_LENGTH_BEFORE = re.compile(
    r"(?:\b(?:for|last(?:s|ed|ing)?|final|takes?|took|taking|every|over|another|next|total(?:l?ing)?|(?:duration|length)"
    rf"(?:[ ](?:is|was|of))?)|持续|时长|长达|总?共|每隔?|用时|历时|最后)[:：]?(?:\s*{_ABOUT})*+\s*[*`]*$",
)
_LENGTH_AFTER = re.compile(
    r"[*`]*[ ,]?(?:(?:long|later|earlier|ago|before|apart|each|(?:in|of)\s(?:length|duration|total)|video|clip|footage"
    r"|film|movie|recording|interval|window|gap|pause|delay|period|countdown|timer)\b|的?时长|的?视频|的?片段|后|之后)"
)
_AGE = re.compile(r"(?:\b(?:her|his|their|the|my|your|early|mid|late)[ -])$")
_ATTRIBUTE = re.compile(r"[ -](?!mark|point|timestamp|moment|(?:and|to|or|into|in|of|the|when|where)\b)[a-z]")
_FIRST = re.compile(r"(?:\b(?:first|initial|opening)|前|最初的?|开头的?)\s*[*`]*$")

_LEFT = r"[\[(<*\"'“`]{0,3}"
_RIGHT = r"[\])>*\"'”`]{0,3}(?:[ ](?:mark|point|timestamp)|开始|起|处|左右)?[,，]?"
_ROUGHLY = r"(?:(?:about|around|approximately|the|at|t[ ]?=|约|大约|第)[ \t]*){0,3}"
_DASH = rf"{_RIGHT}[ \t]*(?:-{{1,3}}>?|[–—~～→−]|to|until|till?|through|thru|up to|直?到|直?至)[ \t]*{_ROUGHLY}{_LEFT}"
_TO = re.compile(_DASH)
_AGAIN = re.compile(r"[ ]?[(（=][ ]?(?:or|即)?[ ]?")  # 90 seconds (1:30)
_CUT = re.compile(_DASH + r"[0-9:：.]*\s*")  # a span without its end
_AND = re.compile(rf"{_RIGHT}[ \t]*(?:and|&|和|与|-|to)[ \t]*{_ROUGHLY}{_LEFT}")
_COMMA = re.compile(r"""["'`]?[ \t]*[,;，][ \t]*["'`]?""")
_BETWEEN = re.compile(rf"(?:\bbetween|介于)\s*{_ROUGHLY}{_LEFT}$")
_START = re.compile(r"(?:\b(?:start|begin|began|begun)|开始|起始)[^0-9\n]{0,30}$")
_END = re.compile(
    rf"{_RIGHT}[\s,;.，。；|*_\-–•\"'\[<]{{0,8}}(?:(?:and|then|but|并且?|然后)\s{{0,3}})?(?:(?:it|the|event)\s){{0,2}}"
    r"(?:end(?:s|ed|ing)?|finish(?:es|ed)?|stop(?:s|ped)?|结束)(?:[ _-]?time(?:stamp)?|时间)?"
    rf"[\s:：=*_\"'`\]>]{{0,6}}(?:(?:is|at|by|于|在|为|是)\s{{0,2}})?{_ROUGHLY}{_LEFT}",
)
_LOWER = re.compile(
    rf"(?<![0-9a-z])(?<![0-9][:：.])({_DIGITS})(?:st|nd|rd|th)?(?:(?P<to>{_DASH})|(?P<and>{_AND.pattern})|(?P<ends>{_END.pattern}))$"
)
_UPPER = re.compile(rf"{_DASH}({_DIGITS})(?!{_TO_UNIT}{re.sub('[?]P<[a-z]+>', '?:', _UNIT)}|[0-9a-z]|[:：.][0-9])")
# Numbers that share the unit of the last one: "at 5, 10 and 15 seconds"; and those after the first: "seconds 5, 10".
_SPAN = rf"({_DIGITS})(?:st|nd|rd|th)?(?:{_DASH}({_DIGITS})(?:st|nd|rd|th)?)?"
_AND_THEN = r"(?:and[ ]then|and|or|&|then)[ ]"
_SHARE = rf"(?:[ ]?[,，、;][ ]?(?:{_AND_THEN})?|[ ]{_AND_THEN}|[ ]?[和与及][ ]?)(?:at[ ]|第)?"
_BEFORE_LIST = r"\b(?:at|near|from|between|during|for|around|about|approximately|the)[ ]|[第在约从:：\n(\[]"
_LIST = re.compile(rf"(?:{_BEFORE_LIST}|\r{_SHARE})[ ]?((?:{_SPAN}{_SHARE})+)$")
_ITEM = re.compile(_SPAN)
_MORE = re.compile(rf"{_SHARE}{_SPAN}(?![0-9a-z]|[:：.][0-9])(?P<last>(?=[ ]?(?:[,，、;.)\]\n]|$|(?:and|or|&)[ ])))?")
_PLAIN = {ord(wide): narrow for wide, narrow in zip("０１２３４５６７８９．", "0123456789.", strict=True)}
_PLAIN |= {capital: chr(capital + 32) for capital in range(ord("A"), ord("Z") + 1)}  # str.lower() may move what follows
# What the text says of a time.
_CLOSED, _OPENING = re.compile(r"[\])>*_.\"'\s]*"), tuple("(:[<-–—（：")
_SENTENCE = re.compile(r"[.!?](?=\s)|[。！？；\n]")
_MARKS = r"\s*_#$>•\-–—:：,，.。;；()\[\]<|\"'“”`~="
_LEAD = re.compile(
    rf"(?:[{_MARKS}]|[0-9]{{1,3}}[.)、](?=\s)|\b(?:from|between|at|on|in|t|time|timestamps?|timecode|around|about|the|first"
    r"|start(?:s|ing)?(?:[ _]time)?|(?:event|scene|step|moment|segment)(?:[ ][0-9]{1,3})?)\b|[从在第前约]"
    r"|(?:开始|起始|发生)?时间段?|时间戳)*+",
    re.I,
)
_BEFORE_NEXT = re.compile(
    rf"(?:[{_MARKS}]|\b(?:and|then|at|from|between|around|about|by|in|finally)\b|[从在第到和与及])+$", re.I
)
_AFTER = re.compile(
    rf"(?:</?[a-z_]{{1,20}}>|[{_MARKS}]|(?:mark|point|timestamp)s?\b"
    r"|in(?:to[ ]the[ ](?:video|clip))?\b|onwards?\b|处|时(?!间)|左右|之间"
    r"|开始|结束)*+",
    re.I,
)
_TAG = re.compile(r"</?[a-zA-Z_]{1,20}>")
_LABEL = re.compile(r"\W*(?:description|event|caption|activity|action|描述|事件|内容)[\s\"'*]*[:：]", re.I)
_LIST_LENGTH = 120  # most characters of numbers that share a unit
_SENTENCE_LENGTH = 300  # of a long sentence, so many characters to each side of its time count


class Time(NamedTuple):
    """A time or span in a text."""

    at: int  # where it begins in the text
    to: int  # the index after it
    start: float  # seconds
    end: float | None  # None: an instant
    kind: str  # "moment", "length" (of time), or "bad": looks like a time but is none


def find(text: str) -> list[Time]:
    """All times and spans of a text, in its order. Their places do not overlap."""
    text = text.translate(_PLAIN)
    singles, out = list(_singles(text)), []
    i = 0
    while i < len(singles):
        one = singles[i]
        after = singles[i + 1] if i + 1 < len(singles) else None
        if after and one.kind == after.kind == "moment" and one.end is None is after.end and _joined(text, one, after):
            kind = "moment" if one.start <= after.start else "bad"
            out.append(Time(one.at, after.to, one.start, after.start, kind))
            i += 2
        elif out and one[2:4] == out[-1][2:4] and _AGAIN.fullmatch(text, out[-1].to, one.at):
            out[-1] = out[-1]._replace(to=one.to)
            i += 1
        else:
            out.append(one)
            i += 1
    if out and out[-1].end is None and _CUT.fullmatch(text, out[-1].to):
        out[-1] = out[-1]._replace(kind="bad")
    return out


def _number(text: str) -> Decimal:
    if text[0] in ".0123456789":
        return Decimal(text.replace(",", ""))
    if text.isascii():
        return Decimal(sum(_WORDS[word] for word in re.split("[ -]", text)))
    total = digit = 0
    for c in text:
        if c in "十百":
            total, digit = total + (digit or 1) * (10 if c == "十" else 100), 0
        else:
            digit = _HAN[c]
    return Decimal(total + digit)


def _singles(text: str) -> Iterator[Time]:
    """The times of a text. A span whose first number has no unit of its own counts as one of them."""
    at = done = 0
    while found := _TIME.search(text, at):
        at = found.end()
        if found["clock"]:
            if time := _clock(text, found):
                yield time
                done = at
        elif found["named"]:
            if yielded := _named(text, found):
                yield from yielded
                at = done = yielded[-1].to
            else:  # a unit follows
                at = found.start("named")
                if (number := _TIME.match(text, at)) is None:
                    at = found.end()
                elif yielded := _with_units(text, number, done, found.start()):
                    yield from yielded
                    at = done = yielded[-1].to
                else:
                    at = number.end()
        elif yielded := _with_units(text, found, done):
            yield from yielded
            at = done = yielded[-1].to


def _named(text: str, found: re.Match) -> list[Time]:
    """The times of "second 12", "t=12.5 to 20" or "seconds 5, 10 and 15"; none if the numbers have a unit."""
    at = found.end()
    if _SUFFIX.match(text, at) or re.match("[a-z]", text[at : at + 1]):
        return []
    end = None
    if upper := _UPPER.match(text, at):
        end, at = _number(upper[1]), upper.end()
    elif _TO.match(text, at) and re.match(rf"{_DASH}{_DIGITS}", text[at : at + 80]):
        return []
    out = [_time(found.start(), at, _number(found["named"]), end, "moment")]
    several = re.match("(?:second|timestamp)s", found[0])
    while (
        (more := _MORE.match(text, at))
        and (several or more["last"] is not None)
        and not _SUFFIX.match(text, more.end())
    ):
        at = more.end()
        out.append(_time(more.start(1), at, _number(more[1]), _number(more[2]) if more[2] else None, "moment"))
    return out


def _time(at: int, to: int, start: Decimal, end: Decimal | None, kind: str) -> Time:
    if end is not None and end < start:
        kind = "bad"
    return Time(at, to, float(start), None if end is None else float(end), kind)


def _clock(text: str, found: re.Match) -> Time | None:
    """The time of mm:ss, hh:mm:ss or hh:mm:ss:mmm; None for a ratio or a time of day."""
    at, to = found.start(), found.end()
    digits, _, fraction = found["clock"].replace("：", ":").replace(",", ".").partition(".")
    parts = digits.split(":")
    if _OF_DAY.match(text, to) or _DATE.search(text, max(at - 14, 0), at):
        return None
    if len(parts) in (3, 4) and len(parts[-1]) == 3 and not fraction:
        fraction = parts.pop()
    if len(parts[-1]) != 2 or len(parts[0]) > 3:
        return None
    seconds = Decimal(f"0.{fraction or 0}")
    for scale, part in zip((1, 60, 3600), reversed(parts), strict=False):
        seconds += scale * int(part)
    is_time = len(parts) <= 3 and all(len(part) == 2 and part <= "59" for part in parts[1:])
    return Time(at, to, float(seconds), None, "moment" if is_time else "bad")


def _unit(found: re.Match) -> str:
    return next(unit for unit in _SCALES if found[unit])


def _with_units(text: str, found: re.Match, done: int, named: int | None = None) -> list[Time]:
    """The times of "1 minute 5 seconds", "3 to 5 seconds" or "5, 10 and 15 seconds"; none if the unit is none.

    done: no earlier text is used. named: where a word stands that says that it is a time.
    """
    at, to, unit = found.start(), found.end(), _unit(found)
    seconds = _number(found["n"]) * _SCALES[unit]
    alone = named is None and found[unit] in ("m", "h", "分")  # metres, points of a game, …
    last = unit
    while last in ("h", "m") and (more := _PAIR.match(text, to)) and _SCALES[_unit(more)] < _SCALES[last]:
        last, to, alone = _unit(more), more.end(), False
        seconds += _number(more["n"]) * _SCALES[last]
    if named is not None:
        return [_time(named, to, seconds, None, "moment")]
    if alone or (found[unit] == "s" and text[to - 2] == "0" and _is_age(text, found)):
        return []
    before = text[max(at - 48, done) : at]
    start, end = seconds, None
    if (lower := _LOWER.search(before)) and _is_pair(lower, before[: lower.start()]):
        start, end = _number(lower[1]) * _SCALES[unit], seconds
        at -= len(before) - lower.start()
        before = before[: lower.start()]
    elif _FIRST.search(before):
        start, end = Decimal(0), seconds
    hyphen = "-" in text[found.end("n") : found.start(unit)]  # a 5-second clip, a 5 minute walk
    is_adjective = hyphen or (found[unit] in ("second", "minute", "hour") and seconds > _SCALES[unit])
    is_adjective = is_adjective and end is None and bool(_ATTRIBUTE.match(text, to))
    if is_adjective or _LENGTH_BEFORE.search(before) or _LENGTH_AFTER.match(text, to):
        return [_time(at, to, start, end, "length")]
    out = [*_sharing(text, at, done, _SCALES[unit], start), _time(at, to, start, end, "moment")]
    if len(out) > 1 and _LENGTH_BEFORE.search(text[max(out[0].at - 48, done) : out[0].at]):
        return [time._replace(kind="length") for time in out]
    return out


def _sharing(text: str, at: int, done: int, scale: Decimal, last: Decimal) -> list[Time]:
    """The times before `at` that share the unit of the one there, which is the last; none if they do not rise to it."""
    begin = max(at - _LIST_LENGTH, done)
    lead = "\r" if 0 < begin == done else "." if begin else "\n"  # after a time, anywhere, where the text begins
    if not (found := _LIST.search(lead + text[begin:at])):
        return []
    out, begin = [], at - len(found[1])
    for item in _ITEM.finditer(found[1]):
        start, end = _number(item[1]) * scale, _number(item[2]) * scale if item[2] else None
        out.append(_time(begin + item.start(), begin + item.end(), start, end, "moment"))
    rising = [time.start for time in out] + [float(last)]
    return out if rising == sorted(rising) else []


def _is_pair(lower: re.Match, before: str) -> bool:
    """Whether a number without a unit is the start of a span."""
    return bool(lower["to"] or (_BETWEEN if lower["and"] else _START).search(before))


def _is_age(text: str, found: re.Match) -> bool:
    """Whether "30s" is an age or "1980s" is a decade."""
    return (len(found["n"]) == 4 and found["n"].isdigit() and found["n"][:2] in ("18", "19", "20")) or bool(
        _AGE.search(text, max(found.start() - 8, 0), found.start())
    )


def _joined(text: str, one: Time, after: Time) -> bool:
    """Whether what stands around and between two times makes them the ends of a span."""
    if after.at - one.to > 60:
        return False
    between, before = text[one.to : after.at], text[max(one.at - 40, 0) : one.at]
    if _TO.fullmatch(between):
        return True
    if _AND.fullmatch(between):
        return bool(_BETWEEN.search(before) or re.match(r"\s*之间", text[after.to : after.to + 5]))
    if _COMMA.fullmatch(between):
        return before.rstrip("\"'`")[-1:] in ("[", "(") and text[after.to : after.to + 2].lstrip("\"'`")[:1] in (
            "]",
            ")",
        )
    if between.strip() == "|":  # two cells of a table
        return True
    return bool(_END.fullmatch(between) and _START.search(before))


def is_alone(text: str, time: Time) -> bool:
    """Whether the text is nothing but this time, apart from marks and words such as "at"."""
    return not _LEAD.sub("", text[: time.at] + text[time.to :]).strip()


def said(text: str, spots: Sequence[Time]) -> list[str]:
    """What the text says of each moment.

    In a line that begins with a time, what stands between this time and the next one, or else the next line. In any
    other line, the sentence.
    """
    out = []
    line_start = line_end = -1
    leads = False
    for i, spot in enumerate(spots):
        if spot.at >= line_end:
            line_start = text.rfind("\n", 0, spot.at) + 1
            leads = _LEAD.match(text, line_start, spot.at).end() == spot.at  # type: ignore[union-attr]
            line_end = text.find("\n", spot.to)
            line_end = len(text) if line_end < 0 else line_end
        following = spots[i + 1].at if i + 1 < len(spots) else len(text)
        if leads:
            out.append(_beside(text, spot.to, line_end, following))
        else:
            start, end = max(line_start, spot.at - _SENTENCE_LENGTH), min(line_end, spot.to + _SENTENCE_LENGTH)
            for stop in _SENTENCE.finditer(text, start, spot.at):
                start = stop.end()
            full_stop = _SENTENCE.search(text, spot.to, end)
            end = full_stop.end() if full_stop else end
            if _CLOSED.fullmatch(text, spot.to, end) and text[start : spot.at].rstrip()[-1:] in _OPENING:
                end = spot.at  # A dog runs (0:05 - 0:09).
            out.append(text[start:end].strip(" \t\r\n*-•(:["))
    return out


def _beside(text: str, at: int, line_end: int, following: int) -> str:
    """What stands after a time that ends at `at`. following: where the next time begins."""
    begin = _AFTER.match(text, at, line_end).end()  # type: ignore[union-attr]
    said = text[begin : min(line_end, following)]
    if following < line_end:
        said = said[:-40] + _BEFORE_NEXT.sub("", said[-40:])
    elif not said.strip():  # a heading
        below = text.find("\n", line_end + 1)
        below = len(text) if below < 0 else below
        said = text[line_end + 1 : below] if below <= following else ""
    said = _TAG.sub("", said)
    if label := _LABEL.match(said):
        said = said[label.end() :]
    return "" if not re.search(r"\w", said) else said.strip(' \t\r\n*_|"“”`-–—•<>[]')


def clock(seconds: float, places: int = 0) -> str:
    """mm:ss or hh:mm:ss, exactly, with at least so many decimal places."""
    whole, _, fraction = plain(seconds).partition(".")
    fraction = fraction.rstrip("0").ljust(places, "0")
    minutes, rest = divmod(int(whole), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours:02}:" if hours else "") + f"{minutes:02}:{rest:02}" + (f".{fraction}" if fraction else "")


def plain(seconds: float) -> str:
    """The seconds exactly, without an exponent."""
    return f"{Decimal(repr(float(seconds))):f}"
