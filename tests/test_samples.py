"""The samples in the package: what they are, and that the demo answers what the README asks about them."""

import re
import shlex
from pathlib import Path

import pytest
from demo.draw_samples import CHOSEN
from demo.tokenizer import PREPROCESSOR

from qwenvl_jax import cli
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.inputs.media import image_visual, load_image
from qwenvl_jax.inputs.preprocessing import Preprocessing
from qwenvl_jax.inputs.video import video_visual

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")
QUESTIONS = re.findall(r"^qwenvl (generate --(?:image|video) demo:.*?)  +# (.+)$", README, re.M)


def test_samples_are_small_and_fit_the_demo():
    assert {f.name for f in SAMPLES.iterdir()} == {*CHOSEN, "README.md"}
    assert sum(f.stat().st_size for f in SAMPLES.iterdir()) < 100_000
    settings = Preprocessing.from_dict(PREPROCESSOR)
    for file in SAMPLES.glob("*.png"):
        image, grid = load_image(str(file)), image_visual(str(file), settings).grid
        assert (image.width, image.height) == (14 * grid.w, 14 * grid.h), f"{file} is resized"
    clip = video_visual(str(SAMPLES / "clip.mp4"), settings)
    assert clip.grid.h == clip.grid.w == 6 and clip.seconds_per_grid == 1.0


def test_the_readme_asks_about_every_sample():
    assert {re.search("demo:([^ ]+)", command)[1] for command, _ in QUESTIONS} == set(CHOSEN)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "answer"), QUESTIONS)
def test_the_demo_answers_as_the_readme_says(command, answer, capsys):
    assert cli.main(shlex.split(command)) == 0
    assert capsys.readouterr() == (f"{answer}\n", "")
