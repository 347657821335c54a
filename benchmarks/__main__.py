"""Runs all benchmarks, one after the other, each in its own process.

    python benchmarks [NAME …] [--output FILE] [--directory DIR]
    python benchmarks --platform gpu --size qwen2.5-vl-7b

A NAME is a script: model, preprocessing, training, conversion. To set their own options, run the scripts directly. On a
GPU without a network, use `benchmarks/gpu.sh`: it does more, in nine minutes.
"""

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from common import SMALL

from qwenvl_jax.families import PRESETS

ON_A_CPU = (
    "model --rows 1 4 --tokens 1024 4096 --patches 4096 16384",
    "model --family qwen2_vl --jobs vision --patches 4096 16384",
    "model --size qwen2-vl-2b --jobs decode --new 16",
    "preprocessing",
    "training",
)


def commands(args) -> list[str]:
    if args.size:
        chosen = [f"model --platform {args.platform} --size {args.size}"]
    elif args.platform == "cpu":
        chosen = list(ON_A_CPU)
    else:
        chosen = [f"model --platform {args.platform}", f"training --platform {args.platform}"]
    if args.platform == "tpu" or not (find_spec("torch") and find_spec("transformers")):
        chosen = [c for c in chosen if c.startswith("model")]  # the others only compare
    if args.output:
        chosen = [f"{command} --output {args.output}" for command in chosen]
    if args.directory:
        chosen.append(f"conversion {args.directory}")
    return [c for c in chosen if not args.names or c.split()[0] in args.names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="scripts to run (default: all)")
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="cpu")
    parser.add_argument("--size", choices=(*SMALL, *PRESETS), help="run model.py only, at this size")
    parser.add_argument("--output", help="file to which results are appended as JSON lines")
    parser.add_argument("--directory", help="where conversion.py may write 14 GB; without it, conversion is skipped")
    args = parser.parse_args()
    failed = []
    for command in commands(args):
        name, *options = command.split()
        print(f"\n{name}.py {' '.join(options)}", flush=True)
        if subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py"), *options]).returncode:
            failed.append(command)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
