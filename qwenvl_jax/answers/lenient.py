"""JSON as models write it: cut short, with single quotes, without commas or braces, with quotes that are not escaped.

Correct JSON is read as JSON. In broken JSON these are read too: no quotes, Python's True, None and tuples, line breaks
and quotes within a string, missing or doubled commas, missing closing brackets, `//` comments. Nothing is evaluated,
and the time is linear in the length of the text.

`read` is for what is acted on: it raises Unreadable where a text has no single meaning. `Reader` is for what is looked
at: it reads on with the likeliest meaning. (A key that stands twice then begins another object.)

Backslashes have one rule in both. An escape means what JSON says, with three exceptions, in which its backslash stands
for itself. Correct JSON has only the second one, and paths with a `\\b` or `\\f` of it; in all else it is read as JSON.

    \\d, \\_, \\alpha, \\(          an escape that JSON lacks
    \\frac, \\begin, \\times, \\neq  \\b and \\f before a letter, and commands of LaTeX that leave no word of a text
    C:\\Users\\new                 all single backslashes in a path of Windows that has one of the first two

In mathematics (a string with $, \\( or \\[, and no doubled backslash) short commands count too: \\to, \\nu, \\rm.
What stays ambiguous is read as JSON says: C:\\new, \\to in prose, \\n and \\t of a regular expression.
"""

import json
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

CUT = ...  # stands for what the end of the text cut off: a value of an object, or the rest of a list
DEPTH = 64  # brackets within brackets

NUMBER = r"[-+]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,24})(?:[eE][-+]?[0-9]{1,3})?"
_SPACE = re.compile(r"(?:[\s,，;]|//[^\n]*+)*+")
_NUMBERS = re.compile(r"[\[(]([-+.0-9eE,，\s]*+)[\])]")
_NUMBER = re.compile(NUMBER)
_COLON = re.compile(r"\s*+(?:[:：]|=>?)\s*+")
_NAME = re.compile(r"[^\W\d][\w-]*+(?=\s*+[:：=]|\Z)")
_WORD = re.compile(r"[-+.\w]++(?=[\s,，;\"`{}\[\])<]|\Z)")
_PHRASE = re.compile(r"""[^\s,，;:="'`{}\[\]()<](?:[^,，;"'`{}\[\]()<\n]|(?<=[^\W\d_])'(?=[^\W\d_]))*+""")
_JUNK = re.compile(r"""[^\s{}\[\]<`"'\w]++|\w++""")
_OPENERS = re.compile(r"""(?:[\[{\s]|["'][^"'\\]{0,40}["']\s*+:\s*+)*+""")
_LIST_KEY = re.compile(r"""(["'])[^"'\\\n]{0,200}\1\s*+[:：]""")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
# What is no value of JSON, or a number that is too large.
_NO_VALUE = re.compile(r"undefined|[-+]?(?:NaN|nan|Infinity|inf|[0-9]++(?:\.[0-9]*+)?(?:[eE][-+]?[0-9]++)?)")

# What follows the quote that ends a key, a value of an object and a value of a list. Other quotes are text.
_KEY = r"""["'][\w-]++["']\s*+[:：=]"""
_NEXT = rf"\Z|[}}\])]|//|{_KEY}|\n\s*+[\"'{{\[]|[,，;]\s*+(?:\Z|//|[\"'{{}}\[\]]|\w++\s*+[:：=]"
_ENDS = {
    "key": r"\s*+(?:[:：=]|\Z)",
    "{": rf"\s*+(?:{_NEXT}))",
    "[": rf"\s*+(?:{_NEXT}|[(+\-.0-9]|(?:true|false|null|True|False|None)\b))",
}
_GUESSED_ENDS = {
    "key": r"\s*+[:：=]",
    "{": rf"\s*+(?:[{{<`]|{_NEXT}|[<`]))",
    "[": r"""\s*+(?:[,，;}\])<`"']|//|\Z)""",
}
# Commands of LaTeX that begin as an escape of JSON does, and those that do so only in mathematics.
_LATEX = (
    r"[bf](?=[A-Za-z])|n(?:abla|eq|exists|otin|ewline|ewcommand|ormalsize|subseteq)(?![A-Za-z])"
    r"|r(?:ho|ight|angle|floor|ceil|ightarrow)(?![A-Za-z])"
    r"|t(?:heta|imes|au|ilde|riangle(?:q|left|right)?|frac|binom|extstyle|ext(?:bf|it|rm|sc|sf|tt)?(?=\{))(?![A-Za-z])"
)
_SHORT_LATEX = r"n(?:e|i|u|eg|ot|leq|geq)(?![A-Za-z])|r(?:m|brace)(?![A-Za-z])|t(?:o|an|anh|op|ag|ext)(?![A-Za-z])"
_COMMANDS, COMMANDS = re.compile(_LATEX), re.compile(f"{_LATEX}|{_SHORT_LATEX}")
_RAW = re.compile(rf"(?<!\\)(?:\\\\)*+\\(?:{_LATEX}|{_SHORT_LATEX}|u[dD][89a-fA-F])")
_MATH = re.compile(r"\$|(?<!\\)\\[(\[]")
_PATH = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]:(?:\\(?!\\)[^\s\\\"'<>|*?]*+)++")
_FOREIGN = re.compile(r"\\(?:[^\"'\\/bfnrtu]|[bf](?=[A-Za-z])|u(?![0-9a-fA-F]{4}))")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4}(?:\\u[dD][c-fC-F][0-9a-fA-F]{2})?)|(.))", re.S)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", '"': '"', "'": "'", "\\": "\\", "/": "/", "\n": ""}


class Read(NamedTuple):
    """A value that was read from a text."""

    value: Any  # what JSON can hold; all numbers are finite
    end: int  # the index after it
    open: list  # the lists and dicts in it that the text does not close, outermost first
    half: bool  # the text ends within a string, number, word or pair; that piece is not in `value`


class Unreadable(ValueError):
    """The text has no single meaning. at: the index from which the reader can go on."""

    def __init__(self, at: int):
        super().__init__(f"not JSON at character {at}")
        self.at = at


def read(text: str, start: int = 0) -> Read:
    """Reads the list or object whose bracket is at `start`. Raises Unreadable."""
    reader = Reader(text, certain=True)
    values, end = reader.read(start)
    return Read(values[0], end, reader.open, reader.half)


@lru_cache
def _string(quote: str, where: str, certain: bool) -> re.Pattern:
    """The text of a string in group 1; in group 2 its closing quote, unless a key or the end of the text stops it."""
    end = (_ENDS if certain else _GUESSED_ENDS)[where]
    stop = "" if certain else rf"(?!\w++{quote}\s*+[:：])"
    return re.compile(rf"((?:[^{quote}\\]++|\\.|{quote}(?!{end}){stop})*+)({quote}{end})?", re.S)


def _finite(word: str) -> float:
    if not math.isfinite(value := float(word)):
        raise ValueError(word)
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict:
    if len(value := dict(pairs)) < len(pairs):
        raise ValueError("a key twice: a brace between two objects is missing")
    return value


def _levels(value) -> Iterator[list]:
    """What is in a list or dict, level by level."""
    holders = [value]
    while holders:
        yield (inner := [v for h in holders for v in (h.values() if isinstance(h, dict) else h)])
        holders = [v for v in inner if isinstance(v, dict | list)]


def _is_shallow(value) -> bool:
    """Whether brackets are nested at most DEPTH deep."""
    return sum(1 for _ in islice(_levels(value), DEPTH + 1)) <= DEPTH


_DECODERS = {
    certain: json.JSONDecoder(
        parse_float=_finite, parse_constant=_finite, strict=False, object_pairs_hook=None if certain else _pairs
    )
    for certain in (True, False)
}


class Reader:
    """Reads values out of one text. certain: as `read` does, else the likeliest meaning, and never an error."""

    def __init__(self, text: str, certain: bool = False):
        self.text, self.certain = text, certain
        self.open: list = []  # of the value that was read last, as in Read
        self.half = False
        self._tries = 4  # how often the text is tried as correct JSON, to stay linear
        self._stack: list[tuple[Any, list]] = []  # (dict or list, [the key that waits for its value])
        self._endless: dict[tuple[str, str], int] = {}  # (quote, where): no string that starts behind this has an end

    def read(self, at: int, inside: bool = False) -> tuple[list, int]:
        """(the values from the bracket at `at`, the place behind them); more than one only if braces are missing.

        inside: `at` is the first key of an object whose opening brace is missing.
        """
        if not inside and (value := self._strict(at)) is not None:
            return [value[0]], value[1]
        values: list = []
        self._stack, self.open, self.half = [(values, [])], [], False
        if inside:
            self._push({})
        text, end = self.text, len(self.text)
        while (at := _behind(_SPACE, text, at)) < end and text[at] not in "<`" and not self.half:
            holder, key = self._stack[-1]
            if text[at] in "}])":
                at = self._close(at)
            elif isinstance(holder, dict) and not key:
                at = self._key(at)
            elif text[at] in "{[(":
                if len(self._stack) > DEPTH:
                    self._doubt(_behind(_OPENERS, text, at))
                    break
                at = self._opened(at)
            elif not self.certain and isinstance(holder, list) and _LIST_KEY.match(text, at):
                self._push({})  # its opening brace is missing
            else:
                value, at = self._scalar(at, "{" if isinstance(holder, dict) else "[")
                if value is not CUT or not self.certain:
                    self._add(value)
            if len(self._stack) == 1:
                return values, at
        self._cut(text[max(at - 80, 0) : at].rstrip().endswith(","))
        return values, at

    def _doubt(self, at: int) -> None:
        """From here on the meaning is a guess. at: where to go on instead."""
        if self.certain:
            raise Unreadable(at)

    def _strict(self, at: int) -> tuple[Any, int] | None:
        """(value, the place behind it) of correct JSON; None for other JSON. The text is tried a few times only."""
        if self._tries:
            try:
                value, end = _DECODERS[self.certain].raw_decode(self.text, at)
                if _is_shallow(value) and not _RAW.search(self.text, at, end):
                    return value, end
            except (ValueError, RecursionError):
                pass
            self._tries -= 1
        return None

    def _add(self, value) -> None:
        holder, key = self._stack[-1]
        if isinstance(holder, list):
            holder.append(value)
        else:
            holder[key.pop()] = value

    def _push(self, holder) -> None:
        self._add(holder)
        self._stack.append((holder, []))

    def _opened(self, at: int) -> int:
        """Reads an opening bracket, or a list of numbers as a whole."""
        if (found := _NUMBERS.match(self.text, at)) and found[1] and None not in (row := _row(found[1])):
            self._add(row)
            return found.end()
        self._push({} if self.text[at] == "{" else [])
        return at + 1

    def _close(self, at: int) -> int:
        """Closes the innermost bracket of this kind, and those in it whose closing bracket is missing."""
        kind = dict if self.text[at] == "}" else list
        for depth in range(len(self._stack) - 1, 0, -1):
            if isinstance(self._stack[depth][0], kind):
                for holder, key in self._stack[depth:]:
                    if key:
                        self._doubt(at + 1)
                        holder[key.pop()] = None
                del self._stack[depth:]
                return at + 1
        self._doubt(at + 1)
        return at + 1

    def _cut(self, in_object: bool) -> None:
        """The text ends in the values on the stack. in_object: after a comma."""
        self.open = [holder for holder, _ in self._stack[1:]]
        self.half = self.half or any(key for _, key in self._stack)
        for holder, key in [] if self.certain else self._stack[1:]:
            if isinstance(holder, list):
                holder.append(CUT)
            elif key:
                holder[key.pop()] = CUT
            elif in_object and holder is self.open[-1]:
                holder[None] = CUT

    def _key(self, at: int) -> int:
        """Reads a key and its colon, or something that stands where a key is due."""
        text, holder = self.text, self._stack[-1][0]
        if text[at] in "\"'":
            key, end = self._string(at, "key")
        elif found := _NAME.match(text, at):
            key, end = found[0], found.end()
        else:
            return self._no_key(at, holder)
        if key is CUT and not self.certain:
            holder[None] = CUT
        if not (colon := _COLON.match(text, end)):
            if end < len(text):
                self._doubt(end)
            self.half = self.half or self.certain
            return end
        if key in holder and not self.certain:  # the brace between two objects is missing
            self._stack.pop()
            self._push({}) if isinstance(self._stack[-1][0], list) else self._stack.append(({}, []))
        end = colon.end()
        if text[end : end + 1] in tuple(",，;"):  # the value is missing
            self._doubt(end)
            self._stack[-1][0][key] = None
        else:
            self._stack[-1][1].append(key)
        return end

    def _no_key(self, at: int, holder: dict) -> int:
        self._doubt(at + 1)
        text = self.text
        if text[at] == "{":  # the closing brace is missing
            if not holder and len(self._stack) == 2:
                return at + 1
            self._stack.pop()
            return at
        if text[at] in "[(" and holder and (found := _NUMBERS.match(text, at)) and found[1].strip():
            key = next(reversed(holder))  # one more list of numbers under the last key
            if isinstance(value := holder[key], list) and value:
                if not isinstance(value[-1], list):
                    value = holder[key] = [value]
                value.append(_row(found[1]))
                return found.end()
        return _behind(_JUNK, text, at) if _JUNK.match(text, at) else at + 1

    def _scalar(self, at: int, where: str) -> tuple[Any, int]:
        text = self.text
        if text[at] in "\"'":
            if self.certain and where == "[" and (key := _LIST_KEY.match(text, at)):
                self._doubt(key.end())  # the list is not closed: what belongs to it, and what to the object?
            return self._string(at, where)
        word = _WORD.match(text, at)
        value: Any = number(word[0]) if word else None
        if word is None or value is None:
            if not (word := _PHRASE.match(text, at)):
                self._doubt(at + 1)
                return None, at + 1
            value = word[0].strip()
            if _NO_VALUE.fullmatch(value):
                self._doubt(word.end())
            value = _WORDS.get(value, value)
        if self.certain and word.end() == len(text):  # more of it may follow
            self.half, value = True, CUT
        return value, word.end()

    def _string(self, at: int, where: str) -> tuple[Any, int]:
        """(the string whose opening quote is at `at`, the place behind it). CUT if the text ends in it."""
        text, quote, start = self.text, self.text[at], at + 1
        if where != "key" and text.startswith(quote * 3, at):  # Python's
            end = text.find(quote * 3, at + 3)
            self.half = self.half or end < 0
            return (CUT, len(text)) if end < 0 else (text[at + 3 : end], end + 3)
        if start < self._endless.get((quote, where), len(text) + 1):
            found = _string(quote, where, self.certain).match(text, start)
            end = found.end(1)  # type: ignore[union-attr]
            if found[2] is not None:  # type: ignore[index]
                return self._unescaped(text[start:end]), end + 1
            if end < len(text) and text[end] == quote:  # a key begins here, so the closing quote is missing
                value = text[start:end].rstrip(" \t\r\n,{}[]")
                return self._unescaped(value), start + len(value)
            self._endless[quote, where] = start
        line = -1 if self.certain else text.find("\n", start)
        if line < 0:
            self.half = True
            return CUT, len(text)
        return self._unescaped(text[start:line].rstrip(" \t\r,{}[]")), line

    def _unescaped(self, text: str) -> str:
        if "\\" not in text:
            return text
        text = unescaped(text)
        # \ud83d\ude00 is one character; half of such a pair is none.
        return text if self.certain else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def unescaped(text: str) -> str:
    """The text that stands between the quotes of a string, without its escapes."""
    commands = COMMANDS if "\\\\" not in text and _MATH.search(text) else _COMMANDS
    text = _PATH.sub(lambda m: m[0].replace("\\", "\\\\") if _FOREIGN.search(m[0]) else m[0], text)

    def character(found: re.Match) -> str:
        if commands.match(text, found.start() + 1):
            return found[0]
        return json.loads(f'"{found[0]}"') if found[1] else _ESCAPED.get(found[2], found[0])

    return _ESCAPE.sub(character, text)


def written(value) -> str:
    """A value as JSON that `read` reads as the same value: no escape in it looks like LaTeX or a path."""

    def plain(found: re.Match) -> str:
        control = _ESCAPED[found[1]] if found[1] in "bfnrt" else ""
        is_command = control and COMMANDS.match(found.string, found.start(1))
        return f"\\u{ord(control):04x}" if is_command else found[0]

    return re.sub(r"\\(.)", plain, json.dumps(value, ensure_ascii=False))


def is_cut(value) -> bool:
    """Whether the end of the text cut off a part of a value."""
    return any(v is CUT for level in _levels(value) for v in level)


def number(word: str) -> int | float | None:
    """The finite number that a word writes, or None."""
    if not _NUMBER.fullmatch(word):
        return None
    value = int(word) if word.lstrip("+-").isdigit() else float(word)
    return value if math.isfinite(value) else None


def _row(text: str) -> list:
    return [number(word) for word in text.replace(",", " ").replace("，", " ").split()]


def _behind(pattern: re.Pattern, text: str, at: int) -> int:
    """The place behind what a pattern finds at a place, or that place."""
    found = pattern.match(text, at)
    return found.end() if found else at


def out_of_string(text: str) -> str:
    """JSON that stands in a string, whose quotes may be missing, as JSON."""
    inner = re.sub(r"\A\s*(?:```\w*\s*)?|\s*(?:```)?\s*\Z", "", text)
    if inner.count('"') == inner.count('\\"') + 2 and inner[0] == inner[-1] == '"':
        text = inner[1:-1]
    elif text.count('"') != text.count('\\"'):
        return text
    try:
        return text.replace('\\"', '"') if "\\u" in text else json.loads(f'"{text}"', strict=False)
    except ValueError:
        return text.replace('\\"', '"')
