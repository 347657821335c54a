"""A web page in headless Chromium, through Playwright (extra `agents`): an environment for computer_use.

Chromium must be on the machine; Playwright only drives it. What the page may reach is bounded in two places: Chromium
resolves no host and port but the allowed ones, so neither redirects nor web sockets get around it, and each request is
checked before it is sent. There are no downloads and no permissions.
"""

import contextlib
import io
import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from qwenvl_jax.agents.actions import Action
from qwenvl_jax.agents.chromium import key_names, kill, launch
from qwenvl_jax.agents.fence import Fence
from qwenvl_jax.agents.options import PageOptions
from qwenvl_jax.agents.worker import Worker
from qwenvl_jax.errors import InputError, install, shown
from qwenvl_jax.options import build

_CLICKS = {
    "left_click": ("left", 1), "right_click": ("right", 1), "middle_click": ("middle", 1), "double_click": ("left", 2),
    "triple_click": ("left", 3),
}  # fmt: skip
_TYPED = 500  # characters that are typed one by one; a longer text is put in at once
_MOST_WINDOWS = 5
_MOST_NOTES = 5


class Page:
    """A page that stays open until `close`; also a context manager.

    url: http://, https:// or file://, see `Fence`. options: fields of `PageOptions`.
    Raises InputError if Playwright or Chromium is missing, or the page does not open.
    All calls run in a thread of the page's own: Playwright refuses to run in a notebook's thread, and a page that keeps
    the browser busy is given up after `seconds`.
    """

    def __init__(self, url: str, **options):
        self.options = build(PageOptions, options)
        self._fence = Fence(url, self.options.origins)
        self._notes: list[str] = []  # what happened since the last action, and the model cannot see
        self._refused = False  # whether a request was
        self._loading: set = set()  # requests of pages that have no end yet
        self._pointer: tuple[float, float] | None = None  # in CSS pixels
        self._playwright: Any = None
        self._browser: Any = None
        self._pid = 0
        self._worker: Worker | None = Worker()
        try:
            self._call(self._open, url, extra=30)
        except BaseException:
            self.close()
            raise

    def screenshot(self) -> Image.Image:
        """The window, with `scale` pixels for each CSS pixel."""
        return self._call(self._screenshot)

    def act(self, action: Action) -> str:
        """Does an action of computer_use. The sentence tells of dialogs, which are closed, and of refused requests."""
        return self._call(self._act, action, extra=action.arguments.get("time", 0.0))

    @property
    def url(self) -> str:
        return self._call(lambda: self._page.url)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page, for tests and for checking what a run has done."""
        return self._call(lambda: self._page.evaluate(script))

    def close(self) -> None:
        if self._worker is not None:
            with contextlib.suppress(InputError):
                self._call(self._shut)
            self._end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _call(self, function: Callable, *arguments, extra: float = 0.0) -> Any:
        """Runs it in the page's thread. extra: seconds that it may take beside `seconds`."""
        if self._worker is None:
            raise InputError("the page is closed")
        try:
            return self._worker.call(self.options.seconds + extra, function, *arguments)
        except TimeoutError:
            self._end()
            said = f"the page kept the browser busy for more than {self.options.seconds:g} seconds"
            raise InputError(f"{said}; the browser is closed") from None
        except Exception as e:
            if not type(e).__module__.startswith("playwright"):
                raise
            raise InputError(f"the browser says: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from e

    def _end(self) -> None:
        """Kills the browser if it still runs, and lets the thread end."""
        kill(self._pid)
        self._pid = 0
        if self._worker is not None:
            self._worker.end(self._shut)
            self._worker = None

    # What follows runs in the page's thread.

    def _open(self, url: str) -> None:
        try:
            from playwright.sync_api import Error, sync_playwright
        except ImportError as e:
            raise InputError(f"a page needs Playwright: {install('agents')}") from e
        o, self._error = self.options, Error
        self._playwright = sync_playwright().start()
        self._browser, self._pid = launch(self._playwright, o.chromium, o.sandbox, self._fence)
        size = {"width": o.width, "height": o.height}
        self._context = self._browser.new_context(
            viewport=size, device_scale_factor=o.scale, accept_downloads=False, service_workers="block"
        )
        self._context.set_default_timeout(250 * o.seconds)  # milliseconds: before `_call` gives up
        self._context.route("**/*", self._route)
        self._context.on("dialog", self._dialog)
        self._context.on("page", self._window)
        self._context.on("request", lambda r: self._loading.add(r) if r.is_navigation_request() else None)
        for end in ("requestfinished", "requestfailed"):
            self._context.on(end, lambda r: self._loading.discard(r))
        try:
            self._context.new_page().goto(url, timeout=800 * o.seconds)
        except Error as e:
            why = "; if it leads to another origin, name that in origins=" if "NAME_NOT_RESOLVED" in str(e) else ""
            raise InputError(f"{url}: the page does not open ({str(e).splitlines()[0]}){why}") from e

    @property
    def _page(self):
        if not self._context.pages:
            raise InputError("the page has closed itself")
        return self._context.pages[-1]

    def _screenshot(self) -> Image.Image:
        png = self._page.screenshot(timeout=800 * self.options.seconds)
        return Image.open(io.BytesIO(png)).convert("RGB")

    def _act(self, action: Action) -> str:
        if action.tool != "computer_use":
            raise InputError(f"a page has a mouse and a keyboard (computer_use), and takes no {action.tool}")
        self._notes.clear()
        self._loading.clear()
        self._refused = False
        page, name, values = self._page, action.name, action.arguments
        if action.points and name != "left_click_drag":
            self._pointer = self._css(action.points[0])
            page.mouse.move(*self._pointer)
        pointer = self._pointer or (self.options.width / 2, self.options.height / 2)
        if name in _CLICKS:
            button, count = _CLICKS[name]
            page.mouse.click(*pointer, button=button, click_count=count)
        elif name == "left_click_drag":
            page.mouse.move(*pointer)
            page.mouse.down()
            self._pointer = self._css(action.points[0])
            page.mouse.move(*self._pointer, steps=10)
            page.mouse.up()
        elif name in ("scroll", "hscroll"):
            page.mouse.move(*pointer)
            pixels = values["pixels"] / self.options.scale
            page.mouse.wheel(*((0, -pixels) if name == "scroll" else (pixels, 0)))
        elif name == "type":
            text = values["text"]
            (page.keyboard.type if len(text) <= _TYPED else page.keyboard.insert_text)(text)
        elif name == "key":
            self._press(page, values["keys"])
        elif name == "wait":
            page.wait_for_timeout(1000 * values["time"])
        self._settle()
        if name in _CLICKS:
            with contextlib.suppress(self._error):
                if self._page.evaluate("document.activeElement?.tagName") == "SELECT":
                    self._note("this is a menu; choose with the keys up, down and enter")
        return ". ".join(["done", *self._notes])

    def _css(self, point: tuple[float, float]) -> tuple[float, float]:
        return point[0] / self.options.scale, point[1] / self.options.scale

    def _press(self, page, names: list[str]) -> None:
        keys = key_names(names)
        if keys == ["Alt", "ArrowLeft"]:  # a headless window does not do it by itself
            self._back()
            return
        for key in keys:
            page.keyboard.down(key)
        for key in reversed(keys):
            page.keyboard.up(key)

    def _settle(self) -> None:
        """Waits for what an action began; goes back from a page that is not allowed, or that could not be opened."""
        self._page.wait_for_timeout(1000 * self.options.settle)
        end = time.monotonic() + self.options.seconds / 4
        while self._loading and time.monotonic() < end:
            self._page.wait_for_timeout(50)
        with contextlib.suppress(self._error):  # too slow: the screenshot shows how far it came
            self._page.wait_for_load_state("domcontentloaded")
        url = self._page.url
        if url.startswith("chrome-error:") or url not in self._fence or (self._refused and url == "about:blank"):
            self._note("the page that it led to is not allowed, or does not open")
            self._back()

    def _back(self) -> None:
        """To the page before this one, or to the window before this one."""
        page, url = self._page, self._page.url
        page.go_back()
        if page.url == url and len(self._context.pages) > 1:
            page.close()

    def _route(self, route) -> None:
        url = route.request.url
        with contextlib.suppress(self._error):  # its page may be gone
            if url in self._fence:
                route.continue_()
                return
            self._note(f"a request to {shown(url)} was refused")
            self._refused = True
            route.abort("aborted")

    def _dialog(self, dialog) -> None:
        self._note(f"the page said {shown(dialog.message)}, which was closed")
        with contextlib.suppress(self._error):
            (dialog.accept if dialog.type == "beforeunload" else dialog.dismiss)()

    def _window(self, page) -> None:
        if len(self._context.pages) > _MOST_WINDOWS:
            page.close()
        elif len(self._context.pages) > 1:
            self._note("a new window opened, and is shown now")

    def _note(self, text: str) -> None:
        if text not in self._notes and len(self._notes) < _MOST_NOTES:
            self._notes.append(text)

    def _shut(self) -> None:
        playwright, browser = self._playwright, self._browser
        self._playwright = self._browser = None
        if browser:
            with contextlib.suppress(self._error):  # it may be dead
                browser.close()
            self._pid = 0
        if playwright:
            playwright.stop()
