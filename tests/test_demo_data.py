"""What the demo is asked, drawn from stand-ins for the fonts, emoji and tables, and its tokenizer."""

import colorsys
import csv
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from demo import charts, clips, fonts, lines, scenes
from demo.assets import VARIABLE, WEBFONTS, find_assets
from demo.canvas import contrast
from demo.emoji import EMOJI, NAMES, plural, sprite
from demo.questions import ALL
from demo.render import TASKS, WEIGHTS, Scenes
from demo.score import second_questions
from demo.sheet import contact_sheet
from demo.tables import _SECTORS, Series, tables
from demo.tokenizer import CHAT_TEMPLATE, SPECIAL, special_ids, vocabulary, write_processor
from PIL import Image, ImageFont

from qwenvl_jax.config import Config, TextConfig, VisionConfig
from qwenvl_jax.errors import InputError
from qwenvl_jax.inputs.processor import Processor

DATA = Path(__file__).parent / "data" / "tokenizer"
COLOURS = {  # as unlike each other as so many can be
    name: tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / len(NAMES), (1, 0.75)[i % 2], (0.9, 0.6)[i // 2 % 2]))
    for i, name in enumerate(NAMES)
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Stand-ins, laid out as the two commands of `find_assets` leave the real ones."""
    root = tmp_path_factory.mktemp("assets")
    face = ImageFont.load_default(20).font_bytes
    for name in itertools.chain(*fonts.FONTS.values(), *fonts.UNSEEN_FONTS.values()):
        folder = root / ("node_modules/@fontsource" if name.endswith(".woff") else "trdg/fonts/latin")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(face)
    words = root / "trdg/dicts/en.txt"
    words.parent.mkdir()
    words.write_text("\n".join("".join(w) for w in itertools.product("pqrstu", "aeiou", "lmn", "ai")))

    folder = root / "node_modules/emoji-datasource-google/img/google/64"
    folder.mkdir(parents=True)
    for name, code in EMOJI.items():
        image = Image.new("RGBA", (64, 64))
        image.paste((*COLOURS[name], 255), (4, 10, 60, 50))  # a rectangle, so that every pixel of its box counts
        image.save(folder / f"{code}.png")

    folder = root / "vega_datasets/_data"
    folder.mkdir(parents=True)
    days = [f"2012/{1 + i // 28:02}/{1 + i % 28:02}" for i in range(336)]
    months = [f"{2006 + i // 12}-{1 + i % 12:02}-01" for i in range(120)]
    states = [a + b for a in "ABCD" for b in "KLMN"]
    hours = [f"{h:02}:00" for h in range(24)]
    tables = {
        "airports.csv": [{"state": s, "city": f"Port {s}"} for i, s in enumerate(states) for _ in range(5 + 3 * i)],
        **{f"{city}-temps.csv": [{"date": f"{d} {h}", "temp": 40 + i + j / 7} for i, d in enumerate(days[:60])
                                 for j, h in enumerate(hours)] for city in ("seattle", "sf")},
        "seattle-weather.csv": [
            {"date": d, "temp_max": i / 8 + 1, "wind": i % 9 + i / 999, "precipitation": i % 3 + i / 99}
            for i, d in enumerate(days)
        ],
        "us-employment.csv": [{"month": m} | {c: 1000 * (k + 2) + i for k, c in enumerate(_SECTORS)}
                              for i, m in enumerate(months)],
        "iowa-electricity.csv": [{"source": s, "year": f"{y}-01-01", "net_generation": 1000 * (y - 1990)}
                                 for s in ("Wind", "Coal") for y in range(2000, 2017)],
    }  # fmt: skip
    for name, rows in tables.items():
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    wheat = [{"year": str(1565 + 5 * i), "wheat": 30 + i} | ({"wages": 5 + i / 4} if i < 40 else {}) for i in range(48)]
    crimea = [{"date": m, "wounds": i * i, "disease": 3 * i, "other": 7 + i} for i, m in enumerate(months[:24])]
    for name, rows in (("wheat", wheat), ("crimea", crimea)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return find_assets(root)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    ids = special_ids()
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "eos_token_id")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>")
    text = TextConfig(
        vocab_size=len(vocabulary()) + len(SPECIAL), hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, mrope_section=(2, 2, 2),
    )  # fmt: skip
    vision = VisionConfig(
        depth=2, hidden_size=32, intermediate_size=44, out_hidden_size=48, num_heads=2, hidden_act="silu",
        window_size=112, fullatt_block_indexes=(1,),
    )  # fmt: skip
    config = Config(
        family="qwen2_5_vl", text=text, vision=vision, **{n: ids[t] for n, t in zip(names, tokens, strict=True)}
    )
    return Processor.from_dir(write_processor(tmp_path_factory.mktemp("processor")), config)


@pytest.fixture
def gray(monkeypatch):
    """Backgrounds that no emoji of the stand-ins can be mistaken for."""
    for module in (scenes, clips):

        def plain(rng, w, h):
            return Image.new("RGB", (w, h), (127,) * 3), np.full(3, 127)

        monkeypatch.setattr(module, "background", plain)


def near(image, name: str) -> np.ndarray:
    """Which pixels have an emoji's colour, but for the noise that is laid over some pictures."""
    return (abs(np.asarray(image).astype(int) - COLOURS[name]) <= 14).all(-1)


def blobs(mask: np.ndarray) -> int:
    """How many pieces hang together."""
    left, n = {tuple(p) for p in np.argwhere(mask)}, 0
    while left:
        n, edge = n + 1, [left.pop()]
        while edge:
            y, x = edge.pop()
            for p in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if p in left:
                    left.remove(p)
                    edge.append(p)
    return n


def named(question: str) -> str:
    """The emoji that a question is about."""
    words = question.rstrip("?.").split()
    (kind,) = [n for n in NAMES if n in words or plural(n) in words]
    return kind


def media(record: dict):
    item = record["messages"][0]["content"][0]
    return item[item["type"]]


def question(record: dict) -> str:
    return record["messages"][0]["content"][1]["text"]


# --- the source of records ---


def test_further_questions_about_the_same_picture(assets, gray):
    """They follow the one that a record has anyway, and their answers hold for the picture."""
    one, four = Scenes(assets), Scenes(assets, turns=4)
    for task in WEIGHTS:
        more = 0
        for i in range(8):
            short, long = one.record(task, i), four.record(task, i)
            assert question(short) == question(long) and short["messages"][1] == long["messages"][1]
            assert np.array_equal(np.asarray(media(short)), np.asarray(media(long)))
            assert [m["role"] for m in long["messages"]] == ["user", "assistant"] * (len(long["messages"]) // 2)
            assert len(long["messages"]) <= 8
            for asked, said in zip(long["messages"][2::2], long["messages"][3::2], strict=True):
                more += 1
                asked, said = asked["content"], said["content"]
                if task == "clip":
                    there = [near(frame, named(asked)).any() for frame in media(long)]
                    assert said == f"{there.index(True) / clips.FPS} seconds"
                elif task in ("name", "count", "locate"):
                    mask = near(media(long), named(asked))
                    if said.isdigit():
                        assert blobs(mask) == int(said)
                    else:
                        boxes = [box["bbox_2d"] for box in json.loads(said)]
                        assert blobs(mask) == len(boxes)
                        for x1, y1, x2, y2 in boxes:
                            assert mask[y1:y2, x1:x2].all()
        assert (more > 0) == (task not in ("ocr", "list"))


def test_lists_name_everything_in_order(assets, gray):
    """Names go from the top row to the bottom one, from left to right, and name all that is drawn."""
    source = Scenes(assets)
    for i in range(20):
        record = source.record("list", i)
        image, names = media(record), record["answer"].split(", ")
        assert all(near(image, name).any() for name in names)
        if len(set(names)) == len(names) > 1:  # each once: the columns of a row go up
            centres = {name: np.argwhere(near(image, name)).mean(0) for name in names}
            for a, b in itertools.pairwise(names):
                (ya, xa), (yb, xb) = centres[a], centres[b]
                assert yb > ya - 44 and (yb > ya + 12 or xb > xa)


def test_easy_pictures(assets):
    """A few characters or letters set apart, and an emoji that fills its picture."""
    easy = Scenes(assets, easy=1.0)
    records = [easy.record("ocr", i) for i in range(60)]
    assert all(media(r).width <= lines.MAX_WIDTH and media(r).width % 28 == 0 for r in records)
    assert 15 < sum(len(r["answer"]) <= 3 for r in records) < 50
    room = [
        np.median([media(r).width / len(r["answer"]) for r in some if 3 < len(r["answer"]) < 10])
        for some in (records, [Scenes(assets).record("ocr", i) for i in range(60)])
    ]
    assert room[0] > 1.3 * room[1]
    for i in range(10):
        record = easy.record("name", i)
        assert media(record).width == media(record).height <= 84
        assert near(media(record), record["answer"]).mean() > 0.2


def test_second_questions_are_about_one_thing_more(assets):
    clips, scenes = (second_questions(assets, 4)[i : i + 4] for i in (0, 4))
    for record, other in zip(clips, Scenes(assets, "evaluation", weights={"clip": 1}), strict=False):
        (item, text), answer = record["messages"][0]["content"], record["messages"][1]["content"]
        assert item["type"] == "video" and record["task"] == "second_clip" and answer.endswith(" seconds")
        assert text["text"] != other["messages"][0]["content"][1]["text"]
    assert all(r["task"] == "second_count" and r["messages"][1]["content"].isdecimal() for r in scenes)


def test_a_record_depends_on_its_number_alone(assets):
    train, again = Scenes(assets), pickle.loads(pickle.dumps(Scenes(assets)))
    other = [Scenes(assets, seed=1), Scenes(assets, "evaluation")]
    for i in reversed(range(30)):
        a, b = train[i], again[i]
        assert np.array_equal(np.asarray(media(a)), np.asarray(media(b)))
        assert (question(a), a["answer"], a["task"], a["metric"]) == (question(b), b["answer"], b["task"], b["metric"])
        assert a["messages"][1] == {"role": "assistant", "content": a["answer"]}
        for source in other:
            c = source.record(a["task"], i)
            assert not np.array_equal(np.asarray(media(a)), np.asarray(media(c)))


def test_mixture(assets):
    source = Scenes(assets, weights={"name": 3, "count": 1}, length=400)
    tasks = [source[i]["task"] for i in range(len(source))]
    assert tasks.count("name") == pytest.approx(300, abs=2)
    assert {tasks[i : i + 5].count("count") for i in range(396)} <= {1, 2}  # spread evenly
    with pytest.raises(IndexError):
        source[400]


@pytest.mark.parametrize(
    "split, weights, message",
    [
        ("test", None, "split is 'test'"),
        ("train", {"ocr": 0}, "'ocr': 0"),
        ("train", {"sing": 1}, "tasks are ocr, "),
        ("train", {"ocr_unseen_fonts": 1}, "evaluation only"),
    ],
)
def test_bad_mixtures(assets, split, weights, message):
    with pytest.raises(InputError, match=message):
        Scenes(assets, split, weights=weights)


@pytest.mark.parametrize("missing", ["trdg/dicts", "node_modules/@fontsource/lora", "vega_datasets/_data"])
def test_missing_assets_are_named(assets, missing, tmp_path, monkeypatch):
    root = assets.words.parents[2]
    monkeypatch.setenv(VARIABLE, str(root))
    assert find_assets() == assets
    for folder in {p.parent for p in root.rglob("*") if p.is_file()}:
        target = tmp_path / folder.relative_to(root)
        if not str(folder.relative_to(root)).startswith(missing):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(folder)
    with pytest.raises(InputError, match=f"{missing}.*\n.*\n  pip install .* trdg.*\n  npm install .*emoji") as e:
        find_assets(tmp_path)
    assert all(name in str(e.value) for name in WEBFONTS)


def test_contact_sheet(assets):
    source = Scenes(assets)
    sheet = contact_sheet([source.record(task, 0) for task in WEIGHTS], columns=3)
    assert sheet.width == 900 and len(sheet.getcolors(10**6)) > 100


# --- emoji ---


def test_located_boxes_hold_every_pixel(assets, gray):
    for i in range(60):
        record = Scenes(assets, weights={"locate": 1})[i]
        found, mask = json.loads(record["answer"]), near(media(record), named(question(record)))
        cells = [((y1 + y2) // 56, (x1 + x2) // 56) for x1, y1, x2, y2 in (b["bbox_2d"] for b in found)]
        assert cells == sorted(cells)  # the order of the visual tokens that hold their centres
        assert 1 <= len(found) <= 3
        assert "is the" not in question(record).lower() or len(found) == 1
        for box in found:
            x1, y1, x2, y2 = box["bbox_2d"]
            assert box["label"] == named(question(record))
            assert mask[y1:y2, x1:x2].all()
            mask[y1:y2, x1:x2] = False
        assert not mask.any()  # and nothing of the kind is left out
        assert record["answer"] == json.dumps(found)


def test_counts_and_names(assets, gray):
    counts = set()
    for i in range(60):
        record = Scenes(assets, weights={"count": 1})[i]
        assert blobs(near(media(record), named(question(record)))) == int(record["answer"])
        counts.add(record["answer"])
        record = Scenes(assets, weights={"name": 1})[i]
        assert blobs(near(media(record), record["answer"])) == 1
    assert counts == set("123456")


def test_nothing_overlaps_or_is_cut_off(assets):
    rng = np.random.default_rng(0)
    for _ in range(50):
        image, kinds, boxes = scenes.scene(rng, assets, [6, 3, 2], sizes=(24, 48), side=(140, 196))
        assert set(boxes) == set(kinds) and not {s % 28 for s in image.size} - {0}
        every = [box for found in boxes.values() for box in found]
        for x1, y1, x2, y2 in every:
            assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height
        for a, b in itertools.combinations(every, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_sprites_are_cropped(assets):
    drawn = sprite(assets.emoji, "dog", 28)
    assert drawn.image.size == (28, 20) == drawn[1:]  # of a rectangle of 56 × 40 pixels
    assert np.asarray(drawn.image)[..., 3].min() > 64


def test_names_are_told_apart():
    assert len({*EMOJI.values()}) == len(NAMES) >= 100
    assert all(name.isalpha() and name.islower() for name in NAMES)
    assert [plural(n) for n in ("dog", "cherry", "fox", "mouse", "tomato", "key", "peach")] == [
        "dogs", "cherries", "foxes", "mice", "tomatoes", "keys", "peaches",
    ]  # fmt: skip


# --- clips ---


def test_clips_tell_the_time(assets, gray):
    for i in range(40):
        record = Scenes(assets, weights={"clip": 1})[i]
        frames = media(record)
        seconds, unit = record["answer"].split()
        there = [near(frame, named(question(record))).sum() for frame in frames]
        first = int(float(seconds) * clips.FPS)
        assert unit == "seconds" and 1 <= first < len(frames) - 1
        assert len(frames) % 2 == 0 and 6 <= len(frames) / clips.FPS <= 10
        assert set(there[:first]) == {0}
        assert len(set(there[first:])) == 1 and there[first] >= 100  # whole from then on


# --- lines of text ---


def test_held_out_texts(assets):
    """Every word, place, number, date, price and code is on one side only."""
    texts = {
        split: {Scenes(assets, split, weights={"ocr": 1})[i]["answer"] for i in range(400)}
        for split in ("train", "evaluation")
    }
    for split, found in texts.items():
        for text in found:
            words = text.split() if text.replace(" ", "").isalpha() and not text.lower().startswith("port") else [text]
            assert {lines.held_out(w) for w in words} == {split == "evaluation"}, text
            assert 3 <= len(text) <= lines.MAX_CHARS or any(c.isdigit() for c in text)
    assert len(texts["train"]) > 200


def test_text_is_not_cut_off(assets, monkeypatch):
    def white(rng, w, h):
        return Image.new("RGB", (w, h), "white"), np.full(3, 255)

    monkeypatch.setattr(lines, "background", white)
    monkeypatch.setattr(lines, "grain", lambda rng, image: image)
    rng = np.random.default_rng(0)
    for text in ("i", "Wg" * 8, "Tully's", "WWWWWWWWWWWWWWWW") * 20:
        image = np.asarray(lines._picture(rng, assets, "DroidSans.ttf", text)[0].convert("L"))
        assert image.shape[0] in (28, 56) and image.shape[1] % 28 == 0 and image.shape[1] <= lines.MAX_WIDTH
        assert image.min() < 160
        frame = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert frame.min() > 180


def test_ink_stands_out():
    rng = np.random.default_rng(0)
    luma = np.array([0.299, 0.587, 0.114])
    for ground in rng.integers(0, 256, (300, 3)):
        assert abs(luma @ ground - luma @ contrast(rng, ground)) > 108


def test_unseen_fonts_are_unseen(assets):
    seen = set(itertools.chain(*fonts.FONTS.values()))
    unseen = set(itertools.chain(*fonts.UNSEEN_FONTS.values()))
    assert not seen & unseen and set(fonts.PLAIN) <= seen
    rng = np.random.default_rng(0)
    assert {fonts.pick(rng)[1] for _ in range(2000)} == seen
    assert {fonts.pick(rng, unseen=True)[1] for _ in range(400)} == unseen


def test_real_fonts_draw_every_character():
    try:
        assets = find_assets()
    except InputError:
        pytest.skip(f"{VARIABLE} does not point to the fonts")
    for file in itertools.chain(*fonts.FONTS.values(), *fonts.UNSEEN_FONTS.values()):
        face = fonts.font(assets, file, 24)
        lacking = bytes(face.getmask("\uffff"))
        for c in map(chr, (*range(33, 127), *map(ord, "€£"))):
            assert bytes(face.getmask(c)) != lacking, (file, c)


# --- charts ---


@pytest.fixture
def drawn(monkeypatch):
    """What the last chart was drawn from."""
    seen, draw = {}, charts._draw

    def spy(rng, width, height, face, heading, series, texts):
        seen.update(series=series, texts=texts)
        return draw(rng, width, height, face, heading, series, texts)

    monkeypatch.setattr(charts, "_draw", spy)
    return seen


def test_chart_answers(assets, drawn):
    kinds = set()
    for i in range(150):
        record = Scenes(assets, "evaluation", weights={"chart": 1})[i]
        series, asked = drawn["series"], question(record)
        values = dict(zip(series.labels, series.values, strict=True))
        assert 3 <= len(values) == len(series.values) <= charts.MOST
        if record["metric"] == "relaxed":
            (label,) = [label for label in values if label in asked.rstrip("?.").split()]
            rounding = 0.5 if max(values.values()) >= 20 else 0.05
            assert float(record["answer"]) == pytest.approx(values[label], abs=rounding + 1e-9)
            assert drawn["texts"] is None or record["answer"] in drawn["texts"]
            assert drawn["texts"] or values[label] >= 0.2 * max(values.values())
            kinds.add("value")
        else:
            most = any(word in asked for word in ("highest", "largest"))
            assert values[record["answer"]] == (max if most else min)(values.values())
            assert list(values.values()).count(values[record["answer"]]) == 1
            kinds.add("highest" if most else "lowest")
        assert media(record).size in charts.SIZES
    assert kinds == {"value", "highest", "lowest"}


def test_bars_are_as_high_as_their_values(assets):
    face = fonts.font(assets, fonts.PLAIN[0], 12)
    series = Series("Title", ("a", "b", "c"), (10.0, 20.0, 40.0))
    bars = 0
    for seed in range(20):
        image = np.asarray(charts._draw(np.random.default_rng(seed), 196, 168, face, face, series, None)[0])
        ink = [c for c in charts._INKS if (image == c).all(-1).sum() > 1000]
        if ink:  # bars, not a line
            heights = (image == ink[0]).all(-1).sum(0)
            tallest = [h for h, _ in itertools.groupby(heights) if h > 10]
            assert tallest == pytest.approx([tallest[2] / 4, tallest[2] / 2, tallest[2]], abs=1)
            bars += 1
    assert bars > 5


@pytest.mark.parametrize("high", [0.3, 1, 2.2, 9.9, 10, 47, 263, 5000])
def test_ticks(high):
    marks = charts._ticks(high)
    assert marks[0] == 0 and marks[-2] < high <= marks[-1] * (1 + 1e-9) and 4 <= len(marks) <= 6


def test_tables_are_cut_in_two(assets):
    train, evaluation = (
        [{(s.title, *point) for s in table for point in zip(s.labels, s.values, strict=True)} for table in part]
        for part in (tables(assets, False), tables(assets, True))
    )
    for mine, theirs in zip(train, evaluation, strict=True):
        assert 0.7 < len(mine) / (len(mine) + len(theirs)) < 0.8
        assert not mine & theirs


# --- tokenizer ---


def test_fixed_texts_are_whole_words(processor):
    def count(text):
        return len(processor.tokenizer.encode(text, add_special_tokens=False).ids)

    for form in ALL:
        for text in (form, form[0].lower() + form[1:]):
            text = text.replace("{}", "pineapples")
            assert count(text) == len(text.rstrip("?.").split()) + 1
    for name in NAMES:
        assert [count(text) for text in (name, f" {name}", plural(name), f" {plural(name)}")] == [1] * 4
    boxes = [{"bbox_2d": [1, 23, 145, 6], "label": "dog"}] * 2
    assert count(json.dumps(boxes)) == 2 * (7 + 3 + 1 + 1) + 3
    assert count("3.5 seconds") == 4
    assert count("2024") == 4
    assert count("xylophone") == 9


def test_round_trips(processor):
    for text in json.loads((DATA / "texts.json").read_text("utf-8")):
        ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
        decoded = processor.decode(ids, skip_special_tokens=False)
        assert decoded == processor.tokenizer.normalizer.normalize_str(text)


def test_every_task_encodes_at_its_own_size(assets, processor):
    """No picture is resized, and a record is short."""
    for task in TASKS:
        source = Scenes(assets, "evaluation", weights={task: 1})
        for record in (source[i] for i in range(10)):
            sample = processor.encode(record["messages"], add_generation_prompt=False)
            (visual,) = sample.visuals
            pixels = np.asarray(media(record))
            assert (visual.grid.h * 14, visual.grid.w * 14) == pixels.shape[-3:-1]
            assert sample.tokens.max() < processor.config.text.vocab_size
            if task == "clip":
                assert visual.grid.t * 2 == len(pixels) and visual.seconds_per_grid == 1
            assert len(sample.tokens) < 200
            assert processor.decode(sample.tokens).endswith(f"assistant\n{record['answer']}\n")


def test_files_are_the_same_each_time(tmp_path):
    first, second = write_processor(tmp_path / "a"), write_processor(tmp_path / "b")
    write_processor(second)
    files = sorted(p.name for p in first.iterdir())
    assert files == sorted(p.name for p in second.iterdir())
    assert files == sorted([*(p.name for p in DATA.glob("*_config.json")), "chat_template.json", "tokenizer.json"])
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_template_is_qwens():
    assert json.loads((DATA / "chat_template.json").read_text("utf-8"))["chat_template"] == CHAT_TEMPLATE


@pytest.mark.parity
def test_transformers_reads_the_same_tokens(processor, tmp_path):
    from transformers import AutoTokenizer, Qwen2VLImageProcessor

    theirs = AutoTokenizer.from_pretrained(write_processor(tmp_path))
    assert theirs.is_fast and (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert {t: theirs.convert_tokens_to_ids(t) for t in SPECIAL} == special_ids()
    texts = [*json.loads((DATA / "texts.json").read_text("utf-8")), *ALL, '[{"bbox_2d": [1, 2, 3, 4], "label": "dog"}]']
    for text in texts:
        ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids
        assert theirs.decode(ids) == processor.decode(ids, skip_special_tokens=False)
    messages = [{"role": "user", "content": "What is it?"}]
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == processor.render(messages)
    assert theirs(prompt)["input_ids"] == processor.encode(messages).tokens.tolist()
    settings = Qwen2VLImageProcessor.from_pretrained(tmp_path)
    pixels = settings(Image.new("RGB", (196, 112)), return_tensors="np")
    assert pixels["image_grid_thw"].tolist() == [[1, 8, 14]]


def test_shuffled_questions_are_the_same_in_any_order(assets):
    def asked(index, shuffled):
        messages = Scenes(assets, turns=9, shuffled=shuffled).record("clip", index)["messages"]
        texts = [m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"] for m in messages]
        return list(zip(texts[::2], texts[1::2], strict=True))

    pairs = [(asked(i, False), asked(i, True)) for i in range(20)]
    assert all(sorted(plain) == sorted(mixed) for plain, mixed in pairs)
    assert sum(plain[0] != mixed[0] for plain, mixed in pairs) > 5
