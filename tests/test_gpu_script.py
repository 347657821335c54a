"""`benchmarks/gpu.sh`: a rehearsal on a CPU; its programs compiled for an H100 and an H200."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gpu
import jax
import jax.numpy as jnp
import model
import pytest
from carry import carry
from common import config_of
from demo.assets import find_assets
from gpu_checks import checks, shallow
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from sides import PROMPT
from test_demo_data import assets  # noqa: F401 - a fixture

from qwenvl_jax.families import FAMILIES, PRESETS, from_dict, to_dict
from qwenvl_jax.inputs.ladder import round_up
from qwenvl_jax.params.specs import init
from qwenvl_jax.plan.hardware import devices, parse_target
from qwenvl_jax.plan.plan import Job, plan
from qwenvl_jax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[1]


def options(**changes):
    given = dict(folder=Path("out"), assets=None, rehearse=False, platform="gpu") | changes
    return type("Options", (), given)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_the_checks_can_be_written(family):
    """A new switch of the config must be set there too."""
    for config in (config_of("50M", family), shallow(config_of("50M", family))):
        assert from_dict(to_dict(config)).vision == config.vision


@pytest.mark.parity
@pytest.mark.slow
def test_the_rehearsal_of_every_stage(assets, tmp_path):  # noqa: F811
    """All stages at a small size, with stand-ins for the assets."""
    environment = os.environ | {"PYTHON": sys.executable, "QWENVL_DEMO_ASSETS": str(assets.words.parents[2])}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    command = [ROOT / "benchmarks" / "gpu.sh", "--rehearse", tmp_path]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    results = lines(tmp_path / "results.jsonl")
    assert {"card", "versions", "date"} <= results[0].keys()
    names = [stage.name for stage in gpu.stages(options(), Path(), Path())]
    assert {line["stage"]: line["status"] for line in results if "stage" in line} == dict.fromkeys(names, "ok")
    assert {line["ceiling"] for line in results if "ceiling" in line} == {"read", "copy", "product"}
    found = {line["check"]: line["ok"] for line in results if "check" in line}
    assert all(found.values())
    for kind in ("attention, causal", "attention, full", "windows", "decode attention", "greedy tokens", "LoRA step"):
        assert any(kind in name for name in found), kind
    jobs = [line for line in results if "job" in line]
    kinds = ["decode", "decode", "prefill", "vision", "picture", "LoRA", "decode"]
    assert [line["job"].replace(",", " ").split()[0] for line in jobs] == kinds
    assert all(line["peer"] for line in jobs if not line["job"].startswith("LoRA"))
    training = {line["when"]: line for line in results if "when" in line}
    assert training["before"]["scores"].keys() == training["after"]["scores"].keys()
    # A trial of four steps, and more while time is left.
    assert 4 < training["training"]["step"] == training["after"]["step"] <= 8
    with safe_open(tmp_path / "demo.safetensors", "numpy") as file:
        assert len(list(file.keys())) > 100
    assert all(file.stat().st_size <= 2**24 for file in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) <= 8


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('all well')", "ok", "all well"),
        ("raise ValueError('three')", "failed", "three"),
        ("import os; os.abort()", "failed", ""),
        # Its child processes are killed too.
        ("import subprocess, sys, time; subprocess.Popen(['sleep', '600']); print(1, flush=True); time.sleep(600)",
         "timed out", "1"),
    ],
)  # fmt: skip
def test_a_stage_costs_only_itself(code, status, said, tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(code)
    with (tmp_path / "log").open("a+") as log:
        log.write("before\n")
        log.flush()
        got, text = gpu.run(gpu.Stage("one", [str(script)], 2, 0), 2 if status == "timed out" else 30, log)
        assert got == status and said in text and "before" not in text
        log.write("after\n")
    assert (tmp_path / "log").read_text().startswith("before\n") and (tmp_path / "log").read_text().endswith("after\n")


def test_stages_end_in_time():
    """If every stage takes its maximum, the last one still has a minute."""
    *others, last = gpu.stages(options(), Path(), Path())
    assert [stage.name for stage in others] == ["ceilings", "checks", "3B", "7B"]
    assert sum(stage.most for stage in others) <= 530 - 30
    rehearsed = [stage.name for stage in gpu.stages(options(rehearse=True, platform="cpu"), Path(), Path())]
    assert rehearsed == [*(stage.name for stage in others), last.name]


def test_the_carried_assets_are_enough(assets, tmp_path):  # noqa: F811
    carry(assets, tmp_path)
    copied = find_assets(tmp_path)
    for mine, theirs in zip(copied, assets, strict=True):
        names = [{p.relative_to(root) for p in root.rglob("*")} for root in (mine, theirs)]
        assert names[0] == names[1]


# The programs that the script runs on the card, compiled for it.

compiled = pytest.mark.compiled
TARGETS = ("h100", "h200")


def compile_for(target: str, f, args):
    where = NamedSharding(make_mesh(devices=devices(parse_target(target))), PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), args)
    with jax.set_mesh(where.mesh):
        return jax.jit(f).lower(*shapes).compile()


@compiled
@pytest.mark.parametrize("target", TARGETS)
def test_checks_compile(target, tmp_path):
    """Attention with the kernel, forward and backward."""
    devices(parse_target(target))  # before jax computes anything
    every = list(checks(False, tmp_path))
    attention = [check for check in every if check.name.startswith("attention, ")]
    assert len(every) == 12 and len(attention) == 5
    for check in every if target == "h100" else attention:
        program = compile_for(target, check.run, check.args).as_text()
        if check in attention:
            assert all(f"mha_{name}" in program for name in ("forward", "backward")), check.name


@compiled
@pytest.mark.parametrize("size", ["qwen2.5-vl-3b", "qwen2.5-vl-7b"])
def test_random_weights_take_little_more_than_themselves(size):
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    memory = compile_for("h100", partial(init, PRESETS[size]), (key,)).memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * memory.output_size_in_bytes


def sized(name: str) -> tuple:
    """The config and the options of a stage."""
    (stage,) = (stage for stage in gpu.stages(options(), Path(), Path()) if stage.name == name)
    args = model.parse([part.format(seconds=1, warm=1) for part in stage.command[1:]])
    return PRESETS[args.size], args


def jobs(name: str, layers: int | None = None) -> dict:
    """{name: the job and target of `plan`}."""
    config, args = sized(name)
    if layers:
        config = replace(config, text=replace(config.text, num_hidden_layers=layers))
    slots = round_up(PROMPT + 1, model.buckets(config, args), "slots")
    asked = {f"decode {n}": Job(config, batch=n, context=slots) for n in args.rows}
    asked |= {f"prefill {n}": Job(config, "prefill", context=n) for n in args.tokens}
    asked |= {f"vision {n}": Job(config, "vision", pixels=n * 14**2) for n in (*args.patches, args.picture)}
    if "lora" in args.jobs:
        asked["lora"] = Job(config, "train", context=args.lora, lora=16, images=0)
    return asked


@compiled
@pytest.mark.parametrize("target", ["h100", pytest.param("h200", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["3B", "7B"])
def test_programs_compile_and_fit(name, target):
    """Two decoder layers, all of the vision tower. An H200 has the cores of an H100 and more memory."""
    for asked, job in jobs(name, 2).items():
        assert plan(job, parse_target(target))["fits"], asked


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("name", ["3B", "7B"])
def test_whole_models_leave_room_for_their_peers(name):
    target = parse_target("h100")
    for asked, job in jobs(name).items():
        assert plan(job, target)["hbm_per_chip"]["total"] < target.limit / 2, asked
