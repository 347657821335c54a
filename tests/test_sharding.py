"""Every mesh of eight virtual devices gives the logits, tokens and training steps of one device."""

from functools import partial

import jax
import numpy as np
import pytest
from test_engine import FakeProcessor
from test_losses import assert_close, samples_of
from tiny import tiny_config, tiny_params, train_batch

from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.params.specs import param_shardings, specs
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.step import batch_shardings, init_state, make_optimizer, make_step, shardings
from qwenvl_jax.types import Model

MESHES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if 8 % (d * f) == 0]


def config_of(family):
    """Six query heads and two KV heads: tensor axes above two need copies of KV heads."""
    windows = {"fullatt_block_indexes": ()} if family == "qwen2_5_vl" else {}
    text = dict(num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)
    return tiny_config(family, text, {"depth": 1} | windows)


def answers(model, compilations) -> tuple[dict, list]:
    """Logits after eight prompts, some with pictures or clips, and the generated tokens."""
    samples = samples_of(model.config) * 2
    engine = Engine(model, max_batch=8, ladder=Ladder(rows=(8,), tokens=(64, 128)))
    compilations.clear()
    with jax.transfer_guard("disallow"):
        logits = jax.device_get(engine._prompt(make_batch(samples, model.config, engine.ladder))[0])
        results = engine.generate(samples, max_new_tokens=8, temperature=0, ignore_eos=True)
    # Each program's output has one layout, so the next program is compiled once.
    assert len(compilations) == sum(engine.traces.values()), (len(compilations), engine.traces)
    return {"logits": logits}, [r.token_ids for r in results]


def steps(step, state, batch, compilations):
    """Two training steps: the state after them, and their metrics and parameters."""
    seen, counts = [], []
    for _ in range(2):
        state, metrics = step(state, batch)
        seen.append({"loss": metrics["loss"], "norm": metrics["grad_norm"]})
        counts.append(len(compilations))
    assert counts[0] == counts[1]  # the state's layout does not change
    return state, {"metrics": seen, "params": state.params}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, meshes", [("qwen2_5_vl", MESHES[::2]), ("qwen2_5_vl", MESHES[1::2]), ("qwen2_vl", [(2, 2, 2)])]
)
def test_eight_devices_equal_one(family, meshes, compilations):
    """One family on every mesh; the other, whose decoder is the same, on one."""
    config = config_of(family)
    params, samples = tiny_params(config), samples_of(config)
    rows = [[samples[i % 4], samples[(i + i // 4) % 4]] for i in range(8)]
    batch = jax.tree.map(lambda *parts: np.stack(parts), train_batch(config, rows), train_batch(config, rows[::-1]))
    assert batch.inputs.vision[0].frames.shape[1] % 8 == 0  # lanes are split too
    remat = family == "qwen2_vl"
    declared = specs(config)
    # eps: without it, the sign of a gradient near zero would count
    optimizer = make_optimizer(declared, 1e-2, eps=1e-3, weight_decay=0.1)
    step = partial(make_step, declared, partial(sft_loss, config, remat=remat, chunk=32), optimizer, lambda path: True)
    start = partial(init_state, declared, optimizer=optimizer, trainable=lambda path: True)
    logits, tokens = answers(Model(config, params, FakeProcessor(), {}), compilations)
    _, trained = steps(step(), start(jax.tree.map(np.array, params)), batch, compilations)

    for shape in meshes:
        mesh = make_mesh(*shape)
        split = jax.device_put(params, param_shardings(declared, mesh))
        mine, theirs = answers(Model(config, split, FakeProcessor(), {}), compilations)
        assert_close(mine, logits)
        assert theirs == tokens, shape
        with jax.set_mesh(mesh):
            placed = jax.device_put(batch, batch_shardings(batch, mesh))
            state, mine = steps(step(), start(split), placed, compilations)
        assert_close(mine, trained)
        for leaf, sharding in zip(
            jax.tree.leaves(state), jax.tree.leaves(shardings(state, declared, mesh)), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
