"""The sides of a comparison, each in its own process: this package, transformers, and the machine's ceilings.

A process reads one job per line and answers with seconds or rates. So the sides can run in turns, need not be in memory
together, have their own memory peaks, and do not disturb each other with idle threads.
"""

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
from common import clock, config_of
from PIL import Image

import qwenvl_jax
from qwenvl_jax.families import to_dict
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.layout import make_sample
from qwenvl_jax.inputs.media import image_visual
from qwenvl_jax.inputs.pack import pack_vision
from qwenvl_jax.inputs.preprocessing import Preprocessing
from qwenvl_jax.params import lora
from qwenvl_jax.params.specs import init, specs_of
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.step import init_state, make_optimizer, make_step
from qwenvl_jax.types import Batch, TrainBatch

PROMPT = 64  # tokens of the prompt in decode
RANK = 16
OPTIMIZER = make_optimizer({}, TrainOptions().learning_rate)


class Failed(Exception):
    """A side failed at a job or took too long; the message is the side's."""


class Side:
    """The client of such a process. Call it with a job's name and arguments; it waits for the answer."""

    def __init__(self, name: str, platform: str, **settings):
        self.name = name
        environment = os.environ | {"JAX_PLATFORMS": {"gpu": "cuda"}.get(platform, platform)}
        if platform == "gpu":
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other sides need memory too
        command = [sys.executable, __file__, name, json.dumps(settings)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def __call__(self, job: str, *args, seconds: float | None = None):
        self.send(job, *args)
        return self.receive(seconds)

    def send(self, job: str, *args) -> None:
        try:
            print(json.dumps([job, *args]), file=self._process.stdin, flush=True)
        except OSError as e:
            raise Failed(f"{self.name} has ended") from e

    def receive(self, seconds: float | None = None):
        """The answer to the last job. Kills a side that takes longer than `seconds`."""
        ready, _, _ = select.select([self._process.stdout], [], [], seconds if seconds is None else max(seconds, 0))
        if not ready:
            self._process.kill()
            raise Failed(f"no answer in {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"ended with exit code {self._process.wait()}")
        answer, error = json.loads(line)
        if error:
            raise Failed(error)
        return answer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:  # it may still be compiling
            self._process.kill()
            self._process.wait()


class Worker:
    """The jobs that all sides have."""

    def facts(self) -> dict:
        """The peak memory of this process in bytes, with mapped files."""
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        return {"peak": int(peak.split()[1]) * 1024}

    def warm(self, jobs: list, until: float) -> list:
        """Prepares every job until a time of `time.time`; returns an error message or None for each."""
        return [attempt(self, *job)[1] for job in jobs]


class Machine(Worker):
    """The machine's ceilings."""

    def __init__(self, device: str, dtype: str, small: bool):
        product = common.product_rates(device, dtype, small)
        self.forms = {"read": common.read_rates(device, small), "product": product}

    def read(self):
        return common.ceiling(self.forms["read"], 3), None

    def product(self):
        return common.ceiling(self.forms["product"], 3), None


class Model(Worker):
    """A side that computes. The first call of a job prepares it. Each returns (seconds, the first token or None)."""

    def decode(self, rows: int, new: int):
        samples = [self.text(PROMPT)] * rows
        one, (token,) = self.timed(samples, 1)
        return self.timed(samples, 1 + new)[0] - one, token

    def prefill(self, tokens: int):
        seconds, (token,) = self.timed([self.text(tokens)], 1)
        return seconds, token

    def vision(self, patches: int):
        if patches not in self.towers:
            self.towers[patches] = self.see(self.ask(picture(patches)))
        return clock(self.towers[patches]), None

    def picture(self, patches: int):
        start, shown = time.perf_counter(), picture(patches)
        (token,) = self.look(shown)
        return time.perf_counter() - start, token

    def timed(self, samples, new: int):
        start = time.perf_counter()
        tokens = self.generate(samples, new)
        return time.perf_counter() - start, tokens[0][:1]

    def text(self, tokens: int):
        return make_sample(np.random.default_rng(tokens).integers(0, 100, tokens), (), self.config)

    def ask(self, picture: Image.Image):
        """A prompt with a picture and a few tokens of text, prepared by this package."""
        c, v = self.config, self.config.vision
        shown = image_visual(picture, Preprocessing(image_mean=v.image_mean, image_std=v.image_std))
        tokens = [c.vision_start_token_id, c.image_token_id, c.vision_end_token_id, *range(8)]
        return make_sample(tokens, [shown], c)


def picture(patches: int) -> Image.Image:
    """A square of noise."""
    side = round(math.sqrt(patches) / 2) * 28
    return Image.fromarray(np.random.default_rng(patches).integers(0, 256, (side, side, 3), np.uint8))


class Here(Model):
    """This package, from a checkpoint directory or with random weights made on the device."""

    def __init__(self, size: str, family: str, directory: str | None, dtype: str, buckets: list[int], rows: int):
        """buckets: the buckets of tokens to compile for; a single one stands for the default ladder up to it."""
        if directory:
            model = qwenvl_jax.load(directory, progress=False)
        else:
            config = config_of(size, family).replace(dtype=dtype)
            params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
            model = qwenvl_jax.Model(config, params, NoText(), {})
        self.config, self.params = model.config, model.params
        ladder = Ladder(tokens=tuple(buckets)) if buckets[1:] else None
        self.engine = qwenvl_jax.Engine(model, max_batch=rows, max_length=buckets[-1], ladder=ladder)
        self.held = self.params["decoder"]["embed_tokens"]["embedding"].dtype.name
        self.towers, self.steps = {}, {}

    def facts(self) -> dict:
        device, dtype = common.device_name(), self.config.dtype
        return super().facts() | {"device": device, "dtype": dtype, "weights": self.held}

    def warm(self, jobs: list, until: float) -> list:
        """Compiles all jobs in parallel."""
        pool = ThreadPoolExecutor(len(jobs))
        coming = [pool.submit(attempt, self, *(["compile_" + j[0], *j[1:]] if j[0] == "lora" else j)) for j in jobs]
        wait(coming, max(until - time.time(), 1))
        pool.shutdown(wait=False, cancel_futures=True)
        late = "not compiled in time"
        return [each.result()[1] if each.done() else late for each in coming]

    def generate(self, samples, new: int) -> list[list[int]]:
        """All rows have the same prompt, so it is prefilled once."""
        options = dict(max_new_tokens=new, temperature=0, ignore_eos=True, n=len(samples))
        (answer,) = self.engine.generate(samples[:1], **options)
        return [row.token_ids for row in answer.samples]

    def see(self, sample):
        """A function that runs the vision tower over the sample's picture, which is already on the device."""
        calls, _ = pack_vision(sample.visuals, self.config, Ladder())
        calls, engine = jax.device_put(calls), self.engine
        vision, params = engine._programs.vision, engine._scan_params
        return lambda: jax.block_until_ready([vision(params, lanes) for lanes in calls])

    def look(self, picture) -> list[int]:
        return self.generate([self.ask(picture)], 1)[0]

    def compile_lora(self, tokens: int) -> None:
        """Compiles without allocating the state."""
        shapes = jax.eval_shape(self.adapted, self.params)
        declared = specs_of(self.config, shapes)
        start = partial(init_state, declared, optimizer=OPTIMIZER, trainable=lora.is_trainable)
        state = jax.eval_shape(start, shapes)
        step = make_step(declared, partial(sft_loss, self.config, remat=True), OPTIMIZER, lora.is_trainable)
        self.steps[tokens] = step.lower(state, self.row(tokens)).compile()

    def lora(self, tokens: int):
        """A training step on one row. It uses up the parameters, so no other job can follow."""
        if tokens not in self.steps:
            self.compile_lora(tokens)
        if self.params:
            params = self.adapted(self.params)
            self.state = init_state(specs_of(self.config, params), params, OPTIMIZER, lora.is_trainable)
            self.params = self.engine = None
            self.towers = {}
        batch = self.row(tokens)
        start = time.perf_counter()
        self.state, metrics = self.steps[tokens](self.state, batch)
        float(metrics["loss"])
        return time.perf_counter() - start, None

    def adapted(self, params: dict) -> dict:
        options = TrainOptions()
        more = dict(rank=RANK, alpha=options.lora_alpha, targets=options.lora_targets)
        return lora.add(self.config, params, jax.random.key(1), **more)

    def row(self, tokens: int) -> TrainBatch:
        ids = jnp.asarray(self.text(tokens).tokens)[None, None]
        positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (1, 3, 1, tokens))
        inputs = Batch(ids, positions, jnp.ones_like(ids), jnp.full_like(ids, -1), ())
        return TrainBatch(inputs, ids, jnp.ones(ids.shape, jnp.float32))


class NoText:
    """Replaces the tokenizer if there is no checkpoint; the benchmark only needs ids."""

    allow_control_tokens, control_tokens = False, {}

    def decode(self, ids, **_) -> str:
        return ""


class There(Model):
    """transformers 4.51.3 or 5 with SDPA, from a checkpoint directory or with random weights made on the device."""

    def __init__(self, size: str, family: str, directory: str | None, dtype: str, device: str):
        import torch
        import transformers

        self.torch, self.device, self.config = torch, device, config_of(size, family)
        self.newer = int(transformers.__version__.partition(".")[0]) >= 5
        options = {"dtype" if self.newer else "torch_dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        settings = to_dict(self.config)
        kind = getattr(transformers, settings["architectures"][0])
        transformers.utils.logging.disable_progress_bar()
        if directory:
            self.model = kind.from_pretrained(directory, **options).to(device).eval()
        else:
            hf_config = kind.config_class(**settings)
            with torch.device(device):  # random weights are made there too
                self.model = kind._from_config(hf_config, **options).eval()
        self.model.generation_config.eos_token_id = None
        self.processor = transformers.Qwen2VLImageProcessor()
        self.towers = {}

    def facts(self) -> dict:
        return super().facts() | {"dtype": str(self.model.dtype).removeprefix("torch.")}

    def inputs(self, samples) -> dict:
        from qwenvl_convert.parity import reference_inputs

        return self.put(reference_inputs(samples, self.config))

    def put(self, inputs: dict) -> dict:
        if self.newer and "image_grid_thw" in inputs:  # 5.x needs it to find the pictures
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.config.image_token_id).int()
        return {k: v.to(self.device) for k, v in inputs.items()}

    def generate(self, samples, new: int) -> list[list[int]]:
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

    def see(self, sample):
        inputs = self.inputs([sample])
        pixels, grid = inputs["pixel_values"].to(self.model.dtype), inputs["image_grid_thw"]
        tower = self.model.model.visual if self.newer else self.model.visual

        def run():
            with self.torch.no_grad():
                tower(pixels, grid_thw=grid)
            if self.device == "cuda":
                self.torch.cuda.synchronize()

        return run

    def look(self, picture) -> list[int]:
        c, seen = self.config, self.processor(images=[picture], return_tensors="pt")
        count = int(seen["image_grid_thw"].prod()) // c.vision.merge_unit
        ids = [c.vision_start_token_id, *[c.image_token_id] * count, c.vision_end_token_id, *range(8)]
        ids = self.torch.tensor([ids])
        inputs = {"input_ids": ids, "attention_mask": self.torch.ones_like(ids), **seen}
        return self.answer(self.put(inputs), 1)[0]


def attempt(side: Worker, job: str, *args) -> tuple:
    """(the result, None) or (None, the error message)."""
    try:
        return getattr(side, job)(*args), None
    except Exception as e:  # the next job may succeed
        traceback.print_exc()
        return None, f"{type(e).__name__}: {e}"[:2000]


def main() -> None:
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # library output must not mix with the answers
    side = {"machine": Machine, "here": Here}.get(name, There)(**settings)
    for line in sys.stdin:
        print(json.dumps(attempt(side, *json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
