"""The keys under which JSON says when something happens: "start_time", "timestamp", "duration (s)"."""

import re
from functools import lru_cache

# Without marks, case and unit, as `name` gives them.
_STARTS = "start starttime begin begintime from timestampstart starttimestamp starts tstart"
_ENDS = "end endtime stop finish to until timestampend endtimestamp ends tend"
_WHENS = (
    "time times timestamp timestamps timespan timespans timerange timeranges timeinterval interval intervals segment "
    "segments span spans window windows relevantwindows moment moments t sec secs second seconds at when timecode range"
)
START = {*_STARTS.split(), "开始", "开始时间", "起始", "起始时间"}
END = {*_ENDS.split(), "结束", "结束时间"}
WHEN = {*_WHENS.split(), "时间", "时间戳", "时刻", "时间段", "时间点", "时间范围"}
DURATION = {"duration", "持续时间", "时长"}
TIMES = START | END | WHEN | DURATION
ANSWERS = {"answer", "finalanswer", "result", "output", "response", "答案"}
SPANS = ANSWERS | {"clip", "clips", "video", "event", "events"}  # spans of numbers may stand under them
# Keys that other things have too: a value that is no time is no fault.
ALSO = {*"from to at t sec secs second seconds stop finish until segment segments window windows range moment".split()}
TEXTS = (
    "description desc event eventdescription caption label text content activity action sentence summary query".split()
)
TEXTS += ["title", "name", "描述", "事件", "内容", "动作", "说明"]

_MS = r"[mM][sS]|[mM]secs?|[mM]illis(?:econds?)?"
# The unit at the end of "start_ms", "timestampMs", "time (s)", "duration_in_seconds".
_UNIT = re.compile(
    rf"(?:[\s_(\[-]+(?:[iI]n[\s_-]?)?(?:(?P<ms>{_MS})|[sS](?:ec(?:ond)?s?)?)[)\]]?"
    r"|(?:[iI]n)?(?:(?P<ms2>Ms|[mM]illis(?:econds?)?)|[sS]ec(?:ond)?s?))$"
)


@lru_cache(maxsize=1024)
def name(key: str) -> str:
    """A key without marks and case, and without its unit if it is a time; "" for a long one."""
    if len(key) >= 40:
        return ""
    plain, bare = (re.sub(r"[\W_]", "", k.lower()) for k in (key, _UNIT.sub("", key)))
    return bare if bare in TIMES else plain


def is_milliseconds(key: str | None, value) -> bool:
    """Whether the key says so of the numbers in a value, which have no unit of their own."""
    unit = _UNIT.search(key) if key and len(key) < 40 else None
    return bool(unit and (unit["ms"] or unit["ms2"]) and not re.search(r"[^-+0-9.eE,\s'\[\]]", str(value)))
