"""Messages to prompt, rendered by the checkpoint's own chat template.

Text that a user types never becomes a control token. `prompt_parts` replaces its special characters while the template
renders, so only the template can write a control token.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes

from qwenvl_jax.config import read_json, read_text
from qwenvl_jax.errors import CheckpointError, InputError
from qwenvl_jax.inputs.messages import strings
from qwenvl_jax.inputs.sandbox import Sandbox, clock


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text in some templates; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # As in transformers. The filter of jinja2 would escape HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message):
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=16)
def _compile(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The template and the names of the variables it reads. Templates are untrusted code, so they run in a sandbox."""
    environment = Sandbox(
        {"tojson": _tojson},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), frozenset(variables)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A checkpoint's jinja chat template.

    sources: templates by name. "default" is required; "tool_use", if present, is used when there are tools.
    origin: the file, for error messages.
    variables: the tokenizer's special tokens (`bos_token`, …), which templates may print.
    Raises CheckpointError for an invalid template.
    """

    sources: Mapping[str, str]
    origin: str = "chat template"
    variables: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for source in self.sources.values():
            try:
                _compile(source)
            except Exception as e:  # Python, which compiles it, raises anything too
                raise CheckpointError(f"{self.origin}: not a valid chat template ({e})") from e

    @classmethod
    def from_dir(cls, path) -> "ChatTemplate":
        """Reads chat_template.jinja, else chat_template.json, else tokenizer_config.json, as transformers does."""
        path = Path(path)
        tokenizer = read_json(path / "tokenizer_config.json", missing={})
        variables = {}
        for key, value in tokenizer.items():
            value = value.get("content") if isinstance(value, Mapping) else value  # an AddedToken, or its text
            if key.endswith("_token") and isinstance(value, str):
                variables[key] = value
        jinja, wrapped = path / "chat_template.jinja", path / "chat_template.json"
        if jinja.exists():
            origin, value = jinja, read_text(jinja)
        elif wrapped.exists():
            origin, value = wrapped, read_json(wrapped).get("chat_template")
        else:
            origin, value = path / "tokenizer_config.json", tokenizer.get("chat_template")
        if value is None:
            raise CheckpointError(
                f"{path} has no chat template (chat_template.jinja or .json, or tokenizer_config.json)"
            )
        if isinstance(value, list) and all(isinstance(v, Mapping) for v in value):
            value = {v.get("name"): v.get("template") for v in value}
        sources = value if isinstance(value, Mapping) else {"default": value}
        if "default" not in sources or not all(isinstance(s, str) for s in sources.values()):
            raise CheckpointError(f"{origin}: chat_template must be a string or named templates with a 'default'")
        return cls(dict(sources), str(origin), variables)

    @property
    def handles_tools(self) -> bool:
        return "tool_use" in self.sources or "tools" in _compile(self.sources["default"])[1]

    @cached_property
    def default_system(self) -> str:
        """The system prompt that the template adds to messages without one; "" if it adds none."""
        text = self.render([{"role": "user", "content": ""}], add_generation_prompt=False)
        found = re.search(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.DOTALL)
        return found[1] if found else ""

    def render(self, messages: list[dict], tools: list[dict] | None = None, **flags) -> str:
        """The prompt of normalised messages. Tools are written into messages if the template does not support them.

        flags: add_generation_prompt, add_vision_id. Raises CheckpointError if the template fails.
        """
        if not self.handles_tools:
            messages, tools = _fold_tools(messages, tools, lambda: self.default_system), None
        source = self.sources.get("tool_use" if tools else "default", self.sources["default"])
        try:
            # Flags come last, so that a file's variables cannot override them.
            values = {**self.variables, "messages": messages, "tools": tools, "documents": None, **flags}
            with clock():
                return _compile(source)[0].render(values)
        except Exception as e:  # a template can raise anything
            raise CheckpointError(f"{self.origin}: the chat template failed: {e}") from e


# The tool format of Qwen2.5-Instruct's published template.
_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\n</tool_call>"
)


def _fold_tools(messages: list[dict], tools: list[dict] | None, default_system) -> list[dict]:
    """Writes tools, calls and results as plain system, assistant and user messages, in Qwen2.5's format."""
    out: list[dict] = []
    if tools:
        section = _TOOLS_HEAD + "".join("\n" + _tojson(t) for t in tools) + _TOOLS_TAIL
        given = messages[0]["role"] == "system"
        system = messages[0]["content"] if given else default_system()
        messages = messages[given:]
        out.append(_turn("system", system, "\n\n" if given or system else "", section))
    previous = None
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            result = ("<tool_response>\n", content, "\n</tool_response>")
            if previous == "tool":  # consecutive results share one user turn
                out[-1] = _turn("user", out[-1]["content"], "\n", *result)
            else:
                out.append(_turn("user", *result))
        elif message.get("tool_calls"):
            form = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
            functions = [call["function"] for call in message["tool_calls"]]
            calls = "\n".join(form.format(f["name"], _tojson(f["arguments"])) for f in functions)
            out.append(_turn(role, content, "\n" if content else "", calls))
        else:
            out.append(message)
        previous = role
    return out


def _turn(role: str, *contents: str | list[dict]) -> dict:
    """A message of several contents. Text alone becomes a string, since text-only templates do not accept lists."""
    items = [i for c in contents for i in ([{"type": "text", "text": c}] if isinstance(c, str) else c)]
    if all(item["type"] == "text" for item in items):
        return {"role": role, "content": "".join(item["text"] for item in items)}
    return {"role": role, "content": items}


def prompt_parts(
    template: ChatTemplate, messages: list, tools, control_tokens: Iterable[str], *, allow_control_tokens=False, **flags
) -> list[str]:
    """The rendered prompt, split: plain text at even indices, control tokens at odd ones.

    Every control token contains a pivot character (`|` in Qwen's). While the template renders, each pivot in typed text
    is replaced by a private-use character that the input does not contain. A control token in the result then needs a
    pivot that the template wrote. Afterwards the pivots are put back. With `allow_control_tokens` nothing is replaced,
    as in transformers.
    """
    control = sorted(control_tokens, key=len, reverse=True)  # the longest match wins, as in `tokenizers`
    restore = {}
    if not allow_control_tokens:
        pivots = sorted({_pivot(token) for token in control})
        used = set().union(*control, *template.sources.values(), *strings(messages), *strings(tools))
        free = (c for c in map(chr, chain(range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))) if c not in used)
        shield = {ord(p): c for p, c in zip(pivots, free, strict=False)}
        if len(shield) < len(pivots):
            raise InputError("the messages use every private-use character of Unicode")
        restore = {ord(c): chr(p) for p, c in shield.items()}
        messages = [_shielded(m, shield) for m in messages]
        tools = _translate(tools, shield)
    text = template.render(messages, tools, **flags)
    parts = re.split("(" + "|".join(map(re.escape, control)) + ")", text) if control else [text]
    return [part.translate(restore) for part in parts]


def _pivot(token: str) -> str:
    if "|" in token:
        return "|"
    return next((c for c in token if not c.isalnum()), token[0])


def _shielded(message: dict, shield: dict) -> dict:
    """Translates the text of a message. Roles and item types stay: `normalize` wrote them, templates compare them."""
    out = {**_translate(message, shield), "role": message["role"]}
    if isinstance(message["content"], list):
        out["content"] = [
            {"type": "text", "text": item["text"].translate(shield)} if item["type"] == "text" else item
            for item in message["content"]
        ]
    return out


def _translate(value, shield: dict):
    if isinstance(value, str):
        return value.translate(shield)
    if isinstance(value, Mapping):
        return {_translate(k, shield): _translate(v, shield) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_translate(v, shield) for v in value]
    return value
