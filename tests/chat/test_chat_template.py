"""Prompts of conversations, against what is published of them and against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from v4export import presets
from v4export.chat import ChatTemplate
from v4export.errors import BadInput, NotSupported

PUBLISHED = Path(__file__).parent / "published"
V32, V4, V41 = (presets.load(name) for name in ("tiny-v3.2", "tiny-v4", "tiny-v4.1"))
FAMILIES = {"v32": V32, "v4": V4, "v41": V41}
BEGIN, END, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def own(folder: Path, config) -> ChatTemplate:
    """The template of a checkpoint that has none."""
    return ChatTemplate.of(folder, config)


@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("weather", "v4", {}),
        ("search", "v4", {}),
        ("weather", "v41", {"reasoning_effort": "xhigh"}),
        ("capital", "v41", {"reasoning_effort": 75}),
    ],
)
def test_published_examples(tmp_path, name, family, options):
    given = json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    expected = (PUBLISHED / f"{name}.{family}.txt").read_text(encoding="utf-8")
    template = own(tmp_path, FAMILIES[family])
    options |= {"thinking": True, "tools": given.get("tools")}
    assert template.render(given["messages"], add_generation_prompt=False, **options) == expected
    assert template.render(given["messages"], **options) == f"{expected}{ASSISTANT}<think>"


def test_the_example_of_the_model_card_of_v32(tmp_path):
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello! I am DeepSeek.", "reasoning_content": "thinking..."},
        {"role": "user", "content": "1+1=?"},
    ]
    answer = f"</think>Hello! I am DeepSeek.{END}"
    expected = f"{BEGIN}{USER}hello{ASSISTANT}{answer}{USER}1+1=?{ASSISTANT}<think>"
    assert own(tmp_path, V32).render(messages, thinking=True) == expected


def test_v32_calls_tools_and_reads_their_results(tmp_path):
    call = {"function": {"name": "add", "arguments": '{"a": 1, "text": "é\\n", "list": [1, "x"]}'}}
    messages = [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "1 and 1?"},
        {"role": "assistant", "reasoning_content": "I add.", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
    ]
    found = own(tmp_path, V32).render(messages, tools=[TOOL], thinking=True)
    assert found.startswith(f"{BEGIN}Count.\n\n## Tools\nYou have access to a set of tools you can use to answer")
    assert '<functions>\n{"name": "look", "parameters": {"type": "object", "properties": {}}}\n</functions>\n' in found
    one = (
        '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="text" string="true">é\n</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="list" string="false">[1, "x"]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    )
    assert found.endswith(
        f"</functions>\n{USER}1 and 1?{ASSISTANT}<think>I add.</think>\n\n"
        f"<｜DSML｜function_calls>\n{one}{one}</｜DSML｜function_calls>{END}"
        "\n\n<function_results>\n<result>2</result>\n<result>3</result>\n</function_results>\n\n<think>"
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thinking", [False, True])
def test_the_last_turn_decides_whether_the_model_thinks(tmp_path, family, thinking):
    template = own(tmp_path, FAMILIES[family])
    opened = template.render(HELLO, thinking=thinking)
    assert opened.endswith(f"{USER}Hello{ASSISTANT}" + ("<think>" if thinking else "</think>"))
    assert template.render(HELLO, thinking=thinking, add_generation_prompt=False).endswith(f"{USER}Hello")


@pytest.mark.parametrize("family", ["v4", "v41"])
def test_results_of_tools_stand_in_the_order_of_their_calls(tmp_path, family):
    calls = [{"id": one, "function": {"name": one, "arguments": {}}} for one in ("first", "second")]
    results = [{"role": "tool", "tool_call_id": one, "content": one} for one in ("second", "first")]
    messages = [*HELLO, {"role": "assistant", "tool_calls": calls}, *results, {"role": "user", "content": "Well?"}]
    found = own(tmp_path, FAMILIES[family]).render(messages)
    parts = "<tool_result>first</tool_result>\n\n<tool_result>second</tool_result>\n\nWell?"
    assert found.endswith(f"{USER}{parts}{ASSISTANT}</think>")


def test_efforts_of_v4(tmp_path):
    template = own(tmp_path, V4)
    assert template.render(HELLO, thinking=True, reasoning_effort="max").startswith(
        f"{BEGIN}Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    )
    assert template.render(HELLO, thinking=True, reasoning_effort="high").startswith(f"{BEGIN}{USER}")
    assert template.render(HELLO, reasoning_effort="max").startswith(f"{BEGIN}{USER}")


@pytest.mark.parametrize(("effort", "budget"), [(None, 50), ("low", 25), ("max", 100), (1, 1), (42, 42)])
def test_efforts_of_v41(tmp_path, effort, budget):
    found = own(tmp_path, V41).render(HELLO, thinking=True, reasoning_effort=effort)
    assert found.startswith(f"{BEGIN}<｜System｜>Reasoning Effort: {budget} (range 1-100, ")


def test_a_later_system_message_of_v41_asks_for_an_answer(tmp_path):
    messages = [{"role": "user", "content": "question"}, {"role": "system", "content": "answer briefly"}]
    expected = f"{BEGIN}{USER}question<｜System｜>answer briefly{ASSISTANT}</think>"
    assert own(tmp_path, V41).render(messages) == expected


def test_quick_tasks(tmp_path):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "latest_reminder", "content": "today"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c", "task": "action"},
        {"role": "assistant", "content": "Search"},
    ]
    assert own(tmp_path, V4).render(messages, add_generation_prompt=False) == (
        f"{BEGIN}S<｜latest_reminder｜>today{USER}a{ASSISTANT}</think>b{END}"
        f"{USER}c{ASSISTANT}</think><｜action｜>Search{END}"
    )


@pytest.mark.parametrize("family", ["v32", "v4"])
def test_developers_and_reasoning_of_earlier_turns_are_dropped(tmp_path, family):
    messages = [
        {"role": "developer", "content": "old"},
        {"role": "assistant", "content": "A", "reasoning_content": "because"},
        *HELLO,
    ]
    template = own(tmp_path, FAMILIES[family])
    dropped = template.render(messages, thinking=True)
    assert "because" not in dropped and "old" not in dropped
    assert "old" in template.render(messages, thinking=True, drop_thinking=False)
    assert ("because" in template.render(messages, thinking=True, drop_thinking=False)) == (family == "v4")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([], {}),
        ([{"content": "x"}], {}),
        ([{"role": "wizard", "content": "x"}], {}),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}),
        ([*HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], {}),
        ([*HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}], {}),
    ],
)
def test_what_cannot_be_rendered_is_refused(tmp_path, family, messages, options):
    with pytest.raises(BadInput):
        own(tmp_path, FAMILIES[family]).render(messages, **options)


@pytest.mark.parametrize("effort", ["medium", 0, 101, True, 1.5, []])
def test_efforts_that_there_are_not(tmp_path, effort):
    with pytest.raises(BadInput, match=r"chat template"):
        own(tmp_path, V41).render(HELLO, thinking=True, reasoning_effort=effort)


#: Uses what transformers gives templates and Jinja by itself has not.
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'skipped' %}{% continue %}{% endif %}
{%- if message['role'] == 'wizard' %}{{ raise_exception('no ' + message['role']) }}{% endif %}
    {%- if message['tool_calls'] is defined and message['tool_calls'] %}
        {%- for call in message['tool_calls'] %}
{{ '<call>' + call['function']['name'] + ' ' + call['function']['arguments'] }}
        {%- endfor %}
    {%- endif %}
<{{ message['role'] }}>{{ message['content'] | trim }}
{% endfor %}
{%- if tools %}{{ tools | tojson }} {{ tools[0] | tojson(indent=2) }}{% endif %}
{{- strftime_now('%Y') }}
{% if add_generation_prompt %}<assistant>{% if thinking %}<think>{% endif %}{% endif %}
"""
CONVERSATION = [
    {"role": "system", "content": " Über "},
    {"role": "skipped", "content": "?"},
    *HELLO,
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": '{"a": 1}'}}]},
]


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "named", "chat_template.json"])
@pytest.mark.parametrize("options", [{}, {"thinking": True}, {"add_generation_prompt": False}, {"tools": [TOOL]}])
def test_a_checkpoints_own_template_is_rendered_as_transformers_does(tmp_path, where, options, tiny_checkpoint):
    template = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": TEMPLATE}]
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    if where == "chat_template.jinja":
        (tmp_path / where).write_text(TEMPLATE)
    elif where == "chat_template.json":
        (tmp_path / where).write_text(json.dumps({"chat_template": TEMPLATE}))
    else:
        settings["chat_template"] = TEMPLATE if where != "named" else template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_checkpoint / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    options = {"add_generation_prompt": True, **options}
    expected = tokenizer.apply_chat_template(CONVERSATION, chat_template=TEMPLATE, tokenize=False, **options)
    assert ChatTemplate.of(tmp_path, V4).render(CONVERSATION, **options) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'tokenizer_config.json' %}",
        "{% for x in range(999999999) %}{% endfor %}",
        "{{ raise_exception('never') }}",
        "{% if %}",
    ],
)
def test_a_template_can_do_nothing_but_write(tmp_path, template):
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(BadInput, match="chat template"):
        ChatTemplate.of(tmp_path, V4).render(HELLO)


def test_a_family_without_a_template_says_so(tmp_path):
    with pytest.raises(NotSupported, match="no chat template"):
        ChatTemplate.of(tmp_path, replace(V32, indexer=None))
