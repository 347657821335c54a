"""Qwen2-VL and Qwen2.5-VL in JAX.

The public names are imported on first use, so that `import qwenvl_jax` and `qwenvl --help` do not pay for
jax: `load`, `Engine`, `forward`, `Processor`, `Config`, `PRESETS`, `Model`, `InputError`.
"""

from importlib import import_module

_HOME = {
    "load": "qwenvl_jax.params.checkpoint",
    "Engine": "qwenvl_jax.infer.engine",
    "forward": "qwenvl_jax.model.qwenvl",
    "Processor": "qwenvl_jax.inputs.processor",
    "Config": "qwenvl_jax.config",
    "PRESETS": "qwenvl_jax.families",
    "Model": "qwenvl_jax.types",
    "InputError": "qwenvl_jax.errors",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *_HOME})
