"""The step that a CUDA graph records, run on CPU tensors, says what the plain loop says."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_engine import EngineConfig, HybridEngine, SamplingParams, ops
from hybrid_engine.generation import loop
from hybrid_engine.generation.device_step import (
    STEPS_OF_A_POLL,
    DeviceStep,
    GraphedSteps,
    bucket_of,
)
from hybrid_engine.generation.rows import Rows
from hybrid_engine.generation.scheduler import Sequence
from hybrid_engine.ops import registry

PARAMS = {
    "greedy": SamplingParams(max_new_tokens=30, temperature=0.0),
    "top_p": SamplingParams(max_new_tokens=30, top_p=0.8, seed=4),
    "penalty": SamplingParams(max_new_tokens=30, repetition_penalty=1.3, seed=6),
    "min_new_tokens": SamplingParams(max_new_tokens=30, min_new_tokens=9, seed=7),
}
CONFIGS = {
    "all-at-once": EngineConfig(),
    "two-at-a-time": EngineConfig(max_running=2),
    "block3": EngineConfig(block_size=3),
}


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch, step_by_step: Any) -> Any:
    """Calls a function whose rollouts take the graph's steps, one after another."""

    def call(function: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "graphs_serve", lambda decoder: True)
            patch.setattr(GraphedSteps, "_capture", lambda self, bucket: None)
            return step_by_step(function)

    return call


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", PARAMS)
def test_device_steps_equal_the_loop(
    build, prompts, step_by_step, on_device, name: str, config: str
) -> None:
    model = build("llama")
    model.generation_config.eos_token_id = [2, 9, 33, 40]
    engine = HybridEngine(model, CONFIGS[config])
    expected = step_by_step(lambda: engine.generate(prompts, PARAMS[name]))
    found = on_device(lambda: engine.generate(prompts, PARAMS[name]))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
    assert found.finish_reasons == expected.finish_reasons
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.truncated_logprobs, expected.truncated_logprobs, rtol=1e-4, atol=1e-4
    )
    assert len(set(expected.lengths.tolist())) > 1


def test_the_host_looks_once_a_poll(build, on_device, monkeypatch) -> None:
    calls: list[int] = []
    run = GraphedSteps.run

    def counted(self: GraphedSteps, count: int, most: int) -> None:
        calls.append(count)
        run(self, count, most)

    monkeypatch.setattr(GraphedSteps, "run", counted)
    engine = HybridEngine(build("llama"))
    tokens = 1 + 3 * STEPS_OF_A_POLL  # the prefill gives the first
    params = SamplingParams(max_new_tokens=tokens, stop_token_ids=())
    on_device(lambda: engine.generate([[1, 5], [1, 6, 7]], params))
    assert calls == [2, 2, 2]


@pytest.fixture
def sample_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that cannot raise: bad rows get token -1 and log-probs of NaN, see `ops.sample`."""
    real = ops.sample

    def sample(logits: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, ...]:
        bad = ~logits.amax(-1).isfinite()
        tokens, *logprobs = real(torch.where(bad.unsqueeze(1), 0, logits), *settings)
        nan = (x.masked_fill(bad, math.nan) for x in logprobs)
        return tokens.masked_fill(bad, -1), *nan

    monkeypatch.setattr(ops, "sample", sample)


@pytest.mark.usefixtures("sample_as_on_cuda")
@pytest.mark.parametrize("steps", ["graph", "loop"])
def test_bad_logits_are_an_error_also_where_the_kernel_cannot_raise(
    build, step_by_step, on_device, steps: str
) -> None:
    model = build("opt")
    learned = model.model.decoder.embed_positions
    learned.weight.data[learned.offset + 12] = math.nan  # the second prompt gets there first
    engine = HybridEngine(model)
    params = SamplingParams(max_new_tokens=30, temperature=0.0, stop_token_ids=())
    with pytest.raises(ValueError, match="for 1 of 2 sequences, the first of them prompt 1;"):
        (on_device if steps == "graph" else step_by_step)(
            lambda: engine.generate([[1, 5, 6], [1, *range(3, 11)]], params)
        )


class Recording(TorchDispatchMode):
    """Fails at what a CUDA graph cannot hold: values for the host, sizes that contents decide."""

    READS = ("aten::is_nonzero", "aten::item", "aten::_local_scalar_dense", "aten::equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in self.READS, f"{func} gives the host a value"
        sized_by_contents = torch.Tag.dynamic_output_shape in func.tags
        if func._schema.name in ("aten::index", "aten::index_put_"):
            sized_by_contents = any(x is not None and x.dtype == torch.bool for x in args[1])
        assert not sized_by_contents, f"the contents decide the size of what {func} works on"
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(ops.NATIVE.library is None, reason="references read contents; no kernel does")
@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "gpt_neox", "bloom"])
def test_a_step_can_be_recorded(
    build, prompts, on_device, monkeypatch, name: str, family: str
) -> None:
    """Contents are checked too (HYBRID_ENGINE_CHECK=1), but not in a step that is recorded."""
    advance, steps = DeviceStep.advance, 0

    def no_list(self: torch.Tensor) -> Any:
        raise AssertionError("tolist() gives the host values")

    def recorded(self: DeviceStep, bucket: int) -> None:
        nonlocal steps
        steps += 1
        with monkeypatch.context() as patch, Recording():
            patch.setattr(registry, "_recording", lambda: True)
            patch.setattr(torch.Tensor, "tolist", no_list)
            advance(self, bucket)

    monkeypatch.setattr(DeviceStep, "advance", recorded)
    engine = HybridEngine(build(family))
    on_device(lambda: engine.generate(prompts, PARAMS[name]))
    assert steps >= STEPS_OF_A_POLL


def test_contents_are_checked_except_while_a_graph_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_CHECK", "1")
    cache = torch.zeros(2, 1, 4, 8)
    lengths = torch.tensor([9], dtype=torch.int32)  # the table holds 4 tokens
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="seq_lens: expected indices"):
        ops.decode_attention(torch.zeros(1, 1, 8), cache, cache, table, lengths, 1.0)
    called: list[Any] = []
    monkeypatch.setattr(registry, "_recording", lambda: True)
    monkeypatch.setattr(ops.decode_attention, "overload", lambda *args: called.append(args))
    ops.decode_attention(torch.zeros(1, 1, 8), cache, cache, table, lengths, 1.0)
    assert len(called) == 1


def test_rows_know_their_blocks_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each look costs a wait, and a block comes every few steps for every row."""
    rows = Rows(capacity=3, max_blocks=9, block_size=4, device=torch.device("cpu"))
    for index, blocks in enumerate(([5], [6, 7], [8])):
        rows.append(Sequence(index=index, prompt=[1, 2], blocks=blocks))
    rows.remove(0)  # the last one moves here
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__int__", lambda self: pytest.fail("int() of a tensor"))
        patch.setattr(torch.Tensor, "item", lambda self: pytest.fail("item() of a tensor"))
        for row, block in ((0, 1), (1, 2), (0, 3)):
            rows.add_block(row, block)
    assert rows.room[:2].tolist() == [12, 12]
    assert rows.block_tables[:2, :3].tolist() == [[8, 1, 3], [6, 7, 2]]
    assert rows.indices[:2].tolist() == [2, 1]


def test_buckets() -> None:
    assert [bucket_of(n, 12) for n in (1, 2, 3, 4, 5, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 12, 12]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", PARAMS)
def test_graphs_on_a_gpu_equal_the_loop(build, prompts, monkeypatch, name: str) -> None:
    torch.use_deterministic_algorithms(False)  # rollouts have other kernels then
    model = build("llama").cuda()
    model.generation_config.eos_token_id = [2, 9, 33, 40]
    engine = HybridEngine(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "decoding without a CUDA graph")
        found = engine.generate(prompts, PARAMS[name])
    monkeypatch.setattr(loop, "graphs_serve", lambda decoder: False)
    expected = engine.generate(prompts, PARAMS[name])
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
