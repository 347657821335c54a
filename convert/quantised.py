"""The tensors of quantised Linears, as AWQ, GPTQ, compressed-tensors and block FP8 hold them, and our arrays.

Ours: dense[order[j], n] = (kernel[j, n] − zeros[g, n]) · scales[g, n], with row j in group g; `Quantised` of config.py
says more. Unsigned codes of b bits become signed: 2^(b−1) is subtracted from codes and zeros both.

awq: `qweight` [in, out/8] and `qzeros` [groups, out/8] with words along out; `scales` [groups, out].
gptq: `qweight` [in·b/32, out] with words along in; `qzeros` [groups, out·b/32] with words along out and 1 less than the
    zeros; `scales` [groups, out]; `g_idx` [in], the group of each input. gptq_v2: the same with the zeros as they are.
pack-quantized: `weight_packed` [out, ⌈in·b/32⌉] with words along in; `weight_zero_point` [⌈out·b/32⌉, groups] along
    out; `weight_scale` [out, groups]; `weight_shape` [2]; `weight_g_idx` [in].
int-quantized and float-quantized: `weight` [out, in]; `weight_scale` and `weight_zero_point` [out, 1], of a tensor [1],
    of blocks [⌈out/rows⌉, ⌈in/columns⌉].
fp8: `weight` [out, in]; `weight_scale_inv`, of blocks.

A word is an int32 with its first code in the lowest bits; AWQ's nibbles are in the order of AWQ_ORDER.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np
from qwenvl_convert.safetensors import DTYPES, STORED, Reader, Tensor

from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.families.quantisation import AWQ, BLOCK, FLOAT, GPTQ, GPTQ_V2, INT, PACKED, Scheme

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of a word's eight outputs a nibble holds
_SIGN = {4: np.uint32(0x88888888), 8: np.uint32(0x80808080)}
_SIGNED = {4: np.dtype(ml_dtypes.int4), 8: np.dtype(np.int8)}
_FLOATS = tuple(DTYPES)
# Tensors beside a Linear's that its weights do not depend on; they are kept for the way back.
BESIDE = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "weight_shape")


class Part(NamedTuple):
    """A tensor of a quantised Linear: our array's name (None: it is only checked), its dtypes and its shapes."""

    leaf: str | None
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    needed: bool = True


def parts(scheme: Scheme, n_in: int, n_out: int) -> dict[str, Part]:
    """The tensors of a Linear by the ends of their names."""
    b, groups = scheme.bits, -(-n_in // (scheme.group or n_in))
    words = lambda n: -(-n * b // 32)  # noqa: E731
    index = Part("order" if scheme.order else None, ("I32",), ((n_in,),))
    if scheme.format == AWQ:
        return {
            "qweight": Part("kernel", ("I32",), ((n_in, words(n_out)),)),
            "qzeros": Part("zeros", ("I32",), ((groups, words(n_out)),)),
            "scales": Part("scales", _FLOATS, ((groups, n_out),)),
        }
    if scheme.format in (GPTQ, GPTQ_V2):
        return {
            "qweight": Part("kernel", ("I32",), ((words(n_in), n_out),)),
            "qzeros": Part("zeros" if scheme.zeros else None, ("I32",), ((groups, words(n_out)),)),
            "scales": Part("scales", _FLOATS, ((groups, n_out),)),
            "g_idx": index,
        }
    if scheme.format == PACKED:
        out = {
            "weight_packed": Part("kernel", ("I32",), ((n_out, words(n_in)),)),
            "weight_scale": Part("scales", _FLOATS, ((n_out, groups),)),
            "weight_shape": Part(None, ("I64", "I32"), ((2,),)),
            "weight_zero_point": Part("zeros", ("I32",), ((words(n_out), groups),)),
            "weight_g_idx": index,
        }
        left_out = () if scheme.zeros else ("weight_zero_point",)
        left_out += () if scheme.order else ("weight_g_idx",)
        return {name: part for name, part in out.items() if name not in left_out}
    scale, blocks = "weight_scale", -(-n_out // scheme.outputs) if scheme.outputs else 0
    shapes = ((blocks, groups),) if scheme.outputs else ((), (1,), (1, 1))
    if scheme.outputs == 1 and groups == 1:
        shapes += ((n_out,),)
    if scheme.format == BLOCK:
        scale = "weight_scale_inv"
    out = {
        "weight": Part("kernel", ("I8" if scheme.format == INT else "F8_E4M3",), ((n_out, n_in),)),
        scale: Part("scales", _FLOATS, shapes),
    }
    if scheme.zeros:
        out["weight_zero_point"] = Part("zeros", ("I8",), shapes)
    return out


class Packed(NamedTuple):
    """The tensors of one quantised Linear of one layer, by the ends of their names."""

    module: str
    scheme: Scheme
    shape: tuple[int, int]  # in, out
    tensors: dict[str, Tensor]

    def tensor(self, leaf: str) -> Tensor:
        return self.tensors[self.suffix(leaf)]

    def suffix(self, leaf: str) -> str:
        return next(name for name, part in parts(self.scheme, *self.shape).items() if part.leaf == leaf)


def unpack(words: np.ndarray, bits: int, axis: int = -1, order: tuple[int, ...] | None = None) -> np.ndarray:
    """int32 words → signed codes of 4 or 8 bits, 32/bits times as many along the axis (the last one or 0).

    order: which code of a word its n-th bits hold, if not the n-th.
    """
    per = 32 // bits
    flat = np.ascontiguousarray(words).view(np.uint32) ^ _SIGN[bits]
    octets = flat.view(np.uint8).reshape(*words.shape, 4)
    shape = (*words.shape, per) if axis == -1 else (words.shape[0], per, *words.shape[1:])
    out = np.empty(shape, np.uint8)
    for place, code in enumerate(order or range(per)):
        octet = octets[..., place * bits // 8]
        target = out[..., code] if axis == -1 else out[:, code]
        target[...] = octet if bits == 8 else (octet >> 4 * (place % 2)) & 15
    joined = (*words.shape[:-1], -1) if axis == -1 else (-1, *words.shape[1:])
    return out.reshape(joined).view(_SIGNED[bits])


def pack(codes: np.ndarray, bits: int, axis: int = -1, order: tuple[int, ...] | None = None) -> np.ndarray:
    """The inverse of `unpack`; what a last word lacks is filled with zero bits."""
    per, codes = 32 // bits, codes.view(np.uint8)
    if axis == 0:
        return np.ascontiguousarray(pack(codes.T, bits, order=order).T)
    lacking = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)]
    codes = np.pad(codes, lacking, constant_values=1 << (bits - 1)).reshape(*codes.shape[:-1], -1, per)
    words = np.zeros(codes.shape[:-1], np.uint32)
    for place, code in enumerate(order or range(per)):
        words |= (codes[..., code].astype(np.uint32) & ((1 << bits) - 1)) << np.uint32(bits * place)
    return (words ^ _SIGN[bits]).view(np.int32)


def _add(codes: np.ndarray, n: int) -> np.ndarray:
    """Codes plus n, of as many bits as they have."""
    wide = codes.view(np.uint8) + np.uint8(n % 256)
    return (wide & (15 if codes.dtype == _SIGNED[4] else 255)).view(codes.dtype)


def read(reader: Reader, packed: Packed, leaf: str, rows: slice, columns: slice, out: np.ndarray) -> None:
    """Fills `out` with [rows, columns] of one of our arrays ("kernel", "scales", "zeros"), or of "dense" in float32."""
    if leaf == "dense":
        out[...] = _dense(reader, packed, rows, columns)
    elif leaf == "order":
        out[...] = _index(reader, packed).argsort(kind="stable")[rows]
    elif leaf == "scales":
        out[...] = _scales(reader, packed, "scales", rows, columns)
    elif leaf == "zeros":
        out[...] = _zeros(reader, packed, rows, columns)
    elif packed.scheme.order:
        order = _index(reader, packed).argsort(kind="stable")[rows]
        out[...] = _codes(reader, packed, slice(0, packed.shape[0]), columns)[order]
    elif packed.scheme.format in (INT, FLOAT, BLOCK):
        reader.read_part(packed.tensor("kernel"), columns, rows, True, out)
    else:
        out[...] = _codes(reader, packed, rows, columns)


def along_rows(scheme: Scheme) -> bool:
    """Do the rows of the kernel's tensor hold inputs? Otherwise they hold outputs."""
    return scheme.format in (AWQ, GPTQ, GPTQ_V2)


def _words(cut: slice, bits: int) -> tuple[slice, slice]:
    """The words that hold some codes, and where those are among the words' codes."""
    per = 32 // bits
    first = cut.start // per
    return slice(first, -(-cut.stop // per)), slice(cut.start - first * per, cut.stop - first * per)


def _codes(reader: Reader, packed: Packed, rows: slice, columns: slice) -> np.ndarray:
    """The kernel's codes [rows, columns] in the order of the file."""
    scheme, tensor = packed.scheme, packed.tensor("kernel")
    if scheme.format == AWQ:
        words, cut = _words(columns, 4)
        return unpack(reader.part(tensor, rows, words), 4, order=AWQ_ORDER)[:, cut]
    if scheme.format in (GPTQ, GPTQ_V2):
        words, cut = _words(rows, scheme.bits)
        return unpack(reader.part(tensor, words, columns), scheme.bits, axis=0)[cut]
    if scheme.format == PACKED:
        words, cut = _words(rows, scheme.bits)
        return unpack(reader.part(tensor, columns, words), scheme.bits)[:, cut].T
    return reader.part(tensor, columns, rows).T


def _scales(reader: Reader, packed: Packed, leaf: str, rows: slice, columns: slice) -> np.ndarray:
    """Scales, or zeros that are stored like them, [rows, columns]."""
    scheme, tensor = packed.scheme, packed.tensor(leaf)
    if along_rows(scheme):
        return reader.part(tensor, rows, columns)
    if not scheme.outputs:
        return np.broadcast_to(reader.part(tensor, slice(0, 1), slice(0, 1)), (1, columns.stop - columns.start))
    n = scheme.outputs
    blocks = slice(columns.start // n, -(-columns.stop // n))
    part = reader.part(tensor, blocks, rows).T.repeat(n, 1) if n > 1 else reader.part(tensor, columns, rows).T
    return part[:, columns.start - blocks.start * n :][:, : columns.stop - columns.start]


def _zeros(reader: Reader, packed: Packed, rows: slice, columns: slice) -> np.ndarray:
    scheme, tensor = packed.scheme, packed.tensor("zeros")
    if scheme.format == INT:
        return _scales(reader, packed, "zeros", rows, columns)
    words, cut = _words(columns, scheme.bits)
    if scheme.format == PACKED:
        return unpack(reader.part(tensor, words, rows), scheme.bits, axis=0)[cut].T
    order = AWQ_ORDER if scheme.format == AWQ else None
    zeros = unpack(reader.part(tensor, rows, words), scheme.bits, order=order)[:, cut]
    return _add(zeros, 1) if scheme.format == GPTQ else zeros


def _index(reader: Reader, packed: Packed) -> np.ndarray:
    """The group of each input."""
    return reader.whole(packed.tensor("order"))


def _dense(reader: Reader, packed: Packed, rows: slice, columns: slice) -> np.ndarray:
    """The weights [rows, columns] in float32, exactly: a code times a scale has fewer bits."""
    scheme, group = packed.scheme, packed.scheme.group or packed.shape[0]
    dense = _codes(reader, packed, rows, columns).astype(np.float32)
    if scheme.order:
        groups = _index(reader, packed)[rows]
        some = slice(0, packed.shape[0] // group)
    else:
        some = slice(rows.start // group, -(-rows.stop // group))
        groups = np.arange(rows.start, rows.stop) // group - some.start
    if scheme.zeros:
        dense -= _zeros(reader, packed, some, columns).astype(np.float32)[groups]
    dense *= _scales(reader, packed, "scales", some, columns).astype(np.float32)[groups]
    return dense


def check(reader: Reader, packed: Packed) -> None:
    """Raises CheckpointError if a tensor has another dtype or shape than quantization_config says, or bad contents.

    The contents are those of which ours do not depend: the index of groups, the zeros of symmetric GPTQ, the shape.
    """
    scheme, (n_in, n_out) = packed.scheme, packed.shape
    per = 32 // scheme.bits
    uneven = {AWQ: n_out % 8, GPTQ: n_in % per or n_out % per, GPTQ_V2: n_in % per or n_out % per}
    if uneven.get(scheme.format):
        raise CheckpointError(
            f"{reader.directory}: {packed.module} is {n_in} × {n_out}, which {scheme.format} cannot pack"
        )
    for suffix, part in parts(scheme, n_in, n_out).items():
        tensor, name = packed.tensors[suffix], f"{packed.module}.{suffix}"
        says = f"quantization_config ({scheme}) calls for"
        if tensor.dtype not in part.dtypes:
            raise CheckpointError(f"{tensor.file}: tensor {name} is {tensor.dtype}; {says} {' or '.join(part.dtypes)}")
        if tensor.shape not in part.shapes:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}; {says} {list(part.shapes[0])}"
            )
        if suffix == "weight_shape" and reader.whole(tensor).tolist() != [n_out, n_in]:
            raise CheckpointError(f"{tensor.file}: tensor {name} does not say {n_out} × {n_in}, as config.json does")
        if suffix in ("g_idx", "weight_g_idx"):
            _check_index(reader, packed, tensor, name)
        if suffix == "qzeros" and part.leaf is None:
            if np.any(reader.whole(tensor) != _middle(scheme)):
                raise CheckpointError(
                    f"{tensor.file}: tensor {name} is not symmetric, but quantization_config.sym is true"
                )


def _check_index(reader: Reader, packed: Packed, tensor: Tensor, name: str) -> None:
    n_in, group = packed.shape[0], packed.scheme.group or packed.shape[0]
    index = reader.whole(tensor)
    if not packed.scheme.order and np.any(index != np.arange(n_in) // group):
        raise CheckpointError(
            f"{tensor.file}: tensor {name} reorders inputs, but quantization_config.desc_act is false"
        )
    outside = index.min() < 0 or index.max() >= n_in // group
    if outside or np.any(np.bincount(index, minlength=n_in // group) != group):
        raise CheckpointError(f"{tensor.file}: tensor {name} does not put {group} inputs into each group")


def _middle(scheme: Scheme) -> np.int32:
    """A word of the zeros of symmetric GPTQ."""
    word = {4: 0x77777777, 8: 0x7F7F7F7F} if scheme.format == GPTQ else {4: 0x88888888, 8: 0x80808080}
    return np.uint32(word[scheme.bits]).view(np.int32)


def encode(scheme: Scheme, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A Linear's tensors, by the ends of their names, of our arrays: the inverse of `read`."""
    kernel, scales = arrays["kernel"], arrays["scales"]
    bits, (n_in, n_out) = scheme.bits, kernel.shape
    index = np.arange(n_in, dtype=np.int32) // np.int32(scheme.group or n_in)
    if scheme.order:
        order, grouped = arrays["order"], index
        index = np.empty_like(grouped)
        index[order] = grouped
        kernel = kernel[np.argsort(order)]
    if scheme.format == AWQ:
        zeros = pack(arrays["zeros"], 4, order=AWQ_ORDER)
        return {"qweight": pack(kernel, 4, order=AWQ_ORDER), "qzeros": zeros, "scales": scales}
    if scheme.format in (GPTQ, GPTQ_V2):
        if scheme.zeros:
            zeros = pack(_add(arrays["zeros"], -1) if scheme.format == GPTQ else arrays["zeros"], bits)
        else:
            zeros = np.full((len(scales), n_out * bits // 32), _middle(scheme))
        return {"qweight": pack(kernel, bits, axis=0), "qzeros": zeros, "scales": scales, "g_idx": index}
    if scheme.format == PACKED:
        out = {"weight_packed": pack(kernel.T, bits), "weight_scale": scales.T}
        out["weight_shape"] = np.array([n_out, n_in], np.int64)
        if scheme.zeros:
            out["weight_zero_point"] = pack(arrays["zeros"].T, bits, axis=0)
        return out | ({"weight_g_idx": index} if scheme.order else {})
    scale, stored = "weight_scale_inv" if scheme.format == BLOCK else "weight_scale", _stored(scheme, scales)
    zeros = {"weight_zero_point": _stored(scheme, arrays["zeros"])} if scheme.zeros else {}
    return {"weight": kernel.T, scale: stored} | zeros


def _stored(scheme: Scheme, scales: np.ndarray) -> np.ndarray:
    return scales[0, :1] if not scheme.outputs else scales[:, :: scheme.outputs].T


def encoded(scheme: Scheme, n_in: int, n_out: int, dtypes: dict[str, np.dtype]) -> dict[str, tuple]:
    """(dtype, shape) of what `encode` gives; dtypes: of our arrays."""
    out = {}
    for suffix, part in parts(scheme, n_in, n_out).items():
        dtype = dtypes["scales"] if part.leaf == "scales" else STORED[part.dtypes[0]]
        out[suffix] = dtype, (1,) if part.leaf in ("scales", "zeros") and not scheme.outputs else part.shapes[0]
    return out
