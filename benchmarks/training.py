"""Training speed, compared with a torch loop over transformers 4.51.3: the same weights, batches, AdamW and machine.

Qwen2.5-VL at two sizes with random weights, on pictures with short and long answers, drawn from fixed seeds. Both
sides clip gradients, keep activations (no remat) and run in turns, so that other load on the machine affects both.
torch uses SDPA and its fused AdamW. Data is on the device beforehand. Before the timing, the losses of the same
weights on the same batch must agree within 1e-4, in float32.

- the same padded batches: each record has its own row on both sides.
- packed: useful tokens per second. Here, records share rows; in torch, they are padded to the longest of a batch.
- the demo's step: the step of `python notebooks/demo train`, with its loss and Muon. It has no peer.

A share is MFU: the model's floating-point operations per second (matmuls and attention, padding included), over the
rate of one large matmul, the better of both libraries', measured in every round.

    python benchmarks/training.py
    python benchmarks/training.py --platform gpu --dtype bfloat16 --rows 32 --tokens 1024 --jobs 50M
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import Report, ceiling, clock, config_of, device_name, product_rates, write_checkpoint
from demo.cells import FACTS
from demo.train import LessonBatch, demo_loss, demo_options
from PIL import Image
from qwenvl_convert.hf import read_params
from qwenvl_convert.parity import reference_inputs
from transformers import Qwen2_5_VLForConditionalGeneration

from qwenvl_jax.config import Config
from qwenvl_jax.inputs.layout import Lanes
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.params.specs import count_params, specs
from qwenvl_jax.train.data import Dataset
from qwenvl_jax.train.flops import train_flops
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.records import PackShape
from qwenvl_jax.train.step import init_state, make_optimizer, make_step

JOBS = ("demo", "50M", "demo-step")
PATCHES = 192  # per lane: the largest picture with its partial windows
RATE, DECAY, CLIP = 1e-4, 0.01, 1.0


class Records:
    """Pictures with sides of 56 to 168 pixels, and answers of 8 to `longest` letters; short ones are likelier."""

    def __init__(self, count: int, longest: int):
        self.count, self.longest = count, longest

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        height, width = rng.integers(2, 7, 2) * 28
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        length = int(8 * (self.longest / 8) ** rng.random())
        answer = "".join(map(chr, rng.integers(ord("a"), ord("z") + 1, length)))
        question = [{"type": "image", "image": Image.fromarray(picture)}, {"type": "text", "text": "What is it?"}]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


class Data(NamedTuple):
    """The same records three times: padded for this package, padded for torch, and packed."""

    padded: list  # TrainBatches, with the leading axis A = 1
    torch: list  # (inputs, labels), in the shapes of `padded`
    trimmed: list  # the same, without columns of padding only, as a collator pads
    packed: list  # TrainBatches
    flops: list[int]  # per step, for each padded batch
    useful: int  # tokens of all records, without padding
    packed_useful: int  # tokens of the records in `packed`


def make_data(config: Config, processor: Processor, rows: int, tokens: int, batches: int) -> Data:
    records = Records(rows * batches, tokens - 80)  # the rest of a record has up to 71 tokens
    samples = [processor.encode(records[i]["messages"], add_generation_prompt=False) for i in range(len(records))]
    groups = [samples[i : i + rows] for i in range(0, len(samples), rows)]
    grids = [[v.grid for s in group for v in s.visuals] for group in groups]
    filled = [Lanes(PATCHES, config.vision) for _ in grids]
    for each, pictures in zip(filled, grids, strict=True):
        each.place(pictures)
    lanes = max(len(each.lanes) for each in filled)
    useful = sum(len(s.tokens) for s in samples)
    # Lanes in proportion to the samples per row, so that rows and lanes are both filled.
    share = tokens * len(samples) / useful
    shape = partial(PackShape, rows, tokens, patches=PATCHES)

    def read(count: int, **more):
        data = Dataset(records, processor, shape(**more), shuffle=False, threads=0)  # endless
        return [jax.tree.map(lambda a: a[None], batch) for batch in islice(data, count)]

    padded, packed = read(batches, lanes=lanes, segments=1), read(-(-batches // 2), lanes=round(0.8 * share * lanes))
    reference, trimmed, flops = [], [], []
    for batch, group, visuals in zip(padded, groups, grids, strict=True):
        labels = np.full((rows, tokens), -100)
        learnt = batch.weights[0] > 0
        labels[:, 1:][learnt[:, :-1]] = batch.targets[0][learnt]
        inputs = reference_inputs(group, config)
        trimmed.append((inputs, labels[:, : inputs["input_ids"].shape[1]]))
        whole = {"input_ids": batch.inputs.tokens[0], "attention_mask": batch.inputs.segments[0] != 0}
        reference.append((inputs | {k: v.astype(np.int64) for k, v in whole.items()}, labels))
        seen = sum(train_flops(config, 0, 0, 1, grid.patches) for grid in visuals)
        flops.append(train_flops(config, rows, tokens, 0, 0) + seen)
    packed_useful = sum(int(np.count_nonzero(b.inputs.segments)) for b in packed)
    return Data(padded, reference, trimmed, packed, flops, useful, packed_useful)


def everything(path: str) -> bool:
    """All parameters are trainable."""
    return True


class Ours:
    """This package's step."""

    def __init__(self, config: Config, directory, dtype: str):
        self.params = read_params(directory, config, progress=False)
        declared = specs(config)
        optimizer = make_optimizer(declared, RATE, weight_decay=DECAY, clip=CLIP)
        self.loss = jax.jit(partial(sft_loss, config))
        step = make_step(declared, partial(sft_loss, config.replace(dtype=dtype)), optimizer, everything)
        self.state = init_state(declared, jax.tree.map(jnp.copy, self.params), optimizer, everything)
        self.steps, self._make = {}, step

    def put(self, batch):
        return jax.device_put(batch)

    def first_loss(self, batch) -> float:
        total, weight, _ = self.loss(self.params, jax.tree.map(lambda a: a[0], batch))
        return float(total) / float(weight)

    def compile(self, batch) -> float:
        """Seconds that the compilation takes."""
        start = time.perf_counter()
        self.steps[batch.inputs.vision[0].frames.shape] = self._make.lower(self.state, batch).compile()
        return time.perf_counter() - start

    def step(self, batch) -> None:
        self.state, metrics = self.steps[batch.inputs.vision[0].frames.shape](self.state, batch)
        float(metrics["loss"])


class Theirs:
    """transformers' model in a plain training loop."""

    def __init__(self, directory, device: str, dtype: str):
        self.device, self.dtype = device, dtype
        options = dict(torch_dtype=torch.float32, attn_implementation="sdpa")
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, **options).to(device).train()
        plain = [p for p in self.model.parameters() if p.ndim == 1]
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY, fused=True)

    def put(self, batch):
        inputs, labels = batch
        return {k: torch.as_tensor(v).to(self.device) for k, v in inputs.items()}, torch.tensor(labels).to(self.device)

    def loss(self, batch, dtype: str):
        inputs, labels = batch
        self.model.rope_deltas = None  # the model keeps them across calls
        with torch.autocast(self.device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return self.model(**inputs, labels=labels, use_cache=False).loss

    def first_loss(self, batch) -> float:
        with torch.no_grad():
            return self.loss(batch, "float32").item()

    def step(self, batch) -> None:
        loss = self.loss(batch, self.dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()


def measure(size: str, args, folder: Path) -> None:
    device = "cuda" if args.platform == "gpu" else "cpu"
    config = config_of(size)
    directory = write_checkpoint(folder / size, config)
    data = make_data(config, Processor.from_dir(directory, config), args.rows, args.tokens, args.batches)
    ours, theirs = Ours(config, directory, args.dtype), Theirs(directory, device, args.dtype)
    padded, packed = ([ours.put(b) for b in part] for part in (data.padded, data.packed))
    reference, trimmed = ([theirs.put(b) for b in part] for part in (data.torch, data.trimmed))

    mine, others = ours.first_loss(padded[0]), theirs.first_loss(reference[0])
    if abs(mine - others) > 1e-4 * others:
        raise SystemExit(f"{size}: the first loss is {mine} here and {others} there")
    compiling = [ours.compile(part[0]) for part in (padded, packed)]
    for batch in (padded[0], packed[0]):  # warm up
        ours.step(batch)
    for batch in (reference[0], trimmed[0]):
        theirs.step(batch)

    products = product_rates(device, args.dtype)
    spent = {name: [] for name in ("padded", "torch", "packed", "trimmed")}
    ceilings = []
    for _ in range(args.rounds):
        ceilings.append(ceiling(products, 1))
        spent["padded"].append(0.0)
        spent["torch"].append(0.0)
        for a, b in zip(padded, reference, strict=True):
            spent["padded"][-1] += clock(partial(ours.step, a))
            spent["torch"][-1] += clock(partial(theirs.step, b))
        spent["packed"].append(sum(clock(partial(ours.step, batch)) for batch in packed))
        spent["trimmed"].append(sum(clock(partial(theirs.step, batch)) for batch in trimmed))

    million = count_params(config) / 1e6
    title = f"training {size}: {million:.1f} M parameters, batches of {args.rows} × {args.tokens} tokens, {args.dtype}"
    report = Report(title, args.output, benchmark="training", size=size, device=device_name())
    best = statistics.median(ceilings)
    mfu = {name: sum(data.flops) / statistics.median(spent[name]) / best for name in ("padded", "torch")}
    tokens = args.rows * args.tokens * len(padded)
    report.add("the same padded batches", "tokens/s", tokens, spent["padded"], {"torch": spent["torch"]}, mfu["padded"])
    share = data.packed_useful / data.useful  # both sides count the same tokens
    report.add(
        "packed", "tokens/s", data.packed_useful, spent["packed"], {"torch": [share * s for s in spent["trimmed"]]}
    )
    columns = sum(inputs["input_ids"].shape[1] for inputs, _ in trimmed) * args.rows
    filled = data.packed_useful / (len(packed) * args.rows * args.tokens)
    report.note(
        f"first loss {mine:.6f} here, {others:.6f} in torch; MFU in torch {mfu['torch']:.0%}, of {best / 1e9:.0f} "
        f"GFLOP/s; compiling a step {compiling[0]:.1f} s, packed {compiling[1]:.1f} s; not padding "
        f"{data.useful / columns:.0%} of torch's tokens, {filled:.0%} of ours when packed",
        mfu=mfu,
        ceilings={"product": best},
        compiling=compiling,
    )


def measure_demo(args, folder: Path) -> None:
    """The demo's training step, on batches of its shape."""
    config, options = config_of("demo"), demo_options(folder / "run", rows=20, lanes=24)
    directory = write_checkpoint(folder / "lessons", config)
    shape = PackShape(options.rows, options.tokens, options.lanes, options.patches)
    records = Records(1000, options.tokens - 80)
    data = Dataset(records, Processor.from_dir(directory, config), shape, shuffle=False, threads=0)
    rng, batches = np.random.default_rng(0), []
    for batch in islice(data, args.batches):
        facts = rng.normal(size=(*batch.targets.shape, len(FACTS))).astype(np.float32)
        facts[rng.random(facts.shape) < 0.5] = np.nan
        batches.append(jax.device_put(jax.tree.map(lambda a: a[None], LessonBatch(*batch, facts))))
    more = dict(weight_decay=options.weight_decay, clip=options.clip, mu_dtype=options.moment_dtype)
    declared = specs(config)
    optimizer = make_optimizer(declared, options.learning_rate, options.optimizer, **more)
    step = make_step(declared, partial(demo_loss, config.replace(dtype=args.dtype)), optimizer, everything)
    state = init_state(declared, read_params(directory, config, progress=False), optimizer, everything)
    state = jax.device_put(state, jax.devices()[0])

    def run(batch) -> None:
        nonlocal state
        state, metrics = step(state, batch)
        float(metrics["loss"])

    run(batches[0])
    spent = [clock(partial(run, batch)) for _ in range(args.rounds) for batch in batches]
    title = f"the demo's training: {options.rows} × {options.tokens} tokens, {args.dtype}"
    report = Report(title, args.output, benchmark="training", size="demo", device=device_name())
    report.add("the demo's step", "ms", 1, spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batches", type=int, default=8, help="number of padded batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--output", help="file to which results are appended as JSON lines")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cuda" if args.platform == "gpu" else "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs memory too
    with tempfile.TemporaryDirectory() as folder:
        for job in args.jobs:
            measure_demo(args, Path(folder)) if job == "demo-step" else measure(job, args, Path(folder))


if __name__ == "__main__":
    main()
