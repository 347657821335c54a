"""Lines of text in many fonts, for "read the text"."""

import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from qwenvl_jax.demo.assets import Assets
from qwenvl_jax.demo.canvas import background, contrast, grain

QUESTIONS = ("Read the text.", "What does it say?", "What is written here?", "Transcribe the text.")

# Of trdg's hundred fonts, those whose own name table says OFL 1.1 or Apache-2.0, but for the eight hairline
# and thin ones, which fade away at the sizes used here.
_LATO = ("Black", "Bold", "Heavy", "Light", "Medium", "Semibold")
_RALEWAY = ("Black", "Bold", "ExtraBold", "ExtraLight", "Light", "Medium", "SemiBold")
_OPEN_SANS = ("Bold", "ExtraBold", "Light", "Semibold")


def _faces(family: str, weights: tuple[str, ...]) -> tuple[str, ...]:
    upright = tuple(f"{family}-{w}.ttf" for w in ("Regular", *weights))
    return upright + tuple(f"{family}-{w}Italic.ttf" for w in ("", *weights))


FONTS = (
    *_faces("Lato", _LATO),
    *_faces("OpenSans", _OPEN_SANS),
    *_faces("Raleway", _RALEWAY),
    *_faces("Roboto", ("Black", "Bold", "Light", "Medium")),
    "RobotoCondensed-Bold.ttf", "RobotoCondensed-BoldItalic.ttf", "RobotoCondensed-Italic.ttf",
    "RobotoCondensed-Light.ttf", "RobotoCondensed-Regular.ttf", "AmaticSC-Regular.ttf",
)  # fmt: skip
# Never trained on: two whole families, and one style each of a known narrow and a known handwritten one.
UNSEEN_FONTS = (
    *_faces("Sansation", ("Bold", "Light")),
    "DroidSans.ttf", "DroidSans-Bold.ttf", "RobotoCondensed-LightItalic.ttf", "Amatic-Bold.ttf",
)  # fmt: skip

MAX_WIDTH = 280
MAX_CHARS = 16
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # of codes: without I and O, which many fonts draw like l and 0


def line(rng: np.random.Generator, assets: Assets, evaluation: bool, unseen_fonts: bool = False):
    """One line of text as (question, picture, answer); evaluation has texts that training never has."""
    fonts = UNSEEN_FONTS if unseen_fonts else FONTS
    name = fonts[rng.integers(len(fonts))]
    text = _text(rng, str(assets.words), evaluation)
    if name.startswith("Amatic"):  # it draws small letters as capitals
        text = text.upper()
    return QUESTIONS[rng.integers(len(QUESTIONS))], _picture(rng, str(assets.fonts / name), text), text


def held_out(text: str) -> bool:
    """Whether a word, or a number, date, price or code as a whole, is kept from training: one in ten."""
    return zlib.crc32(text.lower().encode()) % 10 == 0


@lru_cache(1)
def _words(path: str) -> tuple[list[str], list[str]]:
    """Words of 3 to 12 plain small letters: (for training, held out)."""
    lines = Path(path).read_text("utf-8").splitlines()
    words = [w for w in lines if 3 <= len(w) <= 12 and w.isascii() and w.isalpha() and w.islower()]
    return [w for w in words if not held_out(w)], [w for w in words if held_out(w)]


@lru_cache(1024)
def font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _text(rng: np.random.Generator, words: str, evaluation: bool) -> str:
    if rng.random() < 0.6:
        pool = _words(words)[evaluation]
        text = pool[rng.integers(len(pool))]
        if rng.random() < 0.4:
            second = pool[rng.integers(len(pool))]
            text = f"{text} {second}" if len(text) + len(second) < MAX_CHARS else text
        style = (str.lower, str.capitalize, str.title, str.upper)[np.searchsorted((0.4, 0.65, 0.8), rng.random())]
        return style(text)
    while True:
        text = _figures(rng)
        if held_out(text) == evaluation:
            return text


def _figures(rng: np.random.Generator) -> str:
    n = lambda low, high: int(rng.integers(low, high))  # noqa: E731 - inclusive, exclusive
    kind = n(0, 5)
    if kind == 0:
        return str(n(100, 10 ** n(3, 8)) if rng.random() < 0.5 else n(10**5, 10**9))
    if kind == 1:
        amount = f"{n(1, 10 ** n(1, 5)):,}.{n(0, 100):02}"
        return f"{'$€£'[n(0, 3)]}{amount}"
    if kind == 2:
        return f"{n(1, 1000) / 10}%" if rng.random() < 0.5 else f"{n(0, 24):02}:{n(0, 60):02}"
    if kind == 3:
        day, month, year = n(1, 29), n(1, 13), n(1950, 2031)
        forms = (f"{day} {_MONTHS[month - 1]} {year}", f"{year}-{month:02}-{day:02}", f"{day:02}/{month:02}/{year}")
        return forms[n(0, 3)]
    letters = "".join(_LETTERS[i] for i in rng.integers(len(_LETTERS), size=n(2, 5)))
    digits = "".join(str(d) for d in rng.integers(10, size=n(2, 6)))
    return f"{letters}{('', '-', ' ', '/', '#')[n(0, 5)]}{digits}"


def _picture(rng: np.random.Generator, path: str, text: str) -> Image.Image:
    height = 28 if rng.random() < 0.8 else 56
    size = int(rng.integers(15, 24) if height == 28 else rng.integers(24, 46))
    face = font(path, size)
    if face.getlength(text) > MAX_WIDTH - 8:
        size = int(size * (MAX_WIDTH - 8) / face.getlength(text))
        face = font(path, size)
    left, top, right, bottom = face.getbbox(text)
    while bottom - top > height - 4:  # tall letters with tails
        size -= 1
        face = font(path, size)
        left, top, right, bottom = face.getbbox(text)
    wide, tall = right - left, bottom - top
    width = min(MAX_WIDTH, -(-(wide + 6 + int(rng.integers(0, 20))) // 28) * 28)
    x = int(rng.integers(2, max(3, width - wide - 1)))
    y = int(rng.integers(2, max(3, height - tall - 1)))
    ground, shade = background(rng, width, height)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).text((x - left, y - top), text, fill=255, font=face)
    slack = min(y, height - tall - y) / max(wide, 1)  # a rotation that keeps the text inside
    if slack > 0.01 and rng.random() < 0.4:
        angle = float(np.degrees(np.clip(rng.normal(0, 0.03), -slack, slack)))
        mask = mask.rotate(angle, Image.Resampling.BICUBIC, center=(x + wide / 2, y + tall / 2))
    ground.paste(contrast(rng, shade), mask=mask)
    if rng.random() < 0.25:
        ground = ground.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.7)) * size / 20))
    return grain(rng, ground) if rng.random() < 0.4 else ground
