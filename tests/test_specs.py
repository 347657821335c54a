"""A parameter is declared once, in its module; everything else reads the declaration."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwenvl_convert.hf import read_params
from qwenvl_convert.names import tensor_names
from qwenvl_convert.orbax import to_hf
from tiny import FAMILIES, mixed_samples, tiny_config, train_batch

from qwenvl_jax.errors import InputError
from qwenvl_jax.families import FAMILIES as MODULES
from qwenvl_jax.families import PRESETS, shared
from qwenvl_jax.model import decoder, qwenvl
from qwenvl_jax.model.linear import NORMAL, ONES, declare
from qwenvl_jax.params import specs as specs_module
from qwenvl_jax.params.checkpoint import save
from qwenvl_jax.params.specs import (
    check_mesh,
    flatten,
    init,
    param_shardings,
    specs,
    specs_of,
    unflatten,
)
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.step import init_state, make_optimizer, make_step
from qwenvl_jax.types import Model


class Mixed(nn.Module):
    """The decoder's RMSNorm followed by a matrix: a new parameter, declared only here."""

    eps: float
    param_dtype: str
    dims = "D ."

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", declare(ONES, ".", "scale"), x.shape[-1:], self.param_dtype)
        mix = self.param("mix", declare(NORMAL, self.dims, "linear"), x.shape[-1:] * 2, self.param_dtype)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps) * scale
        return x + x @ mix


@pytest.fixture
def declared_anew():
    """Specs are cached by config; a test's declaration must not stay in the cache."""
    specs_module._specs.cache_clear()
    yield
    specs_module._specs.cache_clear()


@pytest.fixture
def mixed(monkeypatch, declared_anew):
    """A config whose decoder has the matrix in every norm."""
    for module in (decoder, qwenvl):
        monkeypatch.setattr(module, "RMSNorm", Mixed)
    return tiny_config("qwen2_vl")


def named(config):
    """tensor_names of a family that has the matrix."""
    names = shared.tensor_names(config)
    norms = {path: name for path, name in names.items() if path.startswith("decoder/") and path.endswith("norm/scale")}
    return names | {f"{p.removesuffix('scale')}mix": f"{n.removesuffix('weight')}mix" for p, n in norms.items()}


NEW = "decoder/layers/input_layernorm/mix"


@pytest.mark.slow
def test_a_new_parameter_is_declared_in_one_place(mixed, monkeypatch, tmp_path):
    declared = specs(mixed)
    assert declared[NEW].shape == (3, 48, 48) and declared[NEW].group == "llm"
    params = init(mixed, jax.random.key(0))
    assert 0.015 < np.std(flatten(params)[NEW]) < 0.025  # initialised
    where = flatten(param_shardings(declared, make_mesh(fsdp=8)))
    assert where[NEW].spec == jax.P(None, "fsdp", None)  # sharded

    with pytest.raises(InputError, match=f"{NEW}.* names no tensor"):
        tensor_names(mixed)
    monkeypatch.setattr(MODULES["qwen2_vl"], "tensor_names", named)
    save(Model(mixed, params, None, {}), tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "hf")
    chex.assert_trees_all_equal(read_params(tmp_path / "hf", mixed), params)  # converted

    batch = jax.tree.map(lambda a: a[None], train_batch(mixed, [[s] for s in mixed_samples(mixed)]))
    optimizer = make_optimizer(declared, 1e-2, weight_decay=0.1)
    before, state = flatten(jax.tree.map(np.array, params))[NEW], init_state(declared, params, optimizer, declared.get)
    state, _ = make_step(declared, partial(sft_loss, mixed, chunk=32), optimizer, declared.get)(state, batch)
    assert (flatten(state.params)[NEW] != before).all()  # trained


def test_a_letter_that_does_not_exist(mixed, monkeypatch):
    monkeypatch.setattr(Mixed, "dims", "D Q")
    with pytest.raises(InputError, match=r"norm/mix: its dimension 'Q' is none of"):
        specs(mixed)
    monkeypatch.setattr(Mixed, "dims", "D D")
    with pytest.raises(InputError, match=r"norm/mix: two of its dimensions, L D D, are split over the same axis"):
        specs(mixed)
    monkeypatch.setattr(Mixed, "dims", "D")
    with pytest.raises(InputError, match=r"norm/mix: it has 3 dimensions, and is declared with 2"):
        specs(mixed)


class Undeclared(nn.Module):
    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", ONES, x.shape[-1:])


def test_a_parameter_that_is_not_declared(mixed, monkeypatch):
    monkeypatch.setattr(decoder, "RMSNorm", Undeclared)
    with pytest.raises(InputError, match=r"scale: its module does not `declare` it"):
        specs(mixed)


def test_a_leaf_that_nothing_declares():
    config = tiny_config("qwen2_vl")
    with pytest.raises(InputError, match="decoder/norm/gain: no module of this config declares"):
        specs_of(config, unflatten({"decoder/norm/gain": np.zeros(3)}))
    with pytest.raises(InputError, match="decoder/norm/lora_a: no module"):
        specs_of(config, unflatten({"decoder/norm/lora_a": np.zeros((3, 2))}))


@pytest.mark.parametrize(("mesh", "named"), [((1, 5, 1), "D, 48, .* fsdp, 5"), ((1, 1, 7), "F, 80, .* tensor, 7")])
def test_a_dimension_that_the_mesh_does_not_divide(mesh, named):
    config = tiny_config("qwen2_vl")
    with pytest.raises(InputError, match=f"decoder/.*: its dimension {named}"):
        check_mesh(config, dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    with pytest.raises(InputError, match=f"decoder/.*: its dimension {named}"):
        param_shardings(specs(config), jax.sharding.AbstractMesh(mesh, ("data", "fsdp", "tensor")))


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_values(family):
    config = tiny_config(family)
    params = flatten(init(config, jax.random.key(3)))
    for path, spec in specs(config).items():
        w = params[path]
        assert w.shape == spec.shape and w.dtype == spec.dtype
        if spec.role in ("scale", "bias"):
            assert (w == (spec.role == "scale")).all()
        else:
            assert abs(np.std(w) - 0.02) < 0.003 and len({*np.ravel(w)[:9].tolist()}) == 9
    layers = params["decoder/layers/q_proj/kernel"]
    assert (layers[0] != layers[1]).all()


@pytest.mark.parametrize("name", PRESETS)
def test_every_matrix_is_split_over_sixteen_devices(name):
    """The decoder's matrices are split over both axes, the tower's over one."""
    declared = specs(PRESETS[name])
    mesh = jax.sharding.AbstractMesh((1, 4, 4), ("data", "fsdp", "tensor"))
    for path, where in flatten(param_shardings(declared, mesh)).items():
        spec = declared[path]
        if spec.role not in ("scale", "bias"):
            share = spec.size // np.prod(where.shard_shape(spec.shape))
            assert share == (16 if spec.group == "llm" else 4), path
