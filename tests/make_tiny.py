"""Writes a small checkpoint of random weights, laid out like the published ones, to try the package without them.

    python tests/make_tiny.py DIR [--family qwen2_vl|qwen2_5_vl]

The tokenizer, chat template and preprocessor settings are the real ones, from tests/data/tokenizer; so is the
vocabulary's size. Everything else is narrow and shallow: 10 million parameters, 20 MB.
"""

import argparse
import json
import lzma
import shutil
import sys
from pathlib import Path

from qwenvl_jax.config import Config, TextConfig, VisionConfig

TOKENIZER = Path(__file__).resolve().parent / "data" / "tokenizer"
FAMILIES = ("qwen2_vl", "qwen2_5_vl")


def small_config(family: str, dtype: str = "bfloat16", tied: bool = True) -> Config:
    """Real vocabulary and special tokens, small everything else, windows and irregular full attention included."""
    two = family == "qwen2_vl"
    return Config(
        family=family,
        text=TextConfig(
            vocab_size=151936,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            mrope_section=(2, 3, 3),
            tie_word_embeddings=tied,
        ),
        vision=VisionConfig(
            depth=4,
            hidden_size=64,
            intermediate_size=256 if two else 172,
            out_hidden_size=64,
            num_heads=4,
            hidden_act="quick_gelu" if two else "silu",
            window_size=None if two else 112,
            fullatt_block_indexes=() if two else (1, 3),
        ),
        dtype=dtype,
    )


def copy_tokenizer(directory: Path) -> None:
    """The real tokenizer, templates, preprocessor and generation settings, as a checkpoint directory has them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "chat_template.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, directory / name)
    (directory / "tokenizer.json").write_bytes(lzma.decompress((TOKENIZER / "tokenizer.json.xz").read_bytes()))


def make_tiny(directory, family: str = "qwen2_5_vl", dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Writes the whole checkpoint and returns its directory."""
    import numpy as np
    from qwenvl_convert.names import tensor_names, tensor_shape
    from safetensors.numpy import save_file

    from qwenvl_jax.params.specs import specs

    directory, config = Path(directory), small_config(family, dtype)
    copy_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    declared, tensors, rng = specs(config), {}, np.random.default_rng(seed)
    for path, names in tensor_names(config).items():
        spec = declared[path]
        leaf = _random(rng, spec)
        for name, one in zip(names, leaf if spec.stacked else [leaf], strict=True):
            matrix = one.T if spec.transposed else one
            tensors[name] = np.ascontiguousarray(matrix).reshape(tensor_shape(config, spec))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def _random(rng, spec):
    """Unit scales, zero biases, and weights that keep the size of what they multiply (numpy: no compile)."""
    import numpy as np

    if spec.role in ("scale", "bias"):
        return np.full(spec.shape, spec.role == "scale", spec.dtype)
    fan_in = spec.shape[-1] if spec.role == "embedding" else spec.shape[-2]
    return (rng.standard_normal(spec.shape, np.float32) / fan_in**0.5).astype(spec.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    args = parser.parse_args()
    print(make_tiny(args.directory, args.family), file=sys.stderr)


if __name__ == "__main__":
    main()
