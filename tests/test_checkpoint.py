"""Loading checkpoints: every value is in its place, every fault is named, nothing incomplete is left."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from qwenvl_convert.hf import read_params
from qwenvl_convert.names import tensor_names
from tiny import FAMILIES, restore, tiny_config, with_text
from tiny_hf import DTYPES, assert_same_bits, bits, nested, torch_shapes, torch_tensors, write_hf

import qwenvl_jax
from qwenvl_jax.errors import InputError
from qwenvl_jax.families import PRESETS, to_dict
from qwenvl_jax.params import checkpoint, locate
from qwenvl_jax.params.specs import flatten, param_shardings, specs
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.types import Model

LAYER = {
    "input_layernorm/scale": "input_layernorm.weight",
    "q_proj/kernel": "self_attn.q_proj.weight",
    "v_proj/bias": "self_attn.v_proj.bias",
    "o_proj/kernel": "self_attn.o_proj.weight",
    "down_proj/kernel": "mlp.down_proj.weight",
}


@pytest.mark.parametrize("name", PRESETS)
def test_table_names_every_parameter_of_the_official_models(name):
    config = PRESETS[name]
    names = tensor_names(config)
    assert names.keys() == specs(config).keys()
    assert {t for group in names.values() for t in group} == torch_shapes(config).keys()


def test_official_tensor_count_and_size():
    """Qwen2.5-VL-7B's index file lists 729 tensors in 16,584,333,312 bytes."""
    shapes = torch_shapes(PRESETS["qwen2.5-vl-7b"])
    assert len(shapes) == 729
    assert 2 * sum(int(np.prod(s)) for s in shapes.values()) == 16584333312


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_land_where_they_should(family, dtype, tmp_path):
    config = tiny_config(family)
    t = torch_tensors(config, dtype)
    # Slices are taken on the host: a device may quiet a signalling NaN.
    params = jax.tree.map(np.asarray, read_params(write_hf(tmp_path, config, t), config))

    def check(leaf, want):
        assert leaf.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(bits(leaf), bits(want))

    decoder, vision = params["decoder"], params["vision"]
    check(decoder["embed_tokens"]["embedding"], t["model.embed_tokens.weight"])
    check(decoder["norm"]["scale"], t["model.norm.weight"])
    check(decoder["lm_head"]["kernel"], t["lm_head.weight"].T)
    for l in range(config.text.num_hidden_layers):
        for path, name in LAYER.items():
            want = t[f"model.layers.{l}.{name}"]
            check(flatten(decoder["layers"])[path][l], want.T if path.endswith("kernel") else want)
    E = config.vision.hidden_size
    check(vision["patch_embed"]["kernel"], t["visual.patch_embed.proj.weight"].reshape(E, 1176).T)
    for l in range(config.vision.depth):
        p, block = f"visual.blocks.{l}.", vision["blocks"]
        check(block["norm1"]["scale"][l], t[p + "norm1.weight"])
        check(block["qkv"]["kernel"][l], t[p + "attn.qkv.weight"].T)
        check(block["proj"]["bias"][l], t[p + "attn.proj.bias"])
        if config.vision.gated_mlp:
            check(block["gate_proj"]["kernel"][l], t[p + "mlp.gate_proj.weight"].T)
            check(block["down_proj"]["bias"][l], t[p + "mlp.down_proj.bias"])
        else:
            check(block["norm2"]["bias"][l], t[p + "norm2.bias"])
            check(block["fc2"]["kernel"][l], t[p + "mlp.fc2.weight"].T)
    check(vision["merger"]["norm"]["scale"], t["visual.merger.ln_q.weight"])
    check(vision["merger"]["fc1"]["kernel"], t["visual.merger.mlp.0.weight"].T)
    check(vision["merger"]["fc2"]["bias"], t["visual.merger.mlp.2.bias"])


@pytest.mark.parametrize("layout", ["hub", "nested"])
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_and_files_make_no_difference(family, files, layout, tmp_path):
    config = tiny_config(family)
    t = torch_tensors(config, "bfloat16")
    plain = read_params(write_hf(tmp_path / "plain", config, t), config)
    other = read_params(write_hf(tmp_path / "other", config, t, layout, files), config)
    assert_same_bits(flatten(other), flatten(plain))


def test_wide_tensors_are_read_in_many_blocks(tmp_path):
    """More rows than one row block and one thread's job, with remainders."""
    config = with_text(tiny_config("qwen2_vl"), vocab_size=70001, intermediate_size=777, num_hidden_layers=1)
    t = torch_tensors(config)
    params = read_params(write_hf(tmp_path, config, t), config)
    np.testing.assert_array_equal(bits(params["decoder"]["lm_head"]["kernel"]), bits(t["lm_head.weight"].T))
    np.testing.assert_array_equal(
        bits(params["decoder"]["embed_tokens"]["embedding"]), bits(t["model.embed_tokens.weight"])
    )
    np.testing.assert_array_equal(
        bits(params["decoder"]["layers"]["up_proj"]["kernel"][0]), bits(t["model.layers.0.mlp.up_proj.weight"].T)
    )


def test_dtype_casts(tmp_path):
    config = tiny_config("qwen2_5_vl")
    want = {n: np.linspace(-3, 3, x.size, dtype=np.float32).reshape(x.shape) for n, x in torch_tensors(config).items()}
    params = read_params(write_hf(tmp_path, config, want), config, dtype="bfloat16")
    kernel = params["decoder"]["layers"]["q_proj"]["kernel"]
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    np.testing.assert_array_equal(
        kernel[2], want["model.layers.2.self_attn.q_proj.weight"].T.astype(DTYPES["bfloat16"])
    )


def test_layers_of_several_dtypes_become_float32(tmp_path):
    """Mergers and trainers of a part of the layers leave such files; every value stays exact."""
    config, odd = tiny_config("qwen2_5_vl"), "model.layers.1.mlp.up_proj.weight"
    t = {name: np.full(shape, 0.375, DTYPES["bfloat16"]) for name, shape in torch_shapes(config).items()}
    t[odd] = np.full(t[odd].shape, 1.2345, np.float32)
    layers = read_params(write_hf(tmp_path, config, t), config)["decoder"]["layers"]
    up = layers["up_proj"]["kernel"]
    assert up.dtype == np.float32 and layers["down_proj"]["kernel"].dtype == DTYPES["bfloat16"]
    assert [set(np.unique(up[l])) for l in range(3)] == [{np.float32(x)} for x in (0.375, 1.2345, 0.375)]


WRAPPED = {
    "module.": lambda name: "module." + name,
    "torch.compile": lambda name: "_orig_mod." + name.replace("layers.0.", "layers.0._orig_mod."),
    "base_model": lambda name: "base_model.model." + nested(name).replace(".weight", ".base_layer.weight"),
    "fsdp": lambda name: "_fsdp_wrapped_module." + name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    "no head": lambda name: name.replace("model.", "language_model."),
    "lightning": lambda name: "model." + nested(name),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_wrappers_are_read(wrapper, tmp_path):
    config = tiny_config("qwen2_5_vl")
    t = torch_tensors(config)
    want = flatten(read_params(write_hf(tmp_path / "plain", config, t), config))
    write_hf(tmp_path / "wrapped", config, {WRAPPED[wrapper](name): x for name, x in t.items()})
    assert_same_bits(flatten(read_params(tmp_path / "wrapped", config)), want)


def test_each_parameter_keeps_its_own_dtype(tmp_path):
    config = tiny_config("qwen2_5_vl")
    t = torch_tensors(config, "bfloat16")
    t |= {n: x.astype(np.float32) for n, x in t.items() if "layernorm" in n}
    params = read_params(write_hf(tmp_path, config, t), config)
    assert params["decoder"]["layers"]["input_layernorm"]["scale"].dtype == np.float32
    assert params["decoder"]["layers"]["q_proj"]["bias"].dtype == DTYPES["bfloat16"]


def test_tied_checkpoint_may_store_an_equal_head(tmp_path):
    config = with_text(tiny_config("qwen2_vl"), tie_word_embeddings=True)
    t = torch_tensors(config)
    t["lm_head.weight"] = t["model.embed_tokens.weight"].copy()
    assert "lm_head" not in read_params(write_hf(tmp_path / "equal", config, t), config)["decoder"]
    t["lm_head.weight"].view(np.uint32)[-1, -1] ^= 1
    with pytest.raises(InputError, match=r"lm_head\.weight differs"):
        read_params(write_hf(tmp_path / "other", config, t), config)


def test_stored_rotary_buffers_are_ignored(tmp_path):
    config = tiny_config("qwen2_vl")
    t = torch_tensors(config)
    plain = read_params(write_hf(tmp_path / "plain", config, t), config)
    t |= {"visual.rotary_pos_emb.inv_freq": np.ones(4, np.float32)}
    jax.tree.map(np.testing.assert_array_equal, read_params(write_hf(tmp_path / "old", config, t), config), plain)


def change(tensors, name, value):
    return {**tensors, name: value} if value is not None else {n: x for n, x in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("visual.blocks.1.attn.qkv.weight", None, r"visual\.blocks\.1\.attn\.qkv\.weight is missing"),
        ("model.layers.2.self_attn.q_proj.bias", None, r"model\.layers\.2\.self_attn\.q_proj\.bias is missing"),
        ("lm_head.weight", None, r"lm_head\.weight is missing.*tie_word_embeddings"),
        ("model.layers.3.mlp.up_proj.weight", np.zeros((80, 48)), r"layers\.3\.mlp\.up_proj\.weight has no place"),
        ("model.layers.0.lora_A.weight", np.zeros(3), r"lora_A\.weight has no place"),
        ("visual.merger.mlp.0.weight", np.zeros((128, 127), "f4"), r"\[128, 127\].*\[128, 128\]"),
        ("visual.patch_embed.proj.weight", np.zeros((32, 1176), "f4"), r"\[32, 3, 2, 14, 14\]"),
        ("model.norm.weight", np.zeros(48, np.float64), r"model\.norm\.weight is F64"),
        ("model.norm.weight", np.zeros(48, np.int8), r"model\.norm\.weight is I8"),
        ("base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight", np.zeros((2, 48)), "merge_and_unload"),
        ("model.visual.blocks.1.attn.qkv.weight", np.zeros((96, 32), "f4"), "stored twice"),
        ("model.layers.0.mlp.up_proj.qweight", np.zeros((4, 4), np.int32), "quantised"),
    ],
)
def test_wrong_tensors_are_named(name, value, message, tmp_path):
    config = tiny_config("qwen2_5_vl")
    write_hf(tmp_path, config, change(torch_tensors(config), name, value))
    with pytest.raises(InputError, match=message):
        read_params(tmp_path, config)


def test_no_file_stays_open_after_an_error(tmp_path):
    config = tiny_config("qwen2_5_vl")
    write_hf(tmp_path, config, change(torch_tensors(config), "model.norm.weight", None))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(InputError):
        read_params(tmp_path, config)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def with_header(header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short"),
        (b"\x00" * 4, "cut short"),
        (b"\x00" * 64, "cut short"),
        (b"\xff" * 64, "cut short"),
        (b"<html>404: Not Found</html>", "cut short"),
        ((2**40).to_bytes(8, "little") + b"{}", "cut short"),
        (with_header(b"{nonsense"), "not valid JSON"),
        (with_header(b"\xff\xfe\xfd"), "not valid JSON"),
        (with_header(b"[" * 100_000), "not valid JSON"),
        (with_header(b'{"a": 1, "a": 2}'), "occurs twice"),
        (with_header([1]), "not a JSON object"),
        (with_header({"a": 7}), "tensor a is malformed"),
        (with_header({"a": {"dtype": "F32"}}), "tensor a is malformed"),
        (with_header({"a": entry(shape=(-2,))}), "tensor a is malformed"),
        (with_header({"a": entry(shape=(2.0,))}), "tensor a is malformed"),
        (with_header({"a": entry(shape=(True,))}), "tensor a is malformed"),
        (with_header({"a": entry(offsets=(8, 0))}), "tensor a is malformed"),
        (with_header({"a": entry(offsets=(0, 8, 9))}), "tensor a is malformed"),
        (with_header({"a": entry(shape=(3,))}, bytes(8)), "8 bytes are set aside"),
        (with_header({"a": entry(shape=(2**62, 2**62))}, bytes(8)), "8 bytes are set aside"),
        (with_header({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, bytes(8)), "cut short or damaged"),
        (with_header({"a": entry()}, bytes(7)), "cut short or damaged"),
        (with_header({"a": entry()}, bytes(9)), "cut short or damaged"),
        (with_header({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
        (with_header({"a": entry(offsets=(8, 16))}, bytes(16)), "hole"),
    ],
)
def test_damaged_files_are_named(content, message, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message) as e:
        read_params(tmp_path, tiny_config("qwen2_vl"))
    assert str(tmp_path / "model.safetensors") in str(e.value)


def test_truncation_at_any_length_is_noticed(tmp_path):
    config = tiny_config("qwen2_5_vl")
    file = write_hf(tmp_path, config, torch_tensors(config, "bfloat16")) / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 8, 9, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            read_params(tmp_path, config)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not a JSON object"),
        ("{}", "not a readable index"),
        ('{"weight_map": {"a": 3}}', "not a readable index"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside this directory"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "outside this directory"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors: missing"),
    ],
)
def test_bad_index(index, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=message):
        read_params(tmp_path, tiny_config("qwen2_vl"))


def test_index_and_files_must_agree(tmp_path):
    config = tiny_config("qwen2_vl")
    index = write_hf(tmp_path, config, torch_tensors(config), files=2) / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"model\.norm\.weight: .* holds it"):
        read_params(tmp_path, config)
    data["weight_map"] |= {"model.norm.weight": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"model\.norm\.weight: .* does not hold it"):
        read_params(tmp_path, config)


def test_other_weight_formats_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(InputError, match="it holds weights as pickles"):
        read_params(tmp_path, tiny_config("qwen2_vl"))


# load, save


def hf_checkpoint(path, tokenizer_dir, family="qwen2_5_vl", dtype="bfloat16"):
    config = tiny_config(family, dtype=dtype, text={"vocab_size": 151936}, **REAL_TOKENS)
    tensors = {n: (0.1 * np.ones(s)).astype(DTYPES[dtype]) for n, s in torch_shapes(config).items()}
    write_hf(path, config, tensors)
    for file in tokenizer_dir.iterdir():
        shutil.copyfile(file, path / file.name)
    return config


REAL_TOKENS = dict(
    image_token_id=151655,
    video_token_id=151656,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
    eos_token_id=151645,
)


def test_settings_that_are_not_obeyed_are_named_once(tokenizer_dir, tmp_path, caplog):
    hf_checkpoint(tmp_path / "hf", tokenizer_dir)
    file = tmp_path / "hf" / "generation_config.json"
    qwenvl_jax.load(tmp_path / "hf", dtype="bfloat16", progress=False)
    assert not caplog.records
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_beams": 4, "min_p": 0.1, "min_new_tokens": 3}))
    qwenvl_jax.load(tmp_path / "hf", dtype="bfloat16", progress=False)
    (one,) = caplog.records
    said = "not supported, so answers differ from transformers': num_beams 4, min_new_tokens 3"
    assert one.getMessage() == f"{file}: {said}"


def test_load_and_save(tokenizer_dir, tmp_path):
    config = hf_checkpoint(tmp_path / "hf", tokenizer_dir)
    model = qwenvl_jax.load(tmp_path / "hf", progress=False)
    assert model.config == config.replace(dtype="float32")  # as on any CPU; "bfloat16" keeps them
    model = qwenvl_jax.load(tmp_path / "hf", dtype="bfloat16")
    assert model.config == config
    assert model.generation == json.loads((tokenizer_dir / "generation_config.json").read_text())
    checkpoint.save(model, tmp_path / "ours", files_from=tmp_path / "hf")
    again = qwenvl_jax.load(str(tmp_path / "ours"), dtype="bfloat16", progress=False)
    assert again.config == config and again.generation == model.generation
    assert checkpoint.read_config(tmp_path / "ours") == config
    assert_same_bits(flatten(again.params), flatten(model.params))
    text = [{"role": "user", "content": "hello"}]
    assert again.processor.render(text) == model.processor.render(text)
    checkpoint.save(model._replace(generation={}), tmp_path / "plain", files_from=tmp_path / "hf")
    assert qwenvl_jax.load(tmp_path / "plain").generation == {}
    assert (tmp_path / "ours" / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("which", ["hf", "ours"])
def test_load_casts(which, tokenizer_dir, tmp_path):
    hf_checkpoint(tmp_path / "hf", tokenizer_dir)
    if which == "ours":
        checkpoint.save(qwenvl_jax.load(tmp_path / "hf"), tmp_path / "ours", files_from=tmp_path / "hf")
    model = qwenvl_jax.load(tmp_path / which, dtype="float32")
    assert model.config.dtype == "float32"
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"float32"}
    assert model.params["decoder"]["norm"]["scale"][0] == np.float32(DTYPES["bfloat16"](0.1))
    with pytest.raises(InputError, match="int8"):
        qwenvl_jax.load(tmp_path / which, dtype="int8")


def write_config(path, **changes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(to_dict(tiny_config("qwen2_vl")) | changes))
    return path


def test_load_of_anything_else(tmp_path):
    def fails(path, message):
        with pytest.raises(InputError, match=message):
            qwenvl_jax.load(path)

    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "nowhere", "no such directory")
    fails("./nowhere/at/all", "no such directory")
    fails(tmp_path / "file", "is a file")
    fails(tmp_path / "empty", r"no config\.json")
    fails(write_config(tmp_path / "llama", model_type="llama"), "llama")
    fails(write_config(tmp_path / "hqq", quantization_config={"quant_method": "hqq"}), "quantised.*hqq")
    (tmp_path / "empty" / "config.json").write_text("{")
    fails(tmp_path / "empty", r"config\.json")


def test_demo_is_the_packaged_one(monkeypatch, tmp_path):
    package, here = tmp_path / "package", tmp_path / "here"
    (here / "demo").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(locate, "PACKAGE", package)
    with pytest.raises(InputError, match="demo: this installation has no demo checkpoint"):
        checkpoint.find("demo")
    (package / "demo" / "checkpoint").mkdir(parents=True)
    assert checkpoint.find("demo") == package / "demo" / "checkpoint"
    assert checkpoint.find("./demo") == checkpoint.find(Path("demo")) == here / "demo"


@pytest.fixture
def ours(tmp_path):
    config = tiny_config("qwen2_5_vl")
    params = read_params(write_hf(tmp_path / "hf", config, torch_tensors(config)), config)
    model = Model(config, params, None)
    checkpoint.save(model, tmp_path / "ours")
    return model, tmp_path / "ours"


def test_restore(ours):
    model, path = ours
    assert_same_bits(flatten(restore(path, model.config)), flatten(model.params))


def test_restore_of_damaged_checkpoints(ours, tmp_path):
    model, path = ours

    def fails(message, config=model.config, where=path):
        with pytest.raises(InputError, match=message):
            restore(where, config)

    fails("lm_head/kernel is unexpected", with_text(model.config, tie_word_embeddings=True))
    fails(r"down_proj/kernel has shape \[3, 80, 48\].*\[3, 81, 48\]", with_text(model.config, intermediate_size=81))
    (path / "qwenvl_jax.json").write_text('{"format": 2}')
    fails("format 2")
    (path / "qwenvl_jax.json").write_text('{"format": 1}')
    with (path / "params" / "manifest.ocdbt").open("r+b") as file:
        manifest = file.read()
        file.truncate(20)
    fails(r"params: not a readable Orbax checkpoint \(DATA_LOSS: Error decoding local file .*manifest\.ocdbt")
    (path / "params" / "manifest.ocdbt").write_bytes(manifest)
    for file in (path / "params" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    fails("damaged")
    shutil.rmtree(path / "params" / "ocdbt.process_0")
    fails("damaged|not a readable")
    shutil.rmtree(path / "params")
    fails("params: not a readable Orbax checkpoint, it has no parameters")


def test_sharded_loading_on_eight_devices(ours, tmp_path):
    """Both formats give the same bits with and without a mesh."""
    model, path = ours
    other = write_hf(tmp_path / "bf16", model.config, torch_tensors(model.config, "bfloat16"), files=2)
    for source, read in ((other, read_params), (path, restore)):
        config = checkpoint.read_config(source)
        shardings = param_shardings(specs(config), make_mesh(data=2, fsdp=2, tensor=2))
        plain, split = flatten(read(source, config)), flatten(read(source, config, shardings))
        assert all(split[name].sharding == want for name, want in flatten(shardings).items())
        assert_same_bits(split, plain)
        gate = "decoder/layers/gate_proj/kernel"
        assert split[gate].addressable_shards[0].data.shape == (3, 24, 40)
        assert len(plain[gate].sharding.device_set) == 1


# Writing


def test_save_refuses_files_that_see_pictures_otherwise(ours, tokenizer_dir, tmp_path):
    model, _ = ours
    hf_checkpoint(tmp_path / "other", tokenizer_dir)
    (tmp_path / "other" / "preprocessor_config.json").write_text('{"image_std": [0.5, 0.5, 0.5]}')
    with pytest.raises(
        InputError, match=r"other: its image_std is \(0\.5, 0\.5, 0\.5\), the model's config says \(0\.26"
    ):
        checkpoint.save(model, tmp_path / "out", files_from=tmp_path / "other")
    with pytest.raises(InputError, match="nowhere: no such directory"):
        checkpoint.save(model, tmp_path / "out", files_from=tmp_path / "nowhere")
    assert not list(tmp_path.glob("out*"))


def test_save_refuses_to_overwrite(ours):
    model, path = ours
    before = sorted(path.rglob("*"))
    with pytest.raises(InputError, match="exists already"):
        checkpoint.save(model, path)
    assert sorted(path.rglob("*")) == before


def test_staged_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), checkpoint.staged(tmp_path / "out", 10) as work:
        (work / "a").mkdir()
        (work / "a" / "b").write_text("x")
        assert not (tmp_path / "out").exists()
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_staged_removes_what_a_killed_run_left(tmp_path):
    (tmp_path / "out.partial-qwenvl_jax" / "params").mkdir(parents=True)
    (tmp_path / "out.partial-qwenvl_jax" / "config.json").write_text("{}")
    with checkpoint.staged(tmp_path / "out", 10) as work:
        assert list(work.iterdir()) == []
        (work / "a").write_text("x")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/a"]


def test_staged_keeps_two_writers_apart(tmp_path):
    with checkpoint.staged(tmp_path / "out", 10) as work:
        (work / "mine").write_text("x")
        with pytest.raises(InputError, match="another process"), checkpoint.staged(tmp_path / "out", 10):
            pass
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_staged_needs_room_and_a_parent(tmp_path):
    with (
        pytest.raises(InputError, match=r"no space.*1000000\.\d\d GB are needed"),
        checkpoint.staged(tmp_path / "o", 10**15),
    ):
        pass
    with pytest.raises(InputError, match=r"no directory .*/no; make it"), checkpoint.staged(tmp_path / "no" / "o", 10):
        pass
    with pytest.raises(InputError, match="cannot be written"), checkpoint.staged(tmp_path / ("o" * 300), 10):
        pass
    assert list(tmp_path.iterdir()) == []


def test_nested_names():
    """These tests' helper against names that a newer transformers saved."""
    assert nested("model.layers.0.mlp.up_proj.weight") == "model.language_model.layers.0.mlp.up_proj.weight"
    assert nested("visual.blocks.0.norm1.weight") == "model.visual.blocks.0.norm1.weight"
    assert nested("lm_head.weight") == "lm_head.weight"
