"""The `qwenvl` command: the package's verbs, and the one place where errors become sentences.

jax and the model are imported inside the commands, so that `--help` and a mistyped option answer at once.
"""

import atexit
import contextlib
import gc
import importlib.util
import io
import json
import os
import signal
import sys
import traceback

from qwenvl_jax.cli import eval as eval_verb
from qwenvl_jax.cli.arguments import build_parser
from qwenvl_jax.cli.converse import chat, generate
from qwenvl_jax.cli.errors import (
    BROKEN_PIPE,
    FAILED,
    INTERRUPTED,
    NOT_DONE,
    OK,
    explain,
    keep_programs,
    mute_libraries,
    one_of_several,
    own_warnings,
    quiet,
)
from qwenvl_jax.errors import InputError
from qwenvl_jax.eval.evaluator import Evaluator
from qwenvl_jax.train import options as train_options

# What `plan` may be told of a task.
_PLANNED = {"decode": ("batch", "context"), "prefill": ("batch", "context"), "vision": ("images", "pixels")}
_PLANNED["train"] = ("batch", "context", "images", "pixels", "lora", "full")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 a bug or a failed check, 2 bad input, 75 training that a SIGTERM
    put off, 130 Ctrl-C."""
    if argv is None:
        _collect_rarely()
    args = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal whose encoding lacks a character of the answer should get the rest of it.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with quiet(args.debug):
            code = _COMMANDS[args.command](args)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # The reader has gone (`qwenvl … | head`); without this Python complains once more at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        code, sentence = explain(error)
        print(f"qwenvl: {sentence}", file=sys.stderr, flush=True)
        if one_of_several():  # at once: jax would wait for the others, and they may be waiting for this one
            os._exit(code)
        return code


def _collect_rarely() -> None:
    """Importing jax makes hundreds of thousands of objects, which live as long as the process. By default, Python
    searches them for garbage again and again, and once more at exit: a fifth of the time of a short command."""
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)  # the search at exit skips what is frozen


def convert_main(argv: list[str] | None = None) -> int:
    """`qwenvl-convert …` is `qwenvl convert …`."""
    return main(["convert", *(sys.argv[1:] if argv is None else argv)])


def _train(args) -> int:
    options = train_options.TrainOptions.read(args.config, train_options.flags(args))
    from qwenvl_jax.train.finetune import finetune

    keep_programs()

    def evaluator(model, data, encoding):
        return Evaluator(model, data, encoding=encoding)

    try:
        with contextlib.nullcontext() if args.debug else own_warnings():
            ended = finetune(options, evaluator)
    except KeyboardInterrupt:  # the second one: at once, without waiting for a checkpoint that is being written
        print(file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    return {None: OK, signal.SIGTERM: NOT_DONE, signal.SIGINT: INTERRUPTED}[ended]


def _plot(args) -> int:
    from qwenvl_jax.cli import plot
    from qwenvl_jax.train.run import read_metrics

    plot.draw({run: read_metrics(run) for run in args.runs}, args.output)
    print(args.output)
    return OK


def _convert(args) -> int:
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


def plan_job(args):
    """The job that the flags of `qwenvl plan` describe."""
    from qwenvl_jax.plan import plan

    given = {name: value for name in _PLANNED["train"] if (value := getattr(args, name)) is not None}
    for name in given:
        if name not in _PLANNED[args.task]:
            raise InputError(f"--{name} means nothing to --task {args.task}; leave it out")
    given.pop("full", None)
    return plan.Job(plan.resolve_model(args.model), args.task, **given)


def _plan(args) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run, so no accelerator need be there, or be taken
    with contextlib.nullcontext() if args.debug else mute_libraries():
        from qwenvl_jax.plan import plan
        from qwenvl_jax.plan.hardware import CHIPS, parse_target
        from qwenvl_jax.sharding import parse_mesh

        job = plan_job(args)
        if args.search and args.mesh:
            raise InputError("--search finds the mesh; leave out --mesh, or --search")
        if args.search:
            kind = args.target if args.target in CHIPS else parse_target(args.target).kind
            answer = plan.search(job, kind, progress=sys.stderr.isatty())
        else:
            answer = plan.plan(job, parse_target(args.target), parse_mesh(args.mesh) if args.mesh else None)
    print(json.dumps({"model": args.model} | answer) if args.json else plan.table(answer))
    return OK if answer["fits"] else FAILED


def _info(args) -> int:
    from qwenvl_jax.cli import info

    facts = info.describe(args.checkpoint)
    print(json.dumps(facts) if args.json else info.table(facts))
    return OK


def _verify(args) -> int:
    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if missing:
        raise InputError(
            f"verify compares with PyTorch, and {' and '.join(missing)} is not installed: "
            "pip install 'qwenvl-jax[parity]'"
        )
    from qwenvl_convert import parity

    keep_programs()
    rows = parity.verify(args.checkpoint, args.image)
    print(f"{'stage':<22} {'shape':<18} {'max rel. error':>14} {'limit':>8}")
    for row in rows:
        shape = "×".join(map(str, row.shape))
        verdict = "" if row.ok else "  FAILED"
        print(f"{row.name:<22} {shape:<18} {row.error:>14.1e} {row.limit:>8.0e}{verdict}")
    return OK if all(row.ok for row in rows) else FAILED


_COMMANDS = {
    "generate": generate,
    "chat": chat,
    "train": _train,
    "eval": eval_verb.run,
    "plot": _plot,
    "convert": _convert,
    "plan": _plan,
    "info": _info,
    "verify": _verify,
}
