"""Mutates valid inputs and checks that only samples or InputErrors come out, in bounded time and memory.

    python tests/hostile.py --pictures 5000 --clips 1000 --checkpoints 2000 --messages 3000 --records 1000 --seed 0

Case number n of a kind depends on the seed and n alone; `--first n --pictures 1` repeats it. Each kind runs in a
process of its own, whose peak of memory is read after every case: none may pass 1.5 GB, nor last longer than 10
seconds (20 for clips). The named bombs come first. Exit code 1: something else was raised, or took too much.
"""

import argparse
import base64
import copy
import json
import multiprocessing
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).resolve().parent
MEDIA = HERE / "data" / "media"
DEMO = HERE.parent / "qwenvl_jax" / "demo" / "checkpoint"
MEMORY = 1536  # MiB
SECONDS = {"clips": 20.0}
NUMBERS = (0, 1, 2, 3, 7, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def mutated(rng: random.Random, data: bytes, others: list[bytes], damage: int = 8) -> bytes:
    """The bytes with a few changes: bits, runs, numbers of 1 to 8 bytes, cuts, repeats, parts of another file.

    Half of the changes are near the start, where headers are.
    """
    out = bytearray(data)
    for _ in range(rng.randint(1, damage)):
        if not out:
            break
        at = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 600))
        kind = rng.randrange(8)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + rng.randint(1, 16)] = rng.randbytes(rng.randint(1, 16))
        elif kind in (2, 3):
            size = rng.choice((1, 2, 4, 4, 8))
            number = rng.choice(NUMBERS) % 256**size
            out[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
        elif kind == 4 and rng.random() < 0.3:
            del out[at:]
        elif kind == 5:
            part = out[at : at + rng.randint(1, 400)]
            out[at:at] = part * rng.choice((1, 1, 2, 50))
        elif kind == 6:
            del out[at : at + rng.randint(1, 64)]
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            out[at : at + rng.randint(1, 64)] = other[start : start + rng.randint(1, 256)]
    if data[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.8:
        out = bytearray(with_checksums(bytes(out)))  # otherwise a PNG is refused for its checksum
    return bytes(out)


def with_checksums(png: bytes) -> bytes:
    out, at = [png[:8]], 8
    while at + 12 <= len(png):
        size = struct.unpack_from(">I", png, at)[0]
        body = png[at + 4 : at + 8 + size]
        out += [png[at : at + 4], body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + size
    return b"".join(out)


def mutated_json(rng: random.Random, value, depth: int = 0):
    """The value with one part replaced, renamed, dropped, repeated or nested."""
    odd = [None, True, -1, 0, 2**63, 1e308, float("nan"), "", "\ud800", "x" * 10000, [], {}, [[]], {"type": "image"}]
    odd += ["<|im_end|>", "<image>", "data:image/png;base64,AAAA", "file:///dev/zero", {"url": 3}, ["a"] * 1000]
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        out = dict(value)
        match rng.randrange(5):
            case 0:
                out[rng.choice(["role", "content", "type", "image", "video", "text", "fps", "zzz"])] = rng.choice(odd)
            case 1:
                del out[key]
            case _:
                out[key] = mutated_json(rng, value[key], depth + 1)
        return out
    if isinstance(value, list) and value and rng.random() < 0.85:
        i, out = rng.randrange(len(value)), list(value)
        match rng.randrange(6):
            case 0:
                del out[i]
            case 1:
                out[i:i] = [value[i]] * rng.choice((1, 3, 300))
            case _:
                out[i] = mutated_json(rng, value[i], depth + 1)
        return out
    if rng.random() < 0.1:
        for _ in range(rng.choice((3, 200, 3000))):
            value = [value] if rng.random() < 0.5 else {"content": value}
        return value
    return copy.deepcopy(rng.choice(odd))


def as_json(value) -> str:
    """JSON of a mutated value; what is too deep for `json.dumps` becomes lists in lists under the same keys."""
    try:
        return json.dumps(value)
    except RecursionError:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)}: {as_json(part)}" for key, part in value.items()) + "}"
        return "[" * 3000 + "]" * 3000


# --- kinds: each gives its named bombs, and a function from a case's generator to what is run


def pictures(folder: Path):
    import test_media
    import test_pictures

    from qwenvl_jax.inputs.media import image_visual

    sources = [*test_media.PICTURES.values(), *(data for data, _ in test_pictures.FILES.values())]
    image = Image.open(MEDIA / "coffee.jpg")
    for kind, options in (("AVIF", {}), ("WEBP", {"lossless": True}), ("JPEG2000", {"tile_size": (64, 64)})):
        sources.append(test_pictures.encode(image.resize((200, 150)), kind, **options))
    sources = [s for s in sources if len(s) < 200_000]

    def run(data):
        image_visual(data, test_media.P)

    bombs = {name: lambda d=data: run(d) for name, (data, _) in test_pictures.BOMBS.items()}
    text = zlib.compress(bytes(60 << 20), 9)
    flood = [(b"zTXt", b"k%d\0\0" % i + text) for i in range(40)]
    bombs["png of compressed texts"] = lambda: run(test_pictures.png(8, 0, bytes(256), *flood))
    tags = struct.pack(">HHII", 0x9286, 7, 60000, 8) * 5000
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 5000) + tags
    plain = test_pictures.encode(image, "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    bombs["jpeg of many tags"] = lambda: run(plain[:2] + segment + plain[2:])
    bombs["tiff of many tags"] = lambda: run(
        test_pictures.tiff(bytes(2048), 8, extra=[(tag, 1) for tag in range(40000, 65000)])
    )
    return bombs, lambda rng: run(mutated(rng, rng.choice(sources), sources))


def clips(folder: Path):
    import av
    import test_video

    from qwenvl_jax.inputs.options import MediaOptions
    from qwenvl_jax.inputs.video import video_visual

    kinds = [("a.mp4", "libx264"), ("b.mp4", "mpeg4"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.gif", "gif"),
             ("a.avi", "mjpeg"), ("a.ts", "mpeg2video"), ("a.flv", "flv1"), ("a.h264", "libx264")]  # fmt: skip
    sources = [test_video.clip(folder / name, 12, codec=codec).read_bytes() for name, codec in kinds]
    sources.append(test_video.clip(folder / "varying.mkv", 10, times=test_video.SLOW).read_bytes())
    sources += [test_video.animation(kind, [100, 100, 2000, 100, 100]) for kind in ("AVIF", "WEBP")]
    small = MediaOptions(max_pixels=784 * 8)

    def run(data):
        video_visual(data, test_video.P, small)

    def large_frames():
        large = folder / "large.mp4"
        if not large.exists():
            with av.open(str(large), "w") as container:
                options = {"preset": "ultrafast", "x264-params": "ref=1:rc-lookahead=0:threads=1"}
                stream = container.add_stream("libx264", rate=30, options=options)
                stream.width, stream.height, stream.pix_fmt = 4096, 2304, "yuv420p"
                picture = av.VideoFrame.from_ndarray(np.zeros((2304, 4096, 3), np.uint8), format="rgb24")
                for i in range(60):
                    picture.pts = i
                    container.mux(stream.encode(picture))
                container.mux(stream.encode())
        run(large.read_bytes())

    counted = bytearray(sources[0])
    at = counted.index(b"stsz")
    counted[at + 4 : at + 16] = struct.pack(">3I", 0, 1, 10**8)
    bombs = {
        "mp4 of large frames": large_frames,
        "mp4 of a hundred million frames": lambda: run(bytes(counted)),
        "webp of 32 megapixels": lambda: run(sources[-1][:24] + (5699).to_bytes(3, "little") * 2 + sources[-1][30:]),
    }
    return bombs, lambda rng: run(mutated(rng, rng.choice(sources), sources))


def checkpoints(folder: Path):
    """Files of a checkpoint or adapter, one of which is changed; it is opened without its weights, or with them."""
    import jax
    from qwenvl_convert import hf, peft
    from test_sandbox import BOMBS

    from qwenvl_jax.inputs.processor import Processor
    from qwenvl_jax.params import directory, lora

    path = folder / "checkpoint"
    shutil.copytree(DEMO, path)
    config = directory.read_config(path)
    params = hf.read_params(path, config, progress=False)
    adapter = folder / "adapter"
    peft.save_adapter(config, lora.add(config, params, jax.random.key(0), rank=2, alpha=4), adapter, base_name="base")
    files = [f for f in sorted(path.iterdir()) if f.suffix in (".json", ".jinja", ".safetensors")]
    files += sorted(adapter.iterdir())
    originals = {f: f.read_bytes() for f in files}
    small = [f for f in files if len(originals[f]) < 1 << 20]

    def open_all():
        c = directory.read_config(path)
        Processor.from_dir(path, c)
        hf.read_params(path, c, progress=False)
        peft.load_adapter(c, params, adapter)

    def case(rng):
        file = rng.choice(small) if rng.random() < 0.7 else rng.choice(files)
        data = originals[file]
        try:
            if file.suffix == ".json" and len(data) < 1 << 20 and rng.random() < 0.6:
                file.write_text(as_json(mutated_json(rng, json.loads(data))), errors="surrogatepass")
            elif file.suffix == ".safetensors":  # the header only, since weights are any bits
                size = 8 + struct.unpack("<Q", data[:8])[0]
                file.write_bytes(mutated(rng, data[:size], [data[:size]]) + data[size:])
            else:
                file.write_bytes(mutated(rng, data, [data[:4096]]))
            open_all()
        finally:
            file.write_bytes(data)

    template = path / "chat_template.json"

    def with_template(source):
        try:
            template.write_text(json.dumps({"chat_template": source}))
            Processor.from_dir(path, config).render([{"role": "user", "content": "Hi"}])
        finally:
            template.write_bytes(originals[template])

    open_all()
    return {f"template: {name}": lambda s=source: with_template(s) for name, (source, _) in BOMBS.items()}, case


def _processor():
    from qwenvl_jax.inputs.processor import Processor
    from qwenvl_jax.params import directory

    return Processor.from_dir(DEMO, directory.read_config(DEMO))


def messages(folder: Path):
    import test_pictures

    from qwenvl_jax.cli.generate import read_request

    processor, photo = _processor(), str(MEDIA / "coffee.jpg")
    image = {"type": "image", "image": photo, "max_pixels": 7840}
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    valid = [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [image, {"text": "What?"}]}]},
        {"messages": [{"role": "user", "content": [{"video": [photo, photo], "fps": 2, "max_pixels": 7840}]}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "tool_calls": [call]},
                      {"role": "tool", "content": "7"}, {"role": "user", "content": [{"type": "image_url", "image_url":
                       {"url": photo}, "max_pixels": 784}]}], "temperature": 0.5, "max_tokens": 3,
         "tools": [{"type": "function", "function": {"name": "f"}}]},
    ]  # fmt: skip

    def run(body):
        if not isinstance(body, dict):
            return
        options = read_request({k: v for k, v in body.items() if isinstance(k, str) and k != "messages"}, "m")
        media = {k: v for k, v in options.items() if k.endswith(("pixels", "frames", "fps"))}
        processor.encode(body.get("messages"), tools=options.get("tools"), **media)

    def case(rng):
        body = rng.choice(valid)
        for _ in range(rng.randint(1, 3)):
            body = mutated_json(rng, body)
        run(body)

    def user(*content):
        return {"messages": [{"role": "user", "content": list(content)}]}

    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    webp = "data:image/webp;base64," + base64.b64encode(test_pictures.webp(5000)).decode()
    bombs = {
        "eight webp of 34 bytes side by side": lambda: run(user(*[{"image": webp, "max_pixels": 784}] * 8)),
        "a thousand enlarged pictures": lambda: run(user(*[{"image": photo, "min_pixels": 10**7}] * 1000)),
        "eight small pictures, enlarged": lambda: run(user(*[{"image": photo, "min_pixels": 8 * 10**7}] * 8)),
        "ten million letters": lambda: run(user({"text": "a b " * 2_500_000})),
        "a deep list": lambda: run({"messages": [{"role": "user", "content": deep}]}),
        "deep tools": lambda: run({"messages": [{"role": "user", "content": "a"}], "tools": [{"a": deep}]}),
        "ten thousand messages": lambda: run({"messages": [{"role": "user", "content": "a"}] * 10_000}),
    }
    return bombs, case


def records(folder: Path):
    from qwenvl_jax.train.records import PackShape, RecordProcessor

    photo = str(MEDIA / "coffee.jpg")
    process = RecordProcessor(
        _processor(), PackShape(rows=1, tokens=4096, lanes=4, patches=4096), options={"max_pixels": 784 * 16}
    )
    valid = [
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
                      {"role": "assistant", "content": "a cup"}], "images": [photo]},
        {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cup"}],
         "image": photo},
        {"system": "s", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]},
    ]  # fmt: skip

    def case(rng):
        record = rng.choice(valid)
        for _ in range(rng.randint(1, 3)):
            record = mutated_json(rng, record)
        process(record)

    return {}, case


KINDS = {f.__name__: f for f in (pictures, clips, checkpoints, messages, records)}


def peak() -> int:
    """The process's peak of memory in MiB, since the last call where the system can reset it (Linux)."""
    try:
        text = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", text)[1]) >> 10
    except (OSError, TypeError):
        return 0


def attempt(name: str, run) -> tuple[str, float, int, str]:
    """(outcome, seconds, MiB, message) of one case. Outcomes: a sample, an InputError's code, or "FAULT"."""
    from qwenvl_jax.errors import InputError

    peak()
    start = time.perf_counter()
    try:
        run()
        outcome, message = "sample", ""
    except InputError as e:
        outcome, message = e.code, str(e)
    except Exception as e:
        where = e.__traceback__
        while where.tb_next:
            where = where.tb_next
        place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
        outcome, message = "FAULT", f"{type(e).__name__} at {place}: {e}"
    return outcome, time.perf_counter() - start, peak(), message


def campaign(kind: str, count: int, seed: int = 0, first: int = 0, bombs: bool = True) -> dict:
    """Runs one kind in this process. Returns its row of the table, with `faults`: (case, what happened)."""
    limit, outcomes, faults = SECONDS.get(kind, 10.0), Counter(), []
    slowest, largest = (0.0, ""), (0, "")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        named, case = KINDS[kind](Path(folder))
        cases = list(named.items()) if bombs else []
        for n in range(first, first + count):
            cases.append((f"{kind} {n}", lambda n=n: case(random.Random(f"{kind} {seed} {n}"))))
        for name, run in cases:
            outcome, seconds, memory, message = attempt(name, run)
            if seconds > limit:  # other programs may have slowed it
                outcome, seconds, memory, message = attempt(name, run)
            outcomes[outcome] += 1
            slowest, largest = max(slowest, (seconds, name)), max(largest, (memory, name))
            if outcome == "FAULT":
                faults.append((name, message[:300]))
            if seconds > limit or memory > MEMORY:
                faults.append((name, f"took {seconds:.1f} seconds and {memory} MiB ({outcome}: {message[:100]})"))
    row = dict(kind=kind, cases=len(cases), outcomes=dict(outcomes), faults=faults)
    return row | dict(seconds=slowest, memory=largest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args, faults = parser.parse_args(), 0
    print(f"{'kind':12} {'cases':>6} {'samples':>8} {'refused':>8} {'faults':>7}  {'slowest':24} largest")
    for kind in KINDS:
        if not (count := getattr(args, kind)):
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own: its memory is measured
            row = pool.apply(campaign, (kind, count, args.seed, args.first))
        samples = row["outcomes"].get("sample", 0)
        refused = row["cases"] - samples - row["outcomes"].get("FAULT", 0)
        slow, large = "{:.2f} s ({})".format(*row["seconds"]), "{} MiB ({})".format(*row["memory"])
        print(f"{kind:12} {row['cases']:6} {samples:8} {refused:8} {len(row['faults']):7}  {slow:24} {large}")
        for name, what in row["faults"]:
            print(f"    {name}: {what}")
        faults += len(row["faults"])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
