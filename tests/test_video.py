"""Clips: sampling rules, frames of real files in several containers, lists of frames, bad files."""

import base64
import io
import re
import struct
import sys
import wave
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from qwenvl_jax.errors import InputError, install
from qwenvl_jax.families import to_dict
from qwenvl_jax.inputs import timing, video
from qwenvl_jax.inputs.layout import make_sample
from qwenvl_jax.inputs.media import image_visual
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.inputs.preprocessing import Preprocessing, pixel_table
from qwenvl_jax.inputs.timing import Stamps, frame_count, frame_indices, frame_range
from qwenvl_jax.inputs.video import frame_size, video_visual
from qwenvl_jax.types import Grid, Visual

av = pytest.importorskip("av")

CLIP = Path(__file__).parent / "data" / "media" / "bunny.mp4"  # 100 frames at 25 per second, 640 × 360
P = Preprocessing()
SMALL = dict(resized_height=56, resized_width=84)


def frame(i: int, width: int = 84, height: int = 56) -> np.ndarray:
    """A gray frame of value 4·i + 10: its number survives lossy codecs."""
    return np.full((height, width, 3), 4 * i + 10, np.uint8)


def clip(path: Path, n: int, *, codec: str = "mpeg4", rate: int = 10, times=None, options=None, **opened) -> Path:
    """Writes n frames; times: presentation time of each in 1/1000 s (a variable frame rate)."""
    with av.open(str(path), "w", options=options or {}, **opened) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.bit_rate = 84, 56, 4_000_000
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(n):
            picture = av.VideoFrame.from_ndarray(frame(i), format="rgb24")
            picture.time_base = Fraction(1, 1000) if times else Fraction(1, rate)
            picture.pts = times[i] if times else i
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def numbers(visual, p: Preprocessing = P) -> list[float]:
    """The frame numbers of `frame`, read from the patches."""
    per_frame = visual.patches.reshape(visual.grid.t, -1, 3, p.temporal_patch_size, p.patch_size**2)
    return ((per_frame.mean(axis=(1, 2, 4)).ravel() - 10) / 4).tolist()


# --- sampling rules


@pytest.mark.parametrize(
    ("total", "rate", "options", "expected"),
    [
        (300, 30, {}, 20),
        (300, 30, {"fps": 1}, 10),
        (5, 30, {}, 4),
        (300, 30, {"nframes": 7}, 8),
        (300, 30, {"nframes": 5}, 4),  # 2.5 pairs round to even
        (2, 30, {}, 2),
        (3, 30, {}, 2),
        (100000, 30, {}, 768),
        (100000, 30, {"max_frames": 9}, 8),
        (300, 30, {"fps": 0.1, "min_frames": 9}, 10),
        (300, 30, {"fps": 1000}, 300),
        (10, 30, {"min_frames": 100}, 10),
    ],
)
def test_frame_count(total, rate, options, expected):
    assert frame_count(total, rate, MediaOptions(**options)) == expected


@pytest.mark.parametrize(("total", "options"), [(1, {}), (0, {}), (10, {"nframes": 12}), (10, {"nframes": 1})])
def test_frame_count_refuses(total, options):
    with pytest.raises(InputError, match=f"of the clip's {total} frames"):
        frame_count(total, 30, MediaOptions(**options))


@pytest.mark.parametrize(("n", "size"), [(60, (532, 952)), (768, (140, 252))])
def test_frame_size(n, size):
    assert frame_size(1080, 1920, n, P, MediaOptions(min_pixels=16 * 784, total_pixels=20480 * 784)) == size
    assert n / 2 * size[0] * size[1] / 784 == {60: 19380, 768: 17280}[n]


def test_frame_size_bounds():
    assert frame_size(1080, 1920, 20, P) == (560, 1008)  # at most 768 tokens
    assert frame_size(1080, 1920, 20, P, MediaOptions(max_pixels=10**9)) == (
        560,
        1008,
    )  # max_pixels cannot raise it
    assert frame_size(1080, 1920, 20, P, MediaOptions(max_pixels=50176)) == (
        168,
        280,
    )  # lowers min_pixels too
    assert frame_size(10, 20, 20, P) == (224, 448)  # at least 128 tokens


def test_frame_size_of_a_checkpoint_with_small_frames():
    small = Preprocessing(min_pixels=784, max_pixels=64 * 784, video_max_pixels=9 * 784)
    assert frame_size(84, 84, 20, small) == (84, 84)
    assert frame_size(480, 640, 20, small) == (56, 84)
    assert frame_size(480, 640, 20, small, MediaOptions(max_pixels=40 * 784)) == (140, 196)  # an option overrides it
    assert frame_size(480, 640, 20, small, MediaOptions(min_pixels=16 * 784)) == (84, 112)  # this one too


def test_frame_range():
    assert frame_range(100, 25, None, None) == (0, 99)
    assert frame_range(100, 25, 1, None) == (25, 99)
    assert frame_range(100, 25, None, 1) == (0, 25)
    assert frame_range(100, 25, 0.99, 1.99) == (25, 49)
    assert frame_range(100, 25, 0, 1000) == (0, 99)
    for start, end in ((2, 1), (1, 1), (4, None), (1000, None), (None, 0)):
        with pytest.raises(InputError, match=r"video_start .* video_end"):
            frame_range(100, 25, start, end)


def test_frame_indices():
    assert frame_indices(0, 99, 4) == [0, 33, 66, 99]
    assert frame_indices(10, 11, 2) == [10, 11]
    for n in (2, 4, 100, 768):
        found = frame_indices(0, 5000, n)
        assert (found[0], found[-1], len(set(found))) == (0, 5000, n)


@pytest.mark.parity
def test_frame_indices_equal_torch():
    torch = pytest.importorskip("torch")
    for total in [*range(2, 130), 1001, 2000]:
        for n in range(2, min(total, 768) + 1, 2):
            for first in (0, 17):
                last = first + total - 1
                assert frame_indices(first, last, n) == torch.linspace(first, last, n).round().long().tolist()


# --- files


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("clip.mp4", "mpeg4"),
        ("clip.mp4", "libx264"),
        ("clip.mkv", "libx264"),
        ("clip.mkv", "mpeg4"),
        ("clip.webm", "libvpx-vp9"),
        ("clip.avi", "mjpeg"),
        ("clip.avi", "mpeg4"),
        ("clip.mov", "mpeg4"),
        ("clip.ts", "mpeg2video"),
        ("clip.flv", "flv1"),
        ("clip.gif", "gif"),
        ("clip.m4v", "mpeg4"),  # a bare stream: no index, no timestamps
        ("clip.h264", "libx264"),
    ],
)
def test_containers(tmp_path, name, codec):
    path = clip(tmp_path / name, 50, codec=codec, rate=25)
    with av.open(str(path)) as container:
        frames = [f.to_image() for f in container.decode(video=0)]
    assert len(frames) == 50
    visual = video_visual(path, P, MediaOptions(nframes=8, **SMALL))
    assert (visual.kind, visual.grid) == ("video", Grid(4, 4, 6))
    listed = video_visual([frames[i] for i in (0, 7, 14, 21, 28, 35, 42, 49)], P, MediaOptions(**SMALL))
    assert np.array_equal(visual.patches, listed.patches)
    assert visual.seconds_per_grid == pytest.approx(2 / (8 / 50 * 25), rel=1e-3)
    again = video_visual(path.read_bytes(), P, MediaOptions(nframes=8, **SMALL))
    assert np.array_equal(again.patches, visual.patches)


def test_real_clip():
    visual = video_visual(CLIP, P)
    assert visual.grid == Grid(4, 26, 46)  # 4 seconds, two frames each
    assert visual.patches.shape == (4 * 26 * 46, 1176)
    assert visual.seconds_per_grid == 1.0
    assert video_visual(CLIP, P, MediaOptions(fps=1.25, **SMALL)).seconds_per_grid == 2 / (4 / 100 * 25)
    part = video_visual(CLIP, P, MediaOptions(fps=4, video_start=1, video_end=2, **SMALL))  # frames 25 … 50
    assert part.grid.t == 2
    assert part.seconds_per_grid == 2 / (4 / 26 * 25)


SCREEN = [round(i * 1000 / 30) for i in range(60)] + [6000]  # 2 s at 30 frames per second, then a still until 6 s
SLOW = [0, 40, 80, 120, 1000, 2000, 2040, 2080, 3500, 4500]  # in ms


def shown(times: list, moments) -> list[int]:
    """The numbers of the frames that are shown at these moments."""
    return [max(i for i, t in enumerate(times) if t <= m + 1e-6) for m in moments]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),  # frames out of order
        ("b.mp4", "mpeg4"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.webm", "libvpx"),
        ("a.avi", "mpeg4"),
        ("a.flv", "flv1"),
        ("a.gif", "gif"),
    ],
)
def test_a_varying_rate_is_sampled_by_time(tmp_path, name, codec):
    path = clip(tmp_path / name, 10, codec=codec, times=SLOW)
    visual = video_visual(path, P, MediaOptions(video_start=0.5, video_end=3.5, nframes=4, **SMALL))
    assert np.round(numbers(visual)).tolist() == shown(SLOW, [500, 1500, 2500, 3500]) == [3, 4, 7, 8]
    assert visual.seconds_per_grid == 2.0
    still = video_visual(path, P, MediaOptions(video_start=2.5, video_end=3.25, fps=8, **SMALL))
    assert (np.round(numbers(still)).tolist(), still.seconds_per_grid) == ([7] * 6, 0.3)
    whole = video_visual(path, P, MediaOptions(nframes=4, **SMALL))  # to the end of the last frame
    assert np.round(numbers(whole)).tolist() == [0, 4, 7, 9]
    assert whole.seconds_per_grid == pytest.approx(2 * 4.55 / 3, rel=0.02)


def test_a_recording_that_stands_still(tmp_path):
    visual = video_visual(clip(tmp_path / "screen.mp4", 61, codec="libx264", times=SCREEN), P, MediaOptions(**SMALL))
    moments = np.linspace(0, 6033, 12)
    assert np.round(numbers(visual)).tolist() == shown(SCREEN, moments)
    assert visual.seconds_per_grid == pytest.approx(2 * 6.033 / 11, rel=0.02)
    every = video_visual(tmp_path / "screen.mp4", P, MediaOptions(nframes=62, **SMALL))  # more than it has frames
    assert len(numbers(every)) == 62
    for part in ({"video_start": 7}, {"video_start": 3, "video_end": 3}):
        with pytest.raises(InputError, match=r"leave nothing of 6\.\d\d seconds"):
            video_visual(tmp_path / "screen.mp4", P, MediaOptions(**part))
    with pytest.raises(InputError, match=r"nframes 1000 rounds to 1000 of the clip's 61 frames; .* from 2 to 768"):
        video_visual(tmp_path / "screen.mp4", P, MediaOptions(nframes=1000))


@pytest.mark.skipif(not hasattr(av.stream.Stream, "index_entries"), reason="this PyAV does not show the index")
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("cut", [90, 1500])
def test_an_edit_list_cuts_frames_off(tmp_path, codec, cut):
    """As phones trim clips: the frames stay in the file, and are not shown."""
    data = bytearray(clip(tmp_path / "a.mp4", 10, codec=codec, times=SLOW).read_bytes())
    at = data.index(b"elst") + 12
    duration, start = struct.unpack(">Ii", data[at : at + 8])  # in ms, and in ticks
    data[at : at + 8] = struct.pack(">Ii", duration - cut, start + cut * 16)
    visual = video_visual(bytes(data), P, MediaOptions(video_end=2.4, nframes=4, **SMALL))
    first = min(t for t in SLOW if t >= cut)
    assert np.round(numbers(visual)).tolist() == shown(SLOW, first + np.linspace(0, 2400, 4))
    assert visual.seconds_per_grid == pytest.approx(1.6)
    whole = video_visual(bytes(data), P, MediaOptions(nframes=4, **SMALL))
    assert whole.seconds_per_grid == pytest.approx(2 * (4.6 - first / 1000) / 3, rel=0.05)


def animation(kind: str, durations, n: int = 5) -> bytes:
    file, frames = io.BytesIO(), [Image.fromarray(frame(10 * i)) for i in range(n)]
    options = {} if durations is None else {"duration": durations}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "AVIF", "WEBP"])
def test_durations_of_animations(kind):
    visual = video_visual(animation(kind, [100, 100, 2000, 100, 100]), P, MediaOptions(**SMALL))
    assert np.round(np.array(numbers(visual)) / 10).tolist() == [0, 2, 2, 4]  # at 0, 0.8, 1.6 and 2.4 s
    assert visual.seconds_per_grid == pytest.approx(1.6)
    pause = video_visual(animation(kind, [100, 100, 100, 100, 3600]), P, MediaOptions(nframes=6, **SMALL))
    assert np.round(np.array(numbers(pause)) / 10).tolist() == [0, 4, 4, 4, 4, 4]
    assert pause.seconds_per_grid == pytest.approx(1.6)
    for durations in (100, None) if kind != "PNG" else (100,):
        even = video_visual(animation(kind, durations), P, MediaOptions(**SMALL))
        assert np.round(np.array(numbers(even)) / 10).tolist() == [0, 1, 3, 4]
        assert even.seconds_per_grid == pytest.approx(0.25)


def test_webp_animations(tmp_path):
    """They show transparent parts white; frames of up to 10 ms last 100, as in browsers; a still picture is no clip."""
    clear = Image.new("RGBA", (84, 56), (40, 40, 40, 0))
    file, black = io.BytesIO(), Image.new("RGBA", (84, 56), (0, 0, 0, 255))
    clear.save(file, "WEBP", save_all=True, append_images=[black], duration=[300, 900], lossless=True)
    visual = video_visual(file.getvalue(), P, MediaOptions(**SMALL))
    assert numbers(visual) == [61.25, -2.5, -2.5, -2.5] and visual.seconds_per_grid == pytest.approx(0.8)
    path = tmp_path / "a.webp"
    path.write_bytes(animation("WEBP", 0))
    even = video_visual(path, P, MediaOptions(**SMALL))
    assert (even.size, even.seconds_per_grid) == ((84, 56), 0.25)
    with pytest.raises(InputError, match=r"is a picture .WEBP.; give it as an image"):
        video_visual(picture("WEBP"), P)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-300], r"a\.webp: not a picture that can be opened"),
        (lambda data: data.replace(b"ANMF", b"ANMG"), "a WebP animation without frames"),
        (lambda data: data[:24] + b"\xff" * 6 + data[30:], r"a\.webp: .* the limit is"),
        (lambda data: data[:24] + b"\x50\x17\0" * 2 + data[30:], r"a\.webp: .* of memory, the limit is 1,024 MiB"),
    ],
)
def test_bad_webp_animations(tmp_path, change, message):
    path = tmp_path / "a.webp"
    path.write_bytes(change(animation("WEBP", 100)))
    with pytest.raises(InputError, match=message):
        video_visual(path, P)


def ticks(stamps, last: int = 1, time_base=Fraction(1, 1000), may_jump: bool = False):
    collected = Stamps()
    for i, stamp in enumerate(stamps):
        collected.add(stamp, last if i == len(stamps) - 1 else 0)
    return collected.clock(25.0, time_base, may_jump).stamps


EVEN = [40 * i for i in range(100)]


@pytest.mark.parametrize(
    ("stamps", "varies"),
    [
        (EVEN, False),
        ([round(i * 1001 / 30) for i in range(1000)], False),  # NTSC in Matroska
        ([i * 100 // 24 for i in range(99)], False),  # in hundredths, as in GIF
        ([t + (7 * i % 5) for i, t in enumerate(EVEN)], False),  # a camera's jitter
        ([EVEN[i ^ 1] for i in range(100)], False),  # out of order
        ([t for t in EVEN if t != 2000], False),  # a missing frame
        ([*EVEN[:50], EVEN[49], *EVEN[50:]], False),  # a repeated timestamp
        ([t for t in EVEN for _ in range(2)], False),  # two packets of a frame
        ([t if t != 2000 else None for t in EVEN], False),
        ([t if t % 400 else None for t in EVEN], False),  # too few to judge
        ([None] * 9, False),
        ([7] * 9, False),
        ([7], False),
        ([-80, -40, *EVEN], False),
        ([t if t < 2000 else t + 500 for t in EVEN], True),  # a pause
        ([t if t < 2000 else 2 * t - 2000 for t in EVEN], True),  # half the rate from there on
        ([1000 * i for i in (0, 1, 3, 4, 5)], True),  # slides
        ([10000 * i + j for i in range(9) for j in (0, 33)], True),
    ],
)
def test_which_rates_vary(stamps, varies):
    found = ticks(stamps)
    assert (found is not None) == varies
    if varies:
        assert found.tolist() == sorted(stamps)


def test_a_last_frame_that_stays_counts():
    assert ticks(EVEN, last=40) is ticks(EVEN, last=0) is ticks(EVEN, last=20) is None
    assert ticks(EVEN, last=9000) is not None
    assert ticks([0, 2000], last=100).tolist() == [0, 2000]
    assert ticks([0, 2000], last=100, may_jump=True) is None  # MPEG-TS stores no durations


def test_a_clock_that_starts_anew_is_no_pause():
    restarted = [*EVEN, *(t + 10**6 for t in EVEN)]
    assert ticks(restarted) is not None
    assert ticks(restarted, may_jump=True) is None


def test_timestamps_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(timing, "MOST_STAMPS", 50)
    collected = Stamps()
    for t in [*SLOW] * 10:
        collected.add(t, 1)
    assert len(collected.values) == 50
    assert collected.clock(25.0, Fraction(1, 1000), False) == timing.Clock(100, 25.0)


def test_frames_of_a_varying_rate_that_do_not_decode(tmp_path, monkeypatch):
    """Each moment shows the last decoded frame before it, or the first."""
    path, decode = clip(tmp_path / "a.mkv", 10, times=SLOW), video._decode

    def some(*args):
        kept = (item for item in decode(*args) if item[0] not in (0, 4, 9))
        yield from ((i, *item[1:]) for i, item in enumerate(kept))

    monkeypatch.setattr(video, "_decode", some)
    visual = video_visual(path, P, MediaOptions(nframes=4, **SMALL))
    assert np.round(numbers(visual)).tolist() == [1, 3, 7, 8]


def test_fragmented_file_that_declares_no_frames(tmp_path):
    path = clip(tmp_path / "f.mp4", 30, options={"movflags": "frag_keyframe+empty_moov"})
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert video_visual(path, P, MediaOptions(nframes=6, **SMALL)).grid.t == 3


def test_frames_that_do_not_decode_are_not_counted(tmp_path, monkeypatch):
    path = clip(tmp_path / "short.mp4", 20)
    count = video._count
    monkeypatch.setattr(video, "_count", lambda open_clip: count(open_clip)._replace(total=27))
    visual = video_visual(path, P, MediaOptions(nframes=4, **SMALL))
    assert np.round(numbers(visual)).tolist() == [0, 6, 13, 19]
    assert visual.seconds_per_grid == 2 / (4 / 20 * 10)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), lambda a: a),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),  # a phone held upright
        ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), lambda a: a[:, ::-1]),  # a mirrored selfie
        ((1, 0, 0, -1), lambda a: a[::-1]),
        ((0, 1, 1, 0), lambda a: a.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
    ],
)
def test_the_display_matrix_is_applied(tmp_path, matrix, expected):
    """The matrix of a track header, which maps a stored pixel to its place on the screen."""
    stored = np.zeros((56, 84, 3), np.uint8)
    stored[:28, :42], stored[:28, 42:], stored[28:, :42] = 250, 170, 90
    data = bytearray(still(tmp_path / "a.mp4", stored, 4).read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of other fields
    assert struct.unpack(">9i", data[at : at + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    a, b, c, d = (65536 * v for v in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    shown = expected(stored)
    size = dict(resized_height=shown.shape[0], resized_width=shown.shape[1])
    frames = video_visual([shown] * 2, P, MediaOptions(**size))
    turned = video_visual(bytes(data), P, MediaOptions(nframes=2, **size))
    assert turned.grid == frames.grid
    assert abs(turned.patches.astype(int) - frames.patches).mean() < 3


def test_one_frame_is_one_grid_step(tmp_path):
    for name, codec in (("a.mp4", "libx264"), ("a.mkv", "mpeg4"), ("a.gif", "gif"), ("a.h264", "libx264")):
        visual = video_visual(clip(tmp_path / name, 1, codec=codec), P, MediaOptions(**SMALL))
        assert (visual.grid, visual.seconds_per_grid) == (Grid(1, 4, 6), 1.0)
        assert np.round(numbers(visual)).tolist() == [0, 0]
    assert video_visual(tmp_path / "a.mp4", P, MediaOptions(fps=4, **SMALL)).seconds_per_grid == 0.5
    repeated = video_visual(tmp_path / "a.mp4", P, MediaOptions(nframes=4, **SMALL))
    assert (repeated.grid, np.round(numbers(repeated)).tolist()) == (Grid(2, 4, 6), [0] * 4)
    for part in ({"video_start": 0}, {"video_start": 0, "video_end": 1}, {"video_end": 0.01}, {"video_start": 0.05}):
        assert video_visual(tmp_path / "a.mp4", P, MediaOptions(**part, **SMALL)).grid == Grid(1, 4, 6)
    for part in ({"video_start": 3}, {"video_start": 0.05, "video_end": 0.01}):
        with pytest.raises(InputError, match=r"of 0\.10 seconds"):
            video_visual(tmp_path / "a.mp4", P, MediaOptions(**part))


def still(path: Path, pixels: np.ndarray, n: int, codec="libx264", pix_fmt="yuv444p", aspect=None) -> Path:
    """A clip of n equal frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = pix_fmt
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i in range(n):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            picture.pts, picture.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"), [("a.mov", "qtrle", "argb"), ("b.mov", "png", "rgba"), ("a.apng", "apng", "rgba")]
)
def test_transparent_parts_are_white(tmp_path, name, codec, pix_fmt):
    pixels = np.full((56, 84, 4), 40, np.uint8)
    pixels[:, :42, 3], pixels[:, 42:, 3] = 255, 0
    visual = video_visual(still(tmp_path / name, pixels, 4, codec, pix_fmt), P, MediaOptions(**SMALL))
    seen = np.concatenate([np.full((56, 42, 3), 40, np.uint8), np.full((56, 42, 3), 255, np.uint8)], 1)
    assert np.array_equal(visual.patches, video_visual([seen] * 4, P, MediaOptions(**SMALL)).patches)


@pytest.mark.parametrize(
    ("pix_fmt", "codec"), [("yuv420p10le", "libx264"), ("yuv422p", "libx264"), ("yuv444p", "ffv1")]
)
def test_deep_and_odd_frames(tmp_path, pix_fmt, codec):
    height, width = (56, 84) if codec == "libx264" else (57, 85)
    path = still(tmp_path / "a.mkv", np.full((height, width, 3), 130, np.uint8), 4, codec, pix_fmt)
    assert abs(video_visual(path, P, MediaOptions(**SMALL)).patches.astype(int) - 130).max() <= 2


def test_pixels_that_are_not_square(tmp_path):
    pixels = np.full((140, 140, 3), 99, np.uint8)
    wide = still(tmp_path / "a.mp4", pixels, 4, aspect=Fraction(2, 1))
    assert video_visual(wide, P, MediaOptions(max_pixels=280 * 140)).grid == Grid(2, 10, 20)
    mistaken = still(tmp_path / "b.mp4", pixels, 4, aspect=Fraction(100, 1))
    assert video_visual(mistaken, P, MediaOptions(max_pixels=140 * 140)).grid == Grid(2, 10, 10)


def test_a_cover_picture_is_no_clip(tmp_path):
    path = tmp_path / "song.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(1), format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        container.streams.video[0].disposition = av.stream.Disposition.attached_pic
        with pytest.raises(InputError, match="has a cover picture, but no video"):
            video._video_stream(container)


def test_only_sampled_frames_are_converted(monkeypatch):
    kept = []
    fill = video.fill
    monkeypatch.setattr(video, "fill", lambda *args: kept.append(args[1].size) or fill(*args))
    video_visual(CLIP, P, MediaOptions(nframes=6, **SMALL))
    assert kept == [(84, 56)] * 6


# --- lists of frames


@pytest.mark.parametrize(("n", "rows"), [(1, 4900), (2, 4900), (3, 9800), (4, 9800), (5, 14700), (6, 14700)])
def test_frame_lists(n, rows):
    """Expected rows of patches per number of frames."""
    frames = [frame(i, 980, 980) for i in range(n)]
    visual = video_visual(frames, P)
    assert visual.patches.shape == (rows, 1176)
    assert numbers(visual) == [*range(n)] + [n - 1] * (n % 2)
    assert visual.seconds_per_grid == 1.0
    assert video_visual(frames, P, MediaOptions(fps=8)).seconds_per_grid == 0.25


def test_frames_in_every_form(tmp_path):
    frames = [Image.fromarray(frame(i)) for i in range(4)]
    frames[0].save(tmp_path / "0.png")
    file = io.BytesIO()
    frames[1].save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    mixed = [str(tmp_path / "0.png"), url, np.asarray(frames[2]), frames[3]]
    expected = video_visual(frames, P)
    assert np.array_equal(video_visual(mixed, P).patches, expected.patches)
    assert np.array_equal(video_visual(np.stack([frame(i) for i in range(4)]), P).patches, expected.patches)
    assert video_visual(tuple(mixed), P, MediaOptions(max_pixels=3136)).grid == Grid(2, 2, 4)


def test_one_frame_is_its_picture():
    still = image_visual(frame(3), P)
    assert np.array_equal(video_visual([frame(3)], P).patches, still.patches)


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        ([], {}, "list of frames is empty"),
        ([frame(0), frame(1, 112, 56)], {}, r"frame 1 \(ndarray object\) would be resized to 112 × 56"),
        ([frame(0), "no/such.png"], {}, r"frame 1: no/such\.png: No such file"),
        ([frame(0), b"text"], {}, "frame 1: 4 bytes: not a picture"),
        ([frame(0)], {"nframes": 4}, "nframes samples frames of a video file"),
        ([frame(0)], {"video_start": 0.0}, "video_start samples"),
        ([frame(0)], {"video_end": 1}, "video_end samples"),
        ([frame(0)], {"fps": 0}, "fps is 0"),
        ([frame(0)] * 4, {"fps": 1e-9}, r"the clip would last 4e\+09 seconds; the limit is 1,000,000"),
        ([frame(0)], {"fps": 1e-300}, "would last 2e\\+300 seconds"),
        ([frame(0)], {"fps": 5e-324}, "would last inf seconds"),
        ([frame(0)], {"min_pixels": "5"}, "min_pixels is '5'"),
    ],
)
def test_bad_frame_lists(frames, options, message):
    with pytest.raises(InputError, match=message):
        video_visual(frames, P, MediaOptions(**options))


# --- bad files and options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 2, "nframes": 4}, "fps or nframes, not both"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": -1.0}, "fps is -1"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"fps": "2"}, "fps is '2'"),
        ({"nframes": 0}, "nframes is 0"),
        ({"nframes": 4.0}, r"nframes is 4\.0"),
        ({"nframes": 102}, r"bunny\.mp4: nframes 102 rounds to 102 of the clip's 100 frames"),
        ({"nframes": 1}, "nframes 1 rounds to 0"),
        ({"min_frames": 8, "max_frames": 4}, "min_frames 8 is larger than max_frames 4"),
        ({"max_frames": 1}, "0 would be sampled"),
        ({"video_start": -1}, "video_start is -1"),
        ({"video_end": "1s"}, "video_end is '1s'"),
        ({"video_start": 3, "video_end": 1}, r"bunny\.mp4: video_start 3 and video_end 1 leave fewer than two"),
        ({"video_start": 100}, r"frames of 4\.00 seconds"),
        ({"nframes": 10**400}, "nframes is 1000"),
        ({"video_end": 10**5000}, "video_end is a number of thousands of digits"),
        ({"total_pixels": 0}, "total_pixels is 0"),
        ({"total_pixels": float("inf")}, "total_pixels is inf"),
        ({"min_pixels": "5"}, "min_pixels is '5'"),
        ({"max_pixels": [5]}, "max_pixels is "),
        ({"min_pixels": -1}, "min_pixels is -1"),
        ({"min_pixels": 20000, "max_pixels": 10000}, "min_pixels 20000 is larger"),
        ({"resized_width": 28}, "must be given together"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        video_visual(CLIP, P, MediaOptions(**options))


def sound() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1), out.setsampwidth(2), out.setframerate(8000), out.writeframes(bytes(16000))
    return file.getvalue()


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame(0)).save(file, kind)
    return file.getvalue()


def with_garbage(data: bytes) -> bytes:
    """A file with intact boxes, whose coded frames are overwritten."""
    at = data.index(b"mdat") + 4
    size = struct.unpack(">I", data[at - 8 : at - 4])[0] - 8
    return data[:at] + b"\xff" * size + data[at + size :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (picture("PNG"), r"is a picture .PNG.; give it as an image"),
        (picture("JPEG"), r"is a picture .JPEG.; give it as an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC picture; give a video"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page; give a video, such as MP4"),
        (b"#EXTM3U\n#EXTINF:5,\na.ts\n", "is a playlist .HLS.; give a video"),
        (b"%PDF-1.7\n" + bytes(99), "is a PDF document; give a video"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "run `git lfs pull`"),
        (b"hello, this is text", "cannot be decoded as a video"),
        (CLIP.read_bytes()[:100], "no video stream"),
        (CLIP.read_bytes()[:-2000], "cut off: it has 9[0-9] of 100 frames"),
        (CLIP.read_bytes().replace(b"avc1", b"nope"), "an unknown video codec"),
        (with_garbage(CLIP.read_bytes()), "decoded"),
        (sound(), "is a sound file; give a video"),
    ],
)
def test_bad_files(tmp_path, data, message):
    path = tmp_path / "bad.mp4"
    path.write_bytes(data)
    for given in (path, data):
        with pytest.raises(InputError, match=message):
            video_visual(given, P)
    with pytest.raises(InputError, match=r"bad\.mp4"):
        video_visual(path, P)


def test_sound_in_a_video_container(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        for packet in [*stream.encode(samples), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(InputError, match=r"sound\.mkv: has no video stream"):
        video_visual(path, P)


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4.0,\nfile://{clip}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {clip}\n",
    ],
)
@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "concat:list.mp4"])
def test_playlists_cannot_reach_other_files(tmp_path, playlist, name):
    path = tmp_path / name
    path.write_text(playlist.format(clip=CLIP))
    for given in (path, path.read_bytes()):
        with pytest.raises(InputError, match=r"cannot be decoded as a video|is a playlist"):
            video_visual(given, P)


def test_limits_come_before_memory(monkeypatch):
    for given in (CLIP, [CLIP.parent / "coffee.jpg"] * 8):
        with pytest.raises(InputError, match=r"8 frames of .* would take .* MiB .*raise media_memory"):
            video_visual(given, P, MediaOptions(media_memory=86 if given is CLIP else 4, max_pixels=4 * 10**6))
    monkeypatch.setattr(video, "MAX_PIXELS", 100_000)
    monkeypatch.setattr(video, "_decode", lambda *args: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"bunny\.mp4: frames of 640 × 360 pixels; the limit is 100,000"):
        video_visual(CLIP, P)


def test_a_decoder_takes_memory_by_the_size_of_its_frames():
    with pytest.raises(InputError, match=r"bunny\.mp4: .* would take \d\d MiB of memory, the limit is 50 MiB"):
        video_visual(CLIP, P, MediaOptions(media_memory=50))


def test_decoding_ends_at_its_deadline(tmp_path):
    path = still(tmp_path / "long.mp4", frame(1), 1000, pix_fmt="yuv420p")
    with pytest.raises(InputError, match=r"long\.mp4: .* took longer than 0\.05 seconds; .*media_seconds"):
        video_visual(path, P, MediaOptions(media_seconds=0.05))


def test_without_pyav(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=re.escape(install("video"))):
        video_visual(CLIP, P)
    assert video_visual([frame(0)], P).grid.t == 1  # frame lists need no decoder


# --- transformers 4.51.3


def reference(frames: list[Image.Image]):
    """The patches of transformers' image processor for a clip that qwen-vl-utils has resized."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.Qwen2VLImageProcessor(min_pixels=P.min_pixels, max_pixels=P.max_pixels)
    out = processor(images=None, videos=[frames], return_tensors="np")
    return out["pixel_values_videos"], tuple(out["video_grid_thw"][0].tolist())


def assert_equals_reference(visual, frames):
    values, grid = reference(frames)
    assert visual.grid == grid
    table, raw = pixel_table(P), visual.patches.reshape(len(visual.patches), 3, -1)
    mine = np.stack([table[c][raw[:, c]] for c in range(3)], axis=1).reshape(values.shape)
    assert np.array_equal(mine, values)


@pytest.mark.parity
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_listed_frames_equal_the_reference(n):
    rng = np.random.default_rng(n)
    frames = [Image.fromarray(rng.integers(0, 256, (75, 130, 3), dtype=np.uint8)) for _ in range(n)]
    assert_equals_reference(video_visual(frames, P), frames)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("options", "picked", "size"),
    [
        ({}, [0, 14, 28, 42, 57, 71, 85, 99], (364, 644)),
        ({"nframes": 3, "max_pixels": 100352}, [0, 33, 66, 99], (224, 420)),
        ({"fps": 3, "video_start": 1.0, "video_end": 3.0}, [25, 35, 45, 55, 65, 75], (364, 644)),
        ({"nframes": 2, "resized_height": 100, "resized_width": 200}, [0, 99], (112, 196)),
    ],
)
def test_file_equals_frames_decoded_independently(options, picked, size):
    with av.open(str(CLIP)) as container:
        frames = [f.to_image() for f in container.decode(video=0)]
    chosen = [frames[i].resize(size[::-1], Image.Resampling.BICUBIC) for i in picked]
    assert_equals_reference(video_visual(CLIP, P, MediaOptions(**options)), chosen)


# --- an hour


@pytest.fixture(scope="module")
def hour(tmp_path_factory) -> Path:
    """60 minutes of H.264 at 5 frames per second. Each frame shows its number: 2 × 8 gray blocks are its bits."""
    path = tmp_path_factory.mktemp("hour") / "hour.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 320, 192, "yuv420p"
        planes = np.full((192 * 3 // 2, 320), 128, np.uint8)
        for i in range(3600 * 5):
            gray = (20 + 200 * (i >> np.arange(16) & 1)).astype(np.uint8).reshape(2, 8)
            planes[:192] = np.kron(gray, np.ones((96, 40), np.uint8))
            picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            picture.pts, picture.time_base = i, Fraction(1, 5)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


@pytest.mark.slow
def test_an_hour_is_sampled_exactly(hour):
    """768 frames within the default limits of time and memory; each is the frame that its number says."""
    visual = video_visual(hour, P)
    t, h, w = visual.grid
    assert 2 * t == 768 and visual.seconds_per_grid == pytest.approx(3600 / t)
    assert t * h * w // 4 <= 768 / 2 * 300  # tokens
    assert _numbers(visual) == np.linspace(0, 3600 * 5 - 1, 768).round().astype(int).tolist()
    part = video_visual(hour, P, MediaOptions(video_start=1800, video_end=1810))
    assert 2 * part.grid.t == 20 and part.seconds_per_grid == pytest.approx(1, rel=0.05)
    assert _numbers(part) == np.linspace(1800 * 5, 1810 * 5, 20).round().astype(int).tolist()


def _numbers(visual):
    """The number that each frame of `hour` shows: 2 × 8 bits of black and white."""
    t, h, w = visual.grid
    steps = visual.patches.reshape(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]  # one channel of gray
    frames = steps.transpose(0, 5, 1, 3, 6, 2, 4, 7).reshape(2 * t, h * 14, w * 14)
    middle = [int((i + 0.5) * h * 14 / 2) for i in range(2)], [int((j + 0.5) * w * 14 / 8) for j in range(8)]
    bits = frames[:, *np.ix_(*middle)].reshape(2 * t, 16) > 120
    return (bits << np.arange(16)).sum(1).tolist()


@pytest.mark.parity
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_of_an_hour_equal_transformers(family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[family]
    config = tiny_config(family)
    theirs = getattr(transformers, f"{name}Config")(**to_dict(config))
    visual = Visual(np.zeros((384 * 18 * 32, 0), np.uint8), Grid(384, 18, 32), "video", 9.375)
    start, end = config.vision_start_token_id, config.vision_end_token_id
    sample = make_sample(np.array([5, start, config.video_token_id, end, 7, 8]), [visual], config)
    assert len(sample.tokens) == 5 + 384 * 9 * 16
    seconds = {"second_per_grid_ts": torch.tensor([9.375])} if family == "qwen2_5_vl" else {}
    expected, _ = getattr(transformers, f"{name}ForConditionalGeneration").get_rope_index(
        SimpleNamespace(config=theirs),
        torch.tensor(sample.tokens)[None].long(),
        video_grid_thw=torch.tensor([visual.grid]),
        attention_mask=torch.ones(1, len(sample.tokens), dtype=torch.long),
        **seconds,
    )
    assert np.array_equal(sample.positions, expected[:, 0].numpy())
