"""Tool calls in answers: read whole and in pieces, written, and put back into the conversation."""

import json
import random
import re

import pytest
from mutations import mutated
from timing import timed

from qwenvl_jax.answers import lenient
from qwenvl_jax.answers.deltas import CallArguments, CallEnd, CallStart
from qwenvl_jax.answers.tools import Stream, ToolCall, Turn, message, parse, results, write
from qwenvl_jax.errors import InputError
from qwenvl_jax.families import PRESETS
from qwenvl_jax.inputs.messages import normalize
from qwenvl_jax.inputs.processor import Processor

F = '{"name": "f", "arguments": {"a": 1}}'
CLICK = '{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [10, 20]}}'
CLICKED = ToolCall("computer_use", {"action": "left_click", "coordinate": [10, 20]})


def tagged(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def f(**arguments) -> ToolCall:
    return ToolCall("f", arguments)


TABLE = [
    # as the template writes them
    (tagged(CLICK), "", [CLICKED]),
    (f"I look.\n{tagged(F)}", "I look.", [f(a=1)]),
    (f"{tagged(F)}\n{tagged(CLICK)}", "", [f(a=1), CLICKED]),
    ("No call.\n", "No call.\n", []),
    ("", "", []),
    (f"A\n\n{tagged(F)}\nB\n{tagged(F)}\n", "A\n\nB", [f(a=1), f(a=1)]),
    (f"{tagged(F)}  Done.", "Done.", [f(a=1)]),
    (f"A{tagged(F)}B", "A\nB", [f(a=1)]),
    (tagged('{"name": "f"}'), "", [f()]),
    (tagged('{"name": "f", "arguments": {}}'), "", [f()]),
    (tagged('{"arguments": {"city": "北京 \\u00e9 \\ud83d\\ude00"}, "name": "f"}'), "", [f(city="北京 é 😀")]),
    (tagged('{"name": "f", "arguments": {"a": {"b": [1.5, null, true, {"c": "}"}]}}}'), "",
     [f(a={"b": [1.5, None, True, {"c": "}"}]})]),
    # other ways to put them
    (f"<tool_call>{F}</tool_call>", "", [f(a=1)]),
    (tagged(f"```json\n{F}\n```"), "", [f(a=1)]),
    (tagged(f"{F}\n{CLICK}"), "", [f(a=1), CLICKED]),
    (tagged(f"[{F}, {CLICK}]"), "", [f(a=1), CLICKED]),
    (tagged('{"name": "f", "parameters": {"a": 1}}'), "", [f(a=1)]),
    (tagged(f'{{"id": "x", "type": "function", "function": {F}}}'), "", [f(a=1)]),
    (tagged('{"name": "f", "arguments": "{\\"a\\": 1}"}'), "", [f(a=1)]),
    (tagged('{"name": "f", "arguments": ""}'), "", [f()]),
    (tagged('{"name": "f", "arguments": null}'), "", [f()]),
    # tags in strings, and missing tags
    (tagged('{"name": "f", "arguments": {"a": "x</tool_call>y"}}'), "", [f(a="x</tool_call>y")]),
    (f"<tool_call>\n{F}", "", [f(a=1)]),
    (f"<tool_call>\n{F}\nI wait.", "I wait.", [f(a=1)]),
    (f"<tool_call>\n{F}\n{tagged(CLICK)}", "", [f(a=1), CLICKED]),
    (f"{F}\n</tool_call>", "", [f(a=1)]),
    (f"Click it ⚗\n{F}\n</tool_call>", "Click it ⚗", [f(a=1)]),
    (F, "", [f(a=1)]),
    (f"\n{F}\n{CLICK}\n", "", [f(a=1), CLICKED]),
    (f"Such as {F} in a text.", f"Such as {F} in a text.", []),
    (f"<tool_call>\n<tool_call>\n{F}\n</tool_call>", "", [f(a=1)]),
    (f"<think>Or {tagged(F)}?</think>\n{tagged(CLICK)}", f"<think>Or {tagged(F)}?</think>", [CLICKED]),
    (f"<think>Or {tagged(F)}", f"<think>Or {tagged(F)}", []),
    (f"<tool_call>{F}<tool_call>", "", [f(a=1)]),
    (f"<tool_call>{F}<tool_call>\n<tool_call>{CLICK}<tool_call>\n", "", [f(a=1), CLICKED]),
    (f"<tool_call>\n{F}\n<tool_call>\nDone.", "Done.", [f(a=1)]),
    # thinking: its calls are none, whether or not the answer has the tag that opens it
    (f"I think {tagged(F)} no.</think>\n\n{tagged(CLICK)}", f"I think {tagged(F)} no.</think>\n", [CLICKED]),
    (f"Or <tool_call>{F}</think>\n{tagged(CLICK)}", f"Or <tool_call>{F}</think>", [CLICKED]),
    (f"Or <tool_call>{F[:-3]}</think>\n{tagged(CLICK)}", f"Or <tool_call>{F[:-3]}</think>", [CLICKED]),
    (f'Or <tool_call>{{"name": "f</think>\n{tagged(CLICK)}', 'Or <tool_call>{"name": "f</think>', [CLICKED]),
    (f"Or {tagged('{}')}</think>\n{tagged(CLICK)}", f"Or {tagged('{}')}</think>", [CLICKED]),
    (f"<think>A</think>{tagged(F)}</think>{tagged(CLICK)}", f"<think>A</think>{tagged(F)}</think>", [CLICKED]),
    (f"<thinking>Or {tagged(F)}</thinking>{tagged(CLICK)}", f"<thinking>Or {tagged(F)}</thinking>", [CLICKED]),
    (f"Or {tagged(F)}</thinking>{tagged(CLICK)}", f"Or {tagged(F)}</thinking>", [CLICKED]),
    (f"{tagged(F)}</think>Done.", f"{tagged(F)}</think>Done.", []),
    (f"So.</think>\n{CLICK}", "So.</think>", [CLICKED]),
    (f"<think>So.</think>\n{CLICK}", "<think>So.</think>", [CLICKED]),
    (tagged('{"name": "f", "arguments": {"a": "x</think>y"}}'), "", [f(a="x</think>y")]),
    # broken JSON with one meaning
    (tagged(f"{F};"), "", [f(a=1)]),
    (tagged(F[1:]), "", [f(a=1)]),
    (tagged('{"name": "f", "args": {"a": 1}}'), "", [f(a=1)]),
    (tagged('{"name": "f", "arguments": {"a": (10, 20)}}'), "", [f(a=[10, 20])]),
    (tagged('{"name": "f", "arguments": {"a": """x "y"\nz"""}}'), "", [f(a='x "y"\nz')]),
    (tagged('{"name": "f", "arguments": {"a": 1,},}'), "", [f(a=1)]),
    (tagged("{'name': 'f', 'arguments': {'a': 'it's', 'b': True, 'c': None}}"), "", [f(a="it's", b=True, c=None)]),
    (tagged('{name: "f", arguments: {a: 1}}'), "", [f(a=1)]),
    (tagged('{"name": "f", "arguments": {"a": 1}'), "", [f(a=1)]),
    (tagged('{"name": "f", "arguments": {"a": [1, 2'), "", [f(a=[1, 2])]),
    (tagged('{"name": "f", "arguments": {"a": [1, 2}}'), "", [f(a=[1, 2])]),
    (tagged('{"name": "f", "arguments": {"a": 1}}}'), "", [f(a=1)]),
    (tagged('{{"name": "f", "arguments": {"a": 1}}}'), "", [f(a=1)]),
    (tagged('{"name": "f", "arguments": {"a": "x\ny\tz"}}'), "", [f(a="x\ny\tz")]),
    (tagged('{"name": "f", "arguments": {"a": "say "hi", please", "b": 2}}'), "", [f(a='say "hi", please', b=2)]),
    (tagged('{"name": "f", "arguments": "{"a": 1}"}'), "", [f(a=1)]),
    (tagged('{"name": "f" "arguments": {"a": 1 "b": 2}}'), "", [f(a=1, b=2)]),
    (tagged('{"name": "f", "arguments": {"path": "C:\\dir", "re": "\\d+"}}'), "", [f(path="C:\\dir", re="\\d+")]),
    (tagged('{"name": "f", // a comment\n "arguments": {"url": "http://x"}}'), "", [f(url="http://x")]),
    (f'<tool_call>{F[:-1]}', "", [f(a=1)]),
]  # fmt: skip
MALFORMED = [
    "",
    "nothing",
    "[]",
    "{}",
    '{"name": "f", "arguments": {"a": "x}}',
    '{"name": "f", "arguments": {"a": ',
    '{"name": "f", "arguments": {"a": "half',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": "[1]"}',
    '{"name": "f", "arguments": "{"}',
    '{"name": "f", "action": "click"}',
    '{"name": "", "arguments": {}}',
    '{"name": 1, "arguments": {}}',
    '{"arguments": {"a": 1}}',
    '{"name": "f", "arguments": {"a": NaN}}',
    '{"name": "f", "arguments": {"a": undefined}}',
    '{"name: "f", "arguments": {"a": 1}}',
    '{"name": "f", "arguments": {"a": 1e999}}',
    '{"name": "f", "arguments": {"a": [100, 200, "text": "a"}}',
    "{'name': 'f', 'arguments': {'a': [100, 'text' : 'a'}}",
    '{"name": "f", "arguments": {"a": "\\ud83d"}}',
    '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
    '{"name": "f", "arguments": {"a": ' + "[" * 1000 + "]" * 1000 + "}}",
    f"{F} and more",
    f"{F}, 12",
    "__import__('os').system('true')",
    "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>",
]
CUT = [F[:n] for n in range(1, len(F) - 1)]


@pytest.mark.parametrize("answer, text, calls", TABLE)
def test_answers(answer, text, calls):
    assert parse(answer) == Turn(text, calls, 0)


@pytest.mark.parametrize("body", MALFORMED)
def test_malformed_calls_are_counted_and_stay_in_the_text(body):
    answer = f"Look.\n{tagged(body)}\n{tagged(CLICK)}"
    assert parse(answer) == Turn(f"Look.\n{tagged(body)}", [CLICKED], 1, first_malformed=0)


@pytest.mark.parametrize("body", CUT)
def test_a_call_that_is_cut_short_is_not_run(body):
    answer = f"{tagged(CLICK)}\n<tool_call>\n{body}"
    assert parse(answer) == Turn(f"<tool_call>\n{body}", [CLICKED], 1, first_malformed=1)


def test_a_text_that_ends_within_a_tag():
    for n in range(1, len("<tool_call>")):
        assert parse("A <tool_call>"[: 2 + n]) == Turn("A <tool_call>"[: 2 + n], [], 0)


# ------------------------------------------------------------------------------------------ pieces


def streamed(pieces, thinking=False) -> tuple[list, int]:
    """The events, with the pieces of a text joined; and how many calls are malformed."""
    stream, out = Stream(thinking), []
    for event in [e for piece in pieces for e in stream.feed(piece)] + stream.close():
        if isinstance(event, str) and out and isinstance(out[-1], str):
            out[-1] += event
        else:
            out.append(event)
    return out, stream.malformed


THOUGHTS = [answer for answer, *_ in TABLE if "</think" in answer and "x</think>y" not in answer]
ANSWERS = [
    answer for answer, *_ in TABLE if answer not in THOUGHTS or answer.startswith(("<think>Or", "<thinking>Or"))
] + [f"A\n{tagged(body)}\n{tagged(F)}" for body in MALFORMED if len(body) < 999]


@pytest.mark.parametrize("answer", ANSWERS)
def test_any_cutting_gives_the_same(answer):
    whole = streamed([answer])
    turn = parse(answer)
    assert "".join(e for e in whole[0] if isinstance(e, str)) == turn.text and whole[1] == turn.malformed
    assert [e for e in whole[0] if isinstance(e, ToolCall)] == turn.calls
    assert streamed(answer) == whole  # characters
    for i in range(len(answer)):
        assert streamed([answer[:i], answer[i:]]) == whole
    rng = random.Random(answer)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(answer) + 1), k=5))
        assert streamed(answer[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)) == whole


@pytest.mark.parametrize("answer", [answer for answer in THOUGHTS if answer.count("</think") == 1])
def test_a_stream_that_begins_within_a_thought(answer):
    turn = parse(answer)
    for i in range(len(answer)):
        events, malformed = streamed([answer[:i], answer[i:]], thinking=True)
        assert "".join(e for e in events if isinstance(e, str)) == turn.text and malformed == 0
        assert [e for e in events if isinstance(e, ToolCall)] == turn.calls
    assert streamed([tagged(F)], thinking=True) == ([tagged(F)], 0)


@pytest.mark.parametrize("said", ["I look.</think>", "</think>\n\n", "<think>I look.</think>\n"])
@pytest.mark.parametrize("tag", ["x </think> y", "<think>", "</thinking>", "</think>" * 3])
def test_a_call_without_tags_after_a_thought(said, tag):
    """A tag in its strings ends no thought, whether or not the thought has its own opening tag."""
    answer = said + json.dumps({"name": "f", "arguments": {"a": tag}})
    turn = parse(answer)
    assert (turn.text.strip(), turn.calls, turn.malformed) == (said.strip(), [f(a=tag)], 0)
    for i in range(len(answer)):
        events, malformed = streamed([answer[:i], answer[i:]], thinking=not said.startswith("<think>"))
        assert "".join(e for e in events if isinstance(e, str)).strip() == said.strip()
        assert events[-1] == f(a=tag) and malformed == 0


def test_text_and_calls_come_as_soon_as_they_are_known():
    stream = Stream()
    assert stream.feed("Let me ") == ["Let me "] and stream.feed("look <b>") == ["look <b>"]
    assert stream.feed(" {") == [" "] and stream.feed('"x": 1}') == ['{"x": 1}']
    assert stream.feed("\n<tool") == [] and stream.feed("_call>\n" + F) == []
    assert stream.feed("\n</tool_call>") == [f(a=1)]
    assert stream.feed("\n") == [] and stream.feed("So.") == ["\nSo."] and stream.close() == []


# ------------------------------------------------------------------------------------------ calls in pieces


def deltas(pieces, thinking=False) -> list:
    """The events of a stream, with neighbouring pieces of a text and of one call's arguments joined."""
    stream, out = Stream(thinking, deltas=True), []
    for event in [e for piece in pieces for e in stream.feed(piece)] + stream.close():
        last = out[-1] if out else None
        if isinstance(event, str) and isinstance(last, str):
            out[-1] += event
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            out[-1] = last._replace(piece=last.piece + event.piece)
        else:
            out.append(event)
    return out


def check_deltas(events, turn: Turn) -> None:
    """The events are the turn's calls; a malformed one is told before it is text, or is text."""
    calls = [e for e in events if not isinstance(e, str)]
    assert [type(e) for e in calls] == [CallStart, CallArguments, CallEnd] * (len(calls) // 3)
    ended = []
    for i, (start, arguments, end) in enumerate(zip(calls[::3], calls[1::3], calls[2::3], strict=True)):
        assert start.number == arguments.number == end.number == i and start.id == f"call_{i}"
        if end.call is None:
            with pytest.raises(ValueError):
                json.loads(arguments.piece)
        else:
            assert start.name == end.call.name and json.loads(arguments.piece) == end.call.arguments
            assert arguments.piece == lenient.written(end.call.arguments) or arguments.piece.count('"a"') > 1
            ended.append(end.call)
    assert ended == turn.calls
    said = "".join(e for e in events if isinstance(e, str))
    assert said.strip() == turn.text.strip() if len(calls) == 3 * len(ended) else len(said) < len(turn.text)


LONG = {
    "code": 'def f(x):\n\tif x < "é":\r\n\t\treturn {"a": [1, 2]}  # "</b>" \\ C:\\new /\n',
    "n": [0, -7, 1.5, 1e300, 10**18, True, None, {}, [], "", {"北京": "😀"}],
    "more": {"a": {"b": [["x"], ["\x01\x7f\u2028"]]}},
}
WRITTEN = [
    json.dumps({"name": "f", "arguments": LONG}, ensure_ascii=ascii, indent=indent, separators=separators)
    for ascii in (True, False)
    for indent, separators in ((None, None), (2, None), (None, (",", ":")))
] + [
    '{"name": "f", "arguments": {"a": 1, "a": "x"}}',  # a key twice
    '{"name": "f", "arguments": {"a": "\\/\\u0041\\u000a\\u000able \\n\\u0061bla"}}',
    r'{"name": "f", "arguments": {"a": "$\frac{1}{2}$ \times \n\nabla\neq \time \new C:\new C:\\d \d+ A:\n", "b": 1}}',
    r'{"name": "f", "arguments": {"re": "^\w+\.\d{2}\s*$", "b": [1, 2}}',
    '{"name": "f", "arguments": {"a": "say "hi", please", "b": "x"}}',
    '{"name": "f", "arguments": {"a": ["say "hi", please", "b"], "c": ["a", true]}}',
    '{"name": "f", "arguments": {"a": "A:\\n\\u0041", "b": "x:\\\\y"}}',
]
SPLIT = [*ANSWERS, *(tagged(body) for body in WRITTEN), *(f"A\n<tool_call>\n{body}" for body in [*CUT, *WRITTEN])]
SPLIT += [f"<tool_call>\n{body[:n]}" for body in WRITTEN for n in range(30, len(body), 17)]


@pytest.mark.parametrize("answer", SPLIT)
def test_calls_in_pieces(answer):
    whole = deltas([answer])
    check_deltas(whole, parse(answer))
    assert deltas(answer) == whole  # characters
    rng = random.Random(answer)
    for cuts in [[i] for i in range(1, len(answer), 1 + len(answer) // 40)] + [
        sorted(rng.choices(range(len(answer) + 1), k=5)) for _ in range(10)
    ]:
        assert deltas(answer[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)) == whole


@pytest.mark.parametrize("answer", [answer for answer in THOUGHTS if answer.count("</think") == 1])
def test_calls_in_pieces_after_a_thought(answer):
    for pieces in ([answer], answer):
        check_deltas(deltas(pieces, thinking=True), parse(answer))


@pytest.mark.parametrize("body", WRITTEN[:6])
def test_arguments_come_as_they_are_written(body):
    """No more than the few characters that may still change are held back, and never the last bracket."""
    stream, given = Stream(deltas=True), ""
    text = f"<tool_call>\n{body}\n</tool_call>"
    begin = body.index('"arguments"') + 20
    for i, c in enumerate(text):
        given += "".join(e.piece for e in stream.feed(c) if isinstance(e, CallArguments))
        if len("<tool_call>\n") + begin < i < len(text) - 20:
            read = lenient.read(text[12 : i + 1]).value.get("arguments", {})
            assert len(given) >= len(lenient.written(read)) - 30
            with pytest.raises(ValueError):
                json.loads(given)
    assert json.loads(given) == LONG


def test_events_of_a_call():
    stream = Stream(deltas=True, first=2)
    assert stream.feed("I look.\n<tool_ca") == ["I look."]
    assert stream.feed('ll>{"name": "f", "argum') == []
    assert stream.feed('ents": {"a": "Par') == [CallStart(0, "call_2", "f"), CallArguments(0, '{"a": "Par')]
    assert stream.feed("is") == [CallArguments(0, "is")]
    assert stream.feed('"}') == [CallArguments(0, '"')]
    assert stream.feed("}</tool_call>") == [CallArguments(0, "}"), CallEnd(0, f(a="Paris"))]
    assert stream.feed('<tool_call>{"name": "g", "arguments": {"b": [1, 2') == [
        CallStart(1, "call_3", "g"),
        CallArguments(1, '{"b": [1'),
    ]
    assert stream.close() == [CallEnd(1, None)] and stream.malformed == 1 and stream.first_malformed == 1


def test_what_is_given_is_not_taken_back():
    """A call whose later words say something else ends as malformed."""
    events = deltas([tagged('{"name": "f", "arguments": {"a": 1}, "arguments": {"b": 2}}')])
    assert events == [CallStart(0, "call_0", "f"), CallArguments(0, '{"a": 1'), CallEnd(0, None)]


# ------------------------------------------------------------------------------------------ writing, messages

NASTY = [
    "",
    "é 北京 😀",
    'a "quoted" \\ \n\t',
    "<tool_call>",
    "x</tool_call>y<tool_call>",
    "}]{['",
    "{}",
    "\u2028",
    "\fa\bc \time\neq",
    "C:\\new \\frac",
    "//",
]


def some_arguments(rng: random.Random, depth: int = 3):
    kinds = ["text", "number", "constant"] + ["list", "dict"] * (depth > 0)
    match rng.choice(kinds):
        case "text":
            return rng.choice(NASTY)
        case "number":
            return rng.choice([0, -7, 10**18, 0.1, 1e-9, 12345.678])
        case "constant":
            return rng.choice([True, False, None])
        case "list":
            return [some_arguments(rng, depth - 1) for _ in range(rng.randrange(3))]
    return {rng.choice(NASTY): some_arguments(rng, depth - 1) for _ in range(rng.randrange(3))}


@pytest.mark.parametrize("seed", range(50))
def test_what_is_written_is_read_again(seed):
    rng = random.Random(seed)
    names = ["f", "computer_use", "a.b-c", "天气"]
    calls = [
        ToolCall(rng.choice(names), {"a": some_arguments(rng), rng.choice(NASTY): some_arguments(rng)})
        for _ in range(rng.randrange(4))
    ]
    text = rng.choice(["", "I look.", "Zwei\n\nZeilen. ", "{x} <b>"])
    assert parse(write(calls, text)) == Turn(text, calls, 0)


@pytest.mark.parametrize("calls, text, said", [
    ([f(a=1)], "<think>I look.", "text is '<think>I look.'"), ([], F, "text is"), ([f(a=1)], tagged(F), "text is"),
    ([f(a=1)], "So <tool_call>", "text is"), ([f(a=1)], "A</think>B</tool_call>" + tagged("x"), "text is"),
    ([ToolCall("", {"a": 1})], "", "the call of '' cannot be written"), ([f(a=float("nan"))], "", "the call of 'f'"),
    ([f(a={1, 2})], "", "the call of 'f'"), ([ToolCall("f", [1])], "", "the call of 'f'"),
    ([f(a="\ud83d")], "", "the call of 'f'"), ([{"name": "f"}], "", "is no call"), ([f(a=1)], None, "text is None"),
])  # fmt: skip
def test_what_would_be_read_as_something_else_is_not_written(calls, text, said):
    with pytest.raises(InputError, match=said):
        write(calls, text)


@pytest.mark.parametrize("text", ["<think>I look.</think>\n\nThere.", "So.</think>", "\n", f"Such as {F} in a text."])
def test_texts_beside_calls(text):
    turn = parse(write([f(a=(1, 2))], text))
    assert turn.text.strip() == text.strip() and turn.calls == [f(a=[1, 2])] and turn.malformed == 0


@pytest.fixture(scope="module")
def processor(tokenizer_dir) -> Processor:
    return Processor.from_dir(tokenizer_dir, PRESETS["qwen2.5-vl-7b"])


ASK = {"role": "user", "content": "Where is it?"}


@pytest.mark.parametrize("text", ["", "I look.", "I look. ", "Two\nlines\n"])
def test_the_template_writes_the_answer_again(processor, text):
    """The same tokens as if the model's own answer stood in the conversation."""
    calls = [CLICKED, ToolCall("f", {"a": "é 北京", "b": [1, 2.5, None], "c": {"d": False}})]
    answer = write(calls, text)
    turn = parse(answer)
    assert turn == Turn(text, calls, 0)
    reply = message(turn, first=3)
    assert [call["id"] for call in reply["tool_calls"]] == ["call_3", "call_4"]
    as_said = {"role": "assistant", "content": answer}
    one, two = (processor.prompt([ASK, said], add_generation_prompt=True).tokens for said in (reply, as_said))
    assert one.tolist() == two.tolist()


def test_an_answer_without_calls_is_a_plain_message():
    assert message(parse("It is left.")) == {"role": "assistant", "content": "It is left."}


def test_results_go_back_into_the_conversation(processor):
    reply = message(parse(f"{tagged(F)}\n{tagged(CLICK)}\n{tagged(F)}"))
    picture = [{"type": "text", "text": "now"}, {"type": "text", "text": " so"}]
    back = results(reply, ["clicked", picture, {"°C": [21, None]}])
    assert [m["tool_call_id"] for m in back] == ["call_0", "call_1", "call_2"]
    normalize([ASK, reply, *back])
    text = processor.decode(processor.prompt([ASK, reply, *back]).tokens, False)
    shown = ("clicked", "now so", '{"°C": [21, null]}')
    assert text.endswith("\n".join(f"<tool_response>\n{one}\n</tool_response>" for one in shown) + "<|im_end|>\n")


def test_a_call_without_an_id_gets_its_result():
    assert results({"tool_calls": [{"name": "f"}]}, ["a"]) == [{"role": "tool", "content": "a"}]


@pytest.mark.parametrize("returned, error", [
    ([], "1 tool calls, and 0 results"), (["a", "b"], "1 tool calls, and 2"), ([{1, 2}], "result of f cannot be"),
    ([{"a": [float("nan")]}], "result of f cannot be"),
])  # fmt: skip
def test_results_that_do_not_fit(returned, error):
    with pytest.raises(InputError, match=error):
        results(message(parse(tagged(F))), returned)


# ------------------------------------------------------------------------------------------ any text

PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool",
          "_call>", '"', "'", "{", "}", "[", "]", ":", ",", "\\",
          "\n", "name",
          '"name": "f"', '"arguments": ', F, F[:-1], "```json", "1", "é", "\\u12", "//", " " * 50, "null",
          "\ud83d"]  # fmt: skip


def check_mutations(seeds):
    slowest = 0.0
    for seed in seeds:
        rng = random.Random(seed)
        text = mutated(rng, ANSWERS, PIECES)
        seconds, turn = timed(lambda text=text: parse(text), 0.05)
        slowest = max(slowest, seconds)
        assert turn.malformed >= 0 and all(isinstance(call.arguments, dict) for call in turn.calls)
        json.dumps(message(turn)["tool_calls"] if turn.calls else [], ensure_ascii=False).encode()
        cut = rng.randrange(len(text) + 1)
        assert streamed([text[:cut], text[cut:]]) == streamed([text])
        assert deltas([text[:cut], text[cut:]]) == deltas([text])
    assert slowest < 0.05


def test_mutated_answers():
    check_mutations(range(1000))


@pytest.mark.slow
def test_many_mutated_answers():
    check_mutations(range(1000, 11000))


@pytest.mark.parametrize("piece", [*PIECES, '{"', "<tool_call>{", '<tool_call>"', "[{", '{"a":', '{"a": 1}, ', "{'a",
                                   "[[1,",
                                   '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>', F[:28], tagged(F),
                                   tagged(F[:-3]), '"</tool_call>', '", " ', "{{", "\\\\", "```"])  # fmt: skip
@pytest.mark.parametrize("before", ["", "<tool_call>"])
def test_long_answers_are_read_in_linear_time(piece, before):
    def took(size: int) -> float:
        text = before + piece * (size // len(piece))
        return timed(lambda: parse(text, ["f"]), 0.05)[0]

    assert any(took(100_000) < max(0.05, 25 * took(10_000)) for _ in range(2))


@pytest.mark.parametrize("unit", ["x", "\\\\n", "\\\\t5", "\\\\d", '", "', '"', "\\n", "é", "\\\\", "<", "C:\\\\n"])
def test_long_calls_in_pieces_take_linear_time(unit):
    def took(size: int) -> float:
        text = '<tool_call>{"name": "f", "arguments": {"a": ["' + unit * (size // len(unit)) + '"]}}</tool_call>'
        return timed(lambda: deltas(text[i : i + 9] for i in range(0, len(text), 9)), 0.05)[0]

    assert any(took(40_000) < max(0.05, 12 * took(10_000)) for _ in range(2))


# ------------------------------------------------------------------------------------------ lenient JSON


@pytest.mark.parametrize("text, value, is_open, half", [
    ('[{"a": 1}, {"b": "x', [{"a": 1}, {}], 2, True),
    ('[{"a": 1}, {"b": 2', [{"a": 1}, {}], 2, True),
    ('[{"a": 1}, {"b": 2 ', [{"a": 1}, {"b": 2}], 2, False),
    ('[{"a": 1} {"b": 00:12}', [{"a": 1}, {"b": "00:12"}], 1, False),
    ('{"a": [1, 2, 3', {"a": [1, 2]}, 2, True),
    ('{"a"', {}, 1, True),
    ("{'a': left click, 'b': -1.5e3}", {"a": "left click", "b": -1500.0}, 0, False),
])  # fmt: skip
def test_json_that_is_cut_short_says_so(text, value, is_open, half):
    found = lenient.read(text)
    assert (found.value, len(found.open), found.half) == (value, is_open, half) and found.end == len(text)


@pytest.mark.parametrize("text, value", [
    (r"$\frac{1}{2}$", r"$\frac{1}{2}$"), (r"\begin{a} \beta \forall", r"\begin{a} \beta \forall"),
    (r"\theta \times \text{a} \nabla \neq \rho \right)", r"\theta \times \text{a} \nabla \neq \rho \right)"),
    (r"\\frac \\\\ \\new", r"\frac \\ \new"), (r"\(x\)\nso", "\\(x\\)\nso"), (r"\alpha\nu", "\\alpha\nu"),
    (r"a\tb\nthe\rend\n", "a\tb\nthe\rend\n"), (r"\f \b 1\f2", "\f \b 1\f2"), (r"word\tan apple", "word\tan apple"),
    (r"C:\Users\new", r"C:\Users\new"), (r"C:\bin\temp\r.txt", r"C:\bin\temp\r.txt"),
    (r"C:\\Users\\new", r"C:\Users\new"),
    (r"in D:\docs\new now\nthen", "in D:\\docs\\new now\nthen"), (r"Option A:\nThe dog", "Option A:\nThe dog"),
    (r"\u00e9 \underline \u12", "é \\underline \\u12"),
])  # fmt: skip
def test_backslashes_that_stand_for_themselves(text, value):
    assert lenient.read(f'{{"a": "{text}"}}').value == {"a": value}
    assert lenient.read(f"['{text}',]").value == [value]
    assert lenient.read(lenient.written({"a": value})).value == {"a": value}


def test_valid_json_is_read_as_json():
    """Also where its escapes may be something else: only \\b and \\f before letters and commands of LaTeX are not."""
    rng = random.Random(0)
    letters = [
        *"abcz .:$(){}[]/01é",
        "\\n",
        "\\t",
        "\\r",
        '\\"',
        "\\\\",
        "\\/",
        "\\u0041",
        "C:",
        "\\b ",
        "\\f1",
        "\\n5",
        "\\t$",
    ]
    kept = "|".join(["[bf][A-Za-z]", *"nabla neq times theta tau nu ne to tan top rm".split()])
    for _ in range(3000):
        text = '{"a": "' + "".join(rng.choices(letters, k=rng.randrange(1, 20))) + '", "b": [1, "\\u00e9"]}'
        if not re.search(rf"(?<!\\)(?:\\\\)*\\(?:{kept})", text):
            assert lenient.read(text).value == json.loads(text), text


@pytest.mark.parametrize("text, value", [
    ('{"path": "C:\\\\new"}', "C:\\new"), ('{"path": "C:\\new"}', "C:\new"), ('{"path": "C:\\new",}', "C:\new"),
    ('{"path": "C:\\Users\\new"}', "C:\\Users\\new"), ('{"path": "\\\\\\\\server\\\\new"}', "\\\\server\\new"),
])  # fmt: skip
def test_paths(text, value):
    assert lenient.read(text).value == {"path": value} == lenient.Reader(text).read(0)[0][0]


@pytest.mark.parametrize("text, value", [
    ('{"a": , "b": 1}', {"a": None, "b": 1}), ('{"a": [1, 2, "b": 3}', None),
    ('{"a": 1, {"b": 2}', {"a": 1}), ('{"a": }', {"a": None}), ('{"a": 1, b 2}', {"a": 1}),
])  # fmt: skip
def test_what_is_guessed_is_never_acted_on(text, value):
    with pytest.raises(lenient.Unreadable):
        lenient.read(text)
    assert value is None or lenient.Reader(text).read(0)[0][0] == value


@pytest.mark.parametrize("text", ["{{", "[1, 2}", "{12: 3}", "{" + "[" * 99, "{]", '{"a": NaN}'])
def test_what_is_no_json_says_where_to_go_on(text):
    with pytest.raises(lenient.Unreadable) as e:
        lenient.read(text)
    assert 0 < e.value.at <= len(text)
