"""The `qwenvl` command: one file per verb; `main` prints every error as one sentence.

The verbs import jax only when they run, so `--help` and usage errors take no time.
"""

import argparse
import atexit
import contextlib
import gc
import io
import os
import signal
import sys
import textwrap
import threading
import traceback

import qwenvl_jax
from qwenvl_jax.cli import chat, convert, data, eval, generate, info, merge, plan, plot, quantize, train, verify
from qwenvl_jax.cli.errors import BAD_INPUT, BROKEN_PIPE, INTERRUPTED, explain, one_of_several, quiet

_MODULES = (generate, chat, data, train, eval, plot, convert, merge, quantize, plan, info, verify)
VERBS = {module.__name__.rpartition(".")[2]: module for module in _MODULES}
_COMPILING = (generate, chat, train, eval, quantize, verify)
_CACHE = (
    "Compiled programs are cached for the next run, in $XDG_CACHE_HOME/qwenvl_jax (default: ~/.cache/qwenvl_jax). "
    "Set JAX_COMPILATION_CACHE_DIR=DIR for another directory, JAX_ENABLE_COMPILATION_CACHE=0 for no cache."
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0: done; 1: a bug or a failed check; 2: bad input; 75: SIGTERM stopped training, run it again; 130: Ctrl-C.
    """
    ended: list[int] = []
    if argv is None:
        gc.set_threshold(10_000, *gc.get_threshold()[1:])  # jax's many objects live on; scanning them takes time
        sys.unraisablehook = _interrupt_again
        atexit.register(_leave, ended)  # before jax registers its own handlers, so it runs after them
    args = build_parser().parse_args(argv)
    ended.append(_run(args))
    return ended[0]


def _interrupt_again(unraisable) -> None:
    """Repeats a Ctrl-C that was lost. Python drops an exception in a callback of the garbage collector; jax has one."""
    if unraisable.exc_type is KeyboardInterrupt:
        main_thread = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _leave(ended: list[int]) -> None:
    """Ends the process without Python's teardown, if a verb has run. ended: its exit code.

    XLA's threads may still compile or compute, for example after Ctrl-C or past an answer's end. At a normal exit, C++
    destroys what they use, and the process crashes. jax's handlers, which leave a group of processes, have run by now.
    """
    if ended:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(ended[0])


def _run(args) -> int:
    """Runs the verb and returns its exit code; an error becomes a sentence."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # If the terminal's encoding lacks a character, print the rest of the answer.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with quiet(args.debug):
            code = VERBS[args.command].run(args)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # The reader has closed the pipe (`qwenvl … | head`). Without this, Python complains again at exit.
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
        if one_of_several():  # a normal exit waits for the other processes, and they may wait for this one
            os._exit(code)
        return code


def convert_main(argv: list[str] | None = None) -> int:
    """`qwenvl-convert …` is `qwenvl convert …`."""
    return main(["convert", *(sys.argv[1:] if argv is None else argv)])


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(BAD_INPUT, f"{self.prog}: {message}\nSee '{self.prog} --help'.\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; it does not import jax."""
    parser = _Parser(prog="qwenvl", description="Qwen2-VL and Qwen2.5-VL in JAX.")
    parser.add_argument("--debug", action="store_true", help="show warnings, logs and tracebacks")
    parser.add_argument("--version", action="version", version=f"qwenvl-jax {qwenvl_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, verb in VERBS.items():
        cache = ("", textwrap.fill(_CACHE, 80)) if verb in _COMPILING else ()
        epilog = "\n".join(("examples:", *(f"  {example}" for example in verb.EXAMPLES), *cache))
        sub = commands.add_parser(
            name,
            help=verb.HELP,
            description=verb.HELP,
            epilog=epilog.replace("%", "%%"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        # SUPPRESS: otherwise this default would overwrite `qwenvl --debug generate`.
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        verb.add_arguments(sub)
    return parser
