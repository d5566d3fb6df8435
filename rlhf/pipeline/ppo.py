"""Step 3: PPO and the group methods."""

from __future__ import annotations

import dataclasses

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hybrid_engine import EngineConfig
from rlhf.data import RowBatches, load_tokenizer
from rlhf.models import add_adapters, load_causal_lm, parameter_count
from rlhf.pipeline.data import data_of, mixture, prompts
from rlhf.pipeline.evaluation import evaluate, heldout_prompts
from rlhf.pipeline.models import critic_path, load_critic_of, load_reward
from rlhf.pipeline.workspace import Workspace
from rlhf.tracking import ProgressBar
from rlhf.trainers import PPOTrainer, RLHFEngine


def train_ppo(run: Workspace) -> None:
    """From the SFT and the reward model to `actor`, `critic` and `actor_ema`; then measure.

    The step ends with the report: a run that is killed before it is resumed here.
    """
    config = run.config.ppo
    with run.step("ppo", "PPO"):
        path = config.actor_path or run.from_step("sft", "ppo.actor_path")
        tokenizer = load_tokenizer(path)
        engine = _load(run, path, tokenizer)
        rows = prompts(
            data_of(run.config, config.data, "prompts"), "train", tokenizer, engine.actor,
            engine.critic, option="ppo.data", max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
        heldout = heldout_prompts(
            run, config, tokenizer, engine.actor, engine.critic, option="ppo.data"
        )
        mixed = mixture(run.config, tokenizer, engine.actor) if config.ptx_coef else None
        trainer = PPOTrainer(engine, config, seed=run.config.seed, mixture=mixed)
        _iterate(run, trainer, rows)
        engine.rollout_engine.release()
        _save(run, trainer, path, tokenizer)
    with run.watch("evaluation"):
        evaluate(run, trainer.actor, trainer.reference, engine.reward, tokenizer, heldout, config)


def _load(run: Workspace, path: str, tokenizer: PreTrainedTokenizerBase) -> RLHFEngine:
    """The models, the same on every rank."""
    actor = load_causal_lm(path, tokenizer, dtype=run.dtype)
    parameters = parameter_count(actor)
    reward = load_reward(run, tokenizer)
    critic = load_critic_of(run, path, tokenizer)
    for trained in (actor, critic):
        if trained is not None:
            add_adapters(trained, run.config.model.lora)
    run.models_are_ready(parameters)
    rollout = EngineConfig(**dataclasses.asdict(run.config.rollout))
    return RLHFEngine(actor, critic, reward, tokenizer, engines=run.engines, engine_config=rollout)


def _iterate(run: Workspace, trainer: PPOTrainer, rows: Dataset) -> None:
    """The loop of PPO: experience on the next prompts, then learn from it."""
    config = run.config.ppo
    batches = RowBatches(len(rows), config.batch_size, whole=True, seed=run.config.seed)
    checkpoints = run.progress.checkpoints("ppo")
    done = checkpoints.begin(trainer.saved, {"trainer": trainer, "data": batches})
    with (
        run.tracker("ppo") as tracker,
        ProgressBar("PPO", config.iterations, run.console, done=done) as bar,
    ):
        tracker.rewind(done)
        for step in range(done + 1, config.iterations + 1):
            columns = rows[next(batches)]
            experience = trainer.generate_experience(columns.pop("input_ids"), columns)
            trainer.train_rlhf(experience)
            metrics = trainer.metrics
            tracker.log(step, metrics)
            bar.advance(
                tokens=int(experience.lengths.sum()),
                score=metrics["objective/scores"],
                kl=metrics["objective/kl"],
            )
            checkpoints.after(step, last=config.iterations)
        run.report.histories["ppo"] = tracker.history


def _save(
    run: Workspace, trainer: PPOTrainer, path: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    run.save(trainer.actor, tokenizer, "actor", base=path)
    if trainer.critic is not None:
        base = critic_path(run, path, tokenizer)
        run.save(trainer.critic, tokenizer, "critic", base=base)
    if trainer.average is not None:
        averages = trainer.average.weights()
        run.save(trainer.actor, tokenizer, "actor_ema", base=path, over=averages)
