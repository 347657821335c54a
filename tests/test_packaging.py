"""Promises outside the code: the README's tree and commands, and the content of a wheel."""

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PHOTO = ROOT / "tests/data/media/coffee.jpg"


def tree():
    """The paths of the README's annotated tree."""
    block = re.search(r"## The tree\n\n```\n(.*?)```", README, re.S).group(1)
    paths, folders = [], []
    for line in block.splitlines():
        name, _, note = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        assert note.strip(), f"{name} has no description"
        folders = folders[:depth]
        paths.append("".join((*folders, name)))
        if name.endswith("/"):
            folders.append(name)
    return paths


def code_files():
    """All modules except empty `__init__.py` files."""
    files = (p for folder in ("qwenvl_jax", "convert") for p in (ROOT / folder).rglob("*.py"))
    return {str(p.relative_to(ROOT)) for p in files if p.stat().st_size}


@pytest.mark.parametrize("path", tree())
def test_the_tree_names_what_exists(path):
    assert (ROOT / path).exists()
    assert (ROOT / path).is_dir() == path.endswith("/")


READMES = sorted(
    p for folder in ("", "qwenvl_jax/*/", "convert/", "benchmarks/") for p in ROOT.glob(f"{folder}README.md")
)


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    for link in re.findall(r"\]\(([^):]+)\)", path.read_text("utf-8")):
        name, _, heading = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.M) if heading else ()
        slugs = [re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", "-") for text in headings]
        assert not heading or heading in slugs, link


@pytest.mark.parametrize("tiny_checkpoint", ["qwen2_5_vl"], indirect=True)
@pytest.mark.slow
def test_the_python_of_the_readmes_runs(tiny_checkpoint, tmp_path, capsys, caplog):
    """The code as written, with another model and picture, and options for a short answer."""
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name, key, value in (("generation", "max_new_tokens", 8), ("preprocessor", "max_pixels", 50176)):
        name = f"{name}_config.json"
        settings = json.loads((tmp_path / name).read_text()) | {key: value}
        (tmp_path / name).unlink()
        (tmp_path / name).write_text(json.dumps(settings))
    names = {}
    for file in ("README.md", "qwenvl_jax/infer/README.md"):
        code = re.search(r"^```python\n(.*?)^```$", (ROOT / file).read_text("utf-8"), re.M | re.S).group(1)
        for given, here in (("Qwen/Qwen2.5-VL-3B-Instruct", tmp_path), ("photo.jpg", PHOTO)):
            assert code.count(given) == 1
            code = code.replace(given, str(here)).replace("max_new_tokens=64", "max_new_tokens=8")
        exec(code, names)
        out = capsys.readouterr().out
        assert out
    assert len(names["results"]) == 2 and 1 <= len(names["results"][1].token_ids) <= 8
    assert len(names["small"].visuals) == 1
    assert names["results"][1].finish_reason in out
    assert len(caplog.messages) == 2 and all("bfloat16 weights are cast to float32" in m for m in caplog.messages)


@pytest.mark.parametrize("name", ["run", "test"])
def test_ci_runs_the_readme(name):
    """.ci/run takes its commands from the blocks that carry these marks."""
    assert len(re.findall(rf"^<!-- ci: {name} -->\n```bash\n[^`]+```$", README, re.M)) == 1
    assert f" readme {name}\n" in (ROOT / ".ci" / "run").read_text()


def test_wheel_and_sdist(tmp_path):
    """Both have every module, the licence and the two commands; the wheel has no tests and no scripts of the demo."""
    source = tmp_path / "source"
    source.mkdir()
    tracked = ["pyproject.toml", "README.md", "LICENSE", "qwenvl_jax/py.typed", "convert/py.typed", *code_files()]
    tracked += [f"{p.relative_to(ROOT)}" for p in (ROOT / "qwenvl_jax").rglob("__init__.py")]
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "convert" / "__init__.py").touch()
    data = {f"qwenvl_jax/demo/{name}" for name in ("checkpoint/model.safetensors", "samples/scene.png")}
    for name in data:
        (source / name).parent.mkdir()
        (source / name).touch()
    code = f"from setuptools import build_meta as b; b.build_sdist({str(tmp_path)!r}); b.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        entry_points = z.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    expected = {re.sub("^convert/", "qwenvl_convert/", n) for n in code_files()}
    assert expected | data | {"qwenvl_jax/py.typed", "qwenvl_convert/py.typed"} <= names
    demo = {n for n in names if n.startswith("qwenvl_jax/demo/")}
    assert {n for n in demo if n.endswith(".py")} == {"qwenvl_jax/demo/__init__.py"}
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"qwenvl_jax", "qwenvl_convert"}
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert "qwenvl = qwenvl_jax.cli:main\nqwenvl-convert = qwenvl_jax.cli:convert_main" in entry_points
    assert "[lmms_eval.models]\nqwenvl_jax = qwenvl_jax.eval.lmms:manifest" in entry_points

    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as t:
        inside = {n.split("/", 1)[1] for n in t.getnames() if "/" in n}
    assert {*code_files(), *data, "pyproject.toml", "README.md", "LICENSE"} <= inside

    # The installed wheel runs without this checkout on the path.
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    check = (
        "import sys; sys.path.insert(0, sys.argv[1]); import qwenvl_jax, qwenvl_convert; "
        "from qwenvl_jax.cli import main; "
        "assert all(m.__file__.startswith(sys.argv[1]) for m in (qwenvl_jax, qwenvl_convert)); main(['--help'])"
    )
    out = subprocess.run(
        [sys.executable, "-I", "-c", check, str(target)], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "generate" in out.stdout


SCRIPTS = ("conversion.py", "preprocessing.py", "training.py", "model.py", "__main__.py")


HELP = """
import runpy, sys
sys.path[0], scripts = "benchmarks", sys.argv[1:]
for script in scripts:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        assert not e.code
"""


@pytest.mark.parity
def test_benchmarks_start():
    """In one process, which imports torch, transformers and PEFT once."""
    command = [sys.executable, "-c", HELP, *(f"benchmarks/{script}" for script in SCRIPTS)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.findall(r"^usage: (\S+)", run.stdout, re.M) == list(SCRIPTS)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("more", "peers"),
    [
        ("--rows 1 2", {"transformers float32"}),
        # Apart, each side runs the same jobs in the same way; `picture` is a prefill and the vision tower.
        (
            "--apart --dtype bfloat16 --jobs decode picture lora",
            {"transformers float32", "transformers bfloat16"},
        ),
    ],
)
def test_the_benchmark_of_the_model_runs(more, peers, tmp_path):
    """The smallest size; the benchmark itself checks that the first tokens of both sides agree."""
    small = "--small --size demo --tokens 64 --patches 64 --picture 64 --new 16 --rounds 1"
    command = f"{sys.executable} benchmarks/model.py {small} {more} --output {tmp_path / 'lines'}"
    run = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    jobs = {line["job"]: line for line in lines if "job" in line}
    *compared, lora = jobs
    picture = "picture of 64 patches to first token"
    every = ["decode", "decode", "prefill", "vision tower", picture]
    assert [job.split(",")[0] for job in compared] == (["decode", picture] if "--jobs" in more else every)
    assert all(jobs[job]["peers"].keys() == peers and jobs[job]["peer"] in peers for job in compared)
    assert "peers" not in jobs[lora] and 0 < jobs[lora]["share"] < 1
    assert all(f"| {job} |" in run.stdout for job in jobs)
    (ceilings,) = (line["ceilings"] for line in lines if "ceilings" in line)
    assert ceilings["read"] > 1e9 and ceilings["product"] > 1e9
    (memory,) = (line["memory"] for line in lines if "memory" in line)
    assert memory.keys() == {"machine", "here"} | peers
