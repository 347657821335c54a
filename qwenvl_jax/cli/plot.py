"""`qwenvl plot`: curves of one run or several, as a PNG: the loss first, then whatever else was measured."""

import math
from pathlib import Path

from qwenvl_jax.cli.errors import OK
from qwenvl_jax.errors import InputError

HELP = "Draw the metrics of training runs."
_COLUMNS = 3
# What a line says besides things worth a curve.
_BOOKKEEPING = ("step", "weight", "tokens", "epoch", "skipped_steps")


def add_arguments(parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    parser.add_argument("-o", "--output", default="loss.png", metavar="FILE.png", help="default: loss.png")


def run(args) -> int:
    from qwenvl_jax.train.run import read_metrics

    draw({run: read_metrics(run) for run in args.runs}, args.output)
    print(args.output)
    return OK


def draw(runs: dict[str, list[dict]], output) -> None:
    """Draws runs, name → lines of metrics.jsonl, into `output`, one panel a metric. Raises InputError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError("plot draws with matplotlib, which is not installed: pip install 'qwenvl-jax[train]'") from e
    keys = [k for lines in runs.values() for line in lines for k in line if k not in _BOOKKEEPING]
    panels = sorted(dict.fromkeys(keys), key=lambda k: (k != "loss", not k.startswith("eval/")))
    if not panels:
        raise InputError(f"{', '.join(runs)}: nothing to draw yet, metrics.jsonl has no steps")
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
    """Few points as they are; many faintly, under their running mean."""
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
