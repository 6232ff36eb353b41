"""Limits are what their derivation says, and order themselves by precision."""

from __future__ import annotations

import dataclasses
import math

import pytest

from v4export import presets
from v4export.precision import PRECISIONS, precision
from v4export.verify import tolerance
from v4export.verify.tolerance import CONFIDENCE, Path, attention_path, feed_forward_path, head_path, row_path

# D 96, H 4, q rank 48, L 32, N 16, R 8, V 16, dense F 208, E 16, K 4, expert F 48, one shared expert, layer 0 dense.
C = presets.load("tiny-v3")
LITE = presets.load("tiny-v2-lite")
U = 2.0**-24


def test_terms_by_hand():
    attention = attention_path(C, 0, 10)
    # norm 96, down 96, its norm 48, up 48, absorbed 16, score 40, softmax 10, mix 10, value 32; output 4 heads * 16
    assert attention.terms == 96 + 96 + 48 + 48 + 16 + 40 + 10 + 10 + 32 + 64
    assert (attention.stored, attention.products) == (9 + 3, 5)
    assert (row_path(C, 0, "latent").terms, row_path(C, 0, "latent").stored, row_path(C, 0, "latent").products) == (
        96 + 96 + 32,
        3,
        1,
    )
    dense, routed = feed_forward_path(C, 0), feed_forward_path(C, 1)
    assert (dense.terms, dense.stored) == (96 + 96 + 208, 5)
    assert (routed.terms, routed.stored) == (96 + 96 + 48 + 96 + C.experts_per_token, 7)
    assert (head_path(C).terms, head_path(C).stored, head_path(C).products) == (192, 2, 0)


@pytest.mark.parametrize(
    "path", [row_path(C, 0, "latent"), attention_path(C, 0, 7), feed_forward_path(C, 1), tolerance.RESIDUAL]
)
def test_errors_by_hand(path):
    sums = (path.terms + path.stored) * U**2
    wanted = {
        "fp32": math.sqrt(sums / 3),
        "fp16": math.sqrt((path.stored * 2.0**-22 + sums) / 3),
        "bf16": math.sqrt((path.stored * 2.0**-16 + sums) / 3),
        # An FP8 matrix is rounded to bfloat16 before it multiplies: one rounding more for each on the way.
        "fp8": math.sqrt(((path.stored + path.products) * 2.0**-16 + sums) / 3),
    }
    for name, error in wanted.items():
        assert path.error(precision(name)) == pytest.approx(error, rel=1e-9)
        assert f"= {CONFIDENCE * error:.2g}" in path.derivation(precision(name))


def test_limits_grow_with_the_width_of_the_rounding():
    for path in (attention_path(C, 0, 64), feed_forward_path(C, 0), feed_forward_path(C, 1), row_path(C, 0, "latent")):
        errors = [path.error(PRECISIONS[name]) for name in ("fp32", "fp16", "bf16", "fp8")]
        assert errors == sorted(errors) and len(set(errors)) == 4
    assert head_path(C).error(PRECISIONS["fp8"]) == head_path(C).error(PRECISIONS["bf16"])


@pytest.mark.parametrize("name", PRECISIONS)
def test_limits_grow_with_the_lengths_of_the_sums(name):
    p = precision(name)
    wide = dataclasses.replace(C, hidden_size=16 * C.hidden_size)
    assert row_path(wide, 0, "latent").error(p) > row_path(C, 0, "latent").error(p)
    assert attention_path(C, 0, 4096).error(p) > attention_path(C, 0, 4).error(p)
    assert feed_forward_path(wide, 1).error(p) > feed_forward_path(C, 1).error(p)


def test_a_query_of_one_matrix_has_a_shorter_path():
    assert LITE.q_lora_rank is None
    assert attention_path(LITE, 0, 4).products == attention_path(C, 0, 4).products - 2
    assert attention_path(LITE, 0, 4).stored == attention_path(C, 0, 4).stored - 2


def test_mean_over_tokens():
    assert tolerance.mean_limit(1) == tolerance.mean_limit(0) == CONFIDENCE
    assert tolerance.mean_limit(100) == pytest.approx(1 + (CONFIDENCE - 1) / 10)
    assert 1 < tolerance.mean_limit(10**8) < 1.001


def test_fp32_has_no_storage_error():
    assert Path("x", 100, 0, 0).error(precision("fp32")) == pytest.approx(math.sqrt(100 / 3) * U)


# D 96, H 4 of 32, q rank 48, window 16, o 2 groups of rank 16, 4 streams; layers window, csa, hca, csa.
V4 = presets.load("tiny-v4")
V32 = presets.load("tiny-v3.2")


def test_terms_of_v4_by_hand():
    found = [attention_path(V4, layer, 300) for layer in (0, 1, 2)]
    query, output = 96 + 96 + 48 + 48 + 32, 64 + 32
    # Keys: the window and the sink; of a csa layer 8 selected entries, of an hca layer the two of 128 tokens each.
    for path, keys in zip(found, (17, 25, 19), strict=True):
        assert (path.terms, path.stored, path.products) == (query + 32 + 2 * keys + output, 10, 4)
    assert attention_path(V4, 1, 10).terms == query + 32 + 2 * (10 + 2 + 1) + output
    assert attention_path(V32, 0, 100).terms - attention_path(V32, 0, 4).terms == 2 * (8 - 4)


@pytest.mark.parametrize(
    ("config", "layer", "name", "terms", "stored", "products"),
    [
        (V4, 0, "window", 96 + 96 + 32, 4, 1),
        (V4, 1, "entry", 96 + 96 + 8 + 8 + 32, 4, 0),
        (V4, 2, "entry", 96 + 96 + 128 + 128 + 32, 4, 0),
        (V4, 1, "index_key", 96 + 96 + 8 + 8 + 16, 4, 0),
        (V4, 1, "open", 96 + 96, 1, 0),
        (V32, 0, "index_key", 96 + 96 + 16, 4, 1),
    ],
)
def test_rows_by_hand(config, layer, name, terms, stored, products):
    path = row_path(config, layer, name)
    assert (path.terms, path.stored, path.products) == (terms, stored, products)


def test_hyper_connections_add_to_the_head_and_to_nothing_else():
    assert all(path.error(PRECISIONS["bf16"]) == 0 for path in tolerance.hyper_paths(C))
    collapse, coefficients, sinkhorn = tolerance.hyper_paths(V4)
    assert (collapse.stored, coefficients.stored, sinkhorn.stored) == (1, 0, 0)
    assert coefficients.error(PRECISIONS["fp32"]) == coefficients.error(PRECISIONS["bf16"]) > 0
    assert head_path(V4).stored == head_path(C).stored + 1


def test_fp4_experts_count_as_fp8_ones():
    path = feed_forward_path(V4, 2)
    assert path.error(PRECISIONS["mxfp4"]) == path.error(PRECISIONS["fp8"]) > path.error(PRECISIONS["bf16"])
