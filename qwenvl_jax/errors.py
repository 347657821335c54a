"""The errors that this package raises on purpose, and how they quote a value.

Every class has a `code`, which stays the same when sentences change; a server can turn it into a status.
"""

from typing import Self


class InputError(ValueError):
    """The user gave something that cannot be used; the message names it and says what to do."""

    code = "input"

    def at(self, where: str) -> Self:
        """The same error, with the place where it happened in front of its message."""
        text = f"{where}: {self}"
        error = type(self).__new__(type(self), text)
        error.args = (text,)
        error.__dict__.update(self.__dict__)
        return error


class CheckpointError(InputError):
    """A checkpoint's files are missing, damaged, or contradict each other."""

    code = "checkpoint"


class MediaError(InputError):
    """A picture or clip cannot be fetched, decoded or resized."""

    code = "media"


class OptionsError(InputError):
    """An option is unknown, or its value is out of range."""

    code = "options"


class ContextError(InputError):
    """A prompt is longer than the context, or than a fixed size that was asked for."""

    code = "context"


def shown(value) -> str:
    """A value as a message quotes it: `repr`, but short, and for whole numbers of any length."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}…"
