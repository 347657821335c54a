"""Reads untrusted paths, URLs and buffers: sizes, times and kinds of file are limited."""

import base64
import binascii
import contextlib
import http.client
import re
import socket
import stat
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from qwenvl_jax import stores
from qwenvl_jax.errors import InputError, MediaError

FETCH_SECONDS = 30.0  # time limit of one download


def name_of(source) -> str:
    """A short name of a source, for error messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    if isinstance(source, str | Path):
        text = str(source)
        if text[:5].lower() == "data:":
            return f"{re.split('[;,]', text[:60])[0]} URL of {len(text)} characters"
        return text if len(text) <= 200 else f"{text[:197]}…"
    return f"{type(source).__name__} object"


def locate(source, max_bytes: int) -> bytes | Path:
    """The bytes of a URL or buffer, or the path of an existing regular file.

    max_bytes: limit of downloads and data URLs, which are held in memory; files may be larger.
    Raises MediaError that names the source.
    """
    name = name_of(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if not isinstance(source, str | Path):
        raise MediaError(f"{name}: give a path, a URL, bytes, a PIL image or a uint8 array")
    scheme = re.match(r"(?i)[a-z][a-z0-9+.-]*://|data:", source) if isinstance(source, str) else None
    scheme = scheme and scheme[0].rstrip(":/").lower()
    if scheme == "data":
        return _from_data_url(source, name, max_bytes)
    if scheme in ("http", "https"):
        return _fetch(source, max_bytes)
    if scheme in stores.LIBRARIES:
        try:
            return stores.read(source, max_bytes, FETCH_SECONDS)
        except InputError as e:
            raise MediaError(str(e)) from e
    if scheme not in (None, "file"):
        known = "a path, file://, http(s)://, gs://, s3:// or data:"
        raise MediaError(f"{name}: {scheme}:// is not supported; use {known}")
    path = Path(source)
    try:
        if scheme:
            path = Path(re.sub("(?i)^file://(localhost(?=/))?", "", source))
            if not path.exists():
                path = Path(urllib.parse.unquote(str(path)))
        mode = path.stat().st_mode
    except (OSError, ValueError) as e:
        raise MediaError(f"{name}: {getattr(e, 'strerror', None) or e}") from e
    if not stat.S_ISREG(mode):
        raise MediaError(f"{name}: {'is a directory' if stat.S_ISDIR(mode) else 'not a regular file'}")
    return path


def _from_data_url(url: str, name: str, max_bytes: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise MediaError(f"{name}: a data URL must have the form data:image/png;base64,…")
    if len(body) > max_bytes * 4 // 3 + 4:
        raise MediaError(f"{name}: larger than {max_bytes >> 20} MiB")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise MediaError(f"{name}: the base64 text is damaged ({e})") from e


def _fetch(url: str, max_bytes: int) -> bytes:
    """Downloads over http(s) within FETCH_SECONDS."""
    name, sockets, late = name_of(url), [], threading.Event()

    def hang_up():
        # The socket's timeout restarts with every read, so a server that sends single bytes never reaches it.
        late.set()
        for connection in sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    deadline = threading.Timer(FETCH_SECONDS, hang_up)
    deadline.daemon = True
    deadline.start()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "qwenvl-jax"})
        with _opener(sockets.append).open(request, timeout=FETCH_SECONDS) as response:
            return _body(response, name, max_bytes, late)
    except InputError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as e:
        if isinstance(e, urllib.error.HTTPError):
            e.close()
        if late.is_set() or isinstance(e, TimeoutError):
            raise MediaError(f"{name}: not downloaded within {FETCH_SECONDS:g} seconds") from e
        raise MediaError(f"{name}: cannot be downloaded ({e})") from e
    finally:
        deadline.cancel()


def _opener(on_connect: Callable[[socket.socket], None]) -> urllib.request.OpenerDirector:
    """Opens http(s) URLs only. It has no handler of another scheme, so a redirect to file: or ftp: fails."""

    def watched(kind):
        class Connection(kind):
            def connect(self):
                super().connect()
                on_connect(self.sock)

        return Connection

    class Handler(urllib.request.HTTPHandler):
        https_request = urllib.request.HTTPHandler.http_request

        def http_open(self, request):
            return self.do_open(watched(http.client.HTTPConnection), request)

        def https_open(self, request):
            return self.do_open(watched(http.client.HTTPSConnection), request)

    opener = urllib.request.OpenerDirector()
    for handler in (
        Handler,
        urllib.request.ProxyHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _body(response, name: str, max_bytes: int, late: threading.Event) -> bytes:
    """The body of a response. Raises MediaError if it is too large or incomplete, TimeoutError once `late` is set."""
    too_large = MediaError(f"{name}: larger than {max_bytes >> 20} MiB")
    if (response.length or 0) > max_bytes:
        raise too_large
    body = bytearray()
    while (chunk := response.read1(1 << 16)) and not late.is_set():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    if late.is_set():
        raise TimeoutError
    if response.length:  # bytes that Content-Length announced and that did not arrive
        raise MediaError(f"{name}: the download broke off after {len(body)} bytes")
    return bytes(body)
