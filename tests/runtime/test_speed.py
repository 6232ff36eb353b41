"""What is measured of a bundle, and how it is named."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import call
from hashed_model import VOCAB
from test_drafting import Pretender

from v4export import api, show_scale
from v4export.errors import BadInput
from v4export.runtime import bandwidth
from v4export.runtime.drafting import Drafting
from v4export.runtime.speed import CHUNK, Drafted, Floor, Speed, measure


class Steps:
    """An executor that only takes notes."""

    max_seq_len, tail, trunk = 2000, None, None

    def __init__(self):
        self.seen: list[list[tuple[int, int]]] = []

    def new_state(self, batch=1):
        self.seen.append([])
        return None

    def step(self, tokens_BS, state, *, logits_at_BQ, **_):
        self.seen[-1].append((tokens_BS.shape[1], logits_at_BQ.shape[1]))
        return np.zeros((*logits_at_BQ.shape, 7), np.float32)


def test_rates_by_hand():
    speed = Speed(100, 3, (2.0, 4.0), (0.5, 0.5, 1.0, 1.0))
    (pp, pp_off), (tg, tg_off) = speed.rates["pp100"], speed.rates["tg3"]
    assert (pp, tg) == (37.5, 1.5) and pp_off == pytest.approx(17.677669) and tg_off == pytest.approx(0.7071067)
    assert speed.latencies == {
        "TTFT": {"p50": 3.0, "p90": pytest.approx(3.8), "p99": pytest.approx(3.98)},
        "TPOT": {"p50": 0.75, "p90": 1.0, "p99": 1.0},
    }
    assert [*Speed(5, 1, (1.0,), ()).rates] == ["pp5"] and speed.of_floor is None


def test_the_floor_by_hand():
    floor = Floor(weights=6e9, state=1.5e9, bandwidth=3e10)
    assert floor.seconds == 0.25
    assert replace(Speed(100, 3, (1.0,), (0.5, 0.5)), floor=floor).of_floor == 0.5
    assert Speed(100, 1, (1.0,), (), floor=floor).of_floor is None


def test_bandwidth_is_of_so_many_threads(monkeypatch):
    """What is set for the measurement is set back."""
    monkeypatch.setattr(bandwidth, "_BYTES", 1 << 22)
    asked, before = [], torch.get_num_threads()
    own = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (asked.append(n), own(n)))
    assert 1e7 < bandwidth.read_bandwidth(2) < 1e13
    assert asked == [2, before] and torch.get_num_threads() == before


def test_prompts_are_fed_in_chunks_and_all_that_counts_is_told():
    steps, told = Steps(), []
    speed = measure(steps, 7, prompt_tokens=CHUNK + 3, new_tokens=4, repetitions=2, advance=told.append)
    warm, *runs = steps.seen
    assert warm == [(16, 1), (1, 1)] and runs == [[(CHUNK, 0), (3, 1), (1, 1), (1, 1), (1, 1)]] * 2
    assert sum(told) == 2 * (CHUNK + 3 + 4) and len(speed.prefill_s) == 2 and len(speed.steps_s) == 6


@pytest.mark.parametrize(("prompt", "new"), [(1999, 3), (0, 1), (1, 0)])
def test_what_cannot_be_measured_is_refused(prompt, new):
    with pytest.raises(BadInput):
        measure(Steps(), 7, prompt_tokens=prompt, new_tokens=new, repetitions=1)


def test_drafts_by_hand():
    speed = Speed(5, 3, (1.0,), (0.5, 0.5), Drafted(2, 10, 4, (0.5,), (1.0,), True))
    assert speed.rates["tg3+2"] == (4.0, 0.0) and (speed.drafts.acceptance, speed.drafts.speed_up) == (0.4, 2.0)
    assert "2 drafted ahead: 4 of 10 accepted (40%), 2.00x as fast, the same tokens" in show_scale.speed(speed)
    assert json.loads(json.dumps(show_scale.speed_json(speed)))["drafts"]["speed_up"] == 2.0


def test_drafts_are_run_beside_what_comes_without():
    executor, told = Pretender(100), []
    how = {"prompt_tokens": 6, "new_tokens": 9, "repetitions": 2, "advance": told.append}
    speed = measure(executor, VOCAB, drafting=Drafting(3), **how)
    assert speed.drafts.same and len(speed.drafts.decode_s) == len(speed.drafts.plain_s) == 2
    assert speed.drafts.drafted and sum(told) == 2 * 2 * (6 + 9)
    assert measure(executor, VOCAB, **how).drafts is None


def test_command(capfd, tiny_bundle):
    folder = tiny_bundle("fp32").folder
    found = call(capfd, "bench", folder, "-p", 20, "-n", 4, "-r", 2)
    assert found.code == 0 and found.err.startswith("bench ")
    number = r"[\d.,]+"
    for row in (
        *(
            rf"^pp20 +{number} ± {number}$",
            rf"^tg4 +{number} ± ",
            rf"^TTFT( +{number}){{3}}$",
            rf"^TPOT( +{number}){{3}}",
        ),
        rf"^peak memory {number} MiB$",
        rf"^floor: {number} MB of weights and 0.0 MB of cached rows at {number} GB/s take {number} ms a token; "
        r"the median is at \d+% of that speed$",
    ):
        assert re.search(row, found.out, re.MULTILINE), row
    made = json.loads(call(capfd, "bench", folder, "-p", 20, "-n", 4, "-r", 2, "--json", "-q").out)
    assert {*made["rates"]} == {"pp20", "tg4"} and {*made["latencies_s"]} == {"TTFT", "TPOT"}
    assert len(made["prefill_s"]) == 2 and len(made["steps_s"]) == 6 and made["peak_mib"] > 100
    floor, config = made["floor"], tiny_bundle("fp32").config
    assert {*floor} == {"weight_bytes", "state_bytes", "bandwidth_bytes_per_s", "seconds", "share"}
    assert floor["state_bytes"] == 22 * config.latent_dim * 4 * config.num_layers
    assert floor["seconds"] == (floor["weight_bytes"] + floor["state_bytes"]) / floor["bandwidth_bytes_per_s"]
    assert floor["share"] == pytest.approx(floor["seconds"] / made["latencies_s"]["TPOT"]["p50"])
    assert call(capfd, "bench", folder, "-p", 2000).code == 2
    with pytest.raises(BadInput, match="h200"):
        api.bench(folder, device="h200")
