"""What is learnt from a training record (`inputs/records.py` reads its forms): one conversation, or a pair of them.

`tools` of a record go into the prompt; pictures, and messages with `"weight": 0`, are read but not learnt.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenvl_jax.errors import InputError
from qwenvl_jax.inputs.layout import Lanes, make_sample, slots_needed
from qwenvl_jax.inputs.messages import VIDEO_OPTIONS
from qwenvl_jax.inputs.processor import Processor, Prompt
from qwenvl_jax.inputs.records import BadRecord, conversation, preference
from qwenvl_jax.types import Sample, Visual


class PackShape(NamedTuple):
    """The one shape of all batches of a run, on this host.

    segments: the most conversations in a row; preferences need it (an even number), for sums by conversation.
    """

    rows: int  # B
    tokens: int  # T
    lanes: int  # R
    patches: int  # P: whole window blocks, and at least the largest frame
    segments: int | None = None


class Encoder:
    """Records to samples with weights, under one processor's rules.

    folder: what relative paths of pictures and clips start from; None: the working directory.
    options: of `Processor.encode`: pixel and frame limits, add_vision_id, allow_control_tokens.
    """

    def __init__(self, processor: Processor, shape: PackShape, *, preferences=False, folder=None, options=None):
        flags = ("add_vision_id", "allow_control_tokens")
        options = dict(options or {})
        if unknown := sorted(options.keys() - {*flags, *VIDEO_OPTIONS}):
            raise InputError(f"unknown option {unknown[0]!r}; known are {', '.join((*VIDEO_OPTIONS, *flags))}")
        self.processor, self.shape, self.preferences = processor, shape, preferences
        self.folder = None if folder is None else Path(folder)
        self.flags = {k: options.pop(k) for k in flags if k in options}
        self.options = options

    def __call__(self, record) -> tuple[Sample, ...]:
        """One conversation, or the preferred one and its rival, which share the visuals of the first.

        Raises BadRecord, which says what is wrong.
        """
        if not isinstance(record, Mapping):
            raise BadRecord("unreadable", f"a record is a JSON object, not a {type(record).__name__}")
        read = preference if self.preferences else conversation
        taught = [(self._prompt(messages, record), weights) for messages, weights in read(record, self.folder)]
        media = taught[0][0].media
        for prompt, _ in taught[1:]:
            if [m.source for m in prompt.media] != [m.source for m in media]:
                raise BadRecord("messages", "'chosen' and 'rejected' must be text: pictures belong into the prompt")
        self._check_length(sum(len(prompt.tokens) for prompt, _ in taught))  # before anything is decoded
        with _reason("media"):
            visuals = self.processor.open(media, self.options)
        samples = tuple(self._sample(p, w, visuals) for p, w in taught)
        self._check_length(sum(len(s.tokens) for s in samples))
        self._check_lanes(visuals)
        return samples

    def _prompt(self, messages: list, record: Mapping) -> Prompt:
        with _reason("messages"):
            return self.processor.prompt(messages, tools=record.get("tools"), **self.flags)

    def _sample(self, prompt: Prompt, weights: list[int], visuals: tuple[Visual, ...]) -> Sample:
        config = self.processor.config
        if prompt.turns.max(initial=0) != len(weights):
            raise BadRecord(
                "messages",
                f"{len(weights)} assistant messages became {prompt.turns.max(initial=0)} turns of the chat template",
            )
        # Pictures are never learnt, not even an assistant's.
        learnt = np.array([0, *weights], np.float32)[prompt.turns]
        learnt[(prompt.tokens == config.vision_start_token_id) | (prompt.tokens == config.vision_end_token_id)] = 0
        sample = make_sample(prompt.tokens, visuals, config, places=prompt.places, weights=learnt)
        if not sample.weights[1:].any():
            raise BadRecord("nothing to learn", "no assistant message to learn from")
        return sample

    def _check_length(self, length: int) -> None:
        if length > self.shape.tokens:
            raise BadRecord("too long", f"{length} tokens; a row has {self.shape.tokens}")

    def _check_lanes(self, visuals: tuple[Visual, ...]) -> None:
        vision, grids = self.processor.config.vision, [v.grid for v in visuals]
        for visual in visuals:
            if (slots := slots_needed(visual.grid, vision)) > self.shape.patches:
                h, w = visual.grid.h * vision.patch_size, visual.grid.w * vision.patch_size
                raise BadRecord(
                    "too large",
                    f"a frame of {w} × {h} pixels needs {slots} patch slots; a lane has {self.shape.patches} "
                    "(set max_pixels, or larger patches)",
                )
        if Lanes(self.shape.patches, vision, self.shape.lanes).place(grids) is None:
            patches = sum(g.patches for g in grids)
            raise BadRecord(
                "too large",
                f"its pictures and frames have {patches} patches and do not fit into "
                f"{self.shape.lanes} lanes of {self.shape.patches}",
            )


@contextmanager
def _reason(reason: str):
    try:
        yield
    except InputError as e:
        raise BadRecord(reason, str(e)) from e
