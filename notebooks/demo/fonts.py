"""Fonts of the drawn text: for training, and unseen ones for evaluation only."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ImageFont

from demo.assets import Assets

_FOUR = ("400-normal", "400-italic", "700-normal", "700-italic")


def _trdg(family: str, weights: str) -> tuple[str, ...]:
    faces = [face for weight in weights.split() for face in (weight, f"{weight.replace('Regular', '')}Italic")]
    return tuple(f"{family}-{face}.ttf" for face in faces)


def _web(family: str, faces: tuple[str, ...] = _FOUR) -> tuple[str, ...]:
    return tuple(f"{family}/files/{family}-latin-{face}.woff" for face in faces)


# {family: files}. From trdg: fonts whose name table says OFL 1.1 or Apache-2.0, except thin ones, which cannot be read
# at these sizes. They are sans or handwritten, so Fontsource adds serif and typewriter families (OFL 1.1; Roboto Slab:
# Apache-2.0).
FONTS = {
    "Lato": _trdg("Lato", "Regular Black Bold Heavy Light Medium Semibold"),
    "OpenSans": _trdg("OpenSans", "Regular Bold ExtraBold Light Semibold"),
    "Raleway": _trdg("Raleway", "Regular Black Bold ExtraBold ExtraLight Light Medium SemiBold"),
    "Roboto": _trdg("Roboto", "Regular Black Bold Light Medium"),
    "RobotoCondensed": _trdg("RobotoCondensed", "Regular Bold Light"),
    "Amatic": ("Amatic-Bold.ttf", "AmaticSC-Regular.ttf"),
    "PT Serif": _web("pt-serif"),
    "Lora": _web("lora"),
    "Merriweather": _web("merriweather"),
    "Noto Serif": _web("noto-serif"),
    "Source Serif": _web("source-serif-4"),
    "Playfair Display": _web("playfair-display"),
    "EB Garamond": _web("eb-garamond"),
    "Roboto Slab": _web("roboto-slab", ("400-normal", "700-normal")),
    "Roboto Mono": _web("roboto-mono"),
    "Courier Prime": _web("courier-prime"),
    "Inconsolata": _web("inconsolata", ("400-normal", "700-normal")),
    "Caveat": _web("caveat", ("400-normal", "700-normal")),
}
# Families that training never draws: two sans, a serif, a typewriter, a handwritten one.
UNSEEN_FONTS = {
    "Sansation": _trdg("Sansation", "Regular Bold Light"),
    "DroidSans": ("DroidSans.ttf", "DroidSans-Bold.ttf"),
    "Crimson Text": _web("crimson-text"),
    "IBM Plex Mono": _web("ibm-plex-mono"),
    "Patrick Hand": _web("patrick-hand", ("400-normal",)),
}
CAPITALS = ("Amatic",)  # families that draw small letters as capitals
PLAIN = ("Roboto-Regular.ttf", "Roboto-Medium.ttf", "OpenSans-Regular.ttf", "OpenSans-Semibold.ttf", "Lato-Medium.ttf")


def pick(rng: np.random.Generator, unseen: bool = False) -> tuple[str, str]:
    """A random (family, file); every family is equally likely."""
    fonts = UNSEEN_FONTS if unseen else FONTS
    family = list(fonts)[rng.integers(len(fonts))]
    return family, fonts[family][rng.integers(len(fonts[family]))]


def font(assets: Assets, name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of the files above, `size` pixels to the em."""
    return _load((assets.webfonts if name.endswith(".woff") else assets.fonts) / name, size)


def middles(face: ImageFont.FreeTypeFont, text: str) -> np.ndarray:
    """The x of the middle of each character, in pixels from the text's left edge [n]."""
    ends = np.array([face.getlength(text[:i]) for i in range(len(text) + 1)])
    return (ends[:-1] + ends[1:]) / 2


@lru_cache(4096)
def _load(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
