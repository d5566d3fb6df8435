"""What a caller asks for, and what it gets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from transformers import StopStringCriteria

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens. The default samples from the whole distribution, as PPO wants it."""

    max_new_tokens: int = 128  # the response ends here at the latest
    min_new_tokens: int = 0  # no stop token before so many
    temperature: float = 1.0  # divides the logits; 0: greedy
    top_k: int = 0  # keep the k most probable tokens; 0: all
    top_p: float = 1.0  # keep the fewest tokens with this mass; 1: all
    min_p: float = 0.0  # drop tokens under min_p times the largest probability
    repetition_penalty: float = 1.0  # over 1: tokens of prompt and response get less probable
    n: int = 1  # responses to each prompt, one after the other in the rollout
    seed: int = 0  # with the prompt, and which of its responses it is, determines every draw
    stop_token_ids: tuple[int, ...] | None = None  # None: the model's generation_config
    stop_strings: StopStringCriteria | None = None  # texts that end a response, with a tokenizer

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be in [0, max_new_tokens={self.max_new_tokens}], got "
                f"{self.min_new_tokens}"
            )
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if not (self.temperature == 0 or 1e-30 <= self.temperature < math.inf):  # 1 / it is fp32
            raise ValueError(
                f"temperature must be 0 (greedy) or at least 1e-30, got {self.temperature}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2^31), got {self.seed}")
        if not isinstance(self.stop_strings, StopStringCriteria | None):
            raise ValueError(
                "stop_strings must be transformers.StopStringCriteria(tokenizer, [text, ...]), "
                f"which knows the tokens of the texts; got {self.stop_strings!r}"
            )


@dataclass
class Rollout:
    """B responses, n to each prompt, right-padded to the longest, T."""

    tokens: Tensor  # (B, T) int64; pad_token_id after the end
    logprobs: Tensor  # (B, T) fp32, of the whole distribution at the temperature; 0 after
    truncated_logprobs: Tensor  # (B, T) fp32, of the distribution sampled from; 0 after
    lengths: Tensor  # (B,) int64, the stop token included
    finish_reasons: list[FinishReason] = field(default_factory=list)  # B of them

    def response(self, index: int) -> list[int]:
        """The tokens of one response, the stop token included."""
        return self.tokens[index, : int(self.lengths[index])].tolist()
