"""What the engine tests share: small models that listen to their attention, HF's answer, poison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid_engine import ops
from hybrid_engine.cache import KVCache
from hybrid_engine.generation.rows import Rows

Builder = Callable[..., nn.Module]
HFGreedy = Callable[[nn.Module, list[int], int], list[int]]

ILLEGAL_BLOCK = 2**30
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
# H * head_dim is not hidden_size, three query heads share a kv head.
LLAMA = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, **SPECIAL,
}  # fmt: skip
GPT = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 128, **SPECIAL,
}  # fmt: skip
OPT = {
    "vocab_size": 97, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 80,
    "num_hidden_layers": 2, "num_attention_heads": 6, "max_position_embeddings": 128, **SPECIAL,
}  # fmt: skip

# Tied, a large embedding_scale lets the last token alone decide the next.
GEMMA = {**LLAMA, "tie_word_embeddings": False}
CONFIGS = {
    "gemma2": GEMMA,
    "opt": OPT,
    "gpt2": GPT,
    "gpt_neox": {**GPT, "intermediate_size": 80},
    "bloom": GPT,
    "phi": {name: value for name, value in LLAMA.items() if name != "head_dim"},
}


def _build(family: str, **options: Any) -> nn.Module:
    """A random model, scaled until what it says depends on every token before."""
    attention = options.pop("attn_implementation", None)
    config = AutoConfig.for_model(family, **{**CONFIGS.get(family, LLAMA), **options})
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise * 2 / parameter.shape[1] ** 0.5
        else:  # norm weights stay near 1, biases near 0
            parameter.data += 0.2 * noise
    return model.eval()


def _hf_greedy(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The response of HF `generate` to one prompt, alone."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    return output[0, len(prompt) :].tolist()


@pytest.fixture
def build() -> Builder:
    return _build


@pytest.fixture
def hf_greedy() -> HFGreedy:
    return _hf_greedy


@pytest.fixture
def prompts() -> list[list[int]]:
    """Ragged: one token, one block of 16 exactly, one more than a block, and in between."""
    generator = torch.Generator().manual_seed(1)

    def random_prompt(length: int) -> list[int]:
        return [1, *torch.randint(3, 97, (length - 1,), generator=generator).tolist()]

    return [random_prompt(length) for length in (5, 1, 16, 17, 40, 2)]


@pytest.fixture
def step_by_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function while the runtime counts as missing."""

    def call(function: Any) -> Any:
        with monkeypatch.context() as patch:
            without = dataclasses.replace(ops.NATIVE, runtime=None, runtime_reason="not wanted")
            patch.setattr(ops, "NATIVE", without)
            return function()

    return call


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unused cache is NaN and unused block-table entries are illegal, so reading them shows."""
    make_cache, make_rows = KVCache.__init__, Rows.__init__

    def poisoned_cache(self: KVCache, **options: Any) -> None:
        make_cache(self, **options)
        for keys, values in self.layers:
            keys.fill_(float("nan"))
            values.fill_(float("nan"))

    def poisoned_rows(self: Rows, **options: Any) -> None:
        make_rows(self, **options)
        self.block_tables.fill_(ILLEGAL_BLOCK)

    monkeypatch.setattr(KVCache, "__init__", poisoned_cache)
    monkeypatch.setattr(Rows, "__init__", poisoned_rows)


@pytest.fixture
def model(build: Builder) -> Any:
    return build("llama")
