"""What the pictures and clips of one conversation may take, all together."""

import ctypes
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qwenvl_jax.errors import ContextError, MediaError
from qwenvl_jax.inputs.options import DEFAULT, MediaOptions

# glibc keeps what a thread frees for that thread: eight threads that take turns at 200 MB hold a gigabyte. Its
# `malloc_trim` gives all of it back; other C libraries have none.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None) if os.name == "posix" else lambda _: None
_LARGE = 128 << 20  # bytes; below, the pages that the next picture would touch anew cost more (a quarter of its time)

BYTES, MEMORY, SECONDS = 512, 1024, 60  # the defaults of media_bytes (MiB), media_memory (MiB) and media_seconds


class _Decoders:
    """The memory that the decoders of this process hold, those of other conversations included."""

    passing = 0
    change = threading.Condition()


class Budget:
    """The bytes, the memory and the time that are left to the media of one conversation. Thread-safe.

    Every cost is asked for before it is spent, from sizes that headers declare. Threads that decode side by side share
    one budget: a decoder waits until the memory that it needs is free, and is refused if it can never be free.
    Conversations that are loaded side by side share the decoders' memory: each one's limit holds for all decoders of
    the process. The time of waiting for other conversations is given back.

    Decoders run in this process. A child process could be limited by the operating system, on Linux alone, at the
    price of its start (0.2 s) and a copy of the pixels. The headers of the formats that we open bound their decoders
    well enough (`pictures.cost`, `video._decode`).
    """

    def __init__(self, options: MediaOptions = DEFAULT, most_patches: float = math.inf, before: "Budget | None" = None):
        """most_patches: bytes of the patches that fit into the model's context.

        before: that of media of the same conversation that were opened earlier. Its bytes and patches count, its time
            does not.
        """
        self._most_patches = most_patches
        self._bytes_limit = (options.media_bytes or BYTES) << 20
        self.memory_limit = (options.media_memory or MEMORY) << 20
        self._seconds = options.media_seconds or SECONDS
        self._end = time.monotonic() + self._seconds
        self._bytes, self._kept = (before._bytes, before._kept) if before else (0, 0)
        self._passing = self._clip_bytes = 0
        self._change, self._clip = _Decoders.change, threading.Lock()

    def left(self) -> float:
        """Seconds until the deadline. Raises MediaError once it has passed."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise _over(f"took longer than {self._seconds:g} seconds", "media_seconds")
        return seconds

    def read(self, count: int) -> None:
        """Takes bytes of a file, download or buffer. Raises MediaError if too few are left."""
        with self._change:
            self._bytes += count
            if self._bytes > self._bytes_limit:
                raise _over(f"are larger than {self._bytes_limit >> 20:,} MiB", "media_bytes")

    def keep(self, count: int, in_clip: bool = False) -> None:
        """Takes memory for patches, for good. in_clip: within the block of `clip_decoder`."""
        with self.memory(0, count, self._clip_bytes if in_clip else 0):
            pass

    @contextmanager
    def memory(self, passing: int, kept: int = 0, held: int = 0) -> Iterator[None]:
        """Takes memory: `passing` bytes for the block and `kept` for good. Waits for decoders in other threads.

        held: `passing` of a block that this one is in.
        Raises MediaError if there is too little even without them, ContextError if the patches exceed the context.
        """
        with self._change:
            if self._kept + kept > self._most_patches:
                raise ContextError("pictures and clips are longer than the context; lower max_pixels, or use fewer")
            while True:
                if (needed := self._kept + kept + passing + held) > self.memory_limit:
                    limit = f"the limit is {self.memory_limit >> 20:,} MiB"
                    raise _over(f"would take {needed / 2**20:,.0f} MiB of memory, {limit}", "media_memory")
                if self._passing - held + needed > self.memory_limit:
                    self._change.wait(self.left())
                elif passing and _Decoders.passing and _Decoders.passing + passing > self.memory_limit:
                    start, end = time.monotonic(), self._end
                    self._change.wait()
                    self._end = max(self._end, end + time.monotonic() - start)
                else:
                    break
            # All is taken at once: a picture that waits holds nothing that a clip could wait for.
            self._kept += kept
            self._passing += passing
            _Decoders.passing += passing
        try:
            yield
        finally:
            if passing > _LARGE:
                _trim(0)
            with self._change:
                self._passing -= passing
                _Decoders.passing -= passing
                self._change.notify_all()

    @contextmanager
    def clip_decoder(self, passing: int) -> Iterator[None]:
        """`memory` for the decoder of a clip, one at a time: within the block, patches are kept, which may wait.

        Pictures never wait for memory while they hold some. A clip's decoder has threads of its own.
        """
        while not self._clip.acquire(timeout=self.left()):
            pass
        try:
            with self.memory(passing):
                self._clip_bytes = passing
                yield
        finally:
            self._clip.release()


def _over(what: str, option: str) -> MediaError:
    hint = f"use fewer or smaller ones, lower max_pixels, or raise {option}"
    return MediaError(f"the conversation's pictures and clips together {what}; {hint}")
