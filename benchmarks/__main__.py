"""All of the benchmarks, one after the other, each in a process of its own.

    python benchmarks [--platform gpu] [--size qwen2.5-vl-7b] [--directory DIR]

For their own options, run them by themselves.
"""

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="cpu")
    parser.add_argument("--size", default="50M", help="of model.py: 50M, demo or a preset such as qwen2.5-vl-7b")
    parser.add_argument("--directory", help="where conversion.py may write 14 GB; without it, it is left out")
    args = parser.parse_args()
    jobs = [["model", "--platform", args.platform, "--size", args.size]]
    if find_spec("torch") and find_spec("transformers"):  # what the next ones are compared with
        jobs.append(["preprocessing"])
        if args.platform != "tpu":
            jobs.append(["training", "--platform", args.platform])
    if args.directory:
        jobs.append(["conversion", args.directory])
    failed = []
    for name, *options in jobs:
        print(f"\n{name}.py {' '.join(options)}", flush=True)
        if subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py"), *options]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
