"""`qwenvl verify`: compares this package with PyTorch, stage by stage."""

import importlib.util

from qwenvl_jax.cli.errors import FAILED, OK, enable_compile_cache
from qwenvl_jax.errors import InputError, install

HELP = "Compare this package with PyTorch, stage by stage, on your weights."
EXAMPLES = ("qwenvl verify CKPT --image photo.jpg",)


def add_arguments(parser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="Hugging Face checkpoint directory")
    parser.add_argument("--image", metavar="F", required=True, help="image to compare on")


def run(args) -> int:
    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise InputError(f"verify needs {' and '.join(missing)}, which {are} not installed: {install('parity')}")
    from qwenvl_convert import parity

    enable_compile_cache()
    rows = parity.verify(args.checkpoint, args.image)
    print(f"{'stage':<22} {'shape':<18} {'max rel. error':>14} {'limit':>8}")
    for row in rows:
        shape = "×".join(map(str, row.shape))
        verdict = "" if row.ok else "  FAILED"
        print(f"{row.name:<22} {shape:<18} {row.error:>14.1e} {row.limit:>8.0e}{verdict}")
    return OK if all(row.ok for row in rows) else FAILED
