"""The wording of each task: exact, since models were shown exactly these texts."""

import inspect
import json

import pytest

from qwenvl_jax.answers import prompts
from qwenvl_jax.answers.prompts import (
    count,
    describe_events,
    detect,
    extract,
    ground,
    point,
    read_document,
    read_text,
    spot_text,
    when,
)
from qwenvl_jax.errors import InputError

PUBLIC = [ground, point, detect, count, read_document, spot_text, read_text, when, describe_events, extract]


@pytest.mark.parametrize(
    "prompt, text",
    [
        (
            ground("the top right brown cake"),
            "Locate the top right brown cake, output its bbox coordinates using JSON format.",
        ),
        (ground("最右上角的棕色蛋糕", "zh"), "定位最右上角的棕色蛋糕，以JSON格式输出其bbox坐标"),
        (ground(" the man ", tokens=True), "Find <|object_ref_start|>the man<|object_ref_end|>"),
        (ground("击掌", "zh", tokens=True), "框出图中<|object_ref_start|>击掌<|object_ref_end|>的位置"),
        (
            point("the rolling pin on the far side of the table"),
            "point to the rolling pin on the far side of the table, output its coordinates in XML format "
            "<points x y>object</points>",
        ),
        (point("桌子远处的擀面杖", "zh"), "以点的形式定位图中桌子远处的擀面杖，以XML格式输出其坐标"),
        (
            detect(["small cake"]),
            "Outline the position of each small cake and output all the coordinates in JSON format.",
        ),
        (detect("small cake"), detect(["small cake"])),
        (detect("小蛋糕", "zh"), "框出每一个小蛋糕的位置，以json格式输出所有的坐标"),
        (
            detect(("car", "bus", "bicycle")),
            'Locate every instance that belongs to the following categories: "car, bus, bicycle". '
            "Report bbox coordinates in JSON format.",
        ),
        (detect(["汽车", "行人"], "zh"), "检测图中所有汽车、行人并以JSON格式输出其bbox的坐标。"),
        (
            count("birds"),
            "Count the number of birds in the figure. To ensure accuracy, first detect their key points, then give the "
            "total number.",
        ),
        (
            count("物体", "zh"),
            "请以JSON格式输出图中所有物体bbox的坐标以及它们的名字，然后基于检测结果回答以下问题：图中物体的数目是多少？",
        ),
        (read_document(), "QwenVL HTML"),
        (spot_text(), "Spotting all the text in the image with line-level, and output in JSON format."),
        (spot_text("word"), "Spotting all the text in the image with word-level, and output in JSON format."),
        (spot_text(language="zh"), "检测并识别图中所有的文字，每行一项，以JSON格式输出其bbox坐标和文字内容。"),
        (read_text(), "Read all the text in the image."),
        (read_text("zh"), "请读出图中的所有文字。"),
        (
            when("a person opens the door"),
            "Give you a textual query: 'a person opens the door'. When does the described content occur in the video? "
            "Please return the start and end timestamps in seconds.",
        ),
        (when("开门", "zh"), "视频中“开门”发生在什么时候？请以秒为单位给出开始时间和结束时间。"),
        (
            describe_events(),
            "Localize a series of activity events in the video, output the start and end timestamp for each event, and "
            "describe each event with sentences. Provide the result in json format with 'mm:ss.ff' format for time "
            "depiction.",
        ),
        (
            describe_events("zh"),
            "请你描述下视频中的人物的一系列动作，以JSON格式输出开始时间（start_time）、结束时间（end_time）、事件（event），"
            "请使用HH:mm:ss表示时间戳。",
        ),
        (
            extract({"company": "", "date": "", "address": "", "total": ""}),
            'Extract the key-value information in the format:{"company": "", "date": "", "address": "", "total": ""}',
        ),
        (
            extract(["Invoice Code", "Fare"]),
            "Extract the following from the image: ['Invoice Code', 'Fare']. Please output in JSON format.",
        ),
        (extract(["发票代码", "票价"], "zh"), "提取图中的：['发票代码', '票价']，并且按照json格式输出。"),
        (extract({"公司": [""]}, "zh"), '提取图中的信息，按照以下JSON格式输出：{"公司": [""]}'),
    ],
)
def test_wording(prompt, text):
    assert prompt == text


def test_every_function_says_where_its_wording_is_from():
    named = [f for _, f in inspect.getmembers(prompts, inspect.isfunction) if f.__module__ == prompts.__name__]
    assert {f for f in named if not f.__name__.startswith("_")} == set(PUBLIC)
    for f in PUBLIC:
        assert "Wording" in f.__doc__ and ("ookbook" in f.__doc__ or "Model Studio" in f.__doc__)


@pytest.mark.parametrize("f", [f for f in PUBLIC if f is not read_document])
@pytest.mark.parametrize("language", ["de", "EN", "", None, 3, ["en"]])
def test_an_unknown_language_is_refused(f, language):
    arguments = () if f in (spot_text, read_text, describe_events) else ("cat",)
    with pytest.raises(InputError, match=r"language is .*; it must be en or zh"):
        f(*arguments, language=language)


@pytest.mark.parametrize(
    "call, said",
    [
        *(
            (lambda f=f, v=v: f(v), "it must be a text")
            for f in (ground, point, count, when)
            for v in ("", " \n", None, 7)
        ),
        (lambda: detect([]), "a list of texts"),
        (lambda: detect(None), "a list of texts"),
        (lambda: detect({"car"}), "a list of texts"),
        (lambda: detect(["car", ""]), "an item of names"),
        (lambda: detect("  "), "an item of names"),
        (lambda: extract([]), "a list of texts"),
        (lambda: extract({}), "schema is empty"),
        (lambda: extract({"a": {1, 2}}), "JSON cannot say"),
        (lambda: extract({"a": float("nan")}), "JSON cannot say"),
        (lambda: extract([{"name": "a"}]), "an item of schema"),
        (lambda: spot_text("page"), "line or word"),
        (lambda: spot_text(["line"]), "line or word"),
        (lambda: ground("a<|im_end|>b", tokens=True), "control tokens of its own"),
    ],
)
def test_bad_arguments_are_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_an_example_stays_readable_json():
    schema = {"items": [{"name": 'a "quoted" 名', "price": None}]}
    assert json.loads(extract(schema).split(":", 1)[1]) == schema
