"""The model that the first step starts from, and its adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.config.checks import fraction, positive


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (PEFT) instead of all weights, in every step."""

    r: int = 0
    """Rank of the adapters; 0: train all weights."""
    alpha: int = 16
    """Adapters are scaled by alpha / r."""
    dropout: float = 0.0
    """On the adapters' input, in SFT, reward model and DPO."""
    target_modules: list[str] | None = None
    """Names of the layers to adapt, such as [q_proj, v_proj]; default: every linear layer."""

    def __post_init__(self) -> None:
        positive(self, "alpha")
        fraction(self, "dropout")
        if self.r < 0:
            raise ValueError(f"lora.r must be 0 or more, got {self.r}")


@dataclass(frozen=True)
class ModelConfig:
    """The pretrained model that the first step starts from."""

    path: str | None = None
    """Folder or hub name of a Hugging Face causal language model."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; default: the model's."""
    chat_template: str | None = None
    """Jinja template of dialogues, or a file that holds it; default: the tokenizer's own."""
    eos_token: str | None = None
    """The token that ends a response; default: the tokenizer's own."""
    init: dict[str, Any] | None = None
    """Instead of path: the config of a randomly initialised model, with its model_type."""
    vocab_size: int = 1024
    """With init and no tokenizer: size of a byte-level BPE trained on the SFT data."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters; r above 0 switches them on."""

    def __post_init__(self) -> None:
        if self.path is not None and self.init is not None:
            raise ValueError("model.path and model.init exclude each other; give one")
        if self.init is not None and "model_type" not in self.init:
            raise ValueError('model.init needs a model_type, such as {"model_type": "llama"}')
        if self.eos_token is not None and self.path is None and self.tokenizer is None:
            raise ValueError(
                "model.eos_token names a token of a tokenizer: give model.tokenizer too, or leave "
                "it out; a tokenizer that is trained here has its own EOS"
            )
