"""Paths, file://, http(s) and data: URLs, and the error of each failure."""

import base64
import contextlib
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from qwenvl_jax.errors import InputError
from qwenvl_jax.inputs import fetch, media
from qwenvl_jax.inputs.budget import Budget
from qwenvl_jax.inputs.fetch import name_of, path_or_bytes
from qwenvl_jax.inputs.media import image_visual, load_image
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.inputs.preprocessing import Preprocessing
from qwenvl_jax.inputs.video import video_visual

MEDIA = Path(__file__).parent / "data" / "media"
PHOTO = MEDIA / "coffee.jpg"


@pytest.fixture
def server(monkeypatch):
    """Serves tests/data/media and some faulty responses. Yields the base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer = getattr(self, "do_" + self.path.strip("/").split("?")[0].replace("-", "_"), None)
            if answer:
                return answer()
            path = MEDIA / self.path.strip("/")
            if not path.is_file():
                return self.send_error(404)
            self.reply(path.read_bytes())

        def reply(self, body, length=None):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def redirect(self, where):
            self.send_response(302)
            self.send_header("Location", where)
            self.end_headers()

        def do_moved(self):
            self.redirect("/coffee.jpg")

        def do_moved_to_file(self):
            self.redirect(PHOTO.as_uri())

        def do_moved_to_ftp(self):
            self.redirect("ftp://localhost/coffee.jpg")

        def do_moved_in_circles(self):
            self.redirect("/moved-in-circles")

        def do_moved_with_a_body(self):
            self.redirect("/coffee.jpg")
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 16))

        def do_broken_off(self):
            self.reply(PHOTO.read_bytes()[:1000], length=PHOTO.stat().st_size)

        def do_trickle(self):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.02)
            except OSError:
                pass  # the client closed the connection

        def do_dawdle(self):
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.02)

        def do_endless(self):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                pass

        def do_nonsense(self):
            self.wfile.write(b"\x00\x01\x02 not http at all\r\n\r\n")

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def data_url(path: Path, mime: str = "image/jpeg") -> str:
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_all_forms_of_one_picture_agree(server, tmp_path, monkeypatch):
    monkeypatch.chdir(MEDIA)
    spaced = tmp_path / "a photo 100%25.jpg"
    spaced.write_bytes(PHOTO.read_bytes())
    wrapped = data_url(PHOTO).replace("base64,", "base64,\n", 1)
    pixels = np.asarray(load_image(PHOTO))
    sources = [
        str(PHOTO),
        "coffee.jpg",
        f"file://{PHOTO}",
        f"FILE://{PHOTO}",
        f"file://localhost{PHOTO}",
        f"file://{spaced}",  # not percent-encoded
        spaced.as_uri(),  # percent-encoded
        f"{server}/coffee.jpg",
        f"{server}/moved",
        data_url(PHOTO),
        data_url(PHOTO, ""),
        data_url(PHOTO).replace("data:image/jpeg", "DATA:image/JPEG"),
        wrapped,
        PHOTO.read_bytes(),
        bytearray(PHOTO.read_bytes()),
        memoryview(PHOTO.read_bytes()),
        load_image(PHOTO),
        pixels,
    ]
    for given in sources:
        assert np.array_equal(np.asarray(load_image(given)), pixels), name_of(given)


def test_clip_from_url(server):
    options = dict(nframes=2, resized_height=56, resized_width=56)
    clip = video_visual(f"{server}/bunny.mp4", Preprocessing(), MediaOptions(**options))
    for given in (MEDIA / "bunny.mp4", data_url(MEDIA / "bunny.mp4", "video/mp4")):
        assert np.array_equal(video_visual(given, Preprocessing(), MediaOptions(**options)).patches, clip.patches)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("missing.jpg", "404"),
        ("moved-to-file", "not allowed"),
        ("moved-to-ftp", "ftp"),
        ("moved-in-circles", "infinite loop"),
        ("broken-off", "broke off after 1000 bytes"),
        ("nonsense", "cannot be downloaded"),
        ("trickle", r"not downloaded within 0\.2 seconds"),
        ("dawdle", r"not downloaded within 0\.2 seconds"),
        ("endless", "larger than 1 MiB"),
    ],
)
def test_download_errors_name_the_url(server, monkeypatch, address, message):
    monkeypatch.setattr(fetch, "FETCH_SECONDS", 0.2)
    monkeypatch.setattr(media, "MAX_IMAGE_BYTES", 1 << 20)
    with pytest.raises(InputError, match=message) as error:
        load_image(f"{server}/{address}")
    assert f"{server}/{address}" in str(error.value)


def test_the_body_of_a_redirect_is_not_read(server):
    assert path_or_bytes(f"{server}/moved-with-a-body", 1 << 20) == PHOTO.read_bytes()


def test_a_handshake_ends_at_the_deadline(monkeypatch):
    """A server that sends one byte at a time of what seems to be a TLS record."""
    monkeypatch.setattr(fetch, "FETCH_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle():
            connection = server.accept()[0]
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"\x16\x03\x03\x40\x00")
                while True:
                    connection.sendall(b"\x02")
                    time.sleep(0.02)

        thread = threading.Thread(target=trickle)
        thread.start()
        start = time.monotonic()
        with pytest.raises(InputError, match=r"not downloaded within 0\.3 seconds"):
            load_image(f"https://127.0.0.1:{server.getsockname()[1]}/a.png")
        assert time.monotonic() - start < 10  # a record has 16384 bytes: over five minutes
        thread.join()


def test_all_addresses_of_a_host_share_the_deadline(monkeypatch):
    places = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (f"10.0.0.{i}", 80)) for i in range(200)]
    limits = []

    def connect(place, timeout, source):
        limits.append(timeout)
        time.sleep(0.05)
        raise TimeoutError

    monkeypatch.setattr(fetch, "FETCH_SECONDS", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: places)
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(InputError, match=r"not downloaded within 0\.3 seconds"):
        load_image("http://many.example/a.png")
    assert len(limits) <= 6 and limits == sorted(limits, reverse=True)


def test_downloads_take_from_the_budget_of_the_conversation(server):
    budget = Budget(MediaOptions(media_bytes=1))
    size = PHOTO.stat().st_size
    for _ in range((1 << 20) // size):
        path_or_bytes(f"{server}/coffee.jpg", 1 << 20, budget)
    with pytest.raises(InputError, match=r"coffee\.jpg: .* are larger than 1 MiB; .*media_bytes"):
        path_or_bytes(f"{server}/coffee.jpg", 1 << 20, budget)


def test_declared_length_over_the_limit_is_refused_before_the_body(server):
    with pytest.raises(InputError, match="larger than 0 MiB"):  # not that the download broke off
        path_or_bytes(f"{server}/broken-off", 2000)


def test_no_server():
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/a.png: cannot be downloaded"):
        load_image("http://127.0.0.1:9/a.png")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no/such/file.png", r"^no/such/file\.png: No such file"),
        ("file:///no/such/file.png", r"^file:///no/such/file\.png: No such file"),
        (str(MEDIA), "is a directory"),
        ("/dev/zero", "not a regular file"),
        ("", "^the path '': is empty; give a path"),
        (" ", "^the path ' ': is empty"),
        (Path(), "^the path '': is empty"),
        ("nowhere/*.png", r"^nowhere/\*\.png: No such file or directory; patterns are not expanded, name each file"),
        ("~nobody-of-this-name/a.png", "^~nobody-of-this-name/a.png: "),
        ("nul\0byte.png", "null"),
        ("x" * 5000, "x…: File name too long"),
        ("ftp://localhost/a.png", r"ftp:// is not supported"),
        ("gopher+x://localhost/a.png", r"gopher\+x:// is not supported"),
        ("http:///nowhere", "cannot be downloaded"),
        ("http://[bad/a.png", "cannot be downloaded"),
        ("http://localhost/a b\r\nc", "cannot be downloaded"),
        ("data:image/png,abc", r"^data:image/png URL of 18 characters: a data URL must have the form"),
        ("data:image/png;base64", "a data URL must have the form"),
        ("data:image/png;base64,abc", "base64 text is damaged"),
        ("data:image/png;base64,????", "base64 text is damaged"),
        ("data:image/png;base64,é", "base64 text is damaged"),
        ("data:image/png;base64,", "is empty"),
        (b"", "^0 bytes: is empty"),
        (None, "^NoneType object: give a path"),
        (7, "^int object: give a path"),
        ({"url": "x"}, "^dict object: give a path"),
    ],
)
def test_errors_name_the_source(given, message):
    with pytest.raises(InputError, match=message) as error:
        load_image(given)
    assert len(str(error.value)) < 400
    with pytest.raises(InputError, match=message):
        video_visual(given, Preprocessing())


def test_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        load_image(tmp_path / "pipe")


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"coffee\.jpg: cannot be read \(Permission denied\)"):
        load_image(PHOTO)


def test_size_limits(monkeypatch):
    monkeypatch.setattr(media, "MAX_IMAGE_BYTES", 1000)
    for given in (PHOTO, data_url(PHOTO)):
        with pytest.raises(InputError, match="larger than 0 MiB"):
            image_visual(given, Preprocessing())


def test_a_path_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"home")
    (tmp_path / "~").mkdir()
    assert path_or_bytes("~/a.png", 9) == path_or_bytes(Path("~/a.png"), 9) == tmp_path / "a.png"
    (tmp_path / "~" / "a.png").write_bytes(b"a directory of this name")
    assert path_or_bytes("~/a.png", 9) == Path("~/a.png")
