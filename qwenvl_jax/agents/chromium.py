"""Finds a Chromium on the machine, and starts it so that pages can do little."""

import os
import shutil
from typing import Any

from qwenvl_jax.agents.fence import Fence
from qwenvl_jax.errors import InputError, shown

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
_MAC = ("Chromium", "Google Chrome", "Microsoft Edge")
_HOW = (
    "no Chromium is found. Install one (apt-get install chromium; brew install --cask chromium; playwright install "
    "chromium), or name its program with chromium="
)
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


def find_chromium(program: str | None = None) -> str | None:
    """The path of a Chromium: the named one, or the first that is found. Raises InputError if the named one is not."""
    if program is not None:
        if found := shutil.which(program):
            return found
        raise InputError(f"chromium is {shown(program)}, which is no program here")
    paths = [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in _MAC]
    return next((found for name in (*_NAMES, *paths) if (found := shutil.which(name))), None)
