"""The import law: which module may see which, read from the syntax trees so that nothing need be imported.

`types, errors, options, stores, config` <- `sharding`, `families`, `answers` <- `inputs`, `model` <- `params` <-
`convert` <- `infer`, `train` <- `eval`, `serve`, `plan` <- `cli`. `agents` is above `inputs` and `answers`, and takes a
model as a callable. `inputs`, `answers`, `agents`, `families`: no jax. `infer` and `train` never meet. `inputs` sees
`answers`, since boxes in texts of records are converted where the pictures are resized.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {"types", "errors", "options", "config", "stores"}
MAY_SEE = {
    "types": set(),
    "errors": set(),
    "options": {"errors"},
    "stores": {"errors"},
    "config": {"types", "errors"},
    "families": BASE,
    "inputs": BASE | {"families", "answers"},
    "answers": BASE,
    "sharding": BASE,
    "model": BASE | {"sharding"},
    "params": BASE | {"families", "sharding", "model", "inputs"},
    "convert": BASE | {"families", "sharding", "model", "inputs", "params"},
    "distributed": BASE,
    "infer": BASE | {"families", "answers", "sharding", "model", "params", "convert", "inputs"},
    "agents": BASE | {"families", "answers", "inputs"},
    "train": BASE | {"answers", "sharding", "distributed", "model", "params", "convert", "inputs"},
    "eval": BASE | {"answers", "sharding", "model", "params", "inputs", "infer"},
    "serve": BASE | {"answers", "sharding", "model", "params", "inputs", "infer"},
    "plan": BASE | {"families", "sharding", "model", "params", "inputs", "infer", "train"},
    "demo": set(),
    "cli": None,  # everything
}


def modules():
    for folder, package in ((ROOT / "qwenvl_jax", "qwenvl_jax"), (ROOT / "convert", "qwenvl_convert")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), path


MODULES = dict(modules())


def imports(path: Path, module: str):
    """Yields (imported module, is it at the top of the file) for every import in the file."""
    tree = ast.parse(path.read_text("utf-8"))
    inner = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node not in inner
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            for name in node.names:
                # `from package import module` names a module, `from module import name` does not.
                full = f"{node.module}.{name.name}"
                yield (full if full in MODULES else node.module), node not in inner


def layer(module: str) -> str:
    if module.startswith("qwenvl_convert"):
        return "convert"
    return module.split(".")[1] if "." in module else ""


def is_load(module: str, name: str) -> bool:
    """Whether this is an import of `load`, which reaches the files of other projects."""
    return module == "qwenvl_jax.params.checkpoint" and name.startswith("qwenvl_convert.")


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_law(module):
    mine = layer(module)
    for name, top in imports(MODULES[module], module):
        root = name.split(".")[0]
        if root in ("jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers"):
            light = ("inputs", "answers", "agents", "families", "config", "types", "errors", "options", "stores", "")
            assert mine not in light, f"{module} imports {name}"
        if root == "flax":
            assert mine == "model", f"{module} imports {name}"
        if root in ("torch", "transformers"):
            assert module == "qwenvl_convert.parity" and not top, f"{module} imports {name}"
        if root in ("qwenvl_jax", "qwenvl_convert") and mine:
            allowed = MAY_SEE[mine]
            late = is_load(module, name) and not top
            assert late or allowed is None or layer(name) in allowed | {mine}, f"{module} imports {name}"


def test_no_circles():
    """Late imports count too, except those of `load`."""
    graph: dict[str, set[str]] = {}
    for module in filter(layer, MODULES):
        found = {name for name, top in imports(MODULES[module], module) if top or not is_load(module, name)}
        graph[module] = found.intersection(MODULES) - {module}
    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_catch_all_module():
    assert not [p for p in MODULES.values() if p.stem in ("utils", "helpers", "common", "misc")]


HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "PIL"}


def imported(*argv: str) -> tuple[int, set[str]]:
    """The exit code of a command, and which packages it imported, and "answers" for the readers of answers."""
    code = (
        "import sys\nfrom qwenvl_jax.cli import main\ntry:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as e:\n    code = e.code\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "names |= {'answers'} if 'qwenvl_jax.answers' in sys.modules else set()\n"
        "print(*names, file=sys.stderr)\nsys.exit(code)"
    )
    out = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in out.stderr
    return out.returncode, set(out.stderr.splitlines()[-1].split())


def test_the_package_is_light():
    code = "import sys, qwenvl_jax; print({name.partition('.')[0] for name in sys.modules} & " + f"{HEAVY})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "set()"


VERBS = [
    "",
    "generate",
    "chat",
    "data",
    "train",
    "eval",
    "plot",
    "convert",
    "merge",
    "quantize",
    "plan",
    "info",
    "verify",
]


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_light(verb):
    code, packages = imported(*verb.split(), "--help")
    assert code == 0 and "argparse" in packages and not (HEAVY | {"answers"}) & packages


def test_every_verb_is_asked_for_help():
    from qwenvl_jax import cli

    (mark,) = (m for m in test_help_is_light.pytestmark if m.name == "parametrize")
    assert set(mark.args[1]) == {"", *cli.VERBS}


@pytest.mark.parametrize("form", ["preset", "demo", "hf", "orbax", "missing"])
def test_info_needs_no_jax(form, tmp_path):
    names = {"preset": "qwen2.5-vl-7b", "demo": "demo", "hf": str(ROOT / "qwenvl_jax/demo/checkpoint")}
    if form == "orbax":
        from qwenvl_jax import load
        from qwenvl_jax.params import checkpoint

        checkpoint.save(load("demo"), tmp_path / "orbax")
    code, packages = imported("info", names.get(form, str(tmp_path / form)))
    assert code == (2 if form == "missing" else 0)
    assert "argparse" in packages and not packages & (HEAVY - {"numpy"})


@pytest.mark.parametrize("bad", ["--image nowhere.png", "--temperature -1", "--model nowhere"])
def test_bad_input_is_told_before_jax_is_imported(bad):
    code, packages = imported("generate", "--prompt", "?", *bad.split())
    assert code == 2 and not packages & {"jax", "flax", "orbax"}


def test_public_names():
    import qwenvl_jax

    for name in qwenvl_jax.__all__:
        assert getattr(qwenvl_jax, name) is not None
    assert set(qwenvl_jax.__all__) <= set(dir(qwenvl_jax))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qwenvl_jax.no_such_name
