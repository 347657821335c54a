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

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import tiny_config, tiny_params

from qwenvl_jax.errors import InputError
from qwenvl_jax.params import lora
from qwenvl_jax.params.specs import abstract_params, flatten
from qwenvl_jax.train import loop, run
from qwenvl_jax.train.flops import peak_flops, train_flops
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.options import TrainOptions
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
