"""Bar and line charts of real tables, and what one asks of them."""

import csv
import json
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from qwenvl_jax.demo.assets import Assets
from qwenvl_jax.demo.lines import font

VALUE = ("What is the value of {}?", "How much is {}?", "What does the chart show for {}?")
HIGHEST = ("Which is the highest?", "Which has the highest value?", "What has the largest value?")
LOWEST = ("Which is the lowest?", "Which has the lowest value?", "What has the smallest value?")

FONTS = ("Roboto-Regular.ttf", "Roboto-Medium.ttf", "OpenSans-Regular.ttf", "OpenSans-Semibold.ttf", "Lato-Medium.ttf")
SIZES = ((196, 168), (224, 168), (196, 196), (224, 196))
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_SECTORS = {
    "construction": "Construction", "manufacturing": "Factory", "retail_trade": "Retail",
    "financial_activities": "Finance", "information": "Media", "government": "Government", "utilities": "Utility",
    "mining_and_logging": "Mining", "leisure_and_hospitality": "Leisure", "wholesale_trade": "Wholesale",
}  # fmt: skip


class Series(NamedTuple):
    """A row of a table: `labels` and `values` in step; `ordered` says that only neighbours make a chart."""

    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    ordered: bool = True


def chart(rng: np.random.Generator, assets: Assets, evaluation: bool):
    """A chart of 3 to 7 points as (question, picture, answer, metric).

    Training draws from the first three quarters of every table (of the airports, from three states in four),
    evaluation from the rest. A number is answered as the chart prints it, or would print it.
    """
    groups = tables(assets.tables)[evaluation]
    group = groups[rng.integers(len(groups))]
    series = _slice(rng, group[rng.integers(len(group))])
    labelled = bool(rng.random() < 0.5)
    texts, high = _printed(series.values), max(series.values)
    if not labelled and min(series.values) < 0.1 * high and rng.random() < 0.8:
        labelled = True  # little can be read off a bar of no height
    image = _draw(rng, assets, series, texts, labelled)
    order = np.argsort(series.values)
    kinds = []
    if series.values[order[-1]] - series.values[order[-2]] > 0.06 * high:
        kinds.append((HIGHEST, order[-1]))
    if series.values[order[1]] - series.values[order[0]] > 0.06 * high:
        kinds.append((LOWEST, order[0]))
    if kinds and rng.random() < 0.4:
        questions, which = kinds[rng.integers(len(kinds))]
        return questions[rng.integers(len(questions))], image, series.labels[which], "exact"
    readable = [i for i, v in enumerate(series.values) if labelled or v >= 0.2 * high]
    which = readable[rng.integers(len(readable))]
    return VALUE[rng.integers(len(VALUE))].format(series.labels[which]), image, texts[which], "relaxed"


def _slice(rng: np.random.Generator, series: Series) -> Series:
    """Three to seven points of it, not all zero."""
    while True:
        n = int(rng.integers(3, min(7, len(series.labels)) + 1))
        start = int(rng.integers(0, len(series.labels) - n + 1))
        chosen = range(start, start + n) if series.ordered else rng.choice(len(series.labels), n, replace=False)
        labels, values = (tuple(column[i] for i in chosen) for column in (series.labels, series.values))
        if max(values) > 0:
            return series._replace(labels=labels, values=values)


def _printed(values: tuple[float, ...]) -> list[str]:
    """At most four digits a number, the same number of decimals for all."""
    return [f"{v:.0f}" if max(values) >= 20 else f"{v:.1f}" for v in values]


@lru_cache(1)
def tables(folder: Path) -> tuple[list[list[Series]], list[list[Series]]]:
    """(for training, for evaluation): a list of tables each, a table being a list of series.

    All of them are in the public domain: airports (ourairports.com), temperatures and weather (NOAA), power
    (EIA), jobs (Bureau of Labor Statistics), wheat (Playfair 1822, released by M. Bostock), Crimea (Nightingale
    1858).
    """
    both: tuple[list, list] = ([], [])
    for table in (_airports, _temperatures, _days, _months, _power, _jobs, _old_tables):
        parts: tuple[list, list] = ([], [])
        for series in table(folder):
            cut = round(len(series.labels) * 0.75) if len(series.labels) >= 12 else None
            if cut is None:  # short ones go to either side as a whole
                parts[len(parts[0]) > 3 * len(parts[1])].append(series)
                continue
            for part, span in zip(parts, (slice(cut), slice(cut, None)), strict=True):
                part.append(series._replace(labels=series.labels[span], values=series.values[span]))
        for all_tables, part in zip(both, parts, strict=True):
            all_tables.append(part)
    return both


def _rows(path: Path) -> list[dict]:
    if path.suffix == ".json":
        return json.loads(path.read_text("utf-8"))
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _airports(folder: Path) -> list[Series]:
    number: dict[str, int] = defaultdict(int)
    for row in _rows(folder / "airports.csv"):
        number[row["state"]] += 1
    states = sorted((s for s in number if len(s) == 2 and s.isupper() and s != "NA"), key=lambda s: (_scatter(s), s))
    return [Series("Airports", tuple(states), tuple(float(number[s]) for s in states), ordered=False)]


def _scatter(state: str) -> int:
    """Scatters neighbours in the alphabet."""
    return (ord(state[0]) * 37 + ord(state[1]) * 101) % 89


def _temperatures(folder: Path) -> list[Series]:
    """One day each, every four hours."""
    hours = {"00:00": "0am", "04:00": "4am", "08:00": "8am", "12:00": "noon", "16:00": "4pm", "20:00": "8pm"}
    out = []
    for name, file in (("Seattle", "seattle-temps"), ("San Francisco", "sf-temps")):
        days: dict[str, dict[str, float]] = defaultdict(dict)
        for row in _rows(folder / f"{file}.csv"):
            day, hour = row["date"].split(" ")
            if hour[:5] in hours:
                days[day][hours[hour[:5]]] = float(row["temp"])
        for day, found in sorted(days.items()):
            _, month, number = day.split("/")
            out.append(Series(f"{name}, {int(number)} {_MONTHS[int(month) - 1]} (°F)", *_unzip(found)))
    return out


def _days(folder: Path) -> list[Series]:
    """Weeks of Seattle's weather."""
    rows = _rows(folder / "seattle-weather.csv")
    out = []
    for column, title in (("temp_max", "Highest (°C)"), ("wind", "Wind (m/s)"), ("precipitation", "Rain (mm)")):
        for first in range(0, len(rows) - 6, 7):
            values = tuple(float(row[column]) for row in rows[first : first + 7])
            start = first % 7 + 6  # 1 January 2012 was a Sunday
            if min(values) >= 0 and max(values) > 0:
                out.append(Series(title, tuple(_DAYS[(start + i) % 7] for i in range(7)), values))
    return out


def _months(folder: Path) -> list[Series]:
    """Seattle's rain by month, and mean highest temperature."""
    rain: dict[tuple[str, str], list[float]] = defaultdict(list)
    heat: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in _rows(folder / "seattle-weather.csv"):
        year, month, _ = row["date"].split("/")
        rain[year, month].append(float(row["precipitation"]))
        heat[year, month].append(float(row["temp_max"]))
    labels = tuple(_MONTHS[int(month) - 1] for _, month in rain)
    return [
        Series("Rain (mm)", labels, tuple(sum(v) for v in rain.values())),
        Series("Mean high (°C)", labels, tuple(sum(v) / len(v) for v in heat.values())),
    ]


def _power(folder: Path) -> list[Series]:
    """Iowa's electricity in terawatt hours a year."""
    sources: dict[str, dict[str, float]] = defaultdict(dict)
    for row in _rows(folder / "iowa-electricity.csv"):
        sources[row["source"]][row["year"][:4]] = float(row["net_generation"]) / 1000
    return [Series(f"{name} (TWh)", *_unzip(found)) for name, found in sources.items()]


def _jobs(folder: Path) -> list[Series]:
    """Jobs in the United States, in thousands or millions, by month."""
    rows = _rows(folder / "us-employment.csv")
    labels = tuple(_MONTHS[int(row["month"][5:7]) - 1] for row in rows)
    out = []
    for column, name in _SECTORS.items():
        values = [float(row[column]) for row in rows]
        many = max(values) >= 10_000
        title, unit = (f"{name} jobs (M)", 1000) if many else (f"{name} jobs (k)", 1)
        out.append(Series(title, labels, tuple(v / unit for v in values)))
    return out


def _old_tables(folder: Path) -> list[Series]:
    """Wheat and wages from 1565 to 1821; deaths in the Crimean war, by cause and month."""
    wheat, crimea = _rows(folder / "wheat.json"), _rows(folder / "crimea.json")
    out = []
    for column, title in (("wheat", "Price of wheat"), ("wages", "Weekly wages")):
        found = {str(row["year"]): float(row[column]) for row in wheat if row.get(column) is not None}
        out.append(Series(title, *_unzip(found)))
    months = tuple(_MONTHS[int(row["date"][5:7]) - 1] for row in crimea)
    for column in ("wounds", "disease", "other"):
        out.append(Series(f"Crimea: {column}", months, tuple(float(row[column]) for row in crimea)))
    return out


def _unzip(found: dict[str, float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    return tuple(found), tuple(found.values())


_INKS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 140, 150), (90, 90, 90))


def ticks(high: float) -> list[float]:
    """Round numbers from 0 up to the first that is not under `high`, three to six of them."""
    power = 10.0 ** np.floor(np.log10(high))
    step = next(s * power for s in (0.2, 0.25, 0.5, 1, 2) if high <= 5 * s * power)
    return [step * i for i in range(int(np.ceil(high / step - 1e-9)) + 1)]


def _draw(rng: np.random.Generator, assets: Assets, series: Series, texts: list[str], labelled: bool) -> Image.Image:
    width, height = SIZES[rng.integers(len(SIZES))]
    dark = rng.random() < 0.12
    ground = tuple(rng.integers(15, 50, 3).tolist() if dark else rng.integers(238, 256, 3).tolist())
    text_ink, rule = ((235, 235, 235), (80, 80, 80)) if dark else ((20, 20, 20), (208, 208, 208))
    ink = _INKS[rng.integers(len(_INKS))]
    path = str(assets.fonts / FONTS[rng.integers(len(FONTS))])
    face, heading = font(path, 12), font(path, 13)

    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    marks = ticks(max(series.values))
    decimals = 0 if all(m == int(m) for m in marks) else 1 if all(round(10 * m, 6) % 1 == 0 for m in marks) else 2
    names = [f"{m:.{decimals}f}" for m in marks]
    left = int(max(face.getlength(n) for n in names)) + 8
    top, bottom, right = 24 + (12 if labelled else 4), height - 20, width - 5

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / marks[-1]

    draw.text((width / 2, 11), series.title, text_ink, heading, anchor="mm")
    for mark, text in zip(marks, names, strict=True):
        draw.line((left, y(mark), right, y(mark)), rule)
        draw.text((left - 4, y(mark)), text, text_ink, face, anchor="rm")
    slot = (right - left) / len(texts)
    centres = [left + slot * (i + 0.5) for i in range(len(texts))]
    if rng.random() < 0.6:
        half = slot * rng.uniform(0.28, 0.42)
        for x, value in zip(centres, series.values, strict=True):
            draw.rectangle((x - half, y(value), x + half, bottom), ink)
    else:
        points = [(x, y(v)) for x, v in zip(centres, series.values, strict=True)]
        draw.line(points, ink, 2)
        for px, py in points:
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), ink)
    draw.line((left, bottom, right, bottom), text_ink)
    for x, value, label, text in zip(centres, series.values, series.labels, texts, strict=True):
        draw.text((x, bottom + 10), label, text_ink, face, anchor="mm")
        if labelled:
            draw.text((x, y(value) - 4), text, text_ink, face, anchor="mb")
    return image
