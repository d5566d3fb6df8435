"""PEFT's adapters in the rollouts of several ranks: merged into the copy, or gathered beside it."""

from __future__ import annotations

import contextlib
import copy

import peft
import pytest
import torch
import torch.distributed as dist

import hybrid_engine as he
from hybrid_engine.models.lora import is_lora
from tests.distributed.ranks import run_ranks
from tests.distributed.test_gather import counted
from tests.distributed.zero import initialize, train_one_step
from tests.engine.conftest import _build as build

GREEDY = he.SamplingParams(max_new_tokens=8, temperature=0.0)
TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h"],
}


def adapted(family, dtype=torch.float32, names=("default",), **options):
    """A frozen base with adapters that matter; what is left out is fp32."""
    generator = torch.Generator().manual_seed(2)
    base = build(family).to(dtype)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[family], **options)
    model = peft.get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def _compare(model, stage, size, kept):
    """The engine on the trained model against one on a copy that was never partitioned."""
    prompts = [[dist.get_rank() + 5, 6, 7], [8] * 20]
    whole = copy.deepcopy(model).get_base_model()
    trainer = initialize(model, stage=stage)
    base = trainer.module.get_base_model()
    engine = he.HybridEngine(base, he.EngineConfig(inference_tp_size=size))
    alone = he.HybridEngine(whole)

    def difference():
        mine, theirs = engine.generate(prompts, GREEDY), alone.generate(prompts, GREEDY)
        assert torch.equal(mine.tokens, theirs.tokens)
        return float((mine.logprobs - theirs.logprobs).abs().max())

    differences = [difference()]
    assert any("lora_" in name for name in engine.rollout_parameters()) == kept
    with trainer.module.disable_adapter(), switched_off(whole):
        without = engine.generate(prompts, GREEDY)
        differences.append(difference())
    assert not torch.equal(without.tokens, engine.generate(prompts, GREEDY).tokens)
    differences.append(difference())
    return differences


@contextlib.contextmanager
def switched_off(base):
    """PEFT's `disable_adapter`, of a base model without its wrapper."""
    layers = [module for module in base.modules() if is_lora(module)]
    for layer in layers:
        layer.enable_adapters(False)
    yield
    for layer in layers:
        layer.enable_adapters(True)


def _rollouts(family, dtype, options, stage, size, kept):
    return _compare(adapted(family, dtype, **options), stage, size, kept)


MERGED, KEPT = False, True
TWO = {"names": ("one", "two")}


@pytest.mark.parametrize(
    ("family", "dtype", "options", "stage", "size", "kept"),
    [
        ("llama", torch.float32, {}, 3, 1, MERGED),
        ("llama", torch.float32, TWO, 3, 1, KEPT),
        ("llama", torch.float32, {}, 2, 2, MERGED),
        ("llama", torch.float32, TWO, 2, 2, KEPT),
        ("gpt2", torch.float32, {"fan_in_fan_out": True}, 3, 2, MERGED),
        ("gpt2", torch.float32, {"fan_in_fan_out": True, **TWO}, 3, 2, KEPT),
        ("gpt_neox", torch.float32, {}, 3, 2, MERGED),
        ("gpt_neox", torch.float32, TWO, 3, 1, KEPT),
    ],
    ids=[
        "llama-merged", "llama-kept", "llama-zero2-tp2-merged", "llama-zero2-tp2-kept",
        "gpt2-tp2-merged", "gpt2-tp2-kept", "gpt_neox-tp2-merged", "gpt_neox-kept",
    ],
)  # fmt: skip
def test_rollouts_follow_the_adapters(family, dtype, options, stage, size, kept):
    for differences in run_ranks(_rollouts, family, dtype, options, stage, size, kept):
        assert max(differences) < 1e-4


def _mixed():
    """bf16 base, fp32 adapters: one collective carries both."""
    model = adapted("llama", torch.bfloat16)
    layer = copy.deepcopy(model).get_base_model().model.layers[0].self_attn.q_proj
    base = initialize(model).module.get_base_model()
    engine = he.HybridEngine(base, he.EngineConfig(tp_gather_partition_size=1))
    with counted() as calls, engine.rollout():
        found = engine.rollout_parameters()["model.layers.0.self_attn.q_proj.weight"].clone()
    merged = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), merged, rtol=2**-8, atol=1e-6)  # one rounding
    return calls["all_gather_single"]


def test_a_bucket_of_two_dtypes_is_one_collective():
    assert run_ranks(_mixed) == [3, 3]


def _trained():
    trainer = initialize(adapted("llama"))
    base = trainer.module.get_base_model()
    engine = he.HybridEngine(base)
    frozen = base.model.layers[0].self_attn.q_proj.base_layer.weight
    before = frozen.ds_tensor.clone()
    rollouts = []
    for _ in range(3):
        rollouts.append(engine.generate([[5, 6, 7]], GREEDY).logprobs)
        train_one_step(trainer)
    assert torch.equal(frozen.ds_tensor, before)
    assert not torch.equal(rollouts[0], rollouts[1])
    assert not torch.equal(rollouts[1], rollouts[2])


def test_a_step_of_the_adapters_is_in_the_next_rollout_and_never_in_the_base():
    run_ranks(_trained)


def _refused(options):
    with pytest.raises(ValueError) as raised:
        he.HybridEngine(
            adapted("llama", **options).get_base_model(), he.EngineConfig(inference_tp_size=2)
        )
    return str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_dora": True}, "variant"), ({"lora_bias": True}, "lora_bias=True")],
    ids=["dora", "bias"],
)
def test_adapters_that_cannot_be_divided_are_refused(options, message):
    assert all(message in error for error in run_ranks(_refused, options))
