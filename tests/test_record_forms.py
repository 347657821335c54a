"""Every form of record that training frameworks write: what is learnt of it, token for token, and what is refused."""

import base64
import io
import json
import pickle
import re

import numpy as np
import pytest
from make_tiny import small_config
from PIL import Image
from tiny import read_questions

from qwenvl_jax.errors import BadRecord, InputError
from qwenvl_jax.inputs.fields import HARMLESS
from qwenvl_jax.inputs.fields import REFUSED as REFUSED_KEYS
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.inputs.records import _KNOWN, conversation, preference
from qwenvl_jax.inputs.source import open_records
from qwenvl_jax.train.records import PackShape, RecordProcessor

CONFIG = small_config("qwen2_5_vl")
SHAPE = PackShape(rows=1, tokens=512, lanes=2, patches=256)
DEFAULT = "You are a helpful assistant."
WEATHER = {"name": "weather", "description": "Tell the weather", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": WEATHER}
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
CALLED = f"<tool_call>\n{CALL}\n</tool_call>"


@pytest.fixture(scope="module")
def processor(tokenizer_dir) -> Processor:
    return Processor.from_dir(tokenizer_dir, CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("media")
    for i, name in enumerate(("a.png", "b.png")):
        picture(i).save(path / name)
    return path


def picture(seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 56 + 28 * seed, 3), np.uint8))


def png(seed=0) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "png")
    return file.getvalue()


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def turn(speaker, value, **more):
    return {"from": speaker, "value": value, **more}


ASK, REPLY = say("user", "Q"), say("assistant", "A")
PAIR = [turn("human", "Q"), turn("gpt", "A")]
SEE = "<|vision_start|><|image_pad|><|vision_end|>"
FILM = "<|vision_start|><|video_pad|><|vision_end|>"

# (record, the prompt as rendered with what is learnt in «»). Without a system prompt, the template's default stands.
FORMS = {
    # OpenAI
    "messages": ({"messages": [ASK, REPLY]}, "user:Q|assistant:«A"),
    "system in messages": ({"messages": [say("system", "S"), ASK, REPLY]}, "system:S|user:Q|assistant:«A"),
    "developer": ({"messages": [say("developer", "S"), ASK, REPLY]}, "system:S|user:Q|assistant:«A"),
    "weight": (
        {"messages": [ASK, {**REPLY, "weight": 0}, say("user", "R"), say("assistant", "B", weight=1)]},
        "user:Q|assistant:A|user:R|assistant:«B",
    ),
    "tools": (
        {"messages": [ASK, say("assistant", None, tool_calls=[{"id": "1", "type": "function", "function": {
            "name": "weather", "arguments": '{"city": "Rome"}'}}]), say("tool", "18", tool_call_id="1"), REPLY],
         "tools": [TOOL], "parallel_tool_calls": False},
        f"tools|user:Q|assistant:«{CALLED}|user:<tool_response>\n18\n</tool_response>|assistant:«A",
    ),
    "functions": (
        {"messages": [ASK, {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
                      say("function", "18", name="weather"), REPLY], "functions": [WEATHER]},
        f"tools|user:Q|assistant:«{CALLED}|user:<tool_response>\n18\n</tool_response>|assistant:«A",
    ),
    "nulls in calls and tools": (
        {"messages": [ASK, say("assistant", None, tool_calls=[{"id": None, "function": {
            "name": "weather", "arguments": {"city": "Rome", "day": None, "more": [{"at": None}, None]}}}])],
         "tools": [{"type": "function", "function": WEATHER | {"strict": None, "parameters": {
             "type": "object", "properties": {"day": None}}}}]},
        "tools|user:Q|assistant:«" + CALLED.replace('"Rome"', '"Rome", "more": [{}, null]'),
    ),
    "nulls in messages as text": (
        {"messages": json.dumps([ASK, say("assistant", None, tool_calls=[{"function": {
            "name": "weather", "arguments": {"city": "Rome", "day": None}}}])]),
         "tools": json.dumps([{**TOOL, "function": {**WEATHER, "strict": None}}])},
        f"tools|user:Q|assistant:«{CALLED}",
    ),
    "nulls in calls as text": (
        {"messages": [ASK, say("assistant", "", tool_calls=[{"function": {
            "name": "weather", "arguments": '{"city": null}'}}]), say("tool_call", CALL.replace('"Rome"', "null"))],
         "tools": [TOOL]},
        "tools|user:Q|assistant:«" + "\n".join([CALLED.replace('"Rome"', "null")] * 2),
    ),
    "whole numbers": ({"question": 5, "answer": 3}, "user:5|assistant:«3"),
    "whole numbers in alpaca": (
        {"instruction": "Q", "input": 4, "output": 16, "history": [[2, -4]]},
        "user:2|assistant:«-4|user:Q\n4|assistant:«16",
    ),
    "whole numbers in messages": (
        {"conversations": [turn("human", 5), turn("gpt", 0)], "system": 1}, "system:1|user:5|assistant:«0",
    ),
    "nulls of a table": (
        {"messages": [{**ASK, "tool_calls": None, "weight": None}, {**REPLY, "name": None}], "tools": None,
         "system": "", "images": [], "chosen": None},
        "user:Q|assistant:«A",
    ),
    # LLaMA-Factory
    "sharegpt": ({"conversations": PAIR, "system": "S"}, "system:S|user:Q|assistant:«A"),
    "sharegpt tools": (
        {"conversations": [turn("human", "Q"), turn("function_call", CALL), turn("observation", "18"),
                           turn("gpt", "A")], "system": "S", "tools": json.dumps([WEATHER])},
        f"tools:S|user:Q|assistant:«{CALLED}|user:<tool_response>\n18\n</tool_response>|assistant:«A",
    ),
    "sharegpt parallel calls": (
        {"conversations": [turn("human", "Q"), turn("function_call", f"[{CALL}, {CALL}]"), turn("observation", "18"),
                           turn("gpt", "A")], "tools": json.dumps([TOOL])},
        f"tools|user:Q|assistant:«{CALLED}\n{CALLED}|user:<tool_response>\n18\n</tool_response>|assistant:«A",
    ),
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, "user:Q|assistant:«A"),
    "alpaca input": (
        {"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["H", "B"]]},
        "system:S|user:H|assistant:«B|user:Q\nI|assistant:«A",
    ),
    "alpaca pictures": (
        {"instruction": "<image>Q", "input": "", "output": "A", "images": ["a.png"]}, f"user:{SEE}Q|assistant:«A",
    ),
    "gpteacher": ({"instruction": "Q", "response": "A"}, "user:Q|assistant:«A"),
    # ms-swift
    "query": (
        {"system": "S", "query": "Q", "response": "A", "history": [["H", "B"]]},
        "system:S|user:H|assistant:«B|user:Q|assistant:«A",
    ),
    "conversation": (
        {"system": "S", "conversation": [{"human": "Q", "assistant": "A"}, {"human": "R", "assistant": "B"}]},
        "system:S|user:Q|assistant:«A|user:R|assistant:«B",
    ),
    "loss": (
        {"messages": [ASK, {**REPLY, "loss": False}, say("user", "R"), say("assistant", "B", loss=True)],
         "channel": "chat"},
        "user:Q|assistant:A|user:R|assistant:«B",
    ),
    "tool_call": (
        {"messages": [ASK, say("assistant", "Think\n"), say("tool_call", CALL), say("tool_call", CALL),
                      say("tool_response", "18"), say("tool_response", "19"), REPLY], "tools": json.dumps([TOOL])},
        f"tools|user:Q|assistant:«Think\n{CALLED}\n{CALLED}|user:<tool_response>\n18\n</tool_response>\n"
        "<tool_response>\n19\n</tool_response>|assistant:«A",
    ),
    "swift pictures": (
        {"messages": [say("user", "<image>x<video>"), REPLY], "images": ["a.png"], "videos": [["a.png", "a.png"]]},
        f"user:{SEE}x{FILM}|assistant:«A",
    ),
    "swift without a marker": ({"query": "Q", "response": "A", "images": ["a.png"]}, f"user:{SEE}Q|assistant:«A"),
    # TRL
    "completion of texts": ({"prompt": "Q", "completion": "A"}, "user:Q|assistant:«A"),
    "completion of messages": (
        {"prompt": [say("system", "S"), say("user", "H"), say("assistant", "B"), ASK], "completion": [REPLY]},
        "system:S|user:H|assistant:B|user:Q|assistant:«A",
    ),
    "completion and pictures": (
        {"prompt": [ASK], "completion": [REPLY], "images": [{"bytes": png(), "path": "gone.png"}]},
        f"user:{SEE}Q|assistant:«A",
    ),
    "completion and items": (
        {"prompt": [say("user", [{"type": "text", "text": "Q", "image": None}, {"type": "image", "text": None}])],
         "completion": [say("assistant", [{"type": "text", "text": "A"}])], "image": picture()},
        f"user:Q{SEE}|assistant:«A",
    ),
    "messages and pictures": (
        {"messages": [ASK, REPLY], "images": [picture(), picture(1)]}, f"user:{SEE}{SEE}Q|assistant:«A",
    ),
    "trl tools": (
        {"prompt": [ASK], "completion": [say("assistant", None, tool_calls=[{"function": json.loads(CALL)}])],
         "tools": [TOOL]},
        f"tools|user:Q|assistant:«{CALLED}",
    ),
    # axolotl
    "train": (
        {"messages": [{**ASK, "train": False}, {**REPLY, "train": False}, say("user", "R"), say("assistant", "B")]},
        "user:Q|assistant:A|user:R|assistant:«B",
    ),
    "training": (
        {"conversations": [turn("human", "Q"), turn("gpt", "A", training=True), turn("human", "R"),
                           turn("gpt", "B", training=False)]},
        "user:Q|assistant:«A|user:R|assistant:B",
    ),
    "role and content": ({"conversations": [ASK, REPLY]}, "user:Q|assistant:«A"),
    "role and value": (
        {"conversations": [{"role": "user", "value": "Q"}, {"role": "assistant", "value": "A"}]}, "user:Q|assistant:«A",
    ),
    "open orca": ({"system_prompt": "S", "question": "Q", "response": "A"}, "system:S|user:Q|assistant:«A"),
    "question and answer": (
        {"question": "Q", "category": "x", "answer": "A", "image": "a.png"}, f"user:{SEE}Q|assistant:«A",
    ),
    # LLaVA and Qwen
    "llava": (
        {"id": "1", "image": "a.png", "conversations": [turn("human", "<image>\nQ"), turn("gpt", "A")]},
        f"user:{SEE}Q|assistant:«A",
    ),
    "llava of text": ({"id": 1, "model": "", "conversations": PAIR}, "user:Q|assistant:«A"),
    "qwen": (
        {"image": ["a.png", "b.png"], "conversations": [turn("human", "<image>\n<image>\nQ"), turn("gpt", "A")]},
        f"user:{SEE}{SEE}Q|assistant:«A",
    ),
    "qwen data_path": (
        {"data_path": "..", "image": "NAME/a.png", "conversations": [turn("human", "<image>Q"), turn("gpt", "A")]},
        f"user:{SEE}Q|assistant:«A",
    ),
    "a marker that is text": (
        {"messages": [say("user", [{"type": "text", "text": "<image><audio>Q"}]), REPLY]},
        "user:<image><audio>Q|assistant:«A",
    ),
    "anthropic's pictures": (
        {"messages": [say("user", [{"type": "image", "source": {
            "type": "base64", "media_type": "image/png", "data": base64.b64encode(png()).decode()}}]), REPLY]},
        f"user:{SEE}|assistant:«A",
    ),
    "history of messages": (
        {"query": "Q", "response": "A", "history": [say("user", "H"), turn("gpt", "B")]},
        "user:H|assistant:«B|user:Q|assistant:«A",
    ),
    "calls in tags": (
        {"conversations": [turn("human", "Q"), turn("function_call", f"{CALLED}\n{CALLED}"), turn("observation", "18"),
                           turn("gpt", "A")], "tools": json.dumps([TOOL])},
        f"tools|user:Q|assistant:«{CALLED}\n{CALLED}|user:<tool_response>\n18\n</tool_response>|assistant:«A",
    ),
    "the cauldron": (
        {"images": ["a.png"], "texts": [{"user": "Q", "assistant": "A", "source": "x"}]}, f"user:{SEE}Q|assistant:«A",
    ),
    "one system prompt, twice": (
        {"messages": [say("system", [{"type": "text", "text": "S"}]), ASK, REPLY], "system": "S"},
        "system:S|user:Q|assistant:«A",
    ),
    "keys about the picture": (
        {"image": "a.png", "image_path": "x/a.png", "file_name": "a.png", "url": "http://h/a.png", "query": "Q",
         "response": "A"}, f"user:{SEE}Q|assistant:«A",
    ),
    "keys about the picture of an item": (
        {"messages": json.dumps([say("user", [{"type": "image", "image": "a.png"}]), REPLY]), "image_path": "x/a.png"},
        f"user:{SEE}|assistant:«A",
    ),
    "an address of a text": ({"url": "https://h/page", "query": "Q", "response": "A"}, "user:Q|assistant:«A"),
    "prompt and completion as text": (
        {"prompt": json.dumps([ASK], indent=1), "completion": json.dumps(REPLY)}, "user:Q|assistant:«A",
    ),
    "JSON that is no chat": (
        {"prompt": '[{"role": "engineer"}]', "completion": "A"},
        'user:[{"role": "engineer"}]|assistant:«A',
    ),
    "messages as text": ({"messages": json.dumps([ASK, REPLY])}, "user:Q|assistant:«A"),
}  # fmt: skip


def expected(processor, form: str) -> tuple[str, list[str]]:
    """The whole prompt, and the parts of it that are learnt."""
    text, learnt = "", []
    turns = re.split(r"\|(?=user:|assistant:)", form)
    if ":" in turns[0] and not turns[0].startswith(("system:", "tools")):
        turns.insert(0, f"system:{DEFAULT}")
    for one in turns:
        role, _, content = one.partition(":")
        if role == "tools":
            system = processor.render([say("system", content or DEFAULT), ASK], tools=[TOOL])
            text += system[: system.index("<|im_start|>user")]
            continue
        if content.startswith("«"):
            content = content[1:]
            learnt.append(content + "<|im_end|>")
        text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
    return text, learnt


def trained(processor, segment) -> tuple[str, list[str]]:
    ids, weights = [], []
    for token, weight in zip(segment.tokens, segment.weights, strict=True):
        if not (ids and token == ids[-1] and token in (CONFIG.image_token_id, CONFIG.video_token_id)):
            ids.append(int(token))
            weights.append(weight)
    places = np.flatnonzero(weights)
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    decode = lambda run: processor.decode([ids[i] for i in run], skip_special_tokens=False)  # noqa: E731
    return decode(range(len(ids))), [decode(run) for run in runs]


def in_folder(record, folder):
    return json.loads(json.dumps(record).replace("NAME", folder.name)) if "data_path" in record else record


@pytest.mark.parametrize("name", FORMS)
def test_what_is_learnt(processor, folder, name):
    record, form = FORMS[name]
    (segment,) = RecordProcessor(processor, SHAPE, folder=folder)(in_folder(record, folder))
    assert trained(processor, segment) == expected(processor, form)


@pytest.mark.parametrize("name", FORMS)
def test_evaluation_reads_the_same(processor, folder, name):
    """The question is the conversation without its last message, which is the answer."""
    record, form = FORMS[name]
    (question,) = read_questions([in_folder(record, folder)])
    messages, _, tools = conversation(in_folder(record, folder), None)
    assert question.messages == messages[:-1] and question.tools == tools
    if "tool_calls" not in messages[-1]:
        assert question.answers == (form.rpartition(":")[2].removeprefix("«"),)


BREAKS = ["", "\n", "\r\n", "\r", "\x85", "\u2028", "\u2029"]
AROUND = {  # text before and after a marker, the media beside it → forms of record
    "messages": lambda text, media: {"messages": [say("user", text), REPLY], **media},
    "conversations": lambda text, media: {"conversations": [turn("human", text), turn("gpt", "A")], **media},
    "texts": lambda text, media: {"texts": [{"user": text, "assistant": "A"}], **media},
    "query": lambda text, media: {"query": text, "response": "A", **media},
    "alpaca": lambda text, media: {"instruction": text, "output": "A", **media},
    "prompt": lambda text, media: {"prompt": [say("user", text)], "completion": "A", **media},
    "history": lambda text, media: {"query": "R", "response": "B", "history": [[text, "A"]], **media},
}


def first_user(record) -> str:
    """The first user message: each picture or clip as ⟨kind⟩."""
    message = next(m for m in conversation(record, None).messages if m["role"] == "user")
    content = message["content"]
    return content if isinstance(content, str) else "".join(i.get("text", f"⟨{i['type']}⟩") for i in content)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", AROUND)
def test_one_line_break_beside_a_marker_is_removed(name, kind):
    for gap in BREAKS:
        read = lambda text: first_user(AROUND[name](text, {kind: "a.png"}))  # noqa: E731
        assert read(f"<{kind}>{gap}Q") == f"⟨{kind}⟩Q"
        assert read(f"P{gap}<{kind}>") == f"P⟨{kind}⟩"
        assert read(f"P{gap}<{kind}>{gap}Q") == f"P⟨{kind}⟩Q"
        assert read(f"P{gap}{gap}<{kind}>{gap}{gap} Q{gap}") == f"P{gap}⟨{kind}⟩{gap} Q{gap}"
        assert first_user(AROUND[name](f"<{kind}>{gap}<{kind}>{gap}Q", {kind: ["a", "b"]})) == f"⟨{kind}⟩⟨{kind}⟩Q"


@pytest.mark.parametrize("gap", BREAKS[1:])
def test_line_breaks_without_a_marker_stay(gap):
    text = f"{gap}P{gap}{gap}Q{gap}"
    for name, form in AROUND.items():
        assert first_user(form(text, {})) == text
        if name != "conversations":  # elsewhere, media without a marker stand before the text
            assert first_user(form(text, {"images": ["a", "b"]})) == f"⟨image⟩⟨image⟩{text}"
    both = {"query": f"{gap}<image>{gap}{gap}Q", "response": "A", "images": ["a"], "videos": ["b"]}
    assert first_user(both) == f"⟨video⟩⟨image⟩{gap}Q"
    items = [{"type": "image"}, {"type": "text", "text": f"{gap}<image>{gap}Q"}]
    assert first_user({"messages": [say("user", items), REPLY], "image": "a"}) == f"⟨image⟩{gap}<image>{gap}Q"
    assert conversation({"query": "Q", "response": f"<image>{gap}A"}, None).messages[-1]["content"] == f"<image>{gap}A"


PAIRS = {
    "trl": {"prompt": [ASK], "chosen": [say("assistant", "good")], "rejected": [say("assistant", "bad")]},
    "trl of texts": {"prompt": "Q", "chosen": "good", "rejected": "bad", "score_chosen": 9.0},
    "implicit prompt": {"chosen": [ASK, say("assistant", "good")], "rejected": [ASK, say("assistant", "bad")]},
    "the prompt in both": {"prompt": "Q", "prompt_id": "1", "chosen": [ASK, say("assistant", "good")],
                           "rejected": [ASK, say("assistant", "bad")]},
    "sharegpt": {"conversations": [turn("human", "Q")], "chosen": turn("gpt", "good"), "rejected": turn("gpt", "bad")},
    "ultrafeedback": {"prompt": "Q", "prompt_id": "1", "messages": [ASK, say("assistant", "good")], "score_chosen": 9,
                      "chosen": [ASK, say("assistant", "good")], "rejected": [ASK, say("assistant", "bad")]},
    "as text": {"prompt": json.dumps([ASK]), "chosen": json.dumps([say("assistant", "good")]),
                "rejected": json.dumps([turn("gpt", "bad")])},
    "alpaca": {"instruction": "Q", "input": "", "chosen": "good", "rejected": "bad"},
    "swift": {"messages": [ASK, say("assistant", "good")], "rejected_response": "bad"},
    "swift query": {"query": "Q", "response": "good", "rejected_response": "bad"},
    "swift messages": {"messages": [ASK, say("assistant", "good")],
                       "rejected_messages": [ASK, say("assistant", "bad")]},
    "openai": {"input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
               "preferred_output": [say("assistant", "good")], "non_preferred_output": [say("assistant", "bad")]},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_preferences(processor, name):
    segments = RecordProcessor(processor, SHAPE, preferences=True)(PAIRS[name])
    for segment, text in zip(segments, ("good", "bad"), strict=True):
        assert trained(processor, segment) == expected(processor, f"user:Q|assistant:«{text}")
    with pytest.raises(BadRecord, match=r'is a preference .* set task = "dpo"'):
        conversation(PAIRS[name], None)


@pytest.mark.parametrize("name", ["trl", "alpaca", "swift"])
def test_of_a_preference_the_system_prompt_and_history_count(processor, name):
    record = PAIRS[name] | {"system": "S"}
    record |= {"history": [["H", "B"]]} if name == "alpaca" else {}
    history = "user:H|assistant:B|" if name == "alpaca" else ""
    for segment, text in zip(RecordProcessor(processor, SHAPE, preferences=True)(record), ("good", "bad"), strict=True):
        assert trained(processor, segment) == expected(processor, f"system:S|{history}user:Q|assistant:«{text}")


CHAT = {"messages": [ASK, REPLY]}
REFUSED = [
    ({"text": "raw"}, "'text': raw text has no turns"),
    ({"completion": "A"}, "has none of 'messages'"),
    ({"prompt": [ASK, REPLY]}, "no assistant message to learn from; the answer's key is 'completion'"),
    ({"query": "Q"}, "the answer's key is 'completion'"),
    ({"messages": [ASK], "answer": "A"}, "'answer' is for evaluation"),
    ({"question": "Q", "answer": ["A", "B"]}, "'answer' is for evaluation"),
    ({"segments": [{"label": True, "text": "x"}]}, "'segments': parts of a text without turns"),
    ({"input_ids": [1], "labels": [1]}, "'input_ids': tokens of another program"),
    ({"prompt": "Q", "completions": ["a"], "labels": [True]}, "'labels'"),
    ({"prompt": "Q", "completion": "A", "label": True}, "'label': records with a label (KTO"),
    ({"prompt": "Q", "completion": "A", "label": False}, "--columns label="),
    ({"instruction": "Q", "output": "A", "kto_tag": False}, "'kto_tag': KTO is not supported"),
    (CHAT | {"objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}}, "'objects': boxes beside the messages"),
    (CHAT | {"audios": ["a.wav"]}, "'audios': the model cannot hear"),
    (CHAT | {"chat_template_kwargs": {"enable_thinking": False}}, "'chat_template_kwargs': the chat template takes no"),
    (CHAT | {"weight": 0.5}, "'weight': weights are of messages"),
    (CHAT | {"train_on_eos": "none"}, "'train_on_eos': the end of a learnt message"),
    (CHAT | {"rejected_images": ["a.png"], "rejected_response": "B"}, "'rejected_images'"),
    (CHAT | {"persona": "pirate"}, "unknown key 'persona'; rename it with --columns persona=NAME, or pass over it with "
                                   "--columns persona="),
    (CHAT | {"b": 1, "a": 2}, "unknown keys 'a', 'b'; rename it with --columns a=NAME, or pass over it with "
                              "--columns a= --columns b="),
    ({"mesages": [ASK, REPLY]}, "unknown key 'mesages'; did you mean 'messages'?"),
    ({"question": "Q", "answer": "A", "questions": "x"}, "'questions'; rename it with"),
    ({"image_path": "a.png", "query": "Q", "response": "A"}, "read it with --columns image_path=image, or pass over"),
    ({"file_name": "a.PNG", "query": "Q", "response": "A"}, "'file_name' may be the record's picture"),
    (CHAT | {"video_url": "http://h/x"}, "read it with --columns video_url=video"),
    (CHAT | {"prompt": "Q"}, "has both 'messages' and 'prompt'"),
    (CHAT | {"response": "A"}, "has both 'messages' and 'response'"),
    (CHAT | {"history": [["a", "b"]]}, "has both 'messages' and 'history'"),
    ({"query": "Q", "response": "A", "output": "B"}, "has both 'response' and 'output'"),
    ({"query": "Q", "response": ["A", "B"]}, "'response' must be a text, a message or a list of"),
    ({"query": True, "response": "A"}, "'query' is True; it must be a text"),
    ({"query": "Q", "response": 3.0}, "'response' is 3.0; write it as text, such as \"3\" or \"3.0\""),
    ({"query": "Q", "response": 0.5}, "'response' is 0.5; write it as text, such as \"0.5\""),
    ({"query": "Q", "response": False}, "'response' is False; it must be a text"),
    ({"question": "Q", "answer": 2.5}, "'answer' is 2.5; to train on it, write it as text"),
    ({"messages": [ASK, say("assistant", 2.5)]}, "message 1 has content of type float; it must be a string"),
    ({"messages": [ASK, say("assistant", True)]}, "message 1 has content of type bool; it must be a string"),
    ({"query": "Q", "response": "A", "history": [["a"]]}, "'history' must be a list of [question, answer]"),
    ({"query": "Q", "response": "A", "history": {"a": "b"}}, "'history' must be a list of [question, answer]"),
    ({"prompt": [ASK, say("assistant", "{")], "completion": "A"}, "'prompt' ends with an assistant message"),
    (CHAT | {"system": ["S"]}, "'system' is ['S']; it must be a text"),
    ({"messages": [say("system", "T"), ASK, REPLY], "system": "S"}, "has two system prompts"),
    (CHAT | {"tools": [TOOL], "functions": [WEATHER]}, "has both 'tools' and 'functions'"),
    (CHAT | {"tools": "[{]"}, "'tools' is text and not readable as JSON"),
    ({"messages": "[{]"}, "'messages' is text and not readable as JSON"),
    ({"conversations": [turn("human", "Q"), turn("function_call", "weather(Rome)")]}, "message 1 is a call and"),
    ({"conversations": [turn("human", "Q"), turn("function_call", "{broken")]}, "message 1 is text and not readable"),
    ({"conversations": [turn("function", "Q")]}, "message 0 is from 'function'"),
    ({"messages": [ASK, say("assistant", "A", thinking="hm")]}, "message 1 has the unknown key 'thinking'"),
    ({"messages": [ASK, say("assistant", "A", train_detail=[{"train": False}])]}, "the unknown key 'train_detail'"),
    ({"messages": [ASK, say("assistant", "A", channel="analysis")]}, "message 1 has the unknown key 'channel'"),
    ({"messages": [ASK, say("assistant", "A", weight=0.5)]}, "message 1 has weight 0.5; it must be 0 or 1"),
    ({"messages": [ASK, say("assistant", "A", train="yes")]}, "message 1 has train 'yes'"),
    ({"messages": [ASK, say("assistant", "A", weight=1, loss=False)]}, "'weight' and 'loss', which contradict"),
    ({"messages": [say("user", "Q", train=True), REPLY]}, "message 0 is a user message with train True; only the"),
    ({"messages": [ASK, say("assistant", "B", loss=False), say("tool_call", CALL)]}, "message 2 is part of"),
    ({"conversation": [{"human": "Q", "assistant": "A", "mood": "x"}]}, "message 0 has the unknown key 'mood'"),
    ({"prompt": str([ASK]), "completion": "A"}, "'prompt' holds messages as Python prints them; write them as JSON"),
    ([ASK, REPLY], 'a list of 2 messages; a record is an object, so write {"messages": […]}'),
    (PAIR, "a list of 2 messages"),
    ([CHAT, CHAT], "a list of 2 records, as packing tools write"),
    ("text", "a record is a JSON object; this one is of type str"),
    (None, "a record is a JSON object; this one is of type NoneType"),
    ({"messages": [say("user", [{"type": "text", "text": "Q"}]), REPLY], "image": "a.png"}, "refer to 0 images"),
    ({"conversations": PAIR, "image": "a.png"}, "refer to 0 images; the record has 1"),
    ({"messages": [say("user", "<image>Q"), REPLY], "images": ["a.png", "b.png"]}, "refer to 1 images"),
    ({"messages": [say("user", "<image>Q"), REPLY]}, "has 0 (<image> stands for one; if it is meant as text"),
    ({"query": "<video>Q", "response": "A"}, "refer to 1 videos; the record has 0"),
    ({"instruction": "Q", "input": "<image>", "output": "A", "images": []}, "refer to 1 images; the record has 0"),
    ({"query": "Picture 1: <img>a.png</img>\nQ", "response": "A"}, "'<img>a.png</img>', another program's marker"),
    ({"messages": [say("user", SEE + "Q"), REPLY], "images": ["a.png"]}, "message 0 has '<|vision_start|><|image_pad"),
    ({"messages": [say("user", "<image 1>Q"), REPLY], "image": "a.png"}, "message 0 has '<image 1>', another program"),
    ({"query": "<audio>Q", "response": "A"}, "the model cannot hear"),
    ({"query": "Q", "response": "<ref-object> is at <bbox>"}, "message 1 has ms-swift's <ref-object>"),
    ({"data_path": ["a"], "image": "a.png", "query": "Q", "response": "A"}, "'data_path' is ['a']; it must be one"),
]  # fmt: skip


@pytest.mark.parametrize("record, says", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_could_matter_is_refused(processor, folder, record, says):
    with pytest.raises(BadRecord) as e:
        RecordProcessor(processor, SHAPE, folder=folder)(record)
    assert says in str(e.value)


@pytest.mark.parametrize(
    "record, says",
    [
        (PAIRS["trl"] | {"completion": "A"}, "has both 'chosen' and 'completion'"),
        (PAIRS["swift"] | {"chosen": "A"}, "remove one"),
        ({"messages": [ASK], "rejected_response": "bad"}, "needs the better reply as the last message"),
        ({"messages": [ASK, REPLY], "chosen": "good", "rejected": "bad"}, "must not end with an assistant message"),
        ({"prompt": "Q", "chosen": [say("user", "P"), REPLY], "rejected": "bad"}, "'chosen' begins with a user"),
        ({"chosen": [ASK, REPLY], "rejected": [ASK, REPLY]}, "are the same conversation"),
        ({"prompt": "Q", "chosen": "A", "rejected": [say("assistant", [{"type": "text", "text": "A"}])]},
         "are the same reply"),
        ({"prompt": "Q", "chosen": [ASK, REPLY], "rejected": [ASK, REPLY]}, "are the same reply"),
        ({"query": "Q", "response": "A", "rejected_response": "A"}, "are the same reply"),
        ({"chosen": "Human: Q\n\nAssistant: A", "rejected": "Human: Q\n\nAssistant: B"}, "without a prompt"),
        ({"prompt": "Q", "chosen": "good"}, "'rejected' must be a text"),
        (PAIRS["trl"] | {"mood": 0.5}, "unknown key 'mood'"),
        (PAIRS["ultrafeedback"] | {"messages": [ASK, REPLY]}, "'messages', which is neither reply; pass over it with"),
    ],
)  # fmt: skip
def test_bad_preferences(record, says):
    with pytest.raises(BadRecord) as e:
        preference(record, None)
    assert says in str(e.value)


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_harmless_keys_change_nothing(key):
    assert conversation(CHAT | {key: "anything"}, None) == conversation(CHAT, None)


def test_an_answer_beside_a_reply(processor):
    """Evaluation compares with the answer; training learns the reply."""
    for record in ({"question": "Q", "response": "A", "answer": "B"}, CHAT | {"answer": "B"}):
        assert read_questions([record])[0].answers == ("B",)
        (segment,) = RecordProcessor(processor, SHAPE)(record)
        assert trained(processor, segment) == expected(processor, "user:Q|assistant:«A")


@pytest.mark.parametrize(
    "columns, record",
    [
        (["persona=", "mood="], CHAT | {"persona": "x", "mood": "y"}),
        (["caption=response", "ask=query"], {"ask": "Q", "caption": "A"}),
        (["text="], CHAT | {"text": "<|im_start|>user"}),
        (["chosen=completion", "rejected="], {"prompt": "Q", "chosen": "A", "rejected": "B"}),
    ],
)
def test_columns_say_how_to_go_on(columns, record):
    source = open_records([record], columns)
    assert conversation(source[0], None) == conversation(CHAT, None)
    assert read_questions([record], columns=columns)[0].answers == ("A",)


@pytest.mark.parametrize("columns", [["persona"], ["=x"], [""]])
def test_bad_columns(columns):
    with pytest.raises(InputError, match="must be OLD=NEW"):
        open_records([CHAT], columns)
    with pytest.raises(InputError, match="which the record has already"):
        read_questions([{"query": "Q", "prompt": "P"}], columns=["prompt=query"])


def test_pictures_of_every_kind(processor, folder):
    """A path, bytes, a PIL image, and what tables hold: {"bytes", "path"} with either."""
    stored = [{"bytes": png(), "path": None}, {"bytes": None, "path": "a.png"}, {"path": "a.png"}, {"bytes": png()}]
    for image in ["a.png", png(), picture(), *stored]:
        record = {"query": "<image>Q", "response": "A", "images": [image]}
        (segment,) = RecordProcessor(processor, SHAPE, folder=folder)(record)
        np.testing.assert_array_equal(
            segment.visuals[0].patches, processor.encode([say("user", [{"image": picture()}])]).visuals[0].patches
        )
    assert pickle.loads(pickle.dumps(BadRecord("a", "b"))).reason == "a"


ARGUMENTS = [
    ("{a:1", "message 1: the arguments of a call are '{a:1', which is not readable as JSON (Expecting property name"),
    ("Rome", "'Rome', which is not readable as JSON"),
    ('"x"', "they must be a JSON object"),
    ('"{\\"city\\": \\"Rome\\"}"', "they must be a JSON object"),
    ("3", "the arguments of a call are '3'; they must be a JSON object"),
    ([1], "the arguments of a call are [1]; they must be a JSON object"),
    (5, "the arguments of a call are 5; they must be a JSON object"),
]


@pytest.mark.parametrize("arguments, says", ARGUMENTS)
def test_arguments_that_are_no_object_are_not_learnt(processor, arguments, says):
    bare = {"name": "weather", "arguments": arguments}
    forms = [say("assistant", "", tool_calls=[{"function": bare}]), say("assistant", "", tool_calls=[bare])]
    for call in [*forms, turn("function_call", json.dumps(bare)), say("assistant", "", function_call=bare)]:
        record = {"messages": [ASK, call], "tools": [TOOL]}
        with pytest.raises(BadRecord) as e:
            RecordProcessor(processor, SHAPE)(record)
        assert says in str(e.value)
        wrong = {**call, "weight": 0}  # a call that failed, in an agent's trace
        (segment,) = RecordProcessor(processor, SHAPE)(
            {"messages": [ASK, wrong, say("tool", "no"), REPLY], "tools": [TOOL]}
        )
        assert trained(processor, segment)[1] == ["A<|im_end|>"]


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_without_arguments_is_learnt(processor, arguments):
    call = say("assistant", "", tool_calls=[{"function": {"name": "weather", "arguments": arguments}}])
    (segment,) = RecordProcessor(processor, SHAPE)({"messages": [ASK, call], "tools": [TOOL]})
    assert trained(processor, segment)[1] == [
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>'
    ]


LISTS = {
    "JSON": '["a.png", "b.png"]', "one": '["a.png"]', "indented": json.dumps(["a.png", "b.png"], indent=1),
    "an object": '{"bytes": null, "path": "a.png"}', "objects": '[{"path": "a.png"}, {"path": "b.png"}]',
}  # fmt: skip


@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize("name", LISTS)
def test_media_as_json_text(processor, folder, key, name):
    count = LISTS[name].count(".png")
    (segment,) = RecordProcessor(processor, SHAPE, folder=folder)({"query": "Q", "response": "A", key: LISTS[name]})
    assert trained(processor, segment) == expected(processor, f"user:{SEE * count}Q|assistant:«A")
    assert len(segment.visuals) == count


def test_media_as_text_that_is_not_json(folder):
    for text in ("['a.png']", "[{'path': 'a.png'}]", "{'bytes': None, 'path': 'a.png'}"):
        with pytest.raises(BadRecord, match=r"'images' is .*as Python prints it; write it as JSON"):
            conversation({"query": "Q", "response": "A", "images": text}, folder)
    for name in ("[1].png", "{a}.png", '["a.png', "['90s].png"):  # names of files
        (item,) = conversation({"query": "<image>", "response": "A", "images": name}, None).messages[0]["content"]
        assert item["image"] == name


EMPTY = [
    {"type": "image", "text": "", "image": "a.png"},
    {"type": "image", "image": "a.png", "video": "", "text": None, "image_url": {}},
    {"type": "image", "image": "", "image_url": {"url": "a.png"}, "video": [], "text": ""},
    {"image": "a.png", "text": "", "video": ""},
    {"type": "image", "image": "a.png", "image_url": {"url": None}},
]


@pytest.mark.parametrize("item", EMPTY)
def test_empty_sources_beside_another_count_as_absent(processor, folder, item):
    text = {"type": "text", "text": "Q", "image": "", "video": "", "image_url": {"url": None}}
    record = {"messages": [say("user", [item, text]), REPLY]}
    (segment,) = RecordProcessor(processor, SHAPE, folder=folder)(record)
    assert trained(processor, segment) == expected(processor, f"user:{SEE}Q|assistant:«A")
    beside = {"messages": [say("user", [{"type": "image", "image": "", "text": ""}, text]), REPLY], "image": "a.png"}
    assert trained(processor, *RecordProcessor(processor, SHAPE, folder=folder)(beside)) == trained(processor, segment)
    plain = [{"type": "image", "text": "", "image": picture()}, {"type": "text", "text": "Q", "image": ""}]
    assert processor.render([say("user", plain)]) == processor.render([say("user", [{"image": picture()}, "Q"][:1] + [
        {"type": "text", "text": "Q"}])])  # fmt: skip


ODD = [None, True, 0, 1.5, "", "x", "<image>", "[", "[1]", "{}", '[{"role": "user"}]', [], [1], [[1, 2]], {}, {"a": 1}]
NAMES = [
    *_KNOWN,
    *REFUSED_KEYS,
    "id",
    "role",
    "content",
    "from",
    "value",
    "weight",
    "function_call",
    "tool_calls",
    "type",
    "url",
]


def odd(rng, depth=0):
    kind = rng.integers(4 if depth < 4 else 1)
    if kind == 0:
        return ODD[rng.integers(len(ODD))]
    if kind == 1:
        return [odd(rng, depth + 1) for _ in range(rng.integers(3))]
    return {NAMES[rng.integers(len(NAMES))]: odd(rng, depth + 1) for _ in range(rng.integers(1, 4))}


def spoilt(value, rng):
    """The value with one of its parts replaced."""
    if rng.integers(4) == 0 or not isinstance(value, dict | list) or not value:
        return odd(rng)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    out, key = value.copy(), keys[rng.integers(len(keys))]
    out[key] = spoilt(value[key], rng)
    return out


@pytest.mark.parametrize("seed", range(10))
def test_odd_records_are_refused_by_name(processor, folder, seed):
    """Whatever a record holds: samples or BadRecord."""
    rng = np.random.default_rng(seed)
    forms = [record for record, _ in FORMS.values()] + list(PAIRS.values())
    for _ in range(100):
        record = odd(rng) if rng.integers(4) == 0 else spoilt(forms[rng.integers(len(forms))], rng)
        for preferences in (False, True):
            try:
                RecordProcessor(processor, SHAPE, preferences=preferences, folder=folder)(record)
            except BadRecord as e:
                assert str(e)
