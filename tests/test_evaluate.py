"""Evaluation: metrics compared with values computed by hand, intervals, and questions from a file to a table."""

import fcntl
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from make_tiny import make_tiny, small_config
from PIL import Image
from tiny import read_questions

from qwenvl_jax import cli
from qwenvl_jax.answers.boxes import Box, parse_boxes
from qwenvl_jax.errors import InputError, NonFiniteError
from qwenvl_jax.eval import metrics
from qwenvl_jax.eval.evaluator import Evaluator, evaluate
from qwenvl_jax.eval.journal import fingerprint
from qwenvl_jax.eval.questions import Question
from qwenvl_jax.eval.report import report, score
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.params import checkpoint


def test_the_model_of_lmms_eval_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "qwenvl_jax.eval.lmms", raising=False)
    with pytest.raises(ImportError, match=r"lmms-eval cannot be imported .*Install it: .*\[lmms-eval\]"):
        import qwenvl_jax.eval.lmms  # noqa: F401


@pytest.mark.parametrize(
    "prediction, golds, want",
    [
        ("Paris", ["Paris"], 1),
        (" Paris\n", ["Paris "], 1),
        ("paris", ["Paris"], 0),
        ("Paris.", ["Paris"], 0),
        ("a  b", ["a b"], 0),
        ("", ["x"], 0),
        ("", [""], 1),
        ("b", ["a", "b"], 1),
        ("cafe\u0301", ["café"], 1),  # é as two characters and as one
        ("2", ["2.0"], 0),
    ],
)
def test_exact(prediction, golds, want):
    assert metrics.exact(prediction, golds) == want


def test_exact_without_case():
    assert metrics.exact("STRASSE", ["straße"], case_sensitive=False) == 1


@pytest.mark.parametrize(
    "prediction, golds, want",
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("Sitting", ["sITTING "], 1),
        ("abcd", ["abXY"], 0),  # half of it is wrong: 0
        ("abcde", ["abcXY"], 1 - 2 / 5),
        ("", ["x"], 0),
        ("", [""], 1),
        ("naïve", ["naive", "nave"], 1 - 1 / 5),
        ("日本語", ["日本"], 1 - 1 / 3),
        ("abc", ["xyz", "abd"], 1 - 1 / 3),  # the best of several
    ],
)
def test_anls(prediction, golds, want):
    assert metrics.anls(prediction, golds) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    "prediction, gold, want",
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.01", "100", 0),
        ("1.05", "1", 1),  # 1.05 - 1 > 0.05 in binary
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("0", "0", 1),
        ("0.0", "0", 1),
        ("0.001", "0", 0),
        ("25%", "0.25", 1),
        ("25 %", "25%", 1),
        ("25%", "25", 0),
        ("1e2", "100", 1),
        ("nan", "nan", 1),  # not numbers, but equal texts
        ("inf", "100", 0),
        ("1e999", "100", 0),
        ("", "3", 0),
        ("3 apples", "3", 0),
        (" YES ", "yes", 1),
        ("2019", "year 2019", 0),
        ("²", "2", 0),
    ],
)
def test_relaxed(prediction, gold, want):
    assert metrics.relaxed(prediction, [gold]) == want


def test_relaxed_takes_any_of_several():
    assert metrics.relaxed("20", ["10", "20.5"]) == 1
    assert metrics.relaxed("20", ["10", "x"]) == 0


@pytest.mark.parametrize(
    "prediction, gold, want",
    [
        ("3.5 seconds", "3.0 seconds", 1),
        ("3.51", "3.0", 0),
        ("1.1", "0.6", 1),  # 1.1 - 0.6 > 0.5 in binary
        ("2.3", "1.8", 1),
        ("At 3 s.", "3.5", 1),
        ("1:02.5", "62", 1),
        ("01:00:01", "3601.4", 1),
        ("no idea", "3", 0),
        ("", "3", 0),
        ("1, 2 or 3", "3", 0),  # only the first counts
        ("2 trucks appear at 0:03", "3", 1),
        ("It lasts 3 seconds, from 0:08", "3", 0),
        ("1e999", "3", 0),
    ],
)
def test_seconds(prediction, gold, want):
    assert metrics.seconds(prediction, [gold]) == want


@pytest.mark.parametrize(
    "prediction, gold, want",
    [
        ("from 10 to 20 seconds", "[[10, 20]]", 1),
        ("from 10 to 20 seconds", "00:15 - 00:25", 5 / 15),
        ("from 10 to 20 seconds", "20 to 30 seconds", 0),
        ('{"start_time": "00:10", "end_time": "00:20"}', "[[10, 12], [18, 20]]", 0.4),
        ("0 to 5 seconds and 3 to 8 seconds", "[[0, 8]]", 1),  # spans that overlap count once
        ("1 to 2 seconds, 5 to 9 seconds", "[[5, 9], [1, 2]]", 1),
        ("1 to 3 seconds, 4 to 6 seconds", "[[2, 5]]", 2 / 5),
        ("at 15 seconds", "10 to 20 seconds", 0),
        ("from 20 to 10 seconds", "10 to 20 seconds", 0),
        ("", "10 to 20 seconds", 0),
        ("15 to 15 seconds", "10 to 20 seconds", 0),
    ],
)
def test_tiou(prediction, gold, want):
    assert metrics.tiou(prediction, [gold]) == pytest.approx(want, abs=1e-12)
    assert metrics.tiou(prediction, ["90 to 91 seconds", gold]) == pytest.approx(want, abs=1e-12)


CUT_CALL = '\n<tool_call>\n{"name": "x", "argum\n</tool_call>'


def called(*calls) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


CLICK = {"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [10, 20]}}
ZOOM = {"name": "zoom", "arguments": {"factor": 2}}


@pytest.mark.parametrize(
    "prediction, golds, types, whole",
    [
        (called(CLICK), [called(CLICK)], 1, 1),
        ("I click. " + called({"arguments": {"coordinate": [10.0, 20], "action": "left_click"}, "name": CLICK["name"]}),
         [called(CLICK)], 1, 1),
        (called({**CLICK, "arguments": {"action": "left_click", "coordinate": [11, 20]}}), [called(CLICK)], 1, 0),
        (called({**CLICK, "arguments": {"action": "wait", "coordinate": [10, 20]}}), [called(CLICK)], 0, 0),
        (called({**CLICK, "name": "mobile_use"}), [called(CLICK)], 0, 0),
        (called(ZOOM), [called(CLICK), called(ZOOM)], 1, 1),
        (called(CLICK, ZOOM), [called(CLICK, ZOOM)], 1, 1),
        (called(ZOOM, CLICK), [called(CLICK, ZOOM)], 0, 0),
        (called(CLICK), [called(CLICK, ZOOM)], 0, 0),
        ("left_click at (10, 20)", [called(CLICK)], 0, 0),
        ("<tool_call>\n" + json.dumps(CLICK), [called(CLICK)], 1, 1),
        (called(CLICK)[:-30], [called(CLICK)], 0, 0),
        (called(CLICK) + CUT_CALL, [called(CLICK)], 0, 0),
        (CUT_CALL + called(CLICK), [called(CLICK)], 0, 0),
        ("<tool_call>broken</tool_call>", ["hello"], 0, 0),
        ("hello", ["<tool_call>broken</tool_call>", "hello"], 1, 1),
    ],
)  # fmt: skip
def test_tool_calls(prediction, golds, types, whole):
    assert metrics.tool_type(prediction, golds) == types
    assert metrics.tool_call(prediction, golds) == whole


def drag(*points) -> dict:
    arguments = {"action": "left_click_drag", "coordinate": list(points[:2]), "coordinate2": list(points[2:])}
    return {"name": "computer_use", "arguments": arguments}


def swipe(*points) -> dict:
    arguments = {"action": "swipe", "coordinate": list(points[:2]), "coordinate2": list(points[2:])}
    return {"name": "mobile_use", "arguments": arguments}


def click(place, name="mobile_use", **more) -> dict:
    return {"name": name, "arguments": {"action": "click", "coordinate": place, **more}}


@pytest.mark.parametrize(
    "said, right, want",
    [
        # within 14% of a screen of 1000 x 2000: widths and heights count alike
        (click([500, 1000]), click([500, 1000]), 1),
        (click([639, 1000]), click([500, 1000]), 1),
        (click([641, 1000]), click([500, 1000]), 0),
        (click([500, 1279]), click([500, 1000]), 1),
        (click([500, 1281]), click([500, 1000]), 0),
        (click([599, 1199]), click([500, 1000]), 0),
        (click(["510", "990"]), click([500, 1000]), 1),
        # in the element's box, however large; a box is no tolerance
        (click([53, 2104]), click([53, 1287, 513, 2104]), 1),
        (click([52, 2104]), click([53, 1287, 513, 2104]), 0),
        (click([9, 9]), click([[53, 1287, 513, 2104], [0, 0, 10, 10]]), 1),
        (click([20, 9]), click([[53, 1287, 513, 2104], [0, 0, 10, 10]]), 0),
        # what is no point, and everything else, must be equal
        (click([500]), click([500, 1000]), 0),
        (click("there"), click([500, 1000]), 0),
        (click([500, 1000], time=1), click([500, 1000]), 0),
        (click([500, 1000], time=1), click([500, 1000], time=2), 0),
        (click([500, 1000], "computer_use"), click([500, 1000]), 0),
        ({**ZOOM}, ZOOM, 1),
        ({"name": "zoom", "arguments": {"factor": 3}}, ZOOM, 0),
        ({"name": "a", "arguments": {"action": "type", "text": "hi"}},
         {"name": "a", "arguments": {"action": "type", "text": "hi "}}, 0),
        # a swipe has one of four directions
        (swipe(500, 1500, 480, 400), swipe(100, 900, 100, 800), 1),
        (swipe(500, 400, 500, 1500), swipe(100, 900, 100, 800), 0),
        (swipe(500, 400, 900, 500), swipe(100, 900, 100, 800), 0),
        (swipe(500, 400, 500, 400), swipe(100, 900, 100, 800), 0),
        (click([100, 900]), swipe(100, 900, 100, 800), 0),
        ({"name": "swipe", "arguments": {"coordinate": [500, 1500], "coordinate2": [480, 400]}},
         {"name": "swipe", "arguments": {"coordinate": [100, 900], "coordinate2": [100, 800]}}, 1),
        # a drag has two ends
        (drag(0, 0, 0, 500), drag(900, 100, 900, 110), 0),
        (drag(900, 100, 900, 500), drag(900, 100, 900, 110), 0),
        (drag(890, 120, 910, 110), drag(900, 100, 900, 110), 1),
    ],
)  # fmt: skip
def test_steps_of_agents(said, right, want):
    assert metrics.tool_step(called(said), ["nothing", called(right)], screen=(1000, 2000)) == want
    assert metrics.tool_step(called(said, ZOOM), [called(right)], screen=(1000, 2000)) == 0
    assert metrics.tool_step(called(ZOOM, said), [called(ZOOM, right)], screen=(1000, 2000)) == want
    assert metrics.tool_step(called(said) + CUT_CALL, [called(right)], screen=(1000, 2000)) == 0


@pytest.mark.parametrize(
    "given",
    [*(dict(screen=s) for s in ((0, 0), (1, 0), (1,), (-1, -1), (math.nan, 1), (math.inf, 1), "xy")),
     *(dict(tolerance=t) for t in (-1, math.nan, "x", None))],
)  # fmt: skip
def test_steps_need_a_screen_with_an_area(given):
    (name,) = given
    with pytest.raises(InputError, match=rf"{name} is .*; it must be"):
        metrics.tool_step("", [""], **given)


def test_without_a_screen_points_are_equal():
    gold = called(click([500, 1000]))
    assert metrics.tool_step(gold, [gold]) == 1 and metrics.tool_step(called(click([501, 1000])), [gold]) == 0
    assert metrics.tool_step(gold, [called(click([400, 900, 600, 1100]))]) == 1


@pytest.mark.parametrize(
    "metric, answer, golds, prediction",
    [
        ("tiou", "from 12.5 to 20 seconds", ("from 12.5 to 20 seconds",), "12.5s - 20s"),
        ("tiou", ["0:05 - 0:10", "0:07 - 0:09"], ("0:05 - 0:10", "0:07 - 0:09"), "7 to 9 seconds"),
        ("tiou", [12.5, 20.0], ("[12.5, 20.0]",), "12.5s - 20s"),
        ("tiou", [[1, 2], [5, 6]], ("[[1, 2], [5, 6]]",), "1s - 2s and 5s - 6s"),
        ("tiou", {"start": 1, "end": 2}, ('{"start": 1, "end": 2}',), "1s - 2s"),
        ("tool_call", called(CLICK), (called(CLICK),), called(CLICK)),
        ("tool_call", CLICK, (called(CLICK),), called(CLICK)),
        ("tool_type", [CLICK, ZOOM], (called([CLICK, ZOOM]),), called(CLICK, ZOOM)),
    ],
)
def test_right_spans_and_calls_may_be_written_in_several_ways(metric, answer, golds, prediction):
    (question,) = read_questions([{"messages": [ask("?")], "answer": answer, "metric": metric}])
    assert question.answers == golds and score(question, prediction).score == 1 and score(question, "no").score == 0


BOX = '{"bbox_2d": [1, 2, 30, 40], "label": "cat"}'
CAT = Box("cat", 1, 2, 30, 40)


@pytest.mark.parametrize(
    "answer",
    [BOX, [json.loads(BOX)], json.loads(BOX), f"```json\n[{BOX}]\n```", f"Here: [{BOX}]", "cat(1,2),(30,40)", "[]"],
)
def test_right_boxes_may_be_what_a_model_writes(answer):
    (question,) = read_questions([{"messages": [ask("?")], "answer": answer, "metric": "iou"}])
    want = [] if answer == "[]" else [CAT]
    assert parse_boxes(question.answers[0]) == want
    assert score(question, f"[{BOX}]" if want else "[]").score == 1


@pytest.mark.parametrize("gold", ["[1, 2, 30, 40]", [1, 2, 30, 40], {"bbox_2d": [1, 2, 30, 40]}, "(1,2),(30,40)"])
def test_a_right_box_without_a_label_fits_any_label(gold):
    (question,) = read_questions([{"messages": [ask("Where is the cat?")], "answer": gold, "metric": "iou"}])
    for said in (BOX, "[1, 2, 30, 40]", "<box>(1,2),(30,40)</box>", "kitty(1,2),(30,40)"):
        assert score(question, said).score == 1
    assert score(question, "[1, 2, 9, 9]").score == 0 and score(question, f"[{BOX}, {BOX}]").matched == (1, 2, 1)


@pytest.mark.parametrize(
    "gold", ["[1, 2, 30]", [1, 2, 30], {"bbox_2d": [1, 2, 30]}, "none", [{"label": "cat"}], [[1, 2]]]
)
def test_right_boxes_that_cannot_be_read(gold):
    with pytest.raises(InputError, match="answer must be a list of"):
        read_questions([{"messages": [ask("?")], "answer": gold, "metric": "iou"}])


@pytest.mark.parametrize(
    "said, matched",
    [
        ('{"point_2d": [1, 40], "label": "cat"}', (1, 1, 1)),
        ('<points x1="2" y1="3" x2="9" y2="9" alt="cat">cat</points>', (1, 2, 1)),
        ('{"point_2d": [0, 40], "label": "cat"}', (0, 1, 1)),
        ('{"point_2d": [2, 3], "label": "dog"}', (0, 1, 1)),
        ('{"bbox_2d": [0, 0, 50, 50], "label": "cat"}', (1, 1, 1)),  # its centre
        ('{"bbox_2d": [0, 0, 90, 90], "label": "cat"}', (0, 1, 1)),
        ("no", (0, 0, 1)),
    ],
)
def test_points_in_boxes(said, matched):
    (question,) = read_questions([{"messages": [ask("?")], "answer": BOX, "metric": "points"}])
    answer = score(question, said)
    assert answer.matched == matched and answer.score == 2 * matched[0] / (matched[1] + matched[2])
    assert "F1, points in boxes" in report([answer]).table()
    (unnamed,) = read_questions([{"messages": [ask("?")], "answer": "[1, 2, 30, 40]", "metric": "points"}])
    assert score(unnamed, "(5, 6)").score == 1
    assert score(question._replace(metric="iou"), '{"point_2d": [1, 40], "label": "cat"}').matched == (0, 0, 1)


def test_iou():
    a = Box("", 0, 0, 10, 10)
    assert metrics.iou(a, a) == 1
    assert metrics.iou(a, Box("", 5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert metrics.iou(a, Box("", 0, 0, 5, 10)) == 0.5
    assert metrics.iou(a, Box("", 10, 0, 20, 10)) == 0
    assert metrics.iou(a, Box("", 10, 10, 0, 0)) == 0  # inverted
    assert metrics.iou(a, Box("", 3, 3, 3, 3)) == 0


def test_boxes_are_paired_one_to_one():
    a, b = Box("cat", 0, 0, 10, 10), Box("cat", 20, 0, 30, 10)
    match = metrics.match_boxes
    assert match([b, a], [a, b]) == (2, 2, 2)
    assert match([a, a], [a]) == (1, 2, 1)  # the second box on one object has no partner
    assert match([a], [a, b]) == (1, 1, 2)
    assert match([a._replace(label=" CAT")], [a]) == (1, 1, 1)
    assert match([a._replace(label="dog")], [a]) == (0, 1, 1)
    assert match([], [a]) == (0, 0, 1) and match([], []) == (0, 0, 0)
    # The wide box fits both gold boxes; it must leave the left one to the box that fits only that.
    left, right, wide = Box("x", 0, 0, 10, 10), Box("x", 4, 0, 14, 10), Box("x", 1, 0, 12, 10)
    far = Box("x", -4, 0, 8, 10)
    assert metrics.iou(wide, left) >= 0.5 and metrics.iou(wide, right) >= 0.5
    assert metrics.iou(far, left) >= 0.5 > metrics.iou(far, right)
    assert match([wide, far], [left, right]) == (2, 2, 2)


def test_wilson():
    """The paper's formula: the two p with |p̂ − p| = z·√(p(1 − p)/n)."""
    for right, n in ((0, 7), (1, 1), (3, 10), (465, 500), (500, 500)):
        low, high = metrics.wilson(right, n)
        for p in (low, high):
            assert abs(right / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), abs=1e-6)
        assert 0 <= low <= right / n <= high <= 1
    assert metrics.wilson(465, 500) == pytest.approx((0.9043, 0.9492), abs=1e-4)


def test_bootstrap():
    values = [0.0, 1.0] * 200
    low, high = metrics.bootstrap(values, [1.0] * 400)
    # The normal interval of the mean: 0.5 ± 1.96 · 0.5 / √400.
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)
    assert metrics.bootstrap(values, [1.0] * 400) == (low, high)  # seeded
    assert metrics.bootstrap([0.0], [0.0]) == (1.0, 1.0)  # no boxes to find and none found


def test_boxes_are_counted_over_a_task():
    """F1 of all boxes together, not the mean over items. Without predictions, precision and recall are 0."""
    boxes = [Box("cat", 20 * i, 0, 20 * i + 10, 10) for i in range(4)]
    text = json.dumps([{"bbox_2d": b[1:], "label": b.label} for b in boxes])

    def scored(*predictions):
        question = Question([], (text,), "t", "iou", "here")
        ((s,), _, answers, _) = vars(report([score(question, p) for p in predictions])).values()
        return s, [a.score for a in answers]

    one = json.dumps([{"bbox_2d": [0, 0, 10, 10], "label": "cat"}])
    s, each = scored(text, one)
    assert each == [1.0, 2 / 5]
    assert s.value == pytest.approx(10 / 13) and s.details == {"precision": 1.0, "recall": 5 / 8}
    assert s.low < s.value < s.high
    s, _ = scored("", "no")
    assert (s.value, s.details) == (0.0, {"precision": 0.0, "recall": 0.0})
    text = "[]"
    s, _ = scored("[]", "none here")
    assert (s.value, s.details) == (1.0, {"precision": 1.0, "recall": 1.0})
    s, _ = scored(one)
    assert (s.value, s.details) == (0.0, {"precision": 0.0, "recall": 0.0})


def test_odd_answers():
    """Deep nesting and large numbers in a prediction are wrong answers, not errors."""
    gold = Question([], (f"[{BOX}]",), "t", "iou", "here")
    assert score(gold, "[" * 5000 + BOX).score == 1
    assert score(gold, '[{"bbox_2d": [1e400, 2, 30, 40], "label": "cat"}]').score == 0


# Records


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records))
    return path


def ask(text, *media):
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def test_what_a_record_may_be(tmp_path):
    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "3"}]
    a, b, c, d = read_questions(
        write(
            tmp_path / "q.jsonl",
            {"conversations": turns, "image": "a.png", "task": "count"},
            "",
            {"messages": [ask("Ä?")], "answer": ["ä", 3], "metric": "anls"},
            {"messages": [ask("?"), {"role": "assistant", "content": [{"text": "no"}]}], "answer": "yes"},
            {"messages": [ask("Where?")], "answer": json.loads(f"[{BOX}]"), "metric": "iou"},
        ),
        metric="relaxed",
    )
    assert (a.answers, a.task, a.metric, a.where) == (("3",), "count", "relaxed", f"{tmp_path}/q.jsonl:1")
    assert a.messages[0]["content"] == [
        {"type": "image", "image": f"{tmp_path}/a.png"},
        {"type": "text", "text": "How many?"},
    ]
    assert (b.answers, b.metric, b.task, b.where) == (("ä", "3"), "anls", "default", f"{tmp_path}/q.jsonl:3")
    assert c.answers == ("yes",) and len(c.messages) == 1
    assert score(d, BOX).score == 1


def test_nulls_and_numbers_of_tables(tmp_path):
    records = ({"query": "?", "answer": "x", "metric": None, "task": task} for task in (None, 3, 4.0, "t"))
    questions = read_questions(write(tmp_path / "q.jsonl", *records), metric="anls")
    assert [(q.task, q.metric) for q in questions] == [(task, "anls") for task in ("default", "3", "4", "t")]


@pytest.mark.parametrize(
    "record, complaint",
    [
        ("{", "not readable as JSON"),
        ("[1]", "a record is a JSON object"),
        ({"answer": "x"}, "'messages'"),
        ({"messages": [ask("?")]}, "no 'answer'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no question"),
        ({"messages": [ask("?")], "answer": "x", "metric": "bleu"}, "metric is 'bleu'"),
        ({"messages": [ask("?")], "answer": "x", "metric": ["iou"]}, "metric is"),
        ({"messages": [ask("?")], "answer": "x", "task": [3]}, "task is [3]"),
        ({"messages": [ask("?")], "answer": "x", "task": True}, "task is True"),
        ('{"query": "?", "answer": "x", "task": "\\ud800"}', "task has half of a surrogate pair (\\ud800)"),
        ('{"query": "?", "answer": ["x", "a\\udfff"]}', "answer has half of a surrogate pair (\\udfff)"),
        ({"messages": [ask("?")], "answer": {}}, "must be a text or a number"),
        ({"messages": [ask("?")], "answer": []}, "must be a text or a number"),
        ({"messages": [ask("?")], "answer": "soon", "metric": "seconds"}, "must contain a time"),
        ({"messages": [ask("?")], "answer": "at 3 s", "metric": "tiou"}, "must contain spans of time, such as"),
        ({"messages": [ask("?")], "answer": "from 5 s to 3 s", "metric": "tiou"}, "must contain spans of time"),
        ({"messages": [ask("?")], "answer": 12.5, "metric": "tiou"}, "must contain spans of time"),
        ({"messages": [ask("?")], "answer": "click", "metric": "tool_type"}, "must contain tool calls"),
        ({"messages": [ask("?")], "answer": {"a": 1}, "metric": "tool_call"}, "must contain tool calls"),
        ({"messages": [ask("?")], "answer": "[", "metric": "iou"}, "answer must be a list of"),
        ({"messages": [ask("?")], "answer": '[{"bbox_2d": [1, 2]}]', "metric": "iou"}, "must be a list of"),
        ({"messages": [ask("?")], "image": "a.png", "answer": "x"}, "refer to 0 images; the record has 1"),
    ],
)
def test_bad_records_are_named(tmp_path, capsys, record, complaint):
    """By file and line, before weights are read."""
    file = write(tmp_path / "q.jsonl", {"messages": [ask("?")], "answer": "x"}, "", record)
    assert cli.main(["eval", str(file), "--model", str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"qwenvl: {file}:3: ") and complaint in err and err.count("\n") == 1


def test_a_byte_order_mark_is_no_part_of_the_first_question(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": [ask("?")], "answer": "x"}).encode())
    assert len(read_questions(tmp_path / "q.jsonl")) == 1


def test_bad_files(tmp_path):
    (tmp_path / "latin").write_bytes(b'{"answer": "\xe4"}')
    for name, complaint in (("none", "cannot be read"), ("latin", "not UTF-8"), ("empty", "no record")):
        (tmp_path / "empty").write_text("\n")
        with pytest.raises(InputError, match=f"{name}.*{complaint}"):
            read_questions(tmp_path / name)
    with pytest.raises(InputError, match="no record"):
        read_questions([])
    with pytest.raises(InputError, match=r"record 1: .*'answer'"):
        read_questions([{"messages": [ask("?")], "answer": "x"}, {"messages": [ask("?")]}])


# Models


@pytest.fixture
def four(tmp_path):
    """Four records of all sorts: a picture in a file, a clip of frames, a text, boxes."""
    picture = Image.effect_noise((84, 56), 90)
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / name)
    image = {"type": "image", "image": "a.png"}
    clip = {"type": "video", "video": ["a.png", "b.png"], "fps": 2}
    return write(
        tmp_path / "q.jsonl",
        {"messages": [ask("Read.", image)], "answer": "abc", "task": "ocr", "metric": "anls"},
        {"messages": [ask("When does it begin?", clip)], "answer": "0.5 seconds", "task": "clip", "metric": "seconds"},
        {"messages": [ask("Say é.")], "answer": "é", "task": "echo"},
        {"messages": [ask("Locate every cat.", image)], "answer": f"[{BOX}]", "task": "locate", "metric": "iou"},
    )


only_new = pytest.mark.parametrize("tiny_checkpoint", ["qwen2_5_vl"], indirect=True)


@only_new
@pytest.mark.slow
def test_evaluating_again_compiles_nothing_and_keeps_nothing(tiny_checkpoint, four):
    model = checkpoint.load(tiny_checkpoint, progress=False)
    evaluator = Evaluator(model, four, batch=2, max_new_tokens=6)
    first = evaluator.report(model.params)
    assert [a.question.task for a in first.answers] == ["ocr", "clip", "echo", "locate"]
    scores = evaluator(model.params)
    assert scores == first.metrics()
    tasks = ("ocr/anls", "clip/seconds", "echo/exact", "locate/iou", "locate/precision", "locate/recall", "overall")
    points = [name for name in scores if not name.endswith(("/low", "/high"))]
    assert points == [f"eval/{name}" for name in tasks] and len(scores) == len(points) + 2 * 5
    assert sorted(evaluator.names) == sorted(tasks)

    # Each answer equals the engine's answer to that question alone. (The same engine, so nothing compiles.)
    engine = evaluator._engine
    engine.params = model.params
    for answer in first.answers:
        (result,) = engine.generate([answer.question.messages], temperature=0, max_new_tokens=6)
        assert (answer.prediction, answer.finish_reason) == (result.text, result.finish_reason)
    assert evaluate(engine, four, max_new_tokens=6).answers == first.answers
    assert engine.params is model.params

    traces = engine.traces
    second = evaluator.report(jax.tree.map(lambda w: -w, model.params))
    assert engine.traces == traces
    assert [a.prediction for a in second.answers] != [a.prediction for a in first.answers]
    assert engine.params is None and evaluator._model.params == {}


@only_new
def test_eval_from_file_to_table(tiny_checkpoint, four, tmp_path, capsys, monkeypatch):
    """A model with two right answers, one mostly right, and one with a superfluous box."""
    said = {"Read.": "abd", "When": "At 1.0 seconds", "Say": "é", "Locate": f"```json\n[{BOX}, {BOX}]\n```"}

    class Scripted(Engine):
        def generate(self, conversations, options=None, **changes):
            assert changes == {"temperature": 0.0, "max_new_tokens": 9, "skip_special_tokens": True}
            prompts = [self.processor.decode(s.tokens) for s in conversations]
            return [Said(next(a for q, a in said.items() if q in p)) for p in prompts]

    monkeypatch.setattr("qwenvl_jax.infer.engine.Engine", Scripted)
    output = tmp_path / "predictions.jsonl"
    argv = ["eval", str(four), "--model", str(tiny_checkpoint), "--output", str(output), "--max-new-tokens", "9"]
    assert cli.main(argv) == 0
    out, _ = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert [r[0] for r in rows] == ["task", "ocr", "clip", "echo", "locate", "overall"]
    assert rows[1][1:4] == ["anls", "1", "66.7%"] and rows[2][1:4] == ["seconds", "1", "100.0%"]
    assert rows[4][1:7] == ["F1", "at", "IoU", "0.5", "1", "66.7%"]
    assert rows[4][-4:] == ["precision", "50.0%,", "recall", "100.0%"]
    assert rows[5][1:4] == ["mean", "4", "83.3%"]  # (2/3 + 1 + 1 + 2/3) / 4
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [line["where"] for line in lines] == [f"{four}:{i}" for i in (1, 2, 3, 4)]
    assert {name: len(lines[2].pop(name)) for name in ("id", "model")} == {"id": 16, "model": 16}
    assert lines[2].pop("options")["max_new_tokens"] == 9
    assert lines[2] == {
        "where": f"{four}:3",
        "task": "echo",
        "metric": "exact",
        "question": "Say é.",
        "answer": "é",
        "prediction": "é",
        "finish_reason": "stop",
        "score": 1.0,
    }
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png", "predictions.jsonl", "q.jsonl"]

    assert cli.main([*argv[:-4], "--json", "--max-new-tokens", "9"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["overall"]["value"] == pytest.approx(5 / 6) and printed["overall"]["n"] == 4
    assert printed["tasks"][3]["details"] == {"precision": 0.5, "recall": 1.0}
    assert printed["tasks"][2]["low"] == pytest.approx(metrics.wilson(1, 1)[0])


class Said:
    finish_reason = "stop"

    def __init__(self, text):
        self.text = text


# Answers that survive


@pytest.fixture
def echo(monkeypatch):
    """An engine that answers with the question, in batches of two. `asked` lists the questions; `stop_after` kills."""

    class Echo(Engine):
        asked, stop_after = (), None

        def generate(self, conversations, options=None, **changes):
            if Echo.stop_after is not None and len(Echo.asked) >= Echo.stop_after:
                raise KeyboardInterrupt
            said = [self.processor.decode(s.tokens).split("\n")[-3] for s in conversations]
            Echo.asked = (*Echo.asked, *said)
            broken = ["NaN" in text for text in said]
            pairs = zip(said, broken, strict=True)
            results = [SimpleNamespace(text=s, finish_reason="error" if b else "stop") for s, b in pairs]
            if any(broken):
                error = NonFiniteError("broken")
                error.results, error.why = results, "float16 ends at 65504"
                raise error
            return results

    monkeypatch.setattr("qwenvl_jax.infer.engine.Engine", Echo)
    return Echo


def numbers(path, *names):
    return write(path, *({"messages": [ask(name)], "answer": name} for name in names))


def run_eval(capsys, *argv):
    code = cli.main(["eval", "--batch", "2", "--json", "--dtype", "float32", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


@only_new
def test_an_evaluation_goes_on_where_it_stopped(tiny_checkpoint, tmp_path, capsys, echo):
    names = [*"abcdefgh", "a"]  # one question twice
    file, output = numbers(tmp_path / "q.jsonl", *names), tmp_path / "answers.jsonl"
    argv = (file, "--model", tiny_checkpoint, "--output", output)
    for stop in (2, 6):
        echo.stop_after = stop
        assert run_eval(capsys, *argv)[0] == 130
        assert [json.loads(line)["prediction"] for line in output.read_text().splitlines()] == list(echo.asked)
        with output.open("a") as f:
            f.write('{"id": "12ab", "mod')  # killed in the middle of a line
    echo.stop_after = None
    code, scores, _ = run_eval(capsys, *argv)
    assert code == 0 and scores["overall"]["n"] == 9 and scores["overall"]["value"] == 1
    assert sorted(echo.asked) == sorted(names)  # each once
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prediction"] for line in lines] == names and len({line["id"] for line in lines}) == 9
    assert sorted(os.listdir(tmp_path)) == ["answers.jsonl", "q.jsonl"]

    before = output.read_bytes()
    again = run_eval(capsys, *argv)
    assert again[1] == scores and len(echo.asked) == 9 and output.read_bytes() == before, again
    code, part, _ = run_eval(capsys, *argv, "--limit", "3")
    assert (code, part["overall"]["n"], len(echo.asked)) == (0, 3, 9) and output.read_bytes() == before
    assert run_eval(capsys, *argv, "--overwrite")[1] == scores and len(echo.asked) == 18


@only_new
def test_a_pattern_that_matches_the_file_of_answers(tiny_checkpoint, tmp_path, capsys, echo):
    file, output, pattern = numbers(tmp_path / "q.jsonl", "a", "b"), tmp_path / "answers.jsonl", tmp_path / "*.jsonl"
    rest, questions = ("--model", tiny_checkpoint, "--output"), file.read_bytes()
    output.touch()
    for _ in range(2):
        code, scores, _ = run_eval(capsys, pattern, *rest, output)
        assert code == 0 and scores["overall"]["n"] == 2 and len(echo.asked) == 2
    assert run_eval(capsys, pattern, *rest, output, "--overwrite")[0] == 0 and len(echo.asked) == 4
    (tmp_path / "link.jsonl").symlink_to(file)
    for path in (file, tmp_path / "link.jsonl"):
        code, _, err = run_eval(capsys, pattern, *rest, path, "--overwrite")
        assert code == 2 and f"is one of the files of questions (it matches {pattern})" in err
        assert file.read_bytes() == questions
    code, _, err = run_eval(capsys, tmp_path / "ans*", *rest, output)
    assert code == 2 and "only --output" in err


def test_counts_are_checked_and_kept_before_records_are_read(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "q.jsonl", {"query": "?", "answer": "x"}, "{")
    for flag, says in (("--batch", "batch is 0"), ("--limit", "limit 0")):
        assert cli.main(["eval", str(file), "--model", str(tmp_path / "none"), flag, "0"]) == 2
        assert says in capsys.readouterr().err
    assert cli.main(["eval", str(file), "--model", str(tmp_path / "none")]) == 2
    assert f"{file}:2: not readable" in capsys.readouterr().err
    read: list = []
    monkeypatch.setattr("qwenvl_jax.inputs.source._parse", lambda line: read.append(line) or json.loads(line))
    for more in ([], ["--output", str(tmp_path / "a.jsonl")]):
        read.clear()
        assert cli.main(["eval", str(file), "--model", str(tmp_path / "none"), "--limit", "1", *more]) == 2
        assert len(read) == 1


@only_new
def test_a_limit_reads_no_more_unless_there_are_more_answers(tiny_checkpoint, tmp_path, capsys, echo, monkeypatch):
    file, output = numbers(tmp_path / "q.jsonl", *"abcdef"), tmp_path / "answers.jsonl"
    argv = (file, "--model", tiny_checkpoint, "--output", output, "--limit")
    read, parse = [], json.loads
    monkeypatch.setattr("qwenvl_jax.inputs.source._parse", lambda line: read.append(line) or parse(line))
    for limit, asked, records in ((2, 2, 2), (2, 2, 2), (4, 4, 4), (3, 4, 6)):
        read.clear()
        code, scores, _ = run_eval(capsys, *argv, limit)
        assert (code, scores["overall"]["n"], len(echo.asked), len(read)) == (0, limit, asked, records)
    assert [json.loads(line)["prediction"] for line in output.read_text().splitlines()] == [*"abcd"]
    read.clear()
    assert run_eval(capsys, *argv, "1", "--overwrite")[0] == 0 and len(read) == 1


@only_new
def test_answers_carry_the_ids_of_their_records(tiny_checkpoint, tmp_path, capsys, echo):
    own = [{"id": "r-1"}, {"question_id": 7, "id": None}, {"id": {"no": "id"}}, {}]
    records = [{"messages": [ask(name)], "answer": name, **more} for name, more in zip("abcd", own, strict=True)]
    output = tmp_path / "answers.jsonl"
    argv = (write(tmp_path / "q.jsonl", *records), "--model", tiny_checkpoint, "--output", output)
    for _ in range(2):  # a rerun keeps them
        assert run_eval(capsys, *argv)[0] == 0
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line.get("record_id", "none") for line in lines] == ["r-1", 7, "none", "none"]


@only_new
def test_steps_are_measured_on_the_screen_that_the_model_sees(tiny_checkpoint, tmp_path, capsys, echo):
    """A rerun, which opens no picture, scores them alike. Right answers may be in pixels of the file."""
    Image.new("RGB", (60, 120)).save(tmp_path / "screen.png")
    records = []
    for said, right, boxes in (
        ([14, 40], [14, 28], "resized"), ([14, 60], [14, 28], "resized"),
        ([13, 77], [14, 90], "original"), ([14, 56], [10, 40, 20, 60], "original"),
    ):  # fmt: skip
        content = [{"type": "image", "image": "screen.png"}, {"type": "text", "text": "\n" + json.dumps(click(said))}]
        asked = {"messages": [{"role": "user", "content": content}], "answer": click(right), "boxes": boxes}
        records.append({**asked, "metric": "tool_step"})
    output = tmp_path / "answers.jsonl"
    argv = (write(tmp_path / "q.jsonl", *records), "--model", tiny_checkpoint, "--output", output)
    for _ in range(2):
        code, scores, err = run_eval(capsys, *argv)
        assert code == 0, err
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line["score"] for line in lines] == [1, 0, 1, 1] and scores["overall"]["value"] == 0.75
        assert {tuple(line["screen"]) for line in lines} == {(56, 112)} and len(echo.asked) == 4


@pytest.mark.parametrize(
    "output, says",
    [
        ("gs://a/b.jsonl", "local file only"),
        ("no/b.jsonl", "there is no directory no; make it first"),
        (".", r"is a directory; give a file, such as answers\.jsonl"),
    ],
)
def test_a_bad_output_is_refused_before_any_work(output, says, tmp_path, monkeypatch, capsys):
    """From Python as from the command line: here there are neither records nor a model."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^output {output}: .*{says}"):
        evaluate(None, tmp_path / "none.jsonl", output=output)
    assert cli.main(["eval", "none.jsonl", "--model", "none", "--output", output]) == 2
    assert re.search(f"--output {output}: .*{says}", capsys.readouterr().err)


@only_new
def test_a_question_that_is_asked_fewer_times_is_named(tiny_checkpoint, tmp_path, capsys, echo):
    file, output = numbers(tmp_path / "q.jsonl", "a", "b", "a", "a"), tmp_path / "answers.jsonl"
    rest = ("--model", tiny_checkpoint, "--output", output)
    assert run_eval(capsys, file, *rest)[0] == 0
    kept = output.read_bytes()
    for names, says in (
        (("a", "b"), f":3: is answer 2 to the question of {file}:1, which is now asked once; give another"),
        (("b", "a", "a"), f":4: is answer 3 to the question of {file}:2, which is now asked 2 times; give another"),
    ):
        numbers(file, *names)
        code, _, err = run_eval(capsys, file, *rest)
        assert code == 2 and says in err and output.read_bytes() == kept
    numbers(file, "a", "b", "a", "a", "a")  # more of them is no contradiction
    assert run_eval(capsys, file, *rest)[0] == 0


@only_new
@pytest.mark.slow
def test_answers_of_another_evaluation_are_refused(tiny_checkpoint, tmp_path, capsys, echo):
    file, output = numbers(tmp_path / "q.jsonl", "a", "b"), tmp_path / "answers.jsonl"
    argv = (file, "--model", tiny_checkpoint, "--output", output)
    assert run_eval(capsys, *argv)[0] == 0
    kept = output.read_bytes()
    other = make_tiny(tmp_path / "other", "qwen2_5_vl", seed=1)
    changed = numbers(tmp_path / "changed.jsonl", "b", "c")
    for args, says in (
        ((*argv, "--max-new-tokens", 9), ":1: was answered with other options (max_new_tokens was 256 and is 9)"),
        ((*argv, "--kv-dtype", "int8"), ":1: was answered with other options (kv_dtype was None and is int8)"),
        ((*argv, "--max-pixels", 9000), "max_pixels was None and is 9000"),
        ((*argv, "--no-skip-special-tokens"), "skip_special_tokens was True and is False"),
        ((file, "--model", other, "--output", output), ":1: is the answer of another model"),
        ((changed, *argv[1:]), ":1: answers a question that is not asked"),
        ((file, *argv[1:-1], file), "is one of the files of questions"),
    ):
        code, _, err = run_eval(capsys, *args)
        assert code == 2 and says in err and err.count("\n") == 1
    assert output.read_bytes() == kept and len(echo.asked) == 2
    for content in ("notes\n", "notes", '{"id": 1}\n', "[]\n", "[" * 10000 + "\n"):
        output.write_text(content)
        code, _, err = run_eval(capsys, *argv)
        assert code == 2 and ":1: is not an answer of an evaluation" in err and output.read_text() == content
    with output.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is writing it" in run_eval(capsys, *argv, "--overwrite")[2]
    assert "is not a regular file" in run_eval(capsys, *argv[:-1], "/dev/null")[2]
    assert len(echo.asked) == 2


@only_new
@pytest.mark.slow
def test_answers_follow_pictures_and_preprocessing_but_not_the_working_directory(
    tiny_checkpoint, tmp_path, capsys, echo, monkeypatch
):
    model = make_tiny(tmp_path / "model", "qwen2_5_vl")
    folder, elsewhere = tmp_path / "d", tmp_path / "elsewhere"
    for path in (folder, elsewhere):
        path.mkdir()
    noise = Image.effect_noise((84, 56), 90)
    noise.save(folder / "a.png")
    clip = {"type": "video", "video": ["a.png", "a.png"], "fps": 2}
    record = {"messages": [ask("Read.", {"type": "image", "image": "a.png"}, clip)], "answer": "x"}
    file, output = write(folder / "q.jsonl", record), tmp_path / "answers.jsonl"
    rest = ("--model", model, "--output", output)
    monkeypatch.chdir(folder)
    assert run_eval(capsys, "q.jsonl", *rest)[0] == 0
    monkeypatch.chdir(elsewhere)
    assert run_eval(capsys, "../d/q.jsonl", *rest)[0] == 0 and run_eval(capsys, file, *rest)[0] == 0
    assert len(echo.asked) == 1
    for key, value in (("metric", "anls"), ("task", "t"), ("answer", "y")):
        write(file, {**record, key: value})
        code, _, err = run_eval(capsys, file, *rest)
        assert code == 2 and f":1: the {key} of {file}:1 was " in err and f" and is {value!r}" in err
    write(file, {**record, "metric": "anls", "answer": "y"}, {**record, "answer": "z"})  # the second is nearer
    code, _, err = run_eval(capsys, file, *rest)
    assert code == 2 and f":1: the answer of {file}:2 was 'x' and is 'z'" in err
    write(file, record)
    settings = model / "preprocessor_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"max_pixels": 56 * 56}))
    code, _, err = run_eval(capsys, file, *rest)
    assert code == 2 and "another model (weights, config, preprocessing" in err
    settings.write_text(before)
    assert run_eval(capsys, file, *rest)[0] == 0
    noise.transpose(Image.Transpose.ROTATE_180).save(folder / "a.png")
    code, _, err = run_eval(capsys, file, *rest)
    assert code == 2 and f"an image or video of {file}:1 has changed" in err and len(echo.asked) == 1


def test_a_fingerprint_follows_all_that_makes_prompts(tokenizer_dir):
    config = small_config("qwen2_5_vl")
    one, other = (Processor.from_dir(tokenizer_dir, config) for _ in range(2))
    name = fingerprint(config, one, {})
    assert fingerprint(config, other, {}) == name
    changed = [
        replace(one, preprocessing=replace(one.preprocessing, max_pixels=10**6)),
        replace(one, allow_control_tokens=True),
        replace(one, template=replace(one.template, variables={"bos_token": "x"})),
    ]
    other.tokenizer.add_tokens(["zebra-crossing"])
    names = {name, *(fingerprint(config, processor, {}) for processor in (*changed, other))}
    assert len(names) == 5


@only_new
def test_bad_items_are_counted_and_named(tiny_checkpoint, tmp_path, capsys, echo):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    def shown(name):
        return {"messages": [ask("?", {"type": "image", "image": name})], "answer": "x"}

    good = [{"messages": [ask(name)], "answer": name} for name in "abc"]
    nan, long = ({"messages": [ask(text)], "answer": "x"} for text in ("NaN", "word " * 40000))
    records = [good[0], "{", shown("missing.png"), good[1], long, nan, {"answer": "x"}, shown("broken.png"), good[2]]
    file, output = write(tmp_path / "q.jsonl", *records), tmp_path / "answers.jsonl"
    argv = (file, "--model", tiny_checkpoint, "--output", output, "--on-bad-record", "skip")
    code, scores, err = run_eval(capsys, *argv)
    assert code == 0 and scores["overall"]["n"] == 3 and scores["overall"]["value"] == 1
    assert scores["skipped"] == {"unreadable": 1, "media": 2, "too long": 1, "not finite": 1, "messages": 1}
    assert sorted(line.split(": ")[0] for line in err.splitlines()) == [f"{file}:{i}" for i in (2, 3, 5, 6, 7, 8)]
    assert "float16 ends at 65504" in err
    assert cli.main(["eval", "--dtype", "float32", *map(str, argv)]) == 0  # the bad ones are tried again
    assert (
        "6 records skipped, in no score (media: 2, messages: 1, not finite: 1, too long: 1, unreadable: 1)"
        in (capsys.readouterr().out.splitlines()[-1])
    )

    # Stopping keeps what was answered.
    echo.asked = ()
    file = write(tmp_path / "q.jsonl", *good[:2], nan, good[2])
    code, _, err = run_eval(capsys, *argv[:-2], "--overwrite")
    said = f"qwenvl: {file}:3: the model computed NaN or infinity: float16 ends at 65504. The answers so far are in"
    assert code == 2 and err.startswith(f"{said} {output}; ") and "--on-bad-record skip" in err
    assert {"a", "b", "c"} >= {json.loads(line)["prediction"] for line in output.read_text().splitlines()} > {"a"}
    code, _, err = run_eval(capsys, write(file, nan), *argv[1:], "--overwrite")
    assert code == 2 and "no question could be answered; the first: " in err
    # A picture that turns out to be bad costs no other question its answer.
    echo.asked = ()
    write(file, shown("broken.png"), *good)
    code, _, err = run_eval(capsys, *argv[:-2], "--overwrite")
    assert code == 2 and f"{file}:1: " in err and f"answers so far are in {output}" in err and err.count("\n") == 1
    assert sorted(json.loads(line)["prediction"] for line in output.read_text().splitlines()) == ["a", "b", "c"]
    code, scores, _ = run_eval(capsys, *argv)
    assert code == 0 and scores["overall"]["n"] == 3 and len(echo.asked) == 3
    # During training, only what is found before the first step ends the run.
    model = checkpoint.load(tiny_checkpoint, progress=False)
    write(file, good[0], shown("broken.png"), nan)
    metrics = Evaluator(model, file)(model.params)
    assert {name: value for name, value in metrics.items() if not name.endswith(("/low", "/high"))} == {
        "eval/default/exact": 1,
        "eval/skipped/media": 1,
        "eval/skipped/not_finite": 1,
        "eval/overall": 1,
    }
    assert 0 < metrics["eval/default/exact/low"] == metrics["eval/overall/low"] < 1 == metrics["eval/overall/high"]
    with pytest.raises(InputError, match=r"q.jsonl:2: .*broken.png"):
        evaluate(model, file)


@only_new
def test_control_tokens_of_gold_and_answer_are_treated_alike(tiny_checkpoint, tmp_path):
    model = checkpoint.load(tiny_checkpoint, progress=False)
    gold = "<|box_start|>(1,2)<|box_end|>"
    ids = model.processor.control_tokens

    class Box(Engine):
        def generate(self, conversations, options=None, **changes):
            for_ids = self.processor.tokenizer.encode("(1,2)").ids
            skip = changes["skip_special_tokens"]
            text = self.processor.decode([ids["<|box_start|>"], *for_ids, ids["<|box_end|>"]], skip)
            assert (text == gold) == (not skip)
            return [SimpleNamespace(text=text, finish_reason="stop") for _ in conversations]

    records = [{"messages": [ask("Where?")], "answer": gold}]
    for rule in (False, True):
        own = model._replace(processor=replace(model.processor, allow_control_tokens=rule))
        for options in ({}, {"skip_special_tokens": True}, {"skip_special_tokens": False}):
            for encoding in ({}, {"allow_control_tokens": True}, {"allow_control_tokens": False}):
                report = evaluate(Box(own), records, encoding=encoding, **options)
                kept = not options.get("skip_special_tokens", not encoding.get("allow_control_tokens", rule))
                assert report.overall.value == 1 and report.answers[0].prediction == (gold if kept else "(1,2)")


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'


@only_new
@pytest.mark.parametrize("text", ["", "I look. "])
def test_the_gold_of_a_tool_call_is_what_the_template_writes(tiny_checkpoint, text):
    model = checkpoint.load(tiny_checkpoint, progress=False)
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    reply = {"role": "assistant", "content": text, "tool_calls": [call]}
    first = {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"a": "é"}})}
    records = [{"conversations": [{"from": "human", "value": "x"}, first]}, {"messages": [ask("x"), reply]}]
    one, two = Evaluator(model, records).questions
    assert one.answers == (CALL,) and two.answers == (f"{text}\n{CALL}" if text else CALL,)
    assert score(one, "").score == 0 and score(one, CALL).score == 1
    (by_call,) = Evaluator(model, [{**records[1], "metric": "tool_call"}]).questions
    assert score(by_call, CALL.replace("\n", "")).score == 1 and score(by_call, text).score == 0
    call["function"] = {"name": "f", "arguments": '{"a": '}  # no JSON, so the template writes a string
    with pytest.raises(InputError, match="for the metric tool_call it must contain tool calls"):
        Evaluator(model, [{**records[1], "metric": "tool_call"}])


@only_new
def test_scores_are_printed_even_if_the_answers_cannot_be_put_into_order(tiny_checkpoint, tmp_path, capsys, echo):
    file = numbers(tmp_path / "q.jsonl", "a", "b")
    long, target, link = tmp_path / ("x" * 251), tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(target)
    for output in (long, link, long):
        code, scores, err = run_eval(capsys, file, "--model", tiny_checkpoint, "--output", output)
        assert code == 0 and scores["overall"]["n"] == 2 and output.read_text().count("\n") == 2
        assert ("has all answers, but not in the order" in err) == (output == long) and err.count("\n") <= 1
    assert link.is_symlink() and target.is_file() and len(echo.asked) == 4


@only_new
def test_a_file_name_that_is_not_utf_8(tiny_checkpoint, tmp_path, capsys, echo):
    file, output = numbers(tmp_path / os.fsdecode(b"q\xe4.jsonl"), "a"), tmp_path / "answers.jsonl"
    for _ in range(2):
        code, scores, _ = run_eval(capsys, file, "--model", tiny_checkpoint, "--output", output)
        assert code == 0 and scores["overall"]["n"] == 1 and json.loads(output.read_text("utf-8"))["answer"] == "a"
    assert len(echo.asked) == 1


KILLED = """
import sys
from qwenvl_jax import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@only_new
@pytest.mark.slow
def test_killed_ten_times_no_answer_is_lost_or_doubled(tiny_checkpoint, tmp_path):
    names = [f"Question {i}?" for i in range(120)]
    file, output = numbers(tmp_path / "q.jsonl", *names), tmp_path / "answers.jsonl"
    argv = [sys.executable, "-c", KILLED, "eval", str(file), "--model", str(tiny_checkpoint), "--output", str(output)]
    argv += ["--batch", "4", "--max-new-tokens", "4", "--ignore-eos", "--json"]

    def lines():
        return output.read_bytes().count(b"\n") if output.exists() else 0

    rng, before = random.Random(0), b""
    for _ in range(10):
        goal = lines() + rng.randrange(1, 9)
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while lines() < goal and process.poll() is None:
            time.sleep(0.001 * rng.randrange(1, 30))
        process.kill()
        said = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, said
        now = output.read_bytes()
        assert now.startswith(before)  # nothing is lost
        before = now[: now.rindex(b"\n") + 1]
    ended = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout)["overall"]["n"] == 120
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [a["question"] for a in answers] == names and len({a["id"] for a in answers}) == 120
    survived = {line["id"]: line["prediction"] for line in map(json.loads, before.decode().splitlines())}
    assert survived.items() <= {a["id"]: a["prediction"] for a in answers}.items()


@only_new
def test_errors_name_the_line_of_a_question(tiny_checkpoint, tmp_path, capsys):
    model = checkpoint.load(tiny_checkpoint, progress=False)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for message, complaint in (
        (ask("?", {"type": "image", "image": "missing.png"}), "missing.png: No such file"),
        (ask("?", {"type": "image", "image": "broken.png"}), "message 0 item 0: .*broken.png"),
        (ask("?", {"type": "image"}), "refer to 1 images; the record has 0"),
        (ask("word " * 40000), "the prompt has"),
    ):
        file = write(
            tmp_path / "bad.jsonl", {"messages": [ask("Hi")], "answer": "x"}, {"messages": [message], "answer": "x"}
        )
        with pytest.raises(InputError, match=f"{file}:2: .*{complaint}"):
            evaluate(model, file, max_new_tokens=1)
    with pytest.raises(InputError, match="batch is 0"):
        Evaluator(model, file, batch=0)
    argv = ["eval", str(file), "--model", "x", "--output", str(tmp_path / "no" / "p.jsonl")]
    assert cli.main(argv) == 2 and "no directory" in capsys.readouterr().err
