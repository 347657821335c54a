"""What a page may reach: its own origin, and those that the user names."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qwenvl_jax.errors import OptionsError, shown

_HOST = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?|[0-9a-f:.]*:[0-9a-f:.]*")
_PORTS = {"http": 80, "https": 443}
_INNER = ("about", "blob", "data")  # schemes that reach nothing


class Fence:
    """Which URLs are allowed for a page. Raises OptionsError for a URL or origin that is none.

    url: http://, https:// or file:// (then: files of its folder, and of folders in it).
    origins: more of them, such as "https://cdn.example.org" or "http://localhost:8080".
    """

    def __init__(self, url: str, origins: Iterable[str] = ()):
        self._places = [_place(origin) for origin in origins]
        self._folder: Path | None = None
        if url.startswith("file://"):
            path = _path(url)
            if path is None or not path.exists():
                raise OptionsError(f"{shown(url)} is not the URL of a file here")
            self._folder = path.parent
        else:
            self._places.append(_place(url))

    def __contains__(self, url: str) -> bool:
        if url.startswith("file:"):
            path = _path(url)
            return path is not None and self._folder is not None and path.is_relative_to(self._folder)
        try:
            return urlsplit(url).scheme in _INNER or _place(url) in self._places
        except OptionsError:
            return False

    @property
    def rules(self) -> str:
        """The value of Chromium's --host-resolver-rules: it resolves nothing else, whoever asks."""
        mine = [f"{host}:{port}" for _, host, port in self._places]
        return " , ".join([*(f"MAP {place} {place}" for place in mine), "MAP * ~NOTFOUND"])


def _place(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of a URL."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except (ValueError, UnicodeError) as e:
        raise OptionsError(f"{shown(url)} is not a URL ({e})") from e
    if parts.scheme not in _PORTS or not _HOST.fullmatch(host):
        raise OptionsError(
            f"{shown(url)} is not the URL of a page; it must be like https://example.org or file:///a.html"
        )
    return parts.scheme, f"[{host}]" if ":" in host else host, _PORTS[parts.scheme] if port is None else port


def _path(url: str) -> Path | None:
    """The file of a file:// URL, symbolic links followed; None if it is on another machine."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or "\0" in (path := unquote(parts.path)):
        return None
    return Path(os.path.realpath(path))
