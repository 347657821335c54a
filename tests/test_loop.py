"""The training loop: what it learns, and that stopping it, however rudely, changes nothing of that."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_config, tiny_params

from qwenvl_jax.train import loop, run
from qwenvl_jax.train.flops import peak_flops, train_flops
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.types import Batch, InputError, Model, TrainBatch, VisionBatch

ROWS, TOKENS, LANES, PATCHES = 2, 16, 1, 64
CONFIG = tiny_config(
    "qwen2_5_vl",
    text=dict(num_hidden_layers=1, hidden_size=24, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1),
    vision=dict(depth=1, hidden_size=16, intermediate_size=24, out_hidden_size=24, fullatt_block_indexes=(0,)),
)
BASE = dict(rows=ROWS, tokens=TOKENS, lanes=LANES, patches=PATCHES, schedule="constant", remat=False, save_every=3)


def options(output, **changes) -> TrainOptions:
    return TrainOptions(**dict(BASE, output=str(output), steps=12, learning_rate=1e-2) | changes)


def model() -> Model:
    return Model(CONFIG, tiny_params(CONFIG), None)


class Batches:
    """Batch i is a function of i alone; every one is a sentence to memorise, so that the loss must fall.

    `events[i]` is called before batch i is given.
    """

    def __init__(self, events=None, segments=1):
        self.at, self.events, self.segments = 0, events or {}, segments

    def __next__(self) -> TrainBatch:
        if self.at in self.events:
            self.events[self.at]()
        rng = np.random.default_rng((1, self.at % 2))
        self.at += 1
        tokens = rng.integers(1, 150, (ROWS, TOKENS)).astype(np.int32)
        visual_index = np.full((ROWS, TOKENS), -1, np.int32)
        visual_index[0, 2:6] = np.arange(4)
        tokens[0, 2:6] = CONFIG.image_token_id
        positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (3, ROWS, TOKENS))
        segments = np.repeat(np.arange(1, self.segments + 1, dtype=np.int32), TOKENS // self.segments)
        patches = rng.integers(0, 256, (LANES, PATCHES, CONFIG.vision.patch_values), dtype=np.uint8)
        places = np.stack(np.divmod(np.arange(PATCHES, dtype=np.int32), 8), -1)[None]
        ones = np.ones((LANES, PATCHES), np.int32)
        vision = VisionBatch(patches, places, ones, ones)
        inputs = Batch(tokens, positions, np.broadcast_to(segments, (ROWS, TOKENS)), visual_index, (vision,))
        weights = np.ones((ROWS, TOKENS), np.float32)
        weights[:, TOKENS // self.segments - 1 :: TOKENS // self.segments] = 0
        return TrainBatch(inputs, np.roll(tokens, -1, 1), weights)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def exactly(output) -> list[dict]:
    """The lines of metrics.jsonl but for what depends on the clock; floats are written to the last bit."""
    clock = ("tokens_per_second", "flops_per_second", "mfu")
    lines = [{k: v for k, v in line.items() if k not in clock} for line in run.read_metrics(output)]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return lines


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Twelve steps without a stop: (directory, result)."""
    output = tmp_path_factory.mktemp("straight")
    return output, loop.train(model(), Batches(), options(output))


def test_it_learns(straight):
    lines = exactly(straight[0])
    assert len(lines) == 12 and straight[1].step == 12
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert {"grad_norm", "weight", "learning_rate", "tokens", "skipped_steps"} <= lines[0].keys()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stop_and_resume_is_bit_identical(straight, tmp_path, stop):
    events = {4: lambda: os.kill(os.getpid(), stop)}
    before = signal.getsignal(stop)
    first = loop.train(model(), Batches(events), options(tmp_path))
    assert (first.step, first.signal) == (4, stop)
    assert signal.getsignal(stop) is before
    assert len(exactly(tmp_path)) == 4
    second = loop.train(model(), Batches(), options(tmp_path))
    assert (second.step, second.signal) == (12, None)
    assert exactly(tmp_path) == exactly(straight[0])
    assert equal(second.params, straight[1].params)
