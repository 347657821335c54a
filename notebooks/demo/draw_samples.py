"""Draws the samples in the package: pictures and a clip that were not used in training.

python notebooks/demo draw_samples [--assets DIR]
"""

import argparse
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np

from demo.assets import Assets, assets_of
from demo.clips import FPS
from demo.render import Scenes
from qwenvl_jax.demo import SAMPLES

# {file: (task, index)} in the evaluation split, chosen because the demo answers them correctly.
CHOSEN = {
    "scene.png": ("locate", 2919),
    "line.png": ("ocr", 1005),
    "chart.png": ("chart", 103),
    "clip.mp4": ("clip", 802),
}


def draw(folder: Path, assets: Assets, chosen: Mapping[str, tuple[str, int]] = CHOSEN) -> None:
    """Writes pictures (PNG) and clips (H.264, needs PyAV) of the chosen records. Replaces existing files."""
    for name, (task, index) in chosen.items():
        media, _ = Scenes(assets, "evaluation").record(task, index)["messages"][0]["content"]
        if "image" in media:
            media["image"].save(folder / name, optimize=True)
        else:
            _write_clip(folder / name, media["video"])


def _write_clip(file: Path, frames: np.ndarray) -> None:
    """frames: [n, h, w, 3] uint8. Players need 4:2:0, so single pixels lose their colour."""
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"crf": "10", "preset": "veryslow"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", help="where fonts, emoji and tables are; see notebooks/demo/assets.py")
    draw(SAMPLES, assets_of(parser, parser.parse_args().assets))
