"""With the newest transformers and PEFT: they open what we write, with equal logits, and we open what they write.

An environment of their own: `pip install -e ".[newest]"`, then `pytest tests/test_newest.py`. Elsewhere it is skipped.
"""

import json
from importlib.metadata import PackageNotFoundError, version

import jax
import numpy as np
import pytest
from make_tiny import copy_tokenizer, make_tiny, small_config
from PIL import Image
from qwenvl_convert import peft
from qwenvl_convert.hf import read_params
from qwenvl_convert.parity import greedy, reference_inputs
from qwenvl_convert.quantize import quantize
from test_lora import EVERYWHERE, fill, our_logits, relative, samples
from tiny import FAMILIES, tiny_config
from tiny_quantised import FORMATS, assert_same_as_reference

from qwenvl_jax import cli
from qwenvl_jax.demo import SAMPLES
from qwenvl_jax.families import to_dict
from qwenvl_jax.inputs.pack import make_batch
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.params import checkpoint, directory, locate, lora
from qwenvl_jax.params.specs import flatten


def _newest() -> bool:
    try:
        return int(version("transformers").split(".")[0]) >= 5 and bool(version("peft"))
    except PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.newest,
    pytest.mark.parity,  # so that the README's command for tests leaves it out
    pytest.mark.skipif(not _newest(), reason="needs the newest extra: transformers 5 and its PEFT"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def reference(config, path):
    """A random torch model with nothing left at zero or one, and the same weights read from its files."""
    import torch
    import transformers

    settings = to_dict(config)
    kind = getattr(transformers, settings["architectures"][0])
    model = kind(kind.config_class(**settings)).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.2 if config.text.vocab_size < 1000 else 0.05, generator=generator)
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1)
    model.save_pretrained(path)
    assert directory.read_config(path) == config
    return model, read_params(path, config)


def their_logits(model, config):
    import torch

    inputs = reference_inputs(samples(config), config)
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    with torch.no_grad():
        out = model(**inputs, use_cache=False).logits
    return out[inputs["attention_mask"].bool()].numpy()


def assert_adapted(model, path, modules: int) -> None:
    """Every module of the adapter's files is in the PEFT model, with the same weights, and was trained."""
    from peft import get_peft_model_state_dict
    from safetensors.numpy import load_file

    held, theirs = load_file(path / peft.WEIGHTS), get_peft_model_state_dict(model, save_embedding_layers=False)
    assert held.keys() == theirs.keys() and len(held) == 2 * modules
    assert all(np.array_equal(held[name], theirs[name].numpy()) for name in held)
    assert all(np.any(x) for name, x in held.items() if ".lora_B." in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_opens_there(family, tmp_path):
    from peft import PeftModel

    config = tiny_config(family)
    model, params = reference(config, tmp_path / "base")
    assert relative(our_logits(config, params), their_logits(model, config)) <= 1e-5
    whole = fill(lora.add(config, params, jax.random.key(1), rank=4, alpha=6, targets=EVERYWHERE))
    peft.save_adapter(config, whole, tmp_path / "adapter", base_name=str(tmp_path / "base"))
    model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()  # warns of a missing key: an error here
    assert_adapted(model, tmp_path / "adapter", 3 * 7 + 4 * (4 if family == "qwen2_vl" else 5) + 2)
    want = our_logits(config, whole)
    assert relative(our_logits(config, params), want) > 0.01
    assert relative(their_logits(model, config), want) <= 1e-5


SETTINGS = {
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*language_model.*\.(q_proj|down_proj)|.*visual\.merger\.mlp\.2", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj", "qkv"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "qkv": 6},
        "alpha_pattern": {"o_proj": 9},
    },
    "modules_to_save": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "merger"]},
    "bias": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_theirs_opens_here(settings, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    config = tiny_config("qwen2_5_vl")
    model, params = reference(config, tmp_path / "base")
    plain = our_logits(config, params)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **SETTINGS[settings])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.empty_like(p).normal_(0, 0.1, generator=generator))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    want = their_logits(model, config)
    assert relative(plain, want) > 0.01
    whole = peft.load_adapter(config, params, tmp_path / "adapter")
    assert relative(our_logits(config, whole), want) <= 1e-5
    with checkpoint.open_weights(locate.locate(tmp_path / "base", tmp_path / "adapter"), config) as source:
        merged = checkpoint.to_devices(source, progress=False)
    assert relative(our_logits(config, merged), want) <= 1e-5


@pytest.mark.parametrize("targets", [["llm"], ["llm", "vision", "merger"]], ids=["default", "everywhere"])
def test_a_run_of_ours_opens_there(targets, tmp_path, capsys):
    """`qwenvl train`, `qwenvl merge` and the result in Hugging Face's layout."""
    import transformers
    from peft import PeftModel

    base, output = make_tiny(tmp_path / "base", dtype="float32"), tmp_path / "run"
    Image.new("RGB", (112, 112), "red").save(tmp_path / "red.png")
    user = {"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "Colour?"}]}
    record = {"messages": [user, {"role": "assistant", "content": "red"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    argv = "train --rows 1 --tokens 64 --lanes 1 --patches 64 --lora-rank 4 --steps 2 --schedule constant"
    argv += f" --model {base} --data {tmp_path}/data.jsonl --output {output} --learning-rate 0.02 --result-format hf"
    for target in targets if len(targets) > 1 else ():
        argv += f" --lora-targets {target}"
    assert cli.main(argv.split()) == 0
    if len(targets) > 1:
        assert cli.main(["merge", str(output / "adapter"), str(tmp_path / "merged")]) == 0
    capsys.readouterr()

    config, kind = directory.read_config(base), transformers.AutoModelForImageTextToText
    model = PeftModel.from_pretrained(kind.from_pretrained(base), output / "adapter").eval()
    assert_adapted(model, output / "adapter", 21 if len(targets) == 1 else 43)
    want = their_logits(model, config)
    plain, adapted = read_params(base, config), checkpoint.load(output / "adapter", progress=False).params
    assert relative(our_logits(config, plain), want) > 1e-3
    assert relative(our_logits(config, peft.load_adapter(config, plain, output / "adapter")), want) <= 1e-5
    assert relative(our_logits(config, adapted), want) <= 1e-5
    if len(targets) == 1:
        return
    for path in (tmp_path / "merged", output / "final"):
        model, report = kind.from_pretrained(path, output_loading_info=True)
        assert not any(report.values()), report
        assert relative(their_logits(model.eval(), config), want) <= 1e-5
        ours = Processor.from_dir(path, config)
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        text = [{"role": "user", "content": "How many strawberries?"}]
        ids = theirs.apply_chat_template(text, add_generation_prompt=True, return_dict=False)
        assert ids == ours.encode(text).tokens.tolist()
        assert transformers.GenerationConfig.from_pretrained(path).eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_their_whole_directory_opens_here(family, tmp_path):
    """Model and tokenizer saved by transformers 5: nested config and names, other files for the tokenizer."""
    import transformers

    config = small_config(family, "float32", tied=True)
    _, params = reference(config, tmp_path / "saved")
    copy_tokenizer(tmp_path / "files")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "files").save_pretrained(tmp_path / "saved")
    images = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil
    images.from_pretrained(tmp_path / "files").save_pretrained(tmp_path / "saved")
    opened = checkpoint.load(tmp_path / "saved", progress=False)
    for path, x in flatten(params).items():
        np.testing.assert_array_equal(flatten(opened.params)[path], x, err_msg=path)
    before = Processor.from_dir(tmp_path / "files", config)
    text = [{"role": "user", "content": "How many strawberries?"}]
    assert opened.processor.encode(text).tokens.tolist() == before.encode(text).tokens.tolist()
    assert opened.processor.preprocessing == before.preprocessing


@pytest.mark.parametrize("way", [dict(bits=8), dict(group=16), dict(group=8, vision=True)], ids=str)
def test_quantised_by_us_opens_there(way, tmp_path):
    """Linears of the decoder, or the tower too, in other bits: no tensor is left over, and logits are equal."""
    import transformers

    family = "qwen2_vl" if "vision" in way else "qwen2_5_vl"
    base = make_tiny(tmp_path / "base", family, dtype="float32")
    quantize(base, tmp_path / "out", progress=False, **way)
    ours, plain = (checkpoint.load(tmp_path / name, progress=False) for name in ("out", "base"))
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    got, want = our_logits(ours.config, ours.params), their_logits(model.eval(), plain.config)
    assert relative(got, want) <= 1e-5
    assert relative(our_logits(plain.config, plain.params), want) > 1e-3


@pytest.mark.parametrize("way", [dict(bits=8), dict(group=64)], ids=str)
def test_the_quantised_demo_gives_the_same_answers_there(way, tmp_path):
    import torch
    import transformers

    quantize("demo", tmp_path / "out", progress=False, **way)
    ours = checkpoint.load(tmp_path / "out", progress=False)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    theirs.generation_config.eos_token_id = None
    for name, question in (
        ("scene", "Locate every dog."),
        ("line", "What does it say?"),
        ("chart", "What is it about?"),
    ):
        media = {"type": "image", "image": str(SAMPLES / f"{name}.png")}
        talk = [{"role": "user", "content": [media, {"type": "text", "text": question}]}]
        sample = ours.processor.encode(talk)
        inputs = reference_inputs([sample], ours.config)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == ours.config.image_token_id).int()
        with torch.no_grad():
            out = theirs.generate(**inputs, do_sample=False, max_new_tokens=24)
        want = out[:, len(sample.tokens) :].numpy()
        assert want.shape == (1, 24) and len(set(want[0].tolist())) > 2
        assert (greedy(ours.config, ours.params, make_batch([sample], ours.config), 24) == want).all()


@pytest.mark.parametrize("kind", [kind for kind, how in FORMATS.items() if "config_groups" in how])
def test_compressed_tensors_gives_the_same_weights(kind):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    if "actorder" in kind:
        pytest.skip("release 0.20 reads no index of groups; test_quantised.py has one that does")
    scheme = QuantizationConfig(**FORMATS[kind]).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(FORMATS[kind]["format"])
    assert_same_as_reference(kind, lambda tensors: compressor.decompress(tensors, scheme)["weight"])
