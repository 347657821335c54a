"""Reads untrusted paths, URLs and buffers: sizes, times and kinds of file are limited."""

import base64
import binascii
import contextlib
import http.client
import re
import socket
import stat
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from qwenvl_jax import stores
from qwenvl_jax.errors import InputError, MediaError
from qwenvl_jax.inputs.budget import Budget

FETCH_SECONDS = 30.0  # time limit of one download


def name_of(source) -> str:
    """A short name of a source, for error messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    if isinstance(source, str | Path):
        text = "" if source == Path() else str(source)
        if text[:5].lower() == "data:":
            return f"{re.split('[;,]', text[:60])[0]} URL of {len(text)} characters"
        if not text.strip():
            return f"the path {text!r}"
        return text if len(text) <= 200 else f"{text[:197]}…"
    return f"{type(source).__name__} object"


def path_or_bytes(source, max_bytes: int, budget: Budget | None = None) -> bytes | Path:
    """The bytes of a URL or buffer, or the path of an existing regular file.

    max_bytes: limit of downloads and data URLs, which are held in memory; files may be larger.
    budget: what downloads, data URLs and buffers are taken from.
    Raises MediaError that names the source.
    """
    try:
        return _path_or_bytes(source, max_bytes, budget or Budget())
    except InputError as e:
        raise e.at(name_of(source)) from e


def _path_or_bytes(source, max_bytes: int, budget: Budget) -> bytes | Path:
    if isinstance(source, bytes | bytearray | memoryview):
        budget.read(memoryview(source).nbytes)
        return bytes(source)
    if not isinstance(source, str | Path):
        raise MediaError("give a path, a URL, bytes, a PIL image or a uint8 array")
    if source == Path() or not str(source).strip():  # Path("") is the working directory
        raise MediaError("is empty; give a path or a URL")
    scheme = re.match(r"(?i)[a-z][a-z0-9+.-]*://|data:", source) if isinstance(source, str) else None
    scheme = scheme and scheme[0].rstrip(":/").lower()
    if scheme == "data":
        return _from_data_url(source, max_bytes, budget)
    if scheme in ("http", "https"):
        return _download(source, max_bytes, budget)
    if scheme in stores.LIBRARIES:
        try:
            url = f"{scheme}{source[len(scheme) :]}"  # in lower case
            return stores.read(url, max_bytes, min(FETCH_SECONDS, budget.left()), budget.read)
        except InputError as e:
            raise MediaError(str(e).removeprefix(f"{source}: ")) from e
    if scheme not in (None, "file"):
        known = "a path, file://, http(s)://, gs://, s3:// or data:"
        raise MediaError(f"{scheme}:// is not supported; use {known}")
    path = Path(source)
    try:
        if path.parts[:1] and path.parts[0][:1] == "~" and not path.exists():
            path = path.expanduser()
        if scheme:
            path = Path(re.sub("(?i)^file://(localhost(?=/))?", "", source))
            if not path.exists():
                path = Path(urllib.parse.unquote(str(path)))
        mode = path.stat().st_mode
    except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: no such user
        hint = "; patterns are not expanded, name each file" if re.search(r"[*?]", str(source)) else ""
        raise MediaError(f"{getattr(e, 'strerror', None) or e}{hint}") from e
    if not stat.S_ISREG(mode):
        raise MediaError(f"{'is a directory' if stat.S_ISDIR(mode) else 'not a regular file'}")
    return path


def _from_data_url(url: str, max_bytes: int, budget: Budget) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise MediaError("a data URL must have the form data:image/png;base64,…")
    if len(body) > max_bytes * 4 // 3 + 4:
        raise MediaError(f"larger than {max_bytes >> 20} MiB")
    budget.read(len(body) * 3 // 4)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise MediaError(f"the base64 text is damaged ({e})") from e


def _download(url: str, max_bytes: int, budget: Budget) -> bytes:
    """Downloads over http(s), redirects included, within FETCH_SECONDS and the budget.

    Only the look-up of the host's name is out of reach: the system's resolver has its own time limit.
    """
    seconds = min(FETCH_SECONDS, budget.left())
    connections = _Connections(seconds)
    timer = threading.Timer(seconds, connections.hang_up)
    timer.daemon = True
    timer.start()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "qwenvl-jax"})
        with _opener(connections).open(request, timeout=seconds) as response:
            return _body(response, max_bytes, connections.late, budget)
    except InputError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as e:
        if isinstance(e, urllib.error.HTTPError):
            e.close()
        if connections.late.is_set() or isinstance(getattr(e, "reason", e), TimeoutError):  # URLError wraps it
            raise MediaError(f"not downloaded within {seconds:g} seconds") from e
        raise MediaError(f"cannot be downloaded ({e})") from e
    finally:
        timer.cancel()
        connections.close()


class _Connections:
    """The connections of one download, and how they end at its deadline.

    A socket's timeout restarts with every read, so a server that sends single bytes never reaches it.
    """

    def __init__(self, seconds: float):
        self.late = threading.Event()
        self._end = time.monotonic() + seconds
        self._sockets: list[socket.socket] = []

    def connect(self, address, timeout=None, source_address=None) -> socket.socket:
        """`socket.create_connection` with one time limit for all addresses of the host.

        `hang_up` can end the socket during a TLS handshake too: the handshake takes over the descriptor, so a
        duplicate is kept.
        """
        error: OSError = TimeoutError()
        for *_, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            if (left := self._end - time.monotonic()) <= 0:
                raise TimeoutError
            try:
                connection = socket.create_connection(place[:2], left, source_address)
            except OSError as e:
                error = e
                continue
            self._sockets.append(connection.dup())
            return connection
        raise error

    def hang_up(self):
        self.late.set()
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        for connection in self._sockets:
            connection.close()


def _opener(connections: _Connections) -> urllib.request.OpenerDirector:
    """Opens http(s) URLs only. It has no handler of another scheme, so a redirect to file: or ftp: fails."""

    def watched(kind):
        class Connection(kind):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self._create_connection = connections.connect

        return Connection

    class Handler(urllib.request.HTTPHandler):
        https_request = urllib.request.HTTPHandler.http_request

        def http_open(self, request):
            return self.do_open(watched(http.client.HTTPConnection), request)

        def https_open(self, request):
            return self.do_open(watched(http.client.HTTPSConnection), request)

    class Redirect(urllib.request.HTTPRedirectHandler):
        def http_error_302(self, request, response, *args):
            response.read = bytes  # the handler would read the body, of any size
            return super().http_error_302(request, response, *args)

        http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    opener = urllib.request.OpenerDirector()
    for handler in (
        Handler,
        urllib.request.ProxyHandler,
        Redirect,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _body(response, max_bytes: int, late: threading.Event, budget: Budget) -> bytes:
    """The body of a response. Raises MediaError if it is too large or incomplete, TimeoutError once `late` is set."""
    too_large = MediaError(f"larger than {max_bytes >> 20} MiB")
    if (response.length or 0) > max_bytes:
        raise too_large
    body = bytearray()
    while (chunk := response.read1(1 << 16)) and not late.is_set():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
        budget.read(len(chunk))
    if late.is_set():
        raise TimeoutError
    if response.length:  # bytes that Content-Length announced and that did not arrive
        raise MediaError(f"the download broke off after {len(body)} bytes")
    return bytes(body)
