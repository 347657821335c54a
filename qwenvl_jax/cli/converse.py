"""`qwenvl generate` and `qwenvl chat`: questions from files and the keyboard, answers as they come."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path

from qwenvl_jax.cli.errors import BAD_INPUT, OK, explain, keep_programs, one_of_several
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.errors import InputError

_ENCODING = (
    "tools",
    "add_vision_id",
    "allow_control_tokens",
    "min_pixels",
    "max_pixels",
    "resized_height",
    "resized_width",
    "total_pixels",
    "fps",
    "nframes",
    "min_frames",
    "max_frames",
    "video_start",
    "video_end",
)
_SAMPLING = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
)
# What a request body may hold beside its messages, and what it is called here.
_REQUEST = {name: name for name in (*_SAMPLING, "tools")} | {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}


def generate(args) -> int:
    if args.tools is not None:
        args.tools = _read_json("--tools", args.tools)
    if args.messages is None:
        if not (args.media or args.prompt.strip()):
            raise InputError("--prompt is blank; ask something")
        messages = [_user_turn(args.media or [], args.prompt)]
    else:
        messages = _read_messages(args)
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    options = _options(args)
    mesh = _mesh(args)  # first of all: it tells what is wrong with it
    path, encode = _encoder(args)
    sample = encode(messages)
    engine = _engine(path, args, mesh)
    if one_of_several() and sys.modules["jax"].process_index():  # all compute the answer, the first one tells it
        engine.generate([sample], options)
        return OK
    if not args.json:
        for piece in engine.stream(sample, options):
            print(piece, end="", flush=True)
        print()
        return OK
    (result,) = engine.generate([sample], options)
    usage = {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": len(result.token_ids),
        "total_tokens": result.prompt_tokens + len(result.token_ids),
    }
    answer = {
        "text": result.text,
        "token_ids": [int(t) for t in result.token_ids],
        "finish_reason": result.finish_reason,
        "usage": usage,
    }
    print(json.dumps(answer))
    return OK


def _user_turn(media: list[tuple[str, str]], text: str) -> dict:
    return {
        "role": "user",
        "content": [{"type": kind, kind: _media_path(where)} for kind, where in media]
        + [{"type": "text", "text": text}],
    }


def _read_messages(args) -> list[dict]:
    """The messages; what else a request body says becomes an option in `args`, unless it was given there."""
    if args.media:
        raise InputError("--image and --video go with --prompt; with --messages, put them in the messages")
    name = "stdin" if args.messages == "-" else args.messages
    messages = _read_json("--messages", args.messages)
    request = messages if isinstance(messages, dict) else {}  # an OpenAI request body works as it is
    if request:
        messages = request.get("messages")
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise InputError(f'{name}: expected a list of messages such as {{"role": "user", "content": "Hi"}}')
    if args.system is not None and messages[0].get("role") == "system":
        raise InputError(f"{name} has a system message already; leave out --system")
    asked = {}
    for key, value in request.items():
        if value is None or key in ("messages", "model", "stream"):
            continue
        if key not in _REQUEST:
            raise InputError(f"{name}: request key {key!r} is not supported; take it out")
        if _REQUEST[key] in asked:
            raise InputError(f"{name}: {key!r} is given twice, under two names")
        asked[_REQUEST[key]] = value
    for option, value in asked.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    return messages


def _read_json(option: str, where: str):
    """What a JSON file holds, or stdin for "-"."""
    if not where:
        raise InputError(f"{option} is empty; it must name a file, or be - for stdin")
    try:
        return json.loads(sys.stdin.read() if where == "-" else Path(where).read_text("utf-8"))
    except (ValueError, RecursionError) as e:  # a ValueError too: not UTF-8, or a number of thousands of digits
        raise InputError(f"{'stdin' if where == '-' else where}: not readable as JSON ({e})") from e


def _check_file(where: str) -> None:
    if not os.path.exists(where):
        raise InputError(f"{where}: no such file")
    if os.path.isdir(where):
        raise InputError(f"{where}: is a directory, not a file")


_CHAT_HELP = "/image FILE   /video FILE   /reset   /quit   (Ctrl-C stops an answer)"


def chat(args) -> int:
    options = _options(args)
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    mesh = _mesh(args)  # first of all: it tells what is wrong with it
    path, encode = _encoder(args)
    engine = _engine(path, args, mesh)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing and history
        print(_CHAT_HELP)
    messages, media = list(opening), []
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return OK
        except KeyboardInterrupt:
            print("\n/quit leaves")
            continue
        word, _, rest = line.partition(" ")
        rest = rest.strip().strip("'\"")
        if not line:
            continue
        if word == "/quit":
            return OK
        if word == "/reset":
            messages, media = list(opening), []
        elif word in ("/image", "/video"):
            media += _attach(word[1:], rest)
        elif word.startswith("/") and os.sep not in word[1:]:
            print(_CHAT_HELP)
        else:
            turn = _user_turn(media, line)
            answer = _answer(engine, encode, [*messages, turn], options)
            media = []
            if answer is not None:
                messages += [turn, {"role": "assistant", "content": answer}]


def _attach(kind: str, where: str) -> list[tuple[str, str]]:
    try:
        if not where:
            raise InputError(f"/{kind} needs a file")
        where = _media_path(where)
        if "://" not in where:
            _check_file(where)
    except InputError as e:
        print(f"qwenvl: {e}", file=sys.stderr)
        return []
    return [(kind, where)]


def _answer(engine, encode, messages: list[dict], options) -> str | None:
    """Streams one answer and returns it, cut short by Ctrl-C; None if the turn could not be used."""
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


def _given(args, names) -> dict:
    """The options that were given: what is absent is left to the checkpoint's defaults."""
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _options(args):
    """The sampling options, checked before anything is loaded."""
    from qwenvl_jax.infer.options import GenerateOptions

    options = GenerateOptions(**_given(args, _SAMPLING))
    options.resolve({}, 0)
    return options


def _encoder(args):
    """The checkpoint's directory, and messages → Sample. Needs no weights, so bad input is told at once."""
    from qwenvl_jax import Processor
    from qwenvl_jax.infer.options import room
    from qwenvl_jax.params import directory

    path = directory.find(args.model)
    config = directory.read_config(path)
    processor, options = Processor.from_dir(path, config), _given(args, _ENCODING)

    def encode(messages):
        sample = processor.encode(messages, **options)
        room(sample, config.text.context)
        return sample

    return path, encode


def _mesh(args):
    """The mesh that was asked for; None for one device. Several processes share one."""
    if not (args.mesh or args.distributed):
        return None
    import jax

    from qwenvl_jax.distributed import join
    from qwenvl_jax.sharding import make_mesh, parse_mesh

    if args.distributed:
        join()
    shape = parse_mesh(args.mesh) if args.mesh else (1, 1, jax.device_count())
    if args.distributed and math.prod(shape) != jax.device_count():
        raise InputError(f"mesh {args.mesh} is not all {jax.device_count()} devices of the processes, as it must be")
    return make_mesh(*shape)


def _engine(path, args, mesh):
    from qwenvl_jax import Engine, load

    keep_programs()
    return Engine(load(path, mesh=mesh, dtype=args.dtype))


def _media_path(where: str) -> str:
    """What was typed; "demo:scene.png" is the sample of that name that comes with the package."""
    if not where.startswith("demo:"):
        return where
    samples = {f"demo:{f.name}": str(f) for f in sorted(SAMPLES.iterdir()) if f.suffix != ".md"}
    if where not in samples:
        raise InputError(f"{where}: no such sample; there are {', '.join(samples)}")
    return samples[where]
