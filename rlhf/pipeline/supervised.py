"""The steps that learn from rows: SFT, the reward model, and DPO."""

from __future__ import annotations

from datasets import Dataset

from rlhf.data import load_tokenizer
from rlhf.models import add_adapters, load_causal_lm, load_scorer, parameter_count, positions_of
from rlhf.pipeline.data import data_of, normalisation_answers, training_rows
from rlhf.pipeline.evaluation import evaluate, heldout_prompts
from rlhf.pipeline.models import first_model
from rlhf.pipeline.workspace import Workspace
from rlhf.rewards import Reward
from rlhf.trainers import DPOTrainer, RewardTrainer, SFTTrainer, calibration


def train_sft(run: Workspace) -> None:
    """Step 1: from the pretrained model to `sft`."""
    config = run.config.sft
    with run.step("sft", "SFT"):
        data = data_of(run.config, config.data, "demonstrations")
        model, tokenizer = first_model(run.config.model, data, dtype=run.dtype)
        run.models_are_ready(parameter_count(model))
        rows, heldout = training_rows(data, tokenizer, model, option="sft.data")
        trainer = SFTTrainer(model, tokenizer, config, seed=run.config.seed, engines=run.engines)
        run.report.sft = _train(run, "sft", trainer, rows, heldout)
        run.save(trainer.engine, tokenizer, "sft", base=run.config.model.path)
    run.end("sft", sft=run.report.sft)


def train_reward(run: Workspace) -> None:
    """Step 2: from the SFT model, or another, to `reward`."""
    config = run.config.reward
    with run.step("reward", "reward model"):
        path = config.model_path or run.from_step("sft", "reward.model_path")
        tokenizer = load_tokenizer(path)
        model = load_scorer(path, tokenizer, dtype=run.dtype, fresh_head=True)
        add_adapters(model, run.config.model.lora)
        run.models_are_ready(parameter_count(model))
        data = data_of(run.config, config.data, "preferences")
        rows, heldout = training_rows(data, tokenizer, model, option="reward.data")
        trainer = RewardTrainer(model, tokenizer, config, seed=run.config.seed, engines=run.engines)
        found = _train(run, "reward", trainer, rows, heldout)
        run.report.calibration = calibration(trainer.differences(heldout))
        answers = normalisation_answers(run.config, rows, tokenizer, positions=positions_of(model))
        run.report.reward = found | trainer.normalise(answers)
        run.save(trainer.engine, tokenizer, "reward", base=path)
    run.end("reward", reward=run.report.reward, calibration=run.report.calibration)


def train_dpo(run: Workspace) -> None:
    """In place of steps 2 and 3: from the SFT model to `dpo`."""
    config, metric = run.config.dpo, run.metric
    with run.step("dpo", "DPO"):
        path = config.model_path or run.from_step("sft", "dpo.model_path")
        tokenizer = load_tokenizer(path)
        model = load_causal_lm(path, tokenizer, dtype=run.dtype)
        add_adapters(model, run.config.model.lora)
        run.models_are_ready(parameter_count(model))
        data = data_of(run.config, config.data, "preferences")
        rows, heldout = training_rows(data, tokenizer, model, option="dpo.data")
        if metric is not None:  # what cannot be evaluated is said before training
            questions = heldout_prompts(run, config, tokenizer, model, option="dpo.data")
        trainer = DPOTrainer(model, tokenizer, config, seed=run.config.seed, engines=run.engines)
        run.report.dpo = _train(run, "dpo", trainer, rows, heldout)
        run.save(trainer.engine, tokenizer, "dpo", base=path)
    if metric is not None:
        with run.watch("evaluation"):
            sft = load_causal_lm(path, tokenizer, dtype=run.dtype)
            reference = run.engines.frozen(sft, role="reference")
            evaluate(run, trainer.engine, reference, Reward([metric]), tokenizer, questions, config)
    run.end("dpo", dpo=run.report.dpo)


def _train(
    run: Workspace,
    step: str,
    trainer: SFTTrainer | RewardTrainer | DPOTrainer,
    rows: Dataset,
    heldout: Dataset,
) -> dict[str, float]:
    with run.tracker(step) as tracker:
        found = trainer.train(
            rows,
            heldout=heldout,
            tracker=tracker,
            console=run.console,
            checkpoints=run.progress.checkpoints(step),
        )
        run.report.histories[step] = tracker.history
    return found
