"""The compiled programs of an engine. Each is specialised to one kind of bucket, so bucket counts never multiply.

`vision` is compiled per (R, P); `embed`, `place` and `prefill` per (B, T); `first` per B; `step` and `pad` per (B, S);
`fork` only for conversations with several samples. Vision output is handed over in chunks of a fixed size, and S
follows from T, so no program depends on image sizes and text lengths together.
"""

import contextlib
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
from qwenvl_jax.model.linear import pack
from qwenvl_jax.sharding import constrain
from qwenvl_jax.types import Cache

CHUNK = 1024  # visual tokens that `place` puts into the text per call


class Programs:
    """Jitted functions, made once. `traces` counts the traces of each, by name."""

    def __init__(self, config: Config, buckets: Sequence[int], mesh: Mesh | None):
        """buckets: of T and S, rising; mesh: that of the parameters, None for one device."""
        self.config, self.buckets, self.mesh = config, tuple(buckets), mesh
        self.traces = Counter()
        self.compiling: str | None = None  # the program that is being traced and compiled; other threads may read it
        variant = ("sample", "logprobs")
        on_gpu = (jax.devices() if mesh is None else mesh.devices.flat)[0].platform in ("gpu", "cuda")
        self.vision = self._program(self._vision)
        self.embed = self._program(self._embed)
        self.place = self._program(self._place, donate_argnames="x")
        self.prefill = self._program(self._prefill)
        self.fork = self._program(self._fork)
        self.first = self._program(self._first, static_argnames=variant, donate_argnames="prompt")
        self.step = self._program(
            self._step,
            static_argnames=variant,
            donate_argnames=("state", "cache"),
            # XLA:GPU merges matmuls of one input (q/k/v, gate/up) and re-concatenates the weights on every step.
            compiler_options={"xla_gpu_dot_merger_threshold_mb": 0} if on_gpu else None,
        )
        self.pad = self._program(self._pad, static_argnames="slots")

    def grow(self, cache: Cache) -> Cache:
        """The cache in its next bucket. Layers are replaced one by one, so only one layer is in memory twice."""
        slots = self.slots(cache.k[0].shape[2])
        for layers in (cache.k, cache.v):
            for l, layer in enumerate(layers):
                layers[l] = self.pad(layer, slots=slots)
        return cache

    def slots(self, tokens: int) -> int:
        """The cache slots of a prompt of so many tokens: the next bucket, or the last one."""
        return next((bucket for bucket in self.buckets if bucket > tokens), self.buckets[-1])

    def _program(self, f, **options):
        name = f.__name__.strip("_")

        @functools.wraps(f)
        def traced(*args, **kwargs):
            self.traces[name] += 1
            self.compiling = name
            return f(*args, **kwargs)

        jitted = jax.jit(traced, **options)
        mesh = contextlib.nullcontext if self.mesh is None else functools.partial(jax.set_mesh, self.mesh)

        def call(*args, **kwargs):
            try:
                with mesh():
                    return jitted(*args, **kwargs)
            finally:
                self.compiling = None

        call.lower = jitted.lower  # for `plan`, which sets the mesh itself
        return call

    def _vision(self, params, vision):
        """VisionBatch → chunks [CHUNK, D] of the output [R·M, D], padded with zeros."""
        x = qwenvl.encode_vision(self.config, params, vision)
        x = jnp.pad(x, ((0, -len(x) % CHUNK), (0, 0)))
        return [_replicated(x[i : i + CHUNK]) for i in range(0, len(x), CHUNK)]

    def _embed(self, params, tokens, segments):
        """tokens, segments [B, T] → (text embeddings [B, T, D], ids in the prompts [B, V])."""
        prompt = sampling.prompt_ids(tokens, segments, self.config.text.vocab_size)
        return qwenvl.embed(self.config, params, tokens, None), constrain(prompt, "BV")

    def _place(self, x, visual_index, chunk, start, stop):
        """x [B, T, D] with the vision rows start … stop, in `chunk`, at the places that visual_index [B, T] names."""
        index = visual_index - start
        here = (visual_index >= start) & (visual_index < stop)
        picked = chunk[jnp.clip(index, 0, CHUNK - 1)].astype(x.dtype)
        return constrain(jnp.where(here[..., None], picked, x), "BTD")

    def _prefill(self, params, x, positions, segments):
        slots = self.slots(segments.shape[1])
        logits, cache = qwenvl.prefill(self.config, params, x, positions, segments, slots)
        return constrain(logits, "BV"), _constrain_cache(cache)

    def _fork(self, source, logits, prompt, cache):
        """Copies prefilled rows: row b of each result is row source[b]."""
        logits, prompt, cache = jax.tree.map(lambda a: a[source], (logits, prompt, cache))
        return constrain(logits, "BV"), constrain(prompt, "BV"), _constrain_cache(cache)

    def _first(self, logits, prompt, keys, sampling_params, *, sample, logprobs):
        state = sampling.State(jnp.zeros((), jnp.int32), keys, prompt, jnp.zeros(prompt.shape, jnp.int32))
        draw, state = sampling.draw(logits, state, sampling_params, sample=sample, logprobs=logprobs)
        return jax.tree.map(_replicated, draw), _constrain_state(state)

    def _step(self, params, tokens, state, cache, sampling_params, *, sample, logprobs):
        """One token per row: decodes `tokens` [B] and draws the next ones, in one dispatch."""
        logits, cache = qwenvl.decode(self.config, params, tokens, cache)
        draw, state = sampling.draw(logits, state, sampling_params, sample=sample, logprobs=logprobs)
        return jax.tree.map(_replicated, draw), _constrain_state(state), _constrain_cache(cache)

    def _pad(self, layer, *, slots):
        return constrain(jnp.pad(layer, ((0, 0), (0, 0), (0, slots - layer.shape[2]), (0, 0))), "BKSH")


# Arrays that pass from program to program have a fixed sharding. Otherwise XLA would choose one per program, and the
# next program would be compiled once for each of them.


def _replicated(x):
    """A copy on every device, so that every process can read it."""
    return constrain(x, "." * x.ndim)


def _constrain_cache(cache: Cache) -> Cache:
    k, v = ([constrain(layer, "BKSH") for layer in layers] for layers in (cache.k, cache.v))
    return Cache(k, v, _replicated(cache.lengths), _replicated(cache.deltas))


def _constrain_state(state: sampling.State) -> sampling.State:
    index, keys = _replicated(state.index), _replicated(state.keys)
    return sampling.State(index, keys, constrain(state.prompt, "BV"), constrain(state.counts, "BV"))


def cpu_layouts(params: dict) -> tuple[dict, dict]:
    """The parameters as XLA:CPU reads them fastest: (for programs that scan the layers, for a decode step).

    XLA:CPU copies a slice of a stack, and converts a bfloat16 stack to float32 before it slices. So a decode step
    gets the weights of each decoder layer as separate arrays, and scans get bfloat16 as uint16 bits. All are views of
    the same memory, except small weights that are not aligned to 64 bytes, which are copied, and quantised kernels of
    four bits, which are packed anew (`pack` of model/linear.py).
    """
    # `addressable_data` gives a view that dies with `host`, so jax can still donate the buffers.
    device = next(iter(jax.tree.leaves(params)[0].devices()))
    host = jax.tree.map(lambda w: np.asarray(w.addressable_data(0)), _packed(params))

    def scanned(part, name):
        bits = jax.tree.map(lambda w: w.view(np.uint16) if w.dtype == jnp.bfloat16 else w, host[part][name])
        return params[part] | {name: jax.device_put(bits, device)}

    layers = host["decoder"]["layers"]
    apart = [jax.tree.map(lambda w, l=l: w[l], layers) for l in range(len(jax.tree.leaves(layers)[0]))]
    return (
        {"decoder": scanned("decoder", "layers"), "vision": scanned("vision", "blocks")},
        {"decoder": params["decoder"] | {"layers": jax.device_put(apart, device)}, "vision": params["vision"]},
    )


def _packed(tree):
    """The parameters with kernels of four bits in one form that XLA:CPU reads fast."""
    if not isinstance(tree, dict) or "scales" not in tree:
        return {name: _packed(value) for name, value in tree.items()} if isinstance(tree, dict) else tree
    kernel, small = tree["kernel"], {name: w for name, w in tree.items() if name != "kernel"}
    if kernel.dtype == jnp.int4:
        group = kernel.shape[-2] // tree["scales"].shape[-2]
        pieces = [pack(np.asarray(one, np.int8), group) for one in (kernel if kernel.ndim == 3 else [kernel])]
        kernel = jnp.asarray(np.stack(pieces) if kernel.ndim == 3 else pieces[0])
    if "zeros" in small and small["zeros"].dtype == jnp.int4:
        small["zeros"] = small["zeros"].astype(jnp.int8)
    return small | {"kernel": kernel}
