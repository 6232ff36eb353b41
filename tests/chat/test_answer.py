"""What models write back, in each family's marks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4export import presets
from v4export.chat import Answer, AnswerStream, ChatTemplate, ToolCall, read_answer

PUBLISHED = Path(__file__).parent / "published"
ARGUMENTS = '{"city": "Köln", "days": 2}'
V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
    + ARGUMENTS
    + "\n```<｜tool▁call▁end｜>\n<｜tool▁calls▁end｜>"
)
V31 = f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
    f"{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>"
)


def dsml(block: str, space: str = "") -> str:
    return (
        f'\n\n<｜DSML｜{block}>\n<｜DSML｜{space}invoke name="look">\n'
        f'<｜DSML｜{space}parameter name="city" string="true">Köln</｜DSML｜{space}parameter>\n'
        f'<｜DSML｜{space}parameter name="days" string="false">2</｜DSML｜{space}parameter>\n'
        f"</｜DSML｜{space}invoke>\n</｜DSML｜{block}>"
    )


CALLS = {
    "v3": V3,
    "v3.1": V31,
    "kimi": KIMI,
    "v3.2": dsml("function_calls"),
    "v4": dsml("tool_calls"),
    "v4.1": dsml(" calls", " "),
}


@pytest.mark.parametrize("family", CALLS)
@pytest.mark.parametrize("thinking", [False, True])
def test_calls_of_tools(family, thinking):
    text = ("I look.</think>" if thinking else "") + "Let me see." + CALLS[family] + "<｜end▁of▁sentence｜>"
    found = read_answer(text, thinking)
    assert (found.content, found.reasoning) == ("Let me see.", "I look." if thinking else "")
    (call,) = found.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("look", json.loads(ARGUMENTS))
    assert call.id == ("functions.look:0" if family == "kimi" else "")


@pytest.mark.parametrize("family", CALLS)
def test_what_is_not_well_formed_stays_content(family):
    for broken in (CALLS[family][:-3], CALLS[family].replace("2", "2 or"), "<｜DSML｜tool_calls>?" + CALLS[family]):
        found = read_answer(broken)
        assert found == Answer(broken) or (found.tool_calls and found.content == "<｜DSML｜tool_calls>?")


def test_several_calls_and_text_around_them():
    inside = CALLS["v4"].removeprefix("\n\n<｜DSML｜tool_calls>\n").removesuffix("</｜DSML｜tool_calls>")
    found = read_answer(f"a\n\n<｜DSML｜tool_calls>\n{inside}{inside}</｜DSML｜tool_calls>b")
    assert [call.name for call in found.tool_calls] == ["look", "look"] and found.content == "ab"


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("Hello", False, Answer("Hello")),
        ("why</think>Hello<|im_end|>", True, Answer("Hello", "why")),
        ("<think>why</think>Hello", False, Answer("Hello", "why")),
        ("why it is", True, Answer("", "why it is")),
        ("", False, Answer("")),
    ],
)
def test_reasoning(text, thinking, expected):
    assert read_answer(text, thinking) == expected


@pytest.mark.parametrize("preset", ["tiny-v3.2", "tiny-v4", "tiny-v4.1"])
def test_an_answer_is_what_the_template_writes_of_it(tmp_path, preset):
    """Rendered as the last turn and read back."""
    template = ChatTemplate.of(tmp_path, presets.load(preset))
    call = {"function": {"name": "look", "arguments": ARGUMENTS}}
    asked = [{"role": "user", "content": "?"}]
    said = {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": [call]}
    whole = template.render([*asked, said], thinking=True, add_generation_prompt=False)
    prompt = template.render(asked, thinking=True)
    assert whole.startswith(prompt)
    expected = Answer("Let me see.", "Hm.", (ToolCall("look", ARGUMENTS),))
    assert read_answer(whole.removeprefix(prompt), thinking=True) == expected


PIECES = [
    "Hello ",
    "\n\n",
    "<",
    "</think>",
    "<think>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    *CALLS.values(),
    V3[:40],
    KIMI[:30],
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=6), st.booleans(), st.randoms(use_true_random=False))
def test_a_stream_comes_to_what_the_whole_is(parts, thinking, random):
    text, stream, found = "".join(parts), AnswerStream(thinking), []
    at = 0
    while at < len(text):
        step = random.randint(1, 9)
        found.append(stream.push(text[at : at + step]))
        at += step
    found.append(stream.finish())
    joined = Answer(
        "".join(one.content for one in found),
        "".join(one.reasoning for one in found),
        tuple(call for one in found for call in one.tool_calls),
    )
    assert joined == read_answer(text, thinking)


def test_a_stream_holds_back_no_more_than_it_must():
    stream = AnswerStream(thinking=True)
    assert stream.push("Hm") == Answer("", "Hm")
    assert stream.push(".</th") == Answer("", ".")
    assert stream.push("ink>Yes") == Answer("Yes")
    assert stream.push(" <") == Answer("")
    assert stream.push("3") == Answer(" <3")
