"""Samples frames of a clip as qwen-vl-utils did for Qwen2.5-VL.

Its later versions have other defaults, and 0.0.14 resizes a list of frames twice, first to a grid of 56 pixels. Here a
list of frames is resized once, by the rules for images.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_jax.errors import InputError, MediaError, OptionsError, install
from qwenvl_jax.inputs.fetch import locate, name_of
from qwenvl_jax.inputs.media import as_visual, empty_patches, fill, load_image, resize
from qwenvl_jax.inputs.options import DEFAULT, MediaOptions
from qwenvl_jax.inputs.preprocessing import MAX_PIXELS, Preprocessing, target_size
from qwenvl_jax.types import Visual

DEFAULT_FPS = 2.0
MIN_FRAMES, MAX_FRAMES = 4, 768
FRAME_MIN_TOKENS, FRAME_MAX_TOKENS = 128, 768  # visual tokens per frame, before frames are paired
TOTAL_TOKENS = 128000 * 0.9  # visual tokens per clip
MAX_VIDEO_BYTES = 512 << 20  # of a download; files are read while they are decoded
MAX_CLIP_PIXELS = 1 << 28  # of all sampled frames, resized: 0.8 GB of patches
MAX_CLIP_SECONDS = 10**6  # eleven days; float32 and int32 hold the positions, half seconds, exactly

# The formats that FFmpeg may detect. Playlists (HLS, concat, DASH) would make FFmpeg open other files and URLs.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,apng,ivf,h264,hevc,m4v,mxf,nut,yuv4mpegpipe"


def video_visual(source, preprocessing: Preprocessing, options: MediaOptions = DEFAULT) -> Visual:
    """One clip as patches [t·h·w, C] uint8; a grid step is two frames.

    source: a video file (path, file:// or http(s) URL, base64 data: URL, bytes), or a list of frames, each a source of
        `load_image`.
    options: fps or nframes, not both. For a list of frames, fps is the rate at which they were taken. The list is
        resized as images are, and its last frame is repeated if their number is odd; total_pixels, min_frames and
        max_frames do not apply.

    As in the reference, frames are sampled evenly by number, even if the frame rate varies. The file's rotation is
    applied. Raises MediaError or OptionsError that names the source.
    """
    p, o = preprocessing, options
    if isinstance(source, list | tuple) or (isinstance(source, np.ndarray) and source.ndim == 4):
        for name in ("nframes", "video_start", "video_end"):
            if getattr(o, name) is not None:
                raise OptionsError(f"{name} samples frames of a video file; a list of frames is used complete, drop it")
        return _from_frames(source, p, o)
    if o.fps is not None and o.nframes is not None:
        raise OptionsError("give fps or nframes, not both")
    if o.min_frames and o.max_frames and o.min_frames > o.max_frames:
        raise OptionsError(f"min_frames {o.min_frames} is larger than max_frames {o.max_frames}")
    data = locate(source, MAX_VIDEO_BYTES)
    try:
        return _from_file(_opener(data), p, o)
    except InputError as e:
        raise e.at(name_of(source)) from e


def frame_range(total: int, rate: float, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last frame (inclusive) between two times in seconds; a time past the end is the end."""
    if start is None and end is None:
        return 0, total - 1
    seconds = total / rate
    first = math.ceil(min(start or 0.0, seconds) * rate)
    last = min(math.floor(min(seconds if end is None else end, seconds) * rate), total - 1)
    if first >= last:
        raise OptionsError(
            f"video_start {start} and video_end {end} leave fewer than two frames of {seconds:.2f} seconds"
        )
    return first, last


def frame_count(total: int, rate: float, o: MediaOptions = DEFAULT, factor: int = 2) -> int:
    """How many of `total` frames at `rate` frames per second to sample: a multiple of `factor`."""
    if o.nframes is not None:
        n = round(o.nframes / factor) * factor
    else:
        low = math.ceil((o.min_frames or MIN_FRAMES) / factor) * factor
        high = math.floor((o.max_frames or min(MAX_FRAMES, total)) / factor) * factor
        n = min(max(total / rate * (o.fps or DEFAULT_FPS), low), high, total)
        n = math.floor(n / factor) * factor
    if not factor <= n <= total:
        asked = f"nframes {o.nframes} rounds to {n}" if o.nframes is not None else f"{n} would be sampled"
        raise OptionsError(f"{asked} of the clip's {total} frames; it must be from {factor} to {total}")
    return n


def frame_indices(first: int, last: int, n: int) -> list[int]:
    """`n` frame numbers spread evenly over first … last, both included.

    The reference computes them in float32; in clips of many thousand frames its numbers may differ by one.
    """
    return np.linspace(first, last, n).round().astype(int).tolist()


def frame_size(height: int, width: int, n: int, p: Preprocessing, o: MediaOptions = DEFAULT) -> tuple[int, int]:
    """The (height, width) that each of `n` sampled frames is resized to.

    total_pixels lowers the limit of a frame, but not below 1.05 · min_pixels; max_pixels cannot raise it. A small
    max_pixels lowers the default of min_pixels, and a large min_pixels raises the checkpoint's `video_max_pixels`.
    """
    area = p.factor**2
    default = p.video_max_pixels or math.inf
    low = o.min_pixels or min(FRAME_MIN_TOKENS * area, o.max_pixels or default)
    budget = (o.total_pixels or TOTAL_TOKENS * area) / n * p.temporal_patch_size
    high = max(min(FRAME_MAX_TOKENS * area, budget), int(low * 1.05))
    high = min(o.max_pixels or max(default, low), high)
    return target_size(height, width, p, replace(o, min_pixels=low, max_pixels=high))


def _from_frames(frames: Sequence, p: Preprocessing, o: MediaOptions) -> Visual:
    if len(frames) == 0:
        raise MediaError("the list of frames is empty")
    per_step = p.temporal_patch_size
    patches = None
    for i, frame in enumerate(frames):
        try:
            image = load_image(frame)
            height, width = target_size(image.height, image.width, p, o)
        except InputError as e:
            raise e.at(f"frame {i}") from e
        if patches is None:
            first, patches = (height, width), _allocate(len(frames), height, width, p)
        elif (height, width) != first:
            sizes = f"{width} × {height} pixels, the first frame to {first[1]} × {first[0]}"
            hint = "give frames of one size, or resized_height and resized_width"
            raise MediaError(f"frame {i} ({name_of(frame)}) would be resized to {sizes}; {hint}")
        spare = len(patches) * per_step - len(frames) if i == len(frames) - 1 else 0
        slot = i % per_step
        fill(patches[i // per_step], resize(image, height, width), range(slot, slot + 1 + spare))
    return _as_clip(patches, per_step / (o.fps or DEFAULT_FPS))


def _as_clip(patches: np.ndarray, seconds_per_grid: float) -> Visual:
    seconds = len(patches) * seconds_per_grid
    if seconds > MAX_CLIP_SECONDS:
        raise MediaError(f"at its fps the clip would last {seconds:.3g} seconds; the limit is {MAX_CLIP_SECONDS:,}")
    return as_visual(patches, "video", seconds_per_grid)


def _allocate(n: int, height: int, width: int, p: Preprocessing) -> np.ndarray:
    if n * height * width > MAX_CLIP_PIXELS:
        size = f"{n} frames of {width} × {height} pixels exceed the limit of {MAX_CLIP_PIXELS:,} pixels per clip"
        raise MediaError(f"{size}; sample fewer or smaller frames")
    return empty_patches(math.ceil(n / p.temporal_patch_size), height, width, p)


def _from_file(open_clip: Callable, p: Preprocessing, o: MediaOptions) -> Visual:
    """Two passes: the first counts the frames without decoding, the second decodes up to the last sampled one.

    If fewer frames decode than were counted, a third pass samples from that number.
    """
    total, rate = _count(open_clip)
    while total:
        first, last = frame_range(total, rate, o.video_start, o.video_end)
        n = frame_count(last - first + 1, rate, o, p.temporal_patch_size)
        indices = frame_indices(first, last, n)
        patches, found, seen = None, 0, 0
        for index, frame in _decode(open_clip):
            seen = index + 1
            if index != indices[found]:
                continue
            image = _upright(frame)
            if patches is None:
                height, width = frame_size(image.height, image.width, n, p, o)
                patches = _allocate(n, height, width, p)
            fill(patches[found // p.temporal_patch_size], resize(image, height, width), [found % p.temporal_patch_size])
            found += 1
            if found == n:
                sampled_fps = n / (last - first + 1) * rate
                return _as_clip(patches, p.temporal_patch_size / sampled_fps)
        total = seen
    raise MediaError("no frame can be decoded")


def _count(open_clip: Callable) -> tuple[int, float]:
    """Number of frames and their mean rate, from the packets, since headers may lack both or be wrong."""
    with open_clip() as (container, stream):
        n, packets, times = 0, 0, []
        for packet in container.demux(stream):
            packets += packet.pts is not None
            if packet.size and not packet.is_discard:
                n += 1
                if packet.pts is not None:
                    times.append(packet.pts)
        # MP4 and MOV have an index of all frames, so a missing frame means that the file was cut off.
        if "mp4" in container.format.name and packets < stream.frames:
            raise MediaError(f"the file is cut off: it has {packets} of {stream.frames} frames")
        declared = stream.average_rate or stream.guessed_rate
        span = (max(times) - min(times)) * stream.time_base if times else 0
    timed = Fraction(len(times) - 1) / span if span > 0 else None
    # The header's rate, which the reference uses, is exact. If timestamps contradict it (as with a variable rate in
    # Matroska), they decide.
    if declared and (timed is None or abs(timed / declared - 1) < 0.02):
        return n, float(declared)
    if n and timed is None:
        raise MediaError("the clip has neither a frame rate nor timestamps")
    return n, float(timed or 0)


def _decode(open_clip: Callable) -> Iterator[tuple[int, object]]:
    with open_clip() as (container, stream):
        stream.thread_type = "AUTO"
        yield from enumerate(container.decode(stream))


def _upright(frame) -> Image.Image:
    _check_frame(frame.width, frame.height)
    image, degrees = Image.fromarray(frame.to_ndarray(format="rgb24")), frame.rotation % 360
    # Counter-clockwise. Other angles than multiples of 90° are rare, and ignored.
    return image.rotate(degrees, expand=True) if degrees in (90, 180, 270) else image


def _check_frame(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(f"frames of {width} × {height} pixels; the limit is {MAX_PIXELS:,} pixels")


def _opener(data: bytes | Path) -> Callable:
    """Returns a context manager that opens the clip anew: `with open_clip() as (container, video stream)`."""
    try:
        import av
    except ImportError as e:
        raise MediaError(f"reading a video file needs PyAV: {install('video')}") from e

    @contextmanager
    def open_clip():
        # An absolute path, since FFmpeg could take the start of a relative one for a protocol.
        file = io.BytesIO(data) if isinstance(data, bytes) else str(data.absolute())
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        try:
            with av.open(file, "r", options=options) as container:
                if not container.streams.video:
                    raise MediaError("has no video stream")
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise MediaError("has an unknown video codec")
                _check_frame(stream.codec_context.width, stream.codec_context.height)
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # later frames may be larger
                yield container, stream
        except (
            av.error.FFmpegError,
            UnicodeDecodeError,
        ) as e:  # the latter: PyAV < 19, tags not in UTF-8
            why = getattr(e, "strerror", None) or e
            raise MediaError(f"cannot be decoded as a video ({why})") from e

    return open_clip
