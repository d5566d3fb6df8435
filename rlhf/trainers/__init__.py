"""The three steps."""

from rlhf.trainers.ppo import PPOTrainer, RLHFEngine
from rlhf.trainers.reward import RewardTrainer
from rlhf.trainers.sft import SFTTrainer

__all__ = ["PPOTrainer", "RLHFEngine", "RewardTrainer", "SFTTrainer"]
