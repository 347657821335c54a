"""What is in a data set, and what batches of a shape hold of it. On the host alone: no weights, and no jax."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from qwenvl_jax.config import Config
from qwenvl_jax.errors import BadRecord
from qwenvl_jax.inputs.layout import Lanes, slots_needed
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.inputs.source import open_records
from qwenvl_jax.train.data import Bad, Dataset, Packer
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.records import PackShape, RecordProcessor
from qwenvl_jax.types import Grid, Sample, Visual

EXAMPLES = 3  # bad records that are named, of each reason
PACKED = 20_000  # records at most that are packed to try a shape
_ANY = PackShape(1, 2**31 - 1, 2**20, 2**30, 2**20)  # a batch that holds every record


class Measured(NamedTuple):
    """The sizes of one usable record, without its contents."""

    lengths: tuple[int, ...]  # tokens of its conversations: one, or two of a preference
    trained: int  # tokens that are learnt
    answers: int  # runs of them
    pictures: int
    clips: int
    frames: tuple[tuple[Grid, int], ...]  # grids of single frames and how many follow each other
    boxes: bool | None = None  # whether boxes were converted; None if neither record nor options name coordinates

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def patches(self) -> int:
        return sum(grid.patches * n for grid, n in self.frames)

    def samples(self) -> tuple[Sample, ...]:
        """Samples of the same sizes, as `Packer.add` takes them."""
        visuals = tuple(Visual(None, grid._replace(t=n), "image") for grid, n in self.frames)
        return tuple(Sample(range(n), None, (), visuals) for n in self.lengths)  # of their tokens, only len() is read


class Packed(NamedTuple):
    """What batches of one shape hold. Shares are of all token and patch slots, from 0 to 1."""

    shape: PackShape
    records: float  # in a batch, on average
    tokens: float
    patches: float
    batches: int  # of one epoch
    left_out: int  # records that do not fit


@dataclass
class Survey:
    """The contents of a data set; `take` adds a record."""

    shape: PackShape
    total: int  # records of the data set, of which `read` were read
    read: int = 0
    forms: Counter = field(default_factory=Counter)  # how many records have which keys
    measured: list[Measured] = field(default_factory=list)  # all records that can be read, even if they do not fit
    bad: Counter = field(default_factory=Counter)  # by reason
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first bad records of each reason

    def take(self, keys: str, found: Measured | Bad, too_big: Bad | None) -> None:
        """Adds a record. too_big: why it does not fit into the shape, if it can be read."""
        self.read += 1
        self.forms[keys] += 1
        if isinstance(found, Measured):
            self.measured.append(found)
        if bad := found if isinstance(found, Bad) else too_big:
            self.bad[bad.reason] += 1
            named = self.examples.setdefault(bad.reason, [])
            if len(named) < EXAMPLES:
                named.append(f"{bad.where}: {bad.message}")


def survey(data, processor: Processor, options: TrainOptions, *, limit: int | None = None, progress=None) -> Survey:
    """Reads a data set as training does, pictures and clips included.

    data: as for `Dataset`, but not a stream. options: the shape of batches, the task, and how records are read.
    limit: read as many records at most, drawn at random.
    progress: called with the records and `total=` their number; returns an iterator of them, as tqdm does.
    """
    shape = PackShape(options.rows, options.tokens, options.lanes, options.patches, options.segments)
    how = dict(preferences=options.task == "dpo", options=options.encoding)
    source = open_records(data, options.columns)  # once: a pipe can be read once
    total = len(source)
    Dataset(source, processor, shape, **how)  # checks the shape
    dataset = Dataset(source, processor, _ANY, **how, threads=options.threads, workers=options.workers)
    rng = np.random.default_rng(0)
    indices = range(total) if limit is None or limit >= total else np.sort(rng.choice(total, limit, replace=False))
    fits, out = RecordProcessor(processor, shape, **how), Survey(shape, total)
    records = dataset.examples(indices)
    for where, record, item in records if progress is None else progress(records, total=len(indices)):
        too_big = None
        if not isinstance(item, Bad):
            try:
                fits.check(item)
            except BadRecord as e:
                too_big = Bad(where, e.reason, str(e))
            item = _measured(item)._replace(boxes=fits.converts_boxes(record, item[0].visuals))
        out.take(_keys(record), item, too_big)
    return out


def _measured(samples: tuple[Sample, ...]) -> Measured:
    learnt = [np.asarray(s.weights) > 0 for s in samples]
    visuals = samples[0].visuals
    return Measured(
        tuple(len(s.tokens) for s in samples),
        sum(int(w.sum()) for w in learnt),
        sum(int(np.count_nonzero(np.diff(w.astype(np.int8), prepend=0) == 1)) for w in learnt),
        sum(v.kind == "image" for v in visuals),
        sum(v.kind == "video" for v in visuals),
        tuple((v.grid._replace(t=1), v.grid.t) for v in visuals),
    )


def _keys(record) -> str:
    return " + ".join(map(str, record)) if isinstance(record, Mapping) else "no JSON object"


def pack(measured: Sequence[Measured], shape: PackShape, config: Config, total: int) -> Packed:
    """What batches of a shape hold of these records, in a random order.

    total: records of an epoch, of which these are a part.
    """
    order = np.random.default_rng(0).permutation(len(measured))[:PACKED]
    packer, batches, records, tokens, patches, left_out = Packer(shape, config), 0, 0, 0, 0, 0
    for record in (measured[i] for i in order):
        if not fits(record, shape, config):
            left_out += 1
            continue
        if not packer.add(record.samples()):
            batches, packer = batches + 1, Packer(shape, config)
            packer.add(record.samples())
        records, tokens, patches = records + 1, tokens + record.tokens, patches + record.patches
    batches += bool(packer.segments)
    scale = total / max(len(order), 1)
    slots = max(batches, 1) * np.array([1, shape.rows * shape.tokens, shape.lanes * shape.patches])
    held = np.array([records, tokens, patches]) / slots
    return Packed(shape, *held.tolist(), math.ceil(batches * scale), round(left_out * scale))


def fits(record: Measured, shape: PackShape, config: Config) -> bool:
    """Whether an empty batch holds the record."""
    return record.tokens <= shape.tokens and _lanes(record, shape.patches, config) <= shape.lanes


def suggest(
    measured: Sequence[Measured], options: TrainOptions, config: Config, share: float, scale: float = 1.0
) -> PackShape:
    """A shape with about as many tokens as the options' batches that holds this share of the records.

    The row is as long as the longest record of the share, in steps of 128; a lane holds its largest frame, in steps of
    512, as the kernels prefer; there are as many lanes as such rows fill. Few records get no more rows than hold all.

    scale: records of the data set for each of these.
    """
    by_size = sorted(measured, key=lambda m: (m.tokens, m.patches))[: max(1, math.ceil(share * len(measured)))]
    tokens = _up(by_size[-1].tokens, 128)
    rows = max(1, round(options.rows * options.tokens / tokens))
    rows = min(rows, math.ceil(_rows(by_size, PackShape(rows, tokens, 1, 1, options.segments), config) * scale))
    grids = {grid for m in by_size for grid, _ in m.frames}
    if not grids:
        return PackShape(rows, tokens, 1, config.vision.block_slots, options.segments)
    largest = max(slots_needed(grid, config.vision) for grid in grids)
    patches = _up(largest, math.lcm(512, config.vision.block_slots))
    a_token = sum(m.patches for m in by_size) / sum(m.tokens for m in by_size)
    lanes = math.ceil(1.1 * rows * tokens * a_token / patches)
    most = sorted(by_size, key=lambda m: -m.patches)[:50]
    lanes = max(lanes, *(_lanes(m, patches, config) for m in most))
    return PackShape(rows, tokens, lanes, patches, options.segments)


def _rows(measured: Sequence[Measured], shape: PackShape, config: Config) -> int:
    """How many rows of a batch hold all records, by their tokens; all rows of the shape if they do not."""
    packer = Packer(shape, config)
    if all(packer.add(record._replace(frames=()).samples()) for record in reversed(measured)):
        return np.count_nonzero(packer.used)
    return shape.rows


def _lanes(record: Measured, patches: int, config: Config) -> float:
    """How many lanes of so many patches the record needs; infinity if a frame is larger."""
    if any(slots_needed(grid, config.vision) > patches for grid, _ in record.frames):
        return math.inf
    lanes = Lanes(patches, config.vision)
    lanes.place(grid for grid, n in record.frames for _ in range(n))
    return len(lanes.lanes)


def _up(value: int, step: int) -> int:
    return max(step, math.ceil(value / step) * step)


def quantiles(values: Iterable[int]) -> list[int]:
    """Minimum, 5%, 50%, 95%, 99% and maximum."""
    return np.quantile(list(values), [0, 0.05, 0.5, 0.95, 0.99, 1], method="higher").astype(int).tolist()
