"""What a caller may ask of a generation, and where the answers come from when nothing is asked.

Importing this file does not import jax.
"""

import dataclasses
import inspect
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qwenvl_jax.errors import InputError
from qwenvl_jax.types import Sample

MAX_LOGPROBS = 20
_DEFAULT_NEW_TOKENS = 512
# Far beyond any use, and products with logits and counts stay finite in float32.
_LIMIT = 1e6
_TINY = float(np.finfo(np.float32).tiny)  # what is smaller, the device may flush to zero


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

    max_new_tokens: tokens to generate at most.
    temperature: 0 is greedy, 1e6 the most. Penalties apply to greedy rows too, as in transformers.
    top_k: how many of the most likely tokens to keep; 0 is off.
    top_p: keep the most likely tokens whose probability reaches this; 1 is off.
    min_p: keep tokens at least this fraction as likely as the best one; 0 is off.
    repetition_penalty: divides positive logits of tokens in the prompt or output; 1 is off; 1e-6 to 1e6.
    presence_penalty, frequency_penalty: subtracted once, or once an occurrence, for generated tokens; -1e6 to 1e6.
    seed: what is drawn follows from the seed and the token's index alone, not from the batch around it.
        Sample j of n uses seed + j. None draws a new one each time.
    n: how many samples of this conversation; it is encoded and read once for all of them.
    stop: strings that end the text; not part of it.
    stop_token_ids: ids that end the text, besides the checkpoint's eos ids; not part of it.
    ignore_eos: go on to max_new_tokens past the checkpoint's eos ids.
    logprobs: None for none; 0 for each token's own; k ≤ 20 for those of the k best tokens too.
    skip_special_tokens: leave control tokens (`<|box_start|>` …) out of the text.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature < _TINY  # or the device would divide by zero

    @property
    def knobs(self) -> Knobs:
        """The device's settings of a resolved row. A greedy row has its filters off: they cannot matter."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        if self.greedy:
            return Knobs(0.0, 0, 1.0, 0.0, *penalties)
        # A larger k is off; int32 must hold it.
        return Knobs(self.temperature, min(self.top_k, 2**31 - 1), self.top_p, self.min_p, *penalties)

    def replace(self, **changes) -> "GenerateOptions":
        unknown = changes.keys() - {f.name for f in dataclasses.fields(self)}
        if unknown:
            from qwenvl_jax.inputs.processor import Processor

            known = ", ".join(f.name for f in dataclasses.fields(self))
            hint = ""
            if unknown & inspect.signature(Processor.encode).parameters.keys():
                hint = ". Pixel and frame options go to processor.encode(messages, ...), whose Sample generate takes"
            raise InputError(f"unknown option {', '.join(sorted(unknown))}; known are {known}{hint}")
        return dataclasses.replace(self, **changes)

    def resolve(self, generation: Mapping, eos_token_id: int) -> "GenerateOptions":
        """Fills in every None and checks every value; eos ids join `stop_token_ids`.

        generation: the checkpoint's generation_config.json, {} if it has none. As in transformers 4.51.3,
        `do_sample` absent or false is greedy, and with `do_sample` true an absent key means temperature 1,
        top_k 50, top_p 1 (the defaults of its GenerationConfig). The same top_k and top_p apply when only
        the temperature is given here. max_new_tokens is 512 if neither side says.
        """

        def default(key, otherwise):
            mine, theirs = getattr(self, key), generation.get(key)
            return mine if mine is not None else theirs if theirs is not None else otherwise

        temperature = self.temperature
        if temperature is None:
            temperature = default("temperature", 1.0) if generation.get("do_sample") else 0.0
        eos = generation.get("eos_token_id")
        eos = eos_token_id if eos is None else eos
        eos = _listed(eos, int, "generation_config.json: eos_token_id")
        stop_token_ids = _listed(self.stop_token_ids, int, "stop_token_ids")
        options = dataclasses.replace(
            self,
            max_new_tokens=default("max_new_tokens", _DEFAULT_NEW_TOKENS),
            temperature=temperature,
            top_k=default("top_k", 50),
            top_p=default("top_p", 1.0),
            min_p=default("min_p", 0.0),
            repetition_penalty=default("repetition_penalty", 1.0),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=_listed(self.stop, str, "stop"),
            stop_token_ids=stop_token_ids + (() if self.ignore_eos else eos),
        )
        _check(options, {k for k, x in generation.items() if x is not None and getattr(self, k, 0) is None})
        return options


def room(sample: Sample, context: int) -> int:
    """How many tokens fit after the prompt; InputError if not even one does."""
    length = len(sample.tokens)
    if length >= context:
        shrink = " with fewer pictures or frames, or a smaller max_pixels" if sample.visuals else ""
        raise InputError(
            f"the prompt has {length} tokens; the context of {context} must hold it and at least "
            f"one new token. Give a shorter conversation{shrink}"
        )
    return context - length


def _listed(value, kind, name) -> tuple:
    values = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(isinstance(x, kind) and x != "" for x in values):
        what = "strings, none of them empty" if kind is str else "whole numbers"
        raise InputError(f"{name} is {value!r}; it must be a list of {what}")
    return values


def _check(o: GenerateOptions, theirs: set[str]) -> None:
    """theirs: the options whose value is the checkpoint's, so that it gets the blame."""

    def number(name, what, fits, kinds=(int, float)):
        value = getattr(o, name)
        # numpy scalars are welcome; True is not the number one.
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, kinds) or not fits(value):  # nan fits nowhere
            where = "generation_config.json: " if name in theirs else ""
            raise InputError(f"{where}{name} is {getattr(o, name)!r}; it must be {what}")

    number("max_new_tokens", "a whole number, 1 or more", lambda x: x >= 1, int)
    number("temperature", "between 0 (greedy) and 1e6", lambda x: 0 <= x <= _LIMIT)
    number("top_k", "a whole number, 1 or more, or 0 for off", lambda x: x >= 0, int)
    number("top_p", f"at least {_TINY:.2g} and at most 1 (off)", lambda x: _TINY <= x <= 1)
    number("min_p", "between 0 (off) and 1", lambda x: 0 <= x <= 1)
    number("repetition_penalty", "between 1e-6 and 1e6; 1 is off", lambda x: 1 / _LIMIT <= x <= _LIMIT)
    number("presence_penalty", "between -1e6 and 1e6; 0 is off", lambda x: abs(x) <= _LIMIT)
    number("frequency_penalty", "between -1e6 and 1e6; 0 is off", lambda x: abs(x) <= _LIMIT)
    number("seed", "a whole number", lambda x: True, int)
    number("n", "a whole number, 1 or more", lambda x: x >= 1, int)
    if o.logprobs is not None:
        number("logprobs", f"a whole number from 0 to {MAX_LOGPROBS}", lambda x: 0 <= x <= MAX_LOGPROBS, int)
