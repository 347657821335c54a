"""Tree edit distance similarity of tables, against values computed by hand and against the recursive definition."""

import functools
import json
import random

import pytest
from tiny import read_questions

from qwenvl_jax.errors import InputError
from qwenvl_jax.eval.metrics import METRICS, _levenshtein, table_tree, teds


def table(*rows) -> str:
    cells = ("".join(cell if cell.startswith("<") else f"<td>{cell}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


@pytest.mark.parametrize(
    "prediction, gold, score",
    [
        (table("ab", "cd"), table("ab", "cd"), 1),
        (table("ab"), table("ab", "cd"), 1 - 3 / 6),  # a row and its two cells are missing
        (table("ab", "cd", "ef"), table("ab", "ef"), 1 - 3 / 9),  # a row too many, in the middle
        (table("abc"), table("ac"), 1 - 1 / 4),
        (table("ab"), table("ba"), 1 - 2 / 3),  # two texts differ in all they have
        (table(["ax", "b"]), table(["ay", "b"]), 1 - 0.5 / 3),
        (
            table(["<td colspan=2>a</td>"]),
            table(["a"]),
            1 - 1 / 2,
        ),  # a span and its text cost no more than another cell
        (table(["<th>a</th>"]), table(["a"]), 1),
        (table(["<td><b>a</b> <br> b</td>"]), table(["a b"]), 1),
        ("<table bbox='1 2 3 4'></table>", "<table bbox='1 2 3 4'></table>", 1),
        ("<table data-bbox='1 2 3 4'></table>", table("ab"), 0),
        ("no table", table("ab"), 0),
        ("", table("ab"), 0),
        (table("ab")[:-19], table("ab"), 1 - 1 / 3),  # cut off before the second cell
        ("| a | b |\n|---|---|\n| c | d |", table("ab", "cd"), 1),
        (
            r"<!-- Table (1, 2, 3, 4) -->" + "\n" + r"\begin{tabular}{ll} a & b \\ c & d \end{tabular}",
            table("ab", "cd"),
            1,
        ),
        (f"```html\n<html><body>{table('ab')}{table('xyz')}</body></html>\n```", table("ab"), 1),
    ],
)
def test_values(prediction, gold, score):
    assert teds(prediction, [gold]) == pytest.approx(score, abs=1e-12)
    assert teds(prediction, ["<table><tr><td>0123456789", gold]) >= teds(prediction, [gold])


def nested(tree):
    """The tree as (shape, text, children)."""
    children: list = []
    for i, node in enumerate(tree):
        own = [child for child in children if child[0] >= node.first]
        children = [child for child in children if child[0] < node.first] + [
            (i, (node.shape, node.text, tuple(c[1] for c in own)))
        ]
    return children[0][1]


@functools.cache
def distance(a: tuple, b: tuple) -> float:
    """The edit distance of two forests by its definition."""
    if not a or not b:
        return sum(1 + distance(tree[2], ()) for tree in a) + sum(1 + distance((), tree[2]) for tree in b)
    (x, y), longest = (a[-1], b[-1]), max(len(a[-1][1]), len(b[-1][1]), 1)
    change = 1.0 if x[0] != y[0] else _levenshtein(x[1], y[1]) / longest
    return min(
        distance(a[:-1] + x[2], b) + 1,
        distance(a, b[:-1] + y[2]) + 1,
        distance(a[:-1], b[:-1]) + distance(x[2], y[2]) + change,
    )


def test_definition():
    rng = random.Random(0)
    cells = ["a", "ab", "abc", "", '<td rowspan="2">a</td>', '<td colspan="2">ab</td>']
    for _ in range(150):
        texts = [table(*(rng.choices(cells, k=rng.randint(0, 4)) for _ in range(rng.randint(1, 4)))) for _ in range(2)]
        a, b = map(table_tree, texts)
        want = 1 - distance((nested(a),), (nested(b),)) / max(len(a) - 1, len(b) - 1)
        assert teds(texts[0], [texts[1]]) == pytest.approx(want, abs=1e-9) == pytest.approx(teds(texts[1], [texts[0]]))


def test_large_tables_score_zero():
    large = "<table>" + "<tr><td>x" * 600
    assert teds(large, [table("ab")]) == 0 and teds("<table>" + "<tr><td>x" * 100, [table("x")]) == pytest.approx(
        2 / 200
    )


def test_questions():
    assert METRICS["teds"] is teds
    ask = {"messages": [{"role": "user", "content": "?"}], "metric": "teds"}
    (question,) = read_questions([ask | {"answer": table("ab")}])
    assert question.metric == "teds" and json.dumps(question.answers)
    with pytest.raises(InputError, match="it must be a table of at most 1,000 rows and cells"):
        read_questions([ask | {"answer": "a, b"}])
