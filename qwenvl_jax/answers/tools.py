"""Tool calls in answers, in the form of Hermes that Qwen's chat templates use, whole or as the text streams in.

    I look.
    <tool_call>
    {"name": "zoom", "arguments": {"bbox_2d": [10, 20, 300, 400]}}
    </tool_call>

`parse` reads an answer, `write` writes one, `Stream` reads it piece by piece, and gives the calls whole or in pieces.
`message` and `results` continue a conversation with the calls and with what the tools returned.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qwenvl_jax.answers.calls import ToolCall, calls_of, untagged
from qwenvl_jax.answers.deltas import CallArguments, CallEnd, CallStart, Deltas
from qwenvl_jax.answers.lenient import written
from qwenvl_jax.errors import InputError, shown

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_THOUGHTS = ("<think>", "<thinking>", "</think>", "</thinking>")  # a call within is not made
_THINK, _THOUGHT = re.compile("<think(?:ing)?>"), re.compile("</think(?:ing)?>")
_THINKS = re.compile("</?think(?:ing)?>")
_BEGINS = re.compile(r'\s*(?:[\[{]|"name"|```)')  # what a call begins with
_INSIDE = re.compile(rf'"|\\.|{_OPEN}|{_CLOSE}|{_THOUGHT.pattern}', re.S)
# A call whose opening tag is missing.
_BARE = re.compile(r'\{\s{0,9}"name"\s{0,9}:\s{0,9}"[^"{]{1,200}"\s{0,9},\s{0,9}"arguments"\s{0,9}:\s{0,9}\{')
_PIECE = 4096
_BARE_LENGTH = 300  # no match is longer
Event = str | ToolCall | CallStart | CallArguments | CallEnd
_BARE_NAME = re.compile(r'\{"name":"[^"{]{0,200}("?)')


class Turn(NamedTuple):
    """What an answer says and calls."""

    text: str  # beside the calls; malformed calls stay in it as they are
    calls: list[ToolCall]
    malformed: int  # calls that cannot be read or are cut short
    first_malformed: int | None = None  # how many calls stand before the first malformed one; None: there is none


def parse(text: str, names: Collection[str] = ()) -> Turn:
    """The calls of an answer, in order.

    Broken JSON is read where it has one meaning: quotes, commas or closing brackets that are wrong or missing,
    arguments as JSON text, several calls in one pair of tags. A tag may be missing. A call whose arguments are cut
    short is malformed, since a tool must not run on half of them. A call in the model's thinking is text: only what
    follows the last `</think>` makes calls, whether or not a `<think>` stands before it.

    names: of the tools that there are. If given, an answer without tags may call them by JSON that begins a line, in a
    fence, in a list or after a label such as "Action:". What calls one of them in another form is malformed.
    """
    stream, events = _read(text, 0)
    if stream.thought:
        stream, events = _read(text, stream.thought)
    said = "".join(event for event in events if isinstance(event, str))
    calls = [event for event in events if isinstance(event, ToolCall)]
    turn = Turn(said, calls, stream.malformed, stream.first_malformed)
    if not names or turn.calls or turn.malformed:
        return turn
    begin = thought(turn.text)
    found = untagged(_THINK.split(turn.text[begin:], maxsplit=1)[0], names)
    if found is None:
        return turn._replace(malformed=1, first_malformed=0)
    return turn._replace(text=(turn.text[:begin] + found[1]).strip(), calls=found[0]) if found[0] else turn


def thought(text: str) -> int:
    """How many characters of an answer are up to the end of its last thought."""
    return max((found.end() for found in _THOUGHT.finditer(text)), default=0)


def _read(text: str, begin: int) -> tuple["Stream", list]:
    """(the stream that has read a text, its events). begin: so many characters at its start are a thought."""
    stream = Stream()
    stream._think(text[:begin])
    pieces = (text[at : at + _PIECE] for at in range(begin, len(text), _PIECE))  # the stream's buffer stays small
    return stream, [event for piece in pieces for event in stream.feed(piece)] + stream.close()


def write(calls: Iterable[ToolCall], text: str = "") -> str:
    """The answer that says `text` and makes these calls, as the chat template writes it, and as `parse` reads it.

    Raises InputError for arguments that JSON cannot hold and a text that would be read as a call or hide one.
    """
    if not isinstance(text, str):
        raise InputError(f"text is {shown(text)}; it must be a string")
    blocks = [_block(call) for call in calls]
    answer = "\n".join(([text] if text or not blocks else []) + blocks)
    turn = parse(answer)
    if turn.text.strip() != text.strip() or len(turn.calls) != len(blocks) or turn.malformed:
        said = f"close its <think> and leave {_OPEN} and JSON of calls out"
        raise InputError(f"text is {shown(text)}; it would be read as a call or hide one: {said}")
    return answer


def _block(call: ToolCall) -> str:
    if not isinstance(call, ToolCall):
        raise InputError(f"{shown(call)} is no call; make one: ToolCall(name, arguments)")
    try:
        block = f"{_OPEN}\n{_shielded(written(call._asdict()))}\n{_CLOSE}"
        (read,) = parse(block).calls
        if written(read) != written(call):
            raise ValueError("it would be read as another call")
        return block
    except (TypeError, ValueError, RecursionError) as e:
        said = "it needs a name, and a dict of what JSON can hold"
        raise InputError(f"the call of {shown(call.name)} cannot be written: {said}") from e


def message(turn: Turn, first: int = 0) -> dict:
    """The assistant message of an answer, for the conversation; the chat template writes the answer from it again.

    first: how many calls the conversation has so far. The ids go on from there: "call_0", "call_1", …
    """
    out: dict[str, Any] = {"role": "assistant", "content": turn.text}
    if turn.calls:
        functions = [{"name": call.name, "arguments": written(call.arguments)} for call in turn.calls]
        out["tool_calls"] = [
            {"id": f"call_{i}", "type": "function", "function": function} for i, function in enumerate(functions, first)
        ]
    return out


def results(reply: Mapping, returned: Sequence[Any]) -> list[dict]:
    """The messages of role "tool" that answer an assistant message.

    returned: what each call returned, in order: text, a list of content items (such as pictures), or any JSON value.
    Raises InputError unless there is one for each call, of such a kind.
    """
    calls = reply.get("tool_calls") or []
    if len(calls) != len(returned):
        raise InputError(
            f"the message has {len(calls)} tool calls, and {len(returned)} results are given; give one each"
        )
    out = []
    for call, value in zip(calls, returned, strict=True):
        items = isinstance(value, list) and value and all(isinstance(i, Mapping) and "type" in i for i in value)
        try:
            content = value if isinstance(value, str) or items else _json(value)
        except (TypeError, ValueError, RecursionError) as e:
            name = call.get("function", call).get("name")
            raise InputError(f"the result of {name} cannot be written as JSON ({e})") from e
        call_id = {"tool_call_id": call["id"]} if "id" in call else {}
        out.append({"role": "tool", **call_id, "content": content})
    return out


class Stream:
    """Reads an answer as it comes, in pieces of any length.

    `feed(piece)` and, at the end, `close()` return what is known by then: pieces of text, and `ToolCall`s. Joined, they
    are what `parse` returns for the whole answer. Text that may become a call is held back.

    thinking: the answer begins within a thought, since the prompt ends with `<think>`. No call is made before its
    `</think>`. Without it, the calls of such a thought are given before anything can tell that they are none.
    deltas: calls come as they are written: a `CallStart`, the `CallArguments` and, instead of the `ToolCall`, a
        `CallEnd`. The joined arguments are those of `message`. Only a call with its opening tag whose name stands first
        comes in pieces; others come at their end. A call that turns out to be malformed after its `CallStart` is not
        text: it ends with None.
    first: how many calls the conversation has so far, as in `message`.
    """

    def __init__(self, thinking: bool = False, deltas: bool = False, first: int = 0):
        self.malformed = 0
        self.first_malformed: int | None = None  # as in Turn
        self.thought = 0  # how many characters end with a `</think>` that has no `<think>`; their calls are none
        self._calls = 0
        self._done = 0  # how many characters are no longer in the buffer
        self._buffer = ""  # not yet decided; within a call it starts after the tag
        self._thinking = thinking
        self._inside = False  # whether the buffer is a call
        self._tagged = True  # whether that call has its opening tag
        self._at = 0  # how much of the call is scanned for its end
        self._quoted = False  # whether it is within a JSON string there
        self._closing = -1  # where the first closing tag is, if it is within a string
        self._said = False  # whether there was text other than white space
        self._alone = True  # whether there was none but a thought
        self._unclosed = False  # whether the last thing was a call, ended by an opening tag
        self._space = ""  # white space that is dropped if a call follows
        self._after_call = False
        self._deltas = Deltas(first) if deltas else None
        self._events: list[Event] = []

    def feed(self, piece: str) -> list[Event]:
        self._buffer += piece
        while self._step():
            pass
        if self._inside:
            self._write(self._at)
        return self._taken()

    def close(self) -> list[Event]:
        while self._buffer or self._inside:
            if self._inside and self._closing >= 0:
                self._end_call(self._closing, len(_CLOSE))
            elif self._inside:
                self._end_call(len(self._buffer), 0)
            else:
                self._pass(len(self._buffer))
            while self._step():
                pass
        if not self._after_call:
            self._events.append(self._space)
        self._space = ""
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = [event for event in self._events if event], []
        return events

    def _step(self) -> bool:
        """Decides about the next part of the buffer. False if more text is needed."""
        return self._find_end() if self._inside else self._find_call()

    def _find_call(self) -> bool:
        tag = self._buffer.find(_OPEN)
        thought = _THOUGHT.search(self._buffer) if self._thinking else None
        end = len(self._buffer) if tag < 0 else tag
        if not self._thinking and (bare := _BARE.search(self._buffer, 0, end)):
            end = bare.start()
        if not self._thinking and (think := _THINKS.search(self._buffer, 0, end)):
            self._pass(think.end())
            self._thinking = not think[0].startswith("</")
            self.thought = self.thought if self._thinking else self._done
        elif thought:
            self._pass(thought.end())
            self._thinking, self._alone = False, True
        elif self._thinking:
            self._pass(len(self._buffer) - _partial(self._buffer, *_THOUGHTS))
            return False
        elif end < len(self._buffer):
            self._begin(end, len(_OPEN) if end == tag else 0)
        else:
            self._pass(end - _may_begin_call(self._buffer))
            return False
        return True

    def _think(self, text: str) -> None:
        """A text before the first piece, which is a thought."""
        self._say(text)
        self._done, self._alone = len(text), True

    def _take(self, end: int) -> str:
        """The buffer up to `end`, which leaves it."""
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        self._done += end
        return text

    def _pass(self, end: int) -> None:
        """The buffer up to `end` is text."""
        self._say(self._take(end))

    def _begin(self, at: int, tag: int) -> None:
        self._pass(at)
        self._take(tag)
        self._inside, self._tagged = True, tag > 0
        self._at, self._quoted, self._closing = 0, False, -1

    def _find_end(self) -> bool:
        while found := _INSIDE.search(self._buffer, self._at):
            self._at = found.end()
            if found[0] == '"':
                self._quoted = not self._quoted
            elif found[0] == _CLOSE and self._quoted:  # the string's, or a quote is missing: what follows decides
                self._closing = found.start() if self._closing < 0 else self._closing
            elif found[0] == _CLOSE:
                whole = self._closing < 0 or _is_json(self._buffer[: found.start()])
                self._end_call(found.start() if whole else self._closing, len(_CLOSE))
                return True
            elif found[0] in _THOUGHTS and self._quoted:  # the string's, too
                continue
            elif found[0] == _OPEN or found[0] in _THOUGHTS:
                empty = self._closing < 0 and self._tagged and not self._buffer[: found.start()].strip()
                if empty and found[0] == _OPEN:  # it stands twice
                    self._take(found.end())
                    self._at = 0
                    continue
                self._end_call(*((found.start(), 0) if self._closing < 0 else (self._closing, len(_CLOSE))))
                return True
        self._at = max(self._at, len(self._buffer) - _unfinished(self._buffer))
        return False

    def _end_call(self, end: int, tag: int) -> None:
        """The buffer up to `end` is a call, followed by a closing tag of so many characters, or by none."""
        self._write(end)
        at, body = self._done, self._take(end)
        self._take(tag)
        self._inside, unclosed, self._unclosed = False, self._unclosed, False
        found = calls_of(body, closed=tag > 0)
        alone = self._alone and not self._after_call and not self._buffer
        if self._deltas and self._deltas.begun and not (found and self._deltas.fits(found[0][0])):
            self.thought = at + thought(body) if thought(body) else self.thought
            self._fail()
            self._events += self._deltas.cut()
        elif found and (self._tagged or tag or (alone and not found[1].strip())):
            self._space, self._after_call = "", True
            self._events += [e for call in found[0] for e in self._deltas.call(call)] if self._deltas else found[0]
            self._calls += len(found[0])
            self._unclosed = self._tagged and not tag and not found[1].strip()
            self._say(found[1])
        elif unclosed and not tag and not _BEGINS.match(body):  # the opening tag stood for the closing one
            self._say(body)
        else:
            if thought(found[1] if found else body):  # else it is in a string of what would be a call after a thought
                self.thought = at + thought(body)
            if self._tagged or tag:
                self._fail()
            self._say((_OPEN if self._tagged else "") + body + (_CLOSE if tag else ""))

    def _fail(self) -> None:
        self.malformed += 1
        self.first_malformed = self._calls if self.first_malformed is None else self.first_malformed

    def _write(self, end: int) -> None:
        """Gives what is known of a call whose text is known up to `end`."""
        if self._deltas and self._tagged:
            known = end if self._closing < 0 else min(end, self._closing)
            if events := self._deltas.read(self._buffer, known):
                self._space, self._after_call = "", True
                self._events += events

    def _say(self, text: str) -> None:
        """Text beside calls. White space next to a call is dropped: all after it, and one line break before it."""
        text, self._space = self._space + text, ""
        if self._after_call:
            stripped = text.lstrip()
            if not stripped:
                self._space = text
                return
            space = text[: len(text) - len(stripped)] or "\n"
            text, self._after_call = (space if self._said else "") + stripped, False
        if text.endswith("\n"):
            text, self._space = text[:-1], "\n"
        self._said, self._alone = self._said or bool(text.strip()), self._alone and not text.strip()
        self._events.append(text)


def _may_begin_call(text: str) -> int:
    """How many characters at the end of a text may be the beginning of a call."""
    tag = _partial(text, _OPEN, *_THOUGHTS)
    start = text.rfind("{", -_BARE_LENGTH)
    if start >= 0:
        tail = "".join(text[start:].split())
        named = _BARE_NAME.match(tail)
        if '{"name":"'.startswith(tail) or (
            named and (',"arguments":{'.startswith(tail[named.end() :]) if named[1] else named.end() == len(tail))
        ):
            return max(tag, len(text) - start)
    return tag


def _unfinished(text: str) -> int:
    """How many characters at the end of a text may be the beginning of a tag or an escape."""
    if text.endswith("\\"):
        return 1
    return _partial(text, _OPEN, _CLOSE, *_THOUGHTS)


def _partial(text: str, *tags: str) -> int:
    """How many characters at the end of a text are the beginning of one of the tags."""
    start = text.rfind("<", -len(_CLOSE))
    return len(text) - start if start >= 0 and any(tag.startswith(text[start:]) for tag in tags) else 0


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _shielded(text: str) -> str:
    """JSON text whose strings hold no tag."""
    return text.replace(_OPEN, "\\u003c" + _OPEN[1:]).replace(_CLOSE, "\\u003c" + _CLOSE[1:])
