"""The demo's records: a fixed mixture of tasks; each record is drawn from its index alone."""

from collections.abc import Mapping

import numpy as np

from demo import charts, clips, lines, scenes
from demo.assets import Assets
from demo.cells import of_nothing
from qwenvl_jax.errors import InputError

# The share of each task in the default mixture, and the metric of its answers.
WEIGHTS = {"ocr": 0.34, "name": 0.12, "count": 0.1, "locate": 0.12, "chart": 0.12, "clip": 0.08, "list": 0.12}
METRICS = {"ocr": "exact", "name": "exact", "count": "exact", "locate": "iou", "clip": "seconds", "list": "exact"}
EVALUATION_ONLY = ("ocr_unseen_fonts",)
TASKS = (*WEIGHTS, *EVALUATION_ONLY)  # keep the order: a task's index is part of its seeds
_SPLITS = ("train", "evaluation")
_STEP = 0.6180339887498949  # the golden ratio spreads tasks evenly over any run of indices


class Scenes:
    """`length` records; record i depends on (seed, split, task, i) only. Cheap to make, pickle and fork.

    split: "train" or "evaluation", which has other scenes, words, numbers and parts of the tables.
    turns: most questions about one picture, as one conversation. Unless `shuffled`, the first is of the record's task.
    shuffled: random order of the questions. The first one is always about the object that the picture was made for,
        such as the one that appears late in a clip; in a fixed order, a model could ignore what a question names.
    easy: share of easy pictures among lines and names, for a model that has not learnt to see.
    weights: {task: relative frequency}; by default the training mixture.
    A record is {"messages": [user, assistant, …], "answer", "task", "metric", "metadata"}. Pictures are PIL images,
    clips uint8 arrays [frames, height, width, 3]; "metadata" has the facts of `demo.cells`.
    Raises InputError for a split or task that does not exist.
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
        """The record of this task with this index."""
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
        if self.shuffled and task != "chart":  # a chart's metric is that of its first question
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
            "metadata": facts,
        }
