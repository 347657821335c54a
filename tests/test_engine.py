"""The engine on tiny random models: correct tokens, no waiting, no recompilation, correct ends of text."""

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import pytest
import tokenizers
from tiny import FAMILIES, clip, mixed_samples, picture, random_requests, sample, tiny_config, tiny_params, with_text

from qwenvl_jax.config import YarnConfig
from qwenvl_jax.errors import InputError, NonFiniteError
from qwenvl_jax.infer import engine as engine_module
from qwenvl_jax.infer import sampling
from qwenvl_jax.infer.detokenize import Detokenizer
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.infer.options import GenerateOptions
from qwenvl_jax.inputs.ladder import Ladder
from qwenvl_jax.inputs.layout import make_sample
from qwenvl_jax.inputs.pack import cover, make_batch
from qwenvl_jax.model import qwenvl
from qwenvl_jax.params.specs import flatten, param_shardings, specs, unflatten
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.types import Batch, Model

# Most tokens are one byte of UTF-8, a few are two, so token borders fall inside characters.
PAIRS = {150: b"st", 149: "é".encode(), 148: b"\xe2\x82"}
SPECIAL = range(151, 160)
EOS = 155


class FakeProcessor:
    """A byte-level tokenizer of 160 ids and no media."""

    allow_control_tokens = False
    control_tokens = MappingProxyType({"<end>": 155, "<box>": 157})

    def encode(self, messages, *, tools=None):
        text = "".join(m["content"] for m in messages) + ("tools" if tools else "")
        return make_sample(np.frombuffer(text.encode(), np.uint8), (), tiny_config("qwen2_5_vl"))

    def decode(self, ids, skip_special_tokens=True):
        ids = [i for i in ids if i not in SPECIAL or not skip_special_tokens]
        return b"".join(PAIRS.get(i) or bytes([i]) for i in ids).decode("utf-8", "replace")


@functools.cache
def model(family="qwen2_5_vl"):
    windows = {"fullatt_block_indexes": (1,)} if family == "qwen2_5_vl" else {}
    config = tiny_config(family, {"num_hidden_layers": 2}, {"depth": 2} | windows)
    return Model(config, tiny_params(config), FakeProcessor(), {})


@functools.cache
def shared(family="qwen2_5_vl"):
    return Engine(model(family), max_batch=4, ladder=Ladder(tokens=(64, 128, 192, 256)))


forward = jax.jit(qwenvl.forward, static_argnums=0)


def logits_after(family, samples, answers):
    """Logits [len(answer) + 1, V] of every row, from one forward pass over prompts and answers."""
    m = model(family)
    batch = make_batch(samples, m.config)
    longest = max(len(s.tokens) + len(a) for s, a in zip(samples, answers, strict=True))
    longest = max(longest, batch.tokens.shape[1])
    grow = ((0, 0), (0, longest - batch.tokens.shape[1]))
    tokens, segments = np.pad(batch.tokens, grow), np.pad(batch.segments, grow)
    positions = np.pad(batch.positions, ((0, 0), *grow))
    visual_index = np.pad(batch.visual_index, grow, constant_values=-1)
    for b, (s, answer) in enumerate(zip(samples, answers, strict=True)):
        here = slice(len(s.tokens), len(s.tokens) + len(answer))
        tokens[b, here], segments[b, here] = answer, 1
        positions[:, b, here] = positions[:, b].max() + 1 + np.arange(len(answer))
    logits = forward(m.config, m.params, Batch(tokens, positions, segments, visual_index, batch.vision))
    ends = [(len(s.tokens) - 1, len(s.tokens) + len(a)) for s, a in zip(samples, answers, strict=True)]
    return [np.asarray(row[first:last]) for row, (first, last) in zip(logits, ends, strict=True)]


def texts(rng, *lengths):
    return [sample(rng, model().config, n) for n in lengths]


# Tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_one_full_forward(family):
    """Text, two pictures, a clip and a mix in one batch of unequal lengths; the cache grows meanwhile."""
    m = model(family)
    samples = mixed_samples(m.config)
    results = shared(family).generate(samples, max_new_tokens=120, ignore_eos=True)
    assert shared(family).traces["pad"] == 1  # from 192 slots to 256
    answers = [r.token_ids for r in results]
    for s, r, logits in zip(samples, results, logits_after(family, samples, answers), strict=True):
        assert (r.prompt_tokens, len(r.token_ids), r.finish_reason) == (len(s.tokens), 120, "length")
        assert logits[:-1].argmax(-1).tolist() == r.token_ids


def test_lists_longer_than_a_batch_come_back_in_order():
    rng = np.random.default_rng(1)
    samples = texts(rng, 5, 70, 9, 30, 6, 100, 7) + mixed_samples(model().config)
    together = shared().generate(samples, max_new_tokens=6)
    alone = [shared().generate([s], max_new_tokens=6)[0] for s in samples]
    assert together == alone


def test_what_a_seed_draws_does_not_depend_on_the_batch():
    rng = np.random.default_rng(2)
    samples = texts(rng, 11, 40, 75, 20)
    options = [
        GenerateOptions(max_new_tokens=12, temperature=t, top_k=k, top_p=p, seed=s)
        for t, k, p, s in ((1.0, 0, 1.0, 1), (0.7, 30, 0.9, 2), (1.5, 0, 0.95, 2**40), (0, 0, 1, 4))
    ]
    together = shared().generate(samples, options)
    backwards = shared().generate(samples[::-1], options[::-1])[::-1]
    roomy = Engine(model(), max_batch=8, ladder=Ladder(rows=(8,), tokens=(320,)))
    assert together == backwards == roomy.generate(samples, options)
    assert together == [shared().generate([s], o)[0] for s, o in zip(samples, options, strict=True)]
    again = shared().generate(samples, [o.replace(seed=9) for o in options])
    assert [a.token_ids == b.token_ids for a, b in zip(together, again, strict=True)] == [False] * 3 + [True]


def test_processes_agree_on_a_seed(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(engine_module.multihost_utils, "broadcast_one_to_all", lambda mine: np.uint32(9))
    rng, options = np.random.default_rng(0), dict(temperature=1.5, top_k=0, max_new_tokens=8)
    request = shared()._request(sample(rng, model().config, 5), GenerateOptions(), None, options)
    assert [row.seed for row in request.rows] == [9]


def test_no_seed_is_a_new_seed_each_time():
    (s,) = texts(np.random.default_rng(3), 12)
    a, b = (shared().generate([s], temperature=3.0, top_k=0, max_new_tokens=20)[0] for _ in range(2))
    assert a.token_ids != b.token_ids


def test_samples_of_one_conversation_read_it_once(monkeypatch):
    config, engine, rng = model().config, shared(), np.random.default_rng(4)
    shown = sample(rng, config, 3, picture(rng, config, 8, 12), 5)
    rows = []
    prefill, vision = engine._programs.prefill, engine._programs.vision
    monkeypatch.setattr(engine._programs, "prefill", lambda p, x, *a: rows.append(len(x)) or prefill(p, x, *a))
    monkeypatch.setattr(engine._programs, "vision", lambda *a: rows.append("vision") or vision(*a))
    options = dict(temperature=1.0, top_k=0, max_new_tokens=8, ignore_eos=True)
    (result,) = engine.generate([shown], n=4, seed=10, **options)
    assert rows == ["vision", 1]
    alone = [engine.generate([shown], seed=10 + j, **options)[0] for j in range(4)]
    assert [s.token_ids for s in result.samples] == [s.token_ids for s in alone]
    assert len({tuple(s.token_ids) for s in result.samples}) > 1 and len(result.others) == 3

    rows.clear()
    results = engine.generate([*texts(rng, 6), shown], [GenerateOptions(n=n, seed=10, **options) for n in (1, 3)])
    assert rows == ["vision", 2] and [len(r.samples) for r in results] == [1, 3]
    assert [s.token_ids for s in results[1].samples] == [s.token_ids for s in alone[:3]]


def test_more_samples_than_rows_in_a_batch():
    (s,) = texts(np.random.default_rng(5), 9)
    (result,) = shared().generate([s], n=6, temperature=1.0, seed=0, max_new_tokens=3)
    assert [r.token_ids for r in result.samples] == [
        shared().generate([s], temperature=1.0, seed=j, max_new_tokens=3)[0].token_ids for j in range(6)
    ]


def test_penalties_reach_the_prompt_and_the_output():
    (s,) = texts(np.random.default_rng(6), 40)
    plain = shared().generate([s], max_new_tokens=20, ignore_eos=True)[0].token_ids
    assert set(plain) & set(s.tokens.tolist()) or len(set(plain)) < 20
    # So large that no id repeats, and with the repetition penalty no id of the prompt.
    fresh = shared().generate([s], max_new_tokens=20, ignore_eos=True, frequency_penalty=100)[0].token_ids
    assert len(set(fresh)) == 20
    fresh = shared().generate([s], max_new_tokens=20, ignore_eos=True, presence_penalty=100)[0].token_ids
    assert len(set(fresh)) == 20
    tight = GenerateOptions(max_new_tokens=20, ignore_eos=True, repetition_penalty=1e6)
    first = shared().generate([s], tight)[0].token_ids[0]
    (logits,) = logits_after("qwen2_5_vl", [s], [[0] * 30])
    outside = [i for i in np.argsort(-logits[0]) if i not in s.tokens]
    assert first == outside[0]


def test_logprobs_are_those_of_a_full_forward():
    s, other = texts(np.random.default_rng(7), 15, 15)
    options = [GenerateOptions(temperature=1.3, seed=1, logprobs=3), GenerateOptions()]
    r, without = shared().generate([s, other], options, max_new_tokens=5, ignore_eos=True)
    assert without.logprobs is None and without.top_logprobs is None
    (logits,) = logits_after("qwen2_5_vl", [s], [r.token_ids])
    expected = np.asarray(jax.nn.log_softmax(logits[:-1]))
    np.testing.assert_allclose(r.logprobs, expected[np.arange(5), r.token_ids], rtol=1e-4)
    for top, row in zip(r.top_logprobs, expected, strict=True):
        assert [i for i, _ in top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([p for _, p in top], -np.sort(-row)[:3], rtol=1e-4)
    assert shared().generate([s], options[0], max_new_tokens=5, logprobs=0)[0].top_logprobs is None


def test_defaults_are_the_checkpoints(monkeypatch):
    (s,) = texts(np.random.default_rng(8), 20)
    engine = shared()
    greedy = engine.generate([s], max_new_tokens=12, ignore_eos=True)[0].token_ids
    options = dict(seed=1, temperature=1.9, top_k=0, max_new_tokens=12)
    sampled = engine.generate([s], stop_token_ids=[greedy[3]], **options)[0].token_ids
    generation = {"do_sample": True, "temperature": 1.9, "top_k": 0, "max_new_tokens": 12, "eos_token_id": [greedy[3]]}
    monkeypatch.setattr(engine, "generation", generation)
    assert engine.generate([s], temperature=0)[0].token_ids == greedy[: greedy.index(greedy[3]) + 1]
    assert engine.generate([s], seed=1)[0].token_ids == sampled != greedy


# Ends


def scripted(monkeypatch, ids):
    """The engine, but the host reads `ids` in place of the drawn tokens."""
    script = iter(ids)

    def read(draw):
        return draw._replace(tokens=np.array([next(script, 65)]))

    monkeypatch.setattr(engine_module.jax, "device_get", read)
    return shared()


HELLO = [*b"Hello, ", 149, 148, 0xAC, *b" la", 150, *b"!stop"]  # "Hello, é€ last!stop"


@pytest.mark.parametrize(
    "options, text, tokens, reason",
    [
        (dict(max_new_tokens=9), "Hello, é\ufffd", 9, "length"),
        (dict(max_new_tokens=10), "Hello, é€", 10, "length"),
        (dict(stop=["o, "]), "Hell", 7, "stop"),
        (dict(stop=["last!"]), "Hello, é€ ", 15, "stop"),  # the stop string spans four tokens
        (dict(stop=["as"]), "Hello, é€ l", 14, "stop"),  # the stop string ends inside a token
        (dict(stop=["é"]), "Hello, ", 8, "stop"),
        (dict(stop=["zzz", "stopped"], max_new_tokens=19), "Hello, é€ last!stop", 19, "length"),
        (dict(stop=["stop", "st!"]), "Hello, é€ la", 15, "stop"),  # first a false start, then the other stop string
        (dict(stop=["lo, é€ x", "€"]), "Hello, é", 10, "stop"),
        (dict(stop_token_ids=[149]), "Hello, ", 8, "stop"),
        (dict(stop_token_ids=[ord("!")], stop=["!"]), "Hello, é€ last", 15, "stop"),
    ],
    ids=str,
)
def test_ends(monkeypatch, options, text, tokens, reason):
    (s,) = texts(np.random.default_rng(0), 8)
    engine = scripted(monkeypatch, HELLO)
    (r,) = engine.generate([s], **{"max_new_tokens": 40} | options)
    assert (r.text, len(r.token_ids), r.finish_reason) == (text, tokens, reason)
    assert r.token_ids == HELLO[:tokens]

    stream = scripted(monkeypatch, HELLO).stream(s, **{"max_new_tokens": 40} | options)
    assert stream.result is None
    pieces = list(stream)
    assert "".join(pieces) == text and all(pieces) and stream.result == r
    assert len(pieces) > 1


def test_eos_ends_the_text_and_is_not_in_it(monkeypatch):
    ids = [*b"ok", EOS, *b"more"]
    (s,) = texts(np.random.default_rng(0), 8)
    (r,) = scripted(monkeypatch, ids).generate([s])
    assert (r.text, r.token_ids, r.finish_reason) == ("ok", ids[:3], "stop")
    (r,) = scripted(monkeypatch, ids).generate([s], ignore_eos=True, max_new_tokens=7)
    assert (r.text, r.token_ids, r.finish_reason) == ("okmore", ids, "length")


def test_max_length_of_the_checkpoint_counts_the_prompt(monkeypatch):
    """As in transformers: an own max_new_tokens takes its place, as the file's does."""
    engine, s = shared(), texts(np.random.default_rng(0), 8)
    monkeypatch.setattr(engine, "generation", {"max_length": 12})
    assert len(engine.generate(s, ignore_eos=True)[0].token_ids) == 4
    assert len(engine.generate(s, ignore_eos=True, max_new_tokens=6)[0].token_ids) == 6
    with pytest.raises(InputError, match=r"has 12 tokens; generation_config\.json allows 12 .*Give max_new_tokens"):
        engine.generate(texts(np.random.default_rng(0), 12))
    monkeypatch.setattr(engine, "generation", {"max_length": 12, "max_new_tokens": 5})
    assert len(engine.generate(s, ignore_eos=True)[0].token_ids) == 5
    monkeypatch.setattr(engine, "generation", {"eos_token_id": 160})
    with pytest.raises(InputError, match="eos_token_id is 160, which is not in the vocabulary of 160"):
        engine.generate(s)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_that_is_a_control_token_ends_the_text_too(monkeypatch, skip, stored):
    ids = [*b"ok", 157, *b"more"]
    (s,) = texts(np.random.default_rng(0), 8)
    engine, options = scripted(monkeypatch, ids), dict(skip_special_tokens=skip, max_new_tokens=7)
    monkeypatch.setattr(engine, "generation", {"stop_strings": "<box>"} if stored else {})
    (r,) = engine.generate([s], **options | ({} if stored else {"stop": ["<box>"]}))
    assert (r.text, r.token_ids, r.finish_reason) == ("ok", ids[:3], "stop")


@functools.cache
def cramped():
    return Engine(model(), max_batch=2, max_length=100, ladder=Ladder(rows=(2,), tokens=(64,)))


def test_generation_ends_with_the_context():
    short, long = texts(np.random.default_rng(9), 20, 97)
    results = cramped().generate([short, long], max_new_tokens=1000, ignore_eos=True)
    assert [(len(r.token_ids), r.finish_reason) for r in results] == [(80, "length"), (3, "length")]
    options = [GenerateOptions(max_new_tokens=n, ignore_eos=True) for n in (80, 3)]
    assert results == shared().generate([short, long], options)


def test_one_row_may_end_long_before_another():
    short, long = texts(np.random.default_rng(10), 30, 10)
    options = [GenerateOptions(max_new_tokens=2), GenerateOptions(max_new_tokens=150)]
    results = shared().generate([short, long], options, ignore_eos=True)
    assert [len(r.token_ids) for r in results] == [2, 150]
    assert results[1] == shared().generate([long], options[1], ignore_eos=True)[0]


# Streaming


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_streamed_pieces_joined_are_the_generated_text(temperature):
    for s in texts(np.random.default_rng(11), 10, 33):
        options = GenerateOptions(max_new_tokens=60, temperature=temperature, top_k=0, seed=3, stop=("q", "7g"))
        stream = shared().stream(s, options)
        pieces = list(stream)
        (r,) = shared().generate([s], options)
        assert "".join(pieces) == r.text and stream.result == r


def test_a_stream_can_be_closed():
    (s,) = texts(np.random.default_rng(12), 10)
    stream = shared().stream(s, max_new_tokens=100, ignore_eos=True)
    next(stream)
    stream.close()
    assert list(stream) == [] and stream.result is None
    assert shared().generate([s], max_new_tokens=3)  # the engine still works


@pytest.mark.parametrize("seed", range(20))
def test_detokenizer_equals_decoding_everything_at_once(seed):
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("aé€😀\ufffd"), 30)).encode()
    noise = bytes(rng.choice([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xC3, 0x61], 200).tolist())
    raw = text + noise + text
    cuts = np.sort(rng.choice(len(raw), 120, replace=False))
    tokens = [t for t in np.split(np.frombuffer(raw, np.uint8), cuts) if len(t)]

    def decode(ids):
        return b"".join(tokens[i].tobytes() for i in ids).decode("utf-8", "replace")

    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(i) for i in range(len(tokens))]
    assert "".join(pieces) + detokenizer.finish() == raw.decode("utf-8", "replace")


def test_detokenizer_with_the_real_tokenizer(tokenizer_dir):
    """Random ids: broken characters, control tokens, ids that are not in the tokenizer."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    rng = np.random.default_rng(0)
    text = tokenizer.encode("Les élèves 学生们 😀👩‍👩‍👧 пришли\n\n\tdef f(x): return '€'").ids
    for ids in (text, rng.integers(0, 256, 300).tolist(), [*rng.integers(0, 151936, 300).tolist(), *text]):
        for skip in (True, False):
            decode = functools.partial(tokenizer.decode, skip_special_tokens=skip)
            detokenizer = Detokenizer(decode)
            pieces = [detokenizer.push(i) for i in ids]
            assert "".join(pieces) + detokenizer.finish() == decode(ids)
            assert sum(bool(p) for p in pieces) > len(ids) // 4


def test_detokenizer_holds_nothing_back_for_long():
    """Bytes that never become a character must not stall the stream or cost more with each token."""
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return (b"\xe4" * len(ids)).decode("utf-8", "replace")

    detokenizer = Detokenizer(decode)
    released = sum(len(detokenizer.push(i)) for i in range(1000))
    assert released > 980 and longest < 12


# Numbers that are not finite


def half(params):
    """An engine that computes in float16 with these parameters."""
    return Engine(Model(model().config.replace(dtype="float16"), params, FakeProcessor(), {}), max_batch=4)


def test_a_picture_that_overflows_float16_fails_alone():
    """It shares a lane with the other pictures, whose attention reads it times 0: they are answered again, alone."""
    config, rng = model().config, np.random.default_rng(0)
    summing = {"patch_embed": {"kernel": np.full((config.vision.patch_values, 32), 30, np.float32)}}
    engine = half(model().params | {"vision": model().params["vision"] | summing})

    def shown(value, *around):
        visual = picture(rng, config, 4, 6)
        visual = visual._replace(patches=np.full_like(visual.patches, value))
        return sample(rng, config, around[0], visual, around[1])

    samples = [shown(110, 3, 2), shown(255, 2, 4), *texts(rng, 7), shown(115, 5, 2)]
    alone = [engine.generate([s], max_new_tokens=4)[0] for s in (samples[0], samples[2], samples[3])]
    with pytest.raises(NonFiniteError, match=r"1 of 4 conversations, first for number 1: float16 .* bfloat16") as e:
        engine.generate(samples, max_new_tokens=4)
    first, bad, *others = e.value.results
    assert [first, *others] == alone
    assert (bad.finish_reason, bad.text, bad.token_ids) == ("error", "", []) and e.value.code == "not_finite"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["decoder/norm/scale", "vision/patch_embed/kernel"])
def test_a_weight_that_is_not_finite_is_named(monkeypatch, place, value):
    config, rng, engine = model().config, np.random.default_rng(1), shared()
    flat = flatten(model().params)
    weight = np.array(flat[place])
    weight.flat[-1] = value
    monkeypatch.setattr(engine, "_params", None)
    before = model().params
    engine.params = jax.tree.map(jax.numpy.asarray, unflatten(flat | {place: weight}))
    try:
        shown = sample(rng, config, 3, picture(rng, config, 4, 6), 2)
        with pytest.raises(NonFiniteError, match=f"the weight {place} holds"):
            engine.generate([shown], max_new_tokens=4, temperature=1.0, logprobs=2, presence_penalty=2)
        stream = engine.stream(shown, max_new_tokens=4)
        with pytest.raises(NonFiniteError, match=place):
            list(stream)
        assert stream.result.finish_reason == "error"
        if "vision" in place:  # text does not reach the tower
            assert engine.generate(texts(rng, 5), max_new_tokens=2)[0].finish_reason == "length"
    finally:
        engine.params = jax.tree.map(jax.numpy.asarray, before)


def test_an_answer_that_breaks_off_keeps_its_text(monkeypatch):
    (s,) = texts(np.random.default_rng(0), 8)
    stream = scripted(monkeypatch, [*b"ok", 148, sampling.BAD, 65]).stream(s, max_new_tokens=9)
    monkeypatch.setattr(engine_module, "_all_finite", lambda w: True)
    pieces = []
    with pytest.raises(NonFiniteError, match=r"all weights are finite\. Try dtype float32"):
        for piece in stream:
            pieces.append(piece)
    assert "".join(pieces) == stream.result.text == "ok\ufffd" and stream.result.token_ids == [*b"ok", 148]


# Waiting and compiling


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_steps_are_dispatched_ahead_of_what_is_read(monkeypatch, lag):
    engine = shared()
    monkeypatch.setattr(engine, "lag", lag)
    (s,) = texts(np.random.default_rng(13), 10)
    events = []
    step, get = engine._programs.step, jax.device_get
    monkeypatch.setattr(engine._programs, "step", lambda *a, **k: events.append("step") or step(*a, **k))
    monkeypatch.setattr(engine_module.jax, "device_get", lambda x: events.append("read") or get(x))
    engine.generate([s], max_new_tokens=20, ignore_eos=True)
    assert events.count("read") == 20 and events.count("step") == 19  # no superfluous step
    reads = [i for i, e in enumerate(events) if e == "read"]
    ahead = [events[:i].count("step") - n for n, i in enumerate(reads)]
    assert ahead == [min(lag, 19 - n) for n in range(20)]


def test_nothing_else_crosses_between_host_and_device():
    rng = np.random.default_rng(14)
    samples = mixed_samples(model().config)
    options = dict(max_new_tokens=60, temperature=0.8, seed=1, repetition_penalty=1.1, logprobs=2, n=1)
    before = shared().generate(samples, **options)
    with jax.transfer_guard("disallow"):
        assert shared().generate(samples, **options) == before
        list(shared().stream(texts(rng, 9)[0], max_new_tokens=60))


def test_surplus_steps_are_discarded(monkeypatch):
    """The host sees an end `lag` steps late; steps dispatched meanwhile must have no effect."""
    (s,) = texts(np.random.default_rng(15), 30)
    greedy = shared().generate([s], max_new_tokens=30, ignore_eos=True)[0].token_ids
    stop = greedy[5]
    expected = greedy[: greedy.index(stop) + 1]
    for lag in (0, 3, 10):
        monkeypatch.setattr(shared(), "lag", lag)
        (r,) = shared().generate([s], stop_token_ids=[stop], max_new_tokens=30)
        assert (r.token_ids, r.finish_reason) == (expected, "stop")


LIMITS = dict(max_tokens=128, max_pixels=16 * 16 * 14**2, n=2)


@functools.cache
def warm():
    """A smaller model with all programs compiled."""
    config = tiny_config("qwen2_5_vl", {"num_hidden_layers": 1}, {"depth": 2, "fullatt_block_indexes": (1,)})
    ladder = Ladder(rows=(1, 2), tokens=(64, 128, 192), patches=(64, 256), short=())
    engine = Engine(Model(config, tiny_params(config), FakeProcessor(), {}), max_batch=2, ladder=ladder)
    engine.warmup(progress=False, **LIMITS)
    return engine


@pytest.mark.slow
def test_programs_are_a_sum_of_ladders():
    """Rows 1, 2; prompts 64, 128; caches 128, 192; lanes of 64 or 256 patches; greedy or sampling."""
    rows, tokens, caches, lanes, kinds = 2, 2, 2, 2, 2
    assert warm().traces == {
        "vision": lanes, "embed": rows * tokens, "place": rows * tokens, "prefill": rows * tokens,
        "fork": caches, "first": rows * kinds, "step": rows * caches * kinds, "pad": rows * (caches - 1),
    }  # fmt: skip


@pytest.mark.slow
def test_no_new_traces_after_warmup():
    engine, rng = warm(), np.random.default_rng(16)
    traces, sizes = engine.traces, set()
    for i in range(50):
        conversations = []
        for _ in range(rng.integers(1, 6)):
            parts = [int(rng.integers(1, 25))]
            for _ in range(rng.integers(0, 3)):
                h, w = (2 * int(a) for a in rng.integers(2, 6, 2))
                parts += [picture(rng, engine.config, h, w), int(rng.integers(1, 10))]
            conversations.append(sample(rng, engine.config, *parts))
        if i % 5 == 0:
            conversations.append(sample(rng, engine.config, 2, clip(rng, engine.config, 7, 6, 8), 3))
        options = GenerateOptions(
            max_new_tokens=int(rng.integers(1, 31)),
            temperature=float(rng.choice([0, 0.7])),
            top_k=int(rng.integers(0, 50)),
            top_p=float(rng.uniform(0.1, 1)),
            n=int(rng.integers(1, 3)),
        )
        results = engine.generate(conversations, options)
        assert [r.prompt_tokens for r in results] == [len(c.tokens) for c in conversations]
        assert engine.traces == traces, f"request {i}"
        sizes |= {r.prompt_tokens for r in results}
    assert len(sizes) > 50


@pytest.mark.parametrize(
    ("ladder", "said"),
    [
        (dict(patches=()), "patches are"),
        (dict(tokens=(128, 64)), "tokens are"),
        (dict(rows=(0, 1)), "rows are"),
        (dict(lanes=0), "lanes are 0"),
        (dict(patches=(256, 8192), short=(8192,)), "short are"),
    ],
)
def test_bad_ladders(ladder, said):
    with pytest.raises(InputError, match=said):
        Engine(model(), ladder=Ladder(**ladder))


@pytest.mark.parametrize("limits", [dict(max_tokens=0), dict(max_pixels=-1), dict(max_pixels=1e5), dict(n=0)])
def test_bad_warmup_limits(limits):
    with pytest.raises(InputError, match=next(iter(limits))):
        shared().warmup(**limits)


@pytest.mark.slow
def test_two_hundred_requests_compile_nothing_after_warmup(compilations):
    """0 to 8 pictures of 0.05 to 12 megapixels and 10 to 4000 tokens; counted by jax's compile events too.

    For the CPU's sake pictures are resized to 0.1 megapixels; test_layout.py packs them at the official limit.
    """
    text = dict(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=8192)
    config = tiny_config("qwen2_5_vl", text, {"depth": 1, "num_heads": 1, "fullatt_block_indexes": ()})
    m, ladder = Model(config, tiny_params(config), FakeProcessor(), {}), Ladder(tokens=(128, 512, 2048, 5120))
    rng, engine = np.random.default_rng(20), Engine(m, max_batch=1, ladder=ladder)
    jax.jit(lambda x: x + len(compilations))(np.zeros(7))
    assert compilations  # the listener works
    engine.warmup(max_tokens=5120, max_pixels=100_352, sample=(False,), progress=False)
    traces = engine.traces
    assert traces["vision"] == 11
    compilations.clear()
    patches = slots = 0
    for i, grids in enumerate(random_requests(rng, 100_352)):
        patches += sum(grid.patches for grid in grids)
        slots += sum(R * P for (R, P), _ in cover(grids, config.vision, ladder))
        parts = [int(np.exp(rng.uniform(*np.log([10, 4000]))))]
        for grid in grids:
            parts += [picture(rng, config, grid.h, grid.w), 1]
        (result,) = engine.generate([sample(rng, config, *parts)], max_new_tokens=int(rng.integers(1, 5)))
        assert (engine.traces, compilations) == (traces, []), f"request {i}: {result.prompt_tokens} tokens, {grids}"
    assert engine.padding["vision"] == 1 - patches / slots and 0 < engine.padding["text"] < 0.6


WARM_START = """
import time, jax, test_engine as t
missed = []
jax.monitoring.register_event_listener(lambda event, **_: missed.append(event) if "cache_misses" in event else None)
engine = t.Engine(t.model(), max_batch=1, ladder=t.Ladder(tokens=(64, 128)))
start = time.process_time()
engine.warmup(max_tokens=128, max_pixels=0, progress=False)
print(time.process_time() - start, len(missed))
"""


@pytest.mark.slow
def test_the_next_process_warms_up_in_a_quarter_of_the_time(tmp_path):
    """CPU time, which other load changes little."""
    here = Path(__file__).parent
    paths = {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "HOME": str(tmp_path)}
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | paths | {"JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = env["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", "")  # as users compile
    command = [sys.executable, "-c", WARM_START]
    done = []
    while len(done) < 2 or (len(done) < 4 and min(done[1:])[0] >= done[0][0] / 4):  # a busy machine may need more tries
        seconds, missed = subprocess.run(command, env=env, capture_output=True, check=True).stdout.split()
        done.append((float(seconds), int(missed)))
    assert done[0][1] > 6 and not any(missed for _, missed in done[1:]), done
    assert list(tmp_path.glob(".cache/qwenvl_jax/*step*"))
    assert min(done[1:])[0] < done[0][0] / 4, done


def test_long_clips_are_several_calls_of_the_tower():
    """Clips of many frames, one frame per lane, four lanes per call."""
    ladder = Ladder(tokens=(64, 256), patches=(256,), lanes=4)
    rng, engine = np.random.default_rng(21), Engine(model(), max_batch=4, ladder=ladder)
    samples = [sample(rng, engine.config, 2, clip(rng, engine.config, 11, 8, 10), 3) for _ in range(4)]
    together = engine.generate(samples, max_new_tokens=4)
    assert [r.token_ids for r in together] == [engine.generate([s], max_new_tokens=4)[0].token_ids for s in samples]
    logits = logits_after("qwen2_5_vl", samples, [r.token_ids for r in together])
    assert [row[:-1].argmax(-1).tolist() for row in logits] == [r.token_ids for r in together]
    # Prompts of 227 tokens in 256; three frames of 80 patches in a lane of 256, four lanes per call.
    assert engine.padding == {"text": 1 - 227 / 256, "vision": 1 - 2 * 44 * 80 / (8 * 4 * 256)}


def test_bad_samples_anywhere_cost_nothing():
    rng = np.random.default_rng(22)
    good = sample(rng, model().config, 5)
    engine = Engine(model(), max_batch=1, ladder=Ladder(patches=(256,)))
    bad = sample(rng, model().config, 2, picture(rng, model().config, 20, 20))
    with pytest.raises(InputError, match="patches in a frame"):
        engine.generate([good, bad])
    assert engine.traces == {}


def test_warmup_shows_its_progress(capsys):
    warm().warmup(**LIMITS)
    assert "compiling: 100%" in capsys.readouterr().err


# Bad input


def test_yarn_lengthens_the_context():
    m, yarn = model(), YarnConfig(factor=4.0, original_max_position_embeddings=512)
    config = with_text(m.config, yarn=yarn, max_position_embeddings=512)
    assert Engine(m._replace(config=config)).max_length == 2048


def test_a_prompt_beyond_the_context_is_refused():
    rng = np.random.default_rng(17)
    engine = cramped()
    fits, exact = texts(rng, 99, 100)
    assert len(engine.generate([fits])[0].token_ids) == 1
    with pytest.raises(InputError, match=r"100 tokens.* 100 .*shorter conversation$"):
        engine.generate([fits, exact])
    shown = sample(rng, model().config, picture(rng, model().config, 20, 40))
    with pytest.raises(InputError, match=r"202 tokens.* 100 .*max_pixels"):
        engine.stream(shown)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda e, s: e.generate(s), "list of conversations"),
        (lambda e, s: e.generate([{"role": "user", "content": "hi"}]), "list of conversations"),
        (lambda e, s: e.generate([s, s], [GenerateOptions()]), "there are 1 options for 2"),
        (lambda e, s: e.generate([s], temperature=-1), "temperature"),
        (lambda e, s: e.generate([s], tempratur=1), "tempratur"),
        (lambda e, s: e.stream(s, n=2), "n is 2"),
        (lambda e, s: Engine(model(), max_length=4096), "4096.*2048"),
        (lambda e, s: Engine(model(), max_batch=0), "max_batch"),
    ],
)
def test_bad_calls(call, says):
    with pytest.raises(InputError, match=says):
        call(shared(), texts(np.random.default_rng(18), 5)[0])


def test_messages_go_through_the_processor():
    messages = [{"role": "user", "content": "What is it?"}]
    (r,) = shared().generate([messages], max_new_tokens=4)
    (with_tools,) = shared().generate([messages], tools=[{"name": "f"}], max_new_tokens=4)
    assert (r.prompt_tokens, with_tools.prompt_tokens) == (11, 16)
    assert shared().generate([]) == []
    assert "".join(shared().stream(messages, max_new_tokens=4)) == r.text


def test_numpy_weights_work():
    config, params, processor, _ = model()
    (s,) = texts(np.random.default_rng(19), 10)
    engine = Engine(Model(config, jax.tree.map(np.asarray, params), processor, {}), max_batch=1)
    assert engine.generate([s], max_new_tokens=5) == shared().generate([s], max_new_tokens=5)
    assert all(isinstance(w, jax.Array) for w in jax.tree.leaves(engine.params))  # not transferred in every step


@pytest.mark.slow
def test_weights_on_a_mesh_give_the_same_answers(compilations):
    """Four devices split rows and heads; every program is compiled for one sharding only."""
    config, params, processor, _ = model()
    mesh = make_mesh(data=2, tensor=2)
    split = jax.device_put(params, param_shardings(specs(config), mesh))
    assert any(not w.sharding.is_fully_replicated for w in jax.tree.leaves(split))
    engine = Engine(Model(config, split, processor, {}), max_batch=4, ladder=shared().ladder)
    options = dict(max_new_tokens=70, seed=1, temperature=0.9, ignore_eos=True)
    samples = mixed_samples(config)
    expected = [r.token_ids for r in shared().generate(samples, **options)]
    compilations.clear()
    with jax.transfer_guard("disallow"):
        assert [r.token_ids for r in engine.generate(samples, **options)] == expected
    assert len(compilations) == sum(engine.traces.values()), (len(compilations), engine.traces)


def test_the_program_that_is_compiled_is_named():
    engine, seen, done = Engine(model(), max_batch=1), set(), threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.add(engine.compiling)

    watcher = threading.Thread(target=watch)
    watcher.start()
    engine.generate(mixed_samples(engine.config)[:1], max_new_tokens=2)
    done.set()
    watcher.join()
    assert {"prefill", "step"} <= seen and engine.compiling is None
