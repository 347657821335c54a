"""Runs records through the decoder layer by layer: what the inputs of its Linears are, and what rounding them changes.

Host memory holds the records' hidden states, and one layer's weights. The device holds one row and one layer.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from qwenvl_convert.options import QuantizeOptions
from qwenvl_convert.rounding import SHARED, Inputs, Rounded, measure

from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError, NonFiniteError
from qwenvl_jax.inputs.options import MediaOptions, PromptOptions
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.inputs.records import conversation
from qwenvl_jax.inputs.source import Records
from qwenvl_jax.model.attention import attention
from qwenvl_jax.model.decoder import DecoderBlock, embed
from qwenvl_jax.model.norms import RMSNorm
from qwenvl_jax.model.rope import text_rope
from qwenvl_jax.model.vision import encode_vision
from qwenvl_jax.options import given, names
from qwenvl_jax.params.place import Source
from qwenvl_jax.params.specs import unflatten
from qwenvl_jax.types import Sample

TOKENS = 2048  # most tokens of a row; of a longer record, the first ones count


class Rows(NamedTuple):
    """Records packed into rows of one length."""

    x: np.ndarray  # [R, 1, T, D] float32: the hidden states before a layer
    positions: np.ndarray  # [R, 3, 1, T]
    segments: np.ndarray  # [R, 1, T]: 0 = padding


def read_samples(source: Records, options: QuantizeOptions, processor: Processor, progress) -> Iterator[Sample]:
    """The records to calibrate on, drawn at random. progress: as for `survey` of train/survey.py.

    Raises InputError for a record that cannot be used, unless such are skipped, and if none is left.
    """
    encoding = given(options, QuantizeOptions, only=(*names(MediaOptions), *names(PromptOptions)))
    used, chosen = 0, np.sort(np.random.default_rng(0).permutation(len(source))[: options.records]).tolist()
    for i in progress(chosen, total=len(chosen)):
        try:
            sample = _sample(source[i], source.folder(i), processor, options.boxes, encoding)
        except (InputError, RecursionError, OSError) as e:
            if options.on_bad_record == "stop":
                raise InputError(f"{source.where(i)}: {e}") from e
            continue
        used += 1
        yield sample
    if not used:
        raise InputError(f"{source.name}: none of {len(chosen)} records can be used to calibrate on")


def _sample(record, folder, processor: Processor, boxes: str | None, encoding: dict) -> Sample:
    talk = conversation(record, folder)
    last = talk.messages[-1]
    answered = isinstance(last, dict) and last.get("role") == "assistant"
    boxes = record.get("boxes") or boxes
    return processor.encode(
        talk.messages, tools=talk.tools, add_generation_prompt=not answered, boxes=boxes, **encoding
    )


def embed_rows(source: Source, config: Config, samples: Iterator[Sample]) -> Rows:
    """The embeddings of samples, pictures included, packed into rows. config: computes in float32."""
    wanted = {p: leaf for p, leaf in source.leaves.items() if p.startswith(("vision/", "decoder/embed_tokens/"))}
    params = unflatten({p: jnp.asarray(source.read(leaf, whole(leaf))) for p, leaf in wanted.items()})

    @jax.jit
    def embedded(params, batch):
        visual = [encode_vision(config, params, v) for v in batch.vision]
        return embed(config, params, batch.tokens, batch.visual_index, jnp.concatenate(visual) if visual else None)

    parts = []
    for sample in samples:
        n = min(len(sample.tokens), TOKENS)
        x = embedded(params, make_batch([sample], config))
        parts.append((np.asarray(x[0, :n]), np.asarray(sample.positions)[:, :n]))
    return _pack(parts)


def _pack(parts: list[tuple[np.ndarray, np.ndarray]]) -> Rows:
    T = min(TOKENS, -(-sum(len(x) for x, _ in parts) // 128) * 128)
    rows: list[list] = []
    for part in sorted(parts, key=lambda part: -len(part[0])):  # the longest first, each into the first row with room
        row = next((row for row in rows if sum(len(x) for x, _ in row) + len(part[0]) <= T), None)
        if row is None:
            rows.append(row := [])
        row.append(part)
    R, D = len(rows), parts[0][0].shape[-1]
    out = Rows(np.zeros((R, 1, T, D), np.float32), np.zeros((R, 3, 1, T), np.int32), np.zeros((R, 1, T), np.int32))
    for r, row in enumerate(rows):
        at = 0
        for number, (x, positions) in enumerate(row, 1):
            here = slice(at, at + len(x))
            out.x[r, 0, here], out.positions[r, :, 0, here], out.segments[r, 0, here] = x, positions, number
            at += len(x)
    return out


def whole(leaf) -> tuple[slice, ...]:
    """The index of all of a parameter."""
    return tuple(slice(0, n) for n in leaf.shape)


def pass_layer(config: Config, layer: dict, rows: Rows, group: int) -> dict[str, Inputs]:
    """Moves the rows' hidden states past a layer, in place. Returns what the inputs of its Linears are, as in SHARED.

    Raises NonFiniteError if the layer computes NaN or infinity.
    """
    total = None
    for r in range(len(rows.x)):
        y, sums = _block_sums(config, layer, rows.x[r], rows.positions[r], rows.segments[r], group)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        rows.x[r] = np.asarray(y)
        if not np.isfinite(rows.x[r]).all():
            raise NonFiniteError(
                "the model computes NaN or infinity for these records, in float32: its weights are damaged"
            )
    return jax.tree.map(lambda s: s / np.count_nonzero(rows.segments), total)


@partial(jax.jit, static_argnames=("config", "group"))
def _block_sums(config: Config, layer: dict, x, positions, segments, group: int):
    y, inputs = block_inputs(config, layer, x, positions, segments)
    live = (segments.reshape(-1) > 0)[:, None]
    return y, {name: measure(h.reshape(len(live), -1) * live, group) for name, h in inputs.items()}


def block_inputs(config: Config, layer: dict, x, positions, segments):
    """(a block's output [1, T, D], the inputs of its Linears by the names of SHARED)."""
    cos, sin = text_rope(positions, config.text)
    norm = partial(RMSNorm(config.text.rms_norm_eps, config.dtype).apply)

    def attend(q, k, v):
        attended = attention(q, k, v, segments, causal=True)
        return attended, attended

    y, attended = DecoderBlock(config).apply({"params": layer}, x, cos, sin, attend)
    mlp = layer["down_proj"]["kernel"]
    before, _ = DecoderBlock(config).apply(
        {"params": layer | {"down_proj": {"kernel": jnp.zeros_like(mlp)}}}, x, cos, sin, attend
    )
    h = norm({"params": layer["post_attention_layernorm"]}, before)
    gate, up = (jnp.dot(h, layer[name]["kernel"], precision="highest") for name in ("gate_proj", "up_proj"))
    return y, {
        "attention": norm({"params": layer["input_layernorm"]}, x),
        "o_proj": attended.reshape(*x.shape[:2], -1),
        "mlp": h,
        "down_proj": jax.nn.silu(gate) * up,
    }


@partial(jax.jit, static_argnames=("config",))
def output_errors(config: Config, layer: dict, rounded: dict[str, Rounded], x, positions, segments) -> dict:
    """How much rounding changes outputs, relative to their size: of the Linears by the names of SHARED, and of the
    block ("block", relative to what it adds)."""
    live = (segments > 0)[..., None]
    y, inputs = block_inputs(config, layer, x, positions, segments)
    kernels = {name: one.dense() for name, one in rounded.items()}
    out = {}
    for name, (linears, _) in SHARED.items():
        h, both = inputs[name] * live, [(layer[linear]["kernel"], kernels[linear]) for linear in linears]
        was, change = (jnp.concatenate(w, 1) for w in zip(*((a, b - a) for a, b in both), strict=True))
        moved, size = (_size(jnp.dot(h, w, precision="highest")) for w in (change, was))
        out[name] = moved / size
    changed, _ = block_inputs(config, with_kernels(layer, kernels), x, positions, segments)
    return out | {"block": _size((changed - y) * live) / _size((y - x) * live)}


def _size(x):
    return jnp.sqrt(jnp.sum(x * x))


def with_kernels(layer: dict, kernels: dict) -> dict:
    """The layer with other kernels."""
    return layer | {name: layer[name] | {"kernel": kernel} for name, kernel in kernels.items()}
