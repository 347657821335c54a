"""A web page in headless Chromium, through Playwright (extra `agents`): an environment for computer_use.

Chromium must be on the machine; Playwright only drives it. What the page may reach is bounded in two places: Chromium
resolves no host and port but the allowed ones, so neither redirects nor web sockets get around it, and each request is
checked before it is sent. There are no downloads, permissions or further windows.
"""

import contextlib
import io
import os
import queue
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from PIL import Image

from qwenvl_jax.agents.actions import Action
from qwenvl_jax.agents.fence import Fence
from qwenvl_jax.errors import InputError, OptionsError, install, shown
from qwenvl_jax.options import build, check, option

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
_MAC = ("Chromium", "Google Chrome", "Microsoft Edge")
_HOW = (
    "no Chromium is found. Install one (apt-get install chromium; brew install --cask chromium; playwright install "
    "chromium), or name its program with chromium="
)
_MOST_PIXELS = 1 << 25  # of a screenshot
_CLICKS = {
    "left_click": ("left", 1), "right_click": ("right", 1), "middle_click": ("middle", 1), "double_click": ("left", 2),
    "triple_click": ("left", 3),
}  # fmt: skip
_KEYS = {
    "ctrl": "Control", "control": "Control", "alt": "Alt", "option": "Alt", "shift": "Shift", "cmd": "Meta",
    "command": "Meta", "meta": "Meta", "super": "Meta", "win": "Meta", "enter": "Enter", "return": "Enter",
    "esc": "Escape", "escape": "Escape", "tab": "Tab", "backspace": "Backspace", "delete": "Delete", "del": "Delete",
    "space": " ", "up": "ArrowUp", "down": "ArrowDown", "left": "ArrowLeft", "right": "ArrowRight", "home": "Home",
    "end": "End", "insert": "Insert", "pageup": "PageUp", "pgup": "PageUp", "pagedown": "PageDown", "pgdn": "PageDown",
    "capslock": "CapsLock", **{f"f{n}": f"F{n}" for n in range(1, 13)},
    **{f"arrow{way}": f"Arrow{way.title()}" for way in ("up", "down", "left", "right")},
}  # fmt: skip
_MOST_WINDOWS = 5
_MOST_NOTES = 5
_HARDENED = (
    "--no-proxy-server",  # a proxy would resolve hosts by itself
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--deny-permission-prompts",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass(frozen=True)
class PageOptions:
    """How a page is opened."""

    width: int = option(1280, "of the window, in CSS pixels", least=64, most=8192)
    height: int = option(800, "of the window, in CSS pixels", least=64, most=8192)
    scale: float = option(1.0, "device scale factor: pixels of the screenshot per CSS pixel", least=0.25, most=4)
    origins: tuple[str, ...] = option((), 'what the page may reach beside its own origin, such as "https://a.org"')
    chromium: str | None = option(None, "the browser's program; found by name if it is not given")
    sandbox: bool = option(True, "Chromium's own sandbox; it does not work as root")
    seconds: float = option(30.0, "most seconds for one action or screenshot", above=0)
    settle: float = option(0.3, "seconds to wait after each action", least=0, most=60)

    def __post_init__(self):
        check(self)
        if self.width * self.height * self.scale**2 > _MOST_PIXELS:
            said = f"the screenshot would have {self.width} × {self.height} × {self.scale}² pixels"
            raise OptionsError(f"{said}; the most are {_MOST_PIXELS:,}")


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
        self._notes: list[str] = []  # what happened that the model cannot see
        self._pointer: tuple[float, float] | None = None  # in CSS pixels
        self._playwright: Any = None
        self._browser: Any = None
        self._pid = 0
        self._jobs: queue.SimpleQueue | None = queue.SimpleQueue()
        threading.Thread(target=_work, args=(self._jobs,), daemon=True).start()
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
        if self._jobs is not None:
            with contextlib.suppress(InputError):
                self._call(self._shut)
            self._end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _call(self, function: Callable, *arguments, extra: float = 0.0) -> Any:
        """Runs it in the page's thread. extra: seconds that it may take beside `seconds`."""
        if self._jobs is None:
            raise InputError("the page is closed")
        future: Future = Future()
        self._jobs.put((future, function, arguments))
        try:
            return future.result(self.options.seconds + extra)
        except InputError:
            raise
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
        pid, self._pid = self._pid, 0
        if pid:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None

    # What follows runs in the page's thread.

    def _open(self, url: str) -> None:
        try:
            from playwright.sync_api import Error, sync_playwright
        except ImportError as e:
            raise InputError(f"a page needs Playwright: {install('agents')}") from e
        o = self.options
        if o.sandbox and hasattr(os, "geteuid") and os.geteuid() == 0:
            said = "Chromium's sandbox does not work as root: run as another user"
            raise InputError(f"{said}, or pass sandbox=False for pages that you trust")
        self._playwright = sync_playwright().start()
        program = find_chromium(o.chromium) or self._playwright.chromium.executable_path
        if not os.path.exists(program):
            raise InputError(_HOW)
        arguments = [*_HARDENED, f"--host-resolver-rules={self._fence.rules}"]
        launch = self._playwright.chromium.launch
        self._browser = launch(executable_path=program, chromium_sandbox=o.sandbox, args=arguments)
        processes = self._browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
        self._pid = next(p["id"] for p in processes if p["type"] == "browser")
        size = {"width": o.width, "height": o.height}
        self._context = self._browser.new_context(
            viewport=size, device_scale_factor=o.scale, accept_downloads=False, service_workers="block"
        )
        self._context.set_default_timeout(800 * o.seconds)  # milliseconds: before that of `_call`
        self._context.route("**/*", self._route)
        self._context.on("dialog", self._dialog)
        self._context.on("page", self._window)
        try:
            self._context.new_page().goto(url, wait_until="load")
        except Error as e:
            why = "; if it leads to another origin, name that in origins=" if "NAME_NOT_RESOLVED" in str(e) else ""
            raise InputError(f"{url}: the page does not open ({str(e).splitlines()[0]}){why}") from e

    @property
    def _page(self):
        return self._context.pages[-1]

    def _screenshot(self) -> Image.Image:
        return Image.open(io.BytesIO(self._page.screenshot(type="png", scale="device"))).convert("RGB")

    def _act(self, action: Action) -> str:
        if action.tool != "computer_use":
            raise InputError(f"a page has a mouse and a keyboard (computer_use), and takes no {action.tool}")
        self._notes.clear()
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
            page.keyboard.type(values["text"])
        elif name == "key":
            self._press(page, values["keys"])
        elif name == "wait":
            page.wait_for_timeout(1000 * values["time"])
        self._page.wait_for_timeout(1000 * self.options.settle)
        self._page.wait_for_load_state("domcontentloaded")
        self._stay()
        return ". ".join(["done", *self._notes])

    def _css(self, point: tuple[float, float]) -> tuple[float, float]:
        return point[0] / self.options.scale, point[1] / self.options.scale

    def _press(self, page, names: list[str]) -> None:
        keys = [_KEYS.get(name.lower(), name if len(name) == 1 else None) for name in names]
        if None in keys:
            known = ", ".join(_KEYS)
            raise InputError(f"there is no key {shown(names[keys.index(None)])}; the keys are {known}, and characters")
        if keys == ["Alt", "ArrowLeft"]:  # a window without a frame does not do it by itself
            page.go_back()
            return
        for key in keys:
            page.keyboard.down(key)
        for key in reversed(keys):
            page.keyboard.up(key)

    def _stay(self) -> None:
        """Goes back from a page that is not allowed, or that could not be opened."""
        page = self._page
        if page.url.startswith("chrome-error:") or page.url not in self._fence:
            self._note("the page that it led to is not allowed, or does not open")
            page.go_back()

    def _route(self, route) -> None:
        url = route.request.url
        if url in self._fence:
            route.continue_()
            return
        self._note(f"a request to {shown(url)} was refused")
        route.abort("aborted")

    def _dialog(self, dialog) -> None:
        self._note(f"the page said {shown(dialog.message)}, which was closed")
        if dialog.type == "beforeunload":
            dialog.accept()
        else:
            dialog.dismiss()

    def _window(self, page) -> None:
        if len(self._context.pages) > _MOST_WINDOWS:
            page.close()
        elif len(self._context.pages) > 1:
            self._note("a new window opened, and is shown now")

    def _note(self, text: str) -> None:
        if text not in self._notes and len(self._notes) < _MOST_NOTES:
            self._notes.append(text)

    def _shut(self) -> None:
        if self._browser:
            self._browser.close()
            self._pid = 0
        if self._playwright:
            self._playwright.stop()


def _work(jobs: queue.SimpleQueue) -> None:
    while job := jobs.get():
        future, function, arguments = job
        try:
            future.set_result(function(*arguments))
        except BaseException as e:
            future.set_exception(e)


def find_chromium(program: str | None = None) -> str | None:
    """The path of a Chromium: the named one, or the first that is found. Raises InputError if the named one is not."""
    if program is not None:
        if found := shutil.which(program):
            return found
        raise InputError(f"chromium is {shown(program)}, which is no program here")
    paths = [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in _MAC]
    return next((found for name in (*_NAMES, *paths) if (found := shutil.which(name))), None)
