"""The errors that this package raises on purpose."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and says what to do."""
