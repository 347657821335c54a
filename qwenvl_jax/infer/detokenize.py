"""Token ids to text, one id at a time. Text is released once no later id can change it."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
# A UTF-8 character is at most four bytes, and a byte-level token at least one.
_LONGEST = 4


class Detokenizer:
    """Turns a stream of ids into pieces of text. The text ends before the first stop string.

    decode: ids → text. It joins the bytes of the ids (byte-level BPE); bytes that are not UTF-8 become U+FFFD.
    stop: stop strings. The one that is complete first ends the text, even inside a token.

    The results of `push` and the final `finish`, joined, are the text. Until they can no longer change, bytes of an
    unfinished character and the beginning of a stop string are held back.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []  # not yet text
        self._held = ""  # text, not yet released
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds one id and returns the text that it releases: "" after a stop string."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if not text.endswith(_UNFINISHED):
            self._ids = []
        elif len(self._ids) > 2 * _LONGEST:  # invalid bytes, not an unfinished character
            text = self._stable_prefix(text)
        else:
            text = ""
        return self._release(text)

    def finish(self) -> str:
        """Returns the text that was held back; an unfinished character becomes U+FFFD."""
        text = self._release(self._decode(self._ids) if self._ids else "")
        if not self.stopped:
            text, self._held = text + self._held, ""
        self._ids = []
        return text

    def _stable_prefix(self, text: str) -> str:
        """Removes the leading ids whose text the last four ids cannot change, and returns that text."""
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
