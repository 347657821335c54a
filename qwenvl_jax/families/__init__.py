"""The model families. Each is one file, which translates between its published files and a Config:

from_dict(data), to_dict(config)   config.json → Config and back
tensor_names(config)               parameter path → the hub's tensor name, with `{l}` for the layer
time_steps(visual, config)         the M-RoPE t position of each grid step of a picture or clip
BOXES                              coordinates of boxes in answers, one of `types.COORDINATES`
PRESETS                            the official sizes by name
"""

from qwenvl_jax.config import Config
from qwenvl_jax.errors import CheckpointError, shown
from qwenvl_jax.families import qwen2_5_vl, qwen2_vl

FAMILIES = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl}  # by model_type


def merge_presets(families) -> dict[str, Config]:
    """The presets of all families in one dict. Raises ValueError for a name that two of them have."""
    presets: dict[str, Config] = {}
    for family in families:
        for name, config in family.PRESETS.items():
            if name in presets:
                raise ValueError(f"preset {name!r} is in {presets[name].family} and in {config.family}; rename one")
            presets[name] = config
    return presets


PRESETS = merge_presets(FAMILIES.values())


def family_of(config: Config):
    """The module of a config's family."""
    return _family(config.family)


def from_dict(data: dict) -> Config:
    """Reads a Hugging Face `config.json`; `params.directory.read_config` also reads the pixels' mean and std."""
    if not isinstance(data, dict):
        raise CheckpointError("config is not a JSON object")
    return _family(data.get("model_type")).from_dict(data)


def to_dict(config: Config) -> dict:
    """The Hugging Face `config.json` of a config; CheckpointError for a field that the family's file cannot say."""
    data = family_of(config).to_dict(config)
    back = from_dict(data)
    for mine, theirs in ((config, back), (config.text, back.text), (config.vision, back.vision)):
        for name, value in vars(mine).items():
            if name not in ("text", "vision", "image_mean", "image_std") and value != getattr(theirs, name):
                raise CheckpointError(f"{name} is {value!r}, which a config.json of {config.family!r} cannot say")
    return data


def _family(model_type):
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = " and ".join(map(repr, FAMILIES))
        kind = model_type if isinstance(model_type, str) else ""
        text = " (a text model, without a vision tower)" if kind.endswith("_text") or kind in ("qwen2", "qwen3") else ""
        raise CheckpointError(f"model_type {shown(model_type)}{text} is not supported; this library runs {known}")
    return FAMILIES[model_type]
