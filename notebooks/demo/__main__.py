"""Runs one of the demo's scripts: `python notebooks/demo NAME …`."""

import sys
from importlib import import_module
from pathlib import Path

NAMES = ("draw_samples", "pretrain", "score", "sheet", "train")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python notebooks/demo {{{','.join(NAMES)}}} …")
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the scripts import each other as `demo.…`
    name = sys.argv.pop(1)
    sys.argv[0] = f"notebooks/demo {name}"
    import_module(f"demo.{name}").main()


if __name__ == "__main__":
    main()
