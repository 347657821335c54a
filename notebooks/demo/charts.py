"""Bar and line charts of real tables, and questions about them."""

import numpy as np
from PIL import Image, ImageDraw

from demo.assets import Assets
from demo.fonts import PLAIN, font, middles
from demo.questions import HIGHEST, LOWEST, VALUE, ask
from demo.tables import Series, tables

SIZES = ((196, 168), (224, 168), (196, 196), (224, 196))
MOST = 7  # points in a chart
_CLEAR = 0.06  # the highest or lowest is asked for if it leads by this share of the highest value
_INKS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 140, 150), (90, 90, 90))


def chart(rng: np.random.Generator, assets: Assets, evaluation: bool):
    """A chart of 3 to 7 points: (picture, [(question, answer), …], metric of the first answer).

    About half the charts show their values as text, and answers repeat that text. Values that are too low to read off
    an axis are asked for only if they are shown.
    """
    image, series, texts, labelled, _ = _chart(rng, assets, evaluation)
    high, order = max(series.values), np.argsort(series.values)
    kinds = []
    if series.values[order[-1]] - series.values[order[-2]] > _CLEAR * high:
        kinds.append((HIGHEST, order[-1]))
    if series.values[order[1]] - series.values[order[0]] > _CLEAR * high:
        kinds.append((LOWEST, order[0]))
    readable = [i for i, value in enumerate(series.values) if labelled or value >= 0.2 * high]
    ends = [(ask(rng, forms), series.labels[i]) for forms, i in rng.permutation(np.array(kinds, object).reshape(-1, 2))]
    values = [(ask(rng, VALUE, series.labels[i]), texts[i]) for i in rng.permutation(readable)]
    if ends and rng.random() < 0.4:
        return image, [ends[0], *values[:2], *ends[1:], *values[2:]], "exact"
    return image, [values[0], *ends, *values[1:]], "relaxed"


def glyphs(rng: np.random.Generator, assets: Assets):
    """A chart of the training part: (picture, all its text, centres (x, y) of the characters [n, 2] in pixels)."""
    image, *_, written = _chart(rng, assets, evaluation=False)
    return image, "".join(text for text, _ in written), np.concatenate([centres for _, centres in written])


def _chart(rng: np.random.Generator, assets: Assets, evaluation: bool):
    """(picture, series, its values as text, whether the picture shows them, [(text, centres), …] in the picture)."""
    groups = tables(assets, evaluation)
    group = groups[rng.integers(len(groups))]
    series = group[rng.integers(len(group))]
    (width, height), file = SIZES[rng.integers(len(SIZES))], PLAIN[rng.integers(len(PLAIN))]
    face, heading = (font(assets, file, size) for size in (12, 13))
    room = (width - 45) // (max(map(face.getlength, series.labels)) + 5)
    series = _slice(rng, series, int(np.clip(room, 3, MOST)))
    labelled = bool(rng.random() < 0.5)
    # Shown values must be short; values to be read off an axis must not be rounded much.
    whole = max(series.values) >= (20 if labelled else 100) or all(v == int(v) for v in series.values)
    texts = [f"{value:.{0 if whole else 1}f}" for value in series.values]
    image, written = _draw(rng, width, height, face, heading, series, texts if labelled else None)
    return image, series, texts, labelled, written


def _slice(rng: np.random.Generator, series: Series, most: int) -> Series:
    """Three to `most` points of a series, not all zero."""
    while True:
        n = int(rng.integers(3, min(most, len(series.labels)) + 1))
        start = int(rng.integers(0, len(series.labels) - n + 1))
        chosen = range(start, start + n) if series.ordered else rng.choice(len(series.labels), n, replace=False)
        labels, values = (tuple(column[i] for i in chosen) for column in (series.labels, series.values))
        if max(values) > 0:
            return series._replace(labels=labels, values=values)


def _ticks(high: float) -> list[float]:
    """Four to six round numbers from 0 to the first that is at least `high`."""
    power = 10.0 ** np.floor(np.log10(high))
    step = next(s * power for s in (0.2, 0.25, 0.5, 1, 2) if high <= 5 * s * power)
    return [step * i for i in range(int(np.ceil(high / step - 1e-9)) + 1)]


def _draw(rng: np.random.Generator, width: int, height: int, face, heading, series: Series, texts):
    """(the chart, [(text, centres), …] written in it); texts: labels above the points, or None."""
    dark = rng.random() < 0.12
    ground = tuple(rng.integers(15, 50, 3).tolist() if dark else rng.integers(238, 256, 3).tolist())
    text_ink, rule = ((235, 235, 235), (80, 80, 80)) if dark else ((20, 20, 20), (208, 208, 208))
    ink = _INKS[rng.integers(len(_INKS))]
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    written = []

    def write(x, y, text, anchor="mm", face=face, **stroke):
        draw.text((x, y), text, text_ink, face, anchor=anchor, **stroke)
        left, top, _, bottom = draw.textbbox((x, y), text, face, anchor=anchor)
        written.append((text, np.stack([left + middles(face, text), np.full(len(text), (top + bottom) / 2)], axis=1)))

    marks = _ticks(max(series.values))
    decimals = next(d for d in range(4) if all(abs(m - round(m, d)) < 1e-9 for m in marks))
    names = [f"{m:.{decimals}f}" for m in marks]
    left, right = int(max(map(face.getlength, names))) + 8, width - 5
    top, bottom = 36 if texts else 28, height - 20
    heights = [bottom - (bottom - top) * value / marks[-1] for value in series.values]

    write(width / 2, 11, series.title, face=heading)
    for i, name in enumerate(names):
        y = bottom - (bottom - top) * i / (len(names) - 1)
        draw.line((left, y, right, y), rule)
        write(left - 4, y, name, "rm")
    slot = (right - left) / len(heights)
    points = [(left + slot * (i + 0.5), y) for i, y in enumerate(heights)]
    if rng.random() < 0.6:
        half = slot * rng.uniform(0.28, 0.42)
        for x, y in points:
            draw.rectangle((x - half, y, x + half, bottom), ink)
    else:
        draw.line(points, ink, 2)
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), ink)
    draw.line((left, bottom, right, bottom), text_ink)
    for (x, _), label in zip(points, series.labels, strict=True):
        write(x, bottom + 10, label)
    for (x, y), text in zip(points if texts else (), texts or (), strict=True):
        write(x, y - 4, text, "mb", stroke_width=2, stroke_fill=ground)
    return image, written
