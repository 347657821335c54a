"""`qwenvl plot`: the metrics of one or more training runs as curves in a PNG file."""

import math
from pathlib import Path

from qwenvl_jax.cli.errors import OK
from qwenvl_jax.errors import InputError, install

HELP = "Plot the metrics of training runs."
EXAMPLES = (
    "qwenvl plot RUN",
    "qwenvl plot RUN OTHER_RUN --output compared.png",
)
_COLUMNS = 3
# Keys of a line that get no panel.
_BOOKKEEPING = ("step", "weight", "tokens", "epoch", "skipped_steps")


def add_arguments(parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a training run")
    parser.add_argument(
        "-o", "--output", default="loss.png", metavar="FILE.png", help="PNG file to write (default: loss.png)"
    )


def run(args) -> int:
    from qwenvl_jax import stores
    from qwenvl_jax.train.run import read_metrics

    stores.refuse("--output", args.output)

    draw({run: read_metrics(run) for run in args.runs}, args.output)
    print(args.output)
    return OK


def draw(runs: dict[str, list[dict]], output) -> None:
    """Plots runs {name: lines of metrics.jsonl} into a PNG file, one panel per metric, the loss first.

    Raises InputError if matplotlib is missing, there are no metrics, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError(f"plot draws with matplotlib, which is not installed: {install('train')}") from e
    keys = [k for lines in runs.values() for line in lines for k in line if k not in _BOOKKEEPING]
    panels = sorted(dict.fromkeys(keys), key=lambda k: (k != "loss", not k.startswith("eval/")))
    if not panels:
        raise InputError(f"{', '.join(runs)}: metrics.jsonl has no steps yet; there is nothing to plot")
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, key in zip(axes, panels, strict=False):
        for colour, (name, lines) in enumerate(runs.items()):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            _curve(axis, points, name, f"C{colour}")
        axis.set_title(key, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if len(runs) > 1:
        axes[0].legend(fontsize=8)
    output = Path(output)
    try:
        figure.savefig(output, dpi=120, format="png")
    except OSError as e:
        raise InputError(f"{output}: cannot be written ({e.strerror})") from e


def _curve(axis, points: list[tuple[int, float]], name: str, colour: str) -> None:
    """Draws few points as they are; 100 and more faintly, under their running mean."""
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if len(points) < 100:
        axis.plot(steps, values, color=colour, label=name, marker="." if len(points) < 30 else None)
        return
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    mean, smooth = values[0], []
    for value in values:
        mean += (value - mean) / (len(points) / 20)
        smooth.append(mean)
    axis.plot(steps, smooth, color=colour, label=name)
