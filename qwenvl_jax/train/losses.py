"""What training minimises: cross-entropy on the trained tokens, and DPO on pairs, both from log-probabilities that
are computed some tokens at a time, because the logits of a whole batch would outweigh everything else.

A loss returns sums, (total, weight, metrics), so that micro-batches add up whatever their share of trained tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qwenvl_jax.config import Config
from qwenvl_jax.model import decoder, qwenvl
from qwenvl_jax.model.layers import precision
from qwenvl_jax.sharding import constrain, divides, local_rows
from qwenvl_jax.types import InputError, TrainBatch

CHUNK = 1024  # tokens, on one device, whose logits exist at once


def sft_loss(config: Config, params: dict, batch: TrainBatch, *, remat: bool = False, chunk: int = CHUNK):
    """Weighted sum of −log p(target), sum of the weights, and the weighted sum of correct first guesses.

    remat: keep only the blocks' inputs for the backward pass. chunk: see `token_logprobs`.
    """
    return cross_entropy(config, params, qwenvl.hidden(config, params, batch.inputs, remat=remat), batch, chunk)


def cross_entropy(config: Config, params: dict, x, batch: TrainBatch, chunk: int = CHUNK):
    """What `sft_loss` returns, from the decoder's output x [B, T, D] before the final norm."""
    logp, best = _logprobs(config, params, x, batch.targets, chunk)
    hits = jnp.sum(jnp.where(logp >= best, batch.weights, 0))
    return -jnp.sum(_weighted(logp, batch)), jnp.sum(batch.weights), {"accuracy": hits}


def dpo_loss(config: Config, params: dict, batch: TrainBatch, *, beta: float = 0.1, remat=False, chunk: int = CHUNK):
    """Direct preference optimisation (arXiv:2305.18290, eq. 7): sum over pairs, number of pairs, metrics.

    Segments 2j+1 (chosen) and 2j+2 (rejected) of a row are a pair; `batch.reference` [B, n] holds what
    `segment_logprobs` gives for the reference model. Pairs without trained tokens on both sides do not count.
    Metrics: `margin`, the chosen's reward less the rejected's; `accuracy`, how often it is positive.
    """
    if batch.reference is None or batch.reference.shape[1] % 2:
        raise InputError("a DPO batch needs `reference` [B, n], the segments' log-probabilities, with n even")
    n = batch.reference.shape[1]
    rewards = beta * (segment_logprobs(config, params, batch, n, remat=remat, chunk=chunk) - batch.reference)
    live = _by_segment(batch.weights, batch.inputs.segments, n) > 0
    live = live[:, 0::2] & live[:, 1::2]
    margin = jnp.where(live, rewards[:, 0::2] - rewards[:, 1::2], 0)
    total = jnp.sum(jnp.where(live, -jax.nn.log_sigmoid(margin), 0))
    return total, jnp.sum(live, dtype=jnp.float32), {"margin": jnp.sum(margin), "accuracy": jnp.sum(margin > 0.0)}


def segment_logprobs(config: Config, params: dict, batch: TrainBatch, n: int, *, remat=False, chunk: int = CHUNK):
    """[B, n] float32: the weighted log-probability of the targets of segments 1 … n of every row; 0 where empty."""
    x = qwenvl.hidden(config, params, batch.inputs, remat=remat)
    logp = token_logprobs(config, params, x, batch.targets, chunk)
    return _by_segment(_weighted(logp, batch), batch.inputs.segments, n)


def token_logprobs(config: Config, params: dict, x, targets, chunk: int = CHUNK):
    """log p(targets) [B, T] float32 after hidden states x [B, T, D] (before the final norm), targets [B, T].

    Logits exist for about `chunk` tokens a device at a time, in the backward pass too, which computes them again
    and sums the head's gradient in float32.
    """
    return _logprobs(config, params, x, targets, chunk)[0]


def _weighted(logp, batch: TrainBatch):
    # Not a bare product: what the model makes of padding may be anything, and 0 · inf is not 0.
    return jnp.where(batch.weights != 0, logp * batch.weights, 0)


def _by_segment(values, segments, n: int):
    """Sums of values [B, T] by segment: [B, n]."""
    here = segments[:, None, :] == jnp.arange(1, n + 1)[:, None]
    return jnp.sum(jnp.where(here, values[:, None, :], 0), -1)


@jax.named_scope("lm_head")
def _logprobs(config: Config, params: dict, x, targets, chunk: int):
    """As `token_logprobs`, and the log-probability of the likeliest token (not differentiated), both [B, T]."""
    B, T = targets.shape
    x = decoder.final_norm(config, params, x)
    head, dims = decoder.head(config, params)
    # Where weights are split over fsdp, so is the vocabulary here, and tokens are gathered, a chunk at a time: less
    # than the head and its gradient, which would be exchanged with every chunk.
    rows, vocabulary = "bv" if divides("v", config.text.vocab_size) else "BV"
    split = rows, vocabulary, dims
    head = constrain(head.astype(x.dtype), dims.replace("D", ".").replace("V", vocabulary))
    # Chunks cut T, so that B stays split over the mesh.
    chunks = -(-T // max(1, chunk // local_rows(B)))
    width = -(-T // chunks)
    pad = -T % width

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, pad), *[(0, 0)] * (a.ndim - 2)))
        a = jnp.moveaxis(a.reshape(B, -1, width, *a.shape[2:]), 1, 0)
        return constrain(a, ".B" + "." * (a.ndim - 2))

    out = _chunked(split, cut(x), head, cut(targets))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(B, -1)[:, :T] for a in out)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(split, x, head, targets):
    """x [chunks, B, t, D], targets [chunks, B, t] → log p(target), log p(likeliest), both [chunks, B, t] float32.

    split: letters by which rows and the vocabulary are laid out meanwhile, and the head's dimensions.
    """
    return _forward(split, x, head, targets)[0]


def _forward(split, x, head, targets):
    rows, vocabulary, dims = split

    def one(part):
        x, targets = (constrain(a, rows + "." * (a.ndim - 1)) for a in part)
        logits = constrain(decoder.logits(x, head, dims), f"{rows}.{vocabulary}")
        total = jax.nn.logsumexp(logits, -1)
        # A sum, not a gather, which would collect a vocabulary that is split over devices.
        picked = jnp.sum(jnp.where(_is_target(targets, logits), logits, 0), -1)
        return tuple(constrain(a, "B.") for a in (picked - total, jnp.max(logits, -1) - total, total))

    logp, best, total = jax.lax.map(one, (x, targets))
    return (logp, best), (x, head, targets, total)


def _backward(split, saved, cotangents):
    rows, vocabulary, dims = split
    x, head, targets, total = saved

    def one(head_grad, part):
        x, targets, total, g = (constrain(a, rows + "." * (a.ndim - 1)) for a in part)
        logits = constrain(decoder.logits(x, head, dims), f"{rows}.{vocabulary}")
        d = g[..., None] * (_is_target(targets, logits) - jnp.exp(logits - total[..., None]))
        d = d.astype(x.dtype)
        dot = partial(jnp.einsum, precision=precision(x.dtype), preferred_element_type=jnp.float32)
        x_grad = constrain(dot(f"BTV,{dims}->BTD", d, head).astype(x.dtype), "B..")
        return head_grad + dot(f"BTD,BTV->{dims}", x, d), x_grad

    start = constrain(jnp.zeros(head.shape, jnp.float32), dims.replace("D", ".").replace("V", vocabulary))
    head_grad, x_grad = jax.lax.scan(one, start, (x, targets, total, cotangents[0]))
    return x_grad, head_grad.astype(head.dtype), None


def _is_target(targets, logits):
    return targets[..., None] == jnp.arange(logits.shape[-1])


_chunked.defvjp(_forward, _backward)
