"""The size that a picture is resized to, and how its pixels are normalised. Imports no image library."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwenvl_jax.config import Config, read_json, typed
from qwenvl_jax.errors import CheckpointError, InputError, MediaError, OptionsError, shown
from qwenvl_jax.inputs.options import DEFAULT, MediaOptions

PREPROCESSOR_FILE = "preprocessor_config.json"
MAX_ASPECT = 200  # the reference's limit
MAX_PIXELS = 1 << 27  # of a picture before and after resizing: 134 megapixels, 512 MB in Pillow's memory


@dataclass(frozen=True)
class Preprocessing:
    """A checkpoint's `preprocessor_config.json`; the defaults are those of the official files."""

    min_pixels: int = 56 * 56
    max_pixels: int = 12845056  # 16384 visual tokens
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    video_max_pixels: int | None = None  # default limit of one frame of a video file; None: that of video.py

    def __post_init__(self):
        for name in ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"):
            typed(name, getattr(self, name), int)
        if self.video_max_pixels is not None:
            typed("video_max_pixels", self.video_max_pixels, int)
        if self.min_pixels > self.max_pixels:
            raise CheckpointError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            numbers = isinstance(values, tuple) and all(type(v) in (int, float) and abs(v) < 1e300 for v in values)
            if not numbers or len(values) != 3:
                raise CheckpointError(f"{name} is {shown(values)}; it must be three numbers")
        if 0 in self.image_std:
            raise CheckpointError("image_std has a zero")

    @property
    def factor(self) -> int:
        """Side of a visual token in pixels; the sides of a resized picture are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_dict(cls, data: dict) -> "Preprocessing":
        """Reads `preprocessor_config.json` in its older (`min_pixels`) or newer (`size.shortest_edge`) layout."""
        if not isinstance(data, dict):
            raise CheckpointError(f"{PREPROCESSOR_FILE} is not a JSON object")
        steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
        for key, value in (steps | {"resample": 3, "rescale_factor": 1 / 255}).items():
            if data.get(key, value) not in (value, None):
                raise CheckpointError(
                    f"{PREPROCESSOR_FILE} has {key} = {shown(data[key])}; only {value!r} is supported"
                )
        size = data.get("size") or {}
        if not isinstance(size, dict):
            raise CheckpointError(f"{PREPROCESSOR_FILE} has size = {shown(size)}; it must be a JSON object")
        values = {
            "min_pixels": data.get("min_pixels") or size.get("shortest_edge"),
            "max_pixels": data.get("max_pixels") or size.get("longest_edge"),
            **{k: data.get(k) for k in ("video_max_pixels", "patch_size", "temporal_patch_size", "merge_size")},
            **{k: tuple(v) if isinstance(v := data.get(k), list) else v for k in ("image_mean", "image_std")},
        }
        return cls(**{k: v for k, v in values.items() if v is not None})


def read_preprocessing(path: Path, config: Config) -> Preprocessing | None:
    """The preprocessing of a checkpoint directory, or None. Raises CheckpointError if it contradicts `config`."""
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
    """[3, 256] float32: each channel's normalised value of each uint8, equal to transformers 4.51.3 bit for bit.

    transformers rescales in float64, rounds to float32, then subtracts and divides in float32.
    """
    unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.float32(p.image_mean)[:, None], np.float32(p.image_std)[:, None]
    return (unit - mean) / std


def check_aspect(width: int, height: int, where: str = "") -> None:
    """Raises MediaError for an empty picture, or an aspect over MAX_ASPECT."""
    size = f"{width} × {height} pixels"
    if min(width, height) <= 0:
        raise MediaError(f"{where}the picture is empty ({size})")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise MediaError(f"{where}the picture is {size}; one side may be at most {MAX_ASPECT} times the other")


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: float = 56 * 56, max_pixels: float = 12845056
) -> tuple[int, int]:
    """The (height, width) to resize to: multiples of `factor`, with nearly the same aspect, and an area within bounds.

    As in the current transformers: sides round half to even, and none is under `factor`. (transformers 4.51.3 refused
    sides under `factor`.) Raises MediaError for an empty picture, or an aspect over MAX_ASPECT.
    """
    check_aspect(width, height)
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
    """The (height, width) of the resized picture. Options override `p`; one bound alone may move the other.

    As in qwen-vl-utils, `resized_*` pass through smart_resize with its default bounds.
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
