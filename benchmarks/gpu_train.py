"""Trains the demo from the checkpoint in the package for a given time, and scores it before and after.

    python benchmarks/gpu_train.py FOLDER --output FILE --seconds 150 [--assets DIR]

All cores but one draw records. A trial measures the speed and so sets the number of steps; the learning rate reaches
zero when the time is over. The result is FOLDER/demo.safetensors, in the format of the package's checkpoint, and
FOLDER/demo-metrics.jsonl, with one line per step.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))  # for `demo`
from demo.assets import Assets, assets_of


def draw(assets: Assets, files: Path, shape, seed: int, folder: Path, ready, free) -> None:
    """A process that writes endless batches to files and queues their names, as many as `free` allows."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from demo.render import Scenes
    from demo.train import TURNS, Lessons, demo_config

    from qwenvl_jax.inputs.processor import Processor

    # As in the run that made the checkpoint (see its model card).
    weights = {"ocr": 0.3, "list": 0.02, "name": 0.02, "locate": 0.18, "count": 0.2, "chart": 0.12, "clip": 0.16}
    scenes = Scenes(assets, seed=seed, turns=TURNS, shuffled=True, easy=0.1, weights=weights)
    lessons, number = Lessons(scenes, Processor.from_dir(files, demo_config()), shape), 0
    while True:
        free.acquire()
        file = folder / f"{seed}-{number}"
        file.write_bytes(pickle.dumps(next(lessons), 5))
        ready.put(str(file))
        number += 1


class Drawn:
    """An iterator for `train`: batches in the order in which the processes finish them."""

    def __init__(self, assets: Assets, files: Path, shape, folder: Path, workers: int, most: int):
        context = multiprocessing.get_context("spawn")  # a forked process would lack jax's threads
        self.ready, self.free = context.Queue(), context.Semaphore(most)
        self.start, self.times = time.monotonic(), []
        each = (assets, files, shape)
        rest = (folder, self.ready, self.free)
        seeds = range(1000, 1000 + workers)
        self.workers = [context.Process(target=draw, args=(*each, seed, *rest), daemon=True) for seed in seeds]
        for worker in self.workers:
            worker.start()

    def __next__(self):
        file = Path(self.ready.get(timeout=60))
        batch = pickle.loads(file.read_bytes())
        file.unlink()
        self.free.release()
        self.times.append(time.monotonic())
        return batch

    def steps(self, seconds: float) -> int:
        """How many more batches can be drawn and trained on in this time."""
        drawn = len(self.times) + self.ready.qsize()
        rate = drawn / (time.monotonic() - self.start)  # a bit too low: includes the start of the processes
        late = self.times[len(self.times) // 2 :]
        pace = (len(late) - 1) / (late[-1] - late[0])
        return int(0.9 * min(self.ready.qsize() + rate * seconds, pace * seconds))

    def get_state(self) -> dict:
        return {}

    def set_state(self, state: dict) -> None:
        """Nothing to restore: every batch is new."""

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()


def train_for(args, model, data: Drawn, options, begun: float):
    """The result of `train` after as many steps as fit; a trial measures how many."""
    from demo.train import demo_loss

    from qwenvl_jax.train.loop import train

    result = train(model, data, options.replace(steps=args.trial), loss=demo_loss)
    left = args.seconds - args.reserve - (time.monotonic() - begun)
    steps = min(args.trial + data.steps(left), args.most)
    if steps < 2 * args.warmup or steps <= args.trial:
        return result
    timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGTERM))  # ends the run after the current step
    timer.start()
    # A run can be extended only before its cooldown.
    cooldown = min(int(0.8 * (steps - args.warmup)), steps - args.trial)
    options = options.replace(steps=steps, cooldown=cooldown)
    result = train(model, data, options, loss=demo_loss)
    timer.cancel()
    return result


def run(args, assets: Assets, work: Path) -> None:
    from demo.score import LONGEST, questions
    from demo.train import demo_options
    from qwenvl_convert.orbax import to_hf

    import qwenvl_jax
    from qwenvl_jax.eval.evaluator import Evaluator
    from qwenvl_jax.inputs.ladder import Ladder
    from qwenvl_jax.params.checkpoint import find, save
    from qwenvl_jax.train.records import PackShape

    begun, files = time.monotonic(), find("demo")
    more = dict(rows=args.rows, lanes=-(-args.rows * 6 // 5), warmup=args.warmup, save_every=10**6, best=None)
    options = demo_options(work / "run", learning_rate=1e-3, vision_learning_rate=6e-4, **more)
    shape = PackShape(options.rows, options.tokens, options.lanes, options.patches)
    batches = work / "batches"
    batches.mkdir()
    most = int(min(4000, shutil.disk_usage(batches).free / 2 / (400_000 * args.rows)))
    data = Drawn(assets, files, shape, batches, args.workers, most)

    def tell(**facts) -> None:
        facts |= {"seconds": time.monotonic() - begun}
        print(facts, flush=True)
        with args.output.open("a") as file:
            file.write(json.dumps({"benchmark": "the demo's training", **facts}) + "\n")

    try:
        model = qwenvl_jax.load("demo", dtype="float32", progress=False)
        ladder = Ladder(rows=(args.batch,), tokens=(192, 320), patches=(256, 1024), short=(), lanes=16)
        engine = qwenvl_jax.Engine(model, max_batch=args.batch, max_length=320, ladder=ladder)
        evaluate = Evaluator(engine, questions(assets, args.questions), max_new_tokens=LONGEST)
        tell(when="before", step=0, scores=evaluate(model.params))
        result = train_for(args, model, data, options, begun)
        lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = [line["cross_entropy"] for line in lines]
        tenth = max(1, len(losses) // 10)
        spent = data.times[-1] - data.times[0]
        tell(
            when="training",
            step=result.step,
            rows=args.rows,
            workers=args.workers,
            steps_per_second=len(data.times) / spent,
            cross_entropy=[sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth],
            mfu=lines[-1].get("mfu"),
        )
        data.close()
        save(model._replace(params=result.params), work / "final", files_from=files)
        to_hf(work / "final", work / "hf", progress=False)
        shutil.copyfile(work / "hf" / "model.safetensors", args.folder / "demo.safetensors")
        shutil.copyfile(work / "run" / "metrics.jsonl", args.folder / "demo-metrics.jsonl")
        tell(when="after", step=result.step, scores=evaluate(result.params))
    finally:
        data.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="file to which results are appended as JSON lines")
    parser.add_argument("--assets", help="where fonts, emoji and tables are; see notebooks/demo/assets.py")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--rows", type=int, default=40, help="rows of a batch, about two conversations each")
    parser.add_argument("--trial", type=int, default=20, help="steps of the trial that measures the speed")
    parser.add_argument("--most", type=int, default=10**6, help="most steps")
    parser.add_argument("--warmup", type=int, default=40, help="steps of warmup")
    parser.add_argument("--reserve", type=float, default=30, help="seconds for scoring and saving at the end")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that draw records"
    )
    parser.add_argument("--questions", type=int, default=64, help="questions per task")
    parser.add_argument("--batch", type=int, default=64, help="questions answered together")
    args = parser.parse_args()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # for each process
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as work:
        run(args, assets_of(parser, args.assets), Path(work))


if __name__ == "__main__":
    main()
