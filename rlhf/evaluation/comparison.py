"""One policy measured, or two side by side on the same prompts: `rlhf eval`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import ComparisonConfig
from rlhf.data import DataBlend, load_tokenizer, other_tokenizer
from rlhf.data.formats import last_content
from rlhf.engines import PlainEngine
from rlhf.evaluation.policy import PolicyEvaluation, evaluate_policy
from rlhf.models import load_causal_lm, load_scorer
from rlhf.rewards import Reward, load_function


@dataclass(frozen=True)
class WinRate:
    """How often A's score is the higher one; a tie counts as half."""

    wins: int
    ties: int
    losses: int

    @property
    def prompts(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        return (self.wins + 0.5 * self.ties) / max(1, self.prompts)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (J. Am. Stat. Assoc. 22, 1927)."""
        n, z = max(1, self.prompts), 1.96
        centre = (self.rate + z**2 / (2 * n)) / (1 + z**2 / n)
        spread = math.sqrt(self.rate * (1 - self.rate) / n + z**2 / (4 * n**2))
        half = z * spread / (1 + z**2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Comparison:
    """What `rlhf eval` found; `b` and `win_rate` are None for one policy alone."""

    names: tuple[str, ...]
    prompts: list[str]
    a: PolicyEvaluation
    b: PolicyEvaluation | None
    win_rate: WinRate | None


def win_rate(a: list[float], b: list[float]) -> WinRate:
    """Of the first scores over the second, prompt by prompt; skipped ones (NaN) are left out."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if not (math.isnan(x) or math.isnan(y))]
    wins, losses = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
    return WinRate(wins, len(pairs) - wins - losses, losses)


def compare(config: ComparisonConfig) -> Comparison:
    """Load the models, let them answer the held-out prompts, and judge the answers.

    Raises ValueError where a model or function is not there, or tokenizers differ.
    """
    tokenizer = load_tokenizer(config.policy)
    reward = _reward(config, tokenizer)
    prompts = DataBlend(config.data, "prompts", seed=config.seed).encoded("test", tokenizer)
    prompts = prompts.select(range(min(config.prompts, len(prompts))))
    reference = _model(config, config.reference or config.against or config.policy, tokenizer)
    a = _evaluate(config, config.policy, reference, reward, tokenizer, prompts)
    b = None
    if config.against is not None:
        b = _evaluate(config, config.against, reference, reward, tokenizer, prompts)
    return Comparison(
        names=(config.policy, *([config.against] if config.against else [])),
        prompts=[last_content(prompt).strip() for prompt in prompts["prompt"]],
        a=a,
        b=b,
        win_rate=None if b is None else win_rate(a.scores, b.scores),
    )


def _evaluate(
    config: ComparisonConfig,
    path: str,
    reference: nn.Module,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
) -> PolicyEvaluation:
    metric = config.metric and load_function(config.metric, option="metric")
    found = evaluate_policy(
        PlainEngine(_model(config, path, tokenizer)), PlainEngine(reference), reward, tokenizer,
        prompts, max_new_tokens=config.max_new_tokens, metric=metric or None,
        temperature=config.temperature, seed=config.seed,
    )  # fmt: skip
    if all(map(math.isnan, found.scores)):
        raise ValueError(
            f"the reward skipped all {len(found.scores)} answers of {path} (None from every reward "
            "function): nothing is judged"
        )
    return found


def _reward(config: ComparisonConfig, tokenizer: PreTrainedTokenizerBase) -> Reward:
    model, own = None, None
    if config.reward_path is not None:
        own = other_tokenizer(config.reward_path, tokenizer)
        model = load_scorer(config.reward_path, own or tokenizer, dtype=_dtype(config))
    return Reward(
        [load_function(path, option="reward_functions") for path in config.reward_functions],
        weights=config.reward_weights,
        model=model,
        model_weight=config.reward_model_weight if config.reward_functions else 1.0,
        model_tokenizer=own,
    )


def _model(config: ComparisonConfig, path: str, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    _same_tokenizer(path, tokenizer, config.policy)
    return load_causal_lm(path, tokenizer, dtype=_dtype(config))


def _same_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase, policy: str) -> None:
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{path} and {policy} have different tokenizers: models that answer the same token ids "
            "can be compared"
        )


def _dtype(config: ComparisonConfig) -> torch.dtype:
    return getattr(torch, config.dtype)
