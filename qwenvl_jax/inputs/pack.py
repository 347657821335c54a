"""Packs ragged samples into rectangles: tokens into rows, patches into lanes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qwenvl_jax.config import Config, VisionConfig
from qwenvl_jax.errors import InputError
from qwenvl_jax.inputs.ladder import Ladder, round_up
from qwenvl_jax.inputs.layout import Lanes, Placement, check_sample, slots_needed
from qwenvl_jax.types import Batch, Grid, Sample, VisionBatch, Visual


class Segment(NamedTuple):
    """One sample in a row of a batch."""

    row: int
    start: int  # of its tokens in the row
    number: int  # its segment id: 1, 2, … along the row
    sample: Sample
    visual_index: Sequence[np.ndarray]  # per visual: the rows of the [X, D] vision output that its tokens take

    @property
    def stop(self) -> int:
        return self.start + len(self.sample.tokens)


def pack_rows(segments: Sequence[Segment], shape: tuple[int, int], vision: tuple[VisionBatch, ...]) -> Batch:
    """The batch of `shape` [B, T] that holds these segments; all other slots are padding."""
    tokens, ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions, visual_index = np.zeros((3, *shape), np.int32), np.full(shape, -1, np.int32)
    for s in segments:
        here = s.row, slice(s.start, s.stop)
        tokens[here], ids[here], positions[:, *here] = s.sample.tokens, s.number, s.sample.positions
        for (first, last), index in zip(s.sample.spans, s.visual_index, strict=True):
            visual_index[s.row, s.start + first : s.start + last] = index
    return Batch(tokens, positions, ids, visual_index, vision)


def make_batch(samples: Sequence[Sample], config: Config, ladder: Ladder | None = None) -> Batch:
    """Packs conversations into one batch of numpy arrays: one row each, padded on the right to the ladder's sizes.

    Raises InputError for no sample, an empty one or one whose parts disagree, ContextError beyond the ladder.
    """
    ladder = ladder or Ladder()
    if not samples:
        raise InputError("a batch needs at least one conversation")
    longest = max(len(s.tokens) for s in samples)
    if min(len(s.tokens) for s in samples) == 0:
        raise InputError("a conversation has no tokens")
    for sample in samples:
        check_sample(sample, config)
    shape = round_up(len(samples), ladder.rows, "rows"), round_up(longest, ladder.tokens, "tokens in a row")
    vision, index = pack_vision([v for s in samples for v in s.visuals], config, ladder)
    rest = iter(index)
    segments = [Segment(b, 0, 1, s, [next(rest) for _ in s.visuals]) for b, s in enumerate(samples)]
    return pack_rows(segments, shape, vision)


def pack_vision(visuals: Sequence[Visual], config: Config, ladder: Ladder) -> tuple[tuple[VisionBatch, ...], list]:
    """The calls of the vision tower, and per visual the rows of the [X, D] vision output that its tokens take.

    Raises InputError if the patches of a visual do not fit its grid.
    """
    v = config.vision
    for i, visual in enumerate(visuals):
        shape, expected = visual.patches.shape, (visual.grid.patches, v.patch_values)
        if shape != expected:
            raise InputError(
                f"visual {i + 1} has patches of shape {shape}; its grid {tuple(visual.grid)} needs {expected}"
            )
    frames = split_frames(visuals)
    calls, index, start = [], [None] * len(frames), 0
    for (R, P), placed in cover([frame.grid for frame in frames], v, ladder):
        calls.append(fill_lanes([frames[i] for i in placed], placed.values(), R, P, v))
        for i, placement in placed.items():
            index[i] = start + placement.cells
        start += R * P // v.merge_unit
    return tuple(calls), index_by_visual(visuals, index)


def split_frames(visuals: Iterable[Visual]) -> list[Visual]:
    """Every t step of every visual, as a visual of its own: lanes hold frames."""
    return [
        visual._replace(patches=patches, grid=grid)
        for visual in visuals
        for patches, grid in zip(np.split(visual.patches, visual.grid.t), visual.grid.frames, strict=True)
    ]


def index_by_visual(visuals: Iterable[Visual], index: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Concatenates an index per frame (of `split_frames`) to one per visual."""
    rest = iter(index)
    return [np.concatenate([next(rest) for _ in visual.grid.frames]) for visual in visuals]


def cover(grids: Sequence[Grid], v: VisionConfig, ladder: Ladder) -> Iterator[tuple[tuple, dict[int, Placement]]]:
    """The calls that hold frames of these grids: (R, P), and the placement of its frames by their number.

    The largest frame left decides the shape of the next call; smaller ones fill its gaps.
    """
    sizes = {grid: slots_needed(grid, v) for grid in set(grids)}
    left = sorted(range(len(grids)), key=lambda i: -sizes[grids[i]])
    while left:
        R, P = ladder.cheapest([sizes[grids[i]] for i in left], v)
        lanes, placed, refused = Lanes(P, v, R), {}, set()
        for i in left:
            if grids[i] in refused:
                continue
            if placements := lanes.place([grids[i]]):
                (placed[i],) = placements
            else:
                refused.add(grids[i])
        yield (R, P), placed
        left = [i for i in left if i not in placed]


def fill_lanes(frames: Iterable[Visual], placements, lanes: int, capacity: int, v: VisionConfig) -> VisionBatch:
    """The lanes [R, P] that hold each frame at its Placement."""
    unit, side, slots = v.merge_unit, v.spatial_merge_size, lanes * capacity
    patches = np.zeros((slots, v.patch_values), np.uint8)
    positions = np.zeros((slots, 2), np.int32)
    ids, windows = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    in_unit = np.stack(np.divmod(np.arange(unit), side), -1)  # row and column in a merged cell
    for frame, p in zip(frames, placements, strict=True):
        cells = np.stack(np.divmod(np.arange(len(p.cells)), frame.grid.w // side), -1)
        here = (p.cells[:, None] * unit + np.arange(unit)).reshape(-1)
        patches[here], positions[here] = frame.patches, (cells[:, None] * side + in_unit).reshape(-1, 2)
        ids[here], windows[here] = p.frame, np.repeat(p.windows, unit)
    arrays = patches, positions, ids, windows
    return VisionBatch(*(a.reshape(lanes, capacity, *a.shape[1:]) for a in arrays))
