"""Fixtures that several test files share."""

import os
from pathlib import Path

# Tests mostly wait for the compiler. Read when jax first compiles.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import pytest
from make_tiny import FAMILIES, copy_tokenizer, make_tiny


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """What a warm-up writes is not for the home folder."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))


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
