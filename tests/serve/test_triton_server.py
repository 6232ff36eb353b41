"""A model repository in a real Triton Inference Server, asked by its own clients."""

from __future__ import annotations

import importlib.util
import json
import random
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from triton_server import WAIT_S, Server, Stream, assembled, events, missing

from v4export import api
from v4export.package.bundle import Bundle
from v4export.runtime.generate import run_text
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.tokenizer import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

PROMPT = "def read_lines(self, path):"
TEXT = (Path(__file__).resolve().parents[2] / "examples" / "tiny-v3" / "heldout.txt").read_text()
LONGEST = 512
CHAT = "{% for m in messages %}# {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}def{% endif %}"


@pytest.fixture(scope="module")
def bundle(trained_checkpoint, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("served") / "tiny"
    api.export(trained_checkpoint, out, precision="fp32", max_seq_len=LONGEST)
    (out / "chat_template.jinja").write_text(CHAT)
    return Bundle.open(out)


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    return assembled(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def server(binary, bundle, tmp_path_factory):
    made = api.package(bundle.folder, tmp_path_factory.mktemp("repository") / "models", chunk=64, threads=1)
    running = Server(binary, made.folder)
    yield running
    running.kill()


@pytest.fixture
def small(binary, bundle, tmp_path):
    """One sequence at a time, and three that wait."""
    made = api.package(bundle.folder, tmp_path / "models", slots=1, queue=3, threads=1)
    running = Server(binary, made.folder)
    yield running
    running.kill()


@pytest.fixture(scope="module")
def alone(bundle):
    """What ``api.run`` gives, without a session for each."""
    made = (bundle.folder, bundle.config, bundle.precision)
    executor, tokenizer = OnnxExecutor(*made, max_seq_len=LONGEST, threads=1), load_tokenizer(bundle.folder)
    stop_ids = frozenset(bundle.config.eos_token_ids)

    def answer(prompt: str, new: int) -> tuple[str, list[int], str]:
        found = run_text(executor, tokenizer, prompt, max_new_tokens=new, stop_ids=stop_ids)
        return found.text, list(found.tokens), found.finish_reason

    return answer


def settled(server: Server, **wanted: float) -> dict[str, float]:
    """Metrics, once they say so; they are told a few times a second."""
    deadline = time.monotonic() + 10
    while True:
        found = server.metrics()
        if all(found[name] == value for name, value in wanted.items()) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def quiet(server: Server) -> dict[str, float]:
    """Metrics, once all that was done before is in them."""
    found, before = server.metrics(), None
    while found != before:
        time.sleep(0.6)
        found, before = server.metrics(), found
    return found


def test_both_protocols_stream_what_run_gives(server, bundle):
    found = api.run(bundle.folder, prompt=PROMPT, max_new_tokens=48, threads=1)
    wanted = (found.text, list(found.tokens), found.finish_reason)
    assert server.streamed(text_input=PROMPT, max_tokens=48) == wanted
    with Stream(server) as stream:
        stream.ask(text_input=PROMPT, max_tokens=48)
        assert stream.answer() == wanted


def test_options_reach_the_sampler_and_the_text(server, bundle):
    how = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 11}
    found = api.run(bundle.folder, prompt=PROMPT, max_new_tokens=24, threads=1, ignore_eos=True, stop=("self",), **how)
    body = {"text_input": PROMPT, "max_tokens": 24, "ignore_eos": True, "stop": ["self"], **how}
    assert server.streamed(**body) == (found.text, list(found.tokens), found.finish_reason)
    with server.post("generate", **body, stream=False) as response:
        whole = json.load(response)
    assert whole["text_output"] == found.text and whole["finish_reason"] == found.finish_reason
    usage = json.loads(whole["usage"])
    assert usage["new_tokens"] == len(found.tokens) and usage["prompt_tokens"] == found.prompt_tokens
    assert 0 < usage["first_token_s"] < WAIT_S and usage["thoughts"] == 0


def test_messages_go_through_the_chat_template(server, alone, bundle):
    messages = [{"role": "system", "content": "files"}, {"role": "user", "content": "read lines"}]
    text, tokens, _ = server.streamed(messages=json.dumps(messages), max_tokens=16)
    tokenizer = load_tokenizer(bundle.folder)
    assert not tokenizer.prefix  # so that a text is encoded as a rendered chat is
    assert (text, tokens) == alone("# files\n# read lines\ndef", 16)[:2]


def test_sixty_four_at_once_get_what_each_would_get_alone(server, alone):
    chosen = random.Random(1)
    jobs = [
        (TEXT[start : start + chosen.choice([5, 60, 300, 900])], chosen.choice([1, 8, 40, 80]))
        for start in chosen.sample(range(len(TEXT) - 1000), 64)
    ]

    def ask(job: int) -> tuple[str, list[int], str]:
        prompt, new = jobs[job]
        if job % 2:
            return server.streamed(text_input=prompt, max_tokens=new)
        with Stream(server) as stream:
            stream.ask(text_input=prompt, max_tokens=new)
            return stream.answer()

    before = quiet(server)
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(ask, range(64)))
    assert found == [alone(*job) for job in jobs]
    after = settled(server, finished=before["finished"] + 64, running=0)
    assert after["new_tokens"] - before["new_tokens"] == sum(len(tokens) for _, tokens, _ in found)
    assert after["finished"] - before["finished"] == after["first_tokens"] - before["first_tokens"] == 64
    assert after["first_token_seconds"] > after["queue_seconds"] > before["queue_seconds"]
    assert after["running"] == after["waiting"] == 0


def test_a_cancelled_request_ends_soon(server):
    before = quiet(server)
    stream = Stream(server)
    stream.ask(text_input=PROMPT, max_tokens=480, ignore_eos=True)
    for _ in range(3):
        stream.next()
    stream.cancel()
    after = settled(server, cancelled=before["cancelled"] + 1, running=0)
    assert after["cancelled"] == before["cancelled"] + 1 and after["running"] == 0
    assert 3 <= after["new_tokens"] - before["new_tokens"] < 240


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ({"text_input": ""}, "prompt is empty"),
        ({"text_input": PROMPT, "max_tokens": 5000}, "at most 512 together"),
        ({"text_input": PROMPT, "temperature": -1.0}, "temperature is out of range"),
        ({"text_input": PROMPT, "think": "2"}, "no reasoning layers"),
        ({"messages": "{"}, "not JSON"),
        ({"max_tokens": 3}, "a prompt is needed, once"),
    ],
)
def test_malformed_requests(server, alone, body, match):
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        server.post(**body)
    assert match in refused.value.read().decode()
    with Stream(server) as stream:
        stream.ask(**body)
        with pytest.raises(Exception, match=f"INVALID_ARGUMENT: (.|\n)*{match}"):
            stream.next()
    assert server.streamed(text_input=PROMPT, max_tokens=4) == alone(PROMPT, 4)


def test_a_full_queue_is_unavailable(small, alone):
    def ask(_: int) -> str:
        with Stream(small) as stream:
            stream.ask(text_input=PROMPT, max_tokens=200, ignore_eos=True)
            try:
                return "" if stream.answer() == wanted else "differs"
            except Exception as error:
                return error.message()

    # Without its end token, as it is asked for here.
    with small.post(text_input=PROMPT, max_tokens=200, ignore_eos=True) as response:
        answered = list(events(response))
    texts, tokens = "".join(e["text_output"] for e in answered), [e["token_ids"] for e in answered]
    wanted = (texts, tokens, "length")
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(12)))
    refused = [one for one in found if one]
    assert found.count("") >= 3 and refused
    assert all("UNAVAILABLE" in one and "the queue is full" in one for one in refused)
    assert settled(small, refused=len(refused))["refused"] == len(refused)


def test_a_server_that_is_killed_loses_only_what_was_on_its_way(small, alone):
    before = [small.streamed(text_input=TEXT[i : i + 50], max_tokens=8) for i in range(3)]
    begun, errors = threading.Semaphore(0), []

    def long() -> None:
        try:
            with small.post(text_input=PROMPT, max_tokens=480, ignore_eos=True) as response:
                for event in events(response):
                    begun.release()
                    if event["finish_reason"]:
                        return
                raise ConnectionError("the stream has ended before the answer")
        except Exception as error:
            errors.append(error)

    def streamed() -> None:
        with Stream(small) as stream:
            try:  # one that comes too late to be asked is told so at once
                stream.ask(text_input=PROMPT, max_tokens=480, ignore_eos=True)
                stream.answer()
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=target) for target in (long, streamed, streamed)]
    for thread in threads:
        thread.start()
    assert begun.acquire(timeout=WAIT_S)
    small.kill()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(errors) == 3 and all(str(error) for error in errors), errors
    with pytest.raises(OSError, match="refused"):
        small.post(text_input=PROMPT)
    small.start()
    assert [small.streamed(text_input=TEXT[i : i + 50], max_tokens=8) for i in range(3)] == before
    assert before == [alone(TEXT[i : i + 50], 8) for i in range(3)]


def test_a_server_that_is_stopped_tells_its_clients(small):
    with small.post(text_input=PROMPT, max_tokens=480, ignore_eos=True) as response:
        heard = events(response)
        next(heard)
        assert small.stop() == 0
        # It ends what was begun, which is soon.
        assert [event["finish_reason"] for event in heard][-1] == "length"


def test_the_example_of_openais_api(server, bundle, alone, monkeypatch):
    testclient = pytest.importorskip("starlette.testclient")
    monkeypatch.setenv("TRITON", f"127.0.0.1:{server.grpc}")
    monkeypatch.setenv("MODEL", server.model)
    file = Path(__file__).parents[2] / "examples" / "openai_server" / "app.py"
    spec = importlib.util.spec_from_file_location("openai_example", file)
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    messages = [{"role": "user", "content": "read lines"}]
    text, tokens, reason = alone("# read lines\ndef", 16)
    body = {"model": "tiny", "messages": messages, "max_tokens": 16}
    with testclient.TestClient(example.app) as http:
        found = http.post("/v1/chat/completions", json=body).json()
        streamed = http.post("/v1/chat/completions", json=body | {"stream": True}).text
        wrong = http.post("/v1/chat/completions", json=body | {"messages": []})
    (choice,) = found["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)
    assert found["usage"]["completion_tokens"] == len(tokens)
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in events if one["choices"]) == text
    assert wrong.status_code == 400 and "messages" in wrong.json()["error"]["message"]
