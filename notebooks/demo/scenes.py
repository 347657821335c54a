"""Scenes of emoji: what is it, how many are there, where is each one.

The last result of each task's function is the facts of `demo.cells`.
"""

import json

import numpy as np

from demo.assets import Assets
from demo.canvas import background, grain
from demo.cells import Facts, Thing, cell_of, of_things
from demo.emoji import NAMES, plural, sprite
from demo.questions import COUNT, LIST, LOCATE, LOCATE_ALL, LOCATE_ONE, NAME, ask

MOST = 6  # objects of the kind to count
_LOCATED = 3  # objects of the kind to locate
_GAP = 2  # pixels between any two


def name(rng: np.random.Generator, assets: Assets, easy: bool = False):
    """One emoji in a picture: (picture, [(question, its name), (question, its box)], facts).

    easy: it fills the picture.
    """
    if easy:
        side = int(rng.integers(1, 4)) * 28
        image, (what,), boxes = scene(rng, assets, [1], sizes=(side - 8, side), side=(side, side))
    else:
        image, (what,), boxes = scene(rng, assets, [1], sizes=(28, 84), side=(112, 168))
    return image, [(ask(rng, NAME), what), _locate(rng, what, boxes[what])], _facts(image, boxes)


def listing(rng: np.random.Generator, assets: Assets):
    """Rows of emoji, with gaps: (picture, [(question, their names in reading order)], facts)."""
    cell = int(rng.integers(7, 12)) * 4
    columns, rows = (int(n) for n in rng.integers(1, 168 // cell + 1, 2))
    width, height = (max(2, -(-cell * n // 28)) * 28 for n in (columns, rows))
    image, _ = background(rng, width, height)
    left, top = (int(rng.integers(0, room + 1)) for room in (width - cell * columns, height - cell * rows))
    names, things = [], []
    for i in range(columns * rows):
        if rng.random() < 0.85 or not names:
            names.append(NAMES[rng.integers(len(NAMES))])
            drawn = sprite(assets.emoji, names[-1], int(rng.integers(6, cell // 4 + 1)) * 4, bool(rng.integers(2)))
            y, x = divmod(i, columns)
            x += rng.random() * (1 - drawn.width / cell)
            y += rng.random() * (1 - drawn.height / cell)
            corner = np.array([left + int(x * cell), top + int(y * cell)])
            box = [*corner, *(corner + [drawn.width, drawn.height])]
            things.append(Thing(names[-1], [box], index=len(things)))
            image.paste(drawn.image, tuple(corner.tolist()), drawn.image)
    image = grain(rng, image, 12) if rng.random() < 0.3 else image
    return image, [(ask(rng, LIST), ", ".join(names))], of_things(things, width, height)


def count(rng: np.random.Generator, assets: Assets):
    """One to six of a kind and up to five others: (picture, [(question, number), …], facts).

    The first question is about that kind, the next ones about the others.
    """
    wanted = int(rng.integers(1, MOST + 1))
    while True:
        image, kinds, boxes = scene(rng, assets, [wanted, *_others(rng, 5)], sizes=(24, 48), side=(112, 168))
        if len(boxes[kinds[0]]) == wanted:  # else the picture was too full
            return image, [_count(rng, kinds[0], boxes[kinds[0]]), *_more(rng, kinds[1:], boxes)], _facts(image, boxes)


def locate(rng: np.random.Generator, assets: Assets):
    """One to three of a kind and up to four others: (picture, [(question, Qwen2.5's JSON list of boxes), …], facts).

    The first question is about that kind, the next ones about the others.
    """
    numbers = [int(rng.integers(1, _LOCATED + 1)), *_others(rng, 4)]
    image, kinds, boxes = scene(rng, assets, numbers, sizes=(28, 72), side=(112, 168))
    return image, [_locate(rng, kinds[0], boxes[kinds[0]]), *_more(rng, kinds[1:], boxes)], _facts(image, boxes)


def _count(rng: np.random.Generator, kind: str, boxes: list) -> tuple[str, str]:
    return ask(rng, COUNT, plural(kind)), str(len(boxes))


def _locate(rng: np.random.Generator, kind: str, boxes: list) -> tuple[str, str]:
    found = _in_order(boxes)
    forms = ((LOCATE, kind), (LOCATE_ONE, kind) if len(found) == 1 else (LOCATE_ALL, plural(kind)))
    question = ask(rng, *forms[rng.integers(2)])
    return question, json.dumps([{"bbox_2d": list(box), "label": kind} for box in found])


def _in_order(boxes: list) -> list:
    """Boxes in the order of the visual tokens that hold their centres."""
    return sorted(boxes, key=lambda box: (*cell_of(box), box))


def _facts(image, boxes: dict[str, list]) -> Facts:
    things = [Thing(kind, [b], nth=n) for kind, found in boxes.items() for n, b in enumerate(_in_order(found), 1)]
    return of_things(things, image.width, image.height)


def _more(rng: np.random.Generator, kinds: list[str], boxes: dict[str, list]) -> list[tuple[str, str]]:
    """A question about each further kind that was placed."""
    there = [kind for kind in kinds if boxes[kind]]
    return [
        (_locate if len(boxes[kind]) <= _LOCATED and rng.random() < 0.5 else _count)(rng, kind, boxes[kind])
        for kind in there
    ]


def _others(rng: np.random.Generator, most: int) -> list[int]:
    """Numbers of objects of the further kinds, up to `most` in all."""
    numbers, left = [], int(rng.integers(0, most + 1))
    while left:
        numbers.append(int(rng.integers(1, left + 1)))
        left -= numbers[-1]
    return numbers


def scene(rng: np.random.Generator, assets: Assets, numbers: list[int], sizes: tuple[int, int], side: tuple[int, int]):
    """Draws numbers[i] objects of a random kind i, without overlap or cropping: (picture, kinds, {kind: boxes}).

    sizes: range of an object's longer side, in pixels. side: range of the picture's sides, in steps of 28.
    Boxes are (x1, y1, x2, y2); x2 and y2 are just past the last pixel. Objects that cannot be placed are left out.
    """
    width, height = (int(rng.integers(side[0] // 28, side[1] // 28 + 1)) * 28 for _ in "wh")
    kinds = [NAMES[i] for i in rng.choice(len(NAMES), len(numbers), replace=False)]
    image, _ = background(rng, width, height)
    taken: list[tuple[int, int, int, int]] = []
    boxes: dict[str, list] = {kind: [] for kind in kinds}
    for kind, number in zip(kinds, numbers, strict=True):
        for _ in range(number):
            size = int(rng.integers(sizes[0] // 4, sizes[1] // 4 + 1)) * 4
            drawn = sprite(assets.emoji, kind, size, bool(rng.integers(2)))
            box = place(rng, width, height, drawn.width, drawn.height, taken)
            if box:
                taken.append(box)
                boxes[kind].append(box)
                image.paste(drawn.image, box[:2], drawn.image)
    return (grain(rng, image, 12) if rng.random() < 0.3 else image), kinds, boxes


def place(rng: np.random.Generator, width: int, height: int, wide: int, tall: int, taken: list) -> tuple | None:
    """A box of that size that overlaps no taken one, or None after twenty tries."""
    spots = rng.integers(0, [width - wide + 1, height - tall + 1], (20, 2)).tolist()
    for x, y in spots:
        if all(x >= r + _GAP or x + wide + _GAP <= l or y >= b + _GAP or y + tall + _GAP <= t for l, t, r, b in taken):
            return x, y, x + wide, y + tall
    return None
