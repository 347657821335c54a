"""JSON as models write it: cut short, with single quotes, without commas or braces, with quotes that are not escaped.

Correct JSON is read as `json.loads` reads it. Nothing is evaluated, and the time is linear in the length of the text.
"""

import json
import re
from typing import Any

CUT = ...  # stands for what the end of the text cut off: a value of an object, or the rest of a list
DEPTH = 24  # deeper brackets begin anew

NUMBER = r"[-+]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,24})(?:[eE][-+]?[0-9]{1,3})?"
_SPACE = re.compile(r"[\s,，]*+")
_NUMBERS = re.compile(r"[\[(]([-+.0-9eE,，\s]*+)[\])]")
_NUMBER = re.compile(NUMBER)
_COLON = re.compile(r"\s*+[:：]")
_NAME = re.compile(r"[^\W\d]\w*+(?=\s*+[:：])")
_WORD = re.compile(r"""[^\s,:{}\[\]()<`"'][^\s,:{}\[\]()<`"]*+""")
_PHRASE = re.compile(r"[^,{}\[\]<`\"\n]*+")
_JUNK = re.compile(r"""[^\s{}\[\]<`"'\w]++|\w++""")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
# Backslashes that models forget to double: "\frac", "C:\Users\new". No text has \b, \f or \r before a letter. The words
# behind \n and \t are no words of a text; the short ones count only beside other signs of TeX.
_TEX = (
    r"[bf](?=[A-Za-z])|r(?=[a-z])|n(?:abla|eq|exists|otin|ewline|ewcommand|ormalsize|subseteq)(?![A-Za-z])"
    r"|t(?:heta|imes|au|ext(?:bf|it|rm|tt|sf|sc|style)?|ilde|riangle(?:q|left|right)?|frac|binom)(?![A-Za-z])"
)
_SHORT_TEX = r"(?:n(?:e|i|u|eg|ot|leq|geq)|t(?:o|an|anh|op|ag))(?![A-Za-z])"
_FORGOTTEN = re.compile(rf"(?<!\\)(?:\\\\)*+\\(?:{_TEX}|{_SHORT_TEX})")
_ESCAPES = [
    re.compile(rf"(?P<kept>\\(?:{tex}))|\\(?:u(?P<code>[0-9a-fA-F]{{4}})|(?P<sign>[\"'\\/bfnrt]))")
    for tex in (_TEX, f"{_TEX}|{_SHORT_TEX}")
]
_UNKNOWN = re.compile(r"(?<!\\)(?:\\\\)*+\\(?:[^\W_0-9bfnrtu]|u(?![0-9a-fA-F]{4}))")
_PATH = re.compile(r"(?<![A-Za-z])[A-Za-z]:(?:\\(?![\\\"'])[\w.$ ()~-]*+)++")
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
# What comes behind the quote that ends a key, a value of an object, and a value of a list. Other quotes are text.
_KEY = r"""["']\w++["']\s*+[:：]"""
_ENDS = {
    "key": r"\s*+[:：]",
    "{": rf"""\s*+(?:[{{}}\])<`]|,\s*+(?:["'{{}}\[\]<`]|\Z|\w++\s*+:)|{_KEY}|\Z)""",
    "[": r"""\s*+(?:[,}\])<`"']|\Z)""",
}


def _string(quote: str, end: str) -> re.Pattern:
    """The text of a string in group 1; in group 2 its closing quote, unless a key or the end of the text stops it."""
    text = rf"[^{quote}\\]++|\\.|{quote}(?!{end})(?!\w++{quote}\s*+[:：])"
    return re.compile(rf"((?:{text})*+)({quote}{end})?", re.S)


_STRINGS = {(quote, where): _string(quote, end) for quote in "\"'" for where, end in _ENDS.items()}


def _pairs(pairs: list[tuple[str, Any]]) -> dict:
    if len(value := dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return value


def _is_shallow(value) -> bool:
    """Whether brackets are nested at most DEPTH deep."""
    holders = [value]
    for _ in range(DEPTH):
        inner = (v for h in holders for v in (h.values() if isinstance(h, dict) else h))
        if not (holders := [v for v in inner if isinstance(v, dict | list)]):
            return True
    return False


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, strict=False)


class Reader:
    """Reads values out of one text."""

    def __init__(self, text: str):
        self.text = text
        # json.loads accepts halves of characters, and reads a form feed in "\frac".
        self._tries = 0 if "\\u" in text or _FORGOTTEN.search(text) else 4
        self._endless: dict[tuple[str, str], int] = {}  # (quote, where): no string that starts behind this has an end

    def read(self, at: int, inside: bool = False) -> tuple[list, int]:
        """(the values from the bracket at `at`, the place behind them); more than one only if braces are missing.

        inside: `at` is the first key of an object whose opening brace is missing.
        """
        if not inside and (value := self._strict(at)) is not None:
            return [value[0]], value[1]
        values: list = []
        stack: list[tuple[Any, list]] = [(values, [])]  # (dict or list, [the key that waits for its value])
        if inside:
            self._push(stack, {})
        text, end = self.text, len(self.text)
        while (at := _SPACE.match(text, at).end()) < end and text[at] not in "<`":  # type: ignore[union-attr]
            holder, key = stack[-1]
            c = text[at]
            wants_key = isinstance(holder, dict) and not key
            if c in "}])":
                at += 1
                self._close(stack, dict if c == "}" else list)
            elif wants_key:
                if c == "{":  # the closing brace is missing
                    if holder or len(stack) > 2:
                        stack.pop()
                    else:
                        at += 1
                elif c in "[(" and holder and (found := _NUMBERS.match(text, at)) and self._append(holder, found[1]):
                    at = found.end()
                else:
                    at = self._key(stack, at)
            elif c in "{[(":
                if (found := _NUMBERS.match(text, at)) and found[1]:
                    self._add(stack, _numbers(found[1]))
                    at = found.end()
                elif len(stack) > DEPTH:
                    break
                else:
                    self._push(stack, {} if c == "{" else [])
                    at += 1
            else:
                value, at = self._scalar(at, "{" if isinstance(holder, dict) else "[")
                self._add(stack, value)
            if len(stack) == 1:
                return values, at
        self._cut(stack, text[max(at - 80, 0) : at].rstrip().endswith(","))
        return values, at

    def _strict(self, at: int) -> tuple[Any, int] | None:
        """(value, the place behind it) of correct JSON; None for other JSON. The text is tried a few times only."""
        if self._tries:
            try:
                value, end = _DECODER.raw_decode(self.text, at)
                if _is_shallow(value):
                    return value, end
            except (ValueError, RecursionError):
                pass
            self._tries -= 1
        return None

    def _add(self, stack, value) -> None:
        holder, key = stack[-1]
        if isinstance(holder, list):
            holder.append(value)
        else:
            holder[key.pop()] = value

    @staticmethod
    def _append(holder: dict, text: str) -> bool:
        """Adds a list of numbers that stands where a key is due to the list of numbers before it."""
        key = next(reversed(holder))
        value = holder[key]
        if not isinstance(value, list) or not value or not text.strip():
            return False
        if not all(isinstance(v, list) for v in value):
            value = holder[key] = [value]
        value.append(_numbers(text))
        return True

    def _push(self, stack, holder) -> None:
        self._add(stack, holder)
        stack.append((holder, []))

    def _close(self, stack, kind: type) -> None:
        """Closes the innermost bracket of this kind, and those in it whose closing bracket is missing."""
        for depth in range(len(stack) - 1, 0, -1):
            if isinstance(stack[depth][0], kind):
                for holder, key in stack[depth:]:
                    if key:
                        holder[key.pop()] = None
                del stack[depth:]
                return

    def _cut(self, stack, in_object: bool) -> None:
        for i, (holder, key) in enumerate(stack[1:], 2):
            if isinstance(holder, list):
                holder.append(CUT)
            elif key:
                holder[key.pop()] = CUT
            elif in_object and i == len(stack):
                holder[None] = CUT

    def _key(self, stack, at: int) -> int:
        """Reads a key and its colon, or passes over something that is no key."""
        text = self.text
        if text[at] in "\"'":
            key, end = self._string(at, "key")
            if key is CUT:
                stack[-1][0][None] = CUT
        elif found := _NAME.match(text, at):
            key, end = found[0], found.end()
        else:
            found = _JUNK.match(text, at)
            return found.end() if found else at + 1
        if colon := _COLON.match(text, end):
            if key in stack[-1][0]:  # the brace between two objects is missing
                stack.pop()
                self._push(stack, {}) if isinstance(stack[-1][0], list) else stack.append(({}, []))
            stack[-1][1].append(key)
            return colon.end()
        return end

    def _scalar(self, at: int, where: str) -> tuple[Any, int]:
        text = self.text
        if text[at] in "\"'":
            return self._string(at, where)
        if not (word := _WORD.match(text, at)):
            return None, at + 1
        if word[0] in _WORDS:
            return _WORDS[word[0]], word.end()
        value = number(word[0])
        if value is None and where == "{":
            word = _PHRASE.match(text, at) or word
        return (word[0].strip() if value is None else value), max(word.end(), at + 1)

    def _string(self, at: int, where: str) -> tuple[Any, int]:
        """(the string whose opening quote is at `at`, the place behind it). CUT if the text ends in it."""
        text, quote, start = self.text, self.text[at], at + 1
        if start < self._endless.get((quote, where), len(text) + 1):
            found = _STRINGS[quote, where].match(text, start)
            end = found.end(1)  # type: ignore[union-attr]
            if found[2] is not None:  # type: ignore[index]
                return _unescaped(text[start:end]), end + 1
            if end < len(text) and text[end] == quote:  # a key begins here, so the closing quote is missing
                value = text[start:end].rstrip(" \t\r\n,{}[]")
                return _unescaped(value), start + len(value)
            self._endless[quote, where] = start
        line = text.find("\n", start)
        if line < 0:
            return CUT, len(text)
        return _unescaped(text[start:line].rstrip(" \t\r,{}[]")), line


def is_cut(value) -> bool:
    """Whether the end of the text cut off a part of a value."""
    holders = [value]
    while holders:
        inner = [v for h in holders for v in (h.values() if isinstance(h, dict) else h)]
        if any(v is CUT for v in inner):
            return True
        holders = [v for v in inner if isinstance(v, dict | list)]
    return False


def _numbers(text: str) -> list:
    return [number(word) for word in text.replace(",", " ").replace("，", " ").split()]


def number(word: str) -> int | float | None:
    """The number that a word writes, or None."""
    if not _NUMBER.fullmatch(word):
        return None
    return int(word) if word.lstrip("+-").isdigit() else float(word)


def _character(found: re.Match) -> str:
    if found["kept"]:
        return found[0]
    return chr(int(found["code"], 16)) if found["code"] else _ESCAPED.get(found["sign"], found["sign"])


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    if _UNKNOWN.search(text):
        text = _PATH.sub(lambda m: m[0].replace("\\", "\\\\") if _UNKNOWN.search(m[0]) else m[0], text)
    escape = _ESCAPES["$" in text or _UNKNOWN.search(text) is not None]
    text = escape.sub(_character, text)
    # \ud83d\ude00 is one character; half of such a pair is none.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
