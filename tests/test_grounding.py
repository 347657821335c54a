"""Boxes, points and polygons in answers: every form that models write, and the way back to the stored picture."""

import json
import random
import time

import pytest

from qwenvl_jax.answers.grounding import FORMS, Object, Parsed, parse, write
from qwenvl_jax.errors import InputError


def box(label, *numbers, image=0, **attributes):
    return Object(label, "box", (numbers[:2], numbers[2:]), attributes, image)


def point(label, x, y, image=0, **attributes):
    return Object(label, "point", ((x, y),), attributes, image)


def polygon(label, *numbers, **attributes):
    return Object(label, "polygon", tuple(zip(numbers[::2], numbers[1::2], strict=True)), attributes)


MUG, PEN = box("mug", 12, 30, 200, 310), box("pen", 5, 6, 70, 80)
MUG_JSON = '{"bbox_2d": [12, 30, 200, 310], "label": "mug"}'
PEN_JSON = '{"bbox_2d": [5, 6, 70, 80], "label": "pen"}'
MUG_REF, PEN_REF = (f"<|object_ref_start|>{name}<|object_ref_end|>" for name in ("mug", "pen"))
MUG_BOX, PEN_BOX = "<|box_start|>(12,30),(200,310)<|box_end|>", "<|box_start|>(5,6),(70,80)<|box_end|>"
SLOPE = (10, 20, 90, 24, 89, 44, 9, 40)

# (the answer, its objects, how many are malformed)
ANSWERS = {
    "JSON": [
        (f"```json\n[\n\t{MUG_JSON},\n\t{PEN_JSON}\n]\n```", [MUG, PEN], 0),
        (f"[{MUG_JSON}, {PEN_JSON}]", [MUG, PEN], 0),
        (MUG_JSON, [MUG], 0),
        (f"```json\n{MUG_JSON}\n```", [MUG], 0),
        (f"```\n[{MUG_JSON}]\n```", [MUG], 0),
        (f"{MUG_JSON}\n{PEN_JSON}", [MUG, PEN], 0),  # one per line
        (f"{MUG_JSON}, {PEN_JSON}", [MUG, PEN], 0),
        (f"I see two things [1].\n```json\n[{MUG_JSON}]\n```\nand also {PEN_JSON}. Done {{really}}!", [MUG, PEN], 0),
        (f"```json\n[{MUG_JSON}]\n```\n```json\n[{PEN_JSON}]\n```", [MUG, PEN], 0),
        (f"[[{MUG_JSON}], [{PEN_JSON}]]", [MUG, PEN], 0),
        (f'{{"objects": [{MUG_JSON}, {PEN_JSON}]}}', [MUG, PEN], 0),
        (f'{{"scene": "desk", "result": {{"items": [{MUG_JSON}]}}}}', [MUG], 0),
        ('{"label": "mug", "bbox_2d": [12, 30, 200, 310]}', [MUG], 0),
        ('{"bbox_2d": [12, 30, 200, 310]}', [MUG._replace(label="")], 0),
        ('{"bbox": [12, 30, 200, 310], "name": "mug"}', [MUG._replace(attributes={"name": "mug"})], 0),
        (
            '[{"bbox_2d": [1, 2, 3, 4], "label": "rider", "sub_label": "no helmet", "sure": 0.5, "seen": true}]',
            [box("rider", 1, 2, 3, 4, sub_label="no helmet", sure=0.5, seen=True)],
            0,
        ),
        (
            '{"bbox_2d": [1, 2, 3, 4], "label": "cup", "colors": ["red", "blue"], "of": {"made": "tin"}}',
            [box("cup", 1, 2, 3, 4, colors=["red", "blue"], of={"made": "tin"})],
            0,
        ),
        ('{"bbox_2d": ["12", "30", "200", "310"], "label": "mug"}', [MUG], 0),
        ('{"bbox_2d": "[12, 30, 200, 310]", "label": "mug"}', [MUG], 0),
        ('{"bbox_2d": "12,30,200,310", "label": "mug"}', [MUG], 0),
        ('{"bbox_2d": [1.5, -2, 3e1, 4.25], "label": 7}', [box("7", 1.5, -2, 30, 4.25)], 0),
        ('{"bbox_2d": [[12, 30, 200, 310], [5, 6, 70, 80]], "label": "mug"}', [MUG, PEN._replace(label="mug")], 0),
        ('{"bbox_2d": [[12, 30], [200, 310]], "label": "mug"}', [MUG], 0),
        ('{"bbox_2d": {"x1": 12, "y1": 30, "x2": 200, "y2": 310}, "label": "mug"}', [MUG], 0),
        ('{"label": "mug", "x1": 12, "y1": 30, "x2": 200, "y2": 310}', [MUG], 0),
        ('{"label": "mug", "xmin": 12, "ymin": 30, "xmax": 200, "ymax": 310}', [MUG], 0),
        ('{"label": "mug", "x": 12, "y": 30, "width": 188, "height": 280}', [MUG], 0),
        ('{"mug": [12, 30, 200, 310], "pen": [5, 6, 70, 80]}', [MUG, PEN], 0),
        ('{"mug": {"bbox_2d": [12, 30, 200, 310]}, "pen": [[5, 6, 70, 80]]}', [MUG, PEN], 0),
        ('{"label": "mug", "instances": [[12, 30, 200, 310]]}', [MUG], 0),
        (
            '{"bbox_2d": [0, 0, 9, 9], "label": "tray", "parts": [{"bbox_2d": [1, 1, 2, 2], "label": "lid"}]}',
            [box("tray", 0, 0, 9, 9), box("lid", 1, 1, 2, 2)],
            0,
        ),
        ("[[12, 30, 200, 310], [5, 6, 70, 80]]", [MUG._replace(label=""), PEN._replace(label="")], 0),
        ("[12, 30, 200, 310]", [MUG._replace(label="")], 0),
        ("The bounding box of it is [12, 30, 200, 310].", [MUG._replace(label="")], 0),
        ("mug: [12, 30, 200, 310]\n- pen: [[5, 6, 70, 80]]", [MUG, PEN], 0),
        ("12, 30, 200, 310", [MUG._replace(label="")], 0),
        ("<answer>[12, 30, 200, 310]</answer>", [MUG._replace(label="")], 0),
        (f"<think>Perhaps {PEN_JSON}? No.</think>\n{MUG_JSON}", [MUG], 0),
        ("[]", [], 0),
        ("There is no mug [1], {so to say}. See f(3) and (a, b), [2, 3, 4].", [], 0),
        ('{"bbox_3d": [1, 2, 3, 4, 5, 6, 0, 0, 0], "label": "sofa"}', [], 0),
    ],
    "broken JSON": [
        (f'```json\n[{MUG_JSON}, {{"bbox_2d": [5, 6, 7', [MUG], 1),  # cut short in numbers,
        (f'[{MUG_JSON}, {{"bbox_2d": [5, 6, 70, 80], "label": "pe', [MUG], 1),  # in a label,
        (f'[{MUG_JSON}, {{"bbox_2d": [5, 6, 70, 80], "lab', [MUG], 1),  # in a key,
        (f'[{MUG_JSON}, {{"bbox_2d": [5, 6, 70, 80], "label":', [MUG], 1),
        (f'[{MUG_JSON}, {{"bbox_2d": [5, 6, 70, 80],', [MUG], 1),
        (f"[{MUG_JSON}, {PEN_JSON[:-1]}", [MUG, PEN], 0),  # before a brace,
        (f"[{MUG_JSON},", [MUG], 0),  # and between two objects
        ("[[12, 30, 200, 310], [5, 6, 70", [MUG._replace(label="")], 1),
        (f"[{MUG_JSON},\n```\nand more", [MUG], 0),
        ("[{'bbox_2d': [12, 30, 200, 310], 'label': 'mug'}]", [MUG], 0),
        (
            "[{'bbox_2d': (12, 30, 200, 310), 'label': \"cook's mug\", 'seen': True}]",
            [box("cook's mug", 12, 30, 200, 310, seen=True)],
            0,
        ),
        ("[{'bbox_2d': [12, 30, 200, 310], 'label': 'cook's mug'}]", [MUG._replace(label="cook's mug")], 0),
        (f"[{MUG_JSON}, {PEN_JSON},]", [MUG, PEN], 0),
        (f"[{MUG_JSON[:-1]},}}]", [MUG], 0),
        (f"[{MUG_JSON} {PEN_JSON}]", [MUG, PEN], 0),
        (f"[{MUG_JSON[:-1]}, {PEN_JSON}]", [MUG, PEN], 0),  # without a brace
        (f"[{MUG_JSON[:-1]}]", [MUG], 0),
        (f"{MUG_JSON[:-1]}, {PEN_JSON[1:]}", [MUG, PEN], 0),
        (
            '[{"bbox_2d": [12, 30, 200, 310], "label": "mug}, {"bbox_2d": [5, 6, 70, 80], "label": "pen"}]',
            [MUG, PEN],
            0,
        ),
        ('{"bbox_2d": [12, 30, 200, 310], "label": "mug\n"hot": true}', [box("mug", 12, 30, 200, 310, hot=True)], 0),
        ('{"bbox_2d": [12, 30, 200, 310] "label": "mug"}', [MUG], 0),
        ('{"bbox_2d": [12, 30, 200, 310, "label": "mug"}', [], 1),
        ('{"bbox_2d": [12 30 200 310], "label": "mug"}', [MUG], 0),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "a "big" mug"}', [box('a "big" mug', 1, 2, 3, 4)], 0),
        (
            '{"bbox_2d": [1, 2, 3, 4], "text_content": "two\nlines"}',
            [box("two\nlines", 1, 2, 3, 4, text_content="two\nlines")],
            0,
        ),
        ("{bbox_2d: [12, 30, 200, 310], label: mug}", [MUG], 0),
        ('"bbox_2d": [12, 30, 200, 310], "label": "mug"}', [MUG], 0),  # the prompt ended with {
        ("{“bbox_2d”: [12, 30, 200, 310], “label”: “mug”}", [MUG], 0),
        ('{"bbox_2d"：[12, 30, 200, 310], "label"：“mug”}'.replace("“", '"').replace("”", '"'), [MUG], 0),
        ('[{"bbox_2d": [1, 2, 3], "label": "x"}, ' + PEN_JSON + "]", [PEN], 1),
        ('[{"bbox_2d": [1, 2, 3, "4"]}, {"bbox_2d": null}, {"bbox_2d": [1, 2]}, {"bbox_2d": [1, 2, 3, NaN]}]', [], 4),
        ('{"bbox_2d": [x1, y1, x2, y2], "label": "x"}', [], 1),
        ('{"bbox_2d": [1, 2, 3, 1' + "0" * 400 + '], "label": "x"}', [], 1),
    ],
    "points": [
        ('[{"point_2d": [12, 30], "label": "mug", "role": "gift"}]', [point("mug", 12, 30, role="gift")], 0),
        ('{"point_2d": ["12", "30"], "label": "mug"}', [point("mug", 12, 30)], 0),
        ('{"point_2d": [[12, 30], [5, 6]], "label": "mug"}', [point("mug", 12, 30), point("mug", 5, 6)], 0),
        ('{"point": {"x": 12, "y": 30}, "label": "mug"}', [point("mug", 12, 30)], 0),
        ('{"x": 12, "y": 30}', [point("", 12, 30)], 0),
        ('{"point_2d": [1, 2, 3, 4], "label": "mug"}', [box("mug", 1, 2, 3, 4)], 0),
        (
            '{"bbox_2d": [1, 2, 9, 8], "point_2d": [4, 5], "label": "mug"}',
            [box("mug", 1, 2, 9, 8), point("mug", 4, 5)],
            0,
        ),
        (
            '{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [41, 52]}}',
            [point("", 41, 52, action="left_click")],
            0,
        ),
        (
            '<tool_call>\n{"name": "mobile_use", "arguments": {"action": "swipe", "coordinate": [1, 2], '
            '"coordinate2": [3, 4]}}\n</tool_call>',
            [point("", 1, 2, action="swipe"), point("", 3, 4, action="swipe")],
            0,
        ),
        (json.dumps({"arguments": '{"coordinate": [41, 52]}'}), [point("", 41, 52)], 0),
        ('<points x1="12" y1="30" x2="5" y2="6" alt="mug">mug</points>', [point("mug", 12, 30), point("mug", 5, 6)], 0),
        ("<points x1='12' y1='30' alt='mug'>the mug</points>", [point("the mug", 12, 30, alt="mug")], 0),
        ('<point x="12.5" y="30">a &lt; b &amp; c</point>', [point("a < b & c", 12.5, 30)], 0),
        ('```xml\n<point x="12" y="30" alt="mug"/>\n```', [point("mug", 12, 30)], 0),
        ('<points x1="12" y1="30" x2="5" alt="mug">mug</points>', [point("mug", 12, 30)], 1),
        ('<points x1="12" y1="30" alt="mug">mu', [point("mug", 12, 30)], 0),
        ('<points x1="12" y1="30" alt="mu', [], 1),
        ("<point>12 30</point>", [point("", 12, 30)], 0),
        ("[(0.25, 0.5), (0.75, 0.125)]", [point("", 0.25, 0.5), point("", 0.75, 0.125)], 0),
        ("(12, 30)", [point("", 12, 30)], 0),
        ("[12, 30]", [point("", 12, 30)], 0),
        ("Thought: open it.\nAction: click(start_box='(12,30)')", [point("", 12, 30)], 0),
        ("click(start_box='<|box_start|>(12,30)<|box_end|>')", [point("", 12, 30)], 0),
        ("drag(start_box='(12,30)', end_box='(40,50)')", [point("", 12, 30), point("", 40, 50)], 0),
        ("click(point='<point>12 30</point>')", [point("", 12, 30)], 0),
        ("click(start_box='[12, 30, 200, 310]')", [MUG._replace(label="")], 0),
    ],
    "tokens": [
        (MUG_REF + MUG_BOX, [MUG], 0),
        (MUG_REF + MUG_BOX + PEN_REF + PEN_BOX, [MUG, PEN], 0),
        (MUG_REF + MUG_BOX + PEN_BOX, [MUG, PEN._replace(label="mug")], 0),
        (f"{MUG_REF}{MUG_BOX}\n{PEN_REF}{PEN_BOX}<|im_end|>", [MUG, PEN], 0),
        (f"A {MUG_REF}{MUG_BOX} and {PEN_REF} at {PEN_BOX} lie there.", [MUG, PEN], 0),
        (MUG_BOX, [MUG._replace(label="")], 0),
        ("mug" + MUG_BOX, [MUG], 0),
        ("<|object_ref_start|>mug<|object_ref_end|><|box_start|>(12, 30), (200, 310)<|box_end|>", [MUG], 0),
        (MUG_REF + "<|box_start|>(12,30)<|box_end|>", [point("mug", 12, 30)], 0),
        (f"{MUG_REF}<|quad_start|>(10,20),(90,24),(89,44),(9,40)<|quad_end|>", [polygon("mug", *SLOPE)], 0),
        (MUG_REF + MUG_BOX + PEN_REF + "<|box_start|>(5,6),(7", [MUG], 1),
        (MUG_REF + MUG_BOX + PEN_REF + "<|box_start|>(5,6)", [MUG], 1),
        (MUG_REF + "<|box_start|>(5,6),(7)<|box_end|>" + PEN_REF + PEN_BOX, [PEN], 1),
        ("mug(12,30),(200,310)", [MUG], 0),
        ("mug(12,30),(200,310)pen(5,6),(70,80)", [MUG, PEN], 0),
        ("mug(12,30),(200,310)(5,6),(70,80)", [MUG, PEN._replace(label="mug")], 0),
        ("mug(12,30),(200,310), (5,6),(70,80) and pen (5,6),(70,80)", [MUG, PEN._replace(label="mug"), PEN], 0),
        ("mug(12,30),(200,310)\npen(5,6),(7", [MUG], 1),
        ("(10,20),(90,24),(89,44),(9,40)", [polygon("", *SLOPE)], 0),
        ("马克杯(12,30),(200,310)", [MUG._replace(label="马克杯")], 0),
        ("<ref>mug</ref><box>(12,30),(200,310)</box>", [MUG], 0),
        ("<ref> mug</ref><box>[[12, 30, 200, 310], [5, 6, 70, 80]]</box>", [MUG, PEN._replace(label="mug")], 0),
        ("<box>12 30 200 310</box>", [MUG._replace(label="")], 0),
    ],
    "OCR": [
        (
            '{"bbox_2d": [12, 30, 200, 310], "text_content": "No. 5"}',
            [box("No. 5", 12, 30, 200, 310, text_content="No. 5")],
            0,
        ),
        (
            '{"bbox_2d": [10, 20, 90, 24, 89, 44, 9, 40], "text_content": "up"}',
            [polygon("up", *SLOPE, text_content="up")],
            0,
        ),
        ('{"poly": [10, 20, 90, 24, 89, 44, 9, 40], "text": "up"}', [polygon("up", *SLOPE, text="up")], 0),
        ('{"polygon": [[10, 20], [90, 24], [89, 44], [9, 40]], "label": "up"}', [polygon("up", *SLOPE)], 0),
        ('{"quad": [[10, 20], [90, 24], [89, 44], [9, 40]], "label": "up"}', [polygon("up", *SLOPE)], 0),
        ('{"bbox_2d": [[10, 20], [90, 24], [89, 44], [9, 40]], "label": "up"}', [polygon("up", *SLOPE)], 0),
        ('{"location": [10, 20, 90, 24, 89, 44, 9, 40], "text": "up"}', [polygon("up", *SLOPE, text="up")], 0),
        (
            '{"bbox_2d": [1, 2, 3, 4], "label": "flat", "location": "Lyon"}',
            [box("flat", 1, 2, 3, 4, location="Lyon")],
            0,
        ),
        (
            '[{"rotate_rect": [100, 50, 40, 20, 0], "text": "up"}]',
            [polygon("up", 80, 40, 120, 40, 120, 60, 80, 60, text="up")],
            0,
        ),
        ("[[10, 20, 90, 24, 89, 44, 9, 40]]", [polygon("", *SLOPE)], 0),
        ('{"rotate_rect": [100, 50, 40, 20], "poly": [1, 2, 3]}', [box("", 100, 50, 40, 20)], 1),
    ],
    "several pictures": [
        (f"Picture 1: {MUG_JSON}\nPicture 2: {PEN_JSON}", [MUG, PEN._replace(image=1)], 0),
        (f"In image 2, there is {MUG_JSON}", [MUG._replace(image=1)], 0),
        ("图2：\nmug(12,30),(200,310)", [MUG._replace(image=1)], 0),
        (f"第3张图：{MUG_JSON}", [MUG._replace(image=2)], 0),
        (
            f'[{{"image": 1, {MUG_JSON[1:]}, {{"image": 2, {PEN_JSON[1:]}]',
            [MUG, PEN._replace(image=1)],
            0,
        ),
        (
            f'[{{"image_id": 0, {MUG_JSON[1:]}, {{"image_id": 1, {PEN_JSON[1:]}]',
            [MUG, PEN._replace(image=1)],
            0,
        ),
        (f'{{"Picture 1": [{MUG_JSON}], "Picture 2": {PEN_JSON}}}', [MUG, PEN._replace(image=1)], 0),
        ('{"image": "Picture 2", "bbox_2d": [5, 6, 70, 80], "label": "pen"}', [PEN._replace(image=1)], 0),
        (
            '{"image": "a.png", "bbox_2d": [5, 6, 70, 80], "label": "pen"}',
            [PEN._replace(attributes={"image": "a.png"})],
            0,
        ),
    ],
}
TABLE = [(text, objects, malformed) for answers in ANSWERS.values() for text, objects, malformed in answers]


@pytest.mark.parametrize("text, objects, malformed", TABLE)
def test_answers(text, objects, malformed):
    assert parse(text) == Parsed(objects, malformed)


def test_a_rectangle_turns_clockwise():
    (o,) = parse('{"rotate_rect": [100, 50, 40, 20, 90]}').objects
    assert [tuple(map(round, corner)) for corner in o.points] == [(110, 30), (110, 70), (90, 70), (90, 30)]


# Writing


LETTERS = [
    *"abz 09\n\t\\\"'`{}[]()<>/&;:,.=|-_#猫の狗é😀",
    "</",
    "&amp;",
    '":',
    "bbox_2d",
    "Picture 2:",
    "<box>",
    "and ",
]


def drawn_label(rng, letters=LETTERS):
    return "".join(rng.choices(letters, k=rng.choice((0, 1, 2, 5, 20))))


def drawn_number(rng):
    return float(rng.choice((rng.randrange(1000), rng.randrange(-9, 9), round(rng.uniform(0, 4000), 3), rng.random())))


def drawn_attributes(rng):
    values = (drawn_label(rng), rng.randrange(99), rng.random(), None, True, ["a", drawn_label(rng)], {"of": "tin"})
    keys = (f"{drawn_label(rng)}?", "sub_label", "text_content", "name", "type", "colour")
    return {rng.choice(keys): rng.choice(values) for _ in range(rng.choice((0, 0, 1, 3)))}


def drawn_objects(rng, form):
    several, objects = rng.random() < 0.3, []
    for _ in range(rng.choice((0, 1, 2, 4))):
        kind = "point" if form == "xml" else rng.choice(("box", "point", "polygon"))
        n = {"box": 2, "point": 1, "polygon": rng.choice((3, 4, 7))}[kind]
        points = tuple((drawn_number(rng), drawn_number(rng)) for _ in range(n))
        attributes = drawn_attributes(rng) if form == "json" else {}
        objects.append(Object(drawn_label(rng), kind, points, attributes, rng.randrange(3) * several))
    return objects


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read(form):
    rng = random.Random(FORMS.index(form))
    for _ in range(1500):
        objects = drawn_objects(rng, form)
        assert parse(write(objects, form)) == Parsed(objects, 0)


def test_written_forms():
    tilted = polygon("猫", *SLOPE)
    assert write([MUG, point("pen", 5, 6.5)]) == (
        '[\n\t{"bbox_2d": [12, 30, 200, 310], "label": "mug"},\n\t{"point_2d": [5, 6.5], "label": "pen"}\n]'
    )
    assert json.loads(write([tilted])) == [{"poly": list(SLOPE), "label": "猫"}]
    assert json.loads(write([box("A", 1, 2, 3, 4, text_content="A")])) == [
        {"bbox_2d": [1, 2, 3, 4], "text_content": "A"}
    ]
    assert [o["image"] for o in json.loads(write([MUG, PEN._replace(image=1)]))] == [1, 2]
    assert write([MUG, PEN._replace(label="mug"), PEN], "tokens") == MUG_REF + MUG_BOX + PEN_BOX + PEN_REF + PEN_BOX
    assert write([point("a<b", 1, 2), point("a<b", 3, 4)], "xml") == (
        '<points x1="1" y1="2" x2="3" y2="4" alt="a&lt;b">a&lt;b</points>'
    )
    assert (write([], "json"), write([], "tokens"), write([], "xml")) == ("[]", "", "")


@pytest.mark.parametrize(
    "wrong, form",
    [
        (box("a", 1, 2, 3, 4, sure=1), "tokens"),
        (box("a<|object_ref_end|>", 1, 2, 3, 4), "tokens"),
        (MUG, "xml"),
        (point("a", 1, 2, sure=1), "xml"),
        (polygon("a", 1, 2, 3, 4), "json"),
        (point("a", float("nan"), 2), "json"),
        (point("a", 1e300, 2), "json"),
        (Object("a", "circle", ((1, 2),)), "json"),
        (box("a", 1, 2, 3, 4, bbox=[1, 2, 3, 4]), "json"),
        (box("a", 1, 2, 3, 4, when=slice(0)), "json"),
    ],
)
def test_what_a_form_cannot_say_is_refused(wrong, form):
    with pytest.raises(InputError, match=f"cannot be written in the form {form}"):
        write([PEN] * (form != "xml") + [wrong], form)


def test_unknown_form():
    with pytest.raises(InputError, match="form is 'yaml'; it must be one of json, tokens, xml"):
        write([MUG], "yaml")


# Hostile texts


def mutated(rng, text):
    """The text with a few random edits: cut, doubled, or with letters that mean something put in or taken out."""
    marks = [
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        '"',
        "'",
        ",",
        ":",
        "\\",
        "\n",
        "<",
        ">",
        "1",
        "-",
        "e9",
        "\ud83d",
        "\\u12",
        " ",
    ]
    marks += ['"bbox_2d":', "<|box_start|>", "<points ", "</ref>", "```", "Picture 0:", "null", "...", "\0", "٣", "²"]
    for _ in range(rng.randrange(1, 6)):
        at, length = rng.randrange(len(text) + 1), rng.choice((1, 1, 3, 20))
        what = rng.randrange(5)
        if what == 0:
            text = text[:at]
        elif what == 1:
            text = text[:at] + text[at + length :]
        elif what == 2:
            text = text[:at] + text[at : at + length] * rng.choice((2, 9)) + text[at + length :]
        else:
            text = text[:at] + rng.choice(marks) * rng.choice((1, 1, 40)) + text[at:]
    return text


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_answers(count):
    """Every answer of the table with random edits: no exception, and never over 50 milliseconds."""
    rng, slowest = random.Random(count), 0.0
    for i in range(count):
        text = mutated(rng, TABLE[i % len(TABLE)][0])
        took, read = timed(text)
        slowest = max(slowest, took)
        for o in read.objects:
            assert {"box": len(o.points) == 2, "point": len(o.points) == 1, "polygon": len(o.points) >= 3}[o.kind]
            assert all(abs(n) < 1e9 for xy in o.points for n in xy) and o.image >= 0 and type(o.label) is str
            assert not any(v is ... or k is None for k, v in o.attributes.items()), text
    assert slowest < 0.05


def timed(text):
    """(seconds of CPU time, the least of three tries; what was read)."""
    tries = []
    for _ in range(3):
        start = time.process_time()
        read = parse(text)
        tries.append(time.process_time() - start)
        if tries[-1] < 0.02:
            break
    return min(tries), read


@pytest.mark.parametrize(
    "unit", ["[", "{", "(", "7", "[{", "[[", "<", '"', "'", "\\", "<points ", "<ref>", "Picture 1 ", "`"]
)
def test_long_senseless_texts(unit):
    took, read = timed(unit * (100_000 // len(unit)))
    assert read.objects == [] and took < 0.05


SLOW = [
    '{"a":',
    "{'a': '",
    '{"a": "b\n',
    "[1,",
    "[1 ",
    "(1,2)",
    "cat(1,2),(3,4)",
    "[[1,2,3,4]]",
    '{"label":"a","label":"b",',
]
SLOW += [
    '{"bbox_2d":',
    '"bbox_2d": [1,2,3,4] ',
    "<point>1 2",
    "<|box_start|>(1,2),(3,4)",
    f"[{MUG_JSON},",
    "{a:",
    '{"a":{',
]


@pytest.mark.parametrize("unit", SLOW)
def test_time_is_linear(unit):
    """Four times the text takes about four times as long; twelve leaves room for other load."""
    short, long = (timed(unit * (n // len(unit)))[0] for n in (25_000, 100_000))
    assert long < 12 * max(short, 0.002)


def test_deep_nesting():
    assert parse("[" * 5000 + MUG_JSON).objects == [MUG]
    assert parse("[" * 20 + MUG_JSON + "]" * 20).objects == [MUG]
    nested = MUG_JSON
    for _ in range(2000):
        nested = f'{{"a": [{nested}]}}'
    parse(nested)
