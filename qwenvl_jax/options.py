"""Options are fields of a frozen dataclass; each has its type, help and bounds.

`MediaOptions`, `GenerateOptions` and `TrainOptions` are declared this way; flags, TOML keys, request fields and keyword
arguments are generated from the fields. This file imports neither jax nor numpy, so `--help` takes no time.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import operator
from collections.abc import Iterable, Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from qwenvl_jax.errors import OptionsError, shown

T = TypeVar("T")
_BOUNDS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}
Number = int | float  # keeps its type
_WORDS = {int: "a whole number", float: "a number", Number: "a number", bool: "true or false", str: "a string"}


def whole(text: str) -> int:
    """Parses the whole number of a flag."""
    try:
        return int(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number") from e


def real(text: str) -> float:
    """Parses the number of a flag."""
    try:
        return float(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number") from e


def number(text: str) -> Number:
    """Parses the `Number` of a flag."""
    try:
        return int(text)
    except ValueError:
        return real(text)


_FLAGS: dict = {int: (whole, "N"), float: (real, "X"), Number: (number, "X"), str: (str, "VALUE")}


def option(
    default, doc: str, *, least=None, above=None, most=None, below=None, choices=None, title="", flag=True, free=False
) -> Any:
    """A field of an options class.

    doc: its help. least, above, most, below, choices: bounds of a value, or of each item of a list.
    title: starts a group of flags. flag: False if it is neither a flag nor a request field.
    free: whether a training run may resume with another value.
    """
    bounds = dict(least=least, above=above, most=most, below=below, choices=choices)
    return dataclasses.field(default=default, metadata=dict(doc=doc, title=title, flag=flag, free=free, **bounds))


def names(cls) -> tuple[str, ...]:
    """The names of the options of a class or object."""
    return tuple(f.name for f in dataclasses.fields(cls))


def check_names(given: Iterable, known: Iterable[str], where: str = "") -> None:
    """Raises OptionsError for the first unknown name, with the closest known one. where: a prefix, as in "file: "."""
    known = tuple(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1, 0.75)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known) or 'none'}"
            raise OptionsError(f"{where}unknown option {name}; {hint}")


def build(cls: type[T], values: Mapping) -> T:
    """`cls(**values)`. Raises OptionsError for an unknown name or a bad value."""
    check_names(values, names(cls))
    return cls(**values)


def replace(options: T, changes: Mapping) -> T:
    """`dataclasses.replace`. Raises OptionsError for an unknown name or a bad value."""
    check_names(changes, names(options))
    return dataclasses.replace(options, **changes)  # type: ignore[type-var]


def given(source, cls, only: Iterable[str] | None = None) -> dict:
    """The options of `cls` that a namespace of flags or another object has and that are not None.

    only: names of options; others are passed over.
    """
    chosen = names(cls) if only is None else set(names(cls)).intersection(only)
    values = {name: getattr(source, name, None) for name in names(cls) if name in chosen}
    return {name: value for name, value in values.items() if value is not None}


def check(options) -> None:
    """For `__post_init__`: checks each value and converts it to its field's type."""
    for name in names(options):
        object.__setattr__(options, name, checked(type(options), name, getattr(options, name)))


def checked(cls, name: str, value, where: str = ""):
    """The value in its field's type. Raises OptionsError that names the option, the value and the bounds."""
    _, many, optional = _kind(cls, name)
    if not many:
        return None if value is None and optional else _item(cls, name, value, where)
    if value is None:
        return ()
    if many is ... and not isinstance(value, list | tuple):  # a single item needs no brackets
        value = (value,)
    if not isinstance(value, list | tuple) or many not in (..., len(value)):
        count = "a list" if many is ... else f"a list of {many}"
        raise OptionsError(f"{where}{name} is {shown(value)}; it must be {count}")
    return tuple(_item(cls, name, item, where) for item in value)


def add_flags(parser, cls, about: str | None = None, only: Iterable[str] | None = None) -> None:
    """Adds a flag for every option, inherited ones last. Flags that are not given are absent from the namespace.

    about: a sentence below each group's title. only: names of options; others get no flag.
    """
    own, group, only = inspect.get_annotations(cls), parser, None if only is None else set(only)
    for field in sorted(dataclasses.fields(cls), key=lambda f: f.name not in own):
        if only is not None and field.name not in only:
            continue
        kind, many, _ = _kind(cls, field.name)
        meta = field.metadata
        if meta["title"]:
            group = parser.add_argument_group(meta["title"], about)
        if not meta["flag"]:
            continue
        how: dict = dict(default=argparse.SUPPRESS, help=_help(field))
        if kind is bool:
            how |= dict(action=argparse.BooleanOptionalAction)
        else:
            parse, metavar = _FLAGS[kind]
            how |= dict(type=parse, metavar=None if meta["choices"] else metavar, choices=meta["choices"])
            if many:
                how |= dict(action="append") if many is ... else dict(nargs=many)
        group.add_argument(f"--{field.name.replace('_', '-')}", **how)


def as_text(value) -> str:
    """A value as help and messages print it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "nothing"
    return "not given" if value in (None, "") else str(value)


def _help(field) -> str:
    default = "" if field.default in (None, (), "") else f" (default: {as_text(field.default)})"
    return (field.metadata["doc"] + default).replace("%", "%%")


@cache
def _kind(cls, name: str) -> tuple[Any, Any, bool]:
    """(type of the value or its items, number of items (0: no list, ...: any), whether None is allowed)."""
    hint = get_type_hints(cls)[name]
    args = get_args(hint)
    if get_origin(hint) is tuple:
        return args[0], ... if args[1] is ... else len(args), False
    kinds = [kind for kind in args or (hint,) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else Number, 0, NoneType in args


def _item(cls, name: str, value, where: str):
    """One checked value. For float, whole numbers become floats; a `Number` stays whole or not."""
    meta, kind = cls.__dataclass_fields__[name].metadata, _kind(cls, name)[0]
    if _fits(kind, value) and _within(meta, value):
        if kind is Number:  # numpy's scalars cannot be written as TOML
            return int(value) if isinstance(value, Integral) else float(value)
        return kind(value) if kind in (int, float) else value
    what = "one of " + ", ".join(meta["choices"]) if meta["choices"] else _WORDS[kind]
    limits = {words: meta[bound] for bound, (_, words) in _BOUNDS.items() if meta[bound] is not None}
    if limits.get("more than") == 0:
        del limits["more than"]
        what = what.replace("a ", "a positive ", 1)
    text = ", ".join([what, *(f"{words} {limit}" for words, limit in limits.items())])
    raise OptionsError(f"{where}{name} is {shown(value)}; it must be {text}")


def _fits(kind, value) -> bool:
    if kind in (bool, str):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return False
    try:
        return kind is int or math.isfinite(value)
    except OverflowError:  # an int larger than any float
        return False


def _within(meta: Mapping, value) -> bool:
    if meta["choices"] and value not in meta["choices"]:
        return False
    return all(meta[bound] is None or test(value, meta[bound]) for bound, (test, _) in _BOUNDS.items())
