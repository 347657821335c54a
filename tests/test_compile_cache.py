"""Compiled programs of earlier runs: who may write where they are kept, and that a second run compiles nothing.

Modes and owners are looked at, never tried, so that these tests say as much when root runs them.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest

from qwenvl_jax import cli
from qwenvl_jax.cli import errors
from qwenvl_jax.errors import InputError
from qwenvl_jax.infer import compile_cache

ELSEWHERE = "Set JAX_COMPILATION_CACHE_DIR to a directory that only you can write to, or JAX_ENABLE_COMPILATION_CACHE=0"
SECONDS = "jax_persistent_cache_min_compile_time_secs"
ANOTHER = 54321  # the id of another user


@pytest.fixture
def home(monkeypatch) -> Path:
    """A home directory below /tmp that other users can enter; otherwise nothing in it would be exposed."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        path = Path(path).resolve()
        path.chmod(0o755)
        monkeypatch.setenv("HOME", str(path))
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        yield path
        for folder, *_ in os.walk(path):
            os.chmod(folder, 0o700)


@pytest.fixture
def undecided(home, monkeypatch):
    """`home`, and jax without a cache directory, as in a user's process."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", SECONDS)
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv(SECONDS.upper(), raising=False)
    for name, value in zip(names, (None, True, 1.0), strict=True):
        jax.config.update(name, value)
    yield home
    for name, value in before.items():
        jax.config.update(name, value)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def made(path: Path, bits: int) -> Path:
    path.mkdir(parents=True)
    path.chmod(bits)
    return path


def refused() -> str:
    with pytest.raises(InputError, match=f"^compiled programs are not cached, because .*{ELSEWHERE}$") as e:
        compile_cache.directory()
    return str(e.value)


# --- the directory --------------------------------------------------------------------------------------


def test_the_directory_is_the_users_own(home):
    before = os.umask(0)
    try:
        path = compile_cache.directory()
    finally:
        os.umask(before)
    assert path == home / ".cache" / "qwenvl_jax"
    assert mode(path) == mode(path.parent) == 0o700
    assert compile_cache.directory() == path


def test_xdg_cache_home(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "a" / "b"))
    assert compile_cache.directory() == home / "a" / "b" / "qwenvl_jax"
    monkeypatch.chdir(home)
    for relative in ("", "here", "~"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert compile_cache.directory() == home / ".cache" / "qwenvl_jax"


@pytest.mark.parametrize("bits", [0o755, 0o750, 0o770, 0o701, 0o720, 0o702, 0o740, 0o777, 0o1777])
def test_a_directory_that_is_open_to_others_is_refused(home, bits):
    path = made(home / ".cache" / "qwenvl_jax", bits)
    assert f"others can open {path} (chmod 700 fixes this" in refused()
    path.chmod(0o700)
    assert compile_cache.directory() == path


@pytest.mark.parametrize("bits", [0o777, 0o775, 0o757])
def test_a_parent_that_others_can_write_to_is_refused(home, bits):
    parent = made(home / ".cache", bits)
    assert f"others can write to {parent} (chmod go-w fixes this)" in refused()
    parent.chmod(0o1777)  # sticky, like /tmp: others cannot rename our files
    assert compile_cache.directory() == parent / "qwenvl_jax"
    parent.chmod(bits)
    refused()
    home.chmod(0o700)  # nobody else can enter it
    assert compile_cache.directory() == parent / "qwenvl_jax"


def test_a_grandparent_that_others_can_write_to_is_refused(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(made(home / "open", 0o777) / "mine" / "cache"))
    assert f"others can write to {home / 'open'}" in refused()


def test_what_belongs_to_someone_else_is_refused(home, monkeypatch):
    compile_cache.directory()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: ANOTHER)
    theirs = home if me else home / ".cache" / "qwenvl_jax"  # root may own the parents, not the last one
    assert f"{theirs} belongs to another user" in refused()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("place", [".cache", ".cache/qwenvl_jax", ".cache/qwenvl_jax/jit_step-cache"])
def test_what_was_given_to_someone_else_is_refused(home, place):
    (compile_cache.directory() / "jit_step-cache").write_bytes(b"code")
    os.chown(home / place, ANOTHER, -1)
    assert f"{home / place} belongs to another user" in refused()
    home.chmod(0o700)  # this does not change the owner
    refused()


def test_links_are_followed_first(home, monkeypatch):
    target, cache = made(home / "scratch", 0o755), made(home / ".cache", 0o700)
    (cache / "qwenvl_jax").symlink_to(target)
    assert f"others can open {target}" in refused()
    target.chmod(0o700)
    assert compile_cache.directory() == target  # not the link, which could be redirected
    made(home / "open", 0o777)
    target.rename(home / "open" / "scratch")
    (cache / "qwenvl_jax").unlink()
    (cache / "qwenvl_jax").symlink_to(home / "open" / "scratch")
    assert f"others can write to {home / 'open'}" in refused()
    (cache / "qwenvl_jax").unlink()
    (cache / "qwenvl_jax").symlink_to(cache / "qwenvl_jax")
    refused()


def test_no_usable_directory(home, monkeypatch):
    (home / ".cache").write_text("a file")
    assert f"{home / '.cache' / 'qwenvl_jax'} cannot be used" in refused()
    monkeypatch.setenv("HOME", "/proc/nobody")
    assert "/proc/nobody/.cache/qwenvl_jax cannot be used (No such file or directory)" in refused()
    monkeypatch.setenv("HOME", "here")
    assert "the user's cache directory cannot be used (HOME is" in refused()


def test_what_was_used_least_recently_is_removed(home, monkeypatch):
    path = compile_cache.directory()
    (path / "autotuned").mkdir()
    for age, name in enumerate(("new-cache", "autotuned/read", "old-cache", "older-cache")):
        (path / name).write_bytes(bytes(100))
        os.utime(path / name, (1e9 - age, 1e9 - 10 * age))
    os.utime(path / "autotuned" / "read", (2e9, 1))  # written first, but read last

    def left():
        return {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()}

    monkeypatch.setattr(compile_cache, "LIMIT", 400)
    compile_cache.directory()
    assert len(left()) == 4
    monkeypatch.setattr(compile_cache, "LIMIT", 250)
    compile_cache.directory()
    assert left() == {"new-cache", "autotuned/read"}


# --- commands and libraries -----------------------------------------------------------------------------


def test_a_command_caches_everything(undecided, capsys):
    errors.enable_compile_cache()
    assert jax.config.jax_compilation_cache_dir == str(undecided / ".cache" / "qwenvl_jax")
    assert getattr(jax.config, SECONDS) == 0
    assert capsys.readouterr() == ("", "")


def test_a_command_goes_on_without(undecided, capsys):
    made(undecided / ".cache" / "qwenvl_jax", 0o755)
    errors.enable_compile_cache()
    assert jax.config.jax_compilation_cache_dir is None
    out, err = capsys.readouterr()
    assert not out and err.startswith("qwenvl: compiled programs are not cached, because others can open ")
    assert err.count("\n") == 1


def test_the_environment_wins(undecided, monkeypatch, tmp_path):
    made(undecided / ".cache", 0o777)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))  # as jax does at import if the variable is set
    monkeypatch.setenv(SECONDS.upper(), "1.0")
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path) and getattr(jax.config, SECONDS) == 1.0
    assert not list((undecided / ".cache").iterdir())


def test_the_switch(undecided):
    jax.config.update("jax_enable_compilation_cache", False)  # as JAX_ENABLE_COMPILATION_CACHE=0 does
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None and not (undecided / ".cache").exists()


def test_a_warmup_caches_everything_meanwhile(undecided):
    with compile_cache.enabled():
        assert jax.config.jax_compilation_cache_dir == str(undecided / ".cache" / "qwenvl_jax")
        assert getattr(jax.config, SECONDS) == 0
    assert getattr(jax.config, SECONDS) == 1.0


def test_a_warm_up_warns(undecided):
    made(undecided / ".cache" / "qwenvl_jax", 0o755)
    with pytest.warns(UserWarning, match="^compiled programs are not cached, because others can open"):
        with compile_cache.enabled():
            assert getattr(jax.config, SECONDS) == 1.0
    assert jax.config.jax_compilation_cache_dir is None


# --- whole commands -------------------------------------------------------------------------------------

COUNTED = """
import sys
from qwenvl_jax.cli import converse, main
counts = dict.fromkeys(("compile_requests_use_cache", "cache_hits", "cache_misses"), 0)
def count(event, **_):
    name = event.rpartition("/")[2]
    if name in counts:
        counts[name] += 1
def counted(*args, engine=converse.engine):
    import jax
    jax.monitoring.register_event_listener(count)
    return engine(*args)
converse.engine = counted
code = main(["generate", "--image", "demo:scene.png", "--prompt", "How many strawberries are there?"])
print(*counts.values())
sys.exit(code)
"""


def ask(home: Path, **env) -> tuple[str, tuple[int, int, int], str]:
    """Asks the demo in a new process: (answer, (programs, found in the cache, written), stderr)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    kept |= {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | env
    run = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, env=kept)
    assert run.returncode == 0, run.stderr
    answer, counts = run.stdout.splitlines()
    # The compilers of the plan extra print warnings whenever jax is imported.
    said = [line for line in run.stderr.splitlines(True) if not re.search("cudart_stub|absl::InitializeLog", line)]
    return answer, tuple(map(int, counts.split())), "".join(said)


@pytest.mark.slow
def test_a_second_run_compiles_nothing(home):
    path = home / ".cache" / "qwenvl_jax"
    answer, (programs, found, written), err = ask(home)
    assert (answer, found, err) == ("3", 0, "") and programs == written > 0
    assert len(list(path.iterdir())) == programs and mode(path) == 0o700
    assert ask(home) == ("3", (programs, programs, 0), "")
    # A damaged entry, after a killed process or on a full disk, is compiled again.
    for i, file in enumerate(sorted(path.iterdir())):
        file.write_bytes((b"", file.read_bytes()[: file.stat().st_size // 2], os.urandom(5000))[i % 3])
    answer, (_, found, _), err = ask(home)
    assert (answer, found, err) == ("3", 0, "")


@pytest.mark.slow
def test_runs_without_a_cache(home, tmp_path):
    path = made(home / ".cache" / "qwenvl_jax", 0o755)
    answer, (_, found, written), err = ask(home)
    assert (answer, found, written) == ("3", 0, 0) and not list(path.iterdir())
    assert err.startswith(f"qwenvl: compiled programs are not cached, because others can open {path} (")
    assert err.endswith(f"{ELSEWHERE}\n") and err.count("\n") == 1
    answer, (programs, _, written), err = ask(home, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "named"))
    assert (answer, written, err) == ("3", programs, "") and len(list((tmp_path / "named").iterdir())) == programs
    answer, (_, _, written), err = ask(home, JAX_ENABLE_COMPILATION_CACHE="0")
    assert (answer, written, err) == ("3", 0, "") and not list(path.iterdir())


def test_a_library_changes_nothing_by_itself(home):
    code = (
        "import jax, qwenvl_jax; engine = qwenvl_jax.Engine(qwenvl_jax.load('demo')); "
        "engine.generate([[{'role': 'user', 'content': 'Hi'}]], max_new_tokens=1); "
        f"assert jax.config.jax_compilation_cache_dir is None and jax.config.{SECONDS} == 1.0"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    subprocess.run([sys.executable, "-c", code], check=True, env=kept | {"HOME": str(home), "JAX_PLATFORMS": "cpu"})
    assert not list(home.iterdir())


@pytest.mark.parametrize("verb", ["generate", "chat", "train", "eval", "verify"])
def test_help_says_where_and_how_to_turn_it_off(verb, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "~/.cache/qwenvl_jax" in text and "JAX_COMPILATION_CACHE_DIR=DIR" in text
    assert "JAX_ENABLE_COMPILATION_CACHE=0" in text
