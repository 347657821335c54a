"""Window attention on TPUs: the kernel against plain XLA, and the cost of compiled layers of the tower."""

import dataclasses
import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.families import PRESETS
from qwenvl_jax.model.kernels import window as window_kernel
from qwenvl_jax.plan.hlo import Program
from qwenvl_jax.sharding import make_mesh

WINDOWS, FAMILY_2 = PRESETS["qwen2.5-vl-7b"], PRESETS["qwen2-vl-7b"]


def problem(seed: int, R: int, blocks: int, slots: int, heads: int, H: int):
    """Random inputs, window ids (some blocks end in padding, 0) and weights for the sum of the outputs."""
    rng = np.random.default_rng(seed)
    P, E = blocks * slots, heads * H
    qkv, w = (jnp.asarray(rng.standard_normal((R, P, n * E)), jnp.float32) for n in (3, 1))
    cos, sin = (jnp.asarray(f(rng.uniform(0, 9, (R, P, H // 2))), jnp.float32) for f in (np.cos, np.sin))
    windows = np.sort(rng.integers(1, rng.integers(2, 5), (R * blocks, slots)), 1)
    windows[rng.random(R * blocks) < 0.5, -rng.integers(1, slots) :] = 0
    return qkv, cos, sin, jnp.asarray(windows.reshape(R, P), jnp.int32), w


def value_and_grads(attend, qkv, cos, sin, windows, w):
    f = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(attend(*a[:4]) * a[4]), (0, 1, 2)))
    return attend(qkv, cos, sin, windows), f(qkv, cos, sin, windows, w)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.sampled_from([16, 64]), st.integers(1, 4)),
    width=st.sampled_from([8, 64, 80, 128]),
)
def test_the_kernel_equals_plain_attention(seed, shape, width):
    """Forward and backward; the kernel is interpreted."""
    args, sizes = problem(seed, *shape, width), dict(heads=shape[3], slots=shape[2])
    kernel = functools.partial(window_kernel.kernel, **sizes, interpret=True)
    plain = functools.partial(window_kernel.plain, **sizes)
    assert_same(value_and_grads(kernel, *args), value_and_grads(plain, *args))


def test_on_a_mesh_each_device_has_its_lanes():
    args, sizes = problem(0, 4, 2, 16, 2, 8), dict(heads=2, slots=16)
    want = value_and_grads(lambda *a: window_kernel.plain(*a, **sizes), *args)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        got = value_and_grads(jax.jit(lambda *a: window_kernel.kernel(*a, **sizes, interpret=True)), *args)
    assert not got[0].is_fully_replicated
    assert_same(jax.device_get(got), jax.device_get(want))


def compile_for_tpu(f, *args):
    """f compiled for one v6e; args: trees of shapes."""
    from qwenvl_jax.plan import hardware, plan

    mesh = plan.make_mesh(devices=hardware.devices(hardware.parse_target("v6e-1")))
    args = jax.tree.map(lambda a: plan._shaped(mesh, "." * a.ndim, a.shape, a.dtype), args)
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*args).compile()


def shallow(config):
    """A tower of two layers: one with windows, if the model has any, and one with full attention."""
    vision = dataclasses.replace(
        config.vision, depth=2, fullatt_block_indexes=(1,) if config.vision.window_size else ()
    )
    return config.replace(vision=vision)


def tower(config, images: int, patches: int):
    """Two layers of a tower, compiled for `images` lanes with one image of `patches` each."""
    from qwenvl_jax.model.vision import encode_vision
    from qwenvl_jax.params.specs import abstract_params
    from qwenvl_jax.types import VisionBatch

    ids = jax.ShapeDtypeStruct((images, patches), jnp.int32)
    pixels = jax.ShapeDtypeStruct((*ids.shape, config.vision.patch_values), jnp.uint8)
    lanes = VisionBatch(pixels, jax.ShapeDtypeStruct((*ids.shape, 2), jnp.int32), ids, ids)
    params = {"vision": abstract_params(config)["vision"]}
    return compile_for_tpu(lambda p, lanes: encode_vision(config, p, lanes), params, lanes)


def products(config, images: int, patches: int) -> int:
    """FLOPs of the tower's matmuls and attention; a patch attends to its window or its image."""
    from qwenvl_jax.params.specs import abstract_params

    v, rows, total = config.vision, images * patches, 0
    for path, w in jax.tree_util.tree_leaves_with_path(abstract_params(config)["vision"]):
        if path[-1].key == "kernel":
            total += 2 * w.size * rows // (v.merge_unit if path[0].key == "merger" else 1)
    seen = sum(patches if v.is_full_attention(i) else v.block_slots for i in range(v.depth))
    return total + 4 * rows * v.hidden_size * seen


compiles = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler")


@compiles
@pytest.mark.compiled
@pytest.mark.parametrize("config", (WINDOWS, FAMILY_2), ids=("qwen2_5_vl", "qwen2_vl"))
@pytest.mark.parametrize("images", (1, 64))
def test_the_tower_costs_what_its_products_do(config, images):
    config, patches = shallow(config), 2**14 // images
    text = tower(config, images, patches).as_text()
    flops = Program(text).flops
    print(f"{images}: {flops / products(config, images, patches):.3f} of the products")
    assert flops <= 1.15 * products(config, images, patches)
    if images == 1:
        assert not re.search(rf"\[(\d+,)*{patches},{patches}[,\]]", text)


@compiles
@pytest.mark.compiled
def test_a_windowed_layer_moves_little_more_than_it_must():
    """The least bytes: weights are read once, x is read and written; qkv, the attended and the gated values are written
    and read once. Norms, other copies of x, gate and up stay on the chip."""
    from qwenvl_jax.model.vision import VisionBlock

    v, P = WINDOWS.vision, 2**14
    E, half = v.hidden_size, v.hidden_size // v.num_heads // 2
    x, angles = jax.ShapeDtypeStruct((1, P, E), jnp.bfloat16), jax.ShapeDtypeStruct((1, P, half), jnp.float32)
    args = x, angles, angles, jax.ShapeDtypeStruct((1, P), jnp.int32)
    block = VisionBlock(WINDOWS, windowed=True)
    params = jax.eval_shape(block.init, jax.random.key(0), *args)
    read = Program(compile_for_tpu(block.apply, params, *args).as_text())
    (kernel,) = [i for i in read.computations[read.entry].values() if "window_attention" in i.name]
    weights = 2 * sum(math.prod(w.shape) for w in jax.tree.leaves(params))
    fewest = weights + 2 * P * (2 * E + 2 * (3 * E + E + v.intermediate_size))
    # The kernel's bytes: the least, and padding of cosines and window ids to full tiles.
    attended = 2 * P * 4 * E
    print(f"layer: {read.bytes / fewest:.2f} of {fewest / 1e6:.0f} MB")
    assert attended <= read.traffic(read.entry, kernel) <= 1.15 * attended
    assert read.bytes <= 1.5 * fewest
