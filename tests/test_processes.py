"""Several processes over `jax.distributed` give the results of one process, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from qwenvl_jax import cli
from qwenvl_jax.params import checkpoint
from qwenvl_jax.train import run

pytestmark = pytest.mark.slow
FEW = 3
MESHES = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 1, 2)}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A checkpoint (the demo's first layers, quick to compile), a picture, records about it."""
    work = tmp_path_factory.mktemp("processes")
    demo = checkpoint.load("demo", dtype="float32")
    text = replace(demo.config.text, num_hidden_layers=1)
    vision = replace(demo.config.vision, depth=1, fullatt_block_indexes=(0,))
    params = jax.tree.map(lambda w: w, demo.params)
    params["decoder"]["layers"] = jax.tree.map(lambda w: w[:1], params["decoder"]["layers"])
    params["vision"]["blocks"] = jax.tree.map(lambda w: w[:1], params["vision"]["blocks"])
    model = demo._replace(config=demo.config.replace(text=text, vision=vision), params=params)
    checkpoint.save(model, work / "model", files_from=checkpoint.find("demo"))
    Image.new("RGB", (112, 112), "red").save(work / "red.png")
    user = {"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "Colour?"}]}
    record = {"messages": [user, {"role": "assistant", "content": "red"}]}
    (work / "data.jsonl").write_text((json.dumps(record) + "\n") * 4)
    gone = user | {"content": [{"type": "image", "image": "gone.png"}, {"type": "text", "text": "?"}]}
    asked = [
        record,
        {"messages": [gone], "answer": "x"},
        *({"messages": [user], "answer": a} for a in ("blue", "green")),
    ]
    (work / "eval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    (work / "run.toml").write_text(
        f'model = "{work / "model"}"\ndata = "{work / "data.jsonl"}"\nrows = 4\ntokens = 64\nlanes = 4\npatches = 64\n'
        'dtype = "float32"\nschedule = "constant"\nlearning_rate = 1e-3\nremat = false\nfreeze = ["vision"]\n'
    )
    return work


def child(work: str, output: str, steps: str, count: str) -> None:
    """The program of each process: prints how much of the decoder it read, the answer (first process only), and trains.

    With 0 steps it loads and answers forever instead; with more than FEW it only trains."""
    data, fsdp, tensor = MESHES[int(count)]
    several = ["--distributed"] if int(count) > 1 else []
    read, source = [], checkpoint.OrbaxSource.read

    def counted(self, leaf, *args):
        out = source(self, leaf, *args)
        read.append(out.size if leaf.path.startswith("decoder/") else 0)
        return out

    checkpoint.OrbaxSource.read = counted
    ask = ["--image", f"{work}/red.png", "--prompt", "Colour?", "--temperature", "0", "--max-new-tokens", "6"]
    shape = ["--mesh", f"{data}x{fsdp}x{tensor}"]
    generate = ["generate", "--model", f"{work}/model", "--dtype", "float32", "--json", *ask, *shape, *several]
    if int(steps) <= FEW:
        assert cli.main(generate) == 0
    while steps == "0":  # with a seed that they agree on
        assert cli.main([*generate, "--temperature", "1"]) == 0
    score = ["eval", f"{work}/eval.jsonl", "--model", f"{work}/model", "--dtype", "float32", "--json", *shape, *several]
    score += ["--output", f"{output}-answers.jsonl", "--on-bad-record", "skip", "--max-new-tokens", "6", "--batch", "2"]
    for limit in [] if steps.startswith("100") else ["1", "9"]:  # the second goes on from the first
        assert cli.main([*score, "--limit", limit]) == 0
    print(json.dumps({"read": sum(read)}), flush=True)
    sizes = ["--mesh-data", str(data), "--mesh-fsdp", str(fsdp), "--mesh-tensor", str(tensor)]
    sys.exit(cli.main(["train", f"{work}/run.toml", "--output", output, "--steps", steps, *sizes, *several]))


def start(work: Path, output: Path, steps: int, count: int) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
    }
    code = "import sys; sys.modules['tensorboardX'] = None; sys.path.insert(0, sys.argv.pop(1))"
    code += "; import test_processes; test_processes.child(*sys.argv[1:])"
    argv = [sys.executable, "-c", code, *map(str, (Path(__file__).parent, work, output, steps, count))]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [subprocess.Popen(argv, env=env | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(count)]


def together(work: Path, count: int) -> tuple[list[int], list[float], list[int]]:
    """(tokens and answers, losses, bytes of the decoder that each process read)."""
    output = work / f"run{count}"
    ends = [(*p.communicate(timeout=300), p.returncode) for p in start(work, output, FEW, count)]
    assert all(code == 0 for *_, code in ends), ends
    printed = [[json.loads(line) for line in out.splitlines() if line.startswith("{")] for out, *_ in ends]
    assert [len(lines) for lines in printed] == [4] + [1] * (count - 1)  # only the first process prints the answer
    tokens, first, second, _ = printed[0]
    assert (first["overall"]["n"], second["overall"]["n"], second["skipped"]) == (1, 3, {"media": 1})
    answers = [json.loads(line) for line in (work / f"{output.name}-answers.jsonl").read_text().splitlines()]
    said = [tokens["token_ids"], *((a["id"], a["prediction"]) for a in answers)]
    return said, [m["loss"] for m in run.read_metrics(output)], [p[-1]["read"] for p in printed]


@pytest.fixture(scope="module")
def alone(work):
    return together(work, 1)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_equal_one(work, alone, count):
    tokens, losses, (whole,) = alone
    theirs, their_losses, read = together(work, count)
    assert theirs == tokens
    np.testing.assert_allclose(their_losses, losses, rtol=1e-5)
    share = MESHES[count][1] * MESHES[count][2]
    assert max(read) < 1.1 * whole / share  # everything except arrays that no axis splits


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("task", ["generating", "training"])
def test_when_one_dies_the_others_say_so_and_end(work, tmp_path, task, victim):
    processes = start(work, tmp_path / "run", 10**5 if task == "training" else 0, 2)
    file = tmp_path / "run" / run.METRICS
    if task == "generating":
        answers = 0
        while answers < 2:
            line = processes[0].stdout.readline()
            assert line, "it ended by itself"
            answers += line.startswith("{")  # Gloo prints lines too
    else:
        while not (file.exists() and file.read_text().count("\n") > 1) and all(p.poll() is None for p in processes):
            time.sleep(0.05)
    processes[victim].send_signal(signal.SIGKILL)
    other, start_of_end = processes[1 - victim], time.monotonic()
    _, error = other.communicate(timeout=90)
    assert time.monotonic() - start_of_end < 60
    processes[victim].communicate()
    # Our sentence, or that of jax, whose service may be the first to notice.
    assert other.returncode not in (0, 2)
    assert "another process has ended or cannot be reached" in error or "another task died" in error, error[-2000:]
