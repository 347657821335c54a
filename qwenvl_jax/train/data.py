"""Packs records into batches: shuffled, sharded, and resumable at the exact record.

The stream of records is a pure function of (seed, shard, position), and its state is the position. So a resumed run
gets the same batches, with any number of threads or worker processes.
"""

import itertools
import logging
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from qwenvl_jax.config import Config
from qwenvl_jax.errors import BadRecord, InputError, OptionsError, install
from qwenvl_jax.inputs.layout import Lanes
from qwenvl_jax.inputs.pack import Segment, fill_lanes, index_by_visual, pack_rows, split_frames
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.inputs.source import Records, open_records
from qwenvl_jax.train.records import PackShape, RecordProcessor
from qwenvl_jax.types import Batch, Sample, TrainBatch

_STREAM_PATIENCE = 1000  # bad records in a row: a stream does not say how many it has
_LOG = logging.getLogger(__name__)


class Bad(NamedTuple):
    """A bad record in the stream."""

    where: str
    reason: str
    message: str


class _Load:
    """Reads and processes one record by number. It is a class so that worker processes can unpickle it."""

    def __init__(self, source: Records, process: RecordProcessor):
        self.source, self.process = source, process

    def __call__(self, index: int, record=None) -> tuple[Sample, ...] | Bad:
        try:
            try:
                record = self.source[int(index)] if record is None else self.source.renamed(record)
            except OSError as e:
                raise BadRecord("unreadable", str(e)) from e
            return self.process(record, self.source.folder(index))
        except (InputError, RecursionError) as e:  # the latter: lists nested a hundred deep
            return Bad(self.source.where(index), getattr(e, "reason", "unreadable"), str(e))


class Dataset:
    """An endless or finite iterator of TrainBatch: numpy arrays of one shape.

    records: what `open_records` takes: a JSONL, JSON or Parquet file, a pattern or list of them, a dataset of Hugging
        Face, or an object with `len()` and `[i]` that returns the same record i every time. Such an object must be
        thread-safe, and picklable if there are workers.
    columns: "old=new" renames a key of every record, and "old=" drops it.
    shape: the shape of every batch on this host.
    seed: decides the order, which differs between epochs. With shuffle=False it is the order of the records.
    epochs: how often each record is read; None for no end. Hosts may get different numbers of batches, so limit the
        steps, not the epochs, if there are several.
    shard: (index, count) of this host, for a loop that concatenates its hosts' batches. `train` takes (0, 1): it needs
        all records in every process.
    on_error: a bad record raises InputError with its file and line ("stop"), or is logged and counted ("skip").
    preferences: each record becomes two neighbouring segments of a row, the chosen one first.
    media_root: the folder that relative paths start from; by default that of each file.
    options: options of `Processor.encode` for every record (max_pixels, fps, allow_control_tokens, …).
    threads: how many threads process records; 0 for the caller's.
    workers: how many processes do, each with `threads` threads; 0 for none. A script that starts processes needs
        `if __name__ == "__main__":`.
    Raises InputError or OptionsError for a bad argument.
    """

    def __init__(
        self,
        records,
        processor: Processor,
        shape: PackShape,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        shard: tuple[int, int] = (0, 1),
        on_error: str = "stop",
        preferences: bool = False,
        columns: Sequence[str] = (),
        media_root=None,
        options: Mapping | None = None,
        threads: int = 2,
        workers: int = 0,
    ):
        records = open_records(records, columns)
        _check_shape(shape, processor.config, preferences)
        if on_error not in ("stop", "skip"):
            raise OptionsError(f"on_error is {on_error!r}; it must be 'stop' or 'skip'")
        if not 0 <= seed < 2**32:
            raise OptionsError(f"seed is {seed}; it must be from 0 to {2**32 - 1}")
        if epochs is not None and epochs < 1:
            raise OptionsError(f"epochs is {epochs}; it must be 1 or more, or None for no end")
        index, count = shard
        if not 0 <= index < count:
            raise OptionsError(f"shard is {shard}; it must be (index, count) with 0 ≤ index < count")
        if records.streamed and (count > 1 or workers):
            raise OptionsError(f"{records.name} is streamed; read it in one process, with workers = 0")
        size = 0 if records.streamed else len(records)
        self._epoch = len(range(index, size, count))
        if size < count and not records.streamed:
            raise InputError(f"{records.name} has {size} records; each of {count} hosts needs at least one")
        self._config, self._shape, self._on_error = processor.config, shape, on_error
        self._order = dict(seed=seed, shuffle=shuffle, shard=[index, count], records=size)
        self._order |= records.identity
        process = RecordProcessor(processor, shape, preferences=preferences, folder=media_root, options=options)
        self.records, self._load = records, _Load(records, process)
        self.epochs, self._threads, self._workers = epochs, threads, workers
        self._stream: Iterator | None = None
        self.set_state({"position": 0, "skipped": {}, "order": self._order})

    @property
    def skipped(self) -> dict[str, int]:
        """The number of bad records up to the last batch, by `BadRecord.reason`."""
        return dict(self._skipped)

    @property
    def epoch(self) -> float:
        """How often this shard's records were read, up to the last batch. Of a stream it is not known: NaN."""
        return self._position / self._epoch if self._epoch else math.nan

    def get_state(self) -> dict:
        """The position after the last batch, as JSON can hold it."""
        return {"position": self._position, "skipped": self.skipped, "order": dict(self._order)}

    def set_state(self, state: dict) -> None:
        """Continues from `get_state()`. Raises InputError if the records or their order differ."""
        for key, mine in self._order.items():
            if (theirs := state["order"].get(key)) != mine:
                change = f"its {key} is {theirs}, not {mine}"
                raise InputError(f"the saved run read other records, or in another order: {change}; start a new run")
        self.close()
        self._position, self._skipped = state["position"], Counter(state["skipped"])
        self._waiting: tuple[Sample, ...] | None = None  # of the next batch, not yet counted in the position
        self._bad_in_a_row = 0

    def close(self) -> None:
        """Stops threads and worker processes; the next batch starts new ones."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._waiting = None, None

    def examples(self, indices: Sequence[int]) -> Iterator[tuple[str, Any, tuple[Sample, ...] | Bad]]:
        """(file and line, record, its samples or why it is bad) of records by number; it makes no batches."""
        items = self._read(_grain().MapDataset.source(indices))
        for index, item in zip(indices, items, strict=True):
            try:
                record = self.records[index]
            except (InputError, OSError, RecursionError):  # the item says why
                record = None
            yield self.records.where(index), record, item

    def __iter__(self) -> "Dataset":
        return self

    def __next__(self) -> TrainBatch:
        try:
            batch = self._next()
        except BaseException:  # the next call reads the records of the unfinished batch again
            self.close()
            raise
        if batch is None:
            raise StopIteration
        return batch

    def _next(self) -> TrainBatch | None:
        if self._stream is None:
            self._stream = self._open()
        packer = Packer(self._shape, self._config)
        position, skipped = self._position, Counter(self._skipped)
        while True:
            item = next(self._stream, None) if self._waiting is None else self._waiting
            self._waiting = None
            if item is None:
                break
            if isinstance(item, Bad):
                self._skip(item, position)
                skipped[item.reason] += 1
            elif packer.add(item):
                self._bad_in_a_row = 0
            else:
                self._waiting = item
                break
            position += 1
        self._position, self._skipped = position, skipped
        return packer.batch() if packer.segments else None

    def _open(self) -> Iterator:
        if self.records.streamed:
            return self._open_stream()
        index, count = self._order["shard"]
        ds = _grain().MapDataset.range(self._order["records"])
        if self._order["shuffle"]:
            ds = ds.shuffle(seed=self._order["seed"])
        return self._read(ds[index::count].repeat(self.epochs)[self._position :])

    def _read(self, numbers) -> Iterator:
        """Reads and processes the records of a MapDataset of their numbers."""
        grain = _grain()
        ds = numbers.map(self._load).to_iter_dataset(grain.ReadOptions(self._threads, 8 * self._threads))
        if self._workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which only absl.app parses
                flags.FLAGS.mark_as_parsed()
            ds = ds.mp_prefetch(grain.MultiprocessingOptions(self._workers, 8))
        return iter(ds)

    def _open_stream(self) -> Iterator:
        """Processed records of a stream after the first `position`, which are read and dropped."""
        seed, skip, index = self._order["seed"] if self._order["shuffle"] else None, self._position, -1
        pool = ThreadPoolExecutor(max(self._threads, 1))
        ahead: deque = deque()
        try:
            for epoch in itertools.count() if self.epochs is None else range(self.epochs):
                before = index
                for record in self.records.epoch(seed, epoch):
                    index += 1
                    if index >= skip:
                        ahead.append(pool.submit(self._load, index, record))
                    if len(ahead) > 8 * self._threads:
                        yield ahead.popleft().result()
                if index == before:
                    raise InputError(f"{self.records.name}: has no records")
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _skip(self, bad: Bad, position: int) -> None:
        if self._on_error == "stop":
            raise InputError(f"{bad.where}: {bad.message}")
        self._bad_in_a_row += 1
        epoch = self._epoch or _STREAM_PATIENCE
        if self._bad_in_a_row == 2 * epoch - 1:  # a good record may be first in one epoch and last in the next
            raise InputError(f"none of {epoch} records can be used; the last is {bad.where}: {bad.message}")
        if not self._epoch or position < epoch:  # later epochs would repeat the warning
            _LOG.warning("%s: %s; skipped", bad.where, bad.message)


def _grain():
    try:
        import grain
    except ImportError as e:
        raise InputError(f"reading training data needs Grain: {install('train')}") from e
    return grain


def _check_shape(shape: PackShape, config: Config, preferences: bool) -> None:
    if min(shape[:4]) < 1:
        raise OptionsError(f"{shape}: rows, tokens, lanes and patches must be 1 or more")
    if shape.patches % config.vision.block_slots:
        raise OptionsError(f"patches is {shape.patches}; it must be a multiple of {config.vision.block_slots}")
    if preferences and (shape.segments is None or shape.segments < 2 or shape.segments % 2):
        raise OptionsError(f"segments is {shape.segments}; preferences need an even number, 2 or more")


class Packer:
    """One batch being filled. A record's samples go into the first row that holds them all.

    segments: the samples and their positions in the batch, in the order in which they were added.
    """

    def __init__(self, shape: PackShape, config: Config):
        self.shape, self.vision = shape, config.vision
        self.used, self.count = np.zeros(shape.rows, int), np.zeros(shape.rows, int)  # tokens, segments per row
        self.lanes = Lanes(shape.patches, config.vision, shape.lanes)
        self.visuals, self.placements = [], []
        self.segments: list[Segment] = []

    def add(self, samples: tuple[Sample, ...]) -> bool:
        """Adds the samples of one record. If they do not fit, returns False and changes nothing.

        RecordProcessor refuses records that do not fit into an empty batch.
        """
        length, most = sum(len(s.tokens) for s in samples), self.shape.segments or self.shape.tokens
        fits = (self.used + length <= self.shape.tokens) & (self.count + len(samples) <= most)
        if not fits.any():
            return False
        visuals = samples[0].visuals
        placements = self.lanes.place([grid for v in visuals for grid in v.grid.frames])
        if placements is None:
            return False
        row = int(np.argmax(fits))
        self.visuals += visuals
        self.placements += placements
        index = index_by_visual(visuals, [p.cells for p in placements])
        for sample in samples:
            self.count[row] += 1
            self.segments.append(Segment(row, int(self.used[row]), int(self.count[row]), sample, index))
            self.used[row] += len(sample.tokens)
        return True

    def batch(self) -> TrainBatch:
        rows, tokens, lanes, patches, _ = self.shape
        vision = fill_lanes(split_frames(self.visuals), self.placements, lanes, patches, self.vision)
        return with_targets(pack_rows(self.segments, (rows, tokens), (vision,)), self.segments)


def with_targets(inputs: Batch, segments: Sequence[Segment]) -> TrainBatch:
    """The batch with targets and weights: position i predicts token i + 1 of its segment."""
    targets, weights = np.zeros(inputs.tokens.shape, np.int32), np.zeros(inputs.tokens.shape, np.float32)
    for s in segments:
        here, next_weights = (s.row, slice(s.start, s.stop - 1)), s.sample.weights[1:]
        weights[here], targets[here] = next_weights, s.sample.tokens[1:] * (next_weights > 0)
    return TrainBatch(inputs, targets, weights)
