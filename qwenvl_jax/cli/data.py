"""`qwenvl data`: what a data set holds, and how it fits into batches."""

import json
import sys
from functools import partial

from qwenvl_jax.cli.errors import OK
from qwenvl_jax.cli.plot import new_figure, save_figure
from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.inputs.options import MediaOptions, PromptOptions
from qwenvl_jax.options import add_flags, given, names, whole
from qwenvl_jax.train.options import TrainOptions

HELP = "Describe training records: sizes, bad ones, and batches that fit. No weights are read."
_OPTIONS = ("task", "rows", "tokens", "lanes", "patches", "segments", "accumulate", "threads", "workers", "columns",
            "boxes", *names(PromptOptions), *names(MediaOptions))  # fmt: skip
EXAMPLES = (
    "qwenvl data train.jsonl --model Qwen/Qwen2.5-VL-3B-Instruct",
    "qwenvl data 'shards/*.parquet' --columns caption=response --limit 1000 -o sizes.png",
)
_QUANTILES = ("min", "5%", "50%", "95%", "99%", "max")


def add_arguments(parser) -> None:
    parser.add_argument("data", nargs="+", metavar="DATA", help="training records, as for qwenvl train")
    parser.add_argument(
        "--model", default="demo", metavar="DIR_OR_ID", help="whose tokenizer and preprocessing (default: demo)"
    )
    parser.add_argument("--limit", type=whole, metavar="N", help="read N records, drawn at random")
    parser.add_argument("-o", "--output", metavar="FILE.png", help="draw the sizes into a PNG file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_flags(parser, TrainOptions, only=_OPTIONS)


def run(args) -> int:
    if args.output:
        new_figure(args.output)  # before anything is read
    if args.limit is not None and args.limit < 1:
        raise OptionsError(f"limit is {args.limit}; it must be at least 1")
    options = TrainOptions(**given(args, TrainOptions, only=_OPTIONS))
    # Not at the top: `--help` imports this file, and these import numpy.
    from tqdm import tqdm

    from qwenvl_jax.inputs.processor import Processor
    from qwenvl_jax.params.directory import read_config
    from qwenvl_jax.params.locate import locate
    from qwenvl_jax.train.survey import survey

    model = locate(args.model, weights=False)
    processor = Processor.from_dir(model.path, read_config(model.path), model.adapters)
    progress = partial(tqdm, desc="reading", unit=" records", disable=None)
    found = survey(args.data, processor, options, limit=args.limit, progress=progress)
    facts = describe(found, options, processor.config)
    print(json.dumps(facts, ensure_ascii=False) if args.json else table(facts))
    if args.output:
        draw(found, args.output)
        print(args.output, file=sys.stderr)
    return OK


def describe(found, options: TrainOptions, config) -> dict:
    """A Survey as JSON values: counts, quantiles, bad records, and what batches hold."""
    from qwenvl_jax.inputs.layout import slots_needed
    from qwenvl_jax.train.survey import fits, pack, quantiles, suggest

    m = found.measured
    facts = {
        "records": found.total,
        "read": found.read,
        "usable": sum(fits(x, found.shape, config) for x in m),
        "forms": dict(found.forms.most_common()),
        "pictures": sum(x.pictures for x in m),
        "clips": sum(x.clips for x in m),
        "boxes": {"declared": sum(x.boxes is not None for x in m), "converted": sum(bool(x.boxes) for x in m)},
        "bad": {reason: {"count": n, "first": found.examples[reason]} for reason, n in found.bad.most_common()},
    }
    if not m:
        return facts | {"quantiles": {}, "batches": {}, "suggested": {}}
    columns = {
        "tokens": [x.tokens for x in m],
        "tokens learnt": [x.trained for x in m],
        "answers": [x.answers for x in m],
        "pictures and clips": [x.pictures + x.clips for x in m],
        "patches": [x.patches for x in m],
        "slots of a frame": [slots_needed(grid, config.vision) for x in m for grid, _ in x.frames],
    }
    facts["quantiles"] = {
        name: dict(zip(_QUANTILES, quantiles(v), strict=True)) for name, v in columns.items() if any(v)
    }
    facts["batches"] = _batches(pack(m, found.shape, config, found.total * len(m) // found.read), options)
    scale = found.total / found.read
    shapes = {f"{share:.0%}": suggest(m, options, config, share, scale) for share in (1.0, 0.99)}
    if shapes["99%"] == shapes["100%"]:
        del shapes["99%"]
    total = found.total * len(m) // found.read
    facts["suggested"] = {name: _batches(pack(m, shape, config, total), options) for name, shape in shapes.items()}
    return facts


def _batches(packed, options: TrainOptions) -> dict:
    rows, tokens, lanes, patches, _ = packed.shape
    return {
        "shape": dict(rows=rows, tokens=tokens, lanes=lanes, patches=patches),
        "records": packed.records,
        "tokens_filled": packed.tokens,
        "patches_filled": packed.patches,
        "steps_per_epoch": -(-packed.batches // options.accumulate),
        "left_out": packed.left_out,
    }


def table(facts: dict) -> str:
    """The facts as text."""
    part = "" if facts["read"] == facts["records"] else f", {facts['read']:,} of them read"
    lines = [f"{facts['records']:,} records{part}: {facts['usable']:,} fit, with {facts['pictures']:,} pictures and "
             f"{facts['clips']:,} clips in all that can be read"]  # fmt: skip
    if declared := facts["boxes"]["declared"]:
        lines.append(
            f"boxes converted in {facts['boxes']['converted']:,} of {declared:,} records that name coordinates"
        )
    forms = list(facts["forms"].items())
    lines += ["", "keys of a record", *(f"  {n:>9,}  {keys}" for keys, n in forms[:5])]
    lines += [f"  {sum(n for _, n in forms[5:]):>9,}  others"] if forms[5:] else []
    if facts["quantiles"]:
        lines += ["", f"{'of a record':<20}" + "".join(f"{q:>10}" for q in _QUANTILES)]
        for name, values in facts["quantiles"].items():
            lines.append(f"  {name:<18}" + "".join(f"{v:>10,}" for v in values.values()))
    for reason, bad in facts["bad"].items():
        lines += ["", f"bad, {reason}: {bad['count']:,}", *(f"  {text}" for text in bad["first"])]
    if facts["batches"]:
        lines += ["", "batches", *_lines(facts["batches"])]
    for share, batches in facts["suggested"].items():
        lines += ["", f"suggested, to hold {share} of the records that can be read", *_lines(batches)]
    return "\n".join(lines)


def _lines(b: dict) -> list[str]:
    flags = " ".join(f"--{name} {value}" for name, value in b["shape"].items())
    left = f", {b['left_out']:,} records are left out" if b["left_out"] else ""
    filled = f"tokens {b['tokens_filled']:.0%} filled, patches {b['patches_filled']:.0%}"
    return [f"  {flags}", f"  {b['records']:.1f} records in a batch, {filled}",
            f"  about {b['steps_per_epoch']:,} steps in an epoch{left}"]  # fmt: skip


def draw(found, output) -> None:
    """Histograms of tokens and patches into a PNG file. Raises InputError if that cannot be done."""
    import numpy as np

    if not found.measured:
        raise InputError("no record can be read; there is nothing to draw")
    panels = {"tokens": ([m.tokens for m in found.measured], found.shape.tokens, "a row")}
    patches = [m.patches for m in found.measured if m.patches]
    if patches:
        panels["patches"] = (patches, found.shape.lanes * found.shape.patches, "all lanes")
    figure = new_figure(output, figsize=(5 * len(panels), 3.4))
    for axis, (name, (values, most, holder)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(),
                                                    strict=True):  # fmt: skip
        low, high = min([*values, most]), max([*values, most])
        axis.hist(values, bins=np.geomspace(low, high * 1.05, 50).tolist(), color="C0")
        axis.axvline(most, color="C3", linestyle="--", label=f"{holder}: {most:,}")
        axis.set_xscale("log")
        axis.set_xlabel(f"{name} in a record")
        axis.set_ylabel("records")
        axis.legend(fontsize=8)
    save_figure(figure, output)
