"""Shared by `qwenvl generate` and `qwenvl chat`: flags, and a processor and an engine made from them."""

import math

from qwenvl_jax.cli.errors import enable_compile_cache
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.errors import InputError
from qwenvl_jax.infer.options import GenerateOptions, tokens_left
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.options import add_flags, build, given, names

_PROMPT = ("add_vision_id", "allow_control_tokens", "boxes")


def add_arguments(parser) -> None:
    add_model(parser)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), help="dtype of the weights (default: the checkpoint's)"
    )
    parser.add_argument(
        "--mesh", metavar="DxFxT", help="devices along data, fsdp and tensor, such as 1x1x8 (default: one)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_flags(parser, GenerateOptions, "Defaults come from the checkpoint's generation_config.json.")
    add_flags(parser, MediaOptions, "For all images and videos; an item in --messages can override them.")
    group = parser.add_argument_group("prompt")
    flag = dict(action="store_true", default=None)
    group.add_argument("--add-vision-id", **flag, help="number the images and videos in the prompt")
    group.add_argument(
        "--allow-control-tokens", **flag, help="control tokens such as <|im_end|> typed in a text take effect"
    )


def add_model(parser) -> None:
    """Adds --model and --adapter; `located` reads them."""
    parser.add_argument(
        "--model", metavar="DIR_OR_ID", help="checkpoint or adapter: a directory or a hub id (default: demo)"
    )
    parser.add_argument(
        "--adapter", action="append", metavar="DIR_OR_ID", help="LoRA adapter to merge into the model; repeatable"
    )


def located(args):
    """The checkpoint and adapters that --model and --adapter name (`directory.locate`)."""
    from qwenvl_jax.params import directory

    adapters = args.adapter or []
    if args.model is None and adapters:  # the first one's base is the model
        found = directory.locate(*adapters)
        if len(found.adapters) < len(adapters):
            raise InputError(f"--adapter {adapters[0]}: not an adapter; name a model with --model")
        return found
    return directory.locate(directory.DEMO if args.model is None else args.model, *adapters)


def sampling(args, request: dict | None = None) -> GenerateOptions:
    """GenerateOptions from a request and from flags; flags win. Raises OptionsError for a bad value."""
    options = {name: value for name, value in (request or {}).items() if name in names(GenerateOptions)}
    return build(GenerateOptions, options | given(args, GenerateOptions))


def encoder(args, request: dict | None = None):
    """(what `located` gives, messages → Sample). It reads no weights, so bad input is an error at once."""
    from qwenvl_jax import Processor
    from qwenvl_jax.params import directory

    request = request or {}
    options = {name: request[name] for name in (*names(MediaOptions), "tools") if name in request}
    options |= given(args, MediaOptions)
    options |= {name: value for name in _PROMPT if (value := getattr(args, name, None)) is not None}
    where = located(args)
    config = directory.read_config(where.path)
    processor = Processor.from_dir(where.path, config)

    def encode(messages):
        sample = processor.encode(messages, **options)
        tokens_left(sample, config.text.context)
        return sample

    return where, encode


def mesh(args):
    """The mesh of --mesh, over all processes with --distributed; None for one device."""
    if not (args.mesh or args.distributed):
        return None
    import jax

    from qwenvl_jax import distributed
    from qwenvl_jax.sharding import make_mesh, parse_mesh

    if args.distributed:
        distributed.initialize()
    shape = parse_mesh(args.mesh) if args.mesh else (1, 1, jax.device_count())
    if args.distributed and math.prod(shape) != jax.device_count():
        raise InputError(f"mesh {args.mesh} must have all {jax.device_count()} devices of the processes")
    return make_mesh(*shape)


def engine(where, args, mesh):
    """Loads the checkpoint into an engine. where: what `located` gives."""
    from qwenvl_jax import Engine, load

    enable_compile_cache()
    return Engine(load(where.path, adapter=where.adapters, mesh=mesh, dtype=args.dtype))


def user_turn(media: list[tuple[str, str]], text: str) -> dict:
    """A user's message: images and videos, then the text."""
    items = [{"type": kind, kind: media_path(where)} for kind, where in media]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def media_path(where: str) -> str:
    """The path or URL itself; "demo:scene.png" is a sample in the package. Raises InputError for an unknown one."""
    if not where.startswith("demo:"):
        return where
    samples = {f"demo:{f.name}": str(f) for f in sorted(SAMPLES.iterdir()) if f.suffix != ".md"}
    if where not in samples:
        raise InputError(f"{where}: no such sample; there are {', '.join(samples)}")
    return samples[where]
