"""TPUs and GPUs by their data sheets, TPU slices by Cloud TPU's names, and abstract devices to compile for."""

import importlib.util
import os
import re
from typing import NamedTuple

from jax.experimental import topologies

from qwenvl_jax.errors import InputError, install
from qwenvl_jax.train.flops import peak_flops

GIB = 2**30


class Chip(NamedTuple):
    """A chip by its maker's data sheet. TPU memory is what the TPU compiler gives to programs."""

    memory: float  # bytes
    flops: float  # bfloat16 operations per second
    bandwidth: float  # bytes per second to and from memory
    link: float  # bytes per second that it sends to other chips, over all links
    slices: dict[int, str] = {}  # noqa: RUF012 - read only: {chips: topology}; empty for GPUs


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
CHIPS = {
    "v5e": Chip(15.75 * GIB, peak_flops("TPU v5e"), 0.82e12, 200e9, _FLAT),
    "v6e": Chip(31.25 * GIB, peak_flops("TPU v6"), 1.64e12, 400e9, _FLAT),
    "v5p": Chip(95.74 * GIB, peak_flops("TPU v5"), 2.765e12, 600e9, _CUBES),
    "h100": Chip(79.1 * GIB, peak_flops("H100"), 3.35e12, 450e9),
    "h200": Chip(140.4 * GIB, peak_flops("H200"), 4.8e12, 450e9),
}
_HOST = 8  # GPUs per host
_NETWORK = 50e9  # bytes per second that a GPU sends to other hosts (400 Gb/s)
_GPU_SHARE = 0.92  # of a GPU's memory; CUDA, cuBLAS and NCCL use the rest

_GPU = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory:.0f} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""

# With these, neither compiler looks for a device or complains that there is none.
_NO_DEVICE = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs on it, so processes may share it
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class Target(NamedTuple):
    """Chips of one kind, as in "v6e-4" or "h100x8"."""

    kind: str
    chips: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def limit(self) -> int:
        return int(self.chip.memory * (1 if self.chip.slices else _GPU_SHARE))

    @property
    def link(self) -> float:
        return _NETWORK if not self.chip.slices and self.chips > _HOST else self.chip.link

    def __str__(self) -> str:
        if self.chip.slices:
            return f"{self.kind}-{self.chips * (2 if self.kind == 'v5p' else 1)}"  # v5p counts cores
        return self.kind if self.chips == 1 else f"{self.kind}x{self.chips}"


def parse_target(name: str) -> Target:
    """A TPU slice ("v5litepod-8" or "v5e-8", "v6e-4", "v5p-128") or GPUs ("h200", "h100x8", "h100x16" on two hosts).

    Raises InputError if there is no such target.
    """
    match = re.fullmatch(r"(v5litepod|v5e|v6e|v5p)-(\d+)|(h100|h200)(?:x(\d+))?", name)
    if not match:
        raise InputError(
            f"target {name!r}: it must be a TPU slice such as v5e-8, v6e-4 or v5p-128, or GPUs such as h200 or h100x8"
        )
    if match[3]:
        chips = int(match[4] or 1)
        if chips < 1 or (chips > _HOST and chips % _HOST):
            raise InputError(f"target {name}: it must have 1 to {_HOST} GPUs, or a multiple of {_HOST}")
        return Target(match[3], chips)
    kind, number = match[1].replace("v5litepod", "v5e"), int(match[2])
    chips = number // 2 if kind == "v5p" else number
    if chips not in CHIPS[kind].slices or (kind == "v5p" and number % 2):
        slices = ", ".join(str(Target(kind, n)) for n in CHIPS[kind].slices)
        raise InputError(f"target {name}: no such slice; there are {slices}")
    return Target(kind, chips)


def devices(target: Target):
    """Abstract devices of the target, to compile for. Raises InputError if its compiler is not installed."""
    for name, value in _NO_DEVICE.items():  # before jax first looks for devices
        os.environ.setdefault(name, value)
    if target.chip.slices:
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(f"{target} needs the TPU compiler, which comes with the extra plan: {install('plan')}")
        bounds = {"chips_per_host_bounds": [1, 1, 1]} if target.chips == 1 else {}
        name = f"{target.kind}:{target.chip.slices[target.chips]}"
        return topologies.get_topology_desc(topology_name=name, platform="tpu", **bounds).devices
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise InputError(f"{target} needs the GPU compiler, which comes with the extra plan: {install('plan')}")
    chip = target.chip
    card = _GPU.format(name=target.kind.upper(), memory=chip.memory, bandwidth=chip.bandwidth)
    shape = f"{-(-target.chips // _HOST)}x1x{min(target.chips, _HOST)}"
    return topologies.get_topology_desc(
        topology_name=target.kind, platform="cuda", topology=shape, target_config=card
    ).devices
