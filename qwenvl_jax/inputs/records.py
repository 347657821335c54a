"""Reads JSONL files, and turns each form of record into messages.

    {"messages": [{"role": "user", "content": …}, …]}                                     OpenAI's and Qwen's
    {"conversations": [{"from": "human", "value": "<image>\\n…"}, …], "image": path}    LLaVA's and Qwen's
    {"messages": prompt, "chosen": reply, "rejected": reply}     a preference; TRL writes `prompt` for `messages`

Media are items of a message, or stand beside the messages under image, images, video or videos (one, or a list). Media
beside the messages replace `<image>`, `<video>` and items without a source, in order. A message with `"weight": 0` is
not trained on. Other keys are ignored.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax import stores
from qwenvl_jax.errors import InputError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
          "observation": "tool", "tool": "tool"}  # fmt: skip
_SOURCES = ("image", "image_url", "video", "video_url", "url", "path")
_CHUNK = 1 << 20  # bytes; fits the CPU's cache


class BadRecord(InputError):
    """A record that cannot be used.

    reason: "unreadable", "messages", "placeholders", "media", "too long", "too large" or "nothing to learn". Skipped
        records are counted by reason.
    """

    code = "record"

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # between processes; an exception's own would leave out the reason
        return type(self), (self.reason, str(self))


class JsonLines:
    """The records of a JSONL file by number: a sequence that stores byte offsets, 16 bytes of memory per line.

    Opening reads the file once, for the offsets and a checksum (`identity`). The file must not change while it is open.
    Raises InputError if the file cannot be read; an item raises BadRecord if its line is not JSON.
    """

    def __init__(self, path):
        self.path, self._local = path, stores.local(path)
        try:
            self._file = os.open(self._local, os.O_RDONLY)
            ends, checksum, size = [], 0, 0
            while chunk := os.pread(self._file, _CHUNK, size):
                if size == 0:
                    _check_start(chunk, path)
                ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (size + 1))
                checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({e.strerror})") from e
        starts = np.concatenate([[0], *ends])
        self._starts = starts if starts[-1] == size else np.append(starts, size)  # the file may end without a line feed
        lengths = np.diff(self._starts)
        short = np.flatnonzero(lengths < 80)  # only short lines are checked for being blank
        blank = [line for line in short if not self._line(line).strip()]
        self._lines = np.delete(np.arange(len(lengths)), blank)
        self.identity = {"bytes": size, "crc32": checksum}

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Any:
        return _parse(self._line(self._lines[index]))

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index] + 1}"

    def _line(self, line: int) -> bytes:
        start, end = self._starts[line : line + 2].tolist()
        return os.pread(self._file, end - start, start)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_file"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._file = os.open(self._local, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)


def read_lines(path) -> Iterator[tuple[str, Any, Path]]:
    """("FILE:LINE", record, the file's folder) for every record of a JSONL file or pipe, which is read once.

    Raises InputError that names the line.
    """
    try:
        with open(stores.local(path), "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    _check_start(line, path)
                if line.strip():
                    try:
                        record = _parse(line)
                    except BadRecord as e:
                        raise InputError(f"{path}:{number}: {e}") from e
                    yield f"{path}:{number}", record, stores.folder(path).parent
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e


def _check_start(text: bytes, path) -> None:
    if text.lstrip()[:1] == b"[":
        raise InputError(f"{path} is a JSON array; write one record per line, as jq -c '.[]' {path} does")


def _parse(line: bytes):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise BadRecord("unreadable", f"not UTF-8 text ({e.reason} at byte {e.start} of the line)") from e
    except (ValueError, RecursionError) as e:
        raise BadRecord("unreadable", f"not readable as JSON ({e})") from e


def conversation(record: Mapping, folder: Path | None) -> list[tuple[list, list[int]]]:
    """The record's messages, and the weight (0 or 1) of each assistant message."""
    if record.get("chosen") is not None or record.get("rejected") is not None:
        raise BadRecord("messages", "the record is a preference ('chosen', 'rejected'); a conversation is expected")
    return [_split_weights(_with_media(*_messages(record), record, folder))]


def preference(record: Mapping, folder: Path | None) -> list[tuple[list, list[int]]]:
    """What `conversation` returns, for the chosen and the rejected conversation. Their prompt is not trained on."""
    replies = [_reply(record, key) for key in ("chosen", "rejected")]
    if any(record.get(key) is not None for key in ("messages", "conversations", "prompt")):
        prompt, has_markers = _messages(record)
    else:  # TRL's form without a prompt: the messages with which both conversations begin are the prompt
        pairs = zip(*replies, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        prompt, has_markers = replies[0][:common], False
        replies = [reply[common:] for reply in replies]
        if not prompt:
            raise BadRecord("messages", "a preference without a prompt: 'chosen' and 'rejected' begin differently")
    prompt, prompt_weights = _split_weights(_with_media(prompt, has_markers, record, folder))
    split = [_split_weights(reply) for reply in replies]
    return [(prompt + reply, [0] * len(prompt_weights) + weights) for reply, weights in split]


def _messages(record: Mapping) -> tuple[list, bool]:
    """The messages in OpenAI's form, and whether their texts may hold `<image>` markers."""
    keys = [k for k in ("messages", "conversations", "prompt") if record.get(k) is not None]
    if len(keys) != 1:
        raise BadRecord("messages", f"a record must have one of 'messages', 'conversations'; this has {len(keys)}")
    turns = record[keys[0]]
    turns = [{"role": "user", "content": turns}] if isinstance(turns, str) and keys[0] == "prompt" else turns
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRecord("messages", f"{keys[0]!r} must be a list of at least one message")
    return [_message(turn, f"message {i}") for i, turn in enumerate(turns)], keys[0] == "conversations"


def _reply(record: Mapping, key: str) -> list:
    reply = record.get(key)
    if isinstance(reply, str):
        return [{"role": "assistant", "content": reply}]
    replies = [reply] if isinstance(reply, Mapping) else reply
    if not isinstance(replies, list | tuple) or not replies:
        raise BadRecord("messages", f"{key!r} must be a text, a message or a list of messages")
    return [_message(turn, f"{key} {i}") for i, turn in enumerate(replies)]


def _message(turn, where: str):
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    if turn["from"] not in list(_ROLES):
        raise BadRecord("messages", f"{where} is from {turn['from']!r}; known are {', '.join(_ROLES)}")
    rest = {k: turn[k] for k in turn.keys() - {"from", "value"}}
    return rest | {"role": _ROLES[turn["from"]], "content": turn.get("value")}


def _split_weights(messages: list) -> tuple[list, list[int]]:
    """The messages without their 'weight', and the weights of the assistant's."""
    weights, out = [], []
    for i, message in enumerate(messages):
        if isinstance(message, Mapping):
            message = dict(message)
            weight = message.pop("weight", None)
            if weight not in (0, 1, None):
                raise BadRecord("messages", f"message {i} has weight {weight!r}; it must be 0 or 1")
            if message.get("role") == "assistant":
                weights.append(0 if weight == 0 else 1)
        out.append(message)
    return out, weights


def _with_media(messages: list, has_markers: bool, record: Mapping, folder: Path | None) -> list:
    """The messages with the record's media in place of markers, and relative paths starting from `folder`.

    Only user and tool messages hold markers. The line break before and after a marker is removed with it: datasets
    write them, prompts do not.
    """
    beside = {kind: [*_as_list(record.get(kind)), *_as_list(record.get(kind + "s"))] for kind in ("image", "video")}
    has_markers = has_markers or any(beside.values())
    used: dict[str, int] = {"image": 0, "video": 0}

    def next_source(kind: str):
        used[kind] += 1
        return beside[kind][used[kind] - 1] if used[kind] <= len(beside[kind]) else ""

    def with_source(item):
        if not isinstance(item, Mapping):
            return item
        sources = {k: item[k] for k in _SOURCES if item.get(k) is not None}
        if not sources and item.get("type") in list(used) and item.get("base64") is None:
            sources = {item["type"]: next_source(item["type"])}
        return {**item, **{k: _resolved(source, folder) for k, source in sources.items()}}

    out = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple):
            message = {**message, "content": [with_source(item) for item in content]}
        elif isinstance(content, str) and has_markers and message.get("role") in ("user", "tool"):
            parts = re.split(r"\n?<(image|video)>\n?", content)  # text at even indices, kinds at odd ones
            if len(parts) > 1:
                items = ({"type": p} if i % 2 else {"type": "text", "text": p} for i, p in enumerate(parts) if p)
                message = {**message, "content": [with_source(item) for item in items]}
        out.append(message)
    for kind, count in used.items():
        if count != len(beside[kind]):
            raise BadRecord("placeholders", f"messages refer to {count} {kind}s; the record has {len(beside[kind])}")
    return out


def _as_list(value) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [] if value is None else [value]


def _resolved(source, folder: Path | None):
    if isinstance(source, Mapping) and "url" in source:
        return {**source, "url": _resolved(source["url"], folder)}
    if isinstance(source, list | tuple):  # the frames of a clip
        return [_resolved(s, folder) for s in source]
    if folder is None or not isinstance(source, str) or re.match(r"(?i)[a-z][a-z0-9+.-]*://|data:", source):
        return source
    return str(folder / source)
