"""The three steps."""

from rlhf.trainers.ppo import PPOTrainer
from rlhf.trainers.reward import RewardTrainer
from rlhf.trainers.rlhf_engine import RLHFEngine
from rlhf.trainers.sft import SFTTrainer

__all__ = ["PPOTrainer", "RLHFEngine", "RewardTrainer", "SFTTrainer"]
