"""A family that the package has never heard of: one object among FAMILIES, and all that runs the others runs it."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from qwenvl_convert.hf import read_params
from qwenvl_convert.orbax import to_hf, to_orbax
from test_engine import FakeProcessor
from tiny import followed, mixed_samples, restore, tiny_config, tiny_params, train_batch

from qwenvl_jax.config import VisionConfig
from qwenvl_jax.families import FAMILIES, from_dict, shared, to_dict
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.model.qwenvl import forward
from qwenvl_jax.params import lora
from qwenvl_jax.params.checkpoint import save
from qwenvl_jax.params.specs import flatten, init, param_shardings, specs_of
from qwenvl_jax.plan.hardware import parse_target
from qwenvl_jax.plan.plan import Job, plan
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.step import batch_shardings, init_state, make_optimizer, make_step
from qwenvl_jax.types import Model

TEXT = dict(qkv_bias=False, qk_norm=True, rope="interleaved")
TOWER = dict(norm="layer", gated_mlp=False, hidden_act="gelu", window_size=None, fullatt_block_indexes=())


def read_vision(get, width):
    sizes = shared.tower_sizes(get) | dict(hidden_size=get("width", int), intermediate_size=get("mlp", int))
    return VisionConfig(out_hidden_size=width, **sizes, **TOWER)


def write_vision(v):
    return {"depth": v.depth, "num_heads": v.num_heads, "width": v.hidden_size, "mlp": v.intermediate_size}


TOY = SimpleNamespace(
    from_dict=lambda data: shared.from_dict(data, read_vision, **TEXT),
    to_dict=lambda c: shared.to_dict(c, "ToyForConditionalGeneration", write_vision(c.vision)),
    tensor_names=lambda c: {p: n.replace("mlp.fc", "mlp.linear_fc") for p, n in shared.tensor_names(c).items()},
    time_steps=lambda visual, config: np.zeros(visual.grid.t, int),
    BOXES="thousandths",
)


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    return tiny_config("toy", TEXT | dict(head_dim=16, mrope_section=(4, 2, 2)), TOWER | dict(intermediate_size=64))


def test_initialised_sharded_adapted_and_trained(config):
    base = init(config, jax.random.key(0))
    params = lora.add(config, base, jax.random.key(1), rank=2, alpha=4, targets="llm,vision")
    declared, batch = specs_of(config, params), train_batch(config, [[s] for s in mixed_samples(config) * 2])
    batch, optimizer = jax.tree.map(lambda a: a[None], batch), make_optimizer(declared, 1e-2, eps=1e-3)
    step, trained = make_step(declared, partial(sft_loss, config, chunk=32), optimizer, lora.is_trainable), []
    for shape in ((1, 1, 1), (2, 2, 2)):
        with jax.set_mesh(mesh := make_mesh(*shape)):
            split = jax.device_put(jax.tree.map(np.array, params), param_shardings(declared, mesh))
            state = init_state(declared, split, optimizer, lora.is_trainable)
            state, metrics = step(state, jax.device_put(batch, batch_shardings(batch, mesh)))
        trained.append({"loss": metrics["loss"]} | flatten(state.params))
    assert trained[1]["decoder/layers/down_proj/kernel"].sharding.spec == jax.P(None, "tensor", "fsdp")
    for path, one in trained[0].items():
        np.testing.assert_allclose(trained[1][path], one, rtol=1e-4, atol=1e-5, err_msg=path)
        assert path == "loss" or np.any(one != flatten(params)[path]) == path.endswith("lora_b"), path  # lora_a: later


def test_converted_both_ways(config, tmp_path):
    assert from_dict(to_dict(config)) == config
    params = tiny_params(config)
    save(Model(config, params, None, {}), tmp_path / "a")
    to_hf(tmp_path / "a", tmp_path / "hf")
    to_orbax(tmp_path / "hf", tmp_path / "b")
    for back in (read_params(tmp_path / "hf", config), restore(tmp_path / "b", config)):
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_generates_what_one_forward_does(config):
    params = tiny_params(config)
    params["decoder"]["lm_head"]["kernel"][:, [config.image_token_id, config.video_token_id]] = 0  # never the largest
    samples = mixed_samples(config)
    engine = Engine(Model(config, params, FakeProcessor()), ladder=Ladder(tokens=(192, 256)))
    for s, result in zip(samples, engine.generate(samples, max_new_tokens=8, ignore_eos=True), strict=True):
        batch, n = make_batch([followed(s, result.token_ids)], config), len(s.tokens)
        logits = jax.jit(forward, static_argnums=0)(config, params, batch)[0]
        assert logits[n - 1 : n + 7].argmax(-1).tolist() == result.token_ids


@pytest.mark.compiled
def test_planned(config):
    for task in ("decode", "prefill", "vision", "train"):
        assert plan(Job(config, task, context=128, pixels=28 * 28), parse_target("v6e-1"))["fits"]
