"""Speed of decode, prefill, the vision tower and a LoRA step, compared with the machine's limits and with transformers.

Both sides have the same random weights, on a CPU from one checkpoint directory. transformers (4.51.3 or 5, SDPA) runs
in turns with this package on the same device. Figures are medians over rounds. On a CPU, transformers runs a 16-bit
checkpoint in bfloat16 and in float32, and the faster one counts. If both sides compute in float32, the first tokens
must agree.

- decode: tokens after the first one of a short prompt, greedy, `--rows` together. Share: of the rate at which the
  machine reads memory. Each token reads the weights and the filled slots of the caches.
- prefill: `--tokens` tokens to the first token. Share: of the rate of a large matmul. Counted are the matmuls with
  weights, and half of attention, since it is causal.
- vision: the vision tower over one picture of `--patches` patches. Share: as in prefill; a window counts its 64 slots.
- picture: from an image to the first token, with preprocessing.
- lora: a training step of rank 16 on a row of `--lora` tokens, with remat. Share: MFU, by `train_flops`, which counts
  all of attention and no recomputation. It has no peer; see training.py.

    python benchmarks/model.py
    python benchmarks/model.py --family qwen2_vl --jobs vision --patches 4096 16384
    python benchmarks/model.py --size qwen2-vl-2b --jobs decode --new 16
    python benchmarks/model.py --platform gpu --size qwen2.5-vl-7b --rows 1 32 --tokens 8192 --patches 16384
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from common import FAMILIES, SMALL, Report, config_of, write_checkpoint
from sides import PROMPT, Failed, Side

from qwenvl_jax.config import Config
from qwenvl_jax.families import PRESETS
from qwenvl_jax.params.specs import abstract_params, count_params, flatten
from qwenvl_jax.train.flops import train_flops

JOBS = ("decode", "prefill", "vision", "picture", "lora")
GRACE = 20  # seconds for a side to report that it was not ready in time
ALONE = ("here", "machine")  # the sides of jobs without a peer
CEILINGS = {"decode": "read", "prefill": "product", "vision": "product", "lora": "product"}
UNITS = {"read": "B", "product": "FLOP"}


def sizes(config: Config, prefix: str, suffix: str = "") -> int:
    """Weights below `prefix` whose names end in `suffix`."""
    leaves = flatten(abstract_params(config)).items()
    return sum(a.size for path, a in leaves if path.startswith(prefix) and path.endswith(suffix))


def decode_bytes(config: Config, held: str, rows: int, new: int) -> float:
    """Bytes read per decode step, averaged over the answer. The weights have the dtype `held`."""
    t = config.text
    unread = 0 if t.tie_word_embeddings else t.vocab_size * t.hidden_size
    slots = rows * (PROMPT + new / 2) * 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim
    weights = sizes(config, "decoder") - unread
    return jnp.dtype(held).itemsize * weights + jnp.dtype(config.dtype).itemsize * slots


def prefill_flops(config: Config, tokens: int) -> float:
    t = config.text
    attention = 2 * t.num_hidden_layers * t.num_attention_heads * t.head_dim * tokens**2
    return 2 * tokens * sizes(config, "decoder/layers", "kernel") + attention + 2 * t.hidden_size * t.vocab_size


def vision_flops(config: Config, patches: int) -> float:
    v = config.vision
    spans = sum(patches if v.is_full_attention(i) else v.block_slots for i in range(v.depth))
    merger = sizes(config, "vision/merger", "kernel")
    each = sizes(config, "vision", "kernel") - merger + merger / v.merge_unit + 2 * v.hidden_size * spans
    return 2 * patches * each


class Work(NamedTuple):
    """A job: its name in a table, the unit, the amount of work, and the work that is compared with a ceiling."""

    name: str
    unit: str
    count: int
    least: float = 0


def work(config: Config, held: str, job: str, n: int, new: int = 0) -> Work:
    """The work of a job. config: with the compute dtype. held: the dtype of the weights."""
    if job == "decode":
        least = new * decode_bytes(config, held, n, new)
        return Work(f"decode, {n} rows" if n > 1 else "decode", "tokens/s", n * new, least)
    if job == "prefill":
        return Work(f"prefill, {n} tokens", "tokens/s", n, prefill_flops(config, n))
    if job == "vision":
        return Work(f"vision tower, {n} patches", "patches/s", n, vision_flops(config, n))
    if job == "lora":
        flops = train_flops(config, 1, n, 0, 0, trains={"llm"}, weights=False)
        return Work(f"LoRA step, {n} tokens", "tokens/s", n, flops)
    return Work(f"picture of {n} patches to first token", "ms", 1)


class Turns:
    """Runs jobs on all sides, round by round, until the time is over.

    start: {name: function that starts the side}. answers: {(job, side): [(seconds or rate, first token), …]}, one per
    round. errors: {(job, side): message}. facts: what each side reports about itself.
    """

    def __init__(self, start: dict, rounds: int, seconds: float | None):
        self.start, self.rounds = start, rounds
        self.end = None if seconds is None else time.monotonic() + seconds
        self.answers, self.errors, self.facts = defaultdict(list), {}, {}

    def left(self) -> float | None:
        return None if self.end is None else self.end - time.monotonic()

    def ask(self, side: Side, job: tuple, again: bool = False) -> None:
        call = job
        if side.name == "machine":
            call = (CEILINGS.get(job[0]),)
        if call[0] is None or (job, side.name) in self.errors or (job[0] == "lora" and side.name not in ALONE):
            return
        try:
            if again:  # warm up: the first call compiles
                side(*call, seconds=self.left())
            self.answers[job, side.name].append(side(*call, seconds=self.left()))
        except Failed as e:
            self.errors[job, side.name] = str(e)

    def together(self, jobs: list[tuple], warm: float | None):
        """All sides are in memory from the first job to the last; yields each finished job.

        warm: seconds in which all sides prepare all jobs at the same time.
        """
        with ExitStack() as stack:
            sides = [stack.enter_context(begin()) for begin in self.start.values()]
            if warm:
                self.warm([side for side in sides if side.name != "machine"], jobs, warm)
            for job in jobs:
                for n in range(self.rounds):
                    for side in sides:
                        self.ask(side, job, again=n == 0)
                for side in sides:
                    with suppress(Failed):
                        self.facts[side.name] = side("facts", seconds=10)
                yield job

    def warm(self, sides: list[Side], jobs: list[tuple], seconds: float) -> None:
        until = time.time() + seconds
        own = {side: [job for job in jobs if job[0] != "lora" or side.name in ALONE] for side in sides}
        for side in sides:
            side.send("warm", own[side], until)
        for side in sides:
            try:
                messages = side.receive(until + GRACE - time.time())
            except Failed as e:
                messages = [str(e)] * len(own[side])
            self.errors |= {(job, side.name): error for job, error in zip(own[side], messages, strict=True) if error}

    def apart(self, jobs: list[tuple]):
        """One side in memory at a time; each is started anew in every round."""
        for _ in range(self.rounds):
            for begin in self.start.values():
                with begin() as side:
                    for job in jobs:
                        self.ask(side, job, again=True)
                    self.facts[side.name] = side("facts")
        yield from jobs


def peers(config: Config, args) -> list[str]:
    """The dtypes in which transformers runs."""
    if args.alone or args.platform == "tpu" or not (find_spec("torch") and find_spec("transformers")):
        return []
    return list(dict.fromkeys(["float32", config.dtype])) if args.platform == "cpu" else [config.dtype]


def fits(config: Config, dtypes: list[str]) -> bool:
    """Whether a CPU has memory for all sides together. This package may compute in float32."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    each = [count_params(config) * jnp.dtype(dtype).itemsize + 2**30 for dtype in ("float32", *dtypes)]
    return sum(each) + 3 * 2**30 < free


def buckets(config: Config, args) -> list[int]:
    """The buckets of tokens that the jobs need, rising; few buckets compile faster."""
    picture = args.picture // config.vision.merge_unit + 10
    needed = {picture, max(args.patches) // config.vision.merge_unit + 10, *args.tokens, PROMPT + 1 + args.new}
    if not args.random:  # the default ladder
        return [max(needed) + 1]
    needed = {-(-n // 128) * 128 for n in needed - {max(args.patches) // config.vision.merge_unit + 10}}
    return [PROMPT, *sorted(needed), max(needed) + 128]


def measure(args, folder: str) -> list:
    """Prints the line of each finished job; returns the error messages."""
    config = config_of(args.size, args.family)
    config = config.replace(dtype=args.dtype or (config.dtype if args.platform == "cpu" else "bfloat16"))
    device = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}[args.platform]
    # On a CPU, both sides read a checkpoint. For accelerators, that would take most of the time.
    directory = None if args.random else str(write_checkpoint(Path(folder) / "model", config))
    settings = dict(size=args.size, family=config.family, directory=directory)
    ours = dict(settings, dtype=config.dtype, buckets=buckets(config, args), rows=max(args.rows))
    ceilings = dict(device=device, dtype=config.dtype, small=args.small)
    start = {"machine": lambda: Side("machine", args.platform, **ceilings)}
    start["here"] = lambda: Side("here", args.platform, **ours)
    dtypes = peers(config, args)
    for dtype in dtypes:
        name, theirs = f"transformers {dtype}", dict(settings, dtype=dtype, device=device)
        start[name] = lambda name=name, theirs=theirs: Side(name, args.platform, **theirs)

    each = {"decode": [(n, args.new) for n in args.rows], "prefill": args.tokens, "vision": args.patches}
    each |= {"picture": [args.picture], "lora": [args.lora or args.tokens[0]]}
    jobs = [(job, *(n if isinstance(n, tuple) else (n,))) for job in JOBS if job in args.jobs for n in each[job]]
    turns, report = Turns(start, args.rounds, args.seconds), None
    one_by_one = args.apart or (args.platform == "cpu" and not fits(config, dtypes))
    rates = defaultdict(list)
    for job in turns.apart(jobs) if one_by_one else turns.together(jobs, args.warm if args.random else None):
        here = turns.facts.get("here", {})
        config = config.replace(dtype=here.get("dtype", config.dtype))
        held = here.get("weights", config.dtype)
        if report is None:
            title = f"{args.size}, {config.family}: {count_params(config) / 1e6:.0f} M parameters in {held}"
            title += f", computed in {config.dtype}" if held != config.dtype else ""
            about = dict(benchmark="model", size=args.size, family=config.family, device=here.get("device"))
            report = Report(title, args.output, **about)
        if not args.random:
            compare(job, turns)
        add_row(report, work(config, held, *job), job, turns, rates)
    middle = {name: statistics.median(each) for name, each in rates.items()}
    report.note(
        "ceilings: " + ", ".join(f"{name} {rate / 1e9:.1f} G{UNITS[name]}/s" for name, rate in middle.items()),
        ceilings=middle,
    )
    peaks = {name: fact["peak"] for name, fact in turns.facts.items()}
    report.note("peak memory: " + ", ".join(f"{n} {peak / 1e9:.1f} GB" for n, peak in peaks.items()), memory=peaks)
    return list(turns.errors.values())


def compare(job: tuple, turns: Turns) -> None:
    """If the sides compute in float32, their first tokens must be the same; otherwise an error is recorded."""
    exact = [name for name, fact in turns.facts.items() if fact.get("dtype") == "float32"]
    firsts = {name: turns.answers[job, name][0][1] for name in exact if turns.answers[job, name]}
    if len(set(firsts.values())) > 1:
        turns.errors[job, "all"] = f"the first tokens differ: {firsts}"


def add_row(report: Report, w: Work, job: tuple, turns: Turns, ceilings: dict) -> None:
    """Adds the row of one job, or a note for each side that failed."""
    for (failed, name), error in turns.errors.items():
        if failed == job:
            report.note(f"{w.name}, {name}: {error}", job=w.name, side=name, error=error)
    seconds = {name: [value for value, _ in turns.answers[job, name]] for name in turns.start}
    machine, mine = seconds.pop("machine"), seconds.pop("here")
    if not mine:
        return
    share = None
    if machine:
        share = w.least / statistics.median(mine) / statistics.median(machine)
        ceilings[CEILINGS[job[0]]] += machine
    whole = {name: each for name, each in seconds.items() if len(each) == len(mine)}
    report.add(w.name, w.unit, w.count, mine, whole, share)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=(*SMALL, *PRESETS), default="50M")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl", help="family of 50M")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="rows decoded together")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024], help="prompt lengths of prefill")
    parser.add_argument("--patches", nargs="+", type=int, default=[4096], help="patches of the picture of vision")
    parser.add_argument("--picture", type=int, default=1024, help="patches of the picture of the job picture")
    parser.add_argument("--lora", type=int, help="tokens of the training step (default: those of the prompt)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (default: the model's)")
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="cpu")
    parser.add_argument("--random", action="store_true", help="make the weights on the device (always on accelerators)")
    parser.add_argument("--small", action="store_true", help="measure the ceilings on small arrays, for a rehearsal")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--apart", action="store_true", help="one side in memory at a time")
    parser.add_argument("--seconds", type=float, help="seconds for all jobs; jobs beyond that are skipped")
    parser.add_argument("--warm", type=float, default=600, help="seconds to compile in, with random weights")
    parser.add_argument("--output", help="file to which results are appended as JSON lines")
    args = parser.parse_args(arguments)
    args.random |= args.platform != "cpu"
    return args


def main() -> None:
    args = parse()
    jax.config.update("jax_platforms", "cpu")  # this process computes nothing
    with tempfile.TemporaryDirectory() as folder:
        errors = measure(args, folder)
    if errors:
        raise SystemExit("\n".join(errors))


if __name__ == "__main__":
    main()
