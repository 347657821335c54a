"""Conversations in, answers out: batches, buckets and the decode loop around the pure model.

The loop never waits for a token. It dispatches each step right after the previous one; drawn tokens stay on the device,
and the host reads them `lag` steps later. Steps dispatched past a row's end are discarded. (A loop on the device would
hold a second copy of the cache.)
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

from qwenvl_jax.errors import InputError, NonFiniteError, OptionsError
from qwenvl_jax.infer import sampling
from qwenvl_jax.infer.compile_cache import enabled
from qwenvl_jax.infer.options import MAX_LOGPROBS, EngineOptions, GenerateOptions, tokens_left
from qwenvl_jax.infer.programs import CHUNK, Programs, cpu_layouts
from qwenvl_jax.infer.requests import Request, Result, Row, Stream, batches
from qwenvl_jax.inputs.ladder import Ladder, round_up
from qwenvl_jax.inputs.layout import slots_needed
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.params.specs import flatten
from qwenvl_jax.sharding import ACTIVATION_AXES
from qwenvl_jax.types import Batch, Model, Sample, VisionBatch


class Engine:
    """Generates with one model. Programs are compiled on first use, or ahead of time by `warmup`.

    max_batch: most rows decoded together; longer lists are split.
    max_length: most tokens of a prompt and its answer together; the default is the model's context.
    ladder: the buckets to compile for; `tokens` serves prompts and caches.
    lag: the host reads a token this many steps after the device drew it.
    kv_dtype: of the KV cache, "int8", or None or "auto" for the dtype of the computation; see `EngineOptions`.
    Raises OptionsError for a value out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch: int = 8,
        max_length: int | None = None,
        ladder: Ladder | None = None,
        lag: int = 4,
        kv_dtype: str | None = None,
    ):
        context = model.config.text.context
        max_length = context if max_length is None else max_length
        if not 1 < max_length <= context:
            raise OptionsError(f"max_length is {max_length}; it must be from 2 to the model's context, {context}")
        if max_batch < 1 or lag < 0:
            raise OptionsError(f"max_batch is {max_batch} and lag {lag}; they must be at least 1 and 0")
        self.config, self.processor, self.generation = model.config, model.processor, model.generation
        self.max_batch, self.max_length, self.lag = max_batch, max_length, lag
        self.options = EngineOptions(kv_dtype=kv_dtype)
        self.params = jax.tree.map(jnp.asarray, model.params)
        shardings = [leaf.sharding for leaf in jax.tree.leaves(self.params)]
        mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
        # Inputs are copied to every device of the mesh; the model's sharding constraints split them.
        self._sharding = shardings[0] if mesh is None else NamedSharding(mesh, PartitionSpec())

        ladder = ladder or Ladder()
        ladder.check()
        rows, tokens = _capped(ladder.rows, max_batch), _capped(ladder.tokens, max_length)
        lanes = ladder.lanes * (1 if mesh is None else math.prod(mesh.shape[axis] for axis in ACTIVATION_AXES["R"]))
        self.ladder = ladder._replace(rows=rows, tokens=tokens, lanes=lanes)
        self._programs = Programs(self.config, tokens, mesh, int8=self.options.int8)
        self._real, self._slots = Counter(), Counter()  # computed without and with padding, for "text" and "vision"

    @property
    def params(self) -> dict | None:
        """The model's parameters. They can be replaced by others of the same shapes and dtypes."""
        return self._params

    @params.setter
    def params(self, params: dict | None) -> None:
        self._params = self._scan_params = self._step_params = params
        devices = jax.tree.leaves(params)[0].devices() if params else ()
        if [device.platform for device in devices] == ["cpu"]:
            self._scan_params, self._step_params = cpu_layouts(params)

    @property
    def traces(self) -> dict[str, int]:
        """How often each program was traced, that is, compiled."""
        return dict(self._programs.traces)

    @property
    def compiling(self) -> str | None:
        """The program that another thread compiles at this moment, or None."""
        return self._programs.compiling

    @property
    def padding(self) -> dict[str, float]:
        """The share of padding in everything computed so far, for prompts ("text") and the vision tower ("vision")."""
        return {name: float(1 - self._real[name] / slots) for name, slots in self._slots.items()}

    def generate(
        self,
        conversations: Sequence,
        options: GenerateOptions | Sequence[GenerateOptions] | None = None,
        *,
        tools: list | None = None,
        **changes,
    ) -> list[Result]:
        """Answers every conversation, in order.

        conversations: lists of messages, or `Sample`s from the processor.
        options: one for all, or one for each. `changes` are single options for all (`temperature=0.7`); they win.
        tools: functions that the model may call, in OpenAI's form.
        Everything is encoded before the first token is generated: bad input costs no computation, but all images are in
        host memory at once. Raises InputError, or a subclass, for bad input, options, or a prompt that is too long.
        Raises NonFiniteError if the model computes NaN or infinity for a conversation; its `results` hold the answers
        to the others.
        """
        if isinstance(conversations, Sample) or any(isinstance(c, dict) for c in conversations):
            raise InputError("generate takes a list of conversations; put a single one into a list")
        if options is None or isinstance(options, GenerateOptions):
            options = [options or GenerateOptions()] * len(conversations)
        if len(options) != len(conversations):
            raise InputError(
                f"there are {len(options)} options for {len(conversations)} conversations; give one for each"
            )
        requests = [self._request(c, o, tools, changes) for c, o in zip(conversations, options, strict=True)]
        for rows in batches(requests, self.max_batch):
            for _ in self._run(rows):
                pass
        requests = self._failed_again(requests)
        self._check_finite(requests)
        return [request.result() for request in requests]

    def _failed_again(self, requests: list[Request]) -> list[Request]:
        """The requests, those that failed with pictures answered again alone.

        Pictures of a batch share lanes, where attention multiplies other pictures by 0; 0 · NaN is NaN.
        """
        shown = [request for request in requests if request.sample.visuals]
        if len(shown) < 2:
            return requests
        again = [request.again() if request in shown and request.failed else request for request in requests]
        for request in set(again) - set(requests):
            for rows in batches([request], self.max_batch):
                for _ in self._run(rows):
                    pass
        return again

    def _check_finite(self, requests: list[Request]) -> None:
        """Raises NonFiniteError that names the cause if any answer ended in NaN or infinity."""
        failed = [i for i, request in enumerate(requests) if request.failed]
        if not failed:
            return
        many = f" for {len(failed)} of {len(requests)} conversations, first for number {failed[0]}"
        weight = next((path for path, w in flatten(self.params).items() if not _all_finite(w)), None)
        do = "Load the checkpoint with dtype bfloat16 or float32 (--dtype)"
        if weight:
            why = f"the weight {weight} holds them. {do}; if that does not help, its files are damaged"
        elif self.config.dtype == "float16":
            why = f"float16 ends at 65504. {do}"
        else:
            why = "all weights are finite. Try dtype float32 (--dtype), and check that config.json belongs to them"
        error = NonFiniteError(f"the model computed NaN or infinity{many if len(requests) > 1 else ''}: {why}")
        error.why, error.results = why, tuple(request.result() for request in requests)
        raise error

    def stream(
        self, conversation, options: GenerateOptions | None = None, *, tools: list | None = None, **changes
    ) -> Stream:
        """Answers one conversation in pieces of text; joined, they are the text of `generate`.

        No piece holds part of a character or of a stop string. Raises as `generate` does, before the first piece.
        """
        request = self._request(conversation, options or GenerateOptions(), tools, changes)
        if len(request.rows) > 1:
            raise OptionsError(f"n is {len(request.rows)}; stream gives one answer, use generate for several")

        def steps():
            yield from self._run(request.rows)
            self._check_finite([request])

        return Stream(request, steps())

    def _request(self, conversation, options: GenerateOptions, tools, changes: dict) -> Request:
        options = options.replace(**changes)
        if options.seed is None and jax.process_count() > 1:  # one seed for all processes
            seed = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
            options = options.replace(seed=int(seed))
        max_length = options.max_length(self.generation)
        keep, vocab_size = self.processor.allow_control_tokens, self.config.text.vocab_size
        eos = self.config.eos_token_id
        options = options.resolve(self.generation, eos, keep_special=keep, vocab_size=vocab_size)
        # Where control tokens are left out of the text, their ids end it.
        ends = tuple(self.processor.control_tokens[s] for s in options.stop if s in self.processor.control_tokens)
        options = options.replace(stop_token_ids=options.stop_token_ids + ends)
        sample = conversation
        if not isinstance(sample, Sample):
            sample = self.processor.encode(conversation, tools=tools)
        limit = min(options.max_new_tokens, tokens_left(sample, self.max_length, max_length))
        for visual in sample.visuals:
            self.ladder.capacity(slots_needed(visual.grid, self.config.vision), self.config.vision)
        decode = functools.partial(self.processor.decode, skip_special_tokens=options.skip_special_tokens)
        return Request(sample, options, limit, decode, self.config)

    def _run(self, rows: list[Row]) -> Iterator[None]:
        """Generates one batch to its end. Between two yields, each row gets one token."""
        programs = self._programs
        variant = {
            "sample": not all(row.options.greedy for row in rows),
            "logprobs": MAX_LOGPROBS if any(row.options.logprobs is not None for row in rows) else None,
        }
        draw, state, cache, sampling_params = self._start(rows, variant)
        unread, dispatched = deque([_fetch(draw)]), 1
        while live := [row for row in rows if row.finish_reason is None]:
            while len(unread) <= self.lag and dispatched < max(row.limit for row in live):
                # For a row that still needs it, this step writes slot prompt + dispatched − 1.
                slots = max(row.prompt_tokens + min(dispatched, row.limit - 1) for row in live)
                while cache.slots < slots:
                    cache = programs.grow(cache)
                draw, state, cache = programs.step(
                    self._step_params, draw.tokens, state, cache, sampling_params, **variant
                )
                unread.append(_fetch(draw))
                dispatched += 1
            values = jax.device_get(unread.popleft())
            for b, row in enumerate(rows):
                row.push(b, values)
            yield

    def _start(self, rows: list[Row], variant: dict):
        """From the prompts to the first drawn token. Rows with the same prompt share one prefill."""
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
        sampling_params = self._put(sampling.stack_params([row.options.sampling_params for row in rows], size))
        draw, state = self._programs.first(logits, prompt, keys, sampling_params, **variant)
        return draw, state, cache, sampling_params

    def _prompt(self, batch: Batch):
        """Prefill: (logits [B, V] after the prompts, the ids in them [B, V], the cache)."""
        batch = self._put(batch)
        x, prompt = self._programs.embed(self._scan_params, batch.tokens, batch.segments)
        start = 0
        for lanes in batch.vision:
            end = start + lanes.frames.size // self.config.vision.merge_unit
            for chunk in self._programs.vision(self._scan_params, lanes):
                stop = min(start + CHUNK, end)
                rows = self._put((np.int32(start), np.int32(stop)))
                x = self._programs.place(x, batch.visual_index, chunk, *rows)
                start = stop
        logits, cache = self._programs.prefill(self._scan_params, x, batch.positions, batch.segments)
        return logits, prompt, cache

    def _put(self, tree):
        if self._sharding.is_fully_addressable:
            return jax.device_put(tree, self._sharding)
        # All processes hold the same values; device_put would first compare them.
        return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, self._sharding, lambda i: a[i]), tree)

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

        max_tokens: of a prompt and its answer together; the default is the engine's max_length.
        max_pixels: of each image or video frame; the default is the checkpoint's limit; 0 is for text only.
        n: answers per conversation.
        sample: whether any row of a batch samples; logprobs: whether any row returns logprobs.
        The programs go to jax's persistent compilation cache: JAX_COMPILATION_CACHE_DIR, or ~/.cache/qwenvl_jax, which
        must be closed to other users (otherwise a warning, and no cache). Later compilations that take a second or more
        go there too. Raises OptionsError for a limit out of range.
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
        with enabled():
            for job in tqdm(jobs, desc="compiling", disable=not progress):
                jax.block_until_ready(job())

    def _warm_vision(self, R: int, P: int):
        ids = np.zeros((R, P), np.int32)
        patches = np.zeros((*ids.shape, self.config.vision.patch_values), np.uint8)
        vision = VisionBatch(patches, np.zeros((*ids.shape, 2), np.int32), ids, ids)
        return self._programs.vision(self._scan_params, self._put(vision))

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
        keys, sampling_params = self._put((sampling.seed_keys([], B), sampling.stack_params([], B)))
        while True:
            for variant in variants:
                draw, state = self._programs.first(logits, jnp.copy(prompt), keys, sampling_params, **variant)
                draw, state, cache = self._programs.step(
                    self._step_params, draw.tokens, state, cache, sampling_params, **variant
                )
            if cache.slots >= self._programs.slots(tokens[-1]):
                return cache
            cache = self._programs.grow(cache)


@jax.jit
def _all_finite(weight):
    return jnp.isfinite(weight).all()


def _capped(buckets: Sequence[int], most: int) -> tuple[int, ...]:
    """The buckets below `most`, and `most`."""
    return (*(bucket for bucket in buckets if bucket < most), most)


def _forks(n: int, max_batch: int, buckets: Sequence[int]) -> set[tuple[int, int]]:
    """The (prompts, rows) buckets of batches whose conversations have n answers each."""
    counts = {(u, u * n) for u in range(1, max_batch // n + 1)} | {(1, max_batch), (1, n % max_batch)}
    counts = {(u, rows) for u, rows in counts if u < rows and (n <= max_batch or u == 1)} if n > 1 else set()
    return {(round_up(u, buckets, "rows"), round_up(rows, buckets, "rows")) for u, rows in counts}


def _fetch(draw: sampling.Draw) -> sampling.Draw:
    """Starts an asynchronous copy to the host."""
    for leaf in jax.tree.leaves(draw):
        leaf.copy_to_host_async()
    return draw
