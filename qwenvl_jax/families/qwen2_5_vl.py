"""Qwen2.5-VL (arXiv:2502.13923): an RMSNorm tower with a gated MLP, and windows in most layers."""

import numpy as np

from qwenvl_jax.config import Config, TextConfig, VisionConfig
from qwenvl_jax.families import shared
from qwenvl_jax.types import Visual

BOXES = "resized"  # pixels of the resized picture

tensor_names = shared.tensor_names


def from_dict(data: dict) -> Config:
    return shared.from_dict(data, _vision)


def _vision(get, text_width: int) -> VisionConfig:
    return VisionConfig(
        hidden_size=get("hidden_size", int, 1280),
        intermediate_size=get("intermediate_size", int, 3420),
        out_hidden_size=get("out_hidden_size", int, text_width),
        hidden_act=get("hidden_act", str, "silu"),
        window_size=get("window_size", int, 112),
        fullatt_block_indexes=tuple(get("fullatt_block_indexes", list[int], (7, 15, 23, 31))),
        tokens_per_second=get("tokens_per_second", float, 4),
        **shared.tower_sizes(get),
    )


def to_dict(config: Config) -> dict:
    vision = shared.fields(config.vision)
    vision["fullatt_block_indexes"] = list(vision["fullatt_block_indexes"])
    return shared.to_dict(config, "Qwen2_5_VLForConditionalGeneration", vision)


def time_steps(visual: Visual, config: Config) -> np.ndarray:
    """The t position of each grid step relative to the first: by seconds in a clip, 0 in a picture.

    As in the reference, it is computed in float32 and truncated.
    """
    seconds = np.float32(visual.seconds_per_grid if visual.kind == "video" else 0)
    steps = np.arange(visual.grid.t, dtype=np.float32)
    return (steps * seconds * np.float32(config.vision.tokens_per_second)).astype(int)


def _preset(hidden, layers, heads, kv_heads, mlp, vocab, vision_mlp, tied=False) -> Config:
    text = TextConfig(
        vocab, hidden, mlp, layers, heads, kv_heads, max_position_embeddings=128000, tie_word_embeddings=tied
    )
    return Config("qwen2_5_vl", text, VisionConfig(intermediate_size=vision_mlp, out_hidden_size=hidden))


# Sizes from the official config.json files.
PRESETS = {
    "qwen2.5-vl-3b": _preset(2048, 36, 16, 2, 11008, 151936, 3420, tied=True),
    "qwen2.5-vl-7b": _preset(3584, 28, 28, 4, 18944, 152064, 3420),
    "qwen2.5-vl-32b": _preset(5120, 64, 40, 8, 27648, 152064, 3456),
    "qwen2.5-vl-72b": _preset(8192, 80, 64, 8, 29568, 152064, 3456),
}
