"""The `qwenvl` command: a file for each verb, and the one place where errors become sentences.

jax and the model are imported inside the verbs, so that `--help` and a mistyped option answer at once.
"""

import argparse
import atexit
import contextlib
import gc
import io
import os
import sys
import traceback

import qwenvl_jax
from qwenvl_jax.cli import chat, convert, eval, generate, info, plan, plot, train, verify
from qwenvl_jax.cli.errors import BAD_INPUT, BROKEN_PIPE, INTERRUPTED, explain, one_of_several, quiet

VERBS = {
    "generate": generate,
    "chat": chat,
    "train": train,
    "eval": eval,
    "plot": plot,
    "convert": convert,
    "plan": plan,
    "info": info,
    "verify": verify,
}
_COMPILE = (generate, chat, train, eval, verify)
_CACHE = (
    "Compiled programs are kept for the next run in ~/.cache/qwenvl_jax (in XDG_CACHE_HOME, if it is set). "
    "JAX_COMPILATION_CACHE_DIR=DIR keeps them elsewhere, JAX_ENABLE_COMPILATION_CACHE=0 nowhere."
)


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
            code = VERBS[args.command].run(args)
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


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(BAD_INPUT, f"{self.prog}: {message}\nSee '{self.prog} --help'.\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, read without jax."""
    parser = _Parser(prog="qwenvl", description="Qwen2-VL and Qwen2.5-VL in JAX.")
    parser.add_argument("--debug", action="store_true", help="show warnings, logs and tracebacks")
    parser.add_argument("--version", action="version", version=f"qwenvl-jax {qwenvl_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, verb in VERBS.items():
        epilog = _CACHE if verb in _COMPILE else None
        sub = commands.add_parser(name, help=verb.HELP, description=verb.HELP, epilog=epilog, allow_abbrev=False)
        # SUPPRESS: without it the default here would overwrite `qwenvl --debug generate`.
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        verb.add_arguments(sub)
    return parser
