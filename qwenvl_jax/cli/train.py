"""`qwenvl train`: fine-tunes as a TOML file and flags say."""

import os
import signal
import sys

from qwenvl_jax.cli.errors import INTERRUPTED, NOT_DONE, OK, enable_compile_cache
from qwenvl_jax.eval.evaluator import Evaluator
from qwenvl_jax.options import add_flags, given
from qwenvl_jax.train.options import TrainOptions

HELP = "Fine-tune a model. Run the same command again to resume."
EXAMPLES = (
    "qwenvl train run.toml",
    "qwenvl train run.toml --learning-rate 2e-5 --steps 500",
)


def add_arguments(parser) -> None:
    parser.add_argument("config", nargs="?", metavar="FILE.toml", help="options as below, with _ for -; flags win")
    add_flags(parser, TrainOptions)


def run(args) -> int:
    options = TrainOptions.read(args.config, given(args, TrainOptions))
    from qwenvl_jax.train.finetune import finetune

    enable_compile_cache()

    def evaluator(model, data, encoding):
        return Evaluator(model, data, encoding=encoding, on_bad=options.on_bad_record)

    try:
        ended = finetune(options, evaluator)
    except KeyboardInterrupt:  # the second Ctrl-C: does not wait for a checkpoint
        print(file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    codes: dict[int | None, int] = {None: OK, signal.SIGTERM: NOT_DONE, signal.SIGINT: INTERRUPTED}
    return codes[ended]
