"""Trains the demo's vision tower to locate and name things, before the decoder is trained.

    python notebooks/demo pretrain RUN --assets DIR [--steps N] [--dtype bfloat16]

A model this small learns the shapes of letters very slowly from answers alone: a picture has many visual tokens, and
a wrong answer does not say which of them was misread. Here, the target of every visual token is what its own 28 × 28
pixels show: the characters whose centres lie in it, from left to right, or the emoji that covers it, with its edges.
The outputs are the decoder's embedding table, behind a few matrices that are discarded. `train --start` begins from
RUN/final, in Orbax form. A run that is stopped cannot be resumed.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from demo import charts, lines, scenes
from demo.assets import Assets, assets_of
from demo.cells import CELL, COVERED, cell_corners, overlap
from demo.tokenizer import byte_letters, special_ids, vocabulary, write_processor
from demo.train import demo_config
from qwenvl_jax.config import Config, read_json
from qwenvl_jax.inputs.layout import Lanes
from qwenvl_jax.inputs.media import image_visual
from qwenvl_jax.inputs.pack import fill_lanes
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.model.vision import encode_vision
from qwenvl_jax.params.checkpoint import load, save
from qwenvl_jax.params.specs import Spec, init, specs
from qwenvl_jax.train.step import init_state, make_optimizer, make_schedule, make_step
from qwenvl_jax.types import Batch, Model, VisionBatch

SLOTS = 5  # characters per cell
LANES, PATCHES = 64, 128
_SHARES = (0.1, 0.2)  # cumulative shares of emoji and charts; the rest are lines of text
_EMPTY = 0.2  # loss weight of a cell that shows nothing; others have 1


class CellBatch(NamedTuple):
    """Pictures, and the targets of their cells."""

    inputs: Batch  # only its vision
    targets: Any  # [R·M, S] int32: token ids, padded with `nothing`
    weights: Any  # [R·M, S] float32
    edges: Any  # [R·M, 4] float32: the emoji's left, top, right, bottom in cells from the cell's centre, or NaN


class Cells:
    """Batches of pictures, with the leading axis A = 1; batch i depends on (seed, i) only."""

    def __init__(self, assets: Assets, processor: Processor, seed: int = 0, easy: float = 0.2):
        self.assets, self.processor, self.seed, self.easy = assets, processor, seed, easy
        words, letters = vocabulary(), byte_letters()
        self.words = {name: words[name] for name in scenes.NAMES}
        # The target of a non-ASCII character is its first byte.
        self.byte = lambda character: words[letters[character.encode()[0]]]
        self.nothing = special_ids()["<|endoftext|>"]

    def __call__(self, index: int) -> CellBatch:
        rng = np.random.default_rng((self.seed, index))
        vision, unit = self.processor.config.vision, self.processor.config.vision.merge_unit
        lanes, visuals, placements, answers = Lanes(PATCHES, vision, LANES), [], [], []
        while True:
            image, *answer = (self._emoji, self._chart, self._line)[np.searchsorted(_SHARES, rng.random())](rng)
            visual = image_visual(image, self.processor.preprocessing)
            placed = lanes.place([visual.grid])
            if placed is None:
                break
            visuals.append(visual)
            placements += placed
            answers.append(answer)
        filled = fill_lanes(visuals, placements, LANES, PATCHES, vision)
        total = LANES * PATCHES // unit
        targets, weights = np.zeros((total, SLOTS), np.int32), np.zeros((total, SLOTS), np.float32)
        edges = np.full((total, 4), np.nan, np.float32)
        for frame, (ids, weight, edge) in zip(placements, answers, strict=True):
            targets[frame.cells], weights[frame.cells], edges[frame.cells] = ids, weight, edge
        inputs = Batch(None, None, None, None, (filled,))
        return jax.tree.map(lambda a: a[None], CellBatch(inputs, targets, weights, edges))

    def _line(self, rng: np.random.Generator):
        image, text, centres = lines.glyphs(rng, self.assets, easy=rng.random() < self.easy)
        # If a single line is two cells high, both cells have its characters as targets.
        return image, *self._spelled(image, text, centres, spanned=np.ptp(centres[:, 1]) == 0)

    def _chart(self, rng: np.random.Generator):
        """A crop of a chart, whose text is smaller than that of lines."""
        image, text, centres = charts.glyphs(rng, self.assets)
        corner = rng.integers(0, np.array(image.size) - 5 * CELL + 1)
        image, centres = image.crop((*corner, *(corner + 5 * CELL))), centres - corner
        inside = ((centres >= 0) & (centres < 5 * CELL)).all(1)
        return image, *self._spelled(image, "".join(np.array(list(text))[inside]), centres[inside])

    def _spelled(self, image, text: str, centres: np.ndarray, spanned: bool = False):
        columns, rows = image.width // CELL, image.height // CELL
        across, down = np.clip(centres // CELL, 0, [columns - 1, rows - 1]).astype(int).T
        ids, weights = self._empty(columns * rows)
        for i in np.lexsort((centres[:, 0], centres[:, 1])):
            if text[i] != " ":
                for row in range(rows) if spanned else (down[i],):
                    cell = row * columns + across[i]
                    n = int(np.sum(weights[cell] == 1))
                    ids[cell, n : n + 1], weights[cell, n : n + 1] = self.byte(text[i]), 1
        shown = np.sum(weights == 1, axis=1)
        more = (shown > 0) & (shown < SLOTS)
        weights[more, shown[more]] = 1  # one more slot, whose target is `nothing`
        return ids, weights, np.full((columns * rows, 4), np.nan)

    def _emoji(self, rng: np.random.Generator):
        numbers = [1] * int(rng.integers(1, 9))
        image, _, boxes = scenes.scene(rng, self.assets, numbers, sizes=(20, 84), side=(84, 140))
        corners = cell_corners(image.width, image.height)
        ids, weights = self._empty(len(corners))
        edges = np.full((len(corners), 4), np.nan)
        most = np.full(len(corners), COVERED * CELL * CELL)
        for name, (box,) in ((n, b) for n, b in boxes.items() if b):
            box = np.array(box)
            area = overlap(corners, box)
            # A small emoji over the corners of four cells counts for all of them.
            shown = (area >= most) | (area >= COVERED * np.prod(box[2:] - box[:2])) & (ids[:, 0] == self.nothing)
            most[shown] = np.maximum(area, COVERED * CELL * CELL)[shown]
            ids[shown, 0], weights[shown, :2] = self.words[name], 1.0
            centre = np.tile(corners[shown] + CELL / 2, 2)
            edges[shown] = (box - centre) / CELL
        return image, ids, weights, edges

    def _empty(self, cells: int) -> tuple[np.ndarray, np.ndarray]:
        weights = np.zeros((cells, SLOTS))
        weights[:, 0] = _EMPTY
        return np.full((cells, SLOTS), self.nothing), weights


HEADS = {
    "slots/kernel": Spec((), np.float32, (), "linear", "vision", None),
    "edges/table": Spec((), np.float32, (), "embedding", "vision", None),  # AdamW trains it, not Muon
}


def init_heads(width: int, key) -> dict:
    """Matrices from a visual token [D] to its slots and edges. The first slot starts as the identity."""
    slots = jax.random.normal(key, (SLOTS, width, width)) / width**0.5
    return {"slots": {"kernel": slots.at[0].set(jnp.eye(width))}, "edges": {"table": jnp.zeros((width, 4))}}


def cells_loss(config: Config, params: dict, batch: CellBatch):
    """Cross-entropy of the slots and Huber loss of the edges: (sum, weight, metrics), as the losses in `train`."""
    x = encode_vision(config, params, batch.inputs.vision[0]).astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    dtype = config.dtype
    slots = jnp.einsum("xd,sde->xse", x.astype(dtype), params["slots"]["kernel"].astype(dtype))
    table = params["decoder"]["embed_tokens"]["embedding"].astype(dtype)
    logp = jax.nn.log_softmax(jnp.einsum("xse,ve->xsv", slots, table).astype(jnp.float32))
    shown = jnp.where(batch.targets == special_ids()["<|endoftext|>"], 0, batch.weights)
    read = jnp.sum(shown * (jnp.argmax(logp, -1) == batch.targets)) / jnp.sum(shown)
    chosen = jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    there = ~jnp.isnan(batch.edges)
    off = jnp.where(there, x @ params["edges"]["table"] - jnp.where(there, batch.edges, 0), 0)
    huber = jnp.sum(jnp.where(jnp.abs(off) < 0.1, off**2 / 0.2, jnp.abs(off) - 0.05))
    weight = jnp.sum(batch.weights)
    pixels = jnp.sum(jnp.abs(off)) / jnp.maximum(jnp.sum(there), 1) * CELL
    return huber - jnp.sum(chosen * batch.weights), weight, {"read": read * weight, "edges": pixels * weight}


def levelled(config: Config, params: dict, lanes: VisionBatch) -> dict:
    """Scales the merger so that visual tokens have the RMS of word embeddings; `cells_loss` does not fix their scale.

    If they were ten times as large, the decoder's residual updates would hardly change them.
    """

    def rms(x):
        return jnp.sqrt(jnp.mean(jnp.square(x), -1))

    words = jnp.mean(rms(params["decoder"]["embed_tokens"]["embedding"]))
    scale = words / jnp.median(rms(jax.jit(encode_vision, static_argnums=0)(config, params, lanes)))
    merger = params["vision"]["merger"]
    last = {name: w * scale for name, w in merger["fc2"].items()}
    return params | {"vision": params["vision"] | {"merger": merger | {"fc2": last}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument("--assets", help="where fonts, emoji and tables are; see notebooks/demo/assets.py")
    parser.add_argument("--start", help="RUN/final of an earlier run to start from (default: random weights)")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn pictures")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype to compute in")
    args = parser.parse_args()

    if (args.run / "final").exists():
        parser.error(f"{args.run / 'final'} exists; choose another RUN")
    config, assets = demo_config(), assets_of(parser, args.assets)
    files = write_processor(args.run / "processor")
    processor, generation = Processor.from_dir(files, config), read_json(files / "generation_config.json")
    params = load(args.start).params if args.start else jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    params = params | init_heads(config.text.hidden_size, jax.random.key(1))

    def trainable(path):
        return path.startswith(("vision", "slots", "edges")) or "embed_tokens" in path

    schedule = make_schedule(args.learning_rate, "cosine", warmup=args.steps // 25, total=args.steps, end=0.02)
    declared = specs(config) | HEADS
    optimizer = make_optimizer(declared, schedule, "muon", weight_decay=0.02)
    state = init_state(declared, params, optimizer, trainable)
    step = make_step(declared, partial(cells_loss, config.replace(dtype=args.dtype)), optimizer, trainable)
    draw = Cells(assets, processor, args.seed)

    with ThreadPoolExecutor(1) as pool, tqdm(range(args.steps), desc="cells", unit="step", mininterval=10) as bar:
        coming = pool.submit(draw, 0)
        for i in bar:
            batch, coming = coming.result(), pool.submit(draw, i + 1)
            state, metrics = step(state, batch)
            if i % 50 == 0:
                bar.set_postfix({name: f"{float(metrics[name]):.3f}" for name in ("loss", "read", "edges")})
    kept = {name: state.params[name] for name in ("vision", "decoder")}
    kept = levelled(config, kept, jax.tree.map(lambda a: a[0], batch.inputs.vision[0]))
    save(Model(config, kept, processor, generation), args.run / "final", files_from=files)
