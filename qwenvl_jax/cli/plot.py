"""`qwenvl plot`: the metrics of one or more training runs as curves in a PNG file."""

import math
from pathlib import Path

from qwenvl_jax import stores
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
_UNITS = {
    "loss": "nats",
    "accuracy": "share, 0 to 1",
    "grad_norm": "L2 norm before clipping",
    "learning_rate": "factor of the update",
    "tokens_per_second": "tokens/s",
    "flops_per_second": "FLOP/s",
    "margin": "nats",
    "mfu": "share of peak FLOP/s",
}


def add_arguments(parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a training run")
    parser.add_argument(
        "-o", "--output", default="loss.png", metavar="FILE.png", help="PNG file to write (default: loss.png)"
    )


def run(args) -> int:
    from qwenvl_jax.train.run import read_metrics

    new_figure(args.output)  # before anything is read
    places = {stores.as_url(run) or Path(run).expanduser().resolve(): run for run in args.runs}
    draw({run: read_metrics(run) for run in places.values()}, args.output)  # each once, even if it is named twice
    print(args.output)
    return OK


def new_figure(output, **size):
    """A figure to draw, for `save_figure`. Raises InputError if matplotlib is missing or `output` cannot be a file."""
    stores.local_file("--output", output)
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError(f"--output is drawn with matplotlib, which is not installed: {install('train')}") from e
    return Figure(layout="constrained", **size)


def save_figure(figure, output) -> None:
    """Writes a PNG file. Raises InputError."""
    try:
        figure.savefig(output, dpi=120, format="png")
    except OSError as e:
        raise InputError(f"{output}: cannot be written ({e.strerror})") from e


def draw(runs: dict[str, list[dict]], output) -> None:
    """Plots runs {name: lines of metrics.jsonl} into a PNG file, one panel per metric, the loss first.

    Raises InputError if matplotlib is missing, there are no metrics, or the file cannot be written.
    """
    panels = _panels(runs)
    if not panels:
        raise InputError(f"{', '.join(runs)}: metrics.jsonl has no steps yet; there is nothing to plot")
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(output, figsize=(5 * columns, 3.4 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (key, title) in zip(axes, panels.items(), strict=False):
        for colour, (name, lines) in enumerate(runs.items()):
            _curve(axis, _points(lines, key), name, f"C{colour}")
            _interval(axis, lines, key, f"C{colour}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel(_unit(key, runs), fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if len(runs) > 1:
        axes[0].legend(fontsize=8)
    save_figure(figure, output)


def _panels(runs: dict[str, list[dict]]) -> dict[str, str]:
    """The title of each panel by its key, the loss first.

    Scores with the same curves share a panel: with one task, its score is the overall score.
    """
    keys = [k for lines in runs.values() for line in lines for k in line if k not in _BOOKKEEPING]
    keys = [k for k in dict.fromkeys(keys) if not k.endswith(("/low", "/high"))]
    titles: dict[str, str] = {}
    drawn: dict[str, str] = {}  # the key that has a panel, by the text of its curves
    for key in sorted(keys, key=lambda k: (k != "loss", not k.startswith("eval/"))):
        curves = repr([_points(lines, key) for lines in runs.values()])
        first = drawn.setdefault(curves, key) if key.startswith("eval/") else key
        titles[first] = key if first == key else f"{titles[first]} = {key}"
    return titles


def _points(lines: list[dict], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _unit(key: str, runs: dict[str, list[dict]]) -> str:
    if not key.startswith("eval/"):
        return _UNITS.get(key, "")
    bounded = any(f"{key}/low" in line for lines in runs.values() for line in lines)
    return "score, 0 to 1, with 95% interval" if bounded else "score"


def _interval(axis, lines: list[dict], key: str, colour: str) -> None:
    """Draws the interval of each evaluation as a bar."""
    names = ("step", f"{key}/low", f"{key}/high")
    bars = [tuple(line[name] for name in names) for line in lines if all(line.get(name) is not None for name in names)]
    if bars:
        axis.vlines(*zip(*bars, strict=True), color=colour, alpha=0.5, linewidth=1.5)


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
