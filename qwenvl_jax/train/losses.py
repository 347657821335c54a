"""Cross-entropy on the trained tokens, and DPO on pairs.

Log-probabilities are computed some tokens at a time, since the logits of a batch would need more memory than all else.
A loss returns sums, (total, weight, metrics), so that micro-batches with different weights add up.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qwenvl_jax.config import Config
from qwenvl_jax.errors import OptionsError
from qwenvl_jax.model import decoder, qwenvl
from qwenvl_jax.model.linear import precision
from qwenvl_jax.sharding import constrain, divides, local_rows
from qwenvl_jax.types import PreferenceBatch, TrainBatch

CHUNK = 1024  # tokens per device whose logits are in memory at once


def sft_loss(config: Config, params: dict, batch: TrainBatch, *, remat: bool = False, chunk: int = CHUNK):
    """Weighted sum of −log p(target), sum of the weights, and the weighted number of correct top-1 predictions.

    remat: recompute the blocks' activations in the backward pass. chunk: see `token_logprobs`.
    """
    return cross_entropy(config, params, qwenvl.hidden(config, params, batch.inputs, remat=remat), batch, chunk)


@jax.named_scope("lm_head")
def cross_entropy(config: Config, params: dict, x, batch: TrainBatch, chunk: int = CHUNK):
    """`sft_loss` of the decoder's output x [B, T, D] before the final norm."""
    split, arrays = _cut(config, params, x, chunk, batch.targets, batch.weights)
    total, hits = _cross_entropy(split, *arrays)
    return total, jnp.sum(batch.weights), {"accuracy": hits}


def dpo_loss(config: Config, params: dict, batch: PreferenceBatch, *, beta=0.1, remat=False, chunk: int = CHUNK):
    """Direct preference optimisation (arXiv:2305.18290, eq. 7): sum over pairs, number of pairs, metrics.

    `batch.reference` is `segment_logprobs` of the reference model. A pair counts if both of its conversations have
    trained tokens. Metrics: `margin`, the reward of the chosen minus that of the rejected; `accuracy`, how often the
    margin is positive. Raises OptionsError if the number of segments is odd.
    """
    n = batch.reference.shape[1]
    if n % 2:
        raise OptionsError(f"`reference` has {n} segments per row; DPO needs an even number")
    rewards = beta * (segment_logprobs(config, params, batch, n, remat=remat, chunk=chunk) - batch.reference)
    live = _by_segment(batch.weights, batch.inputs.segments, n) > 0
    live = live[:, 0::2] & live[:, 1::2]
    margin = jnp.where(live, rewards[:, 0::2] - rewards[:, 1::2], 0)
    total = jnp.sum(jnp.where(live, -jax.nn.log_sigmoid(margin), 0))
    return total, jnp.sum(live, dtype=jnp.float32), {"margin": jnp.sum(margin), "accuracy": jnp.sum(margin > 0.0)}


def segment_logprobs(config: Config, params: dict, batch, n: int, *, remat=False, chunk: int = CHUNK):
    """[B, n] float32: the weighted sum of log p(target) of segments 1 … n of every row; 0 for absent ones."""
    x = qwenvl.hidden(config, params, batch.inputs, remat=remat)
    logp = token_logprobs(config, params, x, batch.targets, chunk)
    return _by_segment(_weighted(logp, batch.weights), batch.inputs.segments, n)


@jax.named_scope("lm_head")
def token_logprobs(config: Config, params: dict, x, targets, chunk: int = CHUNK):
    """log p(targets) [B, T] float32, from hidden states x [B, T, D] before the final norm and targets [B, T].

    The logits of about `chunk` tokens per device are in memory at a time. The backward pass recomputes them, and sums
    the head's gradient in float32.
    """
    split, arrays = _cut(config, params, x, chunk, targets)
    logp = jnp.moveaxis(_logprobs(split, *arrays), 0, 1)
    return logp.reshape(len(logp), -1)[:, : targets.shape[1]]


def _weighted(logp, weights):
    # Log-probabilities of padding may be infinite, and 0 · inf is not 0.
    return jnp.where(weights != 0, logp * weights, 0)


def _by_segment(values, segments, n: int):
    """Sums of values [B, T] per segment: [B, n]."""
    here = segments[:, None, :] == jnp.arange(1, n + 1)[:, None]
    return jnp.sum(jnp.where(here, values[:, None, :], 0), -1)


def _cut(config: Config, params: dict, x, chunk: int, *arrays):
    """(split, (x, head, *arrays)): x and arrays [B, T, …] cut into chunks [n, B, t, …], padded with zeros.

    split: the dimension letters of a chunk's rows, vocabulary and head.
    """
    B, T = x.shape[:2]
    x = decoder.final_norm(config, params, x)
    head, dims = decoder.head(config, params)
    # If fsdp splits the weights, the vocabulary is split too and the tokens of a chunk are gathered. That moves fewer
    # bytes than the head and its gradient.
    rows, vocabulary = "bv" if divides("v", config.text.vocab_size) else "BV"
    head = constrain(head.astype(x.dtype), dims.replace("D", ".").replace("V", vocabulary))
    # Chunks cut T, since the mesh splits B.
    chunks = -(-T // max(1, chunk // local_rows(B)))
    width = -(-T // chunks)
    pad = -T % width

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, pad), *[(0, 0)] * (a.ndim - 2)))
        a = jnp.moveaxis(a.reshape(B, -1, width, *a.shape[2:]), 1, 0)
        return constrain(a, ".B" + "." * (a.ndim - 2))

    return (rows, vocabulary, dims), (cut(x), head, *map(cut, arrays))


def _logits(split, x, head, targets):
    """Logits [B, t, V] of a chunk, log p(target) and logsumexp [B, t], and x and targets in the chunk's layout."""
    rows, vocabulary, dims = split
    x, targets = (constrain(a, rows + "." * (a.ndim - 1)) for a in (x, targets))
    logits = constrain(decoder.logits(x, head, dims), f"{rows}.{vocabulary}")
    total = jax.nn.logsumexp(logits, -1)
    # A masked sum, since a gather would collect the vocabulary from all devices.
    picked = jnp.sum(jnp.where(_is_target(targets, logits), logits, 0), -1)
    return logits, picked - total, total, x, targets


def _is_target(targets, logits):
    return targets[..., None] == jnp.arange(logits.shape[-1])


def _gradients(split, x, head, targets, logits, total, g):
    """Gradients of Σ g·log p(target) with respect to x, and to the head, [D, V] float32."""
    rows, _, dims = split
    d = constrain(g, f"{rows}.")[..., None] * (_is_target(targets, logits) - jnp.exp(logits - total[..., None]))
    d = d.astype(x.dtype)
    dot = partial(jnp.einsum, precision=precision(x.dtype), preferred_element_type=jnp.float32)
    x_grad = constrain(dot(f"BTV,{dims}->BTD", d, head).astype(x.dtype), "B..")
    return x_grad, dot("BTD,BTV->DV", x, d)


def _sum_gradients(split, head, one, *parts):
    """Scans `one`, which returns (gradient of the head [D, V], rest), over chunks: the sum of gradients, and rests."""
    _, vocabulary, dims = split
    start = constrain(jnp.zeros(head.shape if dims == "DV" else head.shape[::-1], jnp.float32), f".{vocabulary}")

    def add(head_grad, part):
        more, rest = one(*part)
        return head_grad + more, rest

    head_grad, rest = jax.lax.scan(add, start, parts)
    return (head_grad if dims == "DV" else head_grad.T), rest


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(split, x, head, targets):
    """x [n, B, t, D], targets [n, B, t] → log p(target) [n, B, t] float32."""
    return jax.lax.map(lambda part: constrain(_logits(split, part[0], head, part[1])[1], "B."), (x, targets))


def _logprobs_forward(split, x, head, targets):
    return _logprobs(split, x, head, targets), (x, head, targets)


def _logprobs_backward(split, saved, cotangents):
    x, head, targets = saved

    def one(x, targets, g):
        logits, _, total, x, targets = _logits(split, x, head, targets)
        return _gradients(split, x, head, targets, logits, total, g)[::-1]

    head_grad, x_grad = _sum_gradients(split, head, one, x, targets, cotangents)
    return x_grad, head_grad.astype(head.dtype), None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(split, x, head, targets, weights):
    """As `_logprobs`, with weights [n, B, t]: −Σ weight·log p(target), and Σ weight of correct predictions."""

    def one(part):
        logits, logp, total, *_ = _logits(split, part[0], head, part[1])
        return _sums(logits, logp, total, part[2])

    return tuple(map(jnp.sum, jax.lax.map(one, (x, targets, weights))))


def _sums(logits, logp, total, weights):
    hit = logp >= jnp.max(logits, -1) - total
    return -jnp.sum(_weighted(logp, weights)), jnp.sum(jnp.where(hit, weights, 0))


def _cross_entropy_forward(split, x, head, targets, weights):
    """Computes the gradient too, while the logits are in memory; the backward pass multiplies it by its cotangent."""

    def one(x, targets, weights):
        logits, logp, total, x, targets = _logits(split, x, head, targets)
        x_grad, head_grad = _gradients(split, x, head, targets, logits, total, -weights)
        return head_grad, (x_grad, constrain(logp, "B."), *_sums(logits, logp, total, weights))

    head_grad, (x_grad, logp, total, hits) = _sum_gradients(split, head, one, x, targets, weights)
    return (jnp.sum(total), jnp.sum(hits)), (x_grad, head_grad, head, logp)


def _cross_entropy_backward(split, saved, cotangents):
    x_grad, head_grad, head, logp = saved
    g = cotangents[0]
    return (x_grad * g).astype(x_grad.dtype), (head_grad * g).astype(head.dtype), None, -g * logp


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
