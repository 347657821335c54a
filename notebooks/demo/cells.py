"""What each visual token of a drawn picture or clip shows: facts that the demo's decoder is taught along with answers.

A visual token is a cell of 28 × 28 pixels, in a clip for two frames. Words are told facts too: the kind of an object,
wherever it is named, those about the first object of that kind.
"""

from typing import NamedTuple

import numpy as np

CELL = 28  # pixels to a visual token's side
COVERED = 0.25  # of a cell, or of an object, for the cell to be said to show it
# The edges of the object's box in cells from the picture's corner; which of its kind it is, in reading order, from 1;
# in which grid step of a clip it turns up; the place in the text of a cell's first character, or of an object listed;
# whether the object's centre is in this cell, 1 or 0.
FACTS = ("left", "top", "right", "bottom", "nth", "start", "index", "core")


class Thing(NamedTuple):
    """An object, what is known of it, and where it is: boxes [1 or frames, 4] in pixels, (x1, y1, x2, y2)."""

    kind: str
    boxes: np.ndarray
    nth: float = np.nan
    start: float = np.nan  # the first frame that shows it
    index: float = np.nan


class Facts(NamedTuple):
    """What there is to tell about a picture or clip; NaN where there is nothing."""

    cells: np.ndarray  # [cells, len(FACTS)] float32, in reading order
    # {kind: [len(FACTS)] float32}: the box of the first one, when it turns up if that is late, and for "nth" how many
    kinds: dict[str, np.ndarray]


def of_things(things: list[Thing], width: int, height: int, frames: int = 2) -> Facts:
    """About a picture, or a clip of so many frames; each cell tells of the object that covers it most."""
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
    """About a picture of characters with those centres [n, 2]; both rows tell where a single line is two cells high."""
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
    """Pixels [cells] of a box in each of the cells with those corners [cells, 2]."""
    return np.prod(np.clip(np.minimum(corners + CELL, box[2:]) - np.maximum(corners, box[:2]), 0, None), axis=1)


def cell_corners(width: int, height: int) -> np.ndarray:
    """[cells, 2]: x and y of every cell's upper left corner, in pixels."""
    return np.stack(np.meshgrid(np.arange(width // CELL), np.arange(height // CELL)), -1).reshape(-1, 2) * CELL
