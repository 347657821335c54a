"""The compiled programs of an engine: few, and each for one rung of a ladder, never for a pair of rungs.

`encode` is compiled for a call (R, P) of the ladder, `embed`, `place` and `prefill` for a (B, T), `first` for a B,
`step` and `grow` for a (B, S), and `fork` only where a conversation has several samples. They meet in shapes
that depend on one of them alone: vision output travels in chunks of a fixed size, and S follows from T.
"""

import functools
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwenvl_jax.config import Config
from qwenvl_jax.infer import sampling
from qwenvl_jax.model import qwenvl
from qwenvl_jax.sharding import constrain
from qwenvl_jax.types import Cache

CHUNK = 1024  # visual tokens that go into the text at a time


class Programs:
    """Jitted functions, made once. `traces` counts how often each was traced, by name."""

    def __init__(self, config: Config, rungs: Sequence[int], mesh: Mesh | None):
        """rungs: the T and S that exist, rising; mesh: where the parameters live, None for one device."""
        self.config, self.rungs, self.mesh = config, tuple(rungs), mesh
        self.traces = Counter()
        variant = ("sample", "logprobs")
        on_gpu = (jax.devices() if mesh is None else mesh.devices.flat)[0].platform in ("gpu", "cuda")
        self.encode = self._program(self._encode)
        self.embed = self._program(self._embed)
        self.place = self._program(self._place, donate_argnames="x")
        self.prefill = self._program(self._prefill)
        self.fork = self._program(self._fork)
        self.first = self._program(self._first, static_argnames=variant, donate_argnames="prompt")
        self.step = self._program(
            self._step,
            static_argnames=variant,
            donate_argnames=("state", "cache"),
            # Products with the same row would be merged into one, with a matrix joined anew of both in every step.
            compiler_options={"xla_gpu_dot_merger_threshold_mb": 0} if on_gpu else None,
        )
        self.pad = self._program(self._pad, static_argnames="slots")

    def grow(self, cache: Cache) -> Cache:
        """The cache with the next rung's slots; the old one is used up, a layer at a time, so that only one
        layer is held twice."""
        slots = self.slots(cache.k[0].shape[2])
        for layers in (cache.k, cache.v):
            for l, layer in enumerate(layers):
                layers[l] = self.pad(layer, slots=slots)
        return cache

    def slots(self, tokens: int) -> int:
        """The rung after this one, which gives a prompt's cache room for an answer; the last has none."""
        return next((r for r in self.rungs if r > tokens), self.rungs[-1])

    def _program(self, f, **options):
        name = f.__name__.strip("_")

        @functools.wraps(f)
        def traced(*args, **kwargs):
            self.traces[name] += 1
            return f(*args, **kwargs)

        jitted = jax.jit(traced, **options)
        if self.mesh is None:
            return jitted

        def on_mesh(f):
            def call(*args, **kwargs):
                with jax.set_mesh(self.mesh):
                    return f(*args, **kwargs)

            return call

        call = on_mesh(jitted)
        call.lower = on_mesh(jitted.lower)
        return call

    def _encode(self, params, vision):
        """VisionBatch → [CHUNK, D] pieces of the flattened [R·M, D] output, zeros at the end."""
        x = qwenvl.encode_vision(self.config, params, vision)
        x = jnp.pad(x, ((0, -len(x) % CHUNK), (0, 0)))
        return [_whole(x[i : i + CHUNK]) for i in range(0, len(x), CHUNK)]

    def _embed(self, params, tokens, segments):
        """tokens, segments [B, T] → (text embeddings [B, T, D], ids that the prompts hold [B, V])."""
        prompt = sampling.prompt_ids(tokens, segments, self.config.text.vocab_size)
        return qwenvl.embed(self.config, params, tokens, None), constrain(prompt, "BV")

    def _place(self, x, visual_index, chunk, start, stop):
        """Puts rows start … stop of the vision output, at most CHUNK, where visual_index [B, T] wants them in x."""
        index = visual_index - start
        here = (visual_index >= start) & (visual_index < stop)
        picked = chunk[jnp.clip(index, 0, CHUNK - 1)].astype(x.dtype)
        return constrain(jnp.where(here[..., None], picked, x), "BTD")

    def _prefill(self, params, x, positions, segments):
        slots = self.slots(segments.shape[1])
        logits, cache = qwenvl.prefill(self.config, params, x, positions, segments, slots)
        return constrain(logits, "BV"), _settled_cache(cache)

    def _fork(self, source, logits, prompt, cache):
        """Row b of the results is row source[b] of what was prefilled."""
        logits, prompt, cache = jax.tree.map(lambda a: a[source], (logits, prompt, cache))
        return constrain(logits, "BV"), constrain(prompt, "BV"), _settled_cache(cache)

    def _first(self, logits, prompt, keys, knobs, *, sample, logprobs):
        draw, state = sampling.start(logits, prompt, keys, knobs, sample=sample, logprobs=logprobs)
        return jax.tree.map(_whole, draw), _settled_state(state)

    def _step(self, params, tokens, state, cache, knobs, *, sample, logprobs):
        """One token a row: decodes `tokens` [B] and draws the next ones, in one dispatch."""
        logits, cache = qwenvl.decode(self.config, params, tokens, cache)
        draw, state = sampling.draw(logits, state, knobs, sample=sample, logprobs=logprobs)
        return jax.tree.map(_whole, draw), _settled_state(state), _settled_cache(cache)

    def _pad(self, layer, *, slots):
        return constrain(jnp.pad(layer, ((0, 0), (0, 0), (0, slots - layer.shape[2]), (0, 0))), "BKSH")


# On a mesh, what programs hand on to each other has one layout; otherwise XLA would choose one per program,
# and the next program would be compiled once for each that it meets.


def _whole(x):
    """The same on every device, so that any process can read it."""
    return constrain(x, "." * x.ndim)


def _settled_cache(cache: Cache) -> Cache:
    k, v = ([constrain(layer, "BKSH") for layer in layers] for layers in (cache.k, cache.v))
    return Cache(k, v, _whole(cache.lengths), _whole(cache.deltas))


def _settled_state(state: sampling.State) -> sampling.State:
    index, keys = _whole(state.index), _whole(state.keys)
    return sampling.State(index, keys, constrain(state.prompt, "BV"), constrain(state.counts, "BV"))


def cpu_layouts(params: dict) -> tuple[dict, dict]:
    """The parameters as XLA:CPU reads them fastest: for programs that scan stacked layers, and for a decode step.

    XLA:CPU copies what it slices from a stack, and converts a stack of bfloat16 to float32 before it slices it. So a
    decode step gets each decoder layer's weights on their own, and scans get bfloat16 as its bits. All of them are
    views of the same memory (weights of a few bytes, not aligned to 64, are copied).
    """
    # Through `addressable_data`, numpy's view dies with ours; the buffers can be donated then.
    device = next(iter(jax.tree.leaves(params)[0].devices()))
    host = jax.tree.map(lambda w: np.asarray(w.addressable_data(0)), params)

    def bits(w):
        return w.view(np.uint16) if w.dtype == jnp.bfloat16 else w

    layers, blocks = host["decoder"]["layers"], host["vision"]["blocks"]
    depth = len(jax.tree.leaves(layers)[0])
    stacked, scanned, apart = jax.device_put(
        (
            jax.tree.map(bits, layers),
            jax.tree.map(bits, blocks),
            [jax.tree.map(lambda w, l=l: w[l], layers) for l in range(depth)],
        ),
        device,
    )
    decoder, vision = params["decoder"], params["vision"]
    return (
        {"decoder": decoder | {"layers": stacked}, "vision": vision | {"blocks": scanned}},
        {"decoder": decoder | {"layers": apart}, "vision": vision},
    )
