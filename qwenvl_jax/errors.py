"""The errors that this package raises on purpose. A class's `code` is stable, so a server can turn it into a status."""

from typing import Self

_NAME = "qwenvl-jax"


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
    """A value for a message: `repr`, cut to 80 characters, also for integers of any length and nesting of any depth."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print more than 4300 digits
        return "a number of thousands of digits"
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}…"


def install(extra: str) -> str:
    """The command that installs an extra of this package from where the package came: a clone, a wheel, git, an index.

    For a message. pip writes the origin to `direct_url.json` (PEP 610); the installer's name is in `INSTALLER`.
    """
    import json
    import shlex
    from importlib import metadata
    from pathlib import Path
    from urllib.parse import unquote, urlsplit

    clone = Path(__file__).resolve().parents[1]
    try:
        package = metadata.distribution(_NAME)
        uv = (package.read_text("INSTALLER") or "").strip() == "uv"
        origin = json.loads(package.read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, OSError, ValueError):
        package, uv, origin = None, False, {}
    pip = "uv pip install" if uv else "pip install"
    if (clone / "pyproject.toml").is_file():
        return f"{pip} -e {shlex.quote(f'{clone}[{extra}]')}"
    url = urlsplit(origin.get("url", ""))
    if url.scheme == "file" and "vcs_info" not in origin:
        path = Path(unquote(url.path))
        if path.exists():
            return f"{pip} {shlex.quote(f'{path}[{extra}]')}"
        return f"{pip} {' '.join(map(shlex.quote, _requirements(package, extra)))}"
    if "vcs_info" not in origin:
        source = f" @ {url.geturl()}" if url.scheme else ""
    else:
        vcs = origin["vcs_info"]
        source = f" @ {vcs['vcs']}+{url.geturl()}@{vcs.get('requested_revision') or vcs['commit_id']}"
        source += f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
    return f"{pip} {shlex.quote(f'{_NAME}[{extra}]{source}')}"


def _requirements(package, extra: str) -> list[str]:
    """What an extra requires, for a package whose origin is gone. `qwenvl-jax[a]` within an extra is followed."""
    found: list[str] = []
    for line in package.requires or ():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if marker.replace("'", '"') == f'extra == "{extra}"':
            name, _, inner = requirement.partition("[")
            inner = inner.split("]")[0].split(",") if name == _NAME else ()
            found += [r for i in inner for r in _requirements(package, i)] or [requirement]
    return list(dict.fromkeys(found))
