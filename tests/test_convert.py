"""Conversion loses no bit in either direction, needs little memory, and leaves no incomplete directory."""

import errno
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from qwenvl_convert import orbax as conversion
from qwenvl_convert.hf import read_params
from safetensors.numpy import load_file
from tiny import FAMILIES, restore, tiny_config, with_text
from tiny_hf import assert_same_bits, bits, nested, torch_tensors, write_hf

import qwenvl_jax
from qwenvl_jax import cli
from qwenvl_jax.errors import InputError
from qwenvl_jax.families import to_dict
from qwenvl_jax.params import checkpoint
from qwenvl_jax.params.specs import flatten


def read_files(directory) -> dict:
    """Every tensor of every safetensors file, by the safetensors library."""
    out = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        out |= load_file(file)
    return out


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("layout", ["hub", "nested"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_bit_for_bit(family, tied, dtype, layout, files, tmp_path):
    config = with_text(tiny_config(family), tie_word_embeddings=tied)
    tensors = torch_tensors(config, dtype)
    write_hf(tmp_path / "src", config, tensors, layout, files)
    conversion.to_orbax(tmp_path / "src", tmp_path / "orbax", progress=False)
    limit = 10**9 if files == 1 else sum(x.nbytes for x in tensors.values()) // 3
    conversion.to_hf(tmp_path / "orbax", tmp_path / "back", layout=layout, max_shard_bytes=limit, progress=False)
    want = tensors if layout == "hub" else {nested(n): x for n, x in tensors.items()}
    assert_same_bits(read_files(tmp_path / "back"), want)
    written = sorted((tmp_path / "back").glob("*.safetensors"))
    if files == 1:
        assert [f.name for f in written] == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
        assert len(written) >= 3 and {f.name for f in written} == set(index["weight_map"].values())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in want.values())
        assert all(n in load_file(tmp_path / "back" / f) for n, f in index["weight_map"].items())
        assert all(sum(x.nbytes for x in load_file(f).values()) <= limit for f in written)


def test_a_tensor_larger_than_the_limit_gets_a_file_of_its_own(tmp_path):
    config = tiny_config("qwen2_vl")
    tensors = torch_tensors(config, "bfloat16")
    conversion.to_orbax(write_hf(tmp_path / "src", config, tensors), tmp_path / "orbax")
    conversion.to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=1)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == len(tensors)
    assert_same_bits(read_files(tmp_path / "back"), tensors)


@pytest.mark.parametrize("piece", [pytest.param(1, marks=pytest.mark.slow), 1000, 30_000])
@pytest.mark.parametrize("tied", [True, False])
def test_large_parameters_go_in_pieces_and_chunks(tied, piece, monkeypatch, tmp_path):
    """Pieces and chunks far smaller than a tensor, with remainders, in both directions and in loading."""
    monkeypatch.setattr(conversion, "PIECE_BYTES", piece)
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", piece)
    monkeypatch.setattr(conversion, "CHUNK_BYTES", 700)
    config = tiny_config("qwen2_5_vl", text={"vocab_size": 607, "tie_word_embeddings": tied})
    tensors = torch_tensors(config, "bfloat16")
    src = write_hf(tmp_path / "src", config, tensors)
    conversion.to_orbax(src, tmp_path / "orbax")
    conversion.to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_same_bits(read_files(tmp_path / "back"), tensors)
    params = restore(tmp_path / "orbax", config)
    assert_same_bits(flatten(params), flatten(read_params(src, config)))


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_orbax_restores_what_is_written(family, tmp_path):
    config = tiny_config(family)
    src = write_hf(tmp_path / "src", config, torch_tensors(config, "bfloat16"))
    want = read_params(src, config)
    conversion.to_orbax(src, tmp_path / "orbax")
    path = tmp_path / "orbax" / "params"
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), want)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same_bits(flatten(checkpointer.restore(path)), flatten(want))
        arrays = checkpointer.restore(path, target)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(arrays))
    assert_same_bits(flatten(arrays), flatten(want))
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert_same_bits(flatten(checkpointer.restore(path)), flatten(want))
    assert_same_bits(flatten(restore(tmp_path / "orbax", config)), flatten(want))


def test_saved_models_convert_too(tmp_path):
    config = tiny_config("qwen2_5_vl")
    tensors = torch_tensors(config)
    params = read_params(write_hf(tmp_path / "src", config, tensors), config)
    checkpoint.save(qwenvl_jax.Model(config, params, None), tmp_path / "saved")
    conversion.to_hf(tmp_path / "saved", tmp_path / "back")
    assert_same_bits(read_files(tmp_path / "back"), tensors)
    assert checkpoint.read_config(tmp_path / "back") == config


def test_everything_but_the_weights_is_carried_verbatim(tokenizer_dir, tmp_path):
    config = tiny_config("qwen2_5_vl")
    src = write_hf(tmp_path / "src", config, torch_tensors(config), files=2)
    (src / "config.json").write_text("  " + (src / "config.json").read_text().replace("{", '{"unknown": "é", ', 1))
    for file in tokenizer_dir.iterdir():
        shutil.copyfile(file, src / file.name)
    for name in ("chat_template.jinja", "merges.txt", "vocab.json", "README.md", "LICENSE"):
        (src / name).write_text(f"this is {name}")
    (src / "pytorch_model.bin").write_text("not this")
    conversion.to_orbax(src, tmp_path / "orbax")
    conversion.to_hf(tmp_path / "orbax", tmp_path / "back")
    weights = {"pytorch_model.bin", *(f.name for f in src.glob("model*"))}
    side = {f.name for f in src.iterdir()} - weights
    assert len(side) == 11
    assert {f.name for f in (tmp_path / "orbax").iterdir()} == side | {"params", "qwenvl_jax.json"}
    assert {f.name for f in (tmp_path / "back").iterdir()} == side | {"model.safetensors"}
    for name in side:
        for copy in ("orbax", "back"):
            assert (tmp_path / copy / name).read_bytes() == (src / name).read_bytes(), name


def test_conversion_holds_a_few_layers_at_most(tmp_path):
    """By numpy's record of its allocations; the benchmark measures the process."""
    text = dict(num_hidden_layers=12, intermediate_size=8192, hidden_size=192, num_attention_heads=16)
    config = tiny_config("qwen2_5_vl", text=text)
    src = write_hf(tmp_path / "src", config, torch_tensors(config, "bfloat16"))
    layer = 8192 * 192 * 2
    tracemalloc.start()
    try:
        conversion.to_orbax(src, tmp_path / "orbax")
        _, there = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        conversion.to_hf(tmp_path / "orbax", tmp_path / "back")
        _, back = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert there < 5 * layer + 10e6 < 12 * layer
    assert back < 5 * layer + 10e6


# Faults


@pytest.fixture
def src(tmp_path):
    config = tiny_config("qwen2_5_vl")
    return write_hf(tmp_path / "src", config, torch_tensors(config))


@pytest.fixture
def orbax(src, tmp_path):
    conversion.to_orbax(src, tmp_path / "orbax")
    return tmp_path / "orbax"


def test_existing_destination_is_refused(orbax, src, tmp_path):
    for dst in (orbax, src, src / "config.json"):
        before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}
        with pytest.raises(InputError, match="exists already"):
            conversion.to_orbax(src, dst)
        with pytest.raises(InputError, match="exists already"):
            conversion.to_hf(orbax, dst)
        assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")} == before


def test_wrong_sources_and_options(orbax, src, tmp_path):
    def fails(message, job, *args, **kwargs):
        with pytest.raises(InputError, match=message):
            job(*args, tmp_path / "out", **kwargs)
        assert {p.name for p in tmp_path.iterdir()} == {"src", "orbax", "empty"}

    (tmp_path / "empty").mkdir()
    fails(r"no config\.json", conversion.to_orbax, tmp_path / "empty")
    fails("no such directory", conversion.to_hf, tmp_path / "nowhere")
    fails("is an Orbax checkpoint already", conversion.to_orbax, orbax)
    fails("is a Hugging Face checkpoint already", conversion.to_hf, src)
    shutil.copyfile(src / "config.json", tmp_path / "empty" / "config.json")
    fails("safetensors files only", conversion.to_orbax, tmp_path / "empty")
    fails(r"no qwenvl_jax\.json", conversion.to_hf, tmp_path / "empty")
    fails("layout 'v3' is not one of hub, nested", conversion.to_hf, orbax, layout="v3")
    fails("must be positive", conversion.to_hf, orbax, max_shard_bytes=0)
    for file in (orbax / "params" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    fails("is damaged", conversion.to_hf, orbax)
    weights = src / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    fails("cut short", conversion.to_orbax, src)


def test_destinations_that_cannot_be(orbax, src, tmp_path):
    before = set(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(src)
    for job, source in ((conversion.to_orbax, src), (conversion.to_hf, orbax)):
        with pytest.raises(InputError, match=rf"no directory {tmp_path}/no; make it"):
            job(source, tmp_path / "no" / "out")
        with pytest.raises(InputError, match=rf"{source}/out: is inside {source}, the checkpoint that is read"):
            job(source, source / "out")
    with pytest.raises(InputError, match="link/out: is inside"):
        conversion.to_orbax(src, tmp_path / "link" / "out")
    assert set(tmp_path.rglob("*")) == before | {tmp_path / "link"}


def test_layout_is_for_hugging_face_only(src, tmp_path, capsys):
    assert cli.main(["convert", str(src), str(tmp_path / "out"), "--to", "orbax", "--layout", "nested"]) == 2
    assert "use it with --to hf only" in capsys.readouterr().err


def test_relative_paths(orbax, src, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    conversion.to_hf("orbax", "back")
    assert_same_bits(read_files("back"), read_files("src"))


def test_no_room_is_seen_before_the_work(orbax, src, monkeypatch, tmp_path):
    usage = type("usage", (), {"free": 10 << 20})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for job, source in ((conversion.to_orbax, src), (conversion.to_hf, orbax)):
        with pytest.raises(InputError, match=r"no space on the disk; 0\.07 GB are needed and 0\.01 GB are free"):
            job(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("job", ["to_orbax", "to_hf"])
def test_a_disk_that_fills_up_on_the_way(job, orbax, src, tmp_path):
    """A limit on the file size: the kernel refuses a write midway, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"no space on the disk; 0\.07 GB are needed"):
            getattr(conversion, job)(src if job == "to_orbax" else orbax, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("out*"))


def test_a_disk_that_fills_up_while_tensors_are_written(orbax, monkeypatch, tmp_path):
    """Some file systems accept an allocation and then lack the space."""
    pwrite, calls = os.pwrite, []

    def full(*args):
        calls.append(1)
        if len(calls) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match="no space on the disk"):
        conversion.to_hf(orbax, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# Where a signal hits: a function, and at which of its calls.
POINTS = {
    "to_orbax": [
        ("fcntl", "", "flock", 1),  # the directory is made, but not locked yet
        ("qwenvl_convert.hf", "HfSource", "read", 1),
        ("qwenvl_convert.hf", "HfSource", "read", 40),
        ("qwenvl_convert.orbax", "", "copy_side_files", 1),
        ("qwenvl_jax.params.checkpoint", "", "_sync", 1),
        ("os", "", "rename", 2),  # the first is Orbax's own, inside
    ],
    "to_hf": [
        ("fcntl", "", "flock", 1),
        ("qwenvl_convert.safetensors", "Writer", "write_rows", 1),
        ("qwenvl_convert.safetensors", "Writer", "write_rows", 40),
        ("qwenvl_convert.safetensors", "Writer", "finish", 1),
        ("qwenvl_convert.orbax", "", "copy_side_files", 1),
        ("os", "", "rename", 1),
    ],
}


every_point = pytest.mark.parametrize(("job", "point"), [(job, point) for job in POINTS for point in POINTS[job]])


def hit(sent: int, module: str, owner: str, name: str, n: int, patch=setattr) -> None:
    """The process sends itself a signal at the n-th call of a function."""
    target = importlib.import_module(module)
    target = getattr(target, owner) if owner else target
    original, calls = getattr(target, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), sent)
        return original(*args, **kwargs)

    patch(target, name, counted)


@every_point
def test_interrupted_on_the_way(job, point, orbax, src, monkeypatch, capsys, tmp_path):
    """Ctrl-C leaves no files and prints nothing."""
    hit(signal.SIGINT, *point, patch=monkeypatch.setattr)
    source = src if job == "to_orbax" else orbax
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--to", job.removeprefix("to_")]) == 130
    assert capsys.readouterr() == ("", "\n")
    assert not list(tmp_path.glob("out*"))


def killed(source, point, job: str) -> None:
    """Converts `source` to "out" beside it, in a new process that is killed at that point."""
    code = "import sys, test_convert as t; *point, n, job, source, out = sys.argv[1:]; "
    code += "t.hit(t.signal.SIGKILL, *point, int(n)); getattr(t.conversion, job)(source, out)"
    paths = [str(Path(__file__).parent), str(Path(qwenvl_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-c", code, *map(str, point), job, str(source), str(source.parent / "out")]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


@pytest.mark.slow
@every_point
def test_killed_on_the_way(job, point, orbax, src, tmp_path):
    source, dst = src if job == "to_orbax" else orbax, tmp_path / "out"
    killed(source, point, job)
    assert not dst.exists() and (tmp_path / "out.partial-qwenvl_jax").exists()
    with pytest.raises(InputError, match="no such directory"):
        qwenvl_jax.load(dst)
    getattr(conversion, job)(source, dst)
    assert not (tmp_path / "out.partial-qwenvl_jax").exists()
    config = checkpoint.read_config(dst)
    read = restore if job == "to_orbax" else read_params
    assert_same_bits(flatten(read(dst, config)), flatten(read_params(src, config)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 40])
def test_half_written_weights_do_not_load_under_the_partial_name(n, orbax, tmp_path):
    killed(orbax, ("qwenvl_convert.safetensors", "Writer", "write_rows", n), "to_hf")
    shutil.copyfile(orbax / "config.json", tmp_path / "out.partial-qwenvl_jax" / "config.json")
    with pytest.raises(InputError, match="cut short"):
        read_params(tmp_path / "out.partial-qwenvl_jax", checkpoint.read_config(orbax))


@pytest.mark.slow
def test_interrupted_while_orbax_writes(tmp_path):
    """Signals from outside at varying moments; the parameters are large enough to keep Orbax's threads busy."""
    text = dict(num_hidden_layers=12, intermediate_size=8192, hidden_size=768, num_attention_heads=16)
    config = tiny_config("qwen2_5_vl", text=text)
    write_hf(tmp_path / "src", config, torch_tensors(config, "bfloat16"))
    command = [sys.executable, "-m", "qwenvl_jax.cli", "convert", tmp_path / "src", tmp_path / "out", "--to", "orbax"]
    for delay in (0.02, 0.05, 0.1, 0.15, 0.2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
            while not list(tmp_path.glob("out*")) and job.poll() is None:
                time.sleep(0.002)
            time.sleep(delay)
            job.send_signal(signal.SIGINT)
            assert job.communicate() == ("", "\n")
        assert job.returncode == 130
        assert not list(tmp_path.glob("out*"))


# With the reference's own files


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_writes_we_read_we_write_transformers_reads(family, tied, dtype, tmp_path):
    import torch
    import transformers

    config = with_text(tiny_config(family, dtype=dtype), tie_word_embeddings=tied)
    settings = to_dict(config)
    cls = getattr(transformers, settings["architectures"][0])
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings)).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "src", max_shard_size="100KB")
    assert len(list((tmp_path / "src").glob("*.safetensors"))) > 2
    assert checkpoint.read_config(tmp_path / "src") == config
    want = read_files(tmp_path / "src")
    assert ("lm_head.weight" in want) == (not tied)
    params = read_params(tmp_path / "src", config)
    np.testing.assert_array_equal(
        bits(params["decoder"]["layers"]["down_proj"]["kernel"][1]), bits(want["model.layers.1.mlp.down_proj.weight"].T)
    )
    conversion.to_orbax(tmp_path / "src", tmp_path / "orbax")
    conversion.to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=100_000)
    assert_same_bits(read_files(tmp_path / "back"), want)
    again, report = cls.from_pretrained(tmp_path / "back", torch_dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[n]) and x.dtype == state[n].dtype for n, x in again.state_dict().items())
