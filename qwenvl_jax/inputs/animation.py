"""Animated WebP files as clips. FFmpeg does not decode them, so Pillow does."""

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from qwenvl_jax.errors import MediaError
from qwenvl_jax.inputs import pictures
from qwenvl_jax.inputs.budget import Budget
from qwenvl_jax.inputs.media import MAX_IMAGE_BYTES
from qwenvl_jax.inputs.timing import Clock, Stamps

_MEMORY = 32  # bytes per pixel: those of `pictures.cost`, and a frame that waits for the next one
_SHORTEST, _USUAL = 10, 100  # ms; browsers show frames of up to 10 ms for 100


def is_animated_webp(start: bytes) -> bool:
    """start: the first 64 bytes of a file."""
    return start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X" and len(start) >= 30 and bool(start[20] & 2)


def read(data: bytes | Path, budget: Budget) -> bytes:
    """The bytes of the file. Raises MediaError if it is too large."""
    size = len(data) if isinstance(data, bytes) else data.stat().st_size
    if size > MAX_IMAGE_BYTES:
        raise MediaError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB, the limit for a WebP animation; save it as a video")
    if isinstance(data, bytes):
        return data
    budget.read(size)
    return data.read_bytes()


def count(data: bytes, budget: Budget) -> Clock:
    """The clock of the file, from the headers of its frames. Raises MediaError if it has none."""
    at, stamp, stamps, total = 12, 0, Stamps(), 0
    while at + 24 <= len(data):
        budget.left()
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind == b"ANMF":
            duration = int.from_bytes(data[at + 20 : at + 23], "little")
            duration = duration if duration > _SHORTEST else _USUAL
            stamps.add(stamp, duration)
            stamp, total = stamp + duration, total + 1
        at += 8 + size + size % 2
    if not total:
        raise MediaError("cannot be decoded as a video (a WebP animation without frames)")
    return stamps.clock(1000 * total / stamp, Fraction(1, 1000), may_jump=False)


def decode(data: bytes, budget: Budget) -> Iterator[tuple]:
    """(number, None, function that gives the frame and its (height, width)) of each frame."""
    width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    pictures.check_size(width, height)
    with budget.clip_decoder(_MEMORY * width * height + 2 * len(data)):
        image = pictures.identify(io.BytesIO(data), budget.left)
        for number in range(image.n_frames):
            budget.left()
            image.seek(number)
            frame = pictures.decode(image)
            frame = frame.copy() if frame is image else frame  # the next one takes its place
            yield number, None, lambda frame=frame: (frame, (frame.height, frame.width))
