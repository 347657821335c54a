"""The one table of tensor names: which tensors of a Hugging Face checkpoint each parameter is made of.

A parameter that multiplies (`Spec.transposed`) is a torch weight transposed to [in, out]; the patch convolution is
flattened to a matrix first; everything else keeps its shape. A stacked parameter is one tensor a layer.
"""

from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError
from qwenvl_jax.params.specs import Spec

# Prefixes of the decoder and the vision tower: the hub's files, and newer saves of transformers (4.52 on).
LAYOUTS = {"hub": ("model.", "visual."), "nested": ("model.language_model.", "model.visual.")}

_DECODER = {"embed_tokens/embedding": "embed_tokens.weight", "norm/scale": "norm.weight"}
_LAYER = {
    "input_layernorm/scale": "input_layernorm.weight",
    "post_attention_layernorm/scale": "post_attention_layernorm.weight",
    **{f"{p}/kernel": f"self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"{p}/bias": f"self_attn.{p}.bias" for p in ("q_proj", "k_proj", "v_proj")},
    **{f"{p}/kernel": f"mlp.{p}.weight" for p in ("gate_proj", "up_proj", "down_proj")},
}


def _linear(param: str, tensor: str) -> dict[str, str]:
    return {f"{param}/kernel": f"{tensor}.weight", f"{param}/bias": f"{tensor}.bias"}


def _norm(param: str, tensor: str, bias: bool) -> dict[str, str]:
    return {f"{param}/scale": f"{tensor}.weight"} | ({f"{param}/bias": f"{tensor}.bias"} if bias else {})


def tensor_names(config: Config, layout: str = "hub") -> dict[str, tuple[str, ...]]:
    """Parameter path → its tensors' names, one a layer for a stacked parameter, in the order files are written."""
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    decoder, visual = LAYOUTS[layout]
    layer_norm = not config.is_qwen2_5
    mlp = ("gate_proj", "up_proj", "down_proj") if config.is_qwen2_5 else ("fc1", "fc2")
    block = {
        **_norm("norm1", "norm1", layer_norm),
        **_norm("norm2", "norm2", layer_norm),
        **_linear("qkv", "attn.qkv"),
        **_linear("proj", "attn.proj"),
        **{k: v for p in mlp for k, v in _linear(p, f"mlp.{p}").items()},
    }
    merger = {
        **_norm("norm", "ln_q", layer_norm),
        **_linear("fc1", "mlp.0"),
        **_linear("fc2", "mlp.2"),
    }
    out = {f"decoder/{p}": (decoder + t,) for p, t in _DECODER.items()}
    if not config.text.tie_word_embeddings:
        out["decoder/lm_head/kernel"] = ("lm_head.weight",)
    for p, t in _LAYER.items():
        out[f"decoder/layers/{p}"] = tuple(f"{decoder}layers.{l}.{t}" for l in range(config.text.num_hidden_layers))
    out["vision/patch_embed/kernel"] = (f"{visual}patch_embed.proj.weight",)
    for p, t in block.items():
        out[f"vision/blocks/{p}"] = tuple(f"{visual}blocks.{l}.{t}" for l in range(config.vision.depth))
    return out | {f"vision/merger/{p}": (f"{visual}merger.{t}",) for p, t in merger.items()}


def tensor_shape(config: Config, spec: Spec) -> tuple[int, ...]:
    """The shape, in the files, of (one layer of) a parameter."""
    if spec.role == "conv":
        v = config.vision
        return (spec.shape[-1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    shape = spec.shape[1:] if spec.stacked else spec.shape
    return shape[::-1] if spec.transposed else shape


def hub_name(name: str) -> str:
    """A name of either layout, as the hub's files spell it."""
    decoder, visual = LAYOUTS["nested"]
    for old, new in ((visual, "visual."), (decoder, "model.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
