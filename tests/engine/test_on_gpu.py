"""Whole rollouts on a GPU: kernels, graphs and loop together, by the engine's own check."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hybrid_engine import HybridEngine, SamplingParams
from hybrid_engine.self_check import self_check

DEVICE = "cuda"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "opt", "gpt2", "gpt_neox", "bloom"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_says_what_the_model_says(build, family: str, dtype: str) -> None:
    model = build(family).to(DEVICE, DTYPES[dtype])
    verdict = self_check(model, HybridEngine(model))
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_adapters_too(build, dtype: str) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted: Any = get_peft_model(build("llama"), config).to(DEVICE, DTYPES[dtype]).eval()
    model = adapted.get_base_model()
    verdict = self_check(model, HybridEngine(model))
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("count", [1, 5, 33], ids=lambda n: f"B{n}")
def test_a_batch_of_any_size_is_recorded(build, prompts, count: int) -> None:
    """Greedy tokens of each row are those that it has alone, up to the first near tie."""
    model = build("llama").to(DEVICE)
    engine, many = HybridEngine(model), [prompts[i % len(prompts)] for i in range(count)]
    params = SamplingParams(max_new_tokens=20, temperature=0.0, stop_token_ids=())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "decoding without a CUDA graph")
        together = engine.generate(many, params)
    agreed = 0
    for i, prompt in enumerate(many[: len(prompts)]):
        alone = engine.generate([prompt], params)
        agreed += int((alone.tokens[0] == together.tokens[i]).sum())
    assert agreed >= 0.9 * 20 * min(count, len(prompts))


def test_bad_logits_name_the_prompt(build) -> None:
    model = build("opt").to(DEVICE)
    learned = model.model.decoder.embed_positions
    learned.weight.data[learned.offset + 12] = math.nan
    engine = HybridEngine(model)
    params = SamplingParams(max_new_tokens=30, stop_token_ids=())
    with pytest.raises(ValueError, match="logits: NaN"):
        engine.generate([[1, 5, 6], [1, *range(3, 11)]], params)
