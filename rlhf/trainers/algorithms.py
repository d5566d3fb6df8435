"""What tells the algorithms apart: whose baseline, which mean, and where the KL penalty goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from rlhf.advantages import AdvantageFunction, dr_grpo, grpo, reinforce_pp, rloo
from rlhf.config import PPOConfig
from rlhf.kl import ESTIMATORS
from rlhf.losses import Aggregation


@dataclass(frozen=True)
class Algorithm:
    """One row of the table."""

    advantage: AdvantageFunction | None  # None: GAE, with a critic
    aggregation: Aggregation
    kl_in_loss: bool = False
    kl: Callable[[Tensor, Tensor], Tensor] = ESTIMATORS["k1"]  # (logprobs, ref_logprobs) -> (B, T)


ALGORITHMS = {
    "ppo": Algorithm(None, "token"),
    "grpo": Algorithm(grpo, "sequence", kl_in_loss=True),
    "dr_grpo": Algorithm(dr_grpo, "constant", kl_in_loss=True),
    "rloo": Algorithm(rloo, "token"),
    "reinforce_pp": Algorithm(reinforce_pp, "token"),
}


def choose_algorithm(config: PPOConfig, advantage: AdvantageFunction | None = None) -> Algorithm:
    """The row of `config.algorithm`, with what the config, or `advantage`, sets otherwise."""
    row = ALGORITHMS[config.algorithm]
    in_loss = row.kl_in_loss if config.kl_place is None else config.kl_place == "loss"
    estimator = config.kl_estimator or ("k3" if in_loss else "k1")
    if in_loss and estimator == "k1":
        raise ValueError(f"{config.algorithm} has its KL penalty in the loss: take k2 or k3")
    return replace(
        row,
        advantage=advantage or row.advantage,
        aggregation=config.aggregation or row.aggregation,
        kl_in_loss=in_loss,
        kl=ESTIMATORS[estimator],
    )
