"""The policy before and after training, on held-out prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hybrid_engine import EngineConfig
from rlhf.config import DPOConfig, PPOConfig
from rlhf.data.formats import last_content
from rlhf.engines import Engine
from rlhf.evaluation import compare_with_hf_generate, evaluate_policy
from rlhf.pipeline.workspace import Workspace
from rlhf.rewards import Reward


def evaluate(
    run: Workspace,
    policy: Engine,
    sft: Engine,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    step: PPOConfig | DPOConfig,
) -> None:
    """Fill the report: scores, quality and KL, dialogues, and the speed beside HF `generate`.

    Args:
        rows: the encoded prompts, of which so many are taken as are asked for.
    """
    evaluation, report = run.config.evaluation, run.report
    rows = rows.select(range(min(evaluation.prompts, len(rows))))
    options: dict[str, Any] = {
        "max_new_tokens": step.max_new_tokens,
        "metric": run.metric,
        "engine_config": EngineConfig(**dataclasses.asdict(run.config.rollout)),
    }
    report.before = evaluate_policy(sft, sft, reward, tokenizer, rows, **options)
    report.after = evaluate_policy(policy, sft, reward, tokenizer, rows, **options)
    answers = zip(
        rows["prompt"], report.before.completions, report.after.completions, strict=False
    )  # fmt: skip
    report.samples = [
        (last_content(prompt).strip(), before.strip(), after.strip())
        for prompt, before, after in list(answers)[: evaluation.samples]
    ]
    if evaluation.compare_hf_generate:
        prompts = list(rows["input_ids"])[: step.batch_size]
        with policy.gathered():  # for HF's generate; ranks may share the weights of ours
            report.throughput = compare_with_hf_generate(
                policy.module, tokenizer, prompts, max_new_tokens=step.max_new_tokens
            )
