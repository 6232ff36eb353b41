from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from engine_of import builds
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import count, one_node, run

from v4export.plugins.moe_route.op import moe_route

# E experts, K chosen, G groups, groups kept, scoring, group score, norm, scale
CASES = {
    "one expert": (1, 1, 1, 1, "softmax", "max", False, 1.0),
    "greedy": (8, 3, 1, 1, "softmax", "max", False, 1.0),
    "greedy, all experts": (5, 5, 1, 1, "softmax", "max", False, 16.0),
    "v2 groups": (12, 4, 4, 2, "softmax", "max", False, 16.0),
    "v2 groups of one": (6, 2, 6, 3, "softmax", "max", False, 1.0),
    "v3, one group": (9, 4, 1, 1, "sigmoid", "top2_sum", True, 2.827),
    "v3 groups": (16, 4, 4, 2, "sigmoid", "top2_sum", True, 2.5),
    "v3 groups of two": (8, 2, 4, 1, "sigmoid", "top2_sum", True, 2.5),
    "v3, all groups kept": (8, 3, 2, 2, "sigmoid", "top2_sum", True, 2.5),
    "v3 without norm": (16, 4, 4, 2, "sigmoid", "top2_sum", False, 1.0),
    "v3, one chosen": (7, 1, 1, 1, "sigmoid", "top2_sum", True, 2.5),
    "v4": (16, 6, 1, 1, "sqrtsoftplus", "top2_sum", True, 1.5),
    "v4 scores in groups": (16, 4, 4, 2, "sqrtsoftplus", "top2_sum", False, 1.0),
}
KEYS = ("top_k", "num_groups", "topk_groups", "scoring", "group_score", "norm", "scale")


def by_hand(logits, bias, top_k, scoring, num_groups, topk_groups, group_score, norm, scale):
    """The published equations, a token at a time, in double precision."""
    weights, indices = [], []
    for row in logits.astype(float).tolist():
        if scoring == "sigmoid":
            s = [1 / (1 + math.exp(-v)) for v in row]
        elif scoring == "sqrtsoftplus":
            s = [math.sqrt(math.log1p(math.exp(v))) for v in row]
        else:
            total = sum(math.exp(v) for v in row)
            s = [math.exp(v) / total for v in row]
        b = [v + float(add) for v, add in zip(s, bias, strict=True)]
        size = len(row) // num_groups

        def worth(group):
            best = sorted(b[group * size : (group + 1) * size], reverse=True)  # noqa: B023
            return best[0] if group_score == "max" else sum(best[:2])

        groups = sorted(range(num_groups), key=lambda g: (-worth(g), g))[:topk_groups]
        open_experts = [e for g in groups for e in range(g * size, (g + 1) * size)]
        chosen = sorted(open_experts, key=lambda e: (-b[e], e))[:top_k]
        w = [s[e] for e in chosen]
        if norm:
            w = [v / (sum(w) + 1e-20) for v in w]
        weights.append([v * scale for v in w])
        indices.append(chosen)
    return np.array(weights).reshape(-1, top_k), np.array(indices, np.int64).reshape(-1, top_k)


def operands(M: int, E: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are apart from each other within a token, and a bias that changes the choice."""
    rng = np.random.default_rng(seed)
    logits = rng.permuted(np.tile(np.linspace(-3, 3, E), (M, 1)), axis=1) + rng.normal(size=(M, E)) * 0.05
    return logits.astype(np.float32), (rng.normal(size=E) * 0.2).astype(np.float32)


def arguments(case: tuple) -> dict:
    _, k, g, kept, scoring, group_score, norm, scale = case
    return dict(zip(KEYS, (k, g, kept, scoring, group_score, norm, scale), strict=True))


def eager(logits, bias, **a):
    order = ("top_k", "scoring", "num_groups", "topk_groups", "group_score", "norm", "scale")
    w, idx = moe_route(torch.from_numpy(logits), torch.from_numpy(bias), *(a[name] for name in order))
    return w.numpy(), idx.numpy()


def body(logits, bias, **a):
    model = one_node("MoeRoute", [logits, bias], outputs=2, **{**a, "norm": int(a["norm"])})
    return run(model, [logits, bias])


def check(logits, bias, a):
    wanted_w, wanted_idx = by_hand(logits, bias, **a)
    for weights, indices in (eager(logits, bias, **a), body(logits, bias, **a)):
        assert weights.dtype == np.float32 and indices.dtype == np.int64
        np.testing.assert_array_equal(indices, wanted_idx)
        np.testing.assert_allclose(weights, wanted_w, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("M", [1, 5, 33])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equation(case, M):
    check(*operands(M, case[0]), arguments(case))


@st.composite
def routings(draw):
    size, groups = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    scoring = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]))
    group_score = "max" if size == 1 else draw(st.sampled_from(["max", "top2_sum"]))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, size * kept))
    norm, scale = draw(st.booleans()), draw(st.sampled_from([1.0, 2.5, 16.0]))
    return (size * groups, top_k, groups, kept, scoring, group_score, norm, scale)


@given(routings(), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_routing(case, M, seed):
    check(*operands(M, case[0], seed), arguments(case))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ties(case):
    """All experts equal: exactly the kept groups are open, no expert is taken twice, and the weights are one number."""
    E, k, groups, kept, *_ = case
    logits, bias, a = np.full((3, E), 0.25, np.float32), np.zeros(E, np.float32), arguments(case)
    wanted, _ = by_hand(logits, bias, **a)
    for weights, indices in (eager(logits, bias, **a), body(logits, bias, **a)):
        np.testing.assert_allclose(weights, wanted, rtol=3e-6)
        for row in indices.tolist():
            assert len(set(row)) == k
            assert len({e // (E // groups) for e in row}) <= kept
    # ONNX defines what TopK does with equal values: the lower index first.
    assert indices.tolist() == [list(range(k))] * 3


def test_root_of_softplus_keeps_its_precision():
    """Scores of logits from -60 to 60; float32 has no 1 + exp(-20), and the root would make a visible error of it."""
    logits = np.linspace(-60, 60, 961, dtype=np.float32)[None]
    a = arguments((961, 961, 1, 1, "sqrtsoftplus", "top2_sum", False, 1.0))
    wanted = np.sqrt(np.log1p(np.exp(logits.astype(np.float64))))[:, ::-1]
    for weights, _ in (eager(logits, np.zeros(961, np.float32), **a), body(logits, np.zeros(961, np.float32), **a)):
        np.testing.assert_allclose(weights, wanted, rtol=1e-6)


def test_two_groups_tie_for_the_last_open_place():
    logits = np.log(np.array([[4, 3, 4, 3, 4, 3, 1, 1]], np.float32))
    a = arguments((8, 4, 4, 2, "softmax", "top2_sum", False, 1.0))
    for _, indices in (eager(logits, np.zeros(8, np.float32), **a), body(logits, np.zeros(8, np.float32), **a)):
        assert len({e // 2 for e in indices[0].tolist()}) == 2


def test_bias_decides_the_choice_and_not_the_weight():
    logits, bias = np.zeros((1, 4), np.float32), np.array([0, 0, 9, 0], np.float32)
    a = arguments((4, 1, 1, 1, "sigmoid", "top2_sum", False, 2.0))
    for weights, indices in (eager(logits, bias, **a), body(logits, bias, **a)):
        assert indices.item() == 2 and weights.item() == 1.0


def test_negative_scores_do_not_open_a_closed_group():
    """A closed group loses to an open one even where the open one's biased scores are below zero."""
    logits = np.array([[0.1, 0.0, 2.0, -9.0]], np.float32)
    bias = np.array([-5, -5, -5, -5], np.float32)
    a = arguments((4, 2, 2, 1, "sigmoid", "top2_sum", True, 1.0))
    check(logits, bias, a)


@pytest.mark.parametrize("case", [CASES["v2 groups"], CASES["v3 groups"]], ids=["v2", "v3"])
def test_registration(case):
    a = arguments(case)
    logits, bias = map(torch.from_numpy, operands(5, case[0]))
    order = ("top_k", "scoring", "num_groups", "topk_groups", "group_score", "norm", "scale")
    torch.library.opcheck(moe_route, (logits, bias, *(a[name] for name in order)))


def test_body_does_not_grow_with_experts():
    sizes = []
    for E in (8, 256):
        a = arguments((E, 4, 4, 2, "sigmoid", "top2_sum", True, 2.5))
        sizes.append(count(one_node("MoeRoute", operands(1, E), outputs=2, **{**a, "norm": 1}), "MoeRoute"))
    assert sizes[0] == sizes[1] < 40


@pytest.mark.slow
def test_tensorrt_rtx_builds_it(tmp_path):
    a = arguments(CASES["v4"])
    model = one_node("MoeRoute", operands(3, 16), outputs=2, **{**a, "norm": 1})
    builds(model, [("M", 16), (16,)], {"M": (1, 8, 64)}, tmp_path)
