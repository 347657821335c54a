"""How many floating-point operations a batch of training needs, and how many a second a device can do at best.

The count is the model's, as in PaLM (arXiv:2204.02311, appendix B): products with weights and attention over whole
rows and lanes, padding included; what remat computes again is not counted.
"""

from qwenvl_jax.config import Config
from qwenvl_jax.params.specs import MATMULS, specs
from qwenvl_jax.train.options import GROUPS

# Dense bfloat16 products a second, from the makers' data sheets; the first name found in `device_kind` counts.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # what v5p calls itself
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, by jax's name for it; None if it is not in the table."""
    return next((peak for name, peak in _PEAKS.items() if name in device_kind), None)


def train_flops(
    config: Config, rows: int, tokens: int, lanes: int, patches: int, *, trains=GROUPS, weights: bool = True
) -> int:
    """FLOPs of one forward and backward pass over [rows, tokens] and lanes of patches [lanes, patches].

    trains: the groups that learn; below the lowest of them there is no backward pass.
    weights: False for LoRA: gradients pass through the weights, but there are none of them.
    """
    t, v = config.text, config.vision
    unit, vision_learns = v.merge_unit, "vision" in trains

    def weights_of(*where):
        return sum(s.size for path, s in specs(config).items() if path.startswith(where) and s.role in MATMULS)

    head = t.hidden_size * t.vocab_size  # the embedding too, where it is tied
    decoder = rows * tokens * (weights_of("decoder/layers") + head)
    attention = t.num_hidden_layers * rows * tokens**2 * 2 * t.num_attention_heads * t.head_dim
    tower = lanes * patches * weights_of("vision/patch_embed", "vision/blocks")
    spans = sum(patches if v.is_full_attention(i) else v.block_slots for i in range(v.depth))
    looking = lanes * patches * spans * 2 * v.hidden_size
    merger = lanes * patches // unit * weights_of("vision/merger")

    def products(macs, inputs_learn, learns):  # forward, gradient of the input, gradient of the weights
        return 2 * macs * (1 + inputs_learn + (learns and weights))

    return (
        products(decoder, True, "llm" in trains)
        + 2 * attention * 3
        + products(merger, vision_learns, "merger" in trains)
        + products(tower, vision_learns, vision_learns)
        + 2 * looking * (3 if vision_learns else 1)
    )
