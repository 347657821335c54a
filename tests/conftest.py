"""The process that the tests run in, and fixtures that several test files share."""

import atexit
import os
import shutil
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path

# XLA reads these once, before the first program. Programs for tests should compile fast, and meshes need devices;
# whatever names no device still runs on the first one.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
if "emitters" not in os.environ["XLA_FLAGS"] and version("jaxlib").startswith("0.10."):
    # LLVM's emitters compile a training step four times as fast as MLIR's. jax 0.12 has only the latter.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "device_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

# One folder of compiled programs for all test processes: workers and child processes inherit the variable.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="qwenvl-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from make_tiny import FAMILIES, copy_tokenizer, make_tiny

# A shell ignores Ctrl-C for what it starts in the background; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def compilations():
    """An event for each program that XLA compiles, or that is found compiled, during the test."""
    events = []

    def count(event: str, *_, **__) -> None:
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield events
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A directory with the real tokenizer, template and processor files of Qwen2.5-VL-7B-Instruct."""
    path = tmp_path_factory.mktemp("tokenizer")
    copy_tokenizer(path)
    return path


@pytest.fixture(scope="session", params=FAMILIES)
def tiny_checkpoint(request, tmp_path_factory) -> Path:
    """A complete Hugging Face checkpoint directory of random weights, one of each family."""
    return make_tiny(tmp_path_factory.mktemp("checkpoint") / request.param, request.param)
