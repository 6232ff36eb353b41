"""The smallest case: what is written, and that it shows the same to whoever runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from chains import WIDTH, chain
from command_line import call

from v4export import api
from v4export.errors import BadInput, NumbersDiffer

pytest.importorskip("polygraphy")


@pytest.fixture
def case(tmp_path: Path) -> Path:
    made = tmp_path / "case"
    found = api.bisect(chain(tmp_path / "a.onnx", wrong={3: "Sigmoid"}), against=chain(tmp_path / "b.onnx"), out=made)
    assert found.case == str(made) and found.commands[0] == f"v4export bisect --replay {made}"
    return made


def test_a_case_is_one_node_and_its_values(case):
    model = onnx.load(case / "model.onnx")
    assert [node.op_type for node in model.graph.node] == ["Sigmoid"]
    inputs, expected = np.load(case / "inputs.npz"), np.load(case / "expected.npz")
    assert inputs.files == ["m3"] and expected.files == ["t3"] and inputs["m3"].shape == (1, WIDTH)
    np.testing.assert_allclose(expected["t3"], np.tanh(inputs["m3"]), rtol=1e-5)


def test_a_case_is_replayed(case, capfd):
    found = call(capfd, "bisect", "--replay", case)
    assert found.code == 1 and "node activation3 (Sigmoid) of a.onnx" in found.out and "(limit " in found.out
    assert "does not make what is expected" in found.err
    assert json.loads(call(capfd, "bisect", "--replay", case, "--json").out)["facts"]["node"] == "activation3"


def test_a_case_that_was_mended_passes(case):
    model = onnx.load(case / "model.onnx")
    model.graph.node[0].op_type = "Tanh"
    onnx.save(model, case / "model.onnx")
    api.replay(case).check()


def test_a_case_that_cannot_run_fails(case):
    model = onnx.load(case / "model.onnx")
    model.graph.node[0].op_type = "Nothing"
    onnx.save(model, case / "model.onnx")
    with pytest.raises(NumbersDiffer, match="cannot be computed"):
        api.replay(case).check()


@pytest.mark.slow
def test_polygraphy_shows_it(case):
    words = ["run", "model.onnx", "--onnxrt", "--load-inputs", "inputs.json", "--load-outputs", "expected.json"]
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    found = subprocess.run([sys.executable, "-c", code, *words], cwd=case, capture_output=True, text=True)
    assert found.returncode == 1 and "FAILED" in found.stdout + found.stderr


def test_nothing_is_written_over(case, tmp_path):
    with pytest.raises(BadInput, match="exists"):
        api.bisect(tmp_path / "a.onnx", against=tmp_path / "b.onnx", out=case)


@pytest.mark.parametrize("damage", ["case.json", "inputs.npz"])
def test_what_is_no_case_is_refused(case, damage):
    (case / damage).write_text("{}")
    with pytest.raises(BadInput, match="is not a case"):
        api.replay(case)


def test_the_command_line(capfd, tmp_path):
    wrong, sound = chain(tmp_path / "a.onnx", wrong={3: "Sigmoid"}), chain(tmp_path / "b.onnx")
    found = call(capfd, "bisect", wrong, "--against", sound, "-q")
    assert found.code == 1 and found.out.startswith("PARTED | ")
    assert (
        json.loads(call(capfd, "bisect", wrong, "--against", sound, "--json", "-q").out)["node"]["name"]
        == "activation3"
    )
    assert call(capfd, "bisect", sound, "--against", sound, "-q").code == 0
    assert call(capfd, "bisect").code == call(capfd, "bisect", sound).code == 2
