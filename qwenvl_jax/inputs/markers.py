"""Puts the media that stand beside a record's messages into them, in place of `<image>` and `<video>`."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax.errors import BadRecord, shown
from qwenvl_jax.inputs.fields import present

_SOURCES = ("image", "image_url", "video", "video_url", "url", "path")
# Markers of other programs, in texts of users and tools.
_FOREIGN = re.compile(
    r"<img>[^<\n]{0,4096}</img>|<\|vision_start\|>(?:<\|(?:image|video)_pad\|>)+<\|vision_end\|>|<audio>|<\|(?:image|audio)_\d+\|>"
    r"|<image[ _-]?\d+>|<ImageHere>|<image_placeholder>|<image_soft_token>|<start_of_image>|<IMG_CONTEXT>|<__media__>"
)
_BOXES = re.compile(r"<bbox>|<ref-object>")  # ms-swift's, in the texts of every role
_BREAK = "(?:\r\n|[\n\r\x85\u2028\u2029])?"  # one line break of any system, or none
_MARKER = re.compile(f"{_BREAK}<(image|video)>{_BREAK}")
_AS_TEXT = 'if it is meant as text, write the content as [{"type": "text", "text": …}]'


def with_media(messages: list, given: Mapping, folder: Path | None) -> list:
    """The messages with the record's media in place of markers, and relative paths starting from `folder`.

    given: the record; `image`, `images`, `video`, `videos` and `data_path` are read. Raises BadRecord.
    Only user and tool messages hold markers, in contents that are a text; items of text are taken as they are. The
    line break before and after a marker is removed with it: datasets write them, prompts do not. Media without any
    marker stand before the first user's text, as in TRL and ms-swift. Markers of other programs are refused.
    """
    _check_foreign(messages)
    beside = {kind: [*_as_list(given, kind), *_as_list(given, kind + "s")] for kind in ("image", "video")}
    if "data_path" in given:  # of Qwen's own training code
        if not isinstance(given["data_path"], str):
            raise BadRecord("messages", f"'data_path' is {shown(given['data_path'])}; it must be one folder, as a text")
        folder = (folder or Path()) / given["data_path"]
    if "conversations" not in given:  # there, LLaVA, Qwen and LLaMA-Factory refuse media without a marker
        messages = _with_missing_markers(messages, beside)
    used: dict[str, int] = {"image": 0, "video": 0}

    def next_source(kind: str):
        used[kind] += 1
        return beside[kind][used[kind] - 1] if used[kind] <= len(beside[kind]) else ""

    def with_source(item):
        if not isinstance(item, Mapping):
            return item
        sources = present({k: item[k] for k in _SOURCES if k in item})
        item = {k: v for k, v in item.items() if k in sources or k not in _SOURCES}
        inline = item.get("base64") is not None or item.get("source") is not None
        if not sources and item.get("type") in list(used) and not inline:
            sources = {item["type"]: next_source(item["type"])}
        return {**item, **{k: _resolved(source, folder) for k, source in sources.items()}}

    out = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple):
            message = {**message, "content": [with_source(item) for item in content]}
        elif isinstance(content, str) and message.get("role") in ("user", "tool"):
            parts = _MARKER.split(content)  # text at even indices, kinds at odd ones
            if len(parts) > 1:
                items = ({"type": p} if i % 2 else {"type": "text", "text": p} for i, p in enumerate(parts) if p)
                message = {**message, "content": [with_source(item) for item in items]}
        out.append(message)
    for kind, count in used.items():
        if count != len(beside[kind]):
            hint = "" if beside[kind] else f" (<{kind}> stands for one; {_AS_TEXT})"
            said = f"messages refer to {count} {kind}s; the record has {len(beside[kind])}{hint}"
            raise BadRecord("placeholders", said)
    return out


def _check_foreign(messages: list) -> None:
    """Raises BadRecord for a marker that would be learnt as characters."""
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str):
            continue
        if found := _BOXES.search(content):
            said = f"message {i} has ms-swift's {found[0]}; write the object or its box into the text"
            raise BadRecord("placeholders", f"{said}; {_AS_TEXT}")
        if message.get("role") in ("user", "tool") and (found := _FOREIGN.search(content)):
            what = (
                "the model cannot hear" if "audio" in found[0] else "write <image> or <video> there, and the file into "
            )
            what += "" if "audio" in found[0] else "'images' or 'videos'"
            said = f"message {i} has {shown(found[0])}, another program's marker of a picture, clip or sound; {what}"
            raise BadRecord("placeholders", f"{said}; {_AS_TEXT}")


def _with_missing_markers(messages: list, beside: dict[str, list]) -> list:
    """Adds the markers of media that no message refers to, if the first user's content is a text."""
    contents = [m.get("content") for m in messages if isinstance(m, Mapping)]
    texts = "".join(c for c in contents if isinstance(c, str))
    items = [i for c in contents if isinstance(c, list | tuple) for i in c if isinstance(i, Mapping)]
    used = {str(i.get("type")).removesuffix("_url") for i in items} | {k for k in beside if f"<{k}>" in texts}
    missing = "".join(f"<{kind}>" * len(media) for kind, media in beside.items() if kind not in used)
    first = next((i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "user"), None)
    if not missing or first is None or not isinstance(messages[first]["content"], str):
        return messages
    # The line break is removed with the marker; one that the text begins with stays.
    message = {**messages[first], "content": f"{missing}\n{messages[first]['content']}"}
    return [*messages[:first], message, *messages[first + 1 :]]


def _as_list(given: Mapping, key: str) -> Sequence[Any]:
    """The media under a key, which tables of text hold as JSON text."""
    value = given.get(key)
    if isinstance(value, str) and re.match(r"""\s*(\[\s*["'{\[\]]|\{\s*["'])""", value):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            if re.match(r"[\s\[{]*'", value) and value.rstrip()[-1] in "]}":
                raise BadRecord("media", f"{key!r} is {shown(value)}, as Python prints it; write it as JSON") from None
    return value if isinstance(value, list | tuple) else [] if value is None else [value]


def _resolved(source, folder: Path | None):
    if isinstance(source, Mapping) and "url" in source:
        return {**source, "url": _resolved(source["url"], folder)}
    if isinstance(source, Mapping) and source.keys() <= {"bytes", "path"}:  # a picture of Hugging Face datasets
        stored = source.get("bytes")
        return _resolved(source.get("path", ""), folder) if stored is None else stored
    if isinstance(source, list | tuple):  # the frames of a clip
        return [_resolved(s, folder) for s in source]
    if folder is None or not isinstance(source, str) or re.match(r"(?i)[a-z][a-z0-9+.-]*://|data:", source):
        return source
    return str(folder / source)
