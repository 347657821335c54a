"""Options are declared once: each field is a flag, a key and a keyword, with the same checks everywhere."""

import dataclasses
import json
import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from qwenvl_convert.options import QuantizeOptions

from qwenvl_jax import cli, errors
from qwenvl_jax.cli.generate import _read_messages, read_request
from qwenvl_jax.errors import BadRecord, CheckpointError, ContextError, InputError, MediaError, OptionsError, install
from qwenvl_jax.families import PRESETS
from qwenvl_jax.infer.options import EngineOptions, GenerateOptions
from qwenvl_jax.inputs.fields import REQUEST
from qwenvl_jax.inputs.messages import normalize
from qwenvl_jax.inputs.options import LIMITS, MediaOptions, PromptOptions, RecordOptions
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.options import build, given, names, replace
from qwenvl_jax.train.options import TrainOptions

VERBS = {
    "generate": (GenerateOptions, MediaOptions, PromptOptions, EngineOptions),
    "chat": (GenerateOptions, MediaOptions, PromptOptions, EngineOptions),
    "eval": (GenerateOptions, MediaOptions, PromptOptions, RecordOptions, EngineOptions),
    "plan": (EngineOptions,),
    "train": (TrainOptions,),
    "quantize": (QuantizeOptions,),
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


def test_train_takes_every_shared_option():
    for cls in (MediaOptions, PromptOptions, RecordOptions):
        assert set(names(cls)) <= set(names(TrainOptions))
    changed = dict(max_pixels=9000, boxes="thousandths", add_vision_id=True, allow_control_tokens=True)
    assert TrainOptions(**changed, columns=("a=b",)).encoding == changed


def test_an_option_is_declared_once():
    """Neither by two classes nor by hand. A seed is of two things; an answer's control tokens are kept or not twice."""
    classes = (MediaOptions, PromptOptions, RecordOptions, GenerateOptions, EngineOptions, TrainOptions)
    declared = [name for cls in classes for name in cls.__annotations__]
    assert {name for name in declared if declared.count(name) > 1} == {"seed", "skip_special_tokens"}
    shared = {name for cls in classes[:-1] for name in cls.__annotations__}
    text = "".join(file.read_text("utf-8") for file in Path(cli.__file__).parent.glob("*.py"))
    by_hand = re.findall(r'\(\s*(?:"-\w", )?"--([a-z-]+)"', text)
    assert "system" in by_hand and "output" in by_hand and not shared & {name.replace("-", "_") for name in by_hand}


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
    for name in ("allow_control_tokens", *LIMITS):
        with pytest.raises(OptionsError, match=f"m.json: unknown option {name};"):
            read_request({name: 1}, "m.json")


TOOLS = [{"type": "function", "function": {"name": "f"}}]
# The keys that OpenAI's and vLLM's clients send: values that change nothing, and values that would change the answer.
KEYS = {
    "n": ([1], [2, True, "1"]),
    "best_of": ([1], [3]),
    "user": (["u"], []),
    "metadata": ([{"a": "b"}], []),
    "store": ([True, False], []),
    "stream": ([True, False], []),
    "stream_options": ([{"include_usage": True}], []),
    "service_tier": (["auto", "flex"], []),
    "safety_identifier": (["x"], []),
    "prompt_cache_key": (["x"], []),
    "prediction": ([{"type": "content", "content": "x"}], []),
    "logprobs": ([False], [True, 0]),
    "top_logprobs": ([0], [5, False]),
    "logit_bias": ([{}, [], {"5": 0}], [{"5": -100}, [5]]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, {}]),
    "modalities": ([["text"]], [["text", "audio"]]),
    "audio": ([], [{"voice": "x"}]),
    "verbosity": (["medium"], ["low"]),
    "reasoning_effort": (["none", "minimal", "low"], ["high"]),
    "thinking": ([{"type": "disabled"}], [{"type": "enabled", "budget_tokens": 9}]),
    "enable_thinking": ([False], [True, 0]),
    "thinking_budget": ([0], [9]),
    "vl_high_resolution_images": ([False], [True]),
    "detokenize": ([True], [False]),
    "suffix": ([""], ["x"]),
    "num_beams": ([1], [4]),
    "repeat_penalty": ([1.0], [1.1]),
    "no_repeat_ngram_size": ([0], [3]),
    "return_hidden_states": ([False], [True]),
    "truncation": (["disabled"], ["auto"]),
    "timeout": ([5], []),
    "extra_body": ([{}], [{"top_k": 1}]),
    "extra_headers": ([{"a": "b"}], []),
    "keep_alive": (["5m", -1], []),
    "provider": ([{"order": ["x"]}], []),
    "plugins": ([[]], [[{"id": "web"}]]),
    "regex": ([""], ["a+"]),
    "web_search_options": ([], [{}]),
    "tool_choice": (["auto", "none"], ["required", {"type": "function", "function": {"name": "f"}}]),
    "parallel_tool_calls": ([True, False], []),
    "functions": ([[]], [[{"name": "f"}]]),
    "function_call": (["auto", "none"], [{"name": "f"}]),
    "use_beam_search": ([False], [True]),
    "length_penalty": ([1.0], []),
    "min_tokens": ([0], [5]),
    "include_stop_str_in_output": ([False], [True]),
    "truncate_prompt_tokens": ([], [100]),
    "prompt_logprobs": ([], [1]),
    "echo": ([False], [True]),
    "add_generation_prompt": ([True], [False]),
    "continue_final_message": ([False], [True]),
    "add_special_tokens": ([True, False], []),
    "spaces_between_special_tokens": ([True, False], []),
    "documents": ([[]], [[{"title": "x"}]]),
    "chat_template": ([], ["{{ x }}"]),
    "structured_outputs": ([{}], [{"json": {}}]),
    "guided_json": ([{}], [{"type": "object"}]),
    "guided_choice": ([[]], [["a", "b"]]),
    "bad_words": ([[]], [["a"]]),
    "allowed_token_ids": ([[]], [[1]]),
    "priority": ([0, 3], []),
    "request_id": (["x"], []),
    "cache_salt": (["x"], []),
    "media_io_kwargs": ([{}], [{"video": {"num_frames": 4}}]),
    "chat_template_kwargs": ([{}, {"enable_thinking": False}], [{"enable_thinking": True}, {"tools": 1}, [1]]),
    "mm_processor_kwargs": (
        [{}, {"use_fast": True, "do_resize": True}],
        [{"do_resize": False}, {"size": {"longest_edge": 9}}, {"temperature": 1}, "x"],
    ),
}


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_a_request_that_change_nothing(key):
    harmless, others = KEYS[key]
    for value in (None, *harmless):
        assert read_request({key: value, "temperature": 0.5}, "m.json") == {"temperature": 0.5}
    for value in others:
        with pytest.raises(InputError, match=f"m.json: {key}"):
            read_request({key: value}, "m.json")


@pytest.mark.parametrize(
    "body, says",
    [
        ({"do_sample": False, "temperature": 0}, None),
        ({"do_sample": True, "temperature": 0.5}, None),
        ({"do_sample": True, "temperature": 0}, "do_sample is True, which would change"),
        ({"do_sample": False, "temperature": 0.5}, "do_sample is False, which would change"),
        ({"do_sample": False}, "do_sample is not read; set temperature"),
    ],
)
def test_do_sample_must_agree_with_the_temperature(body, says):
    if says is None:
        assert read_request(body, "m.json") == {"temperature": body["temperature"]}
        return
    with pytest.raises(InputError, match=says):
        read_request(body, "m.json")


def test_messages_as_other_programs_write_them():
    """Anthropic's sources, OpenAI's older role of a tool, and keys that only describe."""
    sources = [{"type": "base64", "media_type": "image/png", "data": "QUJD"}, {"type": "url", "url": "http://h/a.png"}]
    user = {"role": "user", "content": [{"type": "image", "source": s} for s in sources], "timestamp": 5}
    tool = {"role": "function", "name": "f", "content": "18", "function_call": {}}
    messages, media = normalize([user, tool])
    assert [m.source for m in media] == ["data:image;base64,QUJD", "http://h/a.png"]
    assert messages[1] == {"role": "tool", "name": "f", "content": "18"}
    for source in ("a.png", {"type": "file", "file_id": "x"}, {"type": ["url"]}, {"type": "base64"}):
        with pytest.raises(InputError, match="message 0 item 0: 'source' must be"):
            normalize([{"role": "user", "content": [{"type": "image", "source": source}]}])


def test_a_line_of_the_batch_api_is_named(tmp_path):
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}
    (tmp_path / "m.json").write_text(json.dumps(line))
    with pytest.raises(InputError, match=r"a line of OpenAI's Batch API; give its 'body'"):
        _read_messages(SimpleNamespace(media=None, messages=str(tmp_path / "m.json"), system=None))


def test_every_key_of_the_table_is_tried():
    common = (
        "guided_decoding_backend guided_whitespace_pattern guided_regex guided_grammar include_reasoning rid regex "
    )
    common += "separate_reasoning stream_reasoning return_token_ids return_tokens_as_token_ids no_stop_trim ebnf model "
    common += "logits_processors json_schema thinking_token_budget vllm_xargs kv_transfer_params lora_path messages "
    common += "chat_template_content_format prompt_cache_retention incremental_output cache_prompt session_id usage "
    common += "extra_query use_cache routing_key num_return_sequences return_routed_experts background result_format "
    common += "enable_search typical_p tfs_z mirostat top_a grammar transforms"
    assert REQUEST.keys() == {*KEYS, *common.split()} - {"chat_template_kwargs", "mm_processor_kwargs"}


def test_keys_of_a_request_with_other_names():
    body = {
        "max_tokens": 9,
        "max_completion_tokens": 9,
        "top_k": -1,
        "skip_special_tokens": False,
        "stop_token_ids": [7],
    }
    body |= {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True, "ignore_eos": True, "min_p": 0.1}
    body |= {"mm_processor_kwargs": {"max_pixels": 784, "fps": 1, "num_frames": 3}, "repetition_penalty": 1.1}
    body |= {"chat_template_kwargs": {"add_vision_id": True}}
    assert read_request(body, "m.json") == {
        "max_new_tokens": 9, "top_k": 0, "skip_special_tokens": False, "stop_token_ids": [7], "tools": TOOLS,
        "ignore_eos": True, "min_p": 0.1, "max_pixels": 784, "fps": 1, "nframes": 3, "repetition_penalty": 1.1,
        "add_vision_id": True,
    }  # fmt: skip
    for key, value in (("tool_choice", "none"), ("parallel_tool_calls", False), ("tool_choice", "required")):
        with pytest.raises(InputError, match=f"m.json: {key} is .* would change the answer"):
            read_request({"tools": TOOLS, key: value}, "m.json")
    with pytest.raises(InputError, match="given twice"):
        read_request({"max_pixels": 9, "mm_processor_kwargs": {"max_pixels": 8}}, "m.json")


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


@pytest.mark.parametrize(
    "origin, installer, command",
    [
        (None, "pip", "pip install 'qwenvl-jax[video]'"),
        (None, "uv", "uv pip install 'qwenvl-jax[video]'"),
        ("not JSON", "pip", "pip install 'qwenvl-jax[video]'"),
        ({"url": "file://{here}/my%20clone", "dir_info": {}}, "pip", "pip install '{here}/my clone[video]'"),
        ({"url": "file://{here}/x-1.whl", "archive_info": {}}, "pip", "pip install '{here}/x-1.whl[video]'"),
        ({"url": "file://{here}/gone.whl", "archive_info": {}}, "pip", "pip install 'av>=14' pillow"),
        (
            {"url": "https://host/x-1.whl", "archive_info": {}},
            "pip",
            "pip install 'qwenvl-jax[video] @ https://host/x-1.whl'",
        ),
        (
            {"url": "https://host/x", "vcs_info": {"vcs": "git", "commit_id": "ab", "requested_revision": "v1"}},
            "pip",
            "pip install 'qwenvl-jax[video] @ git+https://host/x@v1'",
        ),
        (
            {"url": "file://{here}/repo", "vcs_info": {"vcs": "git", "commit_id": "ab"}, "subdirectory": "sub"},
            "pip",
            "pip install 'qwenvl-jax[video] @ git+file://{here}/repo@ab#subdirectory=sub'",
        ),
    ],
)
def test_the_command_that_installs_an_extra(origin, installer, command, tmp_path, monkeypatch):
    """It names the place that the installed package came from."""
    (tmp_path / "my clone").mkdir()
    (tmp_path / "x-1.whl").touch()
    origin = json.dumps(origin) if isinstance(origin, dict) else origin
    files = {"INSTALLER": f"{installer}\n", "direct_url.json": origin and origin.replace("{here}", str(tmp_path))}
    requires = ["jax", "qwenvl-jax[more]; extra == 'video'", 'av>=14; extra == "more"', 'pillow; extra == "more"']
    package = SimpleNamespace(read_text=files.get, requires=requires)
    monkeypatch.setattr(metadata, "distribution", lambda name: package)
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages/qwenvl_jax/errors.py"))
    assert install("video") == command.replace("{here}", str(tmp_path))


def test_the_command_that_installs_an_extra_of_a_clone(tmp_path, monkeypatch):
    """Also where the clone is on the path without an installation."""

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "qwenvl_jax/errors.py"))
    assert install("a") == "pip install 'qwenvl-jax[a]'"
    (tmp_path / "pyproject.toml").touch()
    assert install("a") == f"pip install -e '{tmp_path}[a]'"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--epochs", "0.5"], "--epochs: '0.5' is not a whole number"),
        (["train", "--learning-rate", "1e-5x"], "--learning-rate: '1e-5x' is not a number"),
        (["generate", "--prompt", "?", "--seed", "one"], "--seed: 'one' is not a whole number"),
        (["eval", "q.jsonl", "--limit", "1.5"], "--limit: '1.5' is not a whole number"),
        (["plan", "--model", "m", "--target", "h100", "--batch", "x"], "--batch: 'x' is not a whole number"),
        (["data", "q.jsonl", "--limit", ""], "--limit: '' is not a whole number"),
    ],
)
def test_flags_that_are_not_numbers(argv, says, capsys):
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert f"argument {says}\n" in capsys.readouterr().err
