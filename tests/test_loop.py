"""The training loop: it learns, and neither signals nor kill -9 change the result."""

import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import tiny_config, tiny_params

from qwenvl_jax.errors import InputError
from qwenvl_jax.params import lora
from qwenvl_jax.params.specs import abstract_params, flatten
from qwenvl_jax.train import loop, progress, run
from qwenvl_jax.train.flops import peak_flops, train_flops
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.step import learning_rate_at, make_schedule
from qwenvl_jax.types import Batch, Model, TrainBatch, VisionBatch

ROWS, TOKENS, LANES, PATCHES = 4, 16, 4, 64
CONFIG = tiny_config(
    "qwen2_5_vl",
    text=dict(num_hidden_layers=1, hidden_size=24, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1),
    vision=dict(depth=1, hidden_size=16, intermediate_size=24, out_hidden_size=24, fullatt_block_indexes=(0,)),
)


def options(output, **changes) -> TrainOptions:
    shape = dict(rows=ROWS, tokens=TOKENS, lanes=LANES, patches=PATCHES)
    rest = dict(steps=12, save_every=3, learning_rate=1e-2, schedule="constant", remat=False, freeze=("vision",))
    return TrainOptions(**shape | rest | dict(output=str(output)) | changes)


def model() -> Model:
    return Model(CONFIG, tiny_params(CONFIG), None)


class Batches:
    """Batch i depends on i alone. Batches repeat after `period`, so that a model can memorise them.

    `events[i]` is called with batch i before it is returned.
    """

    def __init__(self, events=None, *, period=2, segments=1):
        self.at, self.events, self.period, self.segments = 0, events or {}, period, segments

    def __next__(self) -> TrainBatch:
        rng = np.random.default_rng((1, self.at % self.period))
        tokens = rng.integers(1, 150, (ROWS, TOKENS)).astype(np.int32)
        visual_index = np.full((ROWS, TOKENS), -1, np.int32)
        visual_index[0, 2:6] = np.arange(4)
        tokens[0, 2:6] = CONFIG.image_token_id
        positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (3, ROWS, TOKENS))
        segments = np.repeat(np.arange(1, self.segments + 1, dtype=np.int32), TOKENS // self.segments)
        patches = rng.integers(0, 256, (LANES, PATCHES, CONFIG.vision.patch_values), dtype=np.uint8)
        places = np.stack(np.divmod(np.arange(PATCHES, dtype=np.int32), 8), -1)
        ones = np.ones((LANES, PATCHES), np.int32)
        vision = VisionBatch(patches, np.broadcast_to(places, (LANES, PATCHES, 2)), ones, ones)
        inputs = Batch(tokens, positions, np.broadcast_to(segments, (ROWS, TOKENS)), visual_index, (vision,))
        weights = np.ones((ROWS, TOKENS), np.float32)
        weights[:, TOKENS // self.segments - 1 :: TOKENS // self.segments] = 0
        batch = TrainBatch(inputs, np.roll(tokens, -1, 1), weights)
        self.events.get(self.at, lambda batch: None)(batch)
        self.at += 1
        return batch

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def spoil(batch):
    batch.weights[:] = np.nan


def exactly(output) -> list[dict]:
    """The lines of metrics.jsonl, one per step, without times; floats are exact."""
    clock = ("tokens_per_second", "flops_per_second", "mfu")
    lines = [{k: v for k, v in line.items() if k not in clock} for line in run.read_metrics(output)]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return lines


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def saved(output) -> list[int]:
    return sorted(int(p.name) for p in (output / run.CHECKPOINTS).iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Twelve steps without a stop: (directory, result)."""
    output = tmp_path_factory.mktemp("straight")
    mine = model()
    result = loop.train(mine, Batches(), options(output))
    assert equal(mine.params, tiny_params(CONFIG))  # the caller's parameters are neither changed nor donated
    return output, result


def test_it_learns(straight):
    output, result = straight
    lines = exactly(output)
    assert len(lines) == result.step == 12
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert {"grad_norm", "weight", "learning_rate", "tokens", "skipped_steps", "accuracy"} <= lines[0].keys()
    assert saved(output) == [9, 12]
    assert not (output / run.CHECKPOINTS / "deleted").exists()
    before, after = flatten(tiny_params(CONFIG)), flatten(result.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {p for p in before if not p.startswith("vision/") or p.startswith("vision/merger/")}


@pytest.mark.parametrize("changes", [{}, dict(lora_rank=2)], ids=["all", "LoRA"])
def test_a_step_is_compiled_once(changes, tmp_path, monkeypatch):
    """In a new run and in a resumed one."""
    steps, make = [], loop.make_step
    monkeypatch.setattr(loop, "make_step", lambda *args, **more: steps.append(make(*args, **more)) or steps[-1])
    for until in (3, 6):
        loop.train(model(), Batches(), options(tmp_path, steps=until, **changes))
    assert [step._cache_size() for step in steps] == [1, 1]


def test_a_loss_of_ones_own(straight, tmp_path):
    def doubled(config, params, batch, *, remat):
        total, weight, metrics = sft_loss(config, params, batch, remat=remat)
        return 2 * total, weight, metrics | {"half": total}

    loop.train(model(), Batches(), options(tmp_path, steps=1), loss=doubled)
    (line,) = exactly(tmp_path)
    plain = exactly(straight[0])[0]["loss"]
    assert line["loss"] == pytest.approx(2 * plain, rel=1e-6) and line["half"] == pytest.approx(plain, rel=1e-6)


def test_tensorboard_has_the_same(straight):
    (file,) = (straight[0] / run.BOARD).iterdir()
    assert file.read_bytes().count(b"grad_norm") == 12


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_bit_for_bit(straight, tmp_path, stop):
    before = signal.getsignal(stop)
    data = Batches({4: lambda _: os.kill(os.getpid(), stop)})
    first = loop.train(model(), data, options(tmp_path))
    assert (first.step, first.signal) == (4, stop)
    assert signal.getsignal(stop) is before
    assert saved(tmp_path) == [3, 4] and len(exactly(tmp_path)) == 4
    second = loop.train(model(), Batches(), options(tmp_path))
    assert (second.step, second.signal) == (12, None)
    assert exactly(tmp_path) == exactly(straight[0])
    assert equal(second.params, straight[1].params)


def test_a_second_interrupt_stops_at_once(tmp_path):
    def twice(_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop.train(model(), Batches({4: twice}), options(tmp_path))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_bad_record_costs_no_steps(tmp_path):
    def bad(_):
        raise InputError("x.jsonl:7: no such picture")

    with pytest.raises(InputError, match=r"x\.jsonl:7"):
        loop.train(model(), Batches({5: bad}), options(tmp_path))
    assert saved(tmp_path) == [3, 5]


def test_data_that_ends_too_early(tmp_path):
    def end(_):
        raise StopIteration

    with pytest.raises(InputError, match="ended after 5 steps of 12"):
        loop.train(model(), Batches({5: end}), options(tmp_path))


def test_a_step_that_is_not_finite_is_not_applied(straight, tmp_path):
    """Batches 4 and 5 of 14 are not finite; the other twelve train as if they were missing."""
    data = Batches({4: spoil, 5: spoil})
    result = loop.train(model(), data, options(tmp_path, steps=14))
    lines = exactly(tmp_path)
    assert [line["skipped_steps"] for line in lines] == [0] * 4 + [1] + [2] * 9
    assert lines[4]["loss"] is None and "NaN" not in (tmp_path / run.METRICS).read_text()
    plain = [line["loss"] for line in exactly(straight[0])]
    assert [line["loss"] for line in lines[:4] + lines[6:]] == plain
    assert equal(result.params, straight[1].params)


def test_too_many_steps_that_are_not_finite(tmp_path):
    """A checkpoint stores the count: steps 4 to 6 are not finite, and the run is stopped after 5."""
    data = Batches({3: spoil, 4: spoil, 5: lambda _: signal.raise_signal(signal.SIGTERM)})
    assert loop.train(model(), data, options(tmp_path, max_bad_steps=3)).step == 5
    with pytest.raises(InputError, match=rf"step 6: .* 2 steps before.*{run.CHECKPOINTS}/5"):
        loop.train(model(), Batches({5: spoil}), options(tmp_path, max_bad_steps=3))


@pytest.mark.parametrize("mode", ["max", "min"])
def test_latest_and_best_survive(tmp_path, mode):
    """Evaluated at steps 2, 4, … 12; the best is step 4 or 8."""
    scores = iter([0.2, 0.9, 0.5, 0.1, 0.6, 0.4])
    seen = {}

    def evaluate(params):
        seen[2 * len(seen) + 2] = jax.tree.map(np.array, params)
        return {"eval/score": next(scores), "other": 1}

    chosen = dict(eval_every=2, save_every=1, keep=2, best="score", best_mode=mode)
    result = loop.train(model(), Batches(), options(tmp_path, **chosen), evaluate=evaluate)
    best = 4 if mode == "max" else 8
    assert saved(tmp_path) == [best, 11, 12]
    assert result.step == best and equal(result.params, seen[best])
    evaluated = {line["step"]: line["eval/score"] for line in exactly(tmp_path) if "eval/score" in line}
    assert evaluated == {2: 0.2, 4: 0.9, 6: 0.5, 8: 0.1, 10: 0.6, 12: 0.4}


def test_best_needs_its_metric(tmp_path):
    with pytest.raises(InputError, match=r"'score'.* give eval_data"):
        loop.train(model(), Batches(), options(tmp_path, best="score"))
    chosen = options(tmp_path, best="score", eval_every=2)

    def evaluate(params):
        return {"exact": 0.5, "seconds": 0}

    with pytest.raises(InputError, match="'score'; the evaluation returns exact, seconds"):
        loop.train(model(), Batches(), chosen, evaluate=evaluate)
    assert saved(tmp_path) == [2]  # the steps before the failure are saved
    evaluate.names = ["exact", "seconds"]  # as an Evaluator has
    with pytest.raises(InputError, match="'score'; the evaluation returns exact, seconds"):
        loop.train(model(), Batches(), options(tmp_path / "other", best="score"), evaluate=evaluate)
    assert not (tmp_path / "other").exists()
    result = loop.train(model(), Batches(), options(tmp_path, best="exact", eval_every=2), evaluate=evaluate)
    assert len(exactly(tmp_path)) == 12 and result.signal is None


def test_an_evaluation_that_fails_costs_no_steps(straight, tmp_path):
    def evaluate(params):
        raise InputError("eval.jsonl:3: no such picture")

    with pytest.raises(InputError, match=r"eval\.jsonl:3"):
        loop.train(model(), Batches(), options(tmp_path, eval_every=5), evaluate=evaluate)
    assert saved(tmp_path) == [3, 5]
    loop.train(model(), Batches(), options(tmp_path, eval_every=5), evaluate=lambda params: {})
    assert [line["loss"] for line in exactly(tmp_path)] == [line["loss"] for line in exactly(straight[0])]


@pytest.mark.parametrize(("last", "step"), [(0.1, 6), (0.9, 12)])
def test_the_last_evaluation_is_made_up_for(tmp_path, last, step):
    """The final evaluation fails at first; repeated, it may be the best."""
    scores = iter([0.2])

    def evaluate(params):
        try:
            return {"score": next(scores)}
        except StopIteration:
            raise InputError("eval.jsonl:3: no such picture") from None

    chosen = options(tmp_path, eval_every=6, best="score")
    with pytest.raises(InputError, match=r"eval\.jsonl:3"):
        loop.train(model(), Batches(), chosen, evaluate=evaluate)
    result = loop.train(model(), Batches(), chosen, evaluate=lambda params: {"score": last})
    assert result.step == step
    assert [line.get("eval/score") for line in exactly(tmp_path)][5::6] == [0.2, last]


def test_a_signal_puts_off_all_evaluations_but_the_last(tmp_path):
    evaluated = []

    def stop(_):
        signal.raise_signal(signal.SIGTERM)

    more = dict(evaluate=lambda params: evaluated.append(1) or {})
    loop.train(model(), Batches({4: stop}), options(tmp_path, eval_every=4), **more)
    assert not evaluated
    assert loop.train(model(), Batches({11: stop}), options(tmp_path, eval_every=100), **more).step == 11
    assert not evaluated
    result = loop.train(model(), Batches(), options(tmp_path, eval_every=100), **more)
    assert result.step == 12 and len(evaluated) == 1


def test_another_run_is_refused(straight):
    with pytest.raises(InputError, match=r"options \(seed was 0 and is 1; learning_rate was 0\.01 and is 0\.02\);"):
        loop.train(model(), Batches(), options(straight[0], learning_rate=2e-2, seed=1, save_every=5))
    with pytest.raises(InputError, match=r"steps was 12 and is 13"):
        loop.train(model(), Batches(), options(straight[0], schedule="linear", steps=13))
    (straight[0] / run.OPTIONS).rename(straight[0] / "away")
    with pytest.raises(InputError, match=r"no train\.toml"):
        loop.train(model(), Batches(), options(straight[0]))
    (straight[0] / "away").rename(straight[0] / run.OPTIONS)


def test_a_constant_schedule_may_go_on_for_longer(straight, tmp_path):
    assert loop.train(model(), Batches(), options(tmp_path, steps=5)).step == 5
    assert loop.train(model(), Batches(), options(tmp_path, steps=12)).step == 12
    assert exactly(tmp_path) == exactly(straight[0])


def test_what_cannot_be_extended(tmp_path):
    """A schedule that falls has its end; so has a cooldown once it began."""
    loop.train(model(), Batches(), options(tmp_path, steps=2, schedule="cosine"))
    for more in (dict(steps=3), dict(steps=None, epochs=2)):
        with pytest.raises(InputError, match=r"a cosine schedule has its end; only constant can be extended"):
            run.Run(options(tmp_path, schedule="cosine", **more))
    with pytest.raises(InputError, match="schedule was cosine and is constant"):
        run.Run(options(tmp_path, steps=3))
    wsd = dict(schedule="constant", cooldown=4)
    before = options("x", steps=12, **wsd)
    after = before.replace(steps=20)
    assert after.differences(before, 8) == []
    assert after.differences(before, 9) == ["steps was 12 and is 20, but step 9 is past the start of a cooldown"]
    assert before.replace(steps=11).differences(before, 8)[0].endswith("step 8 is past the start of a cooldown")
    with pytest.raises(InputError, match="has made 2 steps; steps is 1"):
        (tmp_path / run.OPTIONS).write_text(options(tmp_path, steps=2).to_toml())
        run.Run(options(tmp_path, steps=1))


class Epochs(Batches):
    """`length` batches, `epochs` times; each stands for one record."""

    def __init__(self, epochs, events=None, *, length=3):
        super().__init__(events)
        self.epochs, self.length = epochs, length

    @property
    def epoch(self):
        return self.at / self.length

    def __next__(self):
        if self.at >= self.epochs * self.length:
            raise StopIteration
        return super().__next__()


def by_epochs(output, epochs, **changes):
    return options(output, **dict(steps=None, epochs=epochs, schedule="linear", warmup=1) | changes)


def test_epochs_end_as_their_steps_do(tmp_path):
    """Two epochs of three batches are six steps, at the same learning rates; also after a stop, and once ended."""
    loop.train(model(), Epochs(2), by_epochs(tmp_path / "steps", None, steps=6))
    stop = {2: lambda _: signal.raise_signal(signal.SIGTERM)}
    assert loop.train(model(), Epochs(2, stop), by_epochs(tmp_path / "epochs", 2)).step == 2
    for _ in range(2):
        result = loop.train(model(), Epochs(2), by_epochs(tmp_path / "epochs", 2), evaluate=lambda params: {"x": 1})
        assert (result.step, result.signal) == (6, None)
    steps, epochs = exactly(tmp_path / "steps"), exactly(tmp_path / "epochs")
    assert epochs[-1].pop("eval/x") == 1 and [line["epoch"] for line in epochs] == [i / 3 for i in range(1, 7)]
    rates = [line["learning_rate"] for line in epochs]
    np.testing.assert_allclose(rates, [line["learning_rate"] for line in steps], rtol=1e-6)
    assert rates[0] == 0 and rates[1] == 1e-2 > rates[5] > 0
    np.testing.assert_allclose([x["loss"] for x in epochs], [x["loss"] for x in steps], rtol=1e-5)
    with pytest.raises(InputError, match="epochs was 2 and is 3, but a linear schedule has its end"):
        loop.train(model(), Epochs(3), by_epochs(tmp_path / "epochs", 3))
    with pytest.raises(InputError, match=r"data must end after as many, as Dataset\(…, epochs=…\)"):
        loop.train(model(), Batches(), by_epochs(tmp_path / "epochs", 2))


class Streamed(Epochs):
    epoch = math.nan  # how far a stream is read is not known


@pytest.mark.parametrize("how", [{}, dict(schedule="constant", cooldown=2)])
def test_the_rate_of_a_stream_cannot_fall(tmp_path, how):
    with pytest.raises(InputError, match="epochs is 2, but a stream does not say how long it is"):
        loop.train(model(), Streamed(2), by_epochs(tmp_path, 2, **how))
    assert not list(tmp_path.iterdir())


def test_epochs_of_a_stream(tmp_path, capsys):
    """With a constant rate the run ends where the stream does, and may go on after it."""
    for epochs in (1, 2):
        result = loop.train(model(), Streamed(epochs), by_epochs(tmp_path, epochs, schedule="constant"))
        assert result.step == 3 * epochs
    with pytest.raises(InputError, match="the run has read its records 2 times; epochs is 1"):
        loop.train(model(), Streamed(1), by_epochs(tmp_path, 1, schedule="constant"))
    lines = exactly(tmp_path)
    assert not any("epoch" in line for line in lines)
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, *[1e-2] * 5])  # one step of warmup
    assert "step 6: loss" in capsys.readouterr().err


def test_the_last_step_of_an_epoch_may_be_smaller(tmp_path):
    """Five batches in steps of four; a constant rate may go on for more epochs."""
    constant = dict(schedule="constant", accumulate=4, warmup=0, save_every=1)
    for epochs in (1, 2):
        data = Epochs(epochs, length=5)
        assert loop.train(model(), data, by_epochs(tmp_path, epochs, **constant)).step == 2 * epochs
    with pytest.raises(InputError, match="the run has read its records 2 times; epochs is 1"):
        loop.train(model(), Epochs(1, length=5), by_epochs(tmp_path, 1, **constant))
    lines = exactly(tmp_path)
    assert [line["weight"] / lines[1]["weight"] for line in lines] == [4, 1, 4, 1]
    assert [line["tokens"] for line in lines] == [4 * ROWS * TOKENS, ROWS * TOKENS] * 2
    with pytest.raises(InputError, match="no record that can be used"):
        data.at, data.epochs = 5, 1
        loop.train(model(), data, by_epochs(tmp_path / "none", 1))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_rate_by_its_share_is_that_by_its_step(schedule):
    cooldown = 5 if schedule == "constant" else 0
    rate = make_schedule(2.0, schedule, warmup=4, total=20, cooldown=cooldown)
    for step in range(21):
        mine = learning_rate_at(2.0, schedule, step, 20, warmup=4, cooldown=cooldown)
        assert mine == pytest.approx(float(rate(step)), abs=1e-6)
    assert learning_rate_at(2.0, schedule, 9, math.inf, warmup=4, cooldown=cooldown) == 2.0


@pytest.mark.slow
def test_speed_is_that_of_steps_alone(tmp_path):
    """Evaluations sleep, and every step writes a checkpoint; every step but the first has its speed."""
    more = dict(save_every=1, eval_every=2, steps=5)
    loop.train(model(), Batches(), options(tmp_path, **more), evaluate=lambda params: time.sleep(2) or {})
    lines = run.read_metrics(tmp_path)
    assert ["tokens_per_second" in line for line in lines] == [False] + [True] * 4
    assert all(line["tokens"] / line["tokens_per_second"] < 2 for line in lines[1:])


def test_lines_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    loop.train(model(), Batches(), options(tmp_path / "a", steps=5))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1/5", "step 5/5"]  # ten seconds apart, and the last one
    assert "loss" in lines[0] and "tokens/s" in lines[1]
    monkeypatch.setattr(progress, "PERIOD", 0)
    loop.train(model(), Epochs(1, length=5), by_epochs(tmp_path / "b", 1, log_every=2))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[:2] for line in lines] == [
        [f"step {i}: loss {x['loss']:.4f}", f" epoch {i / 5:.2f}/1"]
        for i, x in ((x["step"], x) for x in run.read_metrics(tmp_path / "b"))
    ]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    loop.train(model(), Batches(), options(tmp_path / "c", steps=2))
    assert "\r" in (err := capsys.readouterr().err) and "step 1/2" not in err


def test_a_start_that_fails_leaves_nothing(tmp_path):
    def bad(_):
        raise InputError("x.jsonl:1: no such picture")

    (tmp_path / "there").mkdir()
    for output in (tmp_path / "there", tmp_path / "new"):
        with pytest.raises(InputError, match="rows is 1; it must be a multiple"):
            loop.train(model(), Batches(), options(output, rows=1, mesh_data=3))
        with pytest.raises(InputError, match="nothing is trainable"):
            loop.train(model(), Batches(), options(output, freeze=("llm", "vision", "merger")))
        with pytest.raises(InputError, match=r"x\.jsonl:1"):
            loop.train(model(), Batches({0: bad}), options(output))
        with run.Run(options(output)), pytest.raises(InputError, match="another process"):
            run.Run(options(output))
    assert list(tmp_path.iterdir()) == [tmp_path / "there"] and not list((tmp_path / "there").iterdir())


def test_options_of_a_run_that_saved_nothing_do_not_bind(tmp_path):
    with run.Run(options(tmp_path)) as r:
        r.begin()
    with run.Run(options(tmp_path, steps=5)) as r:
        r.begin()
        assert TrainOptions.read(tmp_path / run.OPTIONS).steps == 5


def test_one_process_at_a_time(tmp_path):
    with run.Run(options(tmp_path)), pytest.raises(InputError, match="another process"):
        run.Run(options(tmp_path))


def test_output_must_be_a_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        run.Run(options(tmp_path / "file"))
    with pytest.raises(InputError, match="output"):
        run.Run(TrainOptions())


def test_a_damaged_checkpoint_is_named(tmp_path):
    loop.train(model(), Batches(), options(tmp_path, steps=1))
    for file in (tmp_path / run.CHECKPOINTS / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match=f"{run.CHECKPOINTS}/1"):
        loop.train(model(), Batches(), options(tmp_path, steps=1))


@pytest.mark.parametrize(
    "changes, count",
    [
        (dict(steps=12, save_every=3, keep=2), 3),  # the next one is complete before the oldest is deleted
        (dict(steps=12, save_every=3, keep=10**9), 4),
        (dict(steps=12, save_every=3, keep=2, best="x"), 4),
        (dict(steps=2, save_every=3), 1),
        (dict(steps=2**30, save_every=1, keep=5), 6),
        (dict(steps=None, epochs=2, keep=2), 3),
    ],
)
def test_a_disk_without_space_is_found_before_the_first_step(tmp_path, monkeypatch, changes, count):
    state = {"x": np.zeros(25 * 10**6, np.float32)}  # 0.1 GB
    need = count * 10**8 + 3 * 10**8 + run.stores.MARGIN
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(run.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with run.Run(options(tmp_path / "run", **changes), 3 * 10**8) as r:
            if fits:
                r.begin(state)
                continue
            with pytest.raises(InputError) as e:
                r.begin(state)
            assert f"no space for the run: {count} checkpoints of 0.10 GB and the result of 0.30 GB" in str(e.value)


def test_a_resumed_run_needs_space_for_what_is_new(tmp_path, monkeypatch):
    loop.train(model(), Batches(), options(tmp_path, steps=6))
    usage = SimpleNamespace(free=run.stores.MARGIN)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage)
    assert loop.train(model(), Batches(), options(tmp_path, steps=6)).step == 6  # it writes nothing more
    batches = Batches()
    with pytest.raises(InputError, match=r"1 checkpoints of 0.00 GB are to be written, and 0.07 GB are free"):
        loop.train(model(), batches, options(tmp_path, steps=12))
    assert saved(tmp_path) == [3, 6] and batches.at == 7
    usage.free *= 2
    assert loop.train(model(), Batches(), options(tmp_path, steps=12)).step == 12


def test_a_full_disk_is_named(tmp_path):
    """Files are limited to 20 kB; the state is larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(InputError, match="the disk is full"), run.Run(options(tmp_path)) as r:
        r.save(1, {"x": jax.numpy.arange(100_000)}, {}, None)
        r.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            r.save(2, {"x": jax.numpy.arange(100_000)}, {}, None)
            r.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved(tmp_path) == [1]


def test_lines_after_the_checkpoint_go(tmp_path):
    """Incomplete and foreign lines are dropped too."""
    file = tmp_path / run.METRICS
    lines = [json.dumps({"step": s}) + "\n" for s in (1, 2, 3, 4)]
    file.write_text("".join(lines) + "null\n" + '{"step": 2')
    with run.Run(options(tmp_path)) as r:
        assert file.read_text().count("\n") == 5  # reading changes nothing
        r.begin()
        assert file.read_text() == ""
        r.log(1, {"loss": 1.0})
        r.save(1, {"x": jax.numpy.ones(3)}, {}, None)
        r.log(2, {"loss": math.inf})
    with open(file, "a") as f:
        f.write('{"step": 3, "lo')
    with run.Run(options(tmp_path)) as r:
        r.begin()
        r.log(2, {"loss": 0.25})
    assert file.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.25}\n'


def test_implicit_transfers_are_caught(tmp_path, monkeypatch):
    """A batch on the host would be sent implicitly at every step, while the device waits."""
    monkeypatch.setattr(loop, "_place", lambda batch, mesh: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.train(model(), Batches(), options(tmp_path))


@pytest.mark.slow
def test_preferences_with_lora(tmp_path):
    """The policy starts as the reference, so the first loss is log 2; the base weights do not change."""
    chosen = dict(task="dpo", segments=2, lora_rank=2, lora_alpha=4.0, lora_dropout=0.1, freeze=(), accumulate=2)
    result = loop.train(model(), Batches(segments=2), options(tmp_path, **chosen))
    lines = exactly(tmp_path)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["weight"] == 2 * ROWS and lines[0]["tokens"] == 2 * ROWS * TOKENS
    assert lines[-1]["loss"] < 0.5 and lines[-1]["accuracy"] > lines[0]["accuracy"]
    assert equal(lora.strip(result.params), tiny_params(CONFIG))
    assert not equal(lora.split(result.params)[1], lora.split(_fresh(chosen))[1])
    again = loop.train(model(), Batches(segments=2), options(tmp_path, **chosen))  # already finished
    assert equal(again.params, result.params)


def _fresh(chosen):
    return lora.add(CONFIG, tiny_params(CONFIG), jax.random.key(0), rank=chosen["lora_rank"], alpha=4.0)


def child(output, steps, save_every, pause, data, fsdp, port, rank) -> None:
    """The program of the processes below: prints the result, and a digest of the final weights."""
    if int(port):
        jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
    wait = {i: lambda _: time.sleep(float(pause)) for i in range(int(steps))}
    chosen = options(output, steps=int(steps), save_every=int(save_every), mesh_data=int(data), mesh_fsdp=int(fsdp))
    result = loop.train(model(), Batches(wait, period=10**6), chosen, donate=True)
    held = [w.addressable_data(0) for w in jax.tree.leaves(result.params)]
    digest = hashlib.sha256(b"".join(np.asarray(w).tobytes() for w in held))
    print(result.step, result.signal or 0, digest.hexdigest())


def start(output, steps, save_every=2, pause=0.0, mesh=(1, 1), port=0, rank=0) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    # Without tensorboardX the processes start faster.
    code = "import sys; sys.modules['tensorboardX'] = None; sys.path.insert(0, sys.argv.pop(1))"
    code += "; import test_loop; test_loop.child(*sys.argv[1:])"
    argv = [sys.executable, "-c", code, str(Path(__file__).parent)]
    argv += map(str, (output, steps, save_every, pause, *mesh, port, rank))
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)


def finish(process) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return out.splitlines()[-1]


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    """A run killed at random moments ends with the losses and weights of an uninterrupted one, which saves once."""
    steps = 90
    expected = finish(start(tmp_path / "straight", steps, save_every=steps))
    dice, output, kills = random.Random(0), tmp_path / "killed", 0
    metrics = output / run.METRICS
    reader = ocp.StandardCheckpointer()
    for _ in range(10):
        before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        process, more = start(output, steps, pause=0.02), dice.randrange(1, 6)
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > before + more):
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.06))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        for step in saved(output):
            reader.restore(output / run.CHECKPOINTS / str(step) / "state")
    assert kills == 10
    assert finish(start(output, steps)) == expected
    assert exactly(output) == exactly(tmp_path / "straight") and len(exactly(output)) == steps
    assert {p.name for p in (output / run.CHECKPOINTS).iterdir()} == {str(steps - 2), str(steps)}


@pytest.mark.slow
def test_on_a_mesh(tmp_path):
    """Four devices, data × fsdp, give the losses of one device, and resume its checkpoint."""

    def losses(name, **mesh):
        chosen = options(tmp_path / name, steps=6, save_every=2, **mesh)
        loop.train(model(), Batches(period=10**6), chosen, donate=True)
        return [line["loss"] for line in exactly(tmp_path / name)]

    one, four = losses("one"), losses("four", mesh_data=2, mesh_fsdp=2)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / run.CHECKPOINTS / "6")
    moved = losses("moved", mesh_data=2, mesh_fsdp=2)
    np.testing.assert_allclose(four, one, rtol=1e-5)
    np.testing.assert_allclose(moved, one, rtol=1e-5)
    assert moved[:4] == one[:4]


@pytest.mark.slow
def test_two_processes(tmp_path):
    """SIGTERM to one process stops both after the same step; resumed, they lose nothing."""
    steps, output = 24, tmp_path / "two"

    def both(pause):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        return [start(output, steps, 2, pause, (2, 1), port, rank) for rank in range(2)]

    first = both(0.1)
    while not (output / run.METRICS).exists() and first[1].poll() is None:
        time.sleep(0.02)
    first[1].send_signal(signal.SIGTERM)
    ends = [finish(process).split()[:2] for process in first]
    stopped = int(ends[0][0])
    assert ends == [[str(stopped), str(int(signal.SIGTERM))]] * 2 and 0 < stopped < steps
    assert max(saved(output)) == stopped == len(exactly(output))
    assert [finish(process).split()[:2] for process in both(0)] == [[str(steps), "0"]] * 2
    finish(start(tmp_path / "one", steps, save_every=steps))
    one, two = ([line["loss"] for line in exactly(tmp_path / name)] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_flops_follow_the_parameters():
    """Six FLOPs per weight and token, as in PaLM; two for a frozen tower; four with LoRA."""
    matrices = {p: math.prod(w.shape) for p, w in flatten(abstract_params(CONFIG)).items() if p.endswith("kernel")}
    decoder = sum(n for p, n in matrices.items() if p.startswith("decoder/"))
    merger = sum(n for p, n in matrices.items() if p.startswith("vision/merger/"))
    tower = sum(n for p, n in matrices.items() if p.startswith("vision/")) - merger
    attention = 12 * ROWS * TOKENS**2 * CONFIG.text.num_attention_heads * CONFIG.text.head_dim
    look = 4 * LANES * PATCHES**2 * CONFIG.vision.hidden_size
    text, slots = ROWS * TOKENS * decoder, LANES * PATCHES
    cells = slots // CONFIG.vision.merge_unit
    shape = (CONFIG, ROWS, TOKENS, LANES, PATCHES)
    assert train_flops(*shape) == 6 * (text + slots * tower + cells * merger) + attention + 3 * look
    frozen = train_flops(*shape, trains={"llm"})
    assert frozen == 6 * text + 2 * (slots * tower + cells * merger) + attention + look
    adapters = train_flops(*shape, trains={"llm"}, weights=False)
    assert adapters == 4 * text + 2 * (slots * tower + cells * merger) + attention + look


def test_peaks():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5 lite") < peak_flops("NVIDIA A100-SXM4-80GB") < peak_flops("TPU v5p")
    assert peak_flops("cpu") is None
