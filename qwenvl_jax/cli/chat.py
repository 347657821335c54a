"""`qwenvl chat`: a conversation at the keyboard; the answers stream."""

import contextlib
import os
import sys

from qwenvl_jax.cli import converse
from qwenvl_jax.cli.errors import BAD_INPUT, OK, explain
from qwenvl_jax.errors import InputError

HELP = "Talk to a model about images and videos."
_KEYS = "/image FILE   /video FILE   /reset   /quit   (Ctrl-C stops an answer)"


def add_arguments(parser) -> None:
    converse.add_arguments(parser)
    parser.set_defaults(distributed=False)


def run(args) -> int:
    options = converse.sampling(args)
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    mesh = converse.mesh(args)  # before the model is read: a wrong mesh is an error at once
    where, encode = converse.encoder(args)
    engine = converse.engine(where, args, mesh)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing and history
        print(_KEYS)
    messages, media = list(opening), list[tuple[str, str]]()
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return OK
        except KeyboardInterrupt:
            print("\n/quit ends the chat")
            continue
        word, _, rest = line.partition(" ")
        if not line:
            continue
        if word == "/quit":
            return OK
        if word == "/reset":
            messages, media = list(opening), []
        elif word in ("/image", "/video"):
            media += _attach(word[1:], rest.strip().strip("'\""))
        elif word.startswith("/") and os.sep not in word[1:]:
            print(_KEYS)
        else:
            turn = converse.user_turn(media, line)
            answer = _answer(engine, encode, [*messages, turn], options)
            media = []
            if answer is not None:
                messages += [turn, {"role": "assistant", "content": answer}]


def _attach(kind: str, where: str) -> list[tuple[str, str]]:
    try:
        if not where:
            raise InputError(f"/{kind} needs a file: /{kind} FILE")
        where = converse.media_path(where)
        if "://" not in where and not os.path.exists(where):
            raise InputError(f"{where}: no such file")
        if os.path.isdir(where):
            raise InputError(f"{where}: is a directory, not a file")
    except InputError as e:
        print(f"qwenvl: {e}", file=sys.stderr)
        return []
    return [(kind, where)]


def _answer(engine, encode, messages: list[dict], options) -> str | None:
    """Streams one answer and returns it, up to a Ctrl-C. None: the turn failed and is forgotten."""
    pieces = []
    try:
        with contextlib.closing(engine.stream(encode(messages), options)) as stream:
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not pieces:
            print()
            return None
    except BrokenPipeError:
        raise
    except Exception as error:
        code, sentence = explain(error)
        if code != BAD_INPUT:
            raise
        print(f"qwenvl: {sentence}", file=sys.stderr)
        return None
    print()
    return "".join(pieces)
