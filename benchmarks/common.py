"""Shared by the benchmarks: small models, checkpoints of random weights, the machine's ceilings, and tables."""

import datetime
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from qwenvl_convert.names import tensor_names, tensor_shape
from qwenvl_convert.safetensors import Writer

from qwenvl_jax.config import Config, TextConfig, VisionConfig
from qwenvl_jax.families import PRESETS, to_dict
from qwenvl_jax.params.specs import specs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))  # for `demo`
from demo.tokenizer import write_processor
from demo.train import demo_config

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
SMALL = ("demo", "50M")


def config_of(size: str, family: str = "qwen2_5_vl") -> Config:
    """A model by name: "demo", "50M" (of either family) or a preset, with the demo's special tokens."""
    demo = demo_config()
    if size == "demo":
        return demo
    ids = {name: value for name, value in vars(demo).items() if name.endswith("_token_id")}
    return _config_50m(family, ids) if size == "50M" else PRESETS[size].replace(**ids)


def _config_50m(family: str, ids: dict) -> Config:
    """50 million parameters in the proportions of the official models."""
    two = family == "qwen2_vl"
    text = TextConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        mrope_section=(8, 12, 12),
        tie_word_embeddings=True,
    )
    vision = VisionConfig(
        depth=8,
        hidden_size=320,
        intermediate_size=1280 if two else 864,
        out_hidden_size=512,
        num_heads=5,
        norm="layer" if two else "rms",
        gated_mlp=not two,
        hidden_act="quick_gelu" if two else "silu",
        window_size=None if two else 112,
        fullatt_block_indexes=() if two else (1, 3, 5, 7),
        tokens_per_second=None if two else 2,
    )
    return Config(family=family, text=text, vision=vision, dtype="float32", **ids)


def write_checkpoint(directory: Path, config: Config) -> Path:
    """Writes a Hugging Face checkpoint of random weights in the config's dtype, with the demo's tokenizer.

    The weights are slices of one block of random numbers: drawing billions of them would take too long.
    """
    directory.mkdir()
    shapes = {}
    for path, spec in specs(config).items():
        for name in tensor_names(config)[path]:
            shapes[name] = (jnp.dtype(config.dtype), tensor_shape(config, spec))
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(1 << 24, np.float32)).astype(config.dtype)
    with Writer(directory, shapes, 5_000_000_000) as writer:
        for name, tensor in writer.tensors.items():
            rows, width = tensor.matrix
            one = len(tensor.shape) == 1 and name.endswith("weight")  # the scale of a norm
            step = max(1, noise.size // 2 // width)
            for row in range(0, rows, step):
                n = min(step, rows - row)
                start = rng.integers(noise.size - n * width)
                part = noise[start : start + n * width].reshape(n, width)
                writer.write_rows(name, row, np.ones_like(part) if one else part, transpose=False)
        writer.finish()
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    return write_processor(directory)


# Ceilings of the machine. Each function returns {form: function that measures once}; the best form is the ceiling.


def read_rates(device: str, small: bool = False) -> dict:
    """Ways of reading a large array that exists already, so no new page is touched: bytes per second."""
    n = 2**22 if small else 2**27 if device == "cpu" else 2**30
    a = jnp.ones((8192, n // 8192), jnp.float32)
    v = jnp.ones(8192, jnp.float32)
    dot, most = jax.jit(jnp.dot), jax.jit(jnp.max)
    forms = {
        "jax, vector by matrix": lambda: dot(v, a).block_until_ready(),
        "jax, maximum": lambda: most(a).block_until_ready(),
    }
    if device == "cpu":
        pool = ThreadPoolExecutor(os.cpu_count())
        parts = np.array_split(np.ones(n, np.float32), os.cpu_count())
        forms["numpy, maximum"] = lambda: list(pool.map(np.max, parts))
        forms["numpy, dot"] = lambda: list(pool.map(lambda x: np.dot(x, x), parts))
    if _has_torch(device):
        import torch

        t, wait = torch.ones(n, device=device), torch.cuda.synchronize if device == "cuda" else lambda: None
        forms["torch, maximum"] = lambda: (t.max(), wait())
        forms["torch, sum"] = lambda: (t.sum(), wait())
    return {name: partial(_rate, 4 * n, run) for name, run in forms.items()}


def copy_rates(device: str, small: bool = False) -> dict:
    """Copies of a large array: bytes read and written per second. (On a CPU, mostly page allocation.)"""
    a = jnp.ones(2**22 if small else 2**26 if device == "cpu" else 2**30, jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    forms = {"jax": lambda: copy(a).block_until_ready()}
    if _has_torch(device):
        import torch

        t, wait = torch.ones(a.size, device=device), torch.cuda.synchronize if device == "cuda" else lambda: None
        to = torch.empty_like(t)
        forms["torch, in place"] = lambda: (to.copy_(t), wait())
    return {name: partial(_rate, 2 * a.nbytes, run) for name, run in forms.items()}


def product_rates(device: str, dtype: str, small: bool = False) -> dict:
    """One large matmul of random numbers: FLOP per second."""
    n = 512 if small else 2048 if device == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.float32).astype(dtype) for i in range(2))
    dot = jax.jit(partial(jnp.dot, precision="highest" if dtype == "float32" else None))
    forms = {"jax": lambda: dot(a, b).block_until_ready()}
    if _has_torch(device):
        import torch

        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        x, y = (torch.randn((n, n), device=device).to(getattr(torch, dtype)) for _ in range(2))
        forms["torch"] = lambda: (x @ y, wait())
    return {name: partial(_rate, 2 * n**3, run) for name, run in forms.items()}


def _has_torch(device: str) -> bool:
    return device != "tpu" and find_spec("torch") is not None


def _rate(work: float, run) -> float:
    return work / clock(run)


def ceiling(forms: dict, times: int = 5) -> float:
    """The median of the best form, after one warm-up."""
    for measure in forms.values():
        measure()
    return max(statistics.median(measure() for _ in range(times)) for measure in forms.values())


def clock(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def device_name() -> str:
    """The name of jax's device."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "torch", "transformers") if find_spec(name)}


class Report:
    """Prints the rows of one table as they come, and appends them to `output`, if given, as JSON lines."""

    COLUMNS = ("here", "spread", "share", "peer", "ratio", "spread")

    def __init__(self, title: str, output: str | None = None, **facts):
        self.output = output
        self.facts = {"date": datetime.date.today().isoformat(), "of": title, "versions": versions(), **facts}
        print(f"\n### {title}\n\n| | {' | '.join(self.COLUMNS)} |\n|{'---|' * (1 + len(self.COLUMNS))}", flush=True)

    def add(self, job: str, unit: str, work: float, here: list, peers: dict | None = None, share=None, **more) -> None:
        """Adds a row. here: seconds of each round for `work` units. peers: {name: the same}; the best one counts.

        unit "ms" shows milliseconds. share: the share of a ceiling in the median round.
        """

        def speeds(seconds):
            each = sorted((1e3 * s if unit == "ms" else work / s) for s in seconds)
            return statistics.median(each), each[0], each[-1]

        middle, low, high = speeds(here)
        line = {"job": job, "unit": unit, "here": middle, "spread": [low, high], "share": share} | more
        cells = [f"{middle:.4g} {unit}", f"{low:.4g}–{high:.4g}", "" if share is None else f"{share:.0%}", "", "", ""]
        if peers:
            name = min(peers, key=lambda n: statistics.median(peers[n]))
            ratios = [b / a for a, b in zip(here, peers[name], strict=True)]
            line |= {"peer": name, "there": speeds(peers[name])[0], "there_spread": speeds(peers[name])[1:]}
            line |= {"ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)]}
            line |= {"peers": {n: speeds(seconds)[0] for n, seconds in peers.items()}}
            cells[3:] = f"{line['there']:.4g}, {name}", f"{line['ratio']:.2f}×", f"{min(ratios):.2f}–{max(ratios):.2f}×"
        print(f"| {job} | {' | '.join(cells)} |", flush=True)
        self.write(line)

    def note(self, text: str, **facts) -> None:
        """A line below the table."""
        print(f"\n{text}", flush=True)
        self.write(facts)

    def write(self, line: dict) -> None:
        if self.output:
            with open(self.output, "a") as file:
                file.write(json.dumps(self.facts | line) + "\n")
