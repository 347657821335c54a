"""Hugging Face checkpoints opened as parameters, with one copy in memory, and their model cards.

Every tensor is used exactly once and every parameter is made exactly once; otherwise an `InputError` names it.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from qwenvl_convert import packed, quantised
from qwenvl_convert.names import core, tensor_names, tensor_shape
from qwenvl_convert.safetensors import DTYPES, Reader, Tensor

from qwenvl_jax.config import Config
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.params.place import Leaf, Source, to_devices
from qwenvl_jax.params.specs import Spec, specs
from qwenvl_jax.stores import HUB_ID


class HfSource(Source, contextlib.AbstractContextManager):
    """A Hugging Face checkpoint opened as parameters, checked against the config. Use it as a context manager.

    Linears that the files hold quantised and the config does not are dequantised.
    beside: tensors of quantised Linears on which no parameter depends, by name (`Match` of convert/packed.py).
    """

    def __init__(self, directory, config: Config):
        self.reader = Reader(directory)
        try:
            self.leaves, self.beside = _match(self.reader, config)
        except BaseException:
            self.reader.close()
            raise
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def __exit__(self, *_):
        self._pool.shutdown(cancel_futures=True)
        self.reader.close()

    def read(self, leaf: Leaf, index: tuple[slice, ...], dtype=None, bar=None) -> np.ndarray:
        """See `Source.read`. A pool of threads reads, transposes and casts pieces of a few tens of megabytes."""
        out = self.empty(leaf, index, dtype)
        jobs = [(self.reader.read_part, job) for job in pieces(leaf.spec, dict(enumerate(leaf.tensors)), index, out)]
        jobs += [(quantised.read, (self.reader, *job)) for job in packed.pieces(leaf, index, out)]
        for (_, job), _ in zip(jobs, self._pool.map(lambda j: j[0](*j[1]), jobs), strict=True):
            if bar is not None:
                bar.update(job[-1].size * leaf.dtype.itemsize)
        return out


def pieces(spec: Spec, tensors: dict[int, Tensor], index: tuple[slice, ...], out: np.ndarray):
    """Yields the arguments of `Reader.read_part` that fill the part `index` of a parameter, `out`, from its tensors.

    tensors: by layer, 0 if layers are not stacked; what has no tensor, or a quantised one, is left as it is.
    """
    layers = range(index[0].start, index[0].stop) if spec.stacked else [0]
    inner = index[1:] if spec.stacked else index
    rows, columns = inner[::-1] if spec.transposed else (*inner, slice(0, 1))[:2]
    for layer, part in zip(layers, out if spec.stacked else [out], strict=True):
        tensor = tensors.get(layer)
        if not isinstance(tensor, Tensor):
            continue
        part = part[:, None] if part.ndim == 1 else part
        width = tensor.matrix[1] * DTYPES[tensor.dtype].itemsize
        step = max(256, (32 << 20) // width // 256 * 256)
        for row in range(rows.start, rows.stop, step):
            stop = min(row + step, rows.stop)
            cut = slice(row - rows.start, stop - rows.start)
            target = part[:, cut] if spec.transposed else part[cut]
            yield tensor, slice(row, stop), columns, spec.transposed, target


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


def _match(reader: Reader, config: Config) -> tuple[dict[str, Leaf], dict[str, Tensor]]:
    stored: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in reader.tensors.items():
        key = core(name)
        if key in stored:
            both = f"{stored[key][0]} and {name}"
            raise CheckpointError(f"{reader.directory}: a tensor is stored twice, under two spellings ({both})")
        stored[key] = (name, tensor)
    declared, names = specs(config), tensor_names(config)
    match = packed.match(reader, config, stored)
    needed = {core(name): name for path, group in names.items() for name in match.names(path, group)}
    _check_names(reader, config, stored, needed, match)
    leaves = {}
    for path, group in names.items():
        if path in match.leaves:
            leaves |= match.leaves[path]
            continue
        tensors = dict(stored[core(hub)] for hub in match.names(path, group))
        for name, tensor in tensors.items():
            tensor.check(name, tensor_shape(config, declared[path]), "config.json")
        # Some savers mix dtypes; the parameter gets one that holds every layer exactly.
        dtypes = {DTYPES[tensor.dtype] for tensor in tensors.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        leaves[path] = Leaf(path, declared[path]._replace(dtype=dtype), tuple(tensors.values()))
    return leaves, match.beside


def _check_names(reader: Reader, config: Config, stored: dict, needed: dict[str, str], match: packed.Match) -> None:
    """needed: `core` of each tensor's name → its name on the hub."""
    where = reader.directory
    if lora := next((name for name, _ in stored.values() if ".lora_" in name), None):
        raise CheckpointError(
            f"{where}: tensor {lora} has no place in a checkpoint: an adapter was saved inside of its model; save "
            "what PEFT's merge_and_unload gives, or the adapter alone (PeftModel.save_pretrained)"
        )
    missing = sorted(needed[key] for key in needed.keys() - stored.keys())
    if missing:
        hint = "; should config.json say tie_word_embeddings?" if missing == ["lm_head.weight"] else ""
        raise CheckpointError(f"{where}: tensor {missing[0]} is missing{_and_more(missing)}{hint}")
    # Old versions of transformers stored these buffers; they follow from the config.
    unused = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
    beside = {core(name) for name in match.beside}
    extra = sorted(name for name in stored.keys() - needed - beside if not name.endswith(unused))
    if extra == ["lm_head.weight"]:
        if not _same(reader, stored["lm_head.weight"][1], stored["embed_tokens.weight"][1]):
            raise CheckpointError(
                f"{where}: config.json ties lm_head to the embedding, but lm_head.weight differs; set "
                "tie_word_embeddings to false if the head is its own"
            )
    elif extra:
        name = stored[extra[0]][0]
        if name.endswith(packed.QUANTISED):
            raise CheckpointError(f"{where}: tensor {name}: only the blocks' and the merger's Linears may be quantised")
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


def card(base_name, library: str = "transformers") -> str:
    """The model card (README.md) of a model or an adapter that was trained from a base model."""
    # The hub takes an id only; a directory's name would be refused when the card is uploaded.
    base = str(base_name)
    known = [f"base_model: {base}"] if HUB_ID.fullmatch(base) else []
    lines = [*known, f"library_name: {library}", "pipeline_tag: image-text-to-text", "tags:", "- qwenvl_jax"]
    what = "A LoRA adapter for" if library == "peft" else "A model made from"
    return "\n".join(["---", *lines, "---", "", f"{what} `{base}`, written by qwenvl_jax.", ""])
