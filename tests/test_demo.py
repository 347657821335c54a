"""The checkpoint that comes with the package: small, whole, described, and the same model in transformers."""

import hashlib
import json
import re
import sys

import numpy as np
import pytest
from demo.__main__ import NAMES, main
from demo.tokenizer import write_processor
from demo.train import demo_config
from PIL import Image

from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.params import checkpoint
from qwenvl_jax.params.specs import count_params

QUESTIONS = (
    *("Read the text.", "What is it?", "List everything.", "How many strawberries are there?", "Locate every pizza."),
    *("Which is the highest?", "What is the value of Factory?"),
)


@pytest.fixture(scope="module")
def directory():
    return checkpoint.find("demo")


def test_size(directory):
    files = [f for folder in (directory, SAMPLES) for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 20e6


def test_config_and_processor_are_what_the_script_makes(directory, tmp_path):
    assert checkpoint.read_config(directory) == demo_config()
    for file in write_processor(tmp_path).iterdir():
        if file.name != "generation_config.json":
            assert json.loads((directory / file.name).read_text("utf-8")) == json.loads(file.read_text("utf-8"))


def test_card(directory):
    """It tells what was trained and on what, and how well it does every task."""
    card = (directory / "README.md").read_text("utf-8")
    assert f"{count_params(demo_config()):,} parameters" in card
    for word in ("python notebooks/demo train", "OFL", "Apache-2.0", "vega-datasets"):
        assert word in card
    weights = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert weights in card, "the card's results are of other weights; score these"
    for task in ("ocr", "ocr_unseen_fonts", "name", "count", "locate", "chart", "clip"):
        assert re.search(rf"^\| {task} \|.*\d\.\d%", card, re.M), f"no result for {task}"


@pytest.mark.parametrize("name", NAMES)
def test_its_scripts_run_by_name(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["notebooks/demo", name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    assert f"usage: demo {name}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["notebooks/demo", "paint"])
    with pytest.raises(SystemExit, match="usage: python notebooks/demo"):
        main()


def pictures():
    """The samples, and pieces of them that nobody has seen."""
    rng = np.random.default_rng(0)
    for file in sorted(SAMPLES.glob("*.png")):
        whole = Image.open(file).convert("RGB")
        yield whole
        for _ in range(3):
            w, h = (28 * int(rng.integers(1, side // 28 + 1)) for side in whole.size)
            x, y = (int(rng.integers(0, side - cut + 1)) for side, cut in zip(whole.size, (w, h), strict=True))
            yield whole.crop((x, y, x + w, y + h))


@pytest.mark.parity
def test_transformers_answers_the_same(directory):
    """Greedily, token by token, one question at a time there and all of them together here."""
    import torch
    from qwenvl_convert.parity import load_reference, reference_inputs

    from qwenvl_jax import Engine, load

    model = load("demo", dtype="float32")
    content = [[{"image": p}, {"text": QUESTIONS[i % len(QUESTIONS)]}] for i, p in enumerate(pictures())]
    content += [[{"video": str(SAMPLES / "clip.mp4")}, {"text": "When does the giraffe appear?"}]]
    samples = [model.processor.encode([{"role": "user", "content": c}]) for c in content]
    ours = Engine(model).generate(samples, max_new_tokens=48, temperature=0.0, repetition_penalty=1.0)

    reference = load_reference(directory)
    for sample, result in zip(samples, ours, strict=True):
        with torch.no_grad():
            reference.model.rope_deltas = reference.rope_deltas = None
            out = reference.generate(**reference_inputs([sample], model.config), max_new_tokens=48, do_sample=False)
        theirs = out[0, len(sample.tokens) :].tolist()
        stop = model.config.eos_token_id
        theirs = theirs[: theirs.index(stop) + 1] if stop in theirs else theirs
        assert list(result.token_ids) == theirs
