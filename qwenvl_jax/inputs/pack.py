"""Ragged samples to rectangles: samples are laid side by side into rows, and their patches into lanes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qwenvl_jax.config import Config, VisionConfig
from qwenvl_jax.errors import InputError
from qwenvl_jax.inputs.ladder import Ladder, round_up
from qwenvl_jax.inputs.layout import Lanes, Placement, slots_needed
from qwenvl_jax.types import Batch, Grid, Sample, VisionBatch, Visual


class Segment(NamedTuple):
    """One sample in a row of a batch."""

    row: int
    start: int  # of its tokens in the row
    number: int  # its segment id: 1, 2, … along the row
    sample: Sample
    places: Sequence[np.ndarray]  # by visual: the rows of the joined [X, D] vision output that its tokens take

    @property
    def stop(self) -> int:
        return self.start + len(self.sample.tokens)


def pack_rows(segments: Sequence[Segment], shape: tuple[int, int], vision: tuple[VisionBatch, ...]) -> Batch:
    """The batch of `shape` [B, T] that holds these segments; what they leave is padding."""
    tokens, ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions, visual_index = np.zeros((3, *shape), np.int32), np.full(shape, -1, np.int32)
    for s in segments:
        here = s.row, slice(s.start, s.stop)
        tokens[here], ids[here], positions[:, *here] = s.sample.tokens, s.number, s.sample.positions
        for (first, last), places in zip(s.sample.spans, s.places, strict=True):
            visual_index[s.row, s.start + first : s.start + last] = places
    return Batch(tokens, positions, ids, visual_index, vision)


def make_batch(samples: Sequence[Sample], config: Config, ladder: Ladder | None = None) -> Batch:
    """Packs conversations into one batch of numpy arrays, one row each, padded on the right to the ladder.

    Rows beyond the samples are all padding. Raises InputError for a size that exceeds the ladder.
    """
    ladder = ladder or Ladder()
    if not samples:
        raise InputError("a batch needs at least one conversation")
    longest = max(len(s.tokens) for s in samples)
    if min(len(s.tokens) for s in samples) == 0:
        raise InputError("a conversation has no tokens")
    shape = round_up(len(samples), ladder.rows, "rows"), round_up(longest, ladder.tokens, "tokens in a row")
    vision, places = pack_vision([v for s in samples for v in s.visuals], config, ladder)
    rest = iter(places)
    segments = [Segment(b, 0, 1, s, [next(rest) for _ in s.visuals]) for b, s in enumerate(samples)]
    return pack_rows(segments, shape, vision)


def pack_vision(
    visuals: Sequence[Visual], config: Config, ladder: Ladder
) -> tuple[tuple[VisionBatch, ...], list[np.ndarray]]:
    """Lanes of patches in window order, and for every visual the place of each of its merged tokens in the
    joined [X, D] vision output, in the order the text wants them.

    The largest frame that is left decides on the next call; smaller ones fill its gaps.
    """
    v, frames = config.vision, []
    for i, visual in enumerate(visuals):
        if visual.patches.shape != (visual.grid.patches, v.patch_values):
            raise InputError(
                f"visual {i + 1} has patches of shape {visual.patches.shape}, "
                f"its grid {tuple(visual.grid)} needs {(visual.grid.patches, v.patch_values)}"
            )
        one = visual.grid._replace(t=1)
        frames += [visual._replace(patches=patches, grid=one) for patches in np.split(visual.patches, visual.grid.t)]
    calls, places, start = [], [None] * len(frames), 0
    for (R, P), placed in cover([frame.grid for frame in frames], v, ladder):
        for i, (placement,) in placed.items():
            places[i] = start + placement.cells
        calls.append(fill_lanes([frames[i] for i in placed], list(placed.values()), R, P, v))
        start += R * P // v.merge_unit
    rest = iter(places)
    return tuple(calls), [np.concatenate([next(rest) for _ in range(visual.grid.t)]) for visual in visuals]


def cover(
    grids: Sequence[Grid], v: VisionConfig, ladder: Ladder
) -> Iterator[tuple[tuple[int, int], dict[int, list[Placement]]]]:
    """The calls that take in frames of these grids: (R, P), and by number the frames in it and where they are."""
    sizes = {grid: slots_needed(grid, v) for grid in set(grids)}
    left = sorted(range(len(grids)), key=lambda i: -sizes[grids[i]])
    while left:
        R, P = ladder.cheapest([sizes[grids[i]] for i in left], v)
        lanes, placed, refused = Lanes(P, v, R), {}, set()
        for i in left:
            if grids[i] in refused:
                continue
            if placements := lanes.place([grids[i]]):
                placed[i] = placements[0]
            else:
                refused.add(grids[i])
        yield (R, P), placed
        left = [i for i in left if i not in placed]


def fill_lanes(
    visuals: Sequence[Visual], placements: Sequence[Sequence[Placement]], lanes: int, capacity: int, v: VisionConfig
) -> VisionBatch:
    """`lanes` lanes of `capacity` patch slots, with every visual where it was placed."""
    unit, side, slots = v.merge_unit, v.spatial_merge_size, lanes * capacity
    patches = np.zeros((slots, v.patch_values), np.uint8)
    positions = np.zeros((slots, 2), np.int32)
    frames, windows = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    in_unit = np.stack(np.divmod(np.arange(unit), side), -1)  # row and column within a merged cell
    for visual, frames_of in zip(visuals, placements, strict=True):
        cols = visual.grid.w // side
        cells = np.stack(np.divmod(np.arange(visual.grid.h // side * cols), cols), -1)
        where = (cells[:, None] * side + in_unit).reshape(-1, 2)
        for source, p in zip(np.split(visual.patches, visual.grid.t), frames_of, strict=True):
            here = (p.cells[:, None] * unit + np.arange(unit)).reshape(-1)
            patches[here], positions[here], frames[here] = source, where, p.frame
            windows[here] = np.repeat(p.windows, unit)
    arrays = patches, positions, frames, windows
    return VisionBatch(*(a.reshape(lanes, capacity, *a.shape[1:]) for a in arrays))
