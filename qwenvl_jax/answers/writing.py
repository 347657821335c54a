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


def write(objects: Sequence[Object], form: str = "json") -> str:
    """Objects as a model writes them, for training data; `parse` gives the same objects back.

    form: "json" is that of Qwen2.5-VL and Qwen3-VL, "tokens" the control tokens of Qwen2-VL, "xml" has points only.
    Numbers are written as they are: `boxes.converted` takes them to the coordinates of the model first.
    Raises InputError for an object that the form cannot say, such as attributes in tokens.
    """
    if form not in FORMS:
        raise InputError(f"form is {shown(form)}; it must be one of {', '.join(FORMS)}")
    try:
        text = {"json": _as_json, "tokens": _as_tokens, "xml": _as_xml}[form](objects)
        if parse(text) == Parsed(list(objects), 0):
            return text
    except (KeyError, TypeError, ValueError):  # an unknown kind, or attributes that are not JSON
        pass
    if len(objects) > 1:
        for o in objects:
            write([o], form)
    raise InputError(f"{shown(objects[0])} cannot be written in the form {form}; write it as json, or change it")


def _as_json(objects: Sequence[Object]) -> str:
    keys = {"box": "bbox_2d", "point": "point_2d", "polygon": "poly"}
    several = any(o.image or of_label(o.label, headed=True)[0] for o in objects)  # or the label says another picture
    lines = []
    for o in objects:
        item: dict = {keys[o.kind]: [_short(n) for point in o.points for n in point]}
        if (label_of(o.attributes) or "") != o.label:
            item["label"] = o.label
        lines.append(written(item | o.attributes | ({"image": o.image + 1} if several else {})))
    return "[" + ",".join(f"\n\t{line}" for line in lines) + "\n]" if lines else "[]"


def _as_tokens(objects: Sequence[Object]) -> str:
    text, last = "", ("", 0 if not any(o.image for o in objects) else None)
    for o in objects:
        if o.image != last[1]:
            text += f"\nPicture {o.image + 1}: " if text else f"Picture {o.image + 1}: "
        if (o.label, o.image) != last:
            text += f"<|object_ref_start|>{o.label}<|object_ref_end|>"
        token = "quad" if o.kind == "polygon" else "box"
        points = ",".join(f"({_short(x)},{_short(y)})" for x, y in o.points)
        text, last = f"{text}<|{token}_start|>{points}<|{token}_end|>", (o.label, o.image)
    return text


def _as_xml(objects: Sequence[Object]) -> str:
    lines = []
    for (label, image), group in itertools.groupby(objects, lambda o: (o.label, o.image)):
        places = [point for o in group for point in o.points]
        numbers = " ".join(f'x{i}="{_short(x)}" y{i}="{_short(y)}"' for i, (x, y) in enumerate(places, 1))
        heading = f"Picture {image + 1}: " if any(o.image for o in objects) else ""
        label = html.escape(label)
        lines.append(f'{heading}<points {numbers} alt="{label}">{label}</points>')
    return "\n".join(lines)


def _short(n: float) -> float:
    """A whole number without ".0"."""
    return int(n) if math.isfinite(n) and n == int(n) else n
