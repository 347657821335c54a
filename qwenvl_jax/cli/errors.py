"""Exit codes, errors as sentences, and silence from libraries."""

import contextlib
import logging
import os
import sys
import warnings

from qwenvl_jax.errors import InputError, install
from qwenvl_jax.infer import compile_cache

OK, FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
NOT_DONE = 75  # sysexits.h: "temporary failure, the user is invited to try again"
_LOST = ("Gloo", "NCCL", "Coordination", "heartbeat")  # in jax's errors after another process has died


def one_of_several() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _no_devices() -> bool:
    """Whether jax has no device on the requested platform; its errors do not always name the reason."""
    try:
        return "jax" in sys.modules and not sys.modules["jax"].devices()
    except (RuntimeError, AssertionError):
        return True


def explain(error: Exception) -> tuple[int, str]:
    """The exit code and the sentence for an error. An unexpected error is reported as a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return BAD_INPUT, text
    if one_of_several() and any(word in text for word in _LOST):
        return FAILED, f"another process has ended or cannot be reached; start all processes again ({text[:200]})"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return BAD_INPUT, (
            "out of memory. Try --dtype bfloat16, a smaller --max-pixels, --nframes or --max-new-tokens, "
            "or a smaller model; in training, fewer --rows or --tokens with more --accumulate, or --lora-rank."
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return BAD_INPUT, f"{where}{error.strerror or text}"
    if _no_devices():
        platform = os.environ.get("JAX_PLATFORMS") or "usable"
        return BAD_INPUT, (
            f"there are no {platform} devices here. Set JAX_PLATFORMS=cpu, or on a machine that has them "
            f"{install('tpu')} (or the extra cuda)"
        )
    return FAILED, f"unexpected {type(error).__name__}: {text[:300]} (--debug shows where; please report it)"


def enable_compile_cache() -> None:
    """Caches compiled programs for the next command. If the directory is refused, says why and goes on."""
    try:
        compile_cache.enable()
    except InputError as e:
        print(f"qwenvl: {e}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet(debug: bool):
    """Silences jax, absl and other libraries on stderr; warnings of this package are printed."""
    if debug:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA reads it at start
    for name in ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):  # libtpu reads these
        os.environ.setdefault(name, "3")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    levels = {"": logging.CRITICAL, "absl": logging.CRITICAL, "jax": logging.CRITICAL, "qwenvl_jax": logging.WARNING}
    before = {name: logging.getLogger(name).level for name in levels}
    ours, shown = logging.getLogger("qwenvl_jax"), logging.StreamHandler(sys.stderr)
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        ours.addHandler(shown)
        ours.propagate = False  # orbax's import adds a handler to the root, which would print a warning again
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.propagate = True
        ours.removeHandler(shown)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def mute_libraries():
    """Discards what C++ code writes to stderr, such as that there is no TPU; Python's stderr still works."""
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
