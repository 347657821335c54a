"""`qwenvl merge`: a model, or an adapter in its base, as a complete Hugging Face directory."""

from qwenvl_jax.cli.errors import OK

HELP = "Merge an adapter into its model and write a complete Hugging Face directory."
EXAMPLES = (
    "qwenvl merge RUN/adapter OUT",
    "qwenvl merge Qwen/Qwen2.5-VL-3B-Instruct OUT --adapter ADAPTER",
)


def add_arguments(parser) -> None:
    parser.add_argument("src", metavar="MODEL_OR_ADAPTER", help="checkpoint or adapter: a directory or a hub id")
    parser.add_argument("dst", metavar="OUT", help="directory to create")
    parser.add_argument(
        "--adapter", action="append", metavar="DIR_OR_ID", help="LoRA adapter to merge into it; repeatable"
    )
    parser.add_argument("--dequantise", action="store_true", help="write quantised weights in 16 bits")
    parser.add_argument("--layout", choices=("hub", "nested"), default="hub", help="tensor names (default: hub)")


def run(args) -> int:
    from qwenvl_convert import orbax

    orbax.merge(args.src, args.dst, adapter=args.adapter or (), layout=args.layout, dequantise=args.dequantise)
    print(args.dst)
    return OK
