"""Every option of the pipeline: typed, checked, with the sentence that `--help` prints.

A file for each section of a run's YAML; `run` has them all, `checks` what their numbers must be.
"""

from rlhf.config.checkpoint import CheckpointConfig
from rlhf.config.data import DataConfig, SourceConfig
from rlhf.config.dpo import DPOConfig
from rlhf.config.evaluation import ComparisonConfig, EvaluationConfig
from rlhf.config.model import LoraConfig, ModelConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.reward import RewardConfig
from rlhf.config.rollout import RolloutConfig
from rlhf.config.run import STEPS, RunConfig
from rlhf.config.sft import SFTConfig
from rlhf.config.training import Offload, OptimizerConfig, ShardingConfig, TrainingConfig, ZeroStage

__all__ = [
    "STEPS",
    "CheckpointConfig",
    "ComparisonConfig",
    "DPOConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "Offload",
    "OptimizerConfig",
    "PPOConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "ShardingConfig",
    "SourceConfig",
    "TrainingConfig",
    "ZeroStage",
]
