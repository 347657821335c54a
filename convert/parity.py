"""Compares this model with the reference (transformers 4.51.3 on torch) on the same inputs.

Compares patches, positions, vision output, merged embeddings, every decoder layer, logits and greedy tokens, so that a
difference is found at the stage that causes it.
"""

from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from qwenvl_convert.hf import HfSource
from qwenvl_convert.names import tensor_names, tensor_shape

from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError, install
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.inputs.preprocessing import Preprocessing, pixel_table
from qwenvl_jax.model import decoder, qwenvl
from qwenvl_jax.params.directory import read_dense, read_quantised
from qwenvl_jax.types import Batch, Sample

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # the reference's arguments by kind of visual


class Stage(NamedTuple):
    """One row of the table. `error` is max |ours − reference| / max |reference|; 0 means bit-equal."""

    name: str
    shape: tuple[int, ...]
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return bool(self.error <= self.limit)


def compare(ours: dict, reference: dict, limit: float = 1e-4) -> list[Stage]:
    """Pairs two dicts of arrays by name; integer stages and patches must be bit-equal."""
    rows = []
    for name, theirs in reference.items():
        mine = np.asarray(ours[name])
        chex.assert_equal_shape((mine, theirs))
        exact = name == "patches" or np.issubdtype(theirs.dtype, np.integer)
        gap = np.abs(mine.astype(np.float64) - theirs.astype(np.float64)).max(initial=0)
        error = float(gap / max(np.abs(theirs.astype(np.float64)).max(initial=0), 1e-30)) if gap else 0.0
        rows.append(Stage(name, theirs.shape, error if np.isfinite(error) else np.inf, 0.0 if exact else limit))
    return rows


def our_stages(config: Config, params: dict, batch: Batch) -> dict:
    """Every stage of one batch at its live tokens: arrays [live tokens, …] in row order."""
    live = np.asarray(batch.segments) != 0
    out = {"positions": np.moveaxis(np.asarray(batch.positions), 0, -1)[live]}
    visual = _visual_tokens(config, params, batch)
    if visual is not None:
        index = np.asarray(batch.visual_index)
        for kind, token in (("image", config.image_token_id), ("video", config.video_token_id)):
            rows = index[(np.asarray(batch.tokens) == token) & live]
            if len(rows):
                out[f"{kind} vision output"] = np.asarray(visual)[rows]
    x = decoder.embed(config, params, batch.tokens, batch.visual_index, visual)
    out["merged embeddings"] = np.asarray(x)[live]
    layer = jax.jit(decoder.run_layers, static_argnums=(0, 5))
    for l in range(config.text.num_hidden_layers):
        one = {"decoder": {"layers": jax.tree.map(lambda w, l=l: w[l : l + 1], params["decoder"]["layers"])}}
        x, _ = layer(config, one, x, batch.positions, batch.segments, _no_kv)
        if l + 1 == config.text.num_hidden_layers:  # the reference returns the last layer's output after the norm
            x = decoder.final_norm(config, params, x)
        out[f"decoder layer {l}"] = np.asarray(x)[live]
    logits = jax.jit(qwenvl.forward, static_argnums=0)(config, params, batch)
    out["logits"] = np.asarray(logits)[live]
    return out


def _visual_tokens(config: Config, params: dict, batch: Batch):
    encode = jax.jit(qwenvl.encode_vision, static_argnums=0)
    return jnp.concatenate([encode(config, params, v) for v in batch.vision]) if batch.vision else None


def _no_kv(k, v):
    return None


def reference_inputs(samples: list[Sample], config: Config, side: str = "right") -> dict:
    """The arguments of the reference's forward: padded ids and mask, pixel values, grids, seconds per grid step."""
    import torch

    longest = max(len(s.tokens) for s in samples)
    ids, mask = (np.zeros((len(samples), longest), np.int64) for _ in range(2))
    for row, s in enumerate(samples):
        where = slice(0, len(s.tokens)) if side == "right" else slice(longest - len(s.tokens), None)
        ids[row, where], mask[row, where] = s.tokens, 1
    out = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    for kind, values in _PIXELS.items():
        visuals = [v for s in samples for v in s.visuals if v.kind == kind]
        if visuals:
            patches = np.concatenate([v.patches for v in visuals])
            out[values] = torch.tensor(reference_pixels(patches, config))
            out[f"{kind}_grid_thw"] = torch.tensor([list(v.grid) for v in visuals])
            if kind == "video" and config.vision.tokens_per_second is not None:
                out["second_per_grid_ts"] = torch.tensor([v.seconds_per_grid for v in visuals])
    return out


def reference_pixels(patches, config: Config) -> np.ndarray:
    """uint8 patches [n, C] → float32, computed as in the reference's image processor."""
    mean, std = config.vision.image_mean, config.vision.image_std
    table = pixel_table(Preprocessing(image_mean=mean, image_std=std))
    values = patches.reshape(len(patches), len(mean), -1)
    return np.stack([table[c][values[:, c]] for c in range(len(mean))], 1).reshape(patches.shape)


def reference_stages(model, inputs: dict) -> dict:
    """The stages of `our_stages`, from a torch model of transformers 4.51.3."""
    import torch

    live = inputs["attention_mask"].bool()
    model.rope_deltas = None  # the reference keeps them across calls
    grids = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if k in inputs}
    out = {}
    with torch.no_grad():
        positions, _ = model.get_rope_index(inputs["input_ids"], attention_mask=inputs["attention_mask"], **grids)
        out["positions"] = positions.permute(1, 2, 0)[live].numpy().astype(np.int32)
        for kind, values in _PIXELS.items():
            if values in inputs:
                out[f"{kind} vision output"] = model.visual(inputs[values], grid_thw=inputs[f"{kind}_grid_thw"]).numpy()
        result = model(**inputs, output_hidden_states=True, use_cache=False)
    hidden = [h[live].numpy() for h in result.hidden_states]
    out["merged embeddings"] = hidden[0]
    out |= {f"decoder layer {l}": h for l, h in enumerate(hidden[1:])}
    out["logits"] = result.logits[live].float().numpy()
    return out


def load_reference(path):
    """The torch model of a Hugging Face checkpoint directory, float32, plain attention.

    Quantised weights are dequantised here: it has the kernels that they stand for.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()  # it writes to stderr even if that is a file
    with torch.no_grad():
        config, reasons = read_quantised(Path(path))
        if config.quantised or reasons:
            settings = AutoConfig.from_pretrained(path)
            del settings.quantization_config
            settings.torch_dtype = torch.float32
            model = AutoModelForImageTextToText.from_config(settings, attn_implementation="eager")
            model.load_state_dict(_dequantised(path), strict=False)
            return model.eval()
        return AutoModelForImageTextToText.from_pretrained(
            path, torch_dtype=torch.float32, attn_implementation="eager"
        ).eval()


def _dequantised(path) -> dict:
    """The tensors of a quantised checkpoint, dequantised, by their names in transformers 4.51.3."""
    import torch

    config, out = read_dense(Path(path)).replace(dtype="float32"), {}
    with HfSource(path, config) as source:
        for linear, names in tensor_names(config).items():
            leaf = source.leaves[linear]
            whole = source.read(leaf, tuple(slice(0, n) for n in leaf.shape), np.float32)
            for name, x in zip(names, whole if leaf.spec.stacked else [whole], strict=True):
                x = x.T if leaf.spec.transposed else x
                out[name] = torch.from_numpy(np.ascontiguousarray(x).reshape(tensor_shape(config, leaf.spec)))
    return out


def verify(path, image, prompt: str = "Describe this picture.", max_new_tokens: int = 16) -> list[Stage]:
    """Compares this library with the reference on a checkpoint directory and one picture.

    Both run in float32 on their framework's default device; the reference has dequantised weights. Needs the extra
    `parity`. Raises InputError without it, for an Orbax checkpoint, and for a picture that the reference refuses.
    """
    try:
        import torch
        import transformers
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    except ImportError as e:
        raise InputError(f"verify compares with PyTorch, but {e}: {install('parity')}") from e
    if not transformers.__version__.startswith("4.51."):
        version = transformers.__version__
        raise InputError(f"verify needs transformers 4.51.3, not {version}: {install('parity')}")
    from qwenvl_jax.inputs.media import load_image
    from qwenvl_jax.inputs.processor import Processor
    from qwenvl_jax.params.checkpoint import load
    from qwenvl_jax.params.directory import ADAPTER_SETTINGS, MARKER, read_config

    path = Path(path)
    if (path / ADAPTER_SETTINGS).is_file() and not (path / "config.json").is_file():
        raise InputError(f"{path}: an adapter; write its model with `qwenvl merge {path} OUT` and verify that")
    if (path / MARKER).is_file():
        raise InputError(f"{path}: an Orbax checkpoint; verify needs the Hugging Face directory, which torch can read")
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: verify needs a Hugging Face checkpoint directory with a config.json")
    # Errors of the picture come before either side reads the weights.
    processor = Processor.from_dir(path, read_config(path))
    picture, smallest = load_image(image), processor.preprocessing.factor
    if min(picture.size) < smallest:
        size = f"{picture.width} × {picture.height} pixels"
        raise InputError(f"{image}: {size}; verify needs sides of at least {smallest}, as transformers 4.51.3 does")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
    sample = processor.encode(messages)
    config, params, *_ = load(path, dtype="float32")
    batch = make_batch([sample], config)
    model, inputs = load_reference(path), reference_inputs([sample], config)

    reference_processor = Qwen2VLImageProcessor.from_pretrained(path)
    theirs = reference_processor(images=[picture], return_tensors="np")["pixel_values"]
    ours = {"patches": reference_pixels(sample.visuals[0].patches, config)} | our_stages(config, params, batch)
    rows = compare(ours, {"patches": theirs} | reference_stages(model, inputs))

    settings = dict(do_sample=False, repetition_penalty=1.0, temperature=None, top_k=None, top_p=None)
    with torch.no_grad():
        model.rope_deltas = None
        answer = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)[0, len(sample.tokens) :].numpy()
    mine = greedy(config, params, batch, len(answer))[0]
    return rows + compare({"greedy tokens": mine}, {"greedy tokens": answer})


def greedy(config: Config, params: dict, batch: Batch, steps: int) -> np.ndarray:
    """Greedy token ids [B, steps] by prefill and decode, without stopping at eos."""
    visual = _visual_tokens(config, params, batch)
    x = decoder.embed(config, params, batch.tokens, batch.visual_index, visual)
    prefill = jax.jit(qwenvl.prefill, static_argnums=(0, 5))
    decode = jax.jit(qwenvl.decode, static_argnums=0, donate_argnums=3)
    logits, cache = prefill(config, params, x, batch.positions, batch.segments, batch.tokens.shape[1] + steps)
    out = []
    for _ in range(steps):
        out.append(jnp.argmax(logits, -1).astype(jnp.int32))
        logits, cache = decode(config, params, out[-1], cache)
    return np.stack([np.asarray(t) for t in out], 1)
