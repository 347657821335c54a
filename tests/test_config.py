"""Presets and every layout of config.json."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
from tiny import FAMILIES, tiny_config

from qwenvl_jax.cli.info import PARAMETERS, describe
from qwenvl_jax.config import NORMS, VISION_ACTIVATIONS, YarnConfig, decode_text
from qwenvl_jax.errors import CheckpointError, InputError
from qwenvl_jax.families import PRESETS, from_dict, merge_presets, to_dict
from qwenvl_jax.model import vision
from qwenvl_jax.params.directory import read_config
from qwenvl_jax.params.specs import count_params


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_exact(name):
    assert count_params(PRESETS[name]) == PARAMETERS[name]


def test_two_families_cannot_share_the_name_of_a_preset():
    one, two = (
        SimpleNamespace(PRESETS={"a": tiny_config("qwen2_vl")}),
        SimpleNamespace(PRESETS={"b": 1, "a": tiny_config("qwen2_5_vl")}),
    )
    with pytest.raises(ValueError, match="preset 'a' is in qwen2_vl and in qwen2_5_vl; rename one"):
        merge_presets([one, two])


def test_info_of_a_preset_without_a_count(monkeypatch):
    monkeypatch.setitem(PRESETS, "new", PRESETS["qwen2-vl-2b"])
    assert describe("new") == describe("qwen2-vl-2b")


@pytest.mark.parametrize("config", [*PRESETS.values(), *(tiny_config(f) for f in FAMILIES)])
def test_written_config_reads_back(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def flat(**changes):
    return to_dict(PRESETS["qwen2.5-vl-7b"]) | changes


def test_nested_text_config_equals_flat():
    data = flat()
    keys = set(data) - {"model_type", "vision_config", "architectures", "image_token_id", "video_token_id"}
    nested = {k: v for k, v in data.items() if k not in keys} | {"text_config": {k: data[k] for k in keys}}
    assert from_dict(nested) == PRESETS["qwen2.5-vl-7b"]


def test_rope_parameters_of_newer_files():
    data = flat()
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 500000.0}
    del data["rope_scaling"], data["rope_theta"]
    text = from_dict(data | {"rope_parameters": rope}).text
    assert text.rope_theta == 500000 and text.mrope_section == (16, 24, 24) and text.yarn is None


def test_newer_dtype_key():
    data = flat()
    del data["torch_dtype"]
    assert from_dict(data | {"dtype": "float32"}).dtype == "float32"


@pytest.mark.parametrize("where", ["top", "text"])
def test_tied_embeddings_at_either_level(where):
    data = flat()
    del data["tie_word_embeddings"]
    data["text_config"] = {k: v for k, v in data.items() if k not in ("vision_config", "model_type")}
    (data if where == "top" else data["text_config"])["tie_word_embeddings"] = True
    assert from_dict(data).text.tie_word_embeddings


def test_yarn_takes_the_declared_factor():
    rope = {"type": "yarn", "mrope_section": [16, 24, 24], "factor": 4, "original_max_position_embeddings": 32768}
    config = from_dict(flat(rope_scaling=rope))
    assert config.text.yarn == YarnConfig(factor=4.0, original_max_position_embeddings=32768)
    assert from_dict(to_dict(config)) == config


def test_yarn_factor_from_the_context_when_undeclared():
    rope = {"rope_type": "yarn", "mrope_section": [16, 24, 24], "original_max_position_embeddings": 32000}
    assert from_dict(flat(rope_scaling=rope)).text.yarn.factor == 4.0


@pytest.mark.parametrize(
    "name, changes, context",
    [
        ("qwen2-vl-7b", {}, 131072),  # Qwen's documented rope_scaling on the official file, which declares 32768
        ("qwen2.5-vl-7b", {}, 131072),  # declares 128000
        ("qwen2.5-vl-7b", {"factor": 2}, 128000),
        ("qwen2.5-vl-7b", {"factor": None}, 128000),  # 128000 / 32768 · 32768
        ("qwen2.5-vl-7b", {"type": "mrope"}, 128000),
        ("qwen2-vl-7b", {"type": "mrope"}, 32768),
    ],
)
def test_yarn_gives_the_longer_context(name, changes, context):
    data = to_dict(PRESETS[name])
    data["rope_scaling"] |= {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768} | changes
    config = from_dict(data)
    assert config.text.context == context
    assert to_dict(config)["max_position_embeddings"] == data["max_position_embeddings"]
    assert from_dict(to_dict(config)) == config


def test_keys_that_quantised_files_leave_out_take_the_reference_defaults():
    data = flat()
    for key in ("depth", "num_heads", "patch_size", "intermediate_size"):
        del data["vision_config"][key]
    vision = from_dict(data).vision
    assert (vision.depth, vision.num_heads, vision.patch_size, vision.intermediate_size) == (32, 16, 14, 3420)


def test_several_eos_ids_and_full_attention_beyond_the_depth():
    vision = to_dict(PRESETS["qwen2.5-vl-7b"])["vision_config"] | {"depth": 2}
    config = from_dict(json.loads(json.dumps(flat(eos_token_id=[151645, 151643], vision_config=vision))))
    assert config.eos_token_id == (151645, 151643) and hash(config)
    assert not any(config.vision.is_full_attention(i) for i in range(2))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_qwen2_vl_vision_hidden_size_is_the_output_width():
    vision = from_dict(to_dict(PRESETS["qwen2-vl-2b"])).vision
    assert (vision.hidden_size, vision.out_hidden_size, vision.window_size) == (1280, 1536, None)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": None}, "None"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 25]}}, "mrope_section"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -3584}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"vision_config": {"out_hidden_size": 10}}, "out"),
        ({"vision_config": {"window_size": 100}}, "window_size"),
        ({"vision_config": {"patch_size": 0}}, "patch_size"),
        ({"vision_config": [1]}, "vision_config"),
        ({"vision_config": []}, "vision_config"),
        ({"vision_config": 0}, "vision_config"),
        ({"text_config": []}, "text_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"vision_config": {"fullatt_block_indexes": [-1]}}, "fullatt_block_indexes"),
        ({"vision_config": {"fullatt_block_indexes": [7.0]}}, "fullatt_block_indexes"),
        ({"vision_config": {"fullatt_block_indexes": 7}}, "fullatt_block_indexes"),
        ({"vision_config": {"hidden_act": "relu6"}}, "hidden_act"),
        ({"vision_config": {"hidden_act": [1]}}, "hidden_act"),
        ({"vision_config": {"depth": True}}, "depth"),
        ({"vision_config": {"tokens_per_second": "2"}}, "tokens_per_second"),
        ({"image_token_id": "151655"}, "image_token_id"),
        ({"video_token_id": 152064}, "video_token_id"),
        ({"image_token_id": 151656}, "image_token_id"),
        ({"vision_start_token_id": -1}, "vision_start_token_id"),
        ({"eos_token_id": 1.5}, "eos_token_id"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": "abc"}, "rope_theta"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": 1}}, "rope_scaling.type"),
        ({"torch_dtype": 16}, "torch_dtype"),
        *(
            ({"rope_scaling": {"type": "mrope", "mrope_section": section}}, "mrope_section")
            for section in (5, "abc", ["a", "b", "c"], [0, 32, 32], [-16, 40, 40], [16.0, 24, 24], [])
        ),
        *(
            ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24], key: value}}, key)
            for key in ("factor", "beta_fast", "attention_factor", "original_max_position_embeddings")
            for value in (0, -4, math.inf, math.nan, "x")
        ),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_name(changes, named):
    with pytest.raises(InputError, match=named):
        from_dict(flat(**changes))


@pytest.mark.parametrize("ratio", ["4", 0, math.nan, [4]])
def test_qwen2_vl_mlp_ratio_is_a_number(ratio):
    data = to_dict(PRESETS["qwen2-vl-7b"])
    data["vision_config"]["mlp_ratio"] = ratio
    with pytest.raises(InputError, match="mlp_ratio"):
        from_dict(data)


@pytest.mark.parametrize("name", ["qwen2-vl-7b", "qwen2.5-vl-7b"])
def test_null_is_the_same_as_an_absent_key(name):
    data = to_dict(PRESETS[name])
    required = (
        "model_type",
        "num_key_value_heads",
    )  # null means one KV head per head, as in the reference
    for part in (data, data["vision_config"], data["rope_scaling"]):
        for key in set(part) - set(required):
            without, null = copy.deepcopy(data), copy.deepcopy(data)
            where = "vision_config" if part is data["vision_config"] else "rope_scaling"
            (without if part is data else without[where]).pop(key)
            (null if part is data else null[where])[key] = None
            assert _result(null) == _result(without), key


def _result(data):
    try:
        return from_dict(data)
    except InputError as e:
        return str(e)


def test_known_activations_and_norms_are_those_of_the_vision_tower():
    assert set(VISION_ACTIVATIONS) == set(vision.ACTIVATIONS) and set(NORMS) == set(vision.NORMS)


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_texts_are_read_as_editors_save_them(coding):
    """A byte order mark says the encoding; with it, the ends of lines are those of any system."""
    text = "ä\nb\n\n☃"
    mark = "\ufeff" if coding.endswith(("le", "be")) else ""
    for end in ("\n", "\r\n", "\r"):
        assert decode_text((mark + text.replace("\n", end)).encode(coding)) == text
    assert decode_text(mark.encode(coding)) == ""


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{}".encode("utf-16-le"), "is text in UTF-16 or UTF-32 without a byte order mark"),
        ("{}".encode("utf-16-be"), "is text in UTF-16 or UTF-32 without a byte order mark"),
        (b"a\xe9b", "is not UTF-8 text .* at byte 1"),
        (b"\xef\xbb\xbfa\xe9b", "is not UTF-8 text"),
        (b"\xff\xfea", "is not UTF-16 text"),
        (b"\xff\xfe\0\0\xff\xff\xff\xff", "is not UTF-32 text"),
    ],
)
def test_texts_in_another_encoding_are_named(data, says, tmp_path):
    with pytest.raises(InputError, match=says):
        decode_text(data)
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"config\.json: {says}"):
        read_config(tmp_path)


def test_unreadable_file_is_named(tmp_path):
    for content in (b"{", b"[]", b"\xff\xfe"):
        path = tmp_path / "config.json"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"config\.json"):
            read_config(tmp_path)
    with pytest.raises(InputError, match="absent"):
        read_config(tmp_path / "absent")


@pytest.mark.parametrize(
    ("family", "part", "changes", "name"),
    [
        ("qwen2_5_vl", "text", dict(qk_norm=True), "qk_norm"),
        ("qwen2_5_vl", "text", dict(qkv_bias=False), "qkv_bias"),
        ("qwen2_5_vl", "vision", dict(norm="layer"), "norm"),
        ("qwen2_5_vl", "vision", dict(gated_mlp=False), "gated_mlp"),
        ("qwen2_vl", "vision", dict(window_size=112, fullatt_block_indexes=(1,)), "window_size"),
    ],
)
def test_a_file_that_cannot_say_a_switch(family, part, changes, name):
    with pytest.raises(InputError, match=f"^{name} is .* a config.json of '{family}' cannot say"):
        to_dict(tiny_config(family, **{part: changes}))


def test_a_width_that_its_ratio_rounds():
    config = tiny_config("qwen2_vl", vision=dict(hidden_size=448, intermediate_size=115, num_heads=4))
    assert from_dict(to_dict(config)) == config
