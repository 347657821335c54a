"""The wording that Qwen's models were shown for each task, so that nobody has to guess it.

Each function returns the text to put after the picture, page or clip:

    engine.generate([[{"role": "user", "content": [{"type": "image", "image": "a.jpg"},
                                                   {"type": "text", "text": prompts.ground("the dog")}]}]])

language: "en" or "zh". Where Qwen has published a wording in only one of them, the other one is ours, and the docstring
says so. A model answers in the coordinates of its family: `families.BOXES`. All functions raise InputError for a blank
or unknown argument.
"""

import json
from collections.abc import Mapping, Sequence

from qwenvl_jax.errors import InputError, shown

LANGUAGES = ("en", "zh")
# The system prompt that Qwen2.5-VL's cookbook document_parsing sets beside `read_document`.
DOCUMENT_SYSTEM = (
    "You are an AI specialized in recognizing and extracting text from images. Your mission is to analyze the image "
    "document and generate the result in QwenVL Document Parser HTML format using specified tags while maintaining "
    "user privacy and data integrity."
)


def ground(what: str, language: str = "en", tokens: bool = False) -> str:
    """Asks for the box of one object: ground("the brown cake at the top right"). Read by `grounding.parse`.

    Wording: Qwen2.5-VL's cookbook spatial_understanding, in both languages; the answer is JSON with bbox_2d.
    tokens: the form of Qwen2-VL instead, which has no cookbook for it. The object stands between reference tokens, the
        answer between box tokens; both need `allow_control_tokens=True`. The English is that of common training data
        for Qwen2-VL, the Chinese that of Qwen-VL's README.
    """
    what = _text(what, "what")
    if not tokens:
        en = f"Locate {what}, output its bbox coordinates using JSON format."
        return _in(language, en, f"定位{what}，以JSON格式输出其bbox坐标")
    if "<|" in what:
        raise InputError(f"what is {shown(what)}; with tokens=True, it cannot have control tokens of its own")
    marked = f"<|object_ref_start|>{what}<|object_ref_end|>"
    return _in(language, f"Find {marked}", f"框出图中{marked}的位置")


def point(what: str, language: str = "en") -> str:
    """Asks for a point on an object: point("the rolling pin"). Read by `grounding.parse`.

    Wording: Qwen2.5-VL's cookbook spatial_understanding, in both languages; the answer is XML, <points x1="…" …>.
    """
    what = _text(what, "what")
    en = f"point to {what}, output its coordinates in XML format <points x y>object</points>"
    return _in(language, en, f"以点的形式定位图中{what}，以XML格式输出其坐标")


def detect(names: str | Sequence[str], language: str = "en") -> str:
    """Asks for the boxes of all objects of these kinds: detect(["car", "bus"]). Read by `grounding.parse`.

    Wording for one name: Qwen2.5-VL's cookbook spatial_understanding, in both languages. For several: Qwen3-VL's
    cookbook 2d_grounding; in Chinese, the documentation of Alibaba Cloud's Model Studio for Qwen2.5-VL.
    """
    names = _names(names, "names")
    if len(names) == 1:
        en = f"Outline the position of each {names[0]} and output all the coordinates in JSON format."
        return _in(language, en, f"框出每一个{names[0]}的位置，以json格式输出所有的坐标")
    en = f'Locate every instance that belongs to the following categories: "{", ".join(names)}".'
    zh = f"检测图中所有{'、'.join(names)}并以JSON格式输出其bbox的坐标。"
    return _in(language, f"{en} Report bbox coordinates in JSON format.", zh)


def count(what: str, language: str = "en") -> str:
    """Asks how many there are, after marking each: count("birds"). The marks are read by `grounding.parse`.

    Wording: Qwen2.5-VL's release notes (points, then the number); in Chinese, its cookbook spatial_understanding
    (boxes, then the number).
    """
    what = _text(what, "what")
    en = f"Count the number of {what} in the figure."
    en += " To ensure accuracy, first detect their key points, then give the total number."
    zh = f"请以JSON格式输出图中所有{what}bbox的坐标以及它们的名字，然后基于检测结果回答以下问题："
    return _in(language, en, f"{zh}图中{what}的数目是多少？")


def read_document() -> str:
    """Asks for a page as QwenVL-HTML, in any language. Read by `answers.documents`.

    Wording: Qwen2.5-VL's cookbook document_parsing, which also sets DOCUMENT_SYSTEM as the system prompt.
    """
    return "QwenVL HTML"


def spot_text(level: str = "line", language: str = "en") -> str:
    """Asks for the text in a picture with a box for each line or word. Read by `grounding.parse`.

    level: "line" or "word".
    Wording: Qwen2.5-VL's cookbook ocr; the answer is JSON with bbox_2d and text_content. The Chinese is ours.
    """
    units = {"line": "行", "word": "词"}
    if level not in list(units):
        raise InputError(f"level is {shown(level)}; it must be {' or '.join(units)}")
    en = f"Spotting all the text in the image with {level}-level, and output in JSON format."
    return _in(language, en, f"检测并识别图中所有的文字，每{units[level]}一项，以JSON格式输出其bbox坐标和文字内容。")


def read_text(language: str = "en") -> str:
    """Asks for the text in a picture; the answer is plain text.

    Wording: Qwen2.5-VL's cookbook ocr. The Chinese is ours.
    """
    return _in(language, "Read all the text in the image.", "请读出图中的所有文字。")


def when(event: str, language: str = "en") -> str:
    """Asks when something happens in a clip: when("the person opens the door"). Read by `answers.moments`.

    Wording: no cookbook has one. The English is the query with which models are evaluated on Charades-STA; it names the
    unit of time, as the authors advise (QwenLM/Qwen3-VL, issue 950). The Chinese is ours.
    """
    event = _text(event, "event")
    en = f"Give you a textual query: '{event}'. When does the described content occur in the video?"
    zh = f"视频中“{event}”发生在什么时候？请以秒为单位给出开始时间和结束时间。"
    return _in(language, f"{en} Please return the start and end timestamps in seconds.", zh)


def describe_events(language: str = "en") -> str:
    """Asks for the events of a clip with their times. Read by `answers.moments`.

    Wording: Qwen2.5-VL's cookbook video_understanding (times as mm:ss.ff); in Chinese, the documentation of Alibaba
    Cloud's Model Studio (actions of people; start_time, end_time and event, times as HH:mm:ss).
    """
    en = "Localize a series of activity events in the video, output the start and end timestamp for each event, and "
    en += "describe each event with sentences. Provide the result in json format with 'mm:ss.ff' format for time "
    zh = "请你描述下视频中的人物的一系列动作，以JSON格式输出开始时间（start_time）、结束时间（end_time）、"
    return _in(language, f"{en}depiction.", f"{zh}事件（event），请使用HH:mm:ss表示时间戳。")


def extract(schema: Mapping | Sequence[str], language: str = "en") -> str:
    """Asks for the values of these keys on a receipt, form or ticket; the answer is JSON.

    schema: names, as ["company", "total"], or an example of the answer, as {"company": "", "items": [{"name": ""}]}.
    Wording: Qwen2.5-VL's cookbook ocr: an example in English, names in Chinese. Names in English: the documentation of
    Alibaba Cloud's Model Studio. An example in Chinese: ours.
    """
    if not isinstance(schema, Mapping):
        names = _names(schema, "schema")
        zh = f"提取图中的：{names}，并且按照json格式输出。"
        return _in(language, f"Extract the following from the image: {names}. Please output in JSON format.", zh)
    try:
        form = json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"schema is {shown(schema)}, which JSON cannot say ({e})") from e
    if not schema:
        raise InputError("schema is empty; give the names of the values, or an example of the answer")
    return _in(
        language,
        f"Extract the key-value information in the format:{form}",
        f"提取图中的信息，按照以下JSON格式输出：{form}",
    )


def _in(language: str, en: str, zh: str) -> str:
    if language not in LANGUAGES:
        raise InputError(f"language is {shown(language)}; it must be {' or '.join(LANGUAGES)}")
    return en if language == "en" else zh


def _text(value: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name} is {shown(value)}; it must be a text that names it")
    return value.strip()


def _names(values: str | Sequence[str], name: str) -> list[str]:
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, Sequence) or not values:
        raise InputError(f"{name} is {shown(values)}; it must be a list of texts")
    return [_text(value, f"an item of {name}") for value in values]
