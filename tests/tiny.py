"""Tiny random models, samples of both families and readers of records, shared by the tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.config import Config, Quantised, TextConfig, VisionConfig
from qwenvl_jax.errors import InputError
from qwenvl_jax.eval.questions import Question, Questions
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.layout import make_sample
from qwenvl_jax.inputs.pack import Segment, pack_rows, pack_vision
from qwenvl_jax.inputs.preprocessing import smart_resize
from qwenvl_jax.model.linear import dequantise
from qwenvl_jax.params import lora
from qwenvl_jax.params.checkpoint import OrbaxSource
from qwenvl_jax.params.place import to_devices
from qwenvl_jax.params.specs import abstract_params, flatten, specs, unflatten
from qwenvl_jax.train.data import with_targets
from qwenvl_jax.types import Grid, Sample, TrainBatch, Visual

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
TOKENS = dict(
    image_token_id=151, video_token_id=152, vision_start_token_id=153, vision_end_token_id=154, eos_token_id=155
)


def tiny_config(family: str, text: dict | None = None, vision: dict | None = None, **top) -> Config:
    """A few thousand weights, with every feature of the family switched on."""
    two = family == "qwen2_vl"
    text = dict(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        mrope_section=(2, 2, 2),
        max_position_embeddings=2048,
    ) | (text or {})
    vision = dict(
        depth=4,
        hidden_size=32,
        intermediate_size=64 if two else 44,
        out_hidden_size=text["hidden_size"],
        num_heads=2,
        norm="layer" if two else "rms",
        gated_mlp=not two,
        hidden_act="quick_gelu" if two else "silu",
        window_size=None if two else 112,
        fullatt_block_indexes=() if two else (1, 3),
        tokens_per_second=None if two else 2,
    ) | (vision or {})
    parts = dict(family=family, text=TextConfig(**text), vision=VisionConfig(**vision), dtype="float32")
    return Config(**parts | TOKENS | top)


def tiny_params(config: Config, seed: int = 0) -> dict:
    """Random weights with nothing left at zero or one: biases and norms count too."""
    rng = np.random.default_rng(seed)

    def random(path, w):
        one = path[-1].key == "scale"
        return (one + 0.2 * rng.standard_normal(w.shape)).astype(w.dtype)

    return jax.tree_util.tree_map_with_path(random, abstract_params(config))


def quantised(config: Config, form: Quantised, seed: int = 0) -> tuple[Config, dict, dict]:
    """(a config with the decoder's Linears in this form, random parameters, the dense ones that they stand for)."""
    linears = [path for path in lora.linears(config) if path.startswith("decoder/")]
    config = config.replace(quantised=tuple((path, form) for path in linears))
    rng = np.random.default_rng(seed)
    flat, most = flatten(tiny_params(config.replace(quantised=()), seed)), 7 if form.dtype == "int4" else 127
    wide = dict(flat)
    for path, spec in specs(config).items():
        linear, _, leaf = path.rpartition("/")
        if linear not in linears or leaf == "bias":
            continue
        if leaf == "scales":
            flat[path] = (rng.uniform(0.5, 1.5, spec.shape) / most / 4).astype(np.float32)
        elif leaf == "order":
            flat[path] = rng.permuted(np.broadcast_to(np.arange(spec.shape[-1], dtype=np.int32), spec.shape), axis=-1)
        else:
            flat[path] = rng.integers(-most, most + 1, spec.shape).astype(np.float32).astype(spec.dtype)
    for linear in linears:
        held = [flat.get(f"{linear}/{leaf}") for leaf in ("kernel", "scales", "zeros")]
        kernel = np.asarray(dequantise(*(None if a is None else jnp.asarray(a) for a in held)))
        order = flat.get(f"{linear}/order")
        if order is not None:
            kernel = np.take_along_axis(kernel, np.argsort(order, -1)[..., None], -2)
        wide[f"{linear}/kernel"] = kernel
    return config, unflatten(flat), unflatten(wide)


def picture(rng, config: Config, h: int, w: int) -> Visual:
    """A random still of h × w patches: its two frames are equal, as for every image."""
    return _visual(rng, config, Grid(1, h, w), "image", 0.0)


def clip(rng, config: Config, t: int, h: int, w: int, seconds_per_grid: float = 1.0) -> Visual:
    return _visual(rng, config, Grid(t, h, w), "video", seconds_per_grid)


def _visual(rng, config, grid, kind, seconds):
    patches = rng.integers(0, 256, (grid.patches, config.vision.patch_values), dtype=np.uint8)
    return Visual(patches, grid, kind, seconds)


def sample(rng, config: Config, *parts) -> Sample:
    """Random text tokens where a part is a number, a framed run of placeholders where it is a Visual."""
    tokens, visuals = [], []
    for part in parts:
        if isinstance(part, Visual):
            token = config.image_token_id if part.kind == "image" else config.video_token_id
            tokens += [config.vision_start_token_id, token, config.vision_end_token_id]
            visuals.append(part)
        else:
            tokens += rng.integers(1, 150, part).tolist()
    return make_sample(tokens, visuals, config)


def followed(s: Sample, ids) -> Sample:
    """The sample with more text tokens at its end."""
    ids = np.asarray(ids, np.int32)
    after = np.tile(s.positions.max() + 1 + np.arange(len(ids), dtype=np.int32), (3, 1))
    return s._replace(tokens=np.append(s.tokens, ids), positions=np.append(s.positions, after, 1))


def mixed_samples(config: Config, seed: int = 0) -> list[Sample]:
    """Text only; two pictures that no window divides; a clip with fractional seconds a grid; both kinds in one row."""
    rng = np.random.default_rng(seed)
    pic, vid = (lambda *a: picture(rng, config, *a)), (lambda *a: clip(rng, config, *a))
    return [
        sample(rng, config, 9),
        sample(rng, config, 3, pic(10, 22), 4, pic(18, 6), 5),
        sample(rng, config, 2, vid(3, 6, 10, 0.83), 7),
        sample(rng, config, pic(4, 4), 2, vid(2, 4, 12, 2.6), 3, vid(4, 4, 4, 0.4), 11),
    ]


def random_requests(rng, max_pixels: int) -> list[list[Grid]]:
    """200 requests of 0 to 8 pictures, log-uniform in 0.05 … 12 megapixels and in aspects 1:4 … 4:1, then resized."""
    requests = []
    for _ in range(200):
        areas, aspects = np.exp(rng.uniform(*np.log([[5e4, 0.25], [12e6, 4]]), (rng.integers(0, 9), 2))).T
        sides = zip(np.round((areas * aspects) ** 0.5), np.round((areas / aspects) ** 0.5), strict=True)
        sizes = [smart_resize(int(h), int(w), max_pixels=max_pixels) for h, w in sides]
        requests.append([Grid(1, h // 14, w // 14) for h, w in sizes])
    return requests


def with_vision(config: Config, **changes) -> Config:
    return config.replace(vision=dataclasses.replace(config.vision, **changes))


def with_text(config: Config, **changes) -> Config:
    return config.replace(text=dataclasses.replace(config.text, **changes))


def train_batch(config: Config, rows: list[list[Sample]], T: int = 0, seed: int = 0) -> TrainBatch:
    """Packs each list of samples into a row, from segment 1; about half of the text tokens are learnt.

    What is learnt of a sample does not depend on where it is packed. T: slots a row, 0 for as few as fit.
    """
    one_call = Ladder(patches=(256,), lanes=8)
    vision, places = pack_vision([v for row in rows for s in row for v in s.visuals], config, one_call)
    segments, rest = [], iter(places)
    for b, row in enumerate(rows):
        start = 0
        for number, s in enumerate(row, 1):
            chosen = np.random.default_rng((seed, *s.tokens)).random(len(s.tokens) - 1) < 0.5
            learnt = np.append(False, (s.tokens[1:] < 150) & chosen)
            learnt[-1] = True  # every sample is learnt from
            s = s._replace(weights=learnt.astype(np.float32))
            segments.append(Segment(b, start, number, s, [next(rest) for _ in s.visuals]))
            start = segments[-1].stop
    T = T or max(s.stop for s in segments)
    return with_targets(pack_rows(segments, (len(rows), T), vision), segments)


def read_questions(records, metric: str = "exact", columns=()) -> list[Question]:
    """The questions of records. Raises the error of the first bad one."""
    read = Questions(records, metric, columns).first()
    for error in (one for one in read if isinstance(one, InputError)):
        raise error
    return read


def restore(path, config: Config, *how, **more) -> dict:
    """The parameters of a checkpoint in our format."""
    return to_devices(OrbaxSource(path, config), *how, **more)
