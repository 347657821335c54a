"""Finds a Chromium on the machine, starts it so that pages can do little, and names its keys."""

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from qwenvl_jax.agents.fence import Fence
from qwenvl_jax.errors import InputError, shown

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
_MAC = ("Chromium", "Google Chrome", "Microsoft Edge")
_HOW = (
    "no Chromium is found. Install one (apt-get install chromium; brew install --cask chromium; playwright install "
    "chromium), or name its program with chromium="
)
_KEYS = {
    "ctrl": "Control", "control": "Control", "alt": "Alt", "option": "Alt", "shift": "Shift", "cmd": "Meta",
    "command": "Meta", "meta": "Meta", "super": "Meta", "win": "Meta", "enter": "Enter", "return": "Enter",
    "esc": "Escape", "escape": "Escape", "tab": "Tab", "backspace": "Backspace", "delete": "Delete", "del": "Delete",
    "space": " ", "up": "ArrowUp", "down": "ArrowDown", "left": "ArrowLeft", "right": "ArrowRight", "home": "Home",
    "end": "End", "insert": "Insert", "pageup": "PageUp", "pgup": "PageUp", "pagedown": "PageDown", "pgdn": "PageDown",
    "capslock": "CapsLock", **{f"f{n}": f"F{n}" for n in range(1, 13)},
    **{f"arrow{way}": f"Arrow{way.title()}" for way in ("up", "down", "left", "right")},
}  # fmt: skip
_FLAGS = (
    "--no-proxy-server",  # a proxy would resolve hosts by itself
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--deny-permission-prompts",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-smooth-scrolling",  # a screenshot right after an action shows its end
)


def launch(playwright: Any, program: str | None, sandbox: bool, fence: Fence) -> tuple[Any, int]:
    """(Playwright's Browser, its process id). program: as in `find_chromium`. Raises InputError if there is none."""
    if sandbox and hasattr(os, "geteuid") and os.geteuid() == 0:
        said = "Chromium's sandbox does not work as root: run as another user"
        raise InputError(f"{said}, or pass sandbox=False for pages that you trust")
    path = find_chromium(program) or playwright.chromium.executable_path
    if not os.path.exists(path):
        raise InputError(_HOW)
    arguments = [*_FLAGS, f"--host-resolver-rules={fence.rules}"]
    browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=sandbox, args=arguments)
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    return browser, next(process["id"] for process in processes if process["type"] == "browser")


def kill(pid: int) -> None:
    """Kills a browser that this process started; 0 is none. Another process that has its id by now is left alone."""
    above = pid
    while above > 1 and above != os.getpid():
        try:
            above = int(Path(f"/proc/{above}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it has ended, or this is no Linux
            above = os.getpid() if not os.path.exists("/proc/self") else 0
    if above > 1:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def find_chromium(program: str | None = None) -> str | None:
    """The path of a Chromium: the named one, or the first that is found. Raises InputError if the named one is not."""
    if program is not None:
        if found := shutil.which(program):
            return found
        raise InputError(f"chromium is {shown(program)}, which is no program here")
    paths = [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in _MAC]
    return next((found for name in (*_NAMES, *paths) if (found := shutil.which(name))), None)


def key_names(names: list[str]) -> list[str]:
    """Playwright's names of keys, from those that models write ("ctrl", "enter", "a"). Raises InputError."""
    keys = [_KEYS.get(name.lower(), name if len(name) == 1 else "") for name in names]
    if "" in keys:
        known = ", ".join(_KEYS)
        raise InputError(f"there is no key {shown(names[keys.index('')])}; the keys are {known}, and characters")
    return keys
