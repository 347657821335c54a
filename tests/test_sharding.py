"""On eight virtual devices, whatever the mesh: the logits, tokens and training steps of one device."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

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
    """Heads that no mesh of eight shares without copies: six of queries, two of keys."""
    windows = {"fullatt_block_indexes": ()} if family == "qwen2_5_vl" else {}
    text = dict(num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)
    return tiny_config(family, text, {"depth": 1} | windows)


def answers(model) -> tuple[dict, list]:
    """Of eight conversations, some with pictures or clips: logits after the prompts, and tokens."""
    samples = samples_of(model.config) * 2
    engine = Engine(model, max_batch=8, ladder=Ladder(rows=(8,), tokens=(64, 128)))
    compiled.clear()
    with jax.transfer_guard("disallow"):
        logits = jax.device_get(engine._prompt(make_batch(samples, model.config, engine.ladder))[0])
        results = engine.generate(samples, max_new_tokens=8, temperature=0, ignore_eos=True)
    # What programs hand on has one layout, for which the next one is compiled once.
    assert len(compiled) == sum(engine.traces.values()), (len(compiled), engine.traces)
    return {"logits": logits}, [r.token_ids for r in results]


def steps(step, state, batch):
    """Two steps: the state after them; the losses, gradient norms and parameters."""
    seen, counts = [], []
    for _ in range(2):
        state, metrics = step(state, batch)
        seen.append({"loss": metrics["loss"], "norm": metrics["grad_norm"]})
        counts.append(len(compiled))
    assert counts[0] == counts[1]  # what comes out is laid out as what goes in
    return state, {"metrics": seen, "params": state.params}


compiled = []


def compare(family, meshes) -> None:
    """What the process below runs."""
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    config = config_of(family)
    params, samples = tiny_params(config), samples_of(config)
    rows = [[samples[i % 4], samples[(i + i // 4) % 4]] for i in range(8)]
    batch = jax.tree.map(lambda *parts: np.stack(parts), train_batch(config, rows), train_batch(config, rows[::-1]))
    assert batch.inputs.vision[0].frames.shape[1] % 8 == 0  # lanes are split too
    remat = family == "qwen2_vl"
    declared = specs(config)
    optimizer = make_optimizer(
        declared, 1e-2, eps=1e-3, weight_decay=0.1
    )  # eps: or the sign of a zero gradient would count
    step = partial(make_step, declared, partial(sft_loss, config, remat=remat, chunk=32), optimizer, lambda path: True)
    start = partial(init_state, declared, optimizer=optimizer, trainable=lambda path: True)
    logits, tokens = answers(Model(config, params, FakeProcessor(), {}))
    _, trained = steps(step(), start(jax.tree.map(np.array, params)), batch)

    for shape in meshes:
        mesh = make_mesh(*shape)
        split = jax.device_put(params, param_shardings(declared, mesh))
        mine, theirs = answers(Model(config, split, FakeProcessor(), {}))
        assert_close(mine, logits)
        assert theirs == tokens, shape
        with jax.set_mesh(mesh):
            state, mine = steps(step(), start(split), jax.device_put(batch, batch_shardings(batch, mesh)))
        assert_close(mine, trained)
        for leaf, sharding in zip(
            jax.tree.leaves(state), jax.tree.leaves(shardings(state, declared, mesh)), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, meshes", [("qwen2_5_vl", MESHES[::2]), ("qwen2_5_vl", MESHES[1::2]), ("qwen2_vl", [(2, 2, 2)])]
)
def test_eight_devices_equal_one(family, meshes):
    """On every mesh there is; of the other family, whose decoder is the same, on one."""
    here = Path(__file__).parent
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    code = f"import test_sharding; test_sharding.compare({family!r}, {meshes})"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
