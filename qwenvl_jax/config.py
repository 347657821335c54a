"""Config: the sizes and switches of a model's decoder and vision tower, the same for every family.

Field names are those of the Hugging Face files, except that a tower's own width is always `hidden_size` and its output
width always `out_hidden_size`. `families/` translates config.json.
"""

import codecs
import contextlib
import dataclasses
import json
import reprlib
from dataclasses import dataclass
from pathlib import Path

from qwenvl_jax.errors import CheckpointError, InputError, shown

ROPES = ("sections", "interleaved")
NORMS = ("rms", "layer")
DTYPES = ("bfloat16", "float16", "float32")
QUANTISED_DTYPES = ("int4", "int8", "float8_e4m3fn")
MAX_JSON = 64 << 20  # bytes of a checkpoint's JSON or text file; Qwen's tokenizer.json has 7 MB
_POINTER = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer starts
GROUPS = ("vision", "merger", "llm")  # of parameters, for learning rates, freezing and adapters
VISION_ACTIVATIONS = ("silu", "gelu", "quick_gelu")
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


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
    qkv_bias: bool = True
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotary embedding
    rope: str = "sections"  # t, h and w share the frequencies in chunks ("sections") or in turn ("interleaved")

    @property
    def context(self) -> int:
        """Tokens per row. With YaRN, the extended context counts even if the file declares only the original one:
        that is so in official files after Qwen's documented `rope_scaling` is added.
        """
        extended = self.yarn.factor * self.yarn.original_max_position_embeddings if self.yarn else 0
        return max(self.max_position_embeddings, int(extended))


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
    norm: str = "rms"  # "rms" or "layer"
    gated_mlp: bool = True
    hidden_act: str = "silu"
    window_size: int | None = 112  # pixels; None: every block attends to whole frames
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: float | None = 2  # t positions per second of video; None: t positions count grid steps
    # Patches reach the device as uint8 and are normalised there. `read_config` of params/directory.py reads these from
    # preprocessor_config.json.
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def patch_values(self) -> int:
        """C: values in one patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches merged into one visual token."""
        return self.spatial_merge_size**2

    @property
    def window_merged(self) -> int:
        """Side of a window, in merged tokens."""
        assert self.window_size is not None, "this tower has no windows"
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def block_slots(self) -> int:
        """W: patch slots in a window block, the size of a full window (64 in every official model)."""
        return self.window_merged**2 * self.merge_unit if self.window_size else self.merge_unit

    def is_full_attention(self, layer: int) -> bool:
        return self.window_size is None or layer in self.fullatt_block_indexes


@dataclass(frozen=True)
class Quantised:
    """How a Linear holds its kernel [in, out]: (kernel − zeros) · scales, with `group` rows sharing a row of scales.

    dtype: the kernel's, one of QUANTISED_DTYPES.
    group: rows that share scales; 0: all rows.
    zeros: are there zero points, one per scale, of the kernel's dtype?
    order: are the kernel's rows sorted by group (GPTQ's desc_act)? Row j then stands for input feature order[j].
    activations: the dtype to which the checkpoint asks to quantise a Linear's input, token by token; None: it does not.
    """

    dtype: str
    group: int = 0
    zeros: bool = False
    order: bool = False
    activations: str | None = None

    def __str__(self):
        text = f"{self.dtype}, " + (f"groups of {self.group}" if self.group else "a scale per output")
        text += ", zero points" * self.zeros + ", inputs in another order" * self.order
        return text + (f", asks for {self.activations} inputs" if self.activations else "")


@dataclass(frozen=True)
class Config:
    """One model. `dtype` is the compute dtype; in a file it is also the dtype of the weights that are not quantised.

    quantised: (a Linear's path in the tree, such as "decoder/layers/q_proj"; how it holds its kernel).
    """

    family: str  # the model_type of config.json: a key of families.FAMILIES
    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    dtype: str = "bfloat16"
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    eos_token_id: int | tuple[int, ...] = 151645
    quantised: tuple[tuple[str, Quantised], ...] = ()

    def __post_init__(self):
        _check(self)

    def replace(self, **changes) -> "Config":
        return dataclasses.replace(self, **changes)


def read_json(path: Path, missing: dict | None = None) -> dict:
    """A JSON object from a checkpoint's file; `missing`, if given, stands for an absent file.

    Raises CheckpointError if the file is absent, unreadable or not a JSON object.
    """
    if missing is not None and not path.exists():
        return missing
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e})") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError if a clone without Git LFS left a pointer in the place of a file."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(f"{path}: is a Git LFS pointer, not the file; run `git lfs pull` in {path.parent}")


# How editors mark a text in another encoding than plain UTF-8. UTF-32 precedes UTF-16, whose mark its own begins with.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32"),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16"),
}


def decode_text(data: bytes) -> str:
    r"""A text that people write or edit, as their editors save it; every end of a line becomes "\n".

    It is UTF-8, or what a byte order mark says: UTF-8, UTF-16 or UTF-32. Raises InputError for any other.
    """
    coding = next((coding for mark, coding in _MARKS.items() if data.startswith(mark)), "utf-8")
    if coding == "utf-8" and b"\0" in data[:4]:
        raise InputError("is text in UTF-16 or UTF-32 without a byte order mark, or no text; save it as UTF-8")
    try:
        text = data.decode(coding)
    except UnicodeDecodeError as e:
        name = coding.removesuffix("-sig").upper()
        raise InputError(f"is not {name} text ({e.reason} at byte {e.start}); save it as UTF-8") from e
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """A checkpoint's text file, as `decode_text` reads it. Raises CheckpointError."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path}: larger than {MAX_JSON >> 20} MiB, the limit for such a file")
        refuse_pointer(path)
        return decode_text(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; a checkpoint directory needs it") from None
    except OSError as e:
        raise CheckpointError(f"{path}: not readable ({e})") from e
    except CheckpointError:
        raise
    except InputError as e:
        raise CheckpointError(f"{path}: {e}") from e


def is_number(value, kind=int | float) -> bool:
    """Is it a number of this kind? True and False are not."""
    return isinstance(value, kind) and not isinstance(value, bool)


_KINDS = {
    int: ("a positive integer", lambda v: is_number(v, int) and 0 < v < 2**31),
    float: ("a positive, finite number", lambda v: is_number(v) and 0 < v < 1e300),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    str: ("a string", lambda v: isinstance(v, str)),
    dict: ("a JSON object", lambda v: isinstance(v, dict)),
    list: ("a list", lambda v: isinstance(v, list)),
    list[int]: ("a list of integers", lambda v: isinstance(v, list) and all(is_number(x, int) for x in v)),
    "id": ("a token id", lambda v: is_number(v, int) and 0 <= v < 2**31),
    "ids": ("a token id or a list of them", lambda v: is_number(v, int) or (isinstance(v, list | tuple) and v)),
}


def typed(name: str, value, kind):
    """The value, checked; kind: a key of _KINDS. Raises CheckpointError if the value is not of that kind."""
    what, fits = _KINDS[kind]
    if not fits(value):
        raise CheckpointError(f"{name} is {reprlib.repr(value)}; it must be {what}")
    return value


def _check(c: Config) -> None:
    t, v = c.text, c.vision
    typed("family", c.family, str)
    for part in (t, v, t.yarn):
        for field in dataclasses.fields(part) if part else ():
            value = getattr(part, field.name)
            for kind in (int, float, bool, str):
                if field.type == kind or (field.type == kind | None and value is not None):
                    typed(field.name, value, kind)
    for name in TOKEN_IDS:
        typed(name, getattr(c, name), "id")
    for one in c.eos_token_id if isinstance(c.eos_token_id, tuple) else (c.eos_token_id,):
        typed("eos_token_id", one, "id")
    for name, value, known in (
        ("dtype", c.dtype, DTYPES),
        ("rope", t.rope, ROPES),
        ("vision norm", v.norm, NORMS),
        ("vision hidden_act", v.hidden_act, VISION_ACTIVATIONS),
    ):
        if value not in known:
            raise CheckpointError(f"{name} {shown(value)} is not one of {', '.join(known)}")
    for name in ("image_token_id", "video_token_id"):
        if getattr(c, name) >= t.vocab_size:
            raise CheckpointError(f"{name} {getattr(c, name)} is not below vocab_size {t.vocab_size}")
    if c.image_token_id == c.video_token_id:
        raise CheckpointError(f"image_token_id and video_token_id are both {c.image_token_id}; they must differ")
    # An index beyond the depth of a shallow tower is ignored, as in the reference; small test models have some.
    if any(i < 0 for i in v.fullatt_block_indexes):
        raise CheckpointError(f"fullatt_block_indexes {reprlib.repr(v.fullatt_block_indexes)} must not be negative")
    heads, kv_heads = t.num_attention_heads, t.num_key_value_heads
    if heads % kv_heads:
        raise CheckpointError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    section, half = t.mrope_section, t.head_dim / 2
    if len(section) != 3 or min(section) <= 0 or sum(section) != half:
        raise CheckpointError(f"mrope_section {reprlib.repr(section)} is not three numbers above 0 with sum {half:g}")
    if t.rope == "interleaved" and max(3 * section[1] - 1, 3 * section[2]) > half:
        raise CheckpointError(f"mrope_section {section} does not interleave over {half:g} frequencies")
    if v.hidden_size % (4 * v.num_heads):
        raise CheckpointError(f"vision width {v.hidden_size} over {v.num_heads} heads is not a multiple of 4")
    if v.out_hidden_size != t.hidden_size:
        raise CheckpointError(f"vision output width {v.out_hidden_size} is not the decoder's width {t.hidden_size}")
    merged = v.patch_size * v.spatial_merge_size
    if v.window_size is not None and v.window_size % merged:
        raise CheckpointError(f"window_size {v.window_size} is not a multiple of {merged} pixels")
