"""An adapter is a model wherever one is named; what other programs leave on disk is read, or named with what to do."""

import json
import logging
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_tiny import make_tiny
from qwenvl_convert import orbax, peft
from qwenvl_convert.hf import HfSource, read_params
from safetensors.numpy import load_file, save_file
from tiny import tiny_config, tiny_params
from tiny_hf import assert_same_bits, nested, torch_tensors, write_hf

import qwenvl_jax
from qwenvl_jax import cli
from qwenvl_jax.errors import CheckpointError, InputError
from qwenvl_jax.families import to_dict
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.params import checkpoint, directory, locate, lora
from qwenvl_jax.params.specs import flatten, unflatten
from qwenvl_jax.plan.plan import resolve_model
from qwenvl_jax.train import finetune
from qwenvl_jax.types import Model

EVERYWHERE = ("llm", "vision", "merger")


def trained(config, params, seed=0, targets=EVERYWHERE, rank=3):
    """The parameters with an adapter whose lora_b is not zero."""
    rng = np.random.default_rng(seed)
    flat = flatten(lora.add(config, params, jax.random.key(seed), rank=rank, alpha=5, targets=targets))
    b = {path: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype) for path, x in flat.items() if "lora_b" in path}
    return unflatten(flat | b)


def params_of(path, *adapters) -> dict:
    """As `load` reads them, without the processor."""
    located = locate.locate(path, *adapters)
    with checkpoint.open_weights(located, directory.read_config(located.path)) as source:
        return checkpoint.to_devices(source, progress=False)


def assert_close(got: dict, want: dict) -> None:
    """Equal but for the order of sums in float32."""
    got, want = flatten(got), flatten(want)
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base/ and orbax/, one model in both formats, and adapter/, whose base is base/."""
    path = tmp_path_factory.mktemp("home")
    make_tiny(path / "base", dtype="float32")
    (path / "base" / "LICENSE").write_text("free")
    (path / "base" / "README.md").write_text("the base")
    orbax.to_orbax(path / "base", path / "orbax", progress=False)
    model = qwenvl_jax.load(path / "base", progress=False)
    adapted = trained(model.config, model.params)
    peft.save_adapter(model.config, adapted, path / "adapter", base_name=str(path / "base"))
    return path, model, adapted


def rebase(adapter, base) -> None:
    file = adapter / peft.SETTINGS
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def test_an_adapter_is_a_model(home, tmp_path, capsys, caplog):
    path, model, adapted = home
    want = lora.merge(adapted)
    assert_close(qwenvl_jax.load(path / "adapter", progress=False).params, want)
    assert f"{path / 'adapter'}: an adapter; its base model is {path / 'base'}" in caplog.text
    assert_close(params_of(path / "orbax", path / "adapter"), want)
    shutil.copytree(path / "adapter", tmp_path / "again")
    twice = qwenvl_jax.load(path / "adapter", adapter=[tmp_path / "again"], progress=False)
    q = "decoder/layers/q_proj/kernel"
    one, two, none = (flatten(tree)[q] for tree in (want, twice.params, model.params))
    np.testing.assert_allclose(two - one, one - none, atol=1e-5)

    assert resolve_model(str(path / "adapter")) == directory.read_config(path / "base")
    assert cli.main(["info", str(path / "adapter"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["adapters"] == [{"path": str(path / "adapter"), "rank": 3, "modules": 3 * 7 + 4 * 5 + 2, "whole": []}]
    assert facts["parameters"] == sum(x.size for x in flatten(model.params).values())
    assert cli.main(["info", str(path / "adapter")]) == 0
    assert "rank 3 on 43 modules" in capsys.readouterr().out


def test_a_notice_is_printed_once(home, tmp_path, capsys, monkeypatch):
    """orbax's import gives the root logger a handler."""
    root = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger(), "handlers", [root])
    assert cli.main(["merge", str(home[0] / "adapter"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.count("its base model is") == 1


@pytest.mark.parametrize("argv", [["generate", "--prompt", "?"], ["chat"], ["eval", "q.jsonl"]])
def test_flags_name_adapters(argv, home, tmp_path):
    path = home[0]
    base, adapter = str(path / "base"), str(path / "adapter")

    def located(*flags):
        return cli.converse.located(cli.build_parser().parse_args([*argv, *flags]))

    one = locate.Located(path / "base", base, (path / "adapter",))
    assert located("--model", adapter) == located("--adapter", adapter) == one
    assert located("--model", base, "--adapter", adapter) == one
    for twice in (("--model", adapter, "--adapter", f"{adapter}/."), ("--model", base, *("--adapter", adapter) * 2)):
        with pytest.raises(CheckpointError, match="adapter: this adapter is applied already; name it once"):
            located(*twice)
    assert located("--model", str(path / "orbax"), "--adapter", adapter).path == path / "orbax"
    with pytest.raises(InputError, match="base: not an adapter; name a model with --model"):
        located("--adapter", base)
    with pytest.raises(InputError, match=r"base: not an adapter, there is no adapter_config\.json"):
        located("--model", base, "--adapter", base)
    shutil.copytree(path / "adapter", tmp_path / "run" / "adapter")
    (tmp_path / "run" / "final").mkdir()
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    for model in ((), ("--model", base)):
        with pytest.raises(InputError, match=r"not an adapter.*name its folder adapter \(.*/run/adapter\)"):
            located(*model, "--adapter", str(tmp_path / "run"))


def test_merge_writes_a_complete_directory(home, tmp_path, capsys):
    path, _, adapted = home
    assert cli.main(["merge", str(path / "adapter"), str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out'}\n"
    assert err == f"{path / 'adapter'}: an adapter; its base model is {path / 'base'}\n"
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in (path / "base").iterdir()}
    assert_close(params_of(tmp_path / "out"), lora.merge(adapted))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card and "the base" not in card
    for job in ("merge", "convert --to orbax", "convert --to hf"):
        verb, *flags = job.split()
        assert cli.main([verb, str(path / "adapter"), str(tmp_path / "out"), *flags]) == 2
        assert "exists already" in capsys.readouterr().err
    argv = ["convert", str(path / "adapter"), str(tmp_path / "orbax"), "--to", "orbax"]
    assert cli.main(argv) == 0
    assert_close(params_of(tmp_path / "orbax"), lora.merge(adapted))
    assert cli.main(["merge", str(path / "orbax"), str(tmp_path / "same"), "--layout", "nested"]) == 0
    want = {nested(name): x for name, x in load_file(path / "base" / "model.safetensors").items()}
    assert_same_bits(load_file(tmp_path / "same" / "model.safetensors"), want)


def test_merge_needs_a_complete_base(home, tmp_path, capsys):
    shutil.copytree(home[0] / "base", tmp_path / "base", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    assert cli.main(["merge", str(tmp_path / "base"), str(tmp_path / "out")]) == 2
    assert "no preprocessor_config.json" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["base"]


def test_a_model_in_memory_as_hugging_faces_files(home, tmp_path):
    path, model, adapted = home
    located = locate.locate(path / "orbax")
    orbax.save_hf(model._replace(params=lora.merge(adapted)), tmp_path / "out", base=located)
    again = qwenvl_jax.load(tmp_path / "out", progress=False)
    assert_same_bits(flatten(again.params), flatten(lora.merge(adapted)))
    assert again.config == model.config and again.generation == model.generation
    assert not (tmp_path / "out" / directory.MARKER).exists()
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    with pytest.raises(InputError, match="no module of this config declares"):
        orbax.save_hf(model._replace(params={"x": np.zeros(2)}), tmp_path / "bad", base=located)
    assert not (tmp_path / "bad").exists()


def test_parts_are_merged_as_the_whole(tmp_path):
    """Any part of a parameter, as meshes and conversion read them: adapters and whole parameters."""
    config = tiny_config("qwen2_5_vl")
    params = tiny_params(config)
    checkpoint.save(Model(config, params, None), tmp_path / "base")
    peft.save_adapter(config, trained(config, params), tmp_path / "adapter", base_name="x")
    file = tmp_path / "adapter" / peft.WEIGHTS
    tensors = load_file(file)
    whole = {"model.language_model.norm.weight": (48,), "model.visual.patch_embed.proj.weight": (32, 3, 2, 14, 14)}
    whole |= {"model.language_model.layers.1.self_attn.q_proj.bias": (48,), "lm_head.weight": (160, 48)}
    rng = np.random.default_rng(1)
    replaced = {f"base_model.model.{name}": rng.standard_normal(s).astype(np.float32) for name, s in whole.items()}
    save_file(tensors | replaced, file)
    with peft.AdapterFile(config, tmp_path / "adapter") as adapter:
        inner = checkpoint.OrbaxSource(tmp_path / "base", config)
        source = peft.AdaptedSource(inner, adapter)
        full = {path: source.read(leaf, tuple(slice(0, n) for n in leaf.shape)) for path, leaf in source.leaves.items()}
        assert_close(full, flatten(lora.merge(peft.load_adapter(config, params, tmp_path / "adapter"))))
        for path, leaf in source.leaves.items():
            cut = tuple(slice(n // 3, n - n // 4) for n in leaf.shape)
            np.testing.assert_allclose(source.read(leaf, cut), full[path][cut], rtol=1e-6, atol=1e-7)
            assert source.read(leaf, cut, "bfloat16").dtype == jnp.bfloat16
    head = replaced["base_model.model.lm_head.weight"]
    np.testing.assert_array_equal(full["decoder/lm_head/kernel"], head.T)
    bias = full["decoder/layers/q_proj/bias"]
    np.testing.assert_array_equal(
        bias[1], replaced["base_model.model.model.language_model.layers.1.self_attn.q_proj.bias"]
    )
    np.testing.assert_array_equal(bias[0], params["decoder"]["layers"]["q_proj"]["bias"][0])


def test_an_adapter_trained_on_an_adapter_is_one_of_the_base(home, tmp_path):
    path, model, first = home
    second = trained(model.config, lora.merge(first), seed=1, targets=["q_proj", "merger"], rank=2)
    located = locate.locate(path / "adapter")
    both = finetune._with_earlier(model.config, second, located)
    peft.save_adapter(model.config, both, tmp_path / "both", base_name=located.name)
    assert_close(params_of(tmp_path / "both"), lora.merge(second))


def test_an_adapter_keeps_its_rule_for_control_tokens(home, tmp_path):
    path, model, adapted = home
    how = dict(base_name=str(path / "base"), allow_control_tokens=True)
    peft.save_adapter(model.config, adapted, tmp_path / "adapter", **how)
    assert qwenvl_jax.load(tmp_path / "adapter", progress=False).processor.allow_control_tokens
    assert not qwenvl_jax.load(path / "adapter", progress=False).processor.allow_control_tokens
    orbax.merge(tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert qwenvl_jax.load(tmp_path / "merged", progress=False).processor.allow_control_tokens


# Where an adapter's base is


def test_the_base_of_an_adapter(home, tmp_path, monkeypatch):
    import huggingface_hub

    path = home[0]
    downloads = []

    def download(name, **_):
        downloads.append(name)
        return str(path / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    shutil.copytree(path / "adapter", tmp_path / "adapter")

    def located(base):
        rebase(tmp_path / "adapter", base)
        return locate.locate(tmp_path / "adapter")

    assert located("Qwen/Qwen2.5-VL-3B-Instruct").name == "Qwen/Qwen2.5-VL-3B-Instruct"
    cache = "/home/a/.cache/huggingface/hub/models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/66285546d2b821cf"
    assert located(cache).name == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert downloads == ["Qwen/Qwen2.5-VL-3B-Instruct"] * 2
    shutil.copytree(path / "base", tmp_path / "models" / "base")
    assert located("../models/base").path.samefile(tmp_path / "models" / "base")  # relative to the adapter
    monkeypatch.chdir(tmp_path)
    assert located("models/base").path.samefile(tmp_path / "models" / "base")
    assert located("demo").path == locate.find("demo") and len(downloads) == 2


@pytest.mark.parametrize(
    "base, said",
    [
        (
            "/data/models/Qwen2.5-VL-3B",
            "3B is not here; name its base: qwenvl merge BASE OUT --adapter",
        ),
        ("unsloth/Qwen2.5-VL-3B-Instruct-bnb-4bit", "is quantised; give the original model"),
        ("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "is quantised"),
        (None, "base_model_name_or_path is None; name its base"),
        ("", "base_model_name_or_path is ''"),
        (".", "this adapter's base is an adapter of it"),
        ("x" * 9000, "is not here"),
        ("~nobody-here/model\0", "is not here"),
    ],
)
def test_a_base_that_is_not_found(base, said, home, tmp_path):
    shutil.copytree(home[0] / "adapter", tmp_path / "adapter")
    rebase(tmp_path / "adapter", str(tmp_path / "adapter") if base == "." else base)
    with pytest.raises(CheckpointError, match=said):
        locate.locate(tmp_path / "adapter")


def test_weights_and_an_adapter_in_one_directory(home, tmp_path):
    shutil.copytree(home[0] / "base", tmp_path / "both")
    for name in (peft.SETTINGS, peft.WEIGHTS):
        shutil.copyfile(home[0] / "adapter" / name, tmp_path / "both" / name)
    with pytest.raises(CheckpointError, match="holds a model's weights and an adapter"):
        locate.locate(tmp_path / "both")
    located = locate.locate(tmp_path / "both", tmp_path / "both")
    assert (located.path, located.adapters) == (tmp_path / "both", (tmp_path / "both",))
    orbax.merge(tmp_path / "both", tmp_path / "out", adapter=[tmp_path / "both"], progress=False)
    assert not (tmp_path / "out" / peft.SETTINGS).exists()  # transformers would apply the adapter again
    assert_close(params_of(tmp_path / "out"), lora.merge(home[2]))


def test_the_command_that_a_message_gives_works(home, tmp_path):
    """Every command that opens a model can say it, whichever flags that one has."""
    path, _, adapted = home
    shutil.copytree(path / "base", tmp_path / "both")
    for name in (peft.SETTINGS, peft.WEIGHTS):
        shutil.copyfile(path / "adapter" / name, tmp_path / "both" / name)
    shutil.copytree(path / "adapter", tmp_path / "lost")
    rebase(tmp_path / "lost", "/data/gone")
    for name in ("both", "lost"):
        with pytest.raises(CheckpointError) as e:
            locate.locate(tmp_path / name)
        command = str(e.value).partition(": qwenvl ")[2].split()
        places = {"BASE": str(path / "base"), "OUT": str(tmp_path / f"{name}-merged")}
        assert cli.main([places.get(word, word) for word in command]) == 0
        assert_close(params_of(tmp_path / f"{name}-merged"), lora.merge(adapted))


# What others write in an adapter's directory

PREFIXES = {
    "transformers 5": lambda k: k,
    "transformers 4.51": lambda k: k.replace("model.language_model.", "model.").replace("model.visual.", "visual."),
    "compiled": lambda k: "_orig_mod." + k,
    "wrapped": lambda k: k.replace("base_model.model.", "module.base_model.model."),
    "no prefix": lambda k: k.removeprefix("base_model.model."),
    "a name": lambda k: k.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_of_an_adapters_tensors(prefix, tmp_path):
    config = tiny_config("qwen2_5_vl")
    params = tiny_params(config)
    peft.save_adapter(config, trained(config, params), tmp_path / "a", base_name="x")
    want = peft.load_adapter(config, params, tmp_path / "a")
    file = tmp_path / "a" / peft.WEIGHTS
    renamed = {
        PREFIXES[prefix](k): x.astype(jnp.bfloat16 if "lora_A" in k else np.float32) for k, x in load_file(file).items()
    }
    save_file(renamed, file)
    got = flatten(peft.load_adapter(config, params, tmp_path / "a"))
    for path, x in flatten(want).items():
        np.testing.assert_allclose(got[path], x, rtol=2**-8 if path.endswith("lora_a") else 0, err_msg=path)


def test_a_pickled_adapter_is_named(home, tmp_path):
    shutil.copytree(home[0] / "adapter", tmp_path / "a")
    (tmp_path / "a" / peft.WEIGHTS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only adapter_model\.bin, a pickle.*weights_only=True"):
        qwenvl_jax.load(tmp_path / "a")


@pytest.mark.parametrize("beside", ["non_lora_state_dict.bin", "non_lora_trainables.bin"])
def test_weights_beside_an_adapter_are_not_dropped(beside, home, tmp_path):
    shutil.copytree(home[0] / "adapter", tmp_path / "a")
    (tmp_path / "a" / beside).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{beside} holds more trained weights"):
        qwenvl_jax.load(tmp_path / "a")


@pytest.mark.parametrize(
    "settings",
    [
        {"fan_in_fan_out": True},  # PEFT ignores it on a Linear
        {"target_modules": "all-linear", "lora_dropout": 0.1, "peft_version": "0.21.2", "inference_mode": False},
        {"target_modules": r".*language_model.*q_proj", "task_type": None, "a_new_key": None, "eva_config": None},
        {"modules_to_save": [], "bias": "none", "init_lora_weights": "gaussian", "layers_to_transform": None},
    ],
)
def test_settings_that_change_nothing(settings, home, tmp_path):
    path, model, adapted = home
    shutil.copytree(path / "adapter", tmp_path / "a")
    file = tmp_path / "a" / peft.SETTINGS
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    want = flatten(adapted)
    for name, x in flatten(peft.load_adapter(model.config, model.params, tmp_path / "a")).items():
        np.testing.assert_array_equal(x, want[name], err_msg=name)


def test_a_tied_head_cannot_be_replaced(home, tmp_path):
    path, model, _ = home
    shutil.copytree(path / "adapter", tmp_path / "a")
    file = tmp_path / "a" / peft.WEIGHTS
    save_file(load_file(file) | {"base_model.model.lm_head.weight": np.zeros((151936, 48), np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight was trained, but config\.json ties"):
        peft.load_adapter(model.config, model.params, tmp_path / "a")


# What is no checkpoint, but close

DIRECTORIES = [
    ("zero_to_fp32.py latest global_step9/mp_rank_00_model_states.pt", "DeepSpeed's shards.*zero_to_fp32.py"),
    ("global_step9/mp_rank_00_model_states.pt", "DeepSpeed's shards"),
    (".metadata __0_0.distcp __1_0.distcp", "FSDP's shards.*merge-weights"),
    ("pytorch_model_fsdp_0/__0_0.distcp", "FSDP's shards"),
    ("qwen2-vl-q4_k_m.gguf mmproj.gguf", "GGUF files are not supported"),
    ("consolidated.safetensors params.json tekken.json", "another project's format"),
    ("refs/main snapshots/abc/config.json blobs/x", "the hub's cache"),
    ("train.toml metrics.jsonl final/config.json adapter/adapter_config.json", r"directory of a run.*\(.*/final\)"),
    ("train.toml metrics.jsonl checkpoints/30/state/x", "a run that has not ended"),
    ("checkpoint-90/config.json checkpoint-500/config.json runs/x", r"trainer's checkpoints.*\(.*/checkpoint-500\)"),
    ("checkpoint-90/adapter_config.json", r"checkpoints of an adapter.*\(.*/checkpoint-90\)"),
    ("_METADATA manifest.ocdbt d/abc", "Orbax's arrays alone"),
    ("adapter_model.safetensors README.md", "without adapter_config.json"),
    ("model.safetensors optimizer.pt", "weights alone; copy config.json"),
    ("pytorch_model-00001-of-00002.bin", "as pickles.*save_pretrained"),
    ("one/adapter_config.json two/adapter_config.json", r"one of its folders is an adapter"),
    ("stage1/config.json stage1/model.safetensors", r"one of its folders is a checkpoint.*\(.*/stage1\)"),
]


@pytest.mark.parametrize("files, said", DIRECTORIES)
def test_directories_are_named(files, said, tmp_path):
    for name in files.split():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/x: not a checkpoint.*{said}"):
        qwenvl_jax.load(tmp_path / "x")


@pytest.mark.parametrize(
    "files, said",
    [
        ("pytorch_model.bin tokenizer.json", "as pickles.*save_pretrained"),
        ("optimizer.pt global_step500/x zero_to_fp32.py", "DeepSpeed's shards"),
        ("pytorch_model_fsdp_0/x", "FSDP's shards"),
        ("checkpoint-9/config.json", r"trainer's checkpoints.*checkpoint-9\)"),
        ("model.fp16.safetensors", "weights are read from safetensors files only"),
        ("model-00001-of-00002.safetensors", "weights are read from safetensors files only"),
    ],
)
def test_missing_weights_are_named(files, said, tmp_path):
    """A directory with a config.json."""
    config = tiny_config("qwen2_vl")
    write_hf(tmp_path / "x", config, torch_tensors(config))
    (tmp_path / "x" / "model.safetensors").unlink()
    for name in files.split():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"no model\.safetensors and no model.*{said}"):
        HfSource(tmp_path / "x", config)


def test_weight_files_without_an_index(tmp_path):
    config = tiny_config("qwen2_vl")
    tensors = torch_tensors(config)
    write_hf(tmp_path / "plain", config, tensors)
    src = write_hf(tmp_path / "shards", config, tensors, files=3)
    (src / directory.INDEX).unlink()
    assert_same_bits(flatten(read_params(src, config)), flatten(read_params(tmp_path / "plain", config)))


@pytest.mark.parametrize(
    "missing, said",
    [
        ("preprocessor_config.json", "no preprocessor_config.json.*copy it from the model that was trained"),
        ("tokenizer.json", "no tokenizer.json, nor vocab.json.*copy it from the model that was trained"),
        ("chat_template.json", "no chat template.*copy the file of the Instruct model"),
    ],
)
def test_what_a_trainer_leaves_out_is_named(missing, said, home, tmp_path):
    names = shutil.ignore_patterns(missing, "model.safetensors")
    shutil.copytree(home[0] / "base", tmp_path / "checkpoint-9", ignore=names)
    settings = tmp_path / "checkpoint-9" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": None}))
    with pytest.raises(CheckpointError, match=said):
        qwenvl_jax.load(tmp_path / "checkpoint-9")


@pytest.mark.parametrize(
    "data, said",
    [
        ({"model_type": "qwen2"}, "'qwen2' .a text model, without a vision tower. is not supported"),
        ({"model_type": "qwen2_5_vl_text"}, "a text model"),
        ({"model_type": "qwen3_vl"}, "'qwen3_vl' is not supported; this library runs 'qwen2_vl' and 'qwen2_5_vl'"),
        ({"model_type": "qwen2_5_omni"}, "'qwen2_5_omni' is not supported"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quantised checkpoints .aqlm. are not supported"),
        ({"text_config": {"quantization_config": {"quant_method": "bitsandbytes"}}}, ".bitsandbytes."),
    ],
)
def test_other_models_are_named(data, said, tmp_path):
    config = to_dict(tiny_config("qwen2_5_vl"))
    if "text_config" in data:
        data = {"text_config": config | data["text_config"]}
    (tmp_path / "config.json").write_text(json.dumps(config | data))
    with pytest.raises(CheckpointError, match=said):
        directory.read_config(tmp_path)


@pytest.mark.parametrize(
    "name, said",
    [
        ("model.gguf", "GGUF"),
        ("pytorch_model.bin", "pickles are not read"),
        ("model.safetensors", "is a file; a checkpoint is a directory; did you mean"),
        ("config.json", "did you mean"),
        ("x", "is a file"),
    ],
)
def test_files_are_named(name, said, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name}: .*{said}"):
        qwenvl_jax.load(tmp_path / name)


@pytest.mark.parametrize(
    "name",
    [
        *("base/model.safetensors", "base/config.json", "base/tokenizer.json", "base/preprocessor_config.json"),
        *("base/chat_template.json", "base/generation_config.json", "base/model.safetensors.index.json"),
        *("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "orbax/params/manifest.ocdbt"),
        *("base/vocab.json", "base/merges.txt"),
    ],
)
def test_a_pointer_of_git_lfs_is_named(name, home, tmp_path):
    """What `git clone` leaves without Git LFS."""
    folder = name.partition("/")[0]
    shutil.copytree(home[0] / folder, tmp_path / folder)
    base = tmp_path / "base"
    if name.endswith("index.json"):
        (base / "model.safetensors").unlink()
    if name.endswith(("vocab.json", "merges.txt")):
        model = json.loads((base / "tokenizer.json").read_text("utf-8"))["model"]
        (base / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
        (base / "merges.txt").write_text("#version: 0.2\n", "utf-8")
        (base / "tokenizer.json").unlink()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=f"{tmp_path / name}: is a Git LFS pointer.*run `git lfs pull` in "):
        qwenvl_jax.load(tmp_path / folder, progress=False)


def test_a_tokenizer_saved_with_truncation_and_padding(home):
    """transformers keeps both of its last call in tokenizer.json: they cut prompts, or padded them."""
    path, model, _ = home
    processor = Processor.from_dir(path / "base", model.config)
    text = [{"role": "user", "content": "one two three four five six seven eight nine ten"}]
    want = processor.encode(text).tokens
    file = path / "base" / "tokenizer.json"
    before = file.read_text("utf-8")
    data = json.loads(before)
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    data["padding"] |= {"pad_id": 151643, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    try:
        file.write_text(json.dumps(data), "utf-8")
        np.testing.assert_array_equal(Processor.from_dir(path / "base", model.config).encode(text).tokens, want)
    finally:
        file.write_text(before, "utf-8")


def test_a_source_of_arrays_is_closed_with_its_files(tmp_path):
    """A damaged adapter leaves no file of the base open."""
    config = tiny_config("qwen2_vl")
    src = write_hf(tmp_path / "src", config, torch_tensors(config))
    with HfSource(src, config) as source, pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        peft.AdaptedSource(source, peft.AdapterFile(config, tmp_path))
    assert not source.reader._open


def test_the_demo_is_named_so_that_its_adapter_opens_on_every_machine():
    """Not by the place of this installation."""
    assert locate.locate("demo").name == locate.locate(locate.find("demo")).name == "demo"
    assert "base_model" not in peft.card("demo").split("---")[1]


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_an_adapter_that_diverged_is_named(name, home, tmp_path):
    """Not the base's weights, which it is added to."""
    shutil.copytree(home[0] / "adapter", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / peft.WEIGHTS)
    tensors[next(key for key in tensors if name in key)][0, 0] = np.nan
    save_file(tensors, tmp_path / "a" / peft.WEIGHTS)
    said = f"{tmp_path / 'a' / peft.WEIGHTS}: the adapter's weights of .* have NaN or infinity, so its training"
    with pytest.raises(CheckpointError, match=said):
        params_of(tmp_path / "a")
    with pytest.raises(CheckpointError, match=said):
        peft.load_adapter(home[1].config, home[1].params, tmp_path / "a")


@pytest.mark.parametrize("name", ["12", "."])
def test_a_checkpoint_of_a_run_is_named(name, tmp_path):
    (tmp_path / "12" / "progress").mkdir(parents=True)
    (tmp_path / "12" / "state" / "d").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="of a run; end the run with `qwenvl train`, then open its folder final"):
        directory.read_config(tmp_path / name)
