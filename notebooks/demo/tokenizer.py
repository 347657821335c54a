"""The demo's tokenizer: one token for each word of the prompts, single bytes for everything else.

A vocabulary below 900 keeps the embedding table small. There are no merges: a piece of text in the vocabulary is one
token, any other is its bytes. So words in a picture are always spelled in the same way.
"""

import json
import os
import re
import tempfile
from pathlib import Path

from demo.emoji import NAMES, plural
from demo.questions import ALL

# In the order of Qwen2.5-VL, whose ids start at 151643; here they follow the words.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# The JSON around the numbers and labels of an answer with boxes.
JSON_PIECES = ('[{"bbox_2d": [', '], "label": "', '"}, {"bbox_2d": [', '"}]', ", ")
SYSTEM = "You are a helpful assistant."  # the template's default

# Qwen2's split into words (see `inputs/processor.py`), with the JSON pieces in front.
_WORDS = (
    "|".join(re.escape(piece).replace(r"\ ", " ") for piece in JSON_PIECES)
    + r"|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5-VL's chat template, as published by the Qwen team under Apache-2.0.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PREPROCESSOR = {
    "min_pixels": 28 * 28,
    "max_pixels": 64 * 28 * 28,
    "video_max_pixels": 9 * 28 * 28,  # a key of this package only
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
CONTEXT = 2048


def vocabulary() -> dict[str, int]:
    """{token in byte-level letters: id}: the 256 bytes, then the pieces; special tokens follow."""
    letters = byte_letters()
    words = dict.fromkeys("".join(letters[b] for b in piece.encode()) for piece in _pieces() if len(piece) > 1)
    return {token: i for i, token in enumerate((*letters, *words))}


def special_ids() -> dict[str, int]:
    """{special token: id}, for config.json."""
    return {token: i for i, token in enumerate(SPECIAL, len(vocabulary()))}


def _pieces() -> list[str]:
    """All texts that are one token, cut as `_WORDS` cuts them."""
    kinds = [word for name in NAMES for word in (name, plural(name))]
    texts = ["system\n", "user\n", "assistant\n", SYSTEM, *ALL, *(q[0].lower() + q[1:] for q in ALL), " seconds"]
    # Split into " word", "word" and punctuation, as the regular expression does for plain English.
    found = [piece for text in texts for piece in re.findall(r" ?[A-Za-z]+|[^\sA-Za-z]", text.replace("{}", ""))]
    return [*JSON_PIECES, *found, *kinds, *(f" {word}" for word in kinds)]


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary, as in GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def write_processor(directory: str | Path) -> Path:
    """Writes tokenizer, chat template, preprocessor and generation settings; the same bytes each time.

    These are all files of a checkpoint except config.json and the weights. Replaces existing files.
    """
    directory, special = Path(directory), special_ids()
    directory.mkdir(parents=True, exist_ok=True)
    end, stop = special["<|endoftext|>"], special["<|im_end|>"]
    files = {
        "tokenizer.json": _tokenizer(special),
        "tokenizer_config.json": _tokenizer_config(special),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "preprocessor_config.json": PREPROCESSOR,
        "generation_config.json": {
            "bos_token_id": end,
            "pad_token_id": end,
            "eos_token_id": [stop, end],
            "do_sample": False,
        },
    }
    with tempfile.TemporaryDirectory(dir=directory) as unfinished:
        for name, content in files.items():
            path = Path(unfinished) / name
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
            os.replace(path, directory / name)
    return directory


# A special token, in both of the tokenizer's files.
_PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def _tokenizer(special: dict[str, int]) -> dict:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token} | _PLAIN for token, i in special.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # look up the whole piece first
            "vocab": vocabulary(),
            "merges": [],
        },
    }


def _tokenizer_config(special: dict[str, int]) -> dict:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": token} | _PLAIN for token, i in special.items()},
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONTEXT,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
