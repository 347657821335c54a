"""How fast the model generates, sees and learns, next to what the device can do and, where installed, transformers.

Random weights, the same on both sides, in turns with transformers 4.51.3 (SDPA) on the same device, as users call them.
Times are medians over rounds. Where both sides compute in float32, their first tokens must agree.

- decode: tokens after the first of a short prompt, greedily, `--rows` together. Its share is of a plain copy's bytes a
  second: weights and caches, as far as they are filled, have to be read for each token.
- prefill: `--tokens` to the first token. Its share is of a large matrix product's operations a second: products with
  weights, and half of all attention, being causal.
- vision: the tower over one picture of `--patches`. Likewise; a window counts as its 64 slots.
- picture to first token: preprocessing and all, a picture of a quarter of the patches.
- LoRA: a training step of rank 16 on a row of `--tokens`, blocks rematerialised. Its share is of the operations of
  `train_flops`, which has all of attention, as is the custom for MFU, and nothing twice. Here alone; see `training.py`.

    python benchmarks/model.py
    python benchmarks/model.py --platform gpu --size qwen2.5-vl-7b --tokens 8192 --patches 16384 --new 256
"""

import argparse
import math
import os
import statistics
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import SIZES, clock, copy_rate, product_rate, reference
from PIL import Image

from qwenvl_jax.config import PRESETS, Config
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.infer.programs import Programs
from qwenvl_jax.inputs.batch import Ladder, pack_vision
from qwenvl_jax.inputs.media import Preprocessing, image_visual
from qwenvl_jax.model.qwenvl import init
from qwenvl_jax.params import lora
from qwenvl_jax.params.hf import flatten
from qwenvl_jax.train.flops import train_flops
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.step import init_state, make_optimizer, make_step
from qwenvl_jax.types import Batch, Model, Sample, TrainBatch

PROMPT = 64  # tokens before what is decoded
RANK = 16


class NoText:
    """In place of a tokenizer: the benchmark is of ids."""

    def decode(self, ids, **_) -> str:
        return ""


class Problem(NamedTuple):
    short: Sample  # a prompt before decoding
    long: Sample  # the prompt of prefill
    large: Sample  # the picture of vision
    picture: Image.Image  # that of the first token


def make_problem(config: Config, tokens: int, patches: int) -> Problem:
    rng = np.random.default_rng(0)
    text = lambda n: rng.integers(0, 100, n).astype(np.int32)  # noqa: E731
    side = lambda n: round(math.sqrt(n) / 2) * 28  # noqa: E731
    draw = lambda n: Image.fromarray(rng.integers(0, 256, (side(n), side(n), 3), np.uint8))  # noqa: E731
    return Problem(Sample(text(PROMPT)), Sample(text(tokens)), ask(config, draw(patches)), draw(patches // 4))


def ask(config: Config, picture: Image.Image) -> Sample:
    """A picture between its tokens, then a few of text."""
    v = config.vision
    shown = image_visual(picture, Preprocessing(image_mean=v.image_mean, image_std=v.image_std))
    held = np.full(shown.grid.patches // v.merge_unit, config.image_token_id)
    tokens = [[config.vision_start_token_id], held, [config.vision_end_token_id], np.arange(8)]
    return Sample(np.concatenate(tokens).astype(np.int32), (shown,))


class Ours:
    def __init__(self, config: Config, longest: int, rows: int):
        self.config = config
        self.params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
        model = Model(config, self.params, NoText(), {})
        self.engine = Engine(model, max_batch=rows, max_length=longest)
        self.tower = Programs(config, (longest,), None).encode

    def generate(self, samples: list[Sample], new: int) -> list[list[int]]:
        answers = self.engine.generate(samples, max_new_tokens=new, temperature=0, ignore_eos=True)
        return [a.token_ids for a in answers]

    def see(self, sample: Sample):
        """A function that runs the tower over the sample's picture, which is on the device beforehand."""
        calls, _ = pack_vision(sample.visuals, self.config, Ladder())
        calls = jax.device_put(calls)
        return lambda: jax.block_until_ready([self.tower(self.params, lanes) for lanes in calls])

    def first_token(self, picture) -> None:
        self.generate([ask(self.config, picture)], 1)

    def learn(self, sample: Sample):
        """A function that makes a LoRA step on one row; it uses up the parameters, so nothing else can follow."""
        options, key = TrainOptions(), jax.random.key(1)
        targets = options.lora_targets
        params = lora.add(self.config, self.params, key, rank=RANK, alpha=options.lora_alpha, targets=targets)
        optimizer = make_optimizer(options.learning_rate)
        step = make_step(partial(sft_loss, self.config, remat=True), optimizer, lora.is_trainable)
        state = init_state(params, optimizer, lora.is_trainable)
        ids = jnp.asarray(sample.tokens)[None, None]
        T = ids.shape[-1]
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (1, 3, 1, T))
        inputs = Batch(ids, positions, jnp.ones_like(ids), jnp.full_like(ids, -1), ())
        batch = TrainBatch(inputs, ids, jnp.ones(ids.shape, jnp.float32))

        def run():
            nonlocal state
            state, metrics = step(state, batch)
            float(metrics["loss"])

        return run


class Theirs:
    def __init__(self, config: Config, weights: dict, device: str):
        import torch
        from transformers import Qwen2VLImageProcessor

        self.torch, self.config, self.device = torch, config, device
        self.model = reference(config, weights).to(device).eval()
        self.model.generation_config.eos_token_id = None
        self.processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=Preprocessing.max_pixels)

    def inputs(self, samples: list[Sample]) -> dict:
        from qwenvl_convert.parity import reference_inputs

        return {k: v.to(self.device) for k, v in reference_inputs(samples, self.config).items()}

    def generate(self, samples: list[Sample], new: int) -> list[list[int]]:
        return self.answer(self.inputs(samples), new)

    def answer(self, inputs: dict, new: int) -> list[list[int]]:
        with self.torch.no_grad():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                top_k=None,
                top_p=None,
            )
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    def see(self, sample: Sample):
        inputs = self.inputs([sample])
        pixels = inputs["pixel_values"].to(self.model.dtype)

        def run():
            with self.torch.no_grad():
                self.model.visual(pixels, grid_thw=inputs["image_grid_thw"])
            if self.device == "cuda":
                self.torch.cuda.synchronize()

        return run

    def first_token(self, picture) -> None:
        seen = self.processor(images=[picture], return_tensors="pt")
        count = int(seen["image_grid_thw"].prod()) // self.config.vision.merge_unit
        c = self.config
        ids = [c.vision_start_token_id, *[c.image_token_id] * count, c.vision_end_token_id, *range(8)]
        ids = self.torch.tensor([ids])
        inputs = {"input_ids": ids, "attention_mask": self.torch.ones_like(ids), **seen}
        self.answer({k: v.to(self.device) for k, v in inputs.items()}, 1)


def decode_bytes(config: Config, params: dict, rows: int, new: int) -> float:
    """What has to be read for a token of every row, on average over the answer."""
    t, item = config.text, jax.numpy.dtype(config.dtype).itemsize
    unread = 0 if t.tie_word_embeddings else t.vocab_size * t.hidden_size
    weights = sum(a.size for path, a in flatten(params).items() if path.startswith("decoder")) - unread
    filled = PROMPT + new / 2
    return item * (weights + rows * filled * 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim)


def kernels(params: dict, prefix: str) -> int:
    """Weights that every token or patch is multiplied by."""
    return sum(a.size for path, a in flatten(params).items() if path.startswith(prefix) and path.endswith("kernel"))


def prefill_flops(config: Config, params: dict, tokens: int) -> float:
    t = config.text
    attention = 2 * t.num_hidden_layers * t.num_attention_heads * t.head_dim * tokens**2
    return 2 * tokens * kernels(params, "decoder/layers") + attention + 2 * t.hidden_size * t.vocab_size


def vision_flops(config: Config, params: dict, patches: int) -> float:
    v = config.vision
    spans = sum(patches if v.is_full_attention(i) else v.block_slots for i in range(v.depth))
    merger = kernels(params, "vision/merger") / v.merge_unit
    return (
        2
        * patches
        * (kernels(params, "vision") - kernels(params, "vision/merger") + merger + 2 * v.hidden_size * spans)
    )


def measure(args) -> None:
    device = "cpu" if args.platform == "cpu" else "cuda"  # of which torch is asked, on TPUs not at all
    config = SIZES[args.size]() if args.size in SIZES else PRESETS[args.size]
    config = config.replace(dtype=args.dtype)
    problem = make_problem(config, args.tokens, args.patches)
    longest = max(args.tokens, len(problem.large.tokens), PROMPT + args.new) + 1
    ours = Ours(config, longest, args.rows)
    sides = {"here": ours}
    if find_spec("torch") and find_spec("transformers") and not args.alone:
        sides["transformers"] = Theirs(config, jax.device_get(ours.params), device)
    rows = [problem.short] * args.rows
    firsts = [side.generate([problem.long], 1) for side in sides.values()]
    if args.dtype == "float32" and any(first != firsts[0] for first in firsts):
        raise SystemExit(f"the first tokens differ: {firsts}")
    towers = {name: side.see(problem.large) for name, side in sides.items()}
    jobs = {  # in tokens, tokens, patches and pictures
        "decode": lambda side: clock(lambda: side.generate(rows, 1 + args.new)) - clock(lambda: side.generate(rows, 1)),
        "prefill": lambda side: clock(lambda: side.generate([problem.long], 1)),
        "vision": lambda side: clock(towers[next(n for n, s in sides.items() if s is side)]),
        "picture to first token": lambda side: clock(partial(side.first_token, problem.picture)),
    }
    for job in jobs.values():  # compiles, and whatever else the first call does
        for side in sides.values():
            job(side)
    copy, product = copy_rate(device), product_rate(device, args.dtype)
    copy(), product()
    spent = {(job, name): [] for job in jobs for name in sides}
    ceilings = []
    for _ in range(args.rounds):
        ceilings.append((copy(), product()))
        for job, run in jobs.items():
            for name, side in sides.items():
                spent[job, name].append(run(side))

    copied, multiplied = (statistics.median(c) for c in zip(*ceilings, strict=True))
    patches = problem.large.visuals[0].grid.patches
    done = {
        "decode": args.rows * args.new,
        "prefill": args.tokens,
        "vision": patches,
        "picture to first token": 1,
        "LoRA": args.tokens,
    }
    shares = {
        "decode": args.new * decode_bytes(config, ours.params, args.rows, args.new) / copied,
        "prefill": prefill_flops(config, ours.params, args.tokens) / multiplied,
        "vision": vision_flops(config, ours.params, patches) / multiplied,
        "LoRA": train_flops(config, 1, args.tokens, 0, 0, trains={"llm"}, weights=False) / multiplied,
    }
    million = sum(a.size for a in jax.tree.leaves(ours.params)) / 1e6
    learn = ours.learn(problem.long)
    learn()
    spent["LoRA", "here"] = [clock(learn) for _ in range(args.rounds)]
    print(f"\n{args.size}: {million:.0f} M parameters, {args.dtype}, {jax.devices()[0].device_kind}")
    print(f"copy {copied / 1e9:.0f} GB/s, matrix product {multiplied / 1e12:.2f} TFLOP/s\n")
    print("| | here, a second | share | transformers | ratio | spread |")
    print("|---|---|---|---|---|---|")
    what = {
        "decode": f"decode, tokens, {args.rows} × {args.new}",
        "prefill": f"prefill, tokens, {args.tokens}",
        "vision": f"vision, patches, {patches}",
        "picture to first token": f"picture to first token, {'×'.join(map(str, problem.picture.size))}",
        "LoRA": f"LoRA step, tokens, {args.tokens}",
    }
    for job in done:
        mine = spent[job, "here"]
        share = f"{shares[job] / statistics.median(mine):.0%}" if job in shares else ""
        cells = [what[job], f"{done[job] / statistics.median(mine):.4g}", share]
        if "transformers" in sides and job != "LoRA":
            theirs = spent[job, "transformers"]
            ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
            spread = f"{min(ratios):.2f}–{max(ratios):.2f}×"
            cells += [f"{done[job] / statistics.median(theirs):.4g}", f"{statistics.median(ratios):.2f}×", spread]
        print(f"| {' | '.join(cells + [''] * (6 - len(cells)))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=(*SIZES, *PRESETS), default="50M")
    parser.add_argument("--rows", type=int, default=1, help="that are decoded together")
    parser.add_argument("--new", type=int, default=64, help="tokens that are decoded")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt of prefill")
    parser.add_argument("--patches", type=int, default=4096, help="of the picture of vision")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="cpu")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.platform == "cpu" else "bfloat16")
    args.alone |= args.platform == "tpu"
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(args.platform, args.platform))
    if not args.alone and args.platform == "gpu":
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs some of the memory
    measure(args)


if __name__ == "__main__":
    main()
