"""The command line: what it offers, what it prints where, and how it exits."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import click
import pytest
from command_line import call
from traced import export_bundle

from v4export import cli, presets, show
from v4export.checkpoint.synth import synth
from v4export.config import Reasoning
from v4export.errors import BadInput, NotEnough, NotSupported, NumbersDiffer
from v4export.package.bundle import Bundle
from v4export.runtime.generate import Generation, Timings
from v4export.runtime.pausing import Pause

SHARDING = [
    "--tp",
    "--tp-size",
    "--tensor-parallel-size",
    "--ep",
    "--ep-size",
    "--pp",
    "--pp-size",
    "--pipeline-parallel-size",
]
EXPORT = [
    "--out",
    "--precision",
    "--dtype",
    "--keep",
    "--calibrate",
    "--state",
    "--kv-cache-dtype",
    "--max-seq-len",
    "--layers",
    "--copy-weights",
    "--cpu-weights",
    "--no-cpu-weights",
    "--engram-inside",
    "--think-steps",
    "--draft",
    *SHARDING,
    "--expert-load",
    "--no-scan",
    "--force",
    "--resume",
    "--fp16",
    "--bf16",
    "--fp8",
    "--int8",
    "--best",
    "--json",
    "--quiet",
    "-o",
    "-q",
]
ENGINE = [
    "--target",
    "--backend",
    "--max-batch-size",
    "--max-chunk",
    "--plugins",
    "--workspace-gib",
    "--weight-streaming",
    "--refit",
    "--minShapes",
    "--optShapes",
    "--maxShapes",
    "-v",
    "--verbose",
]
#: What scripts rely on: verb -> arguments, options.
EXECUTOR = ["--executor", "--cuda-graphs", "--no-cuda-graphs", "--no-check", "--kernels", "--no-kernels"]
SURFACE = {
    "build": (["model"], [*EXPORT, *ENGINE, "--no-engine", "--no-verify", "--device", "--from"]),
    "export": (["model"], EXPORT),
    "engine": (["bundle"], [*ENGINE, "--refit-from", "--json", "--quiet", "-q"]),
    "verify": (["bundle"], ["--checkpoint", "--decode", "--device", "--json", "--kernels", "--quiet", "-q"]),
    "bisect": (
        ["subject"],
        [
            "--against",
            "--engine",
            "--checkpoint",
            "--prompt",
            "--inputs",
            "--seed",
            "--out",
            "-o",
            "--replay",
            "--json",
            "--quiet",
            "-q",
        ],
    ),
    "eval": (
        ["model"],
        [
            "--text",
            "--precision",
            "--keep",
            "--state",
            "--context",
            "--tokens",
            "--layers",
            "--calibrate",
            "--checkpoint",
            "--out",
            "-o",
            "--device",
            "--json",
            "--quiet",
            "-q",
        ],
    ),
    "run": (
        ["bundle"],
        [
            "--prompt",
            "--prompt-file",
            "--chat",
            "--messages",
            "--thinking",
            "--max-new-tokens",
            "-n",
            "--temperature",
            "--top-p",
            "--top-k",
            "--seed",
            "--stop",
            "--ignore-eos",
            "--skip-decoder",
            "--prompt-cache",
            "--prompt-cache-all",
            "--prompt-cache-ro",
            "--think",
            "--think-threshold",
            "--draft-max",
            "--verbose",
            "-v",
            "--threads",
            "--accuracy-level",
            "--device",
            *EXECUTOR,
            "--json",
        ],
    ),
    "inspect": (["model"], ["--json"]),
    "plan": (
        ["model"],
        [
            *(
                option
                for option in EXPORT[: EXPORT.index("--no-scan")]
                if option not in ("--calibrate", "--expert-load")
            ),
            *("--target", "--device-memory-gib", "--max-batch-size"),
            *("--no-engine", "--no-verify", "-o", "--json"),
        ],
    ),
    "bench": (
        ["model"],
        [
            *(
                "--prompt-tokens",
                "-p",
                "--new-tokens",
                "-n",
                "--repetitions",
                "-r",
                "--draft-max",
                "--threads",
                "-t",
                "--device",
                *EXECUTOR,
            ),
            *("--simulate", *SHARDING, "--batch", "--context", "--micro-batches", "--precision"),
            *("--link-gbs", "--link-us", "--efficiency", "--costs", "--json", "--quiet", "-q"),
        ],
    ),
    "package": (
        ["bundle"],
        [
            *("--triton", "--cpp", "--name", "--device", *EXECUTOR, "--slots", "--queue", "--chunk"),
            *("--draft-max", "-n", "--max-new-tokens", "--threads", "--json"),
        ],
    ),
    "synth": (["config"], ["--out", "-o", "--seed", "--dtype", "--draft", "--sparse", "--fused", "--quiet", "-q"]),
    "presets": ([], ["--json"]),
    "doctor": ([], ["--ops", "--recipes", "--json"]),
    "calibrate": (
        ["model"],
        [
            *("--text", "--method", "--percentile", "--tokens", "--context"),
            *("--out", "-o", "--force", "--json", "--quiet", "-q"),
        ],
    ),
}
LAST = r"PASSED \| (\d+) layers, 4 prompts, \d+ near-ties \| \d+ s \| v4export {} .*"


@pytest.fixture(scope="module")
def bundle(trained_checkpoint, tmp_path_factory) -> Path:
    return export_bundle(trained_checkpoint, tmp_path_factory.mktemp("cli") / "bundle", "fp32").folder


@pytest.fixture(scope="module")
def thinking_checkpoint(tmp_path_factory) -> Path:
    """A random one, with a reasoning layer."""
    config = replace(presets.load("tiny-v3"), reasoning=Reasoning(1, 3))
    return synth(config, tmp_path_factory.mktemp("thinking") / "hub")


@pytest.fixture(scope="module")
def thinking(thinking_checkpoint) -> Path:
    """Its first layer alone, which is soon traced."""
    return export_bundle(thinking_checkpoint, thinking_checkpoint.with_name("out"), "fp32", layers=range(1)).folder


def test_surface_is_frozen():
    found = {}
    for name, command in cli.cli.commands.items():
        options = [o for p in command.params if isinstance(p, click.Option) for o in p.opts + p.secondary_opts]
        found[name] = ([p.name for p in command.params if isinstance(p, click.Argument)], sorted(options))
    assert found == {name: (arguments, sorted(options)) for name, (arguments, options) in SURFACE.items()}


@pytest.mark.parametrize("verb", SURFACE)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_docstring(capfd, verb, flag):
    shown = call(capfd, verb, flag)
    assert shown.code == 0 and shown.err == ""
    assert " ".join(cli.cli.commands[verb].callback.__doc__.split()) in " ".join(shown.out.split())


def test_help_lists_every_verb(capfd):
    shown = call(capfd, "--help").out
    assert all(re.search(rf"^  {verb} ", shown, re.MULTILINE) for verb in SURFACE)
    assert re.fullmatch(r"v4export, version \d+\.\d+.*\n", call(capfd, "--version").out)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NumbersDiffer("what", "values", "fix"), 1), (BadInput("what", "values", "fix"), 2),
        (NotEnough("what", "values", "fix"), 3), (NotSupported("what", "values", "fix"), 4), (KeyboardInterrupt(), 130),
    ],
)  # fmt: skip
def test_exit_codes(capfd, monkeypatch, error, code):
    def fail(_):
        raise error

    monkeypatch.setattr("v4export.api.inspect", fail)
    found = call(capfd, "inspect", "x")
    assert (found.code, found.out) == (code, "")
    # click ends the line that ^C was typed on
    assert found.err.lstrip("\n") == (
        "error: what\n  values\n  fix\n" if code < 100 else "error: interrupted; nothing was left behind\n"
    )


def test_running_out_of_memory(capfd, monkeypatch):
    def fail(_):
        raise MemoryError

    monkeypatch.setattr("v4export.api.inspect", fail)
    found = call(capfd, "inspect", "x")
    assert found.code == 3 and "memory" in found.err and "--layers" in found.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"], ["inspect"], ["inspect", "--nonsense", "x"], ["build", "x"],
       ["export", "x", "-o", "y", "--max-seq-len", "0"],
        ["run", "x", "-n", "many"], ["verify", "x", "--device", "tpu"],
        ["export", "x", "-o", "y", "--think-steps", "-1"], ["run", "x", "--think-threshold", "much"],
    ],
)  # fmt: skip
def test_usage(capfd, arguments):
    found = call(capfd, *arguments)
    assert found.code == 2 and found.out == "" and "Error" in found.err


@pytest.mark.parametrize("flag", ["fp16", "bf16", "fp8", "int8", "best"])
@pytest.mark.parametrize("verb", ["build", "export"])
def test_trtexec_flags_are_explained(capfd, tmp_path, verb, flag):
    found = call(capfd, verb, "model", "-o", tmp_path / "out", f"--{flag}")
    assert found.code == 2 and f"--{flag} is not a flag here" in found.err and "--precision" in found.err


@pytest.mark.parametrize("layers", ["x", "1:", ":", "0:1:2"])
def test_layers_that_are_no_range(capfd, tmp_path, layers):
    found = call(capfd, "export", "model", "-o", tmp_path / "out", "--layers", layers)
    assert found.code == 2 and f"--layers {layers} is not a range" in found.err


@pytest.mark.parametrize("layers", ["0:0", "0:9", "-1"])
def test_layers_that_the_model_does_not_have(capfd, tmp_path, trained_checkpoint, layers):
    found = call(capfd, "export", trained_checkpoint, "-o", tmp_path / "out", f"--layers={layers}")
    assert found.code == 2 and "it has 4 layers" in found.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["build", "export"])
def test_thoughts_that_the_model_does_not_have(capfd, tmp_path, trained_checkpoint, verb):
    found = call(capfd, verb, trained_checkpoint, "-o", tmp_path / "out", "--think-steps", 2)
    assert found.code == 2 and "has no reasoning layers" in found.err and "leave --think-steps out" in found.err
    assert not list(tmp_path.iterdir())


def test_layers_that_are_not_the_first_ones(capfd, tmp_path, trained_checkpoint):
    found = call(capfd, "export", trained_checkpoint, "-o", tmp_path / "out", "--layers", "1:2")
    assert found.code == 2 and "1:2" in found.err and "--layers 0:N" in found.err and not list(tmp_path.iterdir())


def test_inspect(capfd, trained_checkpoint):
    found = json.loads(call(capfd, "inspect", trained_checkpoint, "--json").out)
    assert found["family"] == "deepseek_v3" and found["layers"] == {"total": 4, "dense": 1, "routed": 3}
    assert found["parameters"]["total"] > found["parameters"]["active"] > 0
    assert sum(found["parameters"]["by_part"].values()) == found["parameters"]["total"]
    assert found["dtypes"]["BF16"] > 100 and found["state_bytes_per_token"] == 4 * 80 * 2
    text = call(capfd, "inspect", trained_checkpoint)
    assert text.code == 0 and text.err == "" and "engines can be built for" in text.out and "rtx4090" in text.out


@pytest.mark.parametrize(
    ("preset", "growing", "layers"),
    [
        ("deepseek-v4-flash", 6880, {"window hash": 2, "csa hash": 1, "hca": 20, "csa": 20}),
        ("deepseek-v4-pro", 9848, {"hca hash": 2, "csa hash": 1, "hca": 29, "csa": 29}),
    ],
)
def test_inspect_says_what_state_costs(capfd, preset, growing, layers):
    found = json.loads(call(capfd, "inspect", preset, "--json").out)
    assert found["state_bytes_per_token"] == growing and found["state_bytes_fixed"] > 10**7
    assert found["layers"] == {"total": sum(layers.values()), **layers}
    text = call(capfd, "inspect", preset).out
    assert f"{growing:,} bytes per token in 16 bits, and" in text and "entries of 4 and 128 tokens" in text


def test_inspect_says_what_a_thought_costs(capfd, thinking_checkpoint, trained_checkpoint):
    parts = json.loads(call(capfd, "inspect", thinking_checkpoint, "--json").out)["parameters"]["by_part"]
    text = call(capfd, "inspect", thinking_checkpoint).out
    each, once = (f"{parts[f'reasoning_{part}']:,}" for part in ("layers", "head"))
    line = f"1 layer, thoughts of 3 steps: {each} parameters for each step, {once} once"
    assert re.search(rf"^reasoning +{re.escape(line)}$", text, re.MULTILINE)
    assert re.search(r"^reasoning +2 layers, thoughts of 8 steps: ", call(capfd, "inspect", "v4-1t").out, re.MULTILINE)
    assert "reasoning" not in call(capfd, "inspect", trained_checkpoint).out


def test_synth_and_preset_as_model(capfd, tmp_path):
    assert call(capfd, "synth", "tiny-v3", "-o", tmp_path / "made", "-q").out.strip() == str(tmp_path / "made")
    assert (tmp_path / "made" / "config.json").is_file()
    again = call(capfd, "synth", "tiny-v3", "-o", tmp_path / "made")
    assert again.code == 2 and "exists" in again.err
    preset = call(capfd, "export", "tiny-v3", "-o", tmp_path / "out")
    assert preset.code == 2 and "v4export synth tiny-v3" in preset.err


def test_export(capfd, tmp_path, trained_checkpoint):
    found = call(capfd, "export", trained_checkpoint, "-o", tmp_path / "out", "--dtype", "fp32", "--max-seq-len", 99)
    assert found.code == 0 and found.last.startswith("NOT VERIFIED | ") and "v4export export" in found.last
    assert [line.split()[0] for line in found.err.splitlines()] == ["audit", "trace", "weights", "graph"]
    assert Bundle.open(tmp_path / "out").max_seq_len == 99
    again = call(
        capfd, "export", trained_checkpoint, "-o", tmp_path / "out", "--precision", "fp32", "-q", "--force", "--json"
    )
    assert again.code == 0 and again.err == ""
    result = json.loads(again.out)
    assert result["graphs"]["nodes"] > 100 and result["engines"] == {} and result["verification"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_build_without_engine(capfd, tmp_path, trained_checkpoint):
    found = call(capfd, "build", trained_checkpoint, "-o", tmp_path / "out", "--precision", "fp32", "--no-engine")
    assert found.code == 0, found.err
    assert re.fullmatch(LAST.format("build"), found.last)
    lines = found.out.splitlines()
    assert [line[:10] for line in lines[:3]] == ["[✓] weight", "[✓] embedd", "[✓] layer "]
    assert sum("[✓]" in line for line in lines) == 11
    assert [line.split()[0] for line in found.err.splitlines()] == ["audit", "trace", "weights", "graph", "verify"]
    manifest = json.loads((tmp_path / "out" / "v4export.json").read_text())
    assert manifest["verification"].startswith("PASSED") and "report.html" in manifest["files"]
    assert [stage["name"] for stage in manifest["stages"]] == ["audit", "trace", "weights", "graph", "verify"]


def test_build_that_fails_is_kept_apart(capfd, tmp_path, trained_checkpoint, monkeypatch):
    monkeypatch.setattr("v4export.verify.tolerance.CONFIDENCE", 1e-3)
    found = call(capfd, "build", trained_checkpoint, "-o", tmp_path / "out", "--precision", "fp32", "--no-engine", "-q")
    assert found.code == 1 and found.last.startswith("FAILED | 4 layers, 4 prompts")
    assert "part at layer 0 dense" in found.err and str(tmp_path / "out.failed") in found.err
    assert [p.name for p in tmp_path.iterdir()] == ["out.failed"]
    assert "FAILED" in (tmp_path / "out.failed" / "report.html").read_text()


def test_verify(capfd, bundle):
    found = call(capfd, "verify", bundle, "--decode", 2)
    assert found.code == 0 and re.fullmatch(LAST.format("verify"), found.last)
    assert [line.split()[0] for line in found.err.splitlines()] == ["audit", "verify"]
    result = json.loads(call(capfd, "verify", bundle, "--decode", 0, "--json", "-q").out)
    assert [b["name"] for b in result["boundaries"]][:3] == ["weights", "embedding", "layer 0 dense"]
    assert all(b["ok"] for b in result["boundaries"])


def test_verify_that_fails(capfd, bundle, monkeypatch):
    monkeypatch.setattr("v4export.verify.tolerance.CONFIDENCE", 1e-3)
    found = call(capfd, "verify", bundle, "--decode", 0)
    assert found.code == 1 and found.last.startswith("FAILED | ") and "[✗] layer 0 dense" in found.out
    assert found.err.splitlines()[-3].startswith("error: the graph and the PyTorch definition part at layer 0 dense")


def test_verify_against_another_checkpoint(capfd, bundle, trained_checkpoint, tmp_path):
    moved = Path(shutil.copytree(trained_checkpoint, tmp_path / "moved"))
    assert call(capfd, "verify", bundle, "--checkpoint", moved, "--decode", 0).code == 0
    data = (moved / "model.safetensors").read_bytes()
    # The same tensors under a header that differs by a space: another file.
    size = int.from_bytes(data[:8], "little")
    (moved / "model.safetensors").write_bytes(
        (size + 8).to_bytes(8, "little") + data[8 : 8 + size] + b" " * 8 + data[8 + size :]
    )
    other = call(capfd, "verify", bundle, "--checkpoint", moved)
    assert other.code == 2 and "is not the checkpoint" in other.err and "--checkpoint" in other.err
    gone = call(capfd, "verify", bundle, "--checkpoint", tmp_path / "gone")
    assert gone.code == 2 and "gone" in gone.err


def test_run_streams_and_json_agrees(capfd, bundle, tmp_path):
    text = call(capfd, "run", bundle, "--prompt", "def add(a, b):", "-n", 12)
    assert text.code == 0 and re.fullmatch(r"\[\d+ prompt tokens, \d+/s; \d+ new, [\d.]+/s; \w+\]\n", text.err)
    (tmp_path / "prompt").write_text("def add(a, b):")
    found = json.loads(call(capfd, "run", bundle, "--prompt-file", tmp_path / "prompt", "-n", 12, "--json").out)
    assert found["text"] == text.out.removesuffix("\n") and len(found["tokens"]) <= 12
    assert {"text", "tokens", "prompt_tokens", "finish_reason", "timings"} <= set(found)


def test_run_stops_before_a_text(capfd, bundle):
    whole = json.loads(call(capfd, "run", bundle, "--prompt", "The ", "-n", 24, "--ignore-eos", "--json").out)
    word = whole["text"][5:8]
    found = json.loads(
        call(capfd, "run", bundle, "--prompt", "The ", "-n", 24, "--ignore-eos", "--stop", word, "--json").out
    )
    assert found["text"] == whole["text"].split(word)[0] and found["finish_reason"] == "stop"
    assert len(whole["tokens"]) == 24 and whole["finish_reason"] == "length"


def test_run_is_reproducible(capfd, bundle):
    def text(seed):
        arguments = ["--prompt", "The ", "-n", 16, "--temperature", 1.5, "--seed", seed, "--ignore-eos", "--json"]
        return json.loads(call(capfd, "run", bundle, *arguments).out)["tokens"]

    assert text(7) == text(7) and len({tuple(text(seed)) for seed in range(3)}) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a prompt is needed, once"), (["--prompt", "a", "--prompt-file", "b"], "a prompt is needed, once"),
        (["--prompt-file", "/nowhere"], "cannot read /nowhere"), (["--prompt", "a", "--top-p", "2"], "top"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
    ],
)  # fmt: skip
def test_run_refuses(capfd, bundle, arguments, message):
    found = call(capfd, "run", bundle, *arguments)
    assert found.code == 2 and message in found.err and found.out == ""


@pytest.mark.parametrize("think", ["auto", "2", "0x2"])
def test_run_refuses_to_think_without_reasoning_layers(capfd, bundle, think):
    found = call(capfd, "run", bundle, "--prompt", "a", "--think", think)
    assert found.code == 2 and found.out == ""
    assert "no reasoning layers" in found.err and f"--think {think}\n" in found.err and "--think-steps 0" in found.err


@pytest.mark.parametrize("think", [[], ["--think", "off"], ["--think", "0"]])
def test_run_without_reasoning_layers_does_not_pause(capfd, bundle, think):
    found = call(capfd, "run", bundle, "--prompt", "The ", "-n", 3, "--ignore-eos", "-v", *think)
    assert found.code == 0 and found.err.splitlines()[1:] == ["paused before 0 of 3 tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("think", "count"),
    [
        ([], 9), (["--think", "auto"], 9), (["--think", "2"], 9), (["--think", "3"], 9),
        (["--think", "off"], 0), (["--think-threshold", "99"], 0),
    ],
)  # fmt: skip
def test_run_says_where_it_paused(capfd, thinking, think, count):
    arguments = ["run", thinking, "--prompt", "def add(", "-n", 9, "--ignore-eos", *think]
    verbose = call(capfd, *arguments, "--json", "-v")
    found = json.loads(verbose.out)
    assert len(found["pauses"]) == count and [one["token"] for one in found["pauses"]] == [*range(count)]
    assert bool(any(one["text"] for one in found["pauses"])) == (count > 0 and think[-1:] != ["2"])
    shown = call(capfd, *arguments, "-v")
    assert shown.code == 0 and shown.out == found["text"] + "\n"
    speed, said, *table = shown.err.splitlines()
    assert speed.startswith("[") and said == f"paused before {count} of 9 tokens"
    assert verbose.err.splitlines() == [said, *table] and len(table) == (count and count + 1)
    for line, one in zip(table[1:], found["pauses"], strict=True):
        cells = [str(one["token"]), repr(one["before"]), f"{one['weight']:+.3f}", repr(one["text"])]
        assert re.fullmatch(r" +".join(map(re.escape, cells)), line)
    quiet = call(capfd, *arguments)
    assert quiet.out == shown.out and len(quiet.err.splitlines()) == 1


@pytest.mark.slow
def test_thoughts_change_what_is_said(capfd, thinking):
    arguments = ["run", thinking, "--prompt", "def add(", "-n", 9, "--ignore-eos", "--json", "--think"]
    said = {think: json.loads(call(capfd, *arguments, think).out)["tokens"] for think in ("off", "2", "3", "auto")}
    assert said["3"] == said["auto"] and len({*map(tuple, said.values())}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("think", "message"),
    [
        ("maybe", "a number of steps, auto or off"), ("", "a number of steps, auto or off"),
        ("-1", "a number of steps, auto or off"), ("1.5", "a number of steps, auto or off"),
        ("4", "exported for 1 to 3"),
    ],
)  # fmt: skip
def test_run_refuses_what_is_no_thought(capfd, thinking, think, message):
    found = call(capfd, "run", thinking, "--prompt", "a", f"--think={think}")
    assert found.code == 2 and message in found.err and think in found.err and found.out == ""


@pytest.mark.slow
def test_export_without_thoughts(capfd, tmp_path, thinking_checkpoint):
    out = tmp_path / "out"
    arguments = ["--precision", "fp32", "--layers", "0:1", "--think-steps", 0]
    found = call(capfd, "export", thinking_checkpoint, "-o", out, *arguments)
    assert found.code == 0, found.err
    assert " reasoning layers, left out with --think-steps 0" in found.out and not list(out.glob("think*"))
    assert "exported with --think-steps 0" in call(capfd, "run", out, "--prompt", "a", "--think", "auto").err
    assert call(capfd, "run", out, "--prompt", "a", "-n", 2).code == 0


def paused(pause: Pause) -> Generation:
    return Generation("", (1, 2), 3, "length", Timings(1, 1, 1, 1, 1), (pause,))


def test_a_pause_is_shown_as_it_is():
    head, titles, row = show.pauses(paused(Pause(1, -0.25, (1, 2), text="a\n\t[b]", before=" x"))).splitlines()
    assert head == "paused before 1 of 2 tokens" and titles.split() == ["token", "text", "weight", "thought"]
    assert re.fullmatch(r"1 +' x' +-0\.250 +'a\\n\\t\[b\]'", row)


def test_what_looks_like_a_picture_is_shown_as_it_is():
    assert "'x[:on:2]'" in show.pauses(paused(Pause(0, 0.5, (1,), text="x[:on:2]")))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_build_with_engine(capfd, tmp_path, trained_checkpoint, precision):
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "out"
    arguments = ["--precision", precision, "--layers", "0:2", "--target", "rtx4090", "--max-seq-len", 256]
    found = call(capfd, "build", trained_checkpoint, "-o", out, *arguments)
    assert found.code == 0, found.err
    assert re.fullmatch(LAST.format("build"), found.last) and found.last.startswith("PASSED | 2 layers")
    assert "built, not run" in found.out and found.err.splitlines()[-1].startswith("engine ")
    bundle = Bundle.open(out)
    assert bundle.config.num_layers == 2 and bundle.manifest["engines"]["model.onnx"]["targets"] == ["sm89"]
    assert (out / "model.engine").stat().st_size == bundle.manifest["files"]["model.engine"]["bytes"]


@pytest.mark.slow
def test_a_target_without_fp4_gets_experts_in_fp8(capfd, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    assert call(capfd, "synth", "tiny-v4-fp4", "-o", tmp_path / "hub").code == 0
    arguments = ["--precision", "mxfp4", "--layers", "0:1", "--target", "sm89", "--max-seq-len", 64]
    found = call(capfd, "build", tmp_path / "hub", "-o", tmp_path / "out", *arguments)
    assert found.code == 0, found.err
    assert "sm89 has no FP4" in found.out and ", fp8)" in found.out and ", mxfp4)" not in found.out
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest["precision"] == manifest["engines"]["model.onnx"]["precision"] == "fp8"
    assert "sm89 has no FP4" in manifest["precision_note"]


@pytest.mark.slow
def test_engine_of_a_bundle(capfd, tmp_path, trained_checkpoint):
    pytest.importorskip("tensorrt_rtx")
    out = export_bundle(trained_checkpoint, tmp_path / "out", "fp32").folder
    found = call(capfd, "engine", out, "--target", "sm86", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["model.onnx"]["targets"] == ["sm86"]
    manifest = Bundle.open(out).manifest
    assert manifest["engines"]["model.onnx"]["sha256"] == manifest["files"]["model.engine"]["sha256"]
    assert manifest["precision"] == "fp32" and manifest["format"] == 1
    assert not list(out.glob("*.partial"))
    assert call(capfd, "verify", out, "--decode", 0).code == 0
