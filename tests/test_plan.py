"""`qwenvl plan`: its options, and, with the compilers for TPUs and GPUs, its results."""

import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from qwenvl_jax.cli import build_parser, main
from qwenvl_jax.cli.plan import job as plan_job
from qwenvl_jax.errors import InputError, install
from qwenvl_jax.families import PRESETS
from qwenvl_jax.params.specs import specs
from qwenvl_jax.plan.hardware import CHIPS, Target, devices, parse_target
from qwenvl_jax.plan.hlo import Collective, Program
from qwenvl_jax.plan.plan import (
    Job,
    _collective_lines,
    default_mesh,
    meshes,
    plan,
    quantised,
    resolve_model,
    search,
    table,
)
from qwenvl_jax.sharding import make_mesh, parse_mesh

compiled = pytest.mark.compiled


def shallow(name: str, layers: int = 3):
    """A preset with fewer layers; each layer costs as much as in the full model."""
    config = PRESETS[name]
    return replace(config, text=replace(config.text, num_hidden_layers=layers))


@pytest.mark.parametrize(
    ("name", "kind", "chips"),
    [
        ("v5e-8", "v5e", 8),
        ("v5litepod-16", "v5e", 16),
        ("v6e-1", "v6e", 1),
        ("v5p-128", "v5p", 64),
        ("v5p-8", "v5p", 4),
        ("h200", "h200", 1),
        ("h100x8", "h100", 8),
        ("h100x16", "h100", 16),
    ],
)
def test_targets(name, kind, chips):
    target = parse_target(name)
    assert target == Target(kind, chips)
    assert str(target) == name.replace("litepod", "e")


@pytest.mark.parametrize(
    "name", ["v5e-3", "v5e", "v5p-4", "v5p-9", "v9-8", "h100x12", "h100x0", "h200-8", "", "v5e-8 "]
)
def test_bad_targets(name):
    with pytest.raises(InputError, match="target"):
        parse_target(name)


def test_an_error_names_the_slices():
    with pytest.raises(InputError, match="v5p-8, v5p-16"):
        parse_target("v5p-12")


def test_meshes_divide_the_job():
    config = PRESETS["qwen2.5-vl-7b"]  # four kv heads
    assert default_mesh(Job(config, batch=2), 8) == (2, 1, 4)
    assert default_mesh(Job(config), 8) == (1, 1, 8)
    assert meshes(Job(config, batch=2), 8) == [(2, 1, 4), (1, 1, 8)]
    assert meshes(Job(config, "train", batch=8, images=8), 4) == [(1, 4, 1), (1, 2, 2), (1, 1, 4)]
    assert meshes(Job(config, "vision", images=8), 4) == [(4, 1, 1), (2, 1, 2), (1, 1, 4)]
    assert meshes(Job(config, "train", batch=3, images=3), 5) == []


@pytest.mark.parametrize("name", ["1x1", "1x1x0", "axbxc", "1x-1x1", ""])
def test_bad_meshes(name):
    with pytest.raises(InputError, match="mesh"):
        parse_mesh(name)


@pytest.mark.parametrize(
    ("changes", "mesh", "said"),
    [
        ({"task": "serve"}, None, "task"),
        ({"batch": 0}, None, "batch is 0"),
        ({"context": 10**6}, None, "context is 1000000; it must be from 1 to 128000"),
        ({"task": "vision", "images": 0}, None, "images is 0"),
        ({"pixels": 10**9}, None, "pixels"),
        ({"lora": -1}, None, "lora"),
        ({}, (1, 1, 3), "has 3 chips; v5e-4 has 4"),
        ({"batch": 3}, (4, 1, 1), "batch is 3; it must be a multiple of .* 4"),
        ({"task": "train"}, None, "batch is 1; it must be a multiple of .* 4"),
        ({"task": "train", "batch": 4}, None, "images is 1; it must be a multiple of .* 4"),
        ({}, (1, 1, 4), "dimension F, 11006, is not a multiple of the mesh's tensor, 4"),
    ],
)
def test_bad_jobs(changes, mesh, said):
    config = PRESETS["qwen2.5-vl-3b"]
    if "11006" in said:
        config = replace(config, text=replace(config.text, intermediate_size=11006))
    with pytest.raises(InputError, match=said):
        plan(Job(config)._replace(**changes), Target("v5e", 4), mesh)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model qwen2.5-vl-3b --target v5e-3", "no such slice; there are v5e-1"),
        ("--model qwen2.5-vl-9b --target v5e-1", "presets are qwen2-vl-2b"),
        ("--model qwen2.5-vl-3b --target v5e-8 --mesh 1x1x3", "has 3 chips"),
        ("--model qwen2.5-vl-3b --target v5e-8 --mesh eight", "mesh 'eight'"),
        ("--model qwen2.5-vl-3b --target h100x8 --context 999999", "context is 999999"),
        ("--model qwen2.5-vl-3b --target nothing --search", "target 'nothing'"),
        ("--model qwen2.5-vl-3b --target v5e --search --mesh 1x1x8", "leave out --mesh"),
        ("--model qwen2.5-vl-3b --target v5e-1 --lora", "--lora is not an option of --task decode"),
        ("--model qwen2.5-vl-3b --target v5e-1 --task vision --batch 8", "--batch is not an option of --task vision"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments, said, capsys):
    assert main(["plan", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert said in err
    assert err.startswith("qwenvl: ") and err.count("\n") == 1


@pytest.mark.parametrize("target", ["v6e-1", "h200"])
def test_a_compiler_that_is_missing(monkeypatch, capsys, target):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", "--model", "qwen2.5-vl-3b", "--target", target]) == 2
    assert install("plan") in capsys.readouterr().err


RECIPES = re.findall(r"`(--model [^`]+)`", (Path(__file__).parents[1] / "qwenvl_jax/plan/README.md").read_text())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_of_the_readme_are_valid(recipe):
    args = build_parser().parse_args(["plan", *recipe.split()])
    target, job = parse_target(args.target), plan_job(args)
    job.check()
    shape = default_mesh(job, target.chips)
    assert math.prod(shape) == target.chips and shape in meshes(job, target.chips)


def test_collectives_are_listed_by_part_of_the_model():
    path = "jit(step)/while/body/closed_call/"
    found = [
        ("all-gather", 4, path + "jvp()/while/body/closed_call/DecoderBlock/up_proj/dot_general"),
        ("all-gather", 5, path + "jvp()/while/body/closed_call/DecoderBlock/down_proj/dot_general"),
        (
            "reduce-scatter",
            7,
            path + "transpose(jvp())/checkpoint/rematted_computation/DecoderBlock/up_proj/dot_general",
        ),
        ("all-gather", 3, path + "jvp()/while/body/jit(dynamic_index_in_dim)/squeeze"),
        ("all-to-all", 2, path + "jvp(embed_tokens)/jit(_where)/select_n"),
        ("all-gather", 1, path + "jvp(Merger)/fc2/add"),
        ("all-reduce", 1, ""),
    ]
    listed = [Collective(kind, size * 10**6, 2, 2, source)._asdict() for kind, size, source in found]
    assert _collective_lines(listed, most=5) == [
        "0.02 GB all-gather, DecoderBlock",
        "0.01 GB reduce-scatter, DecoderBlock, backward",
        "6.00 MB all-gather, a layer's weights",
        "4.00 MB all-to-all, embed_tokens",
        "2.00 MB all-gather, Merger",
        "2.00 MB in 1 smaller ones",
    ]
    assert _collective_lines(listed[-1:]) == ["2.00 MB all-reduce, unnamed"]


def test_there_are_recipes():
    assert len(RECIPES) == 10


# With the real compiler.


@compiled
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("qwen2-vl-2b", "v5e-1"),
        pytest.param("qwen2.5-vl-3b", "v5e-1", marks=pytest.mark.slow),
        ("qwen2.5-vl-7b", "v6e-1"),
        pytest.param("qwen2.5-vl-32b", "v6e-4", marks=pytest.mark.slow),
        ("qwen2.5-vl-72b", "v6e-8"),
        pytest.param("qwen2.5-vl-72b", "v5p-8", marks=pytest.mark.slow),
        ("qwen2.5-vl-3b", "h200"),
        ("qwen2.5-vl-7b", "h200"),
        pytest.param("qwen2.5-vl-72b", "h200x2", marks=pytest.mark.slow),
    ],
)
def test_a_decode_step_moves_little_but_weights_and_cache(name, target):
    """With all layers. Qwen2-VL's 7B and 72B have the same decoders."""
    answer = plan(Job(PRESETS[name], context=4096), parse_target(target))
    assert answer["fits"]
    assert answer["bytes_accessed"] <= 1.03 * answer["min_bytes"]
    assert answer["hbm_per_chip"]["temp"] <= 64e6
    assert answer["flops"] >= answer["min_bytes"] * 0.9  # two operations for each two bytes of weights


@compiled
@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ("v5e-8", (2, 1, 4)),
        ("v6e-16", (2, 1, 8)),
        ("v6e-16", (1, 8, 2)),
        ("v5p-128", (1, 32, 2)),
        ("h100x16", (2, 1, 8)),
    ],
)
def test_meshes_over_parts_of_an_axis_of_the_chips(target, shape):
    there = devices(parse_target(target))
    mesh = make_mesh(*shape, devices=there)
    assert mesh.devices.shape == shape and set(mesh.devices.flat) == set(there)


@compiled
def test_a_mesh_over_chips_that_are_no_block():
    with pytest.raises(InputError, match="the first 3 of 8 devices are not a block of neighbours for a mesh of 3×1×1"):
        make_mesh(3, devices=devices(parse_target("v5e-8")))


@compiled
def test_more_chips_than_kv_heads():
    """Four KV heads, 28 query heads, eight chips: each chip has a copy of one KV head."""
    config = shallow("qwen2.5-vl-7b", 4)
    answer, t = plan(Job(config), Target("v6e", 8)), config.text
    assert answer["mesh"]["tensor"] == 8 and answer["fits"]
    assert answer["hbm_per_chip"]["cache"] == 2 * 2 * 4 * 4096 * t.head_dim + 8
    assert answer["bytes_accessed"] <= 1.1 * answer["min_bytes"]
    assert answer["collective_bytes"] < 4e6
    assert "MB all-reduce, DecoderBlock\n" in table(answer)


@compiled
@pytest.mark.parametrize(("name", "target"), [("qwen2.5-vl-7b", "v6e-1"), ("qwen2.5-vl-72b", "v6e-8")])
def test_many_rows_move_little_more(name, target):
    """All rows count as full. A copy of one layer's cache would exceed these limits."""
    answer = plan(Job(shallow(name, 2), batch=32), parse_target(target))
    assert answer["bytes_accessed"] <= 1.10 * answer["min_bytes"]
    assert answer["hbm_per_chip"]["temp"] <= 8e6


@compiled
@pytest.mark.parametrize("rows, most", [(1, 1.05), (32, 1.12)])
@pytest.mark.parametrize(
    "name, target",
    [
        ("qwen2.5-vl-7b", "v5e-1"),
        ("qwen2.5-vl-7b", "v6e-1"),
        pytest.param("qwen2.5-vl-72b", "v6e-4", marks=pytest.mark.slow),
    ],
)
def test_weights_in_four_bits_are_read_in_four_bits(name, target, rows, most):
    """Rows of unequal length; the cache counts as full. A layer in 16 bits would take four times as many bytes."""
    answer = plan(Job(quantised(shallow(name, 4), "int4"), batch=rows), parse_target(target))
    assert answer["bytes_accessed"] <= most * answer["min_bytes"]
    assert answer["hbm_per_chip"]["temp"] <= 32e6


@compiled
@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", pytest.param("qwen2.5-vl-72b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["int4", "int8"])
@pytest.mark.parametrize("card", ["h100", "h200"])
def test_gpus_write_no_dequantised_matrix(name, form, card, monkeypatch):
    programs = []
    monkeypatch.setattr("qwenvl_jax.plan.plan.Program", lambda text: programs.append(Program(text)) or programs[-1])
    for rows in (1, 32):
        config = quantised(shallow(name, 2), form)
        answer = plan(Job(config, batch=rows), parse_target(card))
        t = config.text
        q_proj = t.hidden_size * t.num_attention_heads * t.head_dim
        written = {
            math.prod(array.shape)
            for computation, _ in programs[-1].runs
            for i in programs[-1].computations[computation].values()
            for array in i.results
            if i.opcode not in ("parameter", "bitcast", "get-tuple-element", "tuple")
        }
        assert not any(size % q_proj == 0 for size in written if size), name
        kernels = [i for i in programs[-1].computations[programs[-1].entry].values() if i.opcode == "custom-call"]
        assert sum("/quantised_dot/" in i.attributes for i in kernels) == 7 * 2
        assert rows > 1 or answer["bytes_accessed"] <= 1.05 * answer["min_bytes"]


@compiled
@pytest.mark.slow
def test_prefill_dequantises_each_layer_once():
    """As many operations as with 16 bits; the temporaries are larger by less than two layers in 16 bits."""
    config, answers = shallow("qwen2.5-vl-7b", 2), []
    for one in (config, quantised(config, "int4")):
        answers.append(plan(Job(one, "prefill", context=8192), Target("v6e", 1)))
    dense, few = answers
    assert few["flops"] <= 1.02 * dense["flops"]
    layer = 2 * sum(s.size for p, s in specs(config).items() if p.startswith("decoder/layers/")) // 2
    assert few["hbm_per_chip"]["temp"] - dense["hbm_per_chip"]["temp"] < 2 * layer
    # Each of the two layers is read in few bits, then written and read again.
    assert few["bytes_accessed"] - dense["bytes_accessed"] < 2 * 5 * layer


@compiled
@pytest.mark.slow
def test_adapters_over_four_bits_take_less_memory():
    config = shallow("qwen2.5-vl-7b", 2)
    config, answers = replace(config, vision=replace(config.vision, depth=2)), []
    for one in (config, quantised(config, "int4")):
        answers.append(plan(Job(one, "train", context=1024, pixels=28 * 28 * 64, lora=8), Target("v5e", 1)))
    dense, few = (a["hbm_per_chip"] for a in answers)
    saved = dense["weights"] - few["weights"]
    assert dense["optimizer"] == few["optimizer"] and saved > 0.69e9  # 12 of 16 bits, less the scales
    assert dense["total"] - few["total"] > 0.5 * saved


@compiled
@pytest.mark.parametrize(
    ("name", "target", "rows", "most"),
    [
        ("qwen2.5-vl-7b", "v6e-1", 1, 1.03),
        ("qwen2.5-vl-7b", "v6e-1", 32, 1.10),
        pytest.param("qwen2.5-vl-7b", "v6e-4", 32, 1.10, marks=pytest.mark.slow),
        pytest.param("qwen2.5-vl-72b", "v6e-8", 32, 1.10, marks=pytest.mark.slow),
        ("qwen2.5-vl-7b", "h200", 1, 1.03),
        ("qwen2.5-vl-7b", "h200", 32, 1.15),
    ],
)
def test_an_int8_cache_moves_its_own_bytes(name, target, rows, most):
    """And is never copied, nor is a dequantised one written: all temporaries are smaller than one layer's keys."""
    config = shallow(name, 2 if rows > 1 else 4)
    answer, t = plan(Job(config, batch=rows, kv_dtype="int8"), parse_target(target)), config.text
    heads = t.num_key_value_heads // answer["mesh"]["tensor"]
    layer = rows * heads * 4096 * (t.head_dim + 4)
    assert answer["hbm_per_chip"]["cache"] == 2 * t.num_hidden_layers * layer + 2 * 4 * rows
    assert answer["bytes_accessed"] <= most * answer["min_bytes"]
    if rows > 1:
        assert answer["hbm_per_chip"]["temp"] < layer


@compiled
def test_many_rows_compile_without_the_kernel():
    """The loop that writes the caches of 32 rows; libtpu 0.0.42 cannot compile its obvious form."""
    config = resolve_model("demo")  # its heads do not fill the vector lanes
    config = replace(config, text=replace(config.text, num_hidden_layers=1))
    answer = plan(Job(config, batch=32, context=1024), Target("v5e", 1))
    assert answer["fits"]
    assert answer["hbm_per_chip"]["temp"] <= 8e6


@compiled
def test_prefill_vision_and_training_say_what_they_cost():
    config = shallow("qwen2-vl-2b", 2)
    config = replace(config, vision=replace(config.vision, depth=2))
    T, t = 1024, config.text
    layer = t.hidden_size * (2 * t.hidden_size + 2 * t.num_key_value_heads * t.head_dim + 3 * t.intermediate_size)
    least = 2 * T * 2 * layer
    prefill = plan(Job(config, "prefill", context=T), Target("v6e", 1))
    assert least < prefill["flops"] < 1.3 * least
    train = plan(Job(config, "train", context=T, pixels=28 * 28 * 64, lora=8), Target("v6e", 1))
    assert prefill["flops"] * 2 < train["flops"] < prefill["flops"] * 8
    assert train["hbm_per_chip"]["optimizer"] > 0
    one, many = (plan(Job(config, "vision", images=n, pixels=28 * 28 * 64), Target("v6e", 4)) for n in (4, 64))
    assert many["flops"] == pytest.approx(16 * one["flops"], rel=0.05)  # one image per lane
    assert one["collective_bytes"] < 1e7
    assert "fits" in table(one)


@compiled
@pytest.mark.parametrize("target", ["v6e-1", "h200"])
def test_a_long_prompt_costs_its_products_and_half_its_attention(target):
    """With the kernels, memory grows with the length, not with its square."""
    config = shallow("qwen2.5-vl-7b", 2)
    t, temp = config.text, {}
    wide, narrow = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    layer = t.hidden_size * (2 * wide + 2 * narrow + 3 * t.intermediate_size)
    for T in (4096, 8192):
        answer = plan(Job(config, "prefill", context=T), parse_target(target))
        least = 2 * (2 * T * layer + 2 * T * T * wide) + 2 * t.hidden_size * t.vocab_size
        assert least < answer["flops"] < 1.15 * least
        temp[T] = answer["hbm_per_chip"]["temp"]
    assert temp[8192] < 2.2 * temp[4096]
    assert temp[8192] < 8192**2 * t.num_attention_heads  # a byte for each score


@compiled
def test_what_does_not_fit(capsys):
    arguments = "plan --model qwen2.5-vl-72b --target v5e-8 --json"
    assert main(arguments.split()) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is False
    assert answer["hbm_per_chip"]["total"] > answer["hbm_per_chip"]["limit"]
    assert answer["flops"] is None
    # The weights fit, but the temporaries of a step do not.
    over = plan(Job(shallow("qwen2.5-vl-3b"), "prefill", batch=16, context=32768), Target("v5e", 1))
    assert not over["fits"]


@compiled
def test_the_smallest_slice_is_found():
    answer = search(Job(shallow("qwen2.5-vl-72b", 16)), "v5e", progress=False)
    assert answer["target"] == "v5e-4"  # a fifth of the layers: 33 GB
    assert answer["mesh"]["tensor"] == 4


@compiled
def test_json_and_table_say_the_same(capsys):
    assert main("plan --model qwen2-vl-2b --target v5e-1 --context 512 --json".split()) == 0
    answer = json.loads(capsys.readouterr().out)
    for key in ("chips", "mesh", "flops", "collective_bytes", "roofline_seconds", "compile_seconds"):
        assert answer[key] is not None
    text = table(answer)
    assert f"{answer['tokens_per_second']:,.0f} tokens/s" in text
    assert "GB of 16.91 GB: fits" in text
    assert answer["hbm_per_chip"]["limit"] == int(CHIPS["v5e"].memory)


@pytest.mark.parametrize("target, kind", [("v6e-1", "TPU"), ("h100", "GPU")])
def test_a_compiler_that_is_not_installed_names_its_extra(target, kind, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = f"{target} needs the {kind} compiler, which comes with the extra plan: {install('plan')}"
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        devices(parse_target(target))
