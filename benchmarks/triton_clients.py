"""Throughput and latency of a real Triton Inference Server, against how many clients ask at the same time.

Two servers of one bundle: one that batches, and one of a single slot, which answers one request at a time. Clients are
threads of this process and read events over HTTP; each asks for its next answer as soon as it has one. Needs the extra
``triton``, and answers are checked against those that the prompts get alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnxruntime
from page import PAGE, replace_between, row

from v4export import api
from v4export.evaluate.plot import Axis, figure, lines

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "serve"))
from triton_server import Server, assembled, events, missing  # noqa: E402

BEGIN, END = "<!-- measured: triton -->", "<!-- end: triton -->"
PLOT = PAGE.with_name("triton.svg")
EXAMPLE = ROOT / "examples" / "tiny-v3"
CLIENTS = (1, 2, 4, 8, 16, 32)
#: Characters of a prompt, and new tokens.
PROMPTS, NEW = (100, 400, 1200), 64
PERCENTILES = (50, 90, 99)
BATCHED, SINGLE = "batched", "one at a time"


@dataclass(frozen=True)
class Load:
    """What so many clients found: tokens a second, and milliseconds to first tokens and between tokens."""

    clients: int
    rate: float
    first_ms: np.ndarray
    between_ms: np.ndarray


def asked(count: int) -> list[str]:
    """Beginnings of held-out text, the same for every server."""
    text, chosen = (EXAMPLE / "heldout.txt").read_text(), random.Random(0)
    starts = [chosen.randrange(len(text) - max(PROMPTS)) for _ in range(count)]
    return [text[start : start + chosen.choice(PROMPTS)] for start in starts]


def answer(server: Server, prompt: str) -> tuple[list[int], list[float]]:
    """Tokens, and when each came, in seconds from the request on."""
    start, tokens, times = time.perf_counter(), [], []
    with server.post(text_input=prompt, max_tokens=NEW, ignore_eos=True) as response:
        for event in events(response):
            tokens.append(event["token_ids"])
            times.append(time.perf_counter() - start)
    return tokens, times


def load(server: Server, clients: int, prompts: list[str], wanted: dict[str, list[int]]) -> Load:
    left, lock = list(prompts), threading.Lock()
    first: list[float] = []
    between: list[float] = []

    def client(_: int) -> int:
        count = 0
        while True:
            with lock:
                if not left:
                    return count
                prompt = left.pop()
            tokens, times = answer(server, prompt)
            if wanted.setdefault(prompt, tokens) != tokens:
                raise click.ClickException(f"an answer differs from the one that its prompt gets alone: {prompt!r}")
            first.append(times[0])
            between.extend(np.diff(times))
            count += len(tokens)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        total = sum(pool.map(client, range(clients)))
    seconds = time.perf_counter() - start
    return Load(clients, total / seconds, 1e3 * np.array(first), 1e3 * np.array(between))


def percentiles(values: np.ndarray) -> str:
    return " / ".join(f"{value:.1f}" for value in np.percentile(values, PERCENTILES))


def table(found: dict[str, list[Load]]) -> str:
    header = ("server", "clients", "tokens/s", "first token, ms: p50 / p90 / p99", "each further token, ms")
    rows = [row(*header), row(*("---" for _ in header))]
    for name, loads in found.items():
        for one in loads:
            cells = (name, str(one.clients), f"{one.rate:.0f}", percentiles(one.first_ms), percentiles(one.between_ms))
            rows.append(row(*cells))
    return "\n".join(rows)


def plot(found: dict[str, list[Load]]) -> str:
    def panel(label: str, value) -> str:
        series = {name: [(one.clients, value(one)) for one in loads] for name, loads in found.items()}
        return lines(Axis("clients", log=True), Axis(label, log=True), series)

    first = panel("first token, median, ms", lambda one: float(np.median(one.first_ms)))
    return figure(
        "Clients of one Triton", panel("tokens/s", lambda one: one.rate), first, note=f"{NEW} new tokens each"
    )


@click.command(help=__doc__)
@click.option("--requests", default=64, show_default=True, help="At each number of clients.")
@click.option("--slots", default=16, show_default=True, help="Of the server that batches.")
@click.option("--threads", default=1, show_default=True, help="Of onnxruntime.")
def main(requests: int, slots: int, threads: int) -> None:
    if reason := missing():
        raise click.ClickException(reason)
    prompts, wanted = asked(requests), {}
    found: dict[str, list[Load]] = {SINGLE: [], BATCHED: []}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as running:
        here = Path(scratch)
        api.export(EXAMPLE, here / "tiny", precision="fp32", max_seq_len=1024)
        binary, servers = assembled(here / "server"), {}
        for name, count in ((SINGLE, 1), (BATCHED, slots)):
            made = api.package(here / "tiny", here / f"models-{count}", slots=count, threads=threads)
            servers[name] = Server(binary, made.folder)
            running.callback(servers[name].kill)
            load(servers[name], 1, prompts[:4], wanted)  # what is slow only once
        # One after the other at each number, so that both find the machine as busy with other work.
        for clients in CLIENTS:
            for name, server in servers.items():
                found[name].append(load(server, clients, prompts, wanted))
                click.echo(table({name: found[name][-1:]}).splitlines()[-1])
    PLOT.write_text(plot(found))
    machine = (
        f"{os.cpu_count()} cores, shared by servers, clients and other work; onnxruntime {onnxruntime.__version__}, "
        f"{threads} thread of it; tiny-v3 in fp32; {requests} requests of {NEW} new tokens at each number of clients; "
        f"{slots} slots"
    )
    replace_between(PAGE, BEGIN, END, [machine, table(found), "![Clients of one Triton](triton.svg)"])


if __name__ == "__main__":
    main()
