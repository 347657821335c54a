"""Checkpoints of the hub, from a server on this machine: small files first, one commit, no weights for nothing."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from make_tiny import FAMILIES, copy_tokenizer, make_tiny

import qwenvl_jax
from qwenvl_jax import cli
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.params import directory, locate, remote

REPO = "someone/tiny"


class Hub:
    """The files of a repository by commit, its branches, and the paths that were asked for."""

    def __init__(self):
        self.commits, self.branches, self.asked = {}, {}, []

    def commit(self, files: dict[str, bytes], *, branch: str = "main") -> str:
        name = f"{len(self.commits) + 1:040x}"
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def weights_asked(self) -> list[str]:
        return [path for path in self.asked if "/resolve/" in path and path.endswith(".safetensors")]


def handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            path = self.path.partition("?")[0]
            hub.asked.append(path)
            match = re.fullmatch(
                rf"(?:/api/models)?/{REPO}(?:/(revision|tree|paths-info|resolve)/([^/]+)(/.+)?)?", path
            )
            if not match:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            what, revision, file = match[1] or "revision", match[2] or "main", (match[3] or "/")[1:]
            commit = hub.branches.get(revision, revision)
            if commit not in hub.commits:
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = hub.commits[commit]
            if what == "resolve":
                return self.file(commit, file, files)
            entries = [{"type": "file", "path": n, "size": len(b), "oid": f"{n}"} for n, b in files.items()]
            siblings = [{"rfilename": n, "size": len(b)} for n, b in files.items()]
            body = {"id": REPO, "sha": commit, "siblings": siblings} if what == "revision" else entries
            return self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        do_HEAD = do_GET

        def do_POST(self):
            from urllib.parse import parse_qs

            data = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            paths = json.loads(data)["paths"] if data.startswith("{") else parse_qs(data)["paths"]
            commit = hub.branches.get(self.path.split("/")[-1], self.path.split("/")[-1])
            files = {n: b for n, b in hub.commits[commit].items() if n in paths}
            body = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()]
            self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def file(self, commit, name, files):
            if name not in files:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            body, status = files[name], 200
            headers = {"X-Repo-Commit": commit, "ETag": f'"{commit[-8:]}-{abs(hash(body))}"', "Accept-Ranges": "bytes"}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, stop = int(asked[1]), int(asked[2] or len(body) - 1) + 1
                headers["Content-Range"] = f"bytes {start}-{min(stop, len(body)) - 1}/{len(body)}"
                body, status = body[start:stop], 206
            return self.send(status, body, headers)

        def send(self, status, body, headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants, file_download

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # one of them, by version
        name, form = "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, name, form, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """The files of a complete checkpoint."""
    path = make_tiny(tmp_path_factory.mktemp("hub") / "tiny", FAMILIES[1])
    return {file.name: file.read_bytes() for file in path.iterdir()}


def changed(files: dict[str, bytes], name: str, **values) -> dict[str, bytes]:
    return files | {name: json.dumps(json.loads(files[name]) | values).encode()}


def test_a_checkpoint_is_loaded_and_kept(hub, files, monkeypatch):
    from huggingface_hub import constants

    extra = {"checkpoint-5/model.safetensors": b"x" * 9, "pytorch_model.bin": b"y", "onnx/config.json": b"{}"}
    hub.commit(files | extra)
    model = qwenvl_jax.load(REPO, progress=False)
    assert model.config.family == "qwen2_5_vl"
    assert [path.rpartition("/")[2] for path in hub.weights_asked()].count("model.safetensors") >= 1
    assert not any("checkpoint-5" in path or "onnx" in path or path.endswith(".bin") for path in hub.asked)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate.find(REPO) == locate.find(f"{REPO}@main")
    assert hub.weights_asked() == []


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(model_type="llama"), "config.json: "),
        (dict(quantization_config={"quant_method": "hqq"}), r"quantised checkpoints \(hqq\) are not supported"),
        ("preprocessor_config.json", "has no preprocessor_config.json"),
        ("config.json", "not a checkpoint, there is no config.json in it"),
        ("model.safetensors", f"{REPO}: weights are read from safetensors files, and the repository has only pytorch"),
    ],
)
def test_what_cannot_be_used_costs_no_weights(hub, files, change, sentence):
    if isinstance(change, dict):
        files = changed(files, "config.json", **change)
    else:
        files = {name: body for name, body in files.items() if name != change}
    hub.commit(files | {"pytorch_model.bin": b"y" * 99})
    with pytest.raises(CheckpointError, match=sentence):
        qwenvl_jax.load(REPO)
    assert hub.weights_asked() == []


def test_revisions(hub, files):
    first = hub.commit(changed(files, "generation_config.json", top_k=1))
    hub.branches["v1.0"] = first
    hub.commit(changed(files, "generation_config.json", top_k=2))
    load = lambda name, **how: qwenvl_jax.load(name, progress=False, **how).generation["top_k"]  # noqa: E731
    assert load(REPO) == 2
    for name in (f"{REPO}@v1.0", f"{REPO}@{first}"):
        assert load(name) == 1
    assert load(REPO, revision="v1.0") == 1
    with pytest.raises(CheckpointError, match=r"@none: no such directory, and not on the hub"):
        load(f"{REPO}@none")
    with pytest.raises(CheckpointError, match="names one already; leave out revision"):
        load(f"{REPO}@v1.0", revision="main")
    with pytest.raises(CheckpointError, match="is not an id of the hub; leave out revision"):
        locate.find(locate.PACKAGE, revision="main")


def test_a_branch_that_moves_mixes_no_files(hub, files, monkeypatch):
    first = hub.commit(files)
    judge = remote._judge

    def moves(name, path):
        judge(name, path)
        hub.commit({name: b"other" for name in files})

    monkeypatch.setattr(remote, "_judge", moves)
    path = locate.find(REPO)
    assert path.name == first
    assert (path / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_what_the_cache_lacks_is_named(hub, files, monkeypatch):
    from huggingface_hub import constants

    shards = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate("ab", 1)}
    hub.commit(files)
    locate.find(REPO, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set, and the cache lacks model.safetensors"):
        locate.find(REPO)
    (locate.find(REPO, weights=False) / directory.INDEX).write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match=r"lacks model-00001-of-00002.safetensors and 1 more"):
        locate.find(REPO)
    with pytest.raises(CheckpointError, match="someone/else: no such directory, and not on the hub"):
        locate.find("someone/else")


def test_a_full_disk_is_found_before_the_weights(hub, files, monkeypatch):
    hub.commit(files)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 70 << 20}))
    with pytest.raises(CheckpointError, match=r"no space for its weights; 0\.08 GB are needed and 0\.07 GB are free"):
        locate.find(REPO)
    assert hub.weights_asked() == []


def test_a_download_that_breaks_off_is_finished_by_the_next(hub, files, monkeypatch):
    import huggingface_hub

    hub.commit(files)
    real, calls = huggingface_hub.snapshot_download, []

    def interrupted(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locate.find(REPO)
    assert (locate.find(REPO) / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_info_and_plan_fetch_no_weights(hub, files, tmp_path, capsys):
    hub.commit(files)
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    assert cli.main(["info", str(tmp_path), "--json"]) == 0
    local = json.loads(capsys.readouterr().out)
    assert cli.main(["info", REPO, "--json"]) == 0
    remote = json.loads(capsys.readouterr().out)
    assert remote | {"on_cpu": ""} == local | {"on_cpu": ""}  # the memory that is free changes
    assert local["parameters"] > 1e6 and local["files"] == {"model.safetensors": len(files["model.safetensors"])}
    folder = locate.find(REPO, weights=False)
    assert not (folder / "model.safetensors").exists()
    from qwenvl_jax.plan.plan import resolve_model

    assert resolve_model(REPO) == directory.read_config(Path(tmp_path))
    assert not (folder / "model.safetensors").exists()
    damaged = files | {"model.safetensors": b"\xff" * 99}
    hub.commit(damaged)
    assert cli.main(["info", REPO]) == 2
    assert "not a safetensors file, or cut short" in capsys.readouterr().err


def test_commands_check_everything_else_first(hub, files, tmp_path, capsys, monkeypatch):
    """A wrong picture, adapter, place, target or question costs no weights; without a mistake they are copied."""
    monkeypatch.chdir(tmp_path)
    hub.commit(files)
    (tmp_path / "there").mkdir()
    bad = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"bad"}
    (tmp_path / "bad").mkdir()
    for name, body in bad.items():
        (tmp_path / "bad" / name).write_bytes(body)
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": [user("?", "nosuch.png")], "answer": "x"}))
    train = f"train --model {REPO} --data q.jsonl --output o --rows 1 --tokens 512 --steps 1 --lora-rank 2"
    for command, said in {
        f"generate --model {REPO} --prompt ? --image nosuch.png": "nosuch.png",
        f"generate --model {REPO} --prompt ? --adapter nosuch": "nosuch: no such directory",
        f"generate --model {REPO} --prompt ? --adapter {REPO}": "not an adapter",
        f"generate --model {REPO} --prompt ? --adapter bad": "not a safetensors file",
        f"chat --model {REPO} --adapter nosuch": "nosuch: no such directory",
        f"eval q.jsonl --model {REPO}": "nosuch.png",
        f"eval q.jsonl --model {REPO} --on-bad-record skip --adapter bad": "not a safetensors file",
        f"merge {REPO} out --adapter nosuch": "nosuch: no such directory",
        f"merge {REPO} there": "exists already",
        f"merge {REPO} no/out": "there is no directory",
        f"convert {REPO} there --to orbax": "exists already",
        f"convert {REPO} out --to hf": "is a Hugging Face checkpoint already",
        f"{train} --lora-targets nonsense": "'nonsense' matches nothing",
    }.items():
        assert cli.main(command.split()) == 2, command
        assert said in capsys.readouterr().err, command
        assert hub.weights_asked() == [], command
    assert cli.main(f"merge {REPO} out".split()) == 0 and hub.weights_asked()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def user(text, image):
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}


def test_the_revision_of_an_adapters_base(hub, files, tmp_path, caplog):
    """PEFT keeps the base's revision in adapter_config.json."""
    first = hub.commit(files)
    hub.branches["v1.0"] = first
    hub.commit(changed(files, "generation_config.json", top_k=2))
    (tmp_path / "a").mkdir()
    settings = {"base_model_name_or_path": REPO, "peft_type": "LORA"}

    def located(revision):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings | {"revision": revision}))
        return locate.locate(tmp_path / "a", weights=False)

    assert located("v1.0").path.name == located(first).path.name == first
    assert located("v1.0")[1:] == (REPO, (tmp_path / "a",), remote.Place(None, REPO, "v1.0"), "v1.0")
    assert f"its base model is {REPO}@v1.0" in caplog.text
    for default in (None, "main", ""):
        assert located(default).path.name == hub.branches["main"]
    with pytest.raises(CheckpointError, match=r"revision is 7; name its base: qwenvl merge BASE OUT --adapter"):
        located(7)
    with pytest.raises(CheckpointError, match="@none: no such directory, and not on the hub"):
        located("none")


def test_an_adapter_trained_on_a_revision_names_it(hub, files, tmp_path):
    """So it opens on the same commit, even if the branch has moved; an adapter trained on that one names it too."""
    first = hub.commit(files)
    hub.branches["v1.0"] = first
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": talk}))
    flags = "--rows 1 --tokens 64 --lanes 1 --patches 64 --steps 1 --lora-rank 2 --learning-rate 1e-3".split()
    argv = ["train", "--data", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "run"), *flags]
    assert cli.main([*argv, "--model", f"{REPO}@v1.0"]) == 0
    adapter = tmp_path / "run" / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (REPO, "v1.0")
    hub.commit(changed(files, "generation_config.json", top_k=2))
    found = locate.locate(adapter, weights=False)
    assert (found.path.name, found.name, found.revision) == (first, REPO, "v1.0")


def test_the_revision_of_a_name(hub, files):
    first = hub.commit(files)
    assert locate.locate(REPO, weights=False).revision is None
    for found in (locate.locate(REPO, revision="main"), locate.locate(f"{REPO}@main")):
        assert found.revision == "main"
    in_cache = locate.locate(found.path)
    assert (in_cache.name, in_cache.revision) == (REPO, first)


def test_info_of_a_model_in_the_cache_asks_for_its_commit_alone(hub, files, monkeypatch, capsys):
    from huggingface_hub import constants

    hub.commit(files)
    folder = locate.find(REPO)
    for name, offline in ((REPO, False), (REPO, True), (str(folder), False)):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        hub.asked.clear()
        assert cli.main(["info", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["files"] == {"model.safetensors": len(files["model.safetensors"])}
        assert not [path for path in hub.asked if "resolve" in path], hub.asked
    assert hub.asked == []  # for the folder


def test_an_adapter_is_fetched_without_a_judgement(hub, tmp_path):
    hub.commit({"adapter_config.json": b"{}", "adapter_model.safetensors": b"abc"})
    assert (locate.find(REPO) / "adapter_model.safetensors").read_bytes() == b"abc"
    hub.asked.clear()
    locate.find(REPO)
    assert hub.weights_asked() == []


@pytest.mark.parametrize("name", ["a/b/c", "a", "a/b@", "a/b@/x", "@a/b", "a b/c", "a/b@x y"])
def test_other_names_are_no_ids(name):
    assert remote.place_of(name) is None
    with pytest.raises(CheckpointError, match=r"no such directory$"):
        locate.find(name)


def test_the_tokenizer_alone_is_no_checkpoint(hub, tmp_path):
    copy_tokenizer(tmp_path / "t")
    hub.commit({file.name: file.read_bytes() for file in (tmp_path / "t").iterdir()})
    with pytest.raises(CheckpointError, match=r"not a checkpoint, there is no config.json"):
        locate.find(REPO)
