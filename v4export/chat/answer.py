"""What a model wrote, as a message: its reasoning, its content, and the tools that it calls.

Several families' marks of tool calls are known; whichever is there is read. What is not well formed stays content, so
that nothing a model wrote is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

THINK, THOUGHT = "<think>", "</think>"
#: What a model may write at its end.
ENDS = ("<｜end▁of▁sentence｜>", "<|im_end|>")


@dataclass(frozen=True)
class ToolCall:
    """A tool that a model calls.

    Attributes:
        name: of the tool.
        arguments: as JSON text.
        id: that the model gave the call; "" if none.
    """

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Answer:
    """A message of a model.

    Attributes:
        content: what is for the user.
        reasoning: what it thought before.
        tool_calls: the tools that it calls.
    """

    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def read_answer(text: str, thinking: bool = False) -> Answer:
    """A model's answer, its special tokens as text.

    Args:
        text: all that came after the prompt; a mark of the end may follow.
        thinking: whether the prompt left the model thinking, so that what comes first is reasoning.
    """
    text, reasoning = without_end(text), ""
    if text.lstrip().startswith(THINK):
        text, thinking = text.lstrip().removeprefix(THINK), True
    if thinking:
        before, ended, after = text.partition(THOUGHT)
        reasoning, text = (before, after) if ended else (text, "")
    content, calls = read_calls(text)
    return Answer(content, reasoning, calls)


def without_end(text: str) -> str:
    """The text without the mark of its end, if it has one."""
    return text.removesuffix(next((end for end in ENDS if text.endswith(end)), ""))


def read_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """What is not reasoning: the content, and the calls of tools that were taken out of it."""
    for section, read in _SECTIONS:
        found = section.search(text)
        calls = read(found[1]) if found else None
        if found and calls:
            return text[: found.start()] + text[found.end() :], calls
    return text, ()


def _dsml(inside: str) -> tuple[ToolCall, ...] | None:
    calls, end = [], 0
    for call in _INVOKE.finditer(inside):
        arguments, rest = {}, _PARAMETER.sub("", call[2])
        for name, is_string, value in _PARAMETER.findall(call[2]):
            if name in arguments:
                return None
            try:
                arguments[name] = value if is_string == "true" else json.loads(value)
            except ValueError:
                return None
        if rest.strip() or inside[end : call.start()].strip():
            return None
        calls.append(ToolCall(call[1], json.dumps(arguments, ensure_ascii=False)))
        end = call.end()
    return tuple(calls) if not inside[end:].strip() else None


def _listed(pattern: re.Pattern[str]) -> Callable[[str], tuple[ToolCall, ...] | None]:
    """Calls one behind the other, each of which the pattern finds: ``name``, ``arguments`` in JSON, perhaps ``id``."""

    def read(inside: str) -> tuple[ToolCall, ...] | None:
        calls = []
        for call in pattern.finditer(inside):
            try:
                json.loads(call["arguments"])
            except ValueError:
                return None
            calls.append(ToolCall(call["name"], call["arguments"].strip(), call.groupdict().get("id") or ""))
        return tuple(calls) if not pattern.sub("", inside).strip() else None

    return read


_INVOKE = re.compile(r'<｜DSML｜ ?invoke name="(.*?)">\n?(.*?)</｜DSML｜ ?invoke>', re.DOTALL)
_PARAMETER = re.compile(
    r'<｜DSML｜ ?parameter name="(.*?)" string="(true|false)">(.*?)</｜DSML｜ ?parameter>\n?', re.DOTALL
)
_V3 = (
    r"<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[^\n]*)\n```json\n(?P<arguments>.*?)\n```<｜tool▁call▁end｜>"
)
_V31 = r"<｜tool▁call▁begin｜>(?P<name>.*?)<｜tool▁sep｜>(?P<arguments>.*?)<｜tool▁call▁end｜>"
_KIMI = (
    r"<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^\s:<]+)(?::\d+)?)\s*"
    r"<\|tool_call_argument_begin\|>(?P<arguments>.*?)<\|tool_call_end\|>"
)


def _section(begin: str, end: str) -> re.Pattern[str]:
    return re.compile(rf"\s*{re.escape(begin)}(.*?){re.escape(end)}", re.DOTALL)


#: How sections of tool calls begin, end and are read: DSML (V3.2, V4, V4.1), V3 and R1, V3.1, Kimi.
_MARKED = (
    *((f"<｜DSML｜{block}>", f"</｜DSML｜{block}>", _dsml) for block in ("function_calls", "tool_calls", " calls")),
    *(("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _listed(re.compile(one, re.DOTALL))) for one in (_V3, _V31)),
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", _listed(re.compile(_KIMI, re.DOTALL))),
)
_SECTIONS = [(_section(begin, end), read) for begin, end, read in _MARKED]
#: What a section of tool calls, or the end of an answer, begins with.
MARKS = (*dict.fromkeys(begin for begin, _, _ in _MARKED), *ENDS)
