"""Object stores: what is refused before any work, and everything on emulators of S3 and GCS on this machine."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.memory import MemoryFileSystem
from make_tiny import make_tiny
from PIL import Image

import qwenvl_jax
from qwenvl_jax import cli, stores
from qwenvl_jax.errors import CheckpointError, InputError, MediaError, install
from qwenvl_jax.inputs.budget import Budget
from qwenvl_jax.inputs.fetch import path_or_bytes
from qwenvl_jax.inputs.media import load_image
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.inputs.source import open_records
from qwenvl_jax.train.mirror import open_mirror
from qwenvl_jax.train.run import read_metrics

emulated = [
    pytest.mark.stores,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning"),  # gcsfs, to aiohttp
]


@pytest.mark.parametrize(
    "given, url",
    [
        ("gs://a/b", "gs://a/b"),
        ("S3://a/b/c/", "s3://a/b/c"),
        (Path("gs://a/b"), "gs://a/b"),  # a Path has one slash
        ("gs://a", "gs://a"),
        ("a/b", None),
        ("/gs/a", None),
        ("C:/x", None),
        ("Qwen/Qwen2-VL-2B-Instruct@main", None),
        ("gs", None),
    ],
)
def test_urls(given, url):
    assert stores.as_url(given) == url


@pytest.mark.parametrize("scheme", ["gcs", "s3a", "az", "abfs", "hdfs", "hf", "file", "https", "r2"])
@pytest.mark.parametrize("verb", ["train", "convert", "generate", "info", "plan"])
def test_other_stores_are_refused_before_any_work(scheme, verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    url = f"{scheme}://bucket/x"
    argv = {
        "train": ["--model", "demo", "--data", "d.jsonl", "--output", url],
        "convert": ["demo", url, "--to", "orbax"],
        "generate": ["--model", url, "--prompt", "?"],
        "info": [url],
        "plan": ["--model", url, "--target", "h100"],
    }[verb]
    assert cli.main([verb, *argv]) == 2
    assert f"{url}: {scheme}:// is not supported here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["gs://", "s3:///", "gs://a//b", "s3://a/../b", "gs://a/./b"])
def test_bad_urls(url):
    with pytest.raises(InputError, match="not the URL of an object; it must have the form"):
        stores.as_url(url)


@pytest.mark.parametrize("url, library", [("gs://bucket/x", "gcsfs"), ("s3://bucket/x", "s3fs")])
def test_a_missing_library_is_named_before_any_work(url, library, tmp_path, monkeypatch, capsys):
    for module in (library, f"{library}.core"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    sentence = f"needs {library}: {install('stores')}"
    for argv in (
        ["train", "--model", "demo", "--data", "d.jsonl", "--output", url],
        ["convert", "demo", url, "--to", "orbax"],
        ["generate", "--model", url, "--prompt", "?"],
        ["eval", url],
    ):
        assert cli.main(argv) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(MediaError, match="needs"):
        load_image(url)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_several_processes_need_a_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    argv = ["train", "--model", "demo", "--data", "d.jsonl", "--output", "gs://bucket/run", "--distributed"]
    assert cli.main(argv) == 2
    assert "gs://bucket/run: several processes need a directory that all of them see" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class Folder:
    """A local folder with the calls of a store's file system that this package makes."""

    def __init__(self, root: Path):
        self.root = root

    def at(self, url: str) -> Path:
        return self.root / url.partition("://")[2]

    def find(self, url, detail):
        files = [self.at(url)] if self.at(url).is_file() else [f for f in self.at(url).rglob("*") if f.is_file()]
        stats = {f.relative_to(self.root).as_posix(): f.stat() for f in files}
        return {name: {"size": s.st_size, "type": "file", "etag": str(s.st_mtime_ns)} for name, s in stats.items()}

    def get_file(self, url, local, callback=None):
        shutil.copyfile(self.at(url), local)

    def put_file(self, local, url, callback=None):
        self.pipe_file(url, Path(local).read_bytes())

    def pipe_file(self, url, data):
        self.at(url).parent.mkdir(parents=True, exist_ok=True)
        self.at(url).write_bytes(data)

    def rm_file(self, url):
        self.at(url).unlink()

    def rm(self, urls):
        for url in urls:
            self.rm_file(url)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = Folder(tmp_path / "store")
    monkeypatch.setattr(stores, "filesystem", lambda url: store)
    monkeypatch.setattr(stores, "read", lambda url, *_: store.at(url).read_bytes())
    return store


def test_records_of_a_store_are_named_by_their_url(folder, tmp_path, capsys):
    for name, text in {"d.jsonl": '{"a": 1}\n{', "d.json": '[{"a": 1}, 2]', "d.gz": "\x1f"}.items():
        folder.pipe_file(f"gs://bucket/{name}", text.encode() + b"\x8b" * (name == "d.gz"))
    for name, where in (("d.jsonl", "d.jsonl:2"), ("d.json", "d.json[1]")):
        assert open_records(f"gs://bucket/{name}").where(1) == f"gs://bucket/{where}"
    with pytest.raises(InputError, match=r"^gs://bucket/d.gz: is compressed \(gzip\)"):
        open_records("gs://bucket/d.gz")
    assert cli.main(["eval", "gs://bucket/d.jsonl"]) == 2
    assert "gs://bucket/d.jsonl:1: " in capsys.readouterr().err


def test_errors_of_a_run_name_its_url(folder, tmp_path, monkeypatch, capsys):
    """Not the local copy, which is gone when the error is read."""
    url, data = "gs://bucket/run", tmp_path / "d.jsonl"
    data.write_text(json.dumps({"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]}))
    sizes = "--rows 1 --tokens 64 --lanes 1 --patches 64 --lora-rank 2".split()
    argv = ["train", "--model", "demo", "--data", str(data), "--output", url, *sizes]

    def error(*more):
        assert cli.main([*argv, *more]) == 2
        said = capsys.readouterr().err
        assert str(tmp_path / "cache") not in said.partition(" (its local copy")[0]
        return said

    assert cli.main([*argv, "--steps", "1"]) == 0
    assert f"{url}: a run with other options (seed was 0 and is 1" in error("--steps", "1", "--seed", "1")
    folder.rm_file(f"{url}/final/config.json")  # as if it had never ended
    folder.pipe_file(f"{url}/train.toml", b"nonsense = 1")
    assert f"{url}/train.toml: unknown option nonsense" in error("--steps", "1")
    folder.rm_file(f"{url}/train.toml")
    assert f"{url}: holds checkpoints but no train.toml" in error("--steps", "1")

    waits, wait = [], ocp.CheckpointManager.wait_until_finished

    def full(self):
        waits.append(self)
        if len(waits) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        wait(self)

    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", full)
    argv[argv.index(url)] = url = "gs://bucket/other"
    said = error("--steps", "1")
    assert f"{url}: the disk is full; free some space" in said and f"its local copy is in {stores.cache()}" in said


def test_what_is_written_locally_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written = {"eval": ["d.jsonl", "--output", "gs://a/b"], "plot": ["run", "-o", "s3://a/b.png"]}
    for verb, argv in (written | {"data": ["d.jsonl", "-o", "gs://a/b.png"]}).items():
        assert cli.main([verb, *argv]) == 2
        assert "is written to a local file only" in capsys.readouterr().err
        assert cli.main([verb, *argv[:-1], "nowhere/b"]) == 2
        assert "--output nowhere/b: there is no directory nowhere" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, patterns, matched",
    [
        ("config.json", ("*.json",), True),
        ("checkpoint-5/config.json", ("*.json",), False),
        ("params/d/0", ("params/**",), True),
        ("params", ("params/**",), False),
        ("a/b", ("**",), True),
    ],
)
def test_patterns(name, patterns, matched):
    assert stores.matches(name, patterns) == matched


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """The filesystem of s3:// in memory: everything but a store's own library."""

    class Memory(MemoryFileSystem):
        cachable, store, pseudo_dirs = False, {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("s3://").strip("/")

        def find(self, path, **how):
            return {key.lstrip("/"): info for key, info in super().find(path, **how).items()}

    fs = AsyncFileSystemWrapper(Memory())
    monkeypatch.setattr(stores, "filesystem", lambda url: fs)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fs


def test_a_picture_is_read_within_its_limits(memory, monkeypatch):
    """Its size is taken from media_bytes before it is read, and all requests share one time limit."""
    url, asked = "s3://bucket/a.png", []
    memory.pipe_file(url, bytes(2 << 20))
    content, info = memory._cat_file, memory._info

    async def slow_info(*args, **how):
        await asyncio.sleep(0.2)
        return await info(*args, **how)

    monkeypatch.setattr(memory, "_cat_file", lambda *args, **how: asked.append(args) or content(*args, **how))
    assert len(path_or_bytes(url, 4 << 20)) == 2 << 20 and len(asked) == 1
    with pytest.raises(MediaError, match=r"a\.png: .* larger than 1 MiB; .* raise media_bytes"):
        path_or_bytes(url, 4 << 20, Budget(MediaOptions(media_bytes=1)))
    monkeypatch.setattr(memory, "_info", slow_info)
    with pytest.raises(InputError, match="no answer in time"):
        stores.read(url, 4 << 20, 0.1)
    assert len(asked) == 1


def stored(url: str, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        stores.write(f"{url}/{name}", text)


def test_a_result_whose_upload_was_interrupted_is_written_anew(memory):
    url = "s3://bucket/run"
    step = {"checkpoints/2/state/a": "", "checkpoints/2/commit_success.txt": "", "checkpoints/4/old": ""}
    stored(url, step | {"metrics.jsonl": "{}", "final/old": "", "final/sub/old": "", "tensorboard/events": ""})
    with contextlib.closing(open_mirror(url)) as mirror:
        assert stores.files_in(mirror.path) == ["checkpoints/2/state/a", "metrics.jsonl"]
        for name in ("checkpoints/4/new", "final/config.json", "final/new"):
            (mirror.path / name).parent.mkdir(exist_ok=True)
            (mirror.path / name).write_text("new")
        mirror.push()
    names = sorted(name for name in stores.listing(url) if "/" in name)
    whole = ["checkpoints/2/commit_success.txt", "checkpoints/2/state/a", "checkpoints/4/commit_success.txt"]
    assert names == [*whole, "checkpoints/4/new", "final/config.json", "final/new", "tensorboard/events"]
    with contextlib.closing(open_mirror(url)) as mirror:
        assert "final/config.json" in stores.files_in(mirror.path)


def test_a_result_is_renamed_over_an_interrupted_renaming(memory):
    url = "s3://bucket/run"
    stored(url, {"final/config.json": "", "final/w": "", "final-3/old": ""})
    with contextlib.closing(open_mirror(url)) as mirror:
        assert stores.files_in(mirror.path) == ["final/config.json"]
        mirror.rename(mirror.path / "final", mirror.path / "final-3")
        mirror.push()
    assert sorted(stores.listing(url)) == ["final-3/config.json", "final-3/w", "owner.txt"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request, tmp_path_factory):
    """The URL of an empty bucket of an emulator, which is stopped at the end."""
    scheme, port = request.param, free_port()
    pytest.importorskip(stores.LIBRARIES[scheme])
    name = {"gs": "gcp_storage_emulator", "s3": "moto"}[scheme]
    pytest.importorskip(name)
    argv = {
        "gs": ["start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=bucket"],
        "s3": ["-H", "127.0.0.1", "-p", str(port)],
    }[scheme]
    log = tmp_path_factory.mktemp("emulator") / "log"
    with pytest.MonkeyPatch.context() as patch, log.open("wb") as out:
        module = name if scheme == "gs" else "moto.server"
        server = subprocess.Popen([sys.executable, "-m", module, *argv], stdout=out, stderr=out)
        try:
            url = f"http://127.0.0.1:{port}"
            values = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
            values |= {"AWS_ENDPOINT_URL" if scheme == "s3" else "STORAGE_EMULATOR_HOST": url, "NO_PROXY": "127.0.0.1"}
            values |= {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
            for key, value in values.items():
                patch.setenv(key, value)
            for _ in range(300):
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            if scheme == "s3":
                stores.filesystem("s3://bucket").mkdir("bucket")
            yield f"{scheme}://bucket"
        finally:
            server.terminate()
            server.wait(30)


def put(folder: Path, url: str) -> None:
    stores.upload(folder, url, stores.files_in(folder))


class TestStores:
    pytestmark = emulated

    def test_copies(self, bucket, tmp_path):
        url = f"{bucket}/copies"
        for name, body in {"a.json": b"{}", "e": b"", "sub/x ü%.bin": b"12345", "config.json": b"{}"}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(body)
        put(tmp_path, url)
        small = stores.local_copy(url, ("*.json",))
        assert stores.files_in(small) == ["a.json", "config.json"]
        assert stores.local_copy(url) == small and stores.files_in(small) == stores.files_in(tmp_path)
        assert (small / "sub/x ü%.bin").read_bytes() == b"12345" and (small / "e").read_bytes() == b""
        assert stores.local_copy(f"{url}/a.json").read_bytes() == b"{}"
        stores.write(f"{url}/a.json", "[]")
        assert (stores.local_copy(url, ("*.json",)) / "a.json").read_text() == "[]"  # not the old copy
        assert (small / "a.json").read_text() == "{}"
        with pytest.raises(InputError, match="larger than 0 MiB"):
            stores.read(f"{url}/sub/x ü%.bin", 4, 10)
        stores.remove(url)
        assert stores.listing(url) == {}

    @pytest.mark.parametrize("name", ["none", "none/below"])
    def test_what_is_missing_is_named(self, bucket, name, tmp_path):
        url, no_bucket = f"{bucket}/{name}", f"{bucket}x/{name}"
        for action in (stores.local_copy, qwenvl_jax.load, read_metrics, load_image):
            with pytest.raises(InputError, match=f"{url}.*: no such object"):
                action(url)
        with pytest.raises(InputError, match="no such object"):
            stores.local_copy(no_bucket)
        with pytest.raises(InputError, match=r"no such object or bucket|cannot be written"):
            open_mirror(no_bucket)
        assert not list((stores.cache() / "runs").rglob(name.partition("/")[2] or name))

    def test_a_download_needs_room_and_leaves_no_half_files(self, bucket, tmp_path, monkeypatch):
        url = f"{bucket}/room"
        (tmp_path / "a").write_bytes(b"abc")
        (tmp_path / "b").write_bytes(b"abc")
        put(tmp_path, url)
        with monkeypatch.context() as patch:
            patch.setattr(stores.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5}))
            with pytest.raises(InputError, match=r"no space for its copy; 0\.07 GB are needed"):
                stores.local_copy(url)
        fs = stores.filesystem(url)
        real = fs.get_file
        with monkeypatch.context() as patch:

            def broken(there, here, **how):
                real(there, here, **how)
                if there.endswith("/b"):
                    Path(here).write_bytes(b"a")
                    raise KeyboardInterrupt

            patch.setattr(fs, "get_file", broken)
            with pytest.raises(KeyboardInterrupt):
                stores.local_copy(url)
        local = stores.local_copy(url)
        assert stores.files_in(local) == ["a", "b"] and (local / "b").read_bytes() == b"abc"

    def test_a_new_directory_is_whole_or_has_no_config(self, bucket, monkeypatch):
        url = f"{bucket}/new/model"
        with pytest.raises(KeyError), stores.new_directory(url) as path:
            path.mkdir()
            raise KeyError
        assert stores.listing(url) == {}
        order = []
        fs = stores.filesystem(url)
        real = fs.put_file
        monkeypatch.setattr(fs, "put_file", lambda a, b, **how: (order.append(b), real(a, b, **how)))
        with stores.new_directory(url) as path:
            path.mkdir()
            for name in ("config.json", "a", "z"):
                (path / name).write_text(name)
        assert order[-1] == f"{url}/config.json" and len(order) == 3
        with pytest.raises(InputError, match="not empty; choose another name"), stores.new_directory(url):
            pass
        assert not list((stores.cache() / "new").iterdir())

    def test_of_two_processes_the_later_one_goes_on(self, bucket, monkeypatch):
        url = f"{bucket}/owned"
        first = open_mirror(url)
        first.push()
        monkeypatch.setenv("XDG_CACHE_HOME", f"{stores.cache()}-other")  # another machine
        code = f"from qwenvl_jax.train.mirror import open_mirror as o\nm = o({url!r})\nm.push()\nm.close()"
        subprocess.run([sys.executable, "-c", code], check=True)
        with pytest.raises(InputError, match="another process has taken over this run"):
            first.push()
        first.close()
        assert not first.path.exists()

    def test_an_unfinished_checkpoint_does_not_count(self, bucket, tmp_path):
        url = f"{bucket}/unfinished"
        for name in ("checkpoints/2/state/a", "checkpoints/4/state/a", "metrics.jsonl", "final/config.json", "final/w"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}\n")
        put(tmp_path, url)
        stores.write(f"{url}/checkpoints/2/commit_success.txt", "")
        mirror = open_mirror(url)
        assert stores.files_in(mirror.path) == ["checkpoints/2/state/a", "final/config.json", "metrics.jsonl"]
        shutil.rmtree(mirror.path / "checkpoints/2")
        (mirror.path / "checkpoints/6").mkdir()
        (mirror.path / "checkpoints/6/a").write_text("x")
        mirror.push()
        mirror.close()
        names = stores.listing(url)
        assert "checkpoints/6/commit_success.txt" in names and "final/w" in names
        assert not any(name.startswith("checkpoints/2/") for name in names)

    def test_a_result_gets_another_name(self, bucket, tmp_path):
        url = f"{bucket}/renamed"
        (tmp_path / "final").mkdir()
        for name in ("final/config.json", "final/w"):
            (tmp_path / name).write_text("old")
        put(tmp_path, url)
        mirror = open_mirror(url)
        mirror.rename(mirror.path / "final", mirror.path / "final-3")
        (mirror.path / "final").mkdir()
        for name in ("final/config.json", "final/w"):
            (mirror.path / name).write_text("new")
        mirror.push()
        mirror.close()
        names = ["final-3/config.json", "final-3/w", "final/config.json", "final/w"]
        assert sorted(stores.listing(url)) == [*names, "owner.txt"]
        assert [stores.read(f"{url}/{name}", 10, 10) for name in names] == [b"old", b"old", b"new", b"new"]

    def test_train_killed_resumed_converted_evaluated(self, bucket, tmp_path, capsys):
        """The losses are those of a local run without a stop, and nothing is left on the local disk."""
        make_tiny(tmp_path / "model")
        data = tmp_path / "data"
        data.mkdir()
        Image.new("RGB", (56, 56), "red").save(data / "red.png")
        lines = []
        for i in range(5):
            picture = {"type": "image", "image": "red.png"}
            user = {"role": "user", "content": [picture, {"type": "text", "text": f"Colour {i}?"}]}
            lines.append({"messages": [user, {"role": "assistant", "content": "red"}]})
        (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for name in ("model", "data"):
            put(tmp_path / name, f"{bucket}/{name}")

        def argv(root: str) -> list[str]:
            where = ["--model", f"{root}/model", "--data", f"{root}/data/train.jsonl", "--output", f"{root}/run"]
            sizes = "--rows 1 --tokens 64 --lanes 1 --patches 64 --steps 6 --save-every 2 --learning-rate 0.001"
            return ["train", *where, *sizes.split(), "--keep", "1", "--lora-rank", "4"]

        assert cli.main(argv(str(tmp_path))) == 0
        code = (
            "import sys, time\nfrom qwenvl_jax.cli import main\nfrom qwenvl_jax.train.run import Run\nlog = Run.log\n"
            "Run.log = lambda self, step, values: time.sleep(600) if step > 3 else log(self, step, values)\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "machine")}
        process = subprocess.Popen([sys.executable, "-c", code, *argv(bucket)], env=env)
        try:
            for _ in range(6000):
                if "checkpoints/2/commit_success.txt" in stores.listing(f"{bucket}/run"):
                    break
                assert process.poll() is None
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not any(name.startswith("checkpoints/4/") for name in stores.listing(f"{bucket}/run"))
        assert cli.main(argv(bucket)) == 0
        assert f"{bucket}/run/final" in capsys.readouterr().out
        ours, plain = read_metrics(f"{bucket}/run"), read_metrics(tmp_path / "run")
        assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
        assert [line["loss"] for line in ours] == [line["loss"] for line in plain]
        steps = {name.split("/")[1] for name in stores.listing(f"{bucket}/run") if name.startswith("checkpoints/")}
        assert steps == {"6"}
        assert cli.main(argv(bucket)) == 0
        assert f"already finished: {bucket}/run/final" in capsys.readouterr().out
        assert not [p for p in (stores.cache() / "runs").rglob("*") if p.is_file()]

        assert cli.main(["convert", f"{bucket}/run/final", f"{bucket}/hf", "--to", "hf"]) == 0
        assert cli.main(["convert", f"{bucket}/hf", f"{bucket}/orbax", "--to", "orbax"]) == 0
        capsys.readouterr()
        scores = []
        for model in (f"{bucket}/orbax", str(tmp_path / "run" / "final")):
            flags = ["--model", model, "--json", "--max-new-tokens", "2", "--batch", "2"]
            assert cli.main(["eval", f"{bucket}/data/train.jsonl", *flags]) == 0
            scores.append(json.loads(capsys.readouterr().out))
        assert scores[0] == scores[1]
        assert cli.main(["info", f"{bucket}/hf", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["format"] == "hf"
        assert cli.main(["convert", f"{bucket}/hf", f"{bucket}/orbax", "--to", "orbax"]) == 2
        assert "not empty" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match=r"not a checkpoint, there is no config.json"):
            qwenvl_jax.load(f"{bucket}/data")
