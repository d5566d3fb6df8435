"""activation.cu on the CPU: the tests of the op, then long rows and misaligned ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hybrid_engine import ops
from tests.cuda.layout import misaligned
from tests.ops import test_activation as shared

FAMILY = "activation"
ORDERS = ("forward", "random")  # no thread waits for another: only their order can differ

make = shared.make
test_silu_and_mul = shared.test_silu_and_mul
test_gelu_and_mul = shared.test_gelu_and_mul
test_bias_gelu = shared.test_bias_gelu
test_relu_is_bitwise = shared.test_relu_is_bitwise
test_extreme_values = shared.test_extreme_values
test_near_zero_keeps_relative_accuracy = shared.test_near_zero_keeps_relative_accuracy
test_empty = shared.test_empty


def test_rows_of_several_blocks(run, make, assert_accurate):
    x, bias = make(3, 2 * 4104), make(4104)
    assert_accurate(run(ops.silu_and_mul, x), lambda x: F.silu(x[:, :4104]) * x[:, 4104:], x)
    x = x[:, :4104].contiguous()
    assert_accurate(run(ops.bias_gelu, x, bias), lambda x, b: F.gelu(x + b), x, bias)


def test_misaligned_rows_give_the_same_bits(run, make):
    x, bias = make(3, 64), make(64)
    for op, args in ((ops.silu_and_mul, (x,)), (ops.bias_gelu, (x, bias)), (ops.relu, (x,))):
        assert torch.equal(run(op, *map(misaligned, args)), run(op, *args))
