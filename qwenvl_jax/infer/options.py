"""The options of one generation, and their defaults from the checkpoint.

Importing this file imports neither jax nor numpy.
"""

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwenvl_jax import options
from qwenvl_jax.errors import ContextError, OptionsError
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.options import check, checked, names, option
from qwenvl_jax.types import Sample

MAX_LOGPROBS = 20
_DEFAULT_NEW_TOKENS = 512
# Far beyond any use, and products with logits and counts stay finite in float32.
_LIMIT = 1e6
_TINY = 2.0**-126  # float32's smallest normal number; the device may flush smaller ones to zero


class Knobs(NamedTuple):
    """One setting a row, all [B]; `OFF` holds the values that change nothing."""

    temperature: Any  # float32; 0 is greedy
    top_k: Any  # int32; 0 is off
    top_p: Any  # float32; 1 is off
    min_p: Any  # float32; 0 is off
    repetition_penalty: Any  # float32; 1 is off
    presence_penalty: Any  # float32; 0 is off
    frequency_penalty: Any  # float32; 0 is off


OFF = Knobs(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)


@dataclass(frozen=True)
class GenerateOptions:
    """Settings of one conversation. None means the checkpoint's generation_config.json, see `resolve`.

    Penalties apply to greedy rows too, as in transformers. What is drawn follows from the seed and the token's index
    alone, not from the batch around it; sample j of n uses seed + j. The n samples share one prefill.
    """

    max_new_tokens: int | None = option(None, "most tokens to generate", least=1, title="sampling")
    temperature: float | None = option(None, "0 is greedy", least=0, most=_LIMIT)
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
        0.0, "subtracted from the logits of tokens that were generated before", least=-_LIMIT, most=_LIMIT
    )
    frequency_penalty: float = option(
        0.0, "subtracted once for every time that a token was generated before", least=-_LIMIT, most=_LIMIT
    )
    seed: int | None = option(None, "seed of the random draws; a new one each time if not given")
    n: int = option(1, "samples of the same conversation", least=1, flag=False)
    stop: tuple[str, ...] = option((), "end before this text; repeatable")
    stop_token_ids: tuple[int, ...] = option((), "end before this token id, besides the checkpoint's eos; repeatable")
    ignore_eos: bool = option(False, "go on to max_new_tokens past the checkpoint's eos")
    logprobs: int | None = option(
        None, "0: log-probability of each token; k: those of the k best too", least=0, most=MAX_LOGPROBS, flag=False
    )
    skip_special_tokens: bool = option(True, "leave control tokens such as <|box_start|> out of the text")

    def __post_init__(self):
        check(self)
        if "" in self.stop:
            raise OptionsError(f"stop is {self.stop!r}; it must be strings, none of them empty")

    @property
    def greedy(self) -> bool:
        return (self.temperature or 0.0) < _TINY  # or the device would divide by zero

    @property
    def knobs(self) -> Knobs:
        """The device's settings of a resolved row. A greedy row has its filters off: they cannot matter."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        if self.greedy:
            return Knobs(0.0, 0, 1.0, 0.0, *penalties)
        # A larger k is off; int32 must hold it.
        return Knobs(self.temperature, min(self.top_k or 0, 2**31 - 1), self.top_p, self.min_p, *penalties)

    def replace(self, **changes) -> "GenerateOptions":
        if moved := [name for name in changes if name in names(MediaOptions)]:
            raise OptionsError(
                f"unknown option {moved[0]}; pixel and frame options go to processor.encode(messages, ...), "
                "whose Sample generate takes"
            )
        return options.replace(self, changes)

    def resolve(self, generation: Mapping, eos_token_id: int) -> "GenerateOptions":
        """Fills in every None and checks every value; eos ids join `stop_token_ids`.

        generation: the checkpoint's generation_config.json, {} if it has none. As in transformers 4.51.3,
        `do_sample` absent or false is greedy, and with `do_sample` true an absent key means temperature 1,
        top_k 50, top_p 1 (the defaults of its GenerationConfig). The same top_k and top_p apply when only
        the temperature is given here. max_new_tokens is 512 if neither side says.
        """

        def default(key, otherwise):
            mine, theirs = getattr(self, key), generation.get(key)
            if mine is not None:
                return mine
            return otherwise if theirs is None else checked(GenerateOptions, key, theirs, "generation_config.json: ")

        temperature = self.temperature
        if temperature is None:
            temperature = default("temperature", 1.0) if generation.get("do_sample") else 0.0
        eos = generation.get("eos_token_id")
        try:
            eos = checked(GenerateOptions, "stop_token_ids", eos_token_id if eos is None else eos)
        except OptionsError as e:
            raise OptionsError(f"generation_config.json: eos_token_id is {eos!r}; it must be whole numbers") from e
        return dataclasses.replace(
            self,
            max_new_tokens=default("max_new_tokens", _DEFAULT_NEW_TOKENS),
            temperature=temperature,
            top_k=default("top_k", 50),
            top_p=default("top_p", 1.0),
            min_p=default("min_p", 0.0),
            repetition_penalty=default("repetition_penalty", 1.0),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop_token_ids=self.stop_token_ids + (() if self.ignore_eos else eos),
        )


def room(sample: Sample, context: int) -> int:
    """How many tokens fit after the prompt; ContextError if not even one does."""
    length = len(sample.tokens)
    if length >= context:
        shrink = " with fewer pictures or frames, or a smaller max_pixels" if sample.visuals else ""
        raise ContextError(
            f"the prompt has {length} tokens; the context of {context} must hold it and at least "
            f"one new token. Give a shorter conversation{shrink}"
        )
    return context - length
