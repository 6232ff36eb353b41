"""An answer piece by piece: what of a model's text is certain to be reasoning, content, or a call of a tool."""

from __future__ import annotations

from v4export.chat.answer import ENDS, MARKS, THINK, THOUGHT, Answer, read_calls, without_end


class AnswerStream:
    """Takes text as it comes and gives the answer's growth; all of it joined is what ``read_answer`` makes of it.

    Args:
        thinking: whether the prompt left the model thinking.
    """

    def __init__(self, thinking: bool = False) -> None:
        self._state, self._next = self._beginning, self._reasoning if thinking else self._content
        self._held = ""

    def push(self, text: str) -> Answer:
        """What the text makes certain; calls of tools come at the end."""
        self._held += text
        return self._state(last=False)

    def finish(self) -> Answer:
        """The rest, once no more text comes."""
        self._held = without_end(self._held)
        return self._state(last=True)

    def _beginning(self, last: bool) -> Answer:
        """A model may open its reasoning itself."""
        start = self._held.lstrip()
        if start.startswith(THINK):
            self._held, self._state = start.removeprefix(THINK), self._reasoning
        elif last or not THINK.startswith(start):
            self._state = self._next
        else:
            return Answer("")
        return self._state(last)

    def _reasoning(self, last: bool) -> Answer:
        before, ended, after = self._held.partition(THOUGHT)
        if ended:
            self._held, self._state = after, self._content
            rest = self._content(last)
            return Answer(rest.content, before, rest.tool_calls)
        return Answer("", self._let_go(0 if last else _overlap(self._held, (THOUGHT, *ENDS))))

    def _content(self, last: bool) -> Answer:
        at = min((place for mark in MARKS if (place := self._held.find(mark)) >= 0), default=len(self._held))
        if at < len(self._held):
            self._state = self._calls
        kept = len(self._held) - at or (0 if last else _overlap(self._held, MARKS))
        ahead = self._held[: len(self._held) - kept]
        # White space ahead of a section of calls belongs to it.
        white = len(ahead) - len(ahead.rstrip())
        sure = self._let_go(kept if last and not kept else kept + white)
        rest = self._calls(last)
        return Answer(sure + rest.content, "", rest.tool_calls)

    def _calls(self, last: bool) -> Answer:
        content, calls = read_calls(self._let_go(0)) if last else ("", ())
        return Answer(content, "", calls)

    def _let_go(self, kept: int) -> str:
        """What is held but for the last so many characters."""
        cut = len(self._held) - kept
        sure, self._held = self._held[:cut], self._held[cut:]
        return sure


def _overlap(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of the text that a mark begins with, or is."""
    return max((n for mark in marks for n in range(1, len(mark) + 1) if text.endswith(mark[:n])), default=0)
