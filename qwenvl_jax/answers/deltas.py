"""Tool calls in pieces, as clients of OpenAI's API read them: who is called, then the arguments as JSON text."""

import json
import math
import re
from typing import NamedTuple

from qwenvl_jax.answers.calls import ToolCall
from qwenvl_jax.answers.lenient import COMMANDS, written


class CallStart(NamedTuple):
    """A call begins. number: of the answer's calls, from 0; OpenAI's API calls it the index."""

    number: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """The next piece of a call's arguments. Joined, the pieces of a whole call are their JSON."""

    number: int
    piece: str


class CallEnd(NamedTuple):
    """A call ends. call: None if it is malformed or cut short; its pieces are then no JSON, so that nobody runs it."""

    number: int
    call: ToolCall | None


_S = r"[ \t\r\n]{0,99}"
_TEXT = r'[^"\\\x00-\x1f\ud800-\udfff]'
_HEAD = re.compile(
    rf'{_S}(?:```\w{{0,9}}{_S})?\{{{_S}"name"{_S}:{_S}"({_TEXT}{{1,200}})"{_S},{_S}"arguments"{_S}:{_S}(?=\{{)'
)
_VALUE = rf'(?:([\[{{])|"(?=[^"]|"[^"])|(-?[0-9][-+.0-9eE]{{0,39}}|true|false|null)(?={_S}[,}}\]]))'
_CODE = r"u(?:[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F]|(?![dD][89a-fA-F])[0-9a-fA-F]{2})[0-9a-fA-F]{2}"
_PAIR = rf'"((?:{_TEXT}|\\(?!u00[01]){_CODE}){{0,200}})"{_S}:{_S}{_VALUE}'
# What may follow an opening bracket, and a value, in an object and in a list.
_FIRST = {"{": re.compile(rf"{_S}(?:(\}})|{_PAIR})"), "[": re.compile(rf"{_S}(?:(\])|(){_VALUE})")}
_NEXT = {"{": re.compile(rf"{_S}(?:(\}})|,{_S}{_PAIR})"), "[": re.compile(rf"{_S}(?:(\])|,{_S}(){_VALUE})")}
_PLAIN = re.compile(f"{_TEXT}+")
_CHARACTER = re.compile(rf"""\\(?:(["\\/'])|([bfnrt]|{_CODE})|([^\W_bfnrtu]|[_()\[\]{{}}.*+?$^|&%#-]))|([\x00-\x1f])""")
_LETTERS = re.compile(r"[A-Za-z]{20}|[A-Za-z]{0,19}(?=[^A-Za-z\\]|\\[^u])")
_CLOSED = {
    "{": re.compile(rf'"(?={_S}[}}\]]|{_S},{_S}")'),
    "[": re.compile(rf'"(?={_S}[}}\]]|{_S},{_S}(?:["{{\[]|-?[0-9]|(?:true|false|null){_S}[,\]]))'),
}
_DRIVE = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]:")
_CONTROLS = {"\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}


Event = CallStart | CallArguments | CallEnd


class Deltas:
    """The events of an answer's calls. first: how many calls the conversation has so far."""

    def __init__(self, first: int):
        self._first = first
        self._index = 0  # of the call
        self._writer = _Writer()

    @property
    def begun(self) -> bool:
        """Whether the start of a call is given, and its end is not."""
        return bool(self._writer.name)

    def read(self, text: str, end: int) -> list[Event]:
        """What is known of a call. text: that of the call, after its tag; what stands behind `end` does not count."""
        begun, piece = self.begun, self._writer.read(text, end)
        start = [] if begun or not self.begun else [self._start(self._writer.name)]
        return [*start, CallArguments(self._index, piece)] if piece else []

    def fits(self, call: ToolCall) -> bool:
        """Whether what is given is the beginning of this call."""
        return self._writer.finish(call) is not None

    def call(self, call: ToolCall) -> list[Event]:
        """The rest of a call, which fits, or all of it."""
        start = [] if self.begun else [self._start(call.name)]
        rest = self._writer.finish(call) if self.begun else written(call.arguments)
        return [*start, CallArguments(self._index, rest or ""), *self._end(call)]

    def cut(self) -> list[Event]:
        """The end of a call that is malformed or cut short."""
        return self._end(None)

    def _start(self, name: str) -> CallStart:
        return CallStart(self._index, f"call_{self._first + self._index}", name)

    def _end(self, call: ToolCall | None) -> list[Event]:
        end = CallEnd(self._index, call)
        self._index, self._writer = self._index + 1, _Writer()
        return [end]


class _Writer:
    """Writes the arguments of a call while its text is still coming.

    What it has written is how `written(arguments)` begins, whatever follows. It waits where that is not yet known:
    after what is no JSON, the rest comes at the end. The last bracket is written by `finish` alone.
    """

    def __init__(self):
        self.name = ""  # of the call, when it is known
        self._at = 0  # how much of the call's text is written
        self._open: list[str] = []  # the brackets that are open
        self._first = self._quoted = False  # whether a bracket has just opened; whether this is within a string
        self._written: list[str] = []

    def read(self, text: str, end: int) -> str:
        """The next piece. text: of the call, after its tag; what stands behind `end` does not count yet."""
        start = len(self._written)
        if not self.name and (head := _HEAD.match(text, 0, end)):
            self.name, self._at = head[1], head.end() + 1
            self._open, self._first = ["{"], True
            self._written.append("{")
        while self._open and (piece := (self._string if self._quoted else self._item)(text, end)) is not None:
            self._written.append(piece)
        return "".join(self._written[start:])

    def finish(self, call: ToolCall) -> str | None:
        """The rest of the arguments; None if what is written belongs to another call."""
        done, whole = "".join(self._written), written(call.arguments)
        if self.name != call.name:
            return None
        if whole.startswith(done):
            return whole[len(done) :]
        rest = '"' * self._quoted + "".join("}" if bracket == "{" else "]" for bracket in reversed(self._open))
        try:
            return rest if json.loads(done + rest) == call.arguments else None  # a key stands twice
        except ValueError:
            return None

    def _item(self, text: str, end: int) -> str | None:
        """A bracket that closes, or the next value up to its bracket or quote; None if it is not known."""
        found = (_FIRST if self._first else _NEXT)[self._open[-1]].match(text, self._at, end)
        if not found:
            return None
        if found[1]:
            if len(self._open) == 1:
                return None
            self._open.pop()
            self._at, self._first = found.end(), False
            return found[1]
        said = "" if self._first else ", "
        if self._open[-1] == "{":
            said += _json(json.loads(f'"{found[2]}"')) + ": "
        if found[4]:
            try:
                value = json.loads(found[4])
            except ValueError:
                return None
            if isinstance(value, float) and not math.isfinite(value):
                return None
            said += json.dumps(value)
        elif found[3]:
            said += found[3]
            self._open.append(found[3])
        else:
            said += '"'
            self._quoted = True
        self._at, self._first = found.end(), bool(found[3])
        return said

    def _string(self, text: str, end: int) -> str | None:
        """More of a string, or its closing quote; None if it is not known."""
        if found := _PLAIN.match(text, self._at, end):
            self._at = found.end()
            return found[0]
        if found := _CLOSED[self._open[-1]].match(text, self._at, end):
            self._at, self._quoted = found.end(), False
            return '"'
        if not (found := _CHARACTER.match(text, self._at, end)):
            return None
        if found[0] != "\\\\" and not found[4] and _DRIVE.match(text, max(self._at - 2, 0), self._at):
            return None  # perhaps a path of Windows
        same, code, other, raw = found.groups()
        letter = json.loads(f'"{found[0]}"') if code else same or raw or other
        if letter < " ":
            letters = _LETTERS.match(text, found.end(), end)
            after = text[found.end() : found.end() + 20]
            if not letters or COMMANDS.match(_CONTROLS.get(letter, "") + after):
                return None
        self._at = found.end()
        return _json("\\" * bool(other) + letter)[1:-1]


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
