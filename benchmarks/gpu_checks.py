"""Compares every kernel and program on this card with plain XLA in float32, and tokens of small models with the CPU's.

    JAX_PLATFORMS=cpu python benchmarks/gpu_checks.py tokens.json --tokens      writes the CPU's tokens
    python benchmarks/gpu_checks.py results.jsonl --expected tokens.json        appends one line per check
    python benchmarks/gpu_checks.py results.jsonl --small                       small arrays, kernels interpreted

An error is ‖a − b‖ / ‖b‖, the largest over the arrays. bfloat16 has eight bits, so its matmuls are off by up to a
hundredth. The error of plain XLA in bfloat16 is reported beside the kernel's.
"""

import argparse
import json
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import FAMILIES, config_of, write_checkpoint
from PIL import Image
from qwenvl_convert.hf import read_params

import qwenvl_jax
from qwenvl_jax.config import Config
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.layout import make_sample
from qwenvl_jax.inputs.media import image_visual
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.inputs.preprocessing import Preprocessing
from qwenvl_jax.model import attention, decoder, qwenvl
from qwenvl_jax.model.kernels import window as window_kernel
from qwenvl_jax.params import lora
from qwenvl_jax.params.specs import flatten, unflatten
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.types import Batch, Sample, TrainBatch

LIMIT = 0.02  # error of bfloat16 against float32
DEEP = 0.06  # the same, after a dozen layers


class Check(NamedTuple):
    """The arrays of `run(*args)` must be close to those of `exact(*args)`, which computes in float32."""

    name: str
    run: object
    exact: object
    args: tuple
    limit: float = LIMIT
    plain: object = None  # in bfloat16 too, without the kernel


def error(got, want) -> float:
    """The largest ‖a − b‖ / ‖b‖ over the arrays; NaN if any value is NaN."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    norms = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return float(np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in norms]))


def attention_check(causal: bool, T: int, N: int, K: int, H: int, interpret: bool) -> Check:
    """The attention kernel for GPUs, forward and backward."""
    rng = np.random.default_rng(T + H)
    q, k, v, w = (rng.standard_normal((1, T, n, H), np.float32) for n in (N, K, K, N))
    segments = np.sort(rng.integers(1, 5, (1, T)), 1).astype(np.int32)
    segments[:, -T // 8 :] = 0  # padding

    def grads(attend, dtype, q, k, v, segments, w):
        live = (segments != 0)[..., None, None]  # the output at padding has no meaning

        def total(q, k, v):
            out = attend(*(a.astype(dtype) for a in (q, k, v)), segments, causal=causal).astype(jnp.float32)
            return jnp.sum(jnp.where(live, out * w, 0)), jnp.where(live, out, 0)

        (_, out), back = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return out, back

    flash = partial(attention.flash, interpret=True) if interpret else attention.attention
    kind = "causal" if causal else "full"
    return Check(
        f"attention, {kind}, {T} tokens, {N}/{K} heads of {H}, forward and backward",
        partial(grads, flash, jnp.bfloat16),
        partial(grads, attention._plain, jnp.float32),
        (q, k, v, segments, w),
        plain=partial(grads, attention._plain, jnp.bfloat16),
    )


def window_check(blocks: int, heads: int, H: int) -> Check:
    rng = np.random.default_rng(H)
    P, sizes = blocks * 64, dict(heads=heads, slots=64)
    qkv = rng.standard_normal((1, P, 3 * heads * H), np.float32)
    cos, sin = (f(rng.uniform(0, 9, (1, P, H // 2))).astype(np.float32) for f in (np.cos, np.sin))
    windows = np.sort(rng.integers(1, 4, (blocks, 64)), 1).astype(np.int32).reshape(1, P)

    def run(attend, dtype, qkv, *rest):
        return attend(qkv.astype(dtype), *rest, **sizes).astype(jnp.float32)

    return Check(
        f"windows, {P} patches, {heads} heads of {H}",
        partial(run, window_kernel.window_attention, jnp.bfloat16),
        partial(run, window_kernel.plain, jnp.float32),
        (qkv, cos, sin, windows),
    )


def decode_check(B: int, N: int, K: int, S: int, H: int) -> Check:
    """One token per row is written into the cache and attends."""
    rng = np.random.default_rng(B)
    q, k, v = (rng.standard_normal((B, 1, n, H), np.float32) for n in (N, K, K))
    caches = [rng.standard_normal((B, K, S, H), np.float32) for _ in range(2)]
    lengths = rng.integers(1, S - 1, B).astype(np.int32)

    def run(dtype, *args):
        *arrays, lengths = args
        return [a.astype(jnp.float32) for a in decoder.write_and_attend(*(a.astype(dtype) for a in arrays), lengths)]

    name = f"decode attention, {B} rows, {N}/{K} heads of {H}, {S} slots"
    return Check(name, partial(run, jnp.bfloat16), partial(run, jnp.float32), (q, k, v, *caches, lengths))


def batch_of(config: Config, rows: int, tokens: int, side: int) -> Batch:
    """Rows of text with falling lengths; the first one begins with a picture of side × side patches."""
    samples = [text_and_picture(config, tokens - 3 * row, 0 if row else side, row) for row in range(rows)]
    return make_batch(samples, config, Ladder(tokens=(tokens,), rows=(rows,)))


def text_and_picture(config: Config, tokens: int, side: int, seed: int = 0) -> Sample:
    rng, start, visuals, held = np.random.default_rng(seed), [], (), 0
    if side:
        pixels = rng.integers(0, 256, (side * 14, side * 14, 3), np.uint8)
        visuals = (image_visual(Image.fromarray(pixels), Preprocessing()),)
        start = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
        held = 2 + visuals[0].grid.patches // config.vision.merge_unit
    return make_sample([*start, *rng.integers(0, 100, tokens - held)], visuals, config)


def model_check(config: Config, params: dict, rows: int, tokens: int, side: int) -> Check:
    """Vision tower, prefill and a decode step: logits after the prompt, and after one more token."""
    batch = batch_of(config, rows, tokens, side)

    def run(dtype, params, batch):
        cast = config.replace(dtype=dtype)
        params = jax.tree.map(lambda a: a.astype(dtype), params)
        seen = jnp.concatenate([qwenvl.encode_vision(cast, params, lanes) for lanes in batch.vision])
        x = qwenvl.embed(cast, params, batch.tokens, batch.visual_index, seen)
        slots = batch.tokens.shape[1] + 64
        logits, cache = qwenvl.prefill(cast, params, x, batch.positions, batch.segments, slots)
        more, _ = qwenvl.decode(cast, params, jnp.arange(len(batch.tokens)), cache)
        return seen.astype(jnp.float32), logits, more

    name = f"{config.family}: tower, prefill of {tokens} tokens, decode; {rows} rows"
    return Check(name, partial(run, "bfloat16"), partial(run, "float32"), (params, batch), DEEP)


def lora_check(config: Config, params: dict, rows: int, tokens: int, side: int) -> Check:
    """Loss and gradients of a LoRA step with remat."""
    inputs = batch_of(config, rows, tokens, side)
    targets = np.roll(inputs.tokens, -1, 1)
    batch = TrainBatch(inputs, targets, (inputs.segments != 0).astype(np.float32))
    rng, flat = np.random.default_rng(0), flatten(lora.add(config, params, jax.random.key(0), rank=8, alpha=16.0))
    # At the start lora_b is zero, and then lora_a has no gradient.
    flat |= {p: 0.02 * rng.standard_normal(w.shape, np.float32) for p, w in flat.items() if p.endswith("lora_b")}
    params = unflatten(flat)
    return Check(
        f"{config.family}: LoRA step, {rows} × {tokens} tokens",
        partial(lora_grads, config, "bfloat16"),
        partial(lora_grads, config, "float32"),
        (params, batch),
        DEEP,
    )


def lora_grads(config: Config, dtype: str, params: dict, batch: TrainBatch):
    flat = flatten(params)
    train = {path: w for path, w in flat.items() if lora.is_trainable(path)}
    base = {path: w if lora.is_adapter(path) else w.astype(dtype) for path, w in flat.items()}

    def total(train):
        value, weight, _ = sft_loss(config.replace(dtype=dtype), unflatten(base | train), batch, remat=True)
        return value / weight

    return jax.value_and_grad(total)(train)


def checks(small: bool, folder: Path):
    """All checks. small: for a CPU."""
    T = 128 if small else 1024
    shapes = [(True, T, 4, 2, 64)] if small else [(True, T, 16, 2, 128), (True, T, 8, 2, 64), (True, 2 * T, 28, 4, 128)]
    yield from (attention_check(*shape, small) for shape in shapes)
    shapes = [(False, T, 2, 2, 80)] if small else [(False, T, 16, 16, 80), (False, 4 * T, 16, 16, 80)]
    yield from (attention_check(*shape, small) for shape in shapes)
    yield window_check(2 if small else 64, 16, 80)
    for rows in (1, 32):
        yield decode_check(rows, 16, 2, T, 128)
    for family in FAMILIES:
        config = config_of("50M", family)
        if small:
            config = shallow(config)
        params = read_params(write_checkpoint(folder / family, config), config, progress=False)
        yield model_check(config, params, 2, T, 12 if small else 40)
        yield lora_check(config, params, 2, T, 12 if small else 40)


def shallow(config: Config) -> Config:
    text = replace(config.text, num_hidden_layers=2, vocab_size=1024)
    full = () if config.vision.window_size is None else (1,)
    return config.replace(text=text, vision=replace(config.vision, depth=2, fullatt_block_indexes=full))


def run(check: Check) -> dict:
    start = time.perf_counter()
    want = jax.device_get(jax.jit(check.exact)(*check.args))
    line = {"check": check.name, "error": error(jax.jit(check.run)(*check.args), want), "limit": check.limit}
    if check.plain:
        line["error of plain bfloat16"] = error(jax.jit(check.plain)(*check.args), want)
    return line | {"ok": line["error"] <= check.limit, "seconds": time.perf_counter() - start}


def askers(folder: Path, small: bool) -> dict:
    """Functions that decode greedily in float32: the demo on its samples, and random models of both families."""
    samples = Path(qwenvl_jax.__file__).parent / "demo" / "samples"

    def demo(name: str, question: str):
        engine = qwenvl_jax.Engine(qwenvl_jax.load("demo", dtype="float32", progress=False))
        content = [{"type": "image", "image": str(samples / name)}, {"type": "text", "text": question}]
        return engine.generate([[{"role": "user", "content": content}]], temperature=0, max_new_tokens=24)

    def random(family: str):
        config = config_of("50M", family)
        config = shallow(config) if small else config
        model = qwenvl_jax.load(write_checkpoint(folder / f"{family}-tokens", config), dtype="float32", progress=False)
        asked = text_and_picture(config, 120, 12)
        return qwenvl_jax.Engine(model).generate([asked], temperature=0, max_new_tokens=24, ignore_eos=True)

    return {
        "the demo, a line": partial(demo, "line.png", "Read the text."),
        "the demo, a scene": partial(demo, "scene.png", "List everything."),
        **{f"random {family}": partial(random, family) for family in FAMILIES},
    }


def compared(name: str, ask, expected: Path) -> dict:
    """Compares tokens with the CPU's, which another process writes."""
    (answer,) = ask()
    while not expected.exists():
        time.sleep(0.2)
    here, there = answer.token_ids, json.loads(expected.read_text())[name]
    equal = sum(a == b for a, b in zip(here, there, strict=False))
    return {"check": f"greedy tokens of the CPU, {name}", "ok": here == there, "tokens": len(there), "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", action="store_true")
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asked = askers(Path(folder), args.small)
        if args.tokens:
            work = args.output.with_suffix(".partial")
            work.write_text(json.dumps({name: ask()[0].token_ids for name, ask in asked.items()}))
            work.rename(args.output)
            return
        jobs = [(check.name, partial(run, check)) for check in checks(args.small, Path(folder))]
        if args.expected:
            jobs = [(name, partial(compared, name, ask, args.expected)) for name, ask in asked.items()] + jobs
        with ThreadPoolExecutor(2 if args.small else 8) as pool:  # they mostly wait for the compiler
            lines = [line for line in pool.map(lambda job: attempt(*job, args.output), jobs) if not line["ok"]]
    if lines:
        raise SystemExit(f"failed: {', '.join(line['check'] for line in lines)}")


def attempt(name: str, job, output: Path) -> dict:
    try:
        line = job()
    except Exception as e:  # the other checks still run
        traceback.print_exc()
        line = {"check": name, "ok": False, "error": f"{type(e).__name__}: {e}"[:2000]}
    text = json.dumps(line)
    print(text, flush=True)
    with output.open("a") as file:
        file.write(text + "\n")
    return line


if __name__ == "__main__":
    main()
