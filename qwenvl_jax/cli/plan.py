"""`qwenvl plan`: does a job fit on a TPU slice or GPUs, and how fast can it be at best?"""

import contextlib
import json
import os
import sys

from qwenvl_jax.cli.errors import FAILED, OK, mute_libraries
from qwenvl_jax.errors import InputError
from qwenvl_jax.options import whole

HELP = "Does a job fit on a TPU slice or GPUs, and how fast at best? Compiles without the hardware."
EXAMPLES = (
    "qwenvl plan --model qwen2.5-vl-7b --target v5e-8",
    "qwenvl plan --model qwen2.5-vl-7b --target h100 --task train --lora 16 --search",
    "qwenvl plan --model qwen2.5-vl-72b --target v6e-4 --quantised int4",
)
# The flags of each task.
_TAKES: dict[str, tuple[str, ...]] = {
    "decode": ("batch", "context"),
    "prefill": ("batch", "context"),
    "vision": ("images", "pixels"),
    "train": ("batch", "context", "images", "pixels", "lora", "full"),
}


def add_arguments(parser) -> None:
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="NAME_OR_DIR",
        help="preset (qwen2.5-vl-7b, …), checkpoint directory or hub id",
    )
    add(
        "--quantised",
        choices=("int4", "int8"),
        help="the decoder's weights in 4 bits with groups of 128, or in 8 bits (default: as the checkpoint has them)",
    )
    add("--target", required=True, help="v5e-8, v6e-4, v5p-128, h200, h100x8, …; with --search, v6e or h100")
    add(
        "--task",
        choices=("decode", "prefill", "vision", "train"),
        default="decode",
        help="the program to compile (default: decode)",
    )
    add("--batch", type=whole, metavar="N", help="rows of a batch (default: 1)")
    add("--context", type=whole, metavar="N", help="tokens or cache slots per row (default: 4096)")
    add("--images", type=whole, metavar="N", help="images in all, for vision and train (default: 1)")
    add("--pixels", type=whole, metavar="N", help="pixels of each image (default: 1280·28·28)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--full", action="store_true", default=None, help="train all weights (the default)")
    group.add_argument(
        "--lora", type=whole, nargs="?", const=16, metavar="RANK", help="train adapters of this rank (default: 16)"
    )
    add("--mesh", metavar="DxFxT", help="chips along data, fsdp and tensor (default: by task)")
    add("--search", action="store_true", help="find the smallest slice that the job fits, and its fastest mesh")
    add("--json", action="store_true", help="print one JSON object")


def run(args) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs; do not take an accelerator
    with contextlib.nullcontext() if args.debug else mute_libraries():
        from qwenvl_jax.plan import plan
        from qwenvl_jax.plan.hardware import CHIPS, parse_target
        from qwenvl_jax.sharding import parse_mesh

        planned = job(args)
        if args.search and args.mesh:
            raise InputError("--search finds the mesh; leave out --mesh or --search")
        if args.search:
            kind = args.target if args.target in CHIPS else parse_target(args.target).kind
            answer = plan.search(planned, kind, progress=sys.stderr.isatty())
        else:
            answer = plan.plan(planned, parse_target(args.target), parse_mesh(args.mesh) if args.mesh else None)
    print(json.dumps({"model": args.model} | answer) if args.json else plan.table(answer))
    return OK if answer["fits"] else FAILED


def job(args):
    """The `Job` that the flags describe. Raises InputError for a flag of another task."""
    from qwenvl_jax.plan import plan

    values = {name: value for name in _TAKES["train"] if (value := getattr(args, name)) is not None}
    for name in values:
        if name not in _TAKES[args.task]:
            raise InputError(f"--{name} is not an option of --task {args.task}; leave it out")
    values.pop("full", None)
    config = plan.resolve_model(args.model)
    if args.quantised:
        config = plan.quantised(config, args.quantised)
    return plan.Job(config, args.task, **values)
