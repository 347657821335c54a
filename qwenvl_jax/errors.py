"""The errors that this package raises on purpose. A class's `code` is stable, so a server can turn it into a status."""

from typing import Self


class InputError(ValueError):
    """Unusable input; the message names it and says what to do."""

    code = "input"

    def at(self, where: str) -> Self:
        """The same error with its place before the message."""
        text = f"{where}: {self}"
        error = type(self).__new__(type(self), text)  # not by `copy`, which calls __init__ with the message alone
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
    """A prompt is longer than the context, or than a requested size."""

    code = "context"


class NonFiniteError(InputError):
    """The model computed NaN or infinity.

    results: a Result per conversation; the failed ones end with "error". why: the cause, and what to do.
    """

    code = "not_finite"
    results: tuple = ()
    why = ""


class BadRecord(InputError):
    """A record that cannot be used.

    reason: "unreadable", "unknown key", "messages", "placeholders", "media", "boxes", "too long", "too large" or
        "nothing to learn". Skipped records are counted by reason.
    """

    code = "record"

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # between processes; an exception's own would leave out the reason
        return type(self), (self.reason, str(self))


def shown(value) -> str:
    """A value for a message: `repr`, cut to 80 characters, also for integers of any length."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}…"
