"""Names and shapes of the Hugging Face tensors that make up each parameter.

A matmul's kernel (`Spec.transposed`) is the torch weight transposed to [in, out]; the patch convolution is first
flattened to a matrix. Other parameters keep their shape. A stacked parameter is one tensor per layer.
"""

from qwenvl_jax.config import Config
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.families import family_of
from qwenvl_jax.families.shared import core as core
from qwenvl_jax.params.specs import Spec, specs

# Prefixes of the decoder and the vision tower: in the hub's files, and as transformers 4.52 and newer saves them.
LAYOUTS = {"hub": ("model.", "visual."), "nested": ("model.language_model.", "model.visual.")}


def tensor_names(config: Config, layout: str = "hub") -> dict[str, tuple[str, ...]]:
    """Parameter path → its tensors' names (one per layer if stacked), in the order that files are written.

    The names are those of a checkpoint that is not quantised.
    Raises CheckpointError if the family's `tensor_names` and the modules do not list the same parameters.
    """
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    names, declared = family_of(config).tensor_names(config), specs(config.replace(quantised=()))
    for path in sorted(names.keys() ^ declared.keys()):
        which = "names no tensor for it" if path in declared else "names a tensor for it, but no module declares it"
        raise CheckpointError(f"{path}: the family {config.family!r} {which} (tensor_names)")
    out = {}
    for path, name in names.items():
        layers = declared[path].shape[0] if declared[path].stacked else 1
        out[path] = tuple(respell(name, "hub", layout).format(l=l) for l in range(layers))
    return out


def tensor_shape(config: Config, spec: Spec) -> tuple[int, ...]:
    """The shape in the files of a parameter, or of one layer of it."""
    if spec.role == "conv":
        v = config.vision
        return (spec.shape[-1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    shape = spec.shape[1:] if spec.stacked else spec.shape
    return shape[::-1] if spec.transposed else shape


def respell(name: str, source: str, target: str) -> str:
    for old, new in zip(LAYOUTS[source], LAYOUTS[target], strict=True):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
