"""Commands that print what there is: presets, this machine, and what computes each op."""

from __future__ import annotations

import json
import re

from command_line import call

from v4export import presets


def test_presets(capfd):
    found = json.loads(call(capfd, "presets", "--json").out)
    assert sorted(found) == sorted(presets.names())
    assert found["deepseek-v3"]["parameters"]["total"] > 6e11
    text = call(capfd, "presets").out
    assert all(re.search(rf"^{re.escape(name)} ", text, re.MULTILINE) for name in presets.names())


def test_doctor(capfd):
    found = json.loads(call(capfd, "doctor", "--json").out)
    assert {"component", "version", "state", "does", "fix"} <= set(found[0])
    assert any("onnxruntime" in one["component"] for one in found)
    assert "onnxruntime" in call(capfd, "doctor").out


def test_doctor_says_what_computes_each_op(capfd):
    found = json.loads(call(capfd, "doctor", "--ops", "--json").out)
    assert {row[0] for row in found["ops"]} >= {"MoeRoute", "LatentAttention", "TRT_BlockDequantize"}
    assert [row[0] for row in found["ways"]][1:] == ["aot", "library", "none"]
    text = call(capfd, "doctor", "--ops").out
    assert re.search(r"^MoeExperts +body +plugin +reads chosen experts", text, re.MULTILINE)


def test_doctor_says_what_recipes_there_are(capfd):
    found = json.loads(call(capfd, "doctor", "--recipes", "--json").out)
    assert {name: len(rows) for name, rows in found.items()} == {"recipes": 12, "formats": 11, "targets": 11}
    text = call(capfd, "doctor", "--recipes").out
    assert re.search(r"^int4 +bf16 +int8 +int4 ", text, re.MULTILINE)
    assert re.search(r"^nvfp4 +float4_e2m1fn +4.5 +1 x 16 +float8_e4m3fn times", text, re.MULTILINE)
