"""What is measured on held-out prompts: in the report of a run, and by `rlhf eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.config.checks import not_negative, positive
from rlhf.config.data import DataConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """What the report measures on held-out prompts."""

    prompts: int = 256
    """Held-out prompts to answer, before and after PPO."""
    metric: str | None = None
    """module:function like a reward function: the true quality, where there is one."""
    samples: int = 5
    """Dialogues shown before and after."""
    compare_hf_generate: bool = True
    """Time plain HF generate next to the rollout, on the same model and prompts."""

    def __post_init__(self) -> None:
        positive(self, "prompts", "samples")


@dataclass(frozen=True)
class ComparisonConfig:
    """`rlhf eval`: one policy measured, or two side by side, on held-out prompts."""

    policy: str
    """Folder or hub name of the model to judge, A."""
    against: str | None = None
    """Another model, B: how often A's answer is the better one."""
    reference: str | None = None
    """The model that the KL is measured from; default: against, else policy."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts; their held-out side."""
    prompts: int = 256
    """At most so many prompts."""
    reward_path: str | None = None
    """The reward model that judges."""
    reward_functions: list[str] = field(default_factory=list)
    """Python functions that judge: module:function or path.py:function."""
    reward_weights: list[float] | None = None
    """Of the reward functions, in their order; default: 1 each."""
    reward_model_weight: float = 1.0
    """Of the reward model, where there are functions too."""
    metric: str | None = None
    """Like a reward function: the true quality, where there is one."""
    max_new_tokens: int = 128
    """Longest answer."""
    temperature: float = 1.0
    """Of sampling; 0: always the likeliest token."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    samples: int = 5
    """Answers shown side by side."""
    seed: int = 0
    """Of sampling."""
    output_dir: str = "runs/eval"
    """Where eval.md, eval.json and eval.png go."""

    def __post_init__(self) -> None:
        positive(self, "prompts", "max_new_tokens", "samples")
        not_negative(self, "temperature")
        if self.reward_path is None and not self.reward_functions:
            raise ValueError("nothing judges: give reward_path or reward_functions")
