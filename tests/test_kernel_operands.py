"""What tests on a GPU go by, on a CPU: comparisons see what is wrong, and operands are such as kernels are made for."""

from __future__ import annotations

import pytest
import torch
from kernel_comparison import compare, compare_numbers
from kernel_operands import OP, check_op, models_and_ops, only_seen, operands

from v4export.plugins.kernels.call import call
from v4export.plugins.kernels.emulate import compiler

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
SCORES = torch.tensor([[0.5, 3.0, 3.0 + 1e-6, -1.0, 2.0]])


@pytest.mark.parametrize("got", [[2, 1, 4], [1, 2, 4]])
def test_ties_of_rounding_may_stand_in_either_order(got: list[int]) -> None:
    compare_numbers(torch.tensor([got]), torch.tensor([[2, 1, 4]]), SCORES)


@pytest.mark.parametrize("got", [[2, 1, 0], [4, 1, 2], [2, 2, 4], [2, 1, -1]])
def test_other_numbers_are_seen(got: list[int]) -> None:
    with pytest.raises(AssertionError):
        compare_numbers(torch.tensor([got]), torch.tensor([[2, 1, 4]]), SCORES)


def test_where_there_are_fewer_both_say_so() -> None:
    few = torch.tensor([[1, -1, -1]])
    compare_numbers(few, few, SCORES)
    with pytest.raises(AssertionError):
        compare_numbers(torch.tensor([[1, 2, -1]]), few, SCORES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_numbers_are_within_roundings(dtype: torch.dtype) -> None:
    wanted = torch.linspace(1, 2, 100)
    compare(wanted.to(dtype), wanted, dtype)
    with pytest.raises(AssertionError):
        compare((wanted * (1 + 100 * torch.finfo(dtype).eps)).to(dtype), wanted, dtype)


def test_a_query_is_left_something_to_attend_to() -> None:
    numbers, seen = torch.tensor([[3, 0], [3, 2], [1, 0]]), torch.tensor([4, 2, 0])
    assert only_seen(numbers, seen).tolist() == [[3, 0], [0, -1], [-1, -1]]
    assert only_seen(numbers[:, :0], seen).tolist() == [[0], [0], [-1]]


def test_every_op_with_kernels_is_of_some_model() -> None:
    assert {op for _, op, _ in models_and_ops()} == {name for name, op in OP.items() if op.kernels is not None}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("model", "op", "form"), models_and_ops())
def test_emulated_kernels_agree(model: str, op: str, form: str) -> None:
    """What is asked of a GPU, in one of its types."""
    if op == "moe_experts":
        pytest.skip("takes minutes in an emulator at these widths")
    for sequences, held in ((1, 1), (3, 130)):
        torch.manual_seed(held)
        for args in operands(model, op, form, sequences, held, torch.bfloat16, "cpu"):
            check_op(op, args, torch.bfloat16, lambda *given: OP[op].kernels(call, *given))
