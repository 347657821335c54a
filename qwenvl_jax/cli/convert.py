"""`qwenvl convert`: Hugging Face to Orbax, or back."""

from qwenvl_jax.cli.errors import OK
from qwenvl_jax.errors import InputError

HELP = "Convert a Hugging Face checkpoint to Orbax, or back."
EXAMPLES = (
    "qwenvl convert Qwen/Qwen2.5-VL-3B-Instruct qwen-3b --to orbax",
    "qwenvl convert RUN/final qwen-tuned --to hf",
)


def add_arguments(parser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint directory or hub id")
    parser.add_argument("dst", metavar="DST", help="directory to create")
    parser.add_argument("--to", choices=("orbax", "hf"), required=True, help="the format of DST")
    parser.add_argument("--layout", choices=("hub", "nested"), help="tensor names, for --to hf (default: hub)")


def run(args) -> int:
    from qwenvl_convert import orbax

    from qwenvl_jax.params import checkpoint

    if args.to == "orbax" and args.layout:
        raise InputError("--layout names the tensors of Hugging Face files; use it with --to hf only")
    src = checkpoint.find(args.src)
    if args.to == "orbax":
        orbax.to_orbax(src, args.dst)
    else:
        orbax.to_hf(src, args.dst, layout=args.layout or "hub")
    print(args.dst)
    return OK
