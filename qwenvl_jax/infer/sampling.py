"""From logits to the next token, on the device. Sampling parameters are arrays, so new values never recompile.

Rows of one batch may have different parameters. A row's draw depends on its own seed and token index only, not on
other rows, the batch size or the bucket. Two things are static: whether any row samples, and the number of logprobs.

The order of transformers: repetition, presence and frequency penalties, temperature, top-k, top-p, min-p.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwenvl_jax.infer.options import OFF, SamplingParams

BAD = -1  # in place of a token: NaN or infinity in a row's logits


class State(NamedTuple):
    """The sampling state between two tokens."""

    index: Any  # [] int32: index of the next token; the first after the prompt is 0
    keys: Any  # [B, 2] uint32: threefry keys, see `seed_keys`
    prompt: Any  # [B, V] bool: ids in the prompt
    counts: Any  # [B, V] int32: how often each id was generated


class Draw(NamedTuple):
    """One new token per row. Logprobs are of the raw logits, before penalties and temperature."""

    tokens: Any  # [B] int32; BAD for a row whose logits are not finite
    logprobs: Any = None  # [B] float32
    top_ids: Any = None  # [B, n] int32, most likely first
    top_logprobs: Any = None  # [B, n] float32


def stack_params(rows: list[SamplingParams], size: int) -> SamplingParams:
    """Stacks the rows' parameters to arrays [size]; rows beyond the list are greedy."""
    columns = zip(*rows, *[OFF] * (size - len(rows)), strict=True)
    dtypes = (np.int32 if isinstance(off, int) else np.float32 for off in OFF)
    return SamplingParams(*(np.array(c, d) for c, d in zip(columns, dtypes, strict=True)))


def seed_keys(seeds: list[int], size: int) -> np.ndarray:
    """Threefry keys [size, 2] of the seeds, modulo 2^64; rows beyond the list get seed 0."""
    words = [((s >> 32) & 0xFFFFFFFF, s & 0xFFFFFFFF) for s in map(int, seeds)]
    return np.array(words + [(0, 0)] * (size - len(seeds)), np.uint32)


def prompt_ids(tokens, segments, vocab: int):
    """Which ids occur in the prompts: tokens [B, T], segments [B, T] (0 = padding) → [B, V] bool.

    Image placeholders count, as in transformers.
    """
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, tokens].max(segments > 0)


def penalise(logits, prompt, counts, sampling_params: SamplingParams):
    """Applies the three penalties to logits [B, V] float32.

    Repetition (transformers): ids of the prompt and the output; positive logits are divided, negative ones multiplied.
    Presence and frequency (OpenAI, vLLM): generated ids only; subtracted.
    """
    repetition, presence, frequency = (
        x[:, None]
        for x in (
            sampling_params.repetition_penalty,
            sampling_params.presence_penalty,
            sampling_params.frequency_penalty,
        )
    )
    generated = counts > 0
    repeated = jnp.where(logits < 0, logits * repetition, logits / repetition)
    logits = jnp.where(prompt | generated, repeated, logits)
    return logits - frequency * counts - presence * generated


def allowed_ids(logits, top_k, top_p, min_p):
    """Which ids may be drawn after top-k, then top-p, then min-p: logits [B, V] float32 → [B, V] bool.

    Exact, without sorting the vocabulary: bisection over the float's bit pattern finds each threshold in 32
    reductions. Ids that tie at the threshold all stay, so there may be more than k. top-p is the smallest such set
    whose probability, among the top-k ids, reaches p. min-p compares with the best id.
    """
    vocab = logits.shape[-1]
    bits = _ordered_bits(logits)
    off = jnp.zeros(logits.shape[:1], jnp.uint32)

    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)[:, None]
    least = lax.cond(
        jnp.any(k < vocab),
        lambda: _bisect(lambda t: jnp.sum(bits >= t, -1, keepdims=True, dtype=jnp.int32) >= k, off),
        lambda: off,
    )
    allowed = bits >= least[:, None]

    best = jnp.max(logits, -1, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(logits - best), 0)
    goal = top_p[:, None] * jnp.sum(weights, -1, keepdims=True)
    least = lax.cond(
        jnp.any(top_p < 1),
        lambda: _bisect(lambda t: jnp.sum(jnp.where(bits >= t, weights, 0), -1, keepdims=True) >= goal, off),
        lambda: off,
    )
    # For a row with top-p off, a differently rounded sum must not remove ids.
    allowed &= (bits >= least[:, None]) | (top_p >= 1)[:, None]
    return allowed & (logits - best >= jnp.log(min_p)[:, None])


def draw(logits, state: State, sampling_params: SamplingParams, *, sample: bool, logprobs: int | None = None):
    """Draws one token per row: logits [B, V] float32 → (Draw, the next State). A row that is not finite draws BAD.

    sample: False if every row is greedy; the random part is then skipped.
    logprobs: None for none; n for the drawn token and the n best ids.
    """
    penalised = penalise(logits, state.prompt, state.counts, sampling_params)
    tokens = jnp.argmax(penalised, -1)
    rows = jnp.arange(tokens.shape[0])
    # argmax finds NaN first, then infinity. So this logit alone decides; a mask of -inf on other ids does not matter.
    finite = jnp.isfinite(logits[rows, tokens])
    if sample:
        # Subtract the best logit first: a temperature of 1e-6 (in official files) would overflow.
        below = penalised - jnp.max(penalised, -1, keepdims=True)
        scaled = below / jnp.where(sampling_params.temperature > 0, sampling_params.temperature, 1)[:, None]
        allowed = allowed_ids(scaled, sampling_params.top_k, sampling_params.top_p, sampling_params.min_p)
        noise = jax.vmap(_gumbel, (0, None, None))(state.keys, state.index, logits.shape[-1])
        drawn = jnp.argmax(jnp.where(allowed, scaled + noise, -jnp.inf), -1)
        tokens = jnp.where(sampling_params.temperature > 0, drawn, tokens)
    tokens = jnp.where(finite, tokens, BAD).astype(jnp.int32)

    state = state._replace(index=state.index + 1, counts=state.counts.at[rows, tokens].add(1))
    if logprobs is None:
        return Draw(tokens), state
    raw = jax.nn.log_softmax(logits)
    best, ids = lax.top_k(raw, min(logprobs, raw.shape[-1]))
    return Draw(tokens, raw[rows, tokens], ids, best), state


def _ordered_bits(x):
    """float32 → uint32 in the same order; both zeros map to one value."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x).astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _bisect(holds, zeros):
    """The largest uint32 per row, [B], for which the falling `holds` ([B, 1] → [B, 1] bool) is true; 0 if none."""

    def body(i, least):
        trial = least | (jnp.uint32(1 << 31) >> i)
        return jnp.where(holds(trial[:, None])[:, 0], trial, least)

    return lax.fori_loop(jnp.uint32(0), jnp.uint32(32), body, zeros)


def _gumbel(key, index, vocab):
    # Threefry explicitly: jax_default_prng_impl must not change what a seed draws.
    key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), index)
    return jax.random.gumbel(key, (vocab,), jnp.float32)
