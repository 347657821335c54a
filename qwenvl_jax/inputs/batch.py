"""Ragged samples to rectangles: bucket ladders, lanes, padding.

Sizes are rounded up to a short ladder so that XLA compiles once per rung and never again.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwenvl_jax.config import Config, VisionConfig
from qwenvl_jax.inputs.layout import (
    Placement,
    mrope_positions,
    pack_lanes,
    placeholder_runs,
    slots_needed,
)
from qwenvl_jax.types import Batch, InputError, Sample, VisionBatch, Visual


def geometric(low: int, high: int) -> tuple[int, ...]:
    """Powers of two and one and a half times them, from `low` (a power of two) up to at least `high`."""
    rungs = [low]
    while rungs[-1] < high:
        rungs.append(rungs[-1] * 3 // 2 if rungs[-1] & (rungs[-1] - 1) == 0 else rungs[-1] * 4 // 3)
    return tuple(rungs)


class Ladder(NamedTuple):
    """The sizes programs are compiled for."""

    rows: tuple[int, ...] = tuple(2**i for i in range(11))  # B
    tokens: tuple[int, ...] = geometric(64, 131072)  # T
    lanes: tuple[int, ...] = tuple(2**i for i in range(11))  # R
    patches: tuple[int, ...] = geometric(256, 131072)  # P, rounded up to whole window blocks
    slots: int = 131072  # R · P of one call of the vision tower, at most; what is beyond goes into further calls

    def lane(self, slots: int, vision: VisionConfig) -> int:
        """P for a frame that takes so many slots."""
        rung = round_up(slots, self.patches, "patches in a frame")
        return -(-rung // vision.block_slots) * vision.block_slots

    def most_lanes(self, capacity: int) -> int:
        """The largest R for lanes of this P."""
        return max([r for r in self.lanes if r * capacity <= self.slots], default=self.lanes[0])


def round_up(size: int, rungs: Sequence[int], what: str) -> int:
    """The first rung that holds `size`."""
    i = bisect_left(rungs, size)
    if i == len(rungs):
        raise InputError(f"{size} {what} are more than the largest bucket, {rungs[-1]}")
    return rungs[i]


def make_batch(samples: Sequence[Sample], config: Config, ladder: Ladder | None = None) -> Batch:
    """Packs conversations into one batch of numpy arrays, one row each, padded on the right to the ladder.

    Rows beyond the samples are all padding. Raises InputError when placeholders and visuals do not match or
    a size exceeds the ladder.
    """
    ladder = ladder or Ladder()
    if not samples:
        raise InputError("a batch needs at least one conversation")
    longest = max(len(s.tokens) for s in samples)
    if min(len(s.tokens) for s in samples) == 0:
        raise InputError("a conversation has no tokens")
    shape = round_up(len(samples), ladder.rows, "rows"), round_up(longest, ladder.tokens, "tokens in a row")
    tokens = np.zeros(shape, np.int32)
    segments = np.zeros(shape, np.int32)
    visual_index = np.full(shape, -1, np.int32)
    positions = np.zeros((3, *shape), np.int32)

    visuals = [v for s in samples for v in s.visuals]
    vision, places = pack_vision(visuals, config, ladder)
    places = iter(places)
    for b, s in enumerate(samples):
        n = len(s.tokens)
        tokens[b, :n], segments[b, :n] = s.tokens, 1
        positions[:, b, :n] = mrope_positions(s.tokens, s.visuals, config)
        for first, last in placeholder_runs(s.tokens, s.visuals, config):
            visual_index[b, first:last] = next(places)
    return Batch(tokens, positions, segments, visual_index, vision)


def pack_vision(
    visuals: Sequence[Visual], config: Config, ladder: Ladder
) -> tuple[tuple[VisionBatch, ...], list[np.ndarray]]:
    """Lanes of patches in window order, and for every visual the place of each of its merged tokens in the
    flattened [Σ R·M] vision output, in the order the text wants them.

    Only frames within a factor of four in size share lanes: attention costs the square of a lane's length, which
    a small frame must not pay for a large one beside it.
    """
    v = config.vision
    sizes: dict[int, list[int]] = {}
    for i, visual in enumerate(visuals):
        if visual.patches.shape != (visual.grid.patches, v.patch_values):
            raise InputError(
                f"visual {i + 1} has patches of shape {visual.patches.shape}, "
                f"its grid {tuple(visual.grid)} needs {(visual.grid.patches, v.patch_values)}"
            )
        capacity = ladder.lane(slots_needed(visual.grid, v), v)
        sizes.setdefault(capacity.bit_length() // 2, []).append(i)
    calls, places, start = [], [np.zeros(0, np.int32)] * len(visuals), 0
    for _, members in sorted(sizes.items()):
        lanes, inner = _pack_lanes([visuals[i] for i in members], v, ladder)
        for i, place in zip(members, inner, strict=True):
            places[i] = start + place
        start += lanes.frames.size // v.merge_unit
        most = ladder.most_lanes(lanes.frames.shape[1])
        calls += [VisionBatch(*(a[r : r + most] for a in lanes)) for r in range(0, len(lanes.frames), most)]
    return tuple(calls), places


def _pack_lanes(visuals: list[Visual], v: VisionConfig, ladder: Ladder) -> tuple[VisionBatch, list[np.ndarray]]:
    """As many lanes as these visuals need, rounded up to whole calls, and where in [R·M] their tokens are."""
    capacity = max(ladder.lane(slots_needed(visual.grid, v), v) for visual in visuals)
    placements, lanes = pack_lanes([visual.grid for visual in visuals], capacity, v)
    rest = lanes % ladder.most_lanes(capacity)
    lanes = lanes - rest + (round_up(rest, ladder.lanes, "lanes of patches") if rest else 0)
    return fill_lanes(visuals, placements, lanes, capacity, v)


def fill_lanes(
    visuals: Sequence[Visual], placements: Sequence[Sequence[Placement]], lanes: int, capacity: int, v: VisionConfig
) -> tuple[VisionBatch, list[np.ndarray]]:
    """`lanes` lanes of `capacity` patch slots with every visual where it was placed, and where in [R·M] its merged
    tokens are."""
    unit, side = v.merge_unit, v.spatial_merge_size
    patches = np.zeros((lanes, capacity, v.patch_values), np.uint8)
    positions = np.zeros((lanes, capacity, 2), np.int32)
    frames = np.zeros((lanes, capacity), np.int32)
    windows = np.zeros((lanes, capacity), np.int32)
    places = []
    in_unit = np.stack(np.divmod(np.arange(unit), side), -1)  # row and column within a merged cell
    for visual, frames_of in zip(visuals, placements, strict=True):
        cols = visual.grid.w // side
        cells = np.stack(np.divmod(np.arange(visual.grid.h // side * cols), cols), -1)
        where = (cells[:, None] * side + in_unit).reshape(-1, 2)
        source = visual.patches.reshape(visual.grid.t, -1, v.patch_values)
        out = np.empty((visual.grid.t, len(cells)), np.int32)
        for k, p in enumerate(frames_of):
            slots = (p.cells[:, None] * unit + np.arange(unit)).reshape(-1)
            patches[p.lane, slots] = source[k]
            positions[p.lane, slots] = where
            frames[p.lane, slots] = p.frame
            windows[p.lane, slots] = np.repeat(p.windows, unit)
            out[k] = p.lane * (capacity // unit) + p.cells
        places.append(out.reshape(-1))
    return VisionBatch(patches, positions, frames, windows), places
