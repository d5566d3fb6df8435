"""Step 3."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.config.checks import fraction, not_negative, positive
from rlhf.config.data import DataConfig
from rlhf.config.training import OptimizerConfig


@dataclass(frozen=True)
class PPOConfig:
    """Step 3, proximal policy optimisation and the group methods."""

    algorithm: Literal["ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp"] = "ppo"
    """Baseline of the advantages: a critic (ppo), or the other responses to the same prompt."""
    samples_per_prompt: int = 1
    """Responses to each prompt; group methods, all but ppo, need 2 or more."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    actor_path: str | None = None
    """The policy to start from, also the reference; default: the SFT model in the output folder."""
    reward_path: str | None = None
    """The reward model; default: the one in the output folder, or none with reward_functions."""
    reward_functions: list[str] = field(default_factory=list)
    """Python functions that score: module:function or path.py:function."""
    reward_weights: list[float] | None = None
    """Of the reward functions, in their order; default: 1 each."""
    reward_model_weight: float = 1.0
    """Of the reward model, where there are functions too."""
    reward_overlap: bool = True
    """Call functions on each response as it ends; false: once with the whole batch."""
    critic_path: str | None = None
    """The critic's start; default: the reward model, else the actor with a score head of zeros."""
    actor_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the actor."""
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the critic."""
    iterations: int = 100
    """Rounds of rollout and update."""
    batch_size: int = 64
    """Prompts in a rollout."""
    mini_batches: int = 1
    """Optimizer steps into which each epoch over a rollout is divided."""
    epochs: int = 1
    """Passes over each rollout."""
    micro_batch_size: int = 32
    """Sequences in a forward pass; memory, not results, depends on it."""
    max_new_tokens: int = 128
    """Longest response."""
    temperature: float = 1.0
    """Of sampling, and of every log-prob."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: all. Log-probs stay of the whole distribution."""
    top_p: float = 1.0
    """Sample from the fewest tokens with this mass; 1: all."""
    kl_coef: float = 0.05
    """Weight of the KL penalty."""
    kl_place: Literal["reward", "loss"] | None = None
    """Where the KL penalty goes; default: the loss for grpo and dr_grpo, else the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Of the KL from the reference; default: k1 in the reward, k3 in the loss."""
    kl_limit: float = 10.0
    """Nats from the reference per response token, mean of a rollout, above which a run stops."""
    kl_target: float | None = None
    """KL per response at which an adaptive kl_coef aims; default: kl_coef stays fixed."""
    kl_horizon: int = 10000
    """Responses over which the adaptive kl_coef moves."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    cliprange: float = 0.2
    """Clip of the probability ratio."""
    dual_clip: float | None = None
    """Bound, in advantages, of the loss of a token with a negative advantage; above 1."""
    aggregation: Literal["token", "sequence", "constant"] | None = None
    """Mean of the policy loss; default: sequence for grpo, constant for dr_grpo, else token."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    cliprange_value: float = 0.2
    """Clip of the value update."""
    reward_clip: float = 5.0
    """Scores are clipped to +- this."""
    whiten_rewards: bool = False
    """Scale the shaped rewards of a rollout to variance 1, keeping their mean; ppo only."""
    missing_eos_penalty: float = 1.0
    """Taken from the score of a response that does not end by itself."""
    critic_warmup: int = 0
    """First iterations in which only the critic learns."""
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """Old log-probs: as sampled, or from one more training forward."""
    importance_cap: float | None = None
    """Truncated importance sampling: most by which a token sampled too seldom is weighted up."""
    ptx_coef: float = 0.0
    """Weight of the language-model loss on ptx_data, as in InstructGPT's PPO-ptx."""
    ptx_data: DataConfig | None = None
    """Text or demonstrations for ptx_coef; default: those of SFT."""
    ema_decay: float | None = None
    """Of an fp32 moving average of the actor, saved as actor_ema; default: none."""

    def __post_init__(self) -> None:
        positive(
            self, "iterations", "batch_size", "mini_batches", "epochs", "micro_batch_size",
            "max_new_tokens", "temperature", "cliprange", "cliprange_value", "reward_clip",
            "kl_horizon", "kl_limit", "kl_target", "samples_per_prompt",
        )  # fmt: skip
        fraction(self, "gamma", "lam")
        not_negative(self, "kl_coef", "entropy_coef", "ptx_coef", "top_k", "critic_warmup")
        if self.mini_batches > self.batch_size * self.samples_per_prompt:
            raise ValueError(
                f"mini_batches ({self.mini_batches}) must not exceed batch_size "
                f"({self.batch_size}) * samples_per_prompt ({self.samples_per_prompt})"
            )
        self._check_algorithm()
        self._check_options()

    def _check_algorithm(self) -> None:
        if self.algorithm == "ppo":
            return
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"{self.algorithm} compares the responses to one prompt: samples_per_prompt must "
                f"be 2 or more, got {self.samples_per_prompt}"
            )
        for name, off in (("whiten_rewards", False), ("critic_warmup", 0), ("critic_path", None)):
            if getattr(self, name) != off:
                raise ValueError(f"{name} is for ppo; {self.algorithm} has no critic")

    def _check_options(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.kl_estimator == "k1" and self.kl_place == "loss":
            raise ValueError("k1 as a loss has no gradient on average: take k2 or k3")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")
        positive(self, "importance_cap")
        if self.importance_cap is not None and self.old_logprobs != "recompute":
            raise ValueError(
                "importance_cap compares the training forward with the rollout: set "
                "old_logprobs to recompute"
            )
        if self.critic_warmup >= self.iterations:
            raise ValueError(
                f"critic_warmup ({self.critic_warmup}) must be below iterations "
                f"({self.iterations}): the actor would never learn"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), got {self.ema_decay}")
        if self.reward_weights is not None and len(self.reward_weights) != len(
            self.reward_functions
        ):
            raise ValueError(
                f"{len(self.reward_weights)} reward_weights for {len(self.reward_functions)} "
                "reward_functions: give one for each"
            )
