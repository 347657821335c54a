"""`qwenvl convert`: a checkpoint in the other format."""

from qwenvl_jax.cli.errors import OK
from qwenvl_jax.errors import InputError

HELP = "Turn a Hugging Face checkpoint into an Orbax one, or back."


def add_arguments(parser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint directory or hub id")
    parser.add_argument("dst", metavar="DST", help="directory to create")
    parser.add_argument("--to", choices=("orbax", "hf"), required=True)
    parser.add_argument("--layout", choices=("hub", "nested"), help="tensor names, with --to hf (default: hub)")


def run(args) -> int:
    from qwenvl_convert import orbax

    from qwenvl_jax.params import checkpoint

    if args.to == "orbax" and args.layout:
        raise InputError("--layout is about the tensor names of Hugging Face files; it goes with --to hf only")
    src = checkpoint.find(args.src)
    if args.to == "orbax":
        orbax.to_orbax(src, args.dst)
    else:
        orbax.to_hf(src, args.dst, layout=args.layout or "hub")
    print(args.dst)
    return OK
