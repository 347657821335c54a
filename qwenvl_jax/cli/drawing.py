"""Shared by `qwenvl generate` and `qwenvl chat`: what an answer places in pictures and clips, as JSON and drawn."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_jax.errors import InputError
from qwenvl_jax.types import Visual

if TYPE_CHECKING:  # `--help` imports this file
    from qwenvl_jax.answers.grounding import Object
    from qwenvl_jax.answers.moments import Moment


def check(where: str) -> Path:
    """The file to draw into. Raises InputError if no picture can be written there."""
    from PIL import Image, UnidentifiedImageError  # not at the top: --help imports this module

    file = Path(where)
    if not file.name or file.is_dir():
        raise InputError(f"{where or 'no file'}: name a file to draw into, such as answer.png")
    if not file.parent.is_dir():
        raise InputError(f"{where}: there is no directory {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"{where}: the directory {file.parent} is not writable")
    probe, written = Image.new("RGB", (300, 300)), io.BytesIO()
    try:
        _save(probe, written, file.suffix)
        with Image.open(written) as again:  # an icon, for one, would be smaller
            if again.size != probe.size:
                raise OSError("its pictures are small")
    except UnidentifiedImageError:
        pass  # PDF and a few others are written only
    except (OSError, KeyError, ValueError) as e:
        raise InputError(f"{where}: {file.suffix or 'no suffix'} is no format for it; use .png or .jpg") from e
    return file


def pictures(media: Sequence[tuple[str, Any, Visual]]) -> list:
    """What is drawn on: the whole picture for each picture of the conversation, and the Visual of each clip.

    media: of the conversation, in order: the kind, the source and the Visual. Raises InputError if there are none.
    """
    from qwenvl_jax.inputs.media import load_image

    if not media:
        raise InputError("there is no image or video to draw on; add one")
    return [load_image(source) if kind == "image" else visual for kind, source, visual in media]


def objects_of(result, coordinates: str = "original") -> dict:
    """The objects of an answer in whole numbers, by default in pixels of their pictures' files."""
    parsed = result.objects(coordinates)
    whole = [o._replace(points=[[round(n) for n in point] for point in o.points]) for o in parsed.objects]
    return {"objects": [o._asdict() for o in whole], "malformed": parsed.malformed}


def finish(file: Path, drawn_on: Sequence, result, config) -> None:
    """Writes the pictures of an answer, a Result, and says on stderr what they do not show."""
    objects, moments = _said(drawn_on, result, config)
    files = write(file, drawn_on, objects, config, moments)
    for line in (*notes(drawn_on, objects, config), f"drawn: {', '.join(map(str, files))}"):
        print(f"qwenvl: {line}", file=sys.stderr, flush=True)


def write(
    file: Path, drawn_on: Sequence, objects: Sequence[Object], config, moments: Sequence[Moment] = ()
) -> list[Path]:
    """Writes one file, or FILE-1, FILE-2, … for several pictures and clips; returns them. All are written, or none.

    drawn_on: what `pictures` gives. objects: in pixels of the original pictures. moments: marked in the clips.
    """
    files = [file]
    if len(drawn_on) > 1:
        files = [file.with_name(f"{file.stem}-{i + 1}{file.suffix}") for i in range(len(drawn_on))]
    parts = [f.with_name(f".{f.name}.{os.getpid()}.partial") for f in files]
    try:
        for i, (part, where) in enumerate(zip(parts, drawn_on, strict=True)):
            _save(_drawn(where, [o for o in objects if o.image == i], moments, config), part, file.suffix)
        for part, f in zip(parts, files, strict=True):
            os.replace(part, f)
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: cannot be written ({getattr(e, 'strerror', None) or e})") from e
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return files


def notes(drawn_on: Sequence, objects: Sequence[Object], config) -> list[str]:
    """What the pictures do not show, as sentences."""
    from qwenvl_jax.answers import sheets
    from qwenvl_jax.answers.boxes import sizes
    from qwenvl_jax.answers.draw import legend, outside

    said, lost = [], sum(not 0 <= o.image < len(drawn_on) for o in objects)
    for i, where in enumerate(drawn_on):
        mine = [o for o in objects if o.image == i]
        name = f"{'clip' if isinstance(where, Visual) else 'picture'} {i + 1}: " if len(drawn_on) > 1 else ""
        if isinstance(where, Visual):
            places = sheets.places(mine, *_rate(where, config))
            size = sizes(where, config).original
            lost += sum(not place or outside(size, [o]) for o, place in zip(mine, places, strict=True))
            if untimed := sum(not sheets.is_timed(o) for o in mine):
                said.append(f"{name}objects without a time ({untimed} of {len(mine)}) are drawn on the first frame")
        else:
            lost += outside(where.size, mine)
        said += [f"{name}{number} is {label}" for number, label in legend(mine).items()]
    if not objects and any(not isinstance(where, Visual) for where in drawn_on):
        said.append("the answer places nothing in the pictures")
    if lost:
        said.append(f"{lost} of {len(objects)} objects are not drawn: their place or time is outside of what was given")
    return said


def _said(drawn_on: Sequence, result, config) -> tuple[Sequence[Object], Sequence[Moment]]:
    """The objects, in pixels of the files, and the moments of an answer.

    Numbers alone could be both. "[1, 2, 3, 4]" is a box; "[1, 2]" is a span of a clip that is so long, else a point.
    """
    from qwenvl_jax.answers import boxes, grounding, moments, sheets

    objects, times = result.objects("original").objects, moments.parse(result.text).moments
    ends = {end for time in times for end in (time.start, time.end) if end is not None}
    if not ends <= {n for o in grounding.parse(result.text).objects for point in o.points for n in point}:
        return objects, times
    # With other coordinates in the text, only the moments that are read from coordinates change.
    other = boxes.from_model(
        result.text, boxes.Sizes((10_007 * 10**8, 10_007 * 10**8), (10**8, 10**8)), "resized", "original"
    )
    others = {time[:2] for time in moments.parse(other).moments}
    if other != result.text and (sure := [time for time in times if time[:2] in others]):
        return objects, sure
    clips = [_rate(where, config) for where in drawn_on if isinstance(where, Visual)]
    is_point = len(objects) == 1 and objects[0].kind == "point" and not (objects[0].label or objects[0].attributes)
    is_span = is_point and any(sheets.frames_of(time, *clip) for time in times for clip in clips)
    return ([], times) if is_span else (objects, [])


def _drawn(where, objects: list[Object], moments: Sequence[Moment], config):
    from qwenvl_jax.answers.boxes import sizes
    from qwenvl_jax.answers.draw import draw
    from qwenvl_jax.answers.sheets import draw_clip
    from qwenvl_jax.inputs.media import frames

    if not isinstance(where, Visual):
        return draw(where, objects)
    (width, height), (wide, high), _ = sizes(where, config)
    seen = [o._replace(points=tuple((x * wide / width, y * high / height) for x, y in o.points)) for o in objects]
    return draw_clip(frames(where, config), _rate(where, config)[0], seen, moments)


def _rate(clip: Visual, config) -> tuple[float, int]:
    """(seconds between two frames, frames) of a clip."""
    steps = config.vision.temporal_patch_size
    return clip.seconds_per_grid / steps, clip.grid.t * steps


def _save(picture, to, suffix: str) -> None:
    """Raises KeyError for an unknown suffix, OSError or ValueError if its format cannot hold the picture."""
    from PIL import Image

    Image.init()
    kind = Image.registered_extensions()[suffix.lower()]
    picture.save(to, kind, **({"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}))
