"""Qwen2-VL and Qwen2.5-VL in JAX.

The names below are the public interface. Each is imported on first use, so `import qwenvl_jax` does not import jax.

Checkpoints: `load`, `save`, `find`, `read_config`, `Config`, `PRESETS`, `Model`.
Inputs: `Processor`, `MediaOptions`, `Sample`, `Batch`, `Ladder`, `make_batch`.
The model: `forward`, `make_mesh`.
Generation: `Engine`, `GenerateOptions`.
Training: `TrainOptions`, `Dataset`, `PackShape`, `finetune`, `read_metrics`, and `qwenvl_jax.train.loop.train`.
Evaluation: `evaluate`, `Evaluator`.
Errors: `InputError`, `CheckpointError`, `MediaError`, `OptionsError`, `ContextError`, `NonFiniteError`; each has a
`code`.

`train` is a package, so the function is not importable from here. The modules that the notebooks import by their path
(`eval.metrics`, `params.lora`, `cli.info`, `cli.plot`) are public too.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "params.checkpoint": ("load", "save"),
    "params.locate": ("find",),
    "params.directory": ("read_config",),
    "config": ("Config",),
    "families": ("PRESETS",),
    "types": ("Model", "Sample", "Batch"),
    "inputs.processor": ("Processor",),
    "inputs.options": ("MediaOptions",),
    "inputs.ladder": ("Ladder",),
    "inputs.pack": ("make_batch",),
    "model.qwenvl": ("forward",),
    "sharding": ("make_mesh",),
    "infer.engine": ("Engine",),
    "infer.options": ("GenerateOptions",),
    "train.options": ("TrainOptions",),
    "train.data": ("Dataset",),
    "train.records": ("PackShape",),
    "train.finetune": ("finetune",),
    "train.run": ("read_metrics",),
    "eval.evaluator": ("evaluate", "Evaluator"),
    "errors": ("InputError", "CheckpointError", "MediaError", "OptionsError", "ContextError", "NonFiniteError"),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *_MODULES})
