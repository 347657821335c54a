"""Exit codes, errors as sentences, and libraries that keep quiet meanwhile."""

import contextlib
import logging
import os
import sys
import warnings

from qwenvl_jax.errors import InputError
from qwenvl_jax.infer import compile_cache

OK, FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
NOT_DONE = 75  # sysexits.h: "temporary failure, the user is invited to try again"
_EXCHANGES = ("Gloo", "NCCL", "Coordination", "heartbeat")  # in errors of jax where another process is gone


def one_of_several() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _no_devices() -> bool:
    """Was jax asked for a platform that is not there? Its errors do not always say so."""
    try:
        return "jax" in sys.modules and not sys.modules["jax"].devices()
    except (RuntimeError, AssertionError):
        return True


def explain(error: Exception) -> tuple[int, str]:
    """The exit code and the sentence for an error; anything not foreseen is called a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return BAD_INPUT, text
    if one_of_several() and any(word in text for word in _EXCHANGES):
        return FAILED, f"another process has ended or cannot be reached; start all of them again ({text[:200]})"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return BAD_INPUT, (
            "out of memory. Try --dtype bfloat16, a smaller --max-pixels, --nframes or --max-new-tokens, "
            "or a smaller model; in training fewer --rows or --tokens with more --accumulate, or --lora-rank."
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return BAD_INPUT, f"{where}{error.strerror or text}"
    if _no_devices():
        wanted = os.environ.get("JAX_PLATFORMS") or "usable"
        return BAD_INPUT, (
            f"there are no {wanted} devices here; pip install 'qwenvl-jax[tpu]' or 'qwenvl-jax[cuda]' where there are, "
            "or set JAX_PLATFORMS=cpu"
        )
    return FAILED, f"unexpected {type(error).__name__}: {text[:300]} (--debug shows where; please report it)"


def enable_compile_cache() -> None:
    """Keeps compiled programs for the next command, or says why not; the command works without."""
    try:
        compile_cache.enable()
    except InputError as e:
        print(f"qwenvl: {e}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet(debug: bool):
    """Keeps the chatter of jax, absl and friends off stderr; this package's own messages are shown there."""
    if debug:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read by XLA when it starts
    for name in ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):  # by libtpu, where it is installed without a TPU
        os.environ.setdefault(name, "3")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    levels = {"": logging.CRITICAL, "absl": logging.CRITICAL, "jax": logging.CRITICAL, "qwenvl_jax": logging.WARNING}
    before = {name: logging.getLogger(name).level for name in levels}
    shown = logging.StreamHandler(sys.stderr)
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.getLogger("qwenvl_jax").addHandler(shown)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("qwenvl_jax").removeHandler(shown)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def mute_libraries():
    """Keeps compilers in C++ from saying on stderr that there is no such chip here; Python still writes there."""
    there, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        with open(os.dup(there), "w", encoding="utf-8") as ours:
            os.dup2(null, 2)
            with contextlib.redirect_stderr(ours if sys.stderr is sys.__stderr__ else sys.stderr):
                yield
    finally:
        os.dup2(there, 2)
        os.close(there)
        os.close(null)
