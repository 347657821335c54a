"""Tiny quantised checkpoints, packed here by the documented rules, one code at a time, and what they stand for."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from tiny_hf import write_hf

GROUP = 16
BLOCK = (16, 16)
AWQ_NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # the output of a word that nibble i holds
DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


DTYPES = {
    **{"F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "I64": "i8", "I32": "i4", "I8": "i1"},
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}


def gptq(bits=4, sym=True, desc_act=False, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": sym, "desc_act": desc_act, **more}


def compressed(form, weights, inputs=None, ignore=("lm_head", "re:.*visual.*")):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    how = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return how | {"ignore": list(ignore), "kv_cache_scheme": None, "quantization_status": "compressed"}


def args(num_bits, kind="int", strategy="channel", symmetric=True, **more):
    return {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False, **more}


TOKEN = args(8, strategy="token") | {"dynamic": True}
GROUPED = {"strategy": "group", "group_size": GROUP}
FORMATS = {
    "awq": {
        **{"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True},
        "modules_to_not_convert": ["visual"],
    },
    "gptq-int4": gptq(),
    "gptq-int8": gptq(8),
    "gptq-asymmetric": gptq(sym=False),
    "gptq-int8-asymmetric": gptq(8, sym=False),
    "gptq-desc_act": gptq(desc_act=True),
    "gptq-channel": gptq() | {"group_size": -1},
    "gptq_v2": gptq(sym=False, desc_act=True, checkpoint_format="gptq_v2"),
    "gptq_v2-int8": gptq(8, checkpoint_format="gptq_v2"),
    "w4a16": compressed("pack-quantized", args(4, **GROUPED)),
    "w4a16-channel": compressed("pack-quantized", args(4)),
    "w4a16-asymmetric": compressed("pack-quantized", args(4, symmetric=False, **GROUPED)),
    "w4a16-actorder": compressed("pack-quantized", args(4, actorder="group", **GROUPED)),
    "w4a16-weight": compressed("pack-quantized", args(4, actorder="weight", **GROUPED)),
    "w8a16": compressed("pack-quantized", args(8, symmetric=False, **GROUPED)),
    "w8a8": compressed("int-quantized", args(8), TOKEN, ["lm_head"]),
    "w8a8-asymmetric": compressed("int-quantized", args(8, symmetric=False), TOKEN, ["lm_head"]),
    "fp8-dynamic": compressed("float-quantized", args(8, "float"), TOKEN | {"type": "float"}, ["lm_head"]),
    "fp8-tensor": compressed("float-quantized", args(8, "float", "tensor"), args(8, "float", "tensor")),
    "fp8-block": compressed("float-quantized", args(8, "float", "block", block_structure=list(BLOCK))),
    "fp8": {
        **{"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"},
        "modules_to_not_convert": ["visual", "lm_head"],
    },
}


def is_quantised(kind: str, module: str) -> bool:
    """Is this a Linear that the format's files hold quantised?"""
    if module.startswith("model.layers."):
        return module.rpartition(".")[2] in DECODER
    linear = module.startswith("visual.") and not module.endswith("patch_embed.proj") and "norm" not in module
    return linear and not module.endswith("ln_q") and kind in ("w8a8", "w8a8-asymmetric", "fp8-dynamic")


def words(codes, bits: int, nibbles=None) -> np.ndarray:
    """Rows of codes → rows of int32 words, one code at a time; missing codes are zero bits."""
    per = 32 // bits
    out = np.zeros((len(codes), -(-codes.shape[1] // per)), np.int64)
    for n in range(codes.shape[1]):
        place = n % per if nibbles is None else nibbles.index(n % per)
        out[:, n // per] |= codes[:, n].astype(np.int64) << (bits * place)
    return out.astype(np.uint32).view(np.int32)


def linear(rng, kind: str, out: int, inp: int, scale_dtype=np.float16) -> tuple[dict, np.ndarray]:
    """({the end of a tensor's name: tensor}, the weight [out, in] that it stands for) of random codes."""
    how = FORMATS[kind]
    if how["quant_method"] == "compressed-tensors":
        return _compressed(rng, how, out, inp, scale_dtype)
    if how["quant_method"] == "fp8":
        return _float8(rng, out, inp, BLOCK, "weight_scale_inv", np.float32)
    bits, group = how["bits"], inp if how["group_size"] == -1 else how["group_size"]
    groups, p = inp // group, 32 // bits
    q, index = rng.integers(0, 2**bits, (inp, out)), np.arange(inp) // group
    if how.get("desc_act"):
        index = rng.permutation(index)
    z = np.full((groups, out), 2 ** (bits - 1)) if how.get("sym") else rng.integers(0, 2**bits, (groups, out))
    s = _scales(rng, (groups, out), bits).astype(scale_dtype)
    weight = ((q - z[index]) * s.astype(np.float64)[index]).astype(np.float32).T.copy()
    if how["quant_method"] == "awq":
        return {"qweight": words(q, 4, AWQ_NIBBLES), "qzeros": words(z, 4, AWQ_NIBBLES), "scales": s}, weight
    stored = z if how.get("checkpoint_format") == "gptq_v2" else (z - 1) % 2**bits
    assert inp % p == 0 and out % p == 0
    tensors = {"qweight": words(q.T, bits).T.copy(), "qzeros": words(stored, bits), "scales": s}
    return tensors | {"g_idx": index.astype(np.int32)}, weight


def _compressed(rng, how, out: int, inp: int, scale_dtype):
    form, given = how["format"], how["config_groups"]["group_0"]["weights"]
    if form == "float-quantized":
        sides = {"channel": (1, inp), "tensor": None, "block": BLOCK}[given["strategy"]]
        tensors, weight = _float8(rng, out, inp, sides, "weight_scale", scale_dtype)
        if given["strategy"] == "tensor":
            tensors["input_scale"] = np.ones(1, scale_dtype)
        return tensors, weight
    bits, group = given["num_bits"], given.get("group_size", inp)
    half, groups = 2 ** (bits - 1), inp // group
    q, index = rng.integers(-half, half, (out, inp)), np.arange(inp) // group
    if given.get("actorder") == "group":
        index = rng.permutation(index)
    z = np.zeros((out, groups), int) if given["symmetric"] else rng.integers(-half, half, (out, groups))
    s = _scales(rng, (out, groups), bits).astype(scale_dtype)
    weight = ((q - z[:, index]) * s.astype(np.float64)[:, index]).astype(np.float32)
    if form == "int-quantized":
        zero = {} if given["symmetric"] else {"weight_zero_point": z.astype(np.int8)}
        return {"weight": q.astype(np.int8), "weight_scale": s} | zero, weight
    tensors = {"weight_packed": words(q + half, bits), "weight_scale": s, "weight_shape": np.array([out, inp])}
    if not given["symmetric"]:
        tensors["weight_zero_point"] = words((z + half).T, bits).T.copy()
    return tensors | ({"weight_g_idx": index.astype(np.int32)} if given.get("actorder") == "group" else {}), weight


def _float8(rng, out: int, inp: int, sides, name: str, dtype):
    q = (4 * rng.standard_normal((out, inp))).astype(ml_dtypes.float8_e4m3fn)
    if sides is None:
        s = _scales(rng, (1,)).astype(dtype)
        return {"weight": q, name: s}, q.astype(np.float32) * s.astype(np.float32)
    rows, columns = sides
    s = _scales(rng, (-(-out // rows), -(-inp // columns))).astype(dtype)
    whole = s.astype(np.float32).repeat(rows, 0).repeat(columns, 1)[:out, :inp]
    return {"weight": q, name: s}, q.astype(np.float32) * whole


def _scales(rng, shape, bits: int = 4):
    """Weights of about 0.1, as the tiny models have them."""
    return rng.uniform(0.2, 1, shape) * 0.24 / 2 ** (bits - 1)


def quantise(kind: str, tensors: dict, seed: int = 0, chosen=None) -> tuple[dict, dict]:
    """(the tensors of a checkpoint in this format, the weights that they stand for) with random quantised Linears.

    tensors: of a plain checkpoint. chosen: module → is it quantised? None: the format's own choice.
    """
    rng, packed, dense = np.random.default_rng(seed), {}, {}
    for name, x in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and (chosen or (lambda m: is_quantised(kind, m)))(module):
            more, dense[name] = linear(rng, kind, *x.shape)
            packed |= {f"{module}.{suffix}": value for suffix, value in more.items()}
        else:
            packed[name] = dense[name] = x
    return packed, dense


def stored(directory) -> dict[str, np.ndarray]:
    """Every tensor of a directory's safetensors files; the library's reader for numpy has no float8."""
    out = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        data = file.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (begin + n for n in entry["data_offsets"])
                out[name] = np.frombuffer(data[start:stop], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return out


def write_quantised(directory, config, kind: str, tensors: dict, how: dict | None = None, **more) -> Path:
    """Writes the tensors of `quantise` with their config.json."""
    path = write_hf(directory, config.replace(quantised=()), tensors, **more)
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(data | {"quantization_config": FORMATS[kind] if how is None else how}))
    return path


def assert_same_as_reference(kind: str, decompress) -> None:
    """Does `decompress`, of a Linear's torch tensors, give the weights, element for element?

    The reference multiplies in the dtype of the scales, so ours are rounded to it.
    """
    import torch

    meant = {2: torch.bfloat16, 1: torch.float8_e4m3fn}
    rng = np.random.default_rng(1)
    for out, inp in ((48, 32), (24, 80), (72, 48), (8, 16)):
        for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
            tensors, weight = linear(rng, kind, out, inp, dtype)
            theirs = {}
            for name, x in tensors.items():
                if x.dtype.kind in "fiu":
                    theirs[name] = torch.from_numpy(np.ascontiguousarray(x))
                else:
                    theirs[name] = torch.from_numpy(x.view(f"i{x.dtype.itemsize}").copy()).view(meant[x.dtype.itemsize])
            want = decompress(theirs).float().numpy()
            np.testing.assert_array_equal(weight.astype(dtype).astype(np.float32), want, err_msg=f"{out} × {inp}")
