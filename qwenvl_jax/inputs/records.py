"""Turns every form of record into messages, loss weights and tools. Training and evaluation read records here.

    {"messages": [{"role": "user", "content": …}, …]}                          OpenAI, Qwen, TRL, ms-swift, axolotl
    {"conversations": [{"from": "human", "value": "<image>…"}, …], "image": path}         LLaVA, Qwen, LLaMA-Factory
    {"prompt": text or messages, "completion": text or messages, "images": […]}    TRL; only the completion is learnt
    {"instruction": text, "input": text, "output": text, "history": [[text, text], …]}         alpaca, LLaMA-Factory
    {"query" or "question": text, "response" or "answer": text, "history": …}                      ms-swift, axolotl
    {any of these as the prompt, "chosen": reply, "rejected": reply}                                    a preference
    {any of these with a reply, "rejected_response": text}                                    ms-swift's preference

`answer` is the right answer in evaluation, before any reply. Training learns the reply, and `answer` only without one.
Beside them may stand `system`, `tools`, and media under image, images, video or videos (one, or a list). Media replace
`<image>`, `<video>` and items without a source, in order. A message is not trained on if it has `"weight": 0` (OpenAI),
`"loss": false` (ms-swift) or `"train": false` (axolotl). Another key that is not in `HARMLESS` is an error.

A null counts as absent everywhere, as tables write it; only a call that is JSON text keeps its own. A whole number
stands for its text.
"""

import difflib
import json
import re
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from qwenvl_jax.errors import BadRecord, shown
from qwenvl_jax.inputs import fields
from qwenvl_jax.inputs.fields import CHAT, QUESTIONS, ROLES, present, without_nulls
from qwenvl_jax.inputs.markers import with_media

_REPLIES = ("completion", "response", "output")
_PAIRS = ("chosen", "rejected", "rejected_response", "rejected_messages")
_TEXTS = (*QUESTIONS[len(CHAT) :], *_REPLIES, *_PAIRS)
_LIKE_CHAT = re.compile(r"""\s*\[?\s*\{\s*["'](?:role|from|content|value)["']\s*:""")
_MEDIA = {"image", "images", "video", "videos"}
_MEDIA_NAME = re.compile(r"(?i)\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|avif|mp4|mkv|webm|mov|avi)\b")
_OPENAI_PAIR = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
_KNOWN = (
    *QUESTIONS, *_REPLIES, *_PAIRS, "history", "system", "system_prompt", "tools", "functions", "image", "images",
    "video", "videos", "data_path", "answer", "boxes", "task", "metric",
)  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles whose text is a call as JSON
_MARKS = ("weight", "loss", "train", "training")
_MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", *_MARKS}


class Conversation(NamedTuple):
    """A record in OpenAI's form."""

    messages: list
    weights: list[int]  # 0 or 1 for each assistant message: whether it is learnt
    tools: Any  # a list of JSON objects, or None


def conversation(record, folder: Path | None) -> Conversation:
    """The record as one conversation. Relative paths start from `folder`. Raises BadRecord."""
    given = _keys(record)
    if pair := next((k for k in _PAIRS if k in given), None):
        said = f'the record is a preference (it has {pair!r}); set task = "dpo" to train on preferences'
        raise BadRecord("messages", f"{said}, or {_pass_over(pair)}")
    return _conversation(_with_system(_turns(given), given), given, folder)


def preference(record, folder: Path | None) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation. Of their prompt, nothing is learnt."""
    given = _keys(record)
    prompt, replies = _pair(given)
    if not prompt:
        raise BadRecord("messages", "a preference without a prompt: 'chosen' and 'rejected' begin differently")
    if not all(replies):
        raise BadRecord("messages", "'chosen' and 'rejected' are the same conversation, or one goes on where one ends")
    if _role(prompt[-1]) == "assistant":
        raise BadRecord("messages", "the prompt of a preference must not end with an assistant message")
    prompt = _not_learnt(_with_system(prompt, given))
    for key, reply in zip(("chosen", "rejected"), replies, strict=True):
        if _role(reply[0]) in ("system", "user"):
            raise BadRecord("messages", f"{key!r} begins with a {_role(reply[0])} message that is not in the prompt")
    chosen, rejected = (_conversation([*prompt, *reply], given, folder) for reply in replies)
    good, bad = ([_plain(m) for m in talk.messages[len(prompt) :]] for talk in (chosen, rejected))
    if good == bad:
        raise BadRecord("messages", "'chosen' and 'rejected' are the same reply; leave the record out")
    return chosen, rejected


# ------------------------------------------------------------------------------------------ keys


def _keys(record) -> dict:
    """The keys of a record that say something. Raises BadRecord for one that is not read and could matter."""
    if isinstance(record, list | tuple) and record and all(isinstance(r, Mapping) for r in record):
        if any(r.keys() & {"role", "from"} for r in record):
            said = f"a list of {len(record)} messages"
            raise BadRecord("unreadable", f'{said}; a record is an object, so write {{"messages": […]}}')
        said = f"a list of {len(record)} records, as packing tools write; rows are packed here"
        raise BadRecord("unreadable", f"{said}, so write one record per line (jq -c '.[]')")
    if not isinstance(record, Mapping):
        raise BadRecord("unreadable", f"a record is a JSON object; this one is of type {type(record).__name__}")
    given = {key: _chat(value, key) for key, value in present(without_nulls(record)).items()}
    if isinstance(given.get("input"), Mapping):  # OpenAI's form of a preference
        given |= {k: given.pop(old) for k, old in _OPENAI_PAIR.items() if old in given}
        given |= present(given.pop("input"))
    for key, why in fields.REFUSED.items():
        if key in given:
            raise BadRecord("unknown key", f"{key!r}: {why}; to train without it, {_pass_over(key)}")
    _check_media_keys(given)
    if unknown := sorted({str(k) for k in given} - {*_KNOWN} - fields.HARMLESS - fields.MAYBE_MEDIA):
        close = difflib.get_close_matches(unknown[0], [k for k in _KNOWN if k not in given], 1, 0.75)
        hint = f"did you mean {close[0]!r}? Otherwise rename" if close else "rename"
        several = f"unknown keys {', '.join(map(repr, unknown))}" if unknown[1:] else f"unknown key {unknown[0]!r}"
        raise BadRecord(
            "unknown key", f"{several}; {hint} it with --columns {unknown[0]}=NAME, or {_pass_over(*unknown)}"
        )
    return given


def _check_media_keys(given: dict) -> None:
    """Raises BadRecord for a key that seems to hold the picture, if the record has no other."""
    chats = [_json(given[k], repr(k)) if k in CHAT else given[k] for k in (*CHAT, "prompt") if k in given]
    turns = [turn for chat in chats if isinstance(chat, list | tuple) for turn in chat if isinstance(turn, Mapping)]
    contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), list | tuple)]
    items = [item for content in contents for item in content if isinstance(item, Mapping)]
    if given.keys() & _MEDIA or any(item.get("text") is None for item in items):
        return  # the keys describe the picture
    for key in sorted(fields.MAYBE_MEDIA & given.keys()):
        if key not in fields.MEDIA_BY_VALUE or _MEDIA_NAME.search(shown(given[key])):
            new = "video" if "video" in key else "image"
            said = f"{key!r} may be the record's picture, and is not read; read it with --columns {key}={new}"
            raise BadRecord("unknown key", f"{said}, or {_pass_over(key)}")


def _pass_over(*keys: str) -> str:
    return "pass over it with " + " ".join(f"--columns {key}=" for key in keys[:8]) + ("…" if keys[8:] else "")


def _chat(value, key: str):
    """Messages that stand as JSON text where a text may stand too. Any other text stays."""
    if key not in _TEXTS or not isinstance(value, str) or not _LIKE_CHAT.match(value):
        return value
    if value.lstrip("[{ \t\r\n")[:1] == "'":
        raise BadRecord("messages", f"{key!r} holds messages as Python prints them; write them as JSON")
    try:
        read = without_nulls(json.loads(value))
    except (ValueError, RecursionError):
        return value
    turns = read if isinstance(read, list) else [read]
    are_turns = (isinstance(t, Mapping) and (t.get("role") or t.get("from")) in (*ROLES, "function") for t in turns)
    return read if all(are_turns) else value


def _json(value, where: str, nulls=False):
    """The value, which datasets may hold as JSON text. nulls: keep those of the text."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value) if nulls else without_nulls(json.loads(value))
    except (ValueError, RecursionError) as e:
        raise BadRecord("messages", f"{where} is text and not readable as JSON ({e})") from e


# ------------------------------------------------------------------------------------------ turns


def _turns(given: dict) -> list:
    """The messages of any form. Those of a TRL `prompt` are not learnt."""
    keys = [k for k in QUESTIONS if k in given]
    if not keys:
        raise BadRecord("messages", f"has none of {', '.join(map(repr, QUESTIONS))}; write 'messages'")
    if keys[1:] and keys != ["instruction", "input"]:
        both = f"has both {keys[0]!r} and {keys[1]!r}"
        raise BadRecord("messages", f"{both}; {_pass_over(keys[0])} or --columns {keys[1]}=")
    key, replies = keys[0], [k for k in _REPLIES if k in given]
    if key in CHAT:
        if extra := [*replies, *(k for k in ("history",) if k in given)]:
            raise BadRecord("messages", f"has both {key!r} and {extra[0]!r}; {_pass_over(extra[0])}")
        return _list(given[key], key)
    if replies[1:]:
        raise BadRecord("messages", f"has both {replies[0]!r} and {replies[1]!r}; {_pass_over(replies[1])}")
    if not replies and _is_text(given.get("answer")):
        replies = ["answer"]
    if key == "prompt" and isinstance(given[key], list | tuple | Mapping):
        turns = _not_learnt(_list(given[key], key))
    else:
        turns = [{"role": "user", "content": "\n".join(_text(given[k], k) for k in keys)}]
    if replies and _role(turns[-1]) == "assistant":
        raise BadRecord("messages", f"'prompt' ends with an assistant message, which {replies[0]!r} would continue")
    return [*_history(given), *turns, *(_reply(given[replies[0]], replies[0]) if replies else [])]


def _pair(given: dict) -> tuple[list, list[list]]:
    """(prompt, [chosen reply, rejected reply])."""
    has_prompt = any(k in given for k in QUESTIONS)
    if "rejected_response" in given or "rejected_messages" in given:
        if "chosen" in given or "rejected" in given:
            raise BadRecord("messages", "has both 'chosen' or 'rejected' and 'rejected_response'; remove one")
        turns = _turns(given)
        if "rejected_messages" in given:
            return _common(turns, _list(given["rejected_messages"], "rejected_messages"))
        if _role(turns[-1]) != "assistant":
            raise BadRecord("messages", "'rejected_response' needs the better reply as the last message")
        return turns[:-1], [turns[-1:], _reply(given["rejected_response"], "rejected_response")]
    chosen, rejected = (_reply(given.get(key), key) for key in ("chosen", "rejected"))
    if not has_prompt:  # TRL's form: the messages with which both conversations begin are the prompt
        return _common(chosen, rejected)
    if extra := next((k for k in _REPLIES if k in given), None):
        raise BadRecord("messages", f"has both 'chosen' and {extra!r}; {_pass_over(extra)}")
    talk_key = next((k for k in CHAT if k in given and "prompt" in given), "answer")
    if talk_key in CHAT and _list(given[talk_key], talk_key) not in (chosen, rejected):
        raise BadRecord(
            "messages", f"has 'prompt', 'chosen' and {talk_key!r}, which is neither reply; {_pass_over(talk_key)}"
        )
    prompt = _turns({k: v for k, v in given.items() if k not in ("answer", talk_key)})
    n, mine = len(prompt), _not_learnt(prompt)  # datasets may repeat the prompt in both replies
    return prompt, [r[n:] if _not_learnt(r[:n]) == mine else r for r in (chosen, rejected)]


def _common(chosen: list, rejected: list) -> tuple[list, list[list]]:
    pairs = zip(chosen, rejected, strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return chosen[:common], [chosen[common:], rejected[common:]]


def _is_text(value) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _text(value, key: str) -> str:
    """A text, or the text of a whole number. Other numbers can be written in several ways."""
    if isinstance(value, float):
        ways = " or ".join(f'"{way}"' for way in dict.fromkeys((f"{value:g}", str(value))))
        raise BadRecord("messages", f"{key!r} is {value}; write it as text, such as {ways}")
    if not _is_text(value):
        raise BadRecord("messages", f"{key!r} is {shown(value)}; it must be a text")
    return str(value)


def _history(given: dict) -> list:
    """[[question, answer], …], learnt as the last answer is."""
    turns = []
    pairs = _json(given.get("history", []), "'history'")
    if isinstance(pairs, list) and pairs and all(isinstance(p, Mapping) for p in pairs):
        return _list(pairs, "history")
    if not isinstance(pairs, list | tuple) or any(not isinstance(p, list | tuple) or len(p) != 2 for p in pairs):
        raise BadRecord("messages", "'history' must be a list of [question, answer], or of messages")
    for question, answer in pairs:
        turns.append({"role": "user", "content": _text(question, "history")})
        turns.append({"role": "assistant", "content": _text(answer, "history")})
    return turns


def _reply(reply, key: str) -> list:
    if isinstance(reply, str | int | float):
        return [{"role": "assistant", "content": _text(reply, key)}]
    if isinstance(reply, Mapping):
        return _list([reply], key)
    if not isinstance(reply, list | tuple) or not reply or any(isinstance(turn, str) for turn in reply):
        raise BadRecord("messages", f"{key!r} must be a text, a message or a list of messages")
    return _list(reply, key)


def _list(turns, key: str) -> list:
    turns = _json(turns, repr(key)) if key in CHAT else turns
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRecord("messages", f"{key!r} must be a list of at least one message")
    out: list = []
    for i, turn in enumerate(turns):
        where = f"message {i}" if key in (*CHAT, "prompt") else f"{key} {i}"
        if isinstance(turn, Mapping) and not turn.keys() & {"role", "from"} and "assistant" in turn:
            pair = ((role, turn.get(role)) for role in ("system", "human", "user", "assistant"))  # ms-swift's
            if odd := turn.keys() - {"system", "human", "user", "assistant"} - fields.HARMLESS_IN_MESSAGES:
                raise BadRecord("messages", f"{where} has the unknown key {min(map(str, odd))!r}")
            out += [{"role": ROLES[role], "content": text} for role, text in pair if text is not None]
        else:
            _append(out, _message(turn, where), where, turn)
    return out


def _append(out: list, message, where: str, turn) -> None:
    """Calls that follow an assistant message belong to it, as in ms-swift."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    if role in _CALLS and out and _role(out[-1]) == "assistant" and isinstance(out[-1].get("content"), str):
        if out[-1].get("weight", 1) != message.get("weight", 1):
            raise BadRecord("messages", f"{where} is part of the assistant message before it; mark both to be learnt")
        calls = [*out[-1].get("tool_calls", []), *message["tool_calls"]]
        out[-1] = {**out[-1], "content": out[-1]["content"].removesuffix("\n"), "tool_calls": calls}
    else:
        out.append(message)


def _message(turn, where: str):
    """A turn of any form in OpenAI's, with its mark as `weight`."""
    if not isinstance(turn, Mapping):
        return turn  # `normalize` names it
    given = {k: v for k, v in turn.items() if v is not None and k not in fields.HARMLESS_IN_MESSAGES}
    speaker = "from" if "from" in given else "role"
    role = given.pop(speaker, None)
    known = isinstance(role, str) and (role in ROLES or (speaker, role) == ("role", "function"))
    if not known:
        said = f"is from {shown(role)}" if speaker == "from" else f"has role {shown(role)}"
        raise BadRecord("messages", f"{where} {said}; known are {', '.join(ROLES)}")
    message: dict = {"role": "tool" if role == "function" else ROLES[role]}
    content = given.pop("value", None)
    content = given.pop("content", None) if content is None else content
    content = str(content) if _is_text(content) else content
    call = (
        _json(_untagged(content), where, nulls=True)
        if role in _CALLS
        else _json(given.pop("function_call", None), where)
    )
    if isinstance(call, str):
        raise BadRecord("messages", f'{where} is a call and must be JSON: {{"name": …, "arguments": …}}')
    if call is not None:
        calls = call if isinstance(call, list) else [call]
        message |= {"tool_calls": calls, "content": "" if role in _CALLS else content}
    else:
        message["content"] = content
    if (weight := _mark(given, message["role"], where)) is not None:
        message["weight"] = weight
    given = present(given)
    if unknown := sorted(map(str, given.keys() - _MESSAGE_KEYS)):
        said = f"{where} has the unknown key {unknown[0]!r}, which is not read"
        raise BadRecord("unknown key", f"{said}; remove it, or write what it says into the content")
    return message | given


def _untagged(text):
    """Calls in Hermes' tags, `<tool_call>…</tool_call>`, as one JSON list. Any other value stays."""
    head, *calls = text.split("<tool_call>") if isinstance(text, str) else ("",)
    if head.strip() or not calls or not all(call.rstrip().endswith("</tool_call>") for call in calls):
        return text
    return f"[{', '.join(call.rstrip().removesuffix('</tool_call>') for call in calls)}]"


def _mark(given: dict, role: str, where: str) -> int | None:
    """Takes the marks out of a message: 1 if it is learnt, 0 if not, None if nothing is said."""
    marks = {key: given.pop(key) for key in _MARKS if key in given}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise BadRecord("messages", f"{where} has {key} {shown(mark)}; it must be 0 or 1, or true or false")
        if mark and role != "assistant":
            raise BadRecord("messages", f"{where} is a {role} message with {key} {shown(mark)}; only the assistant's "
                            f"messages are trained on, so remove {key!r}")  # fmt: skip
    if len({int(m) for m in marks.values()}) > 1:
        raise BadRecord("messages", f"{where} has {' and '.join(map(repr, marks))}, which contradict each other")
    return int(next(iter(marks.values()))) if marks else None


def _plain(message):
    """The message, with a content that is a list of texts as one text."""
    content = message.get("content") if isinstance(message, Mapping) else None
    items = content if isinstance(content, list | tuple) else [None]
    texts = [i["text"] for i in items if isinstance(i, Mapping) and isinstance(i.get("text"), str)]
    return {**message, "content": "".join(texts)} if len(texts) == len(items) else message


def _role(message):
    return message.get("role") if isinstance(message, Mapping) else None


def _not_learnt(messages: list) -> list:
    return [{**m, "weight": 0} if _role(m) == "assistant" else m for m in messages]


def _with_system(messages: list, given: dict) -> list:
    """The messages after the `system` beside them."""
    keys = [key for key in ("system", "system_prompt") if key in given]
    if not keys:
        return messages
    texts: list = [_text(given[key], key) for key in keys]
    if _role(messages[0]) == "system":
        texts.append(_plain(messages[0])["content"])
        messages = messages[1:]
    if any(text != texts[0] for text in texts):
        raise BadRecord("messages", f"has two system prompts; {_pass_over(keys[-1])}")
    return [{"role": "system", "content": texts[0]}, *messages]


def _tools(given: dict):
    """`tools` or OpenAI's older `functions`; each as {"type": "function", "function": …}."""
    tools, functions = (_json(given.get(key), repr(key)) for key in ("tools", "functions"))
    if tools and functions:
        raise BadRecord("messages", "has both 'tools' and 'functions'; remove one")
    tools = tools or functions or None
    if not isinstance(tools, list | tuple):
        return tools  # `check_tools` names what it is
    bare = [isinstance(t, Mapping) and "function" not in t and isinstance(t.get("name"), str) for t in tools]
    return [{"type": "function", "function": t} if is_bare else t for t, is_bare in zip(tools, bare, strict=True)]


def _conversation(messages: list, given: dict, folder: Path | None) -> Conversation:
    messages = with_media(messages, given, folder)
    weights = [1 if m.get("weight", 1) else 0 for m in messages if _role(m) == "assistant"]
    plain = [{k: v for k, v in m.items() if k != "weight"} if isinstance(m, Mapping) else m for m in messages]
    return Conversation(plain, weights, _tools(given))
