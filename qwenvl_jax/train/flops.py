"""FLOPs of a training batch, and peak FLOP/s of devices.

Model FLOPs as in PaLM (arXiv:2204.02311, appendix B): matmuls with weights, and attention over full rows and lanes,
padding included. The recomputation of remat is not counted.
"""

from qwenvl_jax.config import Config
from qwenvl_jax.params.specs import MATMULS, specs
from qwenvl_jax.train.options import GROUPS

# Dense bfloat16 FLOP/s from data sheets. The first name found in `device_kind` counts.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its `device_kind`; None if it is unknown."""
    return next((peak for name, peak in _PEAKS.items() if name in device_kind), None)


def train_flops(
    config: Config, rows: int, tokens: int, lanes: int, patches: int, *, trains=GROUPS, weights: bool = True
) -> int:
    """FLOPs of one forward and backward pass over tokens [rows, tokens] and patches [lanes, patches].

    trains: the groups that are trained; the backward pass ends at the lowest of them.
    weights: False for LoRA, which computes no gradients of the weights themselves.
    """
    t, v = config.text, config.vision
    vision_learns = "vision" in trains

    def weights_of(*where):
        return sum(s.size for path, s in specs(config).items() if path.startswith(where) and s.role in MATMULS)

    head = t.hidden_size * t.vocab_size  # tied or not
    decoder = rows * tokens * (weights_of("decoder/layers") + head)
    attention = t.num_hidden_layers * rows * tokens**2 * 2 * t.num_attention_heads * t.head_dim
    tower = lanes * patches * weights_of("vision/patch_embed", "vision/blocks")
    spans = sum(patches if v.is_full_attention(i) else v.block_slots for i in range(v.depth))
    tower_attention = lanes * patches * spans * 2 * v.hidden_size
    merger = lanes * patches // v.merge_unit * weights_of("vision/merger")

    def matmuls(macs, inputs_learn, learns):  # forward, gradient of the input, gradient of the weights
        return 2 * macs * (1 + inputs_learn + (learns and weights))

    return (
        matmuls(decoder, True, "llm" in trains)
        + 2 * attention * 3
        + matmuls(merger, vision_learns, "merger" in trains)
        + matmuls(tower, vision_learns, vision_learns)
        + 2 * tower_attention * (3 if vision_learns else 1)
    )
