"""Which precision a checkpoint is held and computed in where the user names none."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import jax

from qwenvl_jax.config import Config
from qwenvl_jax.model.qwenvl import count_params

MEMORY_SHARE = 0.75  # of the free memory, for weights that are cast to float32


class Precision(NamedTuple):
    """compute: dtype to compute in. weights: dtype to cast the weights to, None to keep them. reason: a sentence."""

    compute: str
    weights: str | None
    reason: str = ""


def precision_of(config: Config, mesh=None) -> Precision:
    """What `load` does with a checkpoint of this config where no dtype is given.

    On TPUs and GPUs: the checkpoint's own dtype. On CPUs: float32. There bfloat16 weights stay as they are, since their
    products with float32 are exact and read half the memory (`narrow_product`). XLA:CPU has no such product for
    float16: those weights are cast to float32, if that takes at most MEMORY_SHARE of the free memory.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform != "cpu" or config.dtype == "float32":
        return Precision(config.dtype, None)
    told = f"{config.dtype} weights are computed in float32 on this CPU"
    if config.dtype == "bfloat16":
        return Precision("float32", None, f"{told}; --dtype bfloat16 rounds more")
    need, free = 4 * count_params(config), free_memory()
    room = f"{need / 1e9:.1f} of {free / 1e9:.1f} GB of free memory"
    if need <= MEMORY_SHARE * free:
        return Precision("float32", "float32", f"{told} and cast to it, which takes {room}")
    return Precision("float32", None, f"{told} but stay in 16 bits, which is slow; a cast would take {room}")


def free_memory() -> int:
    """Bytes of host memory that may still be used, by what the system and a container's limit say."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    cgroup = Path("/sys/fs/cgroup")
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
            free = min(free, int((cgroup / most).read_text()) - int((cgroup / used).read_text()))
    return max(free, 0)
