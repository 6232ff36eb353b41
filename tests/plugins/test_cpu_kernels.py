"""Kernels for a CPU: compiled for every target, alike on those that this machine has, and chosen by what it has."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from histories import Past
from kernel_checks import needs_compiler
from kernel_comparison import compare
from on_cpu import run, run_node
from test_attention_kernels import narrow
from test_compress_tokens_kernel import operands as to_compress
from test_hyper_connection_kernel import operands
from test_moe_experts_kernels import FORMS, arguments

from v4export.plugins import cpu
from v4export.plugins.compress_tokens.op import compress_tokens
from v4export.plugins.hyper_connection.op import hyper_connection
from v4export.plugins.hyper_mix.op import hyper_mix
from v4export.plugins.index_select.op import index_select
from v4export.plugins.latent_attention.op import latent_attention
from v4export.plugins.moe_experts.op import moe_experts
from v4export.plugins.sparse_latent_attention.op import sparse_latent_attention

pytestmark = [needs_compiler, pytest.mark.slow]
#: AMX's tiles by loops, so that all but their instructions runs on every machine.
LOOPS = [
    replace(one, name=f"{one.name}, tiles by loops", options=(*one.options, "-DTILES_BY_LOOPS"))
    for one in cpu.TARGETS[1:]
]
HERE = [target for target in (*cpu.TARGETS, *LOOPS) if target.needs <= cpu.features()]


@pytest.mark.parametrize("target", cpu.TARGETS, ids=lambda one: one.name)
def test_it_compiles_without_a_warning(target: cpu.Target, tmp_path: Path) -> None:
    """For this machine's kind; what it has not is compiled and cannot be run."""
    if not cpu.features():
        pytest.skip("not a CPU that says what it has")
    source = Path(cpu.__file__).with_name("library.cpp")
    command = [
        cpu.compiler(),
        *cpu.OPTIONS,
        *target.options,
        "-O0",
        "-Werror",
        str(source),
        "-o",
        str(tmp_path / "a.so"),
    ]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", HERE, ids=lambda one: one.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_targets_compute_alike(target: cpu.Target, dtype: torch.dtype) -> None:
    # Few heads and many, few tokens and many, odd widths and whole ones: AMX takes many heads, whole rows as they lie.
    for new, heads, width, latent in ((2, 7, 56, 40), (2, 19, 64, 48), (21, 16, 72, 65), (9, 33, 32, 32)):
        past = Past.of([300, 7], new)
        rows = past.rows(width)
        arrays = [past.queries(heads, width), past.new(rows), past.held(rows, 301), past.position]
        args = [*narrow(arrays, dtype), latent, 0.3]
        wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        got = run(latent_attention, args, target)[0]
        compare(got, latent_attention(*wide), dtype, 4 if dtype == torch.float32 else 2)
    for form, tokens in ((form, tokens) for form in FORMS for tokens in (9, 150)):
        args = arguments(form, (tokens, 4, 2, 160, 96), dtype)
        wide = [w.float() if isinstance(w, torch.Tensor) and w.dtype == dtype else w for w in args]
        if form == "plain":
            wide[3:6] = [[w.float() for w in part] for part in args[3:6]]
        wanted = moe_experts(*wide)
        compare(run(moe_experts, args, target)[0], wanted, dtype, 8 if dtype == torch.float32 else 3)


@pytest.mark.parametrize("target", HERE, ids=lambda one: one.name)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "rows", "width"), [(64, 150, 96), (79, 33, 421)])
def test_products_of_float32(target: cpu.Target, stored: torch.dtype, tokens: int, rows: int, width: int) -> None:
    """As exact as float32 is, of numbers of very different sizes, by AMX too, which takes them in parts."""
    torch.manual_seed(0)
    x = torch.randn(tokens, width) * 10.0 ** torch.randint(-6, 6, (tokens, 1))
    weight = (torch.randn(rows, width) * 2.0 ** torch.randint(-4, 4, (rows, 1))).to(stored)
    bias = torch.randn(rows)
    attributes = {"out": rows, "width": width, "rows": 0, "columns": 0, "bias": 1, "activations": ""}
    got = run_node("Linear", (x, weight, bias), attributes, target).double()
    wanted = x.double() @ weight.double().T + bias
    size = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    assert ((got - wanted).abs() / (size + bias.abs())).max() < 2 * width**0.5 * 2**-24


@pytest.mark.parametrize("target", HERE, ids=lambda one: one.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_stands_around_sublayers(target: cpu.Target, dtype: torch.dtype) -> None:
    """Hyper-connections, of few tokens and of many, and compression."""
    for M, X, D in ((1, 4, 96), (33, 3, 35)):
        streams, *weights = operands(M, X, D, dtype)
        y = torch.randn(M, D).to(dtype)
        _, post, comb = hyper_connection(streams.float(), *weights, 20, 1e-6, 1e-5)
        steps = 4 if dtype == torch.float32 else 1
        for op, args in (
            (hyper_connection, [streams, *weights, 20, 1e-6, 1e-5]),
            (hyper_mix, [streams, y, post, comb]),
        ):
            wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
            wanted = op(*wide)
            for one, other in zip(
                run(op, args, target), wanted if isinstance(wanted, tuple) else (wanted,), strict=True
            ):
                compare(one, other, one.dtype, steps)
    for case in ((9, 16, 2, 40, [3, 15, 16, 40]), (1, 4, 1, 69, [3, 7])):
        args = [*to_compress(*case), *case[1:3]]
        compare(run(compress_tokens, args, target)[0], compress_tokens(*args), torch.float32, 4)


def test_the_best_target_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in cpu.TARGETS:
        monkeypatch.setattr(cpu, "features", lambda has=target.needs: has)
        assert cpu.best_target() is target
    monkeypatch.setattr(cpu, "features", lambda: frozenset(("avx2", "fma")))
    assert cpu.best_target().name == "generic"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("V4EXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        cpu.library()


def test_a_node_without_an_attribute_is_an_error() -> None:
    """What goes wrong inside comes out as onnxruntime's error, and the process lives."""
    past = Past.of([3], 1)
    rows = past.rows(8)
    arrays = [past.queries(2, 8), past.normal(1, 2), past.new(rows), past.held(rows, 3), past.position]
    args = [*map(torch.from_numpy, arrays), 2, 1, 0.5]
    assert run(index_select, args)[0].shape == (1, 2)
    with pytest.raises(Exception, match="top_k"):
        run(index_select, args, without="top_k")


def test_numbers_that_nothing_has_are_an_error() -> None:
    past = Past.of([5], 1)
    rows = past.rows(8)
    for number in (3, 9):  # of a row that is not held, and of one behind the new one
        selected = np.array([[number]])
        arrays = [past.queries(2, 8), past.new(rows), past.held(rows, 5)[:, :3], selected, past.position]
        with pytest.raises(Exception, match="no row of a selected number"):
            run(sparse_latent_attention, [*map(torch.from_numpy, arrays), 4, 0.5])
    args = arguments("plain", (2, 3, 1, 8, 8), torch.float32)
    for expert in (3, -1):
        args[2] = torch.full((2, 1), expert)
        with pytest.raises(Exception, match="no expert of that number"):
            run(moe_experts, args)


def test_two_sessions_share_the_library() -> None:
    for _ in range(2):
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(cpu.library()))
