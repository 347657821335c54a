"""How long something takes, in a process that does other things too."""

import gc
import time
from collections.abc import Callable


def timed(run: Callable, enough: float, tries: int = 3) -> tuple[float, object]:
    """(seconds of CPU time of this thread, what `run` returned): the least of a few tries, until one is below `enough`.

    The garbage collector is off meanwhile: in a process with jax it alone may take a fifth of a second.
    """
    least, on = float("inf"), gc.isenabled()
    gc.disable()
    try:
        for _ in range(tries):
            start = time.thread_time()
            result = run()
            least = min(least, time.thread_time() - start)
            if least < enough:
                break
    finally:
        if on:
            gc.enable()
    return least, result
