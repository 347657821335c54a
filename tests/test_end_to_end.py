"""From files on disk to text, through the command line."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_tiny import FAMILIES, copy_tokenizer, make_tiny, small_config
from safetensors.numpy import load_file, save_file

from qwenvl_jax import cli
from qwenvl_jax.families import to_dict

MEDIA = Path(__file__).parent / "data" / "media"
PHOTO, DOCUMENT, CLIP = (str(MEDIA / name) for name in ("coffee.jpg", "page.png", "bunny.mp4"))
GREEDY = ["--temperature", "0", "--repetition-penalty", "1"]


def generate(capsys, *argv) -> str:
    assert cli.main(["generate", *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert not [line for line in err.splitlines() if "on a CPU, bfloat16 weights are cast" not in line]
    return out


def test_generate(tiny_checkpoint, tmp_path, capsys):
    """JSON, and streamed text from an Orbax copy of the checkpoint, agree; without the picture the answer differs."""
    orbax = tmp_path / "orbax"
    assert cli.main(["convert", str(tiny_checkpoint), str(orbax), "--to", "orbax"]) == 0
    capsys.readouterr()
    base = ["--prompt", "What is this?", "--max-new-tokens", "8", *GREEDY]
    image = ["--image", PHOTO, "--max-pixels", "50000"]
    answer = json.loads(generate(capsys, "--model", tiny_checkpoint, *base, *image, "--json"))
    assert generate(capsys, "--model", orbax, *base, *image) == answer["text"] + "\n"
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"]) <= 8
    assert answer["finish_reason"] in ("stop", "length")
    blind = json.loads(generate(capsys, "--model", tiny_checkpoint, *base, "--json"))
    assert blind["token_ids"] != answer["token_ids"]
    assert blind["usage"]["prompt_tokens"] < answer["usage"]["prompt_tokens"]


one_family = pytest.mark.parametrize("tiny_checkpoint", ["qwen2_5_vl"], indirect=True)


@one_family
@pytest.mark.parametrize("content", [b"", b"hi\n", b"this is not a picture", None, slice(0, 2000)], ids=str)
def test_bad_pictures(tiny_checkpoint, tmp_path, capsys, content):
    """Empty, not a picture, missing, truncated: an error names the file before weights are read."""
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(Path(PHOTO).read_bytes()[content] if isinstance(content, slice) else content)
    assert cli.main(["generate", "--model", str(tiny_checkpoint), "--image", str(path), "--prompt", "?"]) == 2
    out, err = capsys.readouterr()
    assert "bad.jpg" in err and err.count("\n") == 1 and not out


@one_family
def test_a_prompt_beyond_the_context(tiny_checkpoint, tmp_path, capsys):
    """The error comes before weights are read: there are none here."""
    for file in tiny_checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", "word " * 40_000]) == 2
    out, err = capsys.readouterr()
    assert "32768" in err and err.count("\n") == 1 and not out


def scaled(path, changes) -> str:
    """A checkpoint in which the tensors whose names end so are multiplied."""
    make_tiny(path, "qwen2_5_vl", dtype="float32")
    (file,) = path.glob("*.safetensors")
    factors = {name: f for name in load_file(file) for end, f in changes.items() if name.endswith(end)}
    save_file({name: w * np.float32(factors.get(name, 1)) for name, w in load_file(file).items()}, file)
    return str(path)


OVERFLOW = {"1.mlp.up_proj.weight": 2000, "1.mlp.down_proj.weight": 2000}


@pytest.mark.parametrize(
    ("changes", "dtype", "says"),
    [
        (OVERFLOW, "float16", "float16 ends at 65504"),
        ({"layers.0.mlp.up_proj.weight": 1e6}, "float16", "the weight decoder/layers/up_proj/kernel holds them"),
        ({"layers.2.mlp.down_proj.weight": np.nan}, "float32", "the weight decoder/layers/down_proj/kernel holds them"),
        ({"layers.1.input_layernorm.weight": np.inf}, "float32", "the weight decoder/layers/input_layernorm/scale"),
    ],
    ids=["overflow", "cast", "nan", "scale"],
)
def test_numbers_that_are_not_finite(tmp_path, capsys, monkeypatch, changes, dtype, says):
    """No answer, no score: generate (streamed or not), eval and chat say why."""
    model = ["--model", scaled(tmp_path / "model", changes), "--dtype", dtype]
    (tmp_path / "q.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}], "answer": "x"}\n')
    ask = ["generate", "--prompt", "Hi"]
    for argv in [ask, [*ask, "--json"], ["eval", f"{tmp_path}/q.jsonl", "--json"]][: 3 if changes is OVERFLOW else 1]:
        assert cli.main([*argv, *model]) == 2
        out, err = capsys.readouterr()
        assert says in err and "the model computed NaN or infinity" in err and "Load the checkpoint with dtype" in err
        assert not out.strip() and err.count("\n") == 1
    if changes is OVERFLOW:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        assert cli.main(["chat", *model]) == 0
        assert says in capsys.readouterr().err


@one_family
def test_truncated_weights(tiny_checkpoint, tmp_path, capsys):
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1 << 20 if file.suffix == ".safetensors" else None])
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", "?"]) == 2
    out, err = capsys.readouterr()
    assert "model.safetensors" in err and err.count("\n") == 1 and not out


@one_family
def test_the_checkpoints_own_normalisation_reaches_the_device(tiny_checkpoint, tmp_path):
    import jax

    from qwenvl_jax import load
    from qwenvl_jax.inputs.preprocessing import Preprocessing, pixel_table
    from qwenvl_jax.model.vision import normalise

    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").unlink()
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    model = load(tmp_path, progress=False)
    config = model.config
    assert model.processor.config == config
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 3, 392))
    seen = jax.jit(normalise, static_argnums=1)(levels.reshape(256, 1176), config).reshape(levels.shape)
    want = pixel_table(Preprocessing.from_dict(settings))
    assert (np.asarray(seen) == want.T[:, :, None]).all()
    assert not np.array_equal(want, pixel_table(Preprocessing()))


@one_family
@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tiny_checkpoint):
    """stdout is the answer only, stderr is empty, and a reader that closes the pipe is no error."""
    argv = [sys.executable, "-m", "qwenvl_jax.cli", "generate", "--model", str(tiny_checkpoint), "--prompt", "Hi"]
    argv += ["--dtype", "float32"]  # explicit, so nothing is logged about it
    run = subprocess.run([*argv, "--max-new-tokens", "4", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["usage"]["completion_tokens"] >= 1
    assert run.stderr == ""
    piped = subprocess.Popen([*argv, "--max-new-tokens", "64"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    piped.stdout.close()
    assert piped.stderr.read() == b""
    assert piped.wait() == 141
    piped.stderr.close()


# --- the reference --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request, tmp_path_factory):
    """A checkpoint in several files, written by transformers, with its model and processor."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("reference")
    config = small_config(request.param, "float32", tied=False)  # a tied model would repeat its last token
    auto = transformers.AutoConfig.for_model(**to_dict(config))
    torch.manual_seed(3)
    model = transformers.AutoModelForImageTextToText.from_config(auto, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:  # larger than the default, so that the picture matters
                p.normal_(std=1.0 if "embed_tokens" in name else p[0].numel() ** -0.5)
            else:
                p.normal_(mean=float(name.endswith("weight")), std=0.1)
    model.save_pretrained(path, max_shard_size="20MB")
    copy_tokenizer(path)
    return path, model


def our_frames(path: str, fps: float) -> tuple[list, float]:
    """Frames of a clip by the published rule, and their rate."""
    import av
    from PIL import Image

    with av.open(path) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate)
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    count = int(min(max(len(frames) / rate * fps, 4), 768, len(frames))) // 2 * 2
    picks = np.linspace(0, len(frames) - 1, count).round().astype(int)
    return [Image.fromarray(frames[i]) for i in picks], count / len(frames) * rate


def _names(media: list[str]) -> str:
    return "+".join(Path(file).stem for file in media)


@pytest.mark.parity
@pytest.mark.parametrize("media", [[PHOTO], [CLIP], [PHOTO, CLIP, DOCUMENT]], ids=_names)
def test_tokens_equal_the_reference(reference, media, capsys):
    """Real files through the command line: the same greedy tokens as transformers."""
    import torch
    import transformers
    from PIL import Image, ImageOps
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

    path, model = reference
    pixels, fps, prompt = 120_000, 2.0, "Describe what you see, in detail."
    argv, content, images, videos, rates = [], [], [], [], []
    for file in media:
        kind = "video" if file == CLIP else "image"
        argv += [f"--{kind}", file]
        content.append({"type": kind, kind: file})
        if kind == "image":
            images.append(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
        else:
            frames, rate = our_frames(file, fps)
            h, w = smart_resize(frames[0].height, frames[0].width, 28, 56 * 56, pixels)
            videos.append([np.asarray(f.resize((w, h), Image.Resampling.BICUBIC)) for f in frames])
            rates.append(rate)
    answer = json.loads(
        generate(
            capsys,
            *("--model", path, *argv, "--prompt", prompt, "--json", *GREEDY, "--max-new-tokens", "24"),
            *("--min-pixels", 56 * 56, "--max-pixels", pixels, "--fps", fps),
        )
    )

    images_of = Qwen2VLImageProcessor.from_pretrained(path, min_pixels=56 * 56, max_pixels=pixels)
    template = json.loads((path / "chat_template.json").read_text())["chat_template"]
    tokenizer = transformers.Qwen2TokenizerFast.from_pretrained(path)
    two = model.config.model_type == "qwen2_vl"
    kind = transformers.Qwen2VLProcessor if two else transformers.Qwen2_5_VLProcessor
    processor = kind(images_of, tokenizer, chat_template=template)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}], add_generation_prompt=True
    )
    extra = {"fps": rates[0]} if rates and not two else {}
    inputs = processor(text=[text], images=images or None, videos=videos or None, return_tensors="pt", **extra)
    assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    model.rope_deltas = None
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1.0)
    theirs = out[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(set(theirs)) > 8  # a model that repeats one token would prove little
    assert answer["token_ids"] == theirs


@pytest.mark.parity
def test_verify(reference, capsys):
    """`qwenvl verify` prints one table, stage by stage, and nothing else."""
    path, _ = reference
    assert cli.main(["verify", str(path), "--image", PHOTO]) == 0
    out, err = capsys.readouterr()
    stages = [line.split("  ")[0] for line in out.splitlines()]
    assert stages[:4] == ["stage", "patches", "positions", "image vision output"]
    assert stages[-2:] == ["logits", "greedy tokens"]
    assert "FAILED" not in out and not err
    assert cli.main(["verify", str(path), "--image", "nowhere.jpg"]) == 2
    assert "nowhere.jpg" in capsys.readouterr().err
