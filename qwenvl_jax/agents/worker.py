"""A thread that does one thing after the other for its owner, who waits no longer than it says."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Worker:
    """`call` runs a function in the thread. After `end` there are no more calls."""

    def __init__(self):
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def call(self, seconds: float, function: Callable, *arguments) -> Any:
        """Its result or exception. Raises TimeoutError after so many seconds; the thread does not stop then."""
        future: Future = Future()
        self._jobs.put((future, function, arguments))
        return future.result(seconds)

    def end(self, last: Callable) -> None:
        """Lets the thread end after what it does now, and after a last call. Does not wait for it."""
        self._jobs.put((Future(), last, ()))
        self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            future, function, arguments = job
            try:
                future.set_result(function(*arguments))
            except BaseException as e:
                future.set_exception(e)
