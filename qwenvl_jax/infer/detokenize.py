"""Token ids to text one id at a time: a delta is released only when nothing that follows can change it."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
# A UTF-8 character is at most four bytes, and a byte-level token at least one.
_LONGEST = 4


class Detokenizer:
    """Turns a stream of ids into a stream of text that ends before the first stop string.

    decode: ids → text, where the text of a list is that of the joined bytes of its ids (byte-level BPE);
    bytes that are no UTF-8 become U+FFFD.
    stop: the text ends before the stop string that is complete first, wherever token borders fall.

    The deltas of `push` and the final `finish`, joined, are the whole text. Held back meanwhile are the bytes
    of an unfinished character and any ending that may grow into a stop string.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []  # not yet text
        self._held = ""  # text, not yet released
        self.stopped = False  # a stop string was found

    def push(self, token: int) -> str:
        """Takes one id and returns the text that it releases; nothing once `stopped`."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if not text.endswith(_UNFINISHED):
            self._ids = []
        elif len(self._ids) > 2 * _LONGEST:  # not one unfinished character, but bytes that never become one
            text = self._settled(text)
        else:
            text = ""
        return self._release(text)

    def finish(self) -> str:
        """Returns what was still held back; an unfinished character becomes U+FFFD."""
        text = self._release(self._decode(self._ids) if self._ids else "")
        if not self.stopped:
            text, self._held = text + self._held, ""
        self._ids = []
        return text

    def _settled(self, text: str) -> str:
        """Splits the ids where the following four settle what the ones before them decode to."""
        for cut in range(len(self._ids) - _LONGEST, 0, -1):
            head = self._decode(self._ids[:cut])
            if head + self._decode(self._ids[cut:]) == text:
                self._ids = self._ids[cut:]
                return head
        return ""

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        ends = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
