"""Turns OpenAI- and Qwen-style messages into one form, which all later code reads."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from qwenvl_jax.errors import InputError, shown
from qwenvl_jax.inputs.fields import ITEM, MESSAGE, URL, present, read_keys
from qwenvl_jax.inputs.options import IMAGE, VIDEO, MediaOptions
from qwenvl_jax.options import check_names, checked

_ROLES = {r: r for r in ("system", "user", "assistant", "tool")} | {
    "developer": "system",
    "function": "tool",
}  # OpenAI's
_MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id"}
_KINDS = {
    "text": "text", "input_text": "text", "output_text": "text",
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
_SOURCES = {
    "text": ("text",),
    "image": ("image", "image_url", "url", "path", "base64", "source"),
    "video": ("video", "video_url", "url", "path"),
}
_ANY_SOURCE = tuple({key: None for keys in _SOURCES.values() for key in keys})
_OPTIONS = {"text": (), "image": IMAGE, "video": VIDEO}
_DETAIL = ("auto", "low", "high")


class Media(NamedTuple):
    """A picture or clip that a message refers to, not yet opened."""

    kind: str  # "image" or "video"
    source: Any
    options: dict  # the MediaOptions that the item sets
    where: str  # "message 0 item 1", for errors


def normalize(messages: Sequence[Mapping]) -> tuple[list[dict], list[Media]]:
    """OpenAI- and Qwen-style messages in the form that chat templates read, and their media in reading order.

    Content stays a string, or becomes a list of `{"type": "text", "text": …}`, `{"type": "image", …}` and
    `{"type": "video", …}`. Keys that are None or [] count as absent: dataset rows and dumped SDK objects have them.
    `fields.py` lists the keys that are passed over.
    Raises InputError that names the message and the item.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError("messages must be a list of at least one {'role': …, 'content': …}")
    read = [_message(m, f"message {i}") for i, m in enumerate(messages)]
    return [message for message, _ in read], [m for _, media in read for m in media]


def map_texts(messages: Sequence[Mapping], change: Callable[[str, range, Any], str]) -> list[dict]:
    """The messages, which `normalize` accepts, with `change(text, pictures, role)` in place of each text.

    The arguments of tool calls are texts of the assistant, as JSON.
    pictures: which of the conversation's media the text may be about: those of its own message, else of the latest
        message before it that has some.
    """
    out: list[dict] = []
    pictures = range(0)
    for message in messages:
        content, role = message.get("content"), message.get("role")
        items = content if isinstance(content, list | tuple) else ()
        is_text = [_kind(_item_keys(item), "") == "text" for item in items]
        if not all(is_text):
            pictures = range(pictures.stop, pictures.stop + is_text.count(False))
        if isinstance(content, str):
            content = change(content, pictures, role)
        elif items:
            content = [
                {**item, "text": change(item["text"], pictures, role)} if text else item
                for item, text in zip(items, is_text, strict=True)
            ]
        out.append({**message, "content": content})
        if isinstance(calls := message.get("tool_calls"), list | tuple):
            out[-1]["tool_calls"] = [_with_arguments(call, change, pictures, role) for call in calls]
    return out


def _with_arguments(call: Mapping, change: Callable[[str, range, Any], str], *about) -> dict:
    """A tool call with its arguments changed, which are JSON text or an object."""
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"], change, *about)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        return {**call, "arguments": change(arguments, *about)}
    if not arguments:
        return {**call}
    return {**call, "arguments": json.loads(change(json.dumps(arguments, ensure_ascii=False), *about))}


def _present(value: Mapping) -> dict:
    return {k: v for k, v in value.items() if v is not None and not (isinstance(v, list) and not v)}


def _item_keys(item: Mapping) -> dict:
    """The keys of an item that say something. An empty source beside another counts as absent, as tables write it."""
    given = _present(item)
    full = present({k: given[k] for k in _ANY_SOURCE if k in given})
    return {k: v for k, v in given.items() if not full or k in full or k not in _ANY_SOURCE}


def _message(message, where: str) -> tuple[dict, list[Media]]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is of {_type(message)}, not an object with 'role' and 'content'")
    given = read_keys(_present(message), MESSAGE, where)
    role = given.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{where} has role {shown(role)}; known roles are {', '.join(_ROLES)}")
    if unknown := sorted(map(str, given.keys() - _MESSAGE_KEYS)):
        raise InputError(f"{where} has an unknown key {shown(unknown[0])}")
    out: dict[str, Any] = {"role": _ROLES[role]}
    if "tool_calls" in given:
        if role != "assistant":
            raise InputError(f"{where} has tool_calls but its role is {role!r}, not 'assistant'")
        out["tool_calls"] = _tool_calls(given["tool_calls"], where)
    content = message.get("content")
    if content is None and "tool_calls" in out:
        content = ""
    media: list[Media] = []
    if isinstance(content, str):
        out["content"] = content
    elif isinstance(content, list | tuple):
        items = [_item(item, f"{where} item {j}") for j, item in enumerate(content)]
        out["content"], media = [item for item, _ in items], [m for _, m in items if m is not None]
    else:
        raise InputError(f"{where} has content of {_type(content)}; it must be a string or a list of items")
    for key in ("name", "tool_call_id"):
        if key in given:
            if not isinstance(given[key], str):
                raise InputError(f"{where} has {key!r} of {_type(given[key])}; it must be a string")
            out[key] = given[key]
    _check_strings(out, where)
    return out, media


def _item(item, where: str) -> tuple[dict, Media | None]:
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is of {_type(item)}, not an object with a 'type'")
    given = read_keys(_item_keys(item), ITEM, where)
    kind = _kind(given, where)
    detail = [given.pop("detail")] if kind == "image" and "detail" in given else []
    given.pop("type", None)
    sources = [k for k in _SOURCES[kind] if k in given]
    if len(sources) != 1:
        known = ", ".join(map(repr, _SOURCES[kind]))
        raise InputError(f"{where} is of type {kind} and must have one of {known}; it has {len(sources)}")
    key, source = sources[0], given.pop(sources[0])
    if key in ("image_url", "video_url") and isinstance(source, Mapping):
        inner = read_keys(_present(source), URL, where)
        source = inner.pop("url", None)
        detail += [inner.pop("detail")] if "detail" in inner else []
        if not isinstance(source, str) or inner:
            raise InputError(f"{where}: {key!r} must be a string or {{'url': string}}")
    if key == "source":
        source = _anthropic(source, where)
    if any(d not in _DETAIL for d in detail):
        raise InputError(f"{where} has detail {shown(detail[0])}; known are {', '.join(_DETAIL)}")
    if kind == "video" and not isinstance(source, str | bytes) and "sample_fps" in given:
        given.setdefault("fps", given.pop("sample_fps"))  # qwen-vl-utils' name for the rate of given frames
    check_names(given, _OPTIONS[kind], f"{where}: ")
    for option, value in given.items():
        checked(MediaOptions, option, value, f"{where}: ")
    if kind == "text":
        if not isinstance(source, str):
            raise InputError(f"{where} has text of {_type(source)}; it must be a string")
        return {"type": "text", "text": source}, None
    if key == "base64":
        source = f"data:image;base64,{source}"
    # Templates read the key, not the data.
    return {"type": kind, kind: kind}, Media(kind, source, given, where)


def _anthropic(source, where: str) -> str:
    """The picture of Anthropic's {"type": "base64", "media_type": …, "data": …} or {"type": "url", "url": …}."""
    kind = source.get("type") if isinstance(source, Mapping) else None
    value = source.get({"base64": "data", "url": "url"}[kind]) if kind in ("base64", "url") else None
    if not isinstance(value, str):
        form = '{"type": "base64", "media_type": …, "data": …} or {"type": "url", "url": …}'
        raise InputError(f"{where}: 'source' must be {form}")
    return value if kind == "url" else f"data:image;base64,{value}"


def _kind(given: dict, where: str) -> str:
    if "type" in given:
        if not isinstance(given["type"], str) or given["type"] not in _KINDS:
            raise InputError(f"{where} has type {shown(given['type'])}; known types are {', '.join(_KINDS)}")
        return _KINDS[given["type"]]
    kinds = {_KINDS[k] for k in ("text", "image", "image_url", "video", "video_url") if k in given}
    if len(kinds) != 1:
        raise InputError(f"{where} has no 'type' and needs exactly one of 'text', 'image', 'video'")
    return kinds.pop()


def _tool_calls(calls, where: str) -> list[dict]:
    if not isinstance(calls, list | tuple):
        raise InputError(f"{where}: tool_calls must be a list")
    out = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}: tool_calls[{i}] needs {{'function': {{'name': …, 'arguments': …}}}}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            # OpenAI sends JSON text, Qwen's format has the object. As in Qwen's template, text that is not JSON stays.
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments or "{}")
        call_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        out.append(call_id | {"type": "function", "function": named})
    return out


def check_tools(tools) -> list[dict] | None:
    """Tool descriptions as JSON objects, or None when there are none."""
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise InputError("tools must be a list of JSON objects ({'type': 'function', 'function': …})")
    try:
        tools = json.loads(json.dumps(tools))
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"tools cannot be written as JSON ({e})") from e
    _check_strings(tools, "tools")
    return tools or None


def _type(value) -> str:
    return f"type {'null' if value is None else type(value).__name__}"


def strings(value, depth: int = 0) -> Iterator[str]:
    """Every string in a JSON-like value, keys included. Raises RecursionError beyond a hundred levels."""
    if depth > 100:
        raise RecursionError
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(strings(v, depth + 1) for pair in value.items() for v in pair)
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(strings(v, depth + 1) for v in value)


def _check_strings(value, where: str) -> None:
    try:
        for s in strings(value):
            s.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{where} holds {e.object[e.start]!a}, half of a character (a lone surrogate)") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None
