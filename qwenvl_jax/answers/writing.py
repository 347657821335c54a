"""Objects → the text of an answer, for training data: the way back from `grounding.parse`."""

import html
import itertools
import math
from collections.abc import Sequence

from qwenvl_jax.answers.grounding import Object, Parsed, parse
from qwenvl_jax.answers.lenient import written
from qwenvl_jax.answers.names import label_of, of_label
from qwenvl_jax.errors import InputError, shown

FORMS = ("json", "tokens", "xml")


def write(objects: Sequence[Object], form: str = "json", clips: Sequence[bool] = ()) -> str:
    """Objects as a model writes them, for training data; `parse(text, clips)` gives the same objects back.

    form: "json" is that of Qwen2.5-VL and Qwen3-VL, "tokens" the control tokens of Qwen2-VL, "xml" has points only.
    clips: for each picture and clip of the conversation, whether it is a clip. If it has both, each kind is counted for
        itself, as in prompts: "Picture 1", "Video 1". Without it, all are pictures.
    Numbers are written as they are: `boxes.converted` takes them to the coordinates of the model first.
    Raises InputError for an object that the form cannot say, such as attributes in tokens, and for one in a picture
    that the conversation does not have.
    """
    if form not in FORMS:
        raise InputError(f"form is {shown(form)}; it must be one of {', '.join(FORMS)}")
    for o in objects:
        if not isinstance(o, Object):
            raise InputError(f"{shown(o)} is no Object; make one of `grounding.Object`, or read a text with `parse`")
        if not 0 <= o.image < (len(clips) or math.inf):
            many = f" of a conversation that has {len(clips)}" if clips else ""
            raise InputError(f"{shown(o)} is in picture {o.image + 1}{many}; correct its image, which counts from 0")
    try:
        text = {"json": _as_json, "tokens": _as_tokens, "xml": _as_xml}[form](objects, clips)
        if parse(text, clips) == Parsed(list(objects), 0):
            return text
    except (KeyError, TypeError, ValueError):  # an unknown kind, or attributes that are not JSON
        pass
    if len(objects) > 1:
        for o in objects:
            write([o], form, clips)
    raise InputError(f"{shown(objects[0])} cannot be written in the form {form}; write it as json, or change it")


def _named(image: int, clips: Sequence[bool]) -> tuple[str, int]:
    """What prompts call a picture or clip: ("Picture", 1), ("Video", 2)."""
    kind = image < len(clips) and clips[image]
    return "Video" if kind else "Picture", 1 + (clips[:image].count(kind) if clips else image)


def _as_json(objects: Sequence[Object], clips: Sequence[bool]) -> str:
    keys = {"box": "bbox_2d", "point": "point_2d", "polygon": "poly"}
    several = any(o.image or of_label(o.label, headed=True)[0] for o in objects)  # or the label says another picture
    lines = []
    for o in objects:
        item: dict = {keys[o.kind]: [_short(n) for point in o.points for n in point]}
        if (label_of(o.attributes) or "") != o.label:
            item["label"] = o.label
        noun, number = _named(o.image, clips)
        where = {"video" if noun == "Video" else "image": number} if several else {}
        lines.append(written(item | o.attributes | where))
    return "[" + ",".join(f"\n\t{line}" for line in lines) + "\n]" if lines else "[]"


def _as_tokens(objects: Sequence[Object], clips: Sequence[bool]) -> str:
    text, last = "", ("", 0 if not any(o.image for o in objects) else None)
    for o in objects:
        if o.image != last[1]:
            noun, number = _named(o.image, clips)
            text += f"\n{noun} {number}: " if text else f"{noun} {number}: "
        if (o.label, o.image) != last:
            text += f"<|object_ref_start|>{o.label}<|object_ref_end|>"
        token = "quad" if o.kind == "polygon" else "box"
        points = ",".join(f"({_short(x)},{_short(y)})" for x, y in o.points)
        text, last = f"{text}<|{token}_start|>{points}<|{token}_end|>", (o.label, o.image)
    return text


def _as_xml(objects: Sequence[Object], clips: Sequence[bool]) -> str:
    lines = []
    for (label, image), group in itertools.groupby(objects, lambda o: (o.label, o.image)):
        places = [point for o in group for point in o.points]
        numbers = " ".join(f'x{i}="{_short(x)}" y{i}="{_short(y)}"' for i, (x, y) in enumerate(places, 1))
        noun, number = _named(image, clips)
        heading = f"{noun} {number}: " if any(o.image for o in objects) else ""
        label = html.escape(label)
        lines.append(f'{heading}<points {numbers} alt="{label}">{label}</points>')
    return "\n".join(lines)


def _short(n: float) -> float:
    """A whole number without ".0"."""
    return int(n) if math.isfinite(n) and n == int(n) else n
