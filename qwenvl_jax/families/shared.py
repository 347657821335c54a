"""Shared by the families' files: typed reads, the decoder's part of config.json, tensor names."""

import dataclasses
from collections.abc import Callable

from qwenvl_jax.config import TOKEN_IDS, Config, TextConfig, YarnConfig, typed
from qwenvl_jax.errors import CheckpointError

# A family sets its switches itself; preprocessor_config.json has mean and std.
_NOT_IN_FILES = ("qkv_bias", "qk_norm", "rope", "norm", "gated_mlp", "image_mean", "image_std")


def reader(*objects: dict, where: str = "") -> Callable:
    """`get(key, kind, default)` reads a typed value from the first object that has the key; null counts as absent."""

    def get(key: str, kind, default=None):
        value = next((o[key] for o in objects if o.get(key) is not None), None)
        return default if value is None else typed(where + key, value, kind)

    return get


def from_dict(data: dict, read_vision: Callable, **switches) -> Config:
    """Reads a `config.json`: flat (as on the hub), or with `text_config` (newer saves).

    read_vision: (reader of vision_config, the decoder's width) → VisionConfig.
    switches: the fields of TextConfig that are in no file.
    """
    top = reader(data)
    text, vision = top("text_config", dict, data), top("vision_config", dict, {})
    # Newer files nest the decoder's keys, but some stay at the top level (tie_word_embeddings may be at both).
    get = reader(text, data)
    if get("hidden_act", str, "silu") != "silu":
        raise CheckpointError(f"hidden_act {get('hidden_act', str)!r} of the decoder is not supported; only 'silu' is")
    windowed = any(kind != "full_attention" for kind in get("layer_types", list, []))
    if windowed or get("use_sliding_window", bool, False):
        key = "layer_types" if windowed else "use_sliding_window"
        raise CheckpointError(f"{key}: sliding-window attention is not supported (no official file has it)")
    d = TextConfig()
    hidden, heads = get("hidden_size", int, 8192), get("num_attention_heads", int, 64)
    max_positions = get("max_position_embeddings", int, 32768)
    rope_key = "rope_parameters" if get("rope_parameters", dict) else "rope_scaling"
    rope = reader(get(rope_key, dict, {}), where=f"{rope_key}.")
    text_config = TextConfig(
        vocab_size=get("vocab_size", int, 152064),
        hidden_size=hidden,
        intermediate_size=get("intermediate_size", int, 29568),
        num_hidden_layers=get("num_hidden_layers", int, 80),
        num_attention_heads=heads,
        num_key_value_heads=get("num_key_value_heads", int, heads if "num_key_value_heads" in text else 8),
        head_dim=get("head_dim", int, hidden // heads),
        rms_norm_eps=get("rms_norm_eps", float, 1e-5),
        rope_theta=float(rope("rope_theta", float, get("rope_theta", float, d.rope_theta))),
        mrope_section=tuple(rope("mrope_section", list[int], d.mrope_section)),
        yarn=_yarn(rope, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=reader(data, text)("tie_word_embeddings", bool, False),
        **switches,
    )
    eos = get("eos_token_id", "ids", Config.eos_token_id)
    return Config(
        family=data["model_type"],
        text=text_config,
        vision=read_vision(reader(vision, where="vision_config."), hidden),
        dtype=get("dtype", str, get("torch_dtype", str, "bfloat16")).removeprefix("torch."),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        **{k: get(k, "id", getattr(Config, k)) for k in TOKEN_IDS},
    )


def _yarn(get, max_positions: int) -> YarnConfig | None:
    kind = get("rope_type", str, get("type", str, "default"))
    if kind in ("default", "mrope"):
        return None
    if kind != "yarn":
        raise CheckpointError(f"rope type {kind!r} is not supported; known are 'default', 'mrope' and 'yarn'")
    original = get("original_max_position_embeddings", int, max_positions)
    return YarnConfig(
        # The declared factor, as in the paper and the model cards. transformers 4.51.3 uses max_position_embeddings /
        # original instead, which differs if a file's numbers disagree (128000 / 32768).
        factor=float(get("factor", float, max_positions / original)),
        original_max_position_embeddings=original,
        beta_fast=float(get("beta_fast", float, 32)),
        beta_slow=float(get("beta_slow", float, 1)),
        attention_factor=get("attention_factor", float),
    )


def tower_sizes(get) -> dict:
    """The fields of `vision_config` that all families share."""
    # Defaults are those of the reference's config classes: quantised checkpoints omit keys.
    return dict(
        depth=get("depth", int, 32),
        num_heads=get("num_heads", int, 16),
        in_channels=get("in_channels", int, get("in_chans", int, 3)),
        patch_size=get("patch_size", int, get("spatial_patch_size", int, 14)),
        spatial_merge_size=get("spatial_merge_size", int, 2),
        temporal_patch_size=get("temporal_patch_size", int, 2),
    )


def fields(part) -> dict:
    """The fields of a TextConfig or VisionConfig that are in a file."""
    return {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name not in _NOT_IN_FILES}


def to_dict(c: Config, architecture: str, vision: dict) -> dict:
    """The flat `config.json`, which every version of transformers reads; vision: its vision_config."""
    t = c.text
    text = {k: v for k, v in fields(t).items() if k not in ("mrope_section", "yarn")}
    if t.head_dim * t.num_attention_heads == t.hidden_size:
        del text["head_dim"]  # derived, and absent from the official files
    rope = {"type": "mrope", "mrope_section": list(t.mrope_section)}
    if t.yarn:
        rope |= {"type": "yarn", **{k: x for k, x in vars(t.yarn).items() if x is not None}}
    return {
        "architectures": [architecture],
        "model_type": c.family,
        "torch_dtype": c.dtype,
        "hidden_act": "silu",
        "use_sliding_window": False,
        **text,
        "rope_scaling": rope,
        **{k: getattr(c, k) for k in (*TOKEN_IDS, "eos_token_id")},
        # The hub's files carry the older spelling in_chans.
        "vision_config": {"model_type": c.family, **vision, "in_chans": c.vision.in_channels},
    }


def tensor_names(config: Config) -> dict[str, str]:
    """Parameter path → the tensor's name on the hub, with `{l}` for the layer, in the order that files are written."""
    t, v = config.text, config.vision
    qkv, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
    layer = {
        "input_layernorm/scale": "input_layernorm.weight",
        "post_attention_layernorm/scale": "post_attention_layernorm.weight",
        **{f"{p}/kernel": f"self_attn.{p}.weight" for p in (*qkv, "o_proj")},
        **{f"{p}/bias": f"self_attn.{p}.bias" for p in qkv if t.qkv_bias},
        **{f"{p}/scale": f"self_attn.{p}.weight" for p in ("q_norm", "k_norm") if t.qk_norm},
        **{f"{p}/kernel": f"mlp.{p}.weight" for p in mlp},
    }
    block = _norm("norm1", "norm1", v.norm) | _norm("norm2", "norm2", v.norm)
    block |= _linear("qkv", "attn.qkv") | _linear("proj", "attn.proj")
    for p in mlp if v.gated_mlp else ("fc1", "fc2"):
        block |= _linear(p, f"mlp.{p}")
    merger = _norm("norm", "ln_q", v.norm) | _linear("fc1", "mlp.0") | _linear("fc2", "mlp.2")
    head = {} if t.tie_word_embeddings else {"decoder/lm_head/kernel": "lm_head.weight"}
    return {
        "decoder/embed_tokens/embedding": "model.embed_tokens.weight",
        "decoder/norm/scale": "model.norm.weight",
        **head,
        **{f"decoder/layers/{p}": f"model.layers.{{l}}.{name}" for p, name in layer.items()},
        "vision/patch_embed/kernel": "visual.patch_embed.proj.weight",
        **{f"vision/blocks/{p}": f"visual.blocks.{{l}}.{name}" for p, name in block.items()},
        **{f"vision/merger/{p}": f"visual.merger.{name}" for p, name in merger.items()},
    }


def _linear(param: str, tensor: str) -> dict[str, str]:
    return {f"{param}/kernel": f"{tensor}.weight", f"{param}/bias": f"{tensor}.bias"}


def _norm(param: str, tensor: str, kind: str) -> dict[str, str]:
    bias = {f"{param}/bias": f"{tensor}.bias"} if kind == "layer" else {}
    return {f"{param}/scale": f"{tensor}.weight"} | bias


# What trainers and wrappers add to a module's name: torch.compile, FSDP, checkpointing, PEFT, Lightning, DDP.
_WRAPPERS = {
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "base_layer", "module"),
}
_LEADING = {"base_model", "model", "language_model"}


def core(name: str) -> str:
    """A tensor's or module's name without the prefixes in which layouts and wrappers differ.

    "model.layers.0.…", "model.language_model.layers.0.…" and "base_model.model.model.layers.0.…" are all "layers.0.…".
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _LEADING:
        parts.pop(0)
    return ".".join(parts)
