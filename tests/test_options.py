"""Options are declared once: each field is a flag, a key and a keyword, with the same checks everywhere."""

import dataclasses
import json
import re

import pytest

from qwenvl_jax import cli
from qwenvl_jax.cli.generate import read_request
from qwenvl_jax.errors import CheckpointError, ContextError, InputError, MediaError, OptionsError
from qwenvl_jax.families import PRESETS
from qwenvl_jax.infer.options import GenerateOptions
from qwenvl_jax.inputs.messages import normalize
from qwenvl_jax.inputs.options import LIMITS, MediaOptions
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.inputs.records import BadRecord
from qwenvl_jax.options import build, given, names, replace
from qwenvl_jax.train.options import TrainOptions

VERBS = {
    "generate": (GenerateOptions, MediaOptions),
    "chat": (GenerateOptions, MediaOptions),
    "eval": (GenerateOptions, MediaOptions),
    "train": (TrainOptions,),
}


@pytest.fixture(scope="module")
def processor(tokenizer_dir) -> Processor:
    return Processor.from_dir(tokenizer_dir, PRESETS["qwen2.5-vl-7b"])


@pytest.fixture(scope="module")
def helps():
    """{verb: its help on one line}."""
    parser = cli.build_parser()
    commands = next(action for action in parser._actions if action.dest == "command").choices
    return {verb: " ".join(commands[verb].format_help().split()) for verb in VERBS}


@pytest.mark.parametrize("verb, cls", [(verb, cls) for verb in VERBS for cls in VERBS[verb]])
def test_every_option_is_a_flag_with_its_help(helps, verb, cls):
    for field in dataclasses.fields(cls):
        flag, doc = f"--{field.name.replace('_', '-')} ", " ".join(field.metadata["doc"].split())
        assert (flag in helps[verb].replace(",", " ")) == field.metadata["flag"], field.name
        assert not field.metadata["flag"] or doc in helps[verb], field.name
    assert [f.name for f in dataclasses.fields(GenerateOptions) if not f.metadata["flag"]] == ["n", "logprobs"]


def test_train_takes_every_media_option():
    assert set(names(MediaOptions)) <= set(names(TrainOptions))


def message(**options):
    return [{"role": "user", "content": [{"type": "video", "video": "a.mp4", **options}]}]


def toml(tmp_path, **options):
    file = tmp_path / "run.toml"
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items()))
    return TrainOptions.read(file)


DOORS = {
    "keyword": lambda processor, path, **o: processor.encode([{"role": "user", "content": "?"}], **o),
    "item": lambda processor, path, **o: normalize(message(**o)),
    "toml": lambda processor, path, **o: toml(path, **o),
    "request": lambda processor, path, **o: build(MediaOptions, read_request(o, "request.json")),
    "class": lambda processor, path, **o: build(MediaOptions, o),
    "change": lambda processor, path, **o: replace(MediaOptions(), o),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_entry_point_checks_alike(processor, tmp_path, door):
    for options, sentence in (
        ({"zzz": 1}, r"unknown option zzz; known are .*min_pixels, max_pixels, resized_height"),
        ({"max_pixel": 1}, r"unknown option max_pixel; did you mean max_pixels\?$"),
        ({"max_pixels": 0}, r"max_pixels is 0; it must be a positive number$"),
        ({"nframes": 1.5}, r"nframes is 1\.5; it must be a positive whole number, at most 2147483647$"),
        ({"video_start": -1}, r"video_start is -1; it must be a number, at least 0$"),
    ):
        with pytest.raises(OptionsError, match=sentence) as error:
            DOORS[door](processor, tmp_path, **options)
        assert error.value.code == "options"


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_a_conversation_are_no_options_of_an_item(name):
    with pytest.raises(OptionsError, match=f"message 0 item 0: unknown option {name}"):
        normalize(message(**{name: 5}))


def test_a_request_may_set_what_a_flag_may():
    body = {"max_tokens": 5, "max_pixels": 784, "messages": [], "model": "m", "stream": True, "top_p": None}
    assert read_request(body, "m.json") == {"max_new_tokens": 5, "max_pixels": 784}
    for name in ("n", "logprobs", "allow_control_tokens", *LIMITS):
        with pytest.raises(OptionsError, match=f"m.json: unknown option {name};"):
            read_request({name: 1}, "m.json")


def test_values_keep_their_type():
    given_ = MediaOptions(max_pixels=360 * 420, total_pixels=20480 * 784 * 0.9, fps=2)
    assert given(given_, MediaOptions) == {"max_pixels": 151200, "fps": 2, "total_pixels": 20480 * 784 * 0.9}
    assert isinstance(given_.max_pixels, int)
    options = GenerateOptions(stop="a", stop_token_ids=[7, 8], temperature=1)
    assert (options.stop, options.stop_token_ids, options.temperature) == (("a",), (7, 8), 1.0)


def test_errors_have_codes_and_keep_them():
    errors = [InputError("x"), CheckpointError("x"), MediaError("x"), OptionsError("x"), ContextError("x")]
    errors.append(BadRecord("media", "x"))
    assert [e.code for e in errors] == ["input", "checkpoint", "media", "options", "context", "record"]
    for error in errors:
        placed = error.at("a.jsonl:3")
        assert type(placed) is type(error) and str(placed) == "a.jsonl:3: x" and str(error) == "x"
    assert errors[-1].at("a.jsonl:3").reason == "media"


def test_version(capsys):
    import qwenvl_jax

    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"qwenvl-jax {qwenvl_jax.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", qwenvl_jax.__version__)
