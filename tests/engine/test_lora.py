"""PEFT's adapters are active in generation and never touch the weights under them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hybrid_engine as he
from hybrid_engine import HybridEngine, SamplingParams

peft = pytest.importorskip("peft")

GREEDY = SamplingParams(max_new_tokens=16, temperature=0.0)
TARGETS = {
    "llama-all": ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]),
    "llama-some": ("llama", ["q_proj", "v_proj", "down_proj"]),
    "opt": ("opt", ["q_proj", "out_proj", "fc1", "fc2"]),
    "gpt2": ("gpt2", ["c_attn", "c_proj", "c_fc"]),
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
