"""Turns conversations into token ids and patches with a checkpoint's tokenizer, template and preprocessing."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from qwenvl_jax.answers.boxes import check_coordinates, sizes, to_model
from qwenvl_jax.config import Config, read_json, read_text
from qwenvl_jax.errors import CheckpointError, ContextError, InputError, shown
from qwenvl_jax.families import family_of
from qwenvl_jax.inputs.budget import Budget
from qwenvl_jax.inputs.chat import ChatTemplate, prompt_parts
from qwenvl_jax.inputs.layout import find_placeholders, make_sample
from qwenvl_jax.inputs.media import image_visual
from qwenvl_jax.inputs.messages import Media, check_tools, map_texts, normalize, strings
from qwenvl_jax.inputs.options import DEFAULT, FRAMES, IMAGE, VIDEO, MediaOptions
from qwenvl_jax.inputs.preprocessing import PREPROCESSOR_FILE, Preprocessing, read_preprocessing
from qwenvl_jax.inputs.video import video_visual
from qwenvl_jax.options import build
from qwenvl_jax.types import Sample, Visual

_TURN_START, _TURN_END, _ASSISTANT = "<|im_start|>", "<|im_end|>", "assistant\n"  # ChatML, as in every family
_COPY = "trainers leave it out if they have no processor: copy it from the model that was trained"
RULE_FILE, RULE = "tokenizer_config.json", "allow_control_tokens"  # our key, beside the tokenizer's own
_TOKEN_LETTERS = 128  # in the longest token of Qwen's vocabulary
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
_LOADERS = 8  # threads that decode one conversation's media; Pillow and PyAV release the GIL


class Prompt(NamedTuple):
    """A conversation before its media are opened."""

    tokens: np.ndarray  # [t] int32, one placeholder per picture or clip
    turns: np.ndarray  # [t] int32: k for the text of the k-th assistant message and its <|im_end|>, else 0
    placeholders: np.ndarray  # [n] int: their indices in `tokens`
    media: list[Media]  # [n], in reading order


@dataclass(frozen=True, eq=False)
class Processor:
    """Turns messages into token ids and patches for one checkpoint. It is immutable and thread-safe.

    tokenizer: must have `encode_special_tokens` set: typed control tokens then become ids of plain text.
    allow_control_tokens: the checkpoint's rule, unless a call says otherwise. True: control tokens typed in a text
        become control tokens, and answers keep theirs (`GenerateOptions.skip_special_tokens` is off).
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    preprocessing: Preprocessing
    config: Config
    allow_control_tokens: bool = False

    def __post_init__(self):
        if not self.tokenizer.encode_special_tokens:
            raise InputError("set the tokenizer's encode_special_tokens; otherwise users can type control tokens")

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True  # pickling a tokenizer drops the setting

    @classmethod
    def from_dir(cls, path, config: Config, adapters: Sequence[Path] = ()) -> "Processor":
        """Reads the tokenizer, chat template and preprocessor config of a checkpoint directory.

        adapters: directories of adapters in this checkpoint; the rule for control tokens is that of the last one that
            has a rule.
        Raises CheckpointError that names a file that is missing, unreadable or contradicts `config`.
        """
        path = Path(path)
        preprocessing = read_preprocessing(path, config)
        if preprocessing is None:
            raise CheckpointError(f"{path} has no {PREPROCESSOR_FILE}; {_COPY}")
        tokenizer = _read_tokenizer(path)
        tokenizer.encode_special_tokens = True
        rule = read_rule(path, *adapters)
        return cls(tokenizer, ChatTemplate.from_dir(path), preprocessing, config, rule)

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Ids of the special tokens, by their text. Typed in a message they are plain characters."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def without_control_tokens(self, text: str) -> str:
        """The text as `decode` with `skip_special_tokens` would give it."""
        for token in sorted(self.control_tokens, key=len, reverse=True):
            text = text.replace(token, "")
        return text

    def render(self, messages, *, tools=None, add_generation_prompt=True, add_vision_id=False) -> str:
        """The prompt as text, for inspection: one placeholder per picture or clip, which are not opened."""
        flags = dict(add_generation_prompt=add_generation_prompt, add_vision_id=add_vision_id)
        return "".join(self._parts(normalize(messages)[0], tools, **flags))

    def encode(
        self,
        messages: Sequence[Mapping],
        *,
        tools: Sequence[Mapping] | None = None,
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
        allow_control_tokens: bool | None = None,
        boxes: str | None = None,
        **media,
    ) -> Sample:
        """One conversation as a Sample: token ids, positions and patches.

        tools: JSON descriptions in OpenAI's form.
        add_vision_id: number the pictures and clips ("Picture 1: ").
        allow_control_tokens: control tokens typed in messages become control tokens, as in transformers; None: the rule
            of the processor.
        boxes: the coordinates of boxes in the messages, one of `answers.boxes.COORDINATES`; they are converted to those
            of the model. None leaves the texts as they are.
        media: MediaOptions by name, for all pictures and clips; an item of a message overrides them.
        Raises InputError that names the message and item.
        """
        options = build(MediaOptions, media)
        check_coordinates(boxes)
        flags = dict(add_generation_prompt=add_generation_prompt, add_vision_id=add_vision_id)
        flags |= dict(tools=tools, allow_control_tokens=allow_control_tokens)
        prompt = self.prompt(messages, **flags)
        if (length := len(prompt.tokens)) > self.config.text.context:
            context = f"the context of {self.config.text.context} must hold it"
            raise ContextError(f"the prompt has {length} tokens; {context}. Use a shorter conversation")
        visuals = self.open(prompt.media, options)
        if boxes is not None:
            prompt = self.prompt(self.boxes_to_model(messages, visuals, boxes), **flags)
        return make_sample(prompt.tokens, visuals, self.config, placeholders=prompt.placeholders)

    def prompt(self, messages, *, tools=None, add_generation_prompt=False, **flags) -> Prompt:
        """The first half of `encode`, with its options: everything except opening the media."""
        normal, media = normalize(messages)
        self._check_text(normal, tools)
        tokens, turns = self._ids(self._parts(normal, tools, add_generation_prompt=add_generation_prompt, **flags))
        placeholders = find_placeholders(tokens, [m.kind for m in media], self.config)
        return Prompt(tokens, turns, placeholders, media)

    def _check_text(self, normal: list[dict], tools) -> None:
        """Raises ContextError for a conversation that cannot fit into the context, before it is rendered."""
        context, length = self.config.text.context, 0
        if len(normal) > context:
            raise ContextError(f"{len(normal):,} messages; the context has {context:,} tokens")
        for text in strings([normal, check_tools(tools)]):
            length += len(text)
            if length > context * _TOKEN_LETTERS:
                raise ContextError(f"the text has over {length - 1:,} letters; the context has {context:,} tokens")

    def boxes_to_model(self, messages, visuals: Sequence[Visual], source: str | None) -> list[dict]:
        """Messages with the boxes of their texts in the model's coordinates: see `answers.boxes.to_model`."""
        places = [sizes(visual, self.config) for visual in visuals]
        target = family_of(self.config).BOXES

        def change(text: str, pictures: range, role) -> str:
            return to_model(text, [places[i] for i in pictures], target, source, role == "assistant")

        return map_texts(messages, change)

    def limits(self, visual: Visual) -> tuple[int, int]:
        """The largest x and y in a picture, in the model's coordinates."""
        return sizes(visual, self.config).of(family_of(self.config).BOXES)

    def _parts(self, normal: list[dict], tools, *, allow_control_tokens: bool | None = None, **flags) -> list[str]:
        allow = self.allow_control_tokens if allow_control_tokens is None else allow_control_tokens
        tools = check_tools(tools)
        return prompt_parts(self.template, normal, tools, self.control_tokens, allow_control_tokens=allow, **flags)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; the bytes of an incomplete character become U+FFFD."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def _ids(self, parts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the parts, and the `turns` of `Prompt`. Only the template can open or close a turn."""
        ids: list[int] = []
        turns: list[int] = []
        turn = count = 0
        for i, part in enumerate(parts):
            if i % 2:
                turn = 0 if part == _TURN_START else turn
                ids.append(self.control_tokens[part])
                turns.append(turn)
                turn = 0 if part == _TURN_END else turn
            elif part:
                encoding = self.tokenizer.encode(part, add_special_tokens=False)
                head = 0
                if i and parts[i - 1] == _TURN_START and part.startswith(_ASSISTANT):
                    turn = count = count + 1
                    # One token may span the header's newline and the first text; it is not trained on.
                    head = sum(start < len(_ASSISTANT) for start, _ in encoding.offsets)
                ids += encoding.ids
                turns += [0] * head + [turn] * (len(encoding.ids) - head)
        tokens = np.array(ids, np.int32)
        if len(tokens) and tokens.max() >= self.config.text.vocab_size:
            size = self.config.text.vocab_size
            raise CheckpointError(f"the tokenizer gave id {tokens.max()}, but config.json's vocab_size is {size}")
        return tokens, np.array(turns, np.int32)

    def budget(self, options: MediaOptions = DEFAULT, before: Budget | None = None) -> Budget:
        """What the media of one conversation may take. before: that of some of them, which were opened earlier."""
        c, p = self.config.text.context, self.preprocessing
        return Budget(options, 3 * p.temporal_patch_size * c * p.factor**2, before)

    def open(
        self, media: Sequence[Media], options: MediaOptions = DEFAULT, budget: Budget | None = None
    ) -> tuple[Visual, ...]:
        """The second half of `encode`: pictures and clips as patches, within the budget, by default that of `options`.

        A source that is a Visual already stays.
        """
        budget = budget or self.budget(options)
        if len(media) < 2:  # without a thread
            return tuple(self._visual(m, options, budget) for m in media)
        with ThreadPoolExecutor(min(_LOADERS, len(media))) as pool:
            return tuple(pool.map(lambda m: self._visual(m, options, budget), media))

    def _visual(self, media: Media, options: MediaOptions, budget: Budget) -> Visual:
        if isinstance(media.source, Visual):  # opened before, with options of its own
            return media.source
        names, load = (IMAGE, image_visual) if media.kind == "image" else (VIDEO, video_visual)
        if media.kind == "video" and isinstance(media.source, list | tuple | np.ndarray):
            names = FRAMES
        chosen = {name: getattr(options, name) for name in names} | media.options
        # fps and nframes exclude each other: an item's choice of one replaces a default of the other.
        for mine, other in (("fps", "nframes"), ("nframes", "fps")):
            if mine in media.options and other not in media.options:
                chosen.pop(other, None)
        try:
            return load(media.source, self.preprocessing, MediaOptions(**chosen), budget)
        except InputError as e:
            raise e.at(media.where) from e


def read_rule(*folders: Path) -> bool:
    """Whether control tokens in texts take effect: what the last folder says that says it."""
    rule = False
    for file in (folder / RULE_FILE for folder in folders):
        own = read_json(file, missing={}).get(RULE)
        if own is not None and not isinstance(own, bool):
            raise CheckpointError(f"{file}: {RULE} is {shown(own)}; it must be true or false")
        rule = rule if own is None else own
    return rule


def _read_tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        return _build_tokenizer(path)
    text = read_text(file)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as e:  # the library raises bare Exception
        raise CheckpointError(f"{file}: not a readable tokenizer ({e})") from e
    # transformers keeps the settings of its last call in the file. They would cut or lengthen every prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):  # BPE dropout, of training, splits the same text anew each time
        tokenizer.model.dropout = None
    return tokenizer


# Qwen2's split into words; vocab.json and merges.txt do not contain it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _build_tokenizer(path: Path) -> Tokenizer:
    """The same tokenizer from the older files: vocab.json, merges.txt, tokenizer_config.json."""
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if not (vocab.exists() and merges.exists()):
        raise CheckpointError(f"{path} has no tokenizer.json, nor vocab.json with merges.txt; {_COPY}")
    ids, lines = read_json(vocab), read_text(merges).removesuffix("\n").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    try:
        tokenizer = Tokenizer(tokenizers.models.BPE(ids, pairs))
    except Exception as e:  # the library raises bare Exception
        raise CheckpointError(f"{vocab}, {merges}: not a readable vocabulary ({e})") from e
    bytes_only = dict(add_prefix_space=False, use_regex=False)
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(**bytes_only)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel(**bytes_only)
    for i, token in _added_tokens(path / RULE_FILE):  # the order decides the ids
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != i:
            raise CheckpointError(f"{path}: added token {json.dumps(token.content)} cannot have id {i}")
    return tokenizer


def _added_tokens(file: Path) -> list[tuple[int, tokenizers.AddedToken]]:
    """The added tokens of tokenizer_config.json with their ids, which rise. Raises CheckpointError."""
    added = read_json(file).get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        raise CheckpointError(f"{file}: added_tokens_decoder is {shown(added)}; it must be a JSON object")
    found = {}
    for key, token in added.items():
        entry = f"{file}: added_tokens_decoder has {shown(key)}: {shown(token)}"
        if not re.fullmatch("[0-9]{1,9}", key):
            raise CheckpointError(f"{entry}; its keys must be token ids")
        if not (isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"]):
            raise CheckpointError(f"{entry}; it must be a JSON object with content, a text")
        flags = {name: token[name] for name in _TOKEN_FLAGS if name in token}
        if not all(isinstance(value, bool) for value in flags.values()):
            raise CheckpointError(f"{entry}; {', '.join(flags)} must be true or false")
        found[int(key)] = tokenizers.AddedToken(token["content"], **flags)
    return sorted(found.items())
