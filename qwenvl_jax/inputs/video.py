"""Samples frames of a clip as qwen-vl-utils did for Qwen2.5-VL.

Its later versions have other defaults, and 0.0.14 resizes a list of frames twice, first to a grid of 56 pixels. Here a
list of frames is resized once, by the rules for images.
"""

import io
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_jax.errors import InputError, MediaError, OptionsError, install
from qwenvl_jax.inputs import animation, pictures
from qwenvl_jax.inputs.budget import Budget
from qwenvl_jax.inputs.fetch import name_of, path_or_bytes
from qwenvl_jax.inputs.media import as_visual, empty_patches, fill, opened, resize
from qwenvl_jax.inputs.options import DEFAULT, MediaOptions
from qwenvl_jax.inputs.preprocessing import MAX_PIXELS, Preprocessing, target_size
from qwenvl_jax.inputs.timing import DEFAULT_FPS, MAX_CLIP_SECONDS, Clock, Stamps, sampled
from qwenvl_jax.types import Visual

FRAME_MIN_TOKENS, FRAME_MAX_TOKENS = 128, 768  # visual tokens per frame, before frames are paired
TOTAL_TOKENS = 128000 * 0.9  # visual tokens per clip
MAX_VIDEO_BYTES = 512 << 20  # of a download; files are read while they are decoded

_HELD = {"h264": 18, "hevc": 18}  # frames that a decoder holds: the references, and those to be shown later; others: 10
_CLOCK_MAY_JUMP = 512  # AVFMT_TS_DISCONT, of FFmpeg's description of a format
_LEAST_PICTURE = 4 << 20  # bytes; so that frames may grow up to full HD
_TURNS = {  # display matrix → the transpose that shows the frame upright
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
_SIDEWAYS = [turn for (a, *_), turn in _TURNS.items() if a == 0]

# The formats that FFmpeg may detect. Playlists (HLS, concat, DASH) would make FFmpeg open other files and URLs.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,apng,ivf,h264,hevc,m4v,mxf,nut,yuv4mpegpipe"


def video_visual(
    source, preprocessing: Preprocessing, options: MediaOptions = DEFAULT, budget: Budget | None = None
) -> Visual:
    """One clip as patches [t·h·w, C] uint8; a grid step is two frames.

    source: a video file or animation (path, file:// or http(s) URL, base64 data: URL, bytes), or a list of frames, each
        a source of `load_image`.
    options: fps or nframes, not both. For a list of frames, fps is the rate at which they were taken. The list is
        resized as images are, and its last frame is repeated if their number is odd; total_pixels, min_frames and
        max_frames do not apply.

    budget: what the conversation's media may still take.

    As in the reference, frames are sampled evenly by number. If the frame rate varies, they are sampled evenly in time:
    of each moment, the frame that is shown then, which may be the same again; seconds_per_grid is twice the time from
    moment to moment. (The reference samples by number here too, so its frames come from other times.) Frames are
    upright and have the file's aspect; transparent parts are white (WebM's are not decoded). Interlaced frames stay as
    they are. A file of one frame is one grid step, or as many as `nframes` asks for.

    Raises MediaError or OptionsError that names the source.
    """
    p, o, budget = preprocessing, options, budget or Budget(options)
    if isinstance(source, list | tuple) or (isinstance(source, np.ndarray) and source.ndim == 4):
        for name in ("nframes", "video_start", "video_end"):
            if getattr(o, name) is not None:
                raise OptionsError(f"{name} samples frames of a video file; a list of frames is used complete, drop it")
        return _from_frames(source, p, o, budget)
    if o.fps is not None and o.nframes is not None:
        raise OptionsError("give fps or nframes, not both")
    if o.min_frames and o.max_frames and o.min_frames > o.max_frames:
        raise OptionsError(f"min_frames {o.min_frames} is larger than max_frames {o.max_frames}")
    data = path_or_bytes(source, MAX_VIDEO_BYTES, budget)
    try:
        if animation.is_animated_webp(_start(data)):
            data = animation.read(data, budget)
            return _from_file(
                lambda: animation.count(data, budget), lambda _: animation.decode(data, budget), p, o, budget
            )
        open_clip = _opener(data, budget)
        return _from_file(lambda: _count(open_clip), lambda held: _decode(open_clip, budget, held), p, o, budget)
    except OSError as e:
        raise MediaError(f"{name_of(source)}: cannot be read ({e.strerror or e})") from e
    except InputError as e:
        raise e.at(name_of(source)) from e


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


def _from_frames(frames: Sequence, p: Preprocessing, o: MediaOptions, budget: Budget) -> Visual:
    if len(frames) == 0:
        raise MediaError("the list of frames is empty")
    per_step = p.temporal_patch_size
    patches, stored = None, set()
    for i, frame in enumerate(frames):
        try:
            with opened(frame, budget) as image:
                height, width = target_size(image.height, image.width, p, o)
                stored.add(image.size)
                image = resize(image, height, width)
        except InputError as e:
            raise e.at(f"frame {i}") from e
        if patches is None:
            first, patches = (height, width), _allocate(len(frames), height, width, p, budget, False)
        elif (height, width) != first:
            sizes = f"{width} × {height} pixels, the first frame to {first[1]} × {first[0]}"
            hint = "give frames of one size, or resized_height and resized_width"
            raise MediaError(f"frame {i} ({name_of(frame)}) would be resized to {sizes}; {hint}")
        spare = len(patches) * per_step - len(frames) if i == len(frames) - 1 else 0
        slot = i % per_step
        fill(patches[i // per_step], image, range(slot, slot + 1 + spare))
    size = stored.pop() if len(stored) == 1 else None
    return _as_clip(patches, per_step / (o.fps or DEFAULT_FPS))._replace(size=size)


def _as_clip(patches: np.ndarray, seconds_per_grid: float) -> Visual:
    seconds = len(patches) * seconds_per_grid
    if seconds > MAX_CLIP_SECONDS:
        raise MediaError(f"at its fps the clip would last {seconds:.3g} seconds; the limit is {MAX_CLIP_SECONDS:,}")
    return as_visual(patches, "video", seconds_per_grid)


def _allocate(n: int, height: int, width: int, p: Preprocessing, budget: Budget, in_clip: bool) -> np.ndarray:
    steps = math.ceil(n / p.temporal_patch_size)
    try:
        budget.keep(3 * steps * p.temporal_patch_size * height * width, in_clip)
    except InputError as e:
        raise e.at(f"{n} frames of {width} × {height} pixels") from e
    return empty_patches(steps, height, width, p)


def _from_file(
    count: Callable[[], Clock],
    decode: Callable[[int], Iterator[tuple]],
    p: Preprocessing,
    o: MediaOptions,
    budget: Budget,
) -> Visual:
    """Two passes: the first counts the frames without decoding, the second decodes up to the last sampled one.

    decode(held): (number, timestamp, function that gives the picture and its shown (height, width)) of each frame, for
        a caller that keeps `held` of them.
    If fewer frames decode than were counted, and they are sampled by number, a third pass samples from that number.
    """
    clock = count()
    while clock.total:
        wanted, seconds_per_grid = sampled(clock, o, p.temporal_patch_size)
        n, patches, found, seen = len(wanted), None, 0, 0
        with closing(decode(int(clock.stamps is not None))) as frames:
            for index, show, end in _with_ends(frames, clock):
                seen = index + 1
                until = bisect_left(wanted, end)
                if until <= found:
                    continue
                image, size = show()
                if patches is None:
                    height, width = frame_size(*size, n, p, o)
                    patches = _allocate(n, height, width, p, budget, True)
                stored, image = image.size, resize(image, height, width)
                for i in range(found, until):
                    fill(patches[i // p.temporal_patch_size], image, [i % p.temporal_patch_size])
                found = until
                if found == n:
                    return _as_clip(patches, seconds_per_grid)._replace(size=stored)
        clock = clock._replace(total=seen)
    raise MediaError("no frame can be decoded")


def _with_ends(frames: Iterator[tuple], clock: Clock) -> Iterator[tuple]:
    """Adds to each frame the place of the next one: its number or, if the rate varies, when it is shown."""
    if clock.stamps is None:
        yield from ((number, show, number + 1) for number, _, show in frames)
        return
    held = None
    for number, stamp, show in frames:
        if held:
            yield *held, clock.place(number, stamp)
        held = number, show
    if held:
        yield *held, math.inf


def _count(open_clip: Callable) -> Clock:
    """Number of frames, their mean rate and their times, from the packets, since headers may lack them or be wrong."""
    stamps = Stamps()
    with open_clip() as (packets, container, stream):
        # FFmpeg's index lacks the frames that an edit list leaves out. Older PyAV does not show it.
        indexed = min(stream.frames, len(getattr(stream, "index_entries", range(stream.frames))))
        n, with_time, times = 0, 0, (math.inf, -math.inf, 0)
        for packet in packets:
            with_time += packet.pts is not None
            if packet.size and not packet.is_discard:
                n += 1
                stamps.add(packet.dts if packet.pts is None else packet.pts, packet.duration)
                if packet.pts is not None:
                    times = min(times[0], packet.pts), max(times[1], packet.pts), times[2] + 1
        # MP4 and MOV have an index of all frames, so a missing frame means that the file was cut off.
        if "mp4" in container.format.name and with_time < indexed:
            raise MediaError(f"the file is cut off: it has {with_time} of {indexed} frames")
        declared = stream.average_rate or stream.guessed_rate
        span = (times[1] - times[0]) * stream.time_base if times[2] else 0
        brand, ticks = container.metadata.get("major_brand", ""), stream.duration
        time_base, may_jump = stream.time_base or Fraction(1), bool(container.format.flags & _CLOCK_MAY_JUMP)
    timed = Fraction(times[2] - 1) / span if span > 0 else None
    # The header's rate, which the reference uses, is exact. If timestamps contradict it (as with a variable rate in
    # Matroska), they decide.
    if declared and (timed is None or abs(timed / declared - 1) < 0.02):
        rate = float(declared)
    elif n > 1 and timed is None:
        raise MediaError("the clip has neither a frame rate nor timestamps; give its frames as a list, with fps")
    else:
        rate = float(timed or 1)
    if brand.startswith("avi") and rate >= 100:  # an AVIF without durations; browsers show 10 frames per second
        return Clock(n, 10.0)
    return stamps.clock(rate, time_base, may_jump, ticks)


def _decode(open_clip: Callable, budget: Budget, held: int) -> Iterator[tuple]:
    """The frames in the order in which they are shown, as `_from_file` takes them."""
    with open_clip() as (packets, _, stream):
        context, index = stream.codec_context, 0
        most = max(_picture_bytes(context), _LEAST_PICTURE)
        threads = budget.memory_limit // 4 // most
        context.thread_type, context.thread_count = "AUTO", max(1, min(os.cpu_count() or 1, 16, threads))
        held += _HELD.get(context.name, 10) + context.thread_count
        with budget.clip_decoder(held * most + 16 * context.width * context.height):
            for packet in packets:
                for frame in packet.decode():
                    yield index, frame.pts, partial(_upright, frame, stream.sample_aspect_ratio)
                    index += 1
                if _picture_bytes(context) > most:
                    raise MediaError(f"its frames grow to {context.width} × {context.height} pixels in the middle")


def _picture_bytes(context) -> int:
    """Bytes of one decoded frame, as the headers say."""
    bits = context.format.padded_bits_per_pixel if context.format else 64
    return context.width * context.height * bits // 8


def _upright(frame, aspect=None) -> tuple[Image.Image, tuple[int, int]]:
    """The frame as it is shown, and its (height, width) in square pixels. aspect: of a stored pixel."""
    _check_frame(frame.width, frame.height)
    alpha = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba" if alpha else "rgb24"))
    if alpha:
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        image = canvas
    aspect = float(aspect or 1)
    width = round(image.width * aspect) if 0.2 < aspect < 5 else image.width  # others are mistakes of the file
    turn = _TURNS.get(_display_matrix(frame))
    if turn is None:
        return image, (image.height, width)
    image, swapped = image.transpose(turn), turn in _SIDEWAYS
    return image, (width, image.width) if swapped else (image.height, width)


def _display_matrix(frame) -> tuple[int, ...]:
    """(a, b, c, d) with x' = ax + cy and y' = bx + dy. Other angles than multiples of 90° are rare, and ignored."""
    data = frame.side_data.get("DISPLAYMATRIX")
    values = np.frombuffer(data, np.int32, 5).tolist() if data else [65536, 0, 0, 0, 65536]
    return tuple(round(values[i] / 65536) for i in (0, 1, 3, 4))


def _check_frame(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(f"frames of {width} × {height} pixels; the limit is {MAX_PIXELS:,} pixels")


def _start(data: bytes | Path) -> bytes:
    """The first 64 bytes."""
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        return file.read(64)


def _opener(data: bytes | Path, budget: Budget) -> Callable:
    """A context manager that opens the clip anew: `with open_clip() as (packets, container, video stream)`."""
    try:
        import av
    except ImportError as e:
        raise MediaError(f"reading a video file needs PyAV: {install('video')}") from e

    def packets(container, stream):
        for packet in container.demux(stream):
            budget.left()
            yield packet

    def check_kind():
        """Names a file that is no video, once FFmpeg has failed."""
        start = _start(data)
        pictures.check_start(start)
        picture, other = pictures.opened_kind(start), pictures.other_kind(start)
        if picture not in (None, "GIF"):
            raise MediaError(f"is a picture ({picture}); give it as an image, or in a list of frames")
        if other and "video" not in other:
            raise MediaError(f"is {other}; give a video, such as MP4, WebM, MKV, MOV, AVI or GIF")

    @contextmanager
    def open_clip():
        # An absolute path, since FFmpeg could take the start of a relative one for a protocol.
        file = io.BytesIO(data) if isinstance(data, bytes) else str(data.absolute())
        # `max_pixels` holds for frames that FFmpeg decodes to look into the file, and for later frames.
        most = min(MAX_PIXELS, budget.memory_limit // 20)
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file", "max_streams": "100"}
        seconds = budget.left()
        try:
            with av.open(
                file, "r", options={**options, "max_pixels": str(most)}, timeout=(seconds, seconds)
            ) as container:
                stream = _video_stream(container)
                _check_frame(stream.codec_context.width, stream.codec_context.height)
                stream.codec_context.options = {"max_pixels": str(most)}
                yield packets(container, stream), container, stream
        except (
            av.error.FFmpegError,
            UnicodeDecodeError,
        ) as e:  # the latter: PyAV < 19, tags not in UTF-8
            budget.left()  # FFmpeg stops at the deadline with an error of its own
            check_kind()
            why = getattr(e, "strerror", None) or e
            raise MediaError(f"cannot be decoded as a video ({why})") from e

    return open_clip


def _video_stream(container):
    """The main video stream. Covers of music and thumbnails are none."""
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        raise MediaError("has a cover picture, but no video" if container.streams.video else "has no video stream")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise MediaError("has an unknown video codec")
    return stream
