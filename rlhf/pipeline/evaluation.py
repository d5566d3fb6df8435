"""The policy before and after training, on held-out prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from hybrid_engine import EngineConfig
from rlhf import distributed
from rlhf.config import DPOConfig, PPOConfig
from rlhf.data.formats import last_content
from rlhf.engines import Engine
from rlhf.evaluation import compare_with_hf_generate, evaluate_policy, try_metric
from rlhf.pipeline.data import data_of, prompts
from rlhf.pipeline.workspace import Workspace
from rlhf.rewards import Reward


def heldout_prompts(
    run: Workspace,
    step: PPOConfig | DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *models: nn.Module | None,
    option: str,
) -> Dataset:
    """The encoded prompts of `evaluate`: what could fail there fails here, before training.

    Raises ValueError for prompts that are too long for a model or too few, or a bad metric.
    """
    data = data_of(run.config, step.data, "prompts")
    rows = prompts(
        data, "test", tokenizer, *models, option=option, max_new_tokens=step.max_new_tokens
    )
    rows = rows.select(range(min(run.config.evaluation.prompts, len(rows))))
    if len(rows) < (ranks := distributed.world_size()):
        raise ValueError(
            f"{len(rows)} held-out prompts for {ranks} processes: raise evaluation.prompts or "
            f"{option}.heldout_rows"
        )
    try_metric(run.metric, rows)
    return rows


def evaluate(
    run: Workspace,
    policy: Engine,
    sft: Engine,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    step: PPOConfig | DPOConfig,
) -> None:
    """Fill the report: scores, quality and KL, dialogues, and the speed beside HF `generate`."""
    evaluation, report = run.config.evaluation, run.report
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
        batch = list(rows["input_ids"])[: step.batch_size]
        with policy.gathered():  # for HF's generate; ranks may share the weights of ours
            report.throughput = compare_with_hf_generate(
                policy.module, tokenizer, batch, max_new_tokens=step.max_new_tokens
            )
