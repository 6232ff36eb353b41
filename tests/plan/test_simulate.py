"""Simulated steps: a tiny case by hand, rooflines, rings and pipelines; and what more devices must not make worse."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from command_line import call

from v4export import presets
from v4export.checkpoint.imagined import imagined
from v4export.config.sharding import WHOLE, Sharding
from v4export.engine.options import EngineOptions
from v4export.errors import BadInput
from v4export.plan.devices import DEVICES, Device
from v4export.plan.efficiency import EFFICIENCIES, given
from v4export.plan.loads import ATTENTION, EXPERTS, HEAD, MATRICES, Loads, experts_hit, rows_read
from v4export.plan.simulate import Link, simulate, spread
from v4export.plan.work import Work
from v4export.precision import precision

#: Bytes and operations a second of one: seconds are what is read, or computed, in round numbers.
SLOW = Device("slow", "sm89", 1.0, 1e-9, 1e-12, 1e-9)
FREE, EXACT = Link(1e300, 0.0), given(1.0)


def work(name: str = "tiny-v3", sharding: Sharding = WHOLE, batch: int = 1, context: int = 64, **changes) -> Work:
    config = replace(presets.load(name), **changes)
    recipe = precision("bf16", config)
    options = EngineOptions(max_batch=batch)
    return Work(config, recipe, imagined(config), context, options, sharding=sharding, plugins=True)


def step(one: Work, device: Device = SLOW, link: Link = FREE, batch: int = 1, context: int = 64, **options):
    options.setdefault("efficiencies", EXACT)
    return simulate(one, device, batch=batch, context=context, link=link, **options)


def test_experts_that_tokens_hit():
    assert experts_hit(8, 2, 1) == 2 and experts_hit(8, 2, 2) == 8 * (1 - 0.75**2)
    assert experts_hit(4, 4, 3) == 4 and experts_hit(256, 8, 10**6) == pytest.approx(256)


def test_loads_by_hand():
    one = work(batch=3)
    c, loads = one.config, Loads(one)
    layer = c.moe_layers[0]
    found = loads.layer(layer, 3, 64)
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    hit = experts_hit(c.num_experts, c.experts_per_token, 3)
    assert found[EXPERTS].bytes == pytest.approx(hit * expert * 2)
    assert found[EXPERTS].operations == 2 * 3 * c.experts_per_token * expert
    assert found[ATTENTION].bytes == 3 * 64 * c.latent_dim * 2
    assert found[ATTENTION].operations == 3 * 2 * 64 * c.num_heads * (c.latent_dim + c.kv_lora_rank)
    each = one.bytes.each
    others = sum(b for n, b in each.items() if n.startswith(f"model.layers.{layer}.") and ".mlp.experts." not in n)
    assert found[MATRICES].bytes == others
    head = loads.head(3)[HEAD]
    assert head.bytes == each["lm_head.weight"] and head.operations == 2 * 3 * c.vocab_size * c.hidden_size
    spread_ = Loads(work(sharding=Sharding(4, 2), batch=3)).layer(layer, 3, 64)
    assert spread_[EXPERTS].bytes == pytest.approx(found[EXPERTS].bytes / 4)
    assert spread_[ATTENTION].bytes == found[ATTENTION].bytes  # rows are on every device
    assert spread_[ATTENTION].operations == found[ATTENTION].operations / 4


def test_rows_that_attention_reads():
    config = presets.load("deepseek-v4-flash")
    kinds = config.kinds
    read = {k: [(rows, heads) for rows, _, _, heads in rows_read(config, i, 65536, 2)] for k, i in kinds.items()}
    assert read["window hash"] == [(128, None)]
    assert read["hca"] == [(128, None), (512, None)]  # an entry for 128 tokens, all of them
    assert read["csa"] == [(128, None), (16384, config.indexer.num_heads), (512, None)]
    sparse = presets.load("deepseek-v3.2")
    assert [rows for rows, *_ in rows_read(sparse, 5, 65536, 2)] == [65536, 2048]
    shared = presets.load("deepseek-v4.1-flash")
    for layer in range(shared.num_layers):  # layers without entries of their own read those of another
        assert all(rows > 0 and nbytes > 0 for rows, nbytes, *_ in rows_read(shared, layer, 65536, 2))
    narrow = replace(presets.load("deepseek-v3"), state_fp8=True)
    assert next(rows_read(narrow, 0, 10, 2))[1] == 512 + 8 * 4 + 64 * 2


def test_a_step_by_hand():
    one = work()
    found, loads = step(one), Loads(one)
    parts = [loads.layer(i, 1, 64) for i in range(one.config.num_layers)] + [loads.head(1)]
    seconds = sum(max(load.bytes, load.operations) for some in parts for load in some.values())
    assert found.tpot_s == pytest.approx(seconds) and found.tokens_per_s == pytest.approx(1 / seconds)
    assert found.bubble == pytest.approx(0) and found.collectives_s == 0
    half = step(one, efficiencies=given(0.5))
    assert half.tpot_s == pytest.approx(2 * seconds)


def test_measured_costs_take_the_place_of_rooflines():
    one, costs = work(), {"dense": 2.0, "routed": 3.0, "head": 5.0}
    dense = one.config.num_layers - len(one.config.moe_layers)
    found = step(one, costs=costs)
    assert found.tpot_s == 2 * dense + 3 * len(one.config.moe_layers) + 5
    assert {k.bound for k in found.kinds.values()} == {"measured"}
    for bad in ({"dense": 1.0}, {**costs, "csa": 1.0}, {**costs, "head": 0.0}):
        with pytest.raises(BadInput, match="measured costs"):
            step(one, costs=bad)


def test_collectives_of_a_ring():
    assert Link(2.0, 5.0).all_reduce(4e9, 1) == 0
    assert Link(2.0, 5.0).all_reduce(4e9, 4) == 2 * 3 / 4 * 4e9 / 2e9 + 5e-6
    costs = {"dense": 1.0, "routed": 1.0, "head": 1.0}
    one = work(sharding=Sharding(2, 2), batch=3)
    found = step(one, link=Link(1e-9, 7e6), batch=3, costs=costs)
    layers, hidden = one.config.num_layers, 3 * one.config.hidden_size * 2
    assert found.collectives_s == layers * 2 * (2 * 1 / 2 * hidden + 7)
    assert found.tpot_s == pytest.approx(layers + 1 + found.collectives_s)


def test_a_pipeline_by_hand():
    costs = {"dense": 2.0, "routed": 2.0, "head": 1e-9}
    one = work(sharding=Sharding(1, 1, 3), batch=4)
    assert one.config.num_layers == 3
    alone = step(one, batch=4, micro_batches=1, costs=costs)
    assert alone.tpot_s == pytest.approx(6) and alone.bubble == pytest.approx(2 / 3)  # one stage of three is at work
    full = step(one, batch=4, micro_batches=4, costs=costs)
    assert full.tpot_s == pytest.approx(8) and full.bubble == pytest.approx(0)
    assert full.tokens_per_s == pytest.approx(4 / 8)
    sent = step(one, batch=1, link=Link(1e-9, 3e6), costs=costs)
    assert sent.collectives_s == 2 * (one.config.hidden_size * 2 + 3)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "tiny-v4", "tiny-v4.1"])
def test_more_devices_are_no_worse(name):
    device, link = DEVICES["h200"], Link(450, 0.0)
    memory, speed = [], []
    for count in (1, 2) if name.startswith("tiny-v4") else (1, 2, 4):
        found = step(work(name, Sharding(count, count), 8, 128), device, link, 8, 128, efficiencies=EFFICIENCIES)
        memory.append(found.memory)
        speed.append(found.tokens_per_s)
    assert memory == sorted(memory, reverse=True)
    assert speed == sorted(speed) or name.startswith("tiny")  # where layers are tiny, rings are not
    piped = [step(work(name, Sharding(1, 1, p), 8, 128), device, link, 8, 128).memory for p in (1, 2, 3)]
    assert piped == sorted(piped, reverse=True)
    grown = [step(work(name, batch=b), device, link, b).tpot_s for b in (1, 4, 16)]
    assert grown == sorted(grown)
    longer = [step(work(name, context=t), device, link, 1, t).tpot_s for t in (64, 1024, 8192)]
    assert longer == sorted(longer)


def test_how_devices_are_used():
    config = presets.load("deepseek-v3")
    assert spread(config, 16, Sharding()) == Sharding(8, 8, 2) and spread(config, 1, Sharding()) == Sharding()
    assert spread(config, 6, Sharding()) == Sharding(2, 2, 3)  # three do not divide 128 heads
    assert spread(config, 32, Sharding(1, 16, 2)) == Sharding(1, 16, 2)
    with pytest.raises(BadInput, match="do not add up"):
        spread(config, 16, Sharding(4, 4, 2))


def test_command(capfd, tmp_path):
    found = call(capfd, "bench", "deepseek-v2-lite", "--simulate", 4, "--device", "rtx4090", "--batch", 8)
    assert found.code == 0 and found.err == ""
    assert "4 x rtx4090 (tp 4, ep 4, pp 1): ~" in found.out and "tokens/s" in found.out
    assert "our kernels on an H100" in found.out and "ring all-reduces" in found.out and "choose" in found.out
    (tmp_path / "costs.json").write_text('{"dense": 0.001, "routed": 0.002, "head": 0.003}')
    how = ["--costs", tmp_path / "costs.json", "--pp", 2, "--simulate", 2, "--json"]
    made = json.loads(call(capfd, "bench", "deepseek-v2-lite", *how).out)
    assert made["sharding"] == {"tp": 1, "ep": 1, "pp": 2} and made["kinds"]["routed"]["seconds"] == 0.002
    assert {"tokens_per_s", "tpot_s", "memory", "has", "stages_s", "bubble", "assumptions"} <= {*made}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["deepseek-v3", "--simulate", 2, "--device", "rtx4090"], 3, "of device memory missing"),
        (["deepseek-v3", "--simulate", 2, "--device", "rtx4099"], 2, "Did you mean rtx4090"),
        (["deepseek-v3", "--simulate", 3, "--tp", 2], 2, "do not add up"),
        (["tiny-v3", "--simulate", 1, "--costs", "nowhere"], 2, "cannot read nowhere"),
        (["tiny-v3", "--simulate", 1, "--efficiency", 0], 2, "efficiency"),
        (["tiny-v3"], 2, "is not a bundle"),
    ],
)
def test_command_refuses(capfd, arguments, code, message):
    found = call(capfd, "bench", *arguments)
    assert found.code == code and message in found.err
