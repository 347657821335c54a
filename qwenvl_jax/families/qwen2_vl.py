"""Qwen2-VL (arXiv:2409.12191): a LayerNorm tower that attends to whole frames."""

import numpy as np

from qwenvl_jax.config import Config, TextConfig, VisionConfig
from qwenvl_jax.families import shared
from qwenvl_jax.types import Visual

BOXES = "thousandths"  # 0 … 1000 along each side of the picture
_TOWER = dict(norm="layer", gated_mlp=False, window_size=None, fullatt_block_indexes=(), tokens_per_second=None)

tensor_names = shared.tensor_names


def from_dict(data: dict) -> Config:
    return shared.from_dict(data, _vision)


def _vision(get, text_width: int) -> VisionConfig:
    width = get("embed_dim", int, 1280)
    return VisionConfig(
        hidden_size=width,
        intermediate_size=round(width * get("mlp_ratio", float, 4)),
        out_hidden_size=get("hidden_size", int, text_width),
        hidden_act=get("hidden_act", str, "quick_gelu"),
        **shared.tower_sizes(get),
        **_TOWER,
    )


def to_dict(config: Config) -> dict:
    v = config.vision
    vision = shared.fields(v)
    for key in ("window_size", "fullatt_block_indexes", "tokens_per_second", "intermediate_size", "out_hidden_size"):
        del vision[key]
    ratio = v.intermediate_size / v.hidden_size
    ratio = int(ratio) if ratio.is_integer() else ratio
    vision |= {"embed_dim": v.hidden_size, "hidden_size": v.out_hidden_size, "mlp_ratio": ratio}
    return shared.to_dict(config, "Qwen2VLForConditionalGeneration", vision)


def time_steps(visual: Visual, config: Config) -> np.ndarray:
    """The t position of each grid step relative to the first: its index."""
    return np.arange(visual.grid.t)


def _preset(hidden, layers, heads, kv_heads, mlp, vocab, tied=False) -> Config:
    text = TextConfig(vocab, hidden, mlp, layers, heads, kv_heads, tie_word_embeddings=tied)
    vision = VisionConfig(intermediate_size=5120, out_hidden_size=hidden, hidden_act="quick_gelu", **_TOWER)
    return Config("qwen2_vl", text, vision)


# Sizes from the official config.json files.
PRESETS = {
    "qwen2-vl-2b": _preset(1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2-vl-7b": _preset(3584, 28, 28, 4, 18944, 152064),
    "qwen2-vl-72b": _preset(8192, 80, 64, 8, 29568, 152064),
}
