"""Quantising: rounding errors, folding, calibration, and the files that `qwenvl quantize` writes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwenvl_convert import calibrate, rounding
from qwenvl_convert.rounding import SHARED
from tiny import FAMILIES, mixed_samples, tiny_config, tiny_params

from qwenvl_jax.config import Quantised
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.model.linear import Linear
from qwenvl_jax.model.qwenvl import forward

FORMS = {
    "int8": Quantised("int8"),
    "int4": Quantised("int4", 16),
    "int4 with zeros": Quantised("int4", 16, zeros=True),
}


def layer_of(params: dict, l: int) -> dict:
    return jax.tree.map(lambda w: w[l], params["decoder"]["layers"])


def with_layers(params: dict, layers: list[dict]) -> dict:
    stacked = jax.tree.map(lambda *w: jnp.stack(w), *layers)
    return params | {"decoder": params["decoder"] | {"layers": stacked}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_no_weight_moves_by_more_than_half_a_scale(form, dtype):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((64, 40)).astype(np.float32) * np.exp(rng.normal(0, 3, (64, 40))).astype(np.float32)
    kernel[:, 0], kernel[:16, 1], kernel[:, 2] = 0, 0, np.abs(kernel[:, 2])
    kernel[:, 3] = -np.abs(kernel[:, 3])
    kernel[:, 4] = np.arange(64) + 0.5
    kernel[:, 5] *= 1e-6
    rounded = rounding.to_nearest(jnp.asarray(kernel), FORMS[form], dtype)
    assert np.array_equal(np.asarray(rounded.scales).astype(jnp.dtype(dtype)).astype(np.float32), rounded.scales)
    bits = rounding.BITS[FORMS[form].dtype]
    codes = np.asarray(rounded.kernel, int)
    assert -(2 ** (bits - 1)) <= codes.min() < 0 < codes.max() < 2 ** (bits - 1)
    scales = np.repeat(np.asarray(rounded.scales), 64 // len(rounded.scales), 0)
    assert (np.abs(rounded.dense() - kernel) <= scales * (0.5 + 1e-5)).all()
    # The scales are no larger than they need to be.
    groups = kernel.reshape(len(rounded.scales), -1, 40)[..., 6:]
    spans = np.ptp(groups, axis=1) * 16 / 15 if FORMS[form].zeros else 2 * np.abs(groups).max(1)
    assert (np.asarray(rounded.scales)[:, 6:] <= 1.01 * spans / (2**bits - 1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_with_scales_folded_in_computes_the_same(family):
    config, rng = tiny_config(family, dict(qk_norm=True)), np.random.default_rng(0)
    params, layers = tiny_params(config), []
    heads = config.text.num_key_value_heads
    for l in range(config.text.num_hidden_layers):
        layer = layer_of(params, l)
        for linears, source in SHARED.values():
            size = jnp.asarray(np.exp(rng.normal(0, 1, layer[linears[0]]["kernel"].shape[0])), jnp.float32)
            scales = rounding._shared(size, (heads, 2)) if source == "v_proj" else size
            layer = rounding.fold(layer, linears, source, scales, config.text)
        layers.append(layer)
    batch = make_batch(mixed_samples(config), config)
    want, got = (forward(config, p, batch) for p in (params, with_layers(params, layers)))
    live = batch.segments > 0
    assert np.abs(got - want)[live].max() <= 1e-5 * np.abs(want[live]).max()
    kernels = [p["decoder"]["layers"]["o_proj"]["kernel"] for p in (params, with_layers(params, layers))]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_sees_what_the_linears_get(family):
    config, rng = tiny_config(family), np.random.default_rng(0)
    layer, seen = layer_of(tiny_params(config), 1), {}
    x = jnp.asarray(rng.standard_normal((1, 9, 48)), jnp.float32)
    positions = np.tile(np.arange(9), (3, 1, 1))
    segments = np.array([[1] * 5 + [2] * 3 + [0]])

    def spy(call, args, _, context):
        if isinstance(context.module, Linear):
            seen.setdefault(context.module.name, args[0])
        return call(*args)

    with nn.intercept_methods(spy):
        y, inputs = calibrate.block_inputs(config, layer, x, positions, segments)
    for name, (linears, _) in SHARED.items():
        for linear in linears:
            np.testing.assert_allclose(inputs[name].reshape(9, -1), seen[linear].reshape(9, -1), rtol=1e-5, atol=1e-6)
    assert set(seen) == set(rounding.LINEARS)

    rows = calibrate.Rows(np.array(x)[None], positions[None], segments[None])
    kept = calibrate.pass_layer(config, layer, rows, 16)
    np.testing.assert_allclose(rows.x[0], y, rtol=1e-5, atol=1e-5)
    h = np.asarray(inputs["mlp"])[0, :8]
    np.testing.assert_allclose(kept["mlp"].size, np.abs(h).mean(0), rtol=1e-5)
    change = np.zeros((48, 5), np.float32)  # of one group, so that the estimate is exact
    change[16:32] = rng.standard_normal((16, 5))
    np.testing.assert_allclose(rounding.error(kept["mlp"], change)[1], ((h @ change) ** 2).mean(0), rtol=1e-4)
