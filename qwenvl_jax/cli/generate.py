"""`qwenvl generate`: answers one conversation, from flags or a file, as a stream or as JSON."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from qwenvl_jax.cli import converse, drawing
from qwenvl_jax.cli.errors import OK, one_of_several
from qwenvl_jax.config import decode_text
from qwenvl_jax.errors import InputError, shown
from qwenvl_jax.infer.options import GenerateOptions
from qwenvl_jax.inputs.fields import (
    GREEDY,
    PROCESSOR_KWARGS,
    REQUEST,
    SAMPLED,
    TEMPLATE_KWARGS,
    WITHOUT_TOOLS,
    read_keys,
)
from qwenvl_jax.inputs.messages import normalize
from qwenvl_jax.inputs.options import VIDEO, RecordOptions
from qwenvl_jax.options import add_flags, check_names, names

HELP = "Answer one conversation; the answer streams to stdout."
EXAMPLES = (
    'qwenvl generate --image demo:scene.png --prompt "How many strawberries are there?"',
    "qwenvl generate --model Qwen/Qwen2.5-VL-3B-Instruct --video clip.mp4 --nframes 16 --prompt 'What happens?'",
    "qwenvl generate --image demo:scene.png --prompt 'Locate every strawberry.' --draw answer.png",
    "qwenvl generate --messages request.json --json",
)
_SYNONYMS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "num_frames": "nframes"}
# Keys of a request body that hold options, and the keys that change nothing there.
_NESTED: dict[str, tuple[tuple[str, ...], dict]] = {
    "mm_processor_kwargs": ((*VIDEO, "num_frames"), PROCESSOR_KWARGS),
    "chat_template_kwargs": (("add_vision_id",), TEMPLATE_KWARGS),
}


class _Media(argparse.Action):
    """Collects --image and --video in one list, in command-line order."""

    def __call__(self, parser, namespace, value, option_string=None):
        kind = option_string.lstrip("-")
        namespace.media = [*(namespace.media or []), (kind, value)]


def add_arguments(parser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the question")
    source.add_argument("--messages", metavar="FILE", help="messages or an OpenAI request body, as JSON; - is stdin")
    parser.add_argument("--tools", metavar="FILE", help="tools (functions) as JSON, in OpenAI's form")
    for kind in ("image", "video"):
        parser.add_argument(
            f"--{kind}",
            action=_Media,
            dest="media",
            metavar="F",
            help="file, URL, or demo:NAME for a sample in the package; repeatable, in order",
        )
    parser.add_argument(
        "--objects",
        action="store_true",
        help="print the boxes, points and polygons of the answer as JSON, in pixels of the image file or in --boxes",
    )
    parser.add_argument(
        "--draw",
        metavar="FILE",
        help="draw the objects on the image (several: FILE-1, FILE-2, …), or objects and times on frames of the video",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a stream")
    converse.add_distributed(parser)
    converse.add_arguments(parser)
    add_flags(parser, RecordOptions, only=("boxes",))
    parser.set_defaults(boxes=None)


def run(args) -> int:
    from qwenvl_jax.families import family_of  # not at the top: these import numpy
    from qwenvl_jax.params import directory

    request: dict = {}
    file = None if args.draw is None else drawing.check(args.draw)
    tools = None if args.tools is None else _read_json("--tools", args.tools)
    if args.messages is None:
        if not (args.media or args.prompt.strip()):
            raise InputError("--prompt is blank; give a question")
        messages = [converse.user_turn(args.media or [], args.prompt)]
    else:
        messages, request = _read_messages(args)
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    options = converse.sampling(args, request)
    mesh = converse.mesh(args)  # before the model is read: a wrong mesh is an error at once
    where, encode, _ = converse.encoder(args, request | ({} if tools is None else {"tools": tools}))
    sample = encode(messages)
    place = None if args.boxes is None else _place(sample, directory.read_config(where.path))
    drawn_on = [] if file is None else _pictures(messages, sample)
    engine = converse.engine(where, args, mesh)
    if one_of_several() and sys.modules["jax"].process_index():  # every process computes; process 0 prints
        engine.generate([sample], options)
        return OK
    if not (args.json or args.boxes or args.objects):
        for piece in (stream := engine.stream(sample, options)):
            print(piece, end="", flush=True)
        print()
        if file is not None:
            drawing.finish(file, drawn_on, stream.result, engine.config)
        return OK
    (result,) = answered = engine.generate([sample], options)
    found = drawing.objects_of(result, args.boxes or "original") if args.objects else {}
    if place is not None:
        from qwenvl_jax.answers.boxes import from_model

        result = replace(result, text=from_model(result.text, place, family_of(engine.config).BOXES, args.boxes))
    if args.json or args.objects:
        print(json.dumps(_as_json(result) | found if args.json else found))
    else:
        print(result.text)
    if file is not None:
        drawing.finish(file, drawn_on, answered[0], engine.config)
    return OK


def _place(sample, config):
    """The sizes of the sample's pictures. Raises InputError if they differ, since a box could be of any of them."""
    from qwenvl_jax.answers.boxes import sizes

    places = {sizes(visual, config) for visual in sample.visuals}
    if len(places) != 1:
        what = f"the prompt has pictures of {len(places)} sizes" if places else "the prompt has no picture"
        raise InputError(f"--boxes converts the boxes of one picture; {what}")
    return places.pop()


def _pictures(messages, sample) -> list:
    media = normalize(messages)[1]
    return drawing.pictures([(m.kind, m.source, visual) for m, visual in zip(media, sample.visuals, strict=True)])


def _as_json(result) -> dict:
    return {
        "text": result.text,
        "token_ids": [int(t) for t in result.token_ids],
        "finish_reason": result.finish_reason,
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": len(result.token_ids),
            "total_tokens": result.prompt_tokens + len(result.token_ids),
        },
    }


def _read_messages(args) -> tuple[list[dict], dict]:
    """(messages, options of the request body)."""
    if args.media:
        raise InputError("--image and --video go with --prompt; with --messages, put them into the messages")
    name = "stdin" if args.messages == "-" else args.messages
    messages = _read_json("--messages", args.messages)
    request = messages if isinstance(messages, dict) else {}  # an OpenAI request body
    if request:
        if "messages" not in request and isinstance(request.get("body"), dict):
            raise InputError(f"{name} is a line of OpenAI's Batch API; give its 'body' alone, the request")
        messages = request.get("messages")
    if isinstance(messages, list) and any(isinstance(m, dict) and "messages" in m for m in messages):
        raise InputError(f"{name} is a list of records; give one of them")
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise InputError(f'{name}: expected a list of messages such as {{"role": "user", "content": "Hi"}}')
    if args.system is not None and messages[0].get("role") == "system":
        raise InputError(f"{name} has a system message already; leave out --system")
    return messages, read_request(request, name)


def read_request(body: dict, name: str) -> dict:
    """The options in an OpenAI request body, under our names; None counts as absent. Raises InputError."""
    flags = tuple(n for n in names(GenerateOptions) if GenerateOptions.__dataclass_fields__[n].metadata["flag"])
    body = {key: value for key, value in body.items() if value is not None}
    table = REQUEST if body.get("tools") else REQUEST | WITHOUT_TOOLS
    if "temperature" in body:
        table = table | (SAMPLED if body["temperature"] else GREEDY)
    elif "do_sample" in body:
        raise InputError(f"{name}: do_sample is not read; set temperature, where 0 is greedy")
    given = read_keys(body, table, name)
    pairs = [pair for pair in given.items() if pair[0] not in _NESTED]
    for key, (known, same) in _NESTED.items():
        inner = given.get(key, {})
        if not isinstance(inner, dict):
            raise InputError(f"{name}: {key} is {shown(inner)}; it must be an object")
        inner = read_keys(inner, same, f"{name}: {key}")
        check_names(inner, known, f"{name}: {key}: ")
        pairs += inner.items()
    options: dict = {}
    for key, value in pairs:
        option = _SYNONYMS.get(key, key)
        value = 0 if option == "top_k" and value == -1 else value  # vLLM's "off"
        if option in options and options[option] != value:
            raise InputError(f"{name}: {key!r} is given twice, under two names; keep one")
        options[option] = value
    check_names(options, (*flags, *VIDEO, "tools", "add_vision_id"), f"{name}: ")
    return options


def _read_json(option: str, where: str):
    """The value in a JSON file; "-" is stdin. Raises InputError."""
    if not where:
        raise InputError(f"{option} is empty; it must be a file, or - for stdin")
    name = "stdin" if where == "-" else where
    try:
        text = decode_text(sys.stdin.buffer.read() if where == "-" else Path(where).expanduser().read_bytes())
    except InputError as e:
        raise e.at(name) from e
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # also a ValueError: a number too long
        if getattr(e, "msg", "") == "Extra data" and text[e.pos] in '[{"':  # type: ignore[union-attr]
            raise InputError(f"{name}: holds several JSON values, as JSONL does; give a file with one of them") from e
        raise InputError(f"{name}: not readable as JSON ({e})") from e
