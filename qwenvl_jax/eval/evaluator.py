"""Asks a model questions with known answers and scores its answers. jax is imported on first use."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from qwenvl_jax import stores
from qwenvl_jax.errors import InputError, NonFiniteError, OptionsError
from qwenvl_jax.eval.journal import Journal, answered_ids, fingerprint, question_ids
from qwenvl_jax.eval.metrics import BOXES
from qwenvl_jax.eval.questions import Question, Questions, check_answer
from qwenvl_jax.eval.report import Answer, Report, report, score
from qwenvl_jax.infer.options import EngineOptions, GenerateOptions
from qwenvl_jax.inputs.options import PromptOptions
from qwenvl_jax.options import names
from qwenvl_jax.types import Model, Sample

_LOG = logging.getLogger(__name__)
_LOADERS = 8  # threads that encode the next questions meanwhile
_GO_ON = (
    'the same command goes on after the record is mended; --on-bad-record skip (in Python, on_bad="skip") goes on '
    "without it"
)
_AHEAD = 4  # batches encoded at a time; only their images are in memory


def evaluate(model, records, *, output=None, overwrite=False, **options) -> Report:
    """Answers every question of `records` greedily and scores the answers.

    model: a `Model` or an `Engine`. records, options: as for `Evaluator`. output, overwrite: as for `Evaluator.report`.
    Raises InputError that names the record (file and line) whose image, video or prompt cannot be used.
    """
    if output is not None:
        stores.local_file("output", output)
    return Evaluator(model, records, **options).report(model.params, output=output, overwrite=overwrite)


class Evaluator:
    """Scores one set of questions repeatedly, as parameters change: `Evaluator(model, records)(params)`.

    The first call compiles; later ones must have parameters of the same shapes and dtypes. Between calls it holds no
    reference to parameters.
    """

    def __init__(
        self,
        model,
        records,
        *,
        batch: int = 32,
        metric: str = "exact",
        encoding: Mapping | None = None,
        max_new_tokens: int = 256,
        on_bad: str = "stop",
        limit: int | None = None,
        progress: bool = False,
        kv_dtype: str | None = None,
        **options,
    ):
        """model: a `Model`, whose own parameters are dropped, or an `Engine`, whose max_batch and KV cache are used.

        records: what `inputs.source.open_records` takes (files, a dataset, or a list of records), or `Questions` of
            them. A record is a training record plus `answer` (a text or number, a list of them, or boxes; by default
            the last assistant message), `task` (the group of its score; by default "default") and `metric` (by default
            `metric`).
        batch: questions answered together.
        encoding: options of `Processor.encode` for all questions.
        on_bad: a record that cannot be asked or answered raises InputError ("stop"), or is logged and counted ("skip").
        limit: ask the first `limit` records only.
        kv_dtype: of the KV cache, see `EngineOptions`; not for an `Engine`.
        options: other `GenerateOptions`; the default temperature is 0. With `skip_special_tokens`, control tokens are
            left out of the right answers too.
        Raises InputError that names the bad record. Images and videos are not opened here.
        """
        check_counts(batch, limit)
        self._how = EngineOptions(kv_dtype)
        if not isinstance(model, Model):
            if kv_dtype is not None:
                raise OptionsError("kv_dtype is an option of the engine; give it to Engine(model, kv_dtype=…)")
            self._how = model.options
        if on_bad not in ("stop", "skip"):
            raise OptionsError(f"on_bad is {on_bad!r}; it must be 'stop' or 'skip'")
        self._encoding, self._progress, self._on_bad = dict(encoding or {}), progress, on_bad
        self._source, self._limit = records if isinstance(records, Questions) else Questions(records, metric), limit
        read = self._read(model.processor, limit)
        self.questions = [one for one in read if isinstance(one, Question)]
        self._unread = [one for one in read if isinstance(one, InputError)]
        if on_bad == "stop":
            for error in self._unread:
                raise error
            check_questions(self.questions, model.processor, self._encoding)
        self._model: Any = model._replace(params={}) if isinstance(model, Model) else None
        self._engine: Any = None if isinstance(model, Model) else model
        self._batch = min(batch, max(len(self.questions), 1)) if self._engine is None else model.max_batch
        options = {"temperature": 0.0, "max_new_tokens": max_new_tokens, **options}
        allow = self._encoding.get("allow_control_tokens")
        allow = model.processor.allow_control_tokens if allow is None else allow
        c = model.config
        how = dict(keep_special=allow, vocab_size=c.text.vocab_size)
        chosen = GenerateOptions(**options).resolve(model.generation, c.eos_token_id, **how)
        self._options = {**options, "skip_special_tokens": chosen.skip_special_tokens}
        self._identity = {**self._encoding, **_settings(chosen), "seed": options.get("seed")}
        if self._how.int8:
            self._identity["kv_dtype"] = "int8"
        self._clean = model.processor.without_control_tokens if chosen.skip_special_tokens else str

    def _read(self, processor, limit: int | None) -> list:
        return [_with_calls(one, processor, self._encoding) for one in self._source.first(limit)]

    def __call__(self, params) -> dict[str, float]:
        """The scores under these parameters, by name: see `Report.metrics`.

        A record that turns out bad while it is answered is logged and counted, so that it does not end a training run.
        """
        return self._report(params, "skip", None, False).metrics()

    @property
    def names(self) -> list[str]:
        """The names of the scores, without "eval/"."""
        groups = dict.fromkeys((q.task, q.metric) for q in self.questions)
        named = [f"{task}/{metric}" for task, metric in groups]
        boxes = [f"{task}/{detail}" for task, metric in groups if metric in BOXES for detail in ("precision", "recall")]
        return [*named, *boxes, "overall"]

    def report(self, params, *, output=None, overwrite: bool = False) -> Report:
        """Answers every question under these parameters and scores the answers.

        output: a JSONL file that gets each answer as it comes. Questions that it answers already are not asked again.
        overwrite: start the file anew. Raises InputError if the file holds anything but these answers; see `Journal`.
        """
        return self._report(params, self._on_bad, output, overwrite)

    def _report(self, params, on_bad: str, output, overwrite: bool) -> Report:
        import jax

        from qwenvl_jax.infer.engine import Engine
        from qwenvl_jax.inputs.ladder import Ladder

        if self._engine is None:
            # A single bucket of rows: padding the last batch is cheaper than compiling for its size.
            ladder = Ladder(rows=(self._batch,))
            model = self._model._replace(params=params)
            self._engine = Engine(model, max_batch=self._batch, ladder=ladder, **vars(self._how))
        path = None if output is None else stores.local_file("output", output)
        engine = self._engine
        own, engine.params = engine.params, jax.tree.map(jax.numpy.asarray, params)
        try:
            if path is None:
                return self._run(engine, on_bad)
            ids, known = question_ids(self.questions), self.questions
            model = fingerprint(engine.config, engine.processor, engine.params)
            if jax.process_index():  # process 0 writes
                return self._run(engine, on_bad, ids=ids)
            if self._limit and not overwrite and not answered_ids(path).issubset(ids):  # a larger limit answered more
                known = [one for one in self._read(engine.processor, None) if isinstance(one, Question)]
                ids = question_ids(known)
            asked = dict(zip(ids, known, strict=True))
            with Journal(path, model, self._identity, asked, overwrite=overwrite) as journal:
                return self._run(engine, on_bad, journal, ids)
        finally:
            engine.params = own if self._model is None else None

    def _run(self, engine, on_bad: str, journal: Journal | None = None, ids: Sequence[str] = ()) -> Report:
        """Answers what the journal does not answer. ids: the names in it of all questions, `questions` first."""
        found = _shared(journal.answered if journal else {}) if ids else {}
        known = {i: found[name] for i, name in enumerate(ids[: len(self.questions)]) if name in found}
        answers = {i: self._stored(self.questions[i], line) for i, line in known.items()}
        todo = [i for i in range(len(self.questions)) if i not in answers]
        bad = list(self._unread)
        for error in bad:
            _LOG.warning("%s; skipped", error)
        for batch in self._answer(engine, todo, bad_last=bool(ids)):
            said = {i: one for i, one in batch.items() if not isinstance(one, InputError)}
            new = {i: score(question, text, reason, self._clean) for i, (question, text, reason) in said.items()}
            answers |= new
            if journal:
                journal.add((ids[i], answer.to_dict()) for i, answer in new.items())
            for error in (one for one in batch.values() if isinstance(one, InputError)):
                if on_bad == "stop":
                    raise _with_rest(error, journal)
                _LOG.warning("%s; skipped", error)
                bad.append(error)
        if not answers:
            raise InputError(f"no question could be answered; the first: {bad[0]}")
        order = sorted(answers)
        if journal:
            try:
                journal.finish((ids[i], answers[i].to_dict()) for i in order)
            except InputError as e:
                _LOG.warning("%s", e)
        return report([answers[i] for i in order], Counter(map(_reason, bad)))

    def _stored(self, question: Question, line: dict) -> Answer:
        golds = line["answer"] if isinstance(line["answer"], list) else [line["answer"]]  # boxes: the model's
        asked = question._replace(answers=tuple(golds), screen=_screen(line.get("screen")))
        return score(asked, line["prediction"], line["finish_reason"], self._clean)

    def _encode(self, engine, i: int):
        """(the sample of question i, the question with its boxes in the model's coordinates), or the error."""
        from qwenvl_jax.infer.options import tokens_left

        q = self.questions[i]
        options = {**self._encoding, **({"boxes": q.boxes} if q.boxes else {})}
        try:
            sample = engine.processor.encode(q.messages, tools=q.tools, **options)
            tokens_left(sample, engine.max_length)
            return sample, _with_model_boxes(q, sample, engine.processor, options.get("boxes"))
        except InputError as e:
            return e.at(q.where)

    def _answer(self, engine, todo: list[int], bad_last: bool) -> Iterator[dict[int, Any]]:
        """Batches of {index: (question, text, finish_reason) or an InputError}. bad_last: see `in_batches`."""
        # Questions of one task have similar sizes, so their batches need few buckets.
        order = sorted(todo, key=lambda i: self.questions[i].task)
        encode, answer = partial(self._encode, engine), partial(generate, engine, changes=self._options)
        for batch in in_batches(order, encode, answer, self._batch, bad_last=bad_last, progress=self._progress):
            yield {
                i: one if isinstance(one, InputError) else (one[0], one[1].text, one[1].finish_reason)
                for i, one in batch.items()
            }


def in_batches(
    order: list[int], encode: Callable, answer: Callable, size: int, *, bad_last: bool = False, progress: bool = False
) -> Iterator[dict[int, Any]]:
    """Batches of {index: what `answer` gives for it, or an InputError}: similar lengths, of questions near in `order`.

    encode: index → (Sample, something), or an InputError; runs in threads, ahead of the answers.
    answer: {index: what `encode` gave} of at most `size` questions → {index: something}.
    bad_last: the bad records of a window come after its answers, so that the answers are kept if these end the run.
    """
    from tqdm import tqdm

    if not order:
        return
    windows = [order[i : i + size * _AHEAD] for i in range(0, len(order), size * _AHEAD)]
    with (
        ThreadPoolExecutor(_LOADERS) as pool,
        tqdm(total=len(order), desc="evaluating", disable=not progress) as bar,
    ):
        encoded = pool.map(encode, windows[0])
        for window, following in zip(windows, [*windows[1:], []], strict=True):
            pairs = dict(zip(window, _agreed(list(encoded)), strict=True))
            encoded = pool.map(encode, following)  # starts now, while this window is answered
            bad = {i: one for i, one in pairs.items() if isinstance(one, InputError)}
            bar.update(len(bad))
            if not bad_last:
                yield bad
            by_length = sorted(pairs.keys() - bad.keys(), key=lambda i: (len(pairs[i][0].tokens), i))
            for at in range(0, len(by_length), size):
                batch = {i: pairs.pop(i) for i in by_length[at : at + size]}
                bar.update(len(batch))
                yield answer(batch)
            if bad_last:
                yield bad


def generate(
    engine, batch: Mapping[int, tuple[Sample, Any]], options: Sequence | None = None, changes: Mapping | None = None
) -> dict[int, Any]:
    """{index: (question, Result), or a NonFiniteError with its place} for {index: (sample, question)}.

    options, changes: as for `Engine.generate`. The questions have a `where`.
    """
    why = ""
    try:
        results = engine.generate([sample for sample, _ in batch.values()], options, **(changes or {}))
    except NonFiniteError as e:
        results, why = e.results, e.why
    done: dict[int, Any] = {}
    for (i, (_, question)), result in zip(batch.items(), results, strict=True):
        done[i] = question, result
        if result.finish_reason == "error":
            done[i] = NonFiniteError(f"{question.where}: the model computed NaN or infinity: {why}")
    return done


def check_counts(batch: int, limit: int | None) -> None:
    if batch < 1 or (limit is not None and limit < 1):
        raise OptionsError(f"batch is {batch} and limit {limit}; they must be at least 1")


def _settings(options) -> dict:
    """The resolved options of a generation that decide its answers, as JSON values."""
    unused = {"n", "logprobs", "seed", *(("top_k", "top_p", "min_p") if options.greedy else ())}
    values = {name: value for name, value in vars(options).items() if name not in unused}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _with_rest(error: InputError, journal: Journal | None) -> InputError:
    """The error that ends a run, with the place of the answers so far."""
    if journal:
        error.args = (f"{error}. The answers so far are in {journal.path}; {_GO_ON}",)
    return error


def _reason(error: InputError) -> str:
    """The reason by which a bad record is counted, as in training."""
    reasons = {"media": "media", "context": "too long", "not_finite": "not finite"}
    return getattr(error, "reason", None) or reasons.get(error.code, "messages")


def _shared(lines: dict[str, dict]) -> dict[str, dict]:
    """The answers that process 0 has found, in every process."""
    import jax

    if jax.process_count() == 1:
        return lines
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(lines).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(text, size))))


def _agreed(encoded: list) -> list:
    """The encoded questions, with an error where another process has one: all must ask the same."""
    import jax

    if jax.process_count() == 1:
        return encoded
    import numpy as np
    from jax.experimental import multihost_utils

    mine = np.array([isinstance(one, InputError) for one in encoded])
    failed: Any = np.asarray(multihost_utils.process_allgather(mine)).any(0)
    other = InputError("a record cannot be used in another process")
    return [other if f and not m else one for one, f, m in zip(encoded, failed, mine, strict=True)]


def _with_model_boxes(question: Question, sample: Sample, processor, coordinates: str | None) -> Question:
    """The question with the boxes of its right answers in the model's coordinates.

    Raises InputError for a box outside its picture.
    """
    if question.metric == "tool_step" and sample.visuals:
        question = question._replace(screen=processor.limits(sample.visuals[-1]))
    if question.metric not in BOXES and coordinates is None:
        return question
    golds = []
    for answer in question.answers:
        talk = [*question.messages, {"role": "assistant", "content": answer}]
        golds.append(processor.boxes_to_model(talk, sample.visuals, coordinates)[-1]["content"])
    return question._replace(answers=tuple(golds))


def _screen(value) -> tuple | None:
    """The size of a screen as a line of answers says it; None for anything else."""
    is_size = isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    return tuple(value) if is_size else None


def _with_calls(question, processor, encoding: Mapping):
    """A question whose answer has tool calls, with the text that the template writes for them: what training learns.

    Other questions, and errors, stay as they are. If the template writes no such text, this returns an InputError.
    """
    if not isinstance(question, Question) or question.reply is None:
        return question
    flags = {name: encoding[name] for name in names(PromptOptions) if name in encoding}
    try:
        prompt = processor.prompt([*question.messages, question.reply], tools=question.tools, **flags)
    except InputError as e:
        return e.at(question.where)
    last = prompt.tokens[prompt.turns == max(prompt.turns.max(), 1)]
    if not (text := processor.decode(last[:-1], False)).strip():  # without <|im_end|>
        return InputError(f"{question.where}: the chat template writes no text for the tool calls; give an 'answer'")
    try:
        check_answer(text, question.metric)
    except InputError as e:
        return e.at(question.where)
    return question._replace(answers=(text,), reply=None)


def check_questions(questions: Sequence[Question], processor, encoding: Mapping) -> None:
    """Raises InputError for a bad prompt or a missing file now; the evaluation may reach it hours later."""
    from qwenvl_jax.inputs.fetch import path_or_bytes

    flags = {name: encoding[name] for name in names(PromptOptions) if name in encoding}
    for q in questions:
        try:
            for media in processor.prompt(q.messages, tools=q.tools, add_generation_prompt=True, **flags).media:
                if isinstance(media.source, str) and not re.match("(?i)(https?|gs|s3):|data:", media.source):
                    path_or_bytes(media.source, 0)
        except InputError as e:
            raise e.at(q.where) from e
