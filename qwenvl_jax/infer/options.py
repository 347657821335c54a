"""The options of one generation, and their defaults from the checkpoint. This file imports neither jax nor numpy."""

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwenvl_jax import options
from qwenvl_jax.config import is_number
from qwenvl_jax.errors import ContextError, OptionsError, shown
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.options import check, checked, names, option
from qwenvl_jax.types import Sample

MAX_LOGPROBS = 20
_DEFAULT_NEW_TOKENS = 512
_LIMIT = 1e6  # products with logits and counts stay finite in float32
_FILE = "generation_config.json: "
_TINY = 2.0**-126  # float32's smallest normal number; the device may flush smaller ones to zero


class SamplingParams(NamedTuple):
    """Sampling parameters of the rows, each [B]. `OFF` holds the values that change nothing."""

    temperature: Any  # float32; 0 is greedy
    top_k: Any  # int32; 0 is off
    top_p: Any  # float32; 1 is off
    min_p: Any  # float32; 0 is off
    repetition_penalty: Any  # float32; 1 is off
    presence_penalty: Any  # float32; 0 is off
    frequency_penalty: Any  # float32; 0 is off


OFF = SamplingParams(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine, the same for all its conversations."""

    kv_dtype: str | None = option(
        None,
        "dtype of the KV cache: int8 takes half the memory of bfloat16; auto (the default) is the dtype of computation",
        choices=("auto", "int8"),
        title="engine",
    )

    def __post_init__(self):
        check(self)

    @property
    def int8(self) -> bool:
        return self.kv_dtype == "int8"


@dataclass(frozen=True)
class GenerateOptions:
    """Options of one conversation. None means the value in generation_config.json, see `resolve`.

    Penalties apply to greedy rows too, as in transformers. A draw depends on the seed and the token's index only, not
    on the batch; sample j of n uses seed + j. The n samples share one prefill.
    """

    max_new_tokens: int | None = option(None, "most tokens to generate", least=1, title="sampling")
    temperature: float | None = option(None, "divides the logits; 0 is greedy", least=0, most=_LIMIT)
    top_k: int | None = option(None, "keep the K most likely tokens; 0 is off", least=0)
    top_p: float | None = option(
        None, "keep the most likely tokens whose probabilities add up to this; 1 is off", least=_TINY, most=1
    )
    min_p: float | None = option(
        None, "keep tokens at least this fraction as likely as the best one; 0 is off", least=0, most=1
    )
    repetition_penalty: float | None = option(
        None, "divides positive logits of tokens in the prompt or output; 1 is off", least=1 / _LIMIT, most=_LIMIT
    )
    presence_penalty: float = option(
        0.0, "subtracted from the logits of tokens generated before", least=-_LIMIT, most=_LIMIT
    )
    frequency_penalty: float = option(
        0.0, "subtracted once per earlier occurrence of a generated token", least=-_LIMIT, most=_LIMIT
    )
    seed: int | None = option(None, "seed of the random draws; without it, every run differs")
    n: int = option(1, "answers to the same conversation", least=1, flag=False)
    stop: tuple[str, ...] = option((), "stop before this text; repeatable")
    stop_token_ids: tuple[int, ...] = option((), "stop at this token id too, not only at eos; repeatable")
    ignore_eos: bool = option(False, "do not stop at the checkpoint's eos")
    logprobs: int | None = option(
        None, "0: log-probability of each token; k: of the k best tokens too", least=0, most=MAX_LOGPROBS, flag=False
    )
    skip_special_tokens: bool | None = option(
        None, "leave control tokens such as <|box_start|> out of the text; default: unless the checkpoint keeps them"
    )

    def __post_init__(self):
        check(self)
        if "" in self.stop:
            raise OptionsError(f"stop is {shown(self.stop)}; it must be strings, none of them empty")

    @property
    def greedy(self) -> bool:
        return (self.temperature or 0.0) < _TINY  # a smaller divisor is zero on the device

    @property
    def sampling_params(self) -> SamplingParams:
        """What the device gets for a row with resolved options. Greedy rows have their filters off."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        if self.greedy:
            return SamplingParams(0.0, 0, 1.0, 0.0, *penalties)
        # k goes to the device as an int32.
        return SamplingParams(self.temperature, min(self.top_k or 0, 2**31 - 1), self.top_p, self.min_p, *penalties)

    def replace(self, **changes) -> "GenerateOptions":
        if media := [name for name in changes if name in names(MediaOptions)]:
            raise OptionsError(
                f"unknown option {media[0]}; pixel and frame options go to processor.encode(messages, ...), "
                "and generate takes the Sample that it returns"
            )
        return options.replace(self, changes)

    def resolve(
        self, generation: Mapping, eos_token_id: int | tuple[int, ...], *, keep_special=False, vocab_size=2**31
    ) -> "GenerateOptions":
        """Fills in every None, checks every value, and adds the eos ids to `stop_token_ids`.

        generation: the checkpoint's generation_config.json, or {}. As in transformers 4.51.3, decoding is greedy unless
        `do_sample` is true; then missing keys mean temperature 1, top_k 50 and top_p 1 (GenerationConfig's defaults).
        The same top_k and top_p apply if only a temperature is given here. max_new_tokens defaults to 512, or to
        max_length, which counts the prompt too (`tokens_left`). stop_strings stand for a `stop` that is not given.
        keep_special: the processor's `allow_control_tokens`; if true, skip_special_tokens defaults to false.
        vocab_size: stop_token_ids and eos ids must be below it.
        Raises OptionsError for a bad value in the file.
        """

        def value(key, default):
            if (own := getattr(self, key)) is not None:
                return own
            stored = generation.get(key)
            return default if stored is None else checked(GenerateOptions, key, stored, _FILE)

        greedy = self.temperature is None and not generation.get("do_sample")
        eos = () if self.ignore_eos else _eos(generation, eos_token_id, vocab_size)
        _check_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        return dataclasses.replace(
            self,
            max_new_tokens=value("max_new_tokens", self.max_length(generation) or _DEFAULT_NEW_TOKENS),
            temperature=0.0 if greedy else value("temperature", 1.0),
            top_k=value("top_k", 50),
            top_p=value("top_p", 1.0),
            min_p=value("min_p", 0.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            skip_special_tokens=value("skip_special_tokens", not keep_special),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=self.stop or _stop_strings(generation),
            stop_token_ids=self.stop_token_ids + eos,
        )

    def max_length(self, generation: Mapping) -> int | None:
        """max_length of generation_config.json, of prompt and answer, if no max_new_tokens takes its place."""
        length = generation.get("max_length")
        if length is None or self.max_new_tokens is not None or generation.get("max_new_tokens") is not None:
            return None
        if not is_number(length, int) or length < 1:
            raise OptionsError(
                f"generation_config.json: max_length is {shown(length)}; it must be a whole number above 0"
            )
        return length


def _eos(generation: Mapping, default, vocab_size: int) -> tuple[int, ...]:
    eos = generation.get("eos_token_id")
    try:
        ids = checked(GenerateOptions, "stop_token_ids", default if eos is None else eos)
    except OptionsError as e:
        raise OptionsError(f"{_FILE}eos_token_id is {shown(eos)}; it must be whole numbers") from e
    if eos is not None:
        _check_ids(f"{_FILE}eos_token_id", ids, vocab_size)
    return ids


def _check_ids(name: str, ids: tuple[int, ...], vocab_size: int) -> None:
    for one in ids:
        if not 0 <= one < vocab_size:
            raise OptionsError(f"{name} is {shown(one)}, which is not in the vocabulary of {vocab_size} tokens")


def _stop_strings(generation: Mapping) -> tuple[str, ...]:
    stored: Any = generation.get("stop_strings")
    try:
        return GenerateOptions(stop=stored).stop
    except OptionsError as e:
        raise OptionsError(f"{_FILE}stop_strings is {shown(stored)}; it must be texts, none empty") from e


def tokens_left(sample: Sample, context: int, max_length: int | None = None) -> int:
    """How many tokens may follow the prompt, in the context and in `max_length`. Raises ContextError if none may."""
    length = len(sample.tokens)
    if max_length is not None and length >= max_length and length < context:
        raise ContextError(
            f"the prompt has {length} tokens; generation_config.json allows {max_length} with the answer (max_length). "
            "Give max_new_tokens (--max-new-tokens)"
        )
    if length >= context:
        shrink = " with fewer pictures or frames, or a smaller max_pixels" if sample.visuals else ""
        raise ContextError(
            f"the prompt has {length} tokens; the context of {context} must hold it and at least "
            f"one new token. Use a shorter conversation{shrink}"
        )
    return min(context, max_length or context) - length
