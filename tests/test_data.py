"""Packing, order, sharding and resuming with small data sets."""

import contextlib
import json
import logging
import os
import pickle
import re
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tiny import small_config
from PIL import Image
from tiny import clip, followed, mixed_samples, picture, sample, tiny_config

from qwenvl_jax.errors import InputError
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.inputs.source import open_records
from qwenvl_jax.train.data import Dataset, Packer
from qwenvl_jax.train.records import PackShape
from qwenvl_jax.types import Sample, TrainBatch

CONFIG = small_config("qwen2_5_vl")
SHAPE = PackShape(rows=2, tokens=160, lanes=2, patches=128, segments=6)


@pytest.fixture(scope="module")
def processor(tokenizer_dir) -> Processor:
    return Processor.from_dir(tokenizer_dir, CONFIG)


class Drawn:
    """Records with pictures that depend on their number; every seventh is bad."""

    def __init__(self, length: int, bad: bool = True):
        self.length, self.bad = length, bad

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if self.bad and i % 7 == 3:
            return {"messages": [{"role": "user", "content": f"record {i}"}]}
        rng = np.random.default_rng(i)
        items = [{"type": "text", "text": f"record {i}" + " word" * int(rng.integers(30))}]
        if i % 3:
            side = 28 * int(rng.integers(2, 5))
            items.append({"image": Image.fromarray(rng.integers(0, 256, (side, 56, 3), np.uint8))})
        return {"messages": [{"role": "user", "content": items}, {"role": "assistant", "content": f"answer {i}"}]}


def numbers(processor, batches) -> list[int]:
    """The numbers of the records in batches, in order."""
    texts = [processor.decode(batch.targets[batch.weights > 0]) for batch in batches]
    return [int(n) for text in texts for n in re.findall(r"answer (\d+)", text)]


def assert_same(a: TrainBatch, b: TrainBatch):
    for x, y in zip([*a.inputs[:4], *a.inputs.vision[0], *a[1:3]], [*b.inputs[:4], *b.inputs.vision[0], *b[1:3]],
                    strict=True):  # fmt: skip
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def lines(path, *records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def chat(i, **more):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"answer {i}"}]} | more


# ------------------------------------------------------------------------------------------ packing


def check_packed(config, shape: PackShape, batch: TrainBatch, examples: list[tuple[Sample, ...]]):
    """The batch holds every segment of every example completely, and nothing else."""
    inputs, vision = batch.inputs, batch.inputs.vision[0]
    B, T, R, P = shape[:4]
    assert inputs.tokens.shape == inputs.segments.shape == inputs.visual_index.shape == (B, T)
    assert batch.targets.shape == batch.weights.shape == (B, T)
    assert inputs.positions.shape == (3, B, T)
    assert vision.patches.shape == (R, P, config.vision.patch_values)
    assert len(inputs.vision) == 1
    unit = config.vision.merge_unit
    outputs = vision.patches.reshape(
        -1, unit, config.vision.patch_values
    )  # the patches of each row of the tower's output
    frames = vision.frames.reshape(-1, unit)
    left = [(s, 1 + k) for e in examples for k, s in enumerate(e)]
    pairs = any(k == 2 for *_, k in left)
    seen, cells = 0, set()
    for b in range(B):
        ids = inputs.segments[b]
        count = ids.max()
        assert shape.segments is None or count <= shape.segments
        np.testing.assert_array_equal(ids[ids > 0], np.sort(ids[ids > 0]))
        for k in range(1, count + 1):
            where = np.flatnonzero(ids == k)
            assert where[-1] - where[0] == len(where) - 1
            span = slice(where[0], where[-1] + 1)
            place = 2 - k % 2 if pairs else 1
            same = [j for j, (s, *_) in enumerate(left) if np.array_equal(s.tokens, inputs.tokens[b, span])]
            segment, _ = left.pop(next(j for j in same if left[j][1] == place))
            np.testing.assert_array_equal(inputs.positions[:, b, span], segment.positions)
            np.testing.assert_array_equal(batch.weights[b, span], [*segment.weights[1:], 0])
            learnt = [t if w else 0 for t, w in zip(segment.tokens[1:], segment.weights[1:], strict=True)]
            np.testing.assert_array_equal(batch.targets[b, span], [*learnt, 0])
            places = inputs.visual_index[b, span]
            places = places[places >= 0]
            wanted = [v.patches.reshape(-1, unit, config.vision.patch_values) for v in segment.visuals]
            assert len(places) == sum(map(len, wanted))
            if wanted:
                np.testing.assert_array_equal(outputs[places], np.concatenate(wanted))
                assert (frames[places] > 0).all()
                if place == 1:
                    assert not cells & set(places.tolist()), "two visuals share a slot"
                    cells |= set(places.tolist())
            seen += len(where)
    assert not left
    assert (inputs.segments > 0).sum() == seen
    assert ((vision.frames > 0).sum()) == unit * len(cells)
    for array in (inputs.tokens, *inputs.positions, batch.targets, batch.weights):
        assert not array[inputs.segments == 0].any()


def as_example(rng, config, s, pair: bool) -> tuple[Sample, ...]:
    both = [s, followed(s, [7])] if pair else [s]
    return tuple(x._replace(weights=rng.integers(0, 2, len(x.tokens)).astype(np.float32)) for x in both)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), pair=st.booleans(), family=st.sampled_from(["qwen2_vl", "qwen2_5_vl"]))
def test_packing(seed, pair, family):
    """Every record is used once, and one that does not fit leaves the batch unchanged."""
    rng, config = np.random.default_rng(seed), tiny_config(family)
    shape = PackShape(3, 150, 3, 64 * int(rng.integers(2, 5)), segments=[None, 4][int(pair or rng.integers(2))])
    packer, taken, refused = Packer(shape, config), [], 0
    for _ in range(40):
        parts = [int(rng.integers(1, 20))]
        for _ in range(rng.integers(0, 3)):
            h, w = (2 * rng.integers(1, 5, 2)).tolist()
            make = [lambda h=h, w=w: picture(rng, config, h, w), lambda h=h, w=w: clip(rng, config, 2, h, w, 0.7)]
            parts += [make[rng.integers(2)](), int(rng.integers(1, 20))]
        example = as_example(rng, config, sample(rng, config, *parts), pair)
        if packer.add(example):
            taken.append(example)
        else:
            refused += 1
    check_packed(config, shape, packer.batch(), taken)
    assert refused and taken


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_first_row_with_room(family):
    rng, config = np.random.default_rng(0), tiny_config(family)
    packer = Packer(PackShape(2, 20, 1, 64), config)
    for length in (12, 9, 8, 11):
        assert packer.add(as_example(rng, config, sample(rng, config, length), False))
    assert not packer.add(as_example(rng, config, sample(rng, config, 1), False))
    batch = packer.batch()
    np.testing.assert_array_equal(batch.inputs.segments, [[1] * 12 + [2] * 8, [1] * 9 + [2] * 11])
    assert not batch.inputs.vision[0].frames.any()


def test_every_size_shares_the_one_call():
    config = tiny_config("qwen2_5_vl")
    rng = np.random.default_rng(0)
    examples = [as_example(rng, config, s, False) for s in mixed_samples(config)]
    shape = PackShape(4, 256, 4, 512)
    packer = Packer(shape, config)
    assert all(map(packer.add, examples))
    check_packed(config, shape, packer.batch(), examples)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_training_packs_what_generation_packs(family):
    """A token has the same positions and patches with any other samples in its row and lanes."""
    rng, config = np.random.default_rng(0), tiny_config(family)
    samples = mixed_samples(config)
    packer = Packer(PackShape(2, 256, 4, 512), config)
    assert all(packer.add(as_example(rng, config, s, False)) for s in samples)
    trained, generated = packer.batch().inputs, make_batch(samples, config)
    assert trained.segments.max() > 1

    def seen(batch, row, span):
        """Tokens, positions, which tokens are visual, and the positions and values of their patches."""
        index = batch.visual_index[row, span]
        out = [batch.tokens[row, span], batch.positions[:, row, span], index >= 0]
        lanes = [[a.reshape(-1, config.vision.merge_unit, *a.shape[2:]) for a in v[:2]] for v in batch.vision]
        out += [np.concatenate(arrays)[index[index >= 0]] for arrays in zip(*lanes, strict=True)]
        return out

    for b, s in enumerate(packer.segments):
        mine = seen(trained, s.row, slice(s.start, s.stop))
        theirs = seen(generated, b, slice(0, s.stop - s.start))
        for ours, other in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(ours, other)


# ------------------------------------------------------------------------------------------ the stream


def test_batches_hold_what_the_records_say(processor):
    data = Dataset(Drawn(20, bad=False), processor, SHAPE, epochs=1, shuffle=False, threads=0)
    batches = list(data)
    process = data._load.process
    examples = [process(Drawn(20, bad=False)[i]) for i in range(20)]
    assert len(batches) > 2
    for batch in batches:
        here = examples[: len(numbers(processor, [batch]))]
        check_packed(CONFIG, SHAPE, batch, here)
        examples = examples[len(here) :]
    assert not examples


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_every_record_once_an_epoch_over_all_shards(processor, shuffle, count):
    everything, shape = [], SHAPE._replace(rows=1)  # with several rows, records may change order
    for shard in range(count):
        more = dict(seed=5, epochs=2, shuffle=shuffle, shard=(shard, count), on_error="skip")
        data = Dataset(Drawn(23), processor, shape, **more)
        found = numbers(processor, data)
        assert data.epoch == 2
        assert sum(data.skipped.values()) + len(found) == 2 * len(range(shard, 23, count))
        everything += found
    good = [i for i in range(23) if i % 7 != 3]
    assert sorted(everything) == sorted(good * 2)
    if count == 1:
        first, second = everything[: len(good)], everything[len(good) :]
        assert sorted(first) == sorted(second) == good
        assert (first == second == good) is not shuffle
        assert (first != second) is shuffle


def test_the_seed_is_the_order(processor):
    runs = [numbers(processor, Dataset(Drawn(20, False), processor, SHAPE, seed=s, epochs=1)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_without_end(processor):
    data = Dataset(Drawn(5, False), processor, SHAPE, threads=1)
    batches = [next(data) for _ in range(6)]
    data.close()
    assert len(numbers(processor, batches)) > 10
    assert data.epoch > 2


def test_epochs_join_within_a_batch(processor):
    """Only the last batch of a run may be short."""
    data = Dataset(Drawn(4, False), processor, SHAPE._replace(rows=1), epochs=3, shuffle=False)
    found = [numbers(processor, [batch]) for batch in data]
    assert [n for batch in found for n in batch] == [0, 1, 2, 3] * 3
    assert any(3 in batch and batch[-1] != 3 for batch in found)


def test_threads_do_not_change_the_order(processor):
    class Slow(Drawn):
        def __getitem__(self, i):
            time.sleep(0.02 if i % 5 == 0 else 0)
            return super().__getitem__(i)

    for threads in (0, 1, 4):
        data = Dataset(Slow(15, False), processor, SHAPE._replace(rows=1), epochs=1, shuffle=False, threads=threads)
        assert numbers(processor, data) == list(range(15))
        data.close()


# ------------------------------------------------------------------------------------------ resuming


def dataset(processor, **more):
    return Dataset(Drawn(24), processor, SHAPE, **dict(seed=3, epochs=2, on_error="skip", threads=1) | more)


@pytest.fixture(scope="module")
def whole(processor):
    """All batches of a run, and after each its state and its count of bad records."""
    data = dataset(processor)
    states, batches, skipped = [json.dumps(data.get_state())], [], []
    for batch in data:
        batches.append(batch)
        states.append(json.dumps(data.get_state()))
        skipped.append(data.skipped)
    assert len(batches) > 6
    return states, batches, skipped


def test_resumes_at_every_position(processor, whole):
    """Equal bit for bit, in a new Dataset or the same one, forwards and backwards."""
    states, batches, skipped = whole
    again = dataset(processor, threads=0)
    for i in reversed(range(len(states))):
        data = dataset(processor)
        for one in (data, again):
            one.set_state(json.loads(states[i]))
            assert json.dumps(one.get_state()) == states[i]
        rest = list(data)
        assert len(rest) == len(batches) - i
        for mine, theirs in zip(rest, batches[i:], strict=True):
            assert_same(mine, theirs)
        assert data.skipped == skipped[-1]
        if i < len(batches):
            assert_same(next(again), batches[i])
            assert again.skipped == skipped[i]
        data.close()


def test_some_resume_with_a_record_pending(processor, whole):
    """A record that does not fit into a batch is the first of the next."""
    states, batches, _ = whole
    data = dataset(processor)
    next(data)
    assert data._waiting is not None
    data.set_state(json.loads(states[1]))
    assert_same(next(data), batches[1])
    data.close()


@pytest.mark.slow
def test_worker_processes_give_the_same(processor, whole):
    states, batches, skipped = whole
    data = dataset(processor, workers=2)
    data.set_state(json.loads(states[3]))
    for i, theirs in enumerate(batches[3:], 3):
        assert_same(next(data), theirs)
        assert json.dumps(data.get_state()) == states[i + 1]
        assert data.skipped == skipped[i]
    assert next(data, None) is None
    data.close()


def test_an_interrupted_batch_is_read_again(processor, whole):
    """A signal that interrupts a batch loses no record."""
    states, batches, _ = whole

    class Interrupting(Drawn):
        armed = False

        def __getitem__(self, i):
            if self.armed and i == int(json.loads(states[2])["position"]) % 24:
                self.armed = False
                raise KeyboardInterrupt
            return super().__getitem__(i)

    source = Interrupting(24)
    data = Dataset(source, processor, SHAPE, seed=3, epochs=2, on_error="skip", threads=0)
    next(data)
    source.armed = True
    got = []
    for _ in range(len(batches)):
        try:
            got.append(next(data))
        except KeyboardInterrupt:
            assert json.dumps(data.get_state()) == states[1 + len(got)]
        except StopIteration:
            break
    assert not source.armed
    for mine, theirs in zip(got, batches[1:], strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize(
    "change, says",
    [(dict(seed=4), "its seed is 3, not 4"), (dict(shuffle=False), "shuffle"), (dict(shard=(0, 2)), "shard")],
)
def test_a_state_of_another_order_is_refused(processor, whole, change, says):
    data = dataset(processor, **change)
    with pytest.raises(InputError, match=re.escape(says)):
        data.set_state(json.loads(whole[0][1]))


def test_a_changed_file_is_refused_and_a_copied_one_is_not(processor, tmp_path):
    records = [chat(i) for i in range(40)]
    data = Dataset(lines(tmp_path / "a.jsonl", *records), processor, SHAPE)
    next(data)
    state, expected = data.get_state(), next(data)
    data.close()
    copied = Dataset(lines(tmp_path / "b.jsonl", *records), processor, SHAPE)
    copied.set_state(state)
    assert_same(next(copied), expected)
    copied.close()
    for changed in (records[:-1], [chat(9), *records[1:]]):
        data = Dataset(lines(tmp_path / "a.jsonl", *changed), processor, SHAPE)
        with pytest.raises(InputError, match="read other records"):
            data.set_state(state)


# ------------------------------------------------------------------------------------------ files and bad records


LINES = b'\xef\xbb\xbf{"a": 1}\n \t \n\r\n{"a": "\xc3\xa9"}\r\n7\n\n{"a": 3}'
RECORDS = [(1, {"a": 1}), (4, {"a": "é"}), (5, 7), (7, {"a": 3})]


def everything(source):
    return [(source.where(i), source[i]) for i in range(len(source))]


def test_lines_of_a_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(LINES)
    source = open_records(path)
    assert everything(source) == [(f"{path}:{n}", record) for n, record in RECORDS]
    assert source.folder(0) == tmp_path
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)
    assert len(everything(source)) == len(source) == 4
    with pytest.raises(IndexError):
        source[4]


@pytest.mark.parametrize("text, error", [(LINES, None), (b"[\n", "not readable"), (b"1\n{", "not readable as JSON")])
def test_lines_of_a_pipe(processor, tmp_path, text, error):
    """`qwenvl eval <(…)` and `qwenvl train --data <(…)` read a pipe, which has no byte offsets."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(text,))
    writer.start()
    with pytest.raises(InputError, match=error) if error else contextlib.nullcontext():
        source = open_records(pipe)
        assert everything(source) == [(f"{pipe}:{n}", record) for n, record in RECORDS]
        assert everything(pickle.loads(pickle.dumps(source))) == everything(source)
    writer.join()


def test_a_pipe_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenvl_jax.inputs.source.MAX_IN_MEMORY", 3)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(LINES,))
    writer.start()
    with pytest.raises(InputError, match="write it to a file"):
        open_records(pipe)
    writer.join()


def test_lines_across_chunks(tmp_path, monkeypatch):
    records = [{"a": "x" * n} for n in range(50)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(r) + "\n" * (i % 3) + " " * i + "\n" * (i % 2) for i, r in enumerate(records)))
    whole = open_records(path)
    assert [whole[i] for i in range(len(whole))] == records
    for chunk in (1, 2, 63, 64):
        monkeypatch.setattr("qwenvl_jax.inputs.source._CHUNK", chunk)
        source = open_records(path)
        assert everything(source) == everything(whole)
        assert source.identity == whole.identity


@pytest.mark.parametrize("width", [1, 79, 80, 81, 5000])
def test_a_blank_line_of_any_width_is_no_record(tmp_path, width):
    path = tmp_path / "data.jsonl"
    path.write_text("1\n" + " " * width + "\n2\n" + "\t" * width + "\r\n" + " " * width)
    assert everything(open_records(path)) == [(f"{path}:1", 1), (f"{path}:3", 2)]


def test_bad_lines_are_named(processor, tmp_path, caplog):
    png = tmp_path / "a.png"
    Image.new("RGB", (56, 56)).save(png)
    seen = {"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "answer 1"}]}
    path = lines(
        tmp_path / "data.jsonl",
        chat(0),
        seen | {"image": "a.png"},  # in the file's folder
        '{"messages": [\n',
        "\n",
        seen | {"image": "gone.png"},
        seen,
        chat(2, tools=5),
        {"messages": [{"role": "user", "content": "x " * 200}, {"role": "assistant", "content": "y"}]},
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "y"}]}\n',
        {"messages": [{"role": "user", "content": "x"}]},
        "[1, 2]\n",
        '{"a": "\x01"}\n',
        chat(3),
    )
    expected = {
        3: "not readable as JSON",
        5: "gone.png: No such file",
        6: "refer to 1 images; the record has 0",
        7: "tools must be a list",
        8: "a row has 160",
        9: "half of a character",
        10: "no assistant message",
        11: "of type list",
        12: "Invalid control character",
    }
    data = Dataset(path, processor, SHAPE, epochs=2, shuffle=False, on_error="skip")
    with caplog.at_level(logging.WARNING):
        assert numbers(processor, data) == [0, 1, 3] * 2
    assert len(caplog.messages) == len(expected)  # warned in the first epoch only
    for message, (line, says) in zip(caplog.messages, expected.items(), strict=True):
        assert message.startswith(f"{path}:{line}: ")
        assert says in message
    assert data.skipped == {
        "unreadable": 6, "media": 2, "placeholders": 2, "messages": 4, "too long": 2, "nothing to learn": 2,
    }  # fmt: skip
    with pytest.raises(InputError, match=re.escape(f"{path}:3: not readable as JSON")):
        list(Dataset(path, processor, SHAPE, epochs=1, shuffle=False))


def test_lists_within_lists_are_a_bad_record(processor):
    frames = "a.png"
    for _ in range(5000):
        frames = [frames]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "?"}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}
    data = Dataset([record, chat(1)], processor, SHAPE, epochs=1, shuffle=False, on_error="skip")
    assert numbers(processor, data) == [1] and sum(data.skipped.values()) == 1


def test_a_stop_repeats(processor):
    """The state stays before the bad record, so a restarted run raises the same error."""
    data = Dataset(Drawn(24), processor, SHAPE, shuffle=False)
    state = data.get_state()
    for _ in range(2):
        with pytest.raises(InputError, match="record 3: no assistant message"):
            list(data)
        assert data.get_state() == state


def test_nothing_usable(processor):
    class Bad(Drawn):
        def __getitem__(self, i):
            raise FileNotFoundError(f"no {i}")

    data = Dataset(Bad(9), processor, SHAPE, on_error="skip")
    with pytest.raises(InputError, match=r"none of 9 records can be used; the last is record \d: no \d"):
        next(data)


def test_an_error_in_the_source_is_no_bad_record(processor):
    class Broken(Drawn):
        def __getitem__(self, i):
            return {}["key"]

    for threads in (0, 2):
        with pytest.raises(KeyError):
            next(Dataset(Broken(9), processor, SHAPE, on_error="skip", threads=threads))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(shape=PackShape(0, 8, 1, 64)), "must be 1 or more"),
        (dict(shape=PackShape(1, 8, 1, 100)), "patches is 100; it must be a multiple of 64"),
        (dict(preferences=True, shape=PackShape(1, 8, 1, 64)), "segments is None"),
        (dict(preferences=True, shape=PackShape(1, 8, 1, 64, 3)), "segments is 3"),
        (dict(on_error="ignore"), "on_error is 'ignore'"),
        (dict(seed=-1), "seed is -1"),
        (dict(epochs=0), "epochs is 0"),
        (dict(shard=(2, 2)), "shard is (2, 2)"),
        (dict(shard=(0, 9)), "has 5 records"),
        (dict(options={"fpx": 1}), "unknown option fpx"),
    ],
)
def test_settings_are_checked(processor, change, says):
    with pytest.raises(InputError, match=re.escape(says)):
        Dataset(Drawn(5), processor, change.pop("shape", SHAPE), **change)


@pytest.mark.parametrize(
    "content, says",
    [(b"", "has 0 records"), (b"\n\n", "has 0 records"), (b" [ ]", "has 0 records"), (None, "No such file")],
)
def test_files_that_are_none(processor, tmp_path, content, says):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        Dataset(path, processor, SHAPE)
    with pytest.raises(InputError, match="directory"):
        Dataset(tmp_path, processor, SHAPE)


def test_closed_threads_end(processor):
    before = threading.active_count()
    data = Dataset(Drawn(50, False), processor, SHAPE, threads=3)
    next(data)
    assert threading.active_count() > before
    data.close()
    for _ in range(100):
        if threading.active_count() <= before:
            return
        time.sleep(0.05)
    raise AssertionError("threads are left")


# ------------------------------------------------------------------------------------------ preferences


def test_preferences_are_neighbours_over_one_picture(processor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8))

    class Pairs(Drawn):
        def __getitem__(self, i):
            prompt = [{"role": "user", "content": [{"image": image}, {"text": f"q {i}"}]}]
            return {"messages": prompt, "chosen": f"answer {i}", "rejected": f"worse {i}"}

    shape = PackShape(2, 200, 2, 128, segments=4)
    data = Dataset(Pairs(9), processor, shape, epochs=1, shuffle=False, preferences=True)
    process, done = data._load.process, 0
    for batch in data:
        here = numbers(processor, [batch])
        examples = [process(Pairs(9)[done + i]) for i in range(len(here))]
        check_packed(CONFIG, shape, batch, examples)
        done += len(here)
        for b in range(2):
            for k in range(1, batch.inputs.segments[b].max() + 1):
                text = processor.decode(batch.targets[b][(batch.inputs.segments[b] == k) & (batch.weights[b] > 0)])
                assert text.startswith("answer" if k % 2 else "worse")
        assert batch.inputs.vision[0].frames.astype(bool).sum() == 24 * len(here)
    assert done == 9
