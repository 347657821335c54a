"""`qwenvl eval`: questions from files, scores as a table or JSON."""

import json
from pathlib import Path

from qwenvl_jax import stores
from qwenvl_jax.cli.errors import OK, enable_compile_cache
from qwenvl_jax.errors import InputError
from qwenvl_jax.eval.evaluator import evaluate
from qwenvl_jax.eval.metrics import BOXES, METRICS
from qwenvl_jax.eval.questions import read_questions
from qwenvl_jax.infer.options import GenerateOptions
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.options import add_flags, given

HELP = "Answer questions from files and score the answers."


def add_arguments(parser) -> None:
    parser.add_argument("data", nargs="+", metavar="FILE", help="JSONL files of questions with answers")
    parser.add_argument("--model", default="demo", metavar="DIR_OR_ID", help="directory or hub id (default: demo)")
    parser.add_argument(
        "--metric",
        choices=(*METRICS, BOXES),
        default="exact",
        help="for records without a metric of their own (default: exact)",
    )
    parser.add_argument("--output", metavar="FILE", help="JSONL file for every question, answer and score")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="questions answered together (default: 32)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), help="dtype of the weights (default: the checkpoint's)"
    )
    add_flags(parser, GenerateOptions, "By default greedy, with at most 256 new tokens.")
    add_flags(parser, MediaOptions)


def run(args) -> int:
    from qwenvl_jax.params import checkpoint

    enable_compile_cache()
    stores.refuse("--output", args.output)
    output = None if args.output is None else Path(args.output)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"--output {output}: is a directory, or there is no directory {output.parent}")
    sampling = given(args, GenerateOptions)
    GenerateOptions(**sampling)
    questions = read_questions(args.data, args.metric)  # bad records are errors before the weights are read
    report = evaluate(
        checkpoint.load(args.model, dtype=args.dtype),
        questions,
        batch=args.batch,
        encoding=given(args, MediaOptions),
        progress=not args.json,
        **sampling,
    )
    print(json.dumps(report.to_dict()) if args.json else report.table(), flush=True)
    if output is not None:
        report.write(output)
    return OK
