"""OpenAI's chat API in front of a model that Triton serves (``v4export package BUNDLE --triton DIR``).

    pip install 'v4export[triton]' starlette uvicorn
    TRITON=localhost:8001 MODEL=tiny uvicorn app:app --port 9000

Triton's own OpenAI frontend knows the backends of vLLM and TensorRT-LLM alone; this is the same for ours, small enough
to be changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc.aio as triton
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tritonclient.utils import InferenceServerException

from v4export.chat import Answer, AnswerStream

#: OpenAI's name of a field -> the model's input and its type.
FIELDS: dict[str, tuple[str, str, Any]] = {
    "max_tokens": ("max_tokens", "INT32", np.int32),
    "max_completion_tokens": ("max_tokens", "INT32", np.int32),
    "temperature": ("temperature", "FP32", np.float32),
    "top_p": ("top_p", "FP32", np.float32),
    "top_k": ("top_k", "INT32", np.int32),
    "seed": ("seed", "INT64", np.int64),
}
#: gRPC's status, with which the model's messages begin -> HTTP's.
STATUS = {"INVALID_ARGUMENT": 400, "UNIMPLEMENTED": 400, "NOT_FOUND": 404, "UNAVAILABLE": 503, "INTERNAL": 500}


class Asked:
    """A request of OpenAI's API as inputs of the model.

    Raises:
        ValueError: a field is of another kind than the API says.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        if not isinstance(body.get("messages"), list):
            raise ValueError("messages: a list is needed")
        template = dict(body.get("chat_template_kwargs") or {})
        effort = body.get("reasoning_effort")
        if effort is not None:
            template |= {"thinking": effort != "none"} | ({} if effort == "none" else {"reasoning_effort": effort})
        self.thinking = bool(template.get("thinking", template.get("enable_thinking", False)))
        talk = {**template, "thinking": self.thinking, "messages": body["messages"], "tools": body.get("tools")}
        self.inputs = [_text("messages", [json.dumps(talk)])]
        for name, (own, kind, dtype) in FIELDS.items():
            if body.get(name) is not None:
                if isinstance(body[name], bool) or not isinstance(body[name], int | float):
                    raise ValueError(f"{name}: a number is needed")
                self.inputs.append(_input(own, kind, np.array([body[name]], dtype)))
        stop = body.get("stop") or []
        if stop:
            self.inputs.append(_text("stop", [stop] if isinstance(stop, str) else stop))
        self.stream = bool(body.get("stream"))
        self.model = str(body.get("model") or "")


async def chat(request: Request) -> Response:
    """``POST /v1/chat/completions``"""
    try:
        asked = Asked(await request.json())
    except (ValueError, AttributeError, TypeError) as error:
        return refused(str(error), 400)
    pieces = answer(request.app.state.client, request.app.state.model, asked)
    try:
        # The first piece says whether the request is taken, while the status can still be another one.
        first = await anext(pieces)
    except InferenceServerException as error:
        return refused(*told(error))
    if asked.stream:
        return StreamingResponse(events(first, pieces, asked), media_type="text/event-stream")
    parts = [first, *[piece async for piece in pieces]]
    whole = Answer(
        "".join(part.content for part, *_ in parts),
        "".join(part.reasoning for part, *_ in parts),
        tuple(call for part, *_ in parts for call in part.tool_calls),
    )
    _, reason, usage = parts[-1]
    choice = {"index": 0, "message": {"role": "assistant", "content": whole.content, **grown(whole)}}
    choice["finish_reason"] = reason
    return JSONResponse(envelope("chat.completion", asked, choices=[choice], usage=usage))


def told(error: InferenceServerException) -> tuple[str, int]:
    """An error's text and HTTP's code for it. Errors of a stream have a status only in their text, at its beginning."""
    text, status = str(error.message()), str(error.status() or "").rpartition(".")[2]
    begin, _, rest = text.partition(": ")
    return (text, STATUS.get(status, 500)) if status else (rest if begin in STATUS else text, STATUS.get(begin, 500))


async def models(request: Request) -> Response:
    """``GET /v1/models``"""
    return JSONResponse({"object": "list", "data": [{"id": request.app.state.model, "object": "model"}]})


#: An answer's growth; at its end why it ended and what it took.
Piece = tuple[Answer, str | None, dict[str, int] | None]


async def answer(client: Any, model: str, asked: Asked) -> AsyncIterator[Piece]:
    """The answer as it comes; who stops asking for it cancels it."""

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": model, "inputs": asked.inputs, "enable_empty_final_response": True}

    read, reason, usage, called = AnswerStream(asked.thinking), "stop", None, False
    replies = client.stream_infer(requests())
    try:
        async for result, error in replies:
            if error is not None:
                raise error
            if result.as_numpy("text_output") is None:
                break
            said = _said(result, "finish_reason")
            if said:
                reason, usage = said, _usage(json.loads(_said(result, "usage")))
            grows = read.push(_said(result, "text_output"))
            yield grows, None, None
        last = read.finish()
        called = bool(last.tool_calls)
        yield last, "tool_calls" if called else reason, usage
    except grpc.aio.AioRpcError as error:
        raise InferenceServerException(error.details(), str(error.code())) from error
    finally:
        replies.cancel()


async def events(first: Piece, pieces: AsyncIterator[Piece], asked: Asked) -> AsyncIterator[str]:
    """Server-sent events of an answer."""
    head = envelope("chat.completion.chunk", asked)

    def event(part: Answer, reason: str | None, **more: Any) -> str:
        delta = {**more, **({"content": part.content} if part.content else {}), **grown(part)}
        return f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}]})}\n\n"

    part, reason, usage = first
    yield event(part, reason, role="assistant")
    try:
        async for piece in pieces:
            part, reason, usage = piece
            if part != Answer("") or reason:
                yield event(part, reason)
    except InferenceServerException as error:
        yield f"data: {json.dumps({'error': {'message': str(error.message())}})}\n\n"
        return
    if usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def grown(part: Answer) -> dict[str, Any]:
    """What an answer has besides content."""
    calls = [
        {
            "index": i,
            "id": call.id or f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for i, call in enumerate(part.tool_calls)
    ]
    reasoning = {"reasoning_content": part.reasoning} if part.reasoning else {}
    return reasoning | ({"tool_calls": calls} if calls else {})


def envelope(kind: str, asked: Asked, **more: Any) -> dict[str, Any]:
    """What every response of the API has."""
    made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}
    return made | more


def refused(message: str, status: int) -> Response:
    """An error as the API has it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status)


def _usage(took: Mapping[str, Any]) -> dict[str, int]:
    read, written = took["prompt_tokens"], took["new_tokens"]
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _said(result: Any, name: str) -> str:
    return result.as_numpy(name).flat[0].decode()


def _text(name: str, values: list[str]) -> Any:
    return _input(name, "BYTES", np.array([value.encode() for value in values], object))


def _input(name: str, kind: str, values: np.ndarray) -> Any:
    made = triton.InferInput(name, list(values.shape), kind)
    made.set_data_from_numpy(values)
    return made


@contextlib.asynccontextmanager
async def connected(app: Starlette) -> AsyncIterator[None]:
    """A connection to Triton for as long as the application runs."""
    app.state.model = os.environ["MODEL"]
    async with triton.InferenceServerClient(os.environ.get("TRITON", "localhost:8001")) as client:
        app.state.client = client
        yield


ROUTES = [Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)]
app = Starlette(routes=ROUTES, lifespan=connected)
