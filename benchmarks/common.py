"""What the benchmarks share: small models, the reference with the same weights, and what the device itself can do."""

import time
from functools import partial

import jax
import jax.numpy as jnp

from qwenvl_jax.config import Config, TextConfig, VisionConfig
from qwenvl_jax.demo.train import demo_config
from qwenvl_jax.params.hf import STACKED, flatten, table, tensor_shape


def config_50m() -> Config:
    """50 million parameters in the proportions of the official models, on the demo's tokens."""
    ids = {name: value for name, value in vars(demo_config()).items() if name.endswith("_token_id")}
    text = TextConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        mrope_section=(8, 12, 12),
        tie_word_embeddings=True,
    )
    vision = VisionConfig(
        depth=8,
        hidden_size=320,
        intermediate_size=864,
        out_hidden_size=512,
        num_heads=5,
        fullatt_block_indexes=(1, 3, 5, 7),
    )
    return Config(family="qwen2_5_vl", text=text, vision=vision, dtype="float32", **ids)


SIZES = {"demo": demo_config, "50M": config_50m}


def reference(config: Config, weights: dict):
    """transformers' model of these weights (numpy), in their type, on the CPU."""
    import torch
    import transformers

    family = "Qwen2_5_VL" if config.is_qwen2_5 else "Qwen2VL"
    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    hf_config = getattr(transformers, f"{family}Config")(**config.to_dict())
    dtype = getattr(torch, config.dtype)
    model = kind._from_config(hf_config, attn_implementation="sdpa", torch_dtype=dtype)
    leaves, names, state = flatten(weights), table(config), {}
    for path, leaf in leaves.items():
        for name, one in zip(names[path], leaf if path.startswith(STACKED) else [leaf], strict=True):
            matrix = one.T if path.endswith("/kernel") else one
            state[name] = torch.tensor(matrix.reshape(tensor_shape(config, path, leaf.shape)).astype("float32")).to(
                dtype
            )
    missing, unexpected = model.load_state_dict(state, strict=False)
    # A tied head has no tensor of its own.
    assert not unexpected and missing in ([], ["lm_head.weight"]), (missing, unexpected)
    return model


def product_rates(device: str, dtype: str):
    """Two functions that each time one large matrix product: FLOP/s in jax, in torch."""
    import torch

    n = 2048 if device == "cpu" else 8192
    b = torch.ones((n, n), dtype=getattr(torch, dtype), device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return product_rate(device, dtype), lambda: 2 * n**3 / clock(lambda: (b @ b, wait()))


def product_rate(device: str, dtype: str):
    """A function that times one large matrix product in jax: FLOP/s."""
    n = 2048 if device == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    dot = jax.jit(partial(jnp.dot, precision="highest" if dtype == "float32" else None))
    return lambda: 2 * n**3 / clock(lambda: dot(a, a).block_until_ready())


def copy_rate(device: str):
    """A function that times a copy of one large array: bytes read and written a second."""
    a = jnp.ones(2**26 if device == "cpu" else 2**30, jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    return lambda: 2 * a.nbytes / clock(lambda: copy(a).block_until_ready())


def clock(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
