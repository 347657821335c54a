"""Trains the demo with the package's trainer, on records drawn on demand.

    python notebooks/demo train RUN --assets DIR [--steps N] [--rows N] [--dtype bfloat16]

Run it again with the same arguments to resume, or with more steps to continue. The result is RUN/final;
`qwenvl convert RUN/final DIR --to hf` turns it into the Hugging Face checkpoint in this package.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from demo.assets import assets_of
from demo.cells import FACTS
from demo.emoji import NAMES, plural
from demo.render import Scenes
from demo.score import LONGEST, questions
from demo.tokenizer import special_ids, vocabulary, write_processor
from qwenvl_jax.config import Config, TextConfig, VisionConfig, read_json
from qwenvl_jax.eval.evaluator import Evaluator
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.model.decoder import run_layers
from qwenvl_jax.model.qwenvl import embed, encode_vision
from qwenvl_jax.params.checkpoint import load, save
from qwenvl_jax.params.specs import init
from qwenvl_jax.train.data import Packer
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.losses import cross_entropy
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.records import BadRecord, PackShape, RecordProcessor
from qwenvl_jax.train.step import GROUPS
from qwenvl_jax.types import Batch, Model

_PLACE_LAYER, _FACTS_LAYER = 2, 4  # decoder layers after which place and facts are predicted
_AUXILIARY = 0.1  # weight of these losses
TURNS = 4  # questions about a picture; encoding the picture costs as much as answering them


def demo_config() -> Config:
    """Qwen2.5-VL's architecture, small: four million parameters. Windowed and full attention alternate."""
    ids = special_ids()
    return Config(
        family="qwen2_5_vl",
        text=TextConfig(
            vocab_size=896,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            max_position_embeddings=4096,
            # Time, height and width share one range of frequencies, in this order. Reading order needs high ones for
            # rows and columns. Finding an object at any distance needs low ones. In Qwen's own proportions,
            # (6, 9, 9), no θ gives both.
            rope_theta=200.0,
            mrope_section=(3, 4, 17),
            tie_word_embeddings=True,
        ),
        vision=VisionConfig(
            depth=4,
            hidden_size=128,
            intermediate_size=384,
            out_hidden_size=192,
            num_heads=4,
            fullatt_block_indexes=(1, 3),
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        eos_token_id=ids["<|im_end|>"],
        dtype="float32",
    )


class LessonBatch(NamedTuple):
    """A TrainBatch, and the facts of its tokens."""

    inputs: Batch
    targets: Any
    weights: Any
    facts: Any  # [B, T, len(FACTS)] float32, NaN for none


class Lessons:
    """Endless batches of the records of Scenes, in order. Records that are too long for a row are skipped."""

    def __init__(self, scenes: Scenes, processor: Processor, shape: PackShape):
        self.scenes, self.shape, self.config = scenes, shape, processor.config
        self.process = RecordProcessor(processor, shape)
        self.position, self.waiting = 0, None
        words = vocabulary()
        spellings = {name: (name, plural(name), f"Ġ{name}", f"Ġ{plural(name)}") for name in NAMES}
        self.kinds = {words[word]: name for name, forms in spellings.items() for word in forms if word in words}

    def get_state(self) -> dict:
        return {"position": self.position}

    def set_state(self, state: dict) -> None:
        self.position, self.waiting = state["position"], None

    def __next__(self) -> LessonBatch:
        packer, added = Packer(self.shape, self.config), []
        while True:
            if self.waiting is None:
                record = self.scenes[self.position]
                try:
                    self.waiting = self.process(record), record["metadata"]
                except BadRecord as e:
                    if e.reason not in ("too long", "too large"):
                        raise
                    self.position += 1
                    continue
            if not packer.add(self.waiting[0]):
                break
            added.append(self.waiting[1])
            self.position, self.waiting = self.position + 1, None
        batch = packer.batch()
        facts = np.full((*batch.inputs.tokens.shape, len(FACTS)), np.nan, np.float32)
        for s, known in zip(packer.segments, added, strict=True):
            here = facts[s.row, s.start : s.stop]
            here[batch.inputs.visual_index[s.row, s.start : s.stop] >= 0] = known.cells
            for t, token in enumerate(s.sample.tokens.tolist()):
                if self.kinds.get(token) in known.kinds:
                    here[t] = known.kinds[self.kinds[token]]
        return LessonBatch(*batch, facts)


def demo_loss(config: Config, params: dict, batch: LessonBatch, *, remat: bool = False):
    """Cross-entropy, plus auxiliary losses on hidden states early in the decoder. Returns what `sft_loss` does.

    M-RoPE gives relative positions, but answers need pixels from the picture's corner, seconds from the clip's start,
    and counts. From answers alone, the decoder learns slowly to count. So fixed random matrices predict the place of
    visual tokens after _PLACE_LAYER layers, and the facts of `demo.cells`, of visual tokens and words, after
    _FACTS_LAYER; the fact "core" after both.
    """
    inputs = batch.inputs
    seen = [encode_vision(config, params, v, remat=remat) for v in inputs.vision]
    x = embed(config, params, inputs.tokens, inputs.visual_index, jnp.concatenate(seen))
    states = []
    for part in (slice(_PLACE_LAYER), slice(_PLACE_LAYER, _FACTS_LAYER), slice(_FACTS_LAYER, None)):
        layers = jax.tree.map(lambda w, part=part: w[part], params["decoder"]["layers"])
        stack = params | {"decoder": params["decoder"] | {"layers": layers}}
        x, _ = run_layers(config, stack, x, inputs.positions, inputs.segments, lambda k, v: None, remat=remat)
        states.append(x)
    entropy, weight, metrics = cross_entropy(config, params, x, batch)

    slots = jnp.arange(inputs.tokens.shape[1])
    start = jax.lax.cummax(jnp.where(inputs.tokens == config.vision_start_token_id, slots, 0), axis=1)
    corner = jnp.take_along_axis(inputs.positions, start[None], axis=2)
    visual = (inputs.visual_index >= 0)[..., None]
    places = jnp.where(visual, jnp.moveaxis(inputs.positions - corner - 1, 0, -1), jnp.nan)
    facts = batch.facts
    # Widths of the Huber loss. Counts need a wide quadratic part: with absolute errors, the model would only learn the
    # most common count, one.
    width = jnp.array([1.0 if name in ("nth", "start", "core") else 0.1 for name in FACTS])
    results = (
        _facts_loss(states[0], places, 0.1, seed=0),
        _facts_loss(states[1], jnp.where(visual, facts, jnp.nan)[..., :-1], width[:-1], seed=0),
        _facts_loss(states[0], facts[..., -1:], width[-1], seed=1),
        _facts_loss(states[1], jnp.where(visual, jnp.nan, facts)[..., :-1], width[:-1], seed=0),
        _facts_loss(states[1], facts[..., -1:], width[-1], seed=1),
    )
    losses, errors = zip(*results, strict=True)
    names = ("t", "h", "w", *FACTS, *(f"named_{name}" for name in FACTS[:-1]), "later_core")
    errors = dict(zip(names, jnp.concatenate(errors), strict=True))
    metrics |= {"cross_entropy": entropy} | {name: error * weight for name, error in errors.items()}
    return entropy + _AUXILIARY * sum(losses), weight, metrics


def _facts_loss(x, facts, width, seed: int):
    """(Huber loss, mean error of each fact [n]) of facts [B, T, n], predicted from x [B, T, D]; NaN facts do not count.

    A fixed random matrix, made from `seed`, predicts. The loss is quadratic up to an error of `width`.
    """
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    reading = jax.random.normal(jax.random.key(seed), (x.shape[-1], facts.shape[-1]))
    known = ~jnp.isnan(facts)
    off = jnp.where(known, x @ (reading * 8 / x.shape[-1] ** 0.5) - jnp.where(known, facts, 0), 0)
    far = jnp.abs(off) >= width
    huber = jnp.where(far, jnp.abs(off) - width / 2, off**2 / (2 * width))
    return jnp.sum(huber), jnp.sum(jnp.abs(off), (0, 1)) / jnp.maximum(jnp.sum(known, (0, 1)), 1)


def demo_options(output, **changes) -> TrainOptions:
    """The options of the demo's training; the model card gives the numbers of steps."""
    return TrainOptions(
        output=str(output),
        tokens=192,
        patches=256,
        optimizer="muon",
        learning_rate=3e-3,
        schedule="constant",
        weight_decay=0.02,
        remat=False,
        save_every=250,
        eval_every=1000,
        keep=1,
        best="overall",
    ).replace(**changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument("--assets", help="where fonts, emoji and tables are; see notebooks/demo/assets.py")
    parser.add_argument("--start", help="RUN/final of an earlier run to start from, or of `pretrain`")
    parser.add_argument("--rows", type=int, default=20, help="rows of a batch; each holds about two conversations")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--cooldown", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype to compute in")
    parser.add_argument(
        "--weights", type=json.loads, help='relative frequency of the tasks, as JSON: {"ocr": 2, "name": 1}'
    )
    parser.add_argument("--easy", type=float, default=0.0, help="share of easy pictures, for the first steps")
    parser.add_argument("--freeze", nargs="*", default=[], choices=GROUPS, help="parts that are not trained")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn records; use another with --start")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--vision-learning-rate", type=float, help="learning rate of the vision tower (default: that of the rest)"
    )
    parser.add_argument("--devices", type=int, default=1, help="devices that share a batch")
    parser.add_argument("--questions", type=int, default=64, help="questions per task, in each evaluation")
    args = parser.parse_args()

    assets = assets_of(parser, args.assets)
    final = args.run / "final"
    if final.exists():
        parser.error(f"{final} exists; move it away to continue")
    config = demo_config()
    args.run.mkdir(parents=True, exist_ok=True)
    files = write_processor(args.run / "processor")
    processor, generation = Processor.from_dir(files, config), read_json(files / "generation_config.json")
    params = load(args.start).params if args.start else jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    model = Model(config, params, processor, generation)
    options = demo_options(
        args.run,
        model=args.start or "",
        rows=args.rows,
        lanes=-(-args.rows * 6 // 5),
        steps=args.steps,
        cooldown=args.cooldown,
        warmup=args.warmup,
        freeze=tuple(args.freeze),
        learning_rate=args.learning_rate,
        vision_learning_rate=args.vision_learning_rate,
        dtype=args.dtype,
        mesh_data=args.devices,
    )
    shape = PackShape(options.rows, options.tokens, options.lanes, options.patches)
    scenes = Scenes(assets, seed=args.seed, turns=TURNS, shuffled=True, easy=args.easy, weights=args.weights)
    data = Lessons(scenes, processor, shape)
    evaluate = Evaluator(model, questions(assets, args.questions), batch=64, max_new_tokens=LONGEST)
    result = train(model, data, options, evaluate=evaluate, loss=demo_loss, donate=True)
    if result.signal is not None:
        print(f"stopped after step {result.step}; run the same command to resume")
        return
    save(model._replace(params=result.params), final, files_from=files)
    print(f"model of step {result.step}: {final}")
