"""`qwenvl data`: what it counts is what training does with the same records."""

import json

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax import cli
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.params import checkpoint, directory, locate
from qwenvl_jax.train.data import Dataset
from qwenvl_jax.train.options import TrainOptions
from qwenvl_jax.train.records import PackShape
from qwenvl_jax.train.survey import pack, suggest, survey


@pytest.fixture(scope="module")
def processor() -> Processor:
    path = locate.find("demo")
    return Processor.from_dir(path, directory.read_config(path))


def chat(question="q", answer="a", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | more


@pytest.fixture
def data(tmp_path):
    """40 usable records, every second one with a picture, and one of each kind of bad ones."""
    Image.new("RGB", (112, 56)).save(tmp_path / "small.png")
    Image.new("RGB", (560, 560)).save(tmp_path / "large.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "small.png").read_bytes()[:60])
    picture = dict(question="<image>\nq" + " word" * 5, image="small.png")
    records = [chat(**picture) if i % 2 else chat("q" + " word" * (i // 4)) for i in range(40)]
    records += [chat("word " * 400), chat("<image>", image="large.png"), chat("<image>", image="none.png")]
    records += [chat("<image>", image="cut.png"), {"messages": [{"role": "user", "content": "q"}]}]
    lines = [json.dumps(record) for record in records] + ["{", "[1]", ""]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path / "data.jsonl"


SHAPE = ["--rows", "2", "--tokens", "128", "--lanes", "2", "--patches", "128"]


def facts_of(capsys, *given) -> dict:
    assert cli.main(["data", *map(str, given), *SHAPE, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_everything_is_counted(data, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", None)  # no weights
    facts = facts_of(capsys, data)
    assert (facts["records"], facts["read"], facts["usable"]) == (47, 47, 40)
    assert facts["forms"] == {"messages": 22, "messages + image": 23, "no JSON object": 2}
    assert (facts["pictures"], facts["clips"]) == (21, 0)
    bad = {reason: (b["count"], [text.split(": ")[0].rpartition(":")[2] for text in b["first"]])
           for reason, b in facts["bad"].items()}  # fmt: skip
    assert bad == {
        "too long": (1, ["41"]), "too large": (1, ["42"]), "media": (2, ["43", "44"]),
        "nothing to learn": (1, ["45"]), "unreadable": (2, ["46", "47"]),
    }  # fmt: skip
    assert facts["quantiles"]["patches"] == {"min": 0, "5%": 0, "50%": 32, "95%": 32, "99%": 256, "max": 256}
    assert facts["quantiles"]["tokens"]["max"] > 400 and facts["quantiles"]["answers"]["max"] == 1
    assert facts["batches"]["left_out"] == 2


def test_the_text_names_reasons_and_flags(data, capsys):
    assert cli.main(["data", str(data), *SHAPE, "--limit", "24", "-o", str(data.parent / "sizes.png")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("47 records, 24 of them read: ") and "bad, media: " in out
    assert "messages + image" in out and "suggested, to hold 100%" in out and "--rows 2 --tokens 128 --lanes 2" in out
    assert err == f"{data.parent / 'sizes.png'}\n"
    with Image.open(data.parent / "sizes.png") as image:
        assert image.format == "PNG" and image.width > 1000


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_converted_boxes_are_counted(task, data, capsys):
    """One has boxes, one has none, one says that they are those of the model, one says nothing, one has no picture."""
    boxed = dict(question="<image>\nWhere?", answer='{"box": [4, 4, 50, 50]}', image="large.png")
    records = [chat(**boxed, boxes="original"), chat(**boxed | {"answer": "a"}, boxes="original")]
    records += [chat(**boxed, boxes="resized"), chat(**boxed), chat(answer=boxed["answer"], boxes="original")]
    if task == "dpo":
        records = [{"prompt": r["messages"][:1], "chosen": r["messages"][1:], "rejected": "no"} | r for r in records]
        for record in records:
            del record["messages"]
    data.write_text("\n".join(map(json.dumps, records)))
    small = ["--max-pixels", "6272", "--task", task]
    assert facts_of(capsys, data, *small)["boxes"] == {"declared": 4, "converted": 1}
    assert cli.main(["data", str(data), *SHAPE, *small]) == 0
    assert "boxes converted in 1 of 4 records that name coordinates" in capsys.readouterr().out
    assert cli.main(["data", str(data), *SHAPE, *small, "--boxes", "original"]) == 0
    assert "boxes converted in 2 of 5 records that name coordinates" in capsys.readouterr().out


def test_packing_is_that_of_training(data, processor):
    """Equal records: their order decides nothing."""
    records = [chat("q", "answer")] * 53
    options = TrainOptions(rows=2, tokens=64, lanes=1, patches=64)
    found = survey(records, processor, options)
    packed = pack(found.measured, found.shape, processor.config, found.total)
    batches = list(Dataset(records, processor, found.shape, epochs=1))
    assert packed.batches == len(batches)
    used = sum(np.count_nonzero(batch.inputs.segments) for batch in batches)
    assert packed.tokens == pytest.approx(used / (len(batches) * 2 * 64))
    assert packed.records == pytest.approx(53 / len(batches))
    assert sum(m.trained for m in found.measured) == sum(np.count_nonzero(b.weights) for b in batches)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_suggestions_hold_all(task, data, processor):
    lines = data.read_text().splitlines()[:42]
    if task == "dpo":
        rows = [json.loads(line) for line in lines]
        replies = [{"chosen": "yes", "rejected": "no"} | {k: r[k] for k in r.keys() - {"messages"}} for r in rows]
        lines = [json.dumps(r | {"prompt": x["messages"][:1]}) for r, x in zip(replies, rows, strict=True)]
    data.write_text("\n".join(lines))
    options = TrainOptions(rows=1, tokens=128, lanes=1, patches=128, task=task)
    found = survey(data, processor, options)
    shape = suggest(found.measured, options, processor.config, 1.0)
    packed = pack(found.measured, shape, processor.config, found.total)
    assert packed.left_out == 0
    dataset = Dataset(data, processor, shape, epochs=1, preferences=task == "dpo")  # a bad record would stop it
    seen = sum(len(np.unique(batch.inputs.segments[batch.inputs.segments > 0])) for batch in dataset)
    assert dataset.epoch == 1 and seen
    part = suggest(found.measured, options, processor.config, 0.9)
    assert part.tokens < shape.tokens
    words = survey([chat()] * 3, processor, options)
    if task == "sft":  # text needs one lane, as small as can be
        options = TrainOptions(rows=7, tokens=128)
        for scale, rows in ((1, 1), (5, 5), (7, 7), (100, 7)):  # records that were not read count too
            expected = PackShape(rows, 128, 1, processor.config.vision.block_slots, 64)
            assert suggest(words.measured, options, processor.config, 1.0, scale) == expected


@pytest.mark.parametrize("count", [1, 2, 24, 200])
def test_few_records_get_no_more_rows_than_hold_them(processor, count):
    options = TrainOptions(rows=64, tokens=128)
    found = survey([chat("q" * (1 + i % 9), "answer") for i in range(count)], processor, options)
    shape = suggest(found.measured, options, processor.config, 1.0)
    packed = pack(found.measured, shape, processor.config, found.total)
    assert packed.left_out == 0 and packed.batches == 1
    if count > 2:
        assert packed.tokens > 0.75
    assert shape.rows == 1 if count < 3 else 1 < shape.rows <= 64


def test_several_files_with_other_names(data, capsys):
    other = data.with_name("other.jsonl")
    other.write_text(json.dumps({"query": "q", "caption": "a b", "mood": 1}) + "\n")
    columns = ["--columns", "caption=response", "--columns", "mood="]
    facts = facts_of(capsys, data, other, *columns)
    assert (facts["records"], facts["usable"], facts["forms"]["query + response"]) == (48, 41, 1)
    assert facts["bad"]["too long"]["first"][0].startswith(f"{data}:41: ")
    assert facts_of(capsys, data.parent / "*.jsonl", *columns) == facts
    facts = facts_of(capsys, data, other)
    assert facts["bad"]["unknown key"]["first"][0].startswith(f"{other}:1: ")


def test_what_cannot_be(data, capsys, tmp_path):
    assert cli.main(["data", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert cli.main(["data", str(data), "--limit", "0"]) == 2
    assert "limit is 0; it must be at least 1" in capsys.readouterr().err
    assert cli.main(["data", str(data), "--patches", "100"]) == 2
    assert "patches is 100; it must be a multiple of" in capsys.readouterr().err
    data.write_text("{x\n[]\n")
    assert facts_of(capsys, data)["suggested"] == {}
    assert cli.main(["data", str(data), "-o", str(tmp_path / "x.png")]) == 2
    assert "no record can be read" in capsys.readouterr().err
