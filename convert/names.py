"""Tensor names: which tensors of a Hugging Face checkpoint each parameter is made of.

A parameter that multiplies (`Spec.transposed`) is a torch weight transposed to [in, out]; the patch convolution is
flattened to a matrix first; everything else keeps its shape. A stacked parameter is one tensor a layer.
"""

from qwenvl_jax.config import Config
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.families import family_of
from qwenvl_jax.params.specs import Spec, specs

# Prefixes of the decoder and the vision tower: the hub's files, and newer saves of transformers (4.52 on).
LAYOUTS = {"hub": ("model.", "visual."), "nested": ("model.language_model.", "model.visual.")}


def tensor_names(config: Config, layout: str = "hub") -> dict[str, tuple[str, ...]]:
    """Parameter path → its tensors' names, one a layer for a stacked parameter, in the order files are written.

    The family has the names. Raises CheckpointError for a parameter without a name, or a name without a parameter.
    """
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    names, declared = family_of(config).tensor_names(config), specs(config)
    for path in sorted(names.keys() ^ declared.keys()):
        which = "names no tensor for it" if path in declared else "names a tensor for it, but no module declares it"
        raise CheckpointError(f"{path}: the family {config.family!r} {which} (tensor_names)")
    out = {}
    for path, name in names.items():
        for hub, prefix in zip(LAYOUTS["hub"], LAYOUTS[layout], strict=True):
            if name.startswith(hub):
                name = prefix + name.removeprefix(hub)
                break
        layers = declared[path].shape[0] if declared[path].stacked else 1
        out[path] = tuple(name.format(l=l) for l in range(layers))
    return out


def tensor_shape(config: Config, spec: Spec) -> tuple[int, ...]:
    """The shape, in the files, of (one layer of) a parameter."""
    if spec.role == "conv":
        v = config.vision
        return (spec.shape[-1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    shape = spec.shape[1:] if spec.stacked else spec.shape
    return shape[::-1] if spec.transposed else shape


def hub_name(name: str) -> str:
    """A name of either layout, as the hub's files spell it."""
    decoder, visual = LAYOUTS["nested"]
    for old, new in ((visual, "visual."), (decoder, "model.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
