"""From logits to the next token, on the device: every knob is an array, so no value ever recompiles.

A batch mixes rows with different settings and seeds. What a row draws depends on its own seed and its own
token index, never on its batch mates, the batch size or the bucket. Two things only are static: whether any
row samples at all, and how many logprobs are returned.

The order is that of transformers: repetition penalty, presence and frequency penalties, temperature, top-k,
top-p, min-p.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwenvl_jax.infer.options import OFF, Knobs


class State(NamedTuple):
    """What sampling carries from token to token."""

    index: Any  # [] int32: index of the token to be drawn next, 0 for the first after the prompt
    keys: Any  # [B, 2] uint32: threefry keys, see `seed_keys`
    prompt: Any  # [B, V] bool: ids that the prompt holds
    counts: Any  # [B, V] int32: how often each id was generated


class Draw(NamedTuple):
    """One new token a row. Logprobs are those of the raw logits, before penalties and temperature."""

    tokens: Any  # [B] int32
    logprobs: Any = None  # [B] float32
    top_ids: Any = None  # [B, n] int32, most likely first
    top_logprobs: Any = None  # [B, n] float32


def make_knobs(rows: list[Knobs], size: int) -> Knobs:
    """Stacks the rows' settings to arrays [size]; rows beyond the list are greedy."""
    columns = zip(*rows, *[OFF] * (size - len(rows)), strict=True)
    dtypes = (np.int32 if isinstance(off, int) else np.float32 for off in OFF)
    return Knobs(*(np.array(c, d) for c, d in zip(columns, dtypes, strict=True)))


def seed_keys(seeds: list[int], size: int) -> np.ndarray:
    """Keys [size, 2] for seeds taken modulo 2^64; rows beyond the list get seed 0."""
    words = [((s >> 32) & 0xFFFFFFFF, s & 0xFFFFFFFF) for s in map(int, seeds)]
    return np.array(words + [(0, 0)] * (size - len(seeds)), np.uint32)


def prompt_ids(tokens, segments, vocab: int):
    """Which ids the prompts hold: tokens [B, T], segments [B, T] (0 = padding) → [B, V] bool.

    Placeholders of pictures count, as they do in transformers.
    """
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, tokens].max(segments > 0)


def penalise(logits, prompt, counts, knobs: Knobs):
    """Applies the three penalties to logits [B, V] float32.

    Repetition (transformers): ids of prompt and output, a positive logit is divided, a negative one
    multiplied. Presence and frequency (OpenAI, vLLM): generated ids only, subtracted.
    """
    repetition, presence, frequency = (
        x[:, None] for x in (knobs.repetition_penalty, knobs.presence_penalty, knobs.frequency_penalty)
    )
    generated = counts > 0
    repeated = jnp.where(logits < 0, logits * repetition, logits / repetition)
    logits = jnp.where(prompt | generated, repeated, logits)
    return logits - frequency * counts - presence * generated


def keep(logits, top_k, top_p, min_p):
    """Which ids top-k, then top-p, then min-p leave: logits [B, V] float32 → [B, V] bool.

    Exact without sorting the vocabulary: the threshold is found by bisection over the float's bit pattern,
    32 reductions. Ids whose logits equal the threshold's are all kept, so a set may exceed k. top-p is the
    smallest such set whose probability, among those top-k left, reaches p; min-p compares with the best id.
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
    kept = bits >= least[:, None]

    best = jnp.max(logits, -1, keepdims=True)
    weights = jnp.where(kept, jnp.exp(logits - best), 0)
    goal = top_p[:, None] * jnp.sum(weights, -1, keepdims=True)
    least = lax.cond(
        jnp.any(top_p < 1),
        lambda: _bisect(lambda t: jnp.sum(jnp.where(bits >= t, weights, 0), -1, keepdims=True) >= goal, off),
        lambda: off,
    )
    # A sum that rounds differently must not cut a row that has top-p off.
    kept &= (bits >= least[:, None]) | (top_p >= 1)[:, None]
    return kept & (logits - best >= jnp.log(min_p)[:, None])


def draw(logits, state: State, knobs: Knobs, *, sample: bool, logprobs: int | None = None):
    """Draws one token a row from logits [B, V] float32 → (Draw, the next State).

    sample: False promises that every row is greedy, and skips the random part.
    logprobs: None for none; n for the drawn token's and the n best ids'.
    """
    penalised = penalise(logits, state.prompt, state.counts, knobs)
    tokens = jnp.argmax(penalised, -1)
    if sample:
        # From the best logit down, so that a temperature of 1e-6 (official files have it) cannot overflow.
        below = penalised - jnp.max(penalised, -1, keepdims=True)
        scaled = below / jnp.where(knobs.temperature > 0, knobs.temperature, 1)[:, None]
        kept = keep(scaled, knobs.top_k, knobs.top_p, knobs.min_p)
        noise = jax.vmap(_gumbel, (0, None, None))(state.keys, state.index, logits.shape[-1])
        drawn = jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), -1)
        tokens = jnp.where(knobs.temperature > 0, drawn, tokens)
    tokens = tokens.astype(jnp.int32)

    rows = jnp.arange(tokens.shape[0])
    state = state._replace(index=state.index + 1, counts=state.counts.at[rows, tokens].add(1))
    if logprobs is None:
        return Draw(tokens), state
    raw = jax.nn.log_softmax(logits)
    best, ids = lax.top_k(raw, min(logprobs, raw.shape[-1]))
    return Draw(tokens, raw[rows, tokens], ids, best), state


def start(logits, prompt, keys, knobs: Knobs, *, sample: bool, logprobs: int | None = None):
    """`draw` of the first token: logits [B, V] of the prompts, `prompt` from `prompt_ids`."""
    state = State(jnp.zeros((), jnp.int32), keys, prompt, jnp.zeros(prompt.shape, jnp.int32))
    return draw(logits, state, knobs, sample=sample, logprobs=logprobs)


def _ordered_bits(x):
    """float32 → uint32 of the same order; both zeros map to one value."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x).astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _bisect(holds, zeros):
    """The largest uint32 a row, [B], for which `holds` ([B, 1] → [B, 1] bool, falling) is true; 0 if none."""

    def body(i, least):
        trial = least | (jnp.uint32(1 << 31) >> i)
        return jnp.where(holds(trial[:, None])[:, 0], trial, least)

    return lax.fori_loop(jnp.uint32(0), jnp.uint32(32), body, zeros)


def _gumbel(key, index, vocab):
    # The generator is named, so that a user's jax_default_prng_impl does not change what a seed gives.
    key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), index)
    return jax.random.gumbel(key, (vocab,), jnp.float32)
