"""Fonts that have the letters of a text.

Pillow brings one font, of ASCII letters and a few more. For other letters the fonts of the system are searched.
"""

import os
import sys
import unicodedata
from functools import lru_cache

from PIL import ImageFont

_LETTERS, _MARKS = 200, 3  # of a text that are measured; marks above and below one letter
_FOLDERS = (
    f"{sys.prefix}/share/fonts",
    f"{sys.prefix}/fonts",
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
    "~/AppData/Local/Microsoft/Windows/Fonts",
)
_STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "mono", "serif", "math")
_NOT_FONTS = ("lastresort", "adobeblank", "emoji")  # their glyphs do not show the letter, or have one size only
_MOST_FONTS, _SEARCHES = 3000, 5  # font files that are looked at; vain searches in one picture


def clean(name: str) -> str:
    """One line of letters that can be drawn, of bounded length."""
    line = " ".join(name[: 4 * _LETTERS].split())
    letters, marks = [], 0
    for c in unicodedata.normalize("NFC", line):
        marks = marks + 1 if unicodedata.category(c) in ("Mn", "Me") else 0
        if c.isprintable() and unicodedata.category(c) != "Me" and c not in "\ufe0e\ufe0f" and marks <= _MARKS:
            letters.append(c)
    return "".join(letters).strip()[:_LETTERS]


class Fonts:
    """Finds fonts for the texts of one picture. A font that served one text is tried first for the next."""

    def __init__(self):
        self._found, self._failed = [""], 0

    def file(self, text: str) -> str | None:
        """The file of a font that has every letter; "" is Pillow's own. None if no font has them all."""
        for file in self._found:
            if all(_has(file, letter) for letter in text):
                return file
        if self._failed == _SEARCHES:
            return None
        for file in _font_files(_FOLDERS):
            if all(_has(file, letter) for letter in text):
                self._found.append(file)
                return file
        self._failed += 1
        return None


@lru_cache(maxsize=8)
def _font_files(folders: tuple[str, ...]) -> tuple[str, ...]:
    """The fonts of the system, plain sans-serif ones first."""
    found = []
    for folder in map(os.path.expanduser, folders):
        for where, _, names in os.walk(folder):
            found += [os.path.join(where, n) for n in names if n.lower().endswith((".ttf", ".ttc", ".otf"))]
    named = [(os.path.basename(file).lower().replace(" ", ""), file) for file in found[:_MOST_FONTS]]
    named = [pair for pair in named if not any(bad in pair[0] for bad in _NOT_FONTS)]
    return tuple(file for _, file in sorted(named, key=_plainness))


def _plainness(named: tuple[str, str]) -> tuple[int, bool, tuple[str, str]]:
    return sum(style in named[0] for style in _STYLES), "sans" not in named[0], named


@lru_cache(maxsize=1 << 15)
def _has(file: str, letter: str) -> bool:
    """Whether a font has a glyph for a letter: not an empty one, and not the one for letters that it lacks."""
    if letter == " ":
        return True
    try:
        font, lacking = _probe(file)
        glyph = font.getmask(letter)
    except (OSError, ValueError):
        return False
    return glyph.getbbox() is not None and (glyph.size, bytes(glyph)) != lacking


@lru_cache(maxsize=16)
def _probe(file: str):
    """(a font that draws letters one by one, what it draws for a letter that it lacks)"""
    font = ImageFont.truetype(file, 16, layout_engine=ImageFont.Layout.BASIC) if file else _font(file, 16)
    glyph = font.getmask("\U0010fffe")  # of no alphabet
    return font, (glyph.size, bytes(glyph))


@lru_cache(maxsize=16)
def _font(file: str, size: int):
    """A font of letters of a size in pixels. Raises OSError if it cannot be read."""
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


def fitted(text: str, fonts: Fonts, size: int, room: int):
    """(the text, cut to a width in pixels, its font)"""
    font = _font(fonts.file(text) or "", size)
    if font.getlength(text) <= room:
        return text, font
    low, high = 0, len(text)  # the most letters that fit: at least `low`, less than `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if font.getlength(text[:middle] + "…") <= room else (low, middle)
    return (text[:low].rstrip() + "…" if low else ""), font
