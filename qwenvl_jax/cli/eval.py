"""`qwenvl eval`: questions from files, scores as a table or JSON."""

import json
from pathlib import Path

from qwenvl_jax.cli.errors import OK, keep_programs
from qwenvl_jax.errors import InputError
from qwenvl_jax.eval.evaluator import evaluate
from qwenvl_jax.eval.metrics import BOXES, METRICS
from qwenvl_jax.eval.questions import read_questions

_ENCODING = ("min_pixels", "max_pixels", "total_pixels", "fps", "max_frames")


def add_arguments(parser) -> None:
    """The arguments of `qwenvl eval`."""
    parser.add_argument("data", nargs="+", metavar="FILE", help="questions and their answers as JSONL")
    parser.add_argument("--model", default="demo", metavar="DIR_OR_ID", help="directory or hub id (default: demo)")
    parser.add_argument("--metric", choices=(*METRICS, BOXES), default="exact", help="of records that name none")
    parser.add_argument("--output", metavar="FILE", help="write every question, answer and score there as JSONL")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="questions answered together")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), help="default: the checkpoint's")
    parser.add_argument("--min-pixels", type=int, metavar="N", help="of an image, or of each frame")
    parser.add_argument("--max-pixels", type=int, metavar="N")
    parser.add_argument("--total-pixels", type=int, metavar="N", help="of all frames of a video, taken in pairs")
    parser.add_argument("--fps", type=float, help="frames sampled a second of video")
    parser.add_argument("--max-frames", type=int, metavar="N")


def run(args) -> int:
    """Runs `qwenvl eval`; returns its exit code. Bad input raises InputError."""
    from qwenvl_jax.params import checkpoint

    keep_programs()
    output = None if args.output is None else Path(args.output)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"--output {output}: is a directory, or there is no directory {output.parent}")
    questions = read_questions(args.data, args.metric)  # bad ones are told before the weights are read
    encoding = {name: value for name in _ENCODING if (value := getattr(args, name)) is not None}
    report = evaluate(
        checkpoint.load(args.model, dtype=args.dtype),
        questions,
        batch=args.batch,
        encoding=encoding,
        max_new_tokens=args.max_new_tokens,
        progress=not args.json,
    )
    print(json.dumps(report.to_dict()) if args.json else report.table(), flush=True)
    if output is not None:
        report.write(output)
    return OK
