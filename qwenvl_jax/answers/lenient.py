"""JSON as models write it, read without `eval` and in linear time.

Beside JSON these are read: single quotes, no quotes, Python's True, False and None, tuples, quotes and line breaks
within a string, missing or doubled commas, closing brackets that are missing, `//` comments, texts that are cut short,
backslashes of LaTeX and of Windows' paths that are not doubled.
"""

import json
import math
import re
from typing import Any, NamedTuple

DEPTH = 64  # brackets within brackets

_SPACE = re.compile(r"(?:[\s,;]|//[^\n]*+)*+")
_COLON = re.compile(r"\s*+(?::|：|=>|=)\s*+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?(?=[\s,;}\])]|\Z)")
_BARE = re.compile(r"""[^\s,;:="'{}\[\]()][^,;"'{}\[\]()\n]*+""")
_BARE_KEY = re.compile(r"[^\W\d][\w-]*+")
_OPENERS = re.compile(r"""(?:[\[{\s]|["'][^"'\\]{0,40}["']\s*+:\s*+)*+""")
_CUT = re.compile(r"[\"'\\]")
_VALUE_ENDS = re.compile(
    r"""\s*+(?:\Z|[}\])]|//|[,;]\s*+(?:\Z|//|["'{}\[\]+\-.0-9]|(?:true|false|null|True|False|None)\b|\w++\s*+:)|"[\w-]++"\s*+:|\n\s*+["'{\[])"""
)
_LIST_KEY = re.compile(r"""(["'])[^"'\\\n]{0,200}\1\s*+[:：]""")
_KEY_ENDS = re.compile(r"\s*+(?:\Z|:|：|=)")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}(?:\\u[dD][c-fC-F][0-9a-fA-F]{2})?|.)", re.S)
# A backslash that stands for itself, though JSON has an escape of its letter: LaTeX, and \f and \b before a letter,
# which no text has as control characters.
_COMMANDS = (
    r"[bf](?=[A-Za-z])|n(?:abla|eq|otin)(?![A-Za-z])|r(?:ho|ight|angle|floor|ceil|ightarrow)(?![A-Za-z])"
    r"|t(?:heta|imes|ilde|riangle|an(?=[({\\^_$])|ext(?:bf|it|rm|sf|tt)?(?=\{))(?![A-Za-z])"
)
_RAW = re.compile(rf"(?<!\\)(?:\\\\)*+\\(?:{_COMMANDS})")
_COMMAND = re.compile(_COMMANDS)
# A path of Windows with an escape that JSON lacks or that `_COMMANDS` names, so that its backslashes are not doubled.
_PATH = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]:(?:\\(?!\\)[^\s\\\"'<>|*?]*+)++")
_FOREIGN = re.compile(r"\\(?:[^\"'\\/bfnrtu]|[bf](?=[A-Za-z])|u(?![0-9a-fA-F]{4}))")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", '"': '"', "'": "'", "\\": "\\", "/": "/", "\n": ""}
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_NOT_VALUES = {"undefined", "NaN", "nan", "Infinity", "-Infinity", "inf", "-inf"}


class Read(NamedTuple):
    """A value that was read from a text."""

    value: Any  # what JSON can hold; all numbers are finite
    end: int  # the index after it
    open: list  # the lists and dicts in it that the text does not close, outermost first
    half: bool  # the text ends within a string, number, word or pair; that piece is not in `value`


class Unreadable(ValueError):
    """The text is not even nearly JSON. at: the index from which the reader can go on."""

    def __init__(self, at: int):
        super().__init__(f"not JSON at character {at}")
        self.at = at


def read(text: str, start: int = 0) -> Read:
    """Reads the list or object whose bracket is at `start`. Raises Unreadable."""
    try:
        value, end = _STRICT.raw_decode(text, start)
        if _depth(text, start, end) <= DEPTH and not _RAW.search(text, start, end):
            return Read(value, end, [], False)
    except (ValueError, RecursionError):
        pass
    return _Reader(text).read(start)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(number)
    return value


def _constant(name: str):
    raise ValueError(name)


_STRICT = json.JSONDecoder(parse_float=_finite, parse_constant=_constant)


def _depth(text: str, start: int, end: int) -> int:
    """The most brackets that are open at a time; brackets in strings count too."""
    depth = most = 0
    for bracket in re.findall(r"[{}\[\]]", text[start:end]):
        depth += 1 if bracket in "{[" else -1
        most = max(most, depth)
    return most


class _Reader:
    """Reads one value; `open` is the stack of its unfinished lists and dicts."""

    def __init__(self, text: str):
        self.text, self.end = text, len(text)
        self.open: list = []

    def read(self, at: int) -> Read:
        root = self._push(at)
        at += 1
        while True:
            at = self._skip(_SPACE, at)
            if at >= self.end:
                return Read(root, at, self.open, False)
            if self.text[at] in "}])":
                self._close(self.text[at], at)
                at += 1
                if not self.open:
                    return Read(root, at, [], False)
                continue
            into, key = self.open[-1], None
            if isinstance(into, dict):
                key, at = self._key(at)
                colon = _COLON.match(self.text, at)
                if key is None or colon is None or colon.end() == self.end:
                    if at >= self.end or (colon and colon.end() == self.end):
                        return Read(root, self.end, self.open, True)
                    raise Unreadable(at)
                at = colon.end()
            if self.text[at] in "{[(":
                self._put(into, key, self._push(at))
                at += 1
                continue
            done, value, at = self._scalar(at)
            if not done:
                return Read(root, at, self.open, True)
            self._put(into, key, value)

    def _skip(self, pattern: re.Pattern, at: int) -> int:
        found = pattern.match(self.text, at)
        return found.end() if found else at

    def _push(self, at: int):
        if len(self.open) >= DEPTH:
            raise Unreadable(self._skip(_OPENERS, at))
        self.open.append({} if self.text[at] == "{" else [])
        return self.open[-1]

    def _close(self, bracket: str, at: int) -> None:
        """Closes the innermost value of this kind, and with it those within, whose brackets are missing."""
        kind = dict if bracket == "}" else list
        if not any(isinstance(value, kind) for value in self.open):
            raise Unreadable(at + 1)
        while not isinstance(self.open.pop(), kind):
            pass

    @staticmethod
    def _put(into, key, value) -> None:
        if isinstance(into, dict):
            into[key] = value
        else:
            into.append(value)

    def _key(self, at: int) -> tuple[str | None, int]:
        """(the key at `at`, the index after it); None if the text ends before the key does."""
        if self.text[at] in "\"'":
            return self._string(at, _KEY_ENDS)
        found = _BARE_KEY.match(self.text, at)
        if not found:
            raise Unreadable(at + 1)
        return found[0], found.end()

    def _scalar(self, at: int) -> tuple[bool, Any, int]:
        """(whether it is complete, the value, the index after it)."""
        if self.text[at] in "\"'":
            if isinstance(self.open[-1], list) and (key := _LIST_KEY.match(self.text, at)):
                raise Unreadable(key.end())  # the list is not closed: what belongs to it, and what to the object?
            string, at = self._string(at, _VALUE_ENDS)
            return string is not None, string, at
        if found := _NUMBER.match(self.text, at):
            try:
                number = _finite(found[0])
                value = int(found[0]) if re.fullmatch("[+-]?[0-9]+", found[0]) else number
            except ValueError:
                raise Unreadable(found.end()) from None
            return found.end() < self.end, value, found.end()
        found = _BARE.match(self.text, at)
        if not found or (word := found[0].strip()) in _NOT_VALUES:
            raise Unreadable(found.end() if found else at + 1)
        return found.end() < self.end, _WORDS.get(word, word), found.end()

    def _string(self, start: int, ends: re.Pattern) -> tuple[str | None, int]:
        """(the string, the index after its closing quote), or None and the end of the text.

        A quote ends the string only where something follows that may follow a string.
        """
        quote, at = self.text[start], start + 1
        if self.text.startswith(quote * 3, start):  # Python's
            end = self.text.find(quote * 3, start + 3)
            return (None, self.end) if end < 0 else (self.text[start + 3 : end], end + 3)
        while found := _CUT.search(self.text, at):
            at = found.end()
            if found[0] == "\\":
                at += 1
            elif found[0] == quote and ends.match(self.text, at):
                return _ESCAPE.sub(_unescaped, _PATH.sub(_doubled, self.text[start + 1 : at - 1])), at
        return None, self.end


def written(value) -> str:
    """A value as JSON that `read` reads as the same value: no escape in it looks like LaTeX or a path."""

    def plain(found: re.Match) -> str:
        control = _ESCAPED[found[1]] if found[1] in "bfnrt" else ""
        return f"\\u{ord(control):04x}" if control and _COMMAND.match(found.string, found.start(1)) else found[0]

    return re.sub(r"\\(.)", plain, json.dumps(value, ensure_ascii=False))


def _doubled(path: re.Match) -> str:
    return path[0].replace("\\", "\\\\") if _FOREIGN.search(path[0]) else path[0]


def _unescaped(found: re.Match) -> str:
    code = found[1]
    if _COMMAND.match(found.string, found.start(1)):
        return found[0]
    if len(code) == 1:
        return _ESCAPED.get(code, found[0])  # models write "\d" and "\(" for themselves
    return json.loads(f'"{found[0]}"')
