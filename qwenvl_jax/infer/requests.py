"""What the engine keeps of each request while it answers: its rows, and the result that they become."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qwenvl_jax.infer import sampling
from qwenvl_jax.infer.detokenize import Detokenizer
from qwenvl_jax.infer.options import GenerateOptions
from qwenvl_jax.types import Sample


@dataclass(frozen=True)
class Result:
    """One answer.

    text: the answer without eos, stop ids or stop strings.
    token_ids: everything generated, with the eos or stop id that ended it (as in transformers and vLLM);
        after a stop string, up to the token that completed it.
    finish_reason: "stop" (eos, a stop id or string) or "length" (max_new_tokens, or the context is full).
    logprobs: one for each of token_ids, under the raw logits; None unless asked for.
    top_logprobs: for each of token_ids the best (id, logprob) pairs; None unless asked for.
    others: the other n − 1 samples of the same conversation.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    others: tuple["Result", ...] = ()

    @property
    def samples(self) -> tuple["Result", ...]:
        """All n samples, this one first."""
        return (self, *self.others)


class Stream:
    """An answer in pieces. `result` is None until they have run out; `close` gives up before that."""

    def __init__(self, request: "Request", steps: Iterator[None]):
        self._request = request
        self._pieces = self._read(steps)

    def _read(self, steps: Iterator[None]) -> Iterator[str]:
        (row,) = self._request.rows
        for _ in steps:
            if row.pieces[-1]:
                yield row.pieces[-1]

    def __iter__(self):
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()

    @property
    def result(self) -> Result | None:
        return self._request.result() if self._request.rows[0].finish_reason else None


class Request:
    """One conversation and the rows, one a sample, that answer it."""

    def __init__(self, sample: Sample, options: GenerateOptions, limit: int, decode):
        self.sample = sample
        self.rows = [
            Row(self, options, options.seed + j, limit, Detokenizer(decode, options.stop)) for j in range(options.n)
        ]

    def result(self) -> Result:
        first, *others = (row.result() for row in self.rows)
        return replace(first, others=tuple(others))


class Row:
    """One row of a batch: what it may still do, and what it has so far."""

    def __init__(self, request: Request, options: GenerateOptions, seed: int, limit: int, text: Detokenizer):
        self.request, self.options, self.seed, self.limit, self._text = request, options, seed, limit, text
        self.prompt_tokens = len(request.sample.tokens)
        self._stop_ids = frozenset(options.stop_token_ids)
        self.finish_reason: str | None = None
        self.pieces: list[str] = []  # of text, one a token
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[list[tuple[int, float]]] = []

    def push(self, b: int, draw: sampling.Draw) -> None:
        """Takes row b of a draw that is on the host; one that comes after the end is dropped."""
        if self.finish_reason:
            return
        token, asked = int(draw.tokens[b]), self.options.logprobs
        self._ids.append(token)
        if asked is not None:
            self._logprobs.append(float(draw.logprobs[b]))
            best = zip(draw.top_ids[b, :asked].tolist(), draw.top_logprobs[b, :asked].tolist(), strict=True)
            self._top.append(list(best))
        ended = token in self._stop_ids
        piece = "" if ended else self._text.push(token)
        if ended or self._text.stopped:
            self.finish_reason = "stop"
        elif len(self._ids) == self.limit:
            self.finish_reason = "length"
        if self.finish_reason:
            piece += self._text.finish()
        self.pieces.append(piece)

    def result(self) -> Result:
        asked = self.options.logprobs
        return Result(
            "".join(self.pieces),
            self._ids,
            self.finish_reason,
            self.prompt_tokens,
            None if asked is None else self._logprobs,
            self._top if asked else None,
        )


def batches(requests: list[Request], max_batch: int) -> Iterator[list[Row]]:
    """Rows of similar prompt length together, the longest first, so that memory runs out early or not at all.

    The samples of one conversation stay together where they fit, so that it is read once.
    """
    batch = []
    for request in sorted(requests, key=lambda r: -len(r.sample.tokens)):
        if batch and len(batch) + len(request.rows) > max_batch:
            yield batch
            batch = []
        batch = batch + request.rows
        while len(batch) >= max_batch:
            yield batch[:max_batch]
            batch = batch[max_batch:]
    if batch:
        yield batch
