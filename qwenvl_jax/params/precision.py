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

    On TPUs and GPUs: the checkpoint's own dtype. On CPUs, float32: 16-bit weights are cast to it if that takes at most
    MEMORY_SHARE of the free memory. Otherwise they stay in 16 bits. bfloat16 then still multiplies float32 exactly and
    without a cast (`narrow_product`); XLA:CPU has no such matmul for float16, and casts each matrix for every token.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform != "cpu" or config.dtype == "float32":
        return Precision(config.dtype, None)
    need, free = 4 * count_params(config), free_memory()
    room = f"{need / 1e9:.1f} of {free / 1e9:.1f} GB of free memory (--dtype changes this)"
    if need <= MEMORY_SHARE * free:
        how = f"cast to float32, which takes {room}"
        return Precision("float32", "float32", f"on this CPU, {config.dtype} weights are {how}")
    how = f"computed in float32 but stay in 16 bits, since a cast would take {room}"
    return Precision("float32", None, f"on this CPU, {config.dtype} weights are {how}")


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
