"""A conversation as users give one: a question, or a file of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v4export.chat.template import ChatTemplate
from v4export.errors import BadInput


@dataclass(frozen=True)
class Conversation:
    """What is to be answered.

    Attributes:
        messages: so far.
        tools: that may be called.
        options: what a template reads besides, ``reasoning_effort`` and the like.
    """

    messages: list[Mapping[str, Any]]
    tools: list[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Conversation:
        """A JSON file of messages, or of an object of ``messages``, ``tools`` and options, as OpenAI's API takes it.

        Raises:
            BadInput: it is neither.
        """
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read {file}", str(error), "give a JSON file of messages") from error
        return cls.parse(text)

    @classmethod
    def parse(cls, text: str) -> Conversation:
        """The same from the JSON itself."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput("messages are not JSON", str(error), "give a list of messages") from error
        rest = {"messages": found} if isinstance(found, list) else found
        if not isinstance(rest, dict) or not isinstance(rest.get("messages"), list):
            raise BadInput("there are no messages", text[:80], 'give [{"role": "user", "content": ".."}]')
        options = {name: value for name, value in rest.items() if name not in ("messages", "tools", "model")}
        return cls(rest["messages"], rest.get("tools"), options)

    @classmethod
    def asking(cls, question: str) -> Conversation:
        """One question."""
        return cls([{"role": "user", "content": question}])

    def thinks(self, thinking: bool) -> bool:
        """Whether the model is asked to reason first: as its options say, or else as given."""
        return bool(self.options.get("thinking", thinking))

    def prompt(self, template: ChatTemplate, thinking: bool = False) -> str:
        """The text to go on from.

        Raises:
            BadInput: the template refuses it.
        """
        return template.render(self.messages, tools=self.tools, **{"thinking": thinking, **self.options})
