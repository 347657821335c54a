"""Metrics from the literature, as pure functions of strings, and confidence intervals.

A metric takes a prediction and the right answers ("golds") and returns a score from 0 to 1. Boxes are the exception:
`match_boxes` counts them, because their score is computed over a task.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qwenvl_jax.eval.calls import tool_call, tool_step, tool_type

if TYPE_CHECKING:  # `--help` imports this file; the readers of answers compile a hundred patterns
    from qwenvl_jax.answers.boxes import Box

_Z = 1.959963984540054  # 97.5% quantile of the normal distribution: two-sided 95%
_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"


def exact(prediction: str, golds: Sequence[str], *, case_sensitive: bool = True) -> float:
    """1 if the prediction is one of the answers, else 0; compared in NFC, without white space at the ends."""

    def normal(text):
        text = unicodedata.normalize("NFC", text).strip()
        return text if case_sensitive else text.casefold()

    return float(normal(prediction) in map(normal, golds))


def anls(prediction: str, golds: Sequence[str], *, threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity of one item, the best over the golds: ST-VQA (arXiv:1905.13648).

    1 − distance / length of the longer text, or 0 if that ratio reaches the threshold. Case and white space at the ends
    are ignored, as in DocVQA's evaluation (arXiv:2007.00398).
    """

    def one(gold):
        a, b = (unicodedata.normalize("NFC", text).strip().lower() for text in (prediction, gold))
        ratio = _levenshtein(a, b) / max(len(a), len(b), 1)
        return 1 - ratio if ratio < threshold else 0.0

    return max(map(one, golds))


def relaxed(prediction: str, golds: Sequence[str], *, tolerance: float = 0.05) -> float:
    """Relaxed accuracy of ChartQA (arXiv:2203.10244): 1 for a number within 5% of the answer, else 0.

    If either side is not a number, the texts must be equal, up to case and outer white space. "12%" is 0.12, as in
    Pix2Struct's evaluation. Only 0 is within 5% of 0 (that evaluation compares "0" as a string).
    """

    def one(gold):
        p, g = _number(prediction), _number(gold)
        if p is None or g is None:
            return prediction.strip().lower() == gold.strip().lower()
        return abs(p - g) <= tolerance * abs(g) * (1 + 1e-9)  # binary rounding: 1.05 - 1 > 0.05

    return float(any(map(one, golds)))


def seconds(prediction: str, golds: Sequence[str], *, tolerance: float = 0.5) -> float:
    """1 if the first time in the prediction is within `tolerance` seconds of an answer's first time, else 0.

    Which time is the first, see `answers.moments.first_time`.
    """
    from qwenvl_jax.answers.moments import first_time

    p, times = first_time(prediction), map(first_time, golds)
    return float(p is not None and any(t is not None and abs(p - t) <= tolerance + 1e-9 for t in times))


def tiou(prediction: str, golds: Sequence[str]) -> float:
    """Temporal intersection over union of the spans in the prediction and in an answer; the best over the golds.

    Several spans count as their union; instants count nothing. The mean over a task is the mIoU of Charades-STA
    (arXiv:1705.02101).
    """
    p, spans = _spans(prediction), [_spans(gold) for gold in golds]
    return max(_overlap(p, gold) for gold in spans)


def _overlap(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """Intersection over union of two lists of spans that are sorted and disjoint."""
    total = sum(end - start for start, end in [*a, *b])
    shared, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        shared += max(min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]), 0.0)
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return shared / (total - shared) if total > shared else 0.0


def _spans(text: str) -> list[tuple[float, float]]:
    """The spans of a text, sorted, with those that overlap joined."""
    from qwenvl_jax.answers import moments

    out: list[tuple[float, float]] = []
    for start, end in sorted((m.start, m.end) for m in moments.parse(text).moments if m.end is not None):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((start, end))
    return out


def _number(text: str) -> float | None:
    text = text.strip()
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    if not re.fullmatch(_NUMBER, text) or not math.isfinite(float(text)):
        return None
    return float(text) / 100 if percent else float(text)


def _levenshtein(a: str, b: str) -> int:
    """The least number of inserted, deleted and replaced characters that turns a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


# --- boxes ----------------------------------------------------------------------------------------------


class Matched(NamedTuple):
    """Counts for one image."""

    right: int  # pairs of a predicted and a gold box
    predicted: int
    gold: int

    @property
    def f1(self) -> float:
        return 2 * self.right / total if (total := self.predicted + self.gold) else 1.0


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two rectangles; labels are ignored. 0 if one is empty or inverted."""
    width, height = min(a.x2, b.x2) - max(a.x1, b.x1), min(a.y2, b.y2) - max(a.y1, b.y1)
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box.x2 - box.x1) * (box.y2 - box.y1) for box in (a, b))
    return width * height / (areas - width * height)


def overlaps(predicted: Box, gold: Box) -> bool:
    return iou(predicted, gold) >= 0.5


def inside(predicted: Box, gold: Box) -> bool:
    """Whether the predicted point, or the centre of a predicted box, is in the gold box, as in ScreenSpot."""
    x, y = (predicted.x1 + predicted.x2) / 2, (predicted.y1 + predicted.y2) / 2
    return gold.x1 <= x <= gold.x2 and gold.y1 <= y <= gold.y2


def match_boxes(predicted: Sequence[Box], gold: Sequence[Box], fit: Callable[[Box, Box], bool] = overlaps) -> Matched:
    """Pairs boxes one to one, as many as possible: the same label (up to case), and fit(predicted, gold).

    A gold box without a label fits any label: the question named the object, as in referring expressions. A second box
    on the same object has no partner and lowers precision.
    """

    def label(box):
        return unicodedata.normalize("NFC", box.label).strip().casefold()

    labels = [label(g) for g in gold]
    fits = [
        [i for i, g in enumerate(gold) if labels[i] in (mine, "") and fit(p, g)]
        for p, mine in ((p, label(p)) for p in predicted)
    ]
    partner: dict[int, int] = {}  # gold → predicted
    mate: dict[int, int] = {}  # predicted → gold

    def place(p: int) -> bool:
        """Pairs p with a gold box, re-pairing others if needed (an augmenting path); False if impossible."""
        reached, queue = {}, [p]  # gold → the predicted box that it was reached from
        while queue:
            q = queue.pop()
            for g in fits[q]:
                if g in reached:
                    continue
                reached[g] = q
                if g in partner:
                    queue.append(partner[g])
                    continue
                end: int | None = g
                while end is not None:
                    q = reached[end]
                    former = mate.get(q)
                    mate[q], partner[end] = end, q
                    end = former
                return True
        return False

    return Matched(sum(place(p) for p in range(len(predicted))), len(predicted), len(gold))


# --- tables ---------------------------------------------------------------------------------------------

_NODES = 1000  # of one table; the time grows with their square


class _Node(NamedTuple):
    first: int  # the node's first leaf, as an index into the tree in postorder
    shape: tuple  # what must be the same
    text: str


def teds(prediction: str, golds: Sequence[str]) -> float:
    """Tree edit distance similarity of tables, the best over the golds: arXiv:1911.10683.

    1 − distance / nodes of the larger table, not counting its root. A row or cell too many or too few costs 1, a cell
    with other spans costs 1, and one with another text the Levenshtein distance over the length of the longer text.
    The first table of each text counts, in HTML or in any form that `answers.documents` reads. <thead> and <tbody> are
    no nodes, <th> is a cell as <td> is, and tags in a cell are left out: three differences from the paper's code.
    0 if there is no table, or one of more than 1,000 rows and cells.
    """
    predicted = table_tree(prediction)
    if predicted is None:
        return 0.0
    wanted = [tree for gold in golds if (tree := table_tree(gold)) is not None]
    scores = (1 - _edits(predicted, tree) / max(len(predicted) - 1, len(tree) - 1, 1) for tree in wanted)
    return max(scores, default=0.0)


def table_tree(text: str) -> list[_Node] | None:
    """The first table of a text in postorder; None without one, or if it has more than 1,000 rows and cells."""
    from qwenvl_jax.answers import blocks, documents

    table = next((block for block in documents.parse(text).walk() if block.kind == "table"), None)
    tree: list[_Node] = []
    for row in table.children if table else ():
        if not blocks.is_kind(row, "row"):
            continue
        first = len(tree)
        for cell in row.children:
            if blocks.is_kind(cell, "cell"):
                spans = (cell.attributes.get("rowspan", 1), cell.attributes.get("colspan", 1))
                tree.append(_Node(len(tree), ("cell", *spans), " ".join(blocks.text(cell).split())))
        tree.append(_Node(first, ("row",), ""))
    return [*tree, _Node(0, ("table",), "")] if table and len(tree) <= _NODES else None


def _edits(a: list[_Node], b: list[_Node]) -> float:
    """The least cost of the edits that turn one tree into the other: Zhang and Shasha 1989 (doi:10.1137/0218082)."""
    known: dict[tuple[str, str], float] = {}

    def change(x: _Node, y: _Node) -> float:
        if x.shape != y.shape:
            return 1.0
        if x.text == y.text:
            return 0.0
        if (x.text, y.text) not in known:
            known[x.text, y.text] = _levenshtein(x.text, y.text) / max(len(x.text), len(y.text))
        return known[x.text, y.text]

    trees = [[0.0] * len(b) for _ in a]  # the distances of the subtrees
    ends_a, ends_b = ({node.first: i for i, node in enumerate(tree)}.values() for tree in (a, b))
    for i in sorted(ends_a):
        for j in sorted(ends_b):
            i0, j0 = a[i].first, b[j].first
            above = [float(n) for n in range(j - j0 + 2)]  # from no tree to the first n
            forests = [above]
            for m in range(i0, i + 1):
                row = [above[0] + 1]
                for n in range(j0, j + 1):
                    least = min(above[n - j0 + 1], row[-1]) + 1
                    if a[m].first == i0 and b[n].first == j0:
                        trees[m][n] = least = min(least, above[n - j0] + change(a[m], b[n]))
                    else:
                        least = min(least, forests[a[m].first - i0][b[n].first - j0] + trees[m][n])
                    row.append(least)
                forests.append(row)
                above = row
    return trees[-1][-1]


# --- intervals ------------------------------------------------------------------------------------------


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95% interval of a proportion, `right` of n ≥ 1: Wilson 1927 (doi:10.1080/01621459.1927.10502953)."""
    p, z2 = right / n, _Z * _Z
    centre, half = p + z2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return max(low, 0.0) if right else 0.0, min(high, 1.0) if right < n else 1.0


def bootstrap(
    numerators: Sequence[float], denominators: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile interval of sum(numerators) / sum(denominators); items are drawn with replacement.

    Denominators of 1 give the interval of a mean. If all items score the same, the interval has no width.
    """
    import numpy as np  # not at the top: `--help` imports this file

    pairs = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], 1)
    rng = np.random.default_rng(seed)
    sums = np.array([pairs[rng.integers(0, len(pairs), len(pairs))].sum(0) for _ in range(resamples)])
    ratios = np.divide(sums[:, 0], sums[:, 1], out=np.ones(resamples), where=sums[:, 1] > 0)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


METRICS: dict[str, Callable[..., float]] = {
    f.__name__: f for f in (exact, anls, relaxed, seconds, tiou, tool_type, tool_call, tool_step, teds)
}
# F1 over the boxes of a task, by what makes two of them a pair; the other metrics are means over items.
BOXES: dict[str, Callable[[Box, Box], bool]] = {"iou": overlaps, "points": inside}
