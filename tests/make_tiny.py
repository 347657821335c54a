"""Writes a small checkpoint of random weights, laid out like the published ones, to try the package without them.

    python tests/make_tiny.py DIR [--family qwen2_vl|qwen2_5_vl]    # needs the library safetensors: extra `test`

The tokenizer, chat template and preprocessor settings are the real ones, from tests/data/tokenizer; so is the
vocabulary's size. Everything else is narrow and shallow: 7 million parameters, 15 MB.
"""

import argparse
import lzma
import math
import shutil
import sys
from pathlib import Path

import numpy as np
from tiny import FAMILIES, TOKENS, tiny_config
from tiny_hf import DTYPES, torch_shapes, write_hf

from qwenvl_jax.config import Config
from qwenvl_jax.families import PRESETS

TOKENIZER = Path(__file__).resolve().parent / "data" / "tokenizer"


def small_config(family: str, dtype: str = "bfloat16", tied: bool = True) -> Config:
    """The tiny config with the real vocabulary and special tokens."""
    tokens = {name: getattr(PRESETS["qwen2.5-vl-7b"], name) for name in TOKENS}
    text = dict(vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=tied)
    return tiny_config(family, text, dtype=dtype, **tokens)


def copy_tokenizer(directory: Path) -> None:
    """The real tokenizer, templates, preprocessor and generation settings, as a checkpoint directory has them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "chat_template.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, directory / name)
    (directory / "tokenizer.json").write_bytes(lzma.decompress((TOKENIZER / "tokenizer.json.xz").read_bytes()))


def make_tiny(directory, family: str = "qwen2_5_vl", dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Writes the whole checkpoint and returns its directory."""
    directory, config = Path(directory), small_config(family, dtype)
    copy_tokenizer(directory)
    rng = np.random.default_rng(seed)
    tensors = {name: _random(rng, name, shape).astype(DTYPES[dtype]) for name, shape in torch_shapes(config).items()}
    return write_hf(directory, config, tensors)


def _random(rng, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Unit scales, zero biases, and weights that keep the size of what they multiply."""
    if len(shape) == 1:
        return np.full(shape, name.endswith("weight"), np.float32)
    return rng.standard_normal(shape, np.float32) / math.prod(shape[1:]) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    args = parser.parse_args()
    print(make_tiny(args.directory, args.family), file=sys.stderr)


if __name__ == "__main__":
    main()
