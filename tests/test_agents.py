"""Agents: tool schemas, actions in original pixels, the loop with a scripted model, records and recorded phones."""

import hashlib
import io
import json
import random
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from qwenvl_jax.agents.actions import TOOLS, Action, View, read_action
from qwenvl_jax.agents.fence import Fence
from qwenvl_jax.agents.loop import Still, run
from qwenvl_jax.agents.phone import RecordedPhone
from qwenvl_jax.agents.record import Record, Step, describe, draw, read, replay
from qwenvl_jax.agents.schemas import schema
from qwenvl_jax.answers.boxes import COORDINATES, Sizes
from qwenvl_jax.answers.tools import ToolCall, write
from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.inputs.preprocessing import Preprocessing

SCREEN = Sizes((1280, 800), (1288, 812))
PHONE = Sizes((1080, 2400), (1092, 2408))


def call(tool: str, action: str = "", **arguments) -> str:
    """The answer of a model that makes one call."""
    return write([ToolCall(tool, ({"action": action} if action else {}) | arguments)])


def computer(action: str, **arguments) -> str:
    return call("computer_use", action, **arguments)


def picture(size=(320, 200), color=(200, 200, 200)) -> Image.Image:
    return Image.new("RGB", size, color)


class Script:
    """A model that gives one answer after the other, and keeps what it was shown."""

    def __init__(self, *answers: str):
        self.answers, self.seen, self.tools = list(answers), [], []

    def __call__(self, messages, tools):
        self.seen.append(json.loads(json.dumps(messages, default=lambda image: f"{image.size}")))
        self.tools.append(tools)
        return self.answers[min(len(self.seen), len(self.answers)) - 1]


class Desk:
    """An environment that writes down the actions."""

    def __init__(self, size=(320, 200), broken=()):
        self.size, self.broken, self.acted = size, broken, []

    def screenshot(self):
        return picture(self.size, (len(self.acted) * 20 % 256, 90, 90))

    def act(self, action):
        self.acted.append(action)
        if action.name in self.broken:
            raise InputError(f"{action.name} does not work here")
        return f"did {action.name}"

    def close(self):
        pass


# The hashes are of the texts that agent_function_call.py of the cookbooks gives by Qwen-Agent. The one of the phone is
# printed in mobile_agent.ipynb, too.
@pytest.mark.parametrize(
    ("tool", "screen", "coordinates", "digest"),
    [
        ("mobile_use", PHONE, "resized", "b0e022bc13f5aa95"),
        ("computer_use", SCREEN, "resized", "cb594ccc6cc77993"),
        ("computer_use", SCREEN, "thousandths", "eb30e6c0a32859b6"),
    ],
)
def test_schemas_are_the_official_ones(tool, screen, coordinates, digest):
    text = json.dumps(schema(tool, screen, coordinates), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)


def test_the_schema_of_zooming():
    zoom = schema("image_zoom_in_tool", SCREEN)["function"]
    assert zoom["parameters"]["required"] == ["bbox_2d", "label", "img_idx"]
    with pytest.raises(InputError, match="no tool 'browser_use'"):
        schema("browser_use", SCREEN)


@pytest.mark.parametrize("tool", ["computer_use", "mobile_use"])
@pytest.mark.parametrize("coordinates", ["resized", "thousandths"])
def test_each_action_of_a_schema_is_read(tool, coordinates):
    everything = {
        "coordinate": [5, 6], "coordinate2": [7, 8], "text": "a", "keys": ["ctrl", "c"], "pixels": -10, "time": 1,
        "button": "Back", "status": "success",
    }  # fmt: skip
    for name in schema(tool, SCREEN, coordinates)["function"]["parameters"]["properties"]["action"]["enum"]:
        everything = {k: v for k, v in everything.items() if k != "coordinate2"} | (
            {"coordinate2": [7, 8]} if name == "swipe" else {}
        )
        action = read_action(ToolCall(tool, {"action": name} | everything), SCREEN, coordinates)
        assert (action.tool, action.name) == (tool, name) and describe(action).startswith(name)
        for missing in everything:
            some = {key: value for key, value in everything.items() if key != missing}
            try:
                other = read_action(ToolCall(tool, {"action": name} | some), SCREEN, coordinates)
            except InputError as e:
                assert str(e) == f"{name} needs {missing}, and it is missing"
            else:
                assert other == action or (missing == "coordinate" and other.points == ())


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_points_come_in_original_pixels(coordinates):
    """Within half of a model pixel of where they were meant, on screens of many sizes."""
    rng = random.Random(3)
    for _ in range(200):
        screen = picture((rng.randrange(30, 3000), rng.randrange(30, 3000)))
        view = View(Preprocessing(max_pixels=rng.choice([50_176, 1_003_520, 12_845_056])), coordinates)
        sizes = view.sizes(screen)
        assert sizes.original == screen.size
        x, y = rng.random() * screen.width, rng.random() * screen.height
        width, height = sizes.of(coordinates)
        said = [round(x * width / screen.width), round(y * height / screen.height)]
        for tool, name in (("computer_use", "left_click"), ("mobile_use", "click")):
            action = read_action(ToolCall(tool, {"action": name, "coordinate": said}), sizes, coordinates)
            ((got_x, got_y),) = action.points
            assert abs(got_x - x) <= max(1, 0.5 * screen.width / width + 1e-6)
            assert abs(got_y - y) <= max(1, 0.5 * screen.height / height + 1e-6)
            assert got_x <= screen.width - 1 and got_y <= screen.height - 1


def test_scrolling_is_in_pixels_of_the_screenshot():
    small = Sizes((1280, 2400), (320, 600))
    action = read_action(ToolCall("computer_use", {"action": "scroll", "pixels": -100}), small)
    assert action.arguments == {"pixels": -400.0} and action.points == ()
    action = read_action(ToolCall("computer_use", {"action": "hscroll", "pixels": 500}), small, "thousandths")
    assert action.arguments == {"pixels": 640.0}


def test_the_view_is_the_processors(tiny_checkpoint):
    """What the tool's schema says is the size that the model really sees."""
    from qwenvl_jax.inputs.processor import Processor
    from qwenvl_jax.params.directory import read_config

    processor = Processor.from_dir(tiny_checkpoint, read_config(tiny_checkpoint))
    for media in ({}, {"max_pixels": 20 * 784}, {"min_pixels": 400 * 784}, {"resized_width": 99, "resized_height": 60}):
        view = View.of(processor, **media)
        for size in ((33, 41), (640, 480), (301, 777)):
            sample = processor.encode([{"role": "user", "content": [view.item(picture(size))]}])
            grid, patch = sample.visuals[0].grid, processor.config.vision.patch_size
            assert view.sizes(picture(size)) == Sizes(size, (grid.w * patch, grid.h * patch))
    assert view.coordinates == ("resized" if processor.config.family == "qwen2_5_vl" else "thousandths")
    with pytest.raises(OptionsError, match="max_pixel"):
        View.of(processor, max_pixel=5)


def test_the_conversation_is_a_prompt(tiny_checkpoint):
    """A processor takes what the loop gives to the model, with as many pictures as stay."""
    from qwenvl_jax.inputs.processor import Processor
    from qwenvl_jax.params.directory import read_config

    processor = Processor.from_dir(tiny_checkpoint, read_config(tiny_checkpoint))
    view = View.of(processor, max_pixels=64 * 784)
    answers = ["<tool_call>{", *[computer("left_click", coordinate=[i, i]) for i in range(3)], "Done."]
    script, pictures = Script(*answers), []

    def model(messages, tools):
        pictures.append(len(processor.encode(messages, tools=tools).visuals))
        prompt = processor.render(messages, tools=tools)
        assert '"name_for_human": "computer_use"' in prompt and prompt.count("<tool_response>") == len(pictures[2:])
        return script(messages, tools)

    assert run(model, Desk((640, 480)), "task", view=view, pictures=2).status == "answered"
    assert pictures == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("value", ["[5, 6]", "(5, 6)", [[5, 6]], {"x": 5, "y": 6}, (5, 6), [5.0, 6.0], ["5", "6"],
                                   [["5", " 6.0"]], {"x": "5", "y": "6"}])  # fmt: skip
def test_points_are_read_in_the_forms_that_models_write(value):
    action = read_action(ToolCall("computer_use", {"action": "mouse_move", "coordinate": value}), Sizes((9, 9), (9, 9)))
    assert action.points == ((5, 6),)


@pytest.mark.parametrize("keys", [["ctrl", "c"], ["ctrl+c"], "ctrl+c", [" ctrl ", "c"]])
def test_keys_are_read_in_the_forms_that_models_write(keys):
    action = read_action(ToolCall("computer_use", {"action": "key", "keys": keys}), SCREEN)
    assert action.arguments == {"keys": ["ctrl", "c"]}


@pytest.mark.parametrize(
    ("tool", "arguments", "read"),
    [
        ("computer_use", {"action": "wait", "time": "2"}, {"time": 2.0}),
        ("computer_use", {"action": "scroll", "pixels": "-500"}, {"pixels": -500.0}),
        ("mobile_use", {"action": "long_press", "coordinate": ["1", "2"], "time": "1.5"}, {"time": 1.5}),
        ("image_zoom_in_tool", {"bbox_2d": ["1", "2", "30", "40"], "img_idx": "0", "label": 5},
         {"picture": 0, "label": "5"}),
        ("image_zoom_in_tool", {"bbox_2d": [1, 2, 30, 40], "label": ["a"]}, {"picture": 0, "label": "['a']"}),
    ],
)  # fmt: skip
def test_numbers_in_quotes_are_numbers(tool, arguments, read):
    assert read_action(ToolCall(tool, arguments), Sizes((99, 99), (99, 99))).arguments == read


BAD = [
    ("browser_use", {"action": "left_click"}, "no tool 'browser_use'; the tools are computer_use, mobile_use"),
    ("computer_use", {}, "action is missing; the actions of computer_use are key, type,"),
    ("computer_use", {"action": "tap"}, "no action 'tap'; the actions of computer_use are"),
    ("computer_use", {"action": ["key"]}, "no action"),
    ("mobile_use", {"action": "left_click"}, "no action 'left_click'; the actions of mobile_use are key, click"),
    ("mobile_use", {"action": "click"}, "click needs coordinate"),
    ("mobile_use", {"action": "swipe", "coordinate": [1, 2]}, "swipe needs coordinate2"),
    ("computer_use", {"action": "left_click", "coordinate": [1289, 5]}, "outside the screen: x is from 0 to 1288"),
    ("computer_use", {"action": "left_click", "coordinate": [-1, 5]}, "outside the screen"),
    ("computer_use", {"action": "left_click", "coordinate": [1, 2, 3]}, r"must be \[x, y\], 2 numbers"),
    ("computer_use", {"action": "left_click", "coordinate": "there"}, "2 numbers"),
    ("computer_use", {"action": "left_click", "coordinate": [True, 2]}, "2 numbers"),
    ("computer_use", {"action": "left_click", "coordinate": [float("nan"), 2]}, "2 numbers"),
    ("computer_use", {"action": "left_click", "coordinate": [10**400, 2]}, "2 numbers"),
    ("computer_use", {"action": "type", "text": 5}, "text is 5; it must be a string"),
    ("computer_use", {"action": "type", "text": "a" * 10_001}, "at most 10000 characters"),
    ("computer_use", {"action": "key", "keys": []}, "a list of key names"),
    ("computer_use", {"action": "key", "keys": [5]}, "a list of key names"),
    ("computer_use", {"action": "key", "keys": ["a"] * 9}, "a list of key names"),
    ("computer_use", {"action": "wait", "time": 61}, "seconds, from 0 to 60"),
    ("computer_use", {"action": "wait", "time": "long"}, "seconds"),
    ("computer_use", {"action": "scroll", "pixels": "far"}, "a number of pixels"),
    ("computer_use", {"action": "terminate", "status": "done"}, "one of success, failure"),
    ("mobile_use", {"action": "system_button", "button": "Power"}, "one of Back, Home, Menu, Enter"),
    ("image_zoom_in_tool", {"bbox_2d": [5, 5, 5, 9]}, "left, top, right, bottom"),
    ("image_zoom_in_tool", {"bbox_2d": [2000, 5, 2100, 9]}, "within the picture, which is 1288 × 812"),
    ("image_zoom_in_tool", {"bbox_2d": [1, 2]}, "4 numbers"),
    ("image_zoom_in_tool", {"bbox_2d": [1, 2, 3, 4], "img_idx": 1}, "img_idx is 1; it must be 0, the only picture"),
    ("image_zoom_in_tool", {"bbox_2d": [1, 2, 3, 4], "img_idx": "0.5"}, "img_idx is '0.5'; it must be 0"),
    (
        "computer_use",
        {"action": "left_click_drag", "coordinate": [1, 2], "coordinate2": [5, 6]},
        "coordinate2 is given",
    ),
    ("computer_use", {"action": "left_click_drag", "coordinate": [1, 2], "start_coordinate": [5, 6]}, "mouse_move to"),
    ("mobile_use", {"action": "click", "coordinate": [1, 2], "coordinate2": [5, 6]}, "click takes one place"),
    ("computer_use", {"action": "scroll", "pixels": "-5px"}, "pixels is '-5px'"),
    ("computer_use", {"action": "left_click", "coordinate": ["5", "x"]}, "2 numbers"),
]


@pytest.mark.parametrize(("tool", "arguments", "said"), BAD)
def test_what_is_wrong_with_a_call_is_said(tool, arguments, said):
    with pytest.raises(InputError, match=said):
        read_action(ToolCall(tool, arguments), SCREEN)


def test_any_call_is_an_action_or_a_sentence():
    rng = random.Random(5)
    values = [None, True, -1, 0, 5, 1e300, "a", "", [], {}, [1], [1, 2], ["a", "b"], [None, 1], {"x": 1}, "[1,2,3,4]"]
    names = ["coordinate", "coordinate2", "text", "keys", "pixels", "time", "button", "status", "bbox_2d", "img_idx"]
    actions = ["left_click", "scroll", "key", "swipe", "type", "wait", "terminate", "click", "", None]
    sentences = 0
    for _ in range(3000):
        arguments = {"action": rng.choice(actions)} | {name: rng.choice(values) for name in names}
        try:
            action = read_action(ToolCall(rng.choice([*TOOLS, "x"]), arguments), SCREEN, rng.choice(COORDINATES))
            json.dumps(action._asdict(), allow_nan=False)
        except InputError as e:
            sentences += 1
            assert len(str(e)) < 400
    assert 0 < sentences < 3000


def test_a_box_is_cut_out_whole_and_not_too_small():
    def box(value, sizes=SCREEN, pictures=(), **more):
        call = ToolCall("image_zoom_in_tool", {"bbox_2d": value} | more)
        return read_action(call, sizes, pictures=pictures).points

    (x1, y1), (x2, y2) = box([644, 406, 645, 407])  # one pixel in the middle
    assert (x2 - x1, y2 - y1) == (28, 28) and x1 <= 640 <= x2 and y1 <= 400 <= y2
    (x1, y1), (x2, y2) = box([1286, 0, 1400, 5])
    assert (x2, y1, x2 - x1, y2 - y1) == (1280, 0, 28, 28)
    assert box([0, 0, 9, 9], Sizes((10, 12), (28, 28))) == ((0, 0), (10, 12))
    pictures = [SCREEN, Sizes((100, 200), (112, 196))]
    assert box([0, 0, 112, 196], pictures=pictures) == ((0, 0), (100, 200))
    assert box([0, 0, 1288, 812], pictures=pictures, img_idx=0) == ((0, 0), (1280, 800))


def test_a_run_ends_as_the_model_says():
    desk = Desk()
    model = Script(
        computer("left_click", coordinate=[100, 50]),
        computer("type", text="né"),
        computer("terminate", status="success"),
    )
    outcome = run(model, desk, "Fill in the form")
    assert outcome.status == "success" and [a.name for a in desk.acted] == ["left_click", "type"]
    assert desk.acted[0].points == ((100 * 320 / 308, 50 * 200 / 196),)  # 308 × 196 is what the model sees
    assert "resolution is 308x196" in model.tools[0][0]["function"]["description"]
    roles = [message["role"] for message in model.seen[-1]]
    assert roles == ["user", "assistant", "tool", "assistant", "tool"]
    told = model.seen[-1][-1]["content"]
    assert [item["type"] for item in told] == ["text", "image"] and told[0]["text"] == "did type"
    assert [step.picture for step in outcome.steps] == ["000.png", "001.png", "002.png"]


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        (computer("terminate", status="failure"), "failure", ""),
        ("It cannot be done.", "answered", "It cannot be done."),
        ("<think>\nHm.\n</think>\n\nIt is red.", "answered", "It is red."),
        (
            f"Or {computer('type', text='rm')}?</think>\nNo.\n{computer('terminate', status='failure')}",
            "failure",
            "No.",
        ),
        (computer("answer", text="42"), "answered", "42"),
        ("I am done.\n" + computer("terminate", status="success"), "success", "I am done."),
    ],
)
def test_ends(answer, status, text):
    assert run(Script(answer), Desk(), "task")[:2] == (status, text)


def test_mistakes_go_back_to_the_model():
    desk = Desk(broken=("scroll",))
    model = Script(
        computer("left_click", coordinate=[5000, 5]),
        '<tool_call>\n{"name": "computer_use", "arguments": {"action": "left_cl',
        call("mobile_use", "click", coordinate=[1, 1]),
        computer("scroll", pixels=5),
        computer("left_click", coordinate=[5, 5]),
        computer("terminate", status="success"),
    )
    outcome = run(model, desk, "task")
    assert outcome.status == "success" and [a.name for a in desk.acted] == ["scroll", "left_click"]
    results = [step.result for step in outcome.steps]
    assert "outside the screen" in results[0] and "cannot be read" in results[1]
    assert results[2] == "there is no tool 'mobile_use'; the tools are computer_use"
    assert results[3] == "scroll does not work here"
    for seen, result in zip(model.seen[1:], results[:-1], strict=True):
        assert seen[-1]["content"][0]["text"] == result
    # A new screenshot comes with what may have changed the screen, only.
    assert [len(seen[-1]["content"]) for seen in model.seen[1:]] == [1, 1, 1, 2, 2]


def test_several_calls_in_one_answer():
    desk = Desk()
    several = write(
        [
            ToolCall("computer_use", {"action": "left_click", "coordinate": [5, 5]}),
            ToolCall("computer_use", {"action": "tap"}),
            ToolCall("computer_use", {"action": "left_click", "coordinate": [6, 6]}),
        ]
    )
    model = Script(several, computer("terminate", status="success"))
    outcome = run(model, desk, "task")
    assert len(desk.acted) == 1 and outcome.status == "success"
    tools = [message["content"] for message in model.seen[1][-3:]]
    assert [content[0]["text"][:7] for content in tools] == ["did lef", "there i", "not don"]
    assert [len(content) for content in tools] == [1, 1, 2]  # the screenshot comes last
    both = write([ToolCall("computer_use", {"action": "wait", "time": 0})] * 2)
    assert len(run(Script(both), Desk(), "task", steps=3).steps) == 3


UNREADABLE = [
    '<tool_call>\n{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": NaN}}\n</tool_call>',
    '<tool_call>\n{"name": "computer_use", "arguments": {"action": "left_cl',
    "<tool_call>\n</tool_call>",
]


@pytest.mark.parametrize("bad", UNREADABLE)
@pytest.mark.parametrize("after", [computer("type", text="secret"), computer("terminate", status="success")])
def test_nothing_is_done_after_a_call_that_cannot_be_read(bad, after):
    desk = Desk()
    model = Script(f"{computer('wait', time=0)}\n{bad}\n{after}", "Enough.")
    assert run(model, desk, "task").status == "answered" and [a.name for a in desk.acted] == ["wait"]
    told = [message["content"][0]["text"] for message in model.seen[1][-3:]]
    assert [text[:8] for text in told] == ["did wait", "not done", "the tool"]


def test_a_call_in_a_thought_is_not_done():
    desk = Desk()
    model = Script(f"I think {computer('type', text='rm')} no.</think>\n\n{computer('terminate', status='failure')}")
    assert run(model, desk, "task").status == "failure" and not desk.acted


@pytest.mark.parametrize(
    ("limits", "status", "actions"),
    [({"steps": 4, "repeats": 9}, "steps", 4), ({"repeats": 3}, "repeats", 3), ({"seconds": 1e-9}, "seconds", 0)],
)
def test_limits(limits, status, actions):
    desk = Desk()
    outcome = run(Script(computer("wait", time=1)), desk, "task", **limits)
    assert outcome.status == status and len(desk.acted) == len(outcome.steps) == actions


def test_other_actions_between_are_no_repetition():
    desk = Desk()
    answers = [computer("wait", time=1), computer("wait", time=2)] * 4
    assert run(Script(*answers, computer("terminate", status="success")), desk, "task", repeats=2).status == "success"
    assert run(Script("<tool_call>{", "x"), desk, "task", repeats=2).status == "answered"
    assert run(Script("<tool_call>{"), desk, "task", repeats=2).status == "repeats"


def test_older_pictures_are_left_out():
    answers = [computer("left_click", coordinate=[i, i]) for i in range(6)]
    model = Script(*answers, computer("terminate", status="success"))
    run(model, Desk(), "task", pictures=2)
    for number, seen in enumerate(model.seen):
        items = [item for message in seen if isinstance(message["content"], list) for item in message["content"]]
        shown = [item["type"] == "image" for item in items if item["type"] == "image" or "was here" in item["text"]]
        assert shown == [False] * (number - 1) + [True] * min(number + 1, 2)
    assert {"type": "text", "text": "(picture 0 was here)"} in model.seen[-1][0]["content"]


@pytest.mark.parametrize(
    "bad", [{"tools": ["x"]}, {"tools": []}, {"tools": "computer_use"}, {"steps": 0}, {"turns": 3}]
)
def test_bad_options_of_a_run(bad):
    with pytest.raises(InputError):
        run(Script("x"), Desk(), "task", **bad)


def test_bad_input_of_the_model_ends_the_run(tmp_path):
    def model(messages, tools):
        raise InputError("the prompt is too long")

    outcome = run(model, Desk(), "task", folder=tmp_path / "run")
    assert outcome[:2] == ("error", "the prompt is too long") == read(tmp_path / "run")[2:]


def test_a_crash_leaves_a_record(tmp_path):
    model = Script(computer("left_click", coordinate=[5, 5]))

    def crashing(messages, tools):
        if len(model.seen) == 2:
            raise KeyboardInterrupt
        return model(messages, tools)

    with pytest.raises(KeyboardInterrupt):
        run(crashing, Desk(), "task", folder=tmp_path)
    found = read(tmp_path)
    assert (found.status, len(found.steps)) == ("", 2) and not list(tmp_path.glob(".*"))
    assert "killed" in replay(tmp_path).read_text("utf-8")
    with pytest.raises(InputError, match="holds a run already"):
        run(model, Desk(), "task", folder=tmp_path)


def test_no_answer_breaks_the_loop(tmp_path):
    rng = random.Random(7)
    whole = [
        "I look.\n" + computer("left_click", coordinate=[100, 50]), computer("key", keys=["ctrl", "c"]),
        call("image_zoom_in_tool", bbox_2d=[10, 20, 90, 99], label="a", img_idx=0),
        computer("type", text='a "b" \\ 茶'),
        write([ToolCall("computer_use", {"action": "scroll", "pixels": -5})] * 3),
    ]  # fmt: skip
    pieces = [
        "{",
        "}",
        '"',
        "<tool_call>",
        "</tool_call>",
        "\\",
        "\ud800",
        "\0",
        "null",
        "1e999",
        "-",
        ",",
        "[",
        "]",
        "\n",
    ]

    def model(messages, tools):
        text = list(rng.choice(whole))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randrange(4)] = rng.choice(pieces)
        return "".join(text) + "<tool_call>" * rng.randrange(2)  # never an end in words

    steps = 0
    for number in range(10):
        tools = ["computer_use", "image_zoom_in_tool"]
        outcome = run(model, Desk(), "task", tools=tools, folder=tmp_path / str(number), steps=40, repeats=41)
        found = read(tmp_path / str(number))
        assert outcome.status in ("steps", "answered", "success", "failure")
        assert [step.action for step in found.steps] == [step.action for step in outcome.steps]
        steps += len(found.steps)
    assert steps > 200


def test_zooming_shows_a_part_of_a_picture():
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8))
    view = View(Preprocessing(max_pixels=50_176))
    width, height = view.sizes(large).resized
    model = Script(
        call("image_zoom_in_tool", bbox_2d=[0, 0, width / 4, height / 3], label="corner", img_idx=0),
        call("image_zoom_in_tool", bbox_2d=[0, 0, 50, 50], label="corner", img_idx=1),
        call("image_zoom_in_tool", bbox_2d=[0, 0, 50, 50], label="corner", img_idx=1),
        "It is noise.",
    )
    outcome = run(model, Still(large), "What is in the corner?", tools=["image_zoom_in_tool"], view=view, pictures=2)
    assert outcome.status == "answered" and outcome.steps[0].action.points == ((0, 0), (300, 300))
    items = [item for m in outcome.messages if m["role"] in ("user", "tool") for item in m["content"]]
    assert next(item["image"].size for item in items if item["type"] == "image") == large.size
    assert {"type": "text", "text": "(picture 1 was here)"} in items
    assert outcome.steps[2].result == "picture 1 is no longer in the conversation"
    outcome = run(Script(model.answers[0], "It is noise."), Still(large), "?", tools=["image_zoom_in_tool"], view=view)
    part = outcome.messages[-1]["content"][1]["image"]
    assert part.size == (448, 448)  # 256 visual tokens
    assert np.allclose(np.asarray(part).mean((0, 1)), np.asarray(large)[:300, :300].mean((0, 1)), atol=2)
    with_call = run(Script(computer("left_click", coordinate=[1, 1]), "no"), Still(large), "?", view=view)
    assert with_call.steps[0].result == "a picture can only be looked at"


def test_the_original_stays_however_often_a_part_is_zoomed():
    zooms = [call("image_zoom_in_tool", bbox_2d=[i, i, 90, 90], label="a", img_idx=0) for i in range(6)]
    for pictures in (1, 2, 3):
        model = Script(*zooms, "Red.")
        outcome = run(model, Still(picture()), "?", tools=["image_zoom_in_tool"], pictures=pictures)
        assert outcome.status == "answered" and all(step.result.startswith("picture ") for step in outcome.steps[:-1])
        assert not any("no longer" in step.result for step in outcome.steps)
        kinds = [item["type"] for m in model.seen[-1] if m["role"] != "assistant" for item in m["content"]]
        assert kinds.count("image") == max(pictures, 2)


def test_parts_go_before_screenshots():
    zoom = call("image_zoom_in_tool", bbox_2d=[0, 0, 90, 90], label="a")
    answers = [computer("left_click", coordinate=[1, 1]), zoom, computer("left_click", coordinate=[2, 2])]
    model = Script(*answers, computer("terminate", status="success"))
    run(model, Desk(), "task", tools=["computer_use", "image_zoom_in_tool"], pictures=3)
    left = [item.get("text") for m in model.seen[-1] if m["role"] != "assistant" for item in m["content"]]
    assert [text for text in left if text and "was here" in text] == ["(picture 2 was here)"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_seen_upright(orientation):
    turned = picture((400, 200), (255, 255, 255))
    turned.paste((255, 0, 0), (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    turned = Image.open(file)
    upright = ImageOps.exif_transpose(turned)
    assert View().sizes(turned) == View().sizes(upright) and View().sizes(turned).original == upright.size
    (y, x) = np.argwhere(np.asarray(upright)[..., 1] == 0).mean(0)
    (width, height) = View().sizes(upright).resized
    x, y = x * width / upright.width, y * height / upright.height
    zoom = call("image_zoom_in_tool", bbox_2d=[x - 14, y - 14, x + 14, y + 14], label="a", img_idx=0)
    outcome = run(Script(zoom, "Red."), Still(turned), "?", tools=["image_zoom_in_tool"])
    part = np.asarray(outcome.messages[-1]["content"][1]["image"])
    assert (part[..., 0] == 255).all() and (part[..., 1] == 0).mean() > 0.9


CLICK_HERE = '{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [5, 5]}}'


@pytest.mark.parametrize(
    "answer",
    [
        CLICK_HERE,
        f"```json\n{CLICK_HERE}\n```",
        f"Thought: It is there.\nAction: {CLICK_HERE}",
        f"**Action:** {CLICK_HERE}",
        f"{CLICK_HERE}\nDone.",
        f"I click it.\n\n```json\n{CLICK_HERE}\n```\nDone.",
        f"[{CLICK_HERE}]",
        f"<tool_calls>\n[{CLICK_HERE}]\n</tool_calls>",
        f"<tools>\n{CLICK_HERE}\n</tools>",
        f'{{"tool_calls": [{{"type": "function", "function": {CLICK_HERE}}}]}}',
        f"- {CLICK_HERE}",
        f"<think>Or {CLICK_HERE}?</think>\nYes.\n{CLICK_HERE}",
        CLICK_HERE.replace('"', "'"),
    ],
)
def test_a_call_of_a_tool_needs_no_tags(answer):
    desk = Desk()
    model = Script(answer, "I am done.")
    assert run(model, desk, "task")[:2] == ("answered", "I am done.")
    assert [a.name for a in desk.acted] == ["left_click"]
    said = model.seen[1][1]["content"]
    assert "left_click" not in said.split("</think>")[-1] and "```" not in said


@pytest.mark.parametrize(
    "answer",
    [
        f"I could write {CLICK_HERE} here.",
        f"```json\n{CLICK_HERE[:-20]}",
        f"[{CLICK_HERE}, {CLICK_HERE.replace('computer_use', 'rm')}]",
        'Action: computer_use\nAction Input: {"action": "left_click", "coordinate": [5, 5]}',
        'computer_use({"action": "left_click", "coordinate": [5, 5]})',
        "computer_use(action='left_click', coordinate=[5, 5])",
        "<function=computer_use>\n<parameter=action>\nleft_click\n</parameter>\n</function>",
        '{"action": "left_click", "coordinate": [5, 5]}',
        '{"tool": "computer_use", "action": "left_click"}',
        "<tool_call>\n",
    ],
)
def test_what_calls_a_tool_in_another_form_goes_back(answer):
    desk = Desk()
    model = Script(answer, "I am done.")
    assert run(model, desk, "task").status == "answered" and not desk.acted
    assert "cannot be read" in model.seen[1][-1]["content"][0]["text"]


@pytest.mark.parametrize(
    "answer",
    ["I did it with computer_use.", '{"name": "Ann"}', '[{"bbox_2d": [1, 2, 3, 4]}]', "{"],
)
def test_other_answers_end_a_run(answer):
    assert run(Script(answer), Desk(), "task")[:2] == ("answered", answer)


@pytest.mark.parametrize("answer", [None, ["x"], 5])
def test_a_model_that_gives_no_text(answer):
    outcome = run(Script(answer), Desk(), "task")
    assert outcome.status == "error" and "it must return the text of its answer" in outcome.text


def test_the_action_that_repeats_is_named():
    outcome = run(Script(computer("left_click", coordinate=[154, 98])), Desk(), "task", repeats=2)
    assert outcome.text == "the same came 2 times in a row: left_click (160, 100)"


def test_a_record_is_read_and_replayed(tmp_path):
    model = Script(
        "Look <b>here</b>\n" + computer("left_click", coordinate=[100, 50]),
        "bad\udc80 " + computer("nothing"),
        computer("terminate", status="success"),
    )
    outcome = run(model, Desk(), "<script>alert(1)</script>", folder=tmp_path / "a" / "run")
    found = read(tmp_path / "a" / "run")
    assert found == ("<script>alert(1)</script>", outcome.steps, "success", "")
    names = {path.name for path in (tmp_path / "a" / "run").iterdir()}
    assert names == {"000.png", "000-action.png", "001.png", "002.png", "002-action.png", "steps.jsonl"}
    with Image.open(tmp_path / "a" / "run" / "000.png") as seen:
        assert seen.size == (320, 200)
    page = replay(tmp_path / "a" / "run").read_text("utf-8")
    assert "<script>" not in page and "&lt;b&gt;here" in page
    assert [f"src='{name}'" in page for name in ("000-action.png", "001.png", "002-action.png")] == [True] * 3


def test_actions_are_drawn_where_they_are():
    shot = picture((640, 400))
    for points, name in ((((300.0, 200.0),), "left_click"), (((100.0, 80.0), (300.0, 200.0)), "swipe")):
        drawn = np.asarray(draw(shot, Action("mobile_use", name, points, {})))
        colour = drawn[200, 300]
        ys, xs = np.nonzero((drawn[185:216, 285:316] == colour).all(-1))
        assert abs(xs.mean() - 15) < 4 and abs(ys.mean() - 15) < 4 and (colour != 200).any()
        assert (drawn[140, 200] == colour).all() == (name == "swipe")  # halfway
        assert (drawn[300, 500] == 200).all() and (drawn[405:] == 255).any()  # its name
    box = np.asarray(draw(shot, Action("", "zoom", ((100.0, 100.0), (500.0, 300.0)), {"label": "汉"})))
    assert (box[100, 110:490] == box[110:290, 100][:1]).all() and (box[200, 300] == 200).all()
    blank = np.asarray(draw(shot, Action("computer_use", "type", (), {"text": "x" * 500})))
    assert (blank[:400] == 200).all() and (blank[405:, :630] == 255).any()


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "{",
        "5",
        '{"picture": "../a.png"}',
        '{"picture": "0.png", "action": 5}',
        '{"picture": "0.png", "box": [1]}',
        '{"picture": "0.png", "action": {"name": "type", "text": "hi"}}',
        '{"picture": "0.png", "bbox": [1, 2, 3, 4]}',
        "{}",
    ],
)
def test_bad_records_are_named(line, tmp_path):
    (tmp_path / "steps.jsonl").write_text(f'{{"task": "a"}}\n{line}\n')
    with pytest.raises(InputError, match="line 2"):
        read(tmp_path)


def phone(folder):
    """A recorded phone of three screens: a button, a text field, the end."""
    folder.mkdir()
    for i in range(4):
        picture((200, 400), (i * 50, 0, 0)).save(folder / f"{i:03d}.png")
    lines = [
        {"task": "Write hello"},
        {"picture": "000.png", "action": {"name": "click", "points": [[50, 60]]}, "box": [40, 50, 80, 90]},
        {"picture": "001.png", "action": {"name": "type", "arguments": {"text": "hello"}}},
        {"picture": "002.png", "action": {"name": "swipe", "points": [[100, 300], [100, 100]]}},
        {"picture": "003.png"},
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_recorded_phone_goes_on_with_the_right_action(tmp_path):
    device = RecordedPhone(phone(tmp_path / "phone"))
    view = View(coordinates="thousandths")
    mobile = [
        call("mobile_use", "click", coordinate=[100, 100]),  # (20, 40): beside the button
        call("mobile_use", "click", coordinate=[390, 220]),  # (78, 88)
        call("mobile_use", "wait", time=0),
        call("mobile_use", "type", text="goodbye"),
        call("mobile_use", "type", text=" Hello"),
        call("mobile_use", "swipe", coordinate=[500, 200], coordinate2=[500, 900]),  # down
        call("mobile_use", "swipe", coordinate=[500, 900], coordinate2=[510, 200]),
        call("mobile_use", "terminate", status="success"),
    ]
    assert [f"src='{i:03d}.png'" in replay(tmp_path / "phone").read_text("utf-8") for i in range(4)] == [True] * 4
    outcome = run(Script(*mobile), device, "Write hello", tools=["mobile_use"], view=view, folder=tmp_path / "run")
    assert outcome.status == "success" and device.done and (device.at, device.wrong) == (3, 3)
    said = [step.result for step in outcome.steps[:-1]]
    assert said == ["nothing happened", "done", "done", "nothing happened", "done", "nothing happened", "done"]
    assert device.screenshot().getpixel((0, 0)) == (150, 0, 0)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"action": {"name": "tap", "points": [[5, 6]]}}, "no action 'tap'"),
        ({"action": {"name": "click"}, "box": [1, 2, 30, 40]}, "click has 0 points and needs 1"),
        ({"action": {"name": "click", "points": [[5, 6], [7, 8]]}}, "click has 2 points and needs 1"),
        ({"action": {"name": "left_click", "points": [[5, 6], [7, 8]]}}, "left_click has 2 points and needs 1"),
        ({"action": {"name": "swipe", "points": [[5, 6]]}}, "swipe has 1 points and needs 2"),
        ({"action": {"name": "type", "text": "hi"}}, "'text' is no part of an action"),
        ({"action": {"name": "type"}}, 'type needs text: "arguments": {"text": …}'),
        ({"action": {"name": "system_button"}}, "system_button needs button"),
        ({"action": {"name": "key", "tool": "computer_use", "arguments": {"text": "a"}}}, "key needs keys"),
        ({"action": {"name": "click", "points": [[5, 6]]}, "box": [9, 9, 5, 5]}, "left, top, right, bottom"),
        ({"action": {"name": "click", "points": [[5, 6]]}, "box": [9, 9, 15, 15]}, "is not in its box"),
        ({"action": {"name": "scroll", "arguments": {"pixels": None}}}, "pixels is None; it must be a number"),
        ({"action": {"name": "scroll", "arguments": {"pixels": [1]}}}, "pixels is [1]; it must be a number"),
        ({"action": {"name": "type", "arguments": {"text": 5}}}, "text is 5; it must be a string"),
        (
            {"action": {"name": "key", "tool": "computer_use", "arguments": {"keys": []}}},
            "keys is []; it must be a list",
        ),
        ({"action": {"name": "system_button", "arguments": {"button": "x"}}}, "button is 'x'; it must be one of Back"),
        ({"action": {"name": "click", "points": [[5, 6]], "arguments": {"text": "a"}}}, "click takes no text"),
        ({"action": {"name": "click", "points": [[500, 20]]}}, "[500.0, 20.0] is not on 003.png, which is 200 × 400"),
        ({"action": {"name": "click", "points": [["nan", 20]]}}, "[nan, 20.0] is not on 003.png"),
        ({"action": {"name": "click", "points": [["1e400", -1]]}}, "[inf, -1.0] is not on 003.png"),
        ({"action": {"name": "click", "points": [[10**400, 1]]}}, "int too large"),
        ({"action": {"name": "swipe", "points": [[5, 6], [5, 6]]}}, "the swipe goes nowhere"),
        ({"picture": "009.png"}, "there is no 009.png beside it"),
        ({"picture": "009.png", "action": {"name": "click", "points": [[5, 6]]}}, "there is no 009.png"),
    ],
)
def test_a_recording_that_cannot_be_played(step, said, tmp_path):
    folder = phone(tmp_path / "phone")
    with open(folder / "steps.jsonl", "a") as file:
        file.write(json.dumps({"picture": "003.png"} | step) + "\n")
    with pytest.raises(InputError, match=f"steps.jsonl, line 6: .*{re.escape(said)}"):
        RecordedPhone(folder)


@pytest.mark.parametrize(
    ("recorded", "asked"),
    [
        ({"name": "scroll", "arguments": {"pixels": "-50"}}, computer("scroll", pixels=-9)),
        ({"name": "key", "arguments": {"keys": "ctrl+c"}}, computer("key", keys=["ctrl", "c"])),
        ({"name": "key", "arguments": {"text": "volume_up"}}, call("mobile_use", "key", text="volume_up")),
        (
            {"name": "system_button", "arguments": {"button": "back"}},
            call("mobile_use", "system_button", button="Back"),
        ),
    ],
)
def test_a_recording_may_be_written_as_models_write(recorded, asked, tmp_path):
    picture((200, 400), (0, 0, 0)).save(tmp_path / "000.png")
    lines = [{"task": "a"}, {"picture": "000.png", "action": recorded}, {"picture": "000.png"}]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    device = RecordedPhone(tmp_path)
    run(Script(asked, "Done."), device, "a", tools=["computer_use", "mobile_use"])
    assert device.done and device.wrong == 0


@pytest.mark.parametrize(
    "break_", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\r\n", "\ufeff", "\ud800"]
)
def test_any_text_is_read_back_from_a_record(break_, tmp_path):
    said = f"a{break_}b"
    record = Record(tmp_path / "run", said)
    action = Action("computer_use", "type", (), {"text": said})
    record.add(Step("000.png", said, action, said, 1.0), picture((60, 60), (0, 0, 0)))
    record.end("success", said)
    read_back = read(tmp_path / "run")
    assert read_back == (said, [Step("000.png", said, action, said, 1.0)], "success", said)
    path = tmp_path / "run" / "steps.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))  # as an editor may save it
    assert read(tmp_path / "run") == read_back


def test_a_recording_passes_over_zooms(tmp_path):
    zoom = call("image_zoom_in_tool", bbox_2d=[0, 0, 90, 90], label="a")
    answers = [zoom, computer("left_click", coordinate=[9, 9]), computer("left_click"), "Done."]
    run(Script(*answers), Desk(), "task", tools=["computer_use", "image_zoom_in_tool"], folder=tmp_path)
    device = RecordedPhone(tmp_path)
    run(Script(*answers[1:]), device, "task")
    assert device.done and device.wrong == 0


def test_a_run_is_a_recording(tmp_path):
    """What one run did, another one is checked against."""
    answers = [
        computer("left_click", coordinate=[100, 50]), computer("key", keys=["enter"]), computer("scroll", pixels=-50),
        computer("terminate", status="success"),
    ]  # fmt: skip
    run(Script(*answers), Desk(), "task", folder=tmp_path)
    device = RecordedPhone(tmp_path)
    near = [computer("left_click", coordinate=[102, 55]), computer("key", keys=["esc"]), computer("scroll", pixels=9)]
    outcome = run(Script(*near, *answers[1:]), device, "task")
    assert device.done and device.wrong == 2 and outcome.status == "success"


def test_a_folder_without_screens(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        RecordedPhone(tmp_path)
    Record(tmp_path, "task").end("success", "")
    with pytest.raises(InputError, match="has no screenshot"):
        RecordedPhone(tmp_path)
    assert Step("000.png", "", None, "", 0.0).box is None


def test_what_a_page_may_reach(tmp_path):
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "a b.html"
    file.write_text("<p>")
    (tmp_path / "in" / "link.html").symlink_to("/etc/hostname")
    fence = Fence(file.as_uri(), ["https://a.org", "http://[::1]:8080", "http://EXAMPLE.com:81/path"])
    inside = ["in/a%20b.html#x", "in/more/c.png", "in/../in/a.png"]
    outside = ["b.html", "in/../b.html", "in/%2e%2e/b.html", "in/link.html", "in/..%2fb.html"]
    assert all(f"{tmp_path.as_uri()}/{name}" in fence for name in inside)
    assert not any(f"{tmp_path.as_uri()}/{name}" in fence for name in outside)
    allowed = [
        "https://a.org/x?y",
        "https://A.org:443/",
        "https://u:p@a.org/",
        "http://[::1]:8080/",
        "http://example.com:81",
    ]
    refused = [
        "http://a.org", "https://a.org:444", "https://b.a.org", "https://a.org.b.com", "https://b.com/a.org", "ftp://a.org",
        "https://a.org@b.com/", "http://127.0.0.1:8080", "file://host/x", "javascript:alert(1)", "chrome://version", "",
        "https://a.org:99999/", "file:///etc/%00passwd",
    ]  # fmt: skip
    assert [url in fence for url in allowed] == [True] * len(allowed)
    assert [url in fence for url in refused] == [False] * len(refused)
    assert fence.rules.startswith("MAP a.org:443 a.org:443 , MAP [::1]:8080 [::1]:8080 , MAP example.com:81")
    assert fence.rules.endswith(" , MAP * ~NOTFOUND")
    assert f"{tmp_path.as_uri()}/in/a%20b.html" not in Fence("http://localhost:1")
    for bad in (
        "a.org",
        "https://*",
        "https://a,b",
        "https://",
        "ftp://a.org",
        "file:///no/such.html",
        "https://a.org:x",
    ):
        with pytest.raises(OptionsError):
            Fence(bad)
