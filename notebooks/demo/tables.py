"""Real tables for the charts, split by time (airports: by state) into a training and an evaluation part.

All are in the public domain: airports (ourairports.com), temperatures and weather (NOAA), power (Energy
Information Administration), jobs (Bureau of Labor Statistics), wheat and wages (Playfair 1822, released by
M. Bostock), the Crimean war (Nightingale 1858).
"""

import csv
import json
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from demo.assets import Assets

TRAINED = 0.75  # the share of every table for training: the earlier part
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
_HOURS = {"00:00": "0am", "04:00": "4am", "08:00": "8am", "12:00": "noon", "16:00": "4pm", "20:00": "8pm"}
_SECTORS = {
    "construction": "Building", "manufacturing": "Factory", "retail_trade": "Retail", "government": "State",
    "financial_activities": "Finance", "information": "Media", "transportation_and_warehousing": "Traffic",
    "mining_and_logging": "Mining", "leisure_and_hospitality": "Leisure", "education_and_health_services": "Health",
}  # fmt: skip


class Series(NamedTuple):
    """A row of a table: `labels` with their `values`. ordered: a chart must take neighbours."""

    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    ordered: bool = True


@lru_cache(2)
def tables(assets: Assets, evaluation: bool) -> list[list[Series]]:
    """The training or evaluation part of each table, as lists of series."""
    makers = (_airports, _temperatures, _days, _jobs, _long)
    return [part for maker in makers if (part := _part(maker(assets.tables), evaluation))]


def _part(table: list[Series], evaluation: bool) -> list[Series]:
    """A table with many series is split between series; otherwise each series is split."""

    def side(n: int) -> slice:
        cut = round(TRAINED * n)
        return slice(cut, None) if evaluation else slice(cut)

    if len(table) >= 50:
        return table[side(len(table))]
    parts = []
    for series in table:
        span = side(len(series.labels))
        parts.append(series._replace(labels=series.labels[span], values=series.values[span]))
    return parts


def _rows(path: Path) -> list[dict]:
    if path.suffix == ".json":
        return json.loads(path.read_text("utf-8"))
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _airports(folder: Path) -> list[Series]:
    """Airports per state; states are shuffled, so that the parts do not split by first letter."""
    number = Counter(row["state"] for row in _rows(folder / "airports.csv"))
    states = [s for s in number if len(s) == 2 and s.isupper() and s != "NA"]
    states.sort(key=lambda s: ((ord(s[0]) * 37 + ord(s[1]) * 101) % 89, s))
    return [Series("Airports", tuple(states), tuple(float(number[s]) for s in states), ordered=False)]


def _temperatures(folder: Path) -> list[Series]:
    """Every day of 2010 in two cities, every four hours."""
    days: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for city, file in (("Seattle", "seattle-temps"), ("San Francisco", "sf-temps")):
        for row in _rows(folder / f"{file}.csv"):
            day, hour = row["date"].split(" ")
            if hour[:5] in _HOURS:
                days[day, city][_HOURS[hour[:5]]] = float(row["temp"])
    return [
        Series(f"{city}, {int(day[8:])} {MONTHS[int(day[5:7]) - 1]} (°F)", tuple(found), tuple(found.values()))
        for (day, city), found in sorted(days.items())
    ]


def _days(folder: Path) -> list[Series]:
    """Weeks of Seattle's weather, 2012 to 2015; the first of January 2012 was a Sunday."""
    rows = _rows(folder / "seattle-weather.csv")
    out = []
    for first in range(0, len(rows) - 6, 7):
        for column, title in (("temp_max", "Highest (°C)"), ("wind", "Wind (m/s)"), ("precipitation", "Rain (mm)")):
            values = tuple(float(row[column]) for row in rows[first : first + 7])
            if min(values) >= 0 and max(values) > 0:
                out.append(Series(title, _DAYS, values))
    return out


def _jobs(folder: Path) -> list[Series]:
    """Millions of jobs by sector in the United States, every month of 2006 to 2015."""
    out = []
    for row in _rows(folder / "us-employment.csv"):
        title = f"Jobs, {MONTHS[int(row['month'][5:7]) - 1]} {row['month'][:4]} (M)"
        values = tuple(float(row[column]) / 1000 for column in _SECTORS)
        out.append(Series(title, tuple(_SECTORS.values()), values, ordered=False))
    return out


def _long(folder: Path) -> list[Series]:
    """Seattle by month, Iowa's power, old prices, the Crimean war."""
    rain: dict[str, float] = defaultdict(float)
    heat: dict[str, list[float]] = defaultdict(list)
    for row in _rows(folder / "seattle-weather.csv"):
        rain[row["date"][:7]] += float(row["precipitation"])
        heat[row["date"][:7]].append(float(row["temp_max"]))
    out = [
        _by_month("Rain (mm)", rain),
        _by_month("Mean high (°C)", {month: sum(values) / len(values) for month, values in heat.items()}),
    ]
    power: dict[str, dict[str, float]] = defaultdict(dict)
    for row in _rows(folder / "iowa-electricity.csv"):
        power[row["source"]][row["year"][:4]] = float(row["net_generation"]) / 1000
    out += [Series(f"{name} (TWh)", tuple(found), tuple(found.values())) for name, found in power.items()]
    wheat = _rows(folder / "wheat.json")
    for column, title in (("wheat", "Price of wheat"), ("wages", "Weekly wages")):
        found = {str(row["year"]): float(row[column]) for row in wheat if row.get(column) is not None}
        out.append(Series(title, tuple(found), tuple(found.values())))
    for column in ("wounds", "disease", "other"):
        found = {row["date"]: float(row[column]) for row in _rows(folder / "crimea.json")}
        out.append(_by_month(f"Crimea: {column}", found))
    return out


def _by_month(title: str, found: dict[str, float]) -> Series:
    return Series(title, tuple(MONTHS[int(date[5:7]) - 1] for date in found), tuple(found.values()))
