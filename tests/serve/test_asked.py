from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from v4export import presets
from v4export.chat import ChatTemplate
from v4export.errors import BadInput, NotSupported
from v4export.runtime.pausing import Pausing
from v4export.runtime.sampling import Sampling
from v4export.runtime.tokenizer import load_tokenizer
from v4export.serve.asked import Reader

THINKING = {"steps": 4, "confidence": "entropy", "threshold": 0.5}


@pytest.fixture(scope="module")
def tokenizer(trained_checkpoint):
    return load_tokenizer(trained_checkpoint)


@pytest.fixture
def reader(tokenizer):
    def made(template=None, thinking=None, **changes) -> Reader:
        config = replace(presets.load("tiny-v3"), **changes)
        bundle = SimpleNamespace(config=config, max_seq_len=512, thinking=thinking)
        return Reader(bundle, tokenizer, template and ChatTemplate(template, {}, {}), max_tokens=100)

    return made


def test_what_is_left_out_has_defaults(reader, tokenizer):
    asked = reader().read({"text_input": "def f("})
    request = asked.request
    assert asked.stream and list(request.tokens) == tokenizer.encode("def f(") and request.max_tokens == 100
    assert request.sampling == Sampling() and request.pausing is None and request.stop_strings == ()
    assert tokenizer.eos_id in request.stop_ids


def test_what_is_given(reader):
    asked = reader(thinking=THINKING).read(
        {
            "text_input": "x",
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "seed": 5,
            "stop": ["a", "b"],
            "think": "2",
            "ignore_eos": True,
            "stream": False,
        }
    )
    assert not asked.stream and asked.request.max_tokens == 7 and asked.request.stop_ids == frozenset()
    assert asked.request.sampling == Sampling(0.5, 0.9, 3, 5) and asked.request.stop_strings == ("a", "b")
    assert asked.request.pausing == Pausing(2, True, "entropy", 0.5)


def test_new_tokens_that_fit_unless_a_number_is_named(reader, tokenizer):
    text = "def " * 440
    room = 512 - len(tokenizer.encode(text))
    assert 0 < room < 100 and reader().read({"text_input": text}).request.max_tokens == room


def test_messages_are_rendered_and_nothing_is_put_in_front_of_them(reader, tokenizer):
    messages = json.dumps([{"role": "user", "content": "hello"}])
    request = reader("{{ messages[0].content }}<|end|>").read({"messages": messages}).request
    assert list(request.tokens) == tokenizer.encode("hello<|end|>", add_special_tokens=False)
    assert request.tokens[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({}, BadInput, "a prompt is needed, once"),
        ({"text_input": "a", "messages": "[]"}, BadInput, "a prompt is needed, once"),
        ({"messages": "{"}, BadInput, "not JSON"),
        ({"messages": "[]"}, BadInput, "these are no messages"),
        ({"messages": '[{"content": "a"}]'}, BadInput, "these are no messages"),
        ({"text_input": "a", "think": "2"}, BadInput, "no reasoning layers"),
        ({"text_input": "a", "temperature": -1.0}, BadInput, "temperature is out of range"),
        ({"text_input": "a", "seed": -1}, BadInput, "seed is out of range"),
        ({"text_input": "\ud800"}, BadInput, "UTF-8"),
    ],
)
def test_what_cannot_be_read(reader, given, error, match):
    with pytest.raises(error, match=match):
        reader("{{ messages }}").read(given)


def test_what_this_model_has_not(reader, tokenizer):
    with pytest.raises(NotSupported, match="no chat template"):
        reader().read({"messages": '[{"role": "user", "content": "a"}]'})
    image = tokenizer.encode("def", add_special_tokens=False)[0]
    with pytest.raises(NotSupported, match="has an image"):
        reader(image_token_id=image).read({"text_input": "def"})
