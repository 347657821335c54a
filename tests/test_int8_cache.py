"""The KV cache in int8: its rounding, attention over it in every form, and engines that hold it."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import model, texts
from test_sharding import config_of
from tiny import FAMILIES, mixed_samples, tiny_config, tiny_params

from qwenvl_jax.cli import build_parser, converse, main
from qwenvl_jax.cli.plan import job as plan_job
from qwenvl_jax.errors import InputError, OptionsError
from qwenvl_jax.eval.evaluator import Evaluator
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.model import attention, qwenvl
from qwenvl_jax.model.attention import decode_attention, to_int8
from qwenvl_jax.model.decoder import write_and_attend
from qwenvl_jax.model.kernels import cpu
from qwenvl_jax.model.kernels import decode as decode_kernel
from qwenvl_jax.params import checkpoint
from qwenvl_jax.params.specs import param_shardings, specs
from qwenvl_jax.plan.plan import Job, _cache, _local_bytes
from qwenvl_jax.sharding import activation_sharding, make_mesh
from qwenvl_jax.types import Int8, Model

kernel = jax.jit(partial(decode_kernel.decode_kernel, interpret=True))
plain = jax.jit(write_and_attend)


def exact(cache: Int8) -> np.ndarray:
    return np.asarray(cache.values, np.float64) * np.asarray(cache.scales, np.float64)[..., None]


# Rounding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 100.0])
def test_a_vector_is_rounded_to_its_own_scale(dtype, size):
    x = np.random.default_rng(0).standard_normal((3, 5, 7, 16)) * size
    x = jnp.asarray(x * 2.0 ** np.arange(7)[:, None], dtype)
    got, wide = jax.jit(to_int8)(x), np.asarray(x, np.float64)
    largest = np.abs(wide).max(-1)
    np.testing.assert_allclose(got.scales, largest / 127, rtol=1e-6)
    assert np.abs(np.asarray(got.values, int)).max(-1).min() == 127 and got.values.min() >= -127
    error = np.abs(exact(got) - wide)
    assert (error <= (largest / 254)[..., None] * (1 + 1e-5)).all()
    negative = jax.jit(to_int8)(-x)
    np.testing.assert_array_equal(negative.values, -got.values)
    again = jax.jit(to_int8)(exact(got).astype(np.float32))  # what is rounded already stays as it is
    np.testing.assert_array_equal(again.values, got.values)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
def test_vectors_without_a_scale(jit):
    """Zeros stay zeros; the smallest numbers become zeros or stay close; NaN and infinity are not hidden."""
    x = np.ones((6, 8), np.float32)
    x[0], x[1], x[2], x[3, 2], x[4, 2], x[5, 2] = 0, 1e-45, 3e38, np.nan, np.inf, -np.inf
    got = jit(to_int8)(x)
    values = exact(jax.tree.map(lambda a: a[:3], got))
    assert not values[0].any() and np.abs(values[1]).max() <= 1e-43
    np.testing.assert_allclose(values[2], x[2], rtol=1e-6)
    assert not np.isfinite(np.asarray(got.scales)[3:]).any()


# Attention


def problem(seed: int, B: int, K: int, G: int, S: int, H: int, dtype="float32"):
    """q, k, v of a token, int8 caches with arbitrary dead slots, lengths with the least and the greatest."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, 1, heads, H)) for heads in (K * G, K, K))
    lengths = np.where(rng.random(B) < 0.5, rng.integers(0, S, B), rng.choice([0, S // 2, S - 1, S], B))
    live = np.arange(S) < lengths[:, None]

    def cache():
        held = to_int8(rng.standard_normal((B, K, S, H)) * rng.uniform(0.1, 3, (B, K, S, 1)))
        dead = rng.integers(-128, 128, held.values.shape)
        values = np.where(live[:, None, :, None], held.values, dead)
        return Int8(jnp.asarray(values, jnp.int8), jnp.where(live[:, None], held.scales, jnp.nan))

    return *(jnp.asarray(a, dtype) for a in (q, k, v)), cache(), cache(), jnp.asarray(lengths, jnp.int32)


def reference(q, k, v, lengths):
    """Attention in float64 over what the caches stand for; k, v: after the write."""
    q, k, v = np.asarray(q, np.float64)[:, 0], exact(k), exact(v)
    out = []
    for b, length in enumerate(np.minimum(lengths + 1, k.shape[2])):
        for head, one in enumerate(q[b]):
            group = head // (q.shape[1] // k.shape[1])
            scores = k[b, group, :length] @ one * q.shape[2] ** -0.5
            p = np.exp(scores - scores.max())
            out.append(p / p.sum() @ v[b, group, :length])
    return np.reshape(out, (len(q), 1, q.shape[1], -1))


@pytest.mark.parametrize(("B", "K", "G", "S"), [(1, 4, 1, 64), (4, 2, 3, 96), (5, 1, 8, 384), (3, 2, 2, 300)])
@pytest.mark.parametrize("form", ["kernel", "XLA", "XLA in blocks"])
def test_attention_is_exact_but_for_the_rounding(monkeypatch, form, B, K, G, S):
    """Within 1e-5 of float64 over the dequantised cache: rows of any length, any bits in dead slots."""
    H = 16
    if form == "kernel" and S == 300 and not jax.__version__.startswith("0.10."):
        pytest.skip("the interpreter of jax 0.12 cannot pad an aliased array to blocks of two sizes; TPUs need not")
    monkeypatch.setattr(decode_kernel, "BLOCK", K * H * 64)  # of int8, 128 slots a block
    if form == "XLA in blocks":
        monkeypatch.setattr(attention, "INT8_BLOCK", 0)
        monkeypatch.setattr(cpu, "INT8_BLOCK", B * K * H * 70)
    run = jax.jit(partial(decode_kernel.decode_kernel, interpret=True) if form == "kernel" else write_and_attend)
    for seed in range(4):
        *args, lengths = problem(seed, B, K, G, S, H)
        got, *caches = run(*args, lengths)
        for cache, old, new in zip(caches, args[3:], args[1:3], strict=True):
            at = np.arange(B), slice(None), np.minimum(lengths, S - 1)
            for part, before, token in zip(cache, old, to_int8(jnp.swapaxes(new, 1, 2)), strict=True):
                want = np.array(before)
                want[at] = token[:, :, 0]
                np.testing.assert_array_equal(part, want)  # one slot is written, all others keep their bits
        assert np.abs(got - reference(args[0], *caches, lengths)).max() <= 1e-5


def test_large_caches_are_converted_in_blocks():
    """On CPUs; no array of the program is as large as a whole cache in float32."""
    B, K, G, S, H = 1, 2, 2, 4096, 192
    q, _, _, k, v, lengths = problem(0, B, K, G, S, H)
    assert k.values.size > attention.INT8_BLOCK
    compiled = jax.jit(decode_attention).lower(q, k, v, lengths).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * k.values.size
    assert f"f32[{B},{K},{S},{H}]" not in compiled.as_text()
    want = jax.jit(decode_attention)(q, k, v, lengths)
    assert np.isfinite(want).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_equals_plain_xla_in_bfloat16(seed):
    *args, lengths = problem(seed, 4, 2, 3, 96, 16, "bfloat16")
    (got, *caches), (want, *written) = kernel(*args, lengths), plain(*args, lengths)
    jax.tree.map(np.testing.assert_array_equal, caches, written)
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-6)


def test_the_error_is_within_what_theory_allows():
    """A key's elements are off by half its scale at most, so a score is off by δ = |q|₁ · scale / (2 √H), and a weight
    by a factor of e^(2 δ). Values are off by half their scale."""
    B, K, G, S, H = 4, 2, 2, 128, 16
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((B, 1, K * G, H), (B, K, S, H), (B, K, S, H)))
    lengths = jnp.asarray([1, 50, 127, 128], jnp.int32)
    k8, v8 = to_int8(k), to_int8(v)
    error = np.abs(decode_attention(q, k8, v8, lengths) - decode_attention(q, k, v, lengths))[:, 0]
    score = np.abs(q[:, 0]).sum(-1) * np.repeat(np.asarray(k8.scales).max(-1), G, 1) / (2 * H**0.5)
    largest, step = (np.repeat(np.max(a, axis), G, 1) for a, axis in ((np.abs(v), (2, 3)), (v8.scales, 2)))
    assert (error <= ((np.exp(2 * score) - 1) * largest + step / 2)[..., None]).all()
    assert error.max() < 0.02 and np.sqrt((error**2).mean()) < 0.004  # for values of a normal distribution


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_the_cache_reaches_the_answer(bad):
    *args, lengths = problem(0, 2, 2, 2, 64, 16)
    for i in (1, 2):
        broken = [a.at[0, 0, 0, 3].set(bad) if i == n else a for n, a in enumerate(args)]
        for form in (kernel, plain):
            out = np.asarray(form(*broken, lengths)[0])
            assert np.isnan(out[0, 0, :2]).any() and np.isfinite(out[1]).all() and np.isfinite(out[0, 0, 2:]).all()


@pytest.mark.parametrize(("B", "K"), [(4, 4), (3, 2)])
def test_the_kernel_on_a_mesh(B, K):
    """Sizes that the mesh splits, and sizes that it does not."""
    args = problem(0, B, K, 2, 64, 16)
    want = plain(*args)
    with jax.set_mesh(mesh := make_mesh(data=2, tensor=4)):
        place = partial(activation_sharding, mesh=mesh)
        dims = [*("BTNH", "BTKH", "BTKH"), *("BKSH", "BKS") * 2, "."]
        leaves, tree = jax.tree.flatten(args)
        placed = [jax.device_put(a, place(d, a.shape)) for d, a in zip(dims, leaves, strict=True)]
        got = kernel(*jax.tree.unflatten(tree, placed))
        assert got[1].scales.sharding.is_equivalent_to(place("BKS", got[1].scales.shape), 3)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_blocks_have_the_bytes_of_float_blocks(K):
    for S in Ladder().tokens:
        slots = decode_kernel.block_slots(K, S, 128, int8=True)
        assert slots == S or (slots % 128 == 0 and 2**17 < slots * K * 128)
        assert slots * K * 128 <= 2**18


# Engines


def engine(kv_dtype, m=None, **options):
    options = {"max_batch": 4, "ladder": Ladder(rows=(4,), tokens=(64, 128, 160, 256))} | options
    return Engine(m or model(), kv_dtype=kv_dtype, **options)


@pytest.fixture(scope="module")
def engines():
    return SimpleNamespace(float=engine("auto"), int8=engine("int8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_close_to_those_of_a_float_cache(family):
    """Of four prompts and twelve tokens after each, the same for both caches. Where the float cache's best token leads
    by more than the two errors together, it is the same token."""
    config = tiny_config(family, {"num_hidden_layers": 2})
    params, samples = tiny_params(config), mixed_samples(config)
    answers = np.random.default_rng(5).integers(1, 150, (4, 12))
    batch = make_batch(samples, config)
    start = jax.jit(qwenvl.prefill, static_argnums=(0, 5), static_argnames="int8")
    step = jax.jit(qwenvl.decode, static_argnums=0)
    visual = jnp.concatenate([qwenvl.encode_vision(config, params, v) for v in batch.vision])
    x = qwenvl.embed(config, params, batch.tokens, batch.visual_index, visual)
    logits = {}
    for int8 in (False, True):
        first, cache = start(config, params, x, batch.positions, batch.segments, batch.tokens.shape[1] + 12, int8=int8)
        assert isinstance(cache.k[0], Int8) == int8 and cache.slots == batch.tokens.shape[1] + 12
        rows = [first]
        for tokens in answers.T:
            out, cache = step(config, params, tokens, cache)
            rows.append(out)
        logits[int8] = np.stack(rows)
    np.testing.assert_array_equal(logits[True][0], logits[False][0])  # the prompt itself attends to exact keys
    error = np.abs(logits[True] - logits[False]).max(-1)
    size = np.abs(logits[False]).max(-1)
    assert 0 < error.max() and (error <= 0.02 * size).all(), (error / size).max()
    best = logits[False].argmax(-1)
    second = np.sort(logits[False], -1)[..., -2]
    sure = logits[False].max(-1) - second > 2 * error
    assert sure.mean() > 0.9 and (logits[True].argmax(-1) == best)[sure].all()


def test_programs_buckets_and_padding_are_as_before(engines, compilations):
    samples = mixed_samples(model().config)
    options = dict(max_new_tokens=70, ignore_eos=True)
    for e in (engines.float, engines.int8):
        compilations.clear()
        e.generate(samples, **options)
        assert len(compilations) == sum(e.traces.values())
    assert engines.int8.traces == engines.float.traces and engines.int8.traces["pad"] == 1
    assert engines.int8.padding == engines.float.padding


@pytest.mark.slow
def test_rows_do_not_depend_on_batch_growth_or_forks(engines):
    """What is rounded once stays as it is: no copy, growth or neighbour changes a token."""
    samples, options = mixed_samples(model().config), dict(max_new_tokens=70, ignore_eos=True, temperature=0.9, seed=1)
    together = engines.int8.generate(samples, **options)
    assert [engines.int8.generate([s], **options)[0] for s in samples[:2]] == together[:2]
    roomy = engine("int8", max_batch=4, ladder=Ladder(rows=(4,), tokens=(320,)))
    assert roomy.generate(samples, **options) == together
    assert "pad" in engines.int8.traces and "pad" not in roomy.traces
    (one,) = engines.int8.generate(samples[1:2], n=3, **options)
    alone = [engines.int8.generate(samples[1:2], **options | {"seed": 1 + j})[0] for j in range(3)]
    assert [r.token_ids for r in one.samples] == [r.token_ids for r in alone]


def test_the_cache_is_updated_in_place_and_keeps_its_bits(engines):
    programs, e = engines.int8._programs, engines.int8
    _, _, cache = e._prompt(make_batch(texts(np.random.default_rng(0), 60), e.config, e.ladder))
    before = jax.tree.map(np.array, cache)
    old = cache.k[0]
    decode = jax.jit(qwenvl.decode, static_argnums=0, donate_argnums=3)
    _, cache = decode(e.config, e._step_params, jnp.ones(4, jnp.int32), cache)
    assert all(a.is_deleted() for a in old)
    cache = programs.grow(cache)
    assert cache.slots > before.slots
    for layers, grown in ((before.k, cache.k), (before.v, cache.v)):
        for was, now in zip(layers, grown, strict=True):
            for a, b in zip(was, now, strict=True):
                assert a.dtype == b.dtype and b.shape[2] == cache.slots
                np.testing.assert_array_equal(np.asarray(b)[0, :, :60], a[0, :, :60])  # the other rows are empty


def test_warmup_covers_it(compilations):
    e = engine("int8", max_batch=1, max_length=96, ladder=Ladder(tokens=(64, 96)))
    e.warmup(max_pixels=0, sample=(False,), progress=False)
    traces = e.traces
    compilations.clear()
    e.generate(texts(np.random.default_rng(1), 40), max_new_tokens=50, ignore_eos=True)
    assert (e.traces, compilations) == (traces, [])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1, 4), (8, 1, 1), (1, 1, 8), (2, 2, 2)])
def test_eight_devices_equal_one(shape, compilations):
    """Two KV heads: tensor axes above two need copies of them, with copies of their scales."""
    config = config_of("qwen2_vl")
    params, samples = tiny_params(config), mixed_samples(config) * 2
    options = dict(max_new_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
    how = dict(max_batch=8, ladder=Ladder(rows=(8,), tokens=(128, 192)))
    split = jax.device_put(params, param_shardings(specs(config), make_mesh(*shape)))
    many, one = (engine("int8", Model(config, p, model().processor, {}), **how) for p in (split, params))
    compilations.clear()
    with jax.transfer_guard("disallow"):
        got = many.generate(samples, **options)
    assert len(compilations) == sum(many.traces.values())
    want = one.generate(samples, **options)
    assert [r.token_ids for r in got] == [r.token_ids for r in want]
    # Where a last bit decides how a value is rounded, the logits differ by a small part of the rounding's own error.
    error = np.abs(np.subtract(*([r.logprobs for r in results] for results in (got, want))))
    assert error.max() <= 0.02 and np.median(error) <= 1e-5 and error[:, 0].max() <= 1e-5


# Options


@pytest.mark.parametrize("bad", ["int4", "bfloat16", "", 8, True])
def test_other_dtypes_are_refused(bad):
    for call in (lambda: engine(bad), lambda: Job(model().config, context=64, kv_dtype=bad).check()):
        with pytest.raises(OptionsError, match=r"^kv_dtype is .*; it must be one of auto, int8$"):
            call()
    with pytest.raises(OptionsError, match=r"kv_dtype is .*auto, int8"):
        Evaluator(model(), [], kv_dtype=bad)


@pytest.mark.parametrize("verb", ["generate --prompt Hi", "chat", "eval q.jsonl", "plan --model demo --target v6e-1"])
def test_the_command_line_knows_it(verb, monkeypatch, capsys):
    args = build_parser().parse_args([*verb.split(), "--kv-dtype", "int8"])
    if verb.startswith("plan"):
        assert plan_job(args).kv_dtype == "int8"
    elif not verb.startswith("eval"):
        monkeypatch.setattr(converse, "enable_compile_cache", lambda: None)
        monkeypatch.setattr(checkpoint, "load_located", lambda *_, **__: model())
        assert converse.engine(None, args, None).options.int8
    with pytest.raises(SystemExit, match="2"):
        main([*verb.split(), "--kv-dtype", "int4"])
    assert "choose from" in capsys.readouterr().err


def test_an_evaluator_takes_an_engines_cache(engines):
    with pytest.raises(InputError, match="give it to Engine"):
        Evaluator(engines.int8, [], kv_dtype="int8")
    assert engine(None).options.int8 is engine("auto").options.int8 is False


@pytest.mark.parametrize("task", ["vision", "train"])
def test_only_generation_is_planned_with_it(task, capsys):
    assert main(f"plan --model qwen2-vl-2b --target v6e-1 --task {task} --kv-dtype int8".split()) == 2
    assert f"--kv-dtype is not an option of --task {task}" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 4), (1, 1, 8)])
def test_plan_counts_its_bytes(shape):
    config = config_of("qwen2_vl")
    mesh, t = make_mesh(*shape), config.text
    with jax.set_mesh(mesh):
        cache = _cache(Job(config, batch=4, context=256, kv_dtype="int8"), mesh)
        rows, heads = 4 // shape[0], max(t.num_key_value_heads // shape[2], 1)
        vectors = 2 * t.num_hidden_layers * rows * heads * 256
        assert _local_bytes(cache) == vectors * (t.head_dim + 4) + 2 * 4 * 4  # and the rows' lengths
