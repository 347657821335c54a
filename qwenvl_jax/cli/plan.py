"""`qwenvl plan`: will a job fit on chips that are not here, and how fast at best?"""

import contextlib
import json
import os
import sys

from qwenvl_jax.cli.errors import FAILED, OK, mute_libraries
from qwenvl_jax.errors import InputError

HELP = "Compile for a TPU slice or GPUs that are not there: does it fit, how fast at best?"
# Which flags each task takes.
_TAKES: dict[str, tuple[str, ...]] = {
    "decode": ("batch", "context"),
    "prefill": ("batch", "context"),
    "vision": ("images", "pixels"),
    "train": ("batch", "context", "images", "pixels", "lora", "full"),
}


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="NAME_OR_DIR", help="a preset such as qwen2.5-vl-7b, or weights")
    add("--target", required=True, help="v5e-8, v6e-4, v5p-128, h200, h100x8, …; with --search v6e or h100")
    add("--task", choices=("decode", "prefill", "vision", "train"), default="decode", help="default: decode")
    add("--batch", type=int, metavar="N", help="rows (default: 1)")
    add("--context", type=int, metavar="N", help="slots or tokens a row (default: 4096)")
    add("--images", type=int, metavar="N", help="of vision and train, in all (default: 1)")
    add("--pixels", type=int, metavar="N", help="of each image (default: 1280·28·28)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--full", action="store_true", default=None, help="train all weights, which is the default")
    group.add_argument(
        "--lora", type=int, nargs="?", const=16, metavar="RANK", help="train adapters (default rank: 16)"
    )
    add("--mesh", metavar="DxFxT", help="chips along data, fsdp and tensor; default: as suits the task")
    add("--search", action="store_true", help="find the smallest slice that holds it, and its best mesh")
    add("--json", action="store_true")


def run(args) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run, so no accelerator need be there, or be taken
    with contextlib.nullcontext() if args.debug else mute_libraries():
        from qwenvl_jax.plan import plan
        from qwenvl_jax.plan.hardware import CHIPS, parse_target
        from qwenvl_jax.sharding import parse_mesh

        asked = job(args)
        if args.search and args.mesh:
            raise InputError("--search finds the mesh; leave out --mesh, or --search")
        if args.search:
            kind = args.target if args.target in CHIPS else parse_target(args.target).kind
            answer = plan.search(asked, kind, progress=sys.stderr.isatty())
        else:
            answer = plan.plan(asked, parse_target(args.target), parse_mesh(args.mesh) if args.mesh else None)
    print(json.dumps({"model": args.model} | answer) if args.json else plan.table(answer))
    return OK if answer["fits"] else FAILED


def job(args):
    """The job that the flags describe."""
    from qwenvl_jax.plan import plan

    asked = {name: value for name in _TAKES["train"] if (value := getattr(args, name)) is not None}
    for name in asked:
        if name not in _TAKES[args.task]:
            raise InputError(f"--{name} means nothing to --task {args.task}; leave it out")
    asked.pop("full", None)
    return plan.Job(plan.resolve_model(args.model), args.task, **asked)
