"""To which size a picture is resized, and how its pixels are normalised: the checkpoint's `preprocessor_config.json`.

Imports no image library.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwenvl_jax.config import Config, read_json
from qwenvl_jax.errors import CheckpointError, InputError, MediaError, OptionsError, shown
from qwenvl_jax.inputs.options import DEFAULT, MediaOptions

PREPROCESSOR_FILE = "preprocessor_config.json"
MAX_ASPECT = 200  # the reference's limit
MAX_PIXELS = 1 << 27  # of a picture, declared or resized: 134 megapixels, half a gigabyte once decoded


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become patches: a checkpoint's `preprocessor_config.json`; defaults are the official files'."""

    min_pixels: int = 56 * 56
    max_pixels: int = 12845056  # 16384 visual tokens
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    video_max_pixels: int | None = None  # of a frame of a file, by default; the official files leave it to video.py

    def __post_init__(self):
        for name in ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"):
            _check_whole(name, getattr(self, name))
        if self.video_max_pixels is not None:
            _check_whole("video_max_pixels", self.video_max_pixels)
        if self.min_pixels > self.max_pixels:
            raise CheckpointError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != 3 or not all(map(_is_number, values)):
                raise CheckpointError(f"{name} is {values!r}; it must be three numbers")
        if 0 in self.image_std:
            raise CheckpointError("image_std has a zero")

    @property
    def factor(self) -> int:
        """Pixels along one side of a visual token; both sides of a resized picture are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_dict(cls, data: dict) -> "Preprocessing":
        """Reads `preprocessor_config.json`, older (`min_pixels`) or newer (`size.shortest_edge`) layout."""
        if not isinstance(data, dict):
            raise CheckpointError("preprocessor_config.json is not a JSON object")
        for key, value in (
            ("do_resize", True),
            ("do_rescale", True),
            ("do_normalize", True),
            ("do_convert_rgb", True),
            ("resample", 3),
            ("rescale_factor", 1 / 255),
        ):
            if data.get(key, value) not in (value, None):
                raise CheckpointError(
                    f"preprocessor_config.json says {key} = {data[key]!r}; only {value!r} is supported"
                )
        size = data.get("size") or {}
        if not isinstance(size, dict):
            raise CheckpointError(
                f"preprocessor_config.json says size = {size!r}; it must have shortest_edge and longest_edge"
            )
        values = {
            "min_pixels": data.get("min_pixels") or size.get("shortest_edge"),
            "max_pixels": data.get("max_pixels") or size.get("longest_edge"),
            **{k: data.get(k) for k in ("video_max_pixels", "patch_size", "temporal_patch_size", "merge_size")},
            **{k: tuple(v) if isinstance(v := data.get(k), list) else v for k in ("image_mean", "image_std")},
        }
        return cls(**{k: v for k, v in values.items() if v is not None})


def read_preprocessing(path: Path, config: Config) -> Preprocessing | None:
    """How a checkpoint directory says pictures are cut and normalised, checked against its config; None: not at all."""
    file = path / PREPROCESSOR_FILE
    if file.exists():
        data = read_json(file)
    else:  # transformers 5 nests the image processor in another
        file = path / "processor_config.json"
        data = read_json(file, missing={}).get("image_processor")
    if data is None:
        return None
    try:
        preprocessing = Preprocessing.from_dict(data)
    except InputError as e:
        raise CheckpointError(f"{file}: {e}") from e
    for key in ("patch_size", "temporal_patch_size", "merge_size"):
        ours, models = getattr(preprocessing, key), getattr(config.vision, key.replace("merge", "spatial_merge"))
        if ours != models:
            raise CheckpointError(f"{file}: {key} is {ours}, but config.json's vision_config calls for {models}")
    return preprocessing


def pixel_table(p: Preprocessing) -> np.ndarray:
    """[3, 256] float32: what the reference makes of each uint8 value of each channel, bit for bit.

    transformers 4.51.3 rescales in float64, rounds to float32, then subtracts and divides in float32.
    """
    unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.float32(p.image_mean)[:, None], np.float32(p.image_std)[:, None]
    return (unit - mean) / std


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: float = 56 * 56, max_pixels: float = 12845056
) -> tuple[int, int]:
    """The (height, width) to resize to: multiples of `factor`, area within bounds, aspect nearly kept.

    As in today's reference: sides round half to even, none is under `factor`, and an aspect of exactly 200
    passes. (transformers 4.51.3 refused sides under `factor`; qwen-vl-utils scaled them up before it saw
    them.) Raises InputError for an empty picture or a larger aspect.
    """
    if height <= 0 or width <= 0:
        raise MediaError(f"the picture is empty ({width} × {height} pixels)")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise MediaError(
            f"the picture is {width} × {height} pixels; one side may be at most {MAX_ASPECT} times the other"
        )
    h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    if h * w > MAX_PIXELS:
        raise MediaError(f"the picture would be resized to {w} × {h} pixels; lower min_pixels or max_pixels")
    return h, w


def target_size(height: int, width: int, p: Preprocessing, o: MediaOptions = DEFAULT) -> tuple[int, int]:
    """The (height, width) of the resized picture under one item's options, which win over `p`.

    `resized_*` go through smart_resize themselves, with its default bounds, as in qwen-vl-utils. One bound
    given alone moves the other if it must.
    """
    if o.resized_height is not None and o.resized_width is not None:
        area = p.factor**2
        return smart_resize(o.resized_height, o.resized_width, p.factor, 4 * area, 16384 * area)
    if o.resized_height is not None or o.resized_width is not None:
        raise OptionsError("resized_height and resized_width must be given together")
    low = o.min_pixels or min(p.min_pixels, o.max_pixels or p.min_pixels)
    high = o.max_pixels or max(p.max_pixels, low)
    if low > high:
        raise OptionsError(f"min_pixels {low} is larger than max_pixels {high}")
    return smart_resize(height, width, p.factor, low, high)


def _check_whole(name: str, value) -> None:
    """CheckpointError unless a setting is a positive whole number, of a size that arithmetic can take."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(f"{name} is {shown(value)}; it must be a positive whole number, at most {2**31 - 1}")


def _is_number(value) -> bool:
    """Whether a value is an int or float that fits a finite float; JSON has longer integers, and Infinity."""
    try:
        return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
