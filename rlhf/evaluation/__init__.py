"""What a policy is worth on held-out prompts, how fast it rolls out, and the report about it."""

from rlhf.evaluation.comparison import Comparison, WinRate, compare, win_rate
from rlhf.evaluation.comparison_report import write_comparison
from rlhf.evaluation.policy import PolicyEvaluation, evaluate_policy, try_metric
from rlhf.evaluation.report import RunReport, write_report
from rlhf.evaluation.throughput import Throughput, compare_with_hf_generate

__all__ = [
    "Comparison",
    "PolicyEvaluation",
    "RunReport",
    "Throughput",
    "WinRate",
    "compare",
    "compare_with_hf_generate",
    "evaluate_policy",
    "try_metric",
    "win_rate",
    "write_comparison",
    "write_report",
]
