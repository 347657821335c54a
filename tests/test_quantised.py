"""Quantised checkpoints: what their files stand for, there and back bit for bit, and what is refused."""

import itertools
import json
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from make_tiny import make_tiny, small_config
from qwenvl_convert import orbax as conversion
from qwenvl_convert import quantised as codecs
from qwenvl_convert.hf import HfSource, read_params
from tiny import FAMILIES, mixed_samples, restore, tiny_config, with_text
from tiny_hf import assert_same_bits, nested, torch_tensors, write_hf
from tiny_quantised import (
    BLOCK,
    FORMATS,
    GROUP,
    args,
    assert_same_as_reference,
    compressed,
    gptq,
    quantise,
    stored,
    write_quantised,
)

import qwenvl_jax
from qwenvl_jax import cli
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.params import checkpoint, directory
from qwenvl_jax.params.quantised import dequantise
from qwenvl_jax.params.specs import flatten, param_shardings, specs
from qwenvl_jax.sharding import make_mesh

# Each format with one of the families.
EACH = list(zip(FORMATS, itertools.cycle(FAMILIES)))
each = pytest.mark.parametrize(("kind", "family"), EACH, ids=FORMATS)


def made(tmp_path, kind: str, family: str, dtype: str = "bfloat16", **more):
    """(a quantised checkpoint, its config, the weights that it stands for)."""
    config = tiny_config(family, dtype=dtype)
    packed, dense = quantise(kind, torch_tensors(config, dtype))
    path = write_quantised(tmp_path / "src", config, kind, packed, **more)
    return path, directory.read_config(path), dense


@each
def test_weights_are_those_of_an_independent_packer(kind, family, tmp_path):
    """Exactly in float32: dequantised while they are read, and after."""
    path, config, dense = made(tmp_path, kind, family)
    want = flatten(read_params(write_hf(tmp_path / "dense", tiny_config(family), dense), tiny_config(family)))
    plain = config.replace(quantised=(), dtype="float32")
    assert_same_bits(flatten(read_params(path, plain)), want)
    held = read_params(path, config)
    assert {p for p in flatten(held) if p.endswith("/scales")} == {f"{p}/scales" for p, _ in config.quantised}
    after, params = dequantise(config, held)
    assert after == config.replace(quantised=())
    assert_same_bits(flatten(params), want)


@each
def test_there_and_back_bit_for_bit(kind, family, tmp_path):
    """To Orbax and back, from either spelling and several files; stock Orbax reads the same bits."""
    number = list(FORMATS).index(kind)
    layout, files = ("hub", "nested")[number // 2 % 2], 1 + number % 3
    path, config, _ = made(tmp_path, kind, family, layout=layout, files=files)
    conversion.to_orbax(path, tmp_path / "orbax", progress=False)
    assert directory.read_config(tmp_path / "orbax") == config
    conversion.to_hf(tmp_path / "orbax", tmp_path / "back", layout=layout, progress=False)
    assert_same_bits(stored(tmp_path / "back"), stored(path))
    assert (tmp_path / "back" / "config.json").read_bytes() == (path / "config.json").read_bytes()
    assert_same_bits(flatten(restore(tmp_path / "orbax", config)), flatten(read_params(path, config)))


@pytest.mark.parametrize(
    "kind", ["awq", "gptq-desc_act", "gptq-int8-asymmetric", "w4a16-channel", "w8a8-asymmetric", "fp8-tensor", "fp8"]
)
def test_a_saved_model_opens_again_and_in_other_programs(kind, tmp_path):
    """`save` keeps the arrays. What `to_hf` then writes is compressed-tensors', which stands for the same weights."""
    path, config, dense = made(tmp_path, kind, dict(EACH)[kind], dtype="float32")
    params = read_params(path, config)
    checkpoint.save(qwenvl_jax.Model(config, params, None), tmp_path / "saved")
    assert directory.read_config(tmp_path / "saved") == config
    assert_same_bits(flatten(restore(tmp_path / "saved", config)), flatten(params))
    conversion.to_hf(tmp_path / "saved", tmp_path / "back", progress=False)
    again = directory.read_config(tmp_path / "back")
    assert again == config
    how = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert how["quant_method"] == "compressed-tensors"
    plain = config.replace(quantised=())
    want = read_params(write_hf(tmp_path / "dense", plain, dense), plain)
    assert_same_bits(flatten(read_params(tmp_path / "back", plain)), flatten(want))


@each
def test_any_part_can_be_read(kind, family, tmp_path):
    """As shards of a mesh are: cut anywhere, inside of words and groups too."""
    path, config, _ = made(tmp_path, kind, family)
    rng = np.random.default_rng(0)
    for one in (config, config.replace(quantised=())):
        with HfSource(path, one) as source:
            for name in ("q_proj", "v_proj", "down_proj"):
                for leaf in (x for p, x in source.leaves.items() if p.startswith(f"decoder/layers/{name}/")):
                    whole = source.read(leaf, tuple(slice(0, n) for n in leaf.shape))
                    for _ in range(6):
                        index = tuple(slice(*sorted(rng.choice(n + 1, 2, replace=False))) for n in leaf.shape)
                        got = source.read(leaf, index)
                        assert got.dtype == whole.dtype
                        np.testing.assert_array_equal(got, whole[index], err_msg=f"{leaf.path} {index}")


@pytest.mark.parametrize("kind", ["awq", "gptq_v2", "w4a16-asymmetric", "w8a8", "fp8"])
def test_sharded_loading_on_eight_devices(kind, tmp_path):
    config = tiny_config("qwen2_5_vl", dict(hidden_size=64, head_dim=16, mrope_section=(2, 3, 3), intermediate_size=96))
    path = write_quantised(tmp_path, config, kind, quantise(kind, torch_tensors(config))[0], files=2)
    config = directory.read_config(path)
    shardings = param_shardings(specs(config), make_mesh(data=2, fsdp=2, tensor=2))
    plain, split = flatten(read_params(path, config)), flatten(read_params(path, config, shardings))
    assert all(split[name].sharding == want for name, want in flatten(shardings).items())
    assert_same_bits(split, plain)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("order", [None, codecs.AWQ_ORDER], ids=["plain", "awq"])
def test_packing_is_unpacked(bits, axis, order):
    """Every code in every place, for numbers of codes that fill their words and that do not."""
    if order and bits == 8:
        return
    rng = np.random.default_rng(0)
    dtype = ml_dtypes.int4 if bits == 4 else np.int8
    for n in (1, 3, 4, 7, 8, 9, 31, 64):
        shape = (n, 5) if axis == 0 else (5, n)
        codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8).astype(dtype)
        words = codecs.pack(codes, bits, axis, order)
        assert words.dtype == np.int32 and words.shape[axis] == -(-n * bits // 32)
        back = codecs.unpack(words, bits, axis, order)
        np.testing.assert_array_equal((back[:n] if axis == 0 else back[:, :n]).astype(int), codes.astype(int))


def test_documented_words():
    """By hand: AWQ's order of nibbles, and signs in the highest bits."""
    word = np.array([[0x76543210]], np.uint32).view(np.int32)
    assert codecs.unpack(word, 4).astype(int).tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1]]
    # Nibble i holds output [0, 2, 4, 6, 1, 3, 5, 7][i].
    awq = codecs.unpack(word, 4, order=codecs.AWQ_ORDER).astype(int) + 8
    assert awq.tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
    high = np.array([[0xF0000000], [0x0000000F]], np.uint32).view(np.int32)
    assert codecs.unpack(high, 4, axis=0).astype(int).ravel().tolist() == [-8] * 7 + [7] + [7] + [-8] * 7
    assert codecs.unpack(np.array([-1], np.int32), 8).tolist() == [127] * 4


def test_stored_zeros_wrap_around(tmp_path):
    """v1 files of GPTQ hold a zero point minus 1, of four bits: 15 stands for 0."""
    config = tiny_config("qwen2_vl", dtype="float32")
    packed, _ = quantise("gptq-asymmetric", torch_tensors(config))
    name = "model.layers.1.mlp.up_proj.qzeros"
    packed[name] = np.full_like(packed[name], -1)  # every nibble is 15
    path = write_quantised(tmp_path, config, "gptq-asymmetric", packed)
    params = flatten(read_params(path, directory.read_config(path)))
    assert (np.asarray(params["decoder/layers/up_proj/zeros"][1]).astype(int) == -8).all()


def test_a_dtype_is_not_for_quantised_kernels(tmp_path):
    path, config, _ = made(tmp_path, "w4a16-asymmetric", "qwen2_5_vl")
    params = flatten(read_params(path, config, dtype="float32"))
    linear = "decoder/layers/q_proj"
    kinds = {name: str(params[f"{linear}/{name}"].dtype) for name in ("kernel", "scales", "zeros", "bias")}
    assert kinds == {"kernel": "int4", "scales": "float16", "zeros": "int4", "bias": "float32"}


# What differs from layer to layer, and what lies beside


def write_mixed(tmp_path, kind: str, chosen, how: dict, family: str = "qwen2_5_vl"):
    config = tiny_config(family, dtype="float32")
    packed, dense = quantise(kind, torch_tensors(config), chosen=chosen)
    path = write_quantised(tmp_path / "src", config, kind, packed, how)
    return path, config, read_params(write_hf(tmp_path / "dense", config, dense), config)


LEFT_OUT = "model.layers.1.mlp.up_proj"
MIXED = {
    "gptq": ("gptq-int4", FORMATS["gptq-int4"]),  # says of no module whether it is quantised
    "gptq dynamic": ("gptq-int4", FORMATS["gptq-int4"] | {"dynamic": {r"-:.*layers\.1\.mlp\.up_proj": {}}}),
    "awq": ("awq", FORMATS["awq"] | {"modules_to_not_convert": ["visual", "layers.1.mlp.up_proj"]}),
    "w4a16": ("w4a16", compressed("pack-quantized", args(4, strategy="group", group_size=GROUP), ignore=[])),
    "fp8": ("fp8", FORMATS["fp8"] | {"modules_to_not_convert": ["visual", "lm_head", LEFT_OUT]}),
}


@pytest.mark.parametrize("method", MIXED)
def test_a_linear_that_some_layers_hold_otherwise_is_dequantised(method, tmp_path, caplog):
    kind, how = MIXED[method]
    if method == "w4a16":
        how["ignore"] = ["lm_head", r"re:.*visual\..*", f"model.language_model.{LEFT_OUT.removeprefix('model.')}"]
    decoder = [f"model.layers.{l}" for l in range(3)]

    def chosen(module):
        return module.startswith(tuple(decoder)) and "norm" not in module and module != LEFT_OUT

    path, _, want = write_mixed(tmp_path, kind, chosen, how)
    held, reasons = directory.read_quantised(path)
    assert reasons == {"decoder/layers/up_proj": "its layers are not all held in the same way"}
    assert len(held.quantised) == 6
    params = read_params(path, held)
    assert_same_bits(flatten(dequantise(held, params)[1]), flatten(want))
    # It can be converted, and used, but not written as it was.
    conversion.to_orbax(path, tmp_path / "orbax", progress=False)
    assert "up_proj was dequantised, so there is no way back" in caplog.text
    assert directory.read_config(tmp_path / "orbax") == held
    with pytest.raises(CheckpointError, match="up_proj and others were quantised and cannot be written so again"):
        conversion.to_hf(tmp_path / "orbax", tmp_path / "back", progress=False)


@pytest.mark.parametrize("kind", ["fp8", "fp8-block"])
def test_blocks_that_do_not_divide_the_inputs_are_dequantised(kind, tmp_path):
    """48 and 80 inputs in blocks of 32 × 16: the MLP's down projection stays as it is, the rest has a shorter block."""
    config = tiny_config("qwen2_vl", dtype="float32")
    rng, blocks = np.random.default_rng(0), (16, 32)
    packed, dense, tensors = {}, {}, torch_tensors(config)
    name = "weight_scale_inv" if kind == "fp8" else "weight_scale"
    for key, x in tensors.items():
        module = key.removesuffix(".weight")
        if module.startswith("model.layers.") and x.ndim == 2:
            q = rng.standard_normal(x.shape).astype(ml_dtypes.float8_e4m3fn)
            s = rng.uniform(0.1, 1, [-(-n // b) for n, b in zip(x.shape, blocks, strict=True)]).astype(np.float32)
            packed |= {key: q, f"{module}.{name}": s}
            whole = s.repeat(blocks[0], 0).repeat(blocks[1], 1)[: x.shape[0], : x.shape[1]]
            dense[key] = q.astype(np.float32) * whole
        else:
            packed[key] = dense[key] = x
    how = json.loads(json.dumps(FORMATS[kind]).replace(json.dumps(list(BLOCK)), json.dumps(list(blocks))))
    path = write_quantised(tmp_path / "src", config, kind, packed, how)
    held, reasons = directory.read_quantised(path)
    assert not held.quantised and set(reasons.values()) == {
        "its 48 inputs are not a multiple of the block's 32",
        "its 80 inputs are not a multiple of the block's 32",
    }
    want = read_params(write_hf(tmp_path / "dense", config, dense), config)
    assert_same_bits(flatten(read_params(path, held)), flatten(want))


def test_tensors_that_no_parameter_depends_on_are_kept(tmp_path):
    """GPTQ's biases of zeros, static scales of inputs and caches, and other spellings of shapes come back."""
    config = tiny_config("qwen2_vl")
    packed, _ = quantise("gptq-int4", torch_tensors(config, "bfloat16"))
    for l in range(3):
        packed[f"model.layers.{l}.mlp.down_proj.bias"] = np.zeros(48, np.float16)
    path = write_quantised(tmp_path / "gptq", config, "gptq-int4", packed)
    packed, _ = quantise("w4a16", torch_tensors(config, "bfloat16"))
    packed = {n: x.astype(np.int32) if n.endswith("weight_shape") else x for n, x in packed.items()}
    packed["model.layers.0.self_attn.k_scale"] = np.ones(1, np.float32)
    packed["model.layers.0.self_attn.q_proj.weight_zero_point"] = np.zeros((48, 3), np.int8)
    other = write_quantised(tmp_path / "w4a16", config, "w4a16", packed)
    packed, _ = quantise("fp8-tensor", torch_tensors(config, "bfloat16"))
    packed = {n: x.reshape(()) if n.endswith("weight_scale") else x for n, x in packed.items()}
    third = write_quantised(tmp_path / "fp8", config, "fp8-tensor", packed)
    for src in (path, other, third):
        conversion.to_orbax(src, tmp_path / f"{src.name}-orbax", progress=False)
        conversion.to_hf(tmp_path / f"{src.name}-orbax", tmp_path / f"{src.name}-back", layout="nested", progress=False)
        want = {nested(name): x for name, x in stored(src).items()}
        assert_same_bits(stored(tmp_path / f"{src.name}-back"), want)


def test_the_widths_are_those_of_the_config(tmp_path):
    """As in the quantised 72B, whose MLP is wider than the original's."""
    config = with_text(tiny_config("qwen2_5_vl"), intermediate_size=96)
    packed, _ = quantise("awq", torch_tensors(config))
    path = write_quantised(tmp_path, config, "awq", packed)
    params = read_params(path, directory.read_config(path))
    assert params["decoder"]["layers"]["down_proj"]["kernel"].shape == (3, 96, 48)


# Refusals


W4A16_32 = compressed("pack-quantized", args(4, strategy="group", group_size=32))
BAD_CONFIGS = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes\) are not supported"),
    "bitsandbytes, older": ({"load_in_4bit": True}, r"\(bitsandbytes\) are not supported; use the original"),
    "hqq": ({"quant_method": "hqq"}, r"\(hqq\) are not supported"),
    "aqlm": ({"quant_method": "aqlm"}, r"\(aqlm\) are not supported"),
    "gguf": ({"quant_method": "gguf"}, r"\(gguf\) are not supported"),
    "a number": ({"quant_method": 4}, r"\(4\) are not supported"),
    "a list": (["awq"], "quantization_config is .'awq'.; it must be a JSON object"),
    "no method": ({"bits": 4}, "has no quant_method; copy the whole config.json"),
    "awq cut short": ({"quant_method": "awq", "bits": 4}, "has no group_size; copy the whole"),
    "awq without bits": ({"quant_method": "awq", "group_size": 16}, "has no bits"),
    "awq gemv": (FORMATS["awq"] | {"version": "gemv"}, r"\(AWQ's format 'gemv'\) are not supported"),
    "awq marlin": (FORMATS["awq"] | {"version": "marlin"}, r"\(AWQ's format 'marlin'\) are not supported"),
    "awq of 3 bits": (FORMATS["awq"] | {"bits": 3}, "bits is 3; only 4 bits are supported"),
    "bits as text": (FORMATS["awq"] | {"bits": "4"}, "bits is '4'; only 4"),
    "true bits": (gptq(True), "bits is True; only 4 or 8"),
    "gptq of 2 bits": (gptq(2), "bits is 2; only 4 or 8 bits are supported"),
    "gptq marlin": (gptq(checkpoint_format="marlin"), r"\(GPTQ's format 'marlin'\) are not supported"),
    "gptq is marlin": (gptq(is_marlin_format=True), r"\(GPTQ's format 'marlin'\) are not supported"),
    "gptq head": (gptq(lm_head=True), "lm_head: a quantised output head is not supported"),
    "group of 0": (gptq() | {"group_size": 0}, "group_size is 0; it must be -1 or a positive integer"),
    "group of 32": (W4A16_32, "q_proj has 48 inputs, not a multiple of the group size 32"),
    "group as text": (gptq() | {"group_size": "x" * 9000}, "group_size is 'xxx"),
    "sym as text": (gptq(sym="yes"), "sym is 'yes'; it must be true or false"),
    "dynamic": (gptq(dynamic={"-:(a+)+$": {}}), "too complex a pattern"),
    "no pattern": (gptq(dynamic={"-:(": {}}), "which is not a pattern"),
    "list of numbers": (FORMATS["awq"] | {"modules_to_not_convert": [1]}, "modules_to_not_convert has 1"),
    "fp8 by tensor": ({"quant_method": "fp8"}, "has no weight_block_size"),
    "fp8 block": (FORMATS["fp8"] | {"weight_block_size": [128]}, "weight_block_size is .128.; it must be two"),
    "fp8 e5m2": (FORMATS["fp8"] | {"fmt": "e5m2"}, "only 'e4m3' is"),
    "no groups": ({"quant_method": "compressed-tensors"}, "has no config_groups"),
    "no format": (FORMATS["w4a16"] | {"format": None}, "has no format"),
    "nvfp4": (compressed("nvfp4-pack-quantized", args(4, "float")), "compressed-tensors' 'nvfp4-pack-quantized'"),
    "marlin-24": (compressed("marlin-24", args(4)), r"\(compressed-tensors' 'marlin-24'\) are not supported"),
    "5 bits": (compressed("pack-quantized", args(5)), "num_bits is 5; only 4 or 8 bits"),
    "4 bits unpacked": (compressed("int-quantized", args(4)), "num_bits is 4; only 8 bits"),
    "floats as integers": (compressed("int-quantized", args(8, "float")), "type is 'float', but its format is 'int-"),
    "a token's": (compressed("int-quantized", args(8, strategy="token")), "strategy 'token' is not supported"),
    "no group size": (
        compressed("pack-quantized", args(4, strategy="group")),
        "has no config_groups.group_0.weights.gr",
    ),
    "sparse": (FORMATS["w4a16"] | {"sparsity_config": {"format": "sparse-24"}}, "sparse format 'sparse-24'"),
    "transforms": (FORMATS["w4a16"] | {"transform_config": {"config_groups": {"a": {}}}}, "with transform_config"),
    "groups as a list": (FORMATS["w4a16"] | {"config_groups": [1]}, "config_groups is .1.; it must be a JSON object"),
    "a group as text": (FORMATS["w4a16"] | {"config_groups": {"a": "W4A16"}}, "config_groups.a is 'W4A16'"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_quantization_configs_are_named(name, tmp_path, capsys):
    how, message = BAD_CONFIGS[name]
    config = tiny_config("qwen2_vl")
    path = write_quantised(tmp_path / "src", config, "awq", torch_tensors(config), how)
    with pytest.raises(CheckpointError, match=message) as e:
        directory.read_config(path)
    assert str(path / "config.json") in str(e.value)
    assert cli.main(["info", str(path)]) == 0  # it cannot be loaded, but described
    assert str(e.value) in capsys.readouterr().out


def without(suffix):
    return lambda t: {n: x for n, x in t.items() if n != f"model.layers.1.mlp.up_proj.{suffix}"}


def changed(suffix, change):
    def change_it(tensors):
        name = f"model.layers.1.mlp.up_proj.{suffix}"
        return tensors | {name: change(tensors[name]) if name in tensors else change(None)}

    return change_it


def plain(t):
    name = "model.layers.1.mlp.up_proj"
    return {n: x for n, x in t.items() if not n.startswith(name)} | {f"{name}.weight": np.ones((80, 48), np.float16)}


BAD_TENSORS = [
    (
        "awq",
        without("qweight"),
        r"up_proj\.qweight is missing; model\.layers\.1\.mlp\.up_proj is awq, 4 bits, groups of 16",
    ),
    ("awq", without("scales"), r"up_proj\.scales is missing"),
    ("awq", without("qzeros"), r"up_proj\.qzeros is missing"),
    ("gptq-int4", without("g_idx"), r"up_proj\.g_idx is missing"),
    ("w4a16", without("weight_scale"), r"up_proj\.weight_scale is missing"),
    ("w4a16", without("weight_shape"), r"up_proj\.weight_shape is missing"),
    ("w8a8", without("weight_scale"), r"up_proj\.weight_scale is missing"),
    ("fp8", without("weight_scale_inv"), r"up_proj\.weight_scale_inv is missing"),
    ("awq", plain, r"says that model\.layers\.1\.mlp\.up_proj is quantised \(awq.*up_proj\.weight is F16"),
    ("w4a16", plain, r"says that model\.layers\.1\.mlp\.up_proj is quantised \(pack-quantized.*weight is F16"),
    ("w8a8", plain, r"says that model\.layers\.1\.mlp\.up_proj is quantised \(int-quantized.*weight is F16"),
    ("awq", changed("qweight", lambda x: x[:-1]), r"qweight has shape \[47, 10\]; quantization_config .* \[48, 10\]"),
    ("awq", changed("qweight", lambda x: x.astype(np.int64)), r"qweight is I64; .* calls for I32"),
    ("awq", changed("scales", lambda x: x.astype(np.int8)), r"scales is I8; .* calls for F32 or F16 or BF16"),
    ("gptq-int4", changed("scales", lambda x: x[:1].copy()), r"scales has shape \[1, 80\]; .*\[3, 80\]"),
    ("gptq-int4", changed("g_idx", lambda x: x[::-1].copy()), "g_idx reorders inputs, but .*desc_act is false"),
    ("gptq-desc_act", changed("g_idx", lambda x: x * 0), "does not put 16 inputs into each group"),
    ("gptq-desc_act", changed("g_idx", lambda x: x - 1), "does not put 16 inputs into each group"),
    ("gptq-desc_act", changed("g_idx", lambda x: x + 2**30), "does not put 16 inputs into each group"),
    ("gptq-int4", changed("qzeros", lambda x: x + 1), "qzeros is not symmetric, but quantization_config.sym is true"),
    ("gptq-int4", changed("bias", lambda x: np.ones(80, np.float16)), r"has a bias, which this model has not"),
    ("w4a16", changed("weight_shape", lambda x: x[::-1].copy()), "does not say 80 × 48, as config.json does"),
    ("w4a16", changed("weight_zero_point", lambda x: np.ones((10, 3), np.int32)), "has zero points, but is symmetric"),
    ("w4a16-actorder", changed("weight_g_idx", lambda x: x * 0 - 1), "does not put 16 inputs into each group"),
    ("fp8", changed("weight", lambda x: x.view(np.int8)), r"up_proj\.weight is I8; .* calls for F8_E4M3"),
    ("awq", lambda t: t | {"lm_head.qweight": np.zeros((48, 20), np.int32)}, r"lm_head\.qweight: only the blocks'"),
    (
        "w8a8",
        lambda t: t | {"model.norm.weight_scale": np.ones(1, np.float16)},
        r"norm\.weight_scale: only the blocks'",
    ),
    ("awq", lambda t: t | {"visual.blocks.0.attn.qkv.qweight": np.zeros((32, 12), np.int32)}, "leaves it out"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BAD_TENSORS)
def test_bad_tensors_are_named(kind, change, message, tmp_path):
    config = tiny_config("qwen2_5_vl")
    packed, _ = quantise(kind, torch_tensors(config))
    path = write_quantised(tmp_path / "src", config, kind, change(packed))
    with pytest.raises(CheckpointError, match=message):
        read_params(path, directory.read_config(path))


@pytest.mark.parametrize("argv", [["convert", "--to", "orbax"], ["merge"], ["generate", "--prompt", "?", "--model"]])
def test_commands_refuse_with_a_sentence(argv, tmp_path, capsys):
    config = small_config("qwen2_vl")
    packed, _ = quantise("awq", torch_tensors(config))
    path = make_tiny(tmp_path / "src")  # for the tokenizer's files
    for how in (FORMATS["awq"], BAD_CONFIGS["bitsandbytes"][0]):
        write_quantised(path, config, "awq", without("scales")(packed), how)
        extra = [] if argv[0] == "generate" else [str(tmp_path / "out")]
        assert cli.main([*argv, str(path), *extra]) == 2
        out = capsys.readouterr()
        assert out.out == "" and out.err.count("\n") == 1 and str(path) in out.err
        assert not (tmp_path / "out").exists()


def test_tensors_of_another_method_than_the_config_says(tmp_path):
    config = tiny_config("qwen2_5_vl")
    kinds = ("awq", "gptq-int4", "w4a16", "w8a8", "fp8")
    for kind, said in itertools.permutations(kinds, 2):
        packed, _ = quantise(kind, torch_tensors(config))
        path = write_quantised(tmp_path / f"{kind}-{said}", config, said, packed)
        with pytest.raises(CheckpointError, match=r"quantization_config|is missing"):
            read_params(path, directory.read_config(path))


def test_quantised_tensors_without_a_quantization_config(tmp_path):
    config = tiny_config("qwen2_5_vl")
    packed, _ = quantise("awq", torch_tensors(config))
    path = write_hf(tmp_path, config, packed)
    with pytest.raises(CheckpointError, match=r"is a quantised tensor, but config\.json has no quantization_config"):
        read_params(path, config)


def test_a_damaged_marker(tmp_path):
    path, _, _ = made(tmp_path, "awq", "qwen2_vl")
    conversion.to_orbax(path, tmp_path / "orbax", progress=False)
    file = tmp_path / "orbax" / "qwenvl_jax.json"
    good = json.loads(file.read_text())
    for held in ([1], {"decoder/layers/q_proj": 1}, {"decoder/layers/q_proj": {"kind": 1}}):
        file.write_text(json.dumps(good | {"quantised": held}))
        with pytest.raises(CheckpointError, match="quantised is"):
            directory.read_config(tmp_path / "orbax")
    some = dict(list(good["quantised"].items())[1:])
    file.write_text(json.dumps(good | {"quantised": some}))
    with pytest.raises(CheckpointError, match=r"q_proj/(scales|zeros) is unexpected"):
        restore(tmp_path / "orbax", directory.read_config(tmp_path / "orbax"))


# The commands


@pytest.fixture
def awq(tmp_path):
    """A whole AWQ checkpoint, as published ones are: float16, scales of float16."""
    path = make_tiny(tmp_path / "awq", dtype="float16")
    config = small_config("qwen2_5_vl", "float16")
    packed, dense = quantise("awq", stored(path))
    write_quantised(path, config, "awq", packed)
    return path, dense


def test_load_info_and_merge(awq, tmp_path, capsys):
    path, dense = awq
    model = qwenvl_jax.load(path, progress=False)
    assert len(model.config.quantised) == 7 and model.config.dtype == "float32"
    layers = model.params["decoder"]["layers"]
    assert layers["q_proj"]["kernel"].dtype == "int4" and layers["q_proj"]["scales"].dtype == np.float16
    assert layers["q_proj"]["bias"].dtype == np.float32

    conversion.to_orbax(path, tmp_path / "orbax", progress=False)
    facts = []
    for one in (path, tmp_path / "orbax"):
        assert cli.main(["info", str(one), "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
    linears = sum(dense[n].size for n in dense if "layers" in n and "proj.weight" in n)
    assert facts[0]["dtypes"] == facts[1]["dtypes"] and facts[0]["dtypes"]["int4"] == linears
    assert facts[0]["parameters"] == sum(x.size for x in dense.values())
    assert facts[0]["quantised"] == facts[1]["quantised"]
    assert list(facts[0]["quantised"]["forms"]) == ["int4, groups of 16, zero points"]
    assert cli.main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "quantised   awq: decoder/layers (q_proj k_proj v_proj o_proj gate_proj up_proj down_proj): int4, gr" in out
    assert "not so      vision/blocks (qkv proj gate_proj up_proj down_proj), vision/merger (fc1 fc2)" in out

    assert cli.main(["merge", str(path), str(tmp_path / "whole"), "--dequantise"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    want = {n: x.astype(np.float16) for n, x in dense.items()}
    assert_same_bits(stored(tmp_path / "whole"), want)
    assert cli.main(["merge", str(path), str(tmp_path / "same")]) == 0
    assert_same_bits(stored(tmp_path / "same"), stored(path))
    assert cli.main(["merge", str(tmp_path / "orbax"), str(tmp_path / "no"), "--dequantise"]) == 2
    assert "convert it with `qwenvl convert --to hf`" in capsys.readouterr().err


def test_an_adapter_is_not_merged_into_quantised_weights(awq, tmp_path, capsys):
    from qwenvl_convert import peft

    from qwenvl_jax.params import lora

    path, dense = awq
    base = tmp_path / "base"
    shutil.copytree(path, base)
    config = small_config("qwen2_5_vl", "float16")
    (base / "model.safetensors").unlink()
    write_hf(base, config, {n: x.astype(np.float16) for n, x in dense.items()})
    params = read_params(base, config)
    whole = lora.add(config, params, jax.random.key(0), rank=2, alpha=4)
    whole = jax.tree_util.tree_map_with_path(lambda p, x: x + 0.1 if p[-1].key == "lora_b" else x, whole)
    peft.save_adapter(config, whole, tmp_path / "adapter", base_name=str(path))
    with pytest.raises(CheckpointError, match="an adapter cannot be merged into quantised weights; write a model in"):
        conversion.to_orbax(tmp_path / "adapter", tmp_path / "orbax", progress=False)
    held = qwenvl_jax.load(tmp_path / "adapter", progress=False).params["decoder"]["layers"]["q_proj"]
    assert held["kernel"].dtype == "int4" and "lora_a" in held  # beside the kernel
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "one"), "--dequantise"]) == 0
    assert cli.main(["merge", str(base), str(tmp_path / "two"), "--adapter", str(tmp_path / "adapter")]) == 0
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:  # the base of the second is rounded to float16 before the sum
        np.testing.assert_allclose(one[name].astype(np.float32), two[name].astype(np.float32), rtol=2e-3, atol=1e-4)


def test_loading_holds_a_few_megabytes_beside_the_parameters(tmp_path):
    """By numpy's record of its allocations."""
    text = dict(num_hidden_layers=6, intermediate_size=8192, hidden_size=256, num_attention_heads=16, head_dim=16)
    config = tiny_config("qwen2_vl", text | {"mrope_section": (2, 3, 3)}, dtype="bfloat16")
    rng = np.random.default_rng(0)
    tensors = {n: x for n, x in torch_tensors(config, "bfloat16").items()}
    packed = {}
    for name, x in tensors.items():
        if name.startswith("model.layers.") and x.ndim == 2:
            module, (out, inp) = name.removesuffix(".weight"), x.shape
            packed[f"{module}.qweight"] = rng.integers(-(2**31), 2**31, (inp, out // 8)).astype(np.int32)
            packed[f"{module}.qzeros"] = rng.integers(-(2**31), 2**31, (inp // 16, out // 8)).astype(np.int32)
            packed[f"{module}.scales"] = rng.uniform(0, 1, (inp // 16, out)).astype(np.float16)
        else:
            packed[name] = x
    path = write_quantised(tmp_path, config, "awq", packed)
    held, layer = directory.read_config(path), 8192 * 256
    with HfSource(path, held) as source:
        leaf = source.leaves["decoder/layers/gate_proj/kernel"]
        index = (slice(0, 6), slice(0, 256), slice(0, 1024))  # a shard, in another dimension than the rows of the file
        tracemalloc.start()
        try:
            part = source.read(leaf, index)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert part.nbytes == 6 * 256 * 1024 and peak < part.nbytes + 4 * layer


# With the reference's own code


# Release 0.10 goes with transformers 4.51.3. It cannot unpack zero points; test_newest.py has a release that can.
OLDER = [
    "w4a16",
    "w4a16-channel",
    "w4a16-actorder",
    "w4a16-weight",
    "w8a8",
    "w8a8-asymmetric",
    "fp8-dynamic",
    "fp8-tensor",
]


@pytest.mark.parity
@pytest.mark.parametrize("kind", OLDER)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compressed_tensors_gives_the_same_weights(kind):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs

    form, given = FORMATS[kind]["format"], FORMATS[kind]["config_groups"]["group_0"]["weights"]
    compressor = BaseCompressor.load_from_registry(form)
    assert_same_as_reference(kind, lambda tensors: compressor.decompress_weight(tensors, QuantizationArgs(**given)))


BOTH = [pytest.param(k, f, marks=() if (k, f) in EACH else pytest.mark.slow) for k in FORMATS for f in FAMILIES]


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "family"), BOTH)
def test_logits_are_those_of_torch_on_the_dequantised_weights(kind, family, tmp_path):
    from qwenvl_convert.parity import compare, greedy, our_stages, reference_inputs, reference_stages
    from test_parity import reference

    config = tiny_config(family)
    model, _ = reference(config, tmp_path / "base")
    packed, dense = quantise(kind, stored(tmp_path / "base"))
    load(model, dense)
    path = write_quantised(tmp_path / "src", config, kind, packed)
    held = directory.read_config(path)
    params, samples = read_params(path, held), mixed_samples(config)
    batch, inputs = make_batch(samples, config), reference_inputs(samples, config)
    rows = compare(our_stages(held, params, batch), reference_stages(model, inputs))
    assert all(row.ok for row in rows), "\n".join(map(str, rows))
    steps = 4
    inputs = reference_inputs(samples, config, "left")
    model.rope_deltas = model.generation_config.eos_token_id = None
    want = model.generate(**inputs, do_sample=False, max_new_tokens=steps)[:, -steps:].numpy()
    assert (greedy(held, params, batch, steps) == want).all()


def load(model, dense: dict) -> None:
    import torch

    with torch.no_grad():
        state = dict(model.named_parameters())
        for name, x in dense.items():
            state[name].copy_(torch.from_numpy(x.copy()))


@pytest.mark.parity
def test_verify_compares_with_the_dequantised_weights(awq, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (84, 56), "red").save(tmp_path / "red.png")
    assert cli.main(["verify", str(awq[0]), "--image", str(tmp_path / "red.png")]) == 0
    assert "logits" in capsys.readouterr().out
