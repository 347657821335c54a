"""How SIGTERM and Ctrl-C end a run."""

import signal
import threading

import jax


class Signals:
    """Records SIGTERM and Ctrl-C, so that the loop stops after its step. A second signal acts as usual."""

    def __enter__(self):
        self.caught, self._old = None, {}
        if threading.current_thread() is threading.main_thread():
            # With several processes, JAX catches SIGTERM and agrees on a step to stop at; Ctrl-C acts as usual.
            signals = () if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
            self._old = {s: signal.signal(s, self._catch) for s in signals}
        return self

    def _catch(self, number, _):
        self.caught = number
        self.__exit__()

    def __exit__(self, *exception):
        while self._old:
            signal.signal(*self._old.popitem())

    def reached(self, step: int) -> bool:
        """Whether to stop. All processes get the same answer."""
        if jax.process_count() == 1:
            return self.caught is not None
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.caught = signal.SIGTERM
        return self.caught is not None
