"""Hugging Face checkpoints opened as parameters, with one copy in memory.

Every tensor is used exactly once and every parameter is made exactly once; otherwise an `InputError` names it.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from qwenvl_convert.names import hub_name, tensor_names, tensor_shape
from qwenvl_convert.safetensors import DTYPES, Reader, Tensor

from qwenvl_jax.config import Config
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.params.place import Leaf, Source, to_devices
from qwenvl_jax.params.specs import specs


class HfSource(Source, contextlib.AbstractContextManager):
    """A Hugging Face checkpoint opened as parameters, checked against the config. Use it as a context manager."""

    def __init__(self, directory, config: Config):
        self._reader = Reader(directory)
        try:
            self.leaves = _match(self._reader, config)
        except BaseException:
            self._reader.close()
            raise
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def __exit__(self, *_):
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()

    def read(self, leaf: Leaf, index: tuple[slice, ...], dtype=None, bar=None) -> np.ndarray:
        """See `Source.read`. A pool of threads reads, transposes and casts pieces of a few tens of megabytes."""
        out = self.empty(leaf, index, dtype)
        stacked, transpose = leaf.spec.stacked, leaf.spec.transposed
        layers = range(index[0].start, index[0].stop) if stacked else [0]
        inner = index[1:] if stacked else index
        rows, columns = inner[::-1] if transpose else (*inner, slice(0, 1))[:2]
        jobs = []
        for layer, part in zip(layers, out if stacked else [out], strict=True):
            tensor = leaf.tensors[layer]
            part = part[:, None] if part.ndim == 1 else part
            width = tensor.matrix[1] * leaf.dtype.itemsize
            step = max(256, (32 << 20) // width // 256 * 256)
            for row in range(rows.start, rows.stop, step):
                stop = min(row + step, rows.stop)
                cut = slice(row - rows.start, stop - rows.start)
                target = part[:, cut] if transpose else part[cut]
                jobs.append((tensor, slice(row, stop), columns, transpose, target))
        for job, _ in zip(jobs, self._pool.map(lambda j: self._reader.read_part(*j), jobs), strict=True):
            if bar is not None:
                bar.update(job[-1].size * leaf.dtype.itemsize)
        return out


def read_params(directory, config: Config, shardings=None, dtype=None, progress: bool = True) -> dict:
    """Reads a Hugging Face checkpoint directory into jax arrays, one parameter after the other.

    shardings: a tree like the parameters; None puts everything on this process's first device.
    dtype: cast to it; None keeps each tensor's own.
    progress: show a bar on stderr, if that is a terminal.

    Each process reads only what its devices hold. On the host it needs memory for one parameter's shard on one device,
    and some megabytes.
    Raises InputError for damaged files and for any tensor that is missing, unexpected or of another shape or dtype.
    """
    with HfSource(directory, config) as source:
        return to_devices(source, shardings, dtype, progress)


def _match(reader: Reader, config: Config) -> dict[str, Leaf]:
    stored = {}
    for name, tensor in reader.tensors.items():
        hub = hub_name(name)
        if hub in stored:
            raise CheckpointError(f"{reader.directory}: tensor {hub} is stored twice, under two spellings")
        stored[hub] = (name, tensor)
    declared, names = specs(config), tensor_names(config)
    _check_names(reader, config, stored, {name for group in names.values() for name in group})
    leaves = {}
    for path, group in names.items():
        tensors = dict(stored[hub] for hub in group)
        for name, tensor in tensors.items():
            tensor.check(name, tensor_shape(config, declared[path]), "config.json")
        first, *_ = tensors
        dtype = tensors[first].dtype
        for name, tensor in tensors.items():
            if tensor.dtype != dtype:
                differ = f"{first} is {dtype} but {name} is {tensor.dtype}"
                raise CheckpointError(f"{reader.directory}: {differ}; layers must share one dtype")
        leaves[path] = Leaf(path, declared[path]._replace(dtype=DTYPES[dtype]), tuple(tensors.values()))
    return leaves


def _check_names(reader: Reader, config: Config, stored: dict, needed: set[str]) -> None:
    where = reader.directory
    if any(name.endswith((".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv")) for name in stored):
        raise CheckpointError(f"{where}: quantised weights (AWQ, GPTQ, FP8) are not supported; use the original model")
    missing = sorted(needed - stored.keys())
    if missing:
        hint = "; should config.json say tie_word_embeddings?" if missing == ["lm_head.weight"] else ""
        raise CheckpointError(f"{where}: tensor {missing[0]} is missing{_and_more(missing)}{hint}")
    # Old versions of transformers stored these buffers; they follow from the config.
    buffers = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
    extra = sorted(name for name in stored.keys() - needed if not name.endswith(buffers))
    if extra == ["lm_head.weight"]:
        if not _same(reader, stored["lm_head.weight"][1], stored["model.embed_tokens.weight"][1]):
            raise CheckpointError(
                f"{where}: config.json ties lm_head to the embedding, but lm_head.weight differs; set "
                "tie_word_embeddings to false if the head is its own"
            )
    elif extra:
        name = stored[extra[0]][0]
        raise CheckpointError(f"{where}: tensor {name} has no place in this {config.family} model{_and_more(extra)}")


def _and_more(names: list) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _same(reader: Reader, a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape) or a.dtype not in DTYPES:
        return False
    rows, width = a.matrix
    step = max(1, (8 << 20) // (width * 4))
    one, two = (np.empty((step, width), f"u{DTYPES[a.dtype].itemsize}") for _ in range(2))
    for row in range(0, rows, step):
        n = min(step, rows - row)
        reader.read(a, row, one[:n])
        reader.read(b, row, two[:n])
        if not np.array_equal(one[:n], two[:n]):
            return False
    return True
