"""Adapters: a new one changes nothing, training leaves the base unchanged, and PEFT gives the same logits."""

import functools
import json
from functools import partial
from types import MappingProxyType

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from qwenvl_convert import peft
from safetensors.numpy import load_file, save_file
from tiny import FAMILIES, clip, picture, sample, tiny_config, tiny_params

from qwenvl_jax.errors import InputError
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.model import qwenvl
from qwenvl_jax.params import lora
from qwenvl_jax.params.checkpoint import save
from qwenvl_jax.params.specs import flatten, param_shardings, specs, specs_of, unflatten
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.types import Model

EVERYWHERE = ("llm", "vision", "merger")

forward = jax.jit(qwenvl.forward, static_argnums=0)


def samples(config):
    """A conversation with a picture and a clip, and one of text; few shapes compile quickly."""
    rng = np.random.default_rng(0)
    both = sample(rng, config, 3, picture(rng, config, 6, 10), 4, clip(rng, config, 2, 4, 6), 5)
    return [both, sample(rng, config, 9)]


@functools.cache
def base(family):
    config = tiny_config(family)
    return config, tiny_params(config), make_batch(samples(config), config)


def fill(params, seed=0):
    """The adapter with a random lora_b, as if trained."""
    rng = np.random.default_rng(seed)
    return unflatten(
        {
            path: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype) if path.endswith("lora_b") else leaf
            for path, leaf in flatten(params).items()
        }
    )


@functools.cache
def adapted(family):
    config, params, _ = base(family)
    return fill(lora.add(config, params, jax.random.key(1), rank=4, alpha=6, targets=EVERYWHERE))


def assert_same(a, b):
    """Two trees of the same leaves, bit for bit."""
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: np.ravel(x).view(np.uint8), tree) for tree in (a, b)))


def relative(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


# Trees


@pytest.mark.parametrize("family", FAMILIES)
def test_step_zero_changes_nothing(family):
    config, params, batch = base(family)
    fresh = lora.add(config, params, jax.random.key(1), rank=4, alpha=6, targets=EVERYWHERE)
    assert np.array_equal(forward(config, fresh, batch), forward(config, params, batch))
    a = fresh["vision"]["blocks"]["qkv"]["lora_a"]
    assert a.dtype == np.float32 and a.shape == (4, 32, 4)
    assert 0.9 * 32**-0.5 < np.abs(a).max() <= 32**-0.5  # PEFT's kaiming_uniform with a = √5


def test_rank_alpha_and_dtype():
    config, params, _ = base("qwen2_vl")
    plain = lora.add(config, params, jax.random.key(1), rank=4, alpha=6)
    rooted = lora.add(config, params, jax.random.key(1), rank=4, alpha=6, rslora=True, dtype=jnp.bfloat16)
    q = plain["decoder"]["layers"]["q_proj"]
    assert q["lora_scale"].tolist() == [1.5] * 3
    assert rooted["decoder"]["layers"]["q_proj"]["lora_scale"].tolist() == [3] * 3
    assert rooted["decoder"]["layers"]["q_proj"]["lora_a"].dtype == jnp.bfloat16
    assert not np.array_equal(q["lora_a"][0], q["lora_a"][1])
    one = lora.add(config, params, jax.random.key(1), rank=4, alpha=6, targets="q_proj")
    assert np.array_equal(one["decoder"]["layers"]["q_proj"]["lora_a"], q["lora_a"])


@pytest.mark.slow
def test_training_an_adapter_leaves_the_base_alone():
    config, params, batch = base("qwen2_vl")
    before = jax.tree.map(np.array, params)
    start = lora.add(config, params, jax.random.key(1), rank=2, alpha=4, targets=EVERYWHERE)
    flat = flatten(start)
    trained = {path: leaf for path, leaf in flat.items() if lora.is_trainable(path)}
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def step(trained, state):
        def loss(trained):
            logits = qwenvl.forward(config, unflatten(flat | trained), batch)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch.tokens[:, 1:]))

        value, gradients = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state, losses = optimizer.init(trained), []
    for _ in range(4):
        trained, state, value = step(trained, state)
        losses.append(value)
    assert losses[-1] < losses[0]
    after = unflatten(flat | trained)
    assert_same(lora.strip(after), before)
    assert all(np.any(leaf != flat[path]) for path, leaf in trained.items())
    assert_same(lora.combine(*lora.split(after)), after)
    assert {p for p in flatten(after) if lora.is_adapter(p)} == flatten(lora.split(after)[1]).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(family):
    config, params, batch = base(family)
    whole, merged = adapted(family), lora.merge(adapted(family))
    assert flatten(merged).keys() == flatten(params).keys()
    want = np.asarray(forward(config, whole, batch))
    assert relative(np.asarray(forward(config, params, batch)), want) > 0.1
    assert relative(np.asarray(forward(config, merged, batch)), want) <= 1e-5


def test_merging_is_float32_and_keeps_the_kernels_dtype():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), lora.strip(adapted("qwen2_vl")))
    merged = lora.merge(lora.combine(half, lora.split(adapted("qwen2_vl"))[1]))
    q = {k: np.asarray(v, np.float64) for k, v in adapted("qwen2_vl")["decoder"]["layers"]["q_proj"].items()}
    kernel = np.asarray(half["decoder"]["layers"]["q_proj"]["kernel"], np.float64)
    want = kernel + q["lora_a"] @ q["lora_b"] * q["lora_scale"][:, None, None]
    got = merged["decoder"]["layers"]["q_proj"]["kernel"]
    assert got.dtype == jnp.bfloat16
    # Rounded once: half a unit in the last place of bfloat16's 8 bits.
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= 2.0**-8 * np.abs(want) * (1 + 1e-4) + 1e-12)


@pytest.mark.parametrize(
    "targets, chosen",
    [
        ("llm", {"decoder/layers/" + p for p in "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()}),
        ("merger", {"vision/merger/fc1", "vision/merger/fc2"}),
        (("vision/blocks/qkv", "merger/fc?"), {"vision/blocks/qkv", "vision/merger/fc1", "vision/merger/fc2"}),
        ("q_proj, v_proj", {"decoder/layers/q_proj", "decoder/layers/v_proj"}),
        (["gate_proj"], {"decoder/layers/gate_proj", "vision/blocks/gate_proj"}),
        ("vision", {"vision/blocks/" + p for p in "qkv proj gate_proj up_proj down_proj".split()}),
    ],
)
def test_targets(targets, chosen):
    config, params, _ = base("qwen2_5_vl")
    add = functools.partial(lora.add, config, rank=2, alpha=2, targets=targets)
    tree = jax.eval_shape(add, params, jax.random.key(0))
    assert {path.rpartition("/")[0] for path in flatten(tree) if lora.is_adapter(path)} == chosen


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"targets": "lm_head"}, r"'lm_head' matches nothing.*groups are vision, merger, llm.*decoder/layers/q_proj"),
        ({"targets": ["q_proj", "qproj"]}, "'qproj' matches nothing"),
        ({"targets": "vision/*embed"}, "matches nothing"),
        ({"targets": ()}, "no adapter targets"),
        ({"rank": 0}, "rank must be a whole number from 1, not 0"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"alpha": float("nan")}, "alpha must be a positive number"),
        ({"params": "adapted"}, "an adapter already"),
    ],
)
def test_bad_requests(changes, said):
    config, params, _ = base("qwen2_vl")
    changes = {"rank": 2, "alpha": 2, "params": params} | changes
    params = adapted("qwen2_vl") if changes["params"] == "adapted" else changes["params"]
    with pytest.raises(InputError, match=said):
        lora.add(config, params, jax.random.key(0), **{k: v for k, v in changes.items() if k != "params"})


def test_dropout_zeroes_rows_of_a():
    whole = adapted("qwen2_5_vl")
    assert_same(lora.dropout(whole, jax.random.key(0), 0.0), whole)
    once = jax.jit(lora.dropout, static_argnums=2)(whole, jax.random.key(0), 0.25)
    assert_same(lora.strip(once), lora.strip(whole))
    assert_same(once, lora.dropout(whole, jax.random.key(0), 0.25))
    before, after = flatten(whole), flatten(once)
    masks = {}
    for path in (p for p in before if p.endswith("lora_a")):
        kept = np.any(after[path] != 0, -1, keepdims=True)
        np.testing.assert_allclose(after[path], np.where(kept, before[path] / 0.75, 0), rtol=1e-6)
        masks[path] = kept
    share = np.mean(np.concatenate([m.ravel() for m in masks.values()]))
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / sum(m.size for m in masks.values())) ** 0.5
    layers = masks["decoder/layers/q_proj/lora_a"]
    assert np.any(layers[0] != layers[1]) and np.any(layers != masks["decoder/layers/k_proj/lora_a"])
    other = lora.dropout(whole, jax.random.key(1), 0.25)["decoder"]["layers"]["q_proj"]["lora_a"]
    assert np.any(np.any(other != 0, -1, keepdims=True) != layers)
    with pytest.raises(InputError, match="dropout is 1"):
        lora.dropout(whole, jax.random.key(0), 1)


def test_a_stack_with_and_without(tmp_path):
    """An adapter of layer 1 only, as with PEFT's layers_to_transform: training does not change the other layers."""
    config, params, _ = base("qwen2_vl")
    rng = np.random.default_rng(0)
    batch = make_batch([sample(rng, config, 9)], config)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    write(
        tmp_path / "one",
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
        {name.format("A"): rng.standard_normal((2, 48)), name.format("B"): rng.standard_normal((48, 2))},
    )
    whole = peft.load_adapter(config, params, tmp_path / "one")
    q = whole["decoder"]["layers"]["q_proj"]
    assert q["lora_scale"].tolist() == [0, 2, 0] and np.any(q["lora_a"] != 0, (1, 2)).tolist() == [False, True, False]

    def loss(q):
        layers = whole["decoder"]["layers"] | {"q_proj": q}
        return jnp.sum(qwenvl.forward(config, whole | {"decoder": whole["decoder"] | {"layers": layers}}, batch) ** 2)

    gradients = jax.jit(jax.grad(loss))(q)
    for leaf in ("lora_a", "lora_b"):
        assert np.any(gradients[leaf] != 0, (1, 2)).tolist() == [False, True, False]
    peft.save_adapter(config, whole, tmp_path / "again", base_name="tiny", layout="hub")
    assert load_file(tmp_path / "again" / peft.WEIGHTS).keys() == {name.format("A"), name.format("B")}
    assert_same(peft.load_adapter(config, params, tmp_path / "again"), whole)


# Generation


class Characters:
    """A processor that encodes nothing."""

    allow_control_tokens, control_tokens = False, MappingProxyType({})

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


def test_generating_with_an_adapter_equals_merged():
    config = base("qwen2_5_vl")[0]
    answers = []
    for tree in (adapted("qwen2_5_vl"), lora.merge(adapted("qwen2_5_vl"))):
        engine = Engine(Model(config, tree, Characters(), {}), max_batch=2, ladder=Ladder(tokens=(64, 128)))
        answers.append(engine.generate(samples(config), max_new_tokens=12, temperature=0, logprobs=0))
    for ours, merged in zip(*answers, strict=True):
        assert ours.token_ids == merged.token_ids and len(ours.token_ids) > 2
        np.testing.assert_allclose(ours.logprobs, merged.logprobs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_on_a_mesh():
    config = tiny_config("qwen2_5_vl")
    params, batch = tiny_params(config), make_batch([sample(np.random.default_rng(0), config, 9)] * 4, config)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    add = partial(lora.add, config, key=jax.random.key(1), rank=4, alpha=6, targets="llm")
    whole, split = fill(add(params)), add(jax.device_put(params, param_shardings(specs(config), mesh)))
    a, b = (split["decoder"]["layers"]["o_proj"][leaf].sharding.spec for leaf in ("lora_a", "lora_b"))
    assert a == jax.P(None, "tensor", None) and b == jax.P(None, None, "fsdp"), (a, b)
    split = jax.device_put(fill(split), param_shardings(specs_of(config, split), mesh))
    assert_same(split, whole)
    want = np.asarray(forward(config, whole, batch))
    with jax.set_mesh(mesh):
        assert relative(np.asarray(forward(config, split, batch)), want) < 1e-5
        merged = flatten(lora.merge(split))
    want = flatten(lora.merge(whole))
    for path, leaf in flatten(lora.strip(split)).items():
        np.testing.assert_allclose(merged[path], want[path], rtol=1e-5, atol=1e-6)
        assert merged[path].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), (path, merged[path].sharding)


# PEFT's files


def write(path, settings, tensors):
    """An adapter directory in PEFT's format."""
    path.mkdir()
    settings = {"peft_type": "LORA", "bias": "none", "target_modules": ["q_proj"]} | settings
    (path / peft.SETTINGS).write_text(json.dumps(settings), "utf-8")
    save_file({k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()}, path / peft.WEIGHTS)
    return path


@pytest.mark.parametrize("layout", ["hub", "nested"])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, layout, tmp_path):
    config, params, _ = base(family)
    peft.save_adapter(config, adapted(family), tmp_path / "a", base_name="tiny", layout=layout)
    assert_same(peft.load_adapter(config, params, tmp_path / "a"), adapted(family))
    settings = json.loads((tmp_path / "a" / peft.SETTINGS).read_text("utf-8"))
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (4, 6, {})
    name = "model.layers.0.mlp.up_proj" if layout == "hub" else "model.language_model.layers.0.mlp.up_proj"
    assert name in settings["target_modules"]
    tensors = load_file(tmp_path / "a" / peft.WEIGHTS)
    got = adapted(family)["decoder"]["layers"]["up_proj"]
    assert np.array_equal(tensors[f"base_model.model.{name}.lora_B.weight"], got["lora_b"][0].T)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_an_adapters_name_in_the_key(tmp_path):
    config, params, _ = base("qwen2_vl")
    peft.save_adapter(config, adapted("qwen2_vl"), tmp_path / "a", base_name="tiny")
    tensors = load_file(tmp_path / "a" / peft.WEIGHTS)
    save_file({k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}, tmp_path / "a" / peft.WEIGHTS)
    assert_same(peft.load_adapter(config, params, tmp_path / "a"), adapted("qwen2_vl"))


def test_ranks_and_alphas_by_pattern(tmp_path):
    config, params, _ = base("qwen2_vl")
    rng = np.random.default_rng(0)
    ranks, tensors = (3, 2, 5), {}
    for l, r in enumerate(ranks):
        name = f"base_model.model.model.layers.{l}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((r, 48))
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((48, r))
    settings = {
        "r": 3,
        "lora_alpha": 6,
        "rank_pattern": {  # the first that matches counts
            r"1\.self_attn\.q_proj": 2,
            r"layers\.(?:2|[37-9])\.(self_)?attn\..*": 5,
            "q_proj": 3,
        },
        "alpha_pattern": {"model.layers.2.self_attn.q_proj": 40},
    }
    whole = peft.load_adapter(config, params, write(tmp_path / "a", settings, tensors))
    q = whole["decoder"]["layers"]["q_proj"]
    assert q["lora_scale"].tolist() == [2, 3, 8] and q["lora_a"].shape == (3, 48, 5)
    rooted = peft.load_adapter(config, params, write(tmp_path / "b", settings | {"use_rslora": True}, tensors))
    want = np.float32([6 / 3**0.5, 6 / 2**0.5, 40 / 5**0.5])
    assert np.array_equal(rooted["decoder"]["layers"]["q_proj"]["lora_scale"], want)
    for tree, name in ((whole, "c"), (rooted, "d")):
        peft.save_adapter(config, tree, tmp_path / name, base_name="tiny", layout="hub")
        assert {k: v.shape for k, v in load_file(tmp_path / name / peft.WEIGHTS).items()} == {
            k: v.shape for k, v in tensors.items()
        }
        assert_same(peft.load_adapter(config, params, tmp_path / name), tree)


A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{s}.weight" for s in "AB")


@pytest.mark.parametrize(
    "settings, tensors, said",
    [
        ({"peft_type": "IA3"}, {}, "peft_type is 'IA3'"),
        ({"use_dora": True}, {}, "use_dora is True.*merge_and_unload"),
        ({"use_new_thing_2027": True}, {}, "use_new_thing_2027 is True, which is not known here.*merge_and_unload"),
        ({"foo_config": {"a": 1}}, {}, "foo_config is .*not known"),
        ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save is \['lm_head'\]"),
        ({"bias": "lora_only"}, {}, "bias is 'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "'pissa_niter_4'.*changed the base weights"),
        ({"r": "2"}, {}, "r is '2' for model.layers.0.self_attn.q_proj"),
        ({"lora_alpha": None}, {}, "lora_alpha is None"),
        ({"rank_pattern": {"(": 2}}, {}, "rank_pattern is not readable"),
        ({"rank_pattern": [2]}, {}, "rank_pattern is not readable"),
        ({"rank_pattern": {r"(\w+)+x": 2}}, {}, "rank_pattern has .*too complex a pattern"),
        ({"alpha_pattern": {".*" * 9 + "x": 2}}, {}, "alpha_pattern has .*too complex a pattern"),
        ({"rank_pattern": {".?" * 200 + "#": 4}}, {}, "rank_pattern has .*too complex a pattern"),
        ({"rank_pattern": {"(.|.)" * 99 + "#": 4}}, {}, "rank_pattern has .*too complex a pattern"),
        ({"rank_pattern": {r"(?:(?:m|.|\w))" * 60 + "#": 4}}, {}, "rank_pattern has .*too complex a pattern"),
        ({"rank_pattern": {r"(.*)\1\1#": 4}}, {}, "rank_pattern has .*too complex a pattern"),
        ({"rank_pattern": {r"(?x:(\w+) +#": 4}}, {}, "rank_pattern has .*too complex a pattern"),
        ({"rank_pattern": {"x{99999999999}": 4}}, {}, "rank_pattern is not readable"),
        ({"rank_pattern": {"(" * 400 + ")" * 400: 4}}, {}, "rank_pattern has .*too complex a pattern"),
        ({"r": 3}, {}, r"q_proj.lora_A.weight has shape \[2, 48\].*calls for \[3, 48\]"),
        ({}, {B: np.zeros((2, 48))}, r"q_proj.lora_B.weight has shape \[2, 48\].*calls for \[48, 2\]"),
        ({}, {A: None}, "q_proj has only one of lora_A and lora_B"),
        ({}, {A: None, B: None}, "holds no tensors"),
        ({}, {A.replace("layers.0", "layers.3"): np.zeros((2, 48))}, "layers.3.self_attn.*no place"),
        ({}, {"base_model.model.lm_head.lora_A.weight": np.zeros((2, 48))}, "lm_head.*no place"),
        ({}, {A.replace("lora_A.weight", "lora_magnitude_vector"): np.zeros(48)}, "magnitude_vector has no place"),
        ({}, {A.replace(".weight", ".default.weight"): np.zeros((2, 48))}, "are for the same layer"),
        ({}, {A.replace("model.layers", "model.language_model.layers"): np.zeros((2, 48))}, "for the same layer"),
    ],
)
def test_adapters_that_cannot_be_read(settings, tensors, said, tmp_path):
    config, params, _ = base("qwen2_vl")
    good = {A: np.zeros((2, 48)), B: np.zeros((48, 2))}
    tensors = {k: v for k, v in (good | tensors).items() if v is not None}
    path = write(tmp_path / "a", {"r": 2, "lora_alpha": 4} | settings, tensors)
    with pytest.raises(InputError, match=said):
        peft.load_adapter(config, params, path)


@pytest.mark.parametrize(
    "settings, lost",
    [
        ({"target_modules": [f"model.layers.{l}.self_attn.q_proj" for l in (0, 1, 2)]}, 2),
        ({"target_modules": ["q_proj"]}, 2),
        ({"target_modules": ["q_proj", "v_proj"]}, 5),
        ({"target_modules": r"model\.layers\.[01]\..*q_proj"}, 1),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, 0),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, 0),
        ({"target_modules": r"^(?!.*visual).*layers\.0\..*(?:q_proj).*"}, 0),
        ({"target_modules": "all-linear"}, 0),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "blocks"}, 0),
        ({"target_modules": ["layers.0.self_attn.q_proj"], "lorap_emb_lr": 1e-6, "a_number_of_2027": 3}, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["hub", "nested"])
def test_layers_that_an_adapter_lost_are_named(settings, lost, layout, tmp_path, caplog):
    """target_modules says which modules PEFT trained."""
    config, params, _ = base("qwen2_vl")
    names = json.dumps({"r": 2, "lora_alpha": 4} | settings), {A: np.ones((2, 48)), B: np.ones((48, 2))}
    settings, tensors = json.loads(names[0]), names[1]
    if layout == "nested":
        settings = json.loads(names[0].replace("model.layers", "model.language_model.layers").replace(
            r"model\\.layers", r"model\\.language_model\\.layers"))  # fmt: skip
        tensors = {k.replace("model.layers", "model.language_model.layers"): v for k, v in tensors.items()}
    peft.load_adapter(config, params, write(tmp_path / "a", settings, tensors))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (lost > 0)
    assert not lost or f"has nothing for {lost} of them, first model." in said[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_adapter_says_nothing(family, tmp_path, caplog):
    config, params, _ = base(family)
    for layout in ("hub", "nested"):
        path = tmp_path / layout
        peft.save_adapter(config, adapted(family), path, base_name="tiny", layout=layout)
        peft.load_adapter(config, params, path)
    assert not caplog.records


def test_files_that_are_not_there(tmp_path):
    config, params, _ = base("qwen2_vl")
    with pytest.raises(InputError, match="no such directory"):
        peft.load_adapter(config, params, tmp_path / "none")
    with pytest.raises(InputError, match=f"no {peft.SETTINGS}"):
        peft.load_adapter(config, params, tmp_path)
    write(tmp_path / "a", {}, {})
    (tmp_path / "a" / peft.WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"no {peft.WEIGHTS}; adapters are read from safetensors"):
        peft.load_adapter(config, params, tmp_path / "a")
    with pytest.raises(InputError, match="no adapter in these parameters"):
        peft.save_adapter(config, params, tmp_path / "b", base_name="tiny")
    with pytest.raises(InputError, match="exists already"):
        peft.save_adapter(config, adapted("qwen2_vl"), tmp_path / "a", base_name="tiny")
    with pytest.raises(InputError, match="an adapter already"):
        good = {A: np.zeros((8, 48)), B: np.zeros((48, 8))}
        peft.load_adapter(config, adapted("qwen2_vl"), write(tmp_path / "c", {}, good))


def test_a_checkpoint_holds_no_adapter(tmp_path):
    config = base("qwen2_vl")[0]
    with pytest.raises(InputError, match=r"down_proj/lora_a.*merge an adapter first"):
        save(Model(config, adapted("qwen2_vl"), None), tmp_path / "a")
    assert not list(tmp_path.iterdir())


# Against PEFT


def peft_logits(model, config):
    """Logits of the samples' live tokens, by torch."""
    import torch
    from qwenvl_convert.parity import reference_inputs

    inputs = reference_inputs(samples(config), config)
    with torch.no_grad():
        out = model(**inputs, use_cache=False).logits
    return out[inputs["attention_mask"].bool()].numpy()


def our_logits(config, params):
    batch = make_batch(samples(config), config)
    return np.asarray(forward(config, params, batch))[np.asarray(batch.segments) != 0]


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_ours(family, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict
    from test_parity import reference

    config = tiny_config(family)
    model, params = reference(config, tmp_path / "base")
    # The whole tower and merger, and parts of the decoder, with different ranks.
    part = lora.add(config, params, jax.random.key(1), rank=4, alpha=6, targets=["vision", "merger", "o_proj"])
    rest = lora.add(config, params, jax.random.key(2), rank=3, alpha=5, targets=["decoder/layers/q_proj", "down_proj"])
    q = {path: leaf for path, leaf in flatten(lora.split(rest)[1]).items() if path.startswith("decoder")}
    whole = fill(unflatten(flatten(part) | q))
    want = our_logits(config, whole)
    assert relative(our_logits(config, params), want) > 0.01

    peft.save_adapter(config, whole, tmp_path / "adapter", base_name="tiny", layout="hub")
    model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()  # warns of a missing key: an error here
    held = load_file(tmp_path / "adapter" / peft.WEIGHTS)
    theirs = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert held.keys() == theirs.keys() and all(np.array_equal(held[k], theirs[k]) for k in held)
    assert relative(peft_logits(model, config), want) <= 1e-4


PATTERNS = {
    "target_modules": ["q_proj", "o_proj", "down_proj", "attn.qkv", "mlp.0"],
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "qkv": 6, "o_proj": 7},
    "alpha_pattern": {"down_proj": 9, "model.layers.2.self_attn.o_proj": 3},
    "use_rslora": True,
}
REGEX = {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj|visual\.merger\.mlp\.2"}
LAYERS = {"target_modules": ["k_proj", "attn.proj"], "layers_to_transform": [1], "layers_pattern": ["layers", "blocks"]}


@pytest.mark.parity
@pytest.mark.parametrize(
    "family, settings",
    [("qwen2_vl", PATTERNS), ("qwen2_5_vl", PATTERNS), ("qwen2_vl", REGEX), ("qwen2_5_vl", LAYERS)],
    ids=["2-patterns", "2.5-patterns", "2-regex", "2.5-layers"],
)
def test_we_load_peft(family, settings, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from test_parity import reference

    config = tiny_config(family)
    model, params = reference(config, tmp_path / "base")
    plain = our_logits(config, params)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=generator)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    whole = peft.load_adapter(config, params, tmp_path / "adapter")
    want = peft_logits(model, config)
    assert relative(plain, want) > 0.01
    assert relative(our_logits(config, whole), want) <= 1e-4
    assert relative(our_logits(config, lora.merge(whole)), want) <= 1e-4
