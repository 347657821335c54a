"""`qwenvl train` and `qwenvl plot`: options from files and flags, exit codes, and one run from end to end."""

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from qwenvl_convert import peft

from qwenvl_jax import cli
from qwenvl_jax.cli import plot
from qwenvl_jax.errors import InputError, install
from qwenvl_jax.params import checkpoint, lora
from qwenvl_jax.params.precision import Precision
from qwenvl_jax.train import finetune, options, run, step
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.records import PackShape, RecordProcessor

FIELDS = {f.name: f for f in dataclasses.fields(TrainOptions)}


@pytest.fixture
def asked(monkeypatch):
    """Records the options of `finetune` instead of training; `asked.answer` is its result."""

    def fake(given, evaluator):
        fake.options = given
        if isinstance(fake.answer, BaseException):
            raise fake.answer
        return fake.answer

    fake.answer, fake.options = None, None
    monkeypatch.setattr(finetune, "finetune", fake)
    return fake


def test_flags_override_the_file(asked, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'model = "m"\nrows = 2\nlearning_rate = 1\nfreeze = ["vision"]\nbetas = [0.8, 0.9]\nremat = false\n'
    )
    assert cli.main(["train", str(file), "--rows", "3", "--lora-targets", "q_proj", "--lora-targets", "v_proj"]) == 0
    expected = dict(model="m", rows=3, learning_rate=1.0, freeze=("vision",), betas=(0.8, 0.9), remat=False)
    assert asked.options == TrainOptions(**expected, lora_targets=("q_proj", "v_proj"))
    assert cli.main(["train", str(file), "--remat", "--betas", "0.7", "0.6", "--freeze", "llm"]) == 0
    assert (asked.options.remat, asked.options.betas, asked.options.freeze) == (True, (0.7, 0.6), ("llm",))


def test_options_come_back_from_their_file(tmp_path):
    given = TrainOptions(
        model='a "b"\\ü', learning_rate=3e-7, betas=(0.5, 0.25), freeze=("vision", "llm"), fps=2.0, remat=False
    )
    (tmp_path / "x.toml").write_text(given.to_toml(), "utf-8")
    assert TrainOptions.read(tmp_path / "x.toml") == given
    assert given.differences(TrainOptions.read(tmp_path / "x.toml", {"keep": 9, "log_every": 5, "threads": 0})) == []
    assert given.replace(fps=None).differences(given) == ["fps was 2.0 and is not given"]


@pytest.mark.parametrize("name", FIELDS)
def test_every_key_is_documented_where_it_is_looked_for(name, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"--{name.replace('_', '-')}" in text
    assert FIELDS[name].metadata["doc"] in text and len(FIELDS[name].metadata["doc"]) > 5


def test_choices_are_those_of_the_step():
    assert options.GROUPS == step.GROUPS
    assert FIELDS["schedule"].metadata["choices"] == step.SCHEDULES


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("learning_rat = 1e-5", "unknown option learning_rat; did you mean learning_rate?"),
        ("zzz = 1", "unknown option zzz; known are columns, "),
        ("[adam]\nclip = 1", "unknown option adam"),
        ("rows = 0", "rows is 0; it must be a whole number, at least 1"),
        ("rows = 1.5", "rows is 1.5; it must be a whole number"),
        ("rows = true", "rows is True; it must be a whole number"),
        ("remat = 1", "remat is 1; it must be true or false"),
        ('task = "rlhf"', "task is 'rlhf'; it must be one of sft, dpo"),
        ('freeze = ["llm", "eyes"]', "freeze is 'eyes'; it must be one of vision, merger, llm"),
        ("betas = [0.9]", "betas is [0.9]; it must be a list of 2"),
        ("betas = [0.9, 1.0]", "betas is 1.0; it must be a number, at least 0, less than 1"),
        ("learning_rate = nan", "learning_rate is nan; it must be a positive number, at most 1"),
        ("weight_decay = inf", "weight_decay is inf"),
        ("model = 5", "model is 5; it must be a string"),
        ("rows = ", "not readable as TOML"),
    ],
)
def test_bad_options_are_named(asked, tmp_path, capsys, line, sentence):
    file = tmp_path / "bad.toml"
    file.write_text(line)
    assert cli.main(["train", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"qwenvl: {file}: ") and sentence in error
    assert asked.options is None


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_options_saved_on_windows(asked, tmp_path, coding):
    file = tmp_path / "run.toml"
    file.write_bytes('rows = 2\r\noutput = "é"\r\n'.encode(coding))
    cli.main(["train", str(file)])
    assert (asked.options.rows, asked.options.output) == (2, "é")


def test_options_in_another_encoding(asked, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_bytes('output = "é"'.encode("latin-1"))
    assert cli.main(["train", str(file)]) == 2
    assert f"{file}: is not UTF-8 text" in capsys.readouterr().err and asked.options is None


def test_bad_options_outside_a_file(tmp_path, capsys):
    assert cli.main(["train", "--steps", "0"]) == 2
    assert "steps is 0; it must be a whole number, at least 1" in capsys.readouterr().err
    assert cli.main(["train", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: cannot be read" in capsys.readouterr().err
    assert cli.main(["train", "--model", "m", "--data", "d"]) == 2
    assert "output is missing" in capsys.readouterr().err
    with pytest.raises(InputError, match="warmup is 10"):
        TrainOptions(warmup=10, steps=10)
    with pytest.raises(InputError, match="did you mean steps"):
        TrainOptions().replace(step=3)
    for name in ("rows", "lanes"):
        with pytest.raises(InputError, match=f"{name} is 3; it must be a multiple of .*, 2"):
            finetune.make_run_mesh(TrainOptions(**dict(rows=4, lanes=4, mesh_fsdp=2) | {name: 3}))


@pytest.mark.parametrize("ended, code", [(None, 0), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_exit_codes(asked, ended, code):
    asked.answer = ended
    assert cli.main(["train"]) == code


def test_the_second_interrupt_does_not_wait(asked, monkeypatch):
    """Threads that write a checkpoint would delay the exit."""
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: codes.append(code) or sys.exit(code))
    asked.answer = KeyboardInterrupt()
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert codes == [130]


def test_skipped_records_are_told(monkeypatch, capsys):
    """The command shows this package's warnings only."""

    def warn(given, evaluator):
        logging.getLogger("qwenvl_jax.train.data").warning("x.jsonl:3: no picture; skipped")
        logging.getLogger("jax._src").warning("chatter")
        logging.getLogger("elsewhere").warning("chatter")

    monkeypatch.setattr(finetune, "finetune", warn)
    assert cli.main(["train"]) == 0
    assert capsys.readouterr().err == "x.jsonl:3: no picture; skipped\n"


def written(directory, steps, **values):
    directory.mkdir()
    lines = [{"step": s} | {name: value(s) for name, value in values.items()} for s in range(1, steps + 1)]
    (directory / run.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(directory)


def test_plot(tmp_path, capsys):
    one = written(tmp_path / "one", 20, loss=lambda s: 1 / s, skipped_steps=lambda s: 0)
    two = written(tmp_path / "two", 300, loss=lambda s: None if s == 7 else 2 / s, accuracy=lambda s: s / 300)
    with open(tmp_path / "two" / run.METRICS, "a") as f:
        f.write('{"step": 301, "loss": 0.1, "eval/overall": 0.5}\n{"step": 302, "los')
    assert cli.main(["plot", one, two, "-o", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'a.png'}\n", "")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.width > 3 * 500  # three panels: loss, eval/overall, accuracy
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert cli.main(["plot", one, "-o", str(tmp_path / "b.png")]) == 0
    with Image.open(tmp_path / "b.png") as image:
        assert image.width < 700


def test_panels_have_units_and_intervals_and_each_curve_once(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: figures.append(figure))

    def score(s):
        return s / 10

    names = {"eval/a/exact": score, "eval/overall": score, "eval/b/f1": lambda s: 0.5}
    bounds = {"eval/overall/low": lambda s: s / 20, "eval/overall/high": lambda s: s / 5}
    bounds |= {"eval/a/exact/low": lambda s: s / 20, "eval/a/exact/high": lambda s: s / 5}
    one = written(tmp_path / "one", 3, loss=lambda s: 1 / s, mfu=lambda s: 0.4, **names, **bounds)
    assert cli.main(["plot", one, one + "/", "-o", str(tmp_path / "a.png")]) == 0
    (figure,) = figures
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == ["loss", "eval/a/exact = eval/overall", "eval/b/f1", "mfu"]
    assert [axis.get_ylabel() for axis in panels.values()] == [
        "nats", "score, 0 to 1, with 95% interval", "score", "share of peak FLOP/s",
    ]  # fmt: skip
    assert all(axis.get_xlabel() == "step" and len(axis.lines) == 1 for axis in panels.values())
    (bars,) = panels["eval/a/exact = eval/overall"].collections
    np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], [[s / 20, s / 5] for s in (1, 2, 3)])
    assert not panels["eval/b/f1"].collections


def test_plot_says_what_is_missing(tmp_path, capsys, monkeypatch):
    assert cli.main(["plot", str(tmp_path / "none")]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    empty = written(tmp_path / "empty", 0)
    assert cli.main(["plot", empty]) == 2
    assert "has no steps yet" in capsys.readouterr().err
    with pytest.raises(InputError, match="there is no directory"):
        plot.draw({"a": [{"step": 1, "loss": 1.0}]}, tmp_path / "no" / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for verb in ("plot", "data"):  # before anything is read
        assert cli.main([verb, str(tmp_path / "none"), "-o", str(tmp_path / "x.png")]) == 2
        assert install("train") in capsys.readouterr().err
    with pytest.raises(InputError, match=re.escape(install("train"))):
        plot.draw({"a": [{"step": 1, "loss": 1.0}]}, tmp_path / "x.png")


@pytest.mark.slow
@pytest.mark.parametrize("tiny_checkpoint", ["qwen2_5_vl"], indirect=True)
def test_from_end_to_end(tiny_checkpoint, tmp_path, capsys):
    """LoRA learns a picture's answer: metrics, a model for `generate`, the adapter, and no second run."""
    Image.new("RGB", (112, 112), "red").save(tmp_path / "red.png")
    user = {"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "Colour?"}]}
    record = {"messages": [user, {"role": "assistant", "content": "red"}]}
    bad = {"messages": [user | {"content": [{"type": "image", "image": "no.png"}]}, record["messages"][1]]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(bad) + "\n")
    (tmp_path / "eval.jsonl").write_text(json.dumps(record | {"task": "colour"}) + "\n")
    output = tmp_path / "run"
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "{tiny_checkpoint}"\ndata = "{tmp_path}/data.jsonl"\neval_data = "{tmp_path}/eval.jsonl"\n'
        f'output = "{output}"\nrows = 1\ntokens = 64\nlanes = 1\npatches = 64\nlora_rank = 4\nlearning_rate = 0.02\n'
        'schedule = "linear"\nlora_targets = ["llm", "merger"]\n'
    )
    argv = ["train", str(file), "--steps", "30", "--on-bad-record", "skip", "--best", "overall", "--eval-every", "30"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert f"model of step 30: {output / 'final'}" in out and f"adapter for PEFT: {output / 'adapter'}" in out
    assert "records skipped: media: " in out and "colour/exact 1" in out
    cast, skipped = (line for line in err.splitlines() if not line.startswith("step "))
    assert "step 30/30: loss" in err
    assert "bfloat16 weights are cast to float32" in cast
    assert skipped.endswith("no.png: No such file or directory; skipped")
    lines = run.read_metrics(output)
    assert len(lines) == 30 and lines[-1]["eval/colour/exact"] == 1
    assert (lines[0]["accuracy"], lines[-1]["accuracy"]) == (0, 1)
    # The head is frozen, its rows have length 1, and its input has length √48: no logit exceeds 7.
    assert lines[-1]["loss"] < lines[0]["loss"] - 5

    ask = ["--image", str(tmp_path / "red.png"), "--prompt", "Colour?", "--temperature", "0"]
    assert cli.main(["generate", "--model", str(output / "final"), *ask]) == 0
    assert capsys.readouterr().out == "red\n"
    base, final = (checkpoint.load(path) for path in (tiny_checkpoint, output / "final"))
    assert final.config == base.config
    adapted = peft.load_adapter(base.config, base.params, output / "adapter")
    for mine, theirs in zip(jax.tree.leaves(lora.merge(adapted)), jax.tree.leaves(final.params), strict=True):
        stored = mine.astype(jnp.bfloat16)  # the dtype of the first checkpoint; the run computes in float32
        np.testing.assert_array_equal(stored.astype(theirs.dtype), theirs)

    assert cli.main(argv) == 0
    assert capsys.readouterr().out == f"already finished: {output / 'final'}\n"
    assert cli.main([*argv, "--learning-rate", "0.1"]) == 2
    assert "learning_rate was 0.02 and is 0.1" in capsys.readouterr().err

    # An existing result is neither overwritten nor mixed with another run's.
    for folder, left in (("checkpoints", "final"), ("final", "adapter")):
        shutil.rmtree(output / folder)
        assert cli.main(argv) == 2
        assert f"{output / left} exists, after 0 steps" in capsys.readouterr().err
    assert len(run.read_metrics(output)) == 30


@pytest.mark.slow
@pytest.mark.parametrize("tiny_checkpoint", ["qwen2_5_vl"], indirect=True)
def test_a_run_that_ended_goes_on(tiny_checkpoint, tmp_path, capsys):
    """By epochs and with an optimizer of one's own; the former result keeps a name."""
    rows = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "data.jsonl").write_text((json.dumps({"messages": rows}) + "\n") * 5)
    output = tmp_path / "run"
    shape = dict(rows=1, tokens=64, lanes=1, patches=64, lora_rank=2)  # two records fit into a row
    how = dict(model=str(tiny_checkpoint), data=str(tmp_path / "data.jsonl"), output=str(output), **shape)
    seen = []
    for epochs, steps in ((1, 3), (1, 3), (2, 6)):
        given = TrainOptions(epochs=epochs, **how)
        optimizer = optax.adam(1e-2)
        assert (
            finetune.finetune(given, optimizer=optimizer, on_metrics=lambda s, m: seen.append((s, m["epoch"]))) is None
        )
        assert checkpoint.find(output / "final") and run.last_step(output) == steps
    out = capsys.readouterr().out
    assert f"already finished: {output / 'final'}" in out
    assert f"the result after 3 steps is now {output / 'final-3'}" in out
    assert {p.name for p in output.iterdir()} >= {"final", "final-3", "adapter", "adapter-3"}
    assert [epoch for _, epoch in seen] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0] and [s for s, _ in seen] == [*range(1, 7)]
    with pytest.raises(InputError, match=r"run: the run has read its records 2 times; epochs is 1"):
        finetune.finetune(TrainOptions(epochs=1, **how), optimizer=optax.adam(1e-2))
    assert (output / "final").is_dir() and not (output / "final-6").exists()
    with pytest.raises(InputError, match="optimizer was custom and is adamw"):
        finetune.finetune(TrainOptions(epochs=2, **how))


def test_a_start_that_fails_leaves_nothing(tmp_path, capsys):
    argv = ["train", "--model", str(tmp_path / "none"), "--data", __file__, "--output", str(tmp_path / "run")]
    assert cli.main(argv) == 2 and str(tmp_path / "none") in capsys.readouterr().err
    assert cli.main([*argv, "--data", str(tmp_path / "d.jsonl")]) == 2
    assert "d.jsonl: cannot be read" in capsys.readouterr().err
    assert cli.main([*argv, "--rows", "1", "--mesh-data", "3"]) == 2
    assert "rows is 1; it must be a multiple" in capsys.readouterr().err
    assert cli.main([*argv, "--steps", "5", "--epochs", "2"]) == 2
    assert "steps is 5 and epochs is 2; give one of them" in capsys.readouterr().err
    assert cli.main([*argv, "--optimizer", "custom"]) == 2
    assert "made in Python" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_empty_flag_switches_a_list_of_the_file_off(asked, tmp_path):
    (file := tmp_path / "run.toml").write_text('data = ["d.jsonl"]\neval_data = ["e.jsonl"]\nlora_targets = ""\n')
    assert TrainOptions.read(file).eval_data == ("e.jsonl",)
    options = TrainOptions.read(file, {"eval_data": [""]})
    assert (options.eval_data, options.data, options.lora_targets) == ((), ("d.jsonl",), ())
    assert TrainOptions.read(file, {"eval_data": ["", "f"]}).eval_data == ("", "f")
    assert cli.main(["train", str(file), "--eval-data", ""]) == 0
    assert asked.options.eval_data == ()


def test_a_result_that_the_disk_does_not_hold(tiny_checkpoint, tmp_path, monkeypatch):
    """The whole model counts, in the checkpoint's dtype."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"query": "Q", "response": "A"}) + "\n")
    seen = []

    def train(model, data, options, reserve=0, **more):
        seen.append((reserve, sum(w.size for w in jax.tree.leaves(model.params))))
        raise InputError("enough")

    monkeypatch.setattr(finetune, "train", train)
    options = TrainOptions(model=str(tiny_checkpoint), data=(f"{tmp_path}/data.jsonl",), output=f"{tmp_path}/run")
    with pytest.raises(InputError, match="enough"):
        finetune.finetune(options)
    ((reserve, size),) = seen
    assert reserve == size * np.dtype(checkpoint.directory.read_config(tiny_checkpoint).dtype).itemsize


def test_epochs_replace_steps(tmp_path):
    assert (TrainOptions().steps, TrainOptions(epochs=2).steps) == (1000, None)
    assert TrainOptions().replace(epochs=2) == TrainOptions(epochs=2)
    assert TrainOptions(epochs=2).replace(steps=5) == TrainOptions(steps=5)
    (tmp_path / "x.toml").write_text("steps = 7\n")
    assert TrainOptions.read(tmp_path / "x.toml", {"epochs": 2}) == TrainOptions(epochs=2)  # flags win
    (tmp_path / "y.toml").write_text(TrainOptions(epochs=2, schedule="constant").to_toml())
    assert TrainOptions.read(tmp_path / "y.toml").length == "2 epochs"
    assert TrainOptions(epochs=3, schedule="constant").differences(TrainOptions.read(tmp_path / "y.toml"), 9) == []


BOXED = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"


@pytest.mark.slow
@pytest.mark.parametrize("tiny_checkpoint", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("allowed", [True, False])
def test_one_rule_for_control_tokens(tiny_checkpoint, tmp_path, capsys, allowed):
    """A conversation trained, scored in the run, scored by `qwenvl eval` and generated: the same ids, score 1."""
    record = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": BOXED}]}
    data, run_dir = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text(json.dumps(record) + "\n")
    argv = ["train", "--model", tiny_checkpoint, "--data", data, "--eval-data", data, "--output", run_dir, "--rows", 1]
    argv += ["--tokens", 64, "--lanes", 1, "--patches", 64, "--lora-rank", 8, "--learning-rate", 0.02, "--steps", 60]
    argv += ["--eval-every", 60, "--schedule", "linear", *(["--allow-control-tokens"] if allowed else [])]
    assert cli.main([str(word) for word in argv]) == 0
    assert run.read_metrics(run_dir)[-1]["eval/default/exact"] == 1

    final = run_dir / "final"
    model = checkpoint.load(final, progress=False)
    (trained,) = RecordProcessor(model.processor, PackShape(1, 64, 1, 64))(record)
    learnt = trained.tokens[trained.weights > 0].tolist()
    boxes = [model.processor.control_tokens[name] for name in ("<|object_ref_start|>", "<|box_end|>")]
    assert (set(boxes) <= set(learnt)) == allowed and json.loads((final / "tokenizer_config.json").read_text()).get(
        "allow_control_tokens", False
    ) is allowed
    capsys.readouterr()
    assert cli.main(["eval", str(data), "--model", str(final), "--output", str(tmp_path / "a.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overall"]["value"] == 1
    prediction = json.loads((tmp_path / "a.jsonl").read_text())["prediction"]
    assert cli.main(["generate", "--model", str(final), "--prompt", "Where?", "--temperature", "0", "--json"]) == 0
    generated = json.loads(capsys.readouterr().out)
    assert generated["token_ids"] == learnt and generated["text"] == prediction == BOXED
    assert cli.main(["generate", "--model", str(final), "--prompt", "Where?", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == BOXED + "\n"  # streamed

    # The user has the last word; gold and answer stay alike.
    assert cli.main(["eval", str(data), "--model", str(final), "--skip-special-tokens", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overall"]["value"] == 1
    argv = ["generate", "--model", str(final), "--prompt", "Where?", "--temperature", "0", "--skip-special-tokens"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == ("cat(1,2),(3,4)\n" if allowed else BOXED + "\n")


@pytest.mark.parametrize("tiny_checkpoint", ["qwen2_5_vl"], indirect=True)
def test_float16_is_not_trained_in(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    # The precision of a float16 checkpoint on an accelerator; a CPU computes it in float32.
    monkeypatch.setattr(checkpoint, "precision_of", lambda config, mesh: Precision("float16", None))
    (tmp_path / "d.jsonl").write_text("{}\n")
    argv = ["train", "--model", str(tiny_checkpoint), "--data", str(tmp_path / "d.jsonl")]
    assert cli.main([*argv, "--output", str(tmp_path / "run")]) == 2
    assert "set dtype to bfloat16 or float32" in capsys.readouterr().err
