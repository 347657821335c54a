"""What the pictures and clips of one conversation may take, all together."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qwenvl_jax.errors import MediaError
from qwenvl_jax.inputs.options import DEFAULT, MediaOptions


class Budget:
    """The bytes, the memory and the time that are left to the media of one conversation. Thread-safe.

    Every cost is asked for before it is spent, from sizes that headers declare. Threads that decode side by side share
    one budget: a decoder waits until the memory that it needs is free, and is refused if it can never be free.

    Decoders run in this process. A child process could be limited by the operating system, on Linux alone, at the
    price of its start (0.2 s) and a copy of the pixels. The headers of the formats that we open bound their decoders
    well enough (`pictures.cost`, `video.decoder_bytes`).
    """

    def __init__(self, options: MediaOptions = DEFAULT):
        self._options = options
        self._bytes = options.media_bytes << 20
        self._memory = options.media_memory << 20
        self._end = time.monotonic() + options.media_seconds
        self._kept = self._passing = 0
        self._change = threading.Condition()

    def left(self) -> float:
        """Seconds until the deadline. Raises MediaError once it has passed."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise _over(f"took longer than {self._options.media_seconds:g} seconds", "media_seconds")
        return seconds

    def read(self, count: int) -> None:
        """Takes bytes of a file, download or buffer. Raises MediaError if too few are left."""
        with self._change:
            self._bytes -= count
            if self._bytes < 0:
                raise _over(f"are larger than {self._options.media_bytes:,} MiB", "media_bytes")

    def keep(self, count: int) -> None:
        """Takes memory for patches, for good. Raises MediaError if there is too little."""
        with self.memory(0, count):
            pass

    @contextmanager
    def memory(self, passing: int, kept: int = 0) -> Iterator[None]:
        """Takes memory: `passing` bytes for the block and `kept` for good. Waits for decoders in other threads.

        Raises MediaError if there is too little even without them.
        """
        with self._change:
            while True:
                if (needed := self._kept + kept + passing) > self._memory:
                    limit = f"the limit is {self._memory >> 20:,} MiB"
                    raise _over(f"would take {needed / 2**20:,.0f} MiB of memory, {limit}", "media_memory")
                if self._passing + needed <= self._memory:
                    break
                self._change.wait(self.left())
            self._kept += kept
            self._passing += passing
        try:
            yield
        finally:
            with self._change:
                self._passing -= passing
                self._change.notify_all()


def _over(what: str, option: str) -> MediaError:
    hint = f"use fewer or smaller ones, lower max_pixels, or raise {option}"
    return MediaError(f"the conversation's pictures and clips together {what}; {hint}")
