"""What a text says around its times: the words of a moment."""

import re
from collections.abc import Sequence

from qwenvl_jax.answers.times import Time

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
    r"|in(?:to[ ]the[ ](?:video|clip))?\b|onwards?\b|(?:to|till|until)[ ]the[ ](?:very[ ])?end\b"
    r"|of[ ]the[ ](?:video|clip)\b"
    r"|[到至](?:最后|结尾|末尾|片尾|视频结束)|处|时(?!间)|左右|之间"
    r"|开始|结束)*+",
    re.I,
)
_TAG = re.compile(r"</?[a-zA-Z_]{1,20}>")
_LABEL = re.compile(r"\W*(?:description|event|caption|activity|action|描述|事件|内容)[\s\"'*]*[:：]", re.I)
_SENTENCE_LENGTH = 300  # of a long sentence, so many characters to each side of its time count


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
