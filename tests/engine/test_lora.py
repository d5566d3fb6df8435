"""PEFT's adapters are active in generation and never touch the weights under them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import hybrid_engine as he
from hybrid_engine import HybridEngine, SamplingParams, ops

peft = pytest.importorskip("peft")

GREEDY = SamplingParams(max_new_tokens=16, temperature=0.0)
TARGETS = {
    "llama-all": ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]),
    "llama-some": ("llama", ["q_proj", "v_proj", "down_proj"]),
    "opt": ("opt", ["q_proj", "out_proj", "fc1", "fc2"]),
    "gpt2": ("gpt2", ["c_attn", "c_proj", "c_fc"]),
    "gpt_neox": ("gpt_neox", ["query_key_value", "dense", "dense_h_to_4h"]),
    "bloom": ("bloom", ["query_key_value", "dense_4h_to_h"]),
    "gemma2-head": ("gemma2", ["k_proj", "lm_head"]),
}


def adapted(model: Any, targets: list[str], **options: Any) -> Any:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options
    )
    return peft.get_peft_model(model, config).eval()


def responses(engine: HybridEngine, prompts: list[list[int]]) -> list[list[int]]:
    rollout = engine.generate(prompts, GREEDY)
    return [rollout.response(i) for i in range(len(prompts))]


@pytest.mark.parametrize("name", TARGETS)
def test_adapters_are_active(build, hf_greedy, prompts, name: str) -> None:
    family, targets = TARGETS[name]
    base = build(family)
    plain = responses(HybridEngine(base), prompts)
    model = adapted(base, targets)
    engine = HybridEngine(model.get_base_model())
    with_adapters = responses(engine, prompts)
    assert with_adapters == [hf_greedy(model.get_base_model(), p, 16) for p in prompts]
    assert with_adapters != plain
    with model.disable_adapter():
        assert responses(engine, prompts) == plain


def test_few_rows_go_through_the_fused_op(build, prompts, step_by_step, monkeypatch) -> None:
    """Decoding few sequences layer by layer: every adapted linear; their prefill: none."""
    calls: list[int] = []
    fused = ops.fused_lora

    def counted(x, *args) -> torch.Tensor:
        calls.append(len(x))
        return fused(x, *args)

    monkeypatch.setattr(ops, "fused_lora", counted)
    model = adapted(build("llama"), ["q_proj", "v_proj", "down_proj"])
    engine = HybridEngine(model.get_base_model())
    step_by_step(lambda: engine.generate([prompts[4], prompts[2]], GREEDY))
    assert calls == [2] * (GREEDY.max_new_tokens - 1) * 2 * 2  # steps, layers, QKV and down
    calls.clear()
    with model.disable_adapter():
        step_by_step(lambda: engine.generate([prompts[4]], GREEDY))
    assert not calls


def test_fp32_adapters_on_a_bf16_model(build, prompts) -> None:
    """PEFT's default. Error at most twice PEFT's own, prefilled and one token at a time."""
    model = adapted(build("llama").to(torch.bfloat16), ["q_proj", "up_proj", "down_proj"])
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    with torch.no_grad():
        wide = copy.deepcopy(model).float()
        truth = wide(torch.tensor([prompts[4]])).logits[0]
        theirs = model(torch.tensor([prompts[4]])).logits[0].float()
    found, _ = HybridEngine(model.get_base_model()).forward(prompts[4])
    assert (found.float() - truth).norm() <= 2 * (theirs - truth).norm()
    alone, _ = HybridEngine(model.get_base_model()).forward(prompts[4][:4])
    assert (alone.float() - truth[:4]).norm() <= 2 * (theirs[:4] - truth[:4]).norm()


def test_adapters_with_a_bias(build, hf_greedy, prompts) -> None:
    model = adapted(build("llama"), ["q_proj", "down_proj"], lora_bias=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(0)
            )
    inner = model.get_base_model()
    found = responses(HybridEngine(inner), prompts)
    assert found == [hf_greedy(inner, p, 16) for p in prompts]


def test_a_trained_adapter_is_seen_by_the_next_rollout(build, hf_greedy, prompts) -> None:
    model = adapted(build("llama"), ["q_proj", "up_proj"])
    inner = model.get_base_model()
    engine = HybridEngine(inner)
    seen = []
    for _ in range(2):
        seen.append(responses(engine, prompts))
        assert seen[-1] == [hf_greedy(inner, p, 16) for p in prompts]
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data.mul_(-2)
    assert seen[0] != seen[1]


def test_the_adapter_switches_within_a_rollout(build, prompts) -> None:
    model = adapted(build("llama"), ["q_proj", "up_proj"])
    engine = HybridEngine(model.get_base_model())
    adapter = responses(engine, prompts)
    with engine.rollout():
        with model.disable_adapter():
            plain = responses(engine, prompts)
        assert responses(engine, prompts) == adapter != plain


def test_several_adapters_and_merging(build, hf_greedy, prompts) -> None:
    model = adapted(build("llama"), ["q_proj", "up_proj"])
    other = peft.LoraConfig(r=2, target_modules=["k_proj", "up_proj"], init_lora_weights=False)
    model.add_adapter("other", other)
    inner = model.get_base_model()
    engine = HybridEngine(inner)
    seen = []
    for active in ("default", "other"):
        model.set_adapter(active)
        seen.append(responses(engine, prompts))
        assert seen[-1] == [hf_greedy(inner, p, 16) for p in prompts]
    model.base_model.set_adapter(["default", "other"])
    seen.append(responses(engine, prompts))
    assert seen[-1] == [hf_greedy(inner, p, 16) for p in prompts]
    assert seen[0] != seen[1] != seen[2]
    model.merge_adapter()
    assert responses(engine, prompts) == [hf_greedy(inner, p, 16) for p in prompts]


def test_a_thousand_flips_leave_the_weights_alone(build) -> None:
    model = adapted(build("llama", torch_dtype=torch.bfloat16).to(torch.bfloat16), ["q_proj"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = HybridEngine(model.get_base_model())
    for _ in range(1000):
        with engine.rollout():
            pass
    engine.generate([[1, 2, 3]], GREEDY)
    engine.release()
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_dora_is_refused(build) -> None:
    model = adapted(build("llama"), ["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match=r"plain LoRA.*DoRA"):
        HybridEngine(model.get_base_model())


def test_accelerated_peft_model(build, prompts) -> None:
    model = adapted(build("llama"), ["q_proj", "down_proj"])
    ids = torch.tensor([prompts[4]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(input_ids=ids, **options)
    he.accelerate(model)
    assert torch.equal(model.generate(input_ids=ids, **options), expected)
    state = he.acceleration(model)
    assert state is not None
    assert state.served == 1
