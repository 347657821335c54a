"""Conversations in, answers out: batches, buckets and the decode loop around the pure model.

The loop never waits for a token. Each step is dispatched as soon as the one before is, the drawn token goes
from step to step on the device, and the host reads it `lag` steps later; what was dispatched past a row's
end is thrown away. (A loop on the device would keep a second copy of the cache.)
"""

import functools
import math
import secrets
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.infer import sampling
from qwenvl_jax.infer.compile_cache import kept
from qwenvl_jax.infer.options import MAX_LOGPROBS, GenerateOptions, room
from qwenvl_jax.infer.programs import CHUNK, Programs, cpu_layouts
from qwenvl_jax.infer.requests import Request, Result, Row, Stream, batches
from qwenvl_jax.inputs.ladder import Ladder, round_up
from qwenvl_jax.inputs.layout import slots_needed
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.sharding import ACTIVATION_AXES
from qwenvl_jax.types import Batch, Model, Sample, VisionBatch


class Engine:
    """Generates with one model. Programs are compiled when first needed, or ahead by `warmup`.

    max_batch: rows decoded together; longer lists are split.
    max_length: tokens of a prompt and its answer together, at most (and by default) the model's context.
    ladder: the sizes to compile for; `tokens` serves prompts and caches.
    lag: how many steps the host reads behind the device.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch: int = 8,
        max_length: int | None = None,
        ladder: Ladder | None = None,
        lag: int = 4,
    ):
        context = model.config.text.context
        max_length = context if max_length is None else max_length
        if not 1 < max_length <= context:
            raise OptionsError(f"max_length is {max_length}; it must be from 2 to the model's context, {context}")
        if max_batch < 1 or lag < 0:
            raise OptionsError(f"max_batch is {max_batch} and lag {lag}; they must be at least 1 and 0")
        self.config, self.processor, self.generation = model.config, model.processor, model.generation
        self.max_batch, self.max_length, self.lag = max_batch, max_length, lag
        self.params = jax.tree.map(jnp.asarray, model.params)
        layouts = [leaf.sharding for leaf in jax.tree.leaves(self.params)]
        mesh = next((s.mesh for s in layouts if isinstance(s, NamedSharding)), None)
        # Inputs go to every device of the mesh; the model's own constraints split them.
        self._layout = layouts[0] if mesh is None else NamedSharding(mesh, PartitionSpec())

        ladder = ladder or Ladder()
        ladder.check()
        rows, tokens = _capped(ladder.rows, max_batch), _capped(ladder.tokens, max_length)
        lanes = ladder.lanes * (1 if mesh is None else math.prod(mesh.shape[axis] for axis in ACTIVATION_AXES["R"]))
        self.ladder = ladder._replace(rows=rows, tokens=tokens, lanes=lanes)
        self._programs = Programs(self.config, tokens, mesh)
        self._real, self._slots = Counter(), Counter()  # of what was computed, by "text" and "vision"

    @property
    def params(self) -> dict | None:
        """The model's parameters; others of the same shapes and dtypes may take their place."""
        return self._params

    @params.setter
    def params(self, params: dict | None) -> None:
        self._params = self._scan_params = self._step_params = params
        devices = jax.tree.leaves(params)[0].devices() if params else ()
        if [device.platform for device in devices] == ["cpu"]:
            self._scan_params, self._step_params = cpu_layouts(params)

    @property
    def traces(self) -> dict[str, int]:
        """How often each program was traced, which is how often XLA compiled."""
        return dict(self._programs.traces)

    @property
    def padding(self) -> dict[str, float]:
        """The share of all that prompts ("text") and the vision tower ("vision") have computed that was padding."""
        return {name: float(1 - self._real[name] / slots) for name, slots in self._slots.items()}

    def generate(
        self,
        conversations: Sequence,
        options: GenerateOptions | Sequence[GenerateOptions] | None = None,
        *,
        tools: list | None = None,
        **changes,
    ) -> list[Result]:
        """Answers every conversation; the results are in their order.

        conversations: each a list of messages, or a `Sample` that the processor has made of one.
        options: for all, or one for each; `changes` are single options for all (`temperature=0.7`) and win.
        Everything is encoded before the first token is generated, so bad input anywhere costs nothing, and
        all pictures are in host memory at once. Raises InputError for bad input, bad options, or a prompt
        that leaves no room in the context.
        """
        if isinstance(conversations, Sample) or any(isinstance(c, dict) for c in conversations):
            raise InputError("generate takes a list of conversations; put the one you have into a list")
        if options is None or isinstance(options, GenerateOptions):
            options = [options or GenerateOptions()] * len(conversations)
        if len(options) != len(conversations):
            raise InputError(f"{len(options)} options were given for {len(conversations)} conversations")
        requests = [self._request(c, o, tools, changes) for c, o in zip(conversations, options, strict=True)]
        for rows in batches(requests, self.max_batch):
            for _ in self._run(rows):
                pass
        return [request.result() for request in requests]

    def stream(
        self,
        conversation,
        options: GenerateOptions | None = None,
        *,
        tools: list | None = None,
        **changes,
    ) -> Stream:
        """Answers one conversation piece by piece; the pieces joined are the text `generate` gives.

        No piece holds part of a character or of a stop string. Raises as `generate` does, before any piece.
        """
        request = self._request(conversation, options or GenerateOptions(), tools, changes)
        if len(request.rows) > 1:
            raise OptionsError(f"n is {len(request.rows)}; only one sample can be streamed, generate gives several")
        return Stream(request, self._run(request.rows))

    def _request(self, conversation, options: GenerateOptions, tools, changes: dict) -> Request:
        options = options.replace(**changes)
        if options.seed is None and jax.process_count() > 1:  # the same one for all, or each would draw its own tokens
            seed = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
            options = options.replace(seed=int(seed))
        options = options.resolve(self.generation, self.config.eos_token_id)
        sample = conversation
        if not isinstance(sample, Sample):
            sample = self.processor.encode(conversation, tools=tools)
        limit = min(options.max_new_tokens, room(sample, self.max_length))
        for visual in sample.visuals:
            self.ladder.capacity(slots_needed(visual.grid, self.config.vision), self.config.vision)
        decode = functools.partial(self.processor.decode, skip_special_tokens=options.skip_special_tokens)
        return Request(sample, options, limit, decode)

    def _run(self, rows: list[Row]) -> Iterator[None]:
        """Generates one batch to its end; the rows take in one token each between two yields."""
        programs = self._programs
        variant = {
            "sample": not all(row.options.greedy for row in rows),
            "logprobs": MAX_LOGPROBS if any(row.options.logprobs is not None for row in rows) else None,
        }
        draw, state, cache, knobs = self._start(rows, variant)
        unread, dispatched = deque([_fetch(draw)]), 1
        while live := [row for row in rows if row.finish_reason is None]:
            while len(unread) <= self.lag and dispatched < max(row.limit for row in live):
                # This step writes slot prompt + dispatched − 1 of a row, if it still needs it.
                slots = max(row.prompt_tokens + min(dispatched, row.limit - 1) for row in live)
                while cache.k[0].shape[2] < slots:
                    cache = programs.grow(cache)
                draw, state, cache = programs.step(self._step_params, draw.tokens, state, cache, knobs, **variant)
                unread.append(_fetch(draw))
                dispatched += 1
            values = jax.device_get(unread.popleft())
            for b, row in enumerate(rows):
                row.push(b, values)
            yield

    def _start(self, rows: list[Row], variant: dict):
        """From the prompts to the first drawn token. A prompt is read once, however many rows have it."""
        requests = list(dict.fromkeys(row.request for row in rows))
        batch = make_batch([r.sample for r in requests], self.config, self.ladder)
        for name, ids in ("text", batch.segments), *(("vision", lanes.frames) for lanes in batch.vision):
            self._real[name] += np.count_nonzero(ids)
            self._slots[name] += ids.size
        prefilled = self._prompt(batch)
        size = round_up(len(rows), self.ladder.rows, "rows")
        if len(requests) < len(rows):
            source = np.zeros(size, np.int32)
            source[: len(rows)] = [requests.index(row.request) for row in rows]
            prefilled = self._programs.fork(self._put(source), *prefilled)
        logits, prompt, cache = prefilled
        keys = self._put(sampling.seed_keys([row.seed for row in rows], size))
        knobs = self._put(sampling.make_knobs([row.options.knobs for row in rows], size))
        draw, state = self._programs.first(logits, prompt, keys, knobs, **variant)
        return draw, state, cache, knobs

    def _prompt(self, batch: Batch):
        """Reads the prompts: (logits [B, V] after each, ids that each holds [B, V], the cache)."""
        batch = self._put(batch)
        x, prompt = self._programs.embed(self._scan_params, batch.tokens, batch.segments)
        start = 0
        for lanes in batch.vision:
            end = start + lanes.frames.size // self.config.vision.merge_unit
            for chunk in self._programs.encode(self._scan_params, lanes):
                stop = min(start + CHUNK, end)
                rows = self._put((np.int32(start), np.int32(stop)))
                x = self._programs.place(x, batch.visual_index, chunk, *rows)
                start = stop
        logits, cache = self._programs.prefill(self._scan_params, x, batch.positions, batch.segments)
        return logits, prompt, cache

    def _put(self, tree):
        if self._layout.is_fully_addressable:
            return jax.device_put(tree, self._layout)
        # Every process has the same; device_put would first compare them all.
        return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, self._layout, lambda i: a[i]), tree)

    def warmup(
        self,
        *,
        max_tokens: int | None = None,
        max_pixels: int | None = None,
        n: int = 1,
        sample: Sequence[bool] = (False, True),
        logprobs: Sequence[bool] = (False,),
        progress: bool = True,
    ) -> None:
        """Compiles every program that requests within these limits can need, by running each once.

        max_tokens: of a prompt and its answer together; by default the engine's max_length.
        max_pixels: the largest that pictures and video frames are prepared with, however many; by default the
            checkpoint's limit, 0 for text only.
        n: samples of every conversation.
        sample, logprobs: the kinds of batches to prepare for: any row not greedy, any row with logprobs.
        They are kept for the next process in jax's persistent compilation cache: where JAX_COMPILATION_CACHE_DIR
        says, else in ~/.cache/qwenvl_jax, which must be closed to others (otherwise a warning, and nothing is kept).
        What this process compiles later is kept there too, if it takes a second or more.
        Raises InputError for limits that cannot be.
        """
        for name, value, least in (("max_tokens", max_tokens, 1), ("max_pixels", max_pixels, 0), ("n", n, 1)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise OptionsError(f"{name} is {value}; it must be a whole number, at least {least}")
        tokens = self.ladder.tokens
        most = self.max_length if max_tokens is None else min(max_tokens, self.max_length)
        tokens = tokens[: tokens.index(round_up(most, tokens, "tokens")) + 1]
        variants = [{"sample": s, "logprobs": MAX_LOGPROBS if p else None} for s in sample for p in logprobs]
        if max_pixels is None:
            max_pixels = self.processor.preprocessing.max_pixels
        calls = self.ladder.reach(max_pixels, self.config.vision) if max_pixels else []
        forks = _forks(n, self.max_batch, self.ladder.rows)
        jobs = [functools.partial(self._warm_vision, *call) for call in calls]
        for B in self.ladder.rows:
            jobs += [functools.partial(self._warm_prompt, B, T, forks, min(calls, default=None)) for T in tokens]
            jobs.append(functools.partial(self._warm_steps, B, tokens, variants))
        with kept():
            for job in tqdm(jobs, desc="compiling", disable=not progress):
                jax.block_until_ready(job())

    def _warm_vision(self, R: int, P: int):
        ids = np.zeros((R, P), np.int32)
        patches = np.zeros((*ids.shape, self.config.vision.patch_values), np.uint8)
        vision = VisionBatch(patches, np.zeros((*ids.shape, 2), np.int32), ids, ids)
        return self._programs.encode(self._scan_params, self._put(vision))

    def _warm_prompt(self, B: int, T: int, forks: set[tuple[int, int]], call: tuple[int, int] | None):
        empty = np.zeros((B, T), np.int32)
        batch = Batch(empty, np.zeros((3, B, T), np.int32), empty, empty - 1)
        prefilled = self._prompt(batch)
        for size in (to for of, to in forks if of == B):
            self._programs.fork(self._put(np.zeros(size, np.int32)), *prefilled)
        if call:
            batch = self._put(batch)
            x, _ = self._programs.embed(self._scan_params, batch.tokens, batch.segments)
            chunk = self._warm_vision(*call)[0]
            self._programs.place(x, batch.visual_index, chunk, *self._put((np.int32(0), np.int32(0))))
        return prefilled

    def _warm_steps(self, B: int, tokens: Sequence[int], variants: list[dict]):
        logits, prompt, cache = self._warm_prompt(B, tokens[0], set(), None)
        keys, knobs = self._put((sampling.seed_keys([], B), sampling.make_knobs([], B)))
        while True:
            for variant in variants:
                draw, state = self._programs.first(logits, jnp.copy(prompt), keys, knobs, **variant)
                draw, state, cache = self._programs.step(self._step_params, draw.tokens, state, cache, knobs, **variant)
            # A prompt in the last bucket has a cache of the rung after it.
            if cache.k[0].shape[2] >= self._programs.slots(tokens[-1]):
                return cache
            cache = self._programs.grow(cache)


def _capped(rungs: Sequence[int], most: int) -> tuple[int, ...]:
    """The rungs below `most`, and `most`."""
    return (*(r for r in rungs if r < most), most)


def _forks(n: int, max_batch: int, rungs: Sequence[int]) -> set[tuple[int, int]]:
    """The (prompts, rows) buckets that conversations with n samples each lead to."""
    counts = {(u, u * n) for u in range(1, max_batch // n + 1)} | {(1, max_batch), (1, n % max_batch)}
    counts = {(u, rows) for u, rows in counts if u < rows and (n <= max_batch or u == 1)} if n > 1 else set()
    return {(round_up(u, rungs, "rows"), round_up(rows, rungs, "rows")) for u, rows in counts}


def _fetch(draw: sampling.Draw) -> sampling.Draw:
    """Starts the copy to the host, to be read later without waiting."""
    for leaf in jax.tree.leaves(draw):
        leaf.copy_to_host_async()
    return draw
