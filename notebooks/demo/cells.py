"""Facts about each visual token of a drawn picture or clip: training targets of the demo, besides the answers.

A visual token is a cell of 28 × 28 pixels; in a clip, of two frames. Words have facts too: the name of an object has
the facts about the first object of that kind.
"""

from typing import NamedTuple

import numpy as np

CELL = 28  # pixels to a visual token's side
COVERED = 0.25  # a cell shows an object that covers this share of the cell, or has this share of itself in it
# left … bottom: edges of the object's box, in cells from the picture's corner. nth: its number among its kind, in
# reading order, from 1. start: the temporal step in which it appears. index: the position of the cell's first character
# in the text, or of the object in the list. core: 1 if the object's centre is in this cell, else 0.
FACTS = ("left", "top", "right", "bottom", "nth", "start", "index", "core")


class Thing(NamedTuple):
    """An object with its facts; boxes: [1 or frames, 4], (x1, y1, x2, y2) in pixels."""

    kind: str
    boxes: np.ndarray
    nth: float = np.nan
    start: float = np.nan  # the first frame that shows it
    index: float = np.nan


class Facts(NamedTuple):
    """The facts about a picture or clip; NaN for unknown ones."""

    cells: np.ndarray  # [cells, len(FACTS)] float32, in reading order
    # {kind: [len(FACTS)] float32}: box and start of the first object of a kind; "nth" is their number
    kinds: dict[str, np.ndarray]


def of_things(things: list[Thing], width: int, height: int, frames: int = 2) -> Facts:
    """Facts about a picture or a clip; a cell has the facts of the object that covers most of it."""
    corners = cell_corners(width, height)
    facts = np.full((frames // 2, len(corners), len(FACTS)), np.nan, np.float32)
    for step, rows in enumerate(facts):
        frame, most = 2 * step + 1, np.zeros(len(corners))
        for thing in things:
            if thing.start > frame:
                continue
            box = thing.boxes[min(frame, len(thing.boxes) - 1)]
            area = overlap(corners, box)
            shown = (area > most) & (area >= COVERED * min(CELL * CELL, np.prod(np.subtract(box[2:], box[:2]))))
            most[shown] = area[shown]
            core = (corners[shown] == cell_of(box)[::-1] * CELL).all(1)
            rows[shown, :-1] = [*np.array(box) / CELL, thing.nth, thing.start / 2, thing.index]
            rows[shown, -1] = core
    return Facts(facts.reshape(-1, len(FACTS)), _of_kinds(things))


def _of_kinds(things: list[Thing]) -> dict[str, np.ndarray]:
    facts: dict[str, np.ndarray] = {}
    for thing in things:
        if thing.kind in facts:
            facts[thing.kind][FACTS.index("nth")] += 1
        else:
            box = thing.boxes[0 if len(thing.boxes) == 1 else int(thing.start)]
            row = [*np.array(box) / CELL, 1, thing.start / 2, np.nan, np.nan]
            facts[thing.kind] = np.array(row, np.float32)
    return facts


def of_text(text: str, centres: np.ndarray, width: int, height: int) -> Facts:
    """Facts about a picture of characters with these centres [n, 2]. A single line counts for all rows of cells."""
    columns, rows = width // CELL, height // CELL
    facts = np.full((rows, columns, len(FACTS)), np.nan, np.float32)
    across, down = np.clip(centres // CELL, 0, [columns - 1, rows - 1]).astype(int).T
    single = np.ptp(centres[:, 1]) == 0
    for i in reversed(range(len(text))):
        if text[i] != " ":
            facts[slice(None) if single else down[i], across[i], FACTS.index("index")] = i
    return Facts(facts.reshape(-1, len(FACTS)), {})


def of_nothing(width: int, height: int) -> Facts:
    return Facts(np.full((len(cell_corners(width, height)), len(FACTS)), np.nan, np.float32), {})


def cell_of(box) -> np.ndarray:
    """(row, column) of the cell that holds a box's centre."""
    return (np.add(box[:2], box[2:]) // (2 * CELL))[::-1]


def overlap(corners: np.ndarray, box) -> np.ndarray:
    """How many pixels of a box lie in each cell [cells]; corners: [cells, 2]."""
    return np.prod(np.clip(np.minimum(corners + CELL, box[2:]) - np.maximum(corners, box[:2]), 0, None), axis=1)


def cell_corners(width: int, height: int) -> np.ndarray:
    """[cells, 2]: x and y of every cell's upper left corner, in pixels."""
    return np.stack(np.meshgrid(np.arange(width // CELL), np.arange(height // CELL)), -1).reshape(-1, 2) * CELL
