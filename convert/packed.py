"""Which tensors of a Hugging Face checkpoint are quantised Linears, and what parameters they become.

Which Linear is quantised is told by its tensors; `quantization_config` must agree.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from qwenvl_convert import quantised
from qwenvl_convert.names import core, tensor_names, tensor_shape
from qwenvl_convert.quantised import Packed
from qwenvl_convert.safetensors import DTYPES, STORED, Reader, Tensor

from qwenvl_jax.config import Config, Quantised, read_json
from qwenvl_jax.errors import CheckpointError, InputError
from qwenvl_jax.families.quantisation import SUFFIXES, Quantisation, form_of, from_dict, is_packed
from qwenvl_jax.params.place import Leaf
from qwenvl_jax.params.specs import Spec, specs

CODES = 8 << 20  # decoded at once by one thread
# Tensors that these and other methods add.
QUANTISED = (*SUFFIXES, ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map", ".SCB")


class Match(NamedTuple):
    """leaves: path of a kernel → the parameters in its place, by path.

    tensors: name of a kernel's tensor on the hub → the names of those in its place.
    beside: tensors of quantised Linears on which no parameter depends, or which `encode` would write in another form,
        by their names on the hub. Converting back needs them.
    """

    leaves: dict[str, dict[str, Leaf]]
    tensors: dict[str, list[str]]
    beside: dict[str, Tensor]

    def names(self, path: str, group: tuple[str, ...]) -> list[str]:
        """The tensors of a parameter; group: those that it has on the hub if it is not quantised."""
        return [name for hub in group for name in self.tensors.get(hub, [hub])]


def match(reader: Reader, config: Config, stored: dict[str, tuple[str, Tensor]]) -> Match:
    """Finds the quantised Linears of a checkpoint and checks their tensors. stored: by `core` of their names.

    Raises CheckpointError if tensors, `quantization_config` and `config.quantised` contradict each other.
    """
    how, out = read_quantisation(reader), Match({}, {}, {})
    odd = next((name for key, (name, _) in stored.items() if key.endswith(QUANTISED) or ".quant_state." in key), None)
    if odd and how is None:
        raise CheckpointError(
            f"{reader.directory}: {odd} is a quantised tensor, but config.json has no quantization_config; copy the "
            "whole config.json of the checkpoint"
        )
    if how is None:
        return out
    dense, held = specs(config.replace(quantised=())), dict(config.quantised)
    for path, group in tensor_names(config).items():
        if dense[path].role != "linear":
            continue
        linear, shape = path.removesuffix("/kernel"), dense[path].shape[-2:]
        layers = [_layer(reader, how, hub, shape, stored) for hub in group]
        form = held.get(linear)
        for hub, one in zip(group, layers, strict=True):
            if form is not None and (one is None or not _same(form_of(one.scheme), form)):
                said = one.scheme if one else "as it is"
                raise CheckpointError(
                    f"{reader.directory}: {hub} is held {said}, unlike the other layers' or the config's"
                )
            if one is not None:
                out.tensors[hub] = [f"{one.module}.{suffix}" for suffix in one.tensors]
                out.beside.update(_beside(reader, one, f"{linear}/bias" in dense, stored))
        if any(layers):
            one_by_one = [
                one or _plain(config, dense[path], hub, stored) for hub, one in zip(group, layers, strict=True)
            ]
            out.leaves[path] = _leaves(config, path, dense[path], tuple(one_by_one))
    cache = (".self_attn.q_scale", ".self_attn.k_scale", ".self_attn.v_scale")  # of a quantised KV cache: not used here
    out.beside.update({f"model.{key}": tensor for key, (_, tensor) in stored.items() if key.endswith(cache)})
    for name, tensor in out.beside.items():
        if tensor.dtype not in STORED:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} is {tensor.dtype}; only {', '.join(STORED)} are supported"
            )
    return out


def read_quantisation(reader: Reader) -> Quantisation | None:
    file = reader.directory / "config.json"
    try:
        return from_dict(read_json(file, missing={}))
    except InputError as e:
        raise e if str(file) in str(e) else CheckpointError(f"{file}: {e}") from e


def _same(a: Quantised, b: Quantised) -> bool:
    return replace(a, activations=b.activations) == b


def _layer(reader: Reader, how: Quantisation, hub: str, shape: tuple[int, int], stored: dict) -> Packed | None:
    module, where = hub.removesuffix(".weight"), reader.directory
    (said, scheme), has = how.lookup(module), is_packed(module, stored)
    if not (has if said is None else said):
        if has:
            raise CheckpointError(f"{where}: {module} has quantised tensors, but quantization_config leaves it out")
        return None
    wanted, plain = quantised.parts(scheme, *shape), stored.get(core(hub))
    if plain and ("weight" not in wanted or plain[1].dtype in DTYPES):
        is_not = f"{module} is quantised ({scheme}), but {plain[0]} is {plain[1].dtype}"
        raise CheckpointError(f"{where}: quantization_config says that {is_not}")
    tensors = {}
    for suffix in wanted:
        found = stored.get(core(f"{module}.{suffix}"))
        if found is None:
            raise CheckpointError(f"{where}: tensor {module}.{suffix} is missing; {module} is {scheme}")
        tensors[suffix] = found[1]
    one = Packed(module, scheme, shape, tensors)
    quantised.check(reader, one)
    return one


def _beside(reader: Reader, one: Packed, has_bias: bool, stored: dict) -> dict[str, Tensor]:
    out, zeros = {}, ("weight_zero_point",) if has_bias else ("weight_zero_point", "bias")
    for suffix in (*zeros, *quantised.BESIDE):
        found = stored.get(core(f"{one.module}.{suffix}"))
        if found is None or suffix in one.tensors:
            continue
        if suffix in zeros and not _is_zero(reader, found[1]):
            what = "a bias, which this model has not" if suffix == "bias" else "zero points, but is symmetric"
            raise CheckpointError(f"{reader.directory}: {one.module} has {what} ({found[0]} is not zero)")
        out[f"{one.module}.{suffix}"] = found[1]
    dtypes = {"scales": STORED[one.tensor("scales").dtype]}
    for suffix, (dtype, shape) in quantised.encoded(one.scheme, *one.shape, dtypes).items():
        tensor = one.tensors[suffix]
        if (STORED[tensor.dtype], tensor.shape) != (dtype, shape):
            out[f"{one.module}.{suffix}"] = tensor
    return out


def _is_zero(reader: Reader, tensor: Tensor) -> bool:
    return tensor.dtype in STORED and not reader.whole(tensor).astype(np.float32).any()


def _plain(config: Config, spec: Spec, hub: str, stored: dict) -> Tensor:
    """The tensor of a layer that is not quantised, in a stack that has quantised ones."""
    if core(hub) not in stored:
        raise CheckpointError(f"tensor {hub} is missing")
    name, tensor = stored[core(hub)]
    tensor.check(name, tensor_shape(config, spec), "config.json")
    return tensor


def _leaves(config: Config, path: str, kernel: Spec, layers: tuple) -> dict[str, Leaf]:
    linear = path.removesuffix("/kernel")
    if linear not in dict(config.quantised):
        return {path: Leaf(path, kernel, layers)}
    out, declared = {}, specs(config)
    for name in ("kernel", "scales", "zeros", "order"):
        spec = declared.get(f"{linear}/{name}")
        if spec is not None:
            if name == "scales":
                dtypes = {DTYPES[one.tensor(name).dtype] for one in layers}
                spec = spec._replace(dtype=dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32))
            out[f"{linear}/{name}"] = Leaf(f"{linear}/{name}", spec, layers)
    return out


def pieces(leaf: Leaf, index: tuple[slice, ...], out: np.ndarray):
    """Yields the arguments of `quantised.read`, after the reader, that fill the part `index` of a parameter, `out`."""
    layers, inner = (range(index[0].start, index[0].stop), index[1:]) if leaf.spec.stacked else ([0], index)
    rows, columns = (*inner, slice(0, 1))[:2]
    name = leaf.path.rpartition("/")[2]
    name = "dense" if name == "kernel" and leaf.dtype in DTYPES.values() else name
    for layer, part in zip(layers, out if leaf.spec.stacked else [out], strict=True):
        one = leaf.tensors[layer]
        if not isinstance(one, Packed):
            continue
        if name not in ("kernel", "dense") or (one.scheme.order and name == "kernel"):
            yield one, name, rows, columns, part
        elif quantised.along_rows(one.scheme):
            for cut in _cuts(rows, columns.stop - columns.start):
                yield one, name, cut, columns, part[cut.start - rows.start : cut.stop - rows.start]
        else:
            for cut in _cuts(columns, rows.stop - rows.start):
                yield one, name, rows, cut, part[:, cut.start - columns.start : cut.stop - columns.start]


def _cuts(whole: slice, width: int) -> list[slice]:
    """Cuts of about CODES codes, each at a multiple of 256: at words, and at the groups that are usual."""
    step = max(256, CODES // max(width, 1) // 256 * 256)
    starts = [whole.start, *range((whole.start // 256 + 1) * 256, whole.stop, step)]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], whole.stop], strict=True)]
