"""Where records come from: JSON arrays, Parquet, datasets, patterns and lists, beside JSONL (tests/test_data.py)."""

import builtins
import bz2
import io
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from make_tiny import small_config
from PIL import Image
from tiny import read_questions

from qwenvl_jax import cli
from qwenvl_jax.errors import CheckpointError, InputError, install
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.inputs.source import open_records
from qwenvl_jax.params.locate import find
from qwenvl_jax.train.data import Dataset
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.records import PackShape

SHAPE = PackShape(rows=1, tokens=128, lanes=1, patches=64)


@pytest.fixture(scope="module")
def processor(tokenizer_dir) -> Processor:
    return Processor.from_dir(tokenizer_dir, small_config("qwen2_5_vl"))


def png(seed=0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def qa(i: int, **more) -> dict:
    return {"query": f"Q{i}é", "response": f"A{i}", **more}


def lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return path


def everything(source) -> list:
    return [(source.where(i), source[i]) for i in range(len(source))]


def answers(data, **more) -> list:
    return [q.answers[0] for q in read_questions(data, **more)]


def learnt(processor, data, **more) -> list[str]:
    """The answers that one epoch trains on."""
    dataset = Dataset(data, processor, SHAPE, epochs=1, shuffle=False, **more)
    return [text for batch in dataset for text in processor.decode(batch.targets[batch.weights > 0]).split("A") if text]


# ------------------------------------------------------------------------------------------ JSON arrays


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("around", ["{}", "\ufeff{}", " \r\n{}\n\n"])
def test_an_array(tmp_path, indent, ascii_only, around):
    records = [qa(i, note='é\u20ac\U0001f600 \\" ] }') for i in range(9)] + [7, "x", [], None]
    path = tmp_path / "a.json"
    path.write_text(around.format(json.dumps(records, indent=indent, ensure_ascii=ascii_only)), "utf-8")
    source = open_records(path)
    assert everything(source) == [(f"{path}[{i}]", record) for i, record in enumerate(records)]
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)
    assert source.identity["bytes"] == path.stat().st_size


@pytest.mark.parametrize(
    "text, says",
    [
        ("[", "a JSON array that is not readable"),
        ("[1 2]", "Expecting ',' or ']'"),
        ("[1, ]", "not readable"),
        ("[1", "not readable"),
        ('[{"a": }]', "line 1 column 8"),
        ("[" * 100000, "not readable"),
        ("[1]\n[2]", "goes on after its array"),
    ],
)
def test_a_damaged_array(tmp_path, text, says):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json") as e:
        open_records(tmp_path / "a.json")
    assert says in str(e.value)


def test_an_array_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenvl_jax.inputs.source.MAX_IN_MEMORY", 4)
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(InputError, match=r"so write one record per line, as jq -c '\.\[\]'"):
        open_records(tmp_path / "a.json")


def test_an_array_is_trained_on_and_evaluated(processor, tmp_path):
    path = tmp_path / "a.json"
    (tmp_path / "a.png").write_bytes(png())
    path.write_text(json.dumps([qa(1, image="a.png"), qa(2), {"query": "Q"}]))
    with pytest.raises(InputError, match=r"a\.json\[2\]: has no 'answer'"):
        read_questions(path)
    with pytest.raises(InputError, match=r"a\.json\[2\]: no assistant message"):
        learnt(processor, path)
    assert learnt(processor, path, on_error="skip") == ["1", "2"]


# ------------------------------------------------------------------------------------------ several files


def test_patterns_and_lists(processor, tmp_path):
    for name, i in (("b", 2), ("a", 1), ("c", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(i))
        lines(tmp_path / name / "part.jsonl", qa(i, image="x.png"))
    (tmp_path / "d.json").write_text(json.dumps([qa(4), qa(5)]))
    data = [str(tmp_path / "*" / "part.jsonl"), tmp_path / "d.json"]
    source = open_records(data)
    assert [r["response"] for _, r in everything(source)] == ["A1", "A2", "A3", "A4", "A5"]
    assert source.folder(1) == tmp_path / "b" and source.where(4) == f"{tmp_path}/d.json[1]"
    assert answers(data) == ["A1", "A2", "A3", "A4", "A5"]
    assert learnt(processor, data) == ["1", "2", "3", "4", "5"]
    assert read_questions(data)[2].messages[0]["content"][0] == {"type": "image", "image": f"{tmp_path}/c/x.png"}
    same, other = open_records(data), open_records(data[::-1])
    assert same.identity == source.identity != other.identity


@pytest.mark.parametrize(
    "name, says",
    [
        ("none.jsonl", "No such file"),
        ("*.jsonl", "no file matches the pattern"),
        ("", "a directory that save_to_disk did not write; give its files, as in"),
        ("a.csv", "tables of text are not read"),
        ("one.json", "one JSON object over several lines"),
        ("a.jsonl.gz", "is compressed (gzip); unpack it first"),
    ],
)
def test_what_is_no_source(tmp_path, name, says):
    (tmp_path / "a.csv").write_text("a,b\n")
    (tmp_path / "one.json").write_text(json.dumps(qa(1), indent=2))
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(InputError) as e:
        open_records(str(tmp_path / name))
    assert says in str(e.value) and str(tmp_path) in str(e.value)


TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as archive:
    archive.addfile(tarfile.TarInfo("a.jsonl"))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", json.dumps(qa(1)).encode("utf-16"), "is text in UTF-16; write it as UTF-8"),
        ("a.jsonl", json.dumps(qa(1)).encode("utf-16-le"), "is text in UTF-16"),
        ("a.json", json.dumps([qa(1)]).encode("utf-16-be"), "is text in UTF-16"),
        ("a.jsonl", json.dumps(qa(1)).encode("utf-32"), "is text in UTF-32"),
        ("a.jsonl", json.dumps(qa(1)).encode("utf-32-be"), "is text in UTF-32"),
        ("a.jsonl.xz", lzma.compress(b"{}"), "is compressed (xz); unpack it first"),
        ("a.jsonl.bz2", bz2.compress(b"{}"), "is compressed (bzip2); unpack it first"),
        ("a.tar", TAR.getvalue(), "is an archive (tar); unpack it first"),
        ("a.arrow", b"\xff\xff\xff\xff\0", "is a file of Arrow; write one JSON object per line"),
        ("a.bin", b"ARROW1\0\0", "is a file of Arrow"),
        ("a.pkl", pickle.dumps([qa(1)]), "is a file of pickle"),
        ("a.yaml", b"- messages: []\n", "records are not read from .yaml files"),
        ("*", png(1), "a.png: is a picture, clip or page (PNG), not records; if a pattern found it, narrow the"),
        ("a.mp4", b"\0\0\0\x18ftypmp42", "is a picture, clip or page (MP4)"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, name, content, says):
    (tmp_path / ("a.png" if name == "*" else name)).write_bytes(content)
    with pytest.raises(InputError) as e:
        open_records(str(tmp_path / name))
    assert says in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize("data", [5, {"a": 1}, iter([]), None])
def test_objects_that_are_no_sequence(data):
    with pytest.raises(InputError, match="give a path, or a sequence"):
        open_records(data)


def test_options_take_one_or_several(tmp_path):
    assert TrainOptions(data="a.jsonl").data == ("a.jsonl",)
    (tmp_path / "run.toml").write_text('data = ["a.jsonl", "b/*.parquet"]\neval_data = "c.json"\ncolumns = ["x="]\n')
    options = TrainOptions.read(tmp_path / "run.toml")
    assert (options.data, options.eval_data, options.columns) == (("a.jsonl", "b/*.parquet"), ("c.json",), ("x=",))
    (tmp_path / "again.toml").write_text(options.to_toml())
    assert TrainOptions.read(tmp_path / "again.toml") == options


def test_flags_take_data_and_columns(tmp_path, capsys):
    """A bad key of the data is told before the model is looked for, and the sentence says how to go on."""
    (tmp_path / "a.json").write_text(json.dumps([qa(1, mood="x")]))
    argv = ["eval", str(tmp_path / "*.json"), "--model", str(tmp_path / "none")]
    assert cli.main(argv) == 2
    assert "a.json[0]: unknown key 'mood'; rename it with --columns mood=NAME" in capsys.readouterr().err
    assert cli.main([*argv, "--columns", "mood="]) == 2
    assert "none" in capsys.readouterr().err
    argv = [
        "train",
        "--data",
        str(tmp_path / "a.json"),
        "--model",
        str(tmp_path / "none"),
        "--output",
        str(tmp_path / "o"),
    ]
    assert cli.main([*argv, "--data", str(tmp_path / "b.json")]) == 2
    assert "b.json: cannot be read" in capsys.readouterr().err
    assert cli.main([*argv, "--columns", "mood"]) == 2
    assert "columns has 'mood'; it must be OLD=NEW" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ without the extra


def test_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args):
        if name.partition(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    for data in (tmp_path / "a.parquet", tmp_path / "saved", "user/name"):
        with pytest.raises(InputError, match=re.escape(f"needs the extra `datasets`: {install('datasets')}")):
            open_records(data)
    with pytest.raises(InputError, match="runs/train: there is no such file; a dataset of the hub needs"):
        open_records("runs/train")


RECORD = '{"query": "Q", "response": "A"}'
NOT_LINES = {
    "wrapper": (
        f'{{"version": 1, "data": [{RECORD}, {RECORD}]}}',
        "records are under 'data'; write one per line, as jq",
    ),
    "wrapper over lines": (json.dumps({"rows": [json.loads(RECORD)]}, indent=1), "under 'rows'"),
    "splits": (f'{{"train": [{RECORD}], "test": []}}', "jq -c '.[\"train\"][]' "),
    "indented": (
        json.dumps(json.loads(RECORD), indent=1),
        "holds one JSON object over several lines; write one record",
    ),
    "several indented": (json.dumps(json.loads(RECORD), indent=1) * 2, "holds JSON objects over several lines each"),
    "a break within": (
        '{"messages": [\n{"role": "user", "content": "Q"}]}\n{}',
        "holds JSON objects over several lines",
    ),
    "on one line": (RECORD * 2, "several JSON values on one line; write one record per line, as jq -c . does"),
    "on one line, spaced": (f"{RECORD}\n{RECORD} \t{RECORD}\n", "several JSON values on one line"),
    "carriage returns": (
        f"{RECORD}\r{RECORD}\r",
        r"carriage returns alone (\r); write line feeds, as tr '\r' '\n' does",
    ),
    "commas": (f"{RECORD},\n{RECORD}\n", "a comma after the record; write one record per line and no commas"),
    "words": (f"{RECORD} x\n", "not readable as JSON (Extra data"),
    "damaged": ('{"query": "Q\n{"response": "A"}\n', "not readable as JSON"),
}


@pytest.mark.parametrize("name", NOT_LINES)
def test_what_is_not_one_record_per_line_is_named(tmp_path, name):
    text, says = NOT_LINES[name]
    for mark in ("", "\ufeff"):
        (path := tmp_path / "a.jsonl").write_text(mark + text, "utf-8", newline="")
        with pytest.raises(InputError) as e:
            everything(open_records(path))
        assert says in str(e.value)


@pytest.mark.parametrize(
    "text", [RECORD, f"{RECORD}\r\n\r\n{RECORD}\r\n", f"\n{RECORD}\n", '{"images": [{"path": "a"}]}']
)
def test_one_record_per_line_is_read(tmp_path, text):
    (path := tmp_path / "a.jsonl").write_text(text, "utf-8", newline="")
    assert len(open_records(path)) == text.count("}\n") + text.count("}\r") + text.endswith("}")
    assert everything(open_records(path))


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    """As another user sees it; the tests may run as root."""
    closed, stat, scandir = tmp_path / "closed", os.stat, os.scandir
    lines(tmp_path / "a.jsonl", qa(1))

    def refusing(function):
        def call(path, *args, **more):
            inside = str(path).startswith(f"{closed}{os.sep}") or (function is scandir and str(path) == str(closed))
            if inside:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **more)

        return call

    closed.mkdir()
    monkeypatch.setattr(os, "stat", refusing(stat))
    monkeypatch.setattr(os, "scandir", refusing(scandir))
    for data in (
        closed,
        closed / "x.jsonl",
        closed / "sub" / "x.jsonl",
        closed / "*.jsonl",
        closed / "sub" / "*" / "x",
    ):
        with pytest.raises(InputError, match=f"cannot be read .no permission to open the folder {closed}.$"):
            open_records(data)
        if "*" not in str(data):
            with pytest.raises(CheckpointError, match="no permission to open the folder"):
                find(data)
    with pytest.raises(InputError, match="No such file"):
        open_records(tmp_path / "gone" / "x.jsonl")
    assert len(open_records(tmp_path / "a.jsonl")) == 1


# ------------------------------------------------------------------------------------------ Parquet


def table(path: Path, records: list, group: int = 2) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=group)
    return path


def test_parquet(processor, tmp_path, monkeypatch):
    records = [qa(i, image={"bytes": png(i), "path": "x.png"}) for i in range(7)]
    path = table(tmp_path / "a.parquet", records)
    source = open_records(path)
    assert everything(source) == [(f"{path}[{i}]", record) for i, record in enumerate(records)]
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)
    assert answers(path) == [f"A{i}" for i in range(7)]
    assert learnt(processor, path) == [str(i) for i in range(7)]
    with pytest.raises(IndexError):
        source[7]
    part = source._parts[0]
    assert len(part._cache) == 4  # all groups fit
    monkeypatch.setattr("qwenvl_jax.inputs.tables._CACHED", 1)
    assert source[6]["response"] == "A6" and list(part._cache) == [3]


def test_a_row_group_has_a_limit(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", [qa(i) for i in range(5)])
    monkeypatch.setattr("qwenvl_jax.inputs.tables.MAX_GROUP", 10)
    with pytest.raises(InputError, match=r"row group 0 has .*row_group_size"):
        open_records(path)


def test_a_table_gives_every_row_the_keys_of_all(tmp_path):
    """Their values are null, and count as absent: also in messages, items and the parameters of tools."""
    call = {"function": {"name": "f", "arguments": {"city": "Rome"}}}
    see = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Q"}]
    tools = [
        {"type": "function", "function": {"name": n, "parameters": {"properties": {n: {"type": "string"}}}}}
        for n in "fg"
    ]
    messages = [{"role": "user", "content": see}, {"role": "assistant", "content": [], "tool_calls": [call]}]
    record = {"messages": messages, "tools": tools, "answer": "A"}
    no_chat, no_query = dict.fromkeys(record), dict.fromkeys(qa(1))
    path = table(tmp_path / "a.parquet", [record | no_query, qa(1) | no_chat])
    first, second = (record for _, record in everything(open_records(path)))
    assert (first, second) == (record, qa(1))
    assert answers(path) == ["A", "A1"]


@pytest.mark.parametrize("form", ["lines", "array", "list", "parquet", "dataset"])
def test_nulls_are_absent_from_every_source(processor, tmp_path, form):
    """As `Dataset.to_json`, `Table.to_pylist` and Parquet write rows that lack a key of other rows."""
    calls = [{"function": {"name": n, "arguments": {"a": 1, n: n}}} for n in "fg"]
    user = {"role": "user", "content": "Q"}
    given = [[user, {"role": "assistant", "content": "", "tool_calls": [call]}] for call in calls]
    for messages, other in zip(given, "gf", strict=True):
        messages[1]["tool_calls"][0]["function"]["arguments"][other] = None
    records = [{"messages": messages, "tools": None} for messages in given]
    if form == "dataset":
        data = pytest.importorskip("datasets").Dataset.from_list(records)
    elif form == "list":
        data = records
    elif form == "parquet":
        data = table(tmp_path / "a.parquet", records)
    else:
        text = json.dumps(records) if form == "array" else "".join(json.dumps(r) + "\n" for r in records)
        (data := tmp_path / "a.jsonl").write_text(text)
    for i, (_, record) in enumerate(everything(open_records(data))):
        arguments = {"a": 1, "fg"[i]: "fg"[i]}
        assert record["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments
        assert "tools" not in record
    (text,) = learnt(processor, data)
    assert text.count('"f": "f"') == text.count('"g": "g"') == 1 and "null" not in text


def test_a_damaged_table(tmp_path):
    path = table(tmp_path / "a.parquet", [qa(i) for i in range(50)], 10)
    good, identity = path.read_bytes(), open_records(path).identity
    path.write_bytes(good[:-30] + b"\0" * 30)
    with pytest.raises(InputError, match="not a readable Parquet file"):
        open_records(path)
    path.write_bytes(good[:4] + b"\xff" * 60 + good[64:])
    with pytest.raises(InputError, match="row group 0 is damaged"):
        open_records(path)[0]
    assert open_records(table(path, [qa(i + 1) for i in range(50)], 10)).identity != identity


# ------------------------------------------------------------------------------------------ datasets


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    return pytest.importorskip("datasets")


def with_pictures(datasets):
    features = datasets.Features(
        {"query": datasets.Value("string"), "response": datasets.Value("string"), "images": [datasets.Image()]}
    )
    return datasets.Dataset.from_list([qa(i, images=[{"bytes": png(i), "path": None}]) for i in range(3)], features)


def test_a_saved_dataset(processor, datasets, tmp_path):
    """Pictures stay bytes until the package itself decodes them."""
    saved = with_pictures(datasets)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([2])}).save_to_disk(tmp_path / "two")
    expected = [qa(i, images=[{"bytes": png(i)}]) for i in range(3)]
    source = open_records(tmp_path / "one")
    assert everything(source) == [(f"{tmp_path}/one[{i}]", r) for i, r in enumerate(expected)]
    assert source.identity == open_records(str(tmp_path / "one")).identity != {}
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)
    assert source.folder(0) == tmp_path / "one"
    for data in (tmp_path / "one", f"{tmp_path}/two", saved):
        assert learnt(processor, data) == ["0", "1", "2"]
    assert answers(f"{tmp_path}/two:test") == ["A2"]
    assert answers([tmp_path / "one", f"{tmp_path}/two:test"]) == ["A0", "A1", "A2", "A2"]
    with pytest.raises(InputError, match=r"name one of its splits: .*two:train, .*two:test"):
        open_records(f"{tmp_path}/two:dev")
    with pytest.raises(InputError, match="is a single split; leave out ':dev'"):
        open_records(f"{tmp_path}/one:dev")
    with pytest.raises(InputError, match="such as one split of it"):
        open_records(datasets.DatasetDict({"train": saved}))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(InputError, match="one: cannot be opened as a dataset"):
        open_records(tmp_path / "one")


@pytest.mark.parametrize(
    "name, called", [("u/n", (None, "train")), ("u/n:test", (None, "test")), ("u/n.x:cfg:test", ("cfg", "test"))]
)
def test_a_dataset_of_the_hub(processor, datasets, monkeypatch, name, called):
    calls = []

    def load_dataset(path, config, split):
        calls.append((path, (config, split)))
        return with_pictures(datasets)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert answers(name) == ["A0", "A1", "A2"] and calls == [(name.split(":")[0], called)]
    assert learnt(processor, name) == ["0", "1", "2"]
    assert open_records(name).where(1) == f"{name}[1]"


def test_a_hub_out_of_reach_is_found_at_once(datasets, monkeypatch):
    """`datasets` would try for half a minute. What the hub answers, and what is in the cache, is for `datasets`."""
    error, called = OSError("no route to host"), []

    def dataset_info(self, name, timeout):
        assert timeout <= 5
        raise error

    def load_dataset(path, config, split):
        called.append(path)
        raise OSError("not found")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("foo/bar", "foo/bar:test"):
        with pytest.raises(InputError, match=r"foo/bar: there is no such file, and the hub.*\(no route to host\)"):
            open_records(name)
    assert called == []
    error.response = object()
    with pytest.raises(InputError, match="cannot be opened as a dataset"):
        open_records("foo/bar")
    del error.response
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(Path(os.environ["HF_HOME"])))
    (Path(os.environ["HF_HOME"]) / "foo___bar").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be opened as a dataset"):
        open_records("foo/bar")
    assert called == ["foo/bar"] * 2


@pytest.fixture
def stream(datasets, monkeypatch):
    """A hub whose datasets are streamed, in 5 shards of 8 records."""
    rows = datasets.Dataset.from_list([qa(i, note=None) for i in range(40)])
    rows = rows.map(lambda r: {"response": f"{r['response']} ", "mood": "x"})

    def load_dataset(path, config, split, streaming):
        assert streaming
        return rows.to_iterable_dataset(num_shards=5)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return open_records("u/n", ["mood="], streaming=True)


def of_batches(processor, batches) -> list[str]:
    texts = [processor.decode(batch.targets[batch.weights > 0]) for batch in batches]
    return [number.strip() for text in texts for number in text.split("A") if number]


@pytest.mark.parametrize("threads", [0, 3])
def test_a_stream_is_shuffled_and_resumed(processor, stream, threads):
    how = dict(seed=3, epochs=2, threads=threads)
    data = Dataset(stream, processor, SHAPE, **how)
    batches, states = [], []
    for batch in data:
        batches.append(batch)
        states.append(json.loads(json.dumps(data.get_state())))
    whole = of_batches(processor, batches)
    assert sorted(whole[:40], key=int) == sorted(whole[40:], key=int) == [str(i) for i in range(40)]
    assert whole[:40] != whole[40:] and np.isnan(data.epoch)
    for at in (2, len(batches) // 2 + 1):
        again = Dataset(stream, processor, SHAPE, **how)
        again.set_state(states[at])
        assert of_batches(processor, [next(again)]) == of_batches(processor, [batches[at + 1]])
        again.close()
    in_order = Dataset(stream, processor, SHAPE, epochs=1, shuffle=False)
    assert of_batches(processor, in_order) == [str(i) for i in range(40)]


def test_what_a_stream_cannot_do(processor, stream, datasets, tmp_path):
    for more in (dict(workers=1), dict(shard=(0, 2))):
        with pytest.raises(InputError, match="is streamed; read it in one process"):
            Dataset(stream, processor, SHAPE, **more)
    with pytest.raises(InputError, match="a streamed dataset stands alone"):
        open_records(["u/n", lines(tmp_path / "a.jsonl", qa(1))], streaming=True)
    with pytest.raises(InputError, match="is streamed, so it has no length; save it with save_to_disk"):
        read_questions(stream)
    empty = datasets.Dataset.from_list([qa(1)]).to_iterable_dataset().filter(lambda r: False)
    with pytest.raises(InputError, match="dataset: has no records"):
        next(Dataset(empty, processor, SHAPE))

    def broken():
        yield qa(1)
        raise ConnectionError("no network")

    data = Dataset(datasets.IterableDataset.from_generator(broken), processor, SHAPE, shuffle=False)
    with pytest.raises(InputError, match=r"dataset: cannot be read further \(.*no network"):
        next(data)


def test_bad_records_of_a_stream(processor, datasets, monkeypatch):
    monkeypatch.setattr("qwenvl_jax.train.data._STREAM_PATIENCE", 3)
    rows = datasets.Dataset.from_list([qa(1), {"query": "Q", "response": None}, qa(3)]).to_iterable_dataset()
    with pytest.raises(InputError, match="dataset, record 1 of the stream: no assistant message"):
        list(Dataset(rows, processor, SHAPE, shuffle=False))
    skipping = dict(shuffle=False, on_error="skip")
    assert learnt(processor, rows, on_error="skip") == ["1", "3"]
    with pytest.raises(InputError, match="record 0 of the stream: columns renames 'query' to 'response'"):
        list(Dataset(rows, processor, SHAPE, columns=["query=response"], shuffle=False))
    bad = datasets.Dataset.from_list([{"query": "Q"}]).to_iterable_dataset()
    with pytest.raises(InputError, match="none of 3 records can be used"):
        list(Dataset(bad, processor, SHAPE, **skipping))


def test_a_hub_that_does_not_answer(datasets, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        InputError, match=r"no such file, and as a dataset of the hub: u/n: cannot be opened as a dataset \(no"
    ):
        open_records("u/n")


def test_a_missing_module_is_not_imported_for_lists(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert answers([qa(1)]) == ["A1"]
    rows = SimpleNamespace(__len__=lambda: 0)
    with pytest.raises(InputError, match="records are of type SimpleNamespace"):
        open_records(rows)


def test_pictures_of_a_pipe_start_at_the_working_directory(tmp_path):
    record = qa(0, image="c/x.png")
    read, write = os.pipe()
    os.write(write, json.dumps(record).encode())
    os.close(write)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_text, args=(json.dumps(record),))
    writer.start()
    file = os.open(lines(tmp_path / "q.jsonl", record), os.O_RDONLY)  # as in `qwenvl eval /dev/stdin < q.jsonl`
    for name in (f"/dev/fd/{read}", fifo, f"/dev/fd/{file}"):
        (question,) = read_questions(name)
        assert question.messages[0]["content"][0] == {"type": "image", "image": "c/x.png"}
    writer.join()
    for descriptor in (read, file):
        os.close(descriptor)


def test_records_that_are_open_when_python_ends(tmp_path):
    file = lines(tmp_path / "a.jsonl", qa(1))
    code = f"from qwenvl_jax.inputs.source import open_records\nimport os, sys\nrecords = open_records({str(file)!r})\n"
    code += "sys.modules['kept'] = records\nos = None\nimport qwenvl_jax.inputs.source as s\ns.os = None\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
