"""A web page as an agent's environment: needs Playwright and a Chromium; the pages are made here."""

import asyncio
import contextlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.agents.actions import Action, View
from qwenvl_jax.agents.chromium import find_chromium, kill
from qwenvl_jax.agents.loop import run
from qwenvl_jax.agents.page import Page
from qwenvl_jax.agents.record import read, replay
from qwenvl_jax.answers.draw import _PALETTE
from qwenvl_jax.answers.tools import ToolCall, write
from qwenvl_jax.errors import InputError, OptionsError

FORM = """<!doctype html><meta charset="utf-8"><title>Order</title>
<style>body { margin: 0; font: 14px sans-serif; height: 2000px }
input, button, select, #pad { position: absolute }
#name { left: 12%; top: 60px; width: 30% } #sort { left: 55.3%; top: 60px } #agree { left: 71.7%; top: 131px }
#pad { left: 8%; top: 150px; width: 40%; height: 60px; background: #cde }
#send { left: 44.1%; top: 1900px }</style>
<form action="/done"><input id="name" name="name"><select id="sort" name="sort"><option>black</option>
<option>green</option></select><input id="agree" name="agree" type="checkbox"><button id="send">Send</button></form>
<div id="pad"></div>
<script>
window.heard = [];
for (const kind of ["mousedown", "mouseup", "dblclick", "contextmenu"]) document.addEventListener(kind, e => {
  heard.push([kind, e.target.id, e.clientX, e.clientY, e.button]) }, true);
</script>"""


SLOW = "<p>Slow"


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        page = self.server.pages.get(urlsplit(self.path).path)
        time.sleep(1.5 * (page == SLOW))
        if isinstance(page, int):  # a redirect to this port
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{page}/elsewhere")
        else:
            self.send_response(200 if page else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        if isinstance(page, str):
            self.wfile.write(page.encode())

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def site(**pages):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.pages = {f"/{name}": page for name, page in pages.items()} | {"/favicon.ico": " "}
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("playwright", reason="pages need the agents extra")
    if not (found := find_chromium()):
        pytest.skip("there is no Chromium on this machine")
    return found


def opened(url: str, **options) -> Page:
    return Page(url, **({"sandbox": False} | options))


def computer(name: str, *points, **arguments) -> Action:
    return Action("computer_use", name, points, arguments)


class Clerk:
    """A scripted model: it does one thing after the other, where the elements are on the screenshot that it is shown.

    It knows the page as a person does: an element's middle, in pixels of the resized screenshot (or thousandths).
    """

    def __init__(self, page: Page, view: View, *steps):
        self.page, self.view, self.steps, self.aimed = page, view, list(steps), []

    def middle(self, element: str) -> tuple[float, float]:
        """Of an element, in CSS pixels of the window."""
        script = f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector('{element}')"
        return tuple(self.page.evaluate(f"{script}.getBoundingClientRect())"))

    def __call__(self, messages, tools):
        items = [item for message in messages if isinstance(message["content"], list) for item in message["content"]]
        screen = [item["image"] for item in items if item["type"] == "image"][-1]
        arguments = dict(self.steps.pop(0))
        if element := arguments.pop("on", None):
            x, y = self.middle(element)
            sizes, scale = self.view.sizes(screen), self.page.options.scale
            width, height = sizes.of(self.view.coordinates)
            arguments["coordinate"] = [
                round(x * scale * width / screen.width), round(y * scale * height / screen.height)
            ]  # fmt: skip
            self.aimed.append((element, (x, y), (screen.width / width / scale, screen.height / height / scale)))
        return write([ToolCall("computer_use", arguments)], f"Step {len(self.aimed)}.")


SIZES, SCALES = [(640, 480), (1280, 800), (1111, 1333)], [1, 1.5, 2]
STEPS = [
    {"action": "left_click", "on": "#name"},
    {"action": "type", "text": "Zoë 茶"},
    {"action": "left_click", "on": "#agree"},
    {"action": "mouse_move", "on": "#pad"},
    {"action": "double_click", "on": "#pad"},
    {"action": "left_click", "on": "#sort"},
    {"action": "key", "keys": ["down"]},
    {"action": "key", "keys": ["enter"]},
    {"action": "scroll", "pixels": -9000},
    {"action": "left_click", "on": "#send"},
    {"action": "terminate", "status": "success"},
]


@pytest.mark.browser
@pytest.mark.parametrize(
    ("size", "scale", "coordinates"),
    [(size, scale, "resized") for size in SIZES for scale in SCALES]
    + [(size, scale, "thousandths") for size, scale in zip(SIZES, SCALES, strict=True)],
)
def test_a_form_is_filled_in_and_sent(chromium, size, scale, coordinates, tmp_path):
    view = View(coordinates=coordinates)
    with site(form=FORM, done="<title>Thanks</title>Thank you") as server:
        with opened(f"{server.url}/form", width=size[0], height=size[1], scale=scale) as page:
            assert np.abs(np.array(page.screenshot().size) - np.array(size) * scale).max() < 1
            clerk = Clerk(page, view, *STEPS)
            heard = []

            def model(messages, tools):
                heard[:] = page.evaluate("window.heard || []") or heard
                return clerk(messages, tools)

            outcome = run(model, page, "Order tea", view=view, folder=tmp_path)
            assert outcome.status == "success", outcome.text
            assert page.url.startswith(f"{server.url}/done?")
    sent = [parse_qs(urlsplit(path).query) for path in server.asked if path.startswith("/done")]
    assert sent == [{"name": ["Zoë 茶"], "sort": ["green"], "agree": ["on"]}]
    assert outcome.steps[5].result == "done. this is a menu; choose with the keys up, down and enter"
    # Each click came to its element, as near to its middle as whole coordinates of the model allow.
    presses = [event for event in heard if event[0] == "mousedown"]
    aimed = [
        aim for aim, step in zip(clerk.aimed, [s for s in STEPS if "on" in s], strict=True) if "click" in step["action"]
    ]
    aimed = [aim for aim in aimed for _ in range(2 if aim[0] == "#pad" else 1)][: len(presses)]
    assert len(presses) == 5  # that of #send left the page
    for (_, element, x, y, button), (name, middle, pixel) in zip(presses, aimed, strict=True):
        assert f"#{element}" == name and button == 0
        assert abs(x - middle[0]) <= pixel[0] / 2 + 1 and abs(y - middle[1]) <= pixel[1] / 2 + 1
    shows_the_clicks(tmp_path, clerk, scale)


def shows_the_clicks(folder, clerk: Clerk, scale: float) -> None:
    """The replay has all steps, and rings around the elements' middles."""
    html = replay(folder).read_text("utf-8")
    found = read(folder)
    assert html.count("<img") == len(STEPS) == len(found.steps) and "Zoë 茶" in html and "success" in html
    aimed = iter(clerk.aimed)
    for step in found.steps:
        if not step.action.points:
            continue
        _, middle, pixel = next(aimed)
        (point,) = step.action.points
        for side in (0, 1):
            assert abs(point[side] / scale - middle[side]) <= pixel[side] / 2 + 1
        x, y = map(round, point)
        colours = {}
        for name in (step.picture, step.picture.replace(".png", "-action.png")):
            with Image.open(folder / name) as picture:
                around = picture.convert("RGB").crop((x - 3, y - 1, x + 4, y + 2))
            colours[name] = {f"#{r:02X}{g:02X}{b:02X}" for _, (r, g, b) in around.getcolors()} & set(_PALETTE)
        assert list(map(len, colours.values())) == [0, 1]


@pytest.mark.browser
def test_the_mouse_and_the_keys(chromium):
    with site(form=FORM) as server, opened(f"{server.url}/form", scale=2, width=800, height=600) as page:
        assert page.act(computer("right_click", (400, 360))) == "done"
        page.act(computer("middle_click", (402, 362)))
        page.act(computer("left_click_drag", (500, 400)))  # from where the pointer is
        heard = page.evaluate("window.heard")
        assert [e for e in heard if e[0] == "mousedown"] == [
            ["mousedown", "pad", 200, 180, 2], ["mousedown", "pad", 201, 181, 1], ["mousedown", "pad", 201, 181, 0]
        ]  # fmt: skip
        assert heard[-1] == ["mouseup", "pad", 250, 200, 0]
        page.act(computer("left_click", (300, 140)))
        page.act(computer("type", text="abc"))
        page.act(computer("key", keys=["ctrl", "a"]))
        page.act(computer("key", keys=["Backspace"]))
        page.act(computer("type", text="de"))
        assert page.evaluate("document.querySelector('#name').value") == "de"
        page.act(computer("scroll", pixels=-500.0))
        page.act(computer("wait", time=0.3))
        assert page.evaluate("window.scrollY") == 250
        page.act(computer("scroll", pixels=5000.0))
        page.act(computer("wait", time=0.3))
        assert page.evaluate("window.scrollY") == 0
        with pytest.raises(InputError, match="no key 'hyper'; the keys are ctrl"):
            page.act(computer("key", keys=["hyper"]))
        with pytest.raises(InputError, match="takes no mobile_use"):
            page.act(Action("mobile_use", "click", ((1, 1),), {}))
    with pytest.raises(InputError, match="the page is closed"):
        page.screenshot()


LINKS = """<!doctype html><style>a, button { position: absolute; left: 10px; width: 100px; height: 20px }</style>
<a style="top: 10px" href="http://127.0.0.1:PORT/x">link</a><a style="top: 40px" href="/away">redirect</a>
<a style="top: 70px" target="_blank" href="/next">window</a>
<a style="top: 100px" target="_blank" href="http://127.0.0.1:PORT/y">window elsewhere</a>
<a style="top: 220px" href="/slow">slow</a>
<a style="top: 130px" href="/file" download>download</a><a style="top: 160px" href="/next">next</a>
<button style="top: 190px" onclick="alert('Hello ' + confirm('Really?'))">say</button>
<img src="http://127.0.0.1:PORT/z.png"><iframe src="http://127.0.0.1:PORT/frame"></iframe>
<script>fetch("http://127.0.0.1:PORT/fetch").catch(() => 0); new WebSocket("ws://127.0.0.1:PORT/socket");
fetch("/away").catch(() => 0); navigator.geolocation.getCurrentPosition(() => { document.title = "found" })</script>"""


@pytest.mark.browser
def test_a_page_stays_where_it_may_be(chromium, tmp_path):
    with site(elsewhere="secret") as other:
        links = LINKS.replace("PORT", str(other.server_port))
        with site(links=links, away=other.server_port, next="<p>Next", slow=SLOW, file="data") as server:
            with opened(f"{server.url}/links", width=400, height=300) as page:

                def click(y: int) -> str:
                    return page.act(computer("left_click", (50.0, y + 10.0)))

                assert "/x' was refused" in click(10) and page.url == f"{server.url}/links"
                assert "not allowed, or does not open" in click(40) and page.url == f"{server.url}/links"
                assert "a new window opened" in click(70) and page.url == f"{server.url}/next"
                page.act(computer("key", keys=["alt", "left"]))
                assert page.url == f"{server.url}/links"
                assert "/y' was refused" in click(100) and page.url == f"{server.url}/links"
                click(130)
                assert page.url == f"{server.url}/links"
                assert click(160) == "done" and page.url == f"{server.url}/next"
                page.act(computer("key", keys=["alt", "left"]))
                assert page.url == f"{server.url}/links"
                assert click(220) == "done" and page.url == f"{server.url}/slow"  # it is waited for
                page.act(computer("key", keys=["alt", "left"]))
                said = click(190)
                assert "'Really?'" in said and "'Hello false'" in said
                assert page.evaluate("document.title") == ""
        assert other.asked == []
    folder = tmp_path / "site"
    folder.mkdir()
    (tmp_path / "secret.html").write_text("<title>secret</title>")
    (folder / "page.html").write_text("<iframe src='../secret.html'></iframe><a href='../secret.html'>a</a><p>b")
    with opened((folder / "page.html").as_uri()) as page:
        page.evaluate("document.querySelector('a').click()")
        page.act(computer("wait", time=0.1))
        assert page.url.endswith("page.html")


SCENE = """<!doctype html><style>body { margin: 0 } img { position: absolute; width: 100vw; height: 100vh }</style>
<img src="scene.png"><script>
document.onclick = e => {
  const x = e.clientX / innerWidth, y = e.clientY / innerHeight  // the pizza in 140 × 140: 102, 6, 124, 34
  document.title = x > 0.73 && x < 0.886 && y > 0.043 && y < 0.243 ? "the pizza" : "something else"
}</script>"""


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scale"), [(140, 1), (70, 2)])
def test_the_demo_finds_a_thing_on_a_page(chromium, width, scale, tmp_path):
    """The demo locates; it was not trained to call tools, so a script writes its box as a click."""
    import qwenvl_jax as qv
    from qwenvl_jax.demo import SAMPLES

    engine = qv.Engine(qv.load("demo"))

    def model(messages, tools):
        if len(messages) > 1:
            return write([ToolCall("computer_use", {"action": "terminate", "status": "success"})])
        question = [{"role": "user", "content": [messages[0]["content"][1], messages[0]["content"][0]]}]
        found = engine.generate([question], temperature=0, max_new_tokens=64)[0].objects("resized")
        ((x1, y1), (x2, y2)) = found.objects[0].points
        return write([ToolCall("computer_use", {"action": "left_click", "coordinate": [(x1 + x2) / 2, (y1 + y2) / 2]})])

    (tmp_path / "scene.html").write_text(SCENE)
    shutil.copy(f"{SAMPLES}/scene.png", tmp_path)
    with opened((tmp_path / "scene.html").as_uri(), width=width, height=width, scale=scale) as page:
        run(model, page, "Locate the pizza.", view=View.of(engine.processor))
        assert page.evaluate("document.title") == "the pizza"


@pytest.mark.browser
def test_a_page_that_hangs_is_given_up(chromium):
    with site(hang="<button onclick='for (;;);' style='width: 300px; height: 300px'>hang</button>") as server:
        page = opened(f"{server.url}/hang", seconds=4, width=400, height=400)
        began = time.monotonic()
        with pytest.raises(InputError, match="kept the browser busy for more than 4 seconds; the browser is closed"):
            page.act(computer("left_click", (100.0, 100.0)))
        assert time.monotonic() - began < 10
        page.close()


@pytest.mark.browser
def test_pages_work_in_notebooks(chromium):
    """Where an event loop runs in the thread already."""

    async def cell(url):
        with opened(url, width=200, height=100) as page:
            return page.screenshot().size

    with site(a="<p>a") as server:
        assert asyncio.run(cell(f"{server.url}/a")) == (200, 100)


@pytest.mark.browser
def test_pages_that_do_not_open(chromium):
    with site() as other, site(away=other.server_port) as server:
        with pytest.raises(InputError, match=r"does not open .*name that in origins="):
            opened(f"{server.url}/away")
    with pytest.raises(InputError, match="does not open"):
        opened(f"{server.url}/gone")


@pytest.mark.browser
def test_without_a_sandbox_only_if_it_is_said(chromium, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(InputError, match="sandbox does not work as root: run as another user, or pass sandbox=False"):
        Page("http://127.0.0.1:9/")


def test_only_own_processes_are_killed():
    mine = subprocess.Popen(["sleep", "60"])
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    orphan = int(subprocess.run(["sh", "-c", "sleep 60 >/dev/null & echo $!"], check=True, **quiet).stdout)
    for pid in (0, orphan, mine.pid):
        kill(pid)
    assert mine.wait(10) == -signal.SIGKILL
    kill(mine.pid)  # which is gone
    os.kill(orphan, signal.SIGKILL)  # raises if it is


def test_without_playwright(monkeypatch):
    monkeypatch.setitem(sys.modules, "playwright", None)
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    with pytest.raises(InputError, match=r"a page needs Playwright: .*pip install .*\[agents\]"):
        Page("http://127.0.0.1:9/")


@pytest.mark.parametrize(
    "bad",
    [{"scale": 5}, {"width": 0}, {"width": 8000, "height": 8000}, {"seconds": 0}, {"window": 5}, {"origins": ["a"]}],
)
def test_bad_options_of_a_page(bad):
    with pytest.raises(OptionsError):
        Page("http://127.0.0.1:9/", **bad)


def test_a_browser_is_found_by_name(tmp_path, monkeypatch):
    program = tmp_path / "google-chrome"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_chromium() == str(program) == find_chromium(str(program))
    with pytest.raises(InputError, match="'no-such-browser', which is no program here"):
        find_chromium("no-such-browser")
