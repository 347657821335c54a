"""Hugging Face checkpoints opened as parameters, without ever holding two copies.

Every tensor of the files is used once and every parameter is made once, or an `InputError` names it.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from qwenvl_convert.names import hub_name, tensor_names, tensor_shape
from qwenvl_convert.safetensors import DTYPES, Reader, Tensor

from qwenvl_jax.config import Config
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.params.place import Leaf, aligned_empty, to_devices
from qwenvl_jax.params.specs import specs


class HfSource:
    """A Hugging Face checkpoint opened as parameters. `leaves`: path → Leaf, all checked against the config."""

    def __init__(self, directory, config: Config):
        self._reader = Reader(directory)
        try:
            self.leaves = _match(self._reader, config)
        except BaseException:
            self._reader.close()
            raise
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def read(self, leaf: Leaf, index: tuple[slice, ...], dtype=None, bar=None) -> np.ndarray:
        """The part `index` (contiguous slices, one a dimension) of a parameter, in a new array; `bar` counts bytes.

        The work is cut into pieces of a few tens of megabytes that a pool of threads reads, transposes and casts.
        """
        index = [slice(*i.indices(n)[:2]) for i, n in zip(index, leaf.shape, strict=True)]
        dtype = leaf.dtype if dtype is None else dtype
        out = aligned_empty([i.stop - i.start for i in index], dtype)
        stacked, transpose = leaf.spec.stacked, leaf.spec.transposed
        layers = range(index[0].start, index[0].stop) if stacked else [0]
        inner = index[1:] if stacked else index
        columns, rows = (inner[0], inner[1]) if transpose else (slice(0, 1), inner[0])
        if not transpose and len(inner) == 2:
            columns = inner[1]
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

    Each process reads what its own devices hold, and host memory beside the devices' stays within one
    parameter's shard on one device plus some megabytes.
    Raises InputError for damaged files and for any tensor that is missing, unexpected or of another shape or dtype.
    """
    with HfSource(directory, config) as source:
        return to_devices(source, shardings, dtype, progress)


def _match(reader: Reader, config: Config) -> dict[str, Leaf]:
    held = {}
    for name, tensor in reader.tensors.items():
        hub = hub_name(name)
        if hub in held:
            raise CheckpointError(f"{reader.directory}: tensor {hub} is stored twice, under two spellings")
        held[hub] = (name, tensor)
    declared, names = specs(config), tensor_names(config)
    needed = {name for group in names.values() for name in group}
    _check_names(reader, config, held, needed)
    leaves = {}
    for path, group in names.items():
        want = tensor_shape(config, declared[path])
        dtypes = {}
        for hub in group:
            name, tensor = held[hub]
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name} is {tensor.dtype}; only {', '.join(DTYPES)} are supported"
                )
            if tensor.shape != want:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}; config.json calls for {list(want)}"
                )
            dtypes.setdefault(tensor.dtype, name)
        if len(dtypes) > 1:
            (a, first), (b, second), *_ = dtypes.items()
            raise CheckpointError(
                f"{reader.directory}: {first} is {a} but {second} is {b}; layers must share one dtype"
            )
        tensors = tuple(held[hub][1] for hub in group)
        leaves[path] = Leaf(path, declared[path]._replace(dtype=DTYPES[tensors[0].dtype]), tensors)
    return leaves


def _check_names(reader: Reader, config: Config, held: dict, needed: set[str]) -> None:
    where = reader.directory
    if any(name.endswith((".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv")) for name in held):
        raise CheckpointError(
            f"{where}: the weights are quantised (AWQ, GPTQ or FP8), which is not supported; use the original model"
        )
    missing = sorted(needed - held.keys())
    if missing:
        hint = "; should config.json say tie_word_embeddings?" if missing == ["lm_head.weight"] else ""
        raise CheckpointError(f"{where}: tensor {missing[0]} is missing{_and_more(missing)}{hint}")
    # Buffers that old versions of transformers stored; they follow from the config.
    extra = sorted(
        n for n in held.keys() - needed if not n.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq"))
    )
    if extra == ["lm_head.weight"]:
        if not _same(reader, held["lm_head.weight"][1], held["model.embed_tokens.weight"][1]):
            raise CheckpointError(
                f"{where}: config.json ties lm_head to the embedding, but lm_head.weight differs from it; "
                "set tie_word_embeddings to false if the head is its own"
            )
    elif extra:
        raise CheckpointError(
            f"{where}: tensor {held[extra[0]][0]} has no place in a {config.family} model of this config"
            f"{_and_more(extra)}"
        )


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
