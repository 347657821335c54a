"""Shared by `qwenvl generate` and `qwenvl chat`: flags, and a processor and an engine made from them."""

import math

from qwenvl_jax.cli.errors import enable_compile_cache
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.errors import ContextError, InputError
from qwenvl_jax.infer.options import EngineOptions, GenerateOptions, tokens_left
from qwenvl_jax.inputs.messages import Media
from qwenvl_jax.inputs.options import MediaOptions, PromptOptions, RecordOptions
from qwenvl_jax.options import add_flags, build, given, names


def add_model(parser) -> None:
    """The flags of the model and its devices."""
    parser.add_argument(
        "--model", metavar="DIR_OR_ID", help="checkpoint or adapter: a directory or a hub id (default: demo)"
    )
    parser.add_argument(
        "--adapter", action="append", metavar="DIR_OR_ID", help="LoRA adapter to merge into the model; repeatable"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), help="dtype of the weights (default: the checkpoint's)"
    )
    parser.add_argument(
        "--mesh", metavar="DxFxT", help="devices along data, fsdp and tensor, such as 1x1x8 (default: one)"
    )


def add_distributed(parser) -> None:
    parser.add_argument("--distributed", action="store_true", help="this is one of several processes, one per host")


def add_arguments(parser) -> None:
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_flags(parser, GenerateOptions, "Defaults come from the checkpoint's generation_config.json.")
    add_flags(parser, MediaOptions, "For all images and videos; an item of a message can override them.")
    add_flags(parser, PromptOptions)
    add_flags(parser, EngineOptions)


def located(args):
    """The checkpoint, without weights, and the adapters that --model and --adapter name (`params.locate`)."""
    from qwenvl_jax.params.directory import ADAPTER_SETTINGS, leftover
    from qwenvl_jax.params.locate import DEMO, find, locate

    adapters = args.adapter or []
    if args.model is None and adapters:  # the first one's base is the model
        first = find(adapters[0], weights=False)
        if not (first / ADAPTER_SETTINGS).is_file():
            hint = leftover(first, of_adapters=True)
            raise InputError(f"--adapter {adapters[0]}: not an adapter{hint or '; name a model with --model'}")
        return locate(*adapters, weights=False)
    return locate(DEMO if args.model is None else args.model, *adapters, weights=False)


def sampling(args, request: dict | None = None) -> GenerateOptions:
    """GenerateOptions from a request and from flags; flags win. Raises OptionsError for a bad value."""
    options = {name: value for name, value in (request or {}).items() if name in names(GenerateOptions)}
    options |= given(args, GenerateOptions)
    if (allow := given(args, PromptOptions).get("allow_control_tokens")) is not None:  # answers follow the same rule
        options.setdefault("skip_special_tokens", not allow)
    return build(GenerateOptions, options)


def encoder(args, request: dict | None = None):
    """(what `located` gives, messages → Sample, a function that opens an attachment).

    It reads no weights, so bad input is an error at once.
    """
    from qwenvl_jax import Processor
    from qwenvl_jax.params import directory

    request = request or {}
    known = (*names(MediaOptions), "add_vision_id", "tools")
    options = {name: request[name] for name in known if name in request}
    options |= given(args, MediaOptions) | given(args, PromptOptions) | given(args, RecordOptions, only=("boxes",))
    found = located(args)
    config = directory.read_config(found.path)
    processor = Processor.from_dir(found.path, config, found.adapters)

    def encode(messages):
        sample = processor.encode(messages, **options)
        tokens_left(sample, config.text.context)
        return sample

    def attach(kind, where, before=None):
        """(the Visual of an image or video, its name, size and tokens as a sentence, its budget).

        The Visual can stand in a message. before: the budget of the message's last attachment.
        """
        p = processor.preprocessing
        media = {name: value for name, value in options.items() if name in names(MediaOptions)}
        budget = processor.budget(build(MediaOptions, media), before)
        (visual,) = processor.open([Media(kind, where, {}, kind)], build(MediaOptions, media), budget)
        grid, tokens = visual.grid, visual.grid.patches // config.vision.merge_unit
        if tokens >= config.text.context:
            raise ContextError(f"{where}: takes {tokens:,} tokens; the model's context is {config.text.context:,}")
        size = f"{grid.w * p.patch_size} × {grid.h * p.patch_size} pixels"
        if kind == "video":
            seconds = f" over {grid.t * visual.seconds_per_grid:.3g} seconds" if visual.seconds_per_grid else ""
            size = f"{grid.t * p.temporal_patch_size} frames{seconds} of {size}"
        elif visual.size and size != (original := f"{visual.size[0]} × {visual.size[1]} pixels"):
            size = f"{original}, resized to {size}"
        return visual, f"{where}: {kind}, {size}, {tokens:,} tokens", budget

    return found, encode, attach


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
    """Loads the checkpoint into an engine. where: what `located` gives; its weights are copied here if need be."""
    from qwenvl_jax import Engine
    from qwenvl_jax.params import checkpoint

    enable_compile_cache()
    return Engine(checkpoint.load_located(where, mesh=mesh, dtype=args.dtype), **given(args, EngineOptions))


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
