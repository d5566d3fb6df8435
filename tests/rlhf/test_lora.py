"""Adapters instead of all weights: in every step, off for the reference, and on disk."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hybrid_engine import HybridEngine, SamplingParams
from rlhf.config import (
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
)
from rlhf.models import (
    adapters_off,
    add_adapters,
    has_adapters,
    load_causal_lm,
    load_scorer,
    reference_of,
    response_logprobs,
    save_model,
    sequence_scores,
    whole_model,
)
from rlhf.pipeline import Pipeline

LORA = LoraConfig(r=4, alpha=8)
IDS = torch.tensor([[3, 17, 99, 254, 7, 41]])


def trained(model: nn.Module, config: LoraConfig = LORA, *, seed: int = 7) -> nn.Module:
    """With adapters that are no longer zero."""
    add_adapters(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def logprobs(model: nn.Module) -> torch.Tensor:
    lengths = torch.tensor([2]), torch.tensor([4])
    with torch.no_grad():
        return response_logprobs(model, IDS, *lengths, temperature=1.0)[0]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_only_adapters_are_trained_and_start_as_nothing(causal_lm, family: str) -> None:
    model, plain = causal_lm(family), causal_lm(family)
    add_adapters(model, LORA)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(".lora_" in name for name in names)
    assert torch.equal(logits(model), logits(plain))
    assert not has_adapters(plain)


def test_rank_0_leaves_the_model_alone(causal_lm) -> None:
    model = causal_lm()
    assert add_adapters(model, LoraConfig()) is model
    assert not has_adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_targets_scale_and_dropout(causal_lm) -> None:
    config = LoraConfig(r=2, alpha=6, dropout=0.5, target_modules=["q_proj", "down_proj"])
    model: Any = trained(causal_lm(), config)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "down_proj"}
    layer, x = model.model.layers[0].mlp.down_proj, torch.randn(3, 64)
    low = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = layer.base_layer(x) + 3.0 * x @ low.T
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(model.train().model.layers[0].mlp.down_proj(x), expected)


def test_an_unknown_target_is_named(causal_lm) -> None:
    with pytest.raises(ValueError, match=r"model\.lora\.target_modules.*nowhere"):
        add_adapters(causal_lm(), LoraConfig(r=2, target_modules=["nowhere"]))


def test_the_score_head_is_trained_whole(scorer) -> None:
    model = add_adapters(scorer(), LORA)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in names if ".lora_" not in name} == {"score.weight"}


def test_the_reference_is_the_actor_with_adapters_off(causal_lm) -> None:
    """No second copy: not one parameter of its own."""
    actor, plain = causal_lm(), causal_lm()
    add_adapters(actor, LORA)
    reference = reference_of(actor)
    assert list(reference.parameters()) == []
    for name, parameter in actor.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    assert torch.equal(logprobs(reference), logprobs(plain))
    assert torch.equal(logits(reference), logits(plain))
    assert not torch.allclose(logprobs(actor), logprobs(plain))
    with whole_model(reference) as policy:
        assert policy is actor
        assert torch.equal(logits(policy), logits(plain))
    trainable = {name for name, p in actor.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trainable)
    assert trainable


def test_adapters_come_back_on_after_an_error(causal_lm) -> None:
    model = trained(causal_lm())
    before = logits(model)
    with pytest.raises(RuntimeError, match="midway"), adapters_off(model):
        raise RuntimeError("midway")
    assert torch.equal(logits(model), before)


def test_the_rollout_has_the_adapters(causal_lm) -> None:
    model = trained(causal_lm())
    rollout = HybridEngine(model).generate([IDS[0].tolist()], SamplingParams(max_new_tokens=8))
    ids = torch.tensor([[*IDS[0].tolist(), *rollout.response(0)]])
    lengths = torch.tensor([6]), torch.tensor([len(rollout.response(0))])
    with torch.no_grad():
        found, _ = response_logprobs(model, ids, *lengths, temperature=1.0)
    torch.testing.assert_close(rollout.logprobs, found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_on_disk_the_adapters_are_in_the_weights_and_beside_them(
    causal_lm, tokenizer, tmp_path: Path, family: str
) -> None:
    save_model(causal_lm(family), tokenizer, tmp_path / "base")
    model = trained(load_causal_lm(str(tmp_path / "base"), tokenizer, dtype=torch.float32).eval())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_model(model, tokenizer, tmp_path / "sft", base=str(tmp_path / "base"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    torch.testing.assert_close(logits(whole), logits(model))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "sft" / "adapter")
    assert torch.equal(logits(adapted), logits(model))
    config = json.loads((tmp_path / "sft" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["r"] == 4


def test_a_reward_model_on_disk(causal_lm, tokenizer, tmp_path: Path) -> None:
    save_model(causal_lm(), tokenizer, tmp_path / "sft")
    model: Any = load_scorer(
        str(tmp_path / "sft"), tokenizer, dtype=torch.float32, fresh_head=True
    ).eval()
    trained(model)
    torch.nn.init.normal_(model.score.weight)
    save_model(model, tokenizer, tmp_path / "reward", base=str(tmp_path / "sft"))
    lengths = torch.tensor([6])
    with torch.no_grad():
        expected = sequence_scores(model, IDS, lengths)
        whole = load_scorer(str(tmp_path / "reward"), tokenizer, dtype=torch.float32).eval()
        torch.testing.assert_close(sequence_scores(whole, IDS, lengths), expected)
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sft", num_labels=1)
        adapted: Any = peft.PeftModel.from_pretrained(base, tmp_path / "reward" / "adapter").eval()
        found = adapted(input_ids=IDS).logits[:, 0]  # HF reads the last token that is not padding
        torch.testing.assert_close(found, expected)


def test_all_steps_train_adapters_alone(causal_lm, tokenizer, tmp_path: Path) -> None:
    save_model(causal_lm(), tokenizer, tmp_path / "base")
    fast = OptimizerConfig(learning_rate=1e-2)
    data = DataConfig(rows=32, heldout_rows=16, max_length=120)
    config = RunConfig(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tmp_path / "base"), lora=LORA),
        sft=SFTConfig(data=data, optimizer=fast),
        reward=RewardConfig(data=data, optimizer=fast),
        ppo=PPOConfig(
            data=data, actor_optimizer=fast, critic_optimizer=fast, iterations=2, batch_size=8,
            max_new_tokens=8,
        ),
        evaluation=EvaluationConfig(prompts=8, compare_hf_generate=False),
    )  # fmt: skip
    report = Pipeline(config, Console(file=io.StringIO())).run()
    assert report.before is not None
    assert report.after is not None
    assert report.before.kl == pytest.approx(0.0, abs=1e-3)
    assert abs(report.after.kl) > 0.001  # of eight responses, so of either sign
    folders = {"sft": "base", "reward": "sft", "actor": "sft", "critic": "reward"}
    for name, base in folders.items():
        adapter = tmp_path / "run" / name / "adapter" / "adapter_config.json"
        assert Path(json.loads(adapter.read_text())["base_model_name_or_path"]).name == base
    history = (tmp_path / "run" / "ppo.jsonl").read_text().splitlines()
    first = json.loads(history[0])
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)  # adapters are zero at the start
    assert first["sampling/logp_difference/max"] < 1e-4
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).get_input_embeddings().weight
        for name in ("base", "run/actor")
    )
    assert torch.equal(after, before)
