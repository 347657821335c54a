"""CPUs: separate arrays per layer, exact matmuls with bfloat16 weights, the precision of checkpoints."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from qwenvl_jax.infer import programs
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.inputs.layout import make_sample
from qwenvl_jax.model import qwenvl
from qwenvl_jax.model.linear import narrow_product
from qwenvl_jax.params import checkpoint, precision, specs
from qwenvl_jax.types import Model


class NoText:
    allow_control_tokens, control_tokens = False, {}

    def decode(self, ids, **_):
        return ""


def model_of(config):
    return Model(config, jax.jit(specs.init, static_argnums=0)(config, jax.random.key(0)), NoText(), {})


@pytest.mark.parametrize("dims", ["DF", "FD"])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_bfloat16_weights_multiply_float32_exactly(dims, rows, scale):
    rng = np.random.default_rng(0)
    x = (scale * rng.standard_normal((rows, 300))).astype(np.float32)
    w = jnp.asarray(rng.standard_normal((300, 130)), jnp.bfloat16)
    exact = x.astype(np.float64) @ np.asarray(w, np.float64)
    got = jax.jit(narrow_product, static_argnums=2)(x, w if dims == "DF" else w.T, dims)
    # As close to float64 as a float32 matmul; with x rounded to bfloat16, the error is a thousand times larger.
    limit = 2 * np.abs(x @ np.asarray(w, np.float32) - exact).max()
    assert np.abs(got - exact).max() <= limit
    assert (
        np.abs(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) @ np.asarray(w, np.float64) - exact).max() > limit
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_the_exact_product(dtype):
    rng = np.random.default_rng(1)
    x, w = jnp.asarray(rng.standard_normal((3, 40)), dtype), jnp.asarray(rng.standard_normal((40, 24)), jnp.bfloat16)

    def loss(product):
        return lambda x, w: jnp.sum(jnp.sin(product(x, w).astype(jnp.float32)))

    got = jax.grad(loss(lambda x, w: narrow_product(x, w, "DF")), (0, 1))(x, w)
    want = jax.grad(loss(lambda x, w: x @ w.astype(x.dtype)), (0, 1))(x, w)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_separate_layers_take_no_memory_and_change_nothing(dtype):
    """Kernels that are aligned to 64 bytes are views of the stack."""
    config = tiny_config("qwen2_5_vl", dtype=dtype)
    params = model_of(config).params
    scanned, step = programs.cpu_layouts(params)
    stack, apart = params["decoder"]["layers"], step["decoder"]["layers"]
    assert len(apart) == config.text.num_hidden_layers
    for l, layer in enumerate(apart):
        for whole, one in zip(jax.tree.leaves(stack), jax.tree.leaves(layer), strict=True):
            assert np.array_equal(whole[l].view(np.uint8), one.view(np.uint8))
            if whole[l].nbytes % 64 == 0:
                assert one.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + l * one.nbytes
    kernel = scanned["decoder"]["layers"]["q_proj"]["kernel"]
    assert kernel.dtype == (jnp.uint16 if dtype == "bfloat16" else jnp.float32)
    assert kernel.unsafe_buffer_pointer() == stack["q_proj"]["kernel"].unsafe_buffer_pointer()


def test_a_decode_step_copies_no_weights():
    config = tiny_config("qwen2_5_vl", dtype="float32")
    engine = Engine(model_of(config), max_length=64)
    tokens, lengths = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
    t = config.text
    cache = jnp.zeros((1, t.num_key_value_heads, 64, t.head_dim))
    caches = [cache] * t.num_hidden_layers
    decode = jax.jit(qwenvl.decode, static_argnums=0)
    sizes = set()
    for params in (engine._step_params, engine.params):
        text = decode.lower(config, params, tokens, qwenvl.Cache(caches, caches, lengths, lengths)).compile().as_text()
        D, F = t.hidden_size, t.intermediate_size
        sizes.add(any(f"f32[1,{D},{F}]" in line and " parameter(" not in line for line in text.splitlines()))
    assert sizes == {False, True}  # separate: no copy; stacked: a copy


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_weights_kept_in_16_bits_answer_as_float32(family):
    narrow = tiny_config(family, dtype="bfloat16")
    model = model_of(narrow)
    config = narrow.replace(dtype="float32")
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), model.params)
    sample = make_sample(np.arange(1, 20), (), narrow)
    options = dict(max_new_tokens=8, temperature=0, ignore_eos=True, logprobs=1)
    kept, cast = (
        Engine(model._replace(config=config, params=params), max_length=64).generate([sample] * 2, **options)
        for params in (model.params, wide)
    )
    assert [a.token_ids for a in kept] == [a.token_ids for a in cast]
    np.testing.assert_allclose(kept[0].logprobs, cast[0].logprobs, atol=1e-5)


def test_precision_follows_the_free_memory(monkeypatch):
    config = tiny_config("qwen2_5_vl", dtype="bfloat16")
    need = 4 * specs.count_params(config)
    for free, weights in ((int(need / precision.MEMORY_SHARE) + 8, "float32"), (need, None)):
        monkeypatch.setattr(precision, "free_memory", lambda free=free: free)
        for dtype in ("bfloat16", "float16"):
            chosen = checkpoint.precision_of(config.replace(dtype=dtype))
            assert (chosen.compute, chosen.weights) == ("float32", weights) and dtype in chosen.reason
        assert checkpoint.precision_of(config.replace(dtype="float32")) == ("float32", None, "")
    monkeypatch.undo()
    assert 0 < precision.free_memory() < 2**50


def test_a_containers_limit_counts_but_not_its_file_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "CGROUP", tmp_path)
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 100\ninactive_file 700\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert precision.free_memory() == 800
    (tmp_path / "memory.max").write_text("max\n")
    assert precision.free_memory() > 1000


@pytest.mark.parametrize("tiny_checkpoint", ["qwen2_5_vl"], indirect=True)
def test_a_cast_is_logged_on_stderr_by_default(tiny_checkpoint):
    """Python's last-resort handler prints warnings unchanged."""
    code = f"import qwenvl_jax; qwenvl_jax.load({str(tiny_checkpoint)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.startswith(f"{tiny_checkpoint.name}: on a CPU, bfloat16 weights are cast to float32")
    assert run.stderr.count("\n") == 1 and not run.stdout
