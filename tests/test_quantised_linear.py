"""Quantised Linears: products, gradients, adapters and meshes give what the dequantised model gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quantised, sample, tiny_config

from qwenvl_jax.config import Quantised
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.model import linear, qwenvl
from qwenvl_jax.model.linear import dequantise, quantised_product
from qwenvl_jax.params import lora
from qwenvl_jax.params.quantised import KERNEL_DTYPES
from qwenvl_jax.params.specs import flatten

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
