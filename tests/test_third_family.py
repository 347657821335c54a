"""A family that the package has never heard of: one object among FAMILIES, and what runs the others runs it."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from qwenvl_convert.names import tensor_names
from test_engine import FakeProcessor
from test_model import test_prefill_and_decode_equal_one_forward as prefill_and_decode_equal_one_forward
from tiny import mixed_samples, tiny_config, tiny_params

from qwenvl_jax.config import VisionConfig
from qwenvl_jax.errors import InputError
from qwenvl_jax.families import FAMILIES, from_dict, shared, to_dict
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.model.decoder import DecoderBlock
from qwenvl_jax.model.layers import text_rope
from qwenvl_jax.model.qwenvl import forward
from qwenvl_jax.params.specs import specs
from qwenvl_jax.types import Model

TOWER = dict(norm="layer", gated_mlp=False, hidden_act="gelu", window_size=None, fullatt_block_indexes=())


def read_vision(get, text_width):
    width, mlp = get("width", int), get("mlp", int)
    sizes = shared.tower_sizes(get)
    return VisionConfig(hidden_size=width, intermediate_size=mlp, out_hidden_size=text_width, **sizes, **TOWER)


def write_vision(v):
    sizes = {k: getattr(v, k) for k in ("depth", "num_heads", "patch_size", "spatial_merge_size")}
    return sizes | {"width": v.hidden_size, "mlp": v.intermediate_size}


TOY = SimpleNamespace(
    from_dict=lambda data: shared.from_dict(data, read_vision, qkv_bias=False, qk_norm=True, rope="interleaved"),
    to_dict=lambda c: shared.to_dict(c, "ToyForConditionalGeneration", write_vision(c.vision)),
    tensor_names=lambda c: {p: n.replace("mlp.fc", "mlp.linear_fc") for p, n in shared.tensor_names(c).items()},
    time_steps=lambda visual, config: np.zeros(visual.grid.t, int),
    BOXES="relative",
)


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", TOY)


@pytest.fixture
def config():
    text = dict(head_dim=16, mrope_section=(4, 2, 2), qkv_bias=False, qk_norm=True, rope="interleaved")
    return tiny_config("toy", text, TOWER | dict(intermediate_size=64))


def test_config_and_names(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    names = tensor_names(config)
    assert names.keys() == specs(config).keys()
    assert names["decoder/layers/q_norm/scale"][2] == "model.layers.2.self_attn.q_norm.weight"
    assert names["vision/blocks/fc1/bias"][3] == "visual.blocks.3.mlp.linear_fc1.bias"
    with pytest.raises(InputError, match="interleave"):
        tiny_config("toy", dict(head_dim=16, mrope_section=(1, 4, 3), rope="interleaved"))


def test_queries_are_normalised_then_turned_by_t_h_w_in_turns(config):
    """Against numpy, as complex numbers: frequency i of [0 1 2 0 1 2 0 0] turns with t, h or w."""
    rng, t = np.random.default_rng(0), config.text
    x, positions = rng.standard_normal((1, 5, 48)).astype(np.float32), rng.integers(0, 50, (3, 1, 5))
    weights = jax.tree.map(lambda w: w[0], tiny_params(config)["decoder"]["layers"])
    block = DecoderBlock(config)
    _, (q, k) = block.apply({"params": weights}, x, *text_rope(positions, t), lambda q, k, v: (q, (q, k)))

    def normal(a, scale):
        return a / np.sqrt(np.mean(a * a, -1, keepdims=True) + t.rms_norm_eps) * scale

    turns = positions[[0, 1, 2, 0, 1, 2, 0, 0], 0].T * t.rope_theta ** -(np.arange(8) / 8)
    h = normal(x, weights["input_layernorm"]["scale"])
    for got, name in ((q, "q"), (k, "k")):
        want = normal((h @ weights[f"{name}_proj"]["kernel"]).reshape(5, -1, 16), weights[f"{name}_norm"]["scale"])
        want = (want[..., :8] + 1j * want[..., 8:]) * np.exp(1j * turns)[:, None]
        np.testing.assert_allclose(got[0], np.concatenate([want.real, want.imag], -1), atol=2e-5)


def test_answers_are_those_of_one_forward(config):
    params = tiny_params(config)
    prefill_and_decode_equal_one_forward((config, params))
    params["decoder"]["lm_head"]["kernel"][:, [config.image_token_id, config.video_token_id]] = 0  # never the largest
    samples = mixed_samples(config)
    engine = Engine(Model(config, params, FakeProcessor()), ladder=Ladder(tokens=(192, 256)))
    for s, result in zip(samples, engine.generate(samples, max_new_tokens=8, ignore_eos=True), strict=True):
        whole = s._replace(tokens=np.concatenate([s.tokens, np.array(result.token_ids, np.int32)]))
        logits = jax.jit(forward, static_argnums=0)(config, params, make_batch([whole], config))[0]
        n = len(s.tokens)
        assert logits[n - 1 : n + 7].argmax(-1).tolist() == result.token_ids
