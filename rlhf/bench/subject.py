"""The model that is measured, and the prompts that it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf.plan import ModelShape, find_shape
from rlhf.plan.known import known_config
from rlhf.plan.shapes import from_config

FIRST_TOKEN = 3  # below are pad, BOS and EOS
PAD, EOS = 0, 2


@dataclass(frozen=True)
class Subject:
    """A Hugging Face causal language model in eval mode, and its shape."""

    name: str
    model: Any
    shape: ModelShape

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def weight_bytes(self) -> int:
        """What a decode step reads of the weights: an embedding that is only looked up, not."""
        looked_up = 0 if self.shape.tied else self.shape.vocab * self.shape.hidden
        positions = self.shape.positions * self.shape.hidden
        return (self.shape.parameters - looked_up - positions) * self.dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        """Of one cached token."""
        return self.shape.kv_elements * self.dtype.itemsize


def load_subject(
    name: str, *, dtype: torch.dtype | None = None, device: str | None = None, seed: int = 0
) -> Subject:
    """A known shape with random weights, or a checkpoint's folder or hub name.

    The default is bf16 on a GPU where there is one, and fp32 on a CPU.
    """
    from transformers import AutoModelForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    config = known_config(name)
    if config is not None:
        torch.manual_seed(seed)
        with torch.device(device):
            drawn = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        return Subject(name, drawn, find_shape(name))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        model = model.to(device).eval()
    except OSError as error:
        find_shape(name)  # raises with the known names if it is no folder either
        raise ValueError(f"no weights in {name}: {error}") from error
    return Subject(name, model, from_config(model.config, name))


@dataclass(frozen=True)
class Workload:
    """What is generated."""

    batch: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 64
    natural: bool = False  # ragged prompts, responses that end by themselves

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def prompts(self, vocab: int, *, seed: int = 0) -> list[list[int]]:
        """Random token ids; natural ones have a quarter of the length to all of it."""
        generator = torch.Generator().manual_seed(seed)
        lengths = [self.prompt_tokens] * self.batch
        if self.natural:
            shortest = max(1, self.prompt_tokens // 4)
            bounds = (shortest, self.prompt_tokens + 1)
            lengths = torch.randint(*bounds, (self.batch,), generator=generator).tolist()
        return [
            torch.randint(FIRST_TOKEN, vocab, (length,), generator=generator).tolist()
            for length in lengths
        ]

    def stop_token_ids(self, vocab: int) -> tuple[int, ...]:
        """For natural lengths as many stop tokens as end a response after half of new_tokens.

        Random weights sample nearly evenly, so each token ends one with the share of the stop
        tokens in the vocabulary. Empty for fixed lengths.
        """
        if not self.natural:
            return ()
        count = max(1, round(2 * vocab / self.new_tokens))
        return tuple(range(FIRST_TOKEN, FIRST_TOKEN + min(count, vocab // 2)))
