"""Sampling, compared with a float64 reference, with transformers' processors, and with single rows."""

import jax
import numpy as np
import pytest

from qwenvl_jax.errors import InputError
from qwenvl_jax.infer import sampling
from qwenvl_jax.infer.options import OFF, GenerateOptions, SamplingParams
from qwenvl_jax.inputs.fields import GENERATION, unsupported

V = 97
allowed_ids = jax.jit(sampling.allowed_ids)
penalise = jax.jit(sampling.penalise)
draw = jax.jit(sampling.draw, static_argnames=("sample", "logprobs"))


def logits(rows, seed=0, vocab=V, scale=3.0):
    return (scale * np.random.default_rng(seed).standard_normal((rows, vocab))).astype(np.float32)


def kept(x, top_k=0, top_p=1.0, min_p=0.0):
    rows = [np.full(len(x), a, d) for a, d in ((top_k, np.int32), (top_p, np.float32), (min_p, np.float32))]
    return np.asarray(allowed_ids(x, *rows))


def reference(row, top_k=0, top_p=1.0, min_p=0.0):
    """The allowed ids of one row, by sorting in float64; ties with the last one are allowed too."""
    row = row.astype(np.float64)
    p = np.exp(row - row.max())
    left = np.ones(len(row), bool)
    if top_k:
        left = row >= np.sort(row)[::-1][min(top_k, len(row)) - 1]
    if top_p < 1:
        order = np.argsort(-row, kind="stable")
        order = order[left[order]]
        mass = np.cumsum(p[order]) / p[order].sum()
        left &= row >= row[order[np.flatnonzero(mass >= top_p)[0]]]
    return left & (p >= min_p * p.max())


@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 96, 97, 98, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 1.0])
def test_allowed_ids_equal_a_sort(top_k, top_p, min_p):
    x = logits(40, seed=top_k)
    expected = [reference(row, top_k, np.float64(np.float32(top_p)), np.float64(np.float32(min_p))) for row in x]
    np.testing.assert_array_equal(kept(x, top_k, top_p, min_p), expected)


def test_allowed_ids_of_a_real_vocabulary():
    x = logits(3, vocab=151936)
    settings = (50, 0.8, 0.0), (0, 0.8, 0.0), (20, 1.0, 0.05)
    sampling_params = sampling.stack_params([OFF._replace(top_k=k, top_p=p, min_p=m) for k, p, m in settings], 3)
    got = np.asarray(allowed_ids(x, sampling_params.top_k, sampling_params.top_p, sampling_params.min_p))
    for row, row_kept, (top_k, top_p, min_p) in zip(x, got, settings, strict=True):
        np.testing.assert_array_equal(row_kept, reference(row, top_k, top_p, min_p))


def test_ties_at_the_threshold_are_kept():
    x = np.array([[3, 1, 2, 2, 0, 2, -1]], np.float32)
    assert kept(x, top_k=2)[0].tolist() == [True, False, True, True, False, True, False]
    # softmax of [3, 2, 2, 2, …] is .44, .16, .16, .16, …: the second id reaches .5, and equal ones stay
    assert kept(x, top_p=0.5)[0].tolist() == [True, False, True, True, False, True, False]


def test_zeros_of_both_signs_are_one_value():
    x = np.array([[0.0, -0.0, -1.0, 1.0]], np.float32)
    assert kept(x, top_k=2)[0].tolist() == [True, True, False, True]


def test_minus_infinity_is_never_drawn():
    x = logits(1)
    x[0, ::2] = -np.inf
    sampling_params = sampling.stack_params([OFF._replace(temperature=5.0)], 1)
    state = fresh_state([0])
    for _ in range(200):
        out, state = draw(x, state, sampling_params, sample=True)
        assert int(out.tokens[0]) % 2


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(8))
def test_allowed_ids_equal_transformers(seed):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(seed)
    x = logits(16, seed)
    top_k, top_p, min_p = int(rng.integers(1, V)), float(rng.uniform(0.05, 0.99)), float(rng.uniform(0, 0.3))
    scores = torch.from_numpy(x)
    for warper in (hf.TopKLogitsWarper(top_k), hf.TopPLogitsWarper(top_p), hf.MinPLogitsWarper(min_p)):
        scores = warper(None, scores)
    np.testing.assert_array_equal(kept(x, top_k, top_p, min_p), torch.isfinite(scores).numpy())


@pytest.mark.parity
@pytest.mark.parametrize("penalty", [1.05, 1.7, 0.8])
def test_repetition_penalty_equals_transformers(penalty):
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(3)
    x = logits(5)
    prompt, generated = rng.integers(0, V, (5, 11)), rng.integers(0, V, (5, 6))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.from_numpy(np.concatenate([prompt, generated], 1)), torch.from_numpy(x)
    )
    segments = np.ones(prompt.shape, np.int32)
    seen = sampling.prompt_ids(prompt, segments, V)
    sampling_params = sampling.stack_params([OFF._replace(repetition_penalty=penalty)] * 5, 5)
    got = np.asarray(penalise(x, seen, counts(generated), sampling_params))
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-7, atol=0)


def counts(generated, vocab=V):
    return np.stack([np.bincount(row, minlength=vocab) for row in generated]).astype(np.int32)


def test_penalties_by_hand():
    x = np.array([[2.0, -2.0, 1.0, 1.0, 4.0]], np.float32)
    seen = np.array([[True, True, False, False, False]])
    generated = np.array([[0, 0, 3, 1, 0]], np.int32)
    sampling_params = sampling.stack_params(
        [OFF._replace(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)], 1
    )
    # prompt ids: repetition only; id 2 thrice, id 3 once generated: 1/2 − 3·0.25 − 0.5, 1/2 − 0.25 − 0.5
    assert np.asarray(penalise(x, seen, generated, sampling_params))[0].tolist() == [1.0, -4.0, -0.75, -0.25, 4.0]


def test_prompt_ids_leave_padding_out():
    tokens, segments = np.array([[5, 3, 0, 0], [1, 1, 2, 0]]), np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    seen = np.asarray(sampling.prompt_ids(tokens, segments, 7))
    assert [np.flatnonzero(r).tolist() for r in seen] == [[3, 5], [0, 1, 2]]


def fresh_state(seeds, vocab=V):
    size = len(seeds)
    return sampling.State(
        np.int32(0), sampling.seed_keys(seeds, size), np.zeros((size, vocab), bool), np.zeros((size, vocab), np.int32)
    )


@pytest.mark.parametrize(
    "sampling_params",
    [
        OFF._replace(temperature=1.0),
        OFF._replace(temperature=0.6),
        OFF._replace(temperature=1.5, top_k=5),
        OFF._replace(temperature=1.0, top_p=0.7),
        OFF._replace(temperature=1.2, top_k=9, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_frequencies_follow_the_probabilities(sampling_params):
    draws, vocab = 40_000, 12
    row = logits(1, seed=5, vocab=vocab, scale=1.0)[0]
    scaled = row.astype(np.float64) / sampling_params.temperature
    p = np.where(
        reference(scaled, sampling_params.top_k, sampling_params.top_p, sampling_params.min_p), np.exp(scaled), 0
    )
    p /= p.sum()
    rows, state = np.tile(row, (draws, 1)), fresh_state(range(draws), vocab)
    out, _ = draw(rows, state, sampling.stack_params([sampling_params] * draws, draws), sample=True)
    seen = np.bincount(out.tokens, minlength=vocab)
    assert not seen[p == 0].any()
    live = p > 0
    chi2 = ((seen[live] - draws * p[live]) ** 2 / (draws * p[live])).sum()
    # The 99.9% quantile of chi² with 11 degrees of freedom is 31.3, less with fewer; the seeds are fixed.
    assert chi2 < {11: 31.3}.get(live.sum() - 1, 27.9)


def test_successive_tokens_are_independent():
    """The successive tokens of one row have the distribution of many rows."""
    row = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))
    state, sampling_params = fresh_state([7], 4), sampling.stack_params([OFF._replace(temperature=1.0)], 1)
    tokens = []
    for _ in range(2000):
        out, state = draw(row, state, sampling_params, sample=True)
        tokens.append(int(out.tokens[0]))
    pairs = np.bincount(np.array(tokens[:-1]) * 4 + tokens[1:], minlength=16)
    p = np.outer([0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125]).ravel() * 1999
    assert ((pairs - p) ** 2 / p).sum() < 37.7  # 99.9% quantile, 15 degrees of freedom
    assert int(state.index) == 2000 and np.asarray(state.counts).sum() == 2000


def test_a_row_draws_the_same_in_any_batch():
    x = logits(6)
    settings = [OFF._replace(temperature=0.5 + 0.3 * i, top_k=3 * i, top_p=1 - 0.1 * i) for i in range(6)]
    together, _ = draw(x, fresh_state(range(6)), sampling.stack_params(settings, 6), sample=True)
    for order in ([3], [5, 0, 3], [2, 3, 2, 1, 0, 5, 4]):
        chosen = [settings[i] for i in order]
        out, _ = draw(x[order], fresh_state(order), sampling.stack_params(chosen, len(order)), sample=True)
        assert out.tokens.tolist() == together.tokens[np.array(order)].tolist()


def test_the_users_default_generator_changes_nothing():
    x, sampling_params = logits(4), sampling.stack_params([OFF._replace(temperature=1.0)] * 4, 4)
    before, _ = draw(x, fresh_state(range(4)), sampling_params, sample=True)
    with jax.default_prng_impl("rbg"):
        after, _ = jax.jit(sampling.draw, static_argnames="sample")(
            x, fresh_state(range(4)), sampling_params, sample=True
        )
    assert before.tokens.tolist() == after.tokens.tolist()


def test_seeds_are_taken_modulo_2_to_the_64():
    keys = sampling.seed_keys([1, 2**32, 2**64 + 1, -1], 5)
    assert keys.tolist() == [[0, 1], [1, 0], [0, 1], [2**32 - 1] * 2, [0, 0]]
    assert keys[:2].tolist() == [jax.random.key_data(jax.random.key(1)).tolist(), [1, 0]]


def test_greedy_rows_among_sampling_rows_are_the_argmax():
    x = logits(8, scale=0.01)
    settings = [OFF if i % 2 else OFF._replace(temperature=2.0) for i in range(8)]
    out, _ = draw(x, fresh_state(range(8)), sampling.stack_params(settings, 8), sample=True)
    alone, _ = draw(x, fresh_state(range(8)), sampling.stack_params([], 8), sample=False)
    assert out.tokens[1::2].tolist() == alone.tokens[1::2].tolist() == x.argmax(-1)[1::2].tolist()
    assert out.tokens[::2].tolist() != x.argmax(-1)[::2].tolist()


@pytest.mark.parametrize("temperature", [1e-6, 1e-30])
def test_a_temperature_near_zero_is_the_argmax(temperature):
    x = logits(8, scale=30)
    sampling_params = sampling.stack_params([OFF._replace(temperature=temperature, top_k=50)] * 8, 8)
    out, _ = draw(x, fresh_state(range(8)), sampling_params, sample=True)
    assert out.tokens.tolist() == x.argmax(-1).tolist()


def test_logprobs_are_those_of_the_raw_logits():
    x = logits(3)
    sampling_params = sampling.stack_params([OFF._replace(temperature=1.7, top_k=4, repetition_penalty=1.5)] * 3, 3)
    out, _ = draw(x, fresh_state(range(3)), sampling_params, sample=True, logprobs=5)
    p = x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(out.logprobs, p[np.arange(3), out.tokens], rtol=1e-5)
    assert out.top_ids.tolist() == np.argsort(-p)[:, :5].tolist()
    np.testing.assert_allclose(out.top_logprobs, -np.sort(-p)[:, :5], rtol=1e-5)


@pytest.mark.parametrize("sample", [False, True])
def test_a_row_that_is_not_finite_draws_nothing(sample):
    """One NaN or infinity of a row is enough; masked ids and penalties are not."""
    x = logits(7)
    x[1, 40], x[2, 3], x[3] = np.nan, np.inf, -np.inf
    x[4, 5:], x[5, 1:] = -np.inf, -np.inf
    odd = OFF._replace(repetition_penalty=3.0, presence_penalty=2.0, frequency_penalty=-1.0)
    rows = [odd._replace(temperature=t, top_k=2) for t in (1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0)]
    state = fresh_state(range(7))
    counts = np.zeros((7, V), np.int32)
    counts[:, 3] = 2
    out, state = draw(x, state._replace(counts=counts), sampling.stack_params(rows, 7), sample=sample, logprobs=2)
    tokens = out.tokens.tolist()
    assert [t == sampling.BAD for t in tokens] == [False, True, True, True, False, False, False]
    assert 0 <= tokens[4] < 5 and tokens[5] == 0


def test_values_never_recompile():
    traces = []

    @jax.jit
    def step(x, state, sampling_params):
        traces.append(1)
        return sampling.draw(x, state, sampling_params, sample=True)

    state = fresh_state([1, 2])
    for i in range(5):
        rows = [SamplingParams(0.3 * i, i, 1 - 0.1 * i, 0.1 * i, 1 + 0.1 * i, 0.2 * i, 0.1 * i), OFF]
        _, state = step(logits(2, i), state, sampling.stack_params(rows, 2))
    assert len(traces) == 1


# Options

EOS = 155
OFFICIAL = {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05, "eos_token_id": [155, 143]}


@pytest.mark.parametrize(
    "generation, options, expected",
    [
        ({}, {}, (0.0, 50, 1.0, 1.0)),
        (OFFICIAL, {}, (1e-6, 50, 1.0, 1.05)),
        (OFFICIAL, {"temperature": 0.7, "top_k": 0}, (0.7, 0, 1.0, 1.05)),
        (OFFICIAL, {"temperature": 0, "repetition_penalty": 1.0}, (0, 50, 1.0, 1.0)),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.5}, {}, (0.0, 50, 0.5, 1.0)),
        ({"do_sample": True, "top_k": 1, "top_p": 0.001, "temperature": 0.1}, {}, (0.1, 1, 0.001, 1.0)),
        ({"do_sample": True, "top_k": None}, {}, (1.0, 50, 1.0, 1.0)),
    ],
)
def test_defaults_come_from_the_checkpoint(generation, options, expected):
    o = GenerateOptions(**options).resolve(generation, EOS)
    assert (o.temperature, o.top_k, o.top_p, o.repetition_penalty) == expected


def test_eos_ids_and_length_come_from_the_checkpoint():
    assert GenerateOptions().resolve({}, EOS).stop_token_ids == (155,)
    assert GenerateOptions(stop_token_ids=[7]).resolve(OFFICIAL, EOS).stop_token_ids == (7, 155, 143)
    assert GenerateOptions(ignore_eos=True, stop_token_ids=7).resolve({"eos_token_id": 9}, EOS).stop_token_ids == (7,)
    assert GenerateOptions().resolve({"max_new_tokens": 9}, EOS).max_new_tokens == 9
    assert GenerateOptions(max_new_tokens=3).resolve({"max_new_tokens": 9}, EOS).max_new_tokens == 3
    assert GenerateOptions(stop="x").resolve({}, EOS).stop == ("x",)


def test_stop_strings_come_from_the_checkpoint():
    stored = {"stop_strings": ["a", "b"]}
    assert GenerateOptions().resolve(stored, EOS).stop == ("a", "b")
    assert GenerateOptions(stop="x").resolve(stored, EOS).stop == ("x",)
    assert GenerateOptions().resolve({"stop_strings": "a"}, EOS).stop == ("a",)
    assert GenerateOptions().resolve({"stop_strings": None}, EOS).stop == ()


def test_ids_outside_the_vocabulary_never_end_an_answer():
    for generation, options, says in (
        ({"eos_token_id": [155, 160]}, {}, r"generation_config\.json: eos_token_id is 160, .* of 160 tokens"),
        ({"eos_token_id": -1}, {}, r"generation_config\.json: eos_token_id is -1"),
        ({}, {"stop_token_ids": [160]}, "^stop_token_ids is 160"),
    ):
        with pytest.raises(InputError, match=says):
            GenerateOptions(**options).resolve(generation, EOS, vocab_size=160)
    assert GenerateOptions(ignore_eos=True).resolve({"eos_token_id": 160}, EOS, vocab_size=160).stop_token_ids == ()


@pytest.mark.parity
def test_every_setting_of_transformers_is_obeyed_harmless_or_named():
    from transformers import GenerationConfig

    defaults = GenerationConfig().to_dict()
    assert unsupported(defaults) == "" == unsupported(OFFICIAL | {"stop_strings": "x", "transformers_version": "9"})
    known = GENERATION.keys() | {"exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"}
    assert defaults.keys() - known == {"max_time", "dola_layers"}


@pytest.mark.parametrize(
    "generation",
    [
        {"num_beams": 4}, {"no_repeat_ngram_size": 3}, {"bad_words_ids": [[7]]}, {"suppress_tokens": [1]},
        {"begin_suppress_tokens": [1]}, {"forced_bos_token_id": 2}, {"forced_eos_token_id": 2}, {"min_length": 9},
        {"min_new_tokens": 3}, {"typical_p": 0.9}, {"penalty_alpha": 0.6}, {"dola_layers": "high"}, {"max_time": 2.0},
        {"sequence_bias": {"a": 1}}, {"guidance_scale": 1.5}, {"watermarking_config": {"bias": 2}}, {"top_h": 0.4},
        {"exponential_decay_length_penalty": [2, 1.1]}, {"token_healing": True}, {"presence_penalty": 1.5},
        {"cache_implementation": "quantized"}, {"a_setting_of_2027": 1},
    ],
    ids=lambda g: min(g),
)  # fmt: skip
def test_settings_that_are_not_obeyed_are_named(generation):
    ((name, value),) = generation.items()
    assert unsupported(OFFICIAL | generation) == f"{name} {value!r}"
    assert unsupported({name: None}) == ""


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": "1"},
        {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0}, {"top_p": 1.01}, {"min_p": -0.1}, {"min_p": 1.1},
        {"repetition_penalty": 0}, {"presence_penalty": float("nan")}, {"frequency_penalty": None},
        {"max_new_tokens": 0}, {"max_new_tokens": True}, {"n": 0}, {"seed": 1.5}, {"logprobs": 21}, {"logprobs": -1},
        {"temperature": 1e39}, {"temperature": 10**400}, {"top_p": 1e-46}, {"repetition_penalty": 1e-46},
        {"repetition_penalty": 1e39}, {"frequency_penalty": 1e39}, {"frequency_penalty": -1e38},
        {"presence_penalty": -(10**400)}, {"stop": [""]},
        {"stop": ""}, {"stop": [3]}, {"stop": 3}, {"stop_token_ids": ["a"]}, {"tempratur": 1},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_named(options):
    (name,) = options
    with pytest.raises(InputError, match=name):
        GenerateOptions().replace(**options).resolve({}, EOS)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e6}, {"temperature": 1e-46}, {"temperature": 1.2e-38}, {"top_p": 1.2e-38}, {"min_p": 1e-46},
        {"repetition_penalty": 1e6}, {"repetition_penalty": 1e-6}, {"frequency_penalty": 1e6},
        {"frequency_penalty": -1e6}, {"presence_penalty": 1e6}, {"seed": 10**400}, {"top_k": 10**400},
    ],
    ids=lambda o: f"{min(o)}-{str(min(o.values()))[:8]}",
)  # fmt: skip
@pytest.mark.parametrize("base", [0.0, 0.5])
def test_the_widest_options_allowed_give_a_token_that_can_be(base, options):
    """One id has all the probability, and penalties change all ids equally."""
    o = GenerateOptions(**{"temperature": base, **options}).resolve({}, EOS)
    sampling_params = sampling.stack_params([o.sampling_params], 1)
    x = np.full((1, V), -1e4, np.float32)
    x[0, 13] = 1e4
    state = fresh_state([o.seed])._replace(counts=np.full((1, V), 30_000, np.int32))
    assert np.isfinite(penalise(x, state.prompt, state.counts, sampling_params)).all()
    if o.temperature < 2 and abs(o.frequency_penalty) < 2 and o.repetition_penalty == 1:
        assert draw(x, state, sampling_params, sample=not o.greedy)[0].tokens.tolist() == [13]


@pytest.mark.parametrize(
    "generation",
    [{"temperature": "x"}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}, {"repetition_penalty": 1e39},
     {"eos_token_id": "x"}, {"eos_token_id": [1, 2.5]}, {"stop_strings": [1]}, {"stop_strings": ""},
     {"max_length": 0}, {"max_length": 2.5}],
    ids=str,
)  # fmt: skip
def test_bad_values_in_generation_config_name_the_file(generation):
    (name,) = generation
    with pytest.raises(InputError, match=rf"^generation_config\.json: {name} is"):
        GenerateOptions().resolve({"do_sample": True, **generation}, EOS)
    if name not in ("eos_token_id", "stop_strings", "max_length"):
        with pytest.raises(InputError, match=rf"^{name} is"):
            GenerateOptions(**{name: -1}).resolve({"do_sample": True, **generation}, EOS)


def test_options_of_the_processor_are_named():
    with pytest.raises(InputError, match=r"unknown option max_pixels;.*processor\.encode"):
        GenerateOptions().replace(max_pixels=1000)
    with pytest.raises(InputError, match="unknown option tempratur; ") as e:
        GenerateOptions().replace(tempratur=1)
    assert "processor" not in str(e.value)
