"""Bucket sizes. XLA compiles one program per shape, so every size is rounded up to one of a few fixed values."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from qwenvl_jax.config import VisionConfig
from qwenvl_jax.errors import ContextError, OptionsError
from qwenvl_jax.inputs.layout import slots_needed
from qwenvl_jax.inputs.preprocessing import MAX_ASPECT
from qwenvl_jax.types import Grid

# The cost of a call of the vision tower, in patches. Reading all weights costs as much as computing CALL patches. In a
# lane of EVEN slots, full attention costs as much as all else (7680 in Qwen2-VL; Qwen2.5-VL has few full layers).
CALL, EVEN = 512, 8192
SHARED = 4096  # the largest number of slots in a call that small frames share


def geometric(low: int, high: int) -> tuple[int, ...]:
    """Powers of two and 1.5 times these, from `low` (a power of two) to at least `high`."""
    rungs = [low]
    while rungs[-1] < high:
        rungs.append(rungs[-1] * 3 // 2 if rungs[-1] & (rungs[-1] - 1) == 0 else rungs[-1] * 4 // 3)
    return tuple(rungs)


class Ladder(NamedTuple):
    """The bucket sizes of each dimension, in rising order. One program is compiled per size; inputs are padded to it.

    rows: B of prompts and answers.
    tokens: T of prompts, and S of caches, which grow from one size to the next with their answers.
    patches: P, the slots of a lane of the vision tower. Most are 4, 5 or 6 quarters of a power of two: a picture then
        fills 89% of its lane on average. From 512 on they are multiples of 128, as the kernels need.
    short: sizes P with a second program of SHARED / P lanes; small frames there do not share a lane.
    lanes: R of the other programs. On a mesh, the engine multiplies R by the number of devices that share a batch.

    Pictures of up to 12.8 megapixels, the checkpoints' limit, need 24 programs of the tower.
    """

    rows: tuple[int, ...] = tuple(2**i for i in range(11))
    tokens: tuple[int, ...] = geometric(64, 131072)
    patches: tuple[int, ...] = (256, 512, 768, 1024, 1536, *(2**i * k for i in range(9, 15) for k in (4, 5, 6)), 131072)
    short: tuple[int, ...] = (256, 1024)
    lanes: int = 1

    def check(self) -> None:
        """Raises OptionsError unless all sizes are positive and rising."""
        for name in ("rows", "tokens", "patches"):
            rungs = getattr(self, name)
            if not rungs or rungs[0] < 1 or any(a >= b for a, b in pairwise(rungs)):
                raise OptionsError(f"the ladder's {name} are {rungs}; they must be positive and in rising order")
        if self.lanes < 1:
            raise OptionsError(f"the ladder's lanes are {self.lanes}; they must be at least 1")
        if max(self.short, default=0) > SHARED:
            raise OptionsError(f"the ladder's short are {self.short}; they must be at most {SHARED}")

    def capacities(self, vision: VisionConfig) -> tuple[int, ...]:
        """Every P, rounded up to whole window blocks."""
        return tuple(dict.fromkeys(-(-P // vision.block_slots) * vision.block_slots for P in self.patches))

    def capacity(self, slots: int, vision: VisionConfig) -> int:
        """The smallest P that holds a frame of `slots` slots."""
        return round_up(slots, self.capacities(vision), "patches in a frame")

    def calls(self, vision: VisionConfig) -> list[tuple[int, int]]:
        """(R, P) of every program of the vision tower."""
        short = self._replace(patches=tuple(P for P in self.patches if P in self.short)).capacities(vision)
        shapes = [(self.lanes, P) for P in self.capacities(vision)]
        return shapes + [(self.lanes * (SHARED // P), P) for P in short if P < SHARED]

    def reach(self, max_pixels: int, vision: VisionConfig) -> list[tuple[int, int]]:
        """(R, P) of every program that any number of frames of up to `max_pixels` pixels can need."""
        side = vision.spatial_merge_size
        cells = max_pixels // (vision.patch_size * side) ** 2
        # If min_pixels is close to max_pixels, sides are rounded up: one more row and column.
        shapes = [(h + 1, min(cells // h, MAX_ASPECT * (h + 1)) + 1) for h in range(1, math.isqrt(cells) + 1)]
        # A side is at least one visual token long, so a long thin picture may exceed max_pixels.
        shapes.append((1, math.isqrt(MAX_ASPECT * max(cells, 1))))
        largest = max(slots_needed(Grid(1, h * side, w * side), vision) for h, w in shapes)
        # A frame larger than the largest P is refused.
        own = self.capacity(min(largest, self.capacities(vision)[-1]), vision)
        return [(R, P) for R, P in self.calls(vision) if P <= max(own, SHARED)]

    def cheapest(self, sizes: Sequence[int], vision: VisionConfig) -> tuple[int, int]:
        """(R, P) of the call with the least cost per filled slot, for frames of `sizes` slots in falling order.

        The call holds at least the first frame. The cost of attention grows with P², so a lane beyond SHARED slots is
        no longer than its first frame needs.
        """
        own = self.capacity(sizes[0], vision)
        calls = [(R, P) for R, P in self.calls(vision) if P == own or own < P <= SHARED]
        return min(calls, key=lambda c: (CALL + c[0] * (c[1] + c[1] ** 2 / EVEN)) / _taken(sizes, *c))


def _taken(sizes: Sequence[int], R: int, P: int) -> int:
    """How many slots of R lanes of P slots are filled if each frame goes into the first lane that holds it."""
    free = [P] * R
    for size in sizes:
        r = next((r for r, slots in enumerate(free) if size <= slots), None)
        if r is not None:
            free[r] -= size
        if max(free) < sizes[-1]:
            break
    return R * P - sum(free)


def round_up(size: int, rungs: Sequence[int], what: str) -> int:
    """The smallest of `rungs` that holds `size`."""
    i = bisect_left(rungs, size)
    if i == len(rungs):
        raise ContextError(f"{size} {what} are more than the largest bucket, {rungs[-1]}")
    return rungs[i]
