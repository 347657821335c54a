"""Our engine as a model of lmms-eval, which finds it by an entry point: `python -m lmms_eval --model qwenvl_jax …`.

Only lmms-eval imports this file. jax is imported on first use. The interface is that of lmms-eval 0.7:
https://github.com/EvolvingLMMs-Lab/lmms-eval
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from qwenvl_jax.answers.boxes import from_model, sizes
from qwenvl_jax.errors import InputError, OptionsError, install, shown
from qwenvl_jax.eval.evaluator import generate, in_batches
from qwenvl_jax.infer.options import GenerateOptions, tokens_left
from qwenvl_jax.inputs.options import MediaOptions, PromptOptions, RecordOptions
from qwenvl_jax.options import build, check_names, checked, names

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as e:
    raise ImportError(f"lmms-eval cannot be imported ({e}). Install it: {install('lmms-eval')}") from e

_LOG = logging.getLogger(__name__)
_BATCH, _NEW_TOKENS = 32, 256  # as in `qwenvl eval`
_ENCODING = (*names(MediaOptions), *names(PromptOptions), "boxes")
_ARGUMENTS = ("pretrained", "dtype", "mesh", *_ENCODING, "on_bad_record")
_FILLED_IN = ("\n\n",)  # lmms-eval's `until` for a task that names none; it would cut answers after one paragraph
_NOT_OURS = ("image_aspect_ratio",)  # how LLaVA fits a picture into its square


def manifest() -> ModelManifest:
    """What the entry point tells lmms-eval: the model's name and class."""
    return ModelManifest("qwenvl_jax", chat_class_path=f"{__name__}.QwenVL")


class _Asked(NamedTuple):
    """One request. `messages` opens its document, so that only documents of the batches at hand are in memory."""

    messages: Callable[[], list]
    options: GenerateOptions
    task: str
    where: str  # "task …, document …", for errors


class QwenVL(lmms):
    """A checkpoint that answers the questions of lmms-eval's tasks, batched as `qwenvl eval` batches them."""

    is_simple = False  # tasks give messages

    def __init__(self, pretrained="demo", batch_size=_BATCH, max_batch_size=None, device=None, **options):
        """pretrained: what `qwenvl_jax.load` takes. batch_size: questions answered together; "auto" is 32.

        options: `dtype` and `mesh` ("1x1x8") of the model; MediaOptions and PromptOptions for all prompts; `boxes`, the
            coordinates in which tasks ask and are answered, such as "original"; `on_bad_record`: "stop", or "skip",
            which answers a question that cannot be used with an empty text.
        Raises InputError for a bad option or checkpoint.
        """
        super().__init__()
        if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
            rule = "it runs in one process, which uses all devices of mesh=DxFxT"
            raise OptionsError(f"qwenvl_jax was started in {processes} processes; {rule}")
        if device is not None:
            rule = "leave it out: JAX_PLATFORMS chooses the devices, and mesh=1x1x8 lays the model out over eight"
            raise OptionsError(f"device is {shown(device)}; {rule}")
        self._batch = _whole(max_batch_size or _BATCH if str(batch_size).startswith("auto") else batch_size)
        if wrong := [name for name in options if name in names(GenerateOptions)]:
            raise OptionsError(f"{wrong[0]} is an option of a generation; give it by --gen_kwargs {wrong[0]}=…")
        check_names(options, _ARGUMENTS)
        for cls in (MediaOptions, PromptOptions):
            build(cls, {name: value for name, value in options.items() if name in names(cls)})
        records = build(RecordOptions, {n: v for n, v in options.items() if n in ("boxes", "on_bad_record")})
        self._skip, self._boxes = records.on_bad_record == "skip", records.boxes
        self._encoding = {name: value for name, value in options.items() if name in _ENCODING and value is not None}
        self._engine = _engine(pretrained, options.get("mesh"), options.get("dtype"), self._batch)

    def generate_until(self, requests) -> list[GenerationResult]:
        """The answers to requests of any tasks, in order, each with its task's own options.

        Raises InputError that names the task and document whose prompt, picture or option cannot be used.
        """
        asked = [self._asked(*request.args) for request in requests]
        done: dict[int, GenerationResult] = {}
        order = sorted(range(len(asked)), key=lambda i: asked[i].task)
        encode, answer = partial(self._encode, asked), partial(self._answer, asked)
        for batch in in_batches(order, encode, answer, self._batch, progress=True):
            for i, one in batch.items():
                if isinstance(one, InputError):
                    if not self._skip:
                        raise one
                    _LOG.warning("%s; answered with an empty text", one)
                    one = GenerationResult("", TokenCounts(0, 0))
                context, _, settings = requests[i].args[:3]
                self.cache_hook.add_partial("generate_until", (context, settings), one.text)
                done[i] = one
        return [done[i] for i in range(len(asked))]

    def loglikelihood(self, requests):
        raise NotImplementedError("qwenvl_jax does not score given answers; choose tasks of output_type generate_until")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError(
            "qwenvl_jax answers tasks of one round only; choose tasks of output_type generate_until"
        )

    def _asked(self, context, doc_to_messages, settings, doc_id, task, split) -> _Asked:
        try:
            options = _generate_options(settings or {}, self._encoding.get("allow_control_tokens"))
        except InputError as e:
            raise e.at(f"task {task}: generation_kwargs") from e
        documents = self.task_dict[task][split]
        return _Asked(lambda: doc_to_messages(documents[doc_id]), options, task, f"task {task}, document {doc_id}")

    def _encode(self, asked: Sequence[_Asked], i: int):
        """(the sample of request i, the request), or the error."""
        engine = self._engine
        try:
            sample = engine.processor.encode(_messages(asked[i].messages()), **self._encoding)
            tokens_left(sample, engine.max_length)
            if self._boxes and len({sizes(visual, engine.config) for visual in sample.visuals}) > 1:
                raise OptionsError("boxes converts the boxes of one picture; the prompt has pictures of several sizes")
        except InputError as e:
            return e.at(asked[i].where)
        return sample, asked[i]

    def _answer(self, asked: Sequence[_Asked], batch: Mapping) -> dict:
        done = generate(self._engine, batch, [asked[i].options for i in batch])
        return {i: one if isinstance(one, InputError) else self._result(one[1]) for i, one in done.items()}

    def _result(self, result) -> GenerationResult:
        text = result.text
        if self._boxes and result.pictures:
            text = from_model(text, result.pictures[0], result.boxes, self._boxes)
        return GenerationResult(text, TokenCounts(result.prompt_tokens, len(result.token_ids)))


def _engine(pretrained, mesh, dtype, batch: int):
    from qwenvl_jax.infer import compile_cache
    from qwenvl_jax.infer.engine import Engine
    from qwenvl_jax.inputs.ladder import Ladder
    from qwenvl_jax.params import checkpoint
    from qwenvl_jax.sharding import make_mesh, parse_mesh

    try:
        compile_cache.enable()
    except InputError as e:
        _LOG.warning("%s", e)
    devices = None if mesh is None else make_mesh(*parse_mesh(str(mesh)))
    model = checkpoint.load(str(pretrained), mesh=devices, dtype=dtype)
    # Agents' tasks ask one question at a time. Else one bucket, as in `Evaluator`.
    return Engine(model, max_batch=batch, ladder=Ladder(rows=tuple(sorted({1, batch}))))


def _whole(batch_size) -> int:
    """Flags of lmms-eval come as texts."""
    try:
        if (count := int(batch_size)) > 0:
            return count
    except (TypeError, ValueError):
        pass
    raise OptionsError(f"batch_size is {shown(batch_size)}; it must be a whole number, at least 1, or auto")


def _generate_options(settings: Mapping, allow_control_tokens: bool | None) -> GenerateOptions:
    """The `generation_kwargs` of a task, which are those of transformers and `until`, as options of the engine.

    As in transformers, `do_sample` false is greedy whatever the temperature. Without `do_sample`, a temperature above 0
    samples, as in lmms-eval's own Qwen models. Raises OptionsError for what the engine cannot do.
    """
    left = {name: value for name, value in settings.items() if value is not None and name not in _NOT_OURS}
    for name, why in (("num_beams", "there is no beam search"), ("n", "lmms-eval scores one answer")):
        if (value := left.pop(name, 1)) != 1:
            raise OptionsError(f"{name} is {shown(value)}; it must be 1, because {why}")
    sample = left.pop("do_sample", None)
    if sample and "temperature" not in left:
        raise OptionsError("do_sample is true without a temperature; add one")
    if (sample is not None and not sample) or not left.get("temperature") or left.get("top_p") == 0:
        left |= {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}
    stop: tuple = ()
    for name in ("until", "stop_sequences", "stop"):
        texts = checked(GenerateOptions, "stop", left.pop(name, None), f"{name}: ")
        stop += () if texts == _FILLED_IN else texts
    if allow_control_tokens is not None:  # answers follow the rule of prompts
        left.setdefault("skip_special_tokens", not allow_control_tokens)
    return build(GenerateOptions, {"max_new_tokens": _NEW_TOKENS, **left, "stop": stop})


def _messages(messages) -> list:
    """lmms-eval's messages with the keys that the processor reads."""
    return [
        {**m, "content": [_item(item) for item in m["content"]]} if isinstance(m["content"], list) else m
        for m in messages
    ]


def _item(item: Mapping) -> dict:
    """An item whose `url` is a mapping has the clip's path and times in it."""
    inner = item.get("url")
    flat = {**item, "url": None, **inner} if isinstance(inner, Mapping) else dict(item)
    for theirs, ours in (("start_time", "video_start"), ("end_time", "video_end")):
        if (value := flat.pop(theirs, None)) is not None:
            flat[ours] = value
    return flat
