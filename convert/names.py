"""Names and shapes of the Hugging Face tensors that make up each parameter.

A matmul's kernel (`Spec.transposed`) is the torch weight transposed to [in, out]; the patch convolution is first
flattened to a matrix. Other parameters keep their shape. A stacked parameter is one tensor per layer.
"""

from qwenvl_jax.config import Config
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.families import family_of
from qwenvl_jax.params.specs import Spec, specs

# Prefixes of the decoder and the vision tower: in the hub's files, and as transformers 4.52 and newer saves them.
LAYOUTS = {"hub": ("model.", "visual."), "nested": ("model.language_model.", "model.visual.")}


def tensor_names(config: Config, layout: str = "hub") -> dict[str, tuple[str, ...]]:
    """Parameter path → its tensors' names (one per layer if stacked), in the order that files are written.

    Raises CheckpointError if the family's `tensor_names` and the modules do not list the same parameters.
    """
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    names, declared = family_of(config).tensor_names(config), specs(config)
    for path in sorted(names.keys() ^ declared.keys()):
        which = "names no tensor for it" if path in declared else "names a tensor for it, but no module declares it"
        raise CheckpointError(f"{path}: the family {config.family!r} {which} (tensor_names)")
    out = {}
    for path, name in names.items():
        layers = declared[path].shape[0] if declared[path].stacked else 1
        out[path] = tuple(_respell(name, "hub", layout).format(l=l) for l in range(layers))
    return out


def tensor_shape(config: Config, spec: Spec) -> tuple[int, ...]:
    """The shape in the files of a parameter, or of one layer of it."""
    if spec.role == "conv":
        v = config.vision
        return (spec.shape[-1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    shape = spec.shape[1:] if spec.stacked else spec.shape
    return shape[::-1] if spec.transposed else shape


# What trainers and wrappers add to a module's name: torch.compile, FSDP, checkpointing, PEFT, Lightning, DDP.
_WRAPPERS = {
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "base_layer", "module"),
}
_LEADING = {"base_model", "model", "language_model"}


def core(name: str) -> str:
    """A tensor's or module's name without the prefixes in which layouts and wrappers differ.

    "model.layers.0.…", "model.language_model.layers.0.…" and "base_model.model.model.layers.0.…" are all "layers.0.…".
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _LEADING:
        parts.pop(0)
    return ".".join(parts)


def _respell(name: str, source: str, target: str) -> str:
    for old, new in zip(LAYOUTS[source], LAYOUTS[target], strict=True):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
