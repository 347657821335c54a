"""Runs the chat template of a checkpoint, which is untrusted code, within bounds of time and size.

jinja2's sandbox keeps a template from Python's internals and bounds `range`, but not nested loops, macros that call
each other, or text that doubles. So every step of a loop and every call looks at the clock, and whatever makes text or
lists longer is measured before it happens.
"""

import re
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from itertools import chain

import jinja2
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

SECONDS = 5.0  # for one rendering; Qwen's template takes a millisecond for a hundred messages
MAX_TEMPLATE = 1 << 20  # characters
MAX_TEXT = 1 << 24  # characters of any text, items of any list
MAX_MADE = 1 << 26  # characters of all texts that one rendering makes, 16 for each item of its lists
_METHODS = re.compile(
    "is[a-z]+|[rl]?(strip|split|find|index|partition)|splitlines|startswith|endswith|upper|lower|title|capitalize|"
    "swapcase|casefold|count|removeprefix|removesuffix|replace|join|format"
)
_clock = threading.local()


class TooMuch(jinja2.TemplateError):
    """A template takes too long, or makes too much text."""


@contextmanager
def clock():
    """Templates that are rendered in the block end after SECONDS."""
    _clock.end, _clock.made = time.monotonic() + SECONDS, 0
    try:
        yield
    finally:
        _clock.end = None


def _tick() -> None:
    end = getattr(_clock, "end", None)
    if end is not None and time.monotonic() > end:
        raise TooMuch(f"it takes longer than {SECONDS:g} seconds")


def _bounded(size: int) -> None:
    if size > MAX_TEXT:
        raise TooMuch(f"it makes a text or list of more than {MAX_TEXT:,} characters or items")


def _made(value):
    """The value, a new text or list, which is counted. It may be kept, so its memory is not given back."""
    if isinstance(value, str | list | tuple):
        _clock.made = getattr(_clock, "made", 0) + 16 + len(value) * (1 if isinstance(value, str) else 16)
        if _clock.made > MAX_MADE:
            raise TooMuch(f"it makes texts and lists of more than {MAX_MADE:,} characters in all")
    return value


def _size(value) -> int:
    """Characters of a value's text, 16 for each item; parts count as often as they are in it. Stops at too much."""
    size, left = 0, [value]
    while left:
        _tick()
        value = left.pop()
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, int):
            size += value.bit_length() // 3
        elif isinstance(value, Mapping):
            left += chain.from_iterable(value.items())
        elif isinstance(value, list | tuple):
            left += value
        size += 16
        _bounded(size + len(left))
    return size


class _Steps:
    """What a loop goes over; every step looks at the clock."""

    def __init__(self, values):
        self._values = values

    def __iter__(self):
        for value in self._values:
            _tick()
            yield value

    def __len__(self):
        return len(self._values)  # a TypeError where there is none, as the loop expects


def _joined(values) -> str:
    values = list(values)
    _size(values)
    return _made("".join(map(str, values)))


class _Bounds(jinja2.visitor.NodeTransformer):
    """Puts `_Steps` around what loops go over, and `_joined` in place of `~`. Counts slices and lists."""

    def visit_For(self, node):
        self.generic_visit(node)
        node.iter = jinja2.nodes.Filter(node.iter, "_steps", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node):
        self.generic_visit(node)
        parts = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return jinja2.nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)

    def visit_Getitem(self, node):
        self.generic_visit(node)
        return self._counted(node) if isinstance(node.arg, jinja2.nodes.Slice) else node

    def visit_List(self, node):
        self.generic_visit(node)
        return self._counted(node)

    @staticmethod
    def _counted(node):
        return jinja2.nodes.Filter(node, "_made", [], [], None, None, lineno=node.lineno)


def _checked_filter(name: str, function):
    def check(value, args: tuple) -> None:
        _tick()
        size = _size(value)
        numbers = [abs(a) for a in args if isinstance(a, int)]
        if name in ("center", "indent", "batch", "slice", "tojson"):
            _bounded(max(numbers, default=0) * (1 if name in ("center", "batch", "slice") else size))
        texts = [a for a in args if isinstance(a, str)]
        if name in ("join", "replace", "indent") and texts:
            _bounded(max(map(len, texts)) * (size + 1))
        if name == "format":
            _check_format(str(value), args)

    # Filters may want the environment, the evaluation context or the context first: the value comes after it.
    first = int(hasattr(function, "jinja_pass_arg"))

    def checked(*args, **kwargs):
        check(args[first] if len(args) > first else None, (*args[first + 1 :], *kwargs.values()))
        return _made(function(*args, **kwargs))

    if first:
        checked.jinja_pass_arg = function.jinja_pass_arg
    return checked


def _check_format(text: str, args: Iterable) -> None:
    if re.search(r"\d{5}|\*|\{[^{}]*\{", text) or any(isinstance(a, int) and a.bit_length() > 64 for a in args):
        raise TooMuch("it formats a number to a width of more than 9999 characters")
    _size(list(args))


def _pieces(text: str, name: str, separator) -> int:
    """How many pieces a method splits a text into, at most."""
    if name == "splitlines":
        return 1 + sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))
    if name.endswith("partition"):
        return 3
    return 1 + (text.count(separator) if isinstance(separator, str) and separator else len(text) // 2)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with a clock and with bounds of size."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, filters: Mapping, **options):
        # An optimised template would compute constants while it is compiled, without a clock.
        super().__init__(optimized=False, finalize=self._finalize, **options)
        self.filters = {name: _checked_filter(name, f) for name, f in (self.filters | filters).items()}
        del self.globals["lipsum"]
        self.filters |= {"_steps": _Steps, "_joined": _joined, "_made": _made}

    def _parse(self, source, name, filename):
        if len(source) > MAX_TEMPLATE:
            raise TooMuch(f"it has more than {MAX_TEMPLATE:,} characters")
        return _Bounds().visit(super()._parse(source, name, filename))

    @staticmethod
    def _finalize(value):
        if not isinstance(value, str):
            _size(value)
        return value

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        kept, size = [], 0
        for part in parts:
            _tick()
            size += len(part)
            _bounded(size)
            kept.append(part)
        return _made("".join(kept))

    def call_binop(self, context, operator, left, right):
        _tick()
        sized = [v for v in (left, right) if isinstance(v, str | list | tuple)]
        if operator == "*" and sized:
            counts = [abs(v) for v in (left, right) if isinstance(v, int)]
            _bounded(len(sized[0]) * max(counts, default=1))
        elif operator == "+" and sized:
            _bounded(sum(map(len, sized)))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            _bounded(left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length())
        return _made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value):
        wrapped = super().wrap_str_format(value)

        def checked(*args, **kwargs):
            _check_format(value.__self__, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return wrapped and checked

    def call(__self, __context, __obj, *args, **kwargs):
        _tick()
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            name = getattr(__obj, "__name__", "")
            if not _METHODS.fullmatch(name):
                raise TooMuch(f"it calls {name} of a text, which templates may not")
            if name == "replace" and len(args) > 1:
                _bounded(len(text) + (text.count(args[0]) if args[0] else len(text) + 1) * len(args[1]))
            elif name == "join" and args:
                args = (list(args[0]), *args[1:])
                _bounded(_size(args[0]) + len(text) * len(args[0]))
            elif name.lstrip("r") in ("split", "splitlines", "partition"):
                _made(text)  # the pieces together
                _bounded(16 * _pieces(text, name, args[0] if args else kwargs.get("sep")))
            return _made(super().call(__context, __obj, *args, **kwargs))
        return super().call(__context, __obj, *args, **kwargs)
