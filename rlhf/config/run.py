"""One file for all steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from rlhf.config.checkpoint import CheckpointConfig
from rlhf.config.data import DataConfig, SourceConfig
from rlhf.config.dpo import DPOConfig
from rlhf.config.evaluation import EvaluationConfig
from rlhf.config.model import ModelConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.reward import RewardConfig
from rlhf.config.rollout import RolloutConfig
from rlhf.config.sft import SFTConfig
from rlhf.config.training import TrainingConfig, ZeroStage

STEPS = ("demonstrations", "preferences", "prompts")  # what the three read, in data_split's order


@dataclass(frozen=True)
class RunConfig:
    """One file for all steps; each step reads its own section."""

    output_dir: str = "runs/rlhf"
    """Where models, metrics and the report go."""
    seed: int = 0
    """Of everything random."""
    zero_stage: ZeroStage | None = None
    """ZeRO stage (0 to 3) of all models; default: 2 on several processes, plain torch on one."""
    data_path: list[str] | None = None
    """Datasets of all three steps, in place of the names in their sections."""
    data_split: list[float] | str | None = None
    """Shares of the prompts for SFT, reward model (or DPO) and PPO, such as 2,4,4: no prompt in two
    steps. Default: each step has all of its data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The pretrained model."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Memory and processes."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Step 1."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Step 2."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Step 3."""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    """In place of steps 2 and 3."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The report."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The actor's generation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints to resume from."""

    def __post_init__(self) -> None:
        fractions = self.fractions
        if fractions is not None and (
            len(fractions) != len(STEPS) or min(fractions) < 0 or sum(fractions) <= 0
        ):
            raise ValueError(
                "data_split must be three shares of 0 or more, such as 2,4,4 for SFT, reward model"
                f" and PPO, got {self.data_split!r}"
            )
        ppo = self.ppo
        mixes_sft = ppo.ptx_coef > 0 and ppo.ptx_data is None
        if mixes_sft and self.is_synthetic(self.sft.data) and not self.is_synthetic(ppo.data):
            raise ValueError(
                "ppo.ptx_coef would mix synthetic text into PPO on other prompts: give "
                "ppo.ptx_data or sft.data"
            )

    @property
    def fractions(self) -> list[float] | None:
        """data_split as numbers."""
        return None if self.data_split is None else _numbers(self.data_split)

    def data_of(self, section: DataConfig) -> DataConfig:
        """A step's data section, with the datasets of data_path where that is given."""
        if self.data_path is None:
            return section
        mix = [SourceConfig(name, columns=section.columns) for name in self.data_path]
        return dataclasses.replace(section, mix=mix)

    def is_synthetic(self, section: DataConfig) -> bool:
        """Whether all of a step's data are the made-up instructions, the default."""
        return all(source.name == "synthetic" for source in self.data_of(section).sources)


def _numbers(text: list[float] | str) -> list[float]:
    """The text "2,4,4" as numbers; [] if it holds something else."""
    try:
        return [float(x) for x in (text.split(",") if isinstance(text, str) else text)]
    except ValueError:
        return []
