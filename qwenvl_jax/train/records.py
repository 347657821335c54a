"""What a training record may look like, and what is learnt from it; nothing after this file knows the forms apart.

    {"messages": [{"role": "user", "content": …}, …]}                  OpenAI's and Qwen's
    {"conversations": [{"from": "human", "value": "<image>\\n…"}, …], "image": path}    LLaVA's and Qwen's
    {"messages": prompt, "chosen": reply, "rejected": reply}           a preference; `prompt` (TRL's) for `messages`

Media may lie in the items of a message, or beside the messages under image, images, video, videos (one, or a
list), to take the place of `<image>`, `<video>` and of items without a source. `tools` go into the prompt, and a
message with `"weight": 0` is read but not learnt. Other keys are left alone.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwenvl_jax.config import Config
from qwenvl_jax.inputs.chat import expand_placeholders
from qwenvl_jax.inputs.layout import Lanes, mrope_positions, slots_needed
from qwenvl_jax.inputs.messages import VIDEO_OPTIONS
from qwenvl_jax.inputs.processor import Processor, Prompt
from qwenvl_jax.types import InputError, Visual

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
          "observation": "tool", "tool": "tool"}  # fmt: skip
_SOURCES = ("image", "image_url", "video", "video_url", "url", "path")


class BadRecord(InputError):
    """A record that nothing can be learnt from.

    reason: one of "unreadable", "messages", "placeholders", "media", "too long", "too large",
        "nothing to learn"; what skipped records are counted by.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Segment(NamedTuple):
    """One conversation, ready to be packed."""

    tokens: np.ndarray  # [t] int32, placeholders repeated
    positions: np.ndarray  # [3, t] int32: M-RoPE
    weights: np.ndarray  # [t] float32: 1 where the token itself is to be learnt


class Example(NamedTuple):
    """What a record becomes: one conversation, or a preferred one and its rival over the same pictures."""

    segments: tuple[Segment, ...]
    visuals: tuple[Visual, ...]  # of every one of the segments, in reading order


class PackShape(NamedTuple):
    """The one shape of all batches of a run, on this host.

    segments: the most conversations in a row; preferences need it (an even number), for sums by conversation.
    """

    rows: int  # B
    tokens: int  # T
    lanes: int  # R
    patches: int  # P: whole window blocks, and at least the largest frame
    segments: int | None = None


class Encoder:
    """Records to examples, under one processor's rules.

    folder: what relative paths of pictures and clips start from; None: the working directory.
    options: of `Processor.encode`: pixel and frame limits, add_vision_id, allow_control_tokens.
    """

    def __init__(self, processor: Processor, shape: PackShape, *, preferences=False, folder=None, options=None):
        flags = ("add_vision_id", "allow_control_tokens")
        options = dict(options or {})
        if unknown := sorted(options.keys() - {*flags, *VIDEO_OPTIONS}):
            raise InputError(f"unknown option {unknown[0]!r}; known are {', '.join((*VIDEO_OPTIONS, *flags))}")
        self.processor, self.shape, self.preferences = processor, shape, preferences
        self.folder = None if folder is None else Path(folder)
        self.flags = {k: options.pop(k) for k in flags if k in options}
        self.options = options

    def __call__(self, record) -> Example:
        """Raises BadRecord, which says what is wrong."""
        if not isinstance(record, Mapping):
            raise BadRecord("unreadable", f"a record is a JSON object, not a {type(record).__name__}")
        read = _preference if self.preferences else _conversation
        taught = [(self._prompt(messages, record), weights) for messages, weights in read(record, self.folder)]
        media = taught[0][0].media
        for prompt, _ in taught[1:]:
            if [m.source for m in prompt.media] != [m.source for m in media]:
                raise BadRecord("messages", "'chosen' and 'rejected' must be text: pictures belong into the prompt")
        self._check_length(sum(len(prompt.tokens) for prompt, _ in taught))  # before anything is decoded
        with _reason("media"):
            visuals = self.processor.open(media, self.options)
        example = Example(tuple(self._segment(p, w, visuals) for p, w in taught), visuals)
        self._check_length(sum(len(s.tokens) for s in example.segments))
        self._check_lanes(visuals)
        return example

    def _prompt(self, messages: list, record: Mapping) -> Prompt:
        with _reason("messages"):
            return self.processor.prompt(messages, tools=record.get("tools"), **self.flags)

    def _segment(self, prompt: Prompt, weights: list[int], visuals: tuple[Visual, ...]) -> Segment:
        config = self.processor.config
        if prompt.turns.max(initial=0) != len(weights):
            raise BadRecord(
                "messages",
                f"{len(weights)} assistant messages became {prompt.turns.max(initial=0)} turns of the chat template",
            )
        tokens = expand_placeholders(prompt.tokens, visuals, config)
        # Pictures are never learnt, not even an assistant's; everything else keeps its order.
        learnt = np.array([0, *weights], np.float32)[prompt.turns]
        learnt[(prompt.tokens == config.vision_start_token_id) | (prompt.tokens == config.vision_end_token_id)] = 0
        out = np.zeros(len(tokens), np.float32)
        out[~is_visual(tokens, config)] = learnt[~is_visual(prompt.tokens, config)]
        if not out[1:].any():
            raise BadRecord("nothing to learn", "no assistant message to learn from")
        return Segment(tokens, mrope_positions(tokens, visuals, config), out)

    def _check_length(self, length: int) -> None:
        if length > self.shape.tokens:
            raise BadRecord("too long", f"{length} tokens; a row has {self.shape.tokens}")

    def _check_lanes(self, visuals: tuple[Visual, ...]) -> None:
        vision, grids = self.processor.config.vision, [v.grid for v in visuals]
        for visual in visuals:
            if (slots := slots_needed(visual.grid, vision)) > self.shape.patches:
                h, w = visual.grid.h * vision.patch_size, visual.grid.w * vision.patch_size
                raise BadRecord(
                    "too large",
                    f"a frame of {w} × {h} pixels needs {slots} patch slots; a lane has {self.shape.patches}",
                )
        if Lanes(self.shape.patches, vision, self.shape.lanes).place(grids) is None:
            patches = sum(g.patches for g in grids)
            raise BadRecord(
                "too large",
                f"its pictures and frames have {patches} patches and do not fit into "
                f"{self.shape.lanes} lanes of {self.shape.patches}",
            )


def is_visual(tokens: np.ndarray, config: Config) -> np.ndarray:
    """Which tokens are placeholders of pictures and clips."""
    return (tokens == config.image_token_id) | (tokens == config.video_token_id)


@contextmanager
def _reason(reason: str):
    try:
        yield
    except InputError as e:
        raise BadRecord(reason, str(e)) from e


def _conversation(record: Mapping, folder: Path | None) -> list[tuple[list, list[int]]]:
    """The record's messages, and how much each assistant message counts."""
    if "chosen" in record or "rejected" in record:
        raise BadRecord("messages", "the record is a preference ('chosen', 'rejected'), and none is expected")
    return [_weighed(_filled(*_turns(record), record, folder))]


def _preference(record: Mapping, folder: Path | None) -> list[tuple[list, list[int]]]:
    """The same for the preferred conversation and its rival. Of their prompt nothing is learnt."""
    replies = [_reply(record, key) for key in ("chosen", "rejected")]
    if any(key in record for key in ("messages", "conversations", "prompt")):
        prompt, marked = _turns(record)
    else:  # TRL's form without a prompt: what both conversations begin with
        common = 0
        while common < min(map(len, replies)) and replies[0][common] == replies[1][common]:
            common += 1
        prompt, marked = replies[0][:common], False
        replies = [reply[common:] for reply in replies]
    prompt, unlearnt = _weighed(_filled(prompt, marked, record, folder))
    out = []
    for reply in replies:
        reply, weights = _weighed(reply)
        out.append((prompt + reply, [0] * len(unlearnt) + weights))
    return out


def _turns(record: Mapping) -> tuple[list, bool]:
    """The messages, roles and contents named as in OpenAI's form, and whether theirs is the form with markers."""
    keys = [k for k in ("messages", "conversations", "prompt") if k in record]
    if len(keys) != 1:
        raise BadRecord("messages", f"a record has one of 'messages', 'conversations'; this has {len(keys)}")
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


def _weighed(messages: list) -> tuple[list, list[int]]:
    """The messages without their 'weight', and the weights of the assistant's."""
    weights, out = [], []
    for i, message in enumerate(messages):
        if isinstance(message, Mapping) and "weight" in message:
            message = dict(message)
            weight = message.pop("weight")
            if weight not in (0, 1, None):
                raise BadRecord("messages", f"message {i} has weight {weight!r}; it must be 0 or 1")
        else:
            weight = None
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            weights.append(0 if weight == 0 else 1)
        out.append(message)
    return out, weights


def _filled(messages: list, marked: bool, record: Mapping, folder: Path | None) -> list:
    """The messages with the media beside them put in their places, and relative paths made to start from folder.

    Markers count in what users and tools say. One line break before a marker and one after belong to the marker:
    datasets put them there, but who asks a question gives the picture and the text without.
    """
    beside = {kind: [*_listed(record.get(kind)), *_listed(record.get(kind + "s"))] for kind in ("image", "video")}
    marked = marked or any(beside.values())
    wanted: dict[str, int] = {"image": 0, "video": 0}

    def take(kind: str):
        wanted[kind] += 1
        return beside[kind][wanted[kind] - 1] if wanted[kind] <= len(beside[kind]) else ""

    def item(item):
        if not isinstance(item, Mapping):
            return item
        sources = {k: item[k] for k in _SOURCES if item.get(k) is not None}
        if not sources and item.get("type") in list(wanted) and item.get("base64") is None:
            sources = {item["type"]: take(item["type"])}
        return {**item, **{k: _resolved(source, folder) for k, source in sources.items()}}

    out = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple):
            message = {**message, "content": [item(i) for i in content]}
        elif isinstance(content, str) and marked and message.get("role") in ("user", "tool"):
            parts = re.split(r"\n?<(image|video)>\n?", content)
            if len(parts) > 1:
                items = [{"type": kind, kind: _resolved(take(kind), folder)} for kind in parts[1::2]]
                texts = [[{"type": "text", "text": text}] if text else [] for text in parts[::2]]
                content = [*texts[0], *(i for pair in zip(items, texts[1:], strict=True) for i in (pair[0], *pair[1]))]
                message = {**message, "content": content}
        out.append(message)
    for kind, count in wanted.items():
        if count != len(beside[kind]):
            raise BadRecord(
                "placeholders", f"the messages have {count} places for {kind}s and the record has {len(beside[kind])}"
            )
    return out


def _listed(value) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [] if value is None else [value]


def _resolved(source, folder: Path | None):
    if isinstance(source, Mapping) and "url" in source:
        return {**source, "url": _resolved(source["url"], folder)}
    if isinstance(source, list | tuple):  # the frames of a clip
        return [_resolved(s, folder) for s in source]
    if folder is None or not isinstance(source, str) or re.match(r"(?i)[a-z][a-z0-9+.-]*://|data:", source):
        return source
    return str(folder / source)
