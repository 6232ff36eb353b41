"""A chat template: messages to the text of a prompt, as transformers' ``apply_chat_template`` makes it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from v4export.config import ModelConfig
from v4export.errors import BadInput, NotSupported
from v4export.side_files import file_of, json_object, parsed

_HERE = Path(__file__).parent
#: Longest template that is read, in characters.
_LONGEST = 1 << 20

#: DSML's tags by family, and what else differs between V4's encodings.
_V4 = {"space": "", "block": "tool_calls", "system_token": "", "efforts": {}}
_V41 = {
    "space": " ",
    "block": " calls",
    "system_token": "<｜System｜>",
    "efforts": {"low": 25, "high": 50, "xhigh": 75, "max": 100},
}


def own_template(config: ModelConfig) -> tuple[str, Mapping[str, Any]] | None:
    """The file of the template that is written here for a family, and what it reads besides; None of other families."""
    if config.compressed:
        return "deepseek_v4.jinja", _V41 if config.compressed.shared else _V4
    return ("deepseek_v32.jinja", {}) if config.indexer else None


@dataclass(frozen=True)
class ChatTemplate:
    """A template of conversations.

    Attributes:
        text: in Jinja.
        tokens: ``bos_token`` and the like, which templates write.
        known: what it reads besides.
        parses: whether it wants the arguments of tool calls as objects, and contents as text.
    """

    text: str
    tokens: Mapping[str, str]
    known: Mapping[str, Any]
    parses: bool = False

    @classmethod
    def of(cls, folder: Path, config: ModelConfig) -> ChatTemplate:
        """The template of a checkpoint or bundle.

        Raises:
            BadInput: a file cannot be read.
            NotSupported: there is none, and the family has none that is known here.
        """
        found = cls.find(folder, config)
        if found is None:
            raise NotSupported(
                "this model has no chat template",
                f"looked for chat_template in {folder}",
                "give a prompt as the model expects it, or put chat_template.jinja beside it",
            )
        return found

    @classmethod
    def find(cls, folder: Path, config: ModelConfig) -> ChatTemplate | None:
        """The same; None where there is none."""
        settings = _json(folder, "tokenizer_config.json")
        tokens = {
            name: text
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _token(settings, name))
        }
        text = _stored(folder, settings)
        if text is not None:
            return cls(text, tokens, {})
        own = own_template(config)
        if own is None:
            return None
        return cls((_HERE / own[0]).read_text(encoding="utf-8"), tokens, own[1], parses=True)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **more: Any,
    ) -> str:
        """The prompt of a conversation, its special tokens as text.

        Args:
            messages: as OpenAI's API has them: ``role``, ``content``, ``tool_calls``, ``reasoning_content``, ..
            tools: that the model may call, likewise.
            add_generation_prompt: whether the model's answer comes next.
            more: what a template reads besides: ``thinking``, ``reasoning_effort``, ``drop_thinking``, ..

        Raises:
            BadInput: the messages are none, or the template refuses them.
        """
        _check(messages)
        given = [_parsed(message) for message in messages] if self.parses else [dict(one) for one in messages]
        variables = {
            **self.tokens,
            **self.known,
            **more,
            "messages": given,
            "tools": [dict(tool) for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _environment(self.parses).from_string(self.text).render(variables)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise BadInput(
                "the chat template cannot render these messages", str(error), "see its roles and fields"
            ) from error


def _environment(own: bool) -> jinja2.Environment:
    """What transformers gives templates, which read their variables and no more; our ``own`` read each other, too."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols],
        loader=jinja2.FileSystemLoader(_HERE) if own else None,
    )
    found.filters["tojson"] = to_json
    found.globals["raise_exception"] = refuse
    found.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return found


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    wrong = next(
        (one for one in messages if not isinstance(one, Mapping) or not isinstance(one.get("role"), str)), None
    )
    if not messages or wrong is not None:
        raise BadInput(
            "these are no messages",
            "there are none" if not messages else f"{str(wrong)[:200]} has no role",
            'give a list such as [{"role": "user", "content": "Hello"}]',
        )


def _parsed(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose tool calls' arguments are objects, whose content is text, and whose tools are functions."""
    made = dict(message)
    if isinstance(made.get("content"), list):
        made["content"] = "\n\n".join(map(_text_of, made["content"]))
    if made.get("tool_calls"):
        made["tool_calls"] = [_call(one) for one in made["tool_calls"]]
    made.setdefault("reasoning_content", made.get("reasoning"))
    return made


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        raise BadInput("a message has a part that is no text", f"type: {kind}", "give text; images are not supported")
    return str(part["text"])


def _call(call: Any) -> dict[str, Any]:
    try:
        function, arguments = call["function"], call["function"]["arguments"]
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        name = function["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            "a tool call cannot be read", f"{str(call)[:200]}: {error}", "arguments have to be JSON"
        ) from error
    if not isinstance(parsed, dict):
        raise BadInput("a tool call's arguments are no object", str(arguments)[:200], "give a JSON object")
    return {"id": call.get("id") or "", "function": {"name": name, "arguments": parsed}}


def _stored(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The checkpoint's own template: of several, the default one."""
    file = file_of(folder, "chat_template.jinja")
    found = parsed(file, bytes.decode) if file else None
    if found is None:
        found = _json(folder, "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
        found = named.get("default")
    if found is not None and (not isinstance(found, str) or len(found) > _LONGEST):
        raise BadInput(f"the chat template of {folder} cannot be read", "it is no text, or longer than a mebibyte")
    return found


def _token(settings: Mapping[str, Any], name: str) -> str | None:
    token = settings.get(name)
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _json(folder: Path, name: str) -> Mapping[str, Any]:
    path = file_of(folder, name)
    return parsed(path, json_object) if path else {}
