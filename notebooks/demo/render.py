"""The demo's source of records: a fixed mixture of drawn questions, each made from its number alone."""

from collections.abc import Mapping

import numpy as np

from demo import charts, clips, lines, scenes
from demo.assets import Assets
from demo.cells import of_nothing
from qwenvl_jax.errors import InputError

# How often each task comes in the default mixture, and how its answers are marked.
WEIGHTS = {"ocr": 0.34, "name": 0.12, "count": 0.1, "locate": 0.12, "chart": 0.12, "clip": 0.08, "list": 0.12}
METRICS = {"ocr": "exact", "name": "exact", "count": "exact", "locate": "iou", "clip": "seconds", "list": "exact"}
EVALUATION_ONLY = ("ocr_unseen_fonts",)
TASKS = (*WEIGHTS, *EVALUATION_ONLY)  # in a fixed order: a task's place is part of its seeds
_SPLITS = ("train", "evaluation")
_STEP = 0.6180339887498949  # the golden ratio spreads tasks evenly over any run of indices


class Scenes:
    """`length` records, record i depending on (seed, split, task, i) only; cheap to make, pickle and fork.

    split: "train" or "evaluation"; the latter has other scenes, words, numbers and parts of the tables.
    turns: questions asked about one picture, at most, as a conversation; the first is of the record's task,
        unless `shuffled`.
    shuffled: in any order. The first one is about the thing that the picture was made for, such as what turns up late
        in a clip; a model that may rely on that need not mind what a question names.
    easy: share of lines and names whose pictures are easy to tell, for a model that has yet to learn to see.
    weights: {task: relative frequency}; by default the training mixture.
    A record is {"messages": [user, assistant, …], "answer", "task", "metric", "facts"}, pictures being PIL images,
    clips uint8 arrays [frames, height, width, 3], and facts what `demo.cells` tells of their visual tokens.
    """

    def __init__(
        self,
        assets: Assets,
        split: str = "train",
        *,
        length: int = 10**9,
        seed: int = 0,
        turns: int = 1,
        shuffled: bool = False,
        easy: float = 0.0,
        weights: Mapping[str, float] | None = None,
    ):
        if split not in _SPLITS:
            raise InputError(f"split is {split!r}; it must be one of {', '.join(_SPLITS)}")
        weights = dict(weights or WEIGHTS)
        for task, weight in weights.items():
            if task not in TASKS or not weight > 0:
                raise InputError(f"weights has {task!r}: {weight!r}; tasks are {', '.join(TASKS)}, weights positive")
            if task in EVALUATION_ONLY and split == "train":
                raise InputError(f"{task} is for evaluation only; leave it out of the training mixture")
        self.assets, self.split, self.length, self.seed = assets, split, length, seed
        self.turns, self.shuffled, self.easy = turns, shuffled, easy
        self.tasks = tuple(weights)
        self.bounds = np.cumsum(list(weights.values())) / sum(weights.values())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        place = np.searchsorted(self.bounds, index * _STEP % 1.0, side="right")
        return self.record(self.tasks[min(int(place), len(self.tasks) - 1)], index)

    def record(self, task: str, index: int) -> dict:
        """The record that `index` would be if it were of that task."""
        evaluation = self.split == "evaluation"
        rng = np.random.default_rng((self.seed, _SPLITS.index(self.split), TASKS.index(task), int(index)))
        metric = METRICS.get(task, "exact")
        easy = self.easy > 0 and rng.random() < self.easy
        if task == "chart":
            media, turns, metric = charts.chart(rng, self.assets, evaluation)
            facts = of_nothing(media.width, media.height)
        elif task == "clip":
            media, turns, facts = clips.clip(rng, self.assets)
        elif task in ("ocr", "ocr_unseen_fonts"):
            media, turns, facts = lines.line(rng, self.assets, evaluation, task == "ocr_unseen_fonts", easy)
        elif task == "list":
            media, turns, facts = scenes.listing(rng, self.assets)
        elif task == "name":
            media, turns, facts = scenes.name(rng, self.assets, easy)
        else:
            media, turns, facts = getattr(scenes, task)(rng, self.assets)
        if self.shuffled and task != "chart":  # whose metric is that of its first question
            turns = [turns[i] for i in rng.permutation(len(turns))]
        kind, options = ("video", {"fps": clips.FPS}) if task == "clip" else ("image", {})
        item = {"type": kind, kind: media} | options
        messages = []
        for question, answer in turns[: self.turns]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages[0]["content"] = [item, {"type": "text", "text": messages[0]["content"]}]
        return {
            "messages": messages,
            "answer": turns[0][1],
            "task": task,
            "metric": metric,
            "facts": facts,
        }
