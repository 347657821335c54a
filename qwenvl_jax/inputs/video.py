"""Samples frames of a clip as qwen-vl-utils does, keeping only the chosen ones, already resized.

The rules are those of its Qwen2.5-VL days. Its defaults moved since, and so did its handling of frame lists:
0.0.14 resizes listed frames twice, on a 56-pixel grid first; here they take the image rules, once.
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

from qwenvl_jax.errors import InputError, MediaError, OptionsError
from qwenvl_jax.inputs.fetch import locate, name_of
from qwenvl_jax.inputs.media import as_visual, empty_patches, fill, load_image, resize
from qwenvl_jax.inputs.options import DEFAULT, MediaOptions
from qwenvl_jax.inputs.preprocessing import MAX_PIXELS, Preprocessing, target_size
from qwenvl_jax.types import Visual

DEFAULT_FPS = 2.0
MIN_FRAMES, MAX_FRAMES = 4, 768
FRAME_MIN_TOKENS, FRAME_MAX_TOKENS = 128, 768  # visual tokens of one frame (before frames are paired)
TOTAL_TOKENS = 128000 * 0.9  # of the whole clip
MAX_VIDEO_BYTES = 512 << 20  # of a download; files are read as they are decoded
MAX_CLIP_PIXELS = 1 << 28  # of all sampled frames, resized: 0.8 GB of patches
MAX_CLIP_SECONDS = 10**6  # eleven days. Positions count half seconds, in float32 and int32: both hold these exactly.

# What FFmpeg may take a file for. Playlists and the like (HLS, concat, DASH) are left out on purpose: they
# make it open other files and addresses.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,apng,ivf,h264,hevc,m4v,mxf,nut,yuv4mpegpipe"
_ROTATIONS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


def video_visual(source, preprocessing: Preprocessing, options: MediaOptions = DEFAULT) -> Visual:
    """One clip as patches [t·h·w, C] uint8, a grid step being two frames.

    source: a video file (path, file:// or http(s) URL, base64 data: URL, bytes), or a list of frames, each
        anything `load_image` takes.
    options: fps and nframes exclude each other. For a frame list, fps says at what rate the frames were taken; the
        list may span MAX_CLIP_SECONDS at most. It takes the image rules, frame by frame, and its last frame is
        repeated if their number is odd; total_pixels and min/max_frames do not apply to it.

    Frames are counted, not timed: a clip of variable rate is sampled evenly by number, as in the reference.
    A rotation that the file asks players to apply is applied. Raises InputError naming the source.
    """
    p, o = preprocessing, options
    if isinstance(source, list | tuple) or (isinstance(source, np.ndarray) and source.ndim == 4):
        for name in ("nframes", "video_start", "video_end"):
            if getattr(o, name) is not None:
                raise OptionsError(f"{name} chooses frames of a video file; a list of frames is used whole, drop it")
        return _listed(source, p, o)

    if o.fps is not None and o.nframes is not None:
        raise OptionsError("give fps or nframes, not both")
    if o.min_frames and o.max_frames and o.min_frames > o.max_frames:
        raise OptionsError(f"min_frames {o.min_frames} is larger than max_frames {o.max_frames}")

    def plan(total: int, rate: float) -> tuple[list[int], float]:
        first, last = frame_range(total, rate, o.video_start, o.video_end)
        n = frame_count(last - first + 1, rate, o, p.temporal_patch_size)
        return frame_indices(first, last, n), n / (last - first + 1) * rate

    def size(height: int, width: int, n: int) -> tuple[int, int]:
        return frame_size(height, width, n, p, o)

    name, data = name_of(source), locate(source, MAX_VIDEO_BYTES)
    try:
        return _sampled(_opener(data), plan, size, p)
    except InputError as e:
        raise e.at(name) from e


def frame_range(total: int, rate: float, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last frame (inclusive) between two times; times past the end mean the end."""
    if start is None and end is None:
        return 0, total - 1
    seconds = total / rate
    first = math.ceil(min(start or 0.0, seconds) * rate)
    last = min(math.floor(min(seconds if end is None else end, seconds) * rate), total - 1)
    if first >= last:
        raise OptionsError(
            f"video_start {start} and video_end {end} leave fewer than two frames of a clip of {seconds:.2f} seconds"
        )
    return first, last


def frame_count(total: int, rate: float, o: MediaOptions = DEFAULT, factor: int = 2) -> int:
    """How many of `total` frames, shot at `rate` a second, to sample: a multiple of `factor`."""
    if o.nframes is not None:
        n = round(o.nframes / factor) * factor
    else:
        low = math.ceil((o.min_frames or MIN_FRAMES) / factor) * factor
        high = math.floor((o.max_frames or min(MAX_FRAMES, total)) / factor) * factor
        n = min(max(total / rate * (o.fps or DEFAULT_FPS), low), high, total)
        n = math.floor(n / factor) * factor
    if not factor <= n <= total:
        asked = f"nframes {o.nframes} rounds to {n}" if o.nframes is not None else f"{n} would be sampled"
        raise OptionsError(
            f"{asked} of the clip's {total} frames; it must be at least {factor} and at most all of them"
        )
    return n


def frame_indices(first: int, last: int, n: int) -> list[int]:
    """`n` frame numbers spread evenly over first … last, both included; `n` is even, so none is a tie.

    The reference does this in float32, and may be one off, depending on its machine, in clips of many thousand frames.
    """
    return np.linspace(first, last, n).round().astype(int).tolist()


def frame_size(height: int, width: int, n: int, p: Preprocessing, o: MediaOptions = DEFAULT) -> tuple[int, int]:
    """The (height, width) that each of `n` sampled frames is resized to.

    The budget of the whole clip lowers the bound of a frame, but not under 1.05 · min_pixels; a larger
    max_pixels has no effect. A max_pixels under the default min_pixels lowers that. The default of a checkpoint for
    max_pixels, `p.video_max_pixels`, gives way to a larger min_pixels.
    """
    area = p.factor**2
    default = p.video_max_pixels or math.inf
    low = o.min_pixels or min(FRAME_MIN_TOKENS * area, o.max_pixels or default)
    budget = (o.total_pixels or TOTAL_TOKENS * area) / n * p.temporal_patch_size
    high = max(min(FRAME_MAX_TOKENS * area, budget), int(low * 1.05))
    high = min(o.max_pixels or max(default, low), high)
    return target_size(height, width, p, replace(o, min_pixels=low, max_pixels=high))


def _listed(frames: Sequence, p: Preprocessing, o: MediaOptions) -> Visual:
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
            raise MediaError(
                f"frame {i} ({name_of(frame)}) would be resized to {width} × {height} pixels, but the first frame to "
                f"{first[1]} × {first[0]}; frames of one clip need one size, or resized_height and resized_width"
            )
        spare = len(patches) * per_step - len(frames) if i == len(frames) - 1 else 0
        slot = i % per_step
        fill(patches[i // per_step], resize(image, height, width), range(slot, slot + 1 + spare))
    return _clip(patches, per_step / (o.fps or DEFAULT_FPS))


def _clip(patches: np.ndarray, seconds_per_grid: float) -> Visual:
    if len(patches) * seconds_per_grid > MAX_CLIP_SECONDS:
        raise MediaError(
            f"at its fps the clip would last {len(patches) * seconds_per_grid:.3g} seconds; "
            f"it may last {MAX_CLIP_SECONDS:,} at most"
        )
    return as_visual(patches, "video", seconds_per_grid)


def _allocate(n: int, height: int, width: int, p: Preprocessing) -> np.ndarray:
    if n * height * width > MAX_CLIP_PIXELS:
        raise MediaError(
            f"{n} frames of {width} × {height} pixels are over the limit of {MAX_CLIP_PIXELS:,} pixels a clip; "
            "take fewer or smaller ones"
        )
    return empty_patches(math.ceil(n / p.temporal_patch_size), height, width, p)


def _sampled(open_clip: Callable, plan: Callable, size: Callable, p: Preprocessing) -> Visual:
    """Two passes: count frames (without decoding), then decode up to the last chosen one.

    If fewer frames decode than were counted, their number is known then, and a third pass is sure to end.
    """
    total, rate = _count(open_clip)
    while total:
        indices, sampled_fps = plan(total, rate)
        patches, found, seen = None, 0, 0
        for index, frame in _decode(open_clip):
            seen = index + 1
            if index != indices[found]:
                continue
            image = _upright(frame)
            if patches is None:
                height, width = size(image.height, image.width, len(indices))
                patches = _allocate(len(indices), height, width, p)
            fill(patches[found // p.temporal_patch_size], resize(image, height, width), [found % p.temporal_patch_size])
            found += 1
            if found == len(indices):
                return _clip(patches, p.temporal_patch_size / sampled_fps)
        total = seen
    raise MediaError("no frame of it can be decoded")


def _count(open_clip: Callable) -> tuple[int, float]:
    """Number of frames and their mean rate, from the packets: headers leave both out, or lie."""
    with open_clip() as (container, stream):
        n, packets, times = 0, 0, []
        for packet in container.demux(stream):
            packets += packet.pts is not None
            if packet.size and not packet.is_discard:
                n += 1
                if packet.pts is not None:
                    times.append(packet.pts)
        # MP4 and MOV index every frame at their start or end, so a missing one means a broken-off copy.
        if "mp4" in container.format.name and packets < stream.frames:
            raise MediaError(f"the file is cut off: of {stream.frames} frames only {packets} are there")
        declared = stream.average_rate or stream.guessed_rate
        span = (max(times) - min(times)) * stream.time_base if times else 0
    timed = Fraction(len(times) - 1) / span if span > 0 else None
    # The header's figure is exact where it is right, and what the reference goes by; where the timestamps
    # contradict it (variable rate in Matroska, say), they win.
    if declared and (timed is None or abs(timed / declared - 1) < 0.02):
        return n, float(declared)
    if n and timed is None:
        raise MediaError("the clip tells neither its frame rate nor its frames' times")
    return n, float(timed or 0)


def _decode(open_clip: Callable) -> Iterator[tuple[int, object]]:
    with open_clip() as (container, stream):
        stream.thread_type = "AUTO"
        yield from enumerate(container.decode(stream))


def _upright(frame) -> Image.Image:
    if frame.width * frame.height > MAX_PIXELS:
        raise MediaError(f"frames of {frame.width} × {frame.height} pixels; the limit is {MAX_PIXELS:,} pixels")
    return _turned(Image.fromarray(frame.to_ndarray(format="rgb24")), frame.rotation)


def _turned(image: Image.Image, degrees: int) -> Image.Image:
    """Counter-clockwise, by right angles only; the few clips with another are left as they are."""
    turn = _ROTATIONS.get(degrees % 360)
    return image if turn is None else image.transpose(turn)


def _opener(data: bytes | Path) -> Callable:
    """A function that opens the clip afresh: `with open_clip() as (container, video stream)`."""
    try:
        import av
    except ImportError as e:
        raise MediaError("reading a video file needs PyAV; install it with: pip install 'qwenvl-jax[video]'") from e

    @contextmanager
    def open_clip():
        # An absolute path, so that FFmpeg cannot read a protocol into a file's name.
        file = io.BytesIO(data) if isinstance(data, bytes) else str(data.absolute())
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        try:
            with av.open(file, "r", options=options) as container:
                if not container.streams.video:
                    raise MediaError("it has no video stream")
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise MediaError("its video codec is unknown")
                width, height = stream.codec_context.width, stream.codec_context.height
                if width * height > MAX_PIXELS:
                    raise MediaError(f"frames of {width} × {height} pixels; the limit is {MAX_PIXELS:,} pixels")
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # of a frame larger than it said before
                yield container, stream
        except (av.error.FFmpegError, UnicodeDecodeError) as e:  # the latter: PyAV < 19 on tags that are not UTF-8
            why = getattr(e, "strerror", None) or e
            raise MediaError(f"it is not a video file that can be decoded ({why})") from e

    return open_clip
