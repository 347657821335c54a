"""Contact sheets: the frames of a clip in a grid over their times, with what an answer says of them.

sheet = draw_clip(frames, seconds, result.objects("resized").objects, moments.parse(result.text).moments)
"""

import math
from bisect import bisect_right
from collections.abc import Container, Sequence

from PIL import Image, ImageDraw

from qwenvl_jax.answers.draw import LEAST_TEXT, SMALL, ink_on, look_of, upright
from qwenvl_jax.answers.fonts import Fonts, clean, fitted
from qwenvl_jax.answers.grounding import Object
from qwenvl_jax.answers.moments import Moment, timed
from qwenvl_jax.answers.names import frames_said
from qwenvl_jax.errors import InputError

MOST_FRAMES = 1000  # of a contact sheet
_SHEET, _TILES = 1600, (96, 480)  # pixels of a sheet's width, roughly; least and most width of a frame in it
_MARK = (0xD5, 0x5E, 0x00)
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


def draw_clip(
    frames: Sequence[Image.Image], seconds: float, objects: Sequence[Object] = (), moments: Sequence[Moment] = ()
) -> Image.Image:
    """A contact sheet of a clip. Every frame is over its time; the frames of `moments` have a coloured border.

    frames: as the model sees them, `inputs.media.frames`. seconds: between two frames; 0 if unknown.
    objects: of this clip, in pixels of these frames. Each is drawn on its frames (`places`). If there are any, the
        sheet shows only frames with objects and frames of moments.
    Of more than MOST_FRAMES frames, every second, third, … is shown. Raises InputError if there are no frames, and for
    seconds that are not finite.
    """
    drawn: dict[int, list[Object]] = {}
    for thing, where in zip(objects, places(objects, seconds, len(frames)), strict=True):
        for n in where:
            drawn.setdefault(n, []).append(thing)
    marked = {n for moment in moments for n in frames_of(moment, seconds, len(frames))}
    shown: Sequence[int] = sorted(drawn.keys() | marked) if drawn else range(len(frames))
    shown = shown[:: max(1, -(-len(shown) // MOST_FRAMES))]
    captions = [_time(n * seconds) if seconds else str(n + 1) for n in shown]
    near = {bisect_right(shown, n) - 1 for n in marked}
    return contact_sheet([frames[n] for n in shown], captions, near, [drawn.get(n, []) for n in shown])


def places(objects: Sequence[Object], seconds: float, count: int) -> list[set[int]]:
    """For each object of a clip, the numbers of the frames that it is in, from 0; none if it is after the end.

    The attributes of an object say when it is there: a time or span as `moments.parse` reads them, else numbers under
    "frame" or "start_frame", which count from 1 unless one is 0. An object with neither is in the first frame.
    seconds, count: seconds between two frames, and how many there are.
    """
    if not 0 <= seconds < math.inf:
        raise InputError(f"the frames are {seconds} seconds apart; it must be a time, or 0 if it is unknown")
    numbers = [frames_said(o.attributes) for o in objects]
    first = 0 if any(0 in span for spans in numbers for span in spans) else 1
    found = []
    for thing, spans in zip(objects, numbers, strict=True):
        if own := timed(thing.attributes)[1]:
            found.append({n for moment in own for n in frames_of(moment, seconds, count)})
        else:
            inside = [range(max(a - first, 0), min(b - first + 1, count)) for a, b in spans or [(first, first)]]
            found.append({n for span in inside for n in span})
    return found


def is_timed(thing: Object) -> bool:
    """Whether an object says in which frames it is."""
    return bool(timed(thing.attributes)[1]) or bool(frames_said(thing.attributes))


def frames_of(moment: Moment, seconds: float, count: int) -> range:
    """Which frames of a clip, `seconds` apart, a moment is in: at least the one that is shown when it starts.

    What starts when the clip ends is in the last frame, since models name the length of the clip.
    """
    last = moment.start if moment.end is None else max(moment.start, moment.end)
    if not seconds or last < 0 or not moment.start <= (count + 0.01) * seconds:
        return range(0)
    first = min(math.floor(max(moment.start, 0) / seconds + 0.01), count - 1)
    last = first if moment.end is None else math.floor(min(count - 1, moment.end / seconds) + 0.01)
    return range(first, min(max(last, first) + 1, count))


def _time(seconds: float) -> str:
    minutes, tenths = divmod(round(seconds * 10), 600)
    return f"{minutes}:{tenths / 10:04.1f}"


def contact_sheet(
    frames: Sequence[Image.Image],
    captions: Sequence[str],
    marked: Container[int] = (),
    objects: Sequence[Sequence[Object]] = (),
) -> Image.Image:
    """Frames in a grid, in reading order, each over its caption, such as its time.

    marked: numbers of frames, counted from 0, that get a coloured border. objects: for each frame, in its pixels.
    Raises InputError unless there are 1 to MOST_FRAMES frames and as many captions.
    """
    if not 0 < len(frames) <= MOST_FRAMES or len(frames) != len(captions):
        said = f"{len(frames):,} frames and {len(captions):,} captions"
        raise InputError(f"{said}; a contact sheet has 1 to {MOST_FRAMES:,} frames, with a caption each")
    first = upright(frames[0])
    ratio = first.height / first.width
    columns = _columns(len(frames), ratio)
    least = SMALL if any(objects) else _TILES[0]  # labels need room
    width = min(max(_SHEET // columns, least), _TILES[1])
    height = min(max(round(width * ratio), 8), 4 * width)
    text = max(LEAST_TEXT, width // 16)
    gap, look = max(4, width // 32), look_of([o for each in objects for o in each])
    across, down = width + gap, height + round(text * 1.6) + gap
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * across + gap, rows * down + gap), _WHITE)
    canvas = ImageDraw.Draw(sheet)
    for i, (frame, caption) in enumerate(zip(frames, captions, strict=True)):
        x, y = gap + i % columns * across, gap + i // columns * down
        frame = upright(frame)
        scale = min(width / frame.width, height / frame.height)
        sides = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        tile = frame.resize(sides, Image.Resampling.BICUBIC)
        if i < len(objects):
            look.draw(tile, objects[i], scale)
        place = x + (width - tile.width) // 2, y + (height - tile.height) // 2
        fill = _MARK if i in marked else _WHITE
        line = max(2, gap // 2)
        canvas.rectangle((x - line, y - line, x + width + line - 1, y + height + round(text * 1.6)), fill)
        canvas.rectangle((x, y, x + width - 1, y + height - 1), _WHITE)
        sheet.paste(tile, place)
        said = clean(caption)
        said, font = fitted(said if look.fonts.file(said) is not None else f"#{i + 1}", look.fonts, text, width)
        canvas.text((x + width // 2, y + height + text * 0.8), said, fill=ink_on(fill), font=font, anchor="mm")
    return sheet


def _columns(count: int, ratio: float) -> int:
    """How many columns make a sheet of about 4:3, with few places left empty."""
    about = math.ceil(math.sqrt(count * max(ratio, 0.1) * 4 / 3))
    near = [c for c in (about, about - 1, about + 1) if 0 < c <= count]
    return min(near, key=lambda c: -count % c) if near else count


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """An RGB picture over one line of text; letters that no font has become "?"."""
    size = max(LEAST_TEXT + 2, min(picture.size) // 40)
    out = Image.new("RGB", (picture.width, picture.height + 2 * size), (30, 30, 30))
    out.paste(picture)
    fonts = Fonts()
    line = clean(text)
    if fonts.file(line) is None:
        line = "".join(c if fonts.file(c) is not None else "?" for c in line)
    line, font = fitted(line, fonts, size, picture.width - size)
    ImageDraw.Draw(out).text((size // 2, picture.height + size), line, _WHITE, font, "lm")
    return out
