"""`qwenvl eval`: questions from files, scores as a table or JSON."""

import glob
import json
import os
import sys
from pathlib import Path

from qwenvl_jax import stores
from qwenvl_jax.cli import converse
from qwenvl_jax.cli.errors import OK, enable_compile_cache, one_of_several
from qwenvl_jax.errors import InputError
from qwenvl_jax.eval.evaluator import check_counts, check_questions, evaluate
from qwenvl_jax.eval.journal import holds_answers
from qwenvl_jax.eval.metrics import BOXES, METRICS
from qwenvl_jax.eval.questions import Question, Questions
from qwenvl_jax.infer.options import EngineOptions, GenerateOptions
from qwenvl_jax.inputs.options import MediaOptions, PromptOptions, RecordOptions
from qwenvl_jax.options import add_flags, given, whole

HELP = "Answer questions from files and score the answers."
EXAMPLES = (
    "qwenvl eval questions.jsonl",
    "qwenvl eval questions.jsonl --model CKPT --metric iou --output answers.jsonl",
)


def add_arguments(parser) -> None:
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="questions with answers: JSONL, JSON or Parquet files, or a dataset of the hub (USER/NAME:SPLIT)",
    )
    converse.add_model(parser)
    parser.add_argument(
        "--metric",
        choices=(*METRICS, *BOXES),
        default="exact",
        help="for records without a metric of their own (default: exact)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="JSONL file that gets every answer as it comes; the same command goes on where it stopped",
    )
    parser.add_argument("--overwrite", action="store_true", help="start the --output file anew")
    parser.add_argument("--limit", type=whole, metavar="N", help="ask the first N records only")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    parser.add_argument("--batch", type=whole, default=32, metavar="N", help="questions in a batch (default: 32)")
    converse.add_distributed(parser)
    add_flags(parser, GenerateOptions, "By default greedy, with at most 256 new tokens.")
    add_flags(parser, MediaOptions)
    add_flags(parser, PromptOptions)
    add_flags(parser, RecordOptions)
    add_flags(parser, EngineOptions)


def run(args) -> int:
    sampling = given(args, GenerateOptions)
    GenerateOptions(**sampling)
    check_counts(args.batch, args.limit)
    how = RecordOptions(**given(args, RecordOptions))
    output = None if args.output is None else stores.local_file("--output", args.output)
    data = args.data if output is None else [file for name in args.data for file in _without(output, name)]
    records = Questions(data, args.metric, how.columns)
    read = records.first(args.limit)
    for one in read if how.on_bad_record == "stop" else ():  # before the weights are read
        if isinstance(one, InputError):
            raise one
    mesh = converse.mesh(args)
    from qwenvl_jax.inputs.processor import Processor
    from qwenvl_jax.params import checkpoint, directory

    enable_compile_cache()
    where = converse.located(args)
    encoding = given(args, MediaOptions) | given(args, PromptOptions) | given(args, RecordOptions, only=("boxes",))
    if where.place is not None and how.on_bad_record == "stop":  # before the weights are copied
        processor = Processor.from_dir(where.path, directory.read_config(where.path), where.adapters)
        check_questions([one for one in read if isinstance(one, Question)], processor, encoding)
    report = evaluate(
        checkpoint.load_located(where, mesh=mesh, dtype=args.dtype),
        records,
        output=output,
        overwrite=args.overwrite,
        batch=args.batch,
        encoding=encoding,
        on_bad=how.on_bad_record,
        limit=args.limit,
        progress=not args.json,
        **given(args, EngineOptions),
        **sampling,
    )
    if one_of_several() and sys.modules["jax"].process_index():  # every process computes; process 0 prints
        return OK
    print(json.dumps(report.to_dict()) if args.json else report.table(), flush=True)
    return OK


def _without(output: Path, name: str) -> list[str]:
    """The questions that a name or pattern stands for. A pattern may match the file of answers, which is left out.

    Raises InputError if --output is a file of questions.
    """
    path = os.path.expanduser(name)
    if not output.exists() or stores.as_url(name):
        return [name]
    is_pattern = not os.path.exists(path) and glob.has_magic(path)
    files = sorted(filter(os.path.isfile, glob.glob(path, recursive=True))) if is_pattern else [path]
    same = [file for file in files if os.path.exists(file) and output.samefile(file)]
    if not same:
        return [name]
    if not (is_pattern and holds_answers(output)):
        matched = f" (it matches {name})" if is_pattern else ""
        raise InputError(f"--output {output}: is one of the files of questions{matched}; give another name")
    if not (files := [file for file in files if file not in same]):
        raise InputError(f"{name}: only --output {output} matches the pattern; give a file of questions")
    return files
