"""The options of runs and pages."""

from dataclasses import dataclass

from qwenvl_jax.errors import OptionsError
from qwenvl_jax.options import check, option

_MOST_PIXELS = 1 << 25  # of a screenshot


@dataclass(frozen=True)
class Limits:
    """When a run ends without the model's say."""

    steps: int = option(50, "most actions, and answers that ask for none", least=1, most=10_000)
    seconds: float = option(900.0, "most seconds; checked before each step", above=0)
    repeats: int = option(5, "end when the same action comes so many times in a row", least=2)
    pictures: int = option(3, "how many pictures stay in the conversation; the newest screenshot always does", least=1)

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class PageOptions:
    """How a page is opened."""

    width: int = option(1280, "of the window, in CSS pixels", least=64, most=8192)
    height: int = option(800, "of the window, in CSS pixels", least=64, most=8192)
    scale: float = option(1.0, "device scale factor: pixels of the screenshot per CSS pixel", least=0.25, most=4)
    origins: tuple[str, ...] = option((), 'what the page may reach beside its own origin, such as "https://a.org"')
    chromium: str | None = option(None, "the browser's program; found by name if it is not given")
    sandbox: bool = option(True, "Chromium's own sandbox; it does not work as root")
    seconds: float = option(30.0, "most seconds for one action or screenshot", least=1)
    settle: float = option(0.3, "seconds to wait after each action, beside the loading of a page", least=0, most=5)

    def __post_init__(self):
        check(self)
        if self.width * self.height * self.scale**2 > _MOST_PIXELS:
            said = f"the screenshot would have {self.width} × {self.height} × {self.scale}² pixels"
            raise OptionsError(f"{said}; the most are {_MOST_PIXELS:,}")
