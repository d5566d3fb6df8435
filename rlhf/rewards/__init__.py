"""Where scores come from: a reward model, Python functions, or a weighted sum of both.

A reward function is `def f(prompts, completions, **columns) -> list[float | None]`: prompts and
completions in the form of the data (strings or message lists), columns the data's other columns.
None skips a completion. `gsm8k` has one for answers that end in a number.
"""

from rlhf.rewards.functions import FunctionError, RewardFunction, call_function, load_function
from rlhf.rewards.reward import PendingScores, Reward, Scorer, Scores, model_scorer

__all__ = [
    "FunctionError",
    "PendingScores",
    "Reward",
    "RewardFunction",
    "Scorer",
    "Scores",
    "call_function",
    "load_function",
    "model_scorer",
]
