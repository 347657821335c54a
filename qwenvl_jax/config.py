"""What a checkpoint is: sizes and switches of both model families, read from and written to `config.json`.

Field names are those of the Hugging Face files, except that a vision tower's own width is always
`hidden_size` and its output width always `out_hidden_size` (Qwen2-VL's file calls them `embed_dim` and
`hidden_size`).
"""

import dataclasses
import json
import reprlib
from dataclasses import dataclass
from pathlib import Path

from qwenvl_jax.errors import InputError

QWEN2_VL, QWEN2_5_VL = "qwen2_vl", "qwen2_5_vl"
VISION_ACTIVATIONS = ("silu", "gelu", "quick_gelu")


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv:2309.00071), composed with M-RoPE's sections."""

    factor: float = 4.0
    original_max_position_embeddings: int = 32768
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1·ln(factor) + 1


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    yarn: YarnConfig | None = None
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False

    @property
    def context(self) -> int:
        """Tokens that a row may have. YaRN's stretch counts where the file still declares the original context,
        as the official Qwen2-VL files do once Qwen's documented `rope_scaling` is added to them.
        """
        stretched = self.yarn.factor * self.yarn.original_max_position_embeddings if self.yarn else 0
        return max(self.max_position_embeddings, int(stretched))


@dataclass(frozen=True)
class VisionConfig:
    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    out_hidden_size: int = 3584
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    hidden_act: str = "silu"
    window_size: int | None = 112  # pixels; None: every block attends to the whole frame
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: float = 2  # t positions a second of video; Qwen2-VL counts grid steps instead
    # Patches reach the device as uint8 and are normalised there. Not in config.json: checkpoint.read_config takes
    # them from preprocessor_config.json.
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def patch_values(self) -> int:
        """C: numbers in one patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches merged into one visual token."""
        return self.spatial_merge_size**2

    @property
    def window_merged(self) -> int:
        """Side of a window, in merged tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def block_slots(self) -> int:
        """W: patch slots in a window block, the size of a whole window (64 in every official model)."""
        return self.window_merged**2 * self.merge_unit if self.window_size else self.merge_unit

    def is_full_attention(self, layer: int) -> bool:
        return self.window_size is None or layer in self.fullatt_block_indexes


@dataclass(frozen=True)
class Config:
    """One checkpoint of either family. `dtype` is the dtype to compute in, and in a file also that of its weights."""

    family: str  # "qwen2_vl" or "qwen2_5_vl"
    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    dtype: str = "bfloat16"
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    eos_token_id: int | tuple[int, ...] = 151645

    def __post_init__(self):
        _check(self)

    @property
    def is_qwen2_5(self) -> bool:
        return self.family == QWEN2_5_VL

    def replace(self, **changes) -> "Config":
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, data: dict) -> "Config":
        """Reads a Hugging Face `config.json`: flat (as on the hub), or with `text_config` (newer saves)."""
        return _from_dict(data)

    @classmethod
    def from_file(cls, path) -> "Config":
        try:
            return _from_dict(read_json(Path(path)))
        except InputError as e:
            raise e if str(path) in str(e) else InputError(f"{path}: {e}") from e

    def to_dict(self) -> dict:
        """The flat Hugging Face layout, which every version of transformers reads."""
        return _to_dict(self)


def read_json(path: Path, missing: dict | None = None) -> dict:
    """A JSON object from a checkpoint's file; `missing`, if given, when there is no such file."""
    if missing is not None and not path.exists():
        return missing
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not readable as JSON ({e})") from e
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a JSON object")
    return data


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}; a checkpoint directory needs it") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not readable ({e})") from e


def _is(value, kind) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


_KINDS = {
    int: ("a positive integer", lambda v: _is(v, int) and 0 < v < 2**31),
    float: ("a positive, finite number", lambda v: _is(v, int | float) and 0 < v < 1e300),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    str: ("a string", lambda v: isinstance(v, str)),
    dict: ("a JSON object", lambda v: isinstance(v, dict)),
    list: ("a list", lambda v: isinstance(v, list)),
    list[int]: ("a list of integers", lambda v: isinstance(v, list) and all(_is(x, int) for x in v)),
    "id": ("a token id", lambda v: _is(v, int) and 0 <= v < 2**31),
    "ids": ("a token id or a list of them", lambda v: _is(v, int) or (isinstance(v, list | tuple) and v)),
}


def _typed(name: str, value, kind):
    what, fits = _KINDS[kind]
    if not fits(value):
        raise InputError(f"{name} is {reprlib.repr(value)}; it must be {what}")
    return value


def _reader(*objects: dict, where: str = ""):
    """Typed reads from the first of `objects` that has a key; null, which transformers may write, is no value."""

    def get(key: str, kind, default=None):
        value = next((o[key] for o in objects if o.get(key) is not None), None)
        return default if value is None else _typed(where + key, value, kind)

    return get


def _check(c: Config) -> None:
    t, v = c.text, c.vision
    if c.family not in (QWEN2_VL, QWEN2_5_VL):
        raise InputError(f"model_type {c.family!r} is not one of 'qwen2_vl', 'qwen2_5_vl'")
    for part in (t, v, t.yarn):
        for field in dataclasses.fields(part) if part else ():
            value = getattr(part, field.name)
            for kind in (int, float, bool, str):
                if field.type == kind or (field.type == kind | None and value is not None):
                    _typed(field.name, value, kind)
    for name in _TOKEN_IDS:
        _typed(name, getattr(c, name), "id")
    for one in c.eos_token_id if isinstance(c.eos_token_id, tuple) else (c.eos_token_id,):
        _typed("eos_token_id", one, "id")
    for name in ("image_token_id", "video_token_id"):
        if getattr(c, name) >= t.vocab_size:
            raise InputError(f"{name} {getattr(c, name)} is not below vocab_size {t.vocab_size}")
    if c.image_token_id == c.video_token_id:
        raise InputError(f"image_token_id and video_token_id are both {c.image_token_id}; they must differ")
    if v.hidden_act not in VISION_ACTIVATIONS:
        raise InputError(f"vision hidden_act {v.hidden_act!r} is not one of {', '.join(VISION_ACTIVATIONS)}")
    # Indexes beyond a shallow tower's depth mean nothing, in the reference too: small test models have them.
    if any(i < 0 for i in v.fullatt_block_indexes):
        raise InputError(f"fullatt_block_indexes {reprlib.repr(v.fullatt_block_indexes)} must not be negative")
    if t.num_attention_heads % t.num_key_value_heads:
        raise InputError(
            f"num_attention_heads {t.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {t.num_key_value_heads}"
        )
    if len(t.mrope_section) != 3 or min(t.mrope_section) <= 0 or 2 * sum(t.mrope_section) != t.head_dim:
        section = reprlib.repr(t.mrope_section)
        raise InputError(
            f"mrope_section {section} must be three positive numbers that sum to half of head_dim {t.head_dim}"
        )
    if v.hidden_size % v.num_heads or (v.hidden_size // v.num_heads) % 4:
        raise InputError(f"vision width {v.hidden_size} over {v.num_heads} heads is not a multiple of 4")
    if v.out_hidden_size != t.hidden_size:
        raise InputError(f"vision output width {v.out_hidden_size} is not the decoder's width {t.hidden_size}")
    if c.is_qwen2_5 and v.window_size is None:
        raise InputError("window_size is None; Qwen2.5-VL has windows")
    if v.window_size is not None and v.window_size % (v.patch_size * v.spatial_merge_size):
        raise InputError(
            f"window_size {v.window_size} is not a multiple of {v.patch_size * v.spatial_merge_size} pixels"
        )
    if c.dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"dtype {c.dtype!r} is not one of 'bfloat16', 'float16', 'float32'")


def _from_dict(data: dict) -> Config:
    if not isinstance(data, dict):
        raise InputError("config is not a JSON object")
    family = data.get("model_type")
    if family not in (QWEN2_VL, QWEN2_5_VL):
        raise InputError(f"model_type {family!r} is not supported; this library runs 'qwen2_vl' and 'qwen2_5_vl'")
    top = _reader(data)
    text, vision = top("text_config", dict, data), top("vision_config", dict, {})
    # Newer files nest the decoder but may leave a key at the top level (tie_word_embeddings does both).
    get = _reader(text, data)
    if get("hidden_act", str, "silu") != "silu":
        raise InputError(f"hidden_act {get('hidden_act', str)!r} of the decoder is not supported; only 'silu' is")
    windowed = any(kind != "full_attention" for kind in get("layer_types", list, []))
    if windowed or get("use_sliding_window", bool, False):
        raise InputError(
            f"{'layer_types' if windowed else 'use_sliding_window'} asks for more than full attention; "
            "sliding-window attention is not supported (no official file has it)"
        )
    d = TextConfig()
    hidden, heads = get("hidden_size", int, 8192), get("num_attention_heads", int, 64)
    max_positions = get("max_position_embeddings", int, 32768)
    rope_key = "rope_parameters" if get("rope_parameters", dict) else "rope_scaling"
    rope = _reader(get(rope_key, dict, {}), where=f"{rope_key}.")
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
        tie_word_embeddings=_reader(data, text)("tie_word_embeddings", bool, False),
    )
    eos = get("eos_token_id", "ids", Config.eos_token_id)
    return Config(
        family=family,
        text=text_config,
        vision=_vision_from_dict(family, _reader(vision, where="vision_config."), hidden),
        dtype=get("dtype", str, get("torch_dtype", str, "bfloat16")).removeprefix("torch."),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        **{k: get(k, "id", getattr(Config, k)) for k in _TOKEN_IDS},
    )


_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _yarn(get, max_positions: int) -> YarnConfig | None:
    kind = get("rope_type", str, get("type", str, "default"))
    if kind in ("default", "mrope"):
        return None
    if kind != "yarn":
        raise InputError(f"rope type {kind!r} is not supported; known are 'default', 'mrope' and 'yarn'")
    original = get("original_max_position_embeddings", int, max_positions)
    return YarnConfig(
        # The declared factor, as the paper and the model cards have it. transformers 4.51.3 replaces it by
        # max_position_embeddings / original, which differs where a file's numbers disagree (128000 / 32768).
        factor=float(get("factor", float, max_positions / original)),
        original_max_position_embeddings=original,
        beta_fast=float(get("beta_fast", float, 32)),
        beta_slow=float(get("beta_slow", float, 1)),
        attention_factor=get("attention_factor", float),
    )


def _vision_from_dict(family: str, get, text_width: int) -> VisionConfig:
    # Quantised checkpoints leave keys out; the defaults are those of the reference's config classes.
    common = dict(
        depth=get("depth", int, 32),
        num_heads=get("num_heads", int, 16),
        in_channels=get("in_channels", int, get("in_chans", int, 3)),
        patch_size=get("patch_size", int, get("spatial_patch_size", int, 14)),
        spatial_merge_size=get("spatial_merge_size", int, 2),
        temporal_patch_size=get("temporal_patch_size", int, 2),
    )
    if family == QWEN2_VL:
        width = get("embed_dim", int, 1280)
        return VisionConfig(
            hidden_size=width,
            intermediate_size=int(width * get("mlp_ratio", float, 4)),
            out_hidden_size=get("hidden_size", int, text_width),
            hidden_act=get("hidden_act", str, "quick_gelu"),
            window_size=None,
            fullatt_block_indexes=(),
            **common,
        )
    return VisionConfig(
        hidden_size=get("hidden_size", int, 1280),
        intermediate_size=get("intermediate_size", int, 3420),
        out_hidden_size=get("out_hidden_size", int, text_width),
        hidden_act=get("hidden_act", str, "silu"),
        window_size=get("window_size", int, 112),
        fullatt_block_indexes=tuple(get("fullatt_block_indexes", list[int], (7, 15, 23, 31))),
        tokens_per_second=get("tokens_per_second", float, 4),
        **common,
    )


_ARCHITECTURE = {
    QWEN2_VL: "Qwen2VLForConditionalGeneration",
    QWEN2_5_VL: "Qwen2_5_VLForConditionalGeneration",
}


def _to_dict(c: Config) -> dict:
    t, v = c.text, c.vision
    text = {f.name: getattr(t, f.name) for f in dataclasses.fields(t) if f.name not in ("mrope_section", "yarn")}
    if t.head_dim * t.num_attention_heads == t.hidden_size:
        del text["head_dim"]  # derived, and absent from the official files
    rope = {"type": "mrope", "mrope_section": list(t.mrope_section)}
    if t.yarn:
        rope |= {"type": "yarn", **{k: x for k, x in vars(t.yarn).items() if x is not None}}
    vision = {f.name: getattr(v, f.name) for f in dataclasses.fields(v) if not f.name.startswith("image_")}
    vision["in_chans"] = vision["in_channels"]  # the hub's files carry this older spelling
    if c.is_qwen2_5:
        vision["fullatt_block_indexes"] = list(v.fullatt_block_indexes)
    else:
        for key in (
            "window_size",
            "fullatt_block_indexes",
            "tokens_per_second",
            "intermediate_size",
            "out_hidden_size",
        ):
            del vision[key]
        vision |= {
            "embed_dim": v.hidden_size,
            "hidden_size": v.out_hidden_size,
            "mlp_ratio": v.intermediate_size / v.hidden_size,
        }
        if vision["mlp_ratio"].is_integer():
            vision["mlp_ratio"] = int(vision["mlp_ratio"])
    return {
        "architectures": [_ARCHITECTURE[c.family]],
        "model_type": c.family,
        "torch_dtype": c.dtype,
        "hidden_act": "silu",
        "use_sliding_window": False,
        **text,
        "rope_scaling": rope,
        **{k: getattr(c, k) for k in (*_TOKEN_IDS, "eos_token_id")},
        "vision_config": {"model_type": c.family, **vision},
    }


def _preset(family, hidden, layers, heads, kv_heads, mlp, vocab, tied, vision_mlp, max_positions):
    two = family == QWEN2_VL
    return Config(
        family=family,
        text=TextConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=max_positions,
            tie_word_embeddings=tied,
        ),
        vision=VisionConfig(
            intermediate_size=vision_mlp,
            out_hidden_size=hidden,
            hidden_act="quick_gelu" if two else "silu",
            window_size=None if two else 112,
            fullatt_block_indexes=() if two else (7, 15, 23, 31),
        ),
    )


# Sizes from the official config.json files.
PRESETS = {
    "qwen2-vl-2b": _preset(QWEN2_VL, 1536, 28, 12, 2, 8960, 151936, True, 5120, 32768),
    "qwen2-vl-7b": _preset(QWEN2_VL, 3584, 28, 28, 4, 18944, 152064, False, 5120, 32768),
    "qwen2-vl-72b": _preset(QWEN2_VL, 8192, 80, 64, 8, 29568, 152064, False, 5120, 32768),
    "qwen2.5-vl-3b": _preset(QWEN2_5_VL, 2048, 36, 16, 2, 11008, 151936, True, 3420, 128000),
    "qwen2.5-vl-7b": _preset(QWEN2_5_VL, 3584, 28, 28, 4, 18944, 152064, False, 3420, 128000),
    "qwen2.5-vl-32b": _preset(QWEN2_5_VL, 5120, 64, 40, 8, 27648, 152064, False, 3456, 128000),
    "qwen2.5-vl-72b": _preset(QWEN2_5_VL, 8192, 80, 64, 8, 29568, 152064, False, 3456, 128000),
}
