"""What training minimises: cross-entropy on the trained tokens, and DPO on pairs, both from log-probabilities that
are computed some tokens at a time, because the logits of a whole batch would outweigh everything else.

A loss returns sums, (total, weight, metrics), so that micro-batches add up whatever their share of trained tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError
from qwenvl_jax.model import decoder, qwenvl
from qwenvl_jax.model.layers import precision
from qwenvl_jax.sharding import constrain, divides, local_rows
from qwenvl_jax.types import PreferenceBatch, TrainBatch

CHUNK = 1024  # tokens, on one device, whose logits exist at once


def sft_loss(config: Config, params: dict, batch: TrainBatch, *, remat: bool = False, chunk: int = CHUNK):
    """Weighted sum of −log p(target), sum of the weights, and the weighted sum of correct first guesses.

    remat: keep only the blocks' inputs for the backward pass. chunk: see `token_logprobs`.
    """
    return cross_entropy(config, params, qwenvl.hidden(config, params, batch.inputs, remat=remat), batch, chunk)


@jax.named_scope("lm_head")
def cross_entropy(config: Config, params: dict, x, batch: TrainBatch, chunk: int = CHUNK):
    """What `sft_loss` returns, from the decoder's output x [B, T, D] before the final norm."""
    split, arrays = _cut(config, params, x, chunk, batch.targets, batch.weights)
    total, hits = _cross_entropy(split, *arrays)
    return total, jnp.sum(batch.weights), {"accuracy": hits}


def dpo_loss(
    config: Config, params: dict, batch: PreferenceBatch, *, beta: float = 0.1, remat=False, chunk: int = CHUNK
):
    """Direct preference optimisation (arXiv:2305.18290, eq. 7): sum over pairs, number of pairs, metrics.

    `batch.reference` holds what `segment_logprobs` gives for the reference model. Pairs without trained tokens on
    both sides do not count.
    Metrics: `margin`, the chosen's reward less the rejected's; `accuracy`, how often it is positive.
    """
    if batch.reference.shape[1] % 2:
        raise InputError(f"`reference` is {list(batch.reference.shape)}; DPO needs an even number of segments in a row")
    n = batch.reference.shape[1]
    rewards = beta * (segment_logprobs(config, params, batch, n, remat=remat, chunk=chunk) - batch.reference)
    live = _by_segment(batch.weights, batch.inputs.segments, n) > 0
    live = live[:, 0::2] & live[:, 1::2]
    margin = jnp.where(live, rewards[:, 0::2] - rewards[:, 1::2], 0)
    total = jnp.sum(jnp.where(live, -jax.nn.log_sigmoid(margin), 0))
    return total, jnp.sum(live, dtype=jnp.float32), {"margin": jnp.sum(margin), "accuracy": jnp.sum(margin > 0.0)}


def segment_logprobs(config: Config, params: dict, batch, n: int, *, remat=False, chunk: int = CHUNK):
    """[B, n] float32: the weighted log-probability of the targets of segments 1 … n of every row; 0 where empty."""
    x = qwenvl.hidden(config, params, batch.inputs, remat=remat)
    logp = token_logprobs(config, params, x, batch.targets, chunk)
    return _by_segment(_weighted(logp, batch.weights), batch.inputs.segments, n)


@jax.named_scope("lm_head")
def token_logprobs(config: Config, params: dict, x, targets, chunk: int = CHUNK):
    """log p(targets) [B, T] float32 after hidden states x [B, T, D] (before the final norm), targets [B, T].

    Logits exist for about `chunk` tokens a device at a time, in the backward pass too, which computes them again
    and sums the head's gradient in float32.
    """
    split, arrays = _cut(config, params, x, chunk, targets)
    logp = jnp.moveaxis(_logprobs(split, *arrays), 0, 1)
    return logp.reshape(len(logp), -1)[:, : targets.shape[1]]


def _weighted(logp, weights):
    # Not a bare product: what the model makes of padding may be anything, and 0 · inf is not 0.
    return jnp.where(weights != 0, logp * weights, 0)


def _by_segment(values, segments, n: int):
    """Sums of values [B, T] by segment: [B, n]."""
    here = segments[:, None, :] == jnp.arange(1, n + 1)[:, None]
    return jnp.sum(jnp.where(here, values[:, None, :], 0), -1)


def _cut(config: Config, params: dict, x, chunk: int, *arrays):
    """How a chunk is laid out (see `_logits`), and (x, head, *arrays) with x and each of the arrays [B, T, …] as chunks
    [n, B, t, …], filled up with zeros."""
    B, T = x.shape[:2]
    x = decoder.final_norm(config, params, x)
    head, dims = decoder.head(config, params)
    # Where weights are split over fsdp, so is the vocabulary here, and tokens are gathered, a chunk at a time: less
    # than the head and its gradient, which would be exchanged with every chunk.
    rows, vocabulary = "bv" if divides("v", config.text.vocab_size) else "BV"
    head = constrain(head.astype(x.dtype), dims.replace("D", ".").replace("V", vocabulary))
    # Chunks cut T, so that B stays split over the mesh.
    chunks = -(-T // max(1, chunk // local_rows(B)))
    width = -(-T // chunks)
    pad = -T % width

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, pad), *[(0, 0)] * (a.ndim - 2)))
        a = jnp.moveaxis(a.reshape(B, -1, width, *a.shape[2:]), 1, 0)
        return constrain(a, ".B" + "." * (a.ndim - 2))

    return (rows, vocabulary, dims), (cut(x), head, *map(cut, arrays))


def _logits(split, x, head, targets):
    """Of one chunk: logits [B, t, V], log p(target) and the logits' logsumexp [B, t]; and x and targets as laid out.

    split: letters by which rows and the vocabulary are laid out meanwhile, and the head's dimensions.
    """
    rows, vocabulary, dims = split
    x, targets = (constrain(a, rows + "." * (a.ndim - 1)) for a in (x, targets))
    logits = constrain(decoder.logits(x, head, dims), f"{rows}.{vocabulary}")
    total = jax.nn.logsumexp(logits, -1)
    # A sum, not a gather, which would collect a vocabulary that is split over devices.
    picked = jnp.sum(jnp.where(_is_target(targets, logits), logits, 0), -1)
    return logits, picked - total, total, x, targets


def _is_target(targets, logits):
    return targets[..., None] == jnp.arange(logits.shape[-1])


def _gradients(split, x, head, targets, logits, total, g):
    """Of the sum of g·log p(target): with respect to x, and to the head [D, V], which is summed in float32."""
    rows, _, dims = split
    d = constrain(g, f"{rows}.")[..., None] * (_is_target(targets, logits) - jnp.exp(logits - total[..., None]))
    d = d.astype(x.dtype)
    dot = partial(jnp.einsum, precision=precision(x.dtype), preferred_element_type=jnp.float32)
    x_grad = constrain(dot(f"BTV,{dims}->BTD", d, head).astype(x.dtype), "B..")
    return x_grad, dot("BTD,BTV->DV", x, d)


def _sum_gradients(split, head, one, *parts):
    """Over the chunks in `parts`, of each of which `one` gives (gradient of the head [D, V], anything): the sum as laid
    out as the head, and the stack of the rest."""
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
    """As above, with weights [n, B, t]: −Σ weight·log p(target), and the weight of the tokens guessed right."""

    def one(part):
        logits, logp, total, *_ = _logits(split, part[0], head, part[1])
        return _sums(logits, logp, total, part[2])

    return tuple(map(jnp.sum, jax.lax.map(one, (x, targets, weights))))


def _sums(logits, logp, total, weights):
    hit = logp >= jnp.max(logits, -1) - total
    return -jnp.sum(_weighted(logp, weights)), jnp.sum(jnp.where(hit, weights, 0))


def _cross_entropy_forward(split, x, head, targets, weights):
    """The gradient for a cotangent of 1 as well, while the logits are there; another cotangent is a factor on it."""

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
