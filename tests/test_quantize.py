"""Quantising: rounding errors, folding, calibration, and the files that `qwenvl quantize` writes."""

import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_tiny import make_tiny
from PIL import Image, ImageDraw, ImageFont
from qwenvl_convert import calibrate, rounding
from qwenvl_convert.quantize import REPORT, quantize
from qwenvl_convert.rounding import SHARED
from safetensors.numpy import load_file, save_file
from tiny import FAMILIES, mixed_samples, tiny_config, tiny_params

from qwenvl_jax import cli, load
from qwenvl_jax.config import Quantised
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.eval.journal import fingerprint
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.model.linear import Linear
from qwenvl_jax.model.qwenvl import forward
from qwenvl_jax.params.directory import read_config
from qwenvl_jax.params.specs import flatten, specs

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


# Files

LARGE = [3, 11, 20, 21, 40]  # channels


def rewrite(directory, change) -> None:
    """Changes the tensors of a checkpoint: `change` gets {name: array}."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def write_records(path, texts, picture=None):
    """A file of conversations; the first one has a picture."""
    lines = []
    for i, text in enumerate(texts):
        content = [{"type": "image", "image": picture}] * (picture is not None and i == 0) + [
            {"type": "text", "text": text}
        ]
        talk = [{"role": "user", "content": content}, {"role": "assistant", "content": text[::-1]}]
        lines.append(json.dumps({"messages": talk}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def tiny_checkpoints(tmp_path_factory):
    """A checkpoint of each family with a few channels that are large, as in real models, and a licence."""
    out = {}
    for family in FAMILIES:
        path = make_tiny(tmp_path_factory.mktemp("tiny") / family, family, dtype="float32")
        (path / "LICENSE").write_text("free")

        def outliers(tensors):
            for name in tensors:
                if name.startswith("model.layers") and name.endswith("layernorm.weight"):
                    tensors[name][LARGE] *= 30
                if name.endswith(
                    ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
                ):
                    if name.startswith("model.layers"):
                        tensors[name][:, LARGE] /= 30

        rewrite(path, outliers)
        out[family] = path
    return out


def dense(model, path: str) -> np.ndarray:
    """The float32 kernel of a Linear, and the half of its scales, row by row."""
    node = model.params
    for key in path.split("/"):
        node = node[key]
    if "scales" not in node:
        return np.asarray(node["kernel"], np.float32), None
    scales = np.asarray(node["scales"], np.float32)
    repeats = node["kernel"].shape[-2] // scales.shape[-2]
    kernel = np.asarray(node["kernel"].astype(jnp.int8), np.float32)
    zeros = np.repeat(np.asarray(node["zeros"].astype(jnp.int8), np.float32), repeats, -2) if "zeros" in node else 0
    scales = np.repeat(scales, repeats, -2)
    return (kernel - zeros) * scales, scales / 2


WAYS = {
    "8": dict(bits=8),
    "8 with the tower": dict(bits=8, vision=True),
    "4": dict(group=16),
    "4 with the tower": dict(group=8, vision=True),
    "4 awq": dict(group=16, format="awq"),
}


@pytest.mark.parametrize(
    ("family", "way"),
    [
        pytest.param(FAMILIES[i % 2], way, marks=[pytest.mark.slow] if "tower" in way else [])
        for i, way in enumerate(WAYS)
    ],
)
def test_what_is_written_opens_and_is_near(family, way, tiny_checkpoints, tmp_path):
    source, options = tiny_checkpoints[family], WAYS[way]
    report = quantize(source, tmp_path / "out", progress=False, **options)
    was, now = load(source, progress=False), load(tmp_path / "out", progress=False)
    held = dict(now.config.quantised)
    for path, spec in specs(was.config).items():
        linear, _, leaf = path.rpartition("/")
        expected = spec.role == "linear" and (spec.group == "llm" or options.get("vision", False))
        assert (linear in held and leaf == "kernel") == expected, path
        if not expected:
            np.testing.assert_array_equal(flatten(now.params)[path], flatten(was.params)[path], err_msg=path)
            continue
        (want, _), (got, half) = dense(was, linear), dense(now, linear)
        assert (np.abs(got - want) <= half * (1 + 5e-5)).all(), path
        assert held[linear].dtype == ("int4" if "4" in way and spec.group == "llm" else "int8")
    assert fingerprint(now.config, now.processor, now.params) != fingerprint(was.config, was.processor, was.params)
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    assert after.pop("quantization_config") and after == before
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert "written by qwenvl_jax" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / REPORT).read_text())["after"] == report.after < report.before
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(x.nbytes for x in stored.values()) == report.after
    errors = [e for layer in report.layers for e in layer["weights"].values()]
    least, most = (0.002, 0.01) if options.get("bits") == 8 else (0.04, 0.15)
    assert len(errors) == 4 * 3 and least < min(errors) <= max(errors) < most
    assert (report.vision is not None) == options.get("vision", False)


def logit_error(path, reference: dict, samples) -> float:
    """The mean squared change of the logits of samples, relative to their size. reference: {id of a sample: logits}."""
    model, change, size = load(path, progress=False), 0.0, 0.0
    run = jax.jit(partial(forward, model.config))
    for i, sample in enumerate(samples):
        batch = make_batch([sample], model.config)
        logits = np.asarray(run(model.params, batch))[batch.segments > 0]
        want = reference.setdefault(i, logits)
        change, size = change + np.square(logits - want).sum(), size + np.square(want).sum()
    return (change / size) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "format"),
    [("qwen2_5_vl", "compressed-tensors"), ("qwen2_vl", "awq")],
)
def test_calibration_beats_rounding_to_nearest_where_channels_are_large(family, format, tiny_checkpoints, tmp_path):
    source, rng = tiny_checkpoints[family], np.random.default_rng(0)
    words = "amber bronze copper delta ember flint garnet hazel indigo jade".split()
    texts = [" ".join(rng.choice(words, 12)) for _ in range(12)]
    Image.fromarray(rng.integers(0, 256, (84, 112, 3), np.uint8)).save(tmp_path / "a.png")
    data = write_records(tmp_path / "train.jsonl", texts[:8], "a.png")
    how = dict(group=16, format=format, progress=False)
    quantize(source, tmp_path / "nearest", **how)
    report = quantize(source, tmp_path / "calibrated", data=str(data), **how)
    assert report.records == 8 and report.tokens > 200
    processor = Processor.from_dir(source, read_config(source))
    held_out = [processor.encode([{"role": "user", "content": text}]) for text in texts[8:]]
    reference: dict = {}
    assert logit_error(source, reference, held_out) == 0
    nearest, calibrated = (logit_error(tmp_path / name, reference, held_out) for name in ("nearest", "calibrated"))
    assert calibrated < 0.7 * nearest < 0.7
    for layer in report.layers:
        assert all(layer["calibrated"][name] < 0.9 * layer["nearest"][name] for name in ("attention", "mlp", "block"))
    assert report.table().splitlines()[1].split()[0] == "0"


@pytest.mark.slow
def test_calibration_beats_rounding_to_nearest_on_the_demo(tmp_path):
    """On records that the demo knows: its samples, and lines of text."""
    lines = []
    for i, text in enumerate("MERA TOVI|KASU|BELO 42|RINA POTA|SULI|VEKO 7|DORA|NAPI LUSE|TEMO 15|GALU".split("|")):
        picture = Image.new("RGB", (224, 56), "white")
        ImageDraw.Draw(picture).text((12, 12), text, fill="black", font=ImageFont.load_default(28))
        picture.save(tmp_path / f"{i}.png")
        media = {"type": "image", "image": str(tmp_path / f"{i}.png")}
        user = {"role": "user", "content": [media, {"type": "text", "text": "What does it say?"}]}
        lines.append([user, {"role": "assistant", "content": text}])
    for name, question, answer in (("scene", "Name the objects.", "dog, car"), ("chart", "What is the value?", "12")):
        media = {"type": "image", "image": str(SAMPLES / f"{name}.png")}
        user = {"role": "user", "content": [media, {"type": "text", "text": question}]}
        lines.insert(0, [user, {"role": "assistant", "content": answer}])
    records = [{"messages": talk} for talk in lines]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:8]))
    quantize("demo", tmp_path / "nearest", group=64, progress=False)
    quantize("demo", tmp_path / "calibrated", group=64, data=str(tmp_path / "train.jsonl"), progress=False)
    quantize("demo", tmp_path / "eight", bits=8, progress=False)
    processor = load("demo", progress=False).processor
    held_out = [processor.encode(r["messages"], add_generation_prompt=False) for r in records[8:]]
    reference: dict = {}
    assert logit_error("demo", reference, held_out) == 0
    errors = [logit_error(tmp_path / name, reference, held_out) for name in ("eight", "calibrated", "nearest")]
    assert errors[0] < 0.02 and errors[1] < 0.9 * errors[2] < 0.2, errors


@pytest.mark.slow
def test_a_long_record_counts_with_its_first_tokens(tiny_checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "TOKENS", 32)
    data = write_records(tmp_path / "a.jsonl", ["many " * 60, "few", "some words"])
    report = quantize(tiny_checkpoints["qwen2_vl"], tmp_path / "out", group=16, data=str(data), progress=False)
    assert report.records == 3 and 32 < report.tokens <= 3 * 32
    some = quantize(tiny_checkpoints["qwen2_vl"], tmp_path / "one", group=16, data=str(data), records=1, progress=False)
    assert some.records == 1 and some.tokens <= 32


# What goes wrong


def failed(capsys, *argv) -> str:
    """The sentence with which the command refuses its input."""
    assert cli.main(["quantize", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("qwenvl: ") and err.count("\n") == 1
    return err


REFUSED = {
    "--group 128": r"group 128 does not divide the \d\d inputs of decoder/layers/.*; the largest group is 16",
    "--group 32": "the largest group is 16",
    "--group 0": "group is 0",
    "--bits 3": "bits is 3; it must be 4 or 8",
    "--bits 8 --format awq": "format awq holds 4 bits",
    "--format awq --vision": "format awq holds 4 bits, and the tower needs 8",
    "--bits 8 --group 16": "group is 16; it is for 4 bits",
    "--bits 8 --data nowhere.jsonl": "data is to calibrate 4 bits",
    "--group 16 --data nowhere.jsonl": "nowhere.jsonl: cannot be read",
    "--group 16 --records 0": "records is 0; it must be a whole number, at least 1",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_options_are_refused(flags, tiny_checkpoints, tmp_path, capsys):
    said = failed(capsys, tiny_checkpoints["qwen2_vl"], tmp_path / "out", *flags.split())
    assert re.search(REFUSED[flags], said)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bad_records_are_named_or_skipped(tiny_checkpoints, tmp_path, capsys):
    source, data = tiny_checkpoints["qwen2_vl"], tmp_path / "bad.jsonl"
    good = {"query": "How many?", "answer": "two"}
    data.write_text(json.dumps(good) + '\n{"messages": [{"role": "user", "content": [{"image": "no.png"}]}]}\n')
    how = ("--group", 16, "--data", data)
    assert "bad.jsonl:2: " in failed(capsys, source, tmp_path / "out", *how)
    assert [f.name for f in tmp_path.iterdir()] == ["bad.jsonl"]
    assert cli.main(["quantize", str(source), str(tmp_path / "out"), *map(str, how), "--on-bad-record", "skip"]) == 0
    assert capsys.readouterr().out.endswith(f"MB\n{tmp_path / 'out'}\n")
    assert json.loads((tmp_path / "out" / REPORT).read_text())["records"] == 1
    data.write_text(data.read_text().splitlines()[1] + "\n")
    said = failed(capsys, source, tmp_path / "other", *how, "--on-bad-record", "skip")
    assert "none of 1 records can be used" in said
    assert "exists already" in failed(capsys, source, tmp_path / "out", "--bits", 8)
    assert "is quantised already" in failed(capsys, tmp_path / "out", tmp_path / "again", "--bits", 8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_are_refused(value, tiny_checkpoints, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoints["qwen2_vl"], source)

    def damage(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value

    rewrite(source, damage)
    said = failed(capsys, source, tmp_path / "out", "--bits", 8)
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in said
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


def test_a_run_that_is_killed_leaves_no_checkpoint(tiny_checkpoints, tmp_path):
    source, out = tiny_checkpoints["qwen2_vl"], tmp_path / "out"
    code = "import os, signal, sys; from qwenvl_convert import quantize as q; whole = q._write_layer\n"
    code += "q._write_layer = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if a[2] == 1 else whole(*a)\n"
    code += "q.quantize(sys.argv[1], sys.argv[2], bits=8, progress=False)"
    run = subprocess.run([sys.executable, "-c", code, str(source), str(out)], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    (left,) = tmp_path.iterdir()
    assert left.name == "out.partial-qwenvl_jax" and not (left / "config.json").exists()
    quantize(source, out, bits=8, progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert dict(load(out, progress=False).config.quantised)
