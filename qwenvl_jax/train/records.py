"""Turns a training record into samples with loss weights: one conversation, or a pair of them.

The assistant's text is trained on, except messages that say otherwise. `inputs/records.py` reads the forms of records.
"""

import json
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenvl_jax import stores
from qwenvl_jax.answers.boxes import check_coordinates
from qwenvl_jax.errors import BadRecord, InputError, shown
from qwenvl_jax.inputs.layout import Lanes, make_sample, slots_needed
from qwenvl_jax.inputs.options import MediaOptions, PromptOptions
from qwenvl_jax.inputs.processor import Processor, Prompt
from qwenvl_jax.inputs.records import Conversation, conversation, preference
from qwenvl_jax.options import check_names, names
from qwenvl_jax.types import Sample, Visual


class PackShape(NamedTuple):
    """The shape of all batches of a run on one host.

    segments: the largest number of conversations in a row. Preferences need an even number.
    """

    rows: int  # B
    tokens: int  # T
    lanes: int  # R
    patches: int  # P: a multiple of the window block; the largest frame must fit
    segments: int | None = None


class RecordProcessor:
    """Turns records into samples with loss weights.

    folder: the folder that relative paths start from; None for the working directory.
    options: options of `Processor.encode`: MediaOptions, PromptOptions, and boxes, for records that do not say in which
        coordinates their boxes are.
    """

    def __init__(self, processor: Processor, shape: PackShape, *, preferences=False, folder=None, options=None):
        flags = names(PromptOptions)
        options = dict(options or {})
        self.boxes = options.pop("boxes", None)
        check_coordinates(self.boxes)
        check_names(options, (*names(MediaOptions), *flags))
        self.processor, self.shape, self.preferences = processor, shape, preferences
        self.folder = None if folder is None else stores.folder(folder)
        self.flags = {k: options.pop(k) for k in flags if k in options}
        self.options = MediaOptions(**options)

    def __call__(self, record, folder: Path | None = None) -> tuple[Sample, ...]:
        """One conversation, or the chosen and the rejected one with the same visuals.

        folder: that of the record's file; the processor's own folder comes first. Raises BadRecord.
        """
        folder = folder if self.folder is None else self.folder
        read = preference(record, folder) if self.preferences else [conversation(record, folder)]
        for talk in read:
            _check_calls(talk)
        prompts = [self._prompt(talk) for talk in read]
        if not all(any(talk.weights) for talk in read):
            raise BadRecord("nothing to learn", _why_nothing(record))
        media = prompts[0].media
        for prompt in prompts[1:]:
            if [m.source for m in prompt.media] != [m.source for m in media]:
                raise BadRecord("messages", "'chosen' and 'rejected' must be text; put pictures into the prompt")
        self._check_length(sum(len(prompt.tokens) for prompt in prompts))  # before anything is decoded
        with _reason("media"):
            visuals = self.processor.open(media, self.options)
        for i, talk in enumerate(read):
            converted = self._boxes_to_model(talk.messages, visuals, record)
            prompts[i] = prompts[i] if converted == talk.messages else self._prompt(talk._replace(messages=converted))
        samples = tuple(self._sample(p, talk.weights, visuals) for p, talk in zip(prompts, read, strict=True))
        self.check(samples)
        return samples

    def check(self, samples: tuple[Sample, ...]) -> None:
        """Raises BadRecord if an empty batch does not hold the samples of one record."""
        self._check_length(sum(len(s.tokens) for s in samples))
        self._check_lanes(samples[0].visuals)

    def _prompt(self, talk: Conversation) -> Prompt:
        with _reason("messages"):
            return self.processor.prompt(talk.messages, tools=talk.tools, **self.flags)

    def _boxes_to_model(self, messages: list, visuals: tuple[Visual, ...], record: Mapping) -> list:
        with _reason("boxes"):
            check_coordinates(own := record.get("boxes"))
            return self.processor.boxes_to_model(messages, visuals, self.boxes if own is None else own)

    def converts_boxes(self, record, visuals: tuple[Visual, ...]) -> bool | None:
        """Whether boxes of a record that can be used, with these visuals, are converted; None if nothing says so."""
        if record.get("boxes") is None and self.boxes is None:
            return None
        read = preference(record, None) if self.preferences else [conversation(record, None)]
        return any(self._boxes_to_model(talk.messages, visuals, record) != talk.messages for talk in read)

    def _sample(self, prompt: Prompt, weights: list[int], visuals: tuple[Visual, ...]) -> Sample:
        config = self.processor.config
        if prompt.turns.max(initial=0) != len(weights):
            turns = f"{len(weights)} assistant messages became {prompt.turns.max(initial=0)} turns"
            raise BadRecord("messages", f"{turns} of the chat template")
        token_weights = np.array([0, *weights], np.float32)[prompt.turns]
        # The marks around pictures are not trained on, not even in an assistant message.
        token_weights[np.isin(prompt.tokens, (config.vision_start_token_id, config.vision_end_token_id))] = 0
        sample = make_sample(prompt.tokens, visuals, config, placeholders=prompt.placeholders, weights=token_weights)
        if not sample.weights[1:].any():
            raise BadRecord("nothing to learn", "no assistant message to learn from")
        return sample

    def _check_length(self, length: int) -> None:
        if length > self.shape.tokens:
            raise BadRecord("too long", f"{length} tokens; a row has {self.shape.tokens}")

    def _check_lanes(self, visuals: tuple[Visual, ...]) -> None:
        vision, frames = self.processor.config.vision, [grid for v in visuals for grid in v.grid.frames]
        for visual in visuals:
            if (slots := slots_needed(visual.grid, vision)) > self.shape.patches:
                size = f"{visual.grid.w * vision.patch_size} × {visual.grid.h * vision.patch_size} pixels"
                lane = f"a lane has {self.shape.patches} (lower max_pixels or raise patches)"
                raise BadRecord("too large", f"a frame of {size} needs {slots} patch slots; {lane}")
        if Lanes(self.shape.patches, vision, self.shape.lanes).place(frames) is None:
            patches = sum(grid.patches for grid in frames)
            lanes = f"{self.shape.lanes} lanes of {self.shape.patches}"
            raise BadRecord("too large", f"{patches} patches of pictures and frames do not fit into {lanes}")


def _check_calls(talk: Conversation) -> None:
    """Raises BadRecord for a call to learn whose arguments are no object; the template would write them as a string."""
    replies = [(i, m) for i, m in enumerate(talk.messages) if isinstance(m, Mapping) and m.get("role") == "assistant"]
    for (i, message), weight in zip(replies, talk.weights, strict=True):
        calls = message.get("tool_calls")
        for call in calls if weight and isinstance(calls, list | tuple) else ():
            function = call.get("function", call) if isinstance(call, Mapping) else None
            arguments = function.get("arguments") if isinstance(function, Mapping) else None
            try:
                read = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
            except (ValueError, RecursionError) as e:
                said = (
                    f"message {i}: the arguments of a call are {shown(arguments)}, which is not readable as JSON ({e})"
                )
                raise BadRecord("messages", said) from e
            if not isinstance(read, Mapping | None):
                said = f"message {i}: the arguments of a call are {shown(arguments)}; they must be a JSON object"
                raise BadRecord("messages", said)


def _why_nothing(record: Mapping) -> str:
    if isinstance(answer := record.get("answer"), float | bool):
        return f"no assistant message to learn from ('answer' is {answer}; to train on it, write it as text)"
    if answer is not None:
        return "no assistant message to learn from ('answer' is for evaluation; write it as an assistant message)"
    if any(key in record for key in ("messages", "conversations", "conversation")):
        return "no assistant message to learn from"
    return "no assistant message to learn from; the answer's key is 'completion', 'response' or 'output'"


@contextmanager
def _reason(reason: str):
    try:
        yield
    except InputError as e:
        raise BadRecord(reason, str(e)) from e
