"""From what a client sends to a request: one table of inputs, their types and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from v4export.chat import ChatTemplate, Conversation
from v4export.errors import BadInput, NotSupported
from v4export.package.bundle import Bundle
from v4export.runtime.pausing import Pausing
from v4export.runtime.sampling import Sampling
from v4export.runtime.tokenizer import Tokenizer
from v4export.serve.answer import Request

TEXT, INTEGER, SMALL, REAL, FLAG = "TYPE_STRING", "TYPE_INT64", "TYPE_INT32", "TYPE_FP32", "TYPE_BOOL"


@dataclass(frozen=True)
class Input:
    """One input: Triton's type, whether there may be several values, and what it says."""

    type: str
    what: str
    several: bool = False


INPUTS = {
    "text_input": Input(TEXT, "the prompt; this or `messages`"),
    "messages": Input(TEXT, 'JSON: [{"role": "user", "content": ".."}, ..], or `messages`, `tools` and more by name'),
    "max_tokens": Input(SMALL, "the most new tokens; a default that fits unless given"),
    "temperature": Input(REAL, "0, the default, takes the likeliest token"),
    "top_p": Input(REAL, "nucleus sampling"),
    "top_k": Input(SMALL, "0 is all"),
    "seed": Input(INTEGER, "of the sampling"),
    "stop": Input(TEXT, "the text ends before the first of these", several=True),
    "think": Input(TEXT, "`off`, `auto` or a number of steps; of models with reasoning layers"),
    "draft_max": Input(SMALL, "tokens drafted ahead of a step, at most the server's own number; 0 is none"),
    "ignore_eos": Input(FLAG, "go on past the end-of-text token"),
    "stream": Input(FLAG, "false: one response with all of it"),
}
OUTPUTS = {
    "text_output": Input(TEXT, "new text, possibly none; cut before a stop string"),
    "token_ids": Input(INTEGER, "the new tokens", several=True),
    "finish_reason": Input(TEXT, "`stop` or `length`, in the last response; else empty"),
    "usage": Input(TEXT, "JSON of tokens, thoughts and times, in the last response; else empty"),
}


@dataclass(frozen=True)
class Asked:
    """A request, and whether its answer is to come piece by piece."""

    request: Request
    stream: bool = True


class Reader:
    """Turns inputs into requests.

    Args:
        bundle: whose model is asked.
        tokenizer: of it.
        template: of its chats; None where it has none.
        max_tokens: where a client names no number, and as many fit.
        draft_max: tokens drafted ahead of a step where a client names no number, and the most that one may ask for.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        max_tokens: int = 256,
        draft_max: int = 0,
    ) -> None:
        self._bundle, self._tokenizer, self._template = bundle, tokenizer, template
        self._max_tokens, self._draft_max = max_tokens, draft_max
        self._stop_ids = tokenizer.ends(bundle.config.eos_token_ids)

    def read(self, given: Mapping[str, Any]) -> Asked:
        """The request.

        Args:
            given: inputs by name: text as ``str``, of several values a list.

        Raises:
            BadInput, NotSupported: it cannot be answered, and why.
        """
        tokens = self._tokens(given.get("text_input"), given.get("messages"))
        room = self._bundle.max_seq_len - len(tokens)
        names = ("temperature", "top_p", "top_k", "seed")
        request = Request(
            tokens=tokens,
            max_tokens=given["max_tokens"] if "max_tokens" in given else max(1, min(self._max_tokens, room)),
            sampling=Sampling(**{name: given[name] for name in names if name in given}),
            stop_ids=frozenset() if given.get("ignore_eos") else self._stop_ids,
            stop_strings=tuple(given.get("stop", ())),
            pausing=Pausing.read(given.get("think"), self._bundle.thinking),
            draft_max=self._ahead(given.get("draft_max", self._draft_max)),
        )
        return Asked(request, given.get("stream", True))

    def _ahead(self, asked: int) -> int:
        if not 0 <= asked <= self._draft_max:
            raise BadInput("draft_max is out of range", f"{asked}", f"give 0 to {self._draft_max}, or leave it out")
        return asked

    def _tokens(self, text: str | None, messages: str | None) -> tuple[int, ...]:
        if (text is None) == (messages is None):
            raise BadInput("a prompt is needed, once", fix="give text_input or messages")
        if messages is None:
            ids = self._tokenizer.encode(text or "") if text else []
        elif self._template is None:
            raise NotSupported("this model has no chat template", fix="give text_input")
        else:
            # The template has written whatever stands in front of a text.
            ids = self._tokenizer.encode(Conversation.parse(messages).prompt(self._template), add_special_tokens=False)
        image = self._bundle.config.image_token_id
        if image is not None and image in ids:
            raise NotSupported("the prompt has an image, and text alone is served", f"token {image}", "leave it out")
        return tuple(ids)
