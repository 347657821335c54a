"""Lines of text in many fonts, for "read the text"."""

import csv
import re
import string
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demo.assets import Assets
from demo.canvas import background, contrast, grain
from demo.cells import of_text
from demo.emoji import NAMES, plural
from demo.fonts import CAPITALS, font, middles, pick
from demo.questions import ALL, READ, ask
from demo.tables import MONTHS

MAX_WIDTH = 280
MAX_CHARS = 16
_CHARACTERS = string.ascii_letters + string.digits * 2 + "$€£%.,:/-#"
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # for codes; I and O look like l and 0 in many fonts


def line(rng: np.random.Generator, assets: Assets, evaluation: bool, unseen_fonts: bool = False, easy: bool = False):
    """One line of text: (picture, [(question, answer)], facts). Evaluation uses texts that training never has.

    easy: either rows of characters, one per visual token; or one to three characters, or letters spaced up to a visual
    token apart, mostly in black and white.
    """
    image, text, centres = glyphs(rng, assets, evaluation, unseen_fonts, easy)
    return image, [(ask(rng, READ), text)], of_text(text, centres, image.width, image.height)


def glyphs(rng: np.random.Generator, assets: Assets, evaluation=False, unseen_fonts=False, easy=False):
    """The line that `line` asks about: (picture, text, centres (x, y) of the characters [n, 2] in pixels)."""
    family, file = pick(rng, unseen_fonts)
    if easy and rng.random() < 0.5:
        return _block(rng, assets, file, family in CAPITALS)
    short = easy and rng.random() < 0.5
    text = _characters(rng) if short else _text(rng, assets, evaluation)
    if family in CAPITALS:
        text = text.upper()
    image, centres = _picture(rng, assets, file, text, easy, easy and not short)
    return image, text, centres


def held_out(text: str) -> bool:
    """Whether a word, place, number, date, price or code is for evaluation only: one in ten."""
    return zlib.crc32(text.lower().encode()) % 10 == 0


@lru_cache(2)
def _pools(assets: Assets, evaluation: bool) -> tuple[list[str], list[str], list[str]]:
    """(words of 3 to 12 small letters, places, words that are one token)."""
    words = [w for w in assets.words.read_text("utf-8").splitlines() if re.fullmatch("[a-z]{3,12}", w)]
    with (assets.tables / "airports.csv").open(encoding="utf-8", newline="") as file:
        cities = {row["city"] for row in csv.DictReader(file)}
    places = sorted(c for c in cities if re.fullmatch(f"[A-Za-z ]{{3,{MAX_CHARS}}}", c))
    known = {*NAMES, *map(plural, NAMES), *re.findall("[a-z]+", " ".join(ALL).lower())}
    return tuple([w for w in pool if held_out(w) == evaluation] for pool in (words, places, sorted(known)))


def _text(rng: np.random.Generator, assets: Assets, evaluation: bool) -> str:
    kind = np.searchsorted((0.45, 0.58, 0.65), rng.random(), side="right")
    if kind == 3:
        while True:
            text = _figures(rng)
            if held_out(text) == evaluation:
                return text
    pool = _pools(assets, evaluation)[kind]
    text = pool[rng.integers(len(pool))]
    if kind != 1 and rng.random() < 0.4:
        second = pool[rng.integers(len(pool))]
        text = f"{text} {second}" if len(text) + len(second) < MAX_CHARS else text
    style = np.searchsorted((0.4, 0.65, 0.8), rng.random(), side="right")
    return (text, text.capitalize(), text.title(), text.upper())[style]


def _characters(rng: np.random.Generator) -> str:
    return "".join(_CHARACTERS[i] for i in rng.integers(len(_CHARACTERS), size=rng.integers(1, 4)))


def _block(rng: np.random.Generator, assets: Assets, file: str, capitals: bool):
    """Characters in rows and columns, one per visual token, read row by row."""
    rows = int(rng.integers(1, 4))
    columns = int(rng.integers(2, 11 if rows < 3 else 9))
    text = "".join(_CHARACTERS[i] for i in rng.integers(len(_CHARACTERS), size=rows * columns))
    text = text.upper() if capitals else text
    ground, shade = background(rng, columns * 28, rows * 28)
    if rng.random() < 0.5:
        ground, shade = Image.new("RGB", ground.size, "white"), np.full(3, 255)
    draw, ink, face = ImageDraw.Draw(ground), contrast(rng, shade), font(assets, file, int(rng.integers(15, 24)))
    centres = (np.stack(np.divmod(np.arange(rows * columns), columns)[::-1], 1) + 0.5) * 28
    centres = centres + rng.uniform(-3, 3, 2)
    for letter, place in zip(text, centres.tolist(), strict=True):
        draw.text(tuple(place), letter, ink, face, anchor="mm")
    return ground, text, centres


def _figures(rng: np.random.Generator) -> str:

    def n(low, high):  # inclusive, exclusive
        return int(rng.integers(low, high))

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
        forms = (f"{day} {MONTHS[month - 1]} {year}", f"{year}-{month:02}-{day:02}", f"{day:02}/{month:02}/{year}")
        return forms[n(0, 3)]
    letters = "".join(_LETTERS[i] for i in rng.integers(len(_LETTERS), size=n(2, 5)))
    digits = "".join(str(d) for d in rng.integers(10, size=n(2, 6)))
    return f"{letters}{('', '-', ' ', '/', '#')[n(0, 5)]}{digits}"


def _picture(
    rng: np.random.Generator, assets: Assets, file: str, text: str, easy: bool = False, spaced: bool = False
) -> tuple[Image.Image, np.ndarray]:
    height = 28 if rng.random() < 0.8 else 56
    size = int(rng.integers(18, 25) if height == 28 else rng.integers(25, 46))
    face = font(assets, file, size)
    if face.getlength(text) > MAX_WIDTH - 8:
        size = int(size * (MAX_WIDTH - 8) / face.getlength(text))
        face = font(assets, file, size)
    left, top, right, bottom = face.getbbox(text)
    while bottom - top > height - 4:  # tall letters with tails
        size -= 1
        face = font(assets, file, size)
        left, top, right, bottom = face.getbbox(text)
    wide, tall = right - left, bottom - top
    pitch = 0.0
    if spaced and len(text) <= MAX_WIDTH // 28:
        pitch = 28.0 if rng.random() < 0.5 else rng.uniform(min(wide / len(text), 28), 28)
        wide = int(pitch * len(text)) - (pitch == 28) * 6  # a pitch of whole tokens fills them
    width = min(MAX_WIDTH, -(-(wide + 6 + int(rng.integers(0, 20))) // 28) * 28)
    x = 0 if pitch == 28 else int(rng.integers(2, max(3, width - wide - 1)))
    y = int(rng.integers(2, max(3, height - tall - 1)))
    plain = easy and rng.random() < 0.7
    if plain:
        shade = np.full(3, 255 * int(rng.integers(2)))
        ground, ink = Image.new("RGB", (width, height), tuple(shade.tolist())), tuple((255 - shade).tolist())
    else:
        ground, shade = background(rng, width, height)
        ink = contrast(rng, shade)
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    if pitch:
        for i, letter in enumerate(text):
            draw.text((x + pitch * (i + 0.5), y - top), letter, fill=255, font=face, anchor="ma")
    else:
        draw.text((x - left, y - top), text, fill=255, font=face)
    across = x + pitch * (np.arange(len(text)) + 0.5) if pitch else x - left + middles(face, text)
    centres = np.stack([across, np.full(len(text), y + tall / 2)], axis=1)
    slack = min(y, height - tall - y) / max(wide, 1)  # the largest rotation that keeps the text inside
    if slack > 0.01 and rng.random() < 0.4 and not plain:
        angle = float(np.degrees(np.clip(rng.normal(0, 0.03), -slack, slack)))
        mask = mask.rotate(angle, Image.Resampling.BICUBIC, center=(x + wide / 2, y + tall / 2))
    ground.paste(ink, mask=mask)
    if plain:
        return ground, centres
    if rng.random() < 0.15:
        ground = ground.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.5)) * size / 20))
    return grain(rng, ground) if rng.random() < 0.3 else ground, centres
