"""Short clips in which an emoji appears late, for "when does it appear"."""

import numpy as np

from demo.assets import Assets
from demo.canvas import background
from demo.cells import Thing, of_things
from demo.emoji import NAMES, sprite
from demo.questions import WHEN, ask

FPS = 2.0


def clip(rng: np.random.Generator, assets: Assets):
    """Six to ten seconds: (frames [n, h, w, 3] uint8, [(question, "3.5 seconds"), …], facts of `demo.cells`).

    n is even. The object of the first question is absent from the first frame and stays once it has appeared. Other
    objects are there from the start or appear at another time. Objects rest or drift.
    """
    side = 56 if rng.random() < 0.4 else 84
    frames = int(rng.integers(6, 11)) * 2
    kinds = [NAMES[i] for i in rng.choice(len(NAMES), int(rng.integers(2, 4 if side == 56 else 5)), replace=False)]
    starts = rng.choice(np.arange(1, frames - 1), len(kinds), replace=False)
    starts = [int(s) if i == 0 or rng.random() < 0.4 else 0 for i, s in enumerate(starts)]
    ground, _ = background(rng, side, side)
    canvases = [ground.copy() for _ in range(frames)]
    taken: list[np.ndarray] = []
    turns, things = [], []
    for kind, start in zip(kinds, starts, strict=True):
        drawn = sprite(assets.emoji, kind, int(rng.integers(5, 7 if side == 56 else 9)) * 4, bool(rng.integers(2)))
        path = _path(rng, frames, side, drawn.width, drawn.height, taken)
        if path is None:
            continue
        taken.append(path)
        turns.append((ask(rng, WHEN, kind), f"{start / FPS} seconds"))
        things.append(Thing(kind, path, start=start))
        for canvas, (x, y, _, _) in zip(canvases[start:], path[start:].tolist(), strict=True):
            canvas.paste(drawn.image, (x, y), drawn.image)
    facts = of_things(things, side, side, frames)
    return np.stack([np.asarray(c) for c in canvases]), turns, facts


def _path(rng: np.random.Generator, frames: int, side: int, wide: int, tall: int, taken: list) -> np.ndarray | None:
    """Boxes [frames, 4] of an object that rests or drifts in a line, without overlap; None after twenty tries."""
    room = np.array([side - wide, side - tall])
    for _ in range(20):
        first = rng.integers(0, room + 1)
        last = np.clip(first + rng.integers(-side // 2, side // 2 + 1, 2), 0, room) if rng.random() < 0.5 else first
        corner = np.rint(np.linspace(first, last, frames)).astype(int)
        path = np.concatenate([corner, corner + [wide, tall]], axis=1)
        if not any(((path[:, :2] < o[:, 2:]) & (o[:, :2] < path[:, 2:])).all(1).any() for o in taken):
            return path
    return None
