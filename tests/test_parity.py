"""In float32, every stage equals transformers 4.51.3: positions exactly, the rest within 1e-4 of the largest value."""

import numpy as np
import pytest
from qwenvl_convert.hf import read_params
from tiny import FAMILIES, clip, mixed_samples, picture, sample, tiny_config, with_text, with_vision

from qwenvl_jax.config import YarnConfig
from qwenvl_jax.families import PRESETS, to_dict
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.pack import make_batch

pytestmark = pytest.mark.parity


def reference(config, directory, seed=0):
    """A torch model with random weights, norms and biases included, and the same weights read from its files."""
    import torch
    import transformers

    settings = to_dict(config)
    kind = getattr(transformers, settings["architectures"][0])
    hf_config = kind.config_class(**settings)
    with torch.device("meta"):
        model = kind._from_config(hf_config, attn_implementation="eager")
    model = model.to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(seed)
    scale = 0.2 if config.text.hidden_size < 1000 else 0.02
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.normal_(0, scale, generator=generator)
            if p.ndim == 1 and path.endswith("weight"):
                p.add_(1)
        for module in model.modules():  # buffers are not filled by to_empty
            if hasattr(module, "inv_freq") and hasattr(module, "rope_init_fn"):
                module.inv_freq, module.attention_scaling = module.rope_init_fn(hf_config, None)
            elif hasattr(module, "inv_freq"):
                half = 2 * len(module.inv_freq)
                module.inv_freq = 1 / 10000 ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    model.tie_weights()
    model.save_pretrained(directory)
    return model, read_params(directory, config)


def assert_stages(config, samples, directory, side="right", ladder=None):
    from qwenvl_convert.parity import compare, our_stages, reference_inputs, reference_stages

    model, params = reference(config, directory)
    batch = make_batch(samples, config, ladder)
    rows = compare(our_stages(config, params, batch), reference_stages(model, reference_inputs(samples, config, side)))
    layers = {f"decoder layer {l}" for l in range(config.text.num_hidden_layers)}
    assert {r.name for r in rows} >= {"positions", "merged embeddings", *layers, "logits"}
    assert all(r.ok for r in rows), "\n".join(map(str, rows))
    return model, params, batch


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch(family, side, tmp_path):
    config = tiny_config(family)
    assert_stages(config, mixed_samples(config), tmp_path, side)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_pictures_no_window_divides_in_one_row(family, tmp_path):
    config = tiny_config(family)
    rng = np.random.default_rng(0)
    row = sample(rng, config, 4, picture(rng, config, 26, 34), 3, picture(rng, config, 6, 46), 8)
    assert_stages(config, [row], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_video_with_fractional_seconds_a_grid(family, tmp_path):
    config = tiny_config(family)
    rng = np.random.default_rng(0)
    row = sample(rng, config, 4, clip(rng, config, 5, 10, 14, 1.37), 9)
    assert_stages(config, [row], tmp_path, ladder=Ladder(patches=(256,)))  # its frames are in several lanes


@pytest.mark.parametrize("shape", [(2, 300), (300, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_extreme_aspect(family, shape, tmp_path):
    config = tiny_config(family)
    rng = np.random.default_rng(0)
    assert_stages(config, [sample(rng, config, 4, picture(rng, config, *shape), 9)], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings(family, tmp_path):
    config = with_text(tiny_config(family), tie_word_embeddings=True)
    assert "lm_head" not in assert_stages(config, mixed_samples(config), tmp_path)[1]["decoder"]


@pytest.mark.parametrize("full", [(), (0,), (0, 3, 4), (2,)])
def test_irregular_full_attention_layers(full, tmp_path):
    config = with_vision(tiny_config("qwen2_5_vl"), depth=5, fullatt_block_indexes=full)
    assert_stages(config, mixed_samples(config), tmp_path)


@pytest.mark.parametrize("window", [56, 84, 168])
def test_another_window_and_clock(window, tmp_path):
    config = with_vision(tiny_config("qwen2_5_vl"), window_size=window, tokens_per_second=25)
    assert_stages(config, mixed_samples(config), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_yarn(family, tmp_path):
    # With this context, the declared factor is the one that transformers computes.
    yarn = YarnConfig(factor=4.0, original_max_position_embeddings=64)
    config = with_text(tiny_config(family), yarn=yarn, max_position_embeddings=256)
    assert_stages(config, mixed_samples(config), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family, tmp_path):
    import torch
    from qwenvl_convert.parity import greedy, reference_inputs

    config = tiny_config(family)
    samples = mixed_samples(config)
    model, params = reference(config, tmp_path)
    batch = make_batch(samples, config)
    with torch.no_grad():
        model.rope_deltas = None
        model.generation_config.eos_token_id = None
        inputs = reference_inputs(samples, config, "left")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    want = out[:, inputs["input_ids"].shape[1] :].numpy()
    assert want.shape == (len(samples), 24)
    assert (greedy(config, params, batch, 24) == want).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen2-vl-72b"])
def test_one_layer_at_real_width(name, tmp_path):
    """One decoder layer and each kind of vision block, at the official model's sizes."""
    config = with_vision(PRESETS[name].replace(dtype="float32"), depth=2, fullatt_block_indexes=(1,))
    if not config.vision.window_size:
        config = with_vision(config, depth=1, fullatt_block_indexes=())
    small = tiny_config(config.family)
    ids = {k: getattr(small, k) for k in vars(small) if k.endswith("_id")}
    config = with_text(config.replace(**ids), num_hidden_layers=1, vocab_size=160)
    rng = np.random.default_rng(0)
    row = sample(rng, config, 4, picture(rng, config, 10, 14), 2, clip(rng, config, 2, 4, 6, 0.7), 5)
    assert_stages(config, [row], tmp_path)
