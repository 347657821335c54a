"""Tiny Hugging Face checkpoints of random bits, named and shaped by hand so that the package's table is tested."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qwenvl_jax.config import Config
from qwenvl_jax.families import to_dict

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def torch_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with the hub's names, as torch shapes it: weights are [out, in]."""
    t, v = config.text, config.vision
    D, F, E, M = t.hidden_size, t.intermediate_size, v.hidden_size, v.intermediate_size
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    out = {"model.embed_tokens.weight": (t.vocab_size, D), "model.norm.weight": (D,)}
    if not t.tie_word_embeddings:
        out["lm_head.weight"] = (t.vocab_size, D)
    for l in range(t.num_hidden_layers):
        p = f"model.layers.{l}."
        out[p + "input_layernorm.weight"] = out[p + "post_attention_layernorm.weight"] = (D,)
        for name, n in (("q", q), ("k", kv), ("v", kv)):
            out[f"{p}self_attn.{name}_proj.weight"], out[f"{p}self_attn.{name}_proj.bias"] = (n, D), (n,)
        out[p + "self_attn.o_proj.weight"] = (D, q)
        out[p + "mlp.gate_proj.weight"] = out[p + "mlp.up_proj.weight"] = (F, D)
        out[p + "mlp.down_proj.weight"] = (D, F)
    out["visual.patch_embed.proj.weight"] = (E, 3, 2, 14, 14)
    linears = {"attn.qkv": (3 * E, E), "attn.proj": (E, E)}
    if v.gated_mlp:
        linears |= {"mlp.gate_proj": (M, E), "mlp.up_proj": (M, E), "mlp.down_proj": (E, M)}
    else:
        linears |= {"mlp.fc1": (M, E), "mlp.fc2": (E, M)}
    norms = ["weight"] if v.norm == "rms" else ["weight", "bias"]
    for l in range(v.depth):
        p = f"visual.blocks.{l}."
        out |= {f"{p}{norm}.{kind}": (E,) for norm in ("norm1", "norm2") for kind in norms}
        out |= {f"{p}{n}.weight": shape for n, shape in linears.items()}
        out |= {f"{p}{n}.bias": shape[:1] for n, shape in linears.items()}
    out |= {f"visual.merger.ln_q.{kind}": (E,) for kind in norms}
    for name, shape in (("0", (4 * E, 4 * E)), ("2", (D, 4 * E))):
        out[f"visual.merger.mlp.{name}.weight"], out[f"visual.merger.mlp.{name}.bias"] = shape, shape[:1]
    return out


def torch_tensors(config: Config, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random bits: negative zeros, infinities and NaNs of every payload are among them."""
    rng, kind = np.random.default_rng(seed), np.dtype(DTYPES[dtype])
    return {
        name: np.frombuffer(rng.bytes(int(np.prod(shape)) * kind.itemsize), kind).reshape(shape)
        for name, shape in torch_shapes(config).items()
    }


def nested(name: str) -> str:
    """A hub name as newer saves spell it."""
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1)


def write_hf(directory, config: Config, tensors: dict, layout: str = "hub", files: int = 1) -> Path:
    """Writes config.json and the tensors with the safetensors library, dealt over so many files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    if layout == "nested":
        tensors = {nested(name): x for name, x in tensors.items()}
    if files == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for i in range(files):
        part = dict(list(tensors.items())[i::files])
        name = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file(part, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def assert_same_bits(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(bits(got[name]), bits(want[name]), err_msg=name)
