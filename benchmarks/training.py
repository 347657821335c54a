"""Training speed next to a plain torch loop over transformers 4.51.3: the same weights, batches, AdamW and machine.

Qwen2.5-VL at two sizes from random weights, on pictures with short and long answers, drawn in the same way each time.
Both sides clip gradients, keep activations (no remat) and run in turns, so that whatever else
the machine does hits both; torch attends by SDPA and updates by its fused AdamW. Data is read and on the device
beforehand. Before anything is timed, the losses of the same weights on the same batch must agree within 1e-4, in
float32.

MFU is the model's floating-point operations (products with weights and attention, padding of rows included) a second,
over what the better of both libraries makes of one large matrix product, measured again in every round.

    python benchmarks/training.py
    python benchmarks/training.py --platform gpu --dtype bfloat16 --rows 32 --tokens 1024 --sizes 50M
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import SIZES, clock, product_rates, reference
from PIL import Image
from qwenvl_convert.parity import reference_inputs

from qwenvl_jax.config import Config
from qwenvl_jax.demo.tokenizer import write_processor
from qwenvl_jax.inputs.layout import Lanes
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.model.qwenvl import init
from qwenvl_jax.train.data import Dataset
from qwenvl_jax.train.flops import train_flops
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.records import PackShape
from qwenvl_jax.train.step import init_state, make_optimizer, make_step

PATCHES = 192  # of a lane: the largest picture and its partial windows
RATE, DECAY, CLIP = 1e-4, 0.01, 1.0


class Records:
    """Pictures of 56 to 168 pixels a side, and answers of 8 to `longest` letters, short ones being likelier."""

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
    """The same records three times: a row each, for us and for torch, and packed."""

    padded: list  # of TrainBatch, with the leading axis A = 1
    torch: list  # of (inputs, labels), of the same shape as `padded`
    trimmed: list  # the same without the columns that are padding in every row, as a collator pads
    packed: list  # of TrainBatch
    flops: list[int]  # of a step, by padded batch
    useful: int  # tokens of all records, which is what is not padding in `padded`
    packed_useful: int  # those that came into `packed`


def make_data(config: Config, processor: Processor, rows: int, tokens: int, batches: int) -> Data:
    records = Records(rows * batches, tokens - 80)  # what is not the answer has up to 71 tokens
    samples = [processor.encode(records[i]["messages"], add_generation_prompt=False) for i in range(len(records))]
    groups = [samples[i : i + rows] for i in range(0, len(samples), rows)]
    grids = [[v.grid for s in group for v in s.visuals] for group in groups]
    filled = [Lanes(PATCHES, config.vision) for _ in grids]
    for each, pictures in zip(filled, grids, strict=True):
        each.place(pictures)
    lanes = max(len(each.lanes) for each in filled)
    useful = sum(len(s.tokens) for s in samples)
    # As many more lanes as samples share a row, so that neither rows nor lanes are half empty.
    share = tokens * len(samples) / useful
    shape = partial(PackShape, rows, tokens, patches=PATCHES)

    def read(count: int, **more):
        data = Dataset(records, processor, shape(**more), shuffle=False, threads=0)  # over and over, without end
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


class Ours:
    """This package's step."""

    def __init__(self, config: Config, dtype: str):
        self.config = config
        self.params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
        self.host = jax.device_get(self.params)
        optimizer = make_optimizer(RATE, weight_decay=DECAY, clip=CLIP)
        everything = lambda path: True  # noqa: E731
        self.loss = jax.jit(partial(sft_loss, config))
        step = make_step(partial(sft_loss, config.replace(dtype=dtype)), optimizer, everything)
        self.state = init_state(jax.tree.map(jnp.copy, self.params), optimizer, everything)
        self.steps, self._make = {}, step

    def put(self, batch):
        return jax.device_put(batch)

    def first_loss(self, batch) -> float:
        total, weight, _ = self.loss(self.params, jax.tree.map(lambda a: a[0], batch))
        return float(total) / float(weight)

    def compile(self, batch) -> float:
        """Seconds it takes."""
        start = time.perf_counter()
        self.steps[batch.inputs.vision[0].frames.shape] = self._make.lower(self.state, batch).compile()
        return time.perf_counter() - start

    def step(self, batch) -> None:
        self.state, metrics = self.steps[batch.inputs.vision[0].frames.shape](self.state, batch)
        float(metrics["loss"])


class Theirs:
    """transformers' model in the loop that everyone writes."""

    def __init__(self, config: Config, weights: dict, device: str, dtype: str):
        self.device, self.dtype = device, dtype
        model = reference(config, weights)
        self.model = model.to(device).train()
        plain = [p for p in model.parameters() if p.ndim == 1]
        decayed = [p for p in model.parameters() if p.ndim > 1]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY, fused=True)

    def put(self, batch):
        inputs, labels = batch
        return {k: torch.as_tensor(v).to(self.device) for k, v in inputs.items()}, torch.tensor(labels).to(self.device)

    def loss(self, batch, dtype: str):
        inputs, labels = batch
        self.model.rope_deltas = None  # it remembers them across calls
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


def measure(size: str, args) -> None:
    device = "cuda" if args.platform == "gpu" else "cpu"
    config = SIZES[size]()
    with tempfile.TemporaryDirectory() as folder:
        processor = Processor.from_dir(write_processor(folder), config)
    data = make_data(config, processor, args.rows, args.tokens, args.batches)
    ours = Ours(config, args.dtype)
    theirs = Theirs(config, ours.host, device, args.dtype)
    padded, packed = ([ours.put(b) for b in part] for part in (data.padded, data.packed))
    reference, trimmed = ([theirs.put(b) for b in part] for part in (data.torch, data.trimmed))

    mine, others = ours.first_loss(padded[0]), theirs.first_loss(reference[0])
    if abs(mine - others) > 1e-4 * others:
        raise SystemExit(f"{size}: the first loss is {mine} here and {others} there")
    compiling = [ours.compile(part[0]) for part in (padded, packed)]
    for batch in (padded[0], packed[0]):  # what the first call does besides
        ours.step(batch)
    for batch in (reference[0], trimmed[0]):
        theirs.step(batch)

    products = product_rates(device, args.dtype)
    for product in products:
        product()
    spent = {name: [] for name in ("ours", "theirs", "packed", "trimmed")}
    ceiling = []
    for _ in range(args.rounds):
        ceiling.append([product() for product in products])
        pairs = zip(padded, reference, strict=True)
        spent["ours"].append(0.0)
        spent["theirs"].append(0.0)
        for a, b in pairs:
            spent["ours"][-1] += clock(partial(ours.step, a))
            spent["theirs"][-1] += clock(partial(theirs.step, b))
        spent["packed"].append(sum(clock(partial(ours.step, batch)) for batch in packed))
        spent["trimmed"].append(sum(clock(partial(theirs.step, batch)) for batch in trimmed))

    best = statistics.median(max(pair) for pair in ceiling)
    middle = {name: statistics.median(times) for name, times in spent.items()}
    flops, tokens = sum(data.flops), args.rows * args.tokens * len(padded)
    ratios = [b / a for a, b in zip(spent["ours"], spent["theirs"], strict=True)]
    ours_useful, theirs_useful = data.packed_useful / middle["packed"], data.useful / middle["trimmed"]
    useful = [
        (data.packed_useful / a) / (data.useful / b) for a, b in zip(spent["packed"], spent["trimmed"], strict=True)
    ]
    million = sum(leaf.size for leaf in jax.tree.leaves(ours.host)) / 1e6
    columns = sum(inputs["input_ids"].shape[1] for inputs, _ in trimmed) * args.rows
    print(f"\n{size}: {million:.1f} M parameters, batches of {args.rows} × {args.tokens} tokens, {args.dtype}")
    print(f"first loss: {mine:.6f} here, {others:.6f} in torch")
    jax_dot, torch_dot = (statistics.median(p) / 1e9 for p in zip(*ceiling, strict=True))
    print(f"matrix product: {jax_dot:.0f} GFLOP/s in jax, {torch_dot:.0f} in torch; MFU is of {best / 1e9:.0f}")
    print(f"compiling a step: {compiling[0]:.1f} s, packed {compiling[1]:.1f} s")
    print(f"not padding: {data.useful / columns:.0%} of torch's tokens, ", end="")
    print(f"{data.packed_useful / (len(packed) * args.rows * args.tokens):.0%} of ours when packed\n")
    print("| | here | torch | ratio | spread |")
    print("|---|---|---|---|---|")
    print(
        f"| tokens/s, the same padded batches | {tokens / middle['ours']:.0f} | {tokens / middle['theirs']:.0f} "
        f"| {statistics.median(ratios):.2f}× | {min(ratios):.2f}–{max(ratios):.2f}× |"
    )
    mfu = [flops / middle[name] / best for name in ("ours", "theirs")]
    print(f"| MFU | {mfu[0]:.0%} | {mfu[1]:.0%} | | |")
    print(
        f"| useful tokens/s, packed here, padded there | {ours_useful:.0f} | {theirs_useful:.0f} "
        f"| {statistics.median(useful):.2f}× | {min(useful):.2f}–{max(useful):.2f}× |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--batches", type=int, default=8, help="of the padded kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cuda" if args.platform == "gpu" else "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a program found there says nothing about compiling
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs some of the memory
    for size in args.sizes:
        measure(size, args)


if __name__ == "__main__":
    main()
