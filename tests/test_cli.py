"""The command line: arguments become messages and options, errors become sentences, nothing hangs."""

import codecs
import importlib.util
import inspect
import io
import json
import os
import pty
import queue
import re
import select
import shlex
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from qwenvl_jax import cli
from qwenvl_jax.answers.boxes import Sizes
from qwenvl_jax.cli import chat as chat_verb
from qwenvl_jax.cli import converse
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.errors import InputError, install
from qwenvl_jax.families import PRESETS, to_dict
from qwenvl_jax.infer.options import GenerateOptions
from qwenvl_jax.infer.requests import Result
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.options import names
from qwenvl_jax.params import checkpoint, locate
from qwenvl_jax.params.specs import check_mesh


class FakeStream:
    result = None

    def __init__(self, pieces):
        self._pieces, self.close = pieces, pieces.close

    def __iter__(self):
        return self._pieces


class FakeEngine:
    """Records what it is asked and answers from a script; an exception in the script is raised.

    It stands for the processor too: `encode` hands the messages through.
    """

    def __init__(self, *answers):
        self.answers, self.calls, self.request, self.compiling = list(answers), [], None, None

    def encode(self, messages):
        return json.loads(json.dumps(messages))

    def attach(self, kind, where, before=None):
        if where.endswith("bad.png"):
            raise InputError(f"{where}: not a picture")
        return where, f"{where}: {kind}, 56 × 28 pixels, 2 tokens", None

    def stream(self, conversation, options):
        return FakeStream(self._pieces(conversation, options))

    def _pieces(self, conversation, options):
        self.calls.append((conversation, options))
        answer = self.answers.pop(0) if self.answers else ["ok"]
        for piece in answer:
            if isinstance(piece, BaseException) or piece is KeyboardInterrupt:
                raise piece
            yield piece

    def generate(self, conversations, options):
        self.calls.append((conversations[0], options))
        text = "".join(self.answers.pop(0)) if self.answers else "né"
        return [Result(text, [5, 6], "stop", 7, pictures=(Sizes((40, 10), (80, 20)),) * 2, boxes="resized")]


@pytest.fixture
def engine(monkeypatch):
    fake = FakeEngine()

    def encoder(args, request=None):
        fake.request = request
        return "m", fake.encode, fake.attach

    monkeypatch.setattr(converse, "encoder", encoder)
    monkeypatch.setattr(converse, "engine", lambda path, args, mesh: fake)
    return fake


@pytest.fixture
def files(tmp_path):
    for name in ("a.png", "b.png", "c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_generate_streams(engine, capsys):
    engine.answers = [["Hel", "lo"]]
    assert cli.main(["generate", "--model", "m", "--prompt", "Hi"]) == 0
    assert capsys.readouterr() == ("Hello\n", "")
    assert engine.calls == [([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], GenerateOptions())]


def test_generate_prints_objects(engine, capsys):
    """One JSON object, in whole pixels of the files of two pictures; with --json, beside the answer."""
    mug = '{"image": 2, "bbox_2d": [9, 4, 81, 12], "label": "m\u00fcg", "of": "tin"}'
    want = {"label": "müg", "kind": "box", "points": [[4, 2], [40, 6]], "attributes": {"of": "tin"}, "image": 1}
    for more in ([], ["--json"]):
        engine.answers = [f"{mug} {{'point_2d': [1]}}"]
        assert cli.main(["generate", "--prompt", "?", "--objects", *more]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["objects"], told["malformed"], "text" in told) == ([want], 1, bool(more))
    assert cli.main(["generate", "--prompt", "?", "--objects"]) == 0
    assert capsys.readouterr().out == '{"objects": [], "malformed": 0}\n'


def test_media_keep_their_order(engine):
    a, b, c = "a.png", "b.png", "c.mp4"
    argv = ["generate", "--model", "m", "--image", a, "--video", c, "--image", b, "--prompt", "?", "--system", "S"]
    assert cli.main(argv) == 0
    system, user = engine.calls[0][0]
    assert system == {"role": "system", "content": "S"}
    assert user["content"] == [
        {"type": "image", "image": a},
        {"type": "video", "video": c},
        {"type": "image", "image": b},
        {"type": "text", "text": "?"},
    ]


def test_sampling_options_are_passed_only_when_given(engine):
    argv = ["generate", "--model", "m", "--prompt", "?", "--temperature", "0", "--top-k", "1", "--stop", "a"]
    argv += ["--presence-penalty", "-1", "--frequency-penalty", "0"]
    assert cli.main([*argv, "--stop", "b", "--seed", "3", "--max-new-tokens", "9", "--repetition-penalty", "1"]) == 0
    assert engine.calls[0][1] == GenerateOptions(
        temperature=0.0,
        top_k=1,
        stop=["a", "b"],
        seed=3,
        max_new_tokens=9,
        repetition_penalty=1.0,
        presence_penalty=-1.0,
        frequency_penalty=0.0,
    )


def test_json_is_one_object(engine, capsys):
    assert cli.main(["generate", "--model", "m", "--prompt", "?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "text": "né",
        "token_ids": [5, 6],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }


def test_messages_from_file_and_stdin(engine, files, monkeypatch):
    messages = [
        {"role": "user", "content": [{"image": str(files / "a.png"), "max_pixels": 1}, {"text": "?"}]},
        {"role": "assistant", "content": "!"},
    ]
    path = files / "m.json"
    path.write_text(json.dumps(messages))
    assert cli.main(["generate", "--model", "m", "--messages", str(path)]) == 0
    assert engine.calls[0][0] == messages
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps({"messages": messages}).encode())))
    assert cli.main(["generate", "--model", "m", "--messages", "-"]) == 0
    assert engine.calls[1][0] == messages


def test_every_option_of_encode_is_an_option_here(monkeypatch, tmp_path):
    """All options of the processor are flags; only the given ones are passed on."""
    from qwenvl_jax import Processor

    class Recorder:
        def encode(self, messages, **options):
            seen.append(options)
            raise InputError("enough")

    monkeypatch.setattr("qwenvl_jax.params.directory.read_config", lambda path: None)
    monkeypatch.setattr(Processor, "from_dir", lambda path, config, adapters: Recorder())
    (tmp_path / "tools.json").write_text('[{"type": "function"}]')
    values = {
        "min_pixels": 1, "max_pixels": 2, "resized_height": 3, "resized_width": 4, "total_pixels": 5,
        "fps": 0.5, "nframes": 6, "min_frames": 7, "max_frames": 8, "video_start": 0.0, "video_end": 9.5,
        "media_bytes": 10, "media_memory": 11, "media_seconds": 12,
    }  # fmt: skip
    argv = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    argv += [
        "--add-vision-id",
        "--allow-control-tokens",
        "--boxes",
        "original",
        "--tools",
        str(tmp_path / "tools.json"),
    ]
    seen, base = [], ["generate", "--model", str(tmp_path), "--prompt", "?"]
    assert cli.main(base) == cli.main([*base, *argv]) == 2
    given = values | {
        "add_vision_id": True,
        "boxes": "original",
        "allow_control_tokens": True,
        "tools": [{"type": "function"}],
    }
    assert seen == [{}, given]
    known = inspect.signature(Processor.encode).parameters.keys() - {"self", "messages", "add_generation_prompt"}
    assert given.keys() == known - {"media"} | set(names(MediaOptions))


def test_a_request_body_sets_what_no_flag_sets(engine, tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {
        "model": "gpt", "messages": [{"role": "user", "content": "Hi"}], "tools": tools, "max_completion_tokens": 9,
        "max_tokens": None, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "x", "presence_penalty": 1,
        "frequency_penalty": 0.5, "top_k": 7,
    }  # fmt: skip
    path = tmp_path / "m.json"
    path.write_text(json.dumps(body))
    assert cli.main(["generate", "--model", "m", "--messages", str(path), "--temperature", "0", "--stop", "y"]) == 0
    assert engine.calls == [
        (
            body["messages"],
            GenerateOptions(
                max_new_tokens=9, temperature=0.0, top_p=0.9, top_k=7, seed=3, stop=["y"],
                presence_penalty=1, frequency_penalty=0.5,
            ),
        )
    ]  # fmt: skip
    assert engine.request["tools"] == tools
    (tmp_path / "none.json").write_text("[]")
    assert cli.main(["generate", "--model", "m", "--messages", str(path), "--tools", str(tmp_path / "none.json")]) == 0
    assert engine.request["tools"] == []


@pytest.mark.parametrize(
    ("request_body", "says"),
    [
        ({"response_former": {}}, "m.json: unknown option response_former; known are max_new_tokens, "),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "'max_completion_tokens' is given twice"),
        ({"max_tokens": "many"}, "max_new_tokens is 'many'"),
        ({"stop": [""]}, "stop is"),
    ],
)
def test_bad_request_bodies(engine, tmp_path, capsys, request_body, says):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}], **request_body}))
    assert cli.main(["generate", "--model", "m", "--messages", str(path)]) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and not out and not engine.calls


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_an_encoding_without_the_answers_characters(engine, monkeypatch, json_flag):
    engine.answers = [["n", "é"]]
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    assert cli.main(["generate", "--model", "m", "--prompt", "?", *json_flag]) == 0
    text = raw.getvalue().decode("ascii")
    assert json.loads(text)["text"] == "né" if json_flag else text == "n\\xe9\n"


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_messages_and_tools_saved_on_windows(engine, tmp_path, monkeypatch, coding):
    messages, tools = tmp_path / "m.json", tmp_path / "t.json"
    messages.write_bytes('[{"role": "user",\r\n"content": "é"}]'.encode(coding))
    tools.write_bytes("[]".encode(coding))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(messages.read_bytes()), "ascii"))
    for where in (str(messages), "-"):
        assert cli.main(["generate", "--model", "m", "--messages", where, "--tools", str(tools)]) == 0
        assert engine.calls.pop()[0] == [{"role": "user", "content": "é"}]


_TURN = '{"messages": [{"role": "user", "content": "Hi"}]}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"{_TURN}\n{_TURN}\n", "holds several JSON values"),
        (f"{_TURN}\r{_TURN}", "holds several JSON values"),
        (_TURN + _TURN, "holds several JSON values"),
        ("[] x", "not readable as JSON"),
        (f"[{_TURN}]", "is a list of records; give one of them"),
        ("{", "not readable as JSON"),
        ("[]", "expected a list of messages"),
        ('{"a": 1}', "expected a list of messages"),
        ('["hi"]', "expected a list of messages"),
        ("[" * 100_000, "not readable as JSON"),
        ("[" + "9" * 5001 + "]", "not readable as JSON"),
    ],
)
def test_bad_messages(engine, tmp_path, capsys, content, says):
    path = tmp_path / "m.json"
    path.write_text(content)
    assert cli.main(["generate", "--model", "m", "--messages", str(path)]) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and not out and not engine.calls


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prompt", "?", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "?", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", " \n"], "--prompt is blank"),
        (["--prompt", "?", "--stop", ""], "stop is"),
        (["--messages", ""], "--messages is empty"),
        (["--prompt", "?", "--tools", ""], "--tools is empty"),
        (["--messages", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["--messages", "m.json", "--image", "a.png"], "go with --prompt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(engine, capsys, argv, says):
    assert cli.main(["generate", "--model", "m", *argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("qwenvl: ") and says in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["paint"],
        ["generate", "--model", "m"],
        ["generate", "--model", "m", "--prompt", "?", "--messages", "f"],
        ["generate", "--model", "m", "--prompt", "?", "--top-k", "many"],
        ["generate", "--model", "m", "--prompt", "?", "--temp", "1"],
        ["convert", "a", "b"],
        ["convert", "a", "b", "--to", "gguf"],
    ],
)
def test_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "--help" in err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("photo.png: cut\nshort"), 2, "photo.png: cut short"),
        (OSError(28, "No space left on device", "out/x"), 2, "out/x: No space left on device"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), 2, "--max-pixels"),
        (KeyError("oops"), 1, "unexpected KeyError"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_errors_become_sentences(engine, monkeypatch, capsys, error, code, says, debug):
    monkeypatch.setattr(os, "dup2", lambda *a: None)
    engine.answers = [["some", error]]
    argv = ["generate", "--model", "m", "--prompt", "?"]
    assert cli.main(argv + ["--debug"] * debug) == code
    err = capsys.readouterr().err
    assert says in err
    quiet = isinstance(error, KeyboardInterrupt | BrokenPipeError)
    assert ("Traceback" in err) == (debug and not quiet)
    assert debug or err.count("\n") <= 1


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--mesh", "eight"], "mesh 'eight' is not chips along data, fsdp and tensor"),
        (["--mesh", "1x1x64"], "a mesh of 1×1×64 needs 64 devices; there are"),
        (["--distributed"], "this process has no number (no coordinator); on a TPU pod"),
    ],
)
def test_meshes_without_devices(engine, monkeypatch, capsys, argv, says):
    def initialize(**_):
        raise ValueError("no coordinator")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert cli.main(["generate", "--prompt", "?", *argv]) == 2
    assert says in capsys.readouterr().err
    assert not engine.calls


@pytest.mark.parametrize(
    ("address", "says"), [("nonsense", "must be host:port"), ("localhost:9", "cannot connect to localhost:9 (no")]
)
def test_processes_that_cannot_connect(engine, monkeypatch, capsys, address, says):
    def initialize(**_):
        raise jax.errors.JaxRuntimeError("no server")

    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert cli.main(["generate", "--prompt", "?", "--distributed"]) == 2
    assert says in capsys.readouterr().err
    assert not engine.calls


def test_a_mesh_that_does_not_divide_the_model():
    config = checkpoint.read_config(checkpoint.find("demo"))
    check_mesh(config, {"data": 7, "fsdp": 3, "tensor": 8})
    with pytest.raises(InputError, match=r"dimension D, 192, is not a multiple of the mesh's fsdp, 5"):
        check_mesh(config, {"data": 1, "fsdp": 5, "tensor": 1})


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'tpu'")])
def test_a_missing_platform(engine, monkeypatch, capsys, error):
    def devices():
        raise error

    engine.answers = [[error]]
    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert cli.main(["generate", "--prompt", "?"]) == 2
    err = capsys.readouterr().err
    assert "there are no tpu devices here. Set JAX_PLATFORMS=cpu" in err and install("tpu") in err


def test_another_process_that_is_gone_is_no_bug(engine, monkeypatch, capsys):
    engine.answers = [[RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")]]
    codes = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(os, "_exit", codes.append)
    cli.main(["generate", "--prompt", "?"])
    assert codes == [1] and "another process has ended or cannot be reached" in capsys.readouterr().err


def test_debug_may_come_first(engine, capsys):
    engine.answers = [[InputError("bad")]]
    assert cli.main(["--debug", "generate", "--model", "m", "--prompt", "?"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_samples_have_names(engine, monkeypatch, capsys):
    assert cli.main(["generate", "--image", "demo:scene.png", "--video", "demo:clip.mp4", "--prompt", "?"]) == 0
    assert chat(monkeypatch, "/image demo:scene.png", "?") == 0
    given = [[item.get(item["type"]) for item in conversation[-1]["content"]] for conversation, _ in engine.calls]
    assert given == [[str(SAMPLES / "scene.png"), str(SAMPLES / "clip.mp4"), "?"], [str(SAMPLES / "scene.png"), "?"]]
    capsys.readouterr()
    for name in ("demo:photo.png", "demo:../__init__.py", "demo:"):
        assert cli.main(["generate", "--image", name, "--prompt", "?"]) == 2
        assert f"{name}: no such sample; there are demo:chart.png, demo:clip.mp4, " in capsys.readouterr().err


# --- chat -----------------------------------------------------------------------------------------------


def chat(monkeypatch, *lines):
    def reader(prompt=""):
        if not script:
            raise EOFError
        line = script.pop(0)
        if isinstance(line, type):
            raise line
        return line

    script = list(lines)
    monkeypatch.setattr("builtins.input", reader)
    return cli.main(["chat", "--model", "m", "--system", "S", "--temperature", "0"])


def text(turn):
    return turn["content"] if isinstance(turn["content"], str) else turn["content"][-1]["text"]


def said(engine):
    """(texts, images and videos) of the conversation of every call."""
    conversations = [c for c, _ in engine.calls]
    media = [
        [i[i["type"]] for t in c if isinstance(t["content"], list) for i in t["content"][:-1]] for c in conversations
    ]
    return [[text(t) for t in c] for c in conversations], media


def test_chat_remembers_and_resets(engine, files, monkeypatch, capsys):
    engine.answers = [["one"], ["two"], ["three"]]
    image = str(files / "a.png")
    assert chat(monkeypatch, f"/image '{image}'", "first", "", "second", "/reset", "third", "/quit", "never") == 0
    assert said(engine) == ([["S", "first"], ["S", "first", "one", "second"], ["S", "third"]], [[image], [image], []])
    assert len(engine.calls[1][0][3]["content"]) == 1  # the picture belongs to the first turn only
    assert all(options == GenerateOptions(temperature=0.0) for _, options in engine.calls)
    attached = f"attached {image}: image, 56 × 28 pixels, 2 tokens"
    assert capsys.readouterr().out == f"{attached}\none\ntwo\nthe conversation is empty\nthree\n"


def test_chat_ctrl_c_stops_the_answer_only(engine, monkeypatch, capsys):
    engine.answers = [["half", KeyboardInterrupt], ["whole"]]
    assert chat(monkeypatch, "a", "b", KeyboardInterrupt, "c", KeyboardInterrupt, KeyboardInterrupt, "never") == 130
    assert said(engine)[0] == [["S", "a"], ["S", "a", "half", "b"], ["S", "a", "half", "b", "whole", "c"]]
    assert "half\nstopped; Ctrl-C again ends the chat\n" in capsys.readouterr().out


def test_chat_ctrl_c_twice_leaves_while_an_answer_runs(engine, monkeypatch, capsys):
    engine.answers = [[KeyboardInterrupt]]
    assert chat(monkeypatch, "a", KeyboardInterrupt, "never") == 130
    assert len(engine.calls) == 1


@pytest.mark.parametrize("failure", [KeyboardInterrupt, InputError("too long"), MemoryError()])
def test_chat_keeps_the_message_of_a_turn_that_failed(engine, files, monkeypatch, capsys, failure):
    a, b = str(files / "a.png"), str(files / "b.png")
    engine.answers = [["one"], [failure], [failure], ["two"], ["three"]]
    lines = ["zero", f"/image {a}", "first", f"/image {b}", "/retry", "other", "/retry"]
    assert chat(monkeypatch, *lines) == 0
    texts, media = said(engine)
    before = ["S", "zero", "one"]
    assert texts[1:] == [[*before, "first"]] * 2 + [[*before, "other"]] * 2
    assert media[1:] == [[a], [a, b], [a, b], [a, b]]
    err = capsys.readouterr().err
    assert "your message and 1 attachment(s) stayed here; /retry sends it again" in err
    assert failure is KeyboardInterrupt or "qwenvl: " in err


def test_chat_lists_and_drops_attachments(engine, files, monkeypatch, capsys):
    a, b = str(files / "a.png"), str(files / "b.png")
    lines = ["/image", f"/image {a}", "one", f"/image {b}", "/image", "/drop", "/drop", "two", "/retry", "/dance"]
    lines.append("/help")
    assert chat(monkeypatch, *lines) == 0
    out = capsys.readouterr().out
    assert out.startswith("nothing is attached;")
    assert f"sent: {a}: image, 56 × 28 pixels, 2 tokens\nwith the next message: {b}: image" in out
    assert f"dropped {b}: image, 56 × 28 pixels, 2 tokens\nthe next message has no attachments\nok\n" in out
    assert "/dance: no such command" in out and "/reset        forget" in out
    assert said(engine)[1] == [[a], [a], [a]]


def test_chat_reads_several_lines(engine, monkeypatch):
    assert chat(monkeypatch, '"""one', "", "  two", 'three"""', '"""four"""', '"""five') == 0
    assert [texts[-1] for texts in said(engine)[0]] == ["one\n\n  two\nthree", "four", "five"]


def test_chat_reads_paths_as_terminals_paste_them(engine, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my photo.png", "it's.png", "b.png", "bad.png"):
        (tmp_path / name).touch()
    spaced, quote, b = (str(tmp_path / name) for name in ("my photo.png", "it's.png", "b.png"))
    forms = {
        spaced: [spaced],
        f"'{spaced}' ": [spaced],
        f'"{spaced}"': [spaced],
        spaced.replace(" ", "\\ "): [spaced],
        "~/my photo.png": [spaced],
        "~/my\\ photo.png ~/b.png": [spaced, b],
        f"file://{spaced.replace(' ', '%20')}": [spaced],
        quote: [quote],
        quote.replace("'", "\\'"): [quote],
        "'" + quote.replace("'", "'\\''") + "' " + b: [quote, b],
        "https://host/a.png?x='1'": ["https://host/a.png?x='1'"],
        "data:image/png;base64,AA": ["data:image/png;base64,AA"],
        "~/bad.png": [],
        "~/no photo.png": [],
        "~/b.png ~/gone.png": [],
    }
    assert chat(monkeypatch, *(line for form in forms for line in (f"/image {form}", "?", "/reset"))) == 0
    assert said(engine)[1] == list(forms.values())
    err = capsys.readouterr().err
    for says in ("bad.png: not a picture", "no photo.png: no such file", "gone.png: no such file"):
        assert says in err


def test_chat_opens_an_attachment_once(tmp_path, monkeypatch, capsys):
    """Bad files are refused when they are attached; a good one may be gone later."""
    image, large = tmp_path / "a.png", tmp_path / "large.png"
    Image.new("RGB", (56, 28), "red").save(image)
    Image.new("RGB", (84, 84)).save(large)
    (tmp_path / "bad.png").write_bytes(b"x")
    args = cli.build_parser().parse_args(["chat", "--max-pixels", "3136"])
    _, encode, attach = converse.encoder(args)
    visual, says, _ = attach("image", str(image))
    assert says == f"{image}: image, 56 × 28 pixels, 2 tokens"
    assert attach("image", str(large))[1] == f"{large}: image, 84 × 84 pixels, resized to 56 × 56 pixels, 4 tokens"
    clip = SAMPLES / "clip.mp4"
    assert re.fullmatch(
        rf"{clip}: video, 16 frames over 8 seconds of 56 × 56 pixels, 32 tokens", attach("video", str(clip))[1]
    )
    with pytest.raises(InputError, match=r"bad\.png: not a picture"):
        attach("image", str(tmp_path / "bad.png"))
    args = cli.build_parser().parse_args(["chat", "--media-memory", "1"])
    Image.new("RGB", (1000, 1000)).save(large)
    with pytest.raises(InputError, match=r"large\.png: .*the limit is 1 MiB"):
        converse.encoder(args)[2]("image", str(large))
    by_path = encode([converse.user_turn([("image", str(image))], "?")])
    image.unlink()
    item = {"type": "image", "image": visual}
    kept = encode([{"role": "user", "content": [item, {"type": "text", "text": "?"}]}])
    assert np.array_equal(kept.tokens, by_path.tokens)
    assert np.array_equal(kept.visuals[0].patches, by_path.visuals[0].patches)


def test_the_attachments_of_a_message_share_one_budget(tmp_path, capsys):
    """A refused one takes nothing of it, and the next message has its own."""
    rng = np.random.default_rng(0)
    for name, side in (("a", 490), ("b", 490), ("c", 30), ("d", 600)):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    args = cli.build_parser().parse_args(["chat", "--media-bytes", "1"])
    _, encode, attach = converse.encoder(args)
    talk = chat_verb.Chat(None, encode, attach, None, [])

    def attached(name):
        talk.obey(f"/image {tmp_path / name}.png")
        out, err = capsys.readouterr()
        assert not err or "media_bytes" in err
        return out.startswith("attached")

    assert [attached(name) for name in "abcd"] == [True, False, True, False]
    talk.obey("/drop")
    capsys.readouterr()
    assert [attached(name) for name in "bac"] == [True, False, True]


class Terminal:
    """A process on a terminal of its own."""

    # `subprocess` starts it without the fork that jax warns of; the child makes the terminal its own.
    OWN = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"

    def __init__(self, *argv, **env):
        self.fd, side = pty.openpty()
        how = dict(stdin=side, stdout=side, stderr=side, start_new_session=True, env=os.environ | env)
        self.process = subprocess.Popen([sys.executable, "-c", self.OWN, *argv], **how)
        os.close(side)
        self.seen, self.at = "", 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end within a character

    def wait(self, for_text: str, then: bytes = b"") -> None:
        """Reads until the text comes, then types `then`."""
        deadline = time.monotonic() + 60
        while (found := self.seen.find(for_text, self.at)) < 0:
            assert time.monotonic() < deadline and self.read(), f"no {for_text!r} in {self.seen[-2000:]}"
        self.at = found + len(for_text)
        os.write(self.fd, then)

    def read(self) -> bool:
        """Reads what there is; False at the end."""
        if select.select([self.fd], [], [], 0.1)[0]:
            try:
                self.seen += self.decoder.decode(os.read(self.fd, 1 << 16))
            except OSError:  # the other side is closed
                return False
        return True

    def close(self) -> int:
        """The exit code."""
        while self.read():
            pass
        os.close(self.fd)
        return self.process.wait()


@pytest.mark.parametrize("toolkit, keys, code", [("", b"\x15\x04", 0), ("", b"\x03", 130), ("None", b"/quit\r", 0)])
def test_chat_is_left_while_a_program_compiles(toolkit, keys, code):
    """With prompt_toolkit and without. A normal exit would crash in XLA's threads."""
    hide = f"import sys; sys.modules['prompt_toolkit'] = {toolkit}; " if toolkit else "import sys; "
    run = f"{hide}from qwenvl_jax.cli import main; sys.argv[1:] = ['chat']; sys.exit(main())"
    t = Terminal(sys.executable, "-c", run, JAX_ENABLE_COMPILATION_CACHE="0", PROMPT_TOOLKIT_NO_CPR="1", XLA_FLAGS="")
    t.wait(">", b"/image demo:scene.png\r")
    t.wait("140 × 140 pixels, 25 tokens", b"How many strawberries are there?\r")
    t.wait("compiling…", b"\x03")
    t.wait("your message and 1 attachment(s) stayed here; /retry sends it again")
    t.wait("stopped; Ctrl-C again ends the chat")
    t.wait(">", keys)
    assert t.close() == code, t.seen
    end = t.seen[t.at :]
    assert "Traceback" not in t.seen and "SIG" not in end and "symbolize" not in end


def test_chat_on_a_terminal():
    """/retry sends the message of a stopped turn, "compiling…" goes, and the answer comes."""
    t = Terminal(
        sys.executable,
        "-m",
        "qwenvl_jax.cli",
        "chat",
        "--temperature",
        "0",
        PROMPT_TOOLKIT_NO_CPR="1",
        JAX_ENABLE_COMPILATION_CACHE="0",
    )
    t.wait(">", b"/image demo:scene.png\r")
    t.wait("25 tokens", b"How many strawberries are there?\x1b\r\r")  # Alt-Enter begins a line
    t.wait("compiling…", b"\x03")
    t.wait("Ctrl-C again")
    t.wait(">", b"/retry\r")
    t.wait("3\r\n")
    t.wait(">", b"\x1b[A\x15/image\r")
    t.wait("sent: ")
    t.wait(">", b"\x04")
    assert t.close() == 0
    said = t.seen.count("compiling…")
    assert said and t.seen.count("\x1b7compiling…") == t.seen.count("\x1b8\x1b[K") == said


ERASED = "\x1b7compiling…\x1b8\x1b[K"  # save the cursor; go back to it and clear the line, "^C" too


def test_compiling_is_said_where_it_fits(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    engine, pieces = SimpleNamespace(compiling="step"), queue.SimpleQueue()
    status = chat_verb._Status()
    threading.Timer(0.4, pieces.put, ["piece"]).start()
    assert status.get(pieces, engine, "a\nb") == "piece"
    assert capsys.readouterr().out == ERASED
    status.show(engine, "x" * 14)  # with "^C" it would fill the line
    monkeypatch.setenv("TERM", "dumb")  # it has no place for the cursor to return to
    status.show(engine, "")
    monkeypatch.delenv("TERM")
    engine.compiling = None
    status.show(engine, "")
    assert capsys.readouterr().out == ""


def test_compiling_goes_when_ctrl_c_comes_with_it(monkeypatch):
    """The signal's handler may run as soon as the word is on the terminal, before `print` returns."""

    class Terminal(io.StringIO):
        presses = 1

        def isatty(self):
            return True

        def flush(self):
            if self.presses:
                self.presses = 0
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    with pytest.raises(KeyboardInterrupt):
        chat_verb._Status().get(queue.SimpleQueue(), SimpleNamespace(compiling="step"), "")
    assert terminal.getvalue() == ERASED


def test_compiling_goes_when_ctrl_c_ends_the_wait_for_the_last_answer(monkeypatch):
    class Worker:
        joined = 0

        def is_alive(self):
            return True

        def join(self, timeout):
            self.joined += 1
            if self.joined == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", terminal := io.StringIO())
    terminal.isatty = lambda: True
    chat = chat_verb.Chat(SimpleNamespace(compiling="step"), None, None, None, [])
    chat._worker = Worker()
    with pytest.raises(KeyboardInterrupt):
        chat._wait(chat_verb._Status())
    assert terminal.getvalue() == ERASED


def test_a_lost_ctrl_c_comes_again():
    with pytest.raises(KeyboardInterrupt):
        cli._interrupt_again(SimpleNamespace(exc_type=KeyboardInterrupt))
        time.sleep(5)


# --- the other verbs ------------------------------------------------------------------------------------


def test_verify_without_torch(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["verify", "ckpt", "--image", "a.png"]) == 2
    err = capsys.readouterr().err
    assert err == f"qwenvl: verify needs torch and transformers, which are not installed: {install('parity')}\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    assert cli.main(["verify", "ckpt", "--image", "a.png"]) == 2
    assert "verify needs torch, which is not installed: " in capsys.readouterr().err


def test_verify_says_what_failed(monkeypatch, capsys):
    stage = SimpleNamespace(name="logits", shape=(3, 160), error=0.5, limit=1e-4, ok=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "qwenvl_convert.parity", SimpleNamespace(verify=lambda path, image: [stage]))
    monkeypatch.setattr("qwenvl_convert.parity", sys.modules["qwenvl_convert.parity"], raising=False)
    assert cli.main(["verify", "ckpt", "--image", "a.png"]) == 1
    assert capsys.readouterr().out.splitlines()[1].split() == ["logits", "3×160", "5.0e-01", "1e-04", "FAILED"]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_has_examples_that_parse(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert cli.VERBS[verb].EXAMPLES
    for example in cli.VERBS[verb].EXAMPLES:
        assert f"  {example}\n" in out
        assert cli.build_parser().parse_args(shlex.split(example)[1:]).command == verb


def test_the_installed_command():
    """The entry points exist and run without importing jax."""
    code = "import sys, qwenvl_jax.cli as c; c.main(['--help'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in ("generate", "chat", "convert", "info", "verify"):
        assert verb in out.stdout


def test_info_of_a_preset(capsys):
    assert cli.main(["info", "qwen2.5-vl-72b"]) == 0
    out = capsys.readouterr().out
    assert "73,410,777,344" in out and "sizes of qwen2.5-vl-72b" in out
    assert cli.main(["info", "qwen2-vl-2b", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 2208985600 and facts["dtypes"] == {"bfloat16": 2208985600}
    assert facts["config"]["text"]["num_hidden_layers"] == 28


def test_info_of_quantised_weights(tmp_path, capsys):
    """Those of other methods cannot be loaded, but they can be described."""
    quantised = {"quantization_config": {"quant_method": "hqq"}}
    data = to_dict(PRESETS["qwen2.5-vl-7b"]) | quantised
    (tmp_path / "config.json").write_text(json.dumps(data))
    save_file({"model.embed_tokens.weight": np.zeros((2, 2), np.int32)}, tmp_path / "model.safetensors")
    assert cli.main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["preset"] == "qwen2.5-vl-7b" and facts["dtypes"] == {"I32": 4}
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", "?"]) == 2
    assert "quantised checkpoints (hqq) are not supported" in capsys.readouterr().err


def test_convert_there_and_back_and_info(tiny_checkpoint, tmp_path, capsys):
    """Both formats have the same facts, and a second conversion does not overwrite the first."""
    orbax, back = tmp_path / "orbax", tmp_path / "hf"
    assert cli.main(["convert", str(tiny_checkpoint), str(orbax), "--to", "orbax"]) == 0
    assert cli.convert_main([str(orbax), str(back), "--to", "hf", "--layout", "nested"]) == 0
    assert capsys.readouterr() == (f"{orbax}\n{back}\n", "")
    facts = []
    for path in (tiny_checkpoint, orbax, back):
        assert cli.main(["info", str(path), "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
        on_disk = sum((path / name).stat().st_size for name in facts[-1]["files"])
        assert facts[-1]["bytes"] == on_disk > 2 * facts[-1]["parameters"]
    assert [f["format"] for f in facts] == ["hf", "orbax", "hf"]
    same = [{k: f[k] for k in ("family", "preset", "parameters", "dtypes", "config")} for f in facts]
    assert same[0] == same[1] == same[2] and facts[0]["family"] == tiny_checkpoint.name
    assert cli.main(["convert", str(back), str(orbax), "--to", "orbax"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["generate", "--prompt", "?"], ["chat"], ["eval", "q.jsonl"], ["info"]])
def test_the_model_is_the_demo_unless_another_is_named(argv):
    args = cli.build_parser().parse_args(argv)
    if argv == ["info"]:
        assert args.checkpoint == locate.DEMO
    else:
        assert converse.located(args) == locate.locate(locate.DEMO)


@pytest.mark.parametrize("argv", [["info"], ["convert", "--to", "orbax"], ["generate", "--prompt", "?", "--model"]])
def test_not_a_checkpoint(argv, tmp_path, capsys):
    for path, says in ((tmp_path, "no config.json"), (tmp_path / "nowhere", "no such directory")):
        extra = [str(tmp_path / "new")] if argv[0] == "convert" else []
        assert cli.main([*argv, str(path), *extra]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parity
@pytest.mark.parametrize("tiny_checkpoint", ["qwen2_5_vl"], indirect=True)
def test_verify_refuses_before_weights_are_read(tiny_checkpoint, tmp_path, capsys):
    pytest.importorskip("torch")
    for file in tiny_checkpoint.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    Image.new("RGB", (100, 27)).save(tmp_path / "small.png")
    argv = ["verify", str(tmp_path), "--image", str(tmp_path / "small.png")]
    assert cli.main(argv) == 2
    assert "small.png: 100 × 27 pixels; verify needs sides of at least 28" in capsys.readouterr().err
    (tmp_path / checkpoint.MARKER).write_text("{}")
    assert cli.main(argv) == 2
    assert "verify needs the Hugging Face directory" in capsys.readouterr().err
