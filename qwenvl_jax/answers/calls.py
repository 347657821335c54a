"""The JSON of tool calls: what a pair of tags holds, and calls without tags."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from qwenvl_jax.answers.lenient import Unreadable, read

# What may stand before and after a call without tags.
_LINE = re.compile(
    r"(?m)^[ \t]{0,9}(?:[-*>#]{1,3}[ \t])?(?:[*_]{0,2}\w[\w ]{0,20}[*_]{0,2}[:：][*_]{0,2}[ \t]{0,9})?"
    r"(?:`{1,3}(?:[a-z]{1,9}\s)?\s{0,9}|<[a-z_]{1,20}>\s{0,9})?(?=[\[{])"
)
_AFTER = re.compile(r"\s*+(?:`{1,3}|</[a-z_]{1,20}>)?")
_FENCE = re.compile(r"```(?:json)?|```")
_BETWEEN = re.compile(r"[\s,;}\]]*+")  # between calls in one pair of tags, and after the last; models double brackets


class ToolCall(NamedTuple):
    """One call. arguments: what JSON can hold."""

    name: str
    arguments: dict[str, Any]


def calls_of(body: str, closed: bool) -> tuple[list[ToolCall], str] | None:
    """(the calls in a body, the text after them), or None if it is malformed.

    closed: a closing tag follows, so that the body is not cut short, and no text may stand in it.
    """
    body = _FENCE.sub("", body, count=1).lstrip() if body.lstrip().startswith("```") else body.lstrip()
    if body.startswith("{{"):  # the braces of a format string
        body = body[1:]
    if "name" not in body:  # soon done with texts of thousands of tags
        return None
    if body.startswith('"name"'):
        body = "{" + body
    body += "\n" * closed  # a number at the end is complete
    calls: list[ToolCall] = []
    at = 0
    try:
        while at < len(body) and body[at] in "{[":
            found = read(body, at)
            if closed and found.half:
                return None
            values = found.value if isinstance(found.value, list) else [found.value]
            calls += [_call(value, () if closed else found.open) for value in values]
            at = _BETWEEN.match(body, found.end).end()  # type: ignore[union-attr]
    except ValueError:
        return None
    if not calls or (closed and body[at:].replace("```", "").strip()):
        return None
    return calls, "" if closed else body[len(body[:at].rstrip()) :]


def _call(value, unfinished: Sequence) -> ToolCall:
    """Raises ValueError if the value is no call, or its arguments are among the `unfinished` lists and dicts."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]  # OpenAI's form
    if not isinstance(value, Mapping) or not isinstance(name := value.get("name"), str) or not name:
        raise ValueError("a call has a name")
    key = next((key for key in ("arguments", "parameters", "args") if key in value), "arguments")
    if key not in value and (value.keys() - {"name", "id", "type"} or any(value is part for part in unfinished)):
        raise ValueError("a call has arguments")
    arguments = value.get(key)
    if any(arguments is part for part in unfinished):
        raise ValueError("the arguments are cut short")
    if isinstance(arguments, str):
        arguments = _object(arguments)
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no object")
    json.dumps(
        [name, arguments], ensure_ascii=False
    ).encode()  # raises for half of a surrogate pair, which no message can hold
    return ToolCall(name, arguments)


def untagged(text: str, names: Collection[str]) -> tuple[list[ToolCall], str] | None:
    """(the calls of the named tools in a text without tags, the text beside them).

    None if the text calls one of them in a form that is none of these.
    """
    rest, calls, at, done = "", [], 0, 0
    while found := _LINE.search(text, at):
        try:
            value, at, unfinished, half = read(text, found.end())
            values = value if isinstance(value, list) else value.get("tool_calls", [value])
            made = [] if half or not isinstance(values, list) else [_call(one, unfinished) for one in values]
        except Unreadable as e:
            at = e.at
            continue
        except ValueError:
            continue
        if made and all(call.name in names for call in made):
            calls += made
            rest += text[done : found.start()]
            done = at = _AFTER.match(text, at).end()  # type: ignore[union-attr]
    rest += text[done:]
    any_name = "|".join(map(re.escape, names))
    if re.search(rf"[\"'=<]\s?(?:{any_name})\b|\b(?:{any_name})\s?[({{]", rest):
        return None
    return calls, rest.strip() if calls else rest


def _object(text: str):
    """The value of arguments that are given as JSON text."""
    if not (text := text.strip()):
        return {}
    if text[0] != "{":
        raise ValueError("the arguments are no object")
    found = read(text)
    if found.half or found.open or text[found.end :].strip():
        raise ValueError("the arguments are cut short")
    return found.value
