"""Converts between Hugging Face and Orbax checkpoints, bit for bit, and merges adapters, one layer at a time.

Stock Orbax saves a tree of arrays in memory. Here the tree's leaves are parameters on disk (`Leaf` of
params/place.py), and a type handler copies one layer after the other. Stock Orbax can restore the result.
"""

import contextlib
import logging
import math
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from qwenvl_convert import quantised
from qwenvl_convert.hf import HfSource, card
from qwenvl_convert.names import respell, tensor_names, tensor_shape
from qwenvl_convert.safetensors import STORED, Reader, Writer

from qwenvl_jax.config import Config, read_json
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.families.quantisation import Scheme, form_of, from_dict
from qwenvl_jax.inputs.processor import RULE, Processor, read_rule
from qwenvl_jax.params.checkpoint import (
    CHUNK_BYTES,
    PIECE_BYTES,
    check_new,
    config_dict,
    copy_side_files,
    open_weights,
    staged,
    write_json,
    write_rule,
)
from qwenvl_jax.params.directory import BESIDE, MARKER, PARAMS, linear_modules, marker, read_config, read_quantised
from qwenvl_jax.params.locate import Located, locate
from qwenvl_jax.params.place import ArraySource, Leaf, Source, progress_bar
from qwenvl_jax.params.specs import Spec, unflatten
from qwenvl_jax.types import Model

_LOG = logging.getLogger("qwenvl_jax.orbax")  # below the package's, whose warnings the commands print
SHARD = 5_000_000_000  # largest file of weights in bytes, as transformers writes them


def to_orbax(src, dst, *, adapter=(), progress: bool = True) -> None:
    """Writes the Hugging Face checkpoint directory `src` as a new directory `dst` that `qwenvl_jax.load` reads.

    src may be an adapter, and `adapter` may name more of them, as for `load`; they are merged.
    Needs host memory for a few layers. Raises InputError if `dst` exists, if the disk is full, or if `load` would
    refuse `src`; then there is no `dst`.
    """
    located = locate(src, *adapter, weights=False)
    src, (config, reasons) = located.path, read_quantised(located.path)
    if (src / MARKER).is_file() and not located.adapters:
        raise CheckpointError(f"{src}: is an Orbax checkpoint already; --to hf makes a Hugging Face one of it")
    check_new(dst, src)
    with (
        open_weights(located, config) as source,
        staged(dst, source.nbytes, src) as work,
        progress_bar("converting", source.nbytes, progress) as bar,
        orderly_interrupt() as raise_if_interrupted,
    ):
        registry = ocp.type_handlers.create_type_handler_registry(
            (Leaf, _LeafHandler(source, bar, raise_if_interrupted)),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused, but Orbax warns if it is absent
        )
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(work / PARAMS, unflatten(source.leaves))
        write_side_files(located, work)
        write_json(work / MARKER, marker(config, reasons))
        if isinstance(source, HfSource) and source.beside:
            tensors = {name: source.reader.whole(tensor) for name, tensor in source.beside.items()}
            with Writer(work, {n: (x.dtype, x.shape) for n, x in tensors.items()}, sys.maxsize, BESIDE) as writer:
                _write(writer, tensors)
                writer.finish()
    for linear, reason in reasons.items():
        _LOG.warning("%s: %s was dequantised, so there is no way back: %s", dst, linear, reason)


def _write(writer: Writer, tensors: dict[str, np.ndarray]) -> None:
    """Writes whole tensors."""
    for name, x in tensors.items():
        writer.write_rows(name, 0, x if x.ndim == 2 else x.reshape(-1, 1), False)


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Saves a Source's leaves; Orbax restores them as numpy arrays."""

    def __init__(self, source: Source, bar, raise_if_interrupted):
        super().__init__()
        self._source, self._bar, self._raise_if_interrupted = source, bar, raise_if_interrupted

    async def serialize(self, values, infos, args=None):
        # No flush after every piece, which takes half as much time again: `staged` flushes before the rename.
        context = ts.Context({"file_io_sync": False, "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})
        for leaf, info in zip(values, infos, strict=True):
            store = None
            for piece, part in read_ahead(self._source, leaf, self._bar):
                if store is None:  # chunks divide the first piece, so no chunk spans two pieces
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
    """Cuts a parameter into pieces to hold in memory: layers, or ranges of rows of a parameter without layers."""
    lead, shape = int(spec.stacked), spec.shape
    axis = len(shape) - 1 if spec.transposed else lead
    one = math.prod(shape[lead:]) * spec.dtype.itemsize
    step = shape[axis] if lead else max(1, min(shape[axis], shape[axis] * PIECE_BYTES // one))
    if 256 < step < shape[axis]:
        step -= step % 256  # a chunk's size divides the piece's, so that must have divisors
    cuts = [slice(i, min(i + step, shape[axis])) for i in range(0, shape[axis], step)]
    layers = [(slice(l, l + 1),) for l in range(shape[0])] if lead else [()]
    inner = [slice(0, n) for n in shape[lead:]]
    at = axis - lead
    return [(*layer, *inner[:at], cut, *inner[at + 1 :]) for layer in layers for cut in cuts]


def to_hf(src, dst, *, adapter=(), layout: str = "hub", max_shard_bytes: int = SHARD, progress: bool = True) -> None:
    """Writes one of our checkpoint directories `src` as a new Hugging Face directory `dst`.

    src may be an adapter, and `adapter` may name more of them, as for `load`; see `merge`.
    layout: "hub" (`visual.*`, `model.*`), which every version of transformers reads, or "nested" (`model.visual.*`,
        `model.language_model.*`), as transformers 4.52 and newer saves.
    max_shard_bytes: larger weights are split over several files, with an index.
    Memory and errors as for `to_orbax`.
    """
    located = locate(src, *adapter, weights=False)
    src = located.path
    read_config(src)
    if not (src / MARKER).is_file() and not located.adapters:
        if located.place is not None or any(src.glob("*.safetensors")):
            raise CheckpointError(f"{src}: is a Hugging Face checkpoint already; --to orbax makes an Orbax one of it")
        raise CheckpointError(f"{src}: not an Orbax checkpoint of ours, there is no {MARKER} in it")
    _to_hf(located, dst, layout, max_shard_bytes, progress)


def merge(
    src,
    dst,
    *,
    adapter=(),
    layout: str = "hub",
    max_shard_bytes: int = SHARD,
    dequantise: bool = False,
    progress: bool = True,
) -> None:
    """Writes a model, or an adapter merged into its base, as a new, complete Hugging Face directory `dst`.

    dequantise: write quantised weights in the config's dtype, which merging an adapter into them needs.
    Arguments, memory and errors as for `to_hf`; `src` may have either format. The files beside the weights are those
    of the base, except the model card.
    """
    located = locate(src, *adapter, weights=False)
    Processor.from_dir(located.path, read_config(located.path))  # raises if a file is missing
    _to_hf(located, dst, layout, max_shard_bytes, progress, dequantise)


def save_hf(model: Model, dst, *, base: Located, layout: str = "hub", max_shard_bytes: int = SHARD) -> None:
    """Writes a model that is in memory as a new, complete Hugging Face directory `dst`.

    base: where its tokenizer, template, preprocessor and licence are, and the base model of the model card.
    """
    source = ArraySource(model.config, model.params)
    stored = {str(leaf.dtype) for leaf in source.leaves.values()}
    dtype = stored.pop() if len(stored) == 1 else model.config.dtype
    with staged(dst, source.nbytes, base.path) as work:
        copy_side_files(base.path, work)
        write_rule(getattr(model.processor, RULE, False), work)
        write_json(work / "config.json", config_dict(model.config.replace(dtype=dtype), base.path))
        _write_hf(source, model.config, work, layout, max_shard_bytes, False)
        write_json(work / "generation_config.json", dict(model.generation))
        (work / "README.md").write_text(card(base.name), "utf-8")


def _to_hf(located: Located, dst, layout: str, max_shard_bytes: int, progress: bool, dequantise: bool = False) -> None:
    path, (config, reasons) = located.path, read_quantised(located.path)
    if dequantise and (path / MARKER).is_file() and config.quantised:
        raise CheckpointError(
            f"{path}: is an Orbax checkpoint; convert it with `qwenvl convert --to hf` and merge that"
        )
    lost = read_json(path / MARKER, missing={}).get("dequantised") or reasons
    if lost and not dequantise:
        linear = next(iter(lost))
        raise CheckpointError(
            f"{path}: {linear} and others were quantised and cannot be written so again ({lost[linear]}); keep the "
            "original, or write it in 16 bits with `qwenvl merge --dequantise`"
        )
    config = config.replace(quantised=()) if dequantise else config
    check_new(dst, path)
    with open_weights(located, config) as source, staged(dst, source.nbytes, path) as work:
        write_side_files(located, work)
        if dequantise:
            _forget_quantisation(work / "config.json")
        with contextlib.ExitStack() as files:
            beside = {}
            if config.quantised and isinstance(source, HfSource):
                beside = {name: (source.reader, tensor) for name, tensor in source.beside.items()}
            elif (path / MARKER).is_file() and (path / BESIDE).is_file():
                reader = files.enter_context(Reader(path, BESIDE))
                beside = {name: (reader, tensor) for name, tensor in reader.tensors.items()}
            _write_hf(source, config, work, layout, max_shard_bytes, progress, beside)


def _forget_quantisation(file: Path) -> None:
    data = read_json(file)
    for part in (data, data.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    write_json(file, data)


def write_side_files(located: Located, work: Path) -> None:
    """Copies the files beside the weights. With adapters merged, the rule is theirs and the model card is new."""
    copy_side_files(located.path, work)
    if located.adapters:
        write_rule(read_rule(located.path, *located.adapters), work)
        (work / "README.md").write_text(card(located.name), "utf-8")


def _write_hf(
    source: Source,
    config: Config,
    work: Path,
    layout: str,
    max_shard_bytes: int,
    progress: bool,
    beside: dict | None = None,
) -> None:
    """Writes the weights into `work`, whose config.json is there.

    beside: name on the hub → (Reader, Tensor) to copy.
    """
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    names, schemes = tensor_names(config, layout), _schemes(config, work)
    copied = {respell(name, "hub", layout): entry for name, entry in (beside or {}).items()}
    shapes: dict[str, tuple] = {}
    for path, name in file_order(names):
        leaf, linear = source.leaves[path], path.removesuffix("/kernel")
        if linear in schemes:
            dtypes = {"scales": source.leaves[f"{linear}/scales"].dtype}
            kinds = quantised.encoded(schemes[linear], *leaf.shape[-2:], dtypes)
            shapes |= {f"{name.removesuffix('.weight')}.{suffix}": kind for suffix, kind in kinds.items()}
        else:
            shapes[name] = leaf.dtype, tensor_shape(config, leaf.spec)
    shapes |= {name: (STORED[tensor.dtype], tensor.shape) for name, (_, tensor) in copied.items()}
    with (
        progress_bar("writing", source.nbytes, progress) as bar,
        orderly_interrupt() as raise_if_interrupted,
        Writer(work, shapes, max_shard_bytes) as writer,
    ):
        for path, group in names.items():
            leaf, linear = source.leaves[path], path.removesuffix("/kernel")
            if linear in schemes:
                for tensors in _encoded(source, linear, group, schemes[linear], bar):
                    _write(writer, {n: x for n, x in tensors.items() if n not in copied})
                    raise_if_interrupted()
                continue
            transpose = leaf.spec.transposed
            for piece, part in read_ahead(source, leaf, bar):
                name = group[0]
                if leaf.spec.stacked:
                    name, part, piece = group[piece[0].start], part[0], piece[1:]
                row = piece[-1 if transpose else 0].start
                writer.write_rows(name, row, part if part.ndim > 1 else part[:, None], transpose)
                raise_if_interrupted()
        _write(writer, {name: reader.whole(tensor) for name, (reader, tensor) in copied.items()})
        writer.finish()


def _schemes(config: Config, work: Path) -> dict[str, Scheme]:
    """How the files hold each quantised Linear, by the config.json in `work`. Raises CheckpointError if they cannot."""
    how = from_dict(read_json(work / "config.json")) if config.quantised else None
    modules, out = linear_modules(config) if how else {}, {}
    for linear, form in config.quantised:
        found = {how.lookup(module)[1] for module in modules[linear][0]} if how else {None}
        scheme = found.pop()
        if found or scheme is None or form_of(scheme) != form:
            raise CheckpointError(
                f"config.json: its quantization_config is not about {linear}, which is held as {form}"
            )
        out[linear] = scheme
    return out


def _encoded(source: Source, linear: str, group: tuple[str, ...], scheme: Scheme, bar):
    """Yields the tensors of a quantised Linear, by name, a layer at a time."""
    named = ((name, source.leaves.get(f"{linear}/{name}")) for name in ("kernel", "scales", "zeros", "order"))
    leaves = {name: leaf for name, leaf in named if leaf is not None}
    for l, hub in enumerate(group):
        arrays = {}
        for name, leaf in leaves.items():
            index = tuple(slice(0, n) for n in leaf.shape)
            lead = (slice(l, l + 1),) if leaf.spec.stacked else ()
            whole = source.read(leaf, (*lead, *index[len(lead) :]), None, bar)
            arrays[name] = whole[0] if lead else whole
        module = hub.removesuffix(".weight")
        yield {f"{module}.{suffix}": x for suffix, x in quantised.encode(scheme, arrays).items()}


@contextlib.contextmanager
def orderly_interrupt():
    """Defers Ctrl-C until the yielded `raise_if_interrupted` is called or the block ends; a second one is immediate.

    After an exception at an arbitrary point, Orbax's threads continue: they create files in the directory that is
    being removed, and print tracebacks.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield lambda: None  # the program handles interrupts itself
        return
    interrupted = threading.Event()

    def note(*_):
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    def raise_if_interrupted():
        if interrupted.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_interrupted
        raise_if_interrupted()
    finally:
        signal.signal(signal.SIGINT, previous)


def read_ahead(source, leaf: Leaf, bar):
    """(index, array) of each piece of a parameter; a thread reads the next piece meanwhile."""
    pieces = _pieces(leaf.spec)
    with ThreadPoolExecutor(1) as pool:
        next_part = pool.submit(source.read, leaf, pieces[0], None, bar)
        for piece, next_piece in zip(pieces, [*pieces[1:], None], strict=True):
            part = next_part.result()
            if next_piece:
                next_part = pool.submit(source.read, leaf, next_piece, None, bar)
            yield piece, part


def file_order(names: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """(parameter path, tensor name) layer by layer, so that most layers' tensors share a file."""
    towers, entries = {}, []
    for path, group in names.items():
        tower = towers.setdefault("/".join(path.split("/")[:2]), len(towers))
        entries += [(tower, layer, path, name) for layer, name in enumerate(group)]
    return [(path, name) for *_, path, name in sorted(entries, key=lambda e: e[:2])]
