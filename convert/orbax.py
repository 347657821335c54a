"""Conversion between Hugging Face and Orbax checkpoints, bit for bit, one layer in memory at a time.

Stock Orbax saves a tree that is in memory. Here the leaves of the tree are parameters still in their files
(`Leaf` of params/place.py), and a type handler for them reads and writes one layer after the other. The result is an
ordinary Orbax checkpoint of numpy arrays, which stock Orbax restores.
"""

import contextlib
import math
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from qwenvl_convert.hf import HfSource
from qwenvl_convert.names import tensor_names, tensor_shape
from qwenvl_convert.safetensors import Writer

from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.params.checkpoint import (
    CHUNK_BYTES,
    FORMAT,
    MARKER,
    PARAMS,
    PIECE_BYTES,
    OrbaxSource,
    copy_side_files,
    read_config,
    staged,
    write_json,
)
from qwenvl_jax.params.place import Leaf, progress_bar
from qwenvl_jax.params.specs import Spec, unflatten


def to_orbax(src, dst, *, progress: bool = True) -> None:
    """Writes the Hugging Face checkpoint directory `src` as a new directory `dst` that `qwenvl_jax.load` reads.

    Host memory stays within a few layers, whatever the size of the model. Raises InputError if `dst` exists,
    if the disk is full, or for any fault of `src` that `read_params` would find; then nothing named `dst` is left.
    """
    src = Path(src)
    config = read_config(src)
    if (src / MARKER).is_file():
        raise CheckpointError(f"{src}: is an Orbax checkpoint already; --to hf turns it into a Hugging Face one")
    with (
        HfSource(src, config) as source,
        staged(dst, source.nbytes, src) as work,
        progress_bar("converting", source.nbytes, progress) as bar,
        _orderly_interrupt() as raise_if_interrupted,
    ):
        registry = ocp.type_handlers.create_type_handler_registry(
            (Leaf, _LeafHandler(source, bar, raise_if_interrupted)),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused; Orbax warns when it is not there
        )
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(work / PARAMS, unflatten(source.leaves))
        copy_side_files(src, work)
        write_json(work / MARKER, {"format": FORMAT})


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Saves leaves that are still in a HfSource's files; what it writes reads back as numpy arrays."""

    def __init__(self, source: HfSource, bar, raise_if_interrupted):
        super().__init__()
        self._source, self._bar, self._raise_if_interrupted = source, bar, raise_if_interrupted

    async def serialize(self, values, infos, args=None):
        # A flush after every piece would cost half as much time again; `staged` flushes all of it before the rename.
        context = ts.Context({"file_io_sync": False, "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})
        for leaf, info in zip(values, infos, strict=True):
            store = None
            for piece, part in _read_ahead(self._source, leaf, self._bar):
                if store is None:  # chunks fit in the first piece, so no later one shares a chunk with another
                    spec = ocp.type_handlers.get_json_tspec_write(
                        info,
                        use_ocdbt=True,
                        global_shape=leaf.shape,
                        local_shape=part.shape,
                        dtype=leaf.dtype,
                        process_index=0,
                        arg=ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES),
                    )
                    store = await ts.open(ts.Spec(spec), create=True, open=True, context=context)
                await store[piece].write(part, can_reference_source_data_indefinitely=True)
                self._raise_if_interrupted()
        return []


def _pieces(spec: Spec) -> list[tuple[slice, ...]]:
    """Cuts a parameter into what is in memory at once: layers, or runs of a tensor's rows where that is less."""
    lead, shape = int(spec.stacked), spec.shape
    axis = len(shape) - 1 if spec.transposed else lead
    one = math.prod(shape[lead:]) * spec.dtype.itemsize
    step = shape[axis] if lead else max(1, min(shape[axis], shape[axis] * PIECE_BYTES // one))
    if 256 < step < shape[axis]:
        step -= step % 256  # Orbax cuts chunks at divisors; a prime has none
    cuts = [slice(i, min(i + step, shape[axis])) for i in range(0, shape[axis], step)]
    layers = [(slice(l, l + 1),) for l in range(shape[0])] if lead else [()]
    inner = [slice(0, n) for n in shape[lead:]]
    at = axis - lead
    return [(*layer, *inner[:at], cut, *inner[at + 1 :]) for layer in layers for cut in cuts]


def to_hf(src, dst, *, layout: str = "hub", max_shard_bytes: int = 5_000_000_000, progress: bool = True) -> None:
    """Writes one of our checkpoint directories `src` as a new Hugging Face directory `dst`.

    layout: "hub" names tensors as the hub's files do (`visual.*`, `model.*`), which every version of transformers
    reads; "nested" as newer saves do (`model.visual.*`, `model.language_model.*`).
    max_shard_bytes: more weights than this are split over several files, with an index.
    Memory, errors and leftovers as for `to_orbax`.
    """
    src = Path(src)
    config = read_config(src)
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    if not (src / MARKER).is_file():
        if any(src.glob("*.safetensors")):
            raise CheckpointError(f"{src}: is a Hugging Face checkpoint already; --to orbax turns it into an Orbax one")
        raise CheckpointError(f"{src}: not an Orbax checkpoint of ours, there is no {MARKER} in it")
    source, names = OrbaxSource(src, config), tensor_names(config, layout)
    shapes = {
        name: (source.leaves[path].dtype, tensor_shape(config, source.leaves[path].spec))
        for path, name in _file_order(names)
    }
    with (
        staged(dst, source.nbytes, src) as work,
        progress_bar("converting", source.nbytes, progress) as bar,
        _orderly_interrupt() as raise_if_interrupted,
        Writer(work, shapes, max_shard_bytes) as writer,
    ):
        for path, group in names.items():
            leaf = source.leaves[path]
            transpose = leaf.spec.transposed
            for piece, part in _read_ahead(source, leaf, bar):
                name, rows = group[0], piece[-1 if transpose else 0]
                if leaf.spec.stacked:
                    name, part, rows = group[piece[0].start], part[0], piece[-1 if transpose else 1]
                writer.write_rows(name, rows.start, part if part.ndim > 1 else part[:, None], transpose)
                raise_if_interrupted()
        writer.finish()
        copy_side_files(src, work)


@contextlib.contextmanager
def _orderly_interrupt():
    """Holds Ctrl-C back until `raise_if_interrupted`, which this yields, is called, or the block ends.

    Orbax's writers work on in their threads after an exception from nowhere: they would create files in a directory
    that is being removed, and print tracebacks. A second Ctrl-C is not held back.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield lambda: None  # the program has its own way of stopping
        return
    asked = []

    def note(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, previous)

    def raise_if_interrupted():
        if asked:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_interrupted
        raise_if_interrupted()
    finally:
        signal.signal(signal.SIGINT, previous)


def _read_ahead(source, leaf: Leaf, bar):
    """(index, array) of a parameter's pieces, the next one being read while this one is used."""
    pieces = _pieces(leaf.spec)
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(source.read, leaf, pieces[0], None, bar)
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            part = coming.result()
            if following:
                coming = ahead.submit(source.read, leaf, following, None, bar)
            yield piece, part


def _file_order(names: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """(parameter path, tensor name) layer by layer, so that a layer's tensors share a file as far as they can."""
    towers = {}
    entries = []
    for path, group in names.items():
        tower = towers.setdefault("/".join(path.split("/")[:2]), len(towers))
        entries += [(tower, layer, path, name) for layer, name in enumerate(group)]
    return [(path, name) for *_, path, name in sorted(entries, key=lambda e: e[:2])]
