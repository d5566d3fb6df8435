"""The steps as they run from the command line: folders in, folders and a report out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import STEPS, DataConfig, RunConfig
from rlhf.data import (
    DataBlend,
    Purpose,
    RowBatches,
    load_tokenizer,
    read_chat_template,
    shares_of,
    texts_of,
    train_tokenizer,
)
from rlhf.data.formats import last_content
from rlhf.evaluation import (
    RunReport,
    compare_with_hf_generate,
    evaluate_policy,
    write_report,
)
from rlhf.models import (
    add_adapters,
    build_causal_lm,
    load_causal_lm,
    load_critic,
    load_scorer,
    parameter_count,
    save_model,
    whole_model,
)
from rlhf.rewards import Reward, load_function
from rlhf.tracking import ProgressBar, Stopwatch, Tracker
from rlhf.trainers import PPOTrainer, RewardTrainer, RLHFEngine, SFTTrainer

NORMALISATION_ROWS = 512  # demonstrations on which the reward model is set to mean 0, std 1


class Pipeline:
    """One run: each step reads what it needs from disk and leaves its model in `output_dir`."""

    def __init__(self, config: RunConfig, console: Console | None = None) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.report = RunReport()
        self._console = console or Console()
        self._watch = Stopwatch()
        metric = config.evaluation.metric
        self._metric = load_function(metric, option="evaluation.metric") if metric else None
        self._dtype = getattr(torch, config.model.dtype)

    def run(self) -> RunReport:
        """All three steps, then the report."""
        self.sft()
        self.reward()
        self.ppo()
        return self.finish()

    def finish(self, name: str = "report") -> RunReport:
        """Write and print the report on the steps that were run."""
        self.report.seconds = self._watch.seconds
        write_report(self.report, self.folder, self._console, name=name)
        return self.report

    def sft(self) -> None:
        config = self.config.sft
        with self._watch("SFT"):
            self._seed()
            data = self._data(config.data, "demonstrations")
            model, tokenizer = self._first_model(data)
            self.report.parameters = parameter_count(model)
            trainer = SFTTrainer(model, tokenizer, config, seed=self.config.seed)
            with Tracker(self.folder, "sft") as tracker:
                rows = data.encoded("train", tokenizer)
                heldout = data.encoded("test", tokenizer)
                self.report.sft = trainer.train(
                    rows, tracker=tracker, console=self._console, heldout=heldout
                )
                self.report.histories["sft"] = tracker.history
            save_model(model, tokenizer, self.folder / "sft", base=self.config.model.path)

    def reward(self) -> None:
        config = self.config.reward
        with self._watch("reward model"):
            self._seed()
            path = config.model_path or self._from_step("sft", "reward.model_path")
            tokenizer = load_tokenizer(path)
            model = load_scorer(path, tokenizer, dtype=self._dtype)
            add_adapters(model, self.config.model.lora)
            self.report.parameters = parameter_count(model)
            data = self._data(config.data, "preferences")
            trainer = RewardTrainer(model, tokenizer, config, seed=self.config.seed)
            with Tracker(self.folder, "reward") as tracker:
                rows = data.encoded("train", tokenizer)
                heldout = data.encoded("test", tokenizer)
                self.report.reward = trainer.train(
                    rows, tracker=tracker, console=self._console, heldout=heldout
                )
                self.report.histories["reward"] = tracker.history
            demonstrations = self._data(self.config.sft.data, "demonstrations")
            sample = demonstrations.encoded("train", tokenizer)[:NORMALISATION_ROWS]
            self.report.reward |= trainer.normalise(sample["input_ids"])
            save_model(model, tokenizer, self.folder / "reward", base=path)

    def ppo(self) -> None:
        config = self.config.ppo
        actor_path = config.actor_path or self._from_step("sft", "ppo.actor_path")
        with self._watch("PPO"):
            self._seed()
            tokenizer = load_tokenizer(actor_path)
            actor = load_causal_lm(actor_path, tokenizer, dtype=self._dtype)
            self.report.parameters = parameter_count(actor)
            reward = self._reward(tokenizer)
            critic = self._critic(actor_path, tokenizer)
            for trained in (actor, critic):
                if trained is not None:
                    add_adapters(trained, self.config.model.lora)
            engine = RLHFEngine(actor, critic, reward, tokenizer)
            mixture = self._mixture(tokenizer) if config.ptx_coef else None
            trainer = PPOTrainer(engine, config, seed=self.config.seed, mixture=mixture)
            rows = self._data(config.data, "prompts").encoded("train", tokenizer)
            self._train_ppo(trainer, rows)
            engine.rollout_engine.release()
            save_model(actor, tokenizer, self.folder / "actor", base=actor_path)
            if critic is not None:
                critic_path = self._critic_path(actor_path)
                save_model(critic, tokenizer, self.folder / "critic", base=critic_path)
            if trainer.average is not None:
                with trainer.average.applied():
                    save_model(actor, tokenizer, self.folder / "actor_ema", base=actor_path)
        with self._watch("evaluation"):
            self._evaluate(actor, engine.reference, reward, tokenizer)

    def _reward_path(self) -> str | None:
        """Of the reward model; None where functions alone score."""
        config = self.config.ppo
        if config.reward_path is None and config.reward_functions:
            return None
        return config.reward_path or self._from_step("reward", "ppo.reward_path")

    def _reward(self, tokenizer: PreTrainedTokenizerBase) -> Reward:
        config, path = self.config.ppo, self._reward_path()
        model = None
        if path is not None:
            if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
                raise ValueError(
                    f"the reward model {path} and the actor have different tokenizers; train the "
                    "reward model from the same base model"
                )
            model = load_scorer(path, tokenizer, dtype=self._dtype)
        return Reward(
            [
                load_function(path, option="ppo.reward_functions")
                for path in config.reward_functions
            ],
            weights=config.reward_weights,
            model=model,
            model_weight=config.reward_model_weight if config.reward_functions else 1.0,
            overlap=config.reward_overlap,
        )

    def _critic(self, actor_path: str, tokenizer: PreTrainedTokenizerBase) -> nn.Module | None:
        if self.config.ppo.algorithm != "ppo":
            return None
        return load_critic(self._critic_path(actor_path), tokenizer, dtype=self._dtype)

    def _critic_path(self, actor_path: str) -> str:
        return self.config.ppo.critic_path or self._reward_path() or actor_path

    def _mixture(self, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        data = self.config.ppo.ptx_data or self.config.sft.data
        return self._data(data, "demonstrations").encoded("train", tokenizer)

    def _train_ppo(self, trainer: PPOTrainer, rows: Dataset) -> None:
        config = self.config.ppo
        batches = RowBatches(len(rows), config.batch_size, whole=True, seed=self.config.seed)
        with (
            Tracker(self.folder, "ppo") as tracker,
            ProgressBar("PPO", config.iterations, self._console) as bar,
        ):
            for step in range(1, config.iterations + 1):
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
            self.report.histories["ppo"] = tracker.history

    def _evaluate(
        self,
        actor: nn.Module,
        sft: nn.Module,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        ppo, evaluation = self.config.ppo, self.config.evaluation
        rows = self._data(ppo.data, "prompts").encoded("test", tokenizer)
        rows = rows.select(range(min(evaluation.prompts, len(rows))))
        options: dict[str, Any] = {"max_new_tokens": ppo.max_new_tokens, "metric": self._metric}
        with whole_model(sft) as policy:
            self.report.before = evaluate_policy(policy, sft, reward, tokenizer, rows, **options)
        self.report.after = evaluate_policy(actor, sft, reward, tokenizer, rows, **options)
        answers = zip(
            rows["prompt"], self.report.before.completions, self.report.after.completions,
            strict=True,
        )  # fmt: skip
        self.report.samples = [
            (last_content(prompt).strip(), before.strip(), after.strip())
            for prompt, before, after in list(answers)[: evaluation.samples]
        ]
        if evaluation.compare_hf_generate:
            prompts = list(rows["input_ids"])[: ppo.batch_size]
            self.report.throughput = compare_with_hf_generate(
                actor, tokenizer, prompts, max_new_tokens=ppo.max_new_tokens
            )

    # ---- what the steps share --------------------------------------------------------------------

    def _first_model(self, data: DataBlend) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        model = self.config.model
        if model.path is None and model.init is None:
            raise ValueError(
                "no model: give model.path, a folder or hub name, or model.init, a config for "
                "random weights"
            )
        tokenizer: PreTrainedTokenizerBase
        if source := model.tokenizer or model.path:
            tokenizer = load_tokenizer(
                source, chat_template=model.chat_template, eos_token=model.eos_token
            )
        else:
            texts = texts_of(row for part in data.parts("train") for row in part)
            template = model.chat_template and read_chat_template(model.chat_template)
            tokenizer = train_tokenizer(texts, vocab_size=model.vocab_size, chat_template=template)
        if model.init is not None:
            return build_causal_lm(model.init, tokenizer, dtype=self._dtype), tokenizer
        assert model.path is not None
        pretrained = load_causal_lm(model.path, tokenizer, dtype=self._dtype)
        return add_adapters(pretrained, model.lora), tokenizer

    def _data(self, section: DataConfig, purpose: Purpose) -> DataBlend:
        fractions = self.config.fractions
        share = shares_of(fractions)[STEPS.index(purpose)] if fractions else (0.0, 1.0)
        data = self.config.data_of(section)
        return DataBlend(data, purpose, share=share, seed=self.config.seed)

    def _from_step(self, step: str, option: str) -> str:
        folder = self.folder / step
        if not (folder / "config.json").exists():
            raise ValueError(
                f"no {step} model in {folder}: run `rlhf {step}` with this output_dir first, or "
                f"give --{option}"
            )
        return str(folder)

    def _seed(self) -> None:
        torch.manual_seed(self.config.seed)
        random.seed(self.config.seed)
