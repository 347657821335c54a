"""Times and spans of time in a sentence, in English and Chinese: where they stand and how many seconds they are.

A number is a time if a colon or a unit makes it one: 00:12, 1:02:03.5, 12.5 seconds, 12s, 1 minute 5 seconds, the 12th
second, second 12, t=12.5, 第12秒, 1分05秒. The numbers of a list share the unit: at 5, 10 and 15 seconds. A length of
time ("for 3 seconds", "a 10-second clip"), a time of day ("3:45 PM"), a ratio ("16:9") and an age ("in her 30s") are no
moments.
"""

import re
from collections.abc import Iterator
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
    r"(?:(?P<ms>milliseconds?|msecs?|ms|毫秒)|(?P<h>hours?|hrs?|h|个?小时)|(?P<m>minutes?|mins?|m|分钟|分|′"
    r"|minutos?|minuten?|minuti|минут[аыу]?|분)|(?P<s>seconds?|secs?|s|秒钟?|″|segundos?|sekunden?|secondes?|secondi|секунд[аыу]?"
    r"|초))(?![a-zа-я])"
)
_TO_UNIT = r"(?:st|nd|rd|th)?[*_`$]{0,3}[ \t-]{0,2}"
_PAIR = re.compile(rf"[ \t]?,?[ \t]?(?:and[ \t])?零?(?P<n>{_N}){_TO_UNIT}{_UNIT}")
_SUFFIX = re.compile(_TO_UNIT + _UNIT)
_TIME = re.compile(
    rf"""(?=[.0-9{_HAN_DIGITS}oetfsnzm])(?<![0-9a-z])(?<![0-9][:：,])(?<![^.]\.)(?:
    (?P<clock>[0-9]{{1,9}}+(?:[:：][0-9]{{1,9}}+){{1,4}}+(?:[.,][0-9]{{1,20}}+(?![:：][0-9]))?)(?![0-9]|[:：][0-9])
        (?:[ ]?s(?:ec(?:ond)?s?)?\b)?
    |(?:(?:(?<!the[ ])(?<!a[ ])(?:seconds?|(?<!every[ ])(?<!per[ ])(?<!each[ ])minutes?)
        |timestamps?)(?:[ ]?[=≈:]|[ ]is|[ ]of|(?=[ ]))|t[ ]?[=≈:])[ ]?
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
# "from the start to 5 seconds"
_FROM_START = re.compile(
    rf"(?:\bfrom[ ]|从)(?:the[ ])?(?:very[ ])?(?:start|beginning|开头|开始|头)(?:[ ]of[ ]the[ ](?:video|clip))?{_DASH}$"
)
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
# The end of a span without a unit: "from 3.2 seconds to 5.", "starts at 3.2 seconds and ends at 5."
_THEN = re.compile(rf"(?:{_DASH}|(?P<ends>{_END.pattern}))({_DIGITS})(?=[ ]?(?:[,;)\]，。；\n]|\.(?![0-9])|$))")
# What makes 分 minutes and not points of a game.
_MINUTE_BEFORE = re.compile(r"[从到至第于在自][ ]?$")
_MINUTE_AFTER = re.compile(rf"[ ]?(?:处|时|左右|整|之间|开始|{_DASH}{_N}{_TO_UNIT}分)")
# Numbers that share the unit of the last one: "at 5, 10 and 15 seconds"; and those after the first: "seconds 5, 10".
_SPAN = rf"({_DIGITS})(?:st|nd|rd|th)?(?:{_DASH}({_DIGITS})(?:st|nd|rd|th)?)?"
_AND_THEN = r"(?:and[ ]then|and|or|&|then)[ ]"
_SHARE = rf"(?:[ ]?[,，、;][ ]?(?:{_AND_THEN})?|[ ]{_AND_THEN}|[ ]?[和与及][ ]?)(?:at[ ]|第)?"
_BEFORE_LIST = r"\b(?:at|near|from|between|during|for|around|about|approximately|the)[ ]|[第在约从:：\n(\[]"
_LIST = re.compile(rf"(?:{_BEFORE_LIST}|\r{_SHARE})[ ]?((?:{_SPAN}{_SHARE})+)$")
_ITEM = re.compile(_SPAN)
_MORE = re.compile(rf"{_SHARE}{_SPAN}(?![0-9a-z]|[:：.][0-9])(?P<last>(?=[ ]?(?:[,，、;.)\]\n]|$|(?:and|or|&)[ ])))?")
_PLAIN = {ord(wide): narrow for wide, narrow in zip("０１２３４５６７８９．", "0123456789.", strict=True)}
_QUOTES = re.compile(r"(?<![0-9.])([0-9]{1,3})['’]([0-5][0-9](?:\.[0-9]{1,9})?)[\"”](?![ ]?(?:tall|high|long|wide))")
_POINT = re.compile(r"(?<=[0-9])[｡·](?=[0-9])")
_PLAIN |= {capital: chr(capital + 32) for capital in range(ord("A"), ord("Z") + 1)}  # str.lower() may move what follows
_LIST_LENGTH = 120  # most characters of numbers that share a unit


class Time(NamedTuple):
    """A time or span in a text."""

    at: int  # where it begins in the text
    to: int  # the index after it
    start: float  # seconds
    end: float | None  # None: an instant
    kind: str  # "moment", "length" (of time), or "bad": looks like a time but is none


def find(text: str) -> list[Time]:
    """All times and spans of a text, in its order. Their places do not overlap."""
    text = _POINT.sub(".", _QUOTES.sub(r"\1′\2″", text.translate(_PLAIN)))  # as long as it was
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
            if (
                one.end is None
                and one.kind == "moment"
                and (begin := _FROM_START.search(text[max(one.at - 60, 0) : one.at]))
            ):
                one = one._replace(at=one.at - len(begin[0]), start=0.0, end=one.start)
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
    scale = 60 if found[0].startswith("minute") else 1
    out = [_time(found.start(), at, _number(found["named"]) * scale, end and end * scale, "moment")]
    several = re.match("(?:second|minute|timestamp)s", found[0])
    while (
        (more := _MORE.match(text, at))
        and (several or more["last"] is not None)
        and not _SUFFIX.match(text, more.end())
    ):
        at = more.end()
        ends = [_number(n) * scale if n else None for n in more.groups()[:2]]
        out.append(_time(more.start(1), at, ends[0] or Decimal(0), ends[1], "moment"))
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
    alone = named is None and found[unit] in ("m", "h", "分", "′", "″")  # metres, points, feet, …
    last = unit
    while last in ("h", "m") and (more := _PAIR.match(text, to)) and _SCALES[_unit(more)] < _SCALES[last]:
        last, to, alone = _unit(more), more.end(), False
        seconds += _number(more["n"]) * _SCALES[last]
    if named is not None:
        return [_time(named, to, seconds, None, "moment")]
    if alone and found[unit] in ("m", "h", "分"):
        alone = not (done and _TO.fullmatch(text, done, at))  # not the end of a span
        if found[unit] == "分" and alone:
            alone = not (_MINUTE_BEFORE.search(text, max(at - 2, 0), at) or _MINUTE_AFTER.match(text, to))
            alone = alone and bool(re.search(r"\w", text[:at][-20:] + text[to : to + 20]))
    if alone or (found[unit] == "s" and text[to - 2] == "0" and _is_age(text, found)):
        return []
    before = text[max(at - 48, done) : at]
    start, end = seconds, None
    if text[at - 1 : at] in tuple("-−") and at - 1 >= done and _is_minus(text, at - 1, done, to):
        return [_time(at - 1, to, -seconds, None, "bad")]
    if (lower := _LOWER.search(before)) and _is_pair(lower, before[: lower.start()]):
        start, end = _number(lower[1]) * _SCALES[unit], seconds
        at -= len(before) - lower.start()
        before = before[: lower.start()]
    elif _FIRST.search(before):
        start, end = Decimal(0), seconds
    if end is None and (then := _THEN.match(text, to)) and (not then["ends"] or _START.search(before)):
        if (value := _number(then[then.lastindex or 0]) * _SCALES[unit]) >= start:
            end, to = value, then.end()
    hyphen = "-" in text[found.end("n") : found.start(unit)]  # a 5-second clip, a 5 minute walk
    is_adjective = hyphen or (found[unit] in ("second", "minute", "hour") and seconds > _SCALES[unit])
    is_adjective = is_adjective and end is None and bool(_ATTRIBUTE.match(text, to))
    if is_adjective or _LENGTH_BEFORE.search(before) or _LENGTH_AFTER.match(text, to):
        return [_time(at, to, start, end, "length")]
    out = [*_sharing(text, at, done, _SCALES[unit], start), _time(at, to, start, end, "moment")]
    if len(out) > 1 and _LENGTH_BEFORE.search(text[max(out[0].at - 48, done) : out[0].at]):
        return [time._replace(kind="length") for time in out]
    return out


def _is_minus(text: str, at: int, done: int, to: int) -> bool:
    """Whether the dash at a place makes the time behind it negative: it joins no two times and begins no item."""
    before = text[max(at - 9, done) : at]
    if not before.rpartition("\n")[2].strip():
        return not done and not re.search(r"\w", text[to : to + 20].partition("\n")[0])
    return bool(re.search(r"(?:[^\W\d_][ ]|[:：=(,\[][ ]?)$", before))


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
