"""Messages to token ids and patches with the real tokenizer, against transformers if it is installed."""

import dataclasses
import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from PIL import Image

from qwenvl_jax.errors import CheckpointError, ContextError, InputError
from qwenvl_jax.families import PRESETS
from qwenvl_jax.inputs.options import VIDEO
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.inputs.processor import Processor, _read_tokenizer
from qwenvl_jax.types import Grid, Visual

DATA = Path(__file__).parent / "data" / "tokenizer"
CONFIG = PRESETS["qwen2.5-vl-7b"]
TEXTS = json.loads((DATA / "texts.json").read_text("utf-8"))
CONTROL = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|vision_start|>", "<|object_ref_start|>", "<|quad_end|>")
# From the official checkpoint: the first ids of a plain turn with a picture.
PICTURE_TURN = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 151652, 151655]
IM_START, IM_END = 151644, 151645


@pytest.fixture(scope="module")
def processor(tokenizer_dir) -> Processor:
    return Processor.from_dir(tokenizer_dir, CONFIG)


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def user(*items):
    return {"role": "user", "content": list(items)}


def conversations(count, seed, texts):
    """Text-only conversations: with and without a system prompt, strings and lists, one to seven turns."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        roles = [["system"], []][rng.integers(2)] + ["user", "assistant"] * 4
        messages = []
        for role in roles[: rng.integers(1, 8)]:
            chosen = [texts[i] for i in rng.integers(0, len(texts), rng.integers(1, 4))]
            content = chosen[0] if rng.integers(2) else [{"type": "text", "text": t} for t in chosen]
            messages.append({"role": role, "content": content})
        yield messages, bool(rng.integers(2))


# ------------------------------------------------------------------------------------------ ids


def test_first_ids_of_a_picture_turn(processor):
    sample = processor.encode([user({"image": picture(56, 84)}, {"text": "Hi"})])
    tail = [151653, 13048, 151645, 198, 151644, 77091, 198]
    assert sample.tokens.tolist() == PICTURE_TURN + [151655] * 5 + tail
    assert sample.tokens.dtype == np.int32
    assert [v.grid for v in sample.visuals] == [(1, 4, 6)]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(processor, text):
    """No text becomes a control token, and decoding returns the typed text in NFC."""
    ids = processor.encode([{"role": "user", "content": text}], add_generation_prompt=False).tokens
    assert [i for i in ids if i in processor.control_tokens.values()] == [IM_START, IM_END, IM_START, IM_END]
    expected = processor.decode(PICTURE_TURN[:-2], False) + unicodedata.normalize("NFC", text) + "<|im_end|>\n"
    assert processor.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize("control", CONTROL + ("<|image_pad|>", "<|video_pad|>"))
def test_typed_control_tokens_are_plain_characters(processor, control):
    text = f"a{control}b <|im_{control}end|> {control}{control} | {control[:4]}"
    messages = [user({"image": picture(56, 56)}, {"text": text}, {"text": control[4:]})]
    ids = processor.encode(messages).tokens
    plain = processor.encode([user({"image": picture(56, 56)}, {"text": "x"})]).tokens
    specials = set(processor.control_tokens.values())
    assert [i for i in ids if i in specials] == [i for i in plain if i in specials]
    assert processor.decode(ids, False) == processor.decode(plain, False).replace(">x<", f">{text}{control[4:]}<")


def test_added_tokens_that_do_not_steer_keep_their_ids(processor):
    ids = processor.encode([{"role": "user", "content": "<tool_call></tool_call><|fim_prefix|>"}]).tokens
    assert ids[14:17].tolist() == [151657, 151658, 151659]


def test_typed_placeholder_is_counted_when_allowed(processor):
    messages = [user({"image": picture(56, 56)}, {"text": "<|image_pad|>"})]
    assert (processor.encode(messages).tokens == CONFIG.image_token_id).sum() == 4
    with pytest.raises(InputError, match="2 image and 0 video placeholders for 1 images"):
        processor.encode(messages, allow_control_tokens=True)


def test_a_tokenizer_that_lets_typed_control_tokens_act_is_refused(processor):
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(InputError, match="encode_special_tokens"):
        dataclasses.replace(processor, tokenizer=plain)
    assert not plain.encode_special_tokens  # the caller's tokenizer does not change


def test_render_shows_the_prompt(processor):
    messages = [user({"image": "never opened"}, {"text": "a|<|im_end|>"})]
    assert processor.render(messages, add_vision_id=True).endswith(
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>a|<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )


def test_decode_skips_control_tokens(processor):
    ids = np.array([151644, 872, 198, 13048, 151645])
    assert processor.decode(ids) == "user\nHi"
    assert processor.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nHi<|im_end|>"


def test_ids_beyond_the_vocabulary_are_refused(processor, tokenizer_dir):
    small = CONFIG.replace(text=CONFIG.text.__class__(vocab_size=1000), image_token_id=998, video_token_id=999)
    with pytest.raises(InputError, match=r"the tokenizer gave id 151645, but config\.json's vocab_size is 1000"):
        Processor.from_dir(tokenizer_dir, small).encode([{"role": "user", "content": "a"}])


# ------------------------------------------------------------------------------------------ media


def test_options_of_items_win_over_defaults(processor):
    image = picture(280, 280)
    sample = processor.encode(
        [user({"image": image}, {"image": image, "max_pixels": 56 * 56}, {"image": image, "max_pixels": 280 * 280})],
        max_pixels=140 * 140,
    )
    assert [v.grid for v in sample.visuals] == [(1, 10, 10), (1, 4, 4), (1, 20, 20)]
    assert (sample.tokens == CONFIG.image_token_id).sum() == sum(v.grid.patches // 4 for v in sample.visuals)


def test_min_pixels_of_an_item_above_a_default_max(processor):
    with pytest.raises(InputError, match=r"message 0 item 0: .*min_pixels"):
        processor.encode([user({"image": picture(56, 56), "min_pixels": 10000})], max_pixels=5000)


def test_pictures_and_clips_keep_their_order(processor):
    frames = [picture(336, 448, i) for i in range(4)]
    messages = [
        user({"video": frames, "fps": 4}, {"image": picture(56, 112)}, {"text": "x"}),
        {"role": "assistant", "content": "y"},
        user({"image": picture(112, 56)}, {"video": frames[:2]}),
    ]
    sample = processor.encode(messages, nframes=2)
    assert [(v.kind, *v.grid) for v in sample.visuals] == [
        ("video", 2, 24, 32), ("image", 1, 4, 8), ("image", 1, 8, 4), ("video", 1, 24, 32)
    ]  # fmt: skip
    assert sample.visuals[0].seconds_per_grid == 0.5
    runs = [len(r) for r in re.findall("[iv]+", "".join({151655: "i", 151656: "v"}.get(t, ".") for t in sample.tokens))]
    assert runs == [2 * 192, 8, 8, 192]


@pytest.mark.parametrize(
    "source, item, used",
    [
        ("a.mp4", {}, {"fps": 1, "nframes": None, "max_pixels": 9, "video_end": 3}),
        ("a.mp4", {"nframes": 8}, {"nframes": 8, "max_pixels": 9, "video_end": 3}),
        ("a.mp4", {"fps": 4, "video_end": 1}, {"fps": 4, "max_pixels": 9, "video_end": 1}),
        (["1.png", "2.png"], {"max_pixels": 7}, {"fps": 1, "max_pixels": 7}),
    ],
)
def test_options_that_reach_a_clip(processor, monkeypatch, source, item, used):
    """Sampling defaults skip lists of frames. An item's fps replaces a default of nframes, and vice versa."""
    seen = {}

    def load(source, preprocessing, options, budget):
        seen.update({name: getattr(options, name) for name in VIDEO})
        return Visual(np.zeros((16, 1176), np.uint8), Grid(1, 4, 4), "video", 1.0)

    monkeypatch.setattr("qwenvl_jax.inputs.processor.video_visual", load)
    processor.encode([user({"video": source, **item})], fps=1, max_pixels=9, video_end=3)
    assert {k: v for k, v in seen.items() if v is not None or k in used} == used


def test_many_pictures_in_order(processor):
    images = [picture(56, 28 * n) for n in range(2, 22)]
    sample = processor.encode([user(*({"image": i} for i in images))])
    assert [v.grid.w for v in sample.visuals] == [2 * n for n in range(2, 22)]


def test_an_unusable_picture_is_named(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    good = {"image": picture(56, 56)}
    with pytest.raises(InputError, match=r"^message 1 item 2: .*a\.png"):
        processor.encode([user(good), user(good, {"text": "x"}, {"image": str(tmp_path / "a.png")}, good)])


def test_batch(processor):
    rows = [[{"role": "user", "content": "Hi"}], [user({"image": picture(56, 56)}, {"text": "What?"})]]
    batch = make_batch([processor.encode(row, add_generation_prompt=False) for row in rows], processor.config)
    for row, messages in enumerate(rows):
        ids = processor.encode(messages, add_generation_prompt=False).tokens
        assert batch.tokens[row, : len(ids)].tolist() == ids.tolist()
        assert batch.segments[row].sum() == len(ids)
    assert (batch.visual_index >= 0).sum() == 4


# ------------------------------------------------------------------------------------------ files


def copy(source, target, *left_out):
    target.mkdir()
    for file in source.iterdir():
        if file.name not in left_out:
            shutil.copyfile(file, target / file.name)
    return target


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_missing_file_is_named_with_its_directory(tokenizer_dir, tmp_path, name):
    path = copy(tokenizer_dir, tmp_path / "checkpoint", name)
    with pytest.raises(InputError, match=f"{re.escape(str(path))} has no {name}"):
        Processor.from_dir(path, CONFIG)


@pytest.mark.parametrize("name, text", [("tokenizer.json", "{}"), ("preprocessor_config.json", "{"),
                                        ("preprocessor_config.json", '{"patch_size": -1}'),
                                        ("preprocessor_config.json", "[]")])  # fmt: skip
def test_an_unreadable_file_is_named(tokenizer_dir, tmp_path, name, text):
    path = copy(tokenizer_dir, tmp_path / "checkpoint")
    (path / name).write_text(text)
    with pytest.raises(InputError, match=name):
        Processor.from_dir(path, CONFIG)


@pytest.mark.parametrize("key", ["patch_size", "temporal_patch_size", "merge_size"])
def test_preprocessing_that_contradicts_the_config_is_refused(tokenizer_dir, tmp_path, key):
    path = copy(tokenizer_dir, tmp_path / "a", "preprocessor_config.json")
    for file, data in (
        ("processor_config.json", {"image_processor": {key: 4}}),
        ("preprocessor_config.json", {key: 4}),
    ):
        (path / file).write_text(json.dumps(data))
        with pytest.raises(InputError, match=rf"{file}: {key} is 4, but config\.json"):
            Processor.from_dir(path, CONFIG)


def test_preprocessing_nested_as_transformers_5_saves_it(processor, tokenizer_dir, tmp_path):
    path = copy(tokenizer_dir, tmp_path / "a", "preprocessor_config.json")
    nested = {"image_processor": {"size": {"shortest_edge": 3136, "longest_edge": 50176}}, "processor_class": "P"}
    (path / "processor_config.json").write_text(json.dumps(nested))
    assert Processor.from_dir(path, CONFIG).preprocessing.max_pixels == 50176


def test_tokenizer_from_vocab_and_merges(processor, tokenizer_dir, tmp_path):
    """A saved slow tokenizer has no tokenizer.json; it must give the same ids."""
    path = copy(tokenizer_dir, tmp_path / "a", "tokenizer.json")
    model = json.loads((tokenizer_dir / "tokenizer.json").read_text("utf-8"))["model"]
    (path / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"]]) + "\n", "utf-8")
    built = Processor.from_dir(path, CONFIG)
    assert built.control_tokens == processor.control_tokens
    for messages, prompt in conversations(150, 1, TEXTS + [f"a{c}b" for c in CONTROL]):
        one, two = (p.encode(messages, add_generation_prompt=prompt).tokens for p in (built, processor))
        np.testing.assert_array_equal(one, two)
        assert built.decode(one, False) == processor.decode(two, False)


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("old", [False, True], ids=["tokenizer.json", "vocab.json"])
def test_a_checkpoint_whose_texts_were_saved_on_windows(processor, tokenizer_dir, tmp_path, old, coding):
    """Every text file has a byte order mark and CRLF, and the ids are the same."""
    path = copy(tokenizer_dir, tmp_path / "a")
    template = json.loads((path / "chat_template.json").read_text("utf-8"))["chat_template"]
    (path / "chat_template.jinja").write_text(template, "utf-8")
    if old:
        model = json.loads((path / "tokenizer.json").read_text("utf-8"))["model"]
        (path / "vocab.json").write_text(json.dumps(model["vocab"], indent=1), "utf-8")
        (path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"]]) + "\n", "utf-8")
        (path / "tokenizer.json").unlink()
    for file in path.iterdir():
        file.write_bytes(file.read_text("utf-8").replace("\n", "\r\n").encode(coding))
    saved = Processor.from_dir(path, CONFIG)
    assert saved.preprocessing == processor.preprocessing
    for messages, prompt in conversations(20, 1, TEXTS):
        one, two = (p.encode(messages, add_generation_prompt=prompt).tokens for p in (saved, processor))
        np.testing.assert_array_equal(one, two)


def test_a_tokenizer_saved_with_dropout(processor, tokenizer_dir, tmp_path):
    """BPE dropout, of training, would split a text into other tokens every time."""
    path = copy(tokenizer_dir, tmp_path / "a")
    data = json.loads((path / "tokenizer.json").read_text("utf-8"))
    data["model"]["dropout"] = 0.9
    (path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    text = [{"role": "user", "content": "The tokenizer splits the whole sentence. " * 9}]
    one, two = (p.encode(text).tokens for p in (Processor.from_dir(path, CONFIG), processor))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "added, says",
    [
        ({"x": {"content": "a"}}, "'x'.*its keys must be token ids"),
        ({"-5": {"content": "a"}}, "its keys must be token ids"),
        ({"9" * 5000: {"content": "a"}}, "its keys must be token ids"),
        ({"5": 1}, "'5': 1; it must be a JSON object with content"),
        ({"5": {}}, "it must be a JSON object with content"),
        ({"5": {"content": 7}}, "it must be a JSON object with content"),
        ({"5": {"content": "a", "special": "yes"}}, "must be true or false"),
        ({"151643": {"content": "a", "new": 1}}, 'added token "a" cannot have id 151643'),
        ([1], r"added_tokens_decoder is \[1\]; it must be a JSON object"),
        (None, "added_tokens_decoder is None"),
    ],
)
def test_damaged_added_tokens_are_named(added, says, tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(CheckpointError, match=says):
        _read_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------ transformers


@pytest.fixture(scope="module")
def reference(tokenizer_dir):
    from transformers import Qwen2TokenizerFast

    tokenizer = Qwen2TokenizerFast.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = json.loads((tokenizer_dir / "chat_template.json").read_text())["chat_template"]
    return tokenizer


@pytest.mark.parity
def test_ids_equal_transformers(processor, reference):
    for messages, prompt in conversations(300, 0, TEXTS):
        expected = reference.apply_chat_template(messages, add_generation_prompt=prompt)
        assert processor.encode(messages, add_generation_prompt=prompt).tokens.tolist() == expected, messages
        assert processor.render(messages, add_generation_prompt=prompt) == reference.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False
        )


@pytest.mark.parity
def test_ids_with_allowed_control_tokens_equal_transformers(processor, reference):
    texts = [t for c in CONTROL for t in (c, f"a {c} b", f"<|im_{c}end|>", c[:5], c[5:], f"{c}\u0338 é\n{c}\n")]
    different = 0
    for messages, prompt in conversations(200, 2, texts + TEXTS[:20]):
        expected = reference.apply_chat_template(messages, add_generation_prompt=prompt)
        allowed = processor.encode(messages, add_generation_prompt=prompt, allow_control_tokens=True).tokens
        assert allowed.tolist() == expected, messages
        different += processor.encode(messages, add_generation_prompt=prompt).tokens.tolist() != expected
    assert different > 100  # otherwise the texts test nothing


@pytest.mark.parity
def test_tools_equal_transformers(processor, reference):
    template = (DATA / "qwen2.5_instruct_template.jinja").read_text("utf-8")
    rng = np.random.default_rng(3)

    def text():
        return TEXTS[rng.integers(len(TEXTS))]

    for _ in range(60):
        tools = [
            {"type": "function", "function": {"name": f"f{i}", "description": text(), "parameters": {text(): [i]}}}
            for i in range(rng.integers(0, 3))
        ]
        messages = [{"role": "system", "content": text()}]
        for role in rng.choice(["user", "assistant", "call", "tool", "tool"], 6):
            messages.append({"role": "assistant" if role == "call" else str(role), "content": text()})
            if role == "call":
                calls = [{"name": text(), "arguments": {text(): text(), "n": i}} for i in range(rng.integers(1, 3))]
                messages[-1]["tool_calls"] = [{"type": "function", "function": c} for c in calls]
        options = dict(tools=tools or None, add_generation_prompt=True)
        expected = reference.apply_chat_template(messages, chat_template=template, **options)
        assert processor.encode(messages, **options).tokens.tolist() == expected, messages


def test_tokens_beyond_the_context_are_refused_before_positions(processor, monkeypatch):
    """A letter may be several tokens, so the letters alone do not bound them."""
    monkeypatch.setattr("qwenvl_jax.inputs.processor.make_sample", lambda *_, **__: pytest.fail("positions were made"))
    monkeypatch.setattr(Processor, "open", lambda *_, **__: pytest.fail("media were opened"))
    context = CONFIG.text.context
    for letter in ("\u200d", "a ", "\U0001f600"):
        content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": letter * context}]
        with pytest.raises(ContextError, match=rf"the prompt has \d+ tokens; the context of {context} must hold it"):
            processor.encode([{"role": "user", "content": content}])


@pytest.mark.parity
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_whole_processor_equals_transformers(processor, reference, family):
    """Ids, grids and seconds of conversations with pictures and clips; test_media compares patches."""
    import transformers

    kind = transformers.Qwen2VLProcessor if family == "qwen2_vl" else transformers.Qwen2_5_VLProcessor
    images = transformers.Qwen2VLImageProcessor(**json.loads((DATA / "preprocessor_config.json").read_text()))
    theirs = kind(image_processor=images, tokenizer=reference, chat_template=reference.chat_template)
    rng = np.random.default_rng(4)
    for _ in range(12):
        messages, pictures, clips = [], [], []
        for role in ["user", "assistant", "user"][: rng.integers(1, 4)]:
            items = []
            for _ in range(rng.integers(1, 5)):
                choice = 0 if role == "assistant" else rng.integers(3)
                if choice == 0:
                    items.append({"type": "text", "text": TEXTS[rng.integers(len(TEXTS))]})
                elif choice == 1:
                    pictures.append(picture(*rng.integers(28, 300, 2)))
                    items.append({"type": "image", "image": pictures[-1]})
                else:
                    clips.append([picture(336, 448, i) for i in range(2 * rng.integers(1, 4))])
                    items.append({"type": "video", "video": clips[-1], "fps": 2.0})
            messages.append({"role": role, "content": items})
        vision_id = bool(rng.integers(2))
        text = reference.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, add_vision_id=vision_id
        )
        expected = theirs(text=[text], images=pictures or None, videos=clips or None)
        sample = processor.encode(messages, add_vision_id=vision_id)
        assert sample.tokens.tolist() == expected["input_ids"][0]
        for name in ("image", "video"):
            grids = [list(v.grid) for v in sample.visuals if v.kind == name]
            assert grids == np.array(expected.get(f"{name}_grid_thw", [])).tolist()
        if clips and family == "qwen2_5_vl":
            seconds = [v.seconds_per_grid for v in sample.visuals if v.kind == "video"]
            assert seconds == expected["second_per_grid_ts"]
