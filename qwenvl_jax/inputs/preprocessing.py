"""How a checkpoint wants pictures cut and normalised: its `preprocessor_config.json`. Imports no image library."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwenvl_jax.config import Config, read_json
from qwenvl_jax.errors import CheckpointError, InputError, shown

PREPROCESSOR_FILE = "preprocessor_config.json"


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
