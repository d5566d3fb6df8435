"""The three steps, and DPO in place of two of them."""

from rlhf.trainers.dpo import DPOTrainer
from rlhf.trainers.ppo import PPOTrainer
from rlhf.trainers.reward import RewardTrainer, calibration
from rlhf.trainers.rlhf_engine import RLHFEngine
from rlhf.trainers.sft import SFTTrainer

__all__ = ["DPOTrainer", "PPOTrainer", "RLHFEngine", "RewardTrainer", "SFTTrainer", "calibration"]
