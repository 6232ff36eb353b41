"""Conversations from the command line to an answer."""

from __future__ import annotations

import json
import shutil

import pytest

from v4export import api
from v4export.chat import Conversation
from v4export.errors import BadInput, NotSupported

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{{ '<think>' if thinking else '' }}"


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """The tiny bundle with a chat template of its own."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("fp32").folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_question_is_put_into_the_template(tiny_bundle, bundle):
    asked = api.run(bundle, prompt="Hi", chat=True, thinking=True, max_new_tokens=6)
    same = api.run(tiny_bundle("fp32").folder, prompt="[user] Hi\n<think>", max_new_tokens=6)
    assert asked.tokens == same.tokens
    assert asked.answer is not None and asked.answer.reasoning and asked.as_json()["answer"]["content"] == ""
    assert same.answer is None


def test_messages_of_a_file(bundle, tmp_path):
    file = tmp_path / "messages.json"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}], "thinking": True}))
    found = api.run(bundle, messages=file, max_new_tokens=4)
    assert found.tokens == api.run(bundle, prompt="Hi", chat=True, thinking=True, max_new_tokens=4).tokens
    assert found.answer is not None and found.answer.reasoning


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"messages": 3}', '"x"', "[]"])
def test_a_file_that_has_no_messages(bundle, tmp_path, text):
    file = tmp_path / "messages.json"
    file.write_text(text)
    with pytest.raises(BadInput):
        api.run(bundle, messages=file)


def test_one_prompt_and_no_more(bundle, tmp_path):
    with pytest.raises(BadInput, match="once"):
        api.run(bundle, prompt="Hi", messages=tmp_path / "messages.json")
    with pytest.raises(BadInput, match="cannot read"):
        Conversation.read(tmp_path / "absent.json")


def test_a_model_without_a_template(tiny_bundle):
    with pytest.raises(NotSupported, match="no chat template"):
        api.run(tiny_bundle("fp32").folder, prompt="Hi", chat=True)
