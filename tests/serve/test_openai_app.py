"""The example that speaks OpenAI's API, over a Triton that is played here."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("tritonclient.grpc.aio")
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tritonclient.utils import InferenceServerException

APP = Path(__file__).parents[2] / "examples" / "openai_server" / "app.py"
USAGE = json.dumps({"prompt_tokens": 3, "new_tokens": 4})
CALL = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="look">\n'
    '<｜DSML｜parameter name="n" string="false">2</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("openai_app", APP)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Reply:
    """One response of the model, or the empty one behind the last."""

    def __init__(self, text: str | None, reason: str = "") -> None:
        self.said = {"text_output": text, "finish_reason": reason, "usage": USAGE if reason else ""}

    def as_numpy(self, name: str) -> np.ndarray | None:
        text = self.said[name]
        return None if text is None else np.array([text.encode()], object)


class Played:
    """Triton, answering with given pieces, or an error; keeps what it was asked."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces, self.asked, self.cancelled = pieces, None, False

    def stream_infer(self, requests: Any) -> Any:
        played = self

        class Stream:
            async def __aiter__(self) -> Any:
                async for request in requests:
                    played.asked = request
                for piece in played.pieces:
                    yield (None, piece) if isinstance(piece, Exception) else (piece, None)

            def cancel(self) -> None:
                played.cancelled = True

        return Stream()


@pytest.fixture
def client(example) -> Iterator[Any]:
    def made(*pieces: Any) -> tuple[TestClient, Played]:
        app, played = Starlette(routes=example.ROUTES), Played(*pieces)
        app.state.client, app.state.model = played, "tiny"
        return TestClient(app), played

    yield made


def test_an_answer(client):
    http, played = client(Reply("Hi "), Reply("there", "stop"), Reply(None))
    found = http.post("/v1/chat/completions", json=HELLO | {"max_tokens": 5, "temperature": 0.5, "stop": "x"}).json()
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi there"} and choice["finish_reason"] == "stop"
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert found["object"] == "chat.completion" and found["model"] == "tiny" and played.cancelled
    names = [one.name() for one in played.asked["inputs"]]
    assert names == ["messages", "max_tokens", "temperature", "stop"] and played.asked["model_name"] == "tiny"


def test_a_stream(client):
    http, _ = client(Reply("why</thi"), Reply("nk>Hi "), Reply("there", "length"), Reply(None))
    body = HELLO | {"stream": True, "reasoning_effort": "high"}
    lines = [line for line in http.post("/v1/chat/completions", json=body).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    deltas = [one["choices"][0]["delta"] for one in events if one["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "why"
    assert "".join(d.get("content", "") for d in deltas) == "Hi there"
    assert [one["choices"][0]["finish_reason"] for one in events if one["choices"]][-1] == "length"
    assert events[-1]["usage"]["total_tokens"] == 7


def test_calls_of_tools(client):
    http, _ = client(Reply("See." + CALL[:30]), Reply(CALL[30:], "stop"), Reply(None))
    tools = [{"type": "function", "function": {"name": "look"}}]
    (choice,) = http.post("/v1/chat/completions", json=HELLO | {"tools": tools}).json()["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "See."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": '{"n": 2}'} and call["id"].startswith("call_")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        ("INVALID_ARGUMENT", 400, "invalid_request_error"),
        ("UNAVAILABLE", 503, "server_error"),
        ("INTERNAL", 500, "server_error"),
    ],
)
def test_what_triton_refuses(client, status, code, kind):
    for error in (InferenceServerException(f"{status}: no room"), InferenceServerException("no room", f"S.{status}")):
        http, _ = client(error)
        for stream in (False, True):
            found = http.post("/v1/chat/completions", json=HELLO | {"stream": stream})
            assert (found.status_code, found.json()["error"]) == (code, {"message": "no room", "type": kind})


def test_an_error_in_the_middle_of_a_stream(client):
    http, _ = client(Reply("Hi"), InferenceServerException("gone", "StatusCode.UNAVAILABLE"))
    text = http.post("/v1/chat/completions", json=HELLO | {"stream": True}).text
    assert '"gone"' in text and "[DONE]" not in text


@pytest.mark.parametrize("body", [{}, {"messages": "x"}, HELLO | {"max_tokens": "many"}, [1]])
def test_bad_requests(client, body):
    http, played = client()
    found = http.post("/v1/chat/completions", json=body)
    assert found.status_code == 400 and found.json()["error"]["message"] and played.asked is None


def test_models(client):
    assert client()[0].get("/v1/models").json()["data"][0]["id"] == "tiny"
