"""Boxes in texts: both forms, three kinds of coordinates, and which picture a box belongs to."""

import contextlib
import json
import math
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from make_tiny import small_config
from PIL import Image
from tiny import FAMILIES, tiny_config

from qwenvl_jax import cli
from qwenvl_jax.answers.boxes import Box, Sizes, converted, from_model, parse_boxes, sizes, to_model
from qwenvl_jax.answers.grounding import Object, Parsed
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.errors import InputError
from qwenvl_jax.eval.evaluator import Evaluator
from qwenvl_jax.families import family_of
from qwenvl_jax.infer.options import EngineOptions
from qwenvl_jax.inputs.messages import map_texts, normalize
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.train.records import BadRecord, PackShape, RecordProcessor
from qwenvl_jax.types import Grid, Visual

CAT = Box("cat", 1, 2, 30, 40)
BOX = '{"bbox_2d": [1, 2, 30, 40], "label": "cat"}'
SHAPE = PackShape(rows=1, tokens=2048, lanes=1, patches=4096)
PHOTO = Sizes(original=(4000, 3000), resized=(952, 728))
RESIZED, THOUSANDTHS = "resized", "thousandths"


@pytest.mark.parametrize(
    "text, want",
    [
        (f"[{BOX}]", [CAT]),
        (f"```json\n[\n\t{BOX},\n\t{BOX}\n]\n```", [CAT, CAT]),
        (f"```json\n[{BOX}", [CAT]),  # cut off behind a box,
        (f'[{BOX}, {{"bbox_2d": [1, 2, 3', [CAT]),  # in a box,
        (f"[{BOX[:-1]}", [CAT]),  # before its brace
        (f"Here: [{BOX}, {BOX},] I see two.", [CAT, CAT]),
        (f"[{BOX} {BOX}]", [CAT, CAT]),
        ("[{'label': 'cat', 'bbox_2d': [1,2 , 30,40]}]", [CAT]),
        (BOX, [CAT]),
        ("[]", []),
        ("", []),
        ("none", []),
        ("3", []),
        ('["x", null, [1]]', []),
        ('[{"bbox_2d": [1, 2, 30], "label": "cat"}]', []),
        ('[{"bbox_2d": [1, 2, 30, "40"], "label": "cat"}]', []),
        ('[{"bbox_2d": [1, 2, 30, true], "label": "cat"}]', []),
        ('[{"bbox_2d": [1, 2, 30, 1e999], "label": "cat"}]', []),
        ('[{"bbox_2d": [1, 2, 30, NaN], "label": "cat"}]', []),
        ('[{"bbox_2d": [1, 2, 30, 40]}]', []),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "{a} \\"é\\""}]', [CAT._replace(label='{a} "é"')]),
        ("[" * 100_000, []),
        ("<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(30,40)<|box_end|>", [CAT]),
        ("cat(1,2),(30,40)", [CAT]),  # without the control tokens
        ("<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(30,40)<|box_end|>" * 2, [CAT, CAT]),
        ("cat(1,2),(30,40)(1,2),(30,40)", [CAT, CAT]),
        ("dog (5, 6), (7, 8); cat (1, 2), (30, 40)", [Box("dog", 5, 6, 7, 8), CAT]),
        ("(1,2)", []),
    ],
)
def test_parse_boxes(text, want):
    assert parse_boxes(text) == want


def json_box(*numbers):
    return json.dumps([{"bbox_2d": list(numbers), "label": "cat"}])


def marked(x1, y1, x2, y2):
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


@pytest.mark.parametrize("write", [json_box, marked])
@pytest.mark.parametrize(
    "config, source, numbers, want",
    [
        (RESIZED, "original", (3000, 0, 3900, 3000), (714, 0, 928, 728)),
        (RESIZED, "original", (3000.0, 0.4, 3900.2, 3000), (714, 0, 928, 728)),
        (RESIZED, "thousandths", (750, 0, 975, 1000), (714, 0, 928, 728)),
        (RESIZED, "resized", (714, 0, 928.5, 728), (714, 0, 928.5, 728)),  # untouched
        (RESIZED, None, (714, 0, 928, 728), (714, 0, 928, 728)),
        (THOUSANDTHS, "original", (3000, 0, 3900, 3000), (750, 0, 975, 1000)),
        (THOUSANDTHS, "resized", (714, 0, 952, 728), (750, 0, 1000, 1000)),
        (THOUSANDTHS, None, (714, 0, 1000, 728), (714, 0, 1000, 728)),
    ],
)
def test_records_are_converted(write, config, source, numbers, want):
    assert to_model(f"See {write(*numbers)}, 5000 m.", [PHOTO], config, source) == f"See {write(*want)}, 5000 m."


def test_answers_are_converted():
    text = f"2 cats: {json_box(714, 0, 928, 728)} and {marked(0, 0, 960, -3)}, in 2024; (7,8),(9,9)."
    want = f"2 cats: {json_box(3000, 0, 3899, 3000)} and {marked(0, 0, 4000, 0)}, in 2024; (29,33),(38,37)."
    assert from_model(text, PHOTO, RESIZED, "original") == want
    assert from_model("(750,0),(975,1000)", PHOTO, THOUSANDTHS, "original") == "(3000,0),(3900,3000)"
    assert from_model(json_box(7.5, 0, 8, 9), PHOTO, RESIZED, "resized") == json_box(7.5, 0, 8, 9)


def test_other_forms_of_the_same_keys():
    assert to_model('{"point_2d": [4000, 1500]}', [PHOTO], RESIZED, "original") == '{"point_2d": [952, 364]}'
    nested = '{"bbox_2d": [[0, 0, 4000, 3000],\n [0, 0, 2000, 1500]]}'
    assert to_model(nested, [PHOTO], RESIZED, "original") == '{"bbox_2d": [[0, 0, 952, 728],\n [0, 0, 476, 364]]}'
    escaped = json.dumps({"arguments": '{"bbox_2d": [0, 0, 4000, 3000]}'})
    assert "[0, 0, 952, 728]" in to_model(escaped, [PHOTO], RESIZED, "original")
    quad = "<|quad_start|>(0,0),(4000,0),(4000,3000),(0,3000)<|quad_end|>"
    assert to_model(quad, [PHOTO], THOUSANDTHS, "original").count("1000") == 4
    assert to_model("click(<|box_start|>(2000,1500)<|box_end|>)", [PHOTO], THOUSANDTHS, "original") == (
        "click(<|box_start|>(500,500)<|box_end|>)"
    )


@pytest.mark.parametrize(
    "text, want",
    [
        ("cat(0,0),(2000,1500)", "cat(0,0),(476,364)"),
        (
            "<p data-bbox=\"0 0 2000 1500\">2000</p><h2 data-bbox='0,0,4000,3000'>a</h2>",
            "<p data-bbox=\"0 0 476 364\">2000</p><h2 data-bbox='0,0,952,728'>a</h2>",
        ),
        ("(0,0),(2000,1500)", "(0,0),(476,364)"),
        ("cat(0,0),(2000,1500)dog(0,0),(4000,3000)", "cat(0,0),(476,364)dog(0,0),(952,728)"),
        ("[0, 0, 2000, 1500]", "[0, 0, 476, 364]"),
        ("[[0, 0, 2000, 1500], [0, 0, 4000, 3000]]", "[[0, 0, 476, 364], [0, 0, 952, 728]]"),
        ('{"coordinate": [2000, 1500]}', '{"coordinate": [476, 364]}'),
        ('{"coordinate": [0, 0], "coordinate2": [2000, 1500]}', '{"coordinate": [0, 0], "coordinate2": [476, 364]}'),
        ("click(start_box='(2000,1500)')", "click(start_box='(476,364)')"),
        ("<point>2000 1500</point>", "<point>476 364</point>"),
        ("<|box_start|>[0, 0, 2000, 1500]<|box_end|>", "<|box_start|>[0, 0, 476, 364]<|box_end|>"),
        ("<ref>cat</ref><box>[[0, 0, 2000, 1500]]</box>", "<ref>cat</ref><box>[[0, 0, 476, 364]]</box>"),
        ('<points x1="2000" y1="1500" alt="x1">a 7</points>', '<points x1="476" y1="364" alt="x1">a 7</points>'),
        ("<point x='4000' y='0'/>", "<point x='952' y='0'/>"),
        ('<points x1="4000" y1="9" x2="0" y2="0">', '<points x1="952" y1="2" x2="0" y2="0">'),  # points have no order
        ('{"poly": [0, 0, 4000, 0, 2000, 3000]}', '{"poly": [0, 0, 952, 0, 476, 728]}'),
        ('{"polygon": [[0, 0], [4000, 0], [2000, 3000]]}', '{"polygon": [[0, 0], [952, 0], [476, 728]]}'),
        ('{"bbox_2d": ["0", "0", "2000", "1500"]}', '{"bbox_2d": ["0", "0", "476", "364"]}'),
        ('{"point_2d": [[4000, 1500], [2000, 0]]}', '{"point_2d": [[952, 364], [476, 0]]}'),  # points have no order
        ('{"bbox_2d": [x1, y1, x2, y2]}', None),
        ("The cat is at (0, 0), (2000, 1500).", "The cat is at (0, 0), (476, 364)."),
        ("exit (0,0),(2000,1500)", "exit (0,0),(476,364)"),
        ('{"box": [0, 0, 2000, 1500]}', '{"box": [0, 0, 476, 364]}'),
        ('{"bounding_box": [0, 0, 2000, 1500.0], "n": 2000}', '{"bounding_box": [0, 0, 476, 364], "n": 2000}'),
        ("{'box_2d': [0,0 , 2000,1500],}", "{'box_2d': [0,0 , 476,364],}"),
        ('{"polygon": [[0, 0], [2000, 0], [2000, 1500]]}', '{"polygon": [[0, 0], [476, 0], [476, 364]]}'),
        ('{"coordinates": [[2000, 1500], [0, 0]]}', '{"coordinates": [[476, 364], [0, 0]]}'),
        ('{"center": [2000, 1500], "cat": 2000}', '{"center": [476, 364], "cat": 2000}'),
        ('{"y1":0,"x1":0,"y2":1500,"x2":2000}', '{"y1":0,"x1":0,"y2":364,"x2":476}'),
        ('{"left":0,"top":0,"right":2000,"bottom":1500}', '{"left":0,"top":0,"right":476,"bottom":364}'),
        (
            '{"x": 2000, "y": 1500, "width": 2000, "height": 1500}',
            '{"x": 476, "y": 364, "width": 476, "height": 364}',
        ),
        (
            '{"bounding_box": {"left": 2000, "top": 1500, "width": 2000, "height": 1500}}',
            '{"bounding_box": {"left": 476, "top": 364, "width": 476, "height": 364}}',
        ),
        ('{"cx": 3000, "cy": 1500, "w": 2000, "h": 3000}', '{"cx": 714, "cy": 364, "w": 476, "h": 728}'),
        (
            '{"top_left": {"x": 2000, "y": 1500}, "bottom_right": [4000, 3000]}',
            '{"top_left": {"x": 476, "y": 364}, "bottom_right": [952, 728]}',
        ),
        ('<points x1= "2000" y1= "1500">a</points>', '<points x1= "476" y1= "364">a</points>'),
        ('<point x="50.1" y="20.3">', '<point x="12" y="5">'),
        ("pyautogui.click(x=2000, y=1500)", "pyautogui.click(x=476, y=364)"),
        ("At x=2000, y=1500.", "At x=476, y=364."),
        ("The box: [0,0,2000,1500]", "The box: [0,0,476,364]"),
        ("cat: [0,0,2000,1500]\ndog: [0,0,4000,3000]", "cat: [0,0,476,364]\ndog: [0,0,952,728]"),
        ("What is at [0, 0, 2000, 1500]?", "What is at [0, 0, 476, 364]?"),
        ("Click (2000, 1500)", "Click (476, 364)"),
        ("[2000, 1500]", "[476, 364]"),
        ("0 0 2000 1500\n0 0 4000 3000", "0 0 476 364\n0 0 952 728"),
        ('["cat", 0, 0, 2000, 1500]', '["cat", 0, 0, 476, 364]'),
        ("[(2000, 1500), (4000, 0)]", "[(476, 364), (952, 0)]"),
        ('{"cat": [0, 0, 2000, 1500], "dogs": 2000}', '{"cat": [0, 0, 476, 364], "dogs": 2000}'),
        (
            '{"bbox_2d": [0, 0, 2000, 1500], "center": [2000, 1500], "polygon": [0, 0, 4000, 0, 4000, 3000]}',
            '{"bbox_2d": [0, 0, 476, 364], "center": [476, 364], "polygon": [0, 0, 952, 0, 952, 728]}',
        ),
        (
            "<think>See [0, 0, 2000, 1500]</think>2000 of [0, 0, 2000, 1500]",
            "<think>See [0, 0, 476, 364]</think>2000 of [0, 0, 476, 364]",
        ),
        (  # arguments in a string, with line breaks before numbers
            json.dumps({"arguments": json.dumps({"bbox_2d": [0, 0, 2000, 1500]}, indent=1)}),
            json.dumps({"arguments": json.dumps({"bbox_2d": [0, 0, 476, 364]}, indent=1)}),
        ),
        (
            "<|object_ref_start|>2000 [1]<|object_ref_end|><|box_start|>(0,0),(2000,1500)<|box_end|>",
            "<|object_ref_start|>2000 [1]<|object_ref_end|><|box_start|>(0,0),(476,364)<|box_end|>",
        ),
        ("Reply as [x1, y1, x2, y2] or <|box_start|>(x1,y1),(x2,y2)<|box_end|>, 3 of them.", None),
        ('{"bbox_2d": []}', None),
        ('{"bbox_2d": null, "n": 3}', None),
        ('{"box": "3", "position": 7}', None),
        ("f(1, 2) = 3", None),
        ("[5000, 5000]", None),
        ("A number in [0, 1], or (0.5, 0.7).", None),
        ("In 2024, 4000 people", None),
        ("From 12:30 to 14:05 on 2024-11-27, call +1 (555) 010-2030.", None),
        ("| a | 1 | 2 | 3 | 4 |\n|---|---|---|---|---|\n| b | 5 | 6 | 7 | 8 |", None),
        ("for i in range(10):\n    a[i], b[2] = f(i, 3), max(1, 2) + 1", None),
        ("1, 2, 3 and 4 cats; 5.5% of 10 [1][2]; v1.2.3", None),
        ("The answer is $3.50 (2 + 2 = 4).", None),
    ],
)
def test_other_forms_in_a_text_that_is_said_to_have_boxes(text, want):
    assert to_model(text, [PHOTO], RESIZED, "original") == (text if want is None else want)
    assert to_model(text, [PHOTO], RESIZED, None, learnt=False) == text
    assert to_model(text, [], RESIZED, "original") == text  # before any picture


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"bbox_2d": [300, 200, 100]}', r'the box "bbox_2d": \[300, 200, 100\] cannot be read; write "bbox_2d"'),
        ('[{"bbox_2d": [1, 1, 90, 90]}, {"box": [1, 1, 1]}]', r'the box "box": \[1, 1, 1\] cannot be read'),
        ('{"bbox_2d": ["10px", "20px", "30px", "40px"]}', "cannot be read"),
        ('{"bbox_2d": [10, 20, 30', "cannot be read"),
        ("<|box_start|>(1,2),(30<|box_end|>", "cannot be read"),
        (
            '{"bbox_2d": [0.1, 0.2, 0.5, 0.75]}',
            'has fractions from 0 to 1; multiply them by 1000 and say "boxes": "thou',
        ),
        ("[0.1, 0.2, 0.5, 1.0]", "has fractions"),
        ("(0.25, 0.5)", "has fractions"),
        ("The cat is at [0.1, 0.2, 0.5, 1].", "has fractions"),
        ('<point x="0.25" y="0.5">cat</point>', "has fractions"),
        ('{"box": [5, 2, 5, 2]}', r"the box \[5, 2, 5, 2\] has no area; mend it, or leave it out"),
        ('{"box": [0, 0, 1, 1]}', "has no area in resized coordinates; raise max_pixels, or leave it out"),
        ('{"x": 10, "y": 20, "w": 0, "h": 30}', "has no area"),
        ('{"x": 3990, "y": 20, "w": 100, "h": 30}', "outside its picture"),
        ('{"box": {"left": 3990, "top": 20, "width": 100, "height": 30}}', "outside its picture"),
        ('{"cx": 3990, "cy": 20, "w": 100, "h": 30}', "outside its picture"),
        ('{"x1": 30, "y1": 20, "x2": 10, "y2": 300}', "corners exchanged; correct it, or what boxes says"),
        ("What is at [100, 200, 5000, 290]?", r"the box \[100, 200, 5000, 290\] is outside"),
        ("click(x=4100, y=2)", "outside its picture"),
        ('<p data-bbox="10 20 30">a</p>', "cannot be read"),
        ("cat <loc0012><loc0100><loc0500><loc0600>", "<loc0012>… is in the form of another model"),
        ("<loc_12><loc_100>", "is in the form of another model"),
        ('{"polygon": [0, 0, 4001, 0, 40, 40]}', "outside its picture"),
    ],
)
def test_what_cannot_be_converted_is_refused(text, said):
    for learnt in (True, False) if text[0] != "(" else (True,):
        with pytest.raises(InputError, match=said):
            to_model(text, [PHOTO], RESIZED, "original", learnt)
    with pytest.raises(InputError, match=r"2 pictures of different sizes|cannot be read|fractions|form of another"):
        to_model(text, [PHOTO, Sizes((9000, 9000), (84, 84))], RESIZED, "original")


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"bbox_2d": [0.1, 0.2, 0.5, 0.75]}', "has fractions"),
        ("<|box_start|>(0.1,0.2),(0.5,0.75)<|box_end|>", "has fractions"),
        ("[0.1, 0.2, 0.5, 0.75]", "has fractions"),
        ("[3000, 0, 3900, 728]", "outside its picture"),  # but inside the picture's file
        ("[1, 2, 3, 4]", None),
        ("[4, 3, 2, 1]", None),
        ("[1000, 2000, 3000, 4000]", None),  # in no picture
        ("[0.4, 0.3, 0.2, 0.1]", None),
        ("Sorted: [3000, 0, 3900, 728]", None),
        ("[[3000, 1], [3900, 2]]", None),
        ('{"box": [3000, 0, 3900, 728], "center": [0.5, 0.5]}', None),
        ("cat(3000,0),(3900,728)", None),
        ("click(x=3000, y=0.5)", None),
        ('{"bbox_2d": [1, 2, 3]}', None),
    ],
)
def test_what_is_refused_in_an_answer_without_coordinates(text, said):
    assert to_model(text, [PHOTO], RESIZED, None, learnt=False) == text
    if said is None:
        assert to_model(text, [PHOTO], RESIZED, None) == text
    else:
        with pytest.raises(InputError, match=said):
            to_model(text, [PHOTO], RESIZED, None)


def test_pairs_about_a_clip_may_be_times():
    clip = PHOTO._replace(clip=True)
    for text in ("[[12.5, 20.0]]", "[[12, 20], [30, 41]]", '{"jump": [12, 20]}', "From (12, 20)"):
        assert to_model(text, [clip], RESIZED, "original") == from_model(text, clip, RESIZED, "original") == text
        assert to_model(text, [PHOTO], RESIZED, "original") != text
    assert to_model('{"point_2d": [4000, 1500]}', [clip], RESIZED, "original") == '{"point_2d": [952, 364]}'


WRITTEN = [
    '{{"bbox_2d": [{}, {}, {}, {}], "label": "7 cats"}}',
    "[{{'box': [{}, {}, {}, {}]}}, {{'point': [{}, {}]}}]",
    "cat<|box_start|>({},{}),({},{})<|box_end|>",
    "cat({},{}),({},{})",
    "In 2024, [{}, {}, {}, {}] and 5 more at ({}, {}), ({}, {}).",
    '{{"x1": {}, "y1": {}, "x2": {}, "y2": {}, "score": 0.5}}',
    '<points x1="{}" y1="{}" x2="{}" y2="{}" alt="a 1">a 1</points>',
    '{{"polygon": [[{}, {}], [{}, {}], [{}, {}]]}}',
    "<box>[[{}, {}, {}, {}]]</box>",
    "click(x={}, y={})",
]


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("target", [RESIZED, THOUSANDTHS])
def test_there_and_back_in_texts(form, target):
    """The numbers come back within the rounding to the model's, and all else stays."""
    rng, empty = random.Random(form), re.sub(r"\{\}", "#", form).replace("{{", "{").replace("}}", "}")
    for _ in range(100):
        width, height = rng.randint(300, 6000), rng.randint(300, 6000)
        picture = Sizes((width, height), (28 * max(2, round(width / 70)), 28 * max(2, round(height / 70))))
        low, high = (
            [rng.randint(a, b) * 1 for a, b in pair]
            for pair in (((0, width // 3), (0, height // 3)), ((width // 2, width), (height // 2, height)))
        )
        numbers = [*low, *high, *low, *high][: form.count("{}")]
        told = to_model(form.format(*numbers), [picture], target, "original")
        back = from_model(told, picture, target, "original")
        pattern = re.escape(empty).replace("\\#", "([0-9]+)").replace("#", "([0-9]+)")
        assert re.fullmatch(pattern, told)
        read = [int(n) for n in re.fullmatch(pattern, back).groups()]
        for i, (a, b) in enumerate(zip(numbers, read, strict=True)):
            assert abs(a - b) <= 0.5 * picture.original[i % 2] / picture.of(target)[i % 2] + 0.5


def test_points_of_tags_are_checked():
    with pytest.raises(InputError, match="outside its picture"):
        to_model('<points x1="4001" y1="1500">a</points>', [PHOTO], RESIZED, "original")
    with pytest.raises(InputError, match="outside its picture"):
        to_model('<points x1="953" y1="5">a</points>', [PHOTO], RESIZED, None)


def test_an_angle_cannot_be_converted():
    text = '{"rotate_rect": [10, 20, 30, 40, 15]}'
    with pytest.raises(InputError, match="has an angle"):
        to_model(text, [PHOTO], RESIZED, "original")
    assert to_model(text, [PHOTO], RESIZED, None) == from_model(text, PHOTO, RESIZED, "original") == text


def test_width_and_height_are_not_guessed():
    with pytest.raises(InputError, match=r'may be \[x, y, width, height\] or two corners; write "bbox_2d"'):
        to_model('{"bbox": [4000, 1, 2, 3]}', [PHOTO], RESIZED, "original")
    assert to_model('{"bbox": [4000, 1, 2, 3]}', [PHOTO], RESIZED, None) == '{"bbox": [4000, 1, 2, 3]}'


@pytest.mark.parametrize(
    "text",
    [
        "[0,0,0,0]" * 5_000,
        "x=0 y=0 " * 5_000,
        "0 " * 20_000,
        "(" + "1" * 50_000,
        '"bbox_2d": [' * 5_000,
        "[" * 50_000,
        "<box>" * 20_000,
        "<point x" * 9999,
    ],
)
def test_long_texts_take_no_time(text):
    start = time.perf_counter()
    for source in (None, "original"):
        with contextlib.suppress(InputError):
            to_model(text, [PHOTO], RESIZED, source)
    parse_boxes(text)
    parse_boxes("bbox_2d" + text)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("write", [json_box, marked])
@pytest.mark.parametrize(
    "config, source, numbers, said",
    [
        (RESIZED, "original", (3000, 0, 4001, 3000), "4000 × 3000 pixels, original"),
        (RESIZED, "original", (3000, -1, 3500, 3000), "4000 × 3000 pixels, original"),
        (RESIZED, "original", (3500, 0, 3000, 3000), "corners exchanged"),
        (RESIZED, "thousandths", (0, 0, 1001, 10), "0 … 1000"),
        (RESIZED, None, (3000, 0, 3900, 728), 'say which coordinates they are: "boxes": "original"'),
        (THOUSANDTHS, None, (3000, 0, 3900, 728), "0 … 1000"),
    ],
)
def test_boxes_outside_are_refused(write, config, source, numbers, said):
    with pytest.raises(InputError, match=said):
        to_model(write(*numbers), [PHOTO], config, source)


def test_what_a_user_writes_is_not_checked():
    """An example of the answer's form is no box."""
    text = 'Reply like {"bbox_2d": [5120, 6000, 8000, 9000]}'
    assert to_model(text, [PHOTO], RESIZED, None, learnt=False) == text
    with pytest.raises(InputError, match="outside"):
        to_model(text, [PHOTO], RESIZED, None)


def test_several_pictures():
    small = Sizes((400, 300), (392, 308))
    box = json_box(0, 0, 4000, 3000)
    assert to_model(box, [PHOTO, PHOTO], RESIZED, "original") == json_box(0, 0, 952, 728)
    with pytest.raises(InputError, match="2 pictures of different sizes"):
        to_model(box, [PHOTO, small], RESIZED, "original")
    assert to_model(box, [], RESIZED, None) == to_model(box, [], RESIZED, "original") == box
    assert to_model(json_box(0, 0, 900, 700), [small, PHOTO], RESIZED, None) == json_box(0, 0, 900, 700)


def test_a_text_is_about_the_latest_pictures():
    image = {"type": "image", "image": "a.png"}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [image, {"type": "text", "text": "a"}, {"video": "b.mp4"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "user", "content": [{"text": "d"}, image]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "e"}], "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "f"}}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "g"}, {"name": "g"}]},
    ]
    seen = {}

    def change(text, pictures, role):
        seen[text] = list(pictures)
        assert role == (
            "assistant" if text in ("b", "e", "", "g", '{"x": "f"}') else "system" if text == "s" else "user"
        )
        return text.upper()

    changed = map_texts(messages, change)
    assert seen == {
        "s": [],
        "a": [0, 1],
        "b": [0, 1],
        "c": [0, 1],
        "d": [2],
        "e": [2],
        '{"x": "f"}': [2],
        "": [2],
        "g": [2],
    }
    assert changed[6]["tool_calls"] == [{"function": {"name": "f", "arguments": {"X": "F"}}}]
    assert changed[7]["tool_calls"] == [{"name": "f", "arguments": "G"}, {"name": "g"}]
    assert changed[1]["content"] == [image, {"type": "text", "text": "A"}, {"video": "b.mp4"}]
    assert changed[5] == {"role": "assistant", "content": [{"type": "output_text", "text": "E"}], "weight": 0}
    assert normalize(changed[:5])[0][0]["content"] == "S"


@pytest.mark.parametrize("name", ["foo", "clip", "", ["original"]])
def test_unknown_coordinates(name):
    """Also where there is nothing to convert."""
    picture, thing = Sizes((9, 9), (9, 9)), Parsed([Object("a", "point", ((1.0, 2.0),), {})], 0)
    for text in ("a", "[1, 2, 3, 4]"):
        for pair in ((name, "original"), ("original", name)):
            with pytest.raises(InputError, match=r"(source|target) is .*; it must be one of original"):
                from_model(text, picture, *pair)
            with pytest.raises(InputError, match=r"(source|target) is .*; it must be one of original"):
                to_model(text, [picture], *pair)
            with pytest.raises(InputError, match=r"(source|target) is .*; it must be one of original"):
                converted(thing, [picture], *pair)
    with pytest.raises(InputError, match=r"coordinates is .*; it must be one of original"):
        picture.of(name)


@pytest.mark.parametrize("picture", [Sizes((0, 0), (0, 0)), Sizes((9, 9), (0, 9)), Sizes((9, -1), (9, 9))])
def test_a_picture_without_pixels(picture):
    thing = Parsed([Object("a", "point", ((1.0, 2.0),), {})], 0)
    for call in (
        lambda: converted(thing, [picture], "resized", "original"),
        lambda: from_model("[1, 2, 3, 4]", picture, "resized", "original"),
        lambda: to_model('{"bbox_2d": [1, 2, 3, 4]}', [picture], "resized", "original"),
    ):
        with pytest.raises(InputError, match="picture without pixels"):
            call()


@pytest.mark.parametrize(
    "image, x, malformed",
    [
        (0, 1.0, 0),
        (1, 1.0, 0),
        (2, 1.0, 1),
        (-1, 1.0, 1),
        (-2, 1.0, 1),
        (0, math.nan, 1),
        (0, math.inf, 0),
        (0, -math.inf, 0),
    ],
)
def test_objects_that_are_nowhere_are_malformed(image, x, malformed):
    parsed = Parsed([Object("a", "box", ((x, 1.0), (9.0, 9.0)), {}, image), Object("b", "point", ((1.0, 2.0),), {})], 3)
    for rounded in (True, False):
        moved = converted(parsed, [Sizes((18, 18), (9, 9))] * 2, "resized", "original", rounded=rounded)
        assert moved.malformed == 3 + malformed and [o.label for o in moved.objects] == ["a", "b"][malformed:]
        assert all(0 <= n <= 18 for o in moved.objects for point in o.points for n in point)


def test_sizes():
    patches = np.zeros((0, 0), np.uint8)
    config = tiny_config("qwen2_5_vl")
    p = config.vision.patch_size
    assert sizes(Visual(patches, Grid(1, 4, 6), "image", 0, (40, 30)), config) == Sizes((40, 30), (6 * p, 4 * p))
    assert sizes(Visual(patches, Grid(2, 4, 6), "video", 1), config) == Sizes((6 * p, 4 * p), (6 * p, 4 * p), clip=True)


FORMS = [
    ("original", (3000, 150, 3900, 3000)),
    ("resized", (714, 35, 928, 700)),
    ("thousandths", (750, 50, 975, 1000)),
]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.new("RGB", PHOTO.original).save(path)
    return str(path)


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request, tokenizer_dir):
    return Processor.from_dir(tokenizer_dir, small_config(request.param))


def record(photo, coordinates, numbers, **more):
    question = {"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "Where?"}]}
    answer = {"role": "assistant", "content": json_box(*numbers)}
    return {"messages": [question, answer], "boxes": coordinates, "metric": "iou"} | more


def learnt(processor, record, **options):
    process = RecordProcessor(processor, SHAPE, options={"max_pixels": 700_000} | options)
    (sample,) = process(record)
    return processor.decode(sample.tokens[sample.weights > 0])


def test_a_large_photo_is_trained_and_scored_alike(processor, photo):
    """4000 × 3000 pixels at max_pixels 700,000, with the same box in all three coordinates."""
    target = family_of(processor.config).BOXES
    want = json_box(*dict(FORMS)[target])
    records = [record(photo, *form) for form in FORMS]
    assert [learnt(processor, r) for r in records] == [want] * 3
    assert learnt(processor, record(photo, None, FORMS[0][1]), boxes="original") == want
    assert learnt(processor, record(photo, *FORMS[1]), boxes="original") == want  # the record's own word wins

    prediction = want if target == "resized" else "cat<|box_start|>(750,50),(975,1000)<|box_end|>"
    exact = [r | {"metric": "exact"} for r in records]
    answers = [SimpleNamespace(text=prediction, finish_reason="stop")] * 3
    engine = SimpleNamespace(
        processor=processor, max_batch=4, max_length=4096, options=EngineOptions(), generate=lambda *a, **o: answers
    )
    engine.params, engine.generation, engine.config = {}, {}, processor.config
    report = Evaluator(engine, records, encoding={"max_pixels": 700_000}).report({})
    assert [a.score for a in report.answers] == [1, 1, 1]
    answers[:] = [SimpleNamespace(text=want, finish_reason="stop")] * 3
    report = Evaluator(engine, exact, encoding={"max_pixels": 700_000}).report({})
    assert [a.score for a in report.answers] == [1, 1, 1]


def test_a_box_outside_is_refused_with_its_line(processor, photo, tmp_path):
    bad = record(photo, "original", (3000, 0, 4100, 3000))
    with pytest.raises(BadRecord, match="outside its picture \\(4000 × 3000 pixels, original\\)") as caught:
        learnt(processor, bad)
    assert caught.value.reason == "boxes"
    with pytest.raises(BadRecord, match="outside its picture"):
        learnt(processor, record(photo, None, (3000, 0, 3900, 3000)))
    with pytest.raises(BadRecord, match="boxes is 'pixels'; it must be one of original, resized, thousandths"):
        learnt(processor, bad | {"boxes": "pixels"})
    (tmp_path / "q.jsonl").write_text(json.dumps(record(photo, *FORMS[0])) + "\n" + json.dumps(bad) + "\n")
    engine = SimpleNamespace(processor=processor, max_batch=4, max_length=4096, options=EngineOptions(), params={})
    engine.generation, engine.config = {}, processor.config
    with pytest.raises(InputError, match=r"q.jsonl:2: the box .* outside its picture"):
        Evaluator(engine, tmp_path / "q.jsonl", encoding={"max_pixels": 700_000}).report({})


def test_answers_in_original_pixels(photo, capsys):
    """The demo's answer about an enlarged picture, in both coordinates."""
    image = Image.open(SAMPLES / "scene.png")
    large = Path(photo).with_name("large.png")
    image.resize((image.width * 3, image.height * 2)).save(large)
    size = f"--resized-width={image.width // 28 * 28} --resized-height={image.height // 28 * 28}".split()
    command = ["generate", "--image", str(large), "--prompt", "Find the boxes of: strawberry", "--json", *size]
    texts = []
    for more in ([], ["--boxes", "original"]):
        assert cli.main(command + more) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    resized, original = map(parse_boxes, texts)
    assert resized and [box.label for box in resized] == [box.label for box in original]
    place = Sizes((image.width * 3, image.height * 2), (image.width // 28 * 28, image.height // 28 * 28))
    for a, b in zip(resized, original, strict=True):
        assert b[1:] == tuple(round(n * place.original[i % 2] / place.resized[i % 2]) for i, n in enumerate(a[1:]))
    assert cli.main(["generate", "--prompt", "Where?", "--boxes", "original"]) == 2
    assert "the prompt has no picture" in capsys.readouterr().err
