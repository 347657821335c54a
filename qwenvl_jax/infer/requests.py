"""The host's state of each request: its rows while they generate, and the result."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qwenvl_jax.answers.boxes import Sizes, check_coordinates, converted, sizes
from qwenvl_jax.answers.grounding import Parsed, parse
from qwenvl_jax.config import Config
from qwenvl_jax.families import family_of
from qwenvl_jax.infer import sampling
from qwenvl_jax.infer.detokenize import Detokenizer
from qwenvl_jax.infer.options import GenerateOptions
from qwenvl_jax.types import Sample


@dataclass(frozen=True)
class Result:
    """One answer.

    text: the answer without eos, stop ids or stop strings.
    token_ids: all generated ids, including the eos or stop id (as in transformers and vLLM) or the token that completed
        the stop string.
    finish_reason: "stop" (eos, a stop id or string), "length" (max_new_tokens, or the context is full) or "error" (the
        model computed NaN or infinity; text and ids are those before it).
    logprobs: of each of token_ids, under the raw logits; None unless requested.
    top_logprobs: the best (id, logprob) pairs for each of token_ids; None unless requested.
    others: the other n − 1 answers to the same conversation.
    pictures: the sizes of the conversation's pictures and clips.
    boxes: the coordinates that the model writes boxes in, one of `answers.boxes.COORDINATES`.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    others: tuple["Result", ...] = ()
    pictures: tuple[Sizes, ...] = ()
    boxes: str = "original"

    def objects(self, coordinates: str = "original") -> Parsed:
        """The boxes, points and polygons in the text, by default in pixels of the picture's file, turned upright.

        coordinates: one of `answers.boxes.COORDINATES`. Whatever a model writes is read: see `answers.grounding.parse`
        and `answers.boxes.converted`. Raises InputError only for unknown coordinates.
        """
        check_coordinates(coordinates, "coordinates")
        return converted(parse(self.text, [p.clip for p in self.pictures]), self.pictures, self.boxes, coordinates)

    @property
    def samples(self) -> tuple["Result", ...]:
        """All n answers, this one first."""
        return (self, *self.others)


class Stream(Iterator[str]):
    """Iterates over an answer in pieces. `result` is None before the last one; `close` stops early."""

    def __init__(self, request: "Request", steps: Iterator[None]):
        self._request = request
        self._pieces = self._read(steps)

    def _read(self, steps: Iterator[None]) -> Iterator[str]:
        (row,) = self._request.rows
        for _ in steps:
            if row.pieces[-1]:
                yield row.pieces[-1]

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()

    @property
    def result(self) -> Result | None:
        return self._request.result() if self._request.rows[0].finish_reason else None


class Request:
    """One conversation, and a row for each of its n answers."""

    def __init__(self, sample: Sample, options: GenerateOptions, limit: int, decode, config: Config):
        self.sample, self._made_of = sample, (sample, options, limit, decode, config)
        self.pictures, self.boxes = tuple(sizes(v, config) for v in sample.visuals), family_of(config).BOXES
        self.rows = [
            Row(self, options, options.seed + j, limit, Detokenizer(decode, options.stop)) for j in range(options.n)
        ]

    def again(self) -> "Request":
        """The same request before its first token."""
        return Request(*self._made_of)

    @property
    def failed(self) -> bool:
        """Whether NaN or infinity ended an answer."""
        return any(row.finish_reason == "error" for row in self.rows)

    def result(self) -> Result:
        first, *others = (row.result() for row in self.rows)
        return replace(first, others=tuple(others))


class Row:
    """One row of a batch: its limits, and what was generated so far. limit: most new tokens."""

    def __init__(self, request: Request, options: GenerateOptions, seed: int, limit: int, text: Detokenizer):
        self.request, self.options, self.seed, self.limit, self._text = request, options, seed, limit, text
        self.prompt_tokens = len(request.sample.tokens)
        self._stop_ids = frozenset(options.stop_token_ids)
        self.finish_reason: str | None = None
        self.pieces: list[str] = []  # of text, one per token
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[list[tuple[int, float]]] = []

    def push(self, b: int, draw: sampling.Draw) -> None:
        """Adds row b of a draw that is on the host, unless the row has ended."""
        if self.finish_reason:
            return
        token, top = int(draw.tokens[b]), self.options.logprobs
        if token == sampling.BAD:
            self.finish_reason = "error"
            self.pieces.append(self._text.finish())
            return
        self._ids.append(token)
        if top is not None:
            self._logprobs.append(float(draw.logprobs[b]))
            best = zip(draw.top_ids[b, :top].tolist(), draw.top_logprobs[b, :top].tolist(), strict=True)
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
        top = self.options.logprobs
        return Result(
            "".join(self.pieces),
            self._ids,
            self.finish_reason,
            self.prompt_tokens,
            None if top is None else self._logprobs,
            self._top if top else None,
            pictures=self.request.pictures,
            boxes=self.request.boxes,
        )


def batches(requests: list[Request], max_batch: int) -> Iterator[list[Row]]:
    """Batches of rows with similar prompt lengths. The longest come first, so that a lack of memory shows at once.

    The rows of one conversation share a batch if they fit, so that its prompt is prefilled once.
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
