"""Answers as pictures: what is drawn where, in which colours, and that labels can be read."""

import itertools
import math
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from timing import timed

from qwenvl_jax.answers import draw as module
from qwenvl_jax.answers import fonts
from qwenvl_jax.answers.draw import draw, legend, outside
from qwenvl_jax.answers.grounding import Object
from qwenvl_jax.answers.sheets import contact_sheet, draw_clip
from qwenvl_jax.errors import InputError

BACKGROUNDS = ("white", "#D55E00", "#808080", "#F0E442")
PALETTE = {tuple(bytes.fromhex(c[1:])) for c in module._PALETTE}


def box(label, x1, y1, x2, y2, **attributes):
    return Object(label, "box", ((x1, y1), (x2, y2)), attributes)


def point(label, x, y, **attributes):
    return Object(label, "point", ((x, y),), attributes)


def polygon(label, *points):
    return Object(label, "polygon", points, {})


def crowd(count, size, seed=0):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        x, y = rng.uniform(0, size[0] * 0.95), rng.uniform(0, size[1] * 0.95)
        across, down = rng.uniform(0.01, 0.06) * size[0], rng.uniform(0.01, 0.06) * size[1]
        found.append(box(rng.choice(["car", "bus", "person"]), x, y, x + across, y + down))
    return found


@pytest.fixture
def written(monkeypatch):
    """The labels that `draw` writes: (text, rectangle with its lower right pixel, background, ink)."""
    labels, backgrounds = [], []
    rectangle, text = ImageDraw.ImageDraw.rectangle, ImageDraw.ImageDraw.text

    def spy_rectangle(self, xy, fill=None, outline=None, width=1):
        if fill is not None:
            backgrounds.append((tuple(xy), fill))
        rectangle(self, xy, fill, outline, width)

    def spy_text(self, xy, said, fill=None, font=None, anchor=None):
        at, background = backgrounds[-1]
        drawn = font.getbbox(said, anchor=anchor)
        assert at[0] <= xy[0] + drawn[0] and xy[0] + drawn[2] <= at[2] + 1, "letters leave their label"
        assert at[1] <= xy[1] + drawn[1] and xy[1] + drawn[3] <= at[3] + 1, "letters leave their label"
        labels.append((said, at, background, fill))
        text(self, xy, said, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", spy_rectangle)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy_text)
    return labels


SIZES = [(30, 30), (140, 140), (640, 480), (480, 640), (2000, 300), (1500, 2000)]


@pytest.mark.parametrize("size, background", [*((s, "black") for s in SIZES), *((SIZES[2], c) for c in BACKGROUNDS)])
def test_a_box_is_where_its_coordinates_say(size, background):
    width, height = size
    x1, y1, x2, y2 = width // 5, height // 4, 4 * width // 5, 3 * height // 4
    before = Image.new("RGB", size, background)
    after = draw(before, [box("", x1, y1, x2, y2)])
    k = after.width // width
    assert after.size == (width * k, height * k) and (k == 1) == (min(size) >= 320 or max(size) * 2 > 4096)
    assert min(after.size) >= 300
    pixels = np.asarray(after)
    edge = pixels[y1 * k : y2 * k, x1 * k]
    (colour,) = {tuple(p) for p in edge}
    assert colour in PALETTE
    for line in (
        pixels[y1 * k : y2 * k, x2 * k - 1],
        pixels[y1 * k, x1 * k : x2 * k],
        pixels[y2 * k - 1, x1 * k : x2 * k],
    ):
        assert {tuple(p) for p in line} == {colour}
    # One of the lines beside it is seen on any background: one is white, the other black.
    line = (pixels[(y1 + y2) * k // 2, x1 * k : (x1 + x2) * k // 2] != colour).any(-1).argmax()
    assert pixels[(y1 + y2) * k // 2, [x1 * k - 1, x1 * k + line]].tolist() == [[255] * 3, [0] * 3]
    inside = pixels[(y1 + y2) * k // 2, (x1 + x2) * k // 2]
    assert tuple(inside) == before.getpixel((0, 0))
    assert before.getpixel((x1, y1)) == before.getpixel((0, 0))  # a copy was drawn on


def contrast(a, b):
    def light(c):
        c = [v / 255 for v in c]
        c = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in c]
        return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


def test_points_and_polygons_are_where_they_should_be():
    corners = [(100, 300), (300, 250), (320, 330), (120, 380)]
    pixels = np.asarray(draw(Image.new("RGB", (400, 400)), [point("", 200, 100), polygon("", *corners)]))
    colour = tuple(pixels[100, 200])
    assert colour in PALETTE
    reach = np.argwhere((pixels[:200] == colour).all(-1))
    assert abs(reach.mean(0) - (100, 200)).max() <= 0.5 and reach.max(0)[0] <= 106
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        for t in (0.25, 0.5, 0.75):
            x, y = round(x1 + t * (x2 - x1)), round(y1 + t * (y2 - y1))
            assert (pixels[y - 1 : y + 2, x - 1 : x + 2] == colour).all(-1).any()
    assert tuple(pixels[315, 210]) == (0, 0, 0)


LAYOUTS = {
    "one": [box("cat", 100, 100, 200, 200)],
    "whole picture": [box("sky", 0, 0, 400, 400), box("ground", 0, 0, 400, 400)],
    "corners": [
        box(n, x, y, x + 40, y + 40) for n, x, y in zip("abcd", (0, 360, 0, 360), (0, 0, 360, 360), strict=True)
    ],
    "same place": [box(f"label {i}", 150, 150, 250, 250) for i in range(12)],
    "nested": [box(f"level {i}", 10 * i, 10 * i, 400 - 10 * i, 400 - 10 * i) for i in range(15)],
    "row of points": [point(f"p{i}", 15 + 12 * i, 200) for i in range(30)],
    "lines of text": [
        box("", 20, 20 + 18 * i, 380, 34 + 18 * i, text_content=f"a line of text {i}") for i in range(20)
    ],
    "long": [box("word " * 60, 10, 10, 60, 60), box("x" * 100_000, 300, 300, 390, 390)],
    "crowd": crowd(150, (400, 400)),
}


@pytest.mark.parametrize("size", [(400, 400), (1200, 1200), (40, 40), (400, 50), (60, 800)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_are_inside_and_do_not_overlap(layout, size, written):
    fit = [
        o._replace(points=tuple((x * size[0] / 400, y * size[1] / 400) for x, y in o.points)) for o in LAYOUTS[layout]
    ]
    picture = draw(Image.new("RGB", size), fit)
    assert written
    for _, (x1, y1, x2, y2), *_ in written:
        assert 0 <= x1 <= x2 < picture.width and 0 <= y1 <= y2 < picture.height
    for (_, a, *_), (_, b, *_) in itertools.combinations(written, 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


@pytest.mark.parametrize("layout", ["one", "corners", "same place", "nested"])
def test_every_label_finds_a_place_where_there_is_room(layout, written):
    draw(Image.new("RGB", (400, 400)), LAYOUTS[layout])
    assert sorted(text for text, *_ in written) == sorted(o.label for o in LAYOUTS[layout])


def test_a_label_hides_neither_its_object_nor_others(written):
    draw(
        Image.new("RGB", (400, 400)), [box("cat", 100, 100, 200, 200), box("dog", 100, 60, 200, 98), point("p", 80, 90)]
    )
    for _, (x1, y1, x2, y2), *_ in written:
        for a, b, c, d in ((100, 100, 200, 200), (100, 60, 200, 98), (80, 90, 80, 90)):
            assert x2 < a or x1 > c or y2 < b or y1 > d


def test_letters_can_be_read(written):
    """Their height follows the picture, and they contrast with their label."""
    for side, low, high in ((30, 11, 16), (400, 11, 16), (1000, 20, 40), (4000, 80, 120)):
        written.clear()
        draw(Image.new("RGB", (side, side)), [box("cat", 0.2 * side, 0.2 * side, 0.8 * side, 0.8 * side)])
        ((_, (_, y1, _, y2), *_),) = written
        assert low < y2 - y1 + 1 < 1.6 * high
    for name in ("a", "b", "c", "d", "e", "f", "g"):
        draw(Image.new("RGB", (400, 400)), [box(name, 50, 50, 90, 90)])
    assert all(contrast(background, ink) > 4.5 for *_, background, ink in written)


def test_a_label_is_what_the_answer_calls_the_object(written):
    things = [
        point("LeBron James", 50, 50, sub_label="head"),
        box("", 100, 100, 300, 120, text_content="EXIT\n\tONLY"),
        box("cat", 20, 200, 60, 240, sub_label="cat", text_content=7),
        box("", 20, 300, 60, 340),
    ]
    draw(Image.new("RGB", (800, 400)), things)
    assert {text for text, *_ in written} == {"LeBron James, head", "EXIT ONLY", "cat"}


def test_a_long_label_is_shortened(written):
    draw(Image.new("RGB", (400, 400)), [box("a very long label that nobody reads to its end", 10, 200, 60, 260)])
    ((text, (x1, _, x2, _), *_),) = written
    assert text.startswith("a very long") and text.endswith("…") and x2 - x1 < 200


def test_colours_are_of_the_label():
    names = ["cat", "dog", "person", "car", "bus", "cup"]
    alone = {n: colour_of([box(n, 100, 100, 200, 200)]) for n in names}
    assert alone == {n: colour_of([box(n, 100, 100, 200, 200)] * 2) for n in names}
    assert set(alone.values()) <= PALETTE and len(set(alone.values())) > 3
    things = [box(n, 20 + 60 * i, 100, 60 + 60 * i, 200) for i, n in enumerate(names)]
    together, reversed_ = (np.asarray(draw(Image.new("RGB", (400, 400)), t)) for t in (things, things[::-1]))
    assert (together[150, ::1] == reversed_[150, ::1]).all()
    assert len({tuple(together[150, 20 + 60 * i]) for i in range(len(names))}) == len(names)


def test_texts_that_were_read_have_one_colour():
    things = [box(t, 10, y, 90, y + 20, text_content=t) for t, y in (("EXIT", 20), ("ONLY", 120), ("NOW", 220))]
    drawn = draw(Image.new("RGB", (400, 400)), things)
    assert len({drawn.getpixel((10, y + 10)) for y in (20, 120, 220)}) == 1


def colour_of(things):
    (x, y), _ = things[0].points
    return draw(Image.new("RGB", (400, 400)), things).getpixel((x, y + 50))


def test_the_colours_stay_apart_for_colour_blind_people():
    """Seen by people without one kind of cones, by the matrices of Viénot, Brettel and Mollon (1999)."""
    deutan = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    colours = (np.array(sorted(PALETTE)) / 255) ** 2.2
    for seen in (colours, colours @ deutan.T, colours @ protan.T):
        seen = seen.clip(0, 1) ** (1 / 2.2)
        assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.08


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "thing, seen",
    [
        (box("a", -50, -50, 50, 50), True),
        (box("a", 350, 350, 9e99, 9e99), True),
        (box("a", -INF, -INF, INF, INF), True),
        (box("a", 500, 10, 600, 50), False),
        (box("a", -90, 10, -5, 50), False),
        (box("a", 90, 90, 50, 50), True),  # corners exchanged
        (box("a", 70, 70, 70, 70), True),
        (box("a", NAN, 0, 50, 50), False),
        (point("a", 400, 400), True),
        (point("a", 401, 0), False),
        (point("a", INF, NAN), False),
        (polygon("a", (-1e30, 50), (1e30, 60), (200, 390)), True),
        (polygon("a", (500, 500), (600, 500), (600, 600)), False),
        (polygon("a", (10, 10), (NAN, 10), (20, 20)), False),
        (polygon("a", (10, 10)), False),
        (polygon("a"), False),
        (Object("a", "box", ((1.0, 2.0),), {}), False),
        (Object("a", "sphere", ((1.0, 2.0),), {}), False),
    ],
)
def test_what_lies_outside_is_cut_off_and_counted(thing, seen):
    blank = Image.new("RGB", (400, 400), "#808080")
    drawn = draw(blank, [thing])
    assert drawn.size == blank.size
    assert (np.asarray(drawn) != np.asarray(blank)).any() == seen
    assert outside(blank.size, [thing, box("b", 1, 1, 9, 9)]) == (0 if seen else 1)


@pytest.mark.parametrize("count, size", [(500, (1280, 960)), (3000, (1000, 1000)), (3000, (320, 320))])
def test_thousands_of_objects_take_less_than_two_seconds(count, size):
    picture, things = Image.new("RGB", size), crowd(count, size)
    draw(picture, things[:5])
    assert timed(lambda: draw(picture, things), 1)[0] < (1 if count == 500 else 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 9000), (30, 30), (8000, 6000)])
def test_extreme_sizes(size):
    things = [box("thing", 0, 0, *size), point("middle", size[0] / 2, size[1] / 2), box("", 0, 0, 0, 0)]
    drawn = draw(Image.new("RGB", size), things)
    assert drawn.width * size[1] == drawn.height * size[0]
    assert max(drawn.size) <= max(4096, *size)
    assert tuple(drawn.getpixel((0, drawn.height // 3))) != (0, 0, 0)


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(InputError, match="no pixels"):
        draw(Image.new("RGB", (0, 7)), [])
    with pytest.raises(InputError, match="no pixels"):
        contact_sheet([Image.new("RGB", (0, 7))], [""])


@pytest.mark.parametrize("size", [(2, 8000), (1, 8000), (8000, 2), (1, 1), (9, 300)])
def test_slivers_in_a_contact_sheet(size):
    sheet = contact_sheet([Image.new("RGB", size)] * 3, ["a", "b", "c"], (), [[box("a", 0, 0, *size)]] * 3)
    assert max(sheet.size) < 3000


@pytest.mark.parametrize("seconds", [NAN, INF, -1.0, -INF])
def test_frames_that_are_no_time_apart(seconds):
    with pytest.raises(InputError, match="seconds apart; it must be a time, or 0"):
        draw_clip([Image.new("RGB", (60, 60))] * 3, seconds)


def test_what_is_no_picture_and_no_point():
    with pytest.raises(InputError, match=r"'a\.png' is no PIL picture; open it with"):
        draw("a.png", [])
    with pytest.raises(InputError, match="'b' is no PIL picture"):
        contact_sheet("ba", ["", ""])
    for points in ((("a", "b"), ("c", "d")), ((1, 2, 3), (4, 5, 6)), (1, 2, 3, 4), None):
        with pytest.raises(InputError, match="must be pairs of numbers"):
            draw(Image.new("RGB", (60, 60)), [Object("a", "box", points, {})])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "HSV", "LAB"])
def test_pictures_of_any_mode(mode):
    drawn = draw(Image.new(mode, (400, 400)), [box("cat", 50, 50, 90, 90)])
    assert drawn.mode == "RGB" and drawn.getpixel((50, 70)) in PALETTE


def test_a_transparent_picture_is_white_and_a_turned_one_upright():
    assert draw(Image.new("RGBA", (400, 400)), []).getpixel((9, 9)) == (255, 255, 255)
    turned = Image.new("RGB", (400, 600))
    turned.getexif()[0x0112] = 6
    assert draw(turned, [box("", 500, 10, 590, 60)]).size == (600, 400)


# ---- letters


def make_font(path, letters):
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    def square(size):
        pen = TTGlyphPen(None)
        for i, corner in enumerate([(100, 0), (100, size), (size, size), (size, 0)]):
            pen.moveTo(corner) if i == 0 else pen.lineTo(corner)
        pen.closePath()
        return pen.glyph()

    names = [".notdef", *(f"g{i}" for i in range(len(letters)))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"g{i}" for i, c in enumerate(letters)})
    builder.setupGlyf({name: square(300 if i == 0 else 600 + 10 * i) for i, name in enumerate(names)})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The only folder where fonts of the system are looked for."""
    monkeypatch.setattr(fonts, "_FOLDERS", (str(tmp_path),))
    return tmp_path


def test_letters_that_no_font_has_are_numbered(folder, written):
    (folder / "damaged.ttf").write_bytes(b"\0\1\0\0 not a font")
    things = [box("草莓", 10, 50, 60, 90), box("cat", 100, 50, 160, 90), box("Ёлка", 10, 250, 60, 290)]
    draw(Image.new("RGB", (400, 400)), [*things, things[0]])
    assert sorted(text for text, *_ in written) == ["#1", "#1", "#2", "cat"]
    assert legend(things) == {"#1": "草莓", "#2": "Ёлка"}


def test_emoji_that_no_font_has_are_left_out(folder, written):
    things = [box("dog 🐶", 10, 50, 60, 90), box("🐶👍🏽", 100, 50, 160, 90), box("# 1 🐶", 10, 250, 60, 290)]
    draw(Image.new("RGB", (400, 400)), things)
    assert {text for text, *_ in written} == {"dog", "#1", "# 1"}
    assert legend(things)["#1"] == "🐶👍🏽"


@pytest.mark.parametrize("size", [(20, 20), (640, 480), (8000, 6000)])
def test_a_box_of_one_pixel_is_seen(size, written):
    """Its mark is at least 1/600 of the picture's side, or 5 pixels, and stands around the pixel."""
    x, y = size[0] // 2, size[1] // 2
    before = Image.new("RGB", size, "#808080")
    pixels = np.asarray(draw(before, [box("", x, y, x + 1, y + 1)]))
    k = pixels.shape[1] // size[0]
    rows, columns = (pixels != 0x80).any(-1).nonzero()
    least = max(5, math.sqrt(size[0] * size[1]) * k / 600)
    assert np.ptp(rows) + 1 >= least and np.ptp(columns) + 1 >= least
    for places, at in ((rows, y), (columns, x)):
        assert abs((places.min() + places.max() + 1) / 2 - (at + 0.5) * k) <= 1
    draw(before, [box("px", x, y, x + 1, y + 1)])
    ((_, (x1, y1, x2, y2), *_),) = written
    assert not (x1 <= columns.max() and x2 >= columns.min() and y1 <= rows.max() and y2 >= rows.min())


def test_labels_at_the_border_stay_in_the_picture(written):
    for size in ((20, 20), (640, 480), (8000, 6000)):
        written.clear()
        w, h = size
        things = [box("left", 0, h * 0.4, w * 0.1, h * 0.6), box("right", w * 0.9, h * 0.4, w, h * 0.6)]
        things += [box("above", w * 0.4, 0, w * 0.6, h * 0.1), box("below", w * 0.4, h * 0.9, w * 0.6, h)]
        drawn = draw(Image.new("RGB", size), things)
        assert {text for text, *_ in written} == {"left", "right", "above", "below"}
        for _, (x1, y1, x2, y2), *_ in written:
            assert 0 <= x1 < x2 < drawn.width and 0 <= y1 < y2 < drawn.height


def test_letters_of_a_font_of_the_system_are_drawn(folder, written):
    (folder / "sub").mkdir()
    make_font(folder / "LastResort.ttf", "草莓é")
    make_font(folder / "sub" / "Some-Bold.ttf", "草莓…")
    make_font(folder / "Other.otf", "é")
    things = [box("草莓", 10, 50, 60, 90), box("é", 100, 50, 160, 90), box("草é", 10, 250, 60, 290)]
    draw(Image.new("RGB", (400, 400)), things)
    assert {text for text, *_ in written} == {"草莓", "é", "#1"}
    assert legend(things) == {"#1": "草é"}


@pytest.mark.parametrize(
    "label",
    [
        "a\ud800b",
        "\u200b\u200e",
        "\0\x1b[31m",
        "\n\n",
        "e\u0301",
        "\ufffd",
        "ﷺ",
        "👨‍👩‍👧",
        "a\u202eb",
        "a" + "\u0334\u0489" * 40,
    ],
)
def test_any_label_can_be_drawn(label, written):
    draw(Image.new("RGB", (400, 400)), [box(label, 50, 50, 90, 90)])
    assert all(text.isprintable() and text for text, *_ in written)


# ---- contact sheets


@pytest.mark.parametrize(
    "count, size", [(1, (320, 180)), (5, (180, 320)), (16, (320, 180)), (30, (28, 28)), (7, (4000, 20))]
)
def test_a_contact_sheet_shows_every_frame_over_its_time(count, size, monkeypatch):
    said, text = [], ImageDraw.ImageDraw.text

    def spy(self, xy, words, fill=None, font=None, anchor=None):
        left, top, right, bottom = font.getbbox(words, anchor=anchor)
        said.append((words, (xy[0] + left, xy[1] + top, xy[0] + right, xy[1] + bottom)))
        text(self, xy, words, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    colours = [(2 * i, 255 - 2 * i, 40) for i in range(count)]
    sheet = contact_sheet([Image.new("RGB", size, c) for c in colours], [f"0:{i:02}.5" for i in range(count)])
    assert [words for words, _ in said] == [f"0:{i:02}.5" for i in range(count)]
    pixels = np.asarray(sheet, np.int32) @ [1 << 16, 1 << 8, 1]
    centres = []
    for colour, (_, (x1, y1, x2, y2)) in zip(colours, said, strict=True):
        assert 0 <= x1 and x2 <= sheet.width and y2 <= sheet.height
        at = np.argwhere(pixels == int(bytes(colour).hex(), 16))
        assert len(at) and at[:, 0].max() < y1 and y1 - at[:, 0].max() < sheet.height / 2
        centres.append((at[:, 0].mean(), at[:, 1].mean()))
        assert abs(centres[-1][1] - (x1 + x2) / 2) < 3
    assert centres == sorted(centres)


@pytest.mark.parametrize("frames, captions", [(0, 0), (2, 1), (1001, 1001)])
def test_a_contact_sheet_has_a_caption_for_each_of_1_to_1000_frames(frames, captions):
    with pytest.raises(InputError, match="a contact sheet has 1 to 1,000 frames"):
        contact_sheet([Image.new("RGB", (8, 8))] * frames, ["0:01"] * captions)
