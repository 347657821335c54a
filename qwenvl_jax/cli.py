"""The `qwenvl` command: the package's verbs, and the one place where errors become sentences.

jax and the model are imported inside the commands, so that `--help` and a mistyped option answer at once.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

from qwenvl_jax import evaluate
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.train import options as train_options
from qwenvl_jax.types import InputError

_OK, _FAILED, _BAD_INPUT, _INTERRUPTED, _BROKEN_PIPE = 0, 1, 2, 130, 141
_NOT_DONE = 75  # sysexits.h: "temporary failure, the user is invited to try again"
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
_EXCHANGES = ("Gloo", "NCCL", "Coordination", "heartbeat")  # in errors of jax where another process is gone
# What a request body may hold beside its messages, and what it is called here.
_REQUEST = {name: name for name in (*_SAMPLING, "tools")} | {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 a bug or a failed check, 2 bad input, 75 training that a SIGTERM
    put off, 130 Ctrl-C."""
    args = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal whose encoding lacks a character of the answer should get the rest of it.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _quiet(args.debug):
            code = args.run(args)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # The reader has gone (`qwenvl … | head`); without this Python complains once more at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        code, sentence = _explain(error)
        print(f"qwenvl: {sentence}", file=sys.stderr, flush=True)
        if _one_of_several():  # at once: jax would wait for the others, and they may be waiting for this one
            os._exit(code)
        return code


def _one_of_several() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def convert_main(argv: list[str] | None = None) -> int:
    """`qwenvl-convert …` is `qwenvl convert …`."""
    return main(["convert", *(sys.argv[1:] if argv is None else argv)])


def _explain(error: Exception) -> tuple[int, str]:
    """The exit code and the sentence for an error; anything not foreseen is called a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return _BAD_INPUT, text
    if _one_of_several() and any(word in text for word in _EXCHANGES):
        return _FAILED, f"another process has ended or cannot be reached; start all of them again ({text[:200]})"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return _BAD_INPUT, (
            "out of memory. Try --dtype bfloat16, a smaller --max-pixels, --nframes or --max-new-tokens, "
            "or a smaller model; in training fewer --rows or --tokens with more --accumulate, or --lora-rank."
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _BAD_INPUT, f"{where}{error.strerror or text}"
    return _FAILED, f"unexpected {type(error).__name__}: {text[:300]} (--debug shows where; please report it)"


@contextlib.contextmanager
def _quiet(debug: bool):
    """Keeps the chatter of jax, absl and friends off stderr, where only our own sentences belong."""
    if debug:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read by XLA when it starts
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(_BAD_INPUT, f"{self.prog}: {message}\nSee '{self.prog} --help'.\n")


class _Media(argparse.Action):
    """Collects --image and --video into one list, in the order of the command line."""

    def __call__(self, parser, namespace, value, option_string=None):
        kind = option_string.lstrip("-")
        namespace.media = [*(namespace.media or []), (kind, value)]


def _media_path(where: str) -> str:
    """What was typed; "demo:scene.png" is the sample of that name that comes with the package."""
    if not where.startswith("demo:"):
        return where
    samples = {f"demo:{f.name}": str(f) for f in sorted(SAMPLES.iterdir()) if f.suffix != ".md"}
    if where not in samples:
        raise InputError(f"{where}: no such sample; there are {', '.join(samples)}")
    return samples[where]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="qwenvl", description="Qwen2-VL and Qwen2.5-VL in JAX.")
    parser.add_argument("--debug", action="store_true", help="show warnings, logs and tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        # SUPPRESS: without it the default here would overwrite `qwenvl --debug generate`.
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        sub.set_defaults(run=run)
        return sub

    p = command("generate", _generate, "Answer one conversation; the text streams to stdout.")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the question")
    source.add_argument("--messages", metavar="FILE", help="messages or an OpenAI request as JSON; - reads stdin")
    p.add_argument("--tools", metavar="FILE", help="descriptions of tools as JSON, in OpenAI's form")
    for kind in ("image", "video"):
        p.add_argument(
            f"--{kind}",
            action=_Media,
            dest="media",
            metavar="F",
            help="file, URL, or demo:NAME for a sample that comes with the package; repeatable, order is kept",
        )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    p.add_argument("--distributed", action="store_true", help="this is one of several processes, as on a pod's hosts")
    _model_options(p)

    p = command("chat", _chat, "Talk to a model about images and videos.")
    _model_options(p)
    p.set_defaults(distributed=False)

    p = command("train", _train, "Fine-tune a model. The same command goes on with a run that was stopped.")
    p.add_argument("config", nargs="?", metavar="FILE.toml", help="the keys below, with _ for -; flags win")
    train_options.add_arguments(p)

    p = command("eval", evaluate.command, "Answer questions and score the answers.")
    evaluate.add_arguments(p)

    p = command("plot", _plot, "Draw the metrics of training runs.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    p.add_argument("-o", "--output", default="loss.png", metavar="FILE.png", help="default: loss.png")

    p = command("convert", _convert, "Turn a Hugging Face checkpoint into an Orbax one, or back.")
    p.add_argument("src", metavar="SRC", help="checkpoint directory or hub id")
    p.add_argument("dst", metavar="DST", help="directory to create")
    p.add_argument("--to", choices=("orbax", "hf"), required=True)
    p.add_argument("--layout", choices=("hub", "nested"), help="tensor names, with --to hf (default: hub)")

    p = command("plan", _plan, "Compile for a TPU slice or GPUs that are not there: does it fit, how fast at best?")
    p.add_argument("--model", required=True, metavar="NAME_OR_DIR", help="a preset such as qwen2.5-vl-7b, or weights")
    p.add_argument("--target", required=True, help="v5e-8, v6e-4, v5p-128, h200, h100x8, …; with --search v6e or h100")
    p.add_argument("--task", choices=("decode", "prefill", "vision", "train"), default="decode", help="default: decode")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="rows (default: 1)")
    p.add_argument("--context", type=int, default=4096, metavar="N", help="slots or tokens a row (default: 4096)")
    p.add_argument("--images", type=int, default=1, metavar="N", help="of vision and train, in all (default: 1)")
    p.add_argument("--pixels", type=int, default=1280 * 28 * 28, metavar="N", help="of each image (1280·28·28)")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--full", action="store_true", help="train all weights, which is the default")
    g.add_argument("--lora", type=int, nargs="?", const=16, default=0, metavar="RANK", help="train adapters (rank 16)")
    p.add_argument("--mesh", metavar="DxFxT", help="chips along data, fsdp and tensor; default: as suits the task")
    p.add_argument("--search", action="store_true", help="find the smallest slice that holds it, and its best mesh")
    p.add_argument("--json", action="store_true")

    p = command("info", _info, "Say what a checkpoint is, reading only its headers.")
    text = "checkpoint directory, or a preset such as qwen2.5-vl-7b (default: demo)"
    p.add_argument("checkpoint", nargs="?", default="demo", metavar="CKPT", help=text)
    p.add_argument("--json", action="store_true")

    p = command("verify", _verify, "Compare this model with the PyTorch one, stage by stage, on your weights.")
    p.add_argument("checkpoint", metavar="CKPT", help="Hugging Face checkpoint directory")
    p.add_argument("--image", metavar="F", required=True, help="picture to compare on")
    return parser


def _model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="demo", metavar="DIR_OR_ID", help="directory or hub id (default: demo)")
    p.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), help="default: the checkpoint's")
    p.add_argument("--mesh", metavar="DxFxT", help="devices along data, fsdp and tensor, as 1x1x8 (default: one)")
    p.add_argument("--system", metavar="TEXT", help="system prompt")
    g = p.add_argument_group("sampling", "Defaults come from the checkpoint's generation_config.json.")
    g.add_argument("--max-new-tokens", type=int, metavar="N")
    g.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    g.add_argument("--top-p", type=float, metavar="P")
    g.add_argument("--top-k", type=int, metavar="K")
    g.add_argument("--min-p", type=float, metavar="P")
    g.add_argument("--repetition-penalty", type=float, metavar="R")
    g.add_argument("--presence-penalty", type=float, metavar="R")
    g.add_argument("--frequency-penalty", type=float, metavar="R")
    g.add_argument("--seed", type=int)
    g.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    g = p.add_argument_group("images and videos", "For all of them; what an item of --messages sets wins.")
    g.add_argument("--min-pixels", type=int, metavar="N", help="of an image, or of each frame")
    g.add_argument("--max-pixels", type=int, metavar="N")
    g.add_argument("--resized-height", type=int, metavar="N", help="instead of the bounds, with --resized-width")
    g.add_argument("--resized-width", type=int, metavar="N")
    g.add_argument("--total-pixels", type=int, metavar="N", help="of all frames of a video, taken in pairs")
    g.add_argument("--fps", type=float, help="frames sampled a second of video")
    g.add_argument("--min-frames", type=int, metavar="N", help="at least so many, whatever --fps gives")
    g.add_argument("--max-frames", type=int, metavar="N")
    g.add_argument("--nframes", type=int, metavar="N", help="frames sampled in all, instead of --fps")
    g.add_argument("--video-start", type=float, metavar="SECONDS")
    g.add_argument("--video-end", type=float, metavar="SECONDS")
    g = p.add_argument_group("prompt")
    flag = dict(action="store_true", default=None)
    g.add_argument("--add-vision-id", **flag, help="number the images and videos")
    g.add_argument("--allow-control-tokens", **flag, help="let tokens such as <|im_end|> that are typed in a text act")


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
    from qwenvl_jax.params import checkpoint

    path = checkpoint.find(args.model)
    config = checkpoint.read_config(path)
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

    from qwenvl_jax.sharding import join, make_mesh, parse_mesh

    if args.distributed:
        join()
    shape = parse_mesh(args.mesh) if args.mesh else (1, 1, jax.device_count())
    if args.distributed and math.prod(shape) != jax.device_count():
        raise InputError(f"mesh {args.mesh} is not all {jax.device_count()} devices of the processes, as it must be")
    return make_mesh(*shape)


def _engine(path, args):
    from qwenvl_jax import Engine, load

    return Engine(load(path, mesh=_mesh(args), dtype=args.dtype))


# --- generate -------------------------------------------------------------------------------------------


def _generate(args) -> int:
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
    _mesh(args)  # tells what is wrong with it before anything is read
    path, encode = _encoder(args)
    sample = encode(messages)
    engine = _engine(path, args)
    if _one_of_several() and sys.modules["jax"].process_index():  # all compute the answer, the first one tells it
        engine.generate([sample], options)
        return _OK
    if not args.json:
        for piece in engine.stream(sample, options):
            print(piece, end="", flush=True)
        print()
        return _OK
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
    return _OK


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


# --- chat -----------------------------------------------------------------------------------------------

_CHAT_HELP = "/image FILE   /video FILE   /reset   /quit   (Ctrl-C stops an answer)"


def _chat(args) -> int:
    options = _options(args)
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    _mesh(args)  # tells what is wrong with it before anything is read
    path, encode = _encoder(args)
    engine = _engine(path, args)
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
            return _OK
        except KeyboardInterrupt:
            print("\n/quit leaves")
            continue
        word, _, rest = line.partition(" ")
        rest = rest.strip().strip("'\"")
        if not line:
            continue
        if word == "/quit":
            return _OK
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
        code, sentence = _explain(error)
        if code != _BAD_INPUT:
            raise
        print(f"qwenvl: {sentence}", file=sys.stderr)
        return None
    print()
    return "".join(pieces)


# --- train, plot ----------------------------------------------------------------------------------------


def _train(args) -> int:
    options = train_options.TrainOptions.read(args.config, train_options.flags(args))
    from qwenvl_jax.train.finetune import finetune

    def evaluator(model, data, encoding):
        return evaluate.Evaluator(model, data, encoding=encoding)

    try:
        with contextlib.nullcontext() if args.debug else _own_warnings():
            ended = finetune(options, evaluator)
    except KeyboardInterrupt:  # the second one: at once, without waiting for a checkpoint that is being written
        print(file=sys.stderr, flush=True)
        os._exit(_INTERRUPTED)
    return {None: _OK, signal.SIGTERM: _NOT_DONE, signal.SIGINT: _INTERRUPTED}[ended]


@contextlib.contextmanager
def _own_warnings():
    """Lets this package's warnings, such as the records that are skipped, through `_quiet`."""
    levels = {"": logging.CRITICAL, "absl": logging.CRITICAL, "jax": logging.CRITICAL, "qwenvl_jax": logging.WARNING}
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    before = {logger: logger.level for logger in loggers}
    disabled = logging.root.manager.disable
    logging.disable(min(disabled, logging.INFO))
    try:
        for logger, level in loggers.items():
            logger.setLevel(level)
        yield
    finally:
        logging.disable(disabled)
        for logger, level in before.items():
            logger.setLevel(level)


def _plot(args) -> int:
    from qwenvl_jax import plot
    from qwenvl_jax.train.run import read_metrics

    plot.draw({run: read_metrics(run) for run in args.runs}, args.output)
    print(args.output)
    return _OK


# --- convert, info, verify ------------------------------------------------------------------------------


def _convert(args) -> int:
    from qwenvl_convert import hf

    from qwenvl_jax.params import checkpoint

    if args.to == "orbax" and args.layout:
        raise InputError("--layout is about the tensor names of Hugging Face files; it goes with --to hf only")
    src = checkpoint.find(args.src)
    if args.to == "orbax":
        hf.to_orbax(src, args.dst)
    else:
        hf.to_hf(src, args.dst, layout=args.layout or "hub")
    print(args.dst)
    return _OK


def _plan(args) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run, so no accelerator need be there, or be taken
    with contextlib.nullcontext() if args.debug else _mute_libraries():
        from qwenvl_jax import plan
        from qwenvl_jax.sharding import parse_mesh

        names = ("task", "batch", "context", "images", "pixels", "lora")
        job = plan.Job(plan.resolve_model(args.model), **{name: getattr(args, name) for name in names})
        if args.search and args.mesh:
            raise InputError("--search finds the mesh; leave out --mesh, or --search")
        if args.search:
            kind = args.target if args.target in plan.CHIPS else plan.parse_target(args.target).kind
            answer = plan.search(job, kind, progress=sys.stderr.isatty())
        else:
            mesh = parse_mesh(args.mesh) if args.mesh else None
            answer = plan.plan(job, plan.parse_target(args.target), mesh)
    print(json.dumps({"model": args.model} | answer) if args.json else plan.table(answer))
    return _OK if answer["fits"] else _FAILED


@contextlib.contextmanager
def _mute_libraries():
    """Keeps compilers in C++ from saying on stderr that there is no such chip here; Python still writes there."""
    there, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        with open(os.dup(there), "w", encoding="utf-8") as ours:
            os.dup2(null, 2)
            with contextlib.redirect_stderr(ours if sys.stderr is sys.__stderr__ else sys.stderr):
                yield
    finally:
        os.dup2(there, 2)
        os.close(there)
        os.close(null)


def _info(args) -> int:
    from qwenvl_jax import info

    facts = info.describe(args.checkpoint)
    print(json.dumps(facts) if args.json else info.table(facts))
    return _OK


def _verify(args) -> int:
    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if missing:
        raise InputError(
            f"verify compares with PyTorch, and {' and '.join(missing)} is not installed: "
            "pip install 'qwenvl-jax[parity]'"
        )
    from qwenvl_convert import parity

    rows = parity.verify(args.checkpoint, args.image)
    print(f"{'stage':<22} {'shape':<18} {'max rel. error':>14} {'limit':>8}")
    for row in rows:
        shape = "×".join(map(str, row.shape))
        verdict = "" if row.ok else "  FAILED"
        print(f"{row.name:<22} {shape:<18} {row.error:>14.1e} {row.limit:>8.0e}{verdict}")
    return _OK if all(row.ok for row in rows) else _FAILED


if __name__ == "__main__":
    sys.exit(main())
