"""Layout in numpy, on the host: placeholders, M-RoPE positions, window order and lanes.

The device permutes nothing. The host hands patches over in window order; the inverse order is part of the index that
puts visual tokens into the text.
"""

import copy
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from qwenvl_jax.config import Config, VisionConfig
from qwenvl_jax.errors import InputError
from qwenvl_jax.families import family_of
from qwenvl_jax.types import Grid, Sample, Visual


def find_placeholders(tokens: np.ndarray, kinds: Sequence[str], config: Config) -> np.ndarray:
    """Indices [n] of the placeholders in `tokens` [t]. Raises InputError unless they match `kinds`, in order."""
    ids = {"image": config.image_token_id, "video": config.video_token_id}
    placeholders = np.flatnonzero(np.isin(tokens, list(ids.values())))
    if tokens[placeholders].tolist() != [ids[k] for k in kinds]:
        found = {k: int((tokens == i).sum()) for k, i in ids.items()}
        raise InputError(
            f"the prompt has {found['image']} image and {found['video']} video placeholders for "
            f"{kinds.count('image')} images and {kinds.count('video')} videos, or has them in another order; "
            "the text may contain a placeholder, or the chat template may not support pictures"
        )
    return placeholders


def make_sample(tokens, visuals: Sequence[Visual], config: Config, *, placeholders=None, weights=None) -> Sample:
    """The sample of token ids with one placeholder per visual, as chat templates write them.

    tokens: [t] int. visuals: in the order of their placeholders.
    placeholders: what `find_placeholders` returned, if the caller has it.
    weights: [t] float32, the weight of each token in the loss; that of placeholders becomes 0.
    Raises InputError if placeholders and visuals do not match.
    """
    tokens = np.asarray(tokens, np.int32)
    if placeholders is None:
        placeholders = find_placeholders(tokens, [v.kind for v in visuals], config)
    repeats = np.ones(len(tokens), np.int64)
    repeats[placeholders] = [v.grid.patches // config.vision.merge_unit for v in visuals]
    if weights is not None:
        weights = np.array(weights, np.float32)
        weights[placeholders] = 0
        weights = np.repeat(weights, repeats)
    ends = np.cumsum(repeats)
    spans = tuple((int(ends[p] - repeats[p]), int(ends[p])) for p in placeholders)
    tokens = np.repeat(tokens, repeats)
    return Sample(tokens, mrope_positions(len(tokens), spans, visuals, config), spans, tuple(visuals), weights)


def check_sample(sample: Sample, config: Config) -> None:
    """Raises InputError unless the sample's visuals, spans and placeholder tokens belong together."""
    ids = {"image": config.image_token_id, "video": config.video_token_id}
    tokens = np.asarray(sample.tokens)
    left = np.isin(tokens, list(ids.values()))
    fits = len(sample.spans) == len(sample.visuals)
    for visual, (first, last) in zip(sample.visuals, sample.spans, strict=False):
        fits = fits and last - first == visual.grid.patches // config.vision.merge_unit
        fits = fits and 0 <= first and last <= len(tokens) and bool((tokens[first:last] == ids[visual.kind]).all())
        left[first:last] = False
    if not fits or left.any() or np.shape(sample.positions) != (3, len(tokens)):
        raise InputError(
            f"a sample's {len(sample.visuals)} images and videos, its spans, positions and placeholder tokens do not "
            "belong together; make it with `processor.encode` or `make_sample`"
        )


def mrope_positions(length: int, spans: Sequence[tuple], visuals: Sequence[Visual], config: Config) -> np.ndarray:
    """M-RoPE ids [3, t] int32 of one unpadded sequence (arXiv:2409.12191, section 2.1).

    spans: (first token, one past the last) of each visual.
    Text advances all three axes together. A visual that starts at s has t = s + step(k), h = s + row and w = s + column
    over the merged grid; the family's `time_steps` gives step(k). The next token is one past the largest id.
    """
    positions = np.empty((3, length), np.int32)
    start = done = 0  # the next id, the next token
    merge, family = config.vision.spatial_merge_size, family_of(config)
    for visual, (first, last) in zip(visuals, spans, strict=True):
        positions[:, done:first] = start + np.arange(first - done)
        start += first - done
        h, w = visual.grid.h // merge, visual.grid.w // merge
        steps = family.time_steps(visual, config)
        axes = np.broadcast_arrays(steps[:, None, None], np.arange(h)[None, :, None], np.arange(w)[None, None, :])
        positions[:, first:last] = start + np.stack([a.reshape(-1) for a in axes])
        start, done = int(positions[:, first:last].max()) + 1, last
    positions[:, done:] = start + np.arange(length - done)
    return positions


class _FrameWindows(NamedTuple):
    """The windows of one frame. Cells are merged patches, in raster order."""

    window: np.ndarray  # [cells] the window of each cell
    rank: np.ndarray  # [cells] its index within that window
    sizes: np.ndarray  # [windows] cells in each window
    block: int  # cells in a whole window


@lru_cache(maxsize=1024)
def _frame_windows(grid: Grid, vision: VisionConfig) -> _FrameWindows:
    rows, cols = grid.h // vision.spatial_merge_size, grid.w // vision.spatial_merge_size
    side = vision.window_merged if vision.window_size else 1  # without windows, each cell is placed alone
    r, c = np.divmod(np.arange(rows * cols), cols)
    across = -(-cols // side)
    window = (r // side) * across + c // side
    width = np.minimum(side, cols - (c // side) * side)  # windows at the right edge are narrower
    rank = (r % side) * width + c % side
    return _FrameWindows(window, rank, np.bincount(window), side * side)


class _Lane:
    """One lane of window blocks, being filled with windows."""

    def __init__(self, capacity: int, block: int):
        self.block, self.blocks = block, capacity // block
        self.free: list[int] = []  # cells left in each opened block
        self.left = self.blocks * block  # cells left in the lane
        self.frames = self.windows = 0  # how many it holds

    def place(self, sizes: np.ndarray) -> np.ndarray | None:
        """First cell of each window of one frame, best fit, largest first. None if they do not all fit."""
        if (total := int(sizes.sum())) > self.left:
            return None
        free, starts = list(self.free), np.empty(len(sizes), np.int64)
        for i in np.argsort(-sizes, kind="stable"):
            size = int(sizes[i])
            fits = [] if size == self.block else [(f, b) for b, f in enumerate(free) if f >= size]
            if fits:
                b = min(fits)[1]
            elif len(free) < self.blocks:
                b = len(free)
                free.append(self.block)
            else:
                return None
            starts[i] = b * self.block + self.block - free[b]
            free[b] -= size
        self.free = free
        self.left -= total
        self.frames += 1
        self.windows += len(sizes)
        return starts


class Placement(NamedTuple):
    """The position of one frame in the lanes. A merged cell is one visual token; cells are in raster order."""

    lane: int
    frame: int  # id within the lane, from 1
    cells: np.ndarray  # [h·w/4] the index of each merged cell among the [R·M] of all lanes
    windows: np.ndarray  # [h·w/4] window id within the lane, from 1


def slots_needed(grid: Grid, vision: VisionConfig) -> int:
    """Patch slots that one frame of this grid takes in an empty lane: at least h·w, in whole blocks."""
    if not vision.window_size:
        return grid.h * grid.w
    windows = _frame_windows(grid, vision)
    lane = _Lane(10**9, windows.block)
    lane.place(windows.sizes)
    return len(lane.free) * windows.block * vision.merge_unit


class Lanes:
    """Up to `limit` lanes of `capacity` patch slots. Each frame goes into the first lane that holds it."""

    def __init__(self, capacity: int, vision: VisionConfig, limit: int = sys.maxsize):
        self.capacity, self.vision, self.limit = capacity, vision, limit
        self.lanes: list[_Lane] = []

    def place(self, frames: Iterable[Grid]) -> list[Placement] | None:
        """Places frames of these grids. If they do not all fit, returns None and changes nothing."""
        before = [copy.copy(lane) for lane in self.lanes]  # shallow: _Lane.place replaces its list of blocks
        capacity = self.capacity // self.vision.merge_unit
        placed, start = [], {}
        for grid in frames:
            windows = _frame_windows(grid, self.vision)
            for i in range(start.get(grid, 0), len(self.lanes) + 1):
                if i == self.limit:
                    self.lanes = before
                    return None
                if i == len(self.lanes):
                    self.lanes.append(_Lane(capacity, windows.block))
                lane = self.lanes[i]
                count, first_window = lane.frames, lane.windows
                if (starts := lane.place(windows.sizes)) is not None:
                    break
                if not count:
                    self.lanes = before
                    raise ValueError(f"a frame of {grid.h}×{grid.w} patches exceeds a lane of {self.capacity} slots")
            start[grid] = i  # the lanes before cannot hold an equal frame either
            cells = i * capacity + starts[windows.window] + windows.rank
            placed.append(Placement(i, count + 1, cells, windows.window + first_window + 1))
        return placed
