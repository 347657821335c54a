"""Quantised Linears: products, gradients, adapters and meshes give what the dequantised model gives."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwenvl_convert.peft import save_adapter
from test_engine import FakeProcessor
from tiny import picture, quantised, sample, tiny_config, train_batch

from qwenvl_jax.config import Quantised
from qwenvl_jax.errors import InputError
from qwenvl_jax.families import PRESETS
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.model import linear, qwenvl
from qwenvl_jax.model.kernels.quantised import fits, quantised_dot
from qwenvl_jax.model.linear import pack, quantised_product
from qwenvl_jax.params import lora
from qwenvl_jax.params.checkpoint import _attached
from qwenvl_jax.params.place import ArraySource, Regrouped, to_devices
from qwenvl_jax.params.quantised import KERNEL_DTYPES, dequantise
from qwenvl_jax.params.specs import check_mesh, flatten, on_mesh, param_shardings, specs, specs_of
from qwenvl_jax.plan import plan
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.step import init_state, make_optimizer, make_step, split
from qwenvl_jax.types import Model

FORMS = {
    "int4": Quantised("int4", 16),
    "int4 with zeros": Quantised("int4", 16, zeros=True),
    "int4 in order": Quantised("int4", 16, zeros=True, order=True),
    "int8": Quantised("int8"),
    "int8 in groups": Quantised("int8", 8, zeros=True),
    "float8": Quantised("float8_e4m3fn"),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def drawn(form: Quantised, rows: int, columns: int, seed: int = 0) -> dict:
    """A random kernel, its scales, and zeros and order if the form has them."""
    rng = np.random.default_rng(seed)
    dtype, groups = KERNEL_DTYPES[form.dtype], rows // (form.group or rows)

    def codes(*shape):
        most = 8 if form.dtype == "int4" else 127
        return jnp.asarray(rng.integers(-most, most, shape).astype(np.float32).astype(dtype))

    scales = rng.uniform(0.5, 2, (groups, columns)) / (50 if form.dtype == "int4" else 900)
    held = {"kernel": codes(rows, columns), "scales": jnp.asarray(scales, jnp.float32)}
    if form.zeros:
        held["zeros"] = codes(groups, columns)
    if form.order:
        held["order"] = jnp.asarray(rng.permutation(rows), jnp.int32)
    return held


def dense(held: dict) -> np.ndarray:
    """The kernel that it stands for, by the definition in config.py, in float64."""
    kernel, scales = (np.asarray(held[name]).astype(np.float64) for name in ("kernel", "scales"))
    zeros = np.asarray(held.get("zeros", np.zeros_like(scales))).astype(np.float64)
    group = len(kernel) // len(scales)
    out = np.empty_like(kernel)
    for j, row in enumerate(kernel):
        out[held["order"][j] if "order" in held else j] = (row - zeros[j // group]) * scales[j // group]
    return out


@forms
@pytest.mark.parametrize("rows", [1, 2, 33, linear.GROUPED_ROWS + 1])
def test_products_and_gradients_are_those_of_the_dense_kernel(form, rows):
    held = drawn(form, 48, 40)
    x = np.random.default_rng(1).standard_normal((rows, 48)).astype(np.float32)
    want = dense(held)
    got = jax.jit(quantised_product)(x, **held)
    np.testing.assert_allclose(got, x @ want, rtol=1e-5, atol=2e-5 * np.abs(want).max())

    if form.dtype == "int4":
        packed = held | {"kernel": pack(held["kernel"].astype(jnp.int8), form.group)}
        assert packed["kernel"].shape == (24, 40)
        again = jax.jit(quantised_product)(x, **packed)
        np.testing.assert_allclose(again, got, rtol=1e-5, atol=1e-5 * np.abs(want).max())

    def loss(x):
        return jnp.sum(jnp.sin(quantised_product(x, **held)))

    slope = np.cos(np.asarray(got, np.float64)) @ want.T
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), slope, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@forms
def test_a_quantised_model_is_its_dequantised_model(form):
    config, params, wide = quantised(tiny_config("qwen2_5_vl"), form)
    rng = np.random.default_rng(0)
    batch = make_batch([sample(rng, config, 9), sample(rng, config, 5)], config)
    forward = jax.jit(qwenvl.forward, static_argnums=0)
    want = forward(config.replace(quantised=()), wide, batch)
    np.testing.assert_allclose(forward(config, params, batch), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("form", [FORMS["int4 in order"], FORMS["int8"]], ids=["int4", "int8"])
def test_an_engine_answers_as_with_the_dequantised_model(form):
    config, params, wide = quantised(tiny_config("qwen2_vl"), form)
    rng = np.random.default_rng(0)
    samples = [sample(rng, config, 9), sample(rng, config, 3, picture(rng, config, 6, 10), 4)]
    answers = [
        Engine(Model(c, p, FakeProcessor(), {}), max_length=64).generate(
            samples, max_new_tokens=8, temperature=0, ignore_eos=True, logprobs=1
        )
        for c, p in ((config, params), (config.replace(quantised=()), wide))
    ]
    for got, want in zip(*answers, strict=True):
        assert got.token_ids == want.token_ids
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_a_grouped_product_is_that_of_the_dense_kernel():
    """The form for TPUs."""
    for rows in (1, 5):
        for form in FORMS.values():
            held = drawn(form, 48, 40)
            held.pop("order", None)
            x = np.random.default_rng(1).standard_normal((rows, 48)).astype(np.float32)
            args = held["kernel"].reshape(len(held["scales"]), -1, 40), held["scales"], held.get("zeros")
            want = dense(held)
            got = jax.jit(linear._grouped)(x, *args)
            np.testing.assert_allclose(got, x @ want, rtol=1e-5, atol=2e-5 * np.abs(want).max())


def regrouped(config, params, sizes):
    """The model as `load` lays it out over a mesh of these sizes."""
    source, config = ArraySource(config, params), on_mesh(config, sizes)
    return config, to_devices(Regrouped(source, specs(config)), progress=False)


@pytest.mark.parametrize(
    ("shape", "group"),
    [((1, 1, 8), (16, 4)), ((2, 2, 2), (8, 16)), ((1, 8, 1), (2, 16))],
    ids=["tensor", "all axes", "fsdp"],
)
def test_eight_devices_answer_as_one(shape, group):
    """Groups of 16 in widths of 48, or of 96 over 8 devices, are split; the inputs are in an order of their own."""
    config = tiny_config("qwen2_5_vl", dict(num_hidden_layers=2, intermediate_size=96))
    config, params, _ = quantised(config, FORMS["int4 in order"])
    rng = np.random.default_rng(0)
    samples = [sample(rng, config, 9), sample(rng, config, 5)] * 4
    mesh = make_mesh(*shape)
    split, laid = regrouped(config, params, mesh.shape)
    forms = dict(split.quantised)
    assert (forms["decoder/layers/up_proj"].group, forms["decoder/layers/down_proj"].group) == group
    laid = jax.device_put(laid, param_shardings(specs(split), mesh))
    down = laid["decoder"]["layers"]["down_proj"]
    assert down["scales"].sharding.spec == down["kernel"].sharding.spec  # never a copy on every device
    batch = make_batch(samples, config)
    with jax.set_mesh(mesh):
        got = jax.jit(qwenvl.forward, static_argnums=0)(split, laid, batch)
    want = jax.jit(qwenvl.forward, static_argnums=0)(config, params, batch)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize(
    ("rows", "tensor", "group"), [(11008, 4, 64), (18944, 8, 64), (29568, 2, 64), (29568, 8, 16), (29696, 8, 128)]
)
def test_groups_that_a_mesh_would_split_become_smaller_ones(rows, tensor, group):
    config = tiny_config("qwen2_5_vl", dict(intermediate_size=rows))
    config = config.replace(quantised=(("decoder/layers/down_proj", Quantised("int4", 128)),))
    assert dict(on_mesh(config, {"tensor": tensor}).quantised)["decoder/layers/down_proj"].group == group
    check_mesh(config, {"tensor": tensor})


@forms
@pytest.mark.parametrize("rows", [1, 17, 70])
def test_the_gpu_kernel_is_the_dense_kernel(form, rows):
    """Interpreted."""
    form = dataclasses.replace(form, group=form.group and 64)
    layers = [drawn(form, 128, 256, seed) for seed in range(2)]
    kernel, scales, zeros = (
        jnp.stack([h[name] for h in layers]) if name in layers[0] else None for name in ("kernel", "scales", "zeros")
    )
    kernel = kernel.reshape(2, scales.shape[1], -1, 256)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 128)), jnp.bfloat16)
    assert fits(x, kernel, scales)
    got = quantised_dot(x, kernel, scales, zeros, 1, interpret=True)
    layers[1].pop("order", None)
    want = np.asarray(x, np.float64) @ dense(layers[1])
    assert got.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-2, atol=1e-2 * np.abs(want).max())


def test_a_stack_is_multiplied_as_its_layer():
    held = {name: jnp.stack([w, w[::-1]]) for name, w in drawn(FORMS["int4 in order"], 48, 40).items()}
    x = np.random.default_rng(1).standard_normal((3, 48)).astype(np.float32)
    got = quantised_product(x, **held, layer=1)
    np.testing.assert_array_equal(got, quantised_product(x, **{name: w[1] for name, w in held.items()}))


def test_adapters_train_over_a_quantised_base():
    """Gradients and optimizer state are of adapters alone; the base stays as it is."""
    config, params, wide = quantised(tiny_config("qwen2_5_vl"), FORMS["int4 in order"])
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda a: a[None], train_batch(config, [[sample(rng, config, 9)], [sample(rng, config, 12)]]))
    losses, logits = [], []
    for c, p in ((config, params), (config.replace(quantised=()), wide)):
        p = lora.add(c, p, jax.random.key(1), rank=4, alpha=8)
        declared = specs_of(c, p)
        optimizer = make_optimizer(declared, 1e-2)
        step = make_step(declared, partial(sft_loss, c), optimizer, lora.is_trainable)
        state = init_state(declared, jax.tree.map(jnp.array, p), optimizer, lora.is_trainable)
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
        assert len(moments) == 2 * sum(map(lora.is_trainable, flatten(p)))
        seen = []
        for _ in range(4):
            state, metrics = step(state, batch)
            seen.append(float(metrics["loss"]))
        assert seen[-1] < seen[0]
        losses.append(seen)
        trained = flatten(state.params)
        for path, leaf in flatten(p).items():
            assert lora.is_trainable(path) or np.array_equal(trained[path], leaf), path
        logits.append(
            jax.jit(qwenvl.forward, static_argnums=0)(c, state.params, jax.tree.map(lambda a: a[0], batch.inputs))
        )
    np.testing.assert_allclose(*losses, rtol=1e-4)
    np.testing.assert_allclose(*logits, atol=1e-3 * np.abs(logits[1]).max())


def test_what_quantised_weights_cannot_do_is_refused():
    config, params, _ = quantised(tiny_config("qwen2_5_vl"), FORMS["int4"])
    with pytest.raises(InputError, match="down_proj is quantised, so an adapter cannot be merged into it; dequantise"):
        lora.merge(lora.add(config, params, jax.random.key(0), rank=2, alpha=2, targets="down_proj"))
    with pytest.raises(InputError, match="is quantised and cannot be trained itself; train adapters"):
        split(params, lambda path: path.startswith("decoder/layers"))
    dense = dequantise(config, lora.strip(params))[1]
    assert lora.merge(dense) is not dense


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_plan_counts_few_bits(form):
    """Qwen widened the MLP of the 72B so that groups of 128 divide it."""
    config = plan.quantised(PRESETS["qwen2.5-vl-72b"], form)
    declared = specs(config)
    up = declared["decoder/layers/up_proj/kernel"]
    assert up.shape == (80, 8192, 29696) and up.nbytes == up.size * (1 if form == "int8" else 0.5)
    assert declared["decoder/layers/up_proj/scales"].shape == (80, 64 if form == "int4" else 1, 29696)
    assert declared["vision/blocks/qkv/kernel"].dtype == jnp.bfloat16
    with pytest.raises(InputError, match="quantised already"):
        plan.quantised(config, form)


def test_an_adapter_of_a_quantised_checkpoint_stays_beside_its_kernels(tmp_path):
    """`load` does this, because the adapter cannot be merged."""
    config, params, _ = quantised(tiny_config("qwen2_5_vl"), FORMS["int4"])
    adapted = lora.add(config, params, jax.random.key(1), rank=4, alpha=8)
    save_adapter(config, adapted, tmp_path / "adapter", base_name="base")
    got = flatten(_attached(config, params, (tmp_path / "adapter",)))
    for path, leaf in flatten(adapted).items():
        np.testing.assert_array_equal(got[path], leaf, path)
    assert got.keys() == flatten(adapted).keys()
