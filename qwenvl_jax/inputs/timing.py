"""When the frames of a clip are shown, at a constant rate or each at its own timestamp, and which are sampled."""

import math
from array import array
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from qwenvl_jax.errors import OptionsError
from qwenvl_jax.inputs.options import DEFAULT, MediaOptions

DEFAULT_FPS = 2.0
MIN_FRAMES, MAX_FRAMES = 4, 768
MAX_CLIP_SECONDS = 10**6  # eleven days; float32 and int32 hold the positions, half seconds, exactly
MOST_STAMPS = 1 << 21  # timestamps that are kept, 8 bytes each: 19 hours at 30 frames per second
_OFF = 0.1  # seconds that the frames of a constant rate may be off their places, and at most 1½ frames
_SAME = 0.002  # seconds; frames so close are one to the eye: a repeated timestamp, a hidden frame of VP8
_RESTART = 10.0  # seconds; in formats whose clocks may jump (MPEG-TS), FFmpeg takes such a gap for a new start


class Clock(NamedTuple):
    """total: frames; rate: their mean number per second.

    stamps: None if the rate is constant, else the frames' timestamps in display order, int64. They and `end`, where the
        last frame ends, count from `start`, in ticks of `tick` seconds.
    """

    total: int
    rate: float
    stamps: np.ndarray | None = None
    start: int = 0
    end: int = 0
    tick: float = 0.0

    def place(self, index: int, stamp: int | None) -> int:
        """When decoded frame number `index` is shown, in ticks. stamp: its own timestamp, if it has one."""
        if stamp is not None:
            return stamp - self.start
        return int(self.stamps[min(index, len(self.stamps) - 1)])


class Stamps:
    """Collects the timestamps of packets, in any order."""

    def __init__(self):
        self.values, self._last, self._last_ticks, self._total = array("q"), None, 0, 0

    def add(self, stamp: int | None, ticks: int | None) -> None:
        """stamp: when the frame is shown, None if unknown; ticks: how long, if known."""
        self._total += 1
        if stamp is None:
            return
        if len(self.values) < MOST_STAMPS:
            self.values.append(stamp)
        if self._last is None or stamp >= self._last:
            self._last, self._last_ticks = stamp, ticks or 0

    def clock(self, rate: float, time_base: Fraction, may_jump: bool, ticks: int | None = None) -> Clock:
        """The clip's clock. may_jump: the format's timestamps may start anew; ticks: how long all frames are shown.

        The rate varies if frames are off their evenly spread places by more than rounding (Matroska counts
        milliseconds, GIF hundredths) or a single missing frame explains. Otherwise it is constant, as it is taken to
        be if too few frames have a timestamp, or more than MOST_STAMPS.
        """
        constant, tick = Clock(self._total, rate), float(time_base)
        if len(self.values) < 2 or self._total - len(self.values) > self._total // 50 + 1:
            return constant
        stamps = np.frombuffer(self.values, np.int64)
        stamps.sort()
        start, last = int(stamps[0]), int(stamps[-1])
        stay = self._last_ticks if self._last_ticks > 1 and not may_jump else 0  # MPEG-TS stores none
        if (last - start + stay) * tick > MAX_CLIP_SECONDS:  # damaged
            return constant
        stamps -= start
        gaps = np.diff(stamps)
        if not gaps.any() or (may_jump and gaps.max() * tick > _RESTART):
            return constant
        usual = float(np.median(gaps[gaps > 0], overwrite_input=True))
        end = last - start + (stay or round(usual))
        if ticks and ticks > last - start:  # FFmpeg shifts the frames' own ticks where an edit list cuts frames off
            end = min(end, ticks)
        own = stamps[np.append(True, gaps > min(usual / 8, _SAME / tick))]
        off = np.linspace(0, end, len(own), endpoint=False)
        off -= own
        if max(-off.min(), off.max()) * tick <= min(1.5 * usual * tick, _OFF):
            return constant
        return Clock(self._total, rate, stamps, start, end, tick)


def sampled(clock: Clock, o: MediaOptions, per_step: int) -> tuple[list[int], float]:
    """The sampled places, and the seconds of a grid step of `per_step` frames.

    Places are numbers of frames or, if the rate varies, ticks, of which the frame that is shown then is meant.
    """
    if clock.stamps is not None:
        first, last = time_range(clock.end * clock.tick, o.video_start, o.video_end)
        most = max(clock.total, MAX_FRAMES)  # a frame that is shown for long may be sampled several times
        n = frame_count(clock.total, clock.total / (last - first), o, per_step, most)
        moments = np.linspace(first / clock.tick, last / clock.tick, n) + 1e-3  # rounding must not miss a frame's start
        return np.floor(moments).astype(np.int64).tolist(), per_step * (last - first) / max(n - 1, 1)
    first, last = frame_range(clock.total, clock.rate, o.video_start, o.video_end)
    if clock.total == 1:
        n = max(round((o.nframes or 1) / per_step), 1) * per_step
        return [0] * n, per_step / (o.fps or DEFAULT_FPS)  # as of a list of frames
    n = frame_count(last - first + 1, clock.rate, o, per_step)
    return frame_indices(first, last, n), per_step / (n / (last - first + 1) * clock.rate)


def frame_range(total: int, rate: float, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last frame (inclusive) between two times in seconds; a time past the end is the end."""
    if start is None and end is None:
        return 0, total - 1
    seconds = total / rate
    if total == 1 and (start or 0) < seconds and (end is None or end >= (start or 0)):
        return 0, 0
    first = math.ceil(min(start or 0.0, seconds) * rate)
    last = min(math.floor(min(seconds if end is None else end, seconds) * rate), total - 1)
    if first >= last:
        raise OptionsError(
            f"video_start {start} and video_end {end} leave fewer than two frames of {seconds:.2f} seconds"
        )
    return first, last


def time_range(seconds: float, start: float | None, end: float | None) -> tuple[float, float]:
    """`frame_range` in seconds, for a clip whose rate varies."""
    first, last = start or 0.0, min(seconds if end is None else end, seconds)
    if first >= last:
        raise OptionsError(f"video_start {start} and video_end {end} leave nothing of {seconds:.2f} seconds")
    return first, last


def frame_count(total: int, rate: float, o: MediaOptions = DEFAULT, factor: int = 2, most: int | None = None) -> int:
    """How many of `total` frames at `rate` frames per second to sample: a multiple of `factor`, up to `most` or all."""
    frames, total = total, most or total
    if o.nframes is not None:
        n = round(o.nframes / factor) * factor
    else:
        low = math.ceil((o.min_frames or MIN_FRAMES) / factor) * factor
        high = math.floor((o.max_frames or min(MAX_FRAMES, total)) / factor) * factor
        n = min(max(frames / rate * (o.fps or DEFAULT_FPS), low), high, total)
        n = math.floor(n / factor) * factor
    if not factor <= n <= total:
        asked = f"nframes {o.nframes} rounds to {n}" if o.nframes is not None else f"{n} would be sampled"
        raise OptionsError(f"{asked} of the clip's {frames} frames; it must be from {factor} to {total}")
    return n


def frame_indices(first: int, last: int, n: int) -> list[int]:
    """`n` frame numbers spread evenly over first … last, both included.

    The reference computes them in float32; in clips of many thousand frames its numbers may differ by one.
    """
    return np.linspace(first, last, n).round().astype(int).tolist()
