"""Images per second from JPEG bytes to patches, this package and transformers 4.51.3, one thread each.

Both sides start from the same bytes and run in turns, so that other load on the machine affects both. The reference
does what its users do: Pillow decode, EXIF, convert, `Qwen2VLImageProcessor`, a numpy array. The photos are the test
suite's photo, scaled up, with added grain, so that decoding costs as much as for a photo from a camera.

This package returns uint8 patches, which the device normalises to bit-equal values (checked here, untimed). The
reference's time includes the normalisation.

    python benchmarks/preprocessing.py --rounds 15
"""

import argparse
import io
from functools import partial
from pathlib import Path

import numpy as np
from common import Report, clock
from PIL import Image, ImageOps
from transformers import Qwen2VLImageProcessor

from qwenvl_jax.inputs.media import image_visual
from qwenvl_jax.inputs.preprocessing import Preprocessing, pixel_table

PHOTO = Path(__file__).resolve().parents[1] / "tests/data/media/coffee.jpg"
SIZES = {"1080p": (1920, 1080), "4K": (3840, 2160)}


def photo(width: int, height: int) -> bytes:
    image = ImageOps.fit(Image.open(PHOTO), (width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 1))
    noisy = (np.asarray(image) + grain).round().clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", help="file to which results are appended as JSON lines")
    args = parser.parse_args()
    preprocessing = Preprocessing()
    processor = Qwen2VLImageProcessor(min_pixels=preprocessing.min_pixels, max_pixels=preprocessing.max_pixels)

    def ours(data: bytes) -> np.ndarray:
        return image_visual(data, preprocessing).patches

    def reference(data: bytes) -> np.ndarray:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        return processor(image, return_tensors="np")["pixel_values"]

    report = Report("preprocessing, one thread", args.output, benchmark="preprocessing")
    for name, (width, height) in SIZES.items():
        data = photo(width, height)
        values = ours(data).reshape(-1, 3, 2 * preprocessing.patch_size**2)
        table = pixel_table(preprocessing)
        normal = np.stack([table[c][values[:, c]] for c in range(3)], axis=1).reshape(len(values), -1)
        if not np.array_equal(normal, reference(data)):
            raise SystemExit(f"{name}: the two sides disagree")
        del values, normal
        times = {ours: [], reference: []}
        for _ in range(args.rounds):
            for run, taken in times.items():
                taken.append(clock(partial(run, data)))
        peers = {"transformers": times[reference]}
        report.add(f"{name}, a JPEG of {len(data) / 1e6:.1f} MB", "images/s", 1, times[ours], peers)


if __name__ == "__main__":
    main()
