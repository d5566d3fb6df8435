"""ZeRO-3: the engine's copy is what DeepSpeed gathers, by one collective a layer."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import hybrid_engine as he
from tests.distributed.ranks import run_ranks
from tests.distributed.zero import initialize, train_one_step
from tests.engine.conftest import _build as build

GREEDY = he.SamplingParams(max_new_tokens=8, temperature=0.0)


def prompts_of(rank, count=3):
    generator = torch.Generator().manual_seed(rank)
    lengths = [5, 1, 17][:count]
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


@contextlib.contextmanager
def counted():
    """Collectives that are called inside, by name."""
    calls = Counter()

    def counting(name, real):
        def call(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    names = ["all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce"]
    names = [name for name in names if hasattr(dist, name)]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        yield calls


def whole_model(module):
    """A copy of a partitioned module that has its parameters whole, by DeepSpeed's own gather."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        state = {name: value.clone() for name, value in module.state_dict().items()}
    model = AutoModelForCausalLM.from_config(copy.deepcopy(module.config))
    for parameter in model.parameters():  # not the rotary frequencies, which DeepSpeed leaves alone
        parameter.data = parameter.data.to(module.dtype)
    model.load_state_dict(state)
    return model.eval()


def _bit_equal(family, bf16, zero):
    module = initialize(build(family), bf16=bf16, **zero).module
    engine = he.HybridEngine(module, he.EngineConfig(tp_gather_partition_size=1))
    expected = whole_model(module)
    with counted() as calls, engine.rollout():
        for name, parameter in expected.named_parameters():
            if "query_key_value" not in name:  # stored by head, read as Q, K, V
                assert torch.equal(engine.rollout_parameters()[name], parameter), name
    rollout = engine.generate(prompts_of(dist.get_rank()), GREEDY)
    alone = he.HybridEngine(expected).generate(prompts_of(dist.get_rank()), GREEDY)
    assert torch.equal(rollout.tokens, alone.tokens)
    assert torch.equal(rollout.logprobs, alone.logprobs)
    assert all(parameter.numel() == 0 for parameter in engine.rollout_parameters().values())
    assert all(parameter.numel() == 0 for parameter in module.parameters())
    gathers = sum(count for name, count in calls.items() if name.startswith("all_gather"))
    return gathers, module.config.num_hidden_layers


@pytest.mark.parametrize(
    ("family", "bf16", "zero", "world"),
    [
        ("llama", False, {}, 2),
        ("qwen2", True, {}, 3),
        ("gpt2", False, {}, 3),
        ("gpt_neox", True, {}, 2),
        ("opt", False, {"offload_param": {"device": "cpu"}}, 2),
        ("llama", True, {"zero_hpz_partition_size": 2}, 2),
        ("bloom", False, {"stage3_param_persistence_threshold": 10**6}, 2),
    ],
    ids=["llama", "qwen2-bf16-W3", "gpt2-W3", "gpt_neox-bf16", "opt-offload", "hpz", "persistent"],
)
def test_the_copy_is_bit_equal_by_one_collective_a_layer(family, bf16, zero, world):
    for gathers, layers in run_ranks(_bit_equal, family, bf16, zero, world=world):
        assert gathers == layers + 1


def _streamed(cases):
    """How many storages the copy has, case by case."""
    rank = dist.get_rank()
    module = initialize(build("llama")).module
    alone = he.HybridEngine(whole_model(module)).generate(prompts_of(rank), GREEDY)
    storages = []
    for config, low_on_rank in cases:
        engine = he.HybridEngine(module, he.EngineConfig(**config))
        free = 1000 if rank == low_on_rank else 2**40
        with mock.patch("hybrid_engine.joint.free_bytes", return_value=free), engine.rollout():
            addresses = {
                p.untyped_storage().data_ptr() for p in engine.rollout_parameters().values()
            }
            storages.append(len(addresses))
            rollout = engine.generate(prompts_of(rank), GREEDY)
        assert torch.equal(rollout.tokens, alone.tokens)
        torch.testing.assert_close(rollout.logprobs, alone.logprobs, rtol=1e-5, atol=1e-5)
    return storages


def test_layers_stream_through_one_layers_memory_where_there_is_no_more():
    cases = [({"pin_parameters": True}, 0), ({"pin_parameters": False}, None), ({}, None), ({}, 1)]
    pinned, streamed = 3, 2  # two layers or one, and what is in no layer
    for storages in run_ranks(_streamed, cases):
        assert storages == [pinned, streamed, pinned, streamed]


def _together(sizes):
    module = initialize(build("llama")).module
    found = []
    for size in sizes:
        engine = he.HybridEngine(module, he.EngineConfig(tp_gather_partition_size=size))
        with counted() as calls, engine.rollout():
            found.append(calls["all_gather_single"])
    return found


def test_small_layers_are_gathered_together():
    assert run_ranks(_together, [1, 2, 8]) == [[3, 2, 1]] * 2


def _adjacent():
    module = initialize(build("llama")).module
    engine = he.HybridEngine(module)
    for unit, layer in zip(engine._joint._copy._units, module.model.layers, strict=False):
        first = min(parameter.ds_tensor.data_ptr() for parameter in layer.parameters())
        part = unit._bucket.part(torch.device("cpu"))
        assert part.data_ptr() == first
        assert part.numel() == sum(parameter.ds_tensor.numel() for parameter in layer.parameters())


def test_trained_partitions_are_sent_where_they_lie():
    run_ranks(_adjacent)


def _step_between(stage):
    prompts = prompts_of(dist.get_rank())
    trainer, reference = (initialize(build("llama"), stage=stage) for _ in range(2))
    engines = [
        he.HybridEngine(trainer.module, he.EngineConfig(inference_tp_size=size)) for size in (1, 2)
    ]
    before = engines[0].generate(prompts, GREEDY).tokens
    for _ in range(2):
        train_one_step(trainer)
        train_one_step(reference)  # never rolled out
        expected = whole_model(reference.module) if stage == 3 else copy.deepcopy(reference.module)
        found = whole_model(trainer.module) if stage == 3 else trainer.module
        for parameter, other in zip(expected.parameters(), found.parameters(), strict=True):
            assert torch.equal(parameter, other)
        alone = he.HybridEngine(expected).generate(prompts, GREEDY).tokens
        assert not torch.equal(alone, before)
        for engine in engines:
            assert torch.equal(engine.generate(prompts, GREEDY).tokens, alone)


@pytest.mark.parametrize("stage", [0, 1, 2, 3], ids=lambda stage: f"zero{stage}")
def test_training_goes_on_as_if_there_were_no_rollout_and_the_next_one_sees_it(stage):
    run_ranks(_step_between, stage)


def _refused(change):
    module = initialize(build("llama")).module
    change(module)
    try:
        he.HybridEngine(module)
    except ValueError as error:
        return str(error)


def _quantize(module):
    module.lm_head.weight.ds_tensor.ds_quant_scale = torch.ones(1)


def _swap_out(module):
    module.lm_head.weight.ds_tensor.data = torch.empty(0)


def _add_parameter(module):
    module.lm_head.bias = torch.nn.Parameter(torch.zeros(97))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_quantize, "zero_quantized_weights"),
        (_swap_out, "offload_param to nvme"),
        (_add_parameter, "not lm_head.bias; add parameters before deepspeed.initialize"),
    ],
    ids=["quantized", "nvme", "added_later"],
)
def test_partitions_that_are_not_the_weights_are_refused(change, message):
    assert all(message in error for error in run_ranks(_refused, change))
