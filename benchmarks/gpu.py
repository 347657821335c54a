"""Runs the stages of `gpu.sh`, the most valuable first, each in its own process, until the time is over.

If a stage hangs, crashes or takes too long, the next one still runs. Each result is appended to FOLDER/results.jsonl at
once; the output of the stages is in FOLDER/log.txt.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "numpy")


class Stage(NamedTuple):
    """most: seconds after which it is killed. least: seconds that must be left to start it."""

    name: str
    command: list[str]
    most: float
    least: float


def stages(args, results: Path, expected: Path) -> list[Stage]:
    """The stages, the most valuable first. {seconds}, the time that a stage may take, is filled in at its start."""
    out = ["--output", str(results)]
    checks = ["gpu_checks.py", str(results), "--expected", str(expected)]
    train = ["gpu_train.py", str(args.folder), *out, "--seconds", "{seconds}"]
    train += ["--assets", str(args.assets)] if args.assets else []
    model = ["model.py", *out, "--random", "--platform", args.platform, "--seconds", "{seconds}"]
    if args.rehearse:
        small = "--small --size demo --new 4 --tokens 128 --patches 64 --picture 64 --lora 128 --rounds 1".split()
        train += "--rows 4 --workers 1 --questions 1 --batch 8 --trial 4 --warmup 1 --most 8 --reserve 5".split()
        return [
            Stage("ceilings", ["gpu_ceilings.py", *out, "--platform", "cpu", "--small"], 60, 5),
            Stage("checks", [*checks, "--small"], 150, 5),
            Stage("3B", [*model, *small, "--rows", "1", "2"], 120, 5),
            Stage("7B", [*model, *small, "--jobs", "decode"], 120, 5),
            Stage("training", train, 300, 40),
        ]
    large = "--rows 1 32 --new 64 --tokens 8192 --patches 16384 --picture 3844 --lora 8192 --warm {warm}".split()
    without_lora = "--jobs decode prefill vision picture".split()
    return [
        Stage("ceilings", ["gpu_ceilings.py", *out, "--platform", "gpu"], 60, 10),
        Stage("checks", checks, 120, 20),
        Stage("3B", [*model, *large, "--size", "qwen2.5-vl-3b"], 170, 50),
        Stage("7B", [*model, *large, "--size", "qwen2.5-vl-7b", *without_lora], 150, 50),
        Stage("training", train, 600, 70),
    ]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run(stage: Stage, seconds: float, log) -> tuple[str, str]:
    """("ok", "failed" or "timed out", its output). log: open for reading and appending."""
    numbers = {"seconds": f"{max(seconds - 5, 1):.0f}", "warm": f"{0.6 * seconds:.0f}"}
    script, *options = (part.format(**numbers) for part in stage.command)
    begin = os.fstat(log.fileno()).st_size
    process = subprocess.Popen(
        [sys.executable, str(HERE / script), *options], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    status = "ok"
    try:
        status = "failed" if process.wait(seconds) else "ok"
    except subprocess.TimeoutExpired:
        status = "timed out"
    finally:
        end(process)
    log.seek(begin)
    return status, log.read()


def end(process) -> None:
    """Kills the stage and all its child processes, which would hold the card's memory."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=530, help="seconds for all stages")
    parser.add_argument("--assets", type=Path, help="fonts, emoji and tables; see notebooks/demo/assets.py")
    parser.add_argument("--rehearse", action="store_true", help="the same stages at a small size, on a CPU")
    args = parser.parse_args()
    args.platform = "cpu" if args.rehearse else "gpu"
    begun = time.monotonic()
    args.folder.mkdir(parents=True, exist_ok=True)
    results, expected, printed = (args.folder / n for n in ("results.jsonl", "expected-tokens.json", "log.txt"))
    for file in (results, expected, printed):  # remove those of an earlier run
        file.unlink(missing_ok=True)

    def tell(**facts) -> None:
        line = json.dumps(facts | {"at": round(time.monotonic() - begun, 1)})
        print(line, flush=True)
        with results.open("a") as file:
            file.write(line + "\n")

    tell(date=datetime.datetime.now().isoformat(timespec="seconds"), card=card(), versions=versions())
    failed = []
    with printed.open("a+") as log:
        small = ["--small"] if args.rehearse else []
        command = [sys.executable, str(HERE / "gpu_checks.py"), str(expected), "--tokens", *small]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        tokens = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        for stage in stages(args, results, expected):
            left = args.seconds - (time.monotonic() - begun)
            if left < stage.least:
                tell(stage=stage.name, status="skipped", left=left)
                continue
            start = time.monotonic()
            status, text = run(stage, min(stage.most, left), log)
            print(text[-3000:], flush=True)
            error = {} if status == "ok" else {"error": text[-1500:]}
            failed += [] if status == "ok" else [stage.name]
            tell(stage=stage.name, status=status, took=round(time.monotonic() - start, 1), **error)
        end(tokens)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def card() -> str:
    """The card's name, memory and driver; without a card, the name of the processor."""
    ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
