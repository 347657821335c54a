"""The emoji that the demo knows by name, as sprites of any size."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

# Well known, with one plain name, and distinct at 28 pixels. File names are code points.
EMOJI = {
    "dog": "1f436", "cat": "1f431", "mouse": "1f42d", "rabbit": "1f430", "fox": "1f98a", "bear": "1f43b",
    "panda": "1f43c", "koala": "1f428", "tiger": "1f42f", "lion": "1f981", "cow": "1f42e", "pig": "1f437",
    "frog": "1f438", "monkey": "1f435", "chicken": "1f414", "penguin": "1f427", "duck": "1f986", "owl": "1f989",
    "bat": "1f987", "horse": "1f434", "unicorn": "1f984", "bee": "1f41d", "butterfly": "1f98b", "snail": "1f40c",
    "ladybug": "1f41e", "spider": "1f577-fe0f", "turtle": "1f422", "snake": "1f40d", "octopus": "1f419",
    "crab": "1f980", "fish": "1f41f", "whale": "1f433", "elephant": "1f418", "camel": "1f42b", "giraffe": "1f992",
    "zebra": "1f993", "parrot": "1f99c", "flamingo": "1f9a9", "sheep": "1f411",
    "cactus": "1f335", "tree": "1f333", "rose": "1f339", "tulip": "1f337", "sunflower": "1f33b",
    "mushroom": "1f344", "clover": "1f340",
    "apple": "1f34e", "pear": "1f350", "orange": "1f34a", "lemon": "1f34b", "banana": "1f34c",
    "watermelon": "1f349", "strawberry": "1f353", "pineapple": "1f34d", "tomato": "1f345", "carrot": "1f955",
    "avocado": "1f951", "peach": "1f351",
    "bread": "1f35e", "cheese": "1f9c0", "egg": "1f95a", "pizza": "1f355", "burger": "1f354", "taco": "1f32e",
    "donut": "1f369", "cookie": "1f36a", "cake": "1f382", "lollipop": "1f36d", "pretzel": "1f968",
    "croissant": "1f950", "cup": "2615", "beer": "1f37a",
    "key": "1f511", "lock": "1f512", "bell": "1f514", "book": "1f4d5", "clock": "23f0", "phone": "1f4f1",
    "camera": "1f4f7", "guitar": "1f3b8", "drum": "1f941", "trumpet": "1f3ba", "umbrella": "2614", "hat": "1f3a9",
    "crown": "1f451", "ring": "1f48d", "shoe": "1f45f", "shirt": "1f455", "dress": "1f457", "hammer": "1f528",
    "magnet": "1f9f2", "candle": "1f56f-fe0f", "bulb": "1f4a1", "balloon": "1f388", "gift": "1f381",
    "kite": "1fa81", "trophy": "1f3c6", "chair": "1fa91", "door": "1f6aa", "bomb": "1f4a3",
    "pencil": "270f-fe0f", "envelope": "2709-fe0f", "broom": "1f9f9", "ladder": "1fa9c", "anchor": "2693",
    "compass": "1f9ed", "robot": "1f916", "ghost": "1f47b", "alien": "1f47d", "skull": "1f480",
    "snowman": "26c4", "basketball": "1f3c0",
    "car": "1f697", "bus": "1f68c", "train": "1f682", "bicycle": "1f6b2", "truck": "1f69a", "tractor": "1f69c",
    "plane": "2708-fe0f", "helicopter": "1f681", "rocket": "1f680", "boat": "26f5", "ship": "1f6a2",
    "house": "1f3e0", "tent": "26fa", "castle": "1f3f0",
    "star": "2b50", "moon": "1f319", "sun": "1f31e", "cloud": "2601-fe0f", "rainbow": "1f308", "fire": "1f525",
    "snowflake": "2744-fe0f", "heart": "2764-fe0f", "volcano": "1f30b",
}  # fmt: skip
NAMES = tuple(EMOJI)
_PLURALS = {"mouse": "mice", "fish": "fish", "sheep": "sheep", "cactus": "cacti"}


def plural(name: str) -> str:
    if name in _PLURALS:
        return _PLURALS[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh", "to")) else "s")


class Sprite(NamedTuple):
    """An RGBA picture cropped to its visible pixels."""

    image: Image.Image
    width: int
    height: int


@lru_cache(8192)
def sprite(folder: Path, name: str, size: int, mirrored: bool = False) -> Sprite:
    """The emoji. Its longer visible side has `size` pixels, or one less if its tips are thin."""
    image = _original(folder, name)
    scale = size / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = _visible(image)
    return Sprite(image, *image.size)


@lru_cache(512)
def _original(folder: Path, name: str) -> Image.Image:
    with Image.open(folder / f"{EMOJI[name]}.png") as file:
        return _visible(file.convert("RGBA"))


def _visible(image: Image.Image) -> Image.Image:
    """Crops margins that are transparent or nearly so."""
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 64)).getbbox())
