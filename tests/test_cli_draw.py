"""`qwenvl generate --draw`: where pictures of answers are written, and what is refused before the model answers."""

import os
import stat
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax import cli
from qwenvl_jax.answers import sheets
from qwenvl_jax.answers.boxes import Sizes
from qwenvl_jax.answers.grounding import Object
from qwenvl_jax.answers.moments import Moment
from qwenvl_jax.cli import converse, drawing
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.errors import InputError
from qwenvl_jax.families import PRESETS
from qwenvl_jax.infer.requests import Result
from qwenvl_jax.inputs.media import frames
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.inputs.preprocessing import Preprocessing
from qwenvl_jax.inputs.video import video_visual

CONFIG = PRESETS["qwen2.5-vl-3b"]
GRAY = Image.new("RGB", (400, 400), "#808080")


def box(label, *at, image=0):
    return Object(label, "box", (at[:2], at[2:]), {}, image)


def opened(file):
    with Image.open(file) as image:
        return image.convert("RGB")


def clip(seconds, steps=3):
    frames = [Image.new("RGB", (56, 56), (40 * i, 0, 99)) for i in range(2 * steps)]
    return video_visual(frames, Preprocessing(), MediaOptions(fps=2.0))._replace(seconds_per_grid=seconds)


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".webp", ".bmp", ".tif", ".gif", ".jp2", ".avif", ".pdf"])
def test_every_format_that_holds_a_colour_picture_is_written(suffix, tmp_path):
    file = drawing.check(str(tmp_path / f"a{suffix}"))
    assert drawing.write(file, [GRAY], [box("cat", 50, 50, 350, 350)], CONFIG) == [file]
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    if suffix != ".pdf":
        assert opened(file).size == (400, 400)


@pytest.mark.parametrize("name", ["a", "a.txt", "a.xbm", "a.ico", "a.h5", "a.mp4", ".png", "a.png.", "a."])
def test_other_suffixes_are_refused(name, tmp_path):
    with pytest.raises(InputError, match=r"use \.png or \.jpg"):
        drawing.check(str(tmp_path / name))


def test_places_where_nothing_can_be_written_are_refused(tmp_path, monkeypatch):
    for where, said in (
        (tmp_path / "nowhere" / "a.png", "there is no directory"),
        (tmp_path, "name a file"),
        ("", "no file: name a file"),
        (tmp_path / "b.png" / "c.png", "there is no directory"),
    ):
        (tmp_path / "b.png").touch()
        with pytest.raises(InputError, match=said):
            drawing.check(str(where))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="not writable"):
        drawing.check(str(tmp_path / "a.png"))


def test_several_pictures_and_clips_are_numbered(tmp_path):
    on = [GRAY, clip(1.0), Image.new("RGB", (500, 400), "white")]
    things = [box("cat", 50, 50, 90, 90), box("dog", 50, 50, 90, 90, image=2), box("bird", 1, 1, 9, 9, image=1)]
    files = drawing.write(tmp_path / "a.b.png", on, things, CONFIG)
    assert [f.name for f in files] == ["a.b-1.png", "a.b-2.png", "a.b-3.png"]
    first, sheet, third = map(opened, files)
    assert first.size == (400, 400) and third.size == (500, 400)
    assert third.getpixel((50, 70)) not in ((255, 255, 255), (0, 0, 0))
    assert [i for i in range(6) if (40 * i, 0, 99) in {c for _, c in sheet.getcolors(1 << 24)}] == [0]
    assert drawing.notes(on, things, CONFIG) == ["clip 2: objects without a time (1 of 1) are drawn on the first frame"]


def test_what_the_picture_does_not_say_is_said(monkeypatch):
    monkeypatch.setattr("qwenvl_jax.answers.fonts._FOLDERS", ())
    things = [box("草莓", 1, 1, 90, 90), box("cat", 900, 900, 950, 950), box("dog", 1, 1, 9, 9, image=4)]
    lost = "2 of 3 objects are not drawn: their place or time is outside of what was given"
    assert drawing.notes([GRAY], things, CONFIG) == ["#1 is 草莓", lost]
    assert drawing.notes([GRAY] * 2, things[:1], CONFIG) == ["picture 1: #1 is 草莓"]
    assert drawing.notes([GRAY], [box("cat", 1, 1, 9, 9)], CONFIG) == []


def frame_boxes(sheet, count):
    """{frame: (x1, y1, x2, y2)} of the frames of `clip` in a sheet, found by their colours."""
    pixels, found = np.asarray(sheet), {}
    for i in range(count):
        rows, columns = (pixels == (40 * i, 0, 99)).all(-1).nonzero()
        if len(rows) > 500:
            found[i] = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return found


PLACE = '"bbox_2d": [14, 14, 42, 42], "label": "cat"'
CLIP_ANSWERS = {
    f'[{{"time": 1.0, {PLACE}}}]': [2],
    f'[{{"timestamp": "00:00.5", {PLACE}}}, {{"timestamp": "00:02.5", {PLACE}}}]': [1, 5],
    f'[{{"start_time": "0:01", "end_time": "0:02", {PLACE}}}]': [2, 3, 4],
    f'{{"time": 2, "objects": [{{{PLACE}}}]}}': [4],
    f'{{"00:01": [{{{PLACE}}}], "00:02": [{{{PLACE}}}]}}': [2, 4],
    f'[{{"time": 3.0, {PLACE}}}, {{"time": "00:02.999", {PLACE}}}]': [5],
    f'[{{"time_ms": 1500, {PLACE}}}, {{"timestamp_ms": 500, {PLACE}}}]': [1, 3],
    f'[{{"frame_id": 2.0, {PLACE}}}, {{"frame": "frame 4", {PLACE}}}]': [1, 3],
    f'[{{"frame": [1, 2], {PLACE}}}, {{"frames": ["6"], {PLACE}}}]': [0, 1, 5],
    f'[{{"start_frame": 2, "end_frame": 4, {PLACE}}}]': [1, 2, 3],
    f'[{{"frame_range": "2-4", {PLACE}}}]': [1, 2, 3],
    f'[{{"start_frame": 3, "end_frame": 1000000, {PLACE}}}]': [2, 3, 4, 5],
    f'{{"frame": 2, "objects": [{{{PLACE}}}]}}': [1],
    f'{{"frame_2": [{{{PLACE}}}], "Frame 4": [{{{PLACE}}}], "第5帧": [{{{PLACE}}}]}}': [1, 3, 4],
    '{"0.5": [14, 14, 42, 42], "2.0": [14, 14, 42, 42]}': [1, 4],
    "At 1.5 seconds, the cat is at [14, 14, 42, 42].": [3],
    "The cat is at [14, 14, 42, 42] at 0.5 seconds, and at [14, 14, 42, 42] at 2 seconds.": [1, 4],
    f'[{{"frame": 3, {PLACE}}}]': [2],
    f'[{{"frame_index": 0, {PLACE}}}, {{"frame_index": "3", {PLACE}}}]': [0, 3],
    f'[{{"text_content": "01:00", {PLACE}}}]': [0],  # a text that the clip shows
    "[14, 14, 42, 42]": [0],
    f"[{{{PLACE}}}]": [0],
    f'[{{"time": 2.9, {PLACE}}}]\nIt leaves at 2.0 seconds.': [4, 5],
    "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(14,14),(42,42)<|box_end|>": [0],
}


@pytest.mark.parametrize("text", CLIP_ANSWERS)
def test_objects_of_a_clip_are_on_the_frames_of_their_times(text, tmp_path):
    """The clip is 3 seconds long, with 6 frames of 56 × 56 pixels from a file of 112 × 112 pixels."""
    video = clip(1.0)._replace(size=(112, 112))
    result = Result(text, [5], "stop", 7, pictures=(Sizes((112, 112), (56, 56), True),), boxes="resized")
    drawing.finish(tmp_path / "a.png", [video], result, CONFIG)
    sheet = opened(tmp_path / "a.png")
    shown = frame_boxes(sheet, 6)
    assert list(shown) == CLIP_ANSWERS[text]
    pixels, marked_alone = np.asarray(sheet), 4 if "leaves" in text else None
    for i, (x1, y1, x2, y2) in shown.items():
        k, own = (x2 - x1) / 56, (40 * i, 0, 99)
        inside = pixels[y1:y2, x1:x2]
        edge = inside[round(28 * k), round(14 * k) : round(14 * k) + 2]  # of the box
        assert k > 5 and (edge != own).any(-1).all() == (i != marked_alone)
        assert all((inside[round(y * k), round(x * k)] == own).all() for x, y in ((28, 28), (50, 7), (7, 28), (50, 28)))


def test_objects_of_pictures_and_clips_of_one_answer(tmp_path, capsys):
    text = (
        '[{"image": 1, "bbox_2d": [100, 100, 300, 300], "label": "cat"},'
        ' {"video": 1, "bbox_2d": [14, 14, 42, 42], "label": "猫", "time": 99},'
        ' {"video": 2, "bbox_2d": [14, 14, 42, 42], "label": "dog", "time": 2}]'
    )
    places = (Sizes((56, 56), (56, 56), True), Sizes((400, 400), (400, 400)), Sizes((56, 56), (56, 56), True))
    result = Result(text, [5], "stop", 7, pictures=places, boxes="resized")
    drawing.finish(tmp_path / "a.png", [clip(1.0), GRAY, clip(1.0)], result, CONFIG)
    first, second, third = (opened(tmp_path / f"a-{i}.png") for i in (1, 2, 3))
    assert list(frame_boxes(first, 6)) == [0, 1, 2, 3, 4, 5] and list(frame_boxes(third, 6)) == [4]
    assert second.getpixel((100, 200)) != (128, 128, 128)
    assert "1 of 3 objects are not drawn: their place or time is outside of what was given" in capsys.readouterr().err


@pytest.mark.parametrize("text, is_span", [("[1, 2]", True), ("(20, 30)", False), ("[1.0, 2.0, 14, 42]", False)])
def test_numbers_alone_about_a_clip(text, is_span):
    result = Result(text, [5], "stop", 7, pictures=(Sizes((56, 56), (56, 56), True),), boxes="resized")
    objects, moments = drawing._said([clip(1.0)], result, CONFIG)
    assert (len(objects), len(moments)) == ((0, 1) if is_span else (1, 0))


BOX = '[{"bbox_2d": [5, 8, 40, 50], "label": "dog"}]'


@pytest.mark.parametrize(
    "text, spans",
    [
        (f"From 00:05 to 00:08, the dog jumps.\n{BOX}", [(5, 8)]),
        (f"{BOX}\nIt leaves at 8 seconds.", [(8, None)]),
        ("In Video 1 it is at [5, 10, 40, 50]. It jumps at 00:05.", [(5, None)]),
        (f'{BOX}\n[{{"start_time": 5, "end_time": 8}}]', [(5, 8)]),
        ("It is at (5, 8, 40, 50) from 5 to 8 seconds.", [(5, 8)]),
        ("(5, 8)\n(40, 50)", []),
        ("[[5, 8], [40, 50]]", []),
    ],
)
def test_times_with_the_numbers_of_a_box(text, spans):
    """A number that is a coordinate in one place may be a time in another."""
    result = Result(text, [5], "stop", 7, pictures=(Sizes((56, 56), (56, 56), True),), boxes="resized")
    objects, moments = drawing._said([clip(30.0)], result, CONFIG)
    assert objects and [m[:2] for m in moments] == spans


def test_times_of_a_clip(monkeypatch):
    said = []
    monkeypatch.setattr("qwenvl_jax.answers.sheets.contact_sheet", lambda frames, *more: said.append(more[:2]))
    moments = [Moment(1.0), Moment(2.1, 2.5)]
    for seconds in (1.0, 75.0, 0.0):
        drawing._drawn(clip(seconds), [], moments, CONFIG)
    monkeypatch.setattr("qwenvl_jax.answers.sheets.MOST_FRAMES", 2)
    drawing._drawn(clip(1.0), [], moments[:1], CONFIG)
    assert said == [
        (["0:00.0", "0:00.5", "0:01.0", "0:01.5", "0:02.0", "0:02.5"], {2, 4, 5}),
        (["0:00.0", "0:37.5", "1:15.0", "1:52.5", "2:30.0", "3:07.5"], {0}),
        (["1", "2", "3", "4", "5", "6"], set()),
        (["0:00.0", "0:01.5"], {0}),
    ]


@pytest.mark.parametrize(
    "moment, frames",
    [
        (Moment(0.0), [0]),
        (Moment(0.49), [0]),
        (Moment(0.4999), [1]),  # rounded by the model
        (Moment(1.5, 2.5), [3, 4, 5]),
        (Moment(1.6, 1.7), [3]),
        (Moment(2.5, 1.0), [5]),  # exchanged
        (Moment(3.0, 99.0), [6, 7]),
        (Moment(4.0), [7]),  # the length of the clip
        (Moment(3.999), [7]),
        (Moment(3.999, 4.0), [7]),
        (Moment(4.1), []),
        (Moment(-1.0), []),
        (Moment(-1.0, 0.6), [0, 1]),
        (Moment(1e8, 1e9), []),
    ],
)
def test_the_frames_of_a_moment(moment, frames):
    assert list(sheets.frames_of(moment, 0.5, 8)) == frames


def test_the_moments_of_an_answer_are_marked_in_its_clip(tmp_path, capsys):
    result = Result("The truck appears at 1.0 seconds.", [5], "stop", 7)
    drawing.finish(tmp_path / "a.png", [clip(1.0)], result, CONFIG)
    assert capsys.readouterr().err == f"qwenvl: drawn: {tmp_path / 'a.png'}\n"
    pixels = np.asarray(opened(tmp_path / "a.png"))
    rows, columns = (pixels == (0xD5, 0x5E, 0)).all(-1).nonzero()
    inside = pixels[(rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2]
    assert inside.tolist() == [80, 0, 99]  # the third frame


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    drawing.write(file, [GRAY], [], CONFIG)
    before = file.read_bytes()
    save = Image.Image.save

    def full(self, to, *rest, **more):
        if "-2" in str(to):
            raise OSError(28, "No space left on device")
        save(self, to, *rest, **more)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match=r"a\.png: cannot be written \(No space left on device\)"):
        drawing.write(file, [GRAY, GRAY], [], CONFIG)
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"] and file.read_bytes() == before
    with pytest.raises(InputError, match=r"a\.webp: cannot be written"):  # its sides are 16383 pixels at most
        drawing.write(tmp_path / "a.webp", [Image.new("RGB", (20_000, 30))], [], CONFIG)
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask()


def umask():
    os.umask(mask := os.umask(0))
    return mask


def test_the_pictures_are_those_of_the_messages(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 600)).save(tmp_path / "turned.jpg", exif=exif)
    video = clip(1.0)
    on = drawing.pictures([("image", str(tmp_path / "turned.jpg"), None), ("video", "clip.mp4", video)])
    assert on[0].size == (600, 400) and on[1] is video
    (file, _) = drawing.write(tmp_path / "out.png", on, [box("", 550, 50, 590, 90)], CONFIG)
    pixels = np.asarray(opened(file))
    assert pixels.shape == (400, 600, 3) and pixels[70, 550].any()
    with pytest.raises(InputError, match="no image or video to draw on"):
        drawing.pictures([])


class Engine:
    """Answers with one box in a picture that was shrunk by half."""

    config, compiling = CONFIG, None
    text = '[{"bbox_2d": [50, 50, 150, 150], "label": "cat"}]'

    def generate(self, samples, options):
        sizes = (Sizes((400, 400), (200, 200)),)
        return [Result(self.text, [5], "stop", 7, pictures=sizes, boxes="resized")]

    def stream(self, sample, options):
        pieces = iter((self.text[:9], self.text[9:]))
        return Pieces(pieces, self.generate([sample], options)[0])


class Pieces:
    def __init__(self, pieces, result):
        self._pieces, self._result, self.result = pieces, result, None

    def __iter__(self):
        yield from self._pieces
        self.result = self._result

    def close(self):
        pass


@pytest.fixture
def engine(monkeypatch, tmp_path):
    GRAY.save(tmp_path / "in.png")
    visual = SimpleNamespace(kind="image", grid=SimpleNamespace(h=14, w=14), size=(400, 400))
    monkeypatch.chdir(tmp_path)
    where = SimpleNamespace(path=".")
    sample = SimpleNamespace(visuals=[visual])

    def attach(kind, source, before):
        return visual, f"{source}: {kind}", None

    monkeypatch.setattr(converse, "encoder", lambda *_: (where, lambda messages: sample, attach))
    monkeypatch.setattr("qwenvl_jax.params.directory.read_config", lambda path: SimpleNamespace(vision=CONFIG.vision))
    monkeypatch.setattr(converse, "engine", lambda where, args, mesh: Engine())


GENERATE = ["generate", "--image", "in.png", "--prompt", "?", "--draw", "out.png"]


@pytest.mark.parametrize("more", [[], ["--json"], ["--objects"], ["--boxes", "original"]])
def test_generate_draws_in_pixels_of_the_file_and_prints_the_same(engine, more, tmp_path, capsys):
    assert cli.main([*GENERATE[:-2], *more]) == 0
    printed = capsys.readouterr().out
    assert cli.main([*GENERATE, *more]) == 0
    assert capsys.readouterr() == (printed, "qwenvl: drawn: out.png\n")
    drawn, around = np.asarray(opened(tmp_path / "out.png")), (128, 128, 128)
    lines = (drawn[200] != around).any(-1).nonzero()[0]
    assert 99 <= lines.min() <= 100 and 299 <= lines.max() <= 300


def test_chat_draws_and_prints_the_objects_of_the_last_answer(engine, monkeypatch, tmp_path, capsys):
    def read(prompt=""):
        if not lines:
            raise EOFError
        return lines.pop(0)

    lines = ["/draw", "/objects", "/draw a.txt", "/draw out.png", "hello", "/draw out.png", "/image in.png", "where?"]
    lines += ["/objects", "/draw 'out.png'"]
    monkeypatch.setattr("builtins.input", read)
    assert cli.main(["chat"]) == 0
    out, err = capsys.readouterr()
    cat = '{"label": "cat", "kind": "box", "points": [[100, 100], [300, 300]], "attributes": {}, "image": 0}'
    assert out == f'{Engine.text}\nattached in.png: image\n{Engine.text}\n{{"objects": [{cat}], "malformed": 0}}\n'
    assert err.splitlines() == [
        "qwenvl: no file: name a file to draw into, such as answer.png",
        "qwenvl: /objects is about an answer, but there is none yet that was not stopped",
        "qwenvl: a.txt: .txt is no format for it; use .png or .jpg",
        "qwenvl: /draw is about an answer, but there is none yet that was not stopped",
        "qwenvl: there is no image or video to draw on; add one",
        "qwenvl: drawn: out.png",
    ]
    assert opened(tmp_path / "out.png").getpixel((100, 200)) != (128, 128, 128)


@pytest.fixture
def clip_engine(engine, monkeypatch):
    """Answers about a clip of 6 frames of 56 × 56 pixels in 3 seconds, from a file of 112 × 112 pixels."""
    video = clip(1.0)._replace(size=(112, 112))
    found, sample = SimpleNamespace(path="."), SimpleNamespace(visuals=[video])
    tools = found, lambda messages: sample, lambda kind, source, before: (video, f"{source}: {kind}", None)
    monkeypatch.setattr(converse, "encoder", lambda *_: tools)
    monkeypatch.setattr(Engine, "text", f'[{{"time": 1.0, {PLACE}}}, {{{PLACE}}}]')
    sizes = (Sizes((112, 112), (56, 56), True),)
    answer = Result(Engine.text, [5], "stop", 7, pictures=sizes, boxes="resized")
    monkeypatch.setattr(Engine, "generate", lambda self, samples, options: [answer])


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_objects_of_a_clip_are_drawn_by_the_commands(verb, clip_engine, monkeypatch, tmp_path, capsys):
    (tmp_path / "in.mp4").touch()
    lines = ["/video in.mp4", "where?", "/draw out.png"]
    monkeypatch.setattr("builtins.input", lambda prompt="": lines.pop(0) if lines else "/quit")
    flags = [] if verb == "chat" else ["--video", "in.mp4", "--prompt", "where?", "--draw", "out.png"]
    assert cli.main([verb, *flags]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "qwenvl: objects without a time (1 of 2) are drawn on the first frame",
        "qwenvl: drawn: out.png",
    ]
    sheet = opened(tmp_path / "out.png")
    shown = frame_boxes(sheet, 6)
    assert list(shown) == [0, 2]
    for i, (x1, y1, x2, y2) in shown.items():
        k = (x2 - x1) / 56
        at = [sheet.getpixel((x1 + round(x * k) + 1, (y1 + y2) // 2)) for x in (14, 28)]
        assert at[0] != (40 * i, 0, 99) == at[1]


def test_objects_of_a_clip_are_drawn_from_python():
    video = clip(1.0)._replace(size=(112, 112))
    text = f'[{{"timestamp": "0:02", {PLACE}}}]'
    result = Result(text, [5], "stop", 7, pictures=(Sizes((112, 112), (56, 56), True),), boxes="resized")
    (thing,) = result.objects("resized").objects
    assert thing == Object("cat", "box", ((14, 14), (42, 42)), {"timestamp": "0:02"})
    sheet = sheets.draw_clip(frames(video, CONFIG), video.seconds_per_grid / 2, [thing])
    assert list(frame_boxes(sheet, 6)) == [4]
    assert len(frame_boxes(sheets.draw_clip(frames(video, CONFIG), 0.5, [], [Moment(1.0)]), 6)) == 6
    assert sheets.places([thing], 0.0, 6) == [set()]  # the clip has no times


def test_generate_refuses_before_it_reads_the_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(converse, "encoder", lambda *_: pytest.fail("it came too far"))
    assert cli.main(["generate", "--prompt", "?", "--draw", str(tmp_path / "a.txt")]) == 2
    assert "use .png or .jpg" in capsys.readouterr().err


def test_an_answer_without_objects_is_said_so(engine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Engine, "text", "I see a cat.")
    assert cli.main(GENERATE) == 0
    out, err = capsys.readouterr()
    assert out == "I see a cat.\n"
    assert err == "qwenvl: the answer places nothing in the pictures\nqwenvl: drawn: out.png\n"
    assert opened(tmp_path / "out.png").getcolors() == [(160_000, (128, 128, 128))]


@pytest.mark.parametrize("side, stored", [(140, None), (1120, None), (700, Image.Transpose.ROTATE_90)])
def test_the_demo_locates_in_pictures_of_any_size(side, stored, tmp_path, capfd):
    """Drawn at the same places of the picture, however it is stored; the README shows the first one.

    stored: how the pixels in the file are turned, which the file's EXIF says.
    """
    with Image.open(SAMPLES / "scene.png") as scene:
        scene, exif = scene.resize((side, side)), Image.Exif()
    exif[0x0112] = 1 if stored is None else 6
    (scene if stored is None else scene.transpose(stored)).save(tmp_path / "scene.png", exif=exif)
    prompt = ["--prompt", "Locate every strawberry.", "--max-pixels", "19600"]
    argv = ["generate", "--image", str(tmp_path / "scene.png"), *prompt, "--draw", str(tmp_path / "out.png")]
    assert cli.main(argv) == 0
    assert capfd.readouterr().out.count("strawberry") == 3
    drawn = opened(tmp_path / "out.png")
    shown = opened(SAMPLES.parent / "located.png")
    assert drawn.size == ((420, 420) if side == 140 else (side, side))
    for picture in (drawn, shown):
        for x, y in ((10, 50), (30, 25), (90, 80), (110, 111), (0.5, 100), (20, 131)):  # on the lines of three boxes
            k = picture.width / 140
            near = np.asarray(picture, int)[max(round(y * k) - 5, 0) :, max(round(x * k) - 5, 0) :][:11, :11]
            assert (np.abs(near - (0xD5, 0x5E, 0)).max(-1) < 12).any(), (x, y)
