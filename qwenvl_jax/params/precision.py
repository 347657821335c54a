"""The precision in which a CPU holds and computes a checkpoint, if the user gives none. Imports no jax."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

MEMORY_SHARE = 0.75  # of the free memory, for weights that are cast to float32
CGROUP = Path("/sys/fs/cgroup")


class Precision(NamedTuple):
    """compute: dtype to compute in. weights: dtype to cast the weights to, None to keep them. reason: a sentence."""

    compute: str
    weights: str | None
    reason: str = ""


def on_cpu(dtype: str, parameters: int) -> Precision:
    """The precision for so many parameters of a dtype: compute in float32.

    16-bit weights are cast to float32 if that takes at most MEMORY_SHARE of the free memory. Otherwise they stay in 16
    bits: bfloat16 weights are then multiplied exactly and without a cast (`narrow_product` of model/linear.py), but
    XLA:CPU casts each float16 matrix for every token.
    """
    if dtype == "float32":
        return Precision(dtype, None)
    need, free = 4 * parameters, free_memory()
    size = f"{need / 1e9:.1f} GB" if need > 1e9 else f"{need / 1e6:.0f} MB"
    memory = f"{size} of {free / 1e9:.1f} GB of free memory (dtype changes this)"
    if need <= MEMORY_SHARE * free:
        return Precision("float32", "float32", f"on a CPU, {dtype} weights are cast to float32, which takes {memory}")
    how = f"stay in 16 bits and are computed in float32, since a cast would take {memory}"
    return Precision("float32", None, f"on a CPU, {dtype} weights {how}")


def free_memory() -> int:
    """Free bytes of host memory, within the system's memory and the container's limit."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    for most, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            limit, taken = int((CGROUP / most).read_text()), int((CGROUP / used).read_text())
            counts = dict(line.split() for line in (CGROUP / stat).read_text().splitlines())
            free = min(free, limit - taken + int(counts.get("inactive_file", 0)))  # cached files can be dropped
    return max(free, 0)
