"""Does a job fit on a TPU slice or GPUs, and how fast can it be at best? No such device is needed.

The compilers come with `libtpu` and jax's CUDA plugin and run on any machine. They compile the program that would run;
`hlo.py` reads its costs from the text. Nothing runs and nothing is measured.
"""

import dataclasses
import math
import re
import time
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from qwenvl_jax.config import Config, Quantised
from qwenvl_jax.errors import InputError
from qwenvl_jax.families import PRESETS
from qwenvl_jax.infer import sampling
from qwenvl_jax.infer.options import EngineOptions
from qwenvl_jax.infer.programs import Programs
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.layout import slots_needed
from qwenvl_jax.inputs.pack import cover
from qwenvl_jax.params import lora
from qwenvl_jax.params.directory import read_config
from qwenvl_jax.params.locate import check_name, locate
from qwenvl_jax.params.specs import abstract_params, bits, check_mesh, on_mesh, param_shardings, specs, specs_of
from qwenvl_jax.plan.hardware import CHIPS, GIB, Target, devices
from qwenvl_jax.plan.hlo import Program
from qwenvl_jax.sharding import AXES, activation_sharding, kv_copies, make_mesh
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.step import batch_shardings, init_state, make_optimizer, make_step, shardings
from qwenvl_jax.types import Batch, Cache, Grid, Int8, TrainBatch, VisionBatch

FORMS = {"int4": Quantised("int4", 128), "int8": Quantised("int8")}


class Job(NamedTuple):
    """The work to plan.

    task: "decode" (one token for each of `batch` rows), "prefill" (a prompt of `context` tokens per row), "vision" (the
        vision tower over `images`, in the engine's calls) or "train" (a step on `batch` rows of `context` tokens, with
        `images` in all, one per lane).
    context: for decode, the slots of the KV cache. pixels: of each image.
    lora: rank of the trained adapters; 0 trains all weights. kv_dtype: of the KV cache, see `EngineOptions`.
    """

    config: Config
    task: str = "decode"
    batch: int = 1
    context: int = 4096
    images: int = 1
    pixels: int = 1280 * 28 * 28
    lora: int = 0
    kv_dtype: str | None = None

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        if self.task not in _LOWER:
            raise InputError(f"task {self.task!r} is not one of {', '.join(_LOWER)}")
        limits = {
            "batch": (1, 2**16),
            "context": (1, self.config.text.context),
            "images": (0, 2**16),
            "lora": (0, 4096),
        }
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from {least} to {most}")
        if self.task == "vision" and not self.images:
            raise InputError("images is 0; the task vision needs at least 1")
        _ = self.grid(), EngineOptions(self.kv_dtype)

    def grid(self) -> Grid:
        """The patches of an image that is as square as possible."""
        v = self.config.vision
        side = v.patch_size * v.spatial_merge_size
        most = Ladder().patches[-1] * v.patch_size**2  # they fill a lane
        if not side**2 <= self.pixels <= most:
            raise InputError(f"pixels is {self.pixels}; it must be from {side**2} to {most}")
        h = math.isqrt(self.pixels // side**2)
        return Grid(1, h * v.spatial_merge_size, self.pixels // side**2 // h * v.spatial_merge_size)


def default_mesh(job: Job, chips: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor). Training splits over fsdp, vision over data, generation over KV heads (tensor).

    For chips beyond the KV heads, generation splits the rows (data), or else replicates KV heads (tensor).
    """
    if job.task == "train":
        return 1, chips, 1
    if job.task == "vision":
        return chips, 1, 1
    tensor = math.gcd(chips, job.config.text.num_key_value_heads)
    return (1, 1, chips) if job.batch % (chips // tensor) else (chips // tensor, 1, tensor)


def meshes(job: Job, chips: int) -> list[tuple[int, int, int]]:
    """All meshes that divide the job: tensor the MLP, data or fsdp the rows."""
    found = []
    for tensor in (n for n in range(1, chips + 1) if chips % n == 0):
        rest = chips // tensor
        if job.config.text.intermediate_size % tensor or _indivisible(job, rest):
            continue
        found.append((1, rest, tensor) if job.task == "train" else (rest, 1, tensor))
    return found


def _indivisible(job: Job, groups: int) -> str | None:
    """The option that so many groups of chips do not divide, or None. Generation replicates a single row."""
    for name in {"vision": ("images",), "train": ("batch", "images")}.get(job.task, ("batch",)):
        number = getattr(job, name)
        if number % groups and (number > 1 or job.task == "train"):
            return name
    return None


def plan(job: Job, target: Target, mesh: tuple[int, int, int] | None = None) -> dict:
    """Compiles the job for the target and returns its costs, for one step on one chip.

    mesh: (data, fsdp, tensor); the product is the number of chips. The default is `default_mesh`.
    Keys: `fits`, `chips`, `mesh`, `hbm_per_chip` (bytes), `flops`, `bytes_accessed`, `min_bytes` (inputs, read once),
    `collective_bytes` (sent), `roofline_seconds`, `compile_seconds`, and `tokens_per_second` of all chips. If the job
    does not fit, unknown values are None.
    Raises InputError for a bad job, or a mesh that does not fit the target or does not divide the job.
    """
    job.check()
    shape = mesh or default_mesh(job, target.chips)
    _check_shape(job, target, shape)
    job = job._replace(config=on_mesh(job.config, dict(zip(AXES, shape, strict=True))))
    chips = make_mesh(*shape, devices=devices(target))
    with jax.set_mesh(chips):
        lowered, parts, tokens, calls = _LOWER[job.task](job, chips)
    arrays = {name: _local_bytes(parts.get(name, ())) for name in ("weights", "cache", "optimizer")}
    memory = arrays | {"temp": None, "total": sum(arrays.values()), "limit": target.limit}
    answer = {
        "fits": False,
        "task": job.task,
        "target": str(target),
        "chips": target.chips,
        "mesh": dict(zip(AXES, shape, strict=True)),
        "hbm_per_chip": memory,
        **dict.fromkeys(("flops", "bytes_accessed", "min_bytes", "collective_bytes", "roofline_seconds")),
        "compile_seconds": 0.0,
    }
    if memory["total"] > target.limit:
        return answer
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory["total"] = _used(str(error), memory["total"])
        return answer | {"compile_seconds": time.perf_counter() - start}
    answer["compile_seconds"] = time.perf_counter() - start
    used = compiled.memory_analysis()
    memory["temp"] = used.temp_size_in_bytes
    # Weights that this program does not use, such as the vision tower in decode, are in memory too.
    arguments = max(used.argument_size_in_bytes, memory["total"]) - used.alias_size_in_bytes
    memory["total"] = arguments + used.output_size_in_bytes + used.temp_size_in_bytes
    costs = _costs(Program(compiled.as_text()), target, calls)
    answer |= costs | {"fits": memory["total"] <= target.limit, "min_bytes": calls * _local_bytes(parts["read"])}
    return answer | {"tokens_per_second": tokens / costs["roofline_seconds"]}


def _check_shape(job: Job, target: Target, shape: tuple[int, int, int]) -> None:
    if math.prod(shape) != target.chips or min(shape) < 1:
        raise InputError(f"mesh {'×'.join(map(str, shape))} has {math.prod(shape)} chips; {target} has {target.chips}")
    share = shape[0] * shape[1]
    if name := _indivisible(job, share):
        raise InputError(f"{name} is {getattr(job, name)}; it must be a multiple of data × fsdp, {share}")
    check_mesh(job.config, dict(zip(AXES, shape, strict=True)))


def _costs(program: Program, target: Target, calls: int) -> dict:
    """Operations, traffic and roofline time of so many runs of a program."""
    flops, moved = calls * program.flops, calls * program.bytes
    sent = calls * sum(c.bytes * c.times for c in program.collectives)
    chip = target.chip
    times = {"compute": flops / chip.flops, "memory": moved / chip.bandwidth, "network": sent / target.link}
    slowest = max(times, key=times.__getitem__)
    return {
        "flops": flops,
        "bytes_accessed": moved,
        "collective_bytes": sent,
        "collectives": [c._replace(times=calls * c.times)._asdict() for c in program.collectives],
        "roofline_seconds": times[slowest],
        "limited_by": slowest,
    }


def search(job: Job, kind: str, *, progress: bool = True) -> dict:
    """The plan for the smallest slice that the job fits, on its fastest mesh. Raises InputError if none fits."""
    chips = CHIPS[kind].slices or (1, 2, 4, 8, 16, 32, 64)
    with tqdm(disable=not progress, unit=" program", leave=False) as bar:
        for n in chips:
            target, plans = Target(kind, n), []
            for shape in meshes(job, n):
                bar.set_description(f"{target} {'×'.join(map(str, shape))}")
                plans.append(plan(job, target, shape))
                bar.update()
            fitting = [p for p in plans if p["fits"]]
            if fitting:
                return min(fitting, key=lambda p: p["roofline_seconds"])
    raise InputError(f"no {kind} slice fits this job: the largest, {target}, is too small or does not divide it")


def resolve_model(name: str) -> Config:
    """The configuration of a preset ("qwen2.5-vl-7b"), or of a checkpoint, without its weights."""
    if name in PRESETS:
        return PRESETS[name]
    check_name(name)
    return read_config(locate(name, weights=False).path)


def quantised(config: Config, form: str) -> Config:
    """A config with the decoder's Linears in one of FORMS, as official checkpoints have them.

    Qwen widened the MLP of the 72B for them, since 29,568 is not a multiple of 128 for each of two devices.
    Raises InputError if the config is of a quantised checkpoint, or if groups do not divide its widths.
    """
    if config.quantised:
        raise InputError("this checkpoint is quantised already; leave out --quantised")
    if form not in FORMS:
        raise InputError(f"quantised is {form!r}; it must be one of {', '.join(FORMS)}")
    if config.text.intermediate_size == 29568:
        config = config.replace(text=dataclasses.replace(config.text, intermediate_size=29696))
    linears = [path for path in lora.linears(config) if path.startswith("decoder/")]
    config = config.replace(quantised=tuple((path, FORMS[form]) for path in linears))
    specs(config)
    return config


def _shaped(mesh: Mesh, dims: str, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=activation_sharding(dims, shape, mesh))


def _placed(tree, where):
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, where)


def _local_bytes(tree) -> int:
    """Bytes per chip of a tree of sharded shapes. Two numbers of four bits share a byte."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * bits(a.dtype) // 8 for a in jax.tree.leaves(tree))


def _weights(config: Config, mesh: Mesh) -> dict:
    return _placed(abstract_params(config), param_shardings(specs(config), mesh))


def _decoder_arrays(params: dict, cache: Cache) -> dict:
    """The arrays of a pass of the decoder. Of an untied embedding table it reads single rows, which do not count."""
    decoder = params["decoder"]
    read = {k: v for k, v in decoder.items() if k != "embed_tokens" or "lm_head" not in decoder}
    return {"weights": params, "cache": cache, "read": (read, cache)}


def _cache(job: Job, mesh: Mesh) -> Cache:
    t, B, S = job.config.text, job.batch, job.context
    shape = (B, t.num_key_value_heads * kv_copies(t.num_key_value_heads), S, t.head_dim)
    layer: Any = _shaped(mesh, "BKSH", shape, jnp.int8 if job.kv_dtype == "int8" else job.config.dtype)
    if job.kv_dtype == "int8":
        layer = Int8(layer, _shaped(mesh, "BKS", shape[:3], jnp.float32))
    k, v = ([layer] * t.num_hidden_layers for _ in "kv")
    return Cache(k, v, *(_shaped(mesh, ".", (B,), jnp.int32) for _ in "ld"))


def _lower_decode(job: Job, mesh: Mesh):
    config, B, V = job.config, job.batch, job.config.text.vocab_size
    params, cache = _weights(config, mesh), _cache(job, mesh)
    shaped = partial(_shaped, mesh)
    sampling_params = jax.tree.map(lambda a: shaped(".", a.shape, a.dtype), sampling.stack_params([], B))
    state = sampling.State(
        shaped("", (), jnp.int32),
        shaped("..", (B, 2), jnp.uint32),
        shaped("BV", (B, V), bool),
        shaped("BV", (B, V), jnp.int32),
    )
    step, tokens = Programs(config, (job.context,), mesh).step, shaped(".", (B,), jnp.int32)
    lowered = step.lower(params, tokens, state, cache, sampling_params, sample=False, logprobs=None)
    return lowered, _decoder_arrays(params, cache), B, 1


def _lower_prefill(job: Job, mesh: Mesh):
    config, B, T = job.config, job.batch, job.context
    params, cache = _weights(config, mesh), _cache(job, mesh)
    x = _shaped(mesh, "BTD", (B, T, config.text.hidden_size), config.dtype)
    positions, segments = _shaped(mesh, "...", (3, B, T), jnp.int32), _shaped(mesh, "..", (B, T), jnp.int32)
    lowered = Programs(config, (T,), mesh, int8=job.kv_dtype == "int8").prefill.lower(params, x, positions, segments)
    return lowered, _decoder_arrays(params, cache), B * T, 1


def _lanes(config: Config, mesh: Mesh, R: int, P: int, lead: str = "") -> VisionBatch:
    one = (1,) * len(lead)
    ids = _shaped(mesh, f"{lead}RP", (*one, R, P), jnp.int32)
    patches = _shaped(mesh, f"{lead}RPC", (*one, R, P, config.vision.patch_values), jnp.uint8)
    return VisionBatch(patches, _shaped(mesh, f"{lead}RP.", (*one, R, P, 2), jnp.int32), ids, ids)


def _lower_vision(job: Job, mesh: Mesh):
    config, grid = job.config, job.grid()
    ladder = Ladder(lanes=mesh.shape["data"] * mesh.shape["fsdp"])
    calls = [call for call, _ in cover([grid] * job.images, config.vision, ladder)]
    # The images are equal, so all calls are equal, except perhaps the last.
    params, lanes = _weights(config, mesh), _lanes(config, mesh, *calls[0])
    lowered = Programs(config, (job.context,), mesh).vision.lower(params, lanes)
    tokens = job.images * grid.patches // config.vision.merge_unit
    return lowered, {"weights": params, "read": (params["vision"], lanes)}, tokens, len(calls)


def _lower_train(job: Job, mesh: Mesh):
    config, B, T = job.config, job.batch, job.context
    options = TrainOptions()
    params = abstract_params(config)
    if job.lora:
        # Adapters are float32; base weights keep their dtype.
        adapt = partial(lora.add, config, rank=job.lora, alpha=16.0, targets=options.lora_targets)
        params = jax.eval_shape(adapt, params, jax.ShapeDtypeStruct((2,), jnp.uint32))
    else:
        params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), params)
    trainable = lora.is_trainable if job.lora else lambda path: True
    declared = specs_of(config, params)
    params = _placed(params, param_shardings(declared, mesh))
    optimizer = make_optimizer(
        declared, options.learning_rate, weight_decay=options.weight_decay, mu_dtype=options.moment_dtype
    )
    state = jax.eval_shape(partial(init_state, declared, optimizer=optimizer, trainable=trainable), params)
    state = _placed(state, shardings(state, declared, mesh))
    P = Ladder().capacity(slots_needed(job.grid(), config.vision), config.vision)
    vision = (_lanes(config, mesh, job.images, P, "."),) if job.images else ()
    ids = jax.ShapeDtypeStruct((1, B, T), jnp.int32)
    inputs = Batch(ids, jax.ShapeDtypeStruct((1, 3, B, T), jnp.int32), ids, ids, vision)
    batch = TrainBatch(inputs, ids, jax.ShapeDtypeStruct((1, B, T), jnp.float32))
    batch = _placed(batch, batch_shardings(batch, mesh))
    step = make_step(declared, partial(sft_loss, config, remat=options.remat), optimizer, trainable)
    parts = {"weights": state.params, "optimizer": state.opt_state, "read": (state.params, state.opt_state)}
    return step.lower(state, batch), parts, B * T, 1


_LOWER = {"decode": _lower_decode, "prefill": _lower_prefill, "vision": _lower_vision, "train": _lower_train}


def _used(message: str, least: int) -> int:
    """The memory that the compiler's error message asks for, in bytes."""
    match = re.search(r"(?:Used|required[^(]*\() ?([\d.]+)([KMG]?)", message)
    return max(least, int(float(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": GIB}[match[2]])) if match else least


def table(answer: dict) -> str:
    """The plan as a text table."""
    hbm = answer["hbm_per_chip"]
    shape = " × ".join(f"{name} {n}" for name, n in answer["mesh"].items() if n > 1)
    chips = "one chip" if answer["chips"] == 1 else f"{answer['chips']} chips: {shape}"
    lines = [(answer["task"], f"{answer['target']} ({chips})")]
    lines += [(name, _gb(hbm[name])) for name in ("weights", "cache", "optimizer", "temp") if hbm[name]]
    verdict = "fits" if answer["fits"] else "does not fit"
    lines.append(("memory per chip", f"{_gb(hbm['total'])} of {_gb(hbm['limit'])}: {verdict}"))
    if answer["flops"] is not None:
        ratio = answer["bytes_accessed"] / answer["min_bytes"]
        lines += [
            ("operations", f"{answer['flops'] / 1e12:,.3f} TFLOP per chip"),
            ("memory traffic", f"{_gb(answer['bytes_accessed'])} per chip, {ratio:,.3f} × the least possible"),
            ("network traffic", f"{_gb(answer['collective_bytes'])} per chip"),
            *(("", line) for line in _collective_lines(answer["collectives"])),
            ("at best", f"{answer['roofline_seconds'] * 1e3:,.2f} ms per step, limited by {answer['limited_by']}"),
            ("", f"{answer['tokens_per_second']:,.0f} tokens/s"),
        ]
    lines.append(("compiled in", f"{answer['compile_seconds']:.1f} s"))
    return "\n".join(f"{name:<16}{text}" for name, text in lines)


def _collective_lines(collectives: list[dict], most: int = 8) -> list[str]:
    """Bytes, kind and part of the model of the collectives, the largest first."""
    sent: Counter = Counter()
    for c in collectives:
        sent[c["kind"], _part(c["source"])] += c["bytes"] * c["times"]
    lines = [f"{_gb(size)} {kind}, {part}" for (kind, part), size in sent.most_common(most)]
    rest = sum(size for _, size in sent.most_common()[most:])
    return [*lines, f"{_gb(rest)} in {len(sent) - most} smaller ones"] if rest else lines


def _part(source: str) -> str:
    """The part of the model that an operation belongs to, from its op_name, and "backward" in that pass."""
    part = re.search(r"\w+Block|Merger|embed_tokens|lm_head", source)
    if part:
        part = part[0]
    else:  # `lax.scan` takes a layer out of a stack
        part = "a layer's weights" if "dynamic_index_in_dim" in source else source.rpartition("/")[2] or "unnamed"
    return f"{part}, backward" if "transpose(" in source else part


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
