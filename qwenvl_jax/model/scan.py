"""What scans over stacked layers need: their weights as bits, and what the backward pass saves."""

from functools import partial

import jax
import jax.numpy as jnp


def unpack_bfloat16(weights):
    """A layer's weights, with bfloat16 in place of its bits in uint16 (`cpu_layouts` in infer/programs.py)."""
    bfloat16 = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.bfloat16)
    return jax.tree.map(lambda w: bfloat16(w) if w.dtype == jnp.uint16 else w, weights)


# Elementwise operations and views: XLA fuses these into their consumers.
_FUSED = frozenset(
    "abs add add_any and broadcast_in_dim concatenate convert_element_type copy div eq erf exp expand_dims ge gt "
    "integer_pow iota le log logistic lt max min mul ne neg not or pow reshape rsqrt select_n sign slice sqrt square "
    "squeeze stop_gradient sub tanh transpose".split()
)
ATTENDED = "attended"  # the name of attention's output, which `checkpointed` saves


def checkpointed(f, remat: bool):
    """`f`, a scan's body, with a choice of what it saves for the backward pass.

    remat: only its inputs. Otherwise the results of linear layers, attention and sums, but no scores. The rest is
    computed again: saving it would take most of the memory that a training step writes, and more time.
    """

    def saved(primitive, *_, **params) -> bool:
        if remat or primitive.name in _FUSED:
            return False
        if primitive.name == "dot_general":  # scores have batch dimensions
            return not any(params["dimension_numbers"][1])
        return params["name"] == ATTENDED if primitive.name == "name" else True

    return jax.checkpoint(f, prevent_cse=False, policy=saved)  # XLA cannot merge a scan's body with its recomputation
