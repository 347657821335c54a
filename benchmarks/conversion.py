"""Time and memory of loading and converting weights, compared with a plain copy of the same files.

    python benchmarks/conversion.py DIR [--size qwen2-vl-2b] [--jobs copy load to_orbax load_orbax to_hf]

Writes a checkpoint of random bf16 weights of an official size to DIR, runs each job in its own process, and removes
the files. DIR needs three times the size of the weights: 14 GB for 2B, 50 GB for 7B. Before each job, files are
dropped from the page cache; after it, they are flushed to the disk. So the times include the disk.

"anonymous" is the peak of the process's own memory, above its value just before the job, without loaded parameters.
"file" is the peak of mapped files, which the kernel can evict.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from common import config_of, write_checkpoint

from qwenvl_jax.families import PRESETS

JOBS = ("copy", "load", "to_orbax", "load_orbax", "to_hf")


def job(name: str, base: Path) -> None:
    """Runs one job in its own process; prints the memory before it and the seconds that it took."""
    import jax
    from qwenvl_convert import orbax
    from qwenvl_convert.hf import read_params

    from qwenvl_jax.params import checkpoint

    config = checkpoint.read_config(base / "hf")
    jax.block_until_ready(jax.numpy.zeros(1))
    print(json.dumps({"anonymous": memory(os.getpid())["RssAnon"]}), flush=True)
    start = time.perf_counter()
    if name == "copy":
        copy(base / "hf", base / "copy")
    elif name == "load":
        jax.block_until_ready(read_params(base / "hf", config, progress=False))
    elif name == "to_orbax":
        orbax.to_orbax(base / "hf", base / "orbax", progress=False)
    elif name == "load_orbax":
        jax.block_until_ready(checkpoint.restore(base / "orbax", config, progress=False))
    else:
        orbax.to_hf(base / "orbax", base / "back", progress=False)
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with open(target / file.name, "rb") as f:
            os.fsync(f.fileno())


def memory(pid: int) -> dict[str, int]:
    """RssAnon and RssFile in bytes; empty when the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {k: int(v.split()[0]) * 1024 for k, v in (line.split(":", 1) for line in lines) if k.startswith("Rss")}


def measure(name: str, base: Path) -> dict[str, float]:
    for file in base.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, str(base), "--job", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = {"RssAnon": 0, "RssFile": 0}

        def watch():
            while process.poll() is None:
                for key, value in memory(process.pid).items():
                    peak[key] = max(peak.get(key, 0), value)
                time.sleep(0.01)

        thread = threading.Thread(target=watch)
        thread.start()
        lines = [json.loads(line) for line in process.stdout]
        thread.join()
    if len(lines) != 2:
        sys.exit(f"{name} failed")
    return {
        "seconds": lines[1]["seconds"],
        "anonymous": peak["RssAnon"] - lines[0]["anonymous"],
        "file": peak["RssFile"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=PRESETS, default="qwen2-vl-2b")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return job(args.job, args.directory)
    base = args.directory / f"bench-{args.size}"
    base.mkdir(parents=True)
    try:
        config = config_of(args.size)
        write_checkpoint(base / "hf", config)
        size = sum(f.stat().st_size for f in (base / "hf").glob("*.safetensors"))
        t = config.text
        largest = 2 * t.num_hidden_layers * t.hidden_size * t.intermediate_size
        print(f"{args.size}: {size / 1e9:.2f} GB; largest stacked parameter {largest / 1e6:.0f} MB\n")
        print(f"{'job':<12}{'seconds':>9}{'GB/s':>7}{'anonymous MB':>14}{'file MB':>9}", flush=True)
        for name in args.jobs:
            m = measure(name, base)
            own = m["anonymous"] - (size if name.startswith("load") else 0)
            print(
                f"{name:<12}{m['seconds']:>9.1f}{size / m['seconds'] / 1e9:>7.2f}"
                f"{own / 1e6:>14.0f}{m['file'] / 1e6:>9.0f}",
                flush=True,
            )
            shutil.rmtree(base / "copy", ignore_errors=True)
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
