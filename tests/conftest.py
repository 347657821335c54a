"""Fixtures that several test files share."""

import lzma
import shutil
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A directory with the real tokenizer, template and processor files of Qwen2.5-VL-7B-Instruct."""
    path = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer_config", "chat_template", "preprocessor_config", "generation_config"):
        shutil.copyfile(DATA / "tokenizer" / f"{name}.json", path / f"{name}.json")
    with lzma.open(DATA / "tokenizer" / "tokenizer.json.xz") as source:
        (path / "tokenizer.json").write_bytes(source.read())
    return path
