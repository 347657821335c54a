"""`qwenvl quantize`: a checkpoint in 8 or 4 bits, for transformers, vLLM and this library."""

from qwenvl_convert.options import QuantizeOptions

from qwenvl_jax.cli.errors import OK, enable_compile_cache
from qwenvl_jax.options import add_flags, given

HELP = "Write a checkpoint in 8 or 4 bits, calibrated on records of your own."
EXAMPLES = (
    "qwenvl quantize Qwen/Qwen2.5-VL-3B-Instruct qwen-3b-int8 --bits 8",
    "qwenvl quantize RUN/final tuned-int4 --data train.jsonl",
    "qwenvl quantize Qwen/Qwen2.5-VL-7B-Instruct qwen-7b-awq --data train.jsonl --format awq",
)


def add_arguments(parser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint or adapter: a directory or a hub id")
    parser.add_argument("dst", metavar="DST", help="directory to create")
    add_flags(parser, QuantizeOptions)


def run(args) -> int:
    options = QuantizeOptions(**given(args, QuantizeOptions))
    from qwenvl_convert.quantize import quantize

    enable_compile_cache()
    print(quantize(args.src, args.dst, options).table())
    print(args.dst)
    return OK
