"""What a policy is worth on held-out prompts, how fast it rolls out, and the report about it."""

from rlhf.evaluation.policy import PolicyEvaluation, evaluate_policy
from rlhf.evaluation.report import RunReport, write_report
from rlhf.evaluation.throughput import Throughput, compare_with_hf_generate

__all__ = [
    "PolicyEvaluation",
    "RunReport",
    "Throughput",
    "compare_with_hf_generate",
    "evaluate_policy",
    "write_report",
]
