"""What Triton's Python backend runs, with a stand-in for the module that only a server has."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from v4export.errors import BadInput, NotEnough, NotSupported
from v4export.serve import repository
from v4export.serve.answer import Cancelled, Closed, Failed, Piece, QueueFull, Usage
from v4export.serve.model import Sender, check_arrays, read_values, triton_error

FILE = str(Path(repository.__file__).with_name("loaded.py"))


class Tensor:
    def __init__(self, name, array):
        self.name, self._array = name, array

    def as_numpy(self):
        return self._array

    @staticmethod
    def from_dlpack(name, array):
        return Tensor(name, np.array(array))


class TritonError:
    INVALID_ARG, UNSUPPORTED, UNAVAILABLE, CANCELLED, INTERNAL = range(5)

    def __init__(self, text, code):
        self.text, self.code = text, code


class Responses:
    """A sender that keeps what is sent."""

    def __init__(self):
        self.sent, self.cancelled = [], False

    def send(self, response, flags=0):
        self.sent.append((response, flags))

    def is_cancelled(self):
        return self.cancelled


def response(outputs=(), error=None):
    return SimpleNamespace(outputs={one.name: one.as_numpy().tolist() for one in outputs}, error=error)


UTILITIES = SimpleNamespace(
    Tensor=Tensor, TritonError=TritonError, InferenceResponse=response, TRITONSERVER_RESPONSE_COMPLETE_FINAL=1
)


@pytest.fixture
def sender():
    responses = Responses()
    return Sender(UTILITIES, SimpleNamespace(get_response_sender=lambda: responses)), responses


PIECES = [Piece(5, "a"), Piece(6, ""), Piece(7, "bé", "stop", Usage(3, 3, 1, 0.1, 0.2, 0.3))]


def test_pieces_are_sent_as_they_come(sender):
    send, responses = sender
    for piece in PIECES:
        send(piece)
    assert [flags for _, flags in responses.sent] == [0, 0, 1]
    outputs = [one.outputs for one, _ in responses.sent]
    assert [one["token_ids"] for one in outputs] == [[5], [6], [7]]
    assert [one["text_output"] for one in outputs] == [[b"a"], [b""], ["bé".encode()]]
    assert [one["finish_reason"] for one in outputs] == [[b""], [b""], [b"stop"]]
    assert outputs[0]["usage"] == [b""] and json.loads(outputs[2]["usage"][0])["thoughts"] == 1


def test_or_all_at_once(sender):
    send, responses = sender
    send.whole = True
    for piece in PIECES:
        send(piece)
    ((only, flags),) = responses.sent
    assert flags == 1 and only.outputs["token_ids"] == [5, 6, 7] and only.outputs["text_output"] == ["abé".encode()]


def test_a_failure_is_the_last_response(sender):
    send, responses = sender
    send(Failed(QueueFull("full", "3 wait")))
    ((only, flags),) = responses.sent
    assert flags == 1 and (only.error.text, only.error.code) == ("UNAVAILABLE: full\n  3 wait", TritonError.UNAVAILABLE)
    responses.cancelled = True
    assert send.is_cancelled()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (BadInput("bad"), TritonError.INVALID_ARG, "INVALID_ARGUMENT: bad"),
        (NotSupported("no"), TritonError.UNSUPPORTED, "UNIMPLEMENTED: no"),
        (Closed("closed"), TritonError.UNAVAILABLE, "UNAVAILABLE: closed"),
        (Cancelled("gone"), TritonError.CANCELLED, "CANCELLED: gone"),
        (NotEnough("memory"), TritonError.INTERNAL, "INTERNAL: memory"),
        (ZeroDivisionError("x"), TritonError.INTERNAL, "INTERNAL: ZeroDivisionError: x"),
    ],
)
def test_errors(error, code, text):
    found = triton_error(UTILITIES, error)
    assert (found.code, found.text) == (code, text)


def test_values_are_what_a_client_wrote():
    assert read_values("top_p", Tensor("top_p", np.array([[0.9]], np.float32))) == [0.9]
    assert read_values("top_k", Tensor("top_k", np.array([3], np.int32))) == [3]
    assert read_values("ignore_eos", Tensor("ignore_eos", np.array([True]))) == [True]
    assert read_values("stop", Tensor("stop", np.array(["é".encode(), b""], np.object_))) == ["é", ""]
    with pytest.raises(BadInput, match="stop is not UTF-8"):
        read_values("stop", Tensor("stop", np.array([b"\xff"], np.object_)))


@pytest.mark.parametrize(
    ("version", "misread", "refused"), [("1.26.4", True, False), ("2.4.6", True, True), ("2.4.6", False, False)]
)
def test_a_backend_that_misreads_arrays_is_refused(monkeypatch, version, misread, refused):
    class Misread(Tensor):
        @staticmethod
        def from_dlpack(name, array):
            return Tensor(name, np.zeros_like(array) if misread else np.array(array))

    monkeypatch.setattr(np, "__version__", version)
    utilities = SimpleNamespace(Tensor=Misread)
    if refused:
        with pytest.raises(NotSupported, match=r"misreads arrays[^$]*NumPy 2\.4\.6[^$]*numpy<2"):
            check_arrays(utilities)
    else:
        check_arrays(utilities)


def test_a_server_without_v4export_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    monkeypatch.setitem(sys.modules, "v4export.serve.model", None)
    with pytest.raises(ImportError, match=r"pip install 'v4export\[cpu\]'"):
        runpy.run_path(FILE)


def test_what_triton_loads_says_why_a_bundle_cannot_be_served(monkeypatch, tmp_path):
    module = ModuleType("triton_python_backend_utils")
    module.TritonModelException = type("TritonModelException", (Exception,), {})
    module.Tensor = Tensor
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    model = runpy.run_path(FILE)["TritonPythonModel"]()
    args = {"model_config": json.dumps({"parameters": {}}), "model_repository": str(tmp_path), "model_version": "1"}
    with pytest.raises(module.TritonModelException, match="is not a bundle"):
        model.initialize(args)
