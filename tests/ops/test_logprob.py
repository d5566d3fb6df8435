"""linear_logprob against the plain version that makes all the logits, in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_engine import ops
from hybrid_engine.ops import logprob

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()
SHAPES = [(1, 1, 1), (7, 5, 63), (63, 17, 257), (131, 40, 300)]  # N, D, V


@pytest.fixture(params=[(512, 2048), (16, 48)], ids=["one-tile", "many-tiles"])
def _tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "ROWS_PER_CHUNK", request.param[0])
    monkeypatch.setattr(logprob, "VOCAB_PER_TILE", request.param[1])


def materialising(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = F.linear(hidden, weight.to(hidden.dtype), bias)  # (N, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, scale: float = 1.0
) -> dict[str, Tensor]:
    rows, dim, vocabulary = shape
    generator = torch.Generator().manual_seed(rows)
    values = {
        "hidden": torch.randn(rows, dim, generator=generator) * scale,
        "weight": torch.randn(vocabulary, dim, generator=generator),
        "bias": torch.randn(vocabulary, generator=generator),
        "targets": torch.randint(vocabulary, (rows,), generator=generator),
    }
    return {
        k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in values.items()
    }


def run(
    function: Any, inputs: dict[str, Tensor], dtype: torch.dtype | None = None, **kwargs: float
) -> dict[str, Tensor]:
    """Results and gradients, from both outputs with fixed random weights; None: dtypes as given."""
    leaves = {
        name: value.detach().to(dtype or value.dtype).requires_grad_()
        if value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    logprobs, entropy = function(**leaves, **kwargs)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, len(logprobs), generator=generator).to(logprobs)
    (logprobs * upstream[0] + entropy * upstream[1]).sum().backward()
    gradients = {f"d_{k}": v.grad for k, v in leaves.items() if v.requires_grad}
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), **gradients}


def assert_as_good_as_plain(
    inputs: dict[str, Tensor], dtype: torch.dtype | None = None, **kwargs: float
) -> None:
    """Error <= 2x the plain version's, or one rounding of the result, both as a norm."""
    truth = run(materialising, inputs, torch.float64, **kwargs)
    plain = run(materialising, inputs, dtype, **kwargs)
    ours = run(ops.linear_logprob, inputs, dtype, **kwargs)
    for name, exact in truth.items():
        assert ours[name].dtype == plain[name].dtype, name
        error, bound = (ours[name] - exact).norm(), (plain[name] - exact).norm()
        rounding = torch.finfo(plain[name].dtype).eps * exact.norm()
        assert error <= torch.maximum(2 * bound, rounding), f"{name}: {error} > 2 * {bound}"


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=["N{}-D{}-V{}".format(*s) for s in SHAPES])
def test_values_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    assert_as_good_as_plain(make(shape, dtype, device), dtype)


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("softcap", [0.0, 30.0], ids=["uncapped", "cap30"])
@pytest.mark.parametrize("temperature", [0.3, 2.0], ids=["T0.3", "T2"])
def test_temperature_and_softcap(
    temperature: float, softcap: float, dtype: torch.dtype, device: str
) -> None:
    inputs = make((63, 33, 257), dtype, device)
    assert_as_good_as_plain(inputs, dtype, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
def test_weight_in_fp32_under_autocast(dtype: torch.dtype, device: str) -> None:
    inputs = make((63, 33, 257), torch.float32, device)
    assert_as_good_as_plain(inputs | {"hidden": inputs["hidden"].to(dtype)})


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-4, 1e3, 1e6], ids=["tiny", "large", "huge"])
def test_extreme_logits(scale: float, device: str) -> None:
    assert_as_good_as_plain(make((31, 16, 129), torch.float32, device, scale), torch.float32)


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("device", DEVICES)
def test_excluded_tokens_leave_the_distribution(device: str) -> None:
    inputs = make((31, 16, 129), torch.float64, device)
    keep = torch.arange(129, device=device) % 3 == 0
    keep[:50] = False  # whole tiles without a token
    inputs["targets"] = keep.nonzero()[:, 0][inputs["targets"] % keep.sum()]
    short = {k: v if k in ("hidden", "targets") else v[keep] for k, v in inputs.items()}
    short["targets"] = keep.cumsum(0)[inputs["targets"]] - 1
    inputs["bias"] = inputs["bias"].masked_fill(~keep, -torch.inf)
    ours = run(ops.linear_logprob, inputs, torch.float32)
    exact = run(materialising, short, torch.float64)
    for name in ("logprobs", "entropy", "d_hidden"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-5, atol=1e-5)
    assert torch.all(ours["d_weight"][~keep] == 0)
    assert torch.all(ours["d_bias"][~keep] == 0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("softcap", [0.0, 2.0], ids=["uncapped", "cap2"])
def test_gradcheck(bias: bool, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "ROWS_PER_CHUNK", 3)
    monkeypatch.setattr(logprob, "VOCAB_PER_TILE", 4)
    inputs = make((5, 3, 11), torch.float64, "cpu")
    targets = inputs.pop("targets")
    if not bias:
        del inputs["bias"]
    names = tuple(inputs)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        tensors = dict(zip(names, values, strict=True))
        return ops.linear_logprob(targets=targets, temperature=0.7, softcap=softcap, **tensors)

    assert torch.autograd.gradcheck(function, tuple(v.requires_grad_() for v in inputs.values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    inputs = make((7, 5, 63), dtype, device)
    hidden, weight, bias = (inputs[k].requires_grad_() for k in ("hidden", "weight", "bias"))
    op = torch.ops.hybrid_engine.linear_logprob.default
    torch.library.opcheck(op, (hidden, weight, inputs["targets"], bias, 0.7, 5.0))
    torch.library.opcheck(op, (hidden, weight.detach(), inputs["targets"], None, 1.0, 0.0))


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous(device: str) -> None:
    inputs = make((31, 16, 129), torch.float32, device)
    strided = {
        "hidden": inputs["hidden"].T.contiguous().T,
        "weight": torch.stack((inputs["weight"],) * 2, -1)[..., 0],
        "targets": torch.stack((inputs["targets"],) * 2, -1)[..., 0],
        "bias": torch.stack((inputs["bias"],) * 2, -1)[..., 0],
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    ours, dense = (run(ops.linear_logprob, x, torch.float32) for x in (strided, inputs))
    for name, value in dense.items():
        torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    ours = run(ops.linear_logprob, make((0, 5, 63), torch.bfloat16, device), torch.bfloat16)
    assert ours["logprobs"].shape == ours["entropy"].shape == (0,)
    assert ours["d_hidden"].shape == (0, 5)
    assert torch.all(ours["d_weight"] == 0)
    assert torch.all(ours["d_bias"] == 0)


class AllocationWatch(TorchDispatchMode):
    """Sizes of all tensors that are made, inside our ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hybrid_engine":
            with self:
                result = ops.OPS[func._schema.name.split("::")[1]].reference(*args)
        else:
            result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else (result,)
        self.sizes += [t.numel() for t in made if isinstance(t, Tensor)]
        return result


@contextmanager
def allocations() -> Iterator[list[int]]:
    watch = AllocationWatch()
    with watch:
        yield watch.sizes


def test_no_tensor_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.OPS["linear_logprob"].implementation("cpu") == "reference"
    monkeypatch.setattr(logprob, "ROWS_PER_CHUNK", 32)
    monkeypatch.setattr(logprob, "VOCAB_PER_TILE", 64)
    inputs = make((300, 8, 900), torch.float32, "cpu")
    with allocations() as sizes:
        run(ops.linear_logprob, inputs, torch.float32, softcap=3.0)
    assert max(sizes) == 900 * 8
    with allocations() as sizes:
        run(materialising, inputs, torch.float32)
    assert max(sizes) == 300 * 900


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_on_the_gpu_is_small_beside_all_logits() -> None:
    rows, dim, vocabulary = 4096, 512, 131_072
    inputs = make((rows, dim, vocabulary), torch.bfloat16, "cuda")
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    logprobs, entropy = ops.linear_logprob(**inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad((logprobs + entropy).sum(), leaves)
    results = sum(gradient.nbytes for gradient in gradients)
    beside_results = torch.cuda.max_memory_allocated() - before - results
    assert beside_results < 0.02 * rows * vocabulary * 4


def test_frozen_weight_gets_no_gradient_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "VOCAB_PER_TILE", 64)
    inputs = make((20, 64, 900), torch.float32, "cpu")
    trained = run(ops.linear_logprob, inputs, torch.float32)
    inputs["hidden"].requires_grad_()
    logprobs, entropy = ops.linear_logprob(**inputs)
    upstream = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    with allocations() as sizes:
        (logprobs * upstream[0] + entropy * upstream[1]).sum().backward()
    assert max(sizes) == 64 * 64
    torch.testing.assert_close(inputs["hidden"].grad, trained["d_hidden"], rtol=0, atol=0)


def test_runs_without_gradients() -> None:
    inputs = make((7, 5, 63), torch.float32, "cpu")
    with torch.no_grad():
        logprobs, entropy = ops.linear_logprob(**inputs)
    assert not logprobs.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden: expected \[any, any\], got \[2, 3, 4\]"),
        ({"weight": torch.zeros(6, 5)}, r"weight: expected \[any, 4\], got \[6, 5\]"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets: expected \[3\], got \[2\]"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, r"targets: expected torch.int64"),
        (
            {"targets": torch.tensor([0, 6, 1])},
            r"targets: expected indices in \[0, 6\), got 6 at \[1\]",
        ),
        (
            {"targets": torch.tensor([0, -1, 1])},
            r"targets: expected indices in \[0, 6\), got -1 at \[1\]",
        ),
        ({"bias": torch.zeros(5)}, r"bias: expected \[6\], got \[5\]"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, r"hidden: expected a floating dtype"),
        ({"temperature": 0.0}, r"temperature: expected above 0, got 0.0"),
        ({"softcap": -1.0}, r"softcap: expected 0 \(none\) or above, got -1.0"),
    ],
)
def test_bad_input_is_named(changed: dict[str, Any], message: str) -> None:
    good = make((3, 4, 6), torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        ops.linear_logprob(**(good | changed))
