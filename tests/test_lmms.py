"""Our engine as a model of lmms-eval: its command finds it by name, and gives the score that `qwenvl eval` gives.

An environment of its own: `pip install -e ".[lmms-eval]" pytest`, then `pytest tests/test_lmms.py`. Elsewhere it is
skipped.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageOps

from qwenvl_jax import cli
from qwenvl_jax.answers.boxes import parse_boxes
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.errors import InputError

INSTALLED = find_spec("lmms_eval") is not None
pytestmark = [
    pytest.mark.lmms,
    pytest.mark.parity,  # so that the README's command for tests leaves it out
    pytest.mark.skipif(not INSTALLED, reason="needs the lmms-eval extra"),
    pytest.mark.filterwarnings("ignore"),  # lmms-eval's own, when it is imported
]

OBJECTS = {"strawberry": [(10, 23, 56, 75), (0, 80, 47, 132), (72, 46, 138, 118)], "pizza": [(100, 5, 126, 35)]}
TURNS = (0, 90, 180, 270)


def turned(image):
    for angle in TURNS:
        yield image.rotate(angle, expand=True)
        yield ImageOps.mirror(image.rotate(angle, expand=True))


def pictures() -> list[tuple[Image.Image, str, str]]:
    """(picture, question, right answer), of the demo's samples turned, mirrored and cut; not all are answered right."""
    scene, line, chart = (Image.open(SAMPLES / f"{name}.png").convert("RGB") for name in ("scene", "line", "chart"))
    asked = [(image, "How many strawberries are there?", "3") for image in turned(scene)]
    asked += [(image, "How many pizzas are there?", "1") for image in turned(scene)]
    for name, boxes in OBJECTS.items():
        for box in boxes:
            asked += [(image, "What is it?", name) for image in turned(scene.crop(box))]
    asked += [(line, text, "Honeycreeper") for text in ("Read the text.", "What does it say?")]
    asked += [(line.crop((0, 0, 140, 56)), "Read the text.", "Honey"), (chart, "Which is the highest?", "Health")]
    asked += [(chart, f"What is the value of {name}?", n) for name, n in (("Factory", "12"), ("Mining", "1"))]
    return asked


CLIPS = [("When does the truck appear?", "1.5 seconds"), ("When does the giraffe appear?", "5.5 seconds")]
TOKENS = {"demo_pictures": 16, "demo_clips": 16, "demo_cut": 2}  # one task's limit must not reach another's answers
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function tasks.visuals
doc_to_text: !function tasks.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, top_p: 0, num_beams: 1, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CODE = """\
from PIL import Image

def visuals(doc):
    return [Image.open(doc["media"]) if doc["media"].endswith(".png") else doc["media"]]

def text(doc):
    return doc["question"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of lmms-eval, which give pictures and paths of clips, and the same questions for `qwenvl eval`."""
    path = tmp_path_factory.mktemp("lmms")
    clips = [(str(SAMPLES / "clip.mp4"), *rest) for rest in CLIPS]
    tasks = {"demo_pictures": [], "demo_clips": clips, "demo_cut": clips}
    for i, (image, question, answer) in enumerate(pictures()):
        image.save(path / f"{i}.png")
        tasks["demo_pictures"].append((str(path / f"{i}.png"), question, answer))
    (path / "tasks").mkdir()
    (path / "tasks/tasks.py").write_text(CODE)
    for name, rows in tasks.items():
        docs = [dict(zip(("media", "question", "answer"), row, strict=True)) for row in rows]
        (path / f"{name}.docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        yaml = YAML.format(name=name, data=path / f"{name}.docs.jsonl", tokens=TOKENS[name])
        (path / f"tasks/{name}.yaml").write_text(yaml)
        with open(path / f"{name}.jsonl", "w") as file:
            for media, question, answer in rows:
                kind = "image" if media.endswith(".png") else "video"
                content = [{"type": kind, kind: media}, {"type": "text", "text": question}]
                file.write(json.dumps({"messages": [{"role": "user", "content": content}], "answer": answer}) + "\n")
    return path


def lmms_eval(folder: Path, *arguments: str):
    """Its command, from another process and without the hub. It exits with 0 after errors too."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    command = [sys.executable, "-m", "lmms_eval", "--include_path", str(folder / "tasks"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, cwd=folder)


def test_the_scores_and_answers_of_qwenvl_eval(folder, capsys):
    run = lmms_eval(
        folder,
        *("--model", "qwenvl_jax", "--model_args", "pretrained=demo", "--batch_size", "16"),
        *("--tasks", ",".join(TOKENS), "--log_samples", "--output_path", str(folder / "out")),
    )
    found = list((folder / "out").rglob("*_results.json"))
    assert found, run.stdout + run.stderr
    scores, values = json.loads(found[0].read_text())["results"], {}
    for task, tokens in TOKENS.items():
        command = ["eval", str(folder / f"{task}.jsonl"), "--batch", "16", "--max-new-tokens", str(tokens), "--json"]
        assert cli.main([*command, "--output", str(folder / f"{task}.answers")]) == 0
        (score,) = json.loads(capsys.readouterr().out)["tasks"]
        (samples,) = (folder / "out").rglob(f"*_samples_{task}.jsonl")
        theirs = {one["doc_id"]: one["filtered_resps"] for one in map(json.loads, samples.read_text().splitlines())}
        lines = map(json.loads, (folder / f"{task}.answers").read_text().splitlines())
        ours = [one["prediction"].strip() for one in lines if "prediction" in one]
        assert [theirs[i] for i in range(score["n"])] == ours and len(theirs) == len(ours)
        assert scores[task]["exact_match,none"] == pytest.approx(score["value"], abs=1e-12)
        values[task] = score["value"]
    assert 0.2 < values["demo_pictures"] < 0.98  # some are right, some are wrong
    assert values["demo_clips"] == 1 and values["demo_cut"] == 0


class Requests:
    """Requests as lmms-eval makes them. `model` gets their documents."""

    def __init__(self, model, *asked):
        """asked: (messages, generation_kwargs), each a task of one document."""
        model.task_dict = {f"task{i}": {"test": [messages]} for i, (messages, _) in enumerate(asked)}
        settings = [how for _, how in asked]
        self.list = [
            SimpleNamespace(args=("", lambda doc: doc, how, 0, f"task{i}", "test")) for i, how in enumerate(settings)
        ]


def user(text, *items):
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


SCENE = {"type": "image", "url": str(SAMPLES / "scene.png")}
CLIP = {"type": "video", "url": str(SAMPLES / "clip.mp4")}


@pytest.fixture(scope="module")
def model():
    from qwenvl_jax.eval.lmms import QwenVL

    return QwenVL(pretrained="demo", batch_size="4")


def answers(model, *asked) -> list[str]:
    return [one.text for one in model.generate_until(Requests(model, *asked).list)]


def test_requests_of_many_kinds_are_answered_in_their_order(model):
    """Pictures as paths, PIL images and frames, clips and their parts, and options that differ in one batch."""
    scene = Image.open(SAMPLES / "scene.png")
    chart = {"type": "image", "url": Image.open(SAMPLES / "chart.png")}
    hear = {"type": "video", "url": {"path": CLIP["url"], "video_start": 4.0, "video_end": 8.0}}
    part = {**CLIP, "start_time": 4.0, "end_time": 8.0}
    frames = {"type": "video", "url": [scene] * 4}
    asked = [
        (user("How many strawberries are there?", SCENE), {"max_new_tokens": 8}),
        (user("Which is the highest?", chart), {"until": ["a"]}),
        (user("When does the truck appear?", CLIP), {"until": ["\n\n"], "temperature": 0.0}),
        (user("When does the giraffe appear?", hear), None),
        (user("How many strawberries are there?", {"type": "image", "url": scene}), {"do_sample": False}),
        (user("When does the giraffe appear?", part), {"max_new_tokens": 8}),
        (user("What is it?", frames), {}),
    ]
    many = answers(model, *asked)
    assert many[:3] == ["3", "He", "1.5 seconds"] and many[4] == "3"
    assert many[3].startswith(many[5]) and many[3] != "5.5 seconds"  # counted from the start of the part
    assert many == [answers(model, one)[0] for one in asked]


def test_tokens_are_counted(model):
    ((one,),) = [model.generate_until(Requests(model, (user("How many strawberries are there?", SCENE), {})).list)]
    sample = model._engine.processor.encode(user("How many strawberries are there?", SCENE))
    assert one.token_counts.input_tokens == len(sample.tokens) and one.token_counts.output_tokens == 2


@pytest.mark.parametrize(
    "settings, want",
    [
        (None, {"max_new_tokens": 256, "temperature": 0.0}),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1}, {"max_new_tokens": 16}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0}, {"temperature": 0.0, "top_p": None}),
        ({"temperature": 0.2, "top_p": 0.9}, {"temperature": 0.2, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0}, {"temperature": 0.0, "top_p": None}),
        ({"do_sample": True, "temperature": 1, "top_k": 5}, {"temperature": 1.0, "top_k": 5}),
        ({"until": ["\n\n"]}, {"stop": ()}),
        ({"until": "Q:"}, {"stop": ("Q:",)}),
        ({"until": ["Q:", "\n\n"], "stop_sequences": ["A:"]}, {"stop": ("Q:", "\n\n", "A:")}),
        ({"until": [], "image_aspect_ratio": "pad", "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"num_beams": 3}, "num_beams is 3; it must be 1, because there is no beam search"),
        ({"n": 2}, "n is 2; it must be 1"),
        ({"do_sample": True}, "do_sample is true without a temperature; add one"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"until": [3]}, "until: stop is 3"),
        ({"best_of": 2}, "unknown option best_of"),
    ],
)
def test_generation_kwargs(model, settings, want):
    if isinstance(want, str):
        with pytest.raises(InputError, match=f"task task0: generation_kwargs: {want}"):
            answers(model, (user("?"), settings))
        return
    (request,) = Requests(model, (user("?"), settings)).list
    options = model._asked(*request.args).options
    assert {name: getattr(options, name) for name in want} == want


def test_bad_documents_are_named_or_skipped(model, monkeypatch, caplog):
    bad = {"type": "image", "url": "nowhere.png"}
    sound = {"type": "audio", "url": "a.wav"}
    asked = [(user("What is it?", item), {}) for item in (SCENE, bad, sound, SCENE)]
    with pytest.raises(InputError, match=r"task task[12], document 0: .*(nowhere\.png|audio)"):
        answers(model, *asked)
    monkeypatch.setattr(model, "_skip", True)
    said = answers(model, *asked)
    assert said[1:3] == ["", ""] and said[0] == said[3] != ""
    assert sum("answered with an empty text" in text for text in caplog.messages) == 2


def test_boxes_in_pixels_of_the_picture(model, monkeypatch):
    """As asked for by `boxes=original`: the picture is six times as large as what the model sees."""
    scene = Image.open(SAMPLES / "scene.png")
    large = {"type": "image", "url": scene.resize((840, 840), Image.Resampling.LANCZOS), "max_pixels": 140 * 140}
    (small,) = answers(model, (user("Where is the pizza?", large), {}))
    monkeypatch.setattr(model, "_boxes", "original")
    (original,) = answers(model, (user("Where is the pizza?", large), {}))
    ((box,), (mapped,)) = (parse_boxes(text) for text in (small, original))
    assert [mapped.x1, mapped.y1, mapped.x2, mapped.y2] == [6 * side for side in (box.x1, box.y1, box.x2, box.y2)]
    with pytest.raises(InputError, match="task0, document 0: boxes converts the boxes of one picture"):
        answers(model, (user("Where is the pizza?", SCENE, large), {}))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "cuda:0"}, "device is 'cuda:0'; leave it out"),
        ({"batch_size": "many"}, "batch_size is 'many'; it must be a whole number"),
        ({"batch_size": "0"}, "batch_size is '0'; it must be a whole number, at least 1"),
        ({"max_new_tokens": 9}, "max_new_tokens is an option of a generation; give it by --gen_kwargs"),
        ({"max_pixel": 1}, "unknown option max_pixel; did you mean max_pixels"),
        ({"max_pixels": "big"}, "max_pixels is 'big'"),
        ({"boxes": "inches"}, "boxes is 'inches'"),
        ({"pretrained": "nowhere/at all"}, "nowhere/at all"),
        ({"mesh": "2"}, "mesh '2' is not"),
    ],
)
def test_bad_arguments(options, message):
    from qwenvl_jax.eval.lmms import QwenVL

    with pytest.raises(InputError, match=message):
        QwenVL(**options)


def test_one_process(monkeypatch):
    from qwenvl_jax.eval.lmms import QwenVL

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="started in 2 processes; it runs in one process"):
        QwenVL()


def test_what_it_does_not_do(model):
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="choose tasks of output_type generate_until"):
            method([])
