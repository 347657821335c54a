"""Boxes, points and polygons in answers: every form that models write, and the way back to the picture's file."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from timing import timed
from tiny import tiny_config

from qwenvl_jax import cli
from qwenvl_jax.answers.boxes import Sizes, converted, from_model, sizes
from qwenvl_jax.answers.grounding import Object, Parsed, parse
from qwenvl_jax.answers.lenient import Reader
from qwenvl_jax.answers.writing import FORMS, write
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.errors import InputError
from qwenvl_jax.infer.requests import Result
from qwenvl_jax.inputs.media import image_visual
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.inputs.preprocessing import Preprocessing, target_size
from qwenvl_jax.inputs.video import frame_size, video_visual


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
        ('{"bbox_2d": [12, 30, 200, 310], "label": null}', [MUG._replace(label="")], 0),
        ("It is at (12, 30, 200, 310).", [MUG._replace(label="")], 0),
        ("mug: (12, 30, 200, 310)", [MUG], 0),
        ("x1: 12, y1: 30, x2: 200, y2: 310", [MUG._replace(label="")], 0),
        ("Its top-left corner is (12, 30) and the other one (200, 310).", [MUG._replace(label="")], 0),
        ('[["mug", 12, 30, 200, 310], [5, 6, 70, 80, "pen"]]', [MUG, PEN], 0),
        ('[["mug", [12, 30, 200, 310]]]', [MUG], 0),
        ("1. **mug**: [12, 30, 200, 310]\n2. **pen**: [5, 6, 70, 80]", [MUG, PEN], 0),
        ("<object><name>mug</name><bbox>12,30,200,310</bbox></object>", [MUG], 0),
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
        (f'[{PEN_JSON}, {MUG_JSON[:-1]}, "of": ["tin", "cla', [PEN], 1),
        (f'{MUG_JSON[:-1]}, "parts": [{PEN_JSON}, {{"bbox_2d": [1, 2', [MUG, PEN], 1),
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
        (f"[{MUG_JSON}, {PEN_JSON[1:]}]", [MUG, PEN], 0),  # without an opening brace
        (f"[{MUG_JSON[1:-1]}]", [MUG], 0),
        ('"bbox_2d": [12, 30, 200, 310], "label": "mug"}', [MUG], 0),  # the prompt ended with {
        ("{“bbox_2d”: [12, 30, 200, 310], “label”: “mug”}", [MUG], 0),
        ('{"bbox_2d"：[12, 30, 200, 310], "label"：“mug”}'.replace("“", '"').replace("”", '"'), [MUG], 0),
        ('[{"bbox_2d": [1, 2, 3], "label": "x"}, ' + PEN_JSON + "]", [PEN], 1),
        ('[{"bbox_2d": [1, 2, 3, "4"]}, {"bbox_2d": null}, {"bbox_2d": [1, 2]}, {"bbox_2d": [1, 2, 3, NaN]}]', [], 4),
        ('{"bbox_2d"：[12，30，200，310]，"label"："mug"}', [MUG], 0),
        ('{\\"bbox_2d\\": [12, 30, 200, 310], \\"label\\": \\"mug\\"}', [MUG], 0),
        ('[ // the mug\n{"bbox_2d": [12, 30, 200, 310], // a box\n"label": "mug"}, ...]', [MUG], 0),
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
        ("pyautogui.click(x=12, y=0.5)", [point("", 12, 0.5)], 0),
        ("The line goes from (1, 2) to (3, 4).", [], 0),
        ("Thought: open it.\nAction: click(start_box='(12,30)')", [point("", 12, 30)], 0),
        ("click(start_box='<|box_start|>(12,30)<|box_end|>')", [point("", 12, 30)], 0),
        ("drag(start_box='(12,30)', end_box='(40,50)')", [point("", 12, 30), point("", 40, 50)], 0),
        ("click(point='<point>12 30</point>')", [point("", 12, 30)], 0),
        ("click(start_box='[12, 30, 200, 310]')", [MUG._replace(label="")], 0),
        ('<p data-bbox="12 30 200 310">a 1</p><p data-bbox="">b</p>', [MUG._replace(label="")], 1),
        ('savefig(bbox="tight", 3)', [], 0),
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
        ("<ref>mug</ref><quad>(10,20),(90,24),(89,44),(9,40)</quad>", [polygon("mug", *SLOPE)], 0),
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
    "several pictures, as models say it": [
        *(
            (f"{heading} {MUG_JSON}", [MUG._replace(image=1)], 0)
            for heading in (
                *("In the second image:", "Second image:", "The 2nd image:", "Image-2:", "Img 2:", "Pic 2:"),
                *(
                    "Image No. 2:",
                    "<image 2>",
                    "Image two:",
                    "The second input image:",
                    "the image 2 shows",
                    "Photo #2,",
                ),
                *(
                    "第二张图：",
                    "图二：",
                    "图片二：",
                    "第2幅图：",
                    "第二张照片：",
                    "照片2：",
                    "Second video:",
                    "第二个视频：",
                ),
            )
        ),
        *(
            (f"{heading} {MUG_JSON}", [MUG], 0)
            for heading in (
                *("In the image 3 dogs:", "On the photo 12 people;", "In the 12 second clip:", "A ten second video:"),
                *(
                    "Image 640 x 480:",
                    "Number of mugs in the image: 3",
                    "图片中有2个杯子：",
                    "Image 100%:",
                    "the images 2 m",
                ),
            )
        ),
        ("第二十一张图：[12, 30, 200, 310]", [MUG._replace(label="", image=20)], 0),
        (f'{{"Image-1": [{MUG_JSON}], "Image-2": {PEN_JSON}}}', [MUG, PEN._replace(image=1)], 0),
        (f'{{"first_image": [{MUG_JSON}], "second_image": {PEN_JSON}}}', [MUG, PEN._replace(image=1)], 0),
        (f'{{"图1": [{MUG_JSON}], "图二": {PEN_JSON}}}', [MUG, PEN._replace(image=1)], 0),
        *(
            (f"{{{said}, {PEN_JSON[1:]}", [PEN._replace(image=1)], 0)
            for said in (
                *(
                    '"image_number": 2',
                    '"image_id": "2"',
                    '"image": "second"',
                    '"Image": "the second one"',
                    '"photo": 2',
                ),
                *('"imgIdx": 1', '"img_idx": 1', '"picture_no": "#2"', '"video": 2', '"clip_index": "2nd"'),
            )
        ),
        (
            '{"img_idx": 1, "bbox_2d": [1, 2, 3, 4]}, {"image": 1, "point": [1, 2]}',
            [box("", 1, 2, 3, 4, image=1), point("", 1, 2)],
            0,
        ),
        ('{"bbox_2d": [12, 30, 200, 310], "label": "Image 2: mug"}', [MUG._replace(image=1)], 0),
        (
            '{"bbox_2d": [1, 2, 3, 4], "label": "the cup in image 2"}',
            [box("the cup in image 2", 1, 2, 3, 4, image=1)],
            0,
        ),
        ('{"image": 1, "bbox_2d": [1, 2, 3, 4], "label": "Image 2: a"}', [box("Image 2: a", 1, 2, 3, 4)], 0),
        (
            '{"bbox_2d": [1, 2, 3, 4], "text_content": "Image 2: a"}',
            [box("Image 2: a", 1, 2, 3, 4, text_content="Image 2: a")],
            0,
        ),
        (
            f"<|object_ref_start|>the cup in image 2<|object_ref_end|>{MUG_BOX}{PEN_REF}{PEN_BOX}",
            [MUG._replace(label="the cup in image 2", image=1), PEN],
            0,
        ),
    ],
    "labels": [
        (
            "There are two mugs: (12,30),(200,310) and a pen (5,6),(70,80)",
            [MUG._replace(label="mugs"), PEN._replace(label="a pen")],
            0,
        ),
        ("Picture 2 has nothing. In picture 1: [12, 30, 200, 310]", [MUG._replace(label="")], 0),
        *(
            (f"{lead}[12, 30, 200, 310]", [MUG._replace(label="", image=1)], 0)
            for lead in (
                *("第2幅图：", "图2中：", "第二张图中：", "第二张图像上：", "第二张照片（右）："),
                *("In picture 2 of 3: ", "Image 2/3: ", "Picture 2 out of 3: ", "In my second image: ", "图2/3："),
            )
        ),
        *(
            (f"{lead}[12, 30, 200, 310]", [MUG._replace(label=label, image=1)], 0)
            for lead, label in {
                "图2中的杯子：": "杯子",
                "图2里的杯子：": "杯子",
                "在图2中，杯子：": "杯子",
                "在图2中杯子：": "杯子",
                "图2中有一个杯子：": "杯子",
                "图2上衣：": "上衣",
                "Unlike the first image, the second image has a mug: ": "mug",
                "(Image 2) mug: ": "mug",
                "Image 2 **mug**: ": "mug",
            }.items()
        ),
        ("In the very last picture: [12, 30, 200, 310]", [MUG._replace(label="")], 0),
        (
            "mug (12,30),(200,310) in image 2 and pen (5,6),(70,80) in image 1",
            [MUG._replace(image=1), PEN],
            0,
        ),
        ("Image 2 (right): [12, 30, 200, 310]", [MUG._replace(label="", image=1)], 0),
        ("The mug in image 2: [12, 30, 200, 310]", [MUG._replace(label="The mug", image=1)], 0),
        ("mug: x1=12, y1=30, x2=200, y2=310\n**pen**: x1=5, y1=6, x2=70, y2=80", [MUG, PEN], 0),
        ("mug [12, 30, 200, 310]; pen [5, 6, 70, 80]", [MUG, PEN], 0),
        ("<!-- Image (12, 30, 200, 310) -->\nText", [MUG._replace(label="Image")], 0),
        ("- mug [12, 30, 200, 310]\n- pen [5, 6, 70, 80]", [MUG, PEN], 0),
        ("I see [12, 30, 200, 310]; the answer is [5, 6, 70, 80]", [MUG._replace(label=""), PEN._replace(label="")], 0),
        ('{"bboxes": [[12, 30, 200, 310], [5, 6, 70, 80]], "labels": ["mug", "pen"]}', [MUG, PEN], 0),
        ('{"bbox_2d": [[12, 30, 200, 310], [5, 6, 70, 80]], "label": ["mug", "pen"]}', [MUG, PEN], 0),
        ('{"bbox_2d": [[12, 30, 200], [5, 6, 70, 80]], "label": ["mug", "pen"]}', [PEN], 1),
        ('{"points": [[12, 30], [5, 6]], "names": ["mug", 7]}', [point("mug", 12, 30), point("7", 5, 6)], 0),
        (
            '{"bboxes": [[12, 30, 200, 310], [5, 6, 70, 80]], "labels": ["mug"]}',
            [o._replace(label="", attributes={"labels": ["mug"]}) for o in (MUG, PEN)],
            0,
        ),
        ('{"bbox_2d": [12, 30, 200, 310], [5, 6, 70, 80], "label": "mug"}', [MUG, PEN._replace(label="mug")], 0),
        (
            "**mug**: Top-left (12, 30), bottom-right (200, 310)\n**pen**: Top left: [5, 6], lower right: [70, 80]",
            [MUG, PEN],
            0,
        ),
        ("Top-left (12, 30), bottom-right (200, 310) and (5, 6)", [], 1),
    ],
    "numbers by name": [
        (
            '{"bounding_box": {"top_left": {"x": 12, "y": 30}, "bottom_right": {"y": 310, "x": 200}}, "label": "mug"}',
            [MUG],
            0,
        ),
        *(
            (f'{{{numbers}, "label": "mug"}}', [MUG], 0)
            for numbers in (
                *('"top_left": [12, 30], "bottom_right": [200, 310]', '"bottomRight": "200, 310", "TopLeft": "12, 30"'),
                *('"upper_right": [200, 30], "lower_left": [12, 310]', '"tl": [12, 30], "br": [200, 310]'),
                '"bbox": [{"x": 12, "y": 30}, {"x": 200, "y": 310}]',
                '"left": 12, "top": 30, "width": 188, "height": 280',
                '"box": {"left": 12, "top": 30, "width": 188, "height": 280}',
                '"x1": "12", "y1": "30", "x2": "200", "y2": "310"',
                '"x0": 12, "y0": 30, "x1": 200, "y1": 310',
                '"xMin": 12, "yMin": 30, "xMax": 200, "yMax": 310',
                *(
                    '"cx": 106, "cy": 170, "w": 188, "h": 280',
                    '"x_center": 106, "y_center": 170, "width": 188, "height": 280',
                ),
                *(
                    '"bbox_xywh": [12, 30, 188, 280]',
                    '"cxcywh": [106, 170, 188, 280]',
                    '"bbox_xyxy": [12, 30, 200, 310]',
                ),
            )
        ),
        *(
            (f'{{"box": {numbers}, "format": "{form}"}}', [MUG._replace(label="", attributes={"format": form})], 0)
            for form, numbers in {
                "xywh": [12, 30, 188, 280],
                "cx, cy, w, h": [106, 170, 188, 280],
                "YXYX": [30, 12, 310, 200],
                "x1y1x2y2": [12, 30, 200, 310],
                "JSON": [12, 30, 200, 310],
            }.items()
        ),
        ('{"x": "12", "y": "30", "label": "mug"}', [point("mug", 12, 30)], 0),
        ('{"center_x": 12, "center_y": 30}', [point("", 12, 30)], 0),
        ('{"left": "arm", "top": "red", "x": "a", "y": "b"}', [], 0),
        ('{"bbox_2d": {"top_left": [12, 30]}, "label": "mug"}', [], 1),
        (
            '{"boundingPoly": {"vertices": [{"x": 1, "y": 2}, {"x": 9, "y": 2}, {"x": 5, "y": 7}]}, "label": "a"}',
            [polygon("a", 1, 2, 9, 2, 5, 7)],
            0,
        ),
        (
            '{"top_left": [10, 20], "top_right": [90, 24], '
            '"bottom_right": [89, 44], "bottom_left": [9, 40], "label": "up"}',
            [polygon("up", *SLOPE)],
            0,
        ),
        (
            "[[12, 30, 200, 310, 0.9], [5, 6, 70, 80, 0.5]]",
            [box("", 12, 30, 200, 310, score=0.9), box("", 5, 6, 70, 80, score=0.5)],
            0,
        ),
        (
            '[["mug", 0.9, 12, 30, 200, 310], [5, 6, 70, 80, 0.5, "pen"]]',
            [box("mug", 12, 30, 200, 310, score=0.9), box("pen", 5, 6, 70, 80, score=0.5)],
            0,
        ),
        ("[[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]", [], 0),
        ("<point><x>12</x><y>30</y></point>", [point("", 12, 30)], 0),
        ("<point>\n  <y>30</y>\n  <x>12</x>\n</point>", [point("", 12, 30)], 0),
        (
            "<name>mug</name><bndbox><xmin>12</xmin><ymin>30</ymin><xmax>200</xmax><ymax>310</ymax></bndbox>",
            [MUG],
            0,
        ),
        ("<point><x>12</x><z>30</z></point>", [], 1),
        ('<points x1="12" y1="30" x1="5" y1="6" alt="mug">mug</points>', [point("mug", 12, 30), point("mug", 5, 6)], 0),
        ('<points x1="12, 5" y1="30, 6" alt="mug">mug</points>', [point("mug", 12, 30), point("mug", 5, 6)], 0),
        ('<points x1="12, 5" y1="30" alt="mug">mug</points>', [], 1),
        ('<point x="12, 30" alt="mug">mug</point>', [], 1),
        ('<point y="30" x="12">mug</point>', [point("mug", 12, 30)], 0),
    ],
    "JSON in other things": [
        (json.dumps(f"[{MUG_JSON}]"), [MUG], 0),
        (json.dumps(f"[\n{MUG_JSON}\n]"), [MUG], 0),
        (f"```json\n{json.dumps(MUG_JSON)}\n```", [MUG], 0),
        (json.dumps({"answer": f"[{MUG_JSON}]"}), [MUG], 0),
        (f"<thinking>maybe {PEN_JSON}</thinking>\n{MUG_JSON}", [MUG], 0),
        ("<think>12 30 200 310\n</think>\nNothing.", [], 0),
        (f"<think>Perhaps {PEN_JSON}, or", [], 0),
    ],
    "single backslashes": [
        (
            f'{{"bbox_2d": [1, 2, 3, 4], "text_content": "{written}"}}',
            [box(wanted, 1, 2, 3, 4, text_content=wanted)],
            0,
        )
        for written, wanted in {
            r"$\frac{1}{2} \beta$": r"$\frac{1}{2} \beta$",
            r"$\\frac{1}{2}$\nand": "$\\frac{1}{2}$\nand",
            r"$\alpha \times \neq \to x$\nfoo": "$\\alpha \\times \\neq \\to x$\nfoo",
            r"\rightarrow \textbf{a}": r"\rightarrow \textbf{a}",
            r"C:\Users\new\table": r"C:\Users\new\table",
            r"C:\\Users\\new": r"C:\Users\new",
            r"A:\nfoo\tbar\r\nto": "A:\nfoo\tbar\r\nto",
            r"a\to \not": "a\to \not",
            r"$a\to b$ \new": "$a\\to b$ \new",
            r"$\\alpha$ \to": "$\\alpha$ \to",
            r"a \times b \times2": "a \\times b \\times2",
            r"a\timescale \ttext \nequal": "a\timescale \ttext \nequal",
            r"C:\new\table": "C:\new\table",
            r"\d+\s*\_ \(x\)": r"\d+\s*\_ \(x\)",
            r"\u00e9 \u00C9\f": "é É\f",
        }.items()
    ],
}
TABLE = [(text, objects, malformed) for answers in ANSWERS.values() for text, objects, malformed in answers]


@pytest.mark.parametrize("text, objects, malformed", TABLE)
def test_answers(text, objects, malformed):
    assert parse(text) == Parsed(objects, malformed)


@pytest.mark.parametrize(
    "clips, places",
    [
        ((), (0, 0, 1, 1)),
        ((False, True), (0, 1, 3, 3)),
        ((True, False, True, False), (1, 0, 3, 2)),
        ((True, True), (0, 0, 1, 1)),
    ],
)
def test_pictures_and_clips_are_counted_for_themselves(clips, places):
    """As the chat template numbers them. What is not there stays out of the conversation."""
    text = "Picture 1: [1,2,3,4]\nVideo 1: [1,2,3,4]\nSecond image: [1,2,3,4]\n第二个视频：[1,2,3,4]"
    assert tuple(o.image for o in parse(text, clips).objects) == places


@pytest.mark.parametrize(
    "text, places",
    [
        # from the end
        ("In the last picture: #", (2,)),
        ("the cat in the final photo #", (2,)),
        ("The last input image shows #", (2,)),
        ("In the second-to-last image: #", (1,)),
        ("the second last picture #", (1,)),
        ("最后一张图：#", (2,)),
        ("最后一张里 #", (2,)),
        ("最后的图片中：#", (2,)),
        ("倒数第二张图：#", (1,)),
        ('{"image": "last", "bbox_2d": [1, 2, 3, 4]}', (2,)),
        ('{"last_image": [{"bbox_2d": [1, 2, 3, 4]}]}', (2,)),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "the cat in the last image"}', (2,)),
        ("In the fourth to last image: #", (3,)),  # not there
        # one of them, after a picture is named
        ("Image 1 shows a dog: # In the second one, # and in the last one #", (0, 1, 2)),
        ("In the first image # and in the second: #", (0, 1)),
        ("The first picture has one: # On the third #", (0, 2)),
        ("第一张图：# 第二个里 # 第3张：#", (0, 1, 2)),
        # in marks
        ("**Image 2**\n- dog: #", (1,)),
        ("**Image 2** #", (1,)),
        ("*Image 2*: #", (1,)),
        ("Image 2 **dog**: #", (1,)),
        ("Image **2**: #", (1,)),
        ("Image [2]: #", (1,)),
        ("- Image 2\n* 3 dogs: #", (1,)),
        ("the picture 2 of 3: #", (1,)),
        # behind the place
        ("dog at # (Image 2), cat at # (Image 1)", (1, 0)),
        ("# in image 2", (1,)),
        ("# [image 2]", (1,)),
        ("The dogs are at # and # in the second image. The cat # is alone.", (1, 1, 1)),
        ("| dog | # | Image 2 |\n| cat | # | Image 1 |", (1, 0)),
        ("dog: #, Image 2\ncat: #, Image 1", (1, 0)),
        ("dog # - Image 2", (1,)),
        ("狗#（第二张图），猫#（图1）", (1, 0)),
        ("狗在#，位于图2中。", (1,)),
        ("(12, 30) in image 2", (1,)),
        ('{"image": 1, "bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2, 3, 4]} in image 3', (0, 2)),
        # before the next one
        ("| Image 1 | # |\n| Image 2 | # |", (0, 1)),
        ("Image 1: #, Image 2: #", (0, 1)),
        ("Image 1: # Image 2: #", (0, 1)),
        ("# (Image 2: #)", (0, 1)),
        ("In image 1 it is at # and in image 2 at #", (0, 1)),
        ("# In image 2: #", (0, 1)),
        # other things
        ("In the second one: #", (0,)),
        ("Image 3 x 4: #", (0,)),
        ("the image 2*3: #", (0,)),
        ("Image 2 has two dogs. The first one is #, the second one is #", (1, 1)),
        ("Image 2: in the first row # in the first 5 rows #", (1, 1)),
        ("第2张图：第一个 # 第二个 #", (1, 1)),
        ("In the other image: #", (0,)),
        ("最后图中有2只猫：#", (0,)),
        ("In the last images: #", (0,)),
        ("At last: #", (0,)),
    ],
)
def test_pictures_in_other_words(text, places):
    read = parse(text.replace("#", "[1, 2, 3, 4]"), [False] * 3)
    assert tuple(o.image for o in read.objects) == places and read.malformed == 0


def test_the_last_of_its_kind():
    text = "The last picture: [1,2,3,4]\nThe last video: [1,2,3,4]\nin the first one: [1,2,3,4]"
    assert [o.image for o in parse(text, (False, True, True, False)).objects] == [3, 2, 1]
    assert [o.image for o in parse(text).objects] == [0, 0, 0]
    assert [o.label for o in parse(text).objects] == ["", "", ""]
    two = Result(text[:27], [], "stop", 1, pictures=(Sizes((10, 10), (10, 10)),) * 2, boxes="resized")
    assert [o.image for o in two.objects().objects] == [1]


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


@pytest.mark.parametrize(
    "label", ["\fa \bc", "$x$ \to", "\times \neq", r"\frac \d C:\Users\new", "C:\new", r"\\server\new"]
)
def test_labels_with_backslashes_and_control_characters(label):
    objects = [box(label, 1, 2, 3, 4, seen=label)]
    assert parse(write(objects)) == Parsed(objects, 0) and json.loads(write(objects))[0]["label"] == label


@pytest.mark.parametrize("form", FORMS)
def test_pictures_and_clips_are_written_as_prompts_count_them(form):
    """Objects → text → the same objects, in conversations of pictures, of clips and of both."""
    rng = random.Random(FORMS.index(form))
    for _ in range(500):
        clips = rng.choices((False, True), k=rng.randint(1, 5))
        objects = [o._replace(image=rng.randrange(len(clips))) for o in drawn_objects(rng, form)]
        assert parse(write(objects, form, clips), clips) == Parsed(objects, 0)
    clips, things = (True, False, True), [point("cat", 1, 2, image=i) for i in (0, 1, 2)]
    text = write(things, form, clips)
    if form == "json":
        places = [{key: o[key] for key in o.keys() & {"image", "video"}} for o in json.loads(text)]
        assert places == [{"video": 1}, {"image": 1}, {"video": 2}]
    else:
        assert re.findall(r"(?:Picture|Video) [0-9]+(?=: <)", text) == ["Video 1", "Picture 1", "Video 2"]
    for outside, others in ((3, clips), (1, (False,)), (-1, (True,))):
        with pytest.raises(InputError, match="of a conversation that has"):
            write([*things[:1], point("cat", 1, 2, image=outside)], form, others)


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
    assert json.loads(write([box("Picture 2: A", 1, 2, 3, 4)]))[0]["image"] == 1  # the label alone says another one
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "wrong, said",
    [
        (point("a", 1, 2, image=-1), "is in picture 0; correct its image"),
        (point("a", 1, 2, image=-9), "is in picture -8; correct its image"),
        ({"point_2d": [1, 2], "label": "a"}, "is no Object"),
        ("a", "is no Object"),
    ],
)
def test_what_is_no_object_of_a_conversation(wrong, said, form):
    with pytest.raises(InputError, match=said):
        write([point("b", 1, 2), wrong], form)


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
        took, read = timed(lambda text=text: parse(text), 0.02)
        slowest = max(slowest, took)
        for o in read.objects:
            assert {"box": len(o.points) == 2, "point": len(o.points) == 1, "polygon": len(o.points) >= 3}[o.kind]
            assert all(abs(n) < 1e9 for xy in o.points for n in xy) and o.image >= 0 and type(o.label) is str
            json.dumps(o.attributes)  # nothing stands for what was cut off
            assert None not in o.attributes
    assert slowest < 0.05


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "[",
            "{",
            "(",
            "7",
            "[{",
            "[[",
            "<",
            '"',
            "'",
            "\\",
            "<points ",
            "<ref>",
            "Picture 1 ",
            "`",
            '"""',
            "//",
            "$\\",
        ),
        *("the last image ", "in the second ", "倒数第", "最后一", "[1", "{a;"),
    ],
)
def test_long_senseless_texts(unit):
    text = unit * (50_000 // len(unit))  # more than 8,000 tokens
    took, read = timed(lambda: parse(text), 0.02)
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
    '{"a"=',
    '{"bbox_2d":',
    '"bbox_2d": [1,2,3,4] ',
    "<point>1 2",
    "<|box_start|>(1,2),(3,4)",
    f"[{MUG_JSON},",
    "[1,2,3,4] (Image 2) ",
    "[1,2,3,4] and ",
    "图2中(1,2),(3,4)",
    "{a:",
    '{"a":{',
]


@pytest.mark.parametrize("unit", SLOW)
def test_time_is_linear(unit):
    """Four times the text takes about four times as long; twelve leaves room for other load."""
    short, long = (timed(lambda n=n: parse(unit * (n // len(unit))), 0.02)[0] for n in (10_000, 40_000))
    assert long < 12 * max(short, 0.001)


def test_many_lists_under_one_key():
    short, long = (
        timed(lambda n=n: parse('{"bbox_2d": [1, 2, 3, 4]' + " [5, 6, 7, 8]" * n + "}"), 0.02) for n in (1000, 4000)
    )
    assert len(long[1].objects) == 4001 and long[0] < 12 * max(short[0], 0.001)


@pytest.mark.parametrize(
    "unit", ["At 00:05 [1,2,3,4] ", '{"00:05": [1,2,3,4]} ', '{"times": [', '{"time": 1, "objects": [']
)
def test_time_is_linear_for_clips(unit):
    short, long = (timed(lambda n=n: parse(unit * (n // len(unit)), [True]), 0.02)[0] for n in (5_000, 20_000))
    assert long < 12 * max(short, 0.001)


@pytest.mark.parametrize(
    "text, times",
    [
        ('{"time": 3, "objects": [{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2, 3, 4], "time": 5}]}', [3, 5]),
        ('{"00:03": [{"bbox_2d": [1, 2, 3, 4]}], "00:05": {"bbox_2d": [1, 2, 3, 4]}}', ["00:03", "00:05"]),
        ("At 3 seconds: [1, 2, 3, 4] and [1, 2, 3, 4]. At 00:05: [1, 2, 3, 4]", [3, 3, 5]),
        ("It is at [1, 2, 3, 4] at 3 seconds, and at [1, 2, 3, 4] at 5 seconds.", [3, 5]),
        ("It is at [1, 2, 3, 4]. At 3 seconds, it is at [1, 2, 3, 4].", [None, 3]),
        ("It is at [1, 2, 3, 4] for 3 seconds.", [None]),
        ('{"1": [1, 2, 3, 4], "2": [1, 2, 3, 4]}', [None, None]),
    ],
)
def test_the_time_of_an_object_of_a_clip_may_stand_around_it(text, times):
    assert [o.attributes.get("time") for o in parse(text, [True]).objects] == times
    assert [o.points for o in parse(text).objects] == [((1, 2), (3, 4))] * len(times)
    own = text.count('4], "time"')  # in its own JSON; of a picture, no more is read
    assert sum("time" in o.attributes for o in parse(text, [False]).objects) == own


def drawn_json(rng, depth=0):
    if depth < 5 and rng.random() < 0.6:
        if rng.random() < 0.5:
            return [drawn_json(rng, depth + 1) for _ in range(rng.randrange(4))]
        return {drawn_label(rng): drawn_json(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice((drawn_label(rng), drawn_number(rng), rng.randrange(10**30), -7, 1e-7, True, False, None))


def test_correct_json_is_read_as_json():
    """Also by the reader of broken JSON, which has to tell where each string ends."""
    rng = random.Random(3)
    for _ in range(1200):
        value = [drawn_json(rng)]
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1, "\t")))
        assert Reader(text).read(0) == ([value], len(text))
        reader = Reader(text)
        reader._tries = 0
        assert reader.read(0) == ([value], len(text))


def test_deep_nesting():
    assert parse("[" * 5000 + MUG_JSON).objects == [MUG]
    assert parse("[" * 20 + MUG_JSON + "]" * 20).objects == [MUG]
    nested = MUG_JSON
    for _ in range(2000):
        nested = f'{{"a": [{nested}]}}'
    parse(nested)


# Coordinates


@pytest.mark.parametrize("text", [text for text, *_ in TABLE])
def test_numbers_are_converted_where_they_stand(text):
    """With every coordinate three times as large, the same objects and labels are read, and all other text stays."""
    large = Sizes((9000, 9000), (3000, 3000))
    out = from_model(text, large, "resized", "original")
    scaled = converted(parse(text), [large] * 99, "resized", "original", rounded=True).objects
    if "rotate" not in text:
        assert [(o.label, o.points) for o in parse(out).objects] == [(o.label, o.points) for o in scaled]
    assert re.sub(r"-?[0-9.]+(e[0-9])?", "#", out) == re.sub(r"-?[0-9.]+(e[0-9])?", "#", text)


def drawn_sizes(rng, p):
    """A picture that is tiny, extreme or ordinary, or the frames of a clip, and its size after resizing."""
    what = rng.randrange(4)
    if what == 0:
        width, height = rng.randint(1, 60), rng.randint(1, 60)
    elif what == 1:
        width = rng.randint(1, 60)
        height = min(width * rng.randint(20, 199), 9000)
    else:
        width, height = rng.randint(30, 6000), rng.randint(30, 6000)
    if rng.random() < 0.5 and what != 3:
        width, height = height, width
    if what == 3:
        resized = frame_size(height, width, rng.choice((2, 64, 768)), p)
    else:
        resized = target_size(height, width, p, MediaOptions(max_pixels=rng.choice((None, 300_000, 3136))))
    return Sizes((width, height), resized[::-1])


def drawn_in(rng, pictures):
    """One box, point or polygon in one of the pictures."""
    image = rng.randrange(len(pictures))
    n = rng.choice((1, 2, 4))
    width, height = pictures[image].original
    points = tuple((rng.uniform(0, width), rng.uniform(0, height)) for _ in range(n))
    return Object("mug", {1: "point", 2: "box", 4: "polygon"}[n], points, {}, image)


@pytest.mark.parametrize(
    "p, target",
    [
        (Preprocessing(), "resized"),  # Qwen2.5-VL
        (Preprocessing(), "thousandths"),  # Qwen2-VL
        (Preprocessing(patch_size=16), "thousandths"),  # Qwen3-VL
    ],
)
def test_there_and_back(p, target):
    """1,000 pictures, up to four in a message: to the model's coordinates and back, and once more in whole numbers."""
    rng = random.Random(p.patch_size)
    for _ in range(400):
        pictures = [drawn_sizes(rng, p) for _ in range(rng.randint(1, 4))]
        parsed = Parsed([drawn_in(rng, pictures) for _ in range(8)], 0)
        for rounded in (False, True):
            told = converted(parsed, pictures, "original", target, rounded=rounded)
            back = converted(told, pictures, target, "original")
            for o, t, b in zip(parsed.objects, told.objects, back.objects, strict=True):
                place = pictures[o.image]
                assert not rounded or all(n == int(n) for xy in t.points for n in xy)
                for side in (0, 1):
                    step = place.original[side] / place.of(target)[side]
                    allowed = max(1, step / 2) if rounded else 1e-6
                    moved = [abs(x[side] - y[side]) for x, y in zip(o.points, b.points, strict=True)]
                    assert max(moved) <= allowed * (1 + 1e-9)


def pixels(visual, step=0, p=Preprocessing()):  # noqa: B008 - frozen
    """The picture that patches make, [height, width, 3]."""
    grid, m, s = visual.grid, p.merge_size, p.patch_size
    blocks = visual.patches.reshape(grid.t, grid.h // m, grid.w // m, m, m, 3, p.temporal_patch_size, s, s)
    return blocks[step, ..., 0, :, :].transpose(0, 2, 5, 1, 3, 6, 4).reshape(grid.h * s, grid.w * s, 3)


def dark(image):
    """The box around the dark pixels."""
    ys, xs = np.nonzero(image.mean(-1) < 128)
    return (xs.min(), ys.min()), (xs.max() + 1, ys.max() + 1)


def drawing(size, corners):
    image = Image.new("RGB", size, "white")
    image.paste((0, 0, 0), tuple(n for corner in corners for n in corner))
    return image


EXIF = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a picture with this orientation is stored


@pytest.mark.parametrize("orientation", EXIF)
@pytest.mark.parametrize("size, corners", [((331, 57), ((20, 9), (190, 33))), ((90, 640), ((11, 400), (70, 630)))])
def test_a_box_is_where_the_picture_shows_it(tmp_path, orientation, size, corners):
    """The box of the resized pixels, in original coordinates, is the one that was drawn in the upright picture."""
    image, exif = drawing(size, corners), Image.Exif()
    exif[0x0112] = orientation
    if EXIF[orientation] is not None:
        image = image.transpose(Image.Transpose(EXIF[orientation]))
    image.save(tmp_path / "a.png", exif=exif)
    visual = image_visual(tmp_path / "a.png", Preprocessing(), MediaOptions(max_pixels=40_000))
    assert visual.size == size
    place = sizes(visual, tiny_config("qwen2_5_vl"))
    seen = Parsed([Object("mug", "box", dark(pixels(visual)))], 0)
    (found,) = converted(seen, [place], "resized", "original").objects
    for side in (0, 1):
        step = place.original[side] / place.resized[side]
        assert all(abs(a[side] - b[side]) <= max(1, step) for a, b in zip(found.points, corners, strict=True))


def test_frames_of_clips(tmp_path):
    size, corners = (331, 157), ((20, 9), (190, 130))
    clip = video_visual([drawing(size, corners)] * 4, Preprocessing())
    assert clip.size == size and clip.grid.t == 2
    place = sizes(clip, tiny_config("qwen2_5_vl"))
    for step in (0, 1):
        seen = Parsed([Object("mug", "box", dark(pixels(clip, step)))], 0)
        (found,) = converted(seen, [place], "resized", "original").objects
        assert all(
            abs(a - b) <= 1 for xy, uv in zip(found.points, corners, strict=True) for a, b in zip(xy, uv, strict=True)
        )
    (name,) = [f for f in SAMPLES.iterdir() if f.suffix == ".mp4"]
    whole = video_visual(str(name), Preprocessing(), MediaOptions(nframes=2))
    small = video_visual(str(name), Preprocessing(), MediaOptions(nframes=2, max_pixels=3136))
    assert whole.size == small.size and small.grid != whole.grid
    frames = [drawing(size, corners), drawing((662, 314), corners)]
    mixed = video_visual(frames, Preprocessing(), MediaOptions(resized_height=56, resized_width=112))
    assert mixed.size is None  # no size is that of all frames


# Results


def test_objects_of_a_result():
    wide, tall = Sizes((4000, 3000), (952, 728)), Sizes((300, 900), (280, 896))
    text = f'Picture 1: {MUG_JSON} Picture 2: {PEN_JSON} Picture 3: {PEN_JSON} {{"bbox_2d": [1]}}'
    result = Result(text, [], "stop", 1, pictures=(wide, tall), boxes="resized")
    mug, pen = result.objects().objects
    assert mug.points == ((12 * 4000 / 952, 30 * 3000 / 728), (200 * 4000 / 952, 310 * 3000 / 728))
    assert pen.points == ((5 * 300 / 280, 6 * 900 / 896), (70 * 300 / 280, 80 * 900 / 896)) and pen.image == 1
    assert result.objects().malformed == 2  # there is no third picture
    assert result.objects("resized").objects == [MUG, PEN._replace(image=1)]
    in_thousandths = replace(result, boxes="thousandths")
    assert in_thousandths.objects().objects[0].points == ((48, 90), (800, 930))
    outside = replace(result, text="[-5, 3, 2000, 9]").objects()
    assert outside.objects[0].points == ((0, 3 * 3000 / 728), (4000, 9 * 3000 / 728))  # moved to the edge
    with pytest.raises(InputError, match=r"^coordinates is 'pixels'; it must be one of original, resized, thousandths"):
        result.objects("pixels")
    for names in (("pixels", "original"), ("original", None)):
        with pytest.raises(InputError, match=r"^(source|target) is '\w+'; it must be one of original, resized"):
            converted(parse(text), [wide, tall], *names)
    clip = Sizes((600, 300), (280, 140), clip=True)
    mixed = replace(result, text=f"Picture 1: {PEN_JSON} Video 1: {PEN_JSON}", pictures=(clip, tall)).objects("resized")
    assert mixed == Parsed([PEN._replace(image=1), PEN], 0)
    assert replace(result, pictures=()).objects() == Parsed([], 4)


def test_generate_prints_objects(tmp_path, capsys):
    """The demo's boxes about an enlarged picture."""
    image = Image.open(SAMPLES / "scene.png")
    image.resize((image.width * 3, image.height * 2)).save(tmp_path / "large.png")
    sides = (image.width // 28 * 28, image.height // 28 * 28)
    command = ["generate", "--image", str(tmp_path / "large.png"), "--prompt", "Find the boxes of: strawberry"]
    command += [f"--resized-width={sides[0]}", f"--resized-height={sides[1]}", "--objects"]
    assert cli.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    places = [Sizes((image.width * 3, image.height * 2), sides)]
    want = converted(parse(told["text"]), places, "resized", "original", rounded=True)
    assert want.objects and told["malformed"] == 0
    assert told["objects"] == [
        {"label": o.label, "kind": "box", "points": [list(xy) for xy in o.points], "attributes": {}, "image": 0}
        for o in want.objects
    ]
    assert cli.main([*command, "--json", "--boxes", "thousandths"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert all(max(max(xy) for xy in o["points"]) <= 1000 for o in told["objects"])
    assert [[tuple(xy) for xy in o["points"]] for o in told["objects"]] == [
        [tuple(xy) for xy in o.points] for o in parse(told["text"]).objects
    ]


@pytest.mark.parametrize("depth", [5, 23, 24, 25, 60, 300, 480, 700, 990, 3000])
def test_nested_attributes_are_read_or_dropped(depth):
    nested = '{"a": [' * depth + MUG_JSON + "]}" * depth
    found = parse(f'{{"bbox_2d": [1, 2, 3, 4], "label": "tray", "in": {nested}}}').objects
    assert all(o.kind == "box" for o in found) and (depth > 11 or found == [box("tray", 1, 2, 3, 4), MUG])
    json.dumps([o._asdict() for o in found])
